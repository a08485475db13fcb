"""A run's page: one HTML file with its figures, health, curves and pictures, to read and to send on.

    RUN/config.yaml, metrics.jsonl, evaluation.json, ...  --+
    its images, views and clusters, if they can be had    --+--> RUN/report.html, RUN/pictures/*.png

The page needs neither network nor script, and its content-security policy allows neither. A run folder may come from a
stranger: the templates escape every text in it, and write out characters that could mislead a reader, such as line
breaks, direction marks and control characters.
"""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tessella import files
from tessella.console import duration, note
from tessella.data.sources import ImageSet, open_images
from tessella.engine.launch import cores_at_hand, pick_device
from tessella.errors import UserError
from tessella.evaluation.evaluate import assign
from tessella.methods import method_of, views_of
from tessella.protocols.features import extract
from tessella.report.charts import Chart, bar_chart, line_chart
from tessella.report.evaluation import tables_of
from tessella.report.grid import Grid
from tessella.report.page import render
from tessella.report.pictures import Album, Cluster, Example, Picture, show_clusters, show_views
from tessella.run.config import RunConfig, flat, to_dict
from tessella.run.folder import RunFolder
from tessella.run.lock import owner_of
from tessella.weights.resolve import resolve_backbone

_LIMIT = 2 << 30  # bytes of a file
_MOST_UNREADABLE = 500  # files that are named
_MOST_SETTINGS = 500
_MOST_CURVES = 24
_CLUSTERED_IMAGES = 20_000  # enough to see the clusters; a page should not take an epoch


class Clusters(NamedTuple):
    """The method's own clusters."""

    numbers: NDArray[np.int64]  # (N,) cluster of each image, -1 for images beyond an evenly spaced part of a large set
    total: int


class RunPath(type(Path())):  # type: ignore[misc]
    """The path of a run's folder. A notebook shows what the run is and how far it is."""

    def _repr_html_(self) -> str | None:
        if not (self / "config.yaml").is_file():  # a path within the folder
            return None
        run = _read(self)
        losses = [loss for line in run.steps if (loss := _value(line, "loss")) is not None]
        facts = [("Run", run.status(None).text), *_facts(run, None)]
        facts += [("Loss", f"{losses[0]:.4g} to {losses[-1]:.4g}")] if losses else []
        return Grid(str(self), [name for name, _ in facts], [[value for _, value in facts]]).html()


class _Curve(NamedTuple):
    """A figure of the log's step lines and its explanation."""

    key: str  # in a line of metrics.jsonl; dots lead inwards
    title: str
    sentence: str
    reaches: float = 0.0  # a value that the axis shows in any case, besides 0


_CURVES = (
    _Curve(
        "loss",
        "Loss",
        "The dashed line is what a network scores that gives every image the same answer. Good: the curve "
        "falls below it and keeps falling.",
    ),
    _Curve(
        "embedding_std",
        "Embedding std",
        "1: embeddings point in all directions; 0: they are all alike, the run has collapsed. Good: near 1.",
        reaches=1.0,
    ),
    _Curve(
        "effective_rank",
        "Effective rank",
        "How many dimensions the embeddings really fill. Good: tens, and not falling.",
    ),
    _Curve(
        "cluster_evenness",
        "Cluster evenness",
        "1: the epoch's images spread evenly over all clusters; 0.5: as if evenly over half of them. It starts again "
        "with each epoch, hence the saw teeth. Good: above 0.5 at an epoch's end.",
        reaches=1.0,
    ),
    _Curve(
        "dead_clusters",
        "Dead clusters",
        "Share of clusters without an image since the epoch began. Good: near 0 at its end.",
        reaches=1.0,
    ),
    _Curve("lr", "Learning rate (lr)", "As set; it explains kinks in the other curves."),
    _Curve("timing.images_per_second", "Images per second", "Over all devices. Good: high and level."),
    _Curve(
        "timing.wait_share",
        "Waiting for data",
        "Share of the time in which the device had nothing to do. Good: near 0; else more workers or faster "
        "storage help.",
        reaches=1.0,
    ),
)


def report(run: Path, *, data: str | None = None, images: ImageSet | None = None, device: str = "auto") -> Path:
    """Write RUN/report.html with all that can be shown; what is missing is named and left out.

    Args:
        run: a run folder.
        data: the images, if they lie elsewhere now, or must be downloaded: what only the run names never is.
        images: what it was trained on, if that has no name on disk.
        device: where the cluster of each image is computed.

    Returns:
        The path of the page.

    Raises:
        UserError: not a run folder, or it cannot be written to.
    """
    folder, config = RunFolder.open(run)
    clusters = None
    try:
        if images is None:
            images = folder.open_images(config, download=False) if data is None else open_images(data)
        clusters = _clusters(run, images, device)
    except UserError as error:  # a page without pictures is better than none
        note(f"the page shows less: {error}")
    return write_report(run, images, clusters)


def write_report(run: Path, images: ImageSet | None = None, clusters: Clusters | None = None) -> Path:
    """Write `report.html` and the pictures of a run.

    Args:
        run: its folder.
        images: what it was trained on; without them there are no pictures.
        clusters: of these images; without them the page shows none.

    Returns:
        The path of the page.

    Raises:
        UserError: not a run folder, or the disk is full.
    """
    contents = _read(run)
    config, environment = contents.config, contents.environment
    notes: list[str] = []
    status = contents.status(images)
    examples: list[Example] = []
    montages: list[Picture] = []
    largest: list[Cluster] = []
    if images is not None:
        album = Album(run / "pictures")
        examples, montages = show_views(images, views_of(config.method), config.seed, album)
        largest = [] if clusters is None else show_clusters(images, clusters.numbers, album)
    unreadable = _text(run / "unreadable.txt").splitlines()
    content = {
        "title": config.recipe or config.method.name,
        "data": config.data or "images without a name",
        "status": status.text,
        "calm": status.complete and not contents.alarms,
        "facts": _facts(contents, images),
        "tables": tables_of(_records(run / "evaluation.json", notes)),
        "evaluated": (run / "evaluation.html").is_file(),
        "alarms": contents.alarms,
        "steps": contents.step,
        "charts": list(filter(None, (_chart(contents.steps, curve) for curve in _CURVES))),
        "more_charts": _further_charts(contents.steps),
        "examples": examples,
        "montages": montages,
        "batch_size": config.batch_size,
        "clusters": clusters and _clusters_shown(clusters),
        "largest": largest,
        "unreadable": [tuple(line.partition("\t")[::2]) for line in unreadable[:_MOST_UNREADABLE]],
        "unreadable_count": len(unreadable),
        "settings": list(itertools.islice(flat(to_dict(config)).items(), _MOST_SETTINGS)),
        "environment": list(itertools.islice(flat(environment).items(), _MOST_SETTINGS)),
        "commands": _commands(run, can_resume=not status.complete and not status.running),
        "notes": notes,
    }
    files.write_text(run / "report.html", render("run.html.j2", content))
    return run / "report.html"


# --- reading -------------------------------------------------------------------------------------------


class _Status(NamedTuple):
    """A run is complete when its backbone is there, and running while a process holds its lock."""

    complete: bool
    running: bool
    text: str


class _Run(NamedTuple):
    """The content of a run's folder."""

    path: Path
    config: RunConfig
    environment: dict[str, Any]
    lines: list[dict[str, Any]]  # of the log

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Lines with the metrics of a step."""
        return [line for line in self.lines if line.get("kind") == "step"]

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """Lines with a warning of the monitor."""
        return [line for line in self.lines if line.get("kind") == "alarm"]

    @property
    def step(self) -> int:
        """The last step in the log."""
        return max((line["step"] for line in self.lines), default=0)

    def status(self, images: ImageSet | None) -> _Status:
        """Whether the run is complete or running, and how far it is of its steps on these images."""
        planned, alarms, owner = self.config.max_steps or 0, len(self.alarms), owner_of(self.path)
        if images is not None:
            whole = len(images) // self.config.batch_size * self.config.epochs
            planned = min(planned or whole, whole)
        place = f"step {self.step:,}" + (f" of {planned:,}" if planned else "")
        warned = f", with {alarms} alarm{'s' * (alarms > 1)}" if alarms else ""
        if owner:
            return _Status(False, True, f"running, at {place}{warned} ({owner})")
        if (self.path / "backbone.safetensors").exists():
            return _Status(True, False, (f"complete after {self.step:,} steps" if self.step else "complete") + warned)
        return _Status(False, False, f"stopped at {place}{warned}")


def _read(run: Path) -> _Run:
    folder, config = RunFolder.open(run)
    return _Run(run, config, folder.recorded_environment(), _log(run / "metrics.jsonl"))


def _text(path: Path) -> str:
    try:
        return files.read_text(path, _LIMIT, errors="replace")
    except OSError:
        return ""


def _records(path: Path, notes: list[str]) -> list[Any]:
    """The records of an evaluation; none if the file is missing, or damaged, which is noted."""
    text = _text(path)
    try:
        records = json.loads(text) if text else []
    except (ValueError, RecursionError):
        records = None
    if not isinstance(records, list):
        notes.append(f"{path.name} is damaged and left out.")
        return []
    return records


def _log(path: Path) -> list[dict[str, Any]]:
    """The log's lines; the last one of a killed run may be half a line."""
    lines = []
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and 0 <= line["step"] < 2**53:
            lines.append(line)
    return lines


def _clusters(run: Path, images: ImageSet, device: str) -> Clusters | None:
    loaded = resolve_backbone(str(run))
    if loaded.method is None or not loaded.method.clusters:
        return None
    chosen = np.linspace(0, len(images) - 1, min(len(images), _CLUSTERED_IMAGES)).round().astype(np.int64)
    on = pick_device(device)
    features = extract(
        loaded.backbone, images, loaded.transform, rows=chosen, device=on, workers=cores_at_hand(), title="clusters"
    )
    numbers = np.full(len(images), -1)
    numbers[features.rows] = assign(loaded.method, features.x, on).numpy()
    return Clusters(numbers, loaded.method.clusters)


# --- content -------------------------------------------------------------------------------------------


def _facts(run: _Run, images: ImageSet | None) -> list[tuple[str, str]]:
    """What kind of run it is and what it cost, in a few words."""
    config, backbone = run.config, run.config.backbone
    stem = "" if backbone.stem == "imagenet" else f", {backbone.stem} stem"
    epoch = max((line["epoch"] for line in run.lines if isinstance(line.get("epoch"), int)), default=0)
    facts = [
        ("Method", method_of(config.method).title),
        ("Backbone", f"{backbone.name}, width {backbone.width}{stem}"),
        *([] if images is None else [("Images", f"{len(images):,}")]),
        ("Epochs", f"{config.epochs}" if epoch >= config.epochs else f"{epoch} of {config.epochs}"),
    ]
    seconds = _seconds(run.steps)
    if seconds > 0:
        facts.append(("Training time", duration(seconds)))
        facts.append(("Images per second", f"{run.step * config.batch_size / seconds:,.0f}"))
    return [*facts, ("Device", str(run.environment.get("gpu") or "CPU"))]


def _seconds(steps: list[dict[str, Any]]) -> float:
    """Time in training: each start of the run counts from 0, so the last figure of each is added up."""
    total = latest = 0.0
    for line in steps:
        seconds = _value(line, "timing.seconds")
        if seconds is not None:
            total += latest if seconds < latest else 0.0
            latest = seconds
    return total + latest


def _further_charts(steps: list[dict[str, Any]]) -> list[Chart]:
    """Curves of figures that only this method reports."""
    known = {curve.key for curve in _CURVES} | {"kind", "step", "epoch", "loss_to_collapse", "nonfinite_loss"}
    keys = dict.fromkeys(key for line in steps for key in line if key not in known)
    charts = (_chart(steps, _Curve(key, key.replace("_", " ").capitalize(), "")) for key in keys)
    return list(itertools.islice(filter(None, charts), _MOST_CURVES))


def _chart(steps: list[dict[str, Any]], curve: _Curve) -> Chart | None:
    return line_chart(
        [(line["step"], _value(line, curve.key)) for line in steps],
        title=curve.title,
        sentence=curve.sentence,
        reaches=curve.reaches,
        rule=_collapse_loss(steps) if curve.key == "loss" else None,
        rule_label="same answer for every image:",
    )


def _collapse_loss(steps: list[dict[str, Any]]) -> float | None:
    """The loss of a collapsed network. The log holds the distance to it, 1 - loss / collapse loss."""
    for line in reversed(steps):
        loss, distance = _value(line, "loss"), _value(line, "loss_to_collapse")
        if loss and distance is not None and distance < 0.99:
            return loss / (1 - distance)
    return None


def _value(line: dict[str, Any], key: str) -> float | None:
    value: Any = line
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None  # None for NaN too


def _clusters_shown(clusters: Clusters) -> tuple[Chart, str] | None:
    """Sizes of the clusters as a chart and a sentence."""
    numbers, count = clusters
    sizes = np.bincount(numbers[numbers >= 0], minlength=count)
    total, empty, largest = int(sizes.sum()), int((sizes == 0).sum()), int(sizes.max())
    if not total:
        return None
    chart = bar_chart(
        sorted(sizes.tolist(), reverse=True),
        title="Images per cluster, largest first",
        sentence=f"An even share would be {total / count:,.1f} images. Good: a gentle slope without a long empty end.",
        x_label="cluster",
    )
    return chart, (
        f"{total:,} images fall into {count - empty:,} of {count:,} clusters; {empty:,} "
        f"{'is' if empty == 1 else 'are'} empty, and the largest holds {largest / total:.1%} of the images."
    )


def _commands(run: Path, can_resume: bool) -> list[tuple[str, str]]:
    """What to do next, and the command for it."""
    folder = shlex.quote(str(run))
    evaluate = f"tessella evaluate {folder} --train LABELLED --test LABELLED --baseline --out {folder}"
    return [
        *([("Go on exactly where it stopped", f"tessella resume {folder}")] if can_resume else []),
        ("Judge the backbone beside an untrained one", evaluate),
        ("Write features for other programs", f"tessella embed {folder} IMAGES --out features.parquet"),
        ("Write this page again", f"tessella report {folder}"),
    ]
