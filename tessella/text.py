"""Foreign text, made safe to show or read: file names, class names, error messages, YAML."""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any

# Control, format, surrogate, private, unassigned; line and paragraph separators.
_CONTROLS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_YAML_CHARACTERS = 2**20
_YAML_DEPTH = 100
_FORMULA = ("=", "+", "-", "@", "'")  # first characters of formulas in spreadsheets, and our mark


def printable(text: str) -> str:
    """`text` on one line; control characters, line breaks, text-direction marks and broken UTF-8 as escapes."""
    return "".join(
        c.encode("unicode_escape", "surrogatepass").decode("ascii") if unicodedata.category(c) in _CONTROLS else c
        for c in text
    )


def cell(text: str) -> str:
    """`text` for a table that a spreadsheet may open: printable, and never a formula.

    If it begins like one and is no number, or begins with an apostrophe, an apostrophe is put before it.
    """
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) and not _is_number(text) else text


def plain_yaml(text: str) -> Any:
    """Tables, lists, texts and numbers (5e-4 too) from YAML; nothing in it is run.

    Raises:
        yaml.YAMLError: it is no YAML, or has a tag of a program.
        ValueError: it is too long or too deep, or has aliases, with which a few lines become gigabytes.
    """
    import yaml

    loader, _ = _yaml_kinds()
    if len(text) > _YAML_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; up to {_YAML_CHARACTERS:,} are read")
    depth = 0
    for event in yaml.parse(text, loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _YAML_DEPTH:
            raise ValueError(f"it is nested more than {_YAML_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases (*name): write out what they stand for")
    return yaml.load(text, loader)


def yaml_text(value: Any) -> str:
    """YAML that `plain_yaml` reads as `value`, in the order of its keys."""
    import yaml

    return str(yaml.dump(value, Dumper=_yaml_kinds()[1], sort_keys=False, allow_unicode=True))


@functools.cache
def _yaml_kinds() -> tuple[Any, Any]:
    """PyYAML's safe reader and writer, for which 5e-4 is a number, as in YAML 1.2 and JSON; PyYAML's is a text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    class Dumper(yaml.SafeDumper):
        pass

    for kind in (Loader, Dumper):
        number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
        kind.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader, Dumper


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
