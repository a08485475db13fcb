"""What sources of every kind say: foreign names made safe to print, parts that are not there."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from tessella.errors import UserError


def shown(text: str) -> str:
    """A foreign name made safe to print: no control characters, no broken UTF-8."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)


def part_not_found(data: str, part: str, choices: list[str]) -> str:
    """The sentence for a part that holds no images.

    Args:
        data: the source as given.
        part: the part as given.
        choices: parts that there are; the nearest are named.
    """
    near = difflib.get_close_matches(part, choices, 3) or sorted(choices)[:5]
    hint = f": there are {', '.join(map(shown, near))}" if near else ""
    return f"{shown(data)} has no part {shown(part)!r} that holds images{hint}"


def check_split(data: str, split: str, splits: Sequence[str]) -> None:
    """Refuse a split that a data set by name does not have.

    Raises:
        UserError: names the splits that there are.
    """
    if split not in splits:
        base = data.partition("::")[0]
        raise UserError(f"{data}: no such split; there are {', '.join(f'{base}::{name}' for name in splits)}")
