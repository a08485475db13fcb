"""The records of evaluations in a folder: one for each question, written as soon as its protocol is done."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from tessella import dist, files
from tessella.errors import UserError
from tessella.files import FileError
from tessella.run.lock import only_writer

Record = dict[str, Any]

NAME = "evaluation.json"
LOCK = "evaluation.lock"  # the process that writes here now
PARTS = ("baseline", "supervised")  # other backbones that answered a record's question
_LIMIT = 1 << 30  # bytes of the file
_ABANDONED = 3600.0  # seconds after which an unfinished file belongs to a killed process
_QUESTION = ("protocol", "version", "settings", "network", "weights", "transform", "seed", "label_map")


def identity(record: Record) -> str:
    """What makes two records answers to one question."""
    question = {key: record.get(key) for key in _QUESTION}
    question |= {split: (record.get(split) or {}).get("fingerprint") for split in ("train", "test")}
    return json.dumps(question, sort_keys=True)


class RecordFile:
    """`evaluation.json` of a folder; without one, records are only held."""

    def __init__(self, out: Path | None, records: list[Record]) -> None:
        self.out, self.records = out, records

    @classmethod
    def read(cls, out: Path | None) -> Self:
        """What the folder holds now, the same on every rank; nothing is written.

        Raises:
            UserError: the folder cannot be used, holds something else of that name, or another evaluation writes there.
        """
        records: list[Record] = []
        with dist.shared_errors():
            if out is not None and dist.rank() == 0:
                if (out / LOCK).exists():
                    with only_writer(out, LOCK):
                        pass
                records = read_records(out)
        return cls(out, dist.broadcast_object(records))

    @classmethod
    @contextmanager
    def opened(cls, out: Path | None) -> Iterator[Self]:
        """The file of a folder in which no other evaluation writes as long as the block runs.

        Args:
            out: the folder, made if it is missing; None for none.

        Raises:
            UserError: as `read`.
        """
        with ExitStack() as held:
            with dist.shared_errors():
                if out is not None and dist.rank() == 0:
                    _make(out)
                    held.enter_context(only_writer(out, LOCK))
                    files.remove_unfinished(out, older_than=_ABANDONED)  # a run may be writing there
                records = read_records(out) if out is not None and dist.rank() == 0 else []
            yield cls(out, dist.broadcast_object(records))
            dist.barrier()  # no rank continues before the file is complete

    def find(self, question: str) -> Record | None:
        """The record of this identity."""
        return next((record for record in self.records if identity(record) == question), None)

    def find_part(self, question: str) -> Record | None:
        """Name, weights and scores of a backbone that has answered this question, in whichever record."""
        return next((part for answered, part in self._answers() if answered == question), None)

    def put(self, record: Record) -> None:
        """Add a record, in the place of one about the same question, and write the file on rank 0."""
        identities = [identity(other) for other in self.records]
        place = identities.index(identity(record)) if identity(record) in identities else len(identities)
        self.records[place : place + 1] = [record]
        self.write()

    def write(self) -> None:
        """Write the file on rank 0, whole or not at all."""
        with dist.shared_errors():
            if self.out is not None and dist.rank() == 0:
                files.write_json(self.out / NAME, self.records)

    def predictions(self, record: Record) -> str | None:
        """Folder below `out` for what is predicted: named like the record, and no other record's."""
        if self.out is None:
            return None
        taken = {other.get("predictions") for other in self.records if identity(other) != identity(record)}
        names = (f"predictions/{record['protocol']}" + (f"-{i}" if i > 1 else "") for i in range(1, len(taken) + 2))
        return next(name for name in names if name not in taken)

    def folder(self, place: str | None) -> Path | None:
        """The folder that a record names; the record may come from somebody else.

        Raises:
            UserError: it leads out of `out`, or a folder on the way is a link.
        """
        if self.out is None or place is None:
            return None
        files.refuse_link(self.out / place, inside=self.out)
        return self.out / place

    def _answers(self) -> Iterator[tuple[str, Record]]:
        for record in self.records:
            keys = ("network", "weights", "transform")
            answer = {"name": record.get("backbone"), "scores": record.get("scores")}
            yield identity(record), answer | {key: record.get(key) for key in keys}
            for name in PARTS:
                part = record.get(name)
                if isinstance(part, dict):
                    yield identity(record | {key: part.get(key, record.get(key)) for key in keys}), part


def read_records(out: Path) -> list[Record]:
    """The records of a folder; none where there is no file.

    Raises:
        UserError: the folder cannot be used, or holds something else of that name.
    """
    path = out / NAME
    try:
        records = files.read_json(path, _LIMIT)
    except FileError as error:
        if error.errno not in (None, errno.ENOENT):
            raise _unusable(out, error) from None
        records = [] if error.errno == errno.ENOENT else None
    if not isinstance(records, list) or not all(map(_is_record, records)):
        raise UserError(f"{path} is not a list of records of an evaluation: move it away or choose another --out")
    return records


def _make(out: Path) -> None:
    try:
        files.make_folder(out)
    except OSError as error:
        raise _unusable(out, error) from None


def _unusable(out: Path, error: OSError) -> UserError:
    return UserError(f"cannot use {out} for results: {error.strerror}; choose another --out")


def _is_record(record: Any) -> bool:
    """Whether a value has the form of a record, as far as readers depend on it."""
    if not isinstance(record, dict):
        return False
    answers = [record, *(record[name] for name in PARTS if record.get(name) is not None)]
    tables = [record.get(split) for split in ("train", "test")]
    for answer in answers:
        if not isinstance(answer, dict) or not isinstance(answer.get("scores"), dict):
            return False
        tables.append(answer.get("transform"))
    texts = [record.get("backbone"), *(answer.get("weights") for answer in answers)]
    size = (record.get("transform") or {}).get("size") if isinstance(record.get("transform"), dict) else None
    return (
        all(table is None or isinstance(table, dict) for table in tables)
        and all(text is None or isinstance(text, str) for text in texts)
        and (size is None or isinstance(size, int))
    )


def finite(value: Any) -> Any:
    """The value with None for every number that JSON cannot say: a diverged training still has a record."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
