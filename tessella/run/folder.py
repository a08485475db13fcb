"""A run on disk: its files, who may write them, and how a run is saved and restored.

RUN/config.yaml           the whole configuration
RUN/environment.json      versions, host and the path of the images at the first start
RUN/metrics.jsonl         the log
RUN/checkpoints/step-N/   the last two checkpoints
RUN/backbone.safetensors  the trained backbone, when the run is complete
RUN/start.json            what was taken from the weights that the run started from, if it started from any
RUN/images.safetensors    names and sizes of the images, to name those that have changed
RUN/unreadable.txt        images that could not be used, with the reason
RUN/lock                  the process that writes here now
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import textwrap
import time
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessella import dist, files
from tessella.console import note
from tessella.data.sources import ImageSet, open_images
from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.methods import views_of
from tessella.methods.method import Method, Progress
from tessella.run import checkpoints as checkpoint_files
from tessella.run import images_seen, lock
from tessella.run.backbone_file import write_backbone
from tessella.run.config import RunConfig, from_dict, load_config, refuse_changes, to_dict, to_yaml
from tessella.run.log import LOG_BYTES, TENSORBOARD
from tessella.run.monitor import Monitor
from tessella.text import printable

_PACKAGES = (
    *("tessella", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "pycocotools", "Pillow", "simplejpeg"),
    *("numba", "lightning-fabric", "timm"),
)

_FRESH_SECONDS = 60  # after a checkpoint, in which the end of an epoch does not save another
_KEPT = 2  # checkpoints
_BEFORE_STEPS = {  # files of a run before its first step
    *(lock.NAME, "environment.json", "start.json", "checkpoints", "config.yaml", "metrics.jsonl", "tensorboard"),
}
_LIMIT = 1 << 20  # bytes of environment.json

Checkpoint = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]  # tensors and facts, as they were saved


class Start(NamedTuple):
    """What a run took from the weights that it started from."""

    source: str
    taken: list[str]  # parts of the method
    initialised: dict[str, str]  # part -> why it was not taken
    backbone_sha256: str = ""  # see `weights.resolve.weights_sha256`

    def write(self, run: Path) -> None:
        """Write start.json, if there was a source."""
        if self.source:
            files.write_json(run / "start.json", self._asdict())


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
        self._read: Checkpoint | None = None
        self._config_changed = False  # since the newest checkpoint
        self._contents: dict[str, str] = {}

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, RunConfig]:
        """An existing run and its configuration."""
        return cls(path), load_config(path / "config.yaml")

    def refuse_taken(self) -> None:
        """Refuse a folder in which a new run cannot begin, before anything slow. A run without a step may begin again.

        Raises:
            UserError: the folder holds something.
        """
        if self._holds_something():
            resume = f"`tessella resume {self.path}` continues the run in it, or " if self._has_begun() else ""
            raise UserError(f"{self.path} is not an empty folder: {resume}choose another --out")

    @contextlib.contextmanager
    def only_writer(self, enabled: bool) -> Iterator[None]:
        """Keep other runs out of the folder, make it if it is missing, and remove what killed writers have left.

        Args:
            enabled: False on all ranks but 0, which does the writing.

        Raises:
            UserError: another process writes there, or the folder cannot be written.
        """
        if not enabled:
            yield
            return
        files.make_folder(self.path)
        with lock.only_writer(self.path):
            files.remove_unfinished(self.path)
            for folder in (self.checkpoints, self.path / TENSORBOARD):
                files.refuse_link(folder)
            yield

    def begin(self, config: RunConfig, start: Start) -> None:
        """Write the files of a new run. config.yaml comes last: without it the folder is no run yet.

        Raises:
            UserError: the folder holds something, or cannot be written.
        """
        self.refuse_taken()
        files.make_folder(self.checkpoints)
        files.remove(self.metrics)
        places = {"data": _places(config.data, self.path)}
        files.write_json(self.path / "environment.json", environment() | places)
        start.write(self.path)
        files.write_text(self.path / "config.yaml", to_yaml(config))

    def _has_begun(self) -> bool:
        return (self.path / "config.yaml").exists()

    def _holds_something(self) -> bool:
        """Whether there is anything but the files of a run that ended before its first step."""
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            return True
        names = {entry.name for entry in self.path.iterdir() if not files.is_unfinished(entry)}
        ours = lock.NAME in names or self._has_begun()
        return bool(names - _BEFORE_STEPS if ours else names) or any(self.checkpoints.glob("*")) or self._has_steps()

    def _has_steps(self) -> bool:
        """Whether a step stands in the log."""
        if not self.metrics.exists():
            return False
        with files.open_regular(self.metrics, LOG_BYTES) as log:
            return any(b'"kind": "step"' in line for line in log)

    def refuse_other_config(self, saved: RunConfig, config: RunConfig, allowed: Collection[str]) -> None:
        """Compare the configuration with that of the newest checkpoint; the same on every rank.

        Args:
            saved: from config.yaml.
            config: of the resumed run.
            allowed: names of fields that may have other values than before; `prepare` then writes config.yaml.

        Raises:
            UserError: see `refuse_changes`.
        """
        self._read = self._newest()
        before = saved if self._read is None else from_dict(RunConfig, self._read[1].get("config"), "state.json")
        self._config_changed = bool(refuse_changes(before, config, allowed))

    def save_is_due(self, minutes: float, epoch_is_over: bool) -> bool:
        """Whether enough time has passed since the last save; at the end of an epoch a minute is enough."""
        seconds = time.monotonic() - self._saved_at
        return self._config_changed or seconds >= 60 * minutes or (epoch_is_over and seconds >= _FRESH_SECONDS)

    def prepare(self, config: RunConfig, images: ImageSet, state: State) -> None:
        """Before training: write a changed configuration, hash a few images, check the disk. For rank 0.

        Raises:
            UserError: the checkpoints will not fit on the disk.
        """
        self._contents = images_seen.content_samples(images)
        state.monitor.identical_images = len(self._contents) > 1 and len(set(self._contents.values())) == 1
        values = sum(p.nbytes for p in state.method.parameters())
        moments = 2 if isinstance(state.optimizer, torch.optim.AdamW) else 1  # of the optimiser, for each value
        checkpoint = sum(t.nbytes for t in state.method.state_dict().values()) + moments * values
        existing = len(list(self.checkpoints.glob("step-*")))
        files.refuse_full_disk(self.path, max(1, _KEPT + 1 - existing) * checkpoint)
        if self._config_changed:
            files.write_text(self.path / "config.yaml", to_yaml(config))

    def recorded_environment(self) -> dict[str, Any]:
        """The content of environment.json; empty if the file is missing or damaged."""
        try:
            content = files.read_json(self.path / "environment.json", _LIMIT)
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def open_images(self, config: RunConfig, *, download: bool) -> ImageSet:
        """The run's images: by their name, or at the path that they had, absolute or relative to the run folder.

        Args:
            config: of the run.
            download: whether a data set by name may be downloaded; False if only the run names it.

        Raises:
            UserError: they are in none of these places, or cannot be read there.
        """
        try:
            return open_images(config.data, download=download)
        except UserError as error:
            places = self.recorded_environment().get("data")
            known = places if isinstance(places, dict) and places.get("name") == config.data else {}
            for place in (str(known.get("absolute")), str(self.path / str(known.get("from_run")))):
                if known and _path_of(place):
                    return open_images(place, download=False)
            raise UserError(f"{error} If the images of {self.path} lie elsewhere now, name them with --data") from None

    def save(
        self, progress: Progress, config: RunConfig, images: ImageSet, state: State, skipped: dict[str, str]
    ) -> None:
        """Write a checkpoint and drop all but the last two. For rank 0; the others hold the same state.

        Raises:
            UserError: it cannot be written; the text says why, and where the state was written instead.
        """
        step = progress.step
        try:
            self._save(progress, config, images, state, skipped)
        except Exception as error:  # whatever it is: hours of training may depend on it
            if self._saved_step == step:
                raise
            place = checkpoint_files.save_elsewhere(step, *self._checkpoint(progress, config, images, state))
            where = f"was written to {place}: move that into {self.checkpoints}, then resume" if place else "is lost"
            raise UserError(f"{error or type(error).__name__}. The state of step {step} {where}") from error

    def _save(
        self, progress: Progress, config: RunConfig, images: ImageSet, state: State, skipped: dict[str, str]
    ) -> None:
        step = progress.step
        if not self._has_begun():
            raise UserError(
                f"{self.path} is no longer a run folder: config.yaml is missing, so nothing was saved at step {step}. "
                "Was the folder moved or deleted, or its disk unmounted? Put it back, then resume"
            )
        unreadable = dict(images.unreadable) | skipped
        if unreadable:
            self._write_unreadable(unreadable)
        if step != self._saved_step or self._config_changed:
            self._sync_log()
            checkpoint_files.save(self.checkpoints, step, *self._checkpoint(progress, config, images, state))
            self._saved_step = step
        # Also if the checkpoint is an earlier process's, which was killed before it came to this:
        checkpoint_files.prune(self.checkpoints, keep=_KEPT)
        images_seen.write_names(self.path, images)
        self._saved_at = time.monotonic()
        self._config_changed = False

    def _checkpoint(self, progress: Progress, config: RunConfig, images: ImageSet, state: State) -> Checkpoint:
        tensors = {
            "method": dict(state.method.state_dict()),
            "optimizer": optimizer_tensors(state.method, state.optimizer),
            "monitor": dict(state.monitor.state_dict()),
        }
        facts = {
            "step": progress.step,
            "steps_per_epoch": progress.steps_per_epoch,
            "config": to_dict(config),
            "fingerprints": {"data": images.fingerprint},
            "contents": self._contents,
        }
        return tensors, facts

    def refuse_other_images(self, config: RunConfig, images: ImageSet) -> None:
        """Compare the images with those that the run was trained on.

        Raises:
            UserError: images were added, removed or encoded again; the text names some.
        """
        self._read = self._read or self._newest()
        if self._read is None:
            return
        facts = self._read[1]
        with _foreign_refused():
            before = facts["fingerprints"]["data"]
            contents = images_seen.changed_contents(images, facts.get("contents", {}))
        if before != images.fingerprint or contents:
            raise UserError(
                f"the images of {config.data} have changed since the run was saved: "
                f"{images_seen.changes(self.path, images, before, contents)}. Put the images back, or start a new run "
                f"from this one's weights (`tessella pretrain RECIPE --init-from {self.path} ...`)"
            )

    def restore(self, state: State, steps_per_epoch: int) -> int:
        """Load the newest valid checkpoint into the parts of a run.

        Args:
            state: freshly built; filled.
            steps_per_epoch: of the run; the checkpoint must have the same.

        Returns:
            The number of complete steps, 0 without a checkpoint.

        Raises:
            UserError: the checkpoint is not one of this run.
        """
        checkpoint, self._read = self._read or self._newest(), None
        if checkpoint is None:
            return 0
        tensors, facts = checkpoint
        with _foreign_refused():
            step = facts["step"]
            if type(step) is not int or facts["steps_per_epoch"] != steps_per_epoch:
                raise ValueError(f"step {step}, and {facts['steps_per_epoch']} steps per epoch, not {steps_per_epoch}")
            if not 0 <= step <= steps_per_epoch * facts["config"]["epochs"]:
                raise ValueError(f"step {step} of {facts['config']['epochs']} epochs of {steps_per_epoch} steps")
            for module, saved in ((state.method, tensors["method"]), (state.monitor, tensors["monitor"])):
                _refuse_other_types(module.state_dict(), saved)
                module.load_state_dict(saved, strict=True)
            load_optimizer_tensors(state.method, state.optimizer, tensors["optimizer"], step)
        self._saved_step = step
        return step

    def _newest(self) -> Checkpoint | None:
        """The newest valid checkpoint. Rank 0 chooses it for all ranks.

        Raises:
            UserError: there are checkpoints, but none can be used; or this rank cannot read rank 0's choice.
        """
        damage: list[str] = []
        chosen = checkpoint_files.load_newest(self.checkpoints, damage.append) if dist.rank() == 0 else None
        for text in damage if chosen else []:
            note(f"warning: {text}; an earlier checkpoint is used")
        name, damage = dist.broadcast_object((chosen and chosen[0].name, damage))
        if name is None and damage:
            raise UserError(
                f"no checkpoint in {self.checkpoints} can be used: {'; '.join(damage)}. Restore one from a copy, or "
                "remove that folder to start the run from its beginning"
            )
        if name is None or chosen is not None:
            return chosen and chosen[1:]
        try:
            return checkpoint_files.load(self.checkpoints / name)
        except checkpoint_files.Damaged as error:
            raise UserError(
                f"rank {dist.rank()} cannot read the checkpoint that rank 0 has chosen: {error}. All machines of a run "
                "need one shared folder"
            ) from None

    def _sync_log(self) -> None:
        """Sync the log before a checkpoint: a resumed run would not write lines again that a power cut took."""
        if self.metrics.exists():
            with files.open_regular(self.metrics) as log:
                os.fsync(log.fileno())

    def write_backbone(self, method: Method, config: RunConfig, steps: int) -> None:
        """The product of a complete run: the backbone alone.

        Raises:
            UserError: it cannot be written.
        """
        origin: dict[str, Any] = {name: getattr(config, name) for name in ("recipe", "epochs", "seed")}
        origin |= {"method": config.method.name, "steps": steps, "tessella": versions()["tessella"]}
        write_backbone(
            self.backbone, dict(method.backbone.state_dict()), config.backbone, eval_transform(config), origin
        )

    def _write_unreadable(self, unreadable: dict[str, str]) -> None:
        """List images that could not be used: a line for each, with name and reason escaped."""
        lines = (f"{printable(key)}\t{printable(reason)}\n" for key, reason in sorted(unreadable.items()))
        files.write_text(self.path / "unreadable.txt", "".join(lines))


def eval_transform(config: RunConfig) -> EvalTransform:
    """The transform of images for a run's backbone when it is evaluated."""
    spec = views_of(config.method)
    return EvalTransform.of(config.image_size, mean=spec.mean, std=spec.std)


def optimizer_tensors(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, named by parameter: `layer1.0.conv1.weight/momentum_buffer`."""
    tensors = {}
    for name, parameter in method.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


@contextlib.contextmanager
def _foreign_refused() -> Iterator[None]:
    """Refuse a checkpoint of another run. Its hashes only prove that it is unchanged since somebody wrote it."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise UserError(
            f"the newest checkpoint cannot be one of this run ({type(error).__name__}: {reason}): remove it to resume "
            "from the one before it, or restore the run from a copy"
        ) from None


def _refuse_other_types(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Refuse tensors of other types: loading would convert them, and lose digits."""
    for name in ours.keys() & theirs.keys():
        if ours[name].dtype != theirs[name].dtype:
            raise ValueError(f"{name} is of {theirs[name].dtype}, not {ours[name].dtype}")


def load_optimizer_tensors(
    method: Method, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], steps: int
) -> None:
    """The inverse of `optimizer_tensors`.

    Args:
        method: its parameters are those that the optimiser updates.
        optimizer: freshly built; filled.
        tensors: from `optimizer_tensors`.
        steps: updates that the run has made.

    Raises:
        KeyError, ValueError: a tensor fits no parameter, or another of the same parameter is missing.
    """
    parameters = dict(method.named_parameters())
    keys = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.AdamW) else {"momentum_buffer"}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        expected = () if key == "step" else parameter.shape  # copying would stretch another one
        if not all(f"{name}/{other}" in tensors for other in keys) or key not in keys:
            raise ValueError(f"optimizer tensor {full_name} is not one of {', '.join(sorted(keys))}, which go together")
        if (
            value.shape != expected
            or not value.is_floating_point()
            or (key != "step" and value.dtype != parameter.dtype)
        ):
            raise ValueError(f"optimizer tensor {full_name} has shape {tuple(value.shape)} and type {value.dtype}")
        if key == "step" and not 0 < float(value) <= steps:
            raise ValueError(f"optimizer tensor {full_name} is {float(value)} after {steps} steps")
        # AdamW keeps its step count on the CPU; everything else lives beside its parameter, in the same layout.
        state = value if key == "step" else torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = state


def _path_of(data: str) -> str:
    """The file or folder at the start of a data set's name; empty if there is none."""
    bases = (data, data.rpartition("::")[0])
    return next((base for base in bases if base and Path(base).expanduser().exists()), "")


def _places(data: str, run: Path) -> dict[str, str]:
    """Further names of a data set that is a file or folder; none for others, such as cifar10."""
    base = _path_of(data)
    if not base:
        return {}
    absolute, part = Path(base).expanduser().absolute(), data.removeprefix(base)
    return {"name": data, "absolute": f"{absolute}{part}", "from_run": os.path.relpath(absolute, run.absolute()) + part}


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
    installed: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed
