"""A run: what it leaves behind, that it goes on exactly, that ranks do not change it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tessella.data.batch import Batch
from tessella.data.loader import Loader
from tessella.data.sampler import EpochSampler
from tessella.data.sources import open_images
from tessella.data.views import CropGroup, ViewSpec
from tessella.engine import memory
from tessella.engine.build import build_state
from tessella.engine.interrupt import EXIT_INTERRUPTED, Interrupted, StopRequest
from tessella.engine.pretrain import pretrain, resume
from tessella.errors import UserError
from tessella.machine import machine_bytes
from tessella.methods.method import MethodOutput, Progress
from tessella.methods.swav import Swav, SwavConfig
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig
from tessella.run.config import load_config, to_yaml
from tessella.run.folder import RunFolder
from tessella.weights.resolve import resolve_backbone
from tests.engine.runs import assert_same, final_state, tiny_run

_LARGE_CROPS = SwavConfig(prototypes=20, views=ViewSpec((CropGroup(2, 512, (0.3, 1.0)),)))
METHODS = ["swav", "jigclu", "mejigclu", "smog"]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """What is only repeatable on one thread is not repeatable."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def log_without_timing(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumed_in_mid_epoch_equals_a_straight_one_bit_for_bit(method: str, tmp_path: Path):
    straight = pretrain(tiny_run(method), tmp_path / "straight")
    sliced = pretrain(tiny_run(method, max_steps=3), tmp_path / "sliced")
    assert int(final_state(sliced)["step"]) == 3  # of five in the first epoch
    resume(sliced, {"max_steps": 4})
    resume(sliced, {"max_steps": None})
    assert_same(final_state(straight), final_state(sliced))
    # A slice's own last step is logged too; the straight run's lines are all there, equal.
    sliced_log = log_without_timing(sliced)
    assert all(line in sliced_log for line in log_without_timing(straight) if line["step"] % 5)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_a_function_of_its_seed(method: str, tmp_path: Path):
    one, same, other = (
        final_state(pretrain(tiny_run(method, seed=seed, max_steps=2), tmp_path / str(i)))
        for i, seed in enumerate((0, 0, 1))
    )
    assert_same(one, same)
    assert not torch.equal(one["method.backbone.conv1.weight"], other["method.backbone.conv1.weight"])


def test_the_number_of_decoding_threads_changes_nothing(tmp_path: Path):
    states = [final_state(pretrain(tiny_run(workers=w, max_steps=2), tmp_path / str(w))) for w in (1, 3)]
    assert_same(*states)


def test_an_update_is_the_mean_gradient_of_its_micro_batches(tmp_path: Path):
    """One plain SGD step of lr 1 moves the weights by minus the gradient; each half-batch is a batch of its own."""
    plain = OptimizerConfig("sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    config = tiny_run("jigclu", accumulate=2, max_steps=1, optimizer=plain)
    moved = final_state(pretrain(config, tmp_path / "run"))["method.location_head.weight"]

    images = open_images(config.data)
    state = build_state(config, images, torch.device("cpu"))
    start = state.method.location_head.weight.detach().clone()
    loader = Loader(
        images, state.method.view_spec(config.method), EpochSampler(len(images), 64, seed=0),
        seed=0, device="cpu", workers=1, accumulate=2,
    )  # fmt: skip
    gradients = []
    for batch in next(loader.epoch(0)):
        state.method(batch, Progress(0, 5, 2)).loss.backward()
        gradients.append(state.method.location_head.weight.grad.clone())
        state.method.zero_grad()
    torch.testing.assert_close(start - moved, (gradients[0] + gradients[1]) / 2, atol=1e-6, rtol=1e-4)

    with pytest.raises(UserError, match="cannot be shared equally"):
        pretrain(tiny_run("jigclu", accumulate=3), tmp_path / "odd")


def test_the_product_is_the_trained_backbone(tmp_path: Path):
    run = pretrain(tiny_run(max_steps=2), tmp_path / "run")
    loaded = resolve_backbone(str(run))
    assert loaded.transform.size == 16 and loaded.method is not None and loaded.method.clusters == 20
    state = final_state(run)
    for name, tensor in loaded.backbone.state_dict().items():
        assert torch.equal(tensor, state[f"method.backbone.{name}"])


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not an empty folder"):
        pretrain(tiny_run(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def _interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 4096, "method": _LARGE_CROPS}, "batch_size=4096 does not fit a data set of 360 images"),
        ({"batch_size": 64, "accumulate": 3}, "cannot be shared equally"),
        ({"backbone": BackboneConfig("resnet10", 2000, "small")}, r"too little memory.* has 2\.0 GiB\. The largest"),
        (
            {"batch_size": 360, "method": _LARGE_CROPS},
            r"too little memory.*new run.*--batch-size \d+ is a smaller",
        ),
    ],
)
def test_a_run_that_cannot_go_on_leaves_nothing_behind(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 2 << 30)
    with pytest.raises(UserError, match=said):
        pretrain(dataclasses.replace(tiny_run(), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_memory_of_this_machine_is_known():
    assert (machine_bytes() or 0) > 256 << 20


def test_a_run_that_ended_before_its_first_step_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Loader, "epoch", _interrupted)
        pretrain(tiny_run(seed=1), tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").exists()
    run = pretrain(tiny_run(max_steps=2), tmp_path / "run")
    assert load_config(run / "config.yaml").seed == 0 and (run / "backbone.safetensors").exists()

    shutil.rmtree(run / "checkpoints")  # a step in the log alone is a step
    with pytest.raises(UserError, match="tessella resume"):
        pretrain(tiny_run(), run)


def test_images_are_found_from_another_folder_and_after_run_and_images_moved_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home = tmp_path / "home"
    photos(home / "photos", 64)
    monkeypatch.chdir(home)
    run = pretrain(tiny_run(data="photos", max_steps=1), home / "run")
    monkeypatch.chdir(tmp_path)
    resume(run, {"max_steps": 2})
    home.rename(tmp_path / "moved")
    resume(tmp_path / "moved" / "run", {"max_steps": 3})
    (tmp_path / "moved" / "photos").rename(tmp_path / "lost")
    with pytest.raises(UserError, match=r"photos does not exist.* name them with --data"):
        resume(tmp_path / "moved" / "run", {"max_steps": 4})
    resume(tmp_path / "moved" / "run", {"max_steps": 4, "data": str(tmp_path / "lost")})


def test_a_run_on_copies_of_one_image_knows_it(tmp_path: Path):
    photos(tmp_path / "photos", 64, same=True)
    run = RunFolder(tmp_path)
    config = tiny_run(data=str(tmp_path / "photos"))
    images = open_images(config.data)
    state = build_state(config, images, torch.device("cpu"))
    run.prepare(config, images, state)
    assert state.monitor.identical_images
    images = open_images("digits::test")
    run.prepare(config, images, state)
    assert not state.monitor.identical_images


def photos(folder: Path, count: int, same: bool = False) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(0 if same else number).integers(0, 255, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")


def test_resume_refuses_what_would_change_the_result_and_other_images(tmp_path: Path):
    run = pretrain(tiny_run(max_steps=1), tmp_path / "run")
    with pytest.raises(UserError, match="seed would change"):
        resume(run, {"seed": 3})
    with pytest.raises(UserError, match="images of digits::train have changed"):
        resume(run, {"data": "digits::train"})
    with pytest.raises(UserError, match="not a run folder"):
        resume(tmp_path)


def test_resume_refuses_another_number_of_categories(tmp_path: Path):
    run = pretrain(tiny_run("mejigclu", max_steps=1), tmp_path / "run")
    fewer = tiny_run("mejigclu", batch_size=32)
    state = build_state(fewer, open_images(fewer.data), torch.device("cpu"))
    with pytest.raises(UserError, match=r"into 64 parts .* into 32 .*continue with the same images"):
        RunFolder(run).restore(state, 5)


def test_an_evaluation_reads_a_run_with_a_partition(tmp_path: Path):
    run = pretrain(tiny_run("mejigclu", max_steps=1, accumulate=2), tmp_path / "run")
    method = resolve_backbone(str(run)).method
    assert method is not None and method.categories == 64


def test_a_stop_request_saves_and_the_run_goes_on_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    straight = pretrain(tiny_run(), tmp_path / "straight")
    monkeypatch.setattr(StopRequest, "seen_by_any_rank", lambda self, step, device: step == 3)
    with pytest.raises(Interrupted, match="step 3 of 10"):
        pretrain(tiny_run(), tmp_path / "stopped")
    monkeypatch.undo()
    monkeypatch.setenv("TESSELLA_CACHE", str(tmp_path / "cache"))
    assert_same(final_state(straight), final_state(resume(tmp_path / "stopped")))


def test_a_stop_request_during_the_first_look_is_heard_and_the_run_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    straight = pretrain(tiny_run("smog", max_steps=1), tmp_path / "straight")
    monkeypatch.setattr(StopRequest, "seen_by_any_rank", lambda self, step, device: step == 2)
    with pytest.raises(Interrupted, match="before the first step"):
        pretrain(tiny_run("smog", max_steps=1), tmp_path / "stopped")
    monkeypatch.undo()
    monkeypatch.setenv("TESSELLA_CACHE", str(tmp_path / "cache"))
    assert_same(final_state(straight), final_state(resume(tmp_path / "stopped")))


SCRIPT = """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(2 // int(os.environ.get("WORLD_SIZE", 1)))
from tessella.run.config import load_config
from tessella.data.views import CropGroup, ViewSpec
from tessella.engine import memory
from tessella.engine.interrupt import EXIT_INTERRUPTED, Interrupted
from tessella.engine.build import build_state
from tessella.engine.pretrain import pretrain, resume
out = Path(sys.argv[2])
try:
    resume(out) if (out / "config.yaml").exists() else pretrain(load_config(Path(sys.argv[1])), out)
except Interrupted:
    sys.exit(EXIT_INTERRUPTED)
"""


def start(config: Path, out: Path, *launcher: str) -> subprocess.Popen[bytes]:
    script = config.with_name("script.py")
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "2"}
    command = [*(launcher or (sys.executable,)), str(script), str(config), str(out)]
    with out.with_suffix(".stderr").open("wb") as said:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any((run / "checkpoints").glob(f"step-*{step:04d}*")):
            return
        time.sleep(0.02)
    pytest.fail(f"no checkpoint of step {step}: exit code {process.poll()}")


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, EXIT_INTERRUPTED)])
def test_a_killed_process_resumes_to_identical_weights(how: signal.Signals, code: int, tmp_path: Path):
    config = tiny_run(epochs=4, checkpoint_minutes=1e-9)  # a checkpoint after every step
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    straight = pretrain(config, tmp_path / "straight")
    process = start(tmp_path / "config.yaml", tmp_path / "killed")
    wait_for_step(process, tmp_path / "killed", 4)
    process.send_signal(how)
    assert process.wait(60) == code
    assert_same(final_state(straight), final_state(resume(tmp_path / "killed")))


def test_two_ranks_of_torchrun_train_as_one_and_one_rank_goes_on_for_two(tmp_path: Path):
    config = tiny_run(max_steps=2)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    code = start(tmp_path / "config.yaml", tmp_path / "two", *torchrun).wait(200)
    assert code == 0, (tmp_path / "two.stderr").read_text()
    pretrain(config, tmp_path / "one")
    for _ in range(2):
        one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=1e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}")
        for name in ("one", "two"):
            resume(tmp_path / name, {"max_steps": 3})


def test_the_log_of_an_accumulated_update_covers_all_of_its_micro_batches(tmp_path: Path, monkeypatch: Any):
    """Loss and metrics are means over the micro-batches, and each of their images is counted in its cluster."""
    losses: list[float] = []
    forward = Swav.forward

    def noted(method: Swav, batch: Batch, progress: Progress) -> MethodOutput:
        output = forward(method, batch, progress)
        losses.append(output.loss.item())
        return output

    monkeypatch.setattr(Swav, "forward", noted)
    run = pretrain(tiny_run(accumulate=2, max_steps=1, log_every=1), tmp_path / "run")
    assert len(losses) == 2 and losses[0] != losses[1]
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert logged["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert final_state(run)["monitor.assigned"].sum() == 64
