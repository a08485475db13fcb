"""What an evaluation found, as a table: on the console, in Markdown and as a page, all from evaluation.json.

A row is one figure: this backbone's, with its spread; the same network at random init and a supervised one, where they
were asked for; and what the five methods have published for that protocol, with the setting that they published it in.
"""

from __future__ import annotations

import html
import json
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tessella import files
from tessella.evaluation.records import PARTS, read_records
from tessella.report.figures import Value, columns, facts, is_number, label, values_over_seeds
from tessella.report.page import literal, render, short
from tessella.report.published import METHODS, Reported, reported

Record = Mapping[str, Any]

_SEEDS = ("seed", "seeds", "repeats")  # settings in which trainings of one question may differ
_PICKED = {"c": "C", "lr": "lr", "head_lr": "head lr", "weight_decay": "weight decay"}  # names among scores, in words
_WORST = 5  # classes and mistakes that are named
OWN, CHANCE = "this backbone", "labels shuffled"  # heads of columns
_HEADS = {"baseline": "random init", "supervised": "supervised"}


class Row(NamedTuple):
    """One figure."""

    figure: str
    value: Value
    chance: str  # the same predictions with the labels in a random order; empty if it is not known
    others: list[Value | None]  # of the table's other backbones
    published: list[tuple[str, str]]  # for each method of the table a figure and its footnote, or two empty texts
    gain: str  # points above random init; empty without it


class Question(NamedTuple):
    """A protocol in one setting, and all its figures."""

    protocol: str
    changed: str  # what differs from the setting that the name stands for
    seeds: str  # over which the spread is, or how it was judged; empty if there is nothing to say
    rows: list[Row]
    notes: list[str]


class Table(NamedTuple):
    """All figures of one backbone on the same train and test images."""

    backbone: str
    network: str
    train: str
    test: str
    facts: str  # sizes and chance, as sentences
    heads: list[str]  # of the other backbones
    methods: list[str]  # with published figures of the same data for any of the rows
    questions: list[Question]
    footnotes: list[tuple[str, str]]  # letter, where a published figure is from
    elsewhere: list[str]  # published figures of other data, one line each
    gains: bool  # whether random init is among the others
    yours: str  # the setting that those are not of
    details: list[tuple[str, str]]  # name, value
    copies: list[tuple[str, str]]  # test and train image of some near-copies


class Records(list[Record]):
    """Records of an evaluation. A notebook shows them as a table."""

    def _repr_html_(self) -> str:
        return "".join(map(_in_html, tables_of(self)))


def _in_html(table: Table) -> str:
    """A table for a notebook."""
    heads = ["protocol", "figure", OWN, CHANCE, *table.heads]
    rows = [
        [question.protocol if number == 0 else "", row.figure, str(row.value), row.chance, *map(_text, row.others)]
        for question in table.questions
        for number, row in enumerate(question.rows)
    ]
    head = "".join(f"<th>{html.escape(literal(name))}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(literal(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    title = html.escape(literal(f"{table.backbone} on {table.test}, per cent"))
    return f"<table><caption>{title}</caption><tr>{head}</tr>{body}</table>"


def tables_of(records: Iterable[Any]) -> list[Table]:
    """Tables from the content of an evaluation.json; what does not look like a record is passed over."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if isinstance(record, Mapping) and isinstance(record.get("scores"), Mapping):
            groups.setdefault(json.dumps(_place(record), sort_keys=True), []).append(record)
    return [table for table in map(_table, groups.values()) if table.questions]


def question_of(record: Record) -> str:
    """What makes two records trainings of one question: all but the seeds, the backbone and the data."""
    settings = {name: value for name, value in part_of(record, "settings").items() if name not in _SEEDS}
    return json.dumps([record.get("protocol"), record.get("version"), settings], sort_keys=True)


def one_per_seed(records: Sequence[Record]) -> list[Record]:
    """Of records of one question those of its seeds; where a protocol has no seeds, or one seed came twice, the last.

    A protocol that repeats its trainings itself tells their spread itself, so that its last record counts.
    """
    settings = part_of(records[-1], "settings")
    if "seed" not in settings or "repeats" in settings:
        return [records[-1]]
    return list({json.dumps(record.get("seed")): record for record in records}.values())


def write_pages(out: Path) -> list[Path]:
    """Write `evaluation.md` and `evaluation.html` of a folder from its `evaluation.json`.

    Returns:
        The paths of both.

    Raises:
        UserError: there are no records, or the disk refuses.
    """
    tables = tables_of(read_records(out))
    files.write_text(out / "evaluation.md", in_markdown(tables))
    names = dict.fromkeys(table.backbone for table in tables)
    title = ", ".join(names) if len(names) < 4 else f"{len(names)} backbones"
    files.write_text(
        out / "evaluation.html", render("evaluation.html.j2", {"title": title, "tables": tables, "methods": METHODS})
    )
    return [out / "evaluation.md", out / "evaluation.html"]


def print_scores(records: Iterable[Record]) -> None:
    """The figures in per cent: a table on a terminal, plain lines elsewhere."""
    tables = tables_of(records)
    for table in tables:
        title = f"{table.backbone} on {short(table.test)}"
        heads = ["protocol", "figure", OWN, CHANCE, *table.heads]
        rows = [
            [
                question.protocol + _brackets(question) if number == 0 else "",
                *(row.figure, f"{row.value}" + (f" ({row.gain})" if row.gain else ""), row.chance or "–"),
                *map(_text, row.others),
            ]
            for question in table.questions
            for number, row in enumerate(question.rows)
        ]
        print_table(title if len(tables) > 1 or sys.stdout.isatty() else "", heads, rows)
        print(literal(table.facts))
        for question in table.questions:
            for note in question.notes:
                if note.startswith("failed"):
                    print(literal(f"{question.protocol}: {note}"))


def in_markdown(tables: Sequence[Table]) -> str:
    """The tables as a Markdown document."""
    lines = ["# Evaluation", "", _LEGEND, ""]
    for table in tables:
        lines += [f"## {markdown(table.backbone)} on {markdown(short(table.test))}", ""]
        lines += [markdown(f"{table.network}. Learned from {table.train}, judged on {table.test}. {table.facts}"), ""]
        heads = ["protocol", "figure", OWN, CHANCE, *map(markdown, table.heads)]
        heads += [f"{METHODS[name]}, published" for name in table.methods]
        lines += [cells(heads), cells(["---", "---", *["---:"] * (len(heads) - 2)])]
        for question in table.questions:
            name = f"{markdown(question.protocol)}{markdown(_brackets(question))}"
            for number, row in enumerate(question.rows):
                score = f"{row.value}" + (f" ({row.gain})" if row.gain else "")
                published = [f"{value} ({note})" if value else "–" for value, note in row.published]
                first = name if number == 0 else ""
                lines.append(cells([first, row.figure, score, row.chance or "–", *map(_text, row.others), *published]))
        lines.append("")
        lines += [f"- ({letter}) {markdown(text)}" for letter, text in table.footnotes]
        lines += [f"- {markdown(table.yours)}"] if table.footnotes else []
        notes = [f"- {markdown(q.protocol)}: {markdown(note)}" for q in table.questions for note in q.notes]
        lines += [*([""] if table.footnotes else []), *(["Notes:", "", *notes, ""] if notes else [])]
        lines += [f"{markdown(name)}: {markdown(value)}  " for name, value in table.details]
        if table.copies:
            lines += ["", "Near-copies, test and train image:", ""]
            lines += [f"- {markdown(one)}, {markdown(other)}" for one, other in table.copies]
        if table.elsewhere:
            lines += ["", "Published on other data, for orientation only:", "", *map(_bullet, table.elsewhere)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


_LEGEND = (
    "Per cent; higher is better. ± is the standard deviation over seeds or draws, [ , ] the 95 % interval for one "
    "backbone on other images of this kind; a figure with neither was measured once. In brackets the difference to "
    "random init. Labels shuffled: what the same predictions score when the labels of the test images are put in a "
    "random order. A published figure was got in the setting that its letter names."
)


def _place(record: Record) -> list[Any]:
    """What the records of one table share."""
    names = [part_of(record, split).get(key) for split in ("train", "test") for key in ("name", "fingerprint")]
    return [record.get("backbone"), record.get("weights"), record.get("label_map"), *names]


def _table(records: list[Record]) -> Table:
    first = records[-1]
    parts = [name for name in PARTS if any(isinstance(record.get(name), Mapping) for record in records)]
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(question_of(record), []).append(record)
    chosen = [one_per_seed(group) for group in groups.values()]
    train, test = (str(part_of(first, split).get("name", "?")) for split in ("train", "test"))
    notes = _Footnotes()
    test_set = part_of(first, "test")
    size = test_set.get("images"), test_set.get("classes")
    every = [[(name, _published(group[-1], name)) for name in _names(group)] for group in chosen]
    published = [[{m: one for m, one in found.items() if one.same_data(*size)} for _, found in rows] for rows in every]
    elsewhere = [
        f"{group[-1].get('protocol')}, {label(name)}: {METHODS[m]} {_published_text(one.value)} "
        f"({one.setting}; {one.source})"
        for group, rows in zip(chosen, every, strict=True)
        for name, found in rows
        for m, one in found.items()
        if not one.same_data(*size)
    ]
    methods = [m for m in METHODS if any(m in found for rows in published for found in rows)]
    questions = [_question(group, parts, rows, methods, notes) for group, rows in zip(chosen, published, strict=True)]
    return Table(
        backbone=str(first.get("backbone", "?")),
        network=network_of(first),
        train=train,
        test=test,
        facts=facts(records),
        heads=[_head(records, name) for name in parts],
        methods=methods,
        questions=[question for question in questions if question.rows],
        footnotes=[(letter, text) for text, letter in notes.letters.items()],
        elsewhere=elsewhere,
        gains="baseline" in parts,
        yours=f"Yours: {short(test)}, {network_of(first)}.",
        details=_details(records),
        copies=_copies(records),
    )


class _Footnotes:
    """Letters for texts, in the order of their first use."""

    def __init__(self) -> None:
        self.letters: dict[str, str] = {}

    def letter(self, one: Reported) -> str:
        number = len(self.letters)
        tens = string.ascii_lowercase[number // 26 - 1] if number >= 26 else ""
        return self.letters.setdefault(f"{one.setting} ({one.source})", tens + string.ascii_lowercase[number % 26])


def _names(group: list[Record]) -> list[str]:
    """Figures of a question, in order."""
    return columns(values_over_seeds([record["scores"] for record in group]))


def _published(record: Record, name: str) -> dict[str, Reported]:
    found = reported(str(record.get("protocol")), part_of(record, "settings"), name)
    return {one.method: one for one in found}


def _question(
    group: list[Record], parts: list[str], published: list[dict[str, Reported]], methods: list[str], notes: _Footnotes
) -> Question:
    values = values_over_seeds([record["scores"] for record in group])
    others = {name: _part_values(group, name) for name in parts}
    rows = []
    for name, found in zip(columns(values), published, strict=True):
        beside = [
            (_published_text(found[m].value), notes.letter(found[m])) if m in found else ("", "") for m in methods
        ]
        gain = difference(values[name], others.get("baseline", {}).get(name))
        value = values[name]
        by_chance = "" if value.chance is None else f"{100 * value.chance:.1f}"
        rows.append(Row(label(name), value, by_chance, [other.get(name) for other in others.values()], beside, gain))
    told = [str(note) for record in group for note in _list(record["scores"].get("notes"))]
    notes_of_all = dict.fromkeys([*told, *_findings(group[-1]["scores"])])
    changed = part_of(group[-1], "changed")
    how = [f"{len(group)} seeds"] if len(group) > 1 else []
    how += ["leave-one-out"] if group[-1]["scores"].get("leave_one_out") is True else []
    return Question(
        str(group[-1].get("protocol")),
        ", ".join(f"{name} {_plain(value)}" for name, value in changed.items()),
        "; ".join(how),
        rows,
        list(notes_of_all),
    )


def _findings(scores: Mapping[str, Any]) -> list[str]:
    """What was picked on train images, the classes that are hardest, and what they are taken for."""
    lines = []
    tried = part_of(scores, "held_out_top1")
    picked = [f"{words} {scores[name]:g}" for name, words in _PICKED.items() if tried and is_number(scores.get(name))]
    if picked:
        lines.append(f"picked on held-out train images: {', '.join(picked)} (of {len(tried)} settings)")
    classes = {str(name): value for name, value in part_of(scores, "per_class").items() if is_number(value)}
    worst = sorted(classes, key=lambda name: classes[name])[:_WORST]
    if len(classes) > 2:
        lines.append("hardest classes: " + ", ".join(f"{name} {100 * classes[name]:.1f}" for name in worst))
    mistakes = [one for one in _list(scores.get("mistakes")) if isinstance(one, list) and len(one) == 3][:_WORST]
    if mistakes:
        lines.append("most frequent mistakes: " + ", ".join(f"{a} taken for {b} ({n} images)" for a, b, n in mistakes))
    return lines


def _copies(records: list[Record]) -> list[tuple[str, str]]:
    pairs = _list(part_of(records[-1], "near_copies").get("pairs"))
    return [(str(pair.get("test")), str(pair.get("train"))) for pair in pairs if isinstance(pair, Mapping)]


def _published_text(value: float) -> str:
    """As published: one decimal, or two."""
    text = f"{value:g}"
    return text if "." in text else f"{text}.0"


def _part_values(group: list[Record], part: str) -> dict[str, Value]:
    """Figures of another backbone, over the same seeds; of a deterministic one they are the same each time."""
    scores = [record[part]["scores"] for record in group if isinstance(record.get(part), Mapping)]
    scores = [one for one in scores if isinstance(one, Mapping)]
    return values_over_seeds(scores) if scores else {}


def _head(records: list[Record], part: str) -> str:
    if part == "baseline":
        return _HEADS[part]
    names = {str(record[part].get("name")) for record in records if isinstance(record.get(part), Mapping)}
    return names.pop() if len(names) == 1 else _HEADS[part]


def _details(records: list[Record]) -> list[tuple[str, str]]:
    last = records[-1]
    libraries = part_of(last, "libraries")
    seconds = sum(record["seconds"] for record in records if isinstance(record.get("seconds"), int | float))
    versions = ", ".join(f"{name} {libraries[name]}" for name in ("tessella", "torch") if libraries.get(name))
    return [
        *([("Label map", _mapping(last))] if last.get("label_map") else []),
        ("Weights", f"sha256 {str(last.get('weights', '?'))[:16]}"),
        ("Train images", f"sha256 {str(part_of(last, 'train').get('fingerprint', '?'))[:16]}"),
        ("Test images", f"sha256 {str(part_of(last, 'test').get('fingerprint', '?'))[:16]}"),
        ("Computed", f"{last.get('device', '?')}, {last.get('ranks', 1)} rank(s), {seconds:,.0f} seconds; {versions}"),
    ]


def _mapping(record: Record) -> str:
    """Which classes count as one."""
    groups: dict[str, list[str]] = {}
    for name, counts_as in part_of(record, "label_map").items():
        groups.setdefault(str(counts_as), []).append(str(name))
    return "; ".join(f"{name}: {', '.join(members)}" for name, members in groups.items())


def _bullet(text: str) -> str:
    return f"- {markdown(text)}"


def difference(value: Value | None, other: Value | None) -> str:
    """How many points one is above the other; empty if one is not known."""
    return "" if value is None or other is None else f"{100 * (value.mean - other.mean):+.1f}"


def network_of(record: Record) -> str:
    """The network in words."""
    network = part_of(record, "network")
    words = [str(network.get("name", "network not named")).removeprefix("timm:")]
    if network.get("width") not in (None, 64):
        words.append(f"width {network['width']}")
    if network.get("stem") not in (None, "imagenet"):
        words.append(f"{network['stem']} stem")
    return ", ".join(words)


def part_of(record: Record, name: str) -> Mapping[str, Any]:
    """A table among the record's values; empty if it is none."""
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _brackets(question: Question) -> str:
    more = "; ".join(filter(None, (question.changed, question.seeds)))
    return f" ({more})" if more else ""


def _text(value: Value | None) -> str:
    return "–" if value is None else str(value)


def markdown(text: str) -> str:
    """Foreign text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#~&" else c for c in literal(text))


def cells(line: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(line)} |"


def print_table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    """Rows of text below their heads: a drawn table on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        _draw(title, heads, rows)
        return
    widths = [max(len(literal(row[i])) for row in [heads, *rows]) for i in range(len(heads))]
    if title:
        print(f"\n{literal(title)}")
    for row in [heads, *rows]:
        print("  ".join(literal(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _draw(title: str, heads: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    grid = Grid(title=escape(literal(title)))
    for number, head in enumerate(heads):
        grid.add_column(escape(literal(head)), justify="left" if number < 2 else "right")
    for row in rows:
        grid.add_row(*(escape(literal(cell)) for cell in row))
    Console().print(grid)
