"""Files of other projects, read without running any of their code."""

from __future__ import annotations

import argparse
import os
import re
import struct
import textwrap
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError  # the name of an error; nothing is unpickled here
from typing import Any, BinaryIO

import numpy as np
import torch

from tessella.errors import UserError
from tessella.files import open_regular
from tessella.run.backbone_file import read_described

SUFFIXES = (".pth", ".pt", ".tar", ".torch", ".bin", ".safetensors")

_SCALAR = np.float64(0).__reduce__()[0]  # what rebuilds a number of numpy; its module has moved between versions
# What official files hold besides tensors, and what does nothing but hold values.
_HARMLESS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")),
    argparse.Namespace,
]


def read_file(path: Path) -> dict[str, Any]:
    """What a checkpoint file holds, on the CPU: tensors, numbers and text in dictionaries and lists.

    Args:
        path: .safetensors, or whatever `torch.save` wrote, under any other name.

    Raises:
        UserError: the file cannot be read, would run code to be read, or holds no named tensors.
    """
    content = read_described(path)[0] if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name: save a state_dict()")
    return content


def _read_torch(path: Path) -> Any:
    try:
        with open_regular(path) as file, torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            _refuse_bomb(path, file)
            warnings.simplefilter("ignore")  # torch warns of pickle protocols; what it cannot read, it refuses
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if culprit is None:
            raise UserError(_unreadable(path, error)) from None
        raise UserError(
            f"{path} holds a Python object ({culprit[1]}) that only code from the file could rebuild, so it is not "
            "read: such a file can do anything to your machine. If you trust who made it, open it there with torch, "
            "take its state_dict, and save that alone: torch.save(state_dict, FILE) or "
            "safetensors.torch.save_file(state_dict, FILE)"
        ) from None
    except Exception as error:  # whatever the parser says of damaged or foreign bytes
        raise UserError(_unreadable(path, error)) from None


def _refuse_bomb(path: Path, file: BinaryIO) -> None:
    """Refuse an archive that unpacks to more than it is: torch.save compresses nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        claimed = 0  # the older format of torch.save, or damaged: torch will say
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if claimed > size:
        raise UserError(
            f"{path} has {size:,} bytes and unpacks to {claimed:,}, which no file of torch.save does: it is not read"
        )


def _unreadable(path: Path, error: Exception) -> str:
    said = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    said = (said.strip().splitlines() or ["the file ends early"])[0]  # torch's advice, which follows, is not for here
    reason = f"{type(error).__name__}: {textwrap.shorten(said, 160)}"
    return f"{path} cannot be read as a file of torch.save ({reason}): is it one, and complete? Download it again"
