"""Text from elsewhere, made safe to show: file names, class names and reasons may hold anything."""

from __future__ import annotations

import unicodedata

# Control, format, surrogate, private, unassigned; line and paragraph separators.
_STEERING = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def printable(text: str) -> str:
    """`text` on one line, every character that could steer a terminal or a reader's eye as a backslash escape.

    Control characters, line breaks, text-direction marks and parts of broken UTF-8 are written out.
    """
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode("ascii") if unicodedata.category(c) in _STEERING else c
        for c in text
    )
