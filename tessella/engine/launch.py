"""Start the ranks: the same command on a CPU, one GPU, all GPUs, or several machines."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.utils.deterministic
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn

from tessella import dist
from tessella.data.sources import ImageSet
from tessella.data.sources.messages import not_read
from tessella.engine.ranks import adopt
from tessella.errors import UserError
from tessella.run.config import RunConfig


def launch(config: RunConfig) -> Fabric:
    """Start this run's ranks: one for each visible GPU, or those that torchrun or SLURM started.

    Several CPU ranks need torchrun.

    Raises:
        UserError: the device is not available.
    """
    device = pick_device(config.device).type
    place = adopt()
    launched = "RANK" in os.environ
    devices = place.local_world_size if launched else torch.cuda.device_count() if device == "cuda" else 1
    if config.nodes > 1 and not launched:
        raise UserError(
            f"nodes={config.nodes}, but this process was started alone, and would wait for the others forever: "
            f"start `torchrun --nnodes={config.nodes} --nproc-per-node=GPUS ... -m tessella pretrain ...` on each "
            "machine, or srun with one task for each GPU"
        )
    if devices > 1 and not launched:
        require_program(devices)
    _rendezvous_after_restart("nccl" if device == "cuda" else "gloo")
    several = DDPStrategy() if device == "cuda" else RepeatableDDP()
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Fabric recommends hardware that was deliberately not chosen
        fabric = Fabric(
            accelerator=device,
            devices=devices,
            num_nodes=config.nodes,
            strategy=several if devices * config.nodes > 1 else "auto",
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            plugins=TorchElasticEnvironment() if launched else LightningEnvironment(),
        )
        fabric.launch()
    return fabric


def join_ranks(device: str) -> torch.device:
    """This rank's device; also starts the process group of the ranks that torchrun or srun started, once."""
    on = pick_device(device)
    place = adopt()
    if place.world_size == 1 or dist.is_launched():
        return on
    if on.type == "cuda":
        on = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(on)
    backend = "nccl" if on.type == "cuda" else "gloo"
    _rendezvous_after_restart(backend)
    if not dist.is_launched():
        torch_dist.init_process_group(backend)
    # Not earlier: torch cannot start a second group under one torchrun, and another evaluation may follow.
    atexit.register(leave_ranks)
    return on


def leave_ranks() -> None:
    """End the process group, if there is one. This process cannot start another one."""
    if dist.is_launched():
        torch_dist.destroy_process_group()


def _rendezvous_after_restart(backend: str) -> None:
    """Start the process group of ranks that torchrun has restarted.

    torchrun's store still holds the addresses of the previous processes. A prefix keeps the new ones apart.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and "MASTER_PORT" in os.environ and not dist.is_launched():
        store, rank, world_size = next(torch_dist.rendezvous("env://"))
        torch_dist.init_process_group(
            backend, store=torch_dist.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=world_size
        )


def require_program(devices: int) -> None:
    """Refuse to start one process per GPU, `devices` of them, if there is no program that each could run.

    The processes are started with this one's command line; a notebook, a prompt and `python -c` have no such file.

    Raises:
        UserError: there is no program.
    """
    if getattr(sys.modules["__main__"], "__file__", None) is None or "ipykernel" in sys.modules:
        raise UserError(
            f"{devices} GPUs are visible, and a notebook or a prompt cannot start one process for each: put "
            "os.environ['CUDA_VISIBLE_DEVICES'] = '0' before the first import of torch to train on one, or start all "
            "from a terminal, with `tessella pretrain RECIPE --data DATA --out RUN` or "
            f"`torchrun --nproc-per-node={devices} SCRIPT.py`"
        )


def first_line(fabric: Fabric, config: RunConfig, images: ImageSet) -> str:
    """What a run trains on: recipe, device, precision, images, epochs and batch size."""
    device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else fabric.device.type
    ranks = f"{fabric.world_size} x " if fabric.world_size > 1 else ""
    precision = {"32-true": "float32", "bf16-mixed": "bf16 mixed precision"}[str(fabric.strategy.precision.precision)]
    left_out = f" ({len(images.unreadable):,} more cannot be read and are left out)" if images.unreadable else ""
    if images.passed_over:
        left_out += f" (not read: {not_read(images.passed_over)})"
    return (
        f"{config.recipe or config.method.name} on {ranks}{device}, {precision}: {len(images):,} images{left_out}, "
        f"{config.epochs} epochs, batches of {config.batch_size}"
    )


def pick_device(name: str) -> torch.device:
    """The device behind `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        UserError: torch does not see it, or the name is another one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={name}: use auto, cpu, cuda or mps")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device: use device=cpu, or install a CUDA build of torch")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but torch sees no Apple GPU: use device=cpu")
    return torch.device(name)


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On the CPU, use deterministic kernels, so that a resumed run equals an uninterrupted one.

    On GPUs they would cost speed; there a run is repeatable up to rounding.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # its property is invisible to type checkers
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every buffer
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filling


class RepeatableDDP(DDPStrategy):
    """DDP that adds each gradient separately.

    DDP adds gradients in buckets and changes their layout after the first step. With three or more ranks, the order of
    addition depends on a value's place in the bucket, so the first step after a resume would differ in the last bits.
    """

    def setup_module(self, module: nn.Module) -> nn.parallel.DistributedDataParallel:
        """Wrap the module."""
        ddp = super().setup_module(module)
        ddp.register_comm_hook(None, lambda _, bucket: _mean_of_each_gradient(bucket))
        return ddp


def _mean_of_each_gradient(bucket: torch_dist.GradBucket) -> torch.futures.Future[Tensor]:
    for gradient in bucket.gradients():  # views of the buffer
        torch_dist.all_reduce(gradient)
        gradient.div_(dist.world_size())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def cores_at_hand() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
