"""A run on disk: what is where, who may write it, and how a run comes back from it.

RUN/config.yaml           the whole configuration
RUN/environment.json      versions, host, data fingerprint of the first start
RUN/metrics.jsonl         the log
RUN/checkpoints/step-N/   the last two checkpoints
RUN/backbone.safetensors  the trained backbone, when the run is complete
RUN/start.json            what was taken from the weights that the run started from, if it started from any
RUN/unreadable.txt        images that could not be used, with the reason
"""

from __future__ import annotations

import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessella.data.sources import ImageSet
from tessella.engine import checkpoint_files
from tessella.engine.config import RunConfig, load_config, to_dict, to_yaml
from tessella.engine.monitor import Monitor
from tessella.errors import UserError
from tessella.methods.method import Method, Progress
from tessella.modules.memory import follow_images, tables_of
from tessella.text import printable

_PACKAGES = (
    *("tessella", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "pycocotools", "Pillow", "simplejpeg"),
    *("numba", "lightning-fabric", "timm"),
)

_FRESH_SECONDS = 60  # short epochs do not each pay for a checkpoint


class State(NamedTuple):
    """What a checkpoint holds, besides the number of steps."""

    method: Method
    optimizer: torch.optim.Optimizer
    monitor: Monitor


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.backbone = path / "backbone.safetensors"
        self._saved_step, self._saved_at = -1, time.monotonic()

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunFolder:
        """A new run in an empty or missing folder.

        Raises:
            UserError: the folder holds something, or cannot be made.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            resume = f"`tessella resume {path}` goes on with it" if (path / "config.yaml").exists() else "empty it"
            raise UserError(f"{path} is not an empty folder: {resume}, or choose another --out")
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            checkpoint_files.write_text_atomic(path / "config.yaml", to_yaml(config))
            checkpoint_files.write_json_atomic(path / "environment.json", environment())
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}; choose another --out") from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, RunConfig]:
        """An existing run and its configuration."""
        return cls(path), load_config(path / "config.yaml")

    def save_is_due(self, minutes: float, epoch_is_over: bool) -> bool:
        """Whether enough time has passed since the last save. An epoch's end is a good moment, if that is not fresh."""
        seconds = time.monotonic() - self._saved_at
        return seconds >= 60 * minutes or (epoch_is_over and seconds >= _FRESH_SECONDS)

    def save(
        self, progress: Progress, config: RunConfig, images: ImageSet, state: State, skipped: dict[str, str]
    ) -> None:
        """Write a checkpoint and drop all but the last two. For rank 0; the others hold the same state."""
        step = progress.step
        unreadable = dict(images.unreadable) | skipped
        if unreadable:
            self._write_unreadable(unreadable)
        if step != self._saved_step:
            tensors = {
                "method": dict(state.method.state_dict()),
                "optimizer": optimizer_tensors(state.method, state.optimizer),
                "monitor": dict(state.monitor.state_dict()),
            }
            if tables_of(state.method):  # whose rows are whose, should the data set change
                tensors["images"] = {"ids": _ids(images)}
            facts = {
                "step": step,
                "steps_per_epoch": progress.steps_per_epoch,
                "config": to_dict(config),
                "fingerprints": {"data": images.fingerprint},
            }
            checkpoint_files.save(self.checkpoints, step, tensors, facts)
            checkpoint_files.prune(self.checkpoints, keep=2)
        self._saved_step, self._saved_at = step, time.monotonic()

    def restore(
        self, config: RunConfig, images: ImageSet, state: State, steps_per_epoch: int, images_changed: bool = False
    ) -> int:
        """Load the newest valid checkpoint into the parts of a run; the number of steps done, 0 without one.

        Args:
            config: of the run.
            images: the data set.
            state: freshly built; filled.
            steps_per_epoch: with these images.
            images_changed: whether the images may be others than before. Each image's row of a table then goes where
                the image is now, and the epoch that was under way starts again.

        Raises:
            UserError: the images are not those that the run was trained on.
        """
        newest = checkpoint_files.newest(self.checkpoints, on_damage=_warn)
        if newest is None:
            return 0
        tensors, facts = checkpoint_files.load(newest)
        others = facts["fingerprints"]["data"] != images.fingerprint
        if others and not images_changed:
            raise UserError(
                f"the images of {config.data} have changed since the run was saved: an image was added, removed or "
                "re-encoded. Put the data back, go on with the changed images (--images-changed: from the start of the "
                "epoch that was under way), or start a new run"
            )
        if others and tables_of(state.method):
            follow_images(state.method, tensors["method"], tensors["images"]["ids"], _ids(images))
        state.method.load_state_dict(tensors["method"], strict=True)
        load_optimizer_tensors(state.method, state.optimizer, tensors["optimizer"])
        state.monitor.load_state_dict(tensors["monitor"])
        if others:
            return int(facts["step"]) // int(facts["steps_per_epoch"]) * steps_per_epoch
        self._saved_step = int(facts["step"])
        return self._saved_step

    def write_backbone(self, method: Method) -> None:
        """The product of a complete run: the backbone alone."""
        checkpoint_files.write_tensors_atomic(self.backbone, dict(method.backbone.state_dict()))

    def _write_unreadable(self, unreadable: dict[str, str]) -> None:
        """List images that could not be used. Names are written on one line, escaped where needed."""
        lines = (f"{printable(key)}\t{printable(reason)}\n" for key, reason in sorted(unreadable.items()))
        checkpoint_files.write_text_atomic(self.path / "unreadable.txt", "".join(lines))


def _ids(images: ImageSet) -> Tensor:
    """(N,) int64 stable ids, in the order of rows."""
    return torch.from_numpy(np.array(images.ids))


def optimizer_tensors(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, named by parameter: `layer1.0.conv1.weight/momentum_buffer`."""
    tensors = {}
    for name, parameter in method.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def load_optimizer_tensors(method: Method, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(method.named_parameters())
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        # AdamW keeps its step count on the CPU; everything else lives beside its parameter, in the same layout.
        state = value if value.dim() == 0 else torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = state


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions() -> dict[str, str | None]:
    """Installed versions of what a result depends on; None for what runs from a source tree."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _warn(text: str) -> None:
    print(printable(f"warning: {text}"), file=sys.stderr)
