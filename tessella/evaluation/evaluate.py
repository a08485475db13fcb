"""Judge a backbone: one JSON record per protocol, written at once, with other backbones' figures beside it.

    what is asked for -> tasks (`plan`) -> their data opened and checked (`data`)
    -> task by task: the backbone, the same network at random init, a supervised one -> evaluation.json (`records`)

What the folder's file holds already is not computed again.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tessella import dist
from tessella.console import note
from tessella.data.sources import ImageSet
from tessella.data.transform import Interpolation
from tessella.engine.launch import cores_at_hand, join_ranks
from tessella.engine.watch import Watch
from tessella.errors import UserError
from tessella.evaluation.data import Data, Shelf, described, transform_of
from tessella.evaluation.plan import Source, Task, plan, read_data_file
from tessella.evaluation.records import Record, RecordFile, finite, identity
from tessella.methods.method import Method
from tessella.protocols import EvalData, Protocol, protocol_of, record_name
from tessella.protocols.clustering import score_assignments
from tessella.protocols.duplicates import DuplicatesConfig
from tessella.protocols.features import ImageData, frozen
from tessella.protocols.scoring import save_predictions
from tessella.run.config import to_dict
from tessella.run.folder import versions
from tessella.weights.resolve import Loaded, random_twin, resolve_backbone, weights_sha256

__all__ = ["Record", "assign", "evaluate", "score"]

_RANK_TIMEOUT = 40.0  # seconds without a sign of life after which the other ranks give one up
_ASSIGN_ROWS = 4096  # features that a method assigns at a time: (rows, prototypes) scores must fit the device
_FOLDERS = {"baseline": "random-init", "supervised": "supervised"}  # of predictions, below the backbone's own


def evaluate(
    backbone: str | Loaded,
    train: str | ImageSet | None = None,
    test: str | ImageSet | None = None,
    *,
    data: Path | None = None,
    label_map: Path | None = None,
    images: str | None = None,
    protocols: Sequence[Any] = (),
    out: Path | None = None,
    baseline: bool = False,
    supervised: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    seed: int = 0,
    seeds: int | None = None,
    image_size: int | None = None,
    interpolation: Interpolation | None = None,
    batch_size: int = 256,
    again: bool = False,
) -> list[Record]:
    """Score a backbone by some protocols; the images pass through it once for all that need its features.

    Arguments are those of `tessella.evaluate`; `backbone`, `train` and `test` may also be what is loaded or open
    already, and `protocols` configs of protocols. Under torchrun the ranks share the work, and every rank returns the
    same records. A method that clusters is also scored by its own assignments, whenever clustering is asked for.
    Everything is checked before the first protocol runs and before anything is written.

    Returns:
        One record per protocol, and per seed where each is a training of its own: protocol, changed (from the
        protocol's setting), version, kind, scores, settings, backbone, network, weights, train, test, label_map,
        transform, seed, device, ranks, warnings about the data, libraries, date, seconds (the first protocol's include
        the features), predictions; near_copies, the test images that are near-copies of train images; and `baseline`
        and `supervised`, with name, weights, network, transform and scores.

    Raises:
        UserError: the input cannot be used; the text says what to change.
    """
    if (data is None) == (train is None and test is None) or (train is None) != (test is None):
        raise UserError("the images are named by --train and --test, or by --data FILE.yaml: give the two, or the file")
    file = None if data is None else read_data_file(data)
    if file is not None and label_map is not None:
        raise UserError(f"a label map belongs into {file.name}: classes: {{label_map: {label_map}}}")
    if file is not None and images is not None:
        raise UserError(f"the images of a COCO file belong into {file.name}: boxes: {{images: {images}}}")
    source = None if file else Source(train, test, None if label_map is None else str(label_map), images)
    tasks = plan(protocols, source, file, seed=seed, seeds=seeds)
    on = join_ranks(device)
    with Watch(_RANK_TIMEOUT, "The same command continues after the last record"), _full_float32():
        with dist.shared_errors():
            loaded = backbone
            if not isinstance(loaded, Loaded):
                loaded = resolve_backbone(loaded, image_size=image_size, seed=seed)
            loaded = _resized(loaded, interpolation)
            others: dict[str, Callable[[int], _Judged]] = {}
            if baseline:
                others["baseline"] = functools.cache(lambda one: _Judged.of(random_twin(loaded, one)))
            if supervised is not None:
                second = _Judged.of(_resized(resolve_backbone(supervised, image_size=image_size), interpolation))
                others["supervised"] = lambda one: second
        shelf = Shelf(on, workers or cores_at_hand(), batch_size)
        judging = _Judging(RecordFile.read(out), shelf, _Judged.of(loaded), others, again)
        possible = judging.check(tasks + _own_clusters(loaded, tasks))
        with RecordFile.opened(out) as judging.records:
            return judging.answers(possible)


def score(loaded: Loaded, data: EvalData, configs: Sequence[Any], seed: int) -> list[Record]:
    """One record per protocol; where clustering is asked for, one more for a method that clusters itself."""
    source, judged = Source(data.train, data.test), _Judged.of(loaded)
    tasks = [Task(record_name(c), c, protocol_of(c), "classes", source, seed) for c in configs]
    return [_answer(task, judged, data, _question(task, judged, data)) for task in tasks + _own_clusters(loaded, tasks)]


def _resized(loaded: Loaded, interpolation: Interpolation | None) -> Loaded:
    """The backbone, with images that are resized by another rule."""
    if interpolation is None:
        return loaded
    return loaded._replace(transform=dataclasses.replace(loaded.transform, interpolation=interpolation))


class _Judged(NamedTuple):
    """A backbone, and the hash of its weights."""

    loaded: Loaded
    weights: str

    @classmethod
    def of(cls, loaded: Loaded) -> _Judged:
        return cls(loaded, weights_sha256(loaded.backbone))


@dataclass
class _Judging:
    """Tasks on one shelf of data, answered into one file."""

    records: RecordFile  # what was answered before, and where answers go
    shelf: Shelf
    judged: _Judged  # the backbone in question
    others: Mapping[str, Callable[[int], _Judged]]  # part of a record -> for a seed, the backbone that it is about
    again: bool  # compute what was answered before

    def check(self, tasks: Sequence[Task]) -> list[Task]:
        """The tasks that the data allow, opened and checked; those asked for by name must be among them."""
        possible, known = [], []
        for task in tasks:
            with _leaving_out(task):
                data = self.shelf.data(task, self.judged.loaded.transform)
                if self._known(_question(task, self.judged, data)) is not None:
                    known.append(task.name)
                elif task.protocol.check is not None:
                    task.protocol.check(data, task.config)
                possible.append(task)
        if not possible:
            raise UserError("the data allow none of these protocols: the lines above say why")
        if known:
            _say(f"already in {self.records.out}, not computed again (--again does): {', '.join(dict.fromkeys(known))}")
        return possible

    def answers(self, tasks: Sequence[Task]) -> list[Record]:
        """One record per task; one that was not asked for by name is left out when its protocol refuses the data."""
        records = []
        for number, task in enumerate(tasks, 1):
            with _leaving_out(task):
                records.append(self._judge(task, f"({number} of {len(tasks)})"))
        return records

    def _judge(self, task: Task, place: str) -> Record:
        """The task's record, with the figures of the other backbones beside it; each is written when it is there."""
        data = self.shelf.data(task, self.judged.loaded.transform)
        question = _question(task, self.judged, data)
        record = self._known(question)
        if record is None:
            _say(f"{task.name} {place}")
            predictions = self.records.predictions(question)
            answer = _answer(task, self.judged, data, question, self.records.folder(predictions))
            answer |= {"predictions": predictions, "near_copies": self.shelf.near_copies(data, predictions)}
            record = dist.broadcast_object(answer)
            self.records.put(record)
        for part, other in self.others.items():
            if not isinstance(task.config, _ALONE):
                with _leaving_out(task):
                    self._beside(task, record, part, other(task.seed))
        return record

    def _beside(self, task: Task, record: Record, part: str, other: _Judged) -> None:
        """Put another backbone's figures into the record, under the name `part`."""
        data = self.shelf.data(task, other.loaded.transform)
        own = {"network": to_dict(other.loaded.config), "weights": other.weights, "transform": transform_of(data)}
        answer = None if self.again else self.records.find_part(identity(record | own))
        if answer is None:
            _say(f"{task.name} of {other.loaded.name}")
            predictions = record.get("predictions")
            folder = self.records.folder(f"{predictions}/{_FOLDERS[part]}") if predictions else None
            answer = dist.broadcast_object(_scores(task, other, data, folder))
        record[part] = answer | own | {"name": other.loaded.name}
        self.records.write()

    def _known(self, question: Record) -> Record | None:
        return None if self.again else self.records.find(identity(question))


@contextmanager
def _leaving_out(task: Task) -> Iterator[None]:
    """A task that was not named may fail."""
    try:
        yield
    except UserError as error:
        if task.required:
            raise
        _say(f"left out: {task.name}: {error}")


@dataclass(frozen=True)
class _OwnClustersConfig:
    """A method's own assignments have no settings."""

    version: ClassVar[int] = 1


# Untrained prototypes mean nothing, and copies do not depend on the backbone: no other backbone is scored.
_ALONE = (_OwnClustersConfig, DuplicatesConfig)


def _own_clusters(loaded: Loaded, tasks: Sequence[Task]) -> list[Task]:
    """Where clustering is asked for, a method's own prototypes or groups are compared with the classes too."""
    method = loaded.method
    if method is None or not method.clusters:
        return []
    protocol = Protocol("the method's own clusters", _OwnClustersConfig, functools.partial(_score_own, method))
    return [
        task._replace(name="own-clusters", config=_OwnClustersConfig(), protocol=protocol)
        for task in tasks
        if task.name == "clustering"
    ]


def _score_own(method: Method, backbone: nn.Module, data: EvalData, config: _OwnClustersConfig) -> dict[str, Any]:
    """How well a method's own assignments of the test images agree with their classes."""
    features = data.features(backbone, "test")
    assert features.labels is not None and method.clusters
    present, labels = features.labels.unique(return_inverse=True)
    assigned = assign(method, features.x, data.device)
    columns = {"label": [data.classes[i] for i in features.labels.tolist()], "cluster": assigned.tolist()}
    save_predictions(data.predictions, "own-clusters", data.test, features.rows, columns)
    scores = score_assignments(assigned, labels, method.clusters)
    return scores | {"split": "test", "clusters": method.clusters, "classes": len(present)}


def assign(method: Method, features: Tensor, device: torch.device) -> Tensor:
    """The method's own cluster of each image: (n, feature_dim) features -> (n,) int64 on the CPU."""
    method.to(device)
    with frozen(method), torch.inference_mode():
        return torch.cat([method.assign(x.to(device)).cpu() for x in features.split(_ASSIGN_ROWS)])


def _question(task: Task, judged: _Judged, data: Data) -> Record:
    """What decides a task's figures."""
    return {
        "protocol": task.name,
        "version": task.config.version,
        "settings": to_dict(task.config),
        "network": to_dict(judged.loaded.config),
        "weights": judged.weights,
        "train": {"fingerprint": data.train.fingerprint},
        "test": {"fingerprint": data.test.fingerprint},
        "label_map": getattr(data, "label_map", None),
        "transform": transform_of(data),
        "seed": task.seed,
    }


def _answer(task: Task, judged: _Judged, data: Data, question: Record, folder: Path | None = None) -> Record:
    """The scores with everything that they depend on; predictions go to `folder`."""
    answer = _scores(task, judged, data, folder)
    return (
        {"protocol": task.name, "version": task.config.version, "scores": answer["scores"]}
        | question
        | {
            "changed": task.changed,
            "kind": task.kind,
            "backbone": judged.loaded.name,
            "train": described(data, "train"),
            "test": described(data, "test"),
            "device": torch.cuda.get_device_name(data.device) if data.device.type == "cuda" else data.device.type,
            "ranks": dist.world_size(),
            "warnings": list(getattr(data, "warnings", ())),
            "libraries": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": answer["seconds"],
        }
    )


def _scores(task: Task, judged: _Judged, data: Data, folder: Path | None) -> Record:
    start = time.perf_counter()
    data.predictions = folder
    if isinstance(data, ImageData):
        data.title = task.name
    scores = finite(task.protocol.function(judged.loaded.backbone, data, task.config))
    return {"scores": scores, "seconds": round(time.perf_counter() - start, 3)}


def _say(text: str) -> None:
    """A line on stderr, from rank 0."""
    if dist.rank() == 0:
        note(text)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Compare neighbours and distances in full float32, though a run may have allowed coarser products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
