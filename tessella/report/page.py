"""How every page is made: templates that escape all they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tessella.text import printable


def render(template: str, content: dict[str, Any], package: str = "tessella.report") -> str:
    """The text of a page.

    Args:
        template: a file in the package's folder `templates`.
        content: all that it shows.
        package: where the template is.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        finalize=literal,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    return environment.get_template(template).render(content)


def literal(value: Any) -> Any:
    """Text that shows every character: what a browser would hide, break or turn around becomes an escape.

    Args:
        value: anything; markup from the template stays as it is.
    """
    return value if isinstance(value, Markup) else printable(str(value))


def short(data: str) -> str:
    """A data set's name without the folders above it."""
    base, mark, part = data.partition("::")
    return (Path(base).name or base) + mark + part
