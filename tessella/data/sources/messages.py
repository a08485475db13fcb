"""What sources of every kind say: foreign names made safe to print, parts that are not there."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from tessella.errors import UserError

_ENDINGS = 6  # that are named


def shown(text: str) -> str:
    """A foreign name made safe to print: no control characters, no broken UTF-8."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)


def not_read(passed_over: dict[str, int]) -> str:
    """Files that are passed over, in words: "12 .heic, 3 .mp4, 1 hidden", and how .heic can be read.

    Args:
        passed_over: of an `ImageSet`.
    """
    most = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{count:,} {shown(ending)}" for ending, count in most[:_ENDINGS]]
    rest = sum(count for _, count in most[_ENDINGS:])
    words += [f"{rest:,} others"] if rest else []
    heic = any(ending in passed_over for ending in (".heic", ".heif"))
    return ", ".join(words) + ("; .heic is read after: pip install 'tessella[heic]'" if heic else "")


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
