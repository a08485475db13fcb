"""Evaluations side by side: protocols row by row, backbones column by column, differences to the first column.

Two figures stand in one row only where the question was the same: protocol, its version and settings but for seeds, and
the train and test images. Where it was not, the remarks say in what it differs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tessella import files
from tessella.errors import UserError
from tessella.evaluation.records import NAME, read_records
from tessella.report.evaluation import (
    Record,
    cells,
    difference,
    markdown,
    network_of,
    one_per_seed,
    part_of,
    print_table,
    question_of,
)
from tessella.report.figures import Value, columns, label, values_over_seeds
from tessella.report.page import literal, render, short
from tessella.run.config import FREE_FIELDS, RunConfig, load_config, to_dict

_PAGES = (".md", ".html")
_CHANGES = 12  # settings that are named


class Column(NamedTuple):
    """One backbone of one folder."""

    title: str
    network: str
    run: RunConfig | None  # how it was trained, if it was evaluated into the folder of its run
    records: list[Record]


class Cell(NamedTuple):
    """A figure, if there is one, and its difference to the first column's in points."""

    value: Value | None
    gain: str


class Question(NamedTuple):
    """A protocol in one setting on the same images."""

    protocol: str
    data: str
    changed: str
    rows: list[tuple[str, list[Cell]]]  # figure and a cell for each column


class Comparison(NamedTuple):
    """Everything that is shown."""

    columns: list[Column]
    questions: list[Question]
    remarks: list[str]


def compare(folders: Sequence[Path], out: Path | None = None) -> Comparison:
    """Put the evaluations of some folders side by side, print them, and write them to a file.

    Args:
        folders: of runs or evaluations, each with an evaluation.json; one is enough if it judges several backbones.
        out: NAME.md or NAME.html; nothing is written without it.

    Raises:
        UserError: a folder has no evaluation, there is only one backbone, or the file cannot be written.
    """
    if out is not None and out.suffix not in _PAGES:
        raise UserError(f"--out {out} ends neither in .md nor in .html")
    found = comparison([(folder, _records(folder)) for folder in folders])
    if len(found.columns) < 2:
        raise UserError("there is only one backbone to be seen: name the folders of two or more evaluations")
    rows = [
        [question.protocol if number == 0 else "", figure, *map(_text, line)]
        for question in found.questions
        for number, (figure, line) in enumerate(question.rows)
    ]
    print_table("", ["protocol", "figure", *(column.title for column in found.columns)], rows)
    for remark in found.remarks:
        print(literal(remark))
    if out is not None:
        text = _markdown(found) if out.suffix == ".md" else render("compare.html.j2", {"found": found})
        files.write_text(out.parent.resolve() / out.name, text)  # folders above may be links: they are the user's own
    return found


def comparison(folders: Iterable[tuple[Path, list[Record]]]) -> Comparison:
    """What the records of some folders say side by side."""
    every = [column for folder, records in folders for column in _columns(folder, records)]
    titles = [column.title for column in every]
    every = [
        column._replace(title=f"{column.title} ({titles[: i + 1].count(column.title)})")
        if titles.count(column.title) > 1
        else column
        for i, column in enumerate(every)
    ]
    groups: dict[str, dict[int, list[Record]]] = {}
    for number, column in enumerate(every):
        for record in column.records:
            groups.setdefault(_place(record), {}).setdefault(number, []).append(record)
    questions = [_question(group, len(every)) for group in groups.values()]
    order = list(dict.fromkeys(question.protocol for question in questions))
    questions.sort(key=lambda question: order.index(question.protocol))
    return Comparison(every, [q for q in questions if q.rows], _remarks(every, list(groups.values())))


def _records(folder: Path) -> list[Record]:
    found: list[Record] = (
        [r for r in read_records(folder) if isinstance(r.get("scores"), Mapping)] if folder.is_dir() else []
    )
    if not found:
        raise UserError(f"{folder} holds no {NAME} with figures: `tessella evaluate ... --out {folder}` makes one")
    return found


def _columns(folder: Path, records: list[Record]) -> list[Column]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault((record.get("backbone"), record.get("weights")), []).append(record)
    name = folder.resolve().name
    run = None
    if len(groups) == 1:
        with contextlib.suppress(UserError):  # a folder of an evaluation alone, or a run of another version
            run = load_config(folder / "config.yaml")
    return [
        Column(name if len(groups) == 1 else f"{name}: {backbone}", network_of(group[-1]), run, group)
        for (backbone, _), group in groups.items()
    ]


def _place(record: Record) -> str:
    """What a row's figures share."""
    images = [part_of(record, split).get("fingerprint") for split in ("train", "test")]
    return json.dumps([question_of(record), images, record.get("label_map")], sort_keys=True)


def _question(group: dict[int, list[Record]], count: int) -> Question:
    values = {
        number: values_over_seeds([r["scores"] for r in one_per_seed(records)]) for number, records in group.items()
    }
    record = next(iter(group.values()))[-1]
    rows = []
    for name in columns(itertools.chain.from_iterable(values.values())):
        line = [values.get(number, {}).get(name) for number in range(count)]
        rows.append(
            (label(name), [Cell(value, difference(value, line[0]) if i else "") for i, value in enumerate(line)])
        )
    changed = ", ".join(f"{name} {json.dumps(value)}" for name, value in part_of(record, "changed").items())
    data = short(str(part_of(record, "test").get("name", "?")))
    return Question(str(record.get("protocol")), data, changed, rows)


def _remarks(every: list[Column], groups: list[dict[int, list[Record]]]) -> list[str]:
    """Why figures of one protocol stand in several rows, and what else a reader should know."""
    remarks = []
    protocols: dict[str, list[dict[int, list[Record]]]] = {}
    for group in groups:
        protocols.setdefault(str(next(iter(group.values()))[-1].get("protocol")), []).append(group)
    for protocol, parts in protocols.items():
        for one, other in itertools.combinations(parts, 2):
            if not one.keys() & other.keys():
                names = (" and ".join(every[number].title for number in part) for part in (one, other))
                what = _difference(next(iter(one.values()))[-1], next(iter(other.values()))[-1])
                remarks.append(f"{protocol}: {next(names)} is not compared with {next(names)}: {what}")
    remarks += _trainings(every)
    sizes = {column.title: size for column in every if (size := _size(column)) is not None}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{title} {size}" for title, size in sizes.items())
        remarks.append(f"the backbones see images at different sizes, in pixels: {told}")
    return remarks


def _trainings(every: list[Column]) -> list[str]:
    """How the backbones were trained, and in which settings they differ from the first."""
    runs = [(column.title, column.run) for column in every if column.run is not None]
    remarks = [
        f"{title}: {run.recipe or 'a run of its own'}, {type(run.method).__name__.removesuffix('Config')}, "
        f"{run.epochs} epochs on {short(run.data)}"
        for title, run in runs
    ]
    settings = [_settings(run) for _, run in runs]
    for (title, _), own in zip(runs[1:], settings[1:], strict=True):
        changed = [
            f"{name} {own.get(name)}" for name in sorted({*own, *settings[0]}) if own.get(name) != settings[0].get(name)
        ]
        more = f" and {len(changed) - _CHANGES} more" if len(changed) > _CHANGES else ""
        if changed:
            remarks.append(f"{title} differs from {runs[0][0]} in {', '.join(changed[:_CHANGES])}{more}")
    return remarks


def _settings(run: RunConfig) -> dict[str, Any]:
    """Dotted name -> value of what decides the result."""

    def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield name, value
            return
        for key, child in value.items():
            yield from leaves(child, f"{name}.{key}" if name else key)

    return {name: value for name, value in leaves(to_dict(run), "") if name.partition(".")[0] not in FREE_FIELDS}


def _difference(one: Record, other: Record) -> str:
    """In what two questions differ, in words."""
    for split in ("train", "test"):
        if part_of(one, split).get("fingerprint") != part_of(other, split).get("fingerprint"):
            names = [short(str(part_of(record, split).get("name", "?"))) for record in (one, other)]
            return f"other {split} images ({names[0]}, {names[1]})"
    if one.get("label_map") != other.get("label_map"):
        return "other label maps"
    if one.get("version") != other.get("version"):
        return f"versions {one.get('version')} and {other.get('version')} of the protocol"
    settings = [part_of(record, "settings") for record in (one, other)]
    fields = sorted(name for name in {*settings[0], *settings[1]} if settings[0].get(name) != settings[1].get(name))
    return f"other settings ({', '.join(fields)})"


def _size(column: Column) -> Any:
    sizes = {part_of(record, "transform").get("size") for record in column.records} - {None}
    return sizes.pop() if len(sizes) == 1 else None


def _text(cell: Cell) -> str:
    if cell.value is None:
        return "–"
    return f"{cell.value}" + (f" ({cell.gain})" if cell.gain else "")


def _markdown(found: Comparison) -> str:
    heads = ["protocol", "test images", "figure", *(markdown(column.title) for column in found.columns)]
    lines = ["# Comparison", "", _LEGEND, "", cells(heads), cells(["---"] * 3 + ["---:"] * len(found.columns))]
    for question in found.questions:
        name = question.protocol + (f" ({question.changed})" if question.changed else "")
        for number, (figure, line) in enumerate(question.rows):
            first = [markdown(name), markdown(question.data)] if number == 0 else ["", ""]
            lines.append(cells([*first, figure, *map(_text, line)]))
    lines += ["", *(f"- {markdown(remark)}" for remark in found.remarks)]
    return "\n".join(lines).rstrip() + "\n"


_LEGEND = (
    "Per cent; higher is better. ± is the standard deviation over seeds or draws, [ , ] the 95 % interval. In brackets "
    "the difference to the first column, in points."
)
