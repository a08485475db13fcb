"""Evaluations side by side: protocols row by row, backbones column by column, differences to the first column.

Two figures share a row only if the question was the same: protocol, its version and settings except seeds, train images
and test images. Where it was not, the remarks name the difference.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tessella import files
from tessella.errors import UserError
from tessella.evaluation.records import NAME, read_records
from tessella.methods import method_of
from tessella.report.evaluation import (
    Record,
    difference,
    in_brackets,
    name_in,
    network_of,
    question_of,
    values_of_question,
)
from tessella.report.figures import Value, table_in
from tessella.report.grid import Grid, markdown
from tessella.report.page import literal, render, short
from tessella.run.config import FREE_FIELDS, RunConfig, flat, load_config, to_dict

_MOST_CHANGES = 12  # settings that are named
_LEGEND = (
    "Per cent; higher is better. ± is the standard deviation over seeds or draws, [ , ] the 95 % interval. In brackets "
    "the difference to the first column, in points."
)


class Column(NamedTuple):
    """One backbone of one folder."""

    title: str
    network: str
    run: RunConfig | None  # how it was trained, if the folder is that of its run
    records: list[Record]


class Cell(NamedTuple):
    """A figure, if there is one, and its difference to the first column's in points."""

    value: Value | None
    gain: str

    def __str__(self) -> str:
        return "–" if self.value is None else in_brackets(str(self.value), self.gain)


class Question(NamedTuple):
    """A protocol in one setting on the same images."""

    protocol: str
    data: str
    changed: str  # what differs from the setting of that name
    rows: list[tuple[str, list[Cell]]]  # label of a figure, and a cell for each column


class Comparison(NamedTuple):
    """Everything that is shown."""

    columns: list[Column]
    questions: list[Question]
    remarks: list[str]

    def grid(self) -> Grid:
        """The table as texts."""
        rows = [
            [*((in_brackets(q.protocol, q.changed), q.data) if number == 0 else ("", "")), label, *map(str, line)]
            for q in self.questions
            for number, (label, line) in enumerate(q.rows)
        ]
        heads = ["protocol", "test images", "figure", *(column.title for column in self.columns)]
        return Grid("", heads, rows, words=3)


def compare(folders: Sequence[Path], out: Path | None = None) -> Comparison:
    """Put the evaluations of some folders side by side, print them, and write them to a file.

    Args:
        folders: of runs or evaluations, each with an evaluation.json; one is enough if it has several backbones.
        out: NAME.md or NAME.html; without it nothing is written.

    Raises:
        UserError: a folder has no evaluation, there is only one backbone, or the file cannot be written.
    """
    if out is not None and out.suffix not in (".md", ".html"):
        raise UserError(f"--out {out} ends neither in .md nor in .html")
    compared = comparison([(folder, _records(folder)) for folder in folders])
    if len(compared.columns) < 2:
        raise UserError("there is only one backbone to be seen: name the folders of two or more evaluations")
    grid = compared.grid()
    grid.show()
    for remark in compared.remarks:
        print(literal(remark))
    if out is not None:
        remarks = [f"- {markdown(remark)}" for remark in compared.remarks]
        lines = ["# Comparison", "", _LEGEND, "", *grid.markdown(), *([""] if remarks else []), *remarks]
        page = "\n".join(lines) + "\n" if out.suffix == ".md" else render("compare.html.j2", {"compared": compared})
        files.write_text(out.parent.resolve() / out.name, page)  # folders above may be links: they are the user's own
    return compared


def comparison(folders: Iterable[tuple[Path, list[Record]]]) -> Comparison:
    """The records of some folders side by side."""
    columns = [column for folder, records in folders for column in _columns(folder, records)]
    times, seen = Counter(column.title for column in columns), Counter[str]()
    for i, column in enumerate(columns):
        seen[column.title] += 1
        if times[column.title] > 1:
            columns[i] = column._replace(title=f"{column.title} ({seen[column.title]})")
    groups: dict[str, dict[int, list[Record]]] = {}
    for number, column in enumerate(columns):
        for record in column.records:
            groups.setdefault(_question_and_data(record), {}).setdefault(number, []).append(record)
    questions = [_question(group, len(columns)) for group in groups.values()]
    protocols = list(dict.fromkeys(question.protocol for question in questions))
    questions.sort(key=lambda question: protocols.index(question.protocol))
    return Comparison(columns, [q for q in questions if q.rows], _remarks(columns, list(groups.values())))


def _records(folder: Path) -> list[Record]:
    records: list[Record] = [r for r in (read_records(folder) if folder.is_dir() else []) if table_in(r, "scores")]
    if not records:
        raise UserError(f"{folder} holds no {NAME} with figures: `tessella evaluate ... --out {folder}` makes one")
    return records


def _columns(folder: Path, records: list[Record]) -> list[Column]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault((record.get("backbone"), record.get("weights")), []).append(record)
    name, run = folder.resolve().name, None
    if len(groups) == 1:
        with contextlib.suppress(UserError):  # a folder of an evaluation alone, or a run of another version
            run = load_config(folder / "config.yaml")
    return [
        Column(name if len(groups) == 1 else f"{name}: {backbone}", network_of(group[-1]), run, group)
        for (backbone, _), group in groups.items()
    ]


def _question_and_data(record: Record) -> str:
    """What the figures of a row have in common."""
    images = [table_in(record, split).get("fingerprint") for split in ("train", "test")]
    return json.dumps([question_of(record), images, record.get("label_map")], sort_keys=True)


def _question(group: dict[int, list[Record]], count: int) -> Question:
    figures = {number: values_of_question(records) for number, records in group.items()}
    rows = []
    for name, value in {name: value for values in figures.values() for name, value in values.items()}.items():
        line = [figures.get(number, {}).get(name) for number in range(count)]
        rows.append((value.label, [Cell(one, difference(one, line[0]) if i else "") for i, one in enumerate(line)]))
    record = _example(group)
    changed = ", ".join(f"{name} {json.dumps(value)}" for name, value in table_in(record, "changed").items())
    return Question(str(record.get("protocol")), short(name_in(record, "test")), changed, rows)


def _example(group: Mapping[int, list[Record]]) -> Record:
    """Any record of a question."""
    return next(iter(group.values()))[-1]


def _remarks(columns: list[Column], groups: list[dict[int, list[Record]]]) -> list[str]:
    """Why figures of one protocol are in several rows, and what else a reader should know."""
    remarks = []
    for one, other in itertools.combinations(groups, 2):
        protocol = _example(one).get("protocol")
        if protocol == _example(other).get("protocol") and not one.keys() & other.keys():
            names = (" and ".join(columns[number].title for number in group) for group in (one, other))
            reason = _difference(_example(one), _example(other))
            remarks.append(f"{protocol}: {next(names)} is not compared with {next(names)}: {reason}")
    remarks += _trainings(columns)
    sizes = {column.title: size for column in columns if (size := _image_size(column)) is not None}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{title} {size}" for title, size in sizes.items())
        remarks.append(f"the backbones see images at different sizes, in pixels: {listed}")
    return remarks


def _trainings(columns: list[Column]) -> Iterator[str]:
    """How the backbones were trained, and in which settings they differ from the first."""
    runs = [(column.title, column.run) for column in columns if column.run is not None]
    for title, run in runs:
        recipe, method = run.recipe or "no recipe", method_of(run.method).title
        yield f"{title}: {recipe}, {method}, {run.epochs} epochs on {short(run.data)}"
    settings = [
        {name: value for name, value in flat(to_dict(run)).items() if name not in FREE_FIELDS} for _, run in runs
    ]
    for (title, _), its in zip(runs[1:], settings[1:], strict=True):
        names = [name for name in sorted({*its, *settings[0]}) if its.get(name) != settings[0].get(name)]
        more = f" and {len(names) - _MOST_CHANGES} more" if len(names) > _MOST_CHANGES else ""
        if names:
            changed = ", ".join(f"{name} {its.get(name)}" for name in names[:_MOST_CHANGES])
            yield f"{title} differs from {runs[0][0]} in {changed}{more}"


def _difference(one: Record, other: Record) -> str:
    """The difference between two questions, in words."""
    for split in ("train", "test"):
        if table_in(one, split).get("fingerprint") != table_in(other, split).get("fingerprint"):
            return f"other {split} images ({short(name_in(one, split))}, {short(name_in(other, split))})"
    if one.get("label_map") != other.get("label_map"):
        return "other label maps"
    if one.get("version") != other.get("version"):
        return f"versions {one.get('version')} and {other.get('version')} of the protocol"
    settings = [table_in(record, "settings") for record in (one, other)]
    fields = sorted(name for name in {*settings[0], *settings[1]} if settings[0].get(name) != settings[1].get(name))
    return f"other settings ({', '.join(fields)})"


def _image_size(column: Column) -> Any:
    sizes = {table_in(record, "transform").get("size") for record in column.records} - {None}
    return sizes.pop() if len(sizes) == 1 else None
