"""Files of other projects, read without executing any code from them."""

from __future__ import annotations

import argparse
import io
import os
import pickletools
import re
import struct
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError  # the name of an error; nothing is unpickled here
from typing import Any, BinaryIO

import numpy as np
import torch

from tessella.errors import UserError
from tessella.files import open_regular
from tessella.run.backbone_file import read_described

SUFFIXES = (".pth", ".pt", ".tar", ".torch", ".bin", ".safetensors")

_MOST_LEVELS = 16  # of tuples in tuples; torch writes three
_SCALAR = np.float64(0).__reduce__()[0]  # rebuilds a number of numpy; its module has moved between versions
# What official files hold besides tensors; all of it only stores values.
_HARMLESS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")),
    argparse.Namespace,
]


def read_file(path: Path) -> dict[str, Any]:
    """The content of a .safetensors file or, with any other name, of `torch.save`: tensors, numbers, texts; on the CPU.

    Raises:
        UserError: the file cannot be read, would execute code, or holds no named tensors.
    """
    content = read_described(path)[0] if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name: save a state_dict()")
    return content


def _read_torch(path: Path) -> Any:
    try:
        with open_regular(path) as file, torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            _refuse_bomb(path, file)
            _refuse_nested_tuples(path, file)
            warnings.simplefilter("ignore")  # about pickle protocols; torch refuses what it cannot read
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if culprit is None:
            raise UserError(_unreadable(path, error)) from None
        raise UserError(
            f"{path} holds a Python object ({culprit[1]}) that only code from the file could rebuild, so it is not "
            "read: such a file can do anything to your machine. If you trust its author, open it with torch, take the "
            "state_dict, and save only that: torch.save(state_dict, FILE) or "
            "safetensors.torch.save_file(state_dict, FILE)"
        ) from None
    except Exception as error:  # damaged or foreign bytes raise errors of many types
        raise UserError(_unreadable(path, error)) from None


def _refuse_bomb(path: Path, file: BinaryIO) -> None:
    """Refuse an archive that unpacks to more bytes than it has: torch.save does not compress."""
    try:
        with zipfile.ZipFile(file) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        claimed = 0  # the older format of torch.save, or damaged, which torch reports
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if claimed > size:
        raise UserError(
            f"{path} has {size:,} bytes and unpacks to {claimed:,}, which no file of torch.save does: it is not read"
        )


def _refuse_nested_tuples(path: Path, file: BinaryIO) -> None:
    """Refuse a pickle of deeply nested tuples: as a key of a dictionary they take exponential time to hash."""
    try:
        deep = any(_tuple_levels(pickled) > _MOST_LEVELS for pickled in _pickles(file))
    except (OSError, ValueError, IndexError, NotImplementedError, zlib.error):
        return  # damaged, which torch reports
    finally:
        file.seek(0)
    if deep:
        raise UserError(f"{path} holds tuples in tuples, more than {_MOST_LEVELS} levels of them: it is not read")


def _pickles(file: BinaryIO) -> Iterator[BinaryIO]:
    """The pickles that torch reads: a member of an archive or, in its older format, four in a row."""
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    yield io.BytesIO(archive.read(name))
    except (zipfile.BadZipFile, struct.error):
        file.seek(0)
        yield from [file] * 4


def _tuple_levels(pickled: BinaryIO) -> int:
    """How deeply the tuples of a pickle are nested, without unpickling."""
    stack: list[int | None] = []  # the level of each value; None for a mark
    memo: dict[int, int] = {}
    deepest = 0
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name.endswith("GET"):
            stack.append(memo.get(int(argument or 0), 0))
        elif opcode.name.endswith("PUT") or opcode.name == "MEMOIZE":
            memo[len(memo) if argument is None else int(argument)] = stack[-1] or 0
        else:
            taken: list[int] = []
            for kind in reversed(opcode.stack_before):
                if kind is pickletools.stackslice:
                    while (level := stack.pop()) is not None:
                        taken.append(level)
                elif kind is not pickletools.markobject:
                    taken.append(stack.pop() or 0)
            level = 1 + max(taken, default=0) if "TUPLE" in opcode.name else 0
            deepest = max(deepest, level)
            stack += [None if kind is pickletools.markobject else level for kind in opcode.stack_after]
    return deepest


def _unreadable(path: Path, error: Exception) -> str:
    message = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    message = (message.strip().splitlines() or ["the file ends early"])[0]  # without the advice of torch that follows
    reason = f"{type(error).__name__}: {textwrap.shorten(message, 160)}"
    return f"{path} cannot be read as a file of torch.save ({reason}): is it one, and complete? Download it again"
