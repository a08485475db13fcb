"""The page of an atlas: one HTML file that needs no server; with many images the pictures are in scripts beside it.

The page is a program of its own, `templates/*.js`. It gets its content as a JSON text in the page: numbers as base64 of
little-endian arrays, names of files as strings, never as markup. The pictures are sheets of many thumbnails, because
the header of a file for each would cost more than the thumbnail.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from tessella import files
from tessella.atlas.content import Content
from tessella.report.page import render

_ONE_FILE = 30_000  # images; beyond, pictures are loaded when they are needed
# A page of 20,000 images stays below 20 MB. Sides are multiples of 16, the blocks of WebP: neighbours do not mix.
_SIDES = ((4_000, 96, 65), (12_000, 64, 60), (math.inf, 48, 40))  # up to so many images: pixels, quality of WebP
_SHEET = 768  # pixels of a sheet's side
_SHEETS_PER_SCRIPT = 8
_FOLDER = "page"  # of the scripts
_SCRIPT_NAME = re.compile(r"\d{4}-[0-9a-f]{16}\.js")
_PROGRAM = ("names.js", "data.js", "map.js", "wall.js", "inbox.js", "atlas.js")


def write_page(content: Content, folder: Path) -> Path:
    """Write the page of an atlas, replacing an older one whole or not at all.

    Args:
        content: all that it shows.
        folder: of the atlas, gets `atlas.html`, and beyond 30,000 images scripts with the pictures in `page/`.

    Returns:
        Path of the HTML file.

    Raises:
        FileError: the disk is full, the folder is a link, ...
    """
    files.make_folder(folder)
    side, quality = next(size for images, *size in _SIDES if len(content.keys) <= images)
    side = min(side, content.side)
    sheets = (base64.b64encode(sheet).decode("ascii") for sheet in picture_sheets(content, side, quality))
    scripts: list[str] = []
    inline: list[str] = []
    if len(content.keys) > _ONE_FILE:
        scripts = _write_scripts(sheets, folder)
    else:
        inline = list(sheets)
    path = folder / "atlas.html"
    files.write_text(path, _html(content, side, inline, scripts))
    _remove_scripts(folder, keep=scripts)  # only now: until the rename the old page needs its own
    return path


def picture_sheets(content: Content, side: int, quality: int) -> Iterator[bytes]:
    """The thumbnails as WebP files, as many in a row and as many rows as fit into 768 pixels.

    Args:
        content: gives the thumbnails.
        side: pixels of each thumbnail on the sheets.
        quality: of WebP, in [0, 100].
    """
    columns = _columns(side)
    for start in range(0, len(content.keys), columns**2):
        stop = min(start + columns**2, len(content.keys))
        lines = -(-(stop - start) // columns)
        pictures = np.zeros((lines * columns, content.side, content.side, 3), np.uint8)
        pictures[: stop - start] = content.thumbnails(start, stop)
        grid = pictures.reshape(lines, columns, content.side, content.side, 3).swapaxes(1, 2)
        sheet = Image.fromarray(grid.reshape(lines * content.side, columns * content.side, 3))
        file = io.BytesIO()
        # All at once: a box filter does not mix neighbours, whose borders stay borders of pixels.
        sheet.resize((columns * side, lines * side), Image.Resampling.BOX).save(file, "WEBP", quality=quality, method=2)
        yield file.getvalue()


def _columns(side: int) -> int:
    return max(1, _SHEET // max(1, side))


def _html(content: Content, side: int, inline: list[str], scripts: list[str]) -> str:
    templates = resources.files("tessella.atlas") / "templates"
    program = "".join((templates / name).read_text(encoding="utf-8") for name in _PROGRAM)
    program = f'"use strict";\n(() => {{\n{program}}})();\n'
    style = "".join(
        source.read_text(encoding="utf-8")
        for source in (resources.files("tessella.report") / "templates" / "palette.css", templates / "atlas.css")
    )
    data = page_data(content) | {"pictures": _pictures(side, scripts)}
    return render(
        "atlas.html.j2",
        {
            "title": content.title,
            "images": content.total,
            "policies": _policies(program, style, with_scripts=bool(scripts)),
            "style": Markup(style),
            "program": Markup(program),
            "data": Markup(_json_in_html(data)),
            "sheets": inline,
        },
        package="tessella.atlas",
    )


def _json_in_html(data: dict[str, Any]) -> str:
    """JSON in ASCII without "<", which alone could end the element or open a comment."""
    numpy_numbers = methodcaller("item")
    return json.dumps(data, ensure_ascii=True, allow_nan=False, default=numpy_numbers).replace("<", "\\u003c")


def _pictures(side: int, scripts: list[str]) -> dict[str, Any]:
    return {"side": side, "columns": _columns(side), "scripts": scripts, "sheetsPerScript": _SHEETS_PER_SCRIPT}


def _policies(program: str, style: str, with_scripts: bool) -> list[str]:
    """Policies of the page. A script must satisfy all of them.

    Scripts of pictures are admitted by two rules: only our own program may add them ('strict-dynamic'), and only from
    where the page itself is. Hashes would say more, but browsers accept none for scripts that are read from the disk.
    """
    own = _hash(program)
    rules = "default-src 'none'; script-src {}; style-src {}; img-src data: blob:; base-uri 'none'; form-action 'none'"
    if not with_scripts:
        return [rules.format(own, _hash(style))]
    return [rules.format(f"{own} 'strict-dynamic'", _hash(style)), f"script-src {own} 'self' file:"]


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _write_scripts(sheets: Iterator[str], folder: Path) -> list[str]:
    """Write the sheets as scripts that hand them to the page.

    Returns:
        Their addresses relative to the page. A name holds a hash of the text: an old page keeps its own scripts until
        the new one is complete.
    """
    files.make_folder(folder / _FOLDER, inside=folder)
    written: list[str] = []
    block: list[str] = []

    def write() -> None:
        text = f"tessellaPictures({len(written)}, {json.dumps(block)});\n"
        name = f"{len(written):04d}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.js"
        files.write_text(folder / _FOLDER / name, text, inside=folder)
        written.append(f"{_FOLDER}/{name}")
        block.clear()

    for sheet in sheets:
        block.append(sheet)
        if len(block) == _SHEETS_PER_SCRIPT:
            write()
    if block:
        write()
    return written


def _remove_scripts(folder: Path, keep: list[str]) -> None:
    if not (folder / _FOLDER).is_dir():
        return
    files.refuse_link(folder / _FOLDER, inside=folder)
    for path in (folder / _FOLDER).iterdir():
        if _SCRIPT_NAME.fullmatch(path.name) and f"{_FOLDER}/{path.name}" not in keep:
            files.remove(path, inside=folder)


# --- content as JSON ----------------------------------------------------------------------------------------


def page_data(content: Content) -> dict[str, Any]:
    """What the page's program reads, apart from the pictures; `templates/data.js` is its counterpart."""
    labels = sorted(set(content.labels))
    number = {label: i for i, label in enumerate(labels)}
    n = len(content.keys)
    arrays = {
        "ids": _packed(content.ids, "i8"),
        "sizes": _packed(content.sizes, "i4"),
        "flags": _packed(content.flags, "u1"),
        "fine": _packed(content.fine, "i4"),
        "runnerUp": _packed(content.runner_up, "i4"),
        "margin": _packed(content.margin, "f4"),
        "typicality": _packed(content.typicality, "f4"),
        "outlier": _packed(content.outlier, "f4"),
        "place": None if content.place is None else _shares(content.place),
        "neighbours": _packed(content.neighbours, "i4"),
        "similarity": _packed(np.rint(content.similarity * 32767), "i2"),
        "components": _packed(content.components, "i1"),
        "label": _packed(np.array([number[label] for label in content.labels]), "i4"),
    }
    return {
        "title": content.title,
        "atlas": content.atlas,
        "revision": content.revision,
        "banner": content.banner,
        "stages": content.stages,
        "facts": list(content.facts.items()),
        "total": content.total,
        "count": n,
        "keys": content.keys,
        "href": content.href,
        "labels": labels,
        "clusters": [asdict(cluster) for cluster in content.clusters],
        "inbox": [asdict(group) for group in content.inbox],
        "unreadable": content.unreadable,
        "events": content.events,
        "arrays": arrays,
    }


def _shares(values: NDArray[np.floating]) -> dict[str, str]:
    """Numbers of [0, 1] in 16 bits, which is finer than any screen."""
    return _packed(np.rint(np.clip(values, 0, 1) * 65535), "u2")


def _packed(values: NDArray[Any], kind: str) -> dict[str, str]:
    data = np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()
    return {"kind": kind, "data": base64.b64encode(data).decode("ascii")}
