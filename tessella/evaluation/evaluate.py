"""Judge a backbone: one JSON record per protocol, written at once, with other backbones' figures beside it.

    what is asked for -> tasks (`evaluation_plan`) -> their data opened and checked -> backbone, then random init, then
    supervised on each -> evaluation.json (`records`)

A question that the folder's file has answered before is not asked again.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from tessella import dist
from tessella.data.sources import ImageSet
from tessella.engine.launch import cores_at_hand, pick_device
from tessella.errors import UserError
from tessella.evaluation.data import Data, Shelf, described, transform_of
from tessella.evaluation.plan import Source, Task, plan, read_data_file
from tessella.evaluation.records import Record, RecordFile, finite, identity
from tessella.methods.method import Method
from tessella.protocols import EvalData, Protocol, protocol_of, record_name
from tessella.protocols.clustering import score_assignments
from tessella.protocols.duplicates import DuplicatesConfig
from tessella.protocols.features import frozen
from tessella.run.config import to_dict
from tessella.run.folder import versions
from tessella.text import printable
from tessella.weights.resolve import Loaded, random_twin, resolve_backbone, weights_sha256

__all__ = ["Record", "assign", "evaluate", "join_ranks", "leave_ranks", "score"]

_ASSIGN_ROWS = 4096  # features that a method assigns at a time: (rows, prototypes) scores must fit the device
_FOLDERS = {"baseline": "random-init", "supervised": "supervised"}  # of predictions, below the backbone's own


def evaluate(
    backbone: str | Loaded,
    train: str | ImageSet | None = None,
    test: str | ImageSet | None = None,
    *,
    data: Path | None = None,
    label_map: Path | None = None,
    protocols: Sequence[Any] = (),
    out: Path | None = None,
    baseline: bool = False,
    supervised: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    seed: int = 0,
    seeds: int | None = None,
    image_size: int | None = None,
    batch_size: int = 256,
    again: bool = False,
) -> list[Record]:
    """Score a backbone by some protocols; the images pass through it once for all that need its features.

    Under torchrun the ranks share the work, and every rank returns the same records. A method that clusters
    is also scored by its own assignments, whenever clustering is asked for.

    Args:
        backbone: a run folder, a weights file, random:NETWORK, or one already loaded.
        train: images to learn from, or their name; what must be known about them, the protocols say.
        test: images to be judged on, or their name.
        data: instead of both, a file that says which data serve which protocol; see `evaluation_plan`.
        label_map: file of classes that count instead of the images' own; see `data.label_map`.
        protocols: names as in `protocols.default_config`, configs of protocols, or "all" for the quick ones that the
            data allow. Default: all with `data`, else kNN, linear, few labels and clustering.
        out: folder of `evaluation.json` and `predictions/`; records of other questions stay.
        baseline: add the scores of the same network at random init to each record.
        supervised: a second backbone to compare with, for example torchvision:resnet50.
        device: auto, cpu, cuda or mps.
        workers: decoding threads; default: the cores at hand.
        seed: of every random choice of the protocols, and of the random init.
        seeds: trainings of each protocol that trains a network, from `seed` on; default: as its setting says.
        image_size: pixels of the evaluated crop; default: the run's.
        batch_size: images per forward pass of a rank.
        again: ask anew what the file of `out` has answered.

    Returns:
        One record per protocol, and per seed where each is a training of its own: protocol, changed (from the
        protocol's setting), version, kind, scores, settings, backbone, network, weights, train, test, label_map,
        transform, seed, device, ranks, libraries, date, seconds (the first protocol's include the features),
        predictions; and `baseline` and `supervised`, with name, weights, network, transform and scores.

    Raises:
        UserError: the input cannot be used; the text says what to change.
    """
    if (data is None) == (train is None and test is None) or (train is None) != (test is None):
        raise UserError("the images are named by --train and --test, or by --data FILE.yaml: give the two, or the file")
    file = None if data is None else read_data_file(data)
    if file is not None and label_map is not None:
        raise UserError(f"a label map belongs into {file.name}: classes: {{label_map: {label_map}}}")
    source = None if file else Source(train, test, None if label_map is None else str(label_map))
    tasks = plan(protocols, source, file, seed=seed, seeds=seeds)
    records = RecordFile(out)  # before hours of work, not after
    on = join_ranks(device)
    records.share()
    with _full_float32():
        loaded = resolve_backbone(backbone, image_size=image_size, seed=seed) if isinstance(backbone, str) else backbone
        other = None if supervised is None else resolve_backbone(supervised, image_size=image_size)
        judging = _Judging(records, Shelf(on, workers or cores_at_hand(), batch_size), again)
        tasks = judging.checked(tasks + _own_clusters(loaded, tasks), loaded)
        answered = judging.answer(tasks, loaded)
        if baseline:
            for one in dict.fromkeys(task.seed for task in tasks):
                twin = random_twin(loaded, one)
                judging.compare({t: r for t, r in answered.items() if tasks[t].seed == one}, tasks, twin, "baseline")
        if other is not None:
            judging.compare(answered, tasks, other, "supervised")
        dist.barrier()  # no rank goes on before the file is there
    return list(answered.values())


def score(loaded: Loaded, data: EvalData, configs: Sequence[Any], seed: int) -> list[Record]:
    """One record per protocol; where clustering is asked for, one more for a method that clusters itself."""
    source = Source(data.train, data.test)
    tasks = [Task(record_name(c), c, protocol_of(c), "classes", source, seed) for c in configs]
    return [_record(task, loaded, data) for task in tasks + _own_clusters(loaded, tasks)]


class _Judging:
    """Tasks on one shelf of data, answered into one file."""

    def __init__(self, file: RecordFile, shelf: Shelf, again: bool) -> None:
        self.file, self.shelf, self.again = file, shelf, again

    def checked(self, tasks: list[Task], loaded: Loaded) -> list[Task]:
        """The tasks that the data allow; those that were asked for by name must be among them."""
        possible = []
        for task in tasks:
            with self._leaving_out(task):
                data = self.shelf.data(task, loaded.transform)
                if task.protocol.check is not None and self._known(task, loaded, data) is None:
                    task.protocol.check(data, task.config)
                possible.append(task)
        if not possible:
            raise UserError("the data allow none of these protocols: the lines above say why")
        return possible

    def answer(self, tasks: list[Task], loaded: Loaded) -> dict[int, Record]:
        """Number of the task -> its record."""
        answered: dict[int, Record] = {}
        ready = []
        for number, task in enumerate(tasks):
            data = self.shelf.data(task, loaded.transform)
            known = self._known(task, loaded, data)
            if known is not None:
                answered[number] = known
                ready.append(task.name)
        if ready:
            _say(f"already in {self.file.out}, not asked again (--again does): {', '.join(dict.fromkeys(ready))}")
        for number, task in enumerate(tasks):
            if number not in answered:
                _say(f"{task.name} ({number + 1} of {len(tasks)})")
                with self._leaving_out(task):
                    data = self.shelf.data(task, loaded.transform)
                    answered[number] = dist.broadcast_object(_record(task, loaded, data, self.file))
                    self.file.put(answered[number])
        return dict(sorted(answered.items()))

    def compare(self, answered: dict[int, Record], tasks: list[Task], other: Loaded, part: str) -> None:
        """Put another backbone's figures beside the records, under the name `part`."""
        weights = weights_sha256(other.backbone)
        for number, record in answered.items():
            task = tasks[number]
            if isinstance(task.config, _OwnClustersConfig | DuplicatesConfig):
                continue  # untrained prototypes mean nothing, and copies are a matter of the images
            data = self.shelf.data(task, other.transform)
            asked = record | {"network": to_dict(other.config), "weights": weights, "transform": transform_of(data)}
            found = None if self.again else self.file.find_part(identity(asked))
            if found is None:
                _say(f"{task.name} of {other.name}")
                start = time.perf_counter()
                with self._leaving_out(task):
                    data.predictions = self._below(record, _FOLDERS[part])
                    scores = finite(task.protocol.function(other.backbone, data, task.config))
                    seconds = round(time.perf_counter() - start, 3)
                    found = dist.broadcast_object({"name": other.name, "scores": scores, "seconds": seconds})
            if found is not None:
                found = found | {key: asked[key] for key in ("network", "weights", "transform")}
                record[part] = found | {"name": other.name}
                self.file.write()

    def _known(self, task: Task, loaded: Loaded, data: Data) -> Record | None:
        return None if self.again else self.file.find(identity(_question(task, loaded, data)))

    def _below(self, record: Record, folder: str) -> Path | None:
        place = record.get("predictions")
        return None if place is None or self.file.out is None else self.file.out / place / folder

    @contextmanager
    def _leaving_out(self, task: Task) -> Iterator[None]:
        """What was not asked for by name may fail."""
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


def _own_clusters(loaded: Loaded, tasks: Sequence[Task]) -> list[Task]:
    """Where clustering is asked for, a method's own prototypes or groups are compared with the classes too."""
    method = loaded.method
    if method is None or not method.clusters:
        return []
    protocol = Protocol(_OwnClustersConfig, partial(_score_own, method))
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
    found = assign(method, features.x, data.device)
    if data.predictions is not None:
        from tessella.protocols.scoring import save_predictions

        columns = {"label": [data.classes[i] for i in features.labels.tolist()], "cluster": found.tolist()}
        save_predictions(data.predictions, "own-clusters", data.test, features.rows, columns)
    scores = score_assignments(found, labels, method.clusters)
    return scores | {"split": "test", "clusters": method.clusters, "classes": len(present)}


def assign(method: Method, features: Tensor, device: torch.device) -> Tensor:
    """The method's own cluster of each image: (n, feature_dim) features -> (n,) int64 on the CPU."""
    method.to(device)
    with frozen(method), torch.inference_mode():
        return torch.cat([method.assign(x.to(device)).cpu() for x in features.split(_ASSIGN_ROWS)])


def _question(task: Task, loaded: Loaded, data: Data) -> Record:
    """What decides a task's figures."""
    return {
        "protocol": task.name,
        "version": task.config.version,
        "settings": to_dict(task.config),
        "network": to_dict(loaded.config),
        "weights": weights_sha256(loaded.backbone),
        "train": {"fingerprint": data.train.fingerprint},
        "test": {"fingerprint": data.test.fingerprint},
        "label_map": getattr(data, "label_map", None),
        "transform": transform_of(data),
        "seed": task.seed,
    }


def _record(task: Task, loaded: Loaded, data: Data, file: RecordFile | None = None) -> Record:
    """The scores with everything that they depend on."""
    start = time.perf_counter()
    record = _question(task, loaded, data)
    place = None if file is None else file.predictions(record)
    data.predictions = None if place is None or file is None or file.out is None else file.out / place
    scores = finite(task.protocol.function(loaded.backbone, data, task.config))
    facts = {
        "changed": task.changed,
        "kind": task.kind,
        "backbone": loaded.name,
        "train": described(data, "train"),
        "test": described(data, "test"),
        "device": torch.cuda.get_device_name(data.device) if data.device.type == "cuda" else data.device.type,
        "ranks": dist.world_size(),
        "libraries": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 3),
        "predictions": place,
    }
    return {"protocol": task.name, "version": task.config.version, "scores": scores} | record | facts


def join_ranks(device: str) -> torch.device:
    """This rank's device; under torchrun, the process group is started unless there is one already."""
    on = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_launched():
        return on
    if on.type == "cuda":
        on = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(on)
    torch_dist.init_process_group("nccl" if on.type == "cuda" else "gloo")
    # Not earlier: torch cannot start a second group under one torchrun, and another evaluation may follow.
    atexit.register(leave_ranks)
    return on


def leave_ranks() -> None:
    """End the process group, if there is one: nothing that ranks share can follow in this process."""
    if dist.is_launched():
        torch_dist.destroy_process_group()


def _say(text: str) -> None:
    """A line on stderr, from rank 0."""
    if dist.rank() == 0:
        print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Compare neighbours and distances in full float32, though a run may have allowed coarser products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
