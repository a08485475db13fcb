"""The table of an evaluation, on the console, in Markdown, on pages and in notebooks; all from evaluation.json.

A row is one figure: this backbone's, with its spread; those of the same network at random init and of a supervised one,
if they were asked for; and what the five methods have published for that protocol, with the setting.
"""

from __future__ import annotations

import base64
import json
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tessella import files
from tessella.errors import UserError
from tessella.evaluation.records import PARTS, read_records
from tessella.methods import METHODS
from tessella.protocols import PROTOCOLS
from tessella.report.figures import Value, facts, is_number, list_in, table_in, values_over_seeds
from tessella.report.grid import Grid, markdown
from tessella.report.page import literal, render, short
from tessella.report.published import per_cent, reported

Record = Mapping[str, Any]

_SEEDS = ("seed", "seeds", "repeats")  # settings in which trainings of one question may differ
_PICKED = {"c": "C", "lr": "lr", "head_lr": "head lr", "weight_decay": "weight decay"}  # score -> label
_PICTURE_BYTES = 4 << 20
_MOST_NAMED = 5  # classes and mistakes
_HEADS = {"baseline": "random init", "supervised": "supervised"}
_LEGEND = (
    "Per cent; higher is better. ± is the standard deviation over seeds or draws, [ , ] the 95 % interval for one "
    "backbone on other images of this kind; a figure with neither was measured once. In brackets the difference to "
    "random init. Labels shuffled: what the same predictions score when the labels of the test images are put in a "
    "random order. A published figure was got in the setting that its letter names."
)


class Row(NamedTuple):
    """One figure."""

    value: Value
    chance: str  # the same predictions with the labels in a random order; empty if it is not known
    others: list[Value | None]  # of the table's other backbones
    published: dict[str, tuple[str, str]]  # title of a method -> figure and the letter of its footnote
    gain: str  # points above random init; empty without it


class Question(NamedTuple):
    """A protocol in one setting, and all its figures."""

    protocol: str
    changed: str  # what differs from the setting of that name
    seeds: str  # number of trainings, or leave-one-out; empty if there is nothing to say
    rows: list[Row]
    notes: list[str]

    @property
    def title(self) -> str:
        """The protocol, and in brackets what is special."""
        return in_brackets(self.protocol, "; ".join(filter(None, (self.changed, self.seeds))))


class Table(NamedTuple):
    """All figures of one backbone on the same train and test images."""

    backbone: str
    network: str
    train: str
    test: str
    facts: str  # about all figures, as sentences
    heads: list[str]  # of the other backbones
    methods: list[str]  # titles of those with figures published for the same data
    questions: list[Question]
    footnotes: list[tuple[str, str]]  # letter, source of a published figure
    elsewhere: list[str]  # figures published for other data, one line each
    gains: bool  # whether random init is among the others
    details: list[tuple[str, str]]  # name, value
    copies: list[tuple[str, str]]  # test and train image of some near-copies
    sheet: str  # their thumbnails, a file within the folder; empty without

    @property
    def yours(self) -> str:
        """The setting of the figures that are not published ones."""
        return f"Yours: {short(self.test)}, {self.network}."

    def grid(self, published: bool = False) -> Grid:
        """The table as texts."""
        methods = self.methods if published else []
        heads = ["protocol", "figure", "this backbone", "labels shuffled", *self.heads]
        rows = [
            [
                question.title if number == 0 else "",
                row.value.label,
                in_brackets(str(row.value), row.gain),
                row.chance or "–",
                *(str(other or "–") for other in row.others),
                *(in_brackets(*row.published.get(title, ("–", ""))) for title in methods),
            ]
            for question in self.questions
            for number, row in enumerate(question.rows)
        ]
        return Grid(
            f"{self.backbone} on {short(self.test)}", [*heads, *(f"{title}, published" for title in methods)], rows
        )


class Records(list[Record]):
    """Records of an evaluation. A notebook shows them as a table."""

    def _repr_html_(self) -> str:
        return "".join(table.grid().html() for table in tables_of(self))


def tables_of(records: Iterable[Any]) -> list[Table]:
    """Tables from the content of an evaluation.json; what does not look like a record is left out."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if isinstance(record, Mapping) and isinstance(record.get("scores"), Mapping):
            groups.setdefault(json.dumps(_backbone_and_data(record), sort_keys=True), []).append(record)
    return [table for table in map(_table, groups.values()) if table.questions]


def question_of(record: Record) -> str:
    """What two records have in common that are trainings of one question: all but seeds, backbone and data."""
    settings = {name: value for name, value in table_in(record, "settings").items() if name not in _SEEDS}
    return json.dumps([record.get("protocol"), record.get("version"), settings], sort_keys=True)


def values_of_question(records: Sequence[Record], part: str = "") -> dict[str, Value]:
    """The figures of one question, over its seeds.

    Where a protocol has no seed, or records have the same seed, the last one counts. So it does where a protocol
    repeats its trainings itself, because it gives their spread itself.

    Args:
        records: of the question.
        part: "baseline" or "supervised" for the figures of another backbone, if the records have them.
    """
    records = one_per_seed(records)
    scores = [table_in(table_in(record, part) if part else record, "scores") for record in records]
    return values_over_seeds([one for one in scores if one] or [{}], _measures(records[-1]))


def one_per_seed(records: Sequence[Record]) -> list[Record]:
    """The records of a question that count; see `values_of_question`."""
    settings = table_in(records[-1], "settings")
    if "seed" not in settings or "repeats" in settings:
        return [records[-1]]
    return list({json.dumps(record.get("seed")): record for record in records}.values())


def write_pages(out: Path) -> list[Path]:
    """Write `evaluation.md` and `evaluation.html` of a folder from its `evaluation.json`.

    Returns:
        The paths of both.

    Raises:
        UserError: the file holds no records, or the disk is full.
    """
    tables = tables_of(read_records(out))
    names = dict.fromkeys(table.backbone for table in tables)
    title = ", ".join(names) if len(names) < 4 else f"{len(names)} backbones"
    files.write_text(out / "evaluation.md", in_markdown(tables))
    context = {
        "title": title,
        "tables": tables,
        "sheets": {table.sheet: _picture(out, table.sheet) for table in tables},
    }
    files.write_text(out / "evaluation.html", render("evaluation.html.j2", context))
    return [out / "evaluation.md", out / "evaluation.html"]


def _picture(out: Path, name: str) -> str:
    """A JPEG within a folder as a data URI; empty if there is none, or its name leads out of the folder."""
    path = out / name
    try:
        files.refuse_link(path.parent, inside=out)
        encoded = b"" if path.is_symlink() else files.read_bytes(path, _PICTURE_BYTES)
    except (OSError, UserError):
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(encoded).decode('ascii')}" if encoded else ""


def print_scores(records: Iterable[Record]) -> None:
    """The figures in per cent: a table on a terminal, plain lines elsewhere."""
    tables = tables_of(records)
    for table in tables:
        grid = table.grid()
        (grid if len(tables) > 1 or sys.stdout.isatty() else grid._replace(title="")).show()
        print(literal(table.facts))
        for question in table.questions:
            for note in question.notes:
                if note.startswith("failed"):
                    print(literal(f"{question.protocol}: {note}"))


def in_markdown(tables: Sequence[Table]) -> str:
    """The tables as a Markdown document."""
    lines = ["# Evaluation", "", _LEGEND, ""]
    for table in tables:
        about = f"{table.network}. Learned from {table.train}, judged on {table.test}. {table.facts}"
        grid = table.grid(published=True)
        lines += [f"## {markdown(grid.title)}", "", markdown(about), "", *grid.markdown(), ""]
        if table.footnotes:
            lines += [f"- ({letter}) {markdown(text)}" for letter, text in table.footnotes]
            lines += [f"- {markdown(table.yours)}", ""]
        lists = {
            "Notes": [f"{question.protocol}: {note}" for question in table.questions for note in question.notes],
            "Near-copies, test and train image": [", ".join(pair) for pair in table.copies],
            "Published on other data, for orientation only": table.elsewhere,
        }
        for title, entries in lists.items():
            lines += [f"{title}:", "", *(f"- {markdown(entry)}" for entry in entries), ""] if entries else []
        lines += [*(f"{markdown(name)}: {markdown(value)}  " for name, value in table.details), ""]
    return "\n".join(lines).rstrip() + "\n"


def network_of(record: Record) -> str:
    """The network in words."""
    network = table_in(record, "network")
    words = [str(network.get("name", "network not named")).removeprefix("timm:")]
    if network.get("width") not in (None, 64):
        words.append(f"width {network['width']}")
    if network.get("stem") not in (None, "imagenet"):
        words.append(f"{network['stem']} stem")
    return ", ".join(words)


def name_in(record: Record, split: str) -> str:
    """The name of a record's train or test images."""
    return str(table_in(record, split).get("name", "?"))


def difference(value: Value | None, other: Value | None) -> str:
    """How many points one is above the other; empty if one is not known."""
    return "" if value is None or other is None else f"{100 * (value.mean - other.mean):+.1f}"


def in_brackets(text: str, more: str) -> str:
    """The text, and in brackets more, if there is more."""
    return f"{text} ({more})" if more else text


def _backbone_and_data(record: Record) -> list[Any]:
    """What the records of one table have in common."""
    data = [table_in(record, split).get(key) for split in ("train", "test") for key in ("name", "fingerprint")]
    return [record.get("backbone"), record.get("weights"), record.get("label_map"), *data]


def _table(records: list[Record]) -> Table:
    last = records[-1]
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(question_of(record), []).append(record)
    parts = [part for part in PARTS if any(table_in(record, part) for record in records)]
    letters: dict[str, str] = {}
    elsewhere: list[str] = []
    questions = [_question(group, parts, letters, elsewhere) for group in groups.values()]
    published = {title for question in questions for row in question.rows for title in row.published}
    pairs = [pair for pair in list_in(table_in(last, "near_copies"), "pairs") if isinstance(pair, Mapping)]
    return Table(
        backbone=str(last.get("backbone", "?")),
        network=network_of(last),
        train=name_in(last, "train"),
        test=name_in(last, "test"),
        facts=facts(records),
        heads=[_head(records, part) for part in parts],
        methods=[title for title in (METHODS[name].title for name in METHODS) if title in published],
        questions=[question for question in questions if question.rows],
        footnotes=[(letter, text) for text, letter in letters.items()],
        elsewhere=elsewhere,
        gains="baseline" in parts,
        details=_details(records),
        copies=[(str(pair.get("test")), str(pair.get("train"))) for pair in pairs],
        sheet=str(table_in(last, "near_copies").get("sheet", "")),
    )


def _question(records: list[Record], parts: list[str], letters: dict[str, str], elsewhere: list[str]) -> Question:
    """The figures of a question; footnotes get their letters, and figures of other data are added to `elsewhere`."""
    record, counted = records[-1], one_per_seed(records)
    protocol, test = str(record.get("protocol")), table_in(record, "test")
    others = {part: values_of_question(records, part) for part in parts}
    rows = []
    for name, value in values_of_question(records).items():
        published = {}
        for one in reported(protocol, table_in(record, "settings"), name):
            title = METHODS[one.method].title
            if one.same_data(test.get("images"), test.get("classes")):
                letter = letters.setdefault(f"{one.setting} ({one.source})", _letter(len(letters)))
                published[title] = per_cent(one.value), letter
            else:
                figure = f"{title} {per_cent(one.value)}"
                elsewhere.append(f"{protocol}, {value.label}: {figure} ({one.setting}; {one.source})")
        chance = "" if value.chance is None else f"{100 * value.chance:.1f}"
        gain = difference(value, others.get("baseline", {}).get(name))
        rows.append(Row(value, chance, [other.get(name) for other in others.values()], published, gain))
    notes = [str(note) for one in counted for note in list_in(table_in(one, "scores"), "notes")]
    how = [f"{len(counted)} seeds"] if len(counted) > 1 else []
    how += ["leave-one-out"] if table_in(record, "scores").get("leave_one_out") is True else []
    changed = ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in table_in(record, "changed").items()
    )
    notes += _findings(table_in(record, "scores"))
    return Question(protocol, changed, "; ".join(how), rows, list(dict.fromkeys(notes)))


def _letter(number: int) -> str:
    """Letters of footnotes: a to z, then aa, ab, ..."""
    tens = string.ascii_lowercase[number // 26 - 1] if number >= 26 else ""
    return tens + string.ascii_lowercase[number % 26]


def _measures(record: Record) -> Mapping[str, str]:
    """Scores that the record's protocol declares, and their labels."""
    name = str(record.get("protocol"))
    for key, protocol in PROTOCOLS.items():
        if name in protocol.settings or name == key or name.startswith(f"{key}-"):
            return protocol.measures
    return {}


def _findings(scores: Mapping[str, Any]) -> list[str]:
    """What was picked on train images, the hardest classes, and the most frequent mistakes."""
    lines = []
    tried = table_in(scores, "held_out_top1")
    picked = [f"{label} {scores[name]:g}" for name, label in _PICKED.items() if tried and is_number(scores.get(name))]
    if picked:
        lines.append(f"picked on held-out train images: {', '.join(picked)} (of {len(tried)} settings)")
    classes = {str(name): value for name, value in table_in(scores, "per_class").items() if is_number(value)}
    hardest = sorted(classes, key=lambda name: classes[name])[:_MOST_NAMED]
    if len(classes) > 2:
        lines.append("hardest classes: " + ", ".join(f"{name} {100 * classes[name]:.1f}" for name in hardest))
    mistakes = [one for one in list_in(scores, "mistakes") if isinstance(one, list) and len(one) == 3]
    if mistakes:
        named = (f"{right} taken for {wrong} ({n} images)" for right, wrong, n in mistakes[:_MOST_NAMED])
        lines.append("most frequent mistakes: " + ", ".join(named))
    return lines


def _head(records: list[Record], part: str) -> str:
    names = {str(table_in(record, part).get("name")) for record in records if table_in(record, part)}
    return names.pop() if part != "baseline" and len(names) == 1 else _HEADS[part]


def _details(records: list[Record]) -> list[tuple[str, str]]:
    last = records[-1]
    hashes = {
        "Weights": last.get("weights", "?"),
        "Train images": table_in(last, "train").get("fingerprint", "?"),
        "Test images": table_in(last, "test").get("fingerprint", "?"),
    }
    seconds = sum(record["seconds"] for record in records if is_number(record.get("seconds")))
    libraries = table_in(last, "libraries")
    versions = ", ".join(f"{name} {libraries[name]}" for name in ("tessella", "torch") if libraries.get(name))
    members: dict[str, list[str]] = {}  # of the classes that a label map makes
    for name, counts_as in table_in(last, "label_map").items():
        members.setdefault(str(counts_as), []).append(str(name))
    return [
        *([("Label map", "; ".join(f"{name}: {', '.join(old)}" for name, old in members.items()))] if members else []),
        *((name, f"sha256 {str(value)[:16]}") for name, value in hashes.items()),
        ("Computed", f"{last.get('device', '?')}, {last.get('ranks', 1)} rank(s), {seconds:,.0f} seconds; {versions}"),
    ]
