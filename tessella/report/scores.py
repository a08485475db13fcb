"""The records of evaluations as a table: what is compared row by row, the measures column by column."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tessella.protocols import PROTOCOLS

_SEED = re.compile(r", seed \d+$")  # ends the name of what was trained or initialised several times
_FEW = re.compile(r"top1_(\d{1,6})$")
_OWN_CLUSTERS = ("Own clusters", {"nmi": "NMI", "ari": "ARI"})  # of a method that has clusters, beside k-means


class Column(NamedTuple):
    """A measure. Sorts in the order of the table."""

    rank: int
    number: int  # labels per class
    heading: str  # of neighbouring columns
    label: str


class Cell(NamedTuple):
    """A figure in per cent."""

    text: str  # empty: not measured
    spread: str  # standard deviation, or empty
    gain: str  # signed difference to random init, or empty
    best: bool


class Row(NamedTuple):
    """What is compared."""

    name: str
    cells: list[Cell]
    trained: bool  # the run that the page is about


class ScoreTable(NamedTuple):
    """Figures that may be compared with each other: of the same train and test images."""

    train: str
    test: str
    facts: str  # sizes and chance, as a sentence
    columns: list[Column]
    headings: list[tuple[str, int]]  # and how many columns each spans
    rows: list[Row]


class _Figure(NamedTuple):
    value: float
    std: float | None


_Figures = dict[str, dict[Column, dict[str, _Figure]]]  # row name -> column -> seed -> figure


def score_tables(records: Any, run_name: str) -> list[ScoreTable]:
    """Tables from the content of an evaluation.json; what does not look like a record is passed over.

    Of several records about one seed the last counts; over several seeds the mean is shown.

    Args:
        records: as parsed.
        run_name: what the records call the run that the page is about.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records if isinstance(records, list) else []:
        if isinstance(record, dict) and isinstance(record.get("scores"), dict):
            found.setdefault((_name_of(record, "train"), _name_of(record, "test")), []).append(record)
    tables = (_table(train, test, group, run_name) for (train, test), group in found.items())
    return [table for table in tables if table.columns]


def _table(train: str, test: str, records: list[dict[str, Any]], run_name: str) -> ScoreTable:
    figures: _Figures = {}
    for record in records:
        baseline = record.get("baseline")
        for part in (baseline, record):  # the baseline first: the table reads downwards from little to much
            if isinstance(part, dict) and isinstance(part.get("scores"), dict):
                name = str(part.get("name", part.get("backbone", "?")))
                row = figures.setdefault(_SEED.sub("", name), {})
                for column, figure in _figures(str(record.get("protocol")), part["scores"]):
                    row.setdefault(column, {})[str(record.get("seed"))] = figure
    columns = sorted({column for row in figures.values() for column in row})
    means = {
        name: {column: _mean(list(seeds.values())) for column, seeds in row.items()} for name, row in figures.items()
    }
    trained = {name for name in means if name in (run_name, "pretrained")}
    rows = [
        _row(_title(name, figures[name], name in trained), means[name], means, columns, name in trained)
        for name in sorted(means, key=lambda name: name in trained)
    ]
    headings: list[tuple[str, int]] = []
    for column in columns:
        count = headings.pop()[1] if headings and headings[-1][0] == column.heading else 0
        headings.append((column.heading, count + 1))
    return ScoreTable(train, test, _facts(records), columns, headings, rows)


def _title(name: str, row: dict[Column, dict[str, _Figure]], trained: bool) -> str:
    seeds = max(map(len, row.values()), default=1)
    if seeds > 1:
        return f"{'pretrained' if trained else name}, mean of {seeds} seeds"
    return "pretrained (this run)" if trained else name


def _row(
    title: str,
    figures: dict[Column, _Figure],
    everyone: dict[str, dict[Column, _Figure]],
    columns: list[Column],
    trained: bool,
) -> Row:
    cells = []
    for column in columns:
        figure = figures.get(column)
        if figure is None:
            cells.append(Cell("", "", "", False))
            continue
        others = [row[column].value for row in everyone.values() if column in row]
        untrained = everyone.get("random init", {}).get(column)
        cells.append(
            Cell(
                text=f"{100 * figure.value:.1f}",
                spread="" if figure.std is None else f"{100 * figure.std:.1f}",
                gain=f"{100 * (figure.value - untrained.value):+.1f}" if trained and untrained else "",
                best=len(others) > 1 and round(figure.value, 3) == round(max(others), 3),
            )
        )
    return Row(title, cells, trained)


def _figures(protocol: str, scores: dict[str, Any]) -> Iterator[tuple[Column, _Figure]]:
    """The measures of a record that the table shows."""
    rank, heading, measures, variant = _declared(protocol)
    stds = scores.get("std")
    for number, (score, label) in enumerate(measures.items()):
        for name, value in scores.items():
            few = _FEW.match(str(name)) if score == "top1_N" else None
            if (name == score or few) and _is_number(value):
                labels = int(few[1]) if few else 0
                std = scores.get(f"std_{labels}") if few else stds.get(name) if isinstance(stds, dict) else None
                text = f"{variant} {label}" if variant and len(measures) > 1 else variant or label
                yield (
                    Column(rank + number, labels, heading, str(labels) if few else text),
                    _Figure(value, std if _is_number(std) else None),
                )


def _declared(record: str) -> tuple[int, str, Mapping[str, str], str]:
    """Place, heading and measures of the protocol that a record is called after, and which of its settings it is."""
    for rank, (name, protocol) in enumerate(PROTOCOLS.items()):
        if record in protocol.settings or record == name or record.startswith(f"{name}-"):
            variant = record.removeprefix(name).strip("-") if len(protocol.settings) > 2 else ""
            return 10 * rank, protocol.title, protocol.measures, variant
    heading, measures = _OWN_CLUSTERS if record == "own-clusters" else ("", {})
    return 10 * list(PROTOCOLS).index("clustering") + 5, heading, measures, ""


def _mean(seeds: list[_Figure]) -> _Figure:
    if len(seeds) == 1:
        return seeds[0]
    values = [figure.value for figure in seeds]
    return _Figure(statistics.fmean(values), statistics.stdev(values))


def _facts(records: Iterable[dict[str, Any]]) -> str:
    """How many test images there were, what guessing scores, and how far chance alone moves an accuracy."""
    sentences = []
    described = [test for test in (record.get("test") for record in records) if isinstance(test, dict)]
    images = next((d["images"] for d in described if _is_number(d.get("images")) and d["images"] > 0), None)
    classes = next((d["classes"] for d in described if _is_number(d.get("classes")) and d["classes"] > 0), None)
    if images:
        sentences.append(
            f"With {images:,.0f} test images, chance alone moves an accuracy by up to "
            f"± {98 / math.sqrt(images):.1f} points (95 %)."
        )
    if classes:
        sentences.append(f"Guessing one of {classes:,.0f} classes would score {100 / classes:.1f} %.")
    return " ".join(sentences)


def _name_of(record: dict[str, Any], split: str) -> str:
    described = record.get(split)
    return str(described.get("name", "")) if isinstance(described, dict) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12  # no NaN either
