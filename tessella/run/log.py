"""The log of a run: `metrics.jsonl`, TensorBoard if it is installed, and the console.

Each line of `metrics.jsonl` is one JSON object:

    {"kind": "step", "step": 20, "epoch": 0, "loss": 5.1, "lr": 0.6, ..., "timing": {"seconds": 3.1, ...}}
    {"kind": "epoch" | "alarm" | "event", "step": 20, "epoch": 0, ...}

`step` counts complete updates. Everything that depends on the clock is under `timing`: without it, the lines of a
resumed run equal those of an uninterrupted one. JSON has no NaN: such values are null, and their names are listed
under `nonfinite`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import secrets
import sys
import time
import warnings
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tessella import files
from tessella.console import Display, LossyStream
from tessella.errors import UserError
from tessella.files import explain_write_error
from tessella.methods.method import Progress
from tessella.run.monitor import Alarm

if TYPE_CHECKING:
    from rich.console import Console

TENSORBOARD = "tensorboard"  # name of the folder

LOG_BYTES = 1 << 30  # limit of metrics.jsonl


class RunLog:
    """The log of one run. `enabled` is False on all ranks but 0: there every call does nothing."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        images_per_step: int,
        resume_step: int = 0,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        """Open the log.

        Args:
            folder: of the run; must exist. `metrics.jsonl` is continued if it is there.
            total_steps: updates of the whole run.
            images_per_step: over all ranks.
            resume_step: updates complete at the start. Lines of later steps are dropped: the run writes them again.
            enabled: whether this process writes.
            console: default: standard output.

        Raises:
            UserError: the disk is full.
        """
        self.enabled = enabled
        if not enabled:
            return
        self._folder = folder
        self._images_per_step = images_per_step
        self._step = resume_step
        self._epoch: int | None = None
        self._started = self._last_time = time.monotonic()
        self._last_step, self._waited = resume_step, 0.0
        self._open(resume_step)
        self._display = Display("step", total_steps, done=resume_step, console=console or _stdout(), keep=True)
        if resume_step:
            self._display.say(
                f"the run continues from step {resume_step:,} of {total_steps:,}"
                if resume_step < total_steps
                else f"the run is complete, after {resume_step:,} steps; nothing is left to train. To train "
                "longer: --epochs N --allow epochs, or --max-steps None if that cut it short"
            )

    def _open(self, resume_step: int) -> None:
        path = self._folder / "metrics.jsonl"
        _drop_lines_after(path, resume_step)
        self._file: FileIO = files.open_append(path)  # closed by `close`
        self._tensorboard = _open_tensorboard(self._folder / TENSORBOARD, resume_step)

    def go_back(self, progress: Progress) -> None:
        """Drop the lines of later steps, because the run has returned to this one and writes them again."""
        if not self.enabled:
            return
        self._close_files()
        self._open(progress.step)
        self._step = self._last_step = progress.step
        self._epoch = progress.epoch

    def say(self, text: str) -> None:
        """Show a line without logging it."""
        if self.enabled:
            self._display.say(text)

    def advance(self, progress: Progress) -> None:
        """Show the progress after a step, whether it is logged or not."""
        if self.enabled:
            self._display.update(progress.step)

    def step(self, progress: Progress, metrics: dict[str, float], wait_seconds: float = 0.0) -> None:
        """Log the metrics of one step, with the clock after it.

        `wait_seconds` is the time spent waiting for data since the start of this process.
        """
        if not self.enabled:
            return
        now = time.monotonic()
        elapsed = max(now - self._last_time, 1e-9)
        timing = {
            "seconds": now - self._started,
            "images_per_second": (progress.step - self._last_step) * self._images_per_step / elapsed,
            "wait_share": (wait_seconds - self._waited) / elapsed,
        }
        self._last_time, self._last_step, self._waited = now, progress.step, wait_seconds
        self._write("step", progress, {**metrics, "timing": timing})
        self._write_tensorboard(progress.step, metrics)
        self._write_tensorboard(progress.step, timing, prefix="timing/")
        self._display.update(progress.step, _summary(metrics, timing))

    def epoch(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Log metrics of a whole epoch, with the clock after its last step."""
        if not self.enabled:
            return
        self._write("epoch", progress, metrics)
        self._write_tensorboard(progress.step, metrics, prefix="epoch/")

    def alarm(self, progress: Progress, alarm: Alarm, **fields: Any) -> None:
        """Log a warning, with further JSON values for programs, and show it at once."""
        if not self.enabled:
            return
        self._write("alarm", progress, {"name": alarm.name, "text": alarm.text, **fields})
        self._display.say(f"warning at step {progress.step}: {alarm.text}")

    def event(self, text: str, **fields: Any) -> None:
        """Log an event at the step logged last, with further JSON values for programs, and show it."""
        if not self.enabled:
            return
        self._write_line({"kind": "event", "step": self._step, "epoch": self._epoch, "text": text, **fields})
        self._display.say(text)

    def close(self) -> None:
        """Finish the files and the display. A second call does nothing."""
        if not self.enabled:
            return
        self.enabled = False
        self._display.close()
        self._close_files()

    def _close_files(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            with explain_write_error(self._folder, 0):
                self._tensorboard.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(*([UserError] if error is not None else [])):  # show the first error only
            self.close()

    def _write(self, kind: str, progress: Progress, fields: Mapping[str, Any]) -> None:
        self._step, self._epoch = progress.step, progress.epoch
        self._write_line({"kind": kind, "step": progress.step, "epoch": progress.epoch, **fields})

    def _write_line(self, line: dict[str, Any]) -> None:
        nonfinite: list[str] = []
        line = _without_nonfinite(line, nonfinite)
        if nonfinite:
            line["nonfinite"] = nonfinite
        data = json.dumps(line, allow_nan=False).encode("ascii") + b"\n"
        with explain_write_error(self._folder, len(data)):
            while data:  # a disk that is nearly full writes a part
                data = data[self._file.write(data) :]

    def _write_tensorboard(self, step: int, values: dict[str, float], prefix: str = "") -> None:
        if self._tensorboard is not None:
            finite = {prefix + name: value for name, value in values.items() if math.isfinite(value)}
            with explain_write_error(self._folder, 64 * len(finite)):  # errors of its thread are raised here
                for name, value in finite.items():
                    self._tensorboard.add_scalar(name, value, step)


def _without_nonfinite(value: Any, names: list[str], name: str = "") -> Any:
    """A copy of `value` with null for NaN and infinity; their dotted names go to `names`."""
    if isinstance(value, dict):
        return {k: _without_nonfinite(v, names, f"{name}.{k}" if name else k) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        names.append(name)
        return None
    return value


def _drop_lines_after(path: Path, step: int) -> None:
    """Drop lines of steps after `step`, and those that a killed process left incomplete."""
    if not path.exists():
        return
    text = files.read_text(path, LOG_BYTES, errors="replace")
    earlier = "".join(line + "\n" for line in text.splitlines() if _step_of(line) <= step)
    if earlier != text:
        files.write_text(path, earlier)


def _step_of(line: str) -> float:
    """Step of a log line; infinity if it is not one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _open_tensorboard(folder: Path, resume_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own dependencies
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
    files.make_folder(folder)
    # TensorBoard opens its file by name: the name must not be guessed, or a link could be put there.
    unpredictable = f".{secrets.token_hex(8)}"
    return SummaryWriter(folder, purge_step=resume_step + 1 if resume_step else None, filename_suffix=unpredictable)


def _summary(values: dict[str, float], timing: dict[str, float]) -> str:
    """One line for people: loss, learning rate, speed, share of time spent waiting for data."""
    parts = [f"{name} {values[name]:.4g}" for name in ("loss", "lr") if name in values]
    parts.append(f"{timing['images_per_second']:,.0f} images/s")
    parts.append(f"waiting for data {timing['wait_share']:.0%}")
    return ", ".join(parts)


def _stdout() -> Console:
    from rich.console import Console

    return Console(file=LossyStream(sys.stdout))  # type: ignore[arg-type]
