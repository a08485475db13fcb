"""A run's page: one HTML file with its figures, health, curves and pictures, to read and to send on.

    RUN/config.yaml, metrics.jsonl, evaluation.json, ...  --+
    images, view spec, clusters, where the caller has them  --+--> RUN/report.html, RUN/pictures/*.png

The page needs neither network nor script, and its content-security policy allows neither. A run folder may
come from a stranger: every text in it is escaped by the template, and characters that could steer a reader's
eye (line breaks, direction marks, control characters) are written out.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from tessella import files
from tessella.console import duration
from tessella.data.sources import ImageSet
from tessella.data.views import ViewSpec
from tessella.errors import UserError
from tessella.methods import METHODS
from tessella.report.charts import Chart, bar_chart, line_chart
from tessella.report.page import render
from tessella.report.pictures import Album, Cluster, Example, Picture, show_clusters, show_views
from tessella.report.scores import score_tables
from tessella.run.lock import owner_of

_CLUSTER_FIELDS = ("prototypes", "groups", "centres")  # what methods call the number of their clusters
_CONFIG_LIMIT = 4 << 20  # bytes of config.yaml
_LIMIT = 2 << 30  # bytes of any other file
_SHOWN_UNREADABLE = 500
_MOST_SETTINGS = 500
_DEEPEST_SETTING = 12
_MOST_CURVES = 24
_MOST_CLUSTERS = 10_000_000  # a larger number is no setting but a mistake


class _Curve(NamedTuple):
    """A figure of the log's step lines and how to explain it."""

    key: str  # in a line of metrics.jsonl; dots lead inwards
    title: str
    sentence: str
    reaches: float = 0.0  # what the axis shows in any case, besides 0


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
        "Share of clusters that no image has fallen into since the epoch began. Good: near 0 at its end.",
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


class _Status(NamedTuple):
    complete: bool
    text: str
    alarms: int = 0
    running: bool = False


class _Clusters(NamedTuple):
    chart: Chart
    sentence: str
    largest: list[Cluster]


@dataclass
class _Run:
    """What a run folder holds."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    records: Any  # of evaluation.json
    unreadable: list[str]
    notes: list[str]  # what is damaged and therefore left out

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Lines with the figures of a step."""
        return [line for line in self.lines if line.get("kind") == "step"]

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """Lines with a warning of the monitor."""
        return [line for line in self.lines if line.get("kind") == "alarm"]

    @property
    def step(self) -> int:
        """Updates that the log knows of."""
        return max((line["step"] for line in self.lines), default=0)

    def number(self, name: str, default: int) -> int:
        """A whole number among the top-level settings."""
        value = self.config.get(name)
        return value if isinstance(value, int) and 0 <= value < 2**64 else default

    def part(self, name: str) -> dict[str, Any]:
        """A group of settings."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}


def write_report(
    run: Path,
    *,
    images: ImageSet | None = None,
    spec: ViewSpec | None = None,
    clusters: Sequence[int] | NDArray[np.int64] | None = None,
) -> Path:
    """Write `report.html` and the pictures of a run; what the folder or the caller does not have is left out.

    Args:
        run: its folder.
        images: what it was trained on: for the views and the members of clusters.
        spec: the views of its method.
        clusters: the method's cluster of each of the images, negative where there is none.

    Returns:
        The path of the page.

    Raises:
        UserError: not a run folder, `clusters` are not those of `images`, or the disk refuses.
    """
    if clusters is not None and images is not None and len(clusters) != len(images):
        raise UserError(
            f"{len(clusters)} cluster numbers for {len(images)} images: give one per image, in the order of the rows"
        )
    found = _read(run)
    page = render("run.html.j2", _content(found, images, spec, clusters))
    files.write_text(run / "report.html", page)
    return run / "report.html"


def _content(
    run: _Run, images: ImageSet | None, spec: ViewSpec | None, clusters: Sequence[int] | NDArray[np.int64] | None
) -> dict[str, Any]:
    """All that the template shows."""
    album = Album(run.path / "pictures") if images is not None and (spec or clusters is not None) else None
    examples: list[Example] = []
    montages: list[Picture] = []
    if album and images is not None and spec is not None:
        examples, montages = show_views(images, spec, run.number("seed", 0), album)
    status = _status(run, images)
    charts, more_charts = _charts(run.steps)
    return {
        "title": _text(run.config, "recipe") or _text(run.part("method"), "name") or "A run",
        "data": _text(run.config, "data") or "images without a name",
        "status": status,
        "facts": _facts(run, images),
        "tables": score_tables(run.records, run.path.resolve().name),
        "evaluated": (run.path / "evaluation.html").is_file(),
        "alarms": run.alarms,
        "steps": run.step,
        "charts": charts,
        "more_charts": more_charts,
        "examples": examples,
        "montages": montages,
        "batch_size": run.number("batch_size", 0),
        "clusters": _clusters(run, images, clusters, album),
        "unreadable": [tuple(line.partition("\t")[::2]) for line in run.unreadable[:_SHOWN_UNREADABLE]],
        "unreadable_count": len(run.unreadable),
        "settings": list(itertools.islice(_flat(run.config), _MOST_SETTINGS)),
        "environment": list(itertools.islice(_flat(run.environment), _MOST_SETTINGS)),
        "commands": _commands(run, status),
        "notes": run.notes,
    }


# --- reading -------------------------------------------------------------------------------------------


def _read(run: Path) -> _Run:
    try:
        config = yaml.safe_load(files.read_text(run / "config.yaml", _CONFIG_LIMIT))
    except (OSError, yaml.YAMLError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{run} is not a run folder: it has no readable config.yaml; give the --out of a run")
    notes: list[str] = []
    environment = _read_json(run / "environment.json", notes)
    return _Run(
        path=run,
        config=config,
        environment=environment if isinstance(environment, dict) else {},
        lines=_read_log(run / "metrics.jsonl"),
        records=_read_json(run / "evaluation.json", notes),
        unreadable=_read_text(run / "unreadable.txt").splitlines(),
        notes=notes,
    )


def _read_text(path: Path) -> str:
    try:
        return files.read_text(path, _LIMIT, errors="replace")
    except OSError:
        return ""


def _read_json(path: Path, notes: list[str]) -> Any:
    """The parsed file; None if it is missing, or damaged, which is noted."""
    text = _read_text(path)
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        notes.append(f"{path.name} is damaged and left out.")
        return None


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The log's lines; the last one of a killed run may be half a line."""
    lines = []
    for text in _read_text(path).splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and 0 <= line["step"] < 2**53:
            lines.append(line)
    return lines


def _flat(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names, as the command line takes them.

    Lazily and to a certain depth: in a foreign file aliases may multiply a few lines into gigabytes.
    """
    nested = isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value)
    if not value or not (nested or isinstance(value, dict)):
        yield name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    elif depth == _DEEPEST_SETTING:
        yield name, "..."
    else:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(item, f"{name}.{key}" if name else str(key), depth + 1)


def _text(values: dict[str, Any], name: str) -> str:
    """A text among values; empty if there is none."""
    value = values.get(name)
    return value if isinstance(value, str) else ""


# --- telling -------------------------------------------------------------------------------------------


def _status(run: _Run, images: ImageSet | None) -> _Status:
    """A run is complete when its backbone is there, and running while a process holds its lock."""
    planned = run.number("max_steps", 0)
    if images is not None:
        whole = len(images) // max(run.number("batch_size", 1), 1) * run.number("epochs", 1)
        planned = min(planned or whole, whole)
    steps = f"step {run.step:,}" + (f" of {planned:,}" if planned else "")
    alarms = len(run.alarms)
    warned = f", with {alarms} alarm{'s' * (alarms > 1)}" if alarms else ""
    owner = owner_of(run.path)
    if owner:
        return _Status(False, f"running, at {steps}{warned} ({owner})", alarms, running=True)
    if (run.path / "backbone.safetensors").exists():
        return _Status(True, (f"complete after {run.step:,} steps" if run.step else "complete") + warned, alarms)
    return _Status(False, f"stopped at {steps}{warned}", alarms)


def _facts(run: _Run, images: ImageSet | None) -> list[tuple[str, str]]:
    """What kind of run it is and what it cost, in a few words."""
    method, backbone = _text(run.part("method"), "name"), run.part("backbone")
    network = [_text(backbone, "name")]
    if isinstance(backbone.get("width"), int):
        network.append(f"width {backbone['width']}")
    if _text(backbone, "stem") in ("small", "small-pool"):
        network.append(f"{_text(backbone, 'stem')} stem")
    facts = [("Method", METHODS[method].title if method in METHODS else method), ("Backbone", ", ".join(network))]
    if images is not None:
        facts.append(("Images", f"{len(images):,}"))
    facts.append(("Epochs", _epochs(run)))
    seconds, batch = _seconds(run.steps), run.number("batch_size", 0)
    if seconds > 0:
        facts.append(("Training time", duration(seconds)))
        facts.append(("Images per second", f"{run.step * batch / seconds:,.0f}"))
    facts.append(("Device", _text(run.environment, "gpu") or "CPU"))
    return facts


def _epochs(run: _Run) -> str:
    last = max((line["epoch"] for line in run.lines if isinstance(line.get("epoch"), int)), default=0)
    planned = run.number("epochs", 0)
    return f"{planned}" if last >= planned else f"{last} of {planned}"


def _seconds(steps: list[dict[str, Any]]) -> float:
    """Time in training: each start of the run counts from 0, so the last figure of each is added up."""
    total = latest = 0.0
    for line in steps:
        seconds = _value(line, "timing.seconds")
        if seconds is not None:
            total += latest if seconds < latest else 0.0
            latest = seconds
    return total + latest


def _charts(steps: list[dict[str, Any]]) -> tuple[list[Chart], list[Chart]]:
    """The curves that every run has, and those of figures that only this method reports."""
    known = [_chart(steps, curve) for curve in _CURVES]
    used = {curve.key for curve in _CURVES} | {"kind", "step", "epoch", "loss_to_collapse", "nonfinite_loss"}
    others = dict.fromkeys(key for line in steps for key in line if key not in used)
    more = (_chart(steps, _Curve(key, key.replace("_", " ").capitalize(), "")) for key in others)
    drawn = itertools.islice((chart for chart in more if chart is not None), _MOST_CURVES)
    return [chart for chart in known if chart is not None], list(drawn)


def _chart(steps: list[dict[str, Any]], curve: _Curve) -> Chart | None:
    collapse = _collapse_loss(steps) if curve.key == "loss" else None
    return line_chart(
        [(line["step"], _value(line, curve.key)) for line in steps],
        title=curve.title,
        sentence=curve.sentence,
        reaches=curve.reaches,
        rule=collapse,
        rule_label="same answer for every image:",
    )


def _collapse_loss(steps: list[dict[str, Any]]) -> float | None:
    """The log holds the distance to it, 1 - loss / collapse loss."""
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
    return float(value) if abs(value) < 1e300 else None  # NaN is not less either


def _clusters(
    run: _Run, images: ImageSet | None, clusters: Sequence[int] | NDArray[np.int64] | None, album: Album | None
) -> _Clusters | None:
    if clusters is None:
        return None
    numbers = np.asarray(clusters)
    sizes = np.bincount(numbers[numbers >= 0])
    if not sizes.any():
        return None
    settings = (run.part("method").get(name) for name in _CLUSTER_FIELDS)
    count = max([len(sizes), *(k for k in settings if isinstance(k, int) and k <= _MOST_CLUSTERS)])
    descending = [*sorted(sizes.tolist(), reverse=True), *[0] * (count - len(sizes))]
    dead, total, largest = descending.count(0), sum(descending), descending[0]
    chart = bar_chart(
        descending,
        title="Images per cluster, largest first",
        sentence=f"An even share would be {total / count:,.1f} images. Good: a gentle slope without a long empty end.",
        x_label="cluster",
    )
    return _Clusters(
        chart,
        f"{total:,} images fall into {count - dead:,} of {count:,} clusters; {dead:,} "
        f"{'is' if dead == 1 else 'are'} empty, and the largest holds {largest / total:.1%} of the images.",
        show_clusters(images, numbers, album) if images is not None and album is not None else [],
    )


def _commands(run: _Run, status: _Status) -> list[tuple[str, str]]:
    """What to do next, and the command for it."""
    folder = shlex.quote(str(run.path))
    evaluate = f"tessella evaluate {folder} --train LABELLED --test LABELLED --baseline --out {folder}"
    go_on = ("Go on exactly where it stopped", f"tessella resume {folder}")
    commands = [] if status.complete or status.running else [go_on]
    return [
        *commands,
        ("Judge the backbone beside an untrained one", evaluate),
        ("Write features for other programs", f"tessella embed {folder} IMAGES --out features.parquet"),
        ("Write this page again", f"tessella report {folder}"),
    ]
