"""Judge a backbone: one JSON record per protocol, a table, and the same network at random init beside it."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from tessella import dist
from tessella.data.sources import ImageSet, open_images
from tessella.engine.checkpoint_files import write_json_atomic
from tessella.engine.config import to_dict
from tessella.engine.launch import cores_at_hand, pick_device
from tessella.engine.run_folder import versions
from tessella.engine.weights import Loaded, random_twin, resolve_backbone, weights_sha256
from tessella.errors import UserError
from tessella.methods.method import Method
from tessella.protocols import EvalData, default_config, protocol_of
from tessella.protocols.clustering import score_assignments
from tessella.protocols.features import frozen
from tessella.text import printable

Record = dict[str, Any]

_ASSIGN_ROWS = 4096  # features that a method assigns at a time: (rows, prototypes) scores must fit the device
_OWN_CLUSTERS = "own-clusters"  # record of a method's own assignments
_OWN_VERSION = 1
# Which figures the table shows; the record holds all.
_SHOWN = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "k1": "nearest neighbour",
    "accuracy": "accuracy",
    "nmi": "NMI",
    "ari": "ARI",
    "purity": "purity",
}


def evaluate(
    backbone: str | Loaded,
    train: str | ImageSet,
    test: str | ImageSet,
    *,
    protocols: Sequence[Any] = ("knn", "linear", "fewlabels", "clustering"),
    out: Path | None = None,
    baseline: bool = False,
    device: str = "auto",
    workers: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
    batch_size: int = 256,
) -> list[Record]:
    """Score a backbone by some protocols; the images pass through it once for all of them.

    Under torchrun the ranks share the work, and every rank returns the same records. A method that clusters
    is also scored by its own assignments, whenever clustering is asked for.

    Args:
        backbone: a run folder, a weights file, random:NETWORK, or one already loaded.
        train: labelled images to learn from, or their name.
        test: labelled images to be judged on, or their name.
        protocols: names as in `protocols.default_config`, or configs of protocols.
        out: folder of `evaluation.json`; a record of the same weights, data and settings is replaced, others
            stay.
        baseline: add the scores of the same network at random init to each record.
        device: auto, cpu, cuda or mps.
        workers: decoding threads; default: the cores at hand.
        seed: of every random choice of the protocols, and of the random init.
        image_size: pixels of the evaluated crop; default: the run's.
        batch_size: images per forward pass of a rank.

    Returns:
        One record per protocol: protocol, version, scores, settings, backbone, weights, train, test,
        transform, seed, device, libraries, seconds (the first protocol's include the features), and
        `baseline`.

    Raises:
        UserError: the input cannot be used; the text says what to change.
    """
    configs = [_seeded(default_config(p) if isinstance(p, str) else p, seed) for p in protocols]
    earlier = _earlier_records(out)  # before hours of work, not after
    on = join_ranks(device)
    with _full_float32():
        loaded = backbone
        if isinstance(loaded, str):
            loaded = resolve_backbone(loaded, image_size=image_size, seed=seed)
        train_images = _open(train)
        test_images = train_images if test == train else _open(test)
        workers = workers or cores_at_hand()
        data = EvalData(train_images, test_images, loaded.transform, on, workers, batch_size)
        records = score(loaded, data, configs, seed)
        if baseline:
            _add_baselines(records, configs, random_twin(loaded, seed), data)
        if dist.rank() == 0:
            if out is not None:
                new = {_identity(record) for record in records}
                kept = [record for record in earlier if _identity(record) not in new]
                write_json_atomic(out / "evaluation.json", kept + records)
            print_scores(records)
        dist.barrier()  # no rank goes on before the file is there
    return records


def score(loaded: Loaded, data: EvalData, configs: Sequence[Any], seed: int) -> list[Record]:
    """One record per protocol; where clustering is asked for, one more for a method that clusters itself."""
    records = [_record(loaded, data, config, seed) for config in configs]
    own = loaded.method is not None and loaded.method.clusters
    if own and "clustering" in (record["protocol"] for record in records):
        records.append(_own_clusters(loaded, data, seed))
    return records


def print_scores(records: list[Record]) -> None:
    """The records' main figures in per cent: a table on a terminal, plain lines elsewhere."""
    with_baseline = any("baseline" in record for record in records)
    heads = ["protocol", "figure", "score", *(["random init"] if with_baseline else [])]
    rows = [row[: len(heads)] for record in records for row in _table_rows(record)]
    if not sys.stdout.isatty():
        widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
        for row in [heads, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = f"{records[0]['backbone']} on {records[0]['test']['name']}" if records else ""
    table = Table(title=escape(printable(title)))
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


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
    atexit.register(_leave_ranks)
    return on


def _leave_ranks() -> None:
    if dist.is_launched():
        torch_dist.destroy_process_group()


def _open(images: str | ImageSet) -> ImageSet:
    return open_images(images, labels=True) if isinstance(images, str) else images


def _record(loaded: Loaded, data: EvalData, config: Any, seed: int) -> Record:
    name, function = protocol_of(config)
    start = time.perf_counter()
    scores = function(loaded.backbone, data, config)
    return _signed(name, config.version, scores, to_dict(config), loaded, data, seed, start)


def _own_clusters(loaded: Loaded, data: EvalData, seed: int) -> Record:
    """How well the method's own prototypes or groups agree with the classes of the test images."""
    method = loaded.method
    assert method is not None and method.clusters
    start = time.perf_counter()
    features = data.features(loaded.backbone, "test")
    assert features.labels is not None
    present, labels = features.labels.unique(return_inverse=True)
    scores = score_assignments(assign(method, features.x, data.device), labels, method.clusters)
    sizes = {"split": "test", "clusters": method.clusters, "classes": len(present)}
    return _signed(_OWN_CLUSTERS, _OWN_VERSION, scores | sizes, {}, loaded, data, seed, start)


def assign(method: Method, features: Tensor, device: torch.device) -> Tensor:
    """The method's own cluster of each image: (n, feature_dim) features -> (n,) int64 on the CPU."""
    method.to(device)
    with frozen(method), torch.inference_mode():
        return torch.cat([method.assign(x.to(device)).cpu() for x in features.split(_ASSIGN_ROWS)])


def _signed(
    name: str,
    number: int,
    scores: Record,
    settings: Record,
    loaded: Loaded,
    data: EvalData,
    seed: int,
    start: float,
) -> Record:
    """The scores with everything that they depend on."""
    return {
        "protocol": name,
        "version": number,
        "scores": scores,
        "settings": settings,
        "backbone": loaded.name,
        "network": to_dict(loaded.config),
        "weights": weights_sha256(loaded.backbone),
        "train": _described(data, "train"),
        "test": _described(data, "test"),
        "transform": to_dict(loaded.transform),
        "seed": seed,
        "device": torch.cuda.get_device_name(data.device) if data.device.type == "cuda" else data.device.type,
        "ranks": dist.world_size(),
        "libraries": versions(),
        "seconds": round(time.perf_counter() - start, 3),
    }


def _add_baselines(records: list[Record], configs: list[Any], twin: Loaded, data: EvalData) -> None:
    """Untrained prototypes mean nothing, so a method's own clusters get no baseline."""
    for record, config in zip(records, configs, strict=False):
        _, function = protocol_of(config)
        scores = function(twin.backbone, data, config)
        record["baseline"] = {"name": twin.name, "weights": weights_sha256(twin.backbone), "scores": scores}


def _described(data: EvalData, split: str) -> Record:
    images = data.train if split == "train" else data.test
    skipped = data.skipped(split)
    return {
        "name": images.name,
        "fingerprint": images.fingerprint,
        "images": len(images),
        "classes": len(data.labels(split).unique()),
        "skipped": None if skipped is None else len(skipped),  # None: the protocol did not look at this split
    }


def _identity(record: Any) -> str:
    """What makes two records answers to one question."""
    asked = {key: record.get(key) for key in ("protocol", "version", "settings", "weights", "transform", "seed")}
    asked |= {split: (record.get(split) or {}).get("fingerprint") for split in ("train", "test")}
    return json.dumps(asked, sort_keys=True)


def _earlier_records(out: Path | None) -> list[Record]:
    if out is None:
        return []
    path = out / "evaluation.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else "[]"
        records = json.loads(text)
    except OSError as error:
        raise UserError(f"cannot use {out} for results: {error.strerror}; choose another --out") from None
    except ValueError:
        records = None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} is not a list of records of an evaluation: move it away or choose another --out")
    return records


def _seeded(config: Any, seed: int) -> Any:
    """The config with the evaluation's seed, where it takes one; k-means takes several, from it on."""
    names = {field.name for field in dataclasses.fields(config)}
    if "seed" in names:
        return dataclasses.replace(config, seed=seed)
    if "seeds" in names:
        return dataclasses.replace(config, seeds=tuple(seed + i for i in range(len(config.seeds))))
    return config


def _table_rows(record: Record) -> list[list[str]]:
    scores, other = record["scores"], record.get("baseline", {}).get("scores", {})
    shown = dict(_SHOWN)
    for name in scores:
        if name.startswith("top1_") and name[5:].isdigit():
            shown[name] = f"top-1, {name[5:]} label{'s' * (name != 'top1_1')} per class"
    return [
        [record["protocol"], label, _percent(scores, name), _percent(other, name)]
        for name, label in shown.items()
        if name in scores
    ]


def _percent(scores: Record, name: str) -> str:
    if name not in scores:
        return "-"
    stds = scores.get("std", {})
    spread = stds.get(name, scores.get(name.replace("top1_", "std_")) if name.startswith("top1_") else None)
    return f"{100 * scores[name]:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")


@contextmanager
def _full_float32() -> Iterator[None]:
    """Compare neighbours and distances in full float32, though a run may have allowed coarser products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
