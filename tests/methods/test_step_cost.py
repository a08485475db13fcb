"""A training step beyond its arithmetic: nothing waits for the device, and few operators are launched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tessella.data.batch import Batch
from tessella.methods.method import Method, Progress
from tessella.optim import OptimizerConfig, build_optimizer
from tessella.run.monitor import Monitor
from tests.methods.test_coke import MULTI, ONE, TWO, coke
from tests.methods.tiny import BATCH, jigclu, mejigclu, random_batch, smog, swav

# Operators whose result, or whose result's size, the host must know: on a GPU it waits for them. `lift_fresh` is a
# tensor made of Python numbers, which is copied to the device from memory that is not pinned.
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "lift_fresh",
}  # fmt: skip
CASES: dict[str, Callable[[], Method]] = {
    "swav with queue": lambda: swav(queue_length=2 * BATCH, queue_from_epoch=0),
    "swav with heads and hard codes": lambda: swav(prototypes=(12, 5), codes="hard"),
    "jigclu": jigclu,
    "mejigclu": mejigclu,
    "smog": lambda: smog(group_sets=2),
    "smog as in the paper's text": lambda: smog(group_grad="through_update", max_gradient_norm=3.0),
    "coke, one view": lambda: coke(ONE),
    "coke, two views": lambda: coke(TWO),
    "coke, multi-crop": lambda: coke(MULTI),
}


class Operators(TorchDispatchMode):
    """Every operator that reaches the device, and those that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.all[name] += 1
        if name in WAITS or (name in ("index", "index_put", "index_put_") and any(map(_is_mask, args[1]))):
            self.waits[name] += 1
        return func(*args, **kwargs or {})


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class Training:
    """What `engine.pretrain` does in a step, with the optimiser that asks for most."""

    def __init__(self, method: Method, device: str = "cpu") -> None:
        self.method = method.to(device)
        self.optimizer = build_optimizer(method, OptimizerConfig("larc", lr=0.01))
        self.monitor = Monitor(method.collapse_loss(), method.clusters, method.config.embedding_dim).to(device)
        self.progress = Progress(0, 4, 10)
        batch = random_batch(method)
        self.batch = Batch(tuple(views.to(device) for views in batch.views), batch.instances.to(device))
        method.epoch_start(self.progress)

    def step(self) -> None:
        result = self.method(self.batch, self.progress)
        result.loss.backward()
        self.method.before_update(self.progress)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_update(self.progress)
        self.monitor.observe(result)
        self.progress = self.progress.next()


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_nothing_back_from_the_device(name: str):
    training = Training(CASES[name]())
    training.step()
    training.step()  # the queue is full, buffers of the optimiser are there
    with Operators() as seen:
        training.step()
    assert sum(seen.all.values()) > 100, "the step was not seen"
    if name in ("jigclu", "mejigclu"):
        del seen.waits["lift_fresh"]  # where tiles go is found out on the host, and sent without waiting
    assert not seen.waits


def test_the_count_sees_a_wait():
    x = torch.arange(3.0)
    with Operators() as seen:
        x.sum().item()
        x[x > 1]
        x.new_tensor([1.0])
    assert set(seen.waits) == {"_local_scalar_dense", "index", "lift_fresh"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_a_gpu_waits_for_nothing(name: str):
    training = Training(CASES[name](), "cuda")
    training.step()
    training.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_gradients_of_all_tensors_are_scaled_in_lists():
    training = Training(swav())
    training.method(training.batch, training.progress).loss.backward()
    params = [p for p in training.method.parameters() if p.grad is not None]
    with Operators() as seen:
        training.optimizer._scale_gradients(params, 1e-4)  # type: ignore[attr-defined]
    one_by_one = sum(seen.all[name + end] for name in ("mul", "add", "div", "linalg_vector_norm") for end in ("", "_"))
    assert seen.all["_foreach_norm"] == 2 and one_by_one < 10 < len(params)


@pytest.mark.parametrize("name", ["swav with queue", "jigclu", "mejigclu", "coke, multi-crop"])
def test_a_compiled_backbone_is_one_graph_per_crop_size_whichever_way_the_method_calls_it(name: str):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    method = CASES[name]()
    batch, progress = random_batch(method), Progress(0, 4, 10)
    expected = CASES[name]()(batch, progress).loss
    method.backbone.compile(backend=backend, fullgraph=True, dynamic=False)
    torch.testing.assert_close(method(batch, progress).loss, expected)
    method(batch, progress.next())
    assert len(graphs) == len({views.shape[-1] for views in batch.views}), "broken, recompiled or not compiled"
    torch._dynamo.reset()
