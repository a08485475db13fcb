"""The records of evaluations in a folder: one for each question, written as soon as it is answered."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tessella import dist
from tessella.errors import UserError
from tessella.run.checkpoints import write_json_atomic

Record = dict[str, Any]

NAME = "evaluation.json"
PARTS = ("baseline", "supervised")  # other backbones that answered a record's question
_ASKED = ("protocol", "version", "settings", "network", "weights", "transform", "seed", "label_map")


def identity(record: Record) -> str:
    """What makes two records answers to one question."""
    asked = {key: record.get(key) for key in _ASKED}
    asked |= {split: (record.get(split) or {}).get("fingerprint") for split in ("train", "test")}
    return json.dumps(asked, sort_keys=True)


class RecordFile:
    """`evaluation.json` of a folder; without one, records are only held.

    Raises:
        UserError: the folder cannot be used, or holds something else of that name.
    """

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.records = [] if out is None else read_records(out, make=True)

    def share(self) -> None:
        """Every rank sees what rank 0 has read."""
        self.records = dist.broadcast_object(self.records)

    def find(self, asked: str) -> Record | None:
        """The record of this identity."""
        return next((record for record in self.records if identity(record) == asked), None)

    def find_part(self, asked: str) -> Record | None:
        """Name, weights and scores of a backbone that has answered this question, wherever they stand."""
        return next((part for question, part in self._answers() if question == asked), None)

    def put(self, record: Record) -> None:
        """Add a record, in the place of one about the same question, and write the file on rank 0."""
        asked = identity(record)
        places = [i for i, other in enumerate(self.records) if identity(other) == asked]
        if places:
            self.records[places[0]] = record
        else:
            self.records.append(record)
        self.write()

    def write(self) -> None:
        """Write the file on rank 0, whole or not at all."""
        if self.out is not None and dist.rank() == 0:
            write_json_atomic(self.out / NAME, self.records)

    def predictions(self, record: Record) -> str | None:
        """Folder below `out` for what is predicted: named like the record, and no other record's."""
        if self.out is None:
            return None
        taken = {other.get("predictions") for other in self.records if identity(other) != identity(record)}
        names = (f"predictions/{record['protocol']}" + (f"-{i}" if i > 1 else "") for i in range(1, len(taken) + 2))
        return next(name for name in names if name not in taken)

    def _answers(self) -> Iterator[tuple[str, Record]]:
        for record in self.records:
            keys = ("network", "weights", "transform")
            yield (
                identity(record),
                {"name": record.get("backbone"), "scores": record.get("scores")}
                | {key: record.get(key) for key in keys},
            )
            for name in PARTS:
                part = record.get(name)
                if isinstance(part, dict):
                    yield identity(record | {key: part.get(key, record.get(key)) for key in keys}), part


def read_records(out: Path, *, make: bool = False) -> list[Record]:
    """The records of a folder; none where there is no file.

    Args:
        out: the folder.
        make: make it if it is missing.

    Raises:
        UserError: the folder cannot be used, or holds something else of that name.
    """
    path = out / NAME
    try:
        if make:
            out.mkdir(parents=True, exist_ok=True)
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot use {out} for results: {error.strerror}; choose another --out") from None
    except (ValueError, RecursionError):
        records = None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} is not a list of records of an evaluation: move it away or choose another --out")
    return records


def finite(value: Any) -> Any:
    """The value with None for every number that JSON cannot say: a diverged training still has a record."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
