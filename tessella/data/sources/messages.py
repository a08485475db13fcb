"""Messages of several sources: files that are not read, parts and splits that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from tessella.errors import UserError
from tessella.text import printable

_ENDINGS = 6  # that are named


def not_read(passed_over: dict[str, int]) -> str:
    """The files of `ImageSet.passed_over` in words: "12 .heic, 3 .mp4, 1 hidden", and how .heic can be read."""
    most = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{count:,} {printable(ending)}" for ending, count in most[:_ENDINGS]]
    rest = sum(count for _, count in most[_ENDINGS:])
    words += [f"{rest:,} others"] if rest else []
    heic = any(ending in passed_over for ending in (".heic", ".heif"))
    return ", ".join(words) + ("; .heic is read after: pip install 'tessella[heic]'" if heic else "")


def part_not_found(data: str, part: str, choices: Sequence[str]) -> str:
    """The message for a part that holds no images, with the existing ones that are nearest to it."""
    near = difflib.get_close_matches(part, choices, 3) or sorted(choices)[:5]
    hint = f": there are {', '.join(map(printable, near))}" if near else ""
    return f"{printable(data)} has no part {printable(part)!r} that holds images{hint}"


def with_parents(folders: Iterable[str]) -> list[str]:
    """Folders and all folders above them, in order."""
    parts = (folder.split("/") for folder in folders if folder)
    return sorted({"/".join(names[: depth + 1]) for names in parts for depth in range(len(names))})


def check_split(data: str, split: str, splits: Sequence[str]) -> None:
    """Raise a UserError, with the existing splits, if a data set by name does not have this one."""
    if split not in splits:
        base = data.partition("::")[0]
        raise UserError(f"{data}: no such split; there are {', '.join(f'{base}::{name}' for name in splits)}")
