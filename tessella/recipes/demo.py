"""`tessella demo`: embedded digits, no network, minutes on two cores; what pretraining buys, in one table.

For each seed: pretrain on the unlabelled train split, then evaluate the backbone and the same network at random init on
held-out digits. Raw pixels are evaluated once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from tessella import files
from tessella.data.sources import open_images
from tessella.engine.launch import cores_at_hand, pick_device
from tessella.engine.pretrain import pretrain
from tessella.evaluation.evaluate import Record, score
from tessella.protocols.clustering import ClusteringConfig
from tessella.protocols.features import EvalData
from tessella.protocols.knn import KnnConfig
from tessella.protocols.linear import FewLabelsConfig, LinearConfig
from tessella.ranges import Repeats, checked
from tessella.recipes import recipe
from tessella.report.grid import Grid
from tessella.report.run import report
from tessella.run.config import Device
from tessella.weights.resolve import Loaded, random_twin, resolve_backbone

_PROTOCOLS = (KnnConfig(), FewLabelsConfig(labels_per_class=(1,), draws=20), LinearConfig(), ClusteringConfig())


class Column(NamedTuple):
    """One figure of the table and its place in the records."""

    title: str
    protocol: str
    score: str


COLUMNS = (
    Column("kNN", "knn", "top1"),
    Column("10 labels", "fewlabels", "top1_1"),
    Column("linear", "linear-fast", "top1"),
    Column("k-means ACC", "clustering", "accuracy"),
    Column("NMI", "clustering", "nmi"),
    Column("ARI", "clustering", "ari"),
)


class Pixels(nn.Module):
    """The baseline without a network: the values of the pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.feature_dim = 3 * size * size

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, size, size) -> (b, 3 * size * size)."""
        return x.flatten(1)


@checked
def demo(out: Path, *, seeds: Repeats = 3, device: Device = "auto") -> Path:
    """Pretrain on the embedded digits, print the table, write the report.

    Args:
        out: an empty or missing folder; becomes the run folder of the first seed, with the others in `seed-N`.
        seeds: number of runs.
        device: as in a run's configuration.

    Returns:
        The report's path.

    Raises:
        UserError: the folder is not empty, or an argument is out of range.
    """
    records: list[Record] = []
    for seed in range(seeds):
        config = dataclasses.replace(recipe("swav_digits"), seed=seed, device=device)
        print(f"Pretraining on 1437 digits without their labels, seed {seed} ({seed + 1} of {seeds})", flush=True)
        run = pretrain(config, out if seed == 0 else out / f"seed-{seed}")
        loaded = resolve_backbone(str(run))
        transform = loaded.transform
        train, test = (open_images(f"digits::{split}", labels=True) for split in ("train", "test"))
        data = EvalData(train, test, transform, pick_device(device), cores_at_hand())
        if seed == 0:
            pixels = Loaded(Pixels(transform.size), config.backbone, transform, None, "raw pixels")
            records += score(pixels, data, _PROTOCOLS, seed)
        random_init = score(random_twin(loaded, seed), data, _PROTOCOLS, seed)
        baselines = {one["protocol"]: {"name": one["backbone"], "scores": one["scores"]} for one in random_init}
        pretrained = score(loaded._replace(name="pretrained"), data, _PROTOCOLS, seed)
        records += [*random_init, *pretrained]
        beside = [one | {"baseline": baselines.get(one["protocol"])} for one in pretrained]
        files.write_json(run / "evaluation.json", beside)
    print_table(records)
    page = report(out, device=device)
    print(f"\nReport: {page}\nNext:   tessella scan IMAGES, then tessella pretrain swav_cpu --data IMAGES --out RUN")
    return page


def print_table(records: list[Record]) -> None:
    """Means over the seeds in per cent, with their standard deviation."""
    rows = []
    for name in ("raw pixels", "random init", "pretrained"):
        cells = [name]
        for column in COLUMNS:
            values = [
                100 * record["scores"][column.score]
                for record in records
                if record["protocol"] == column.protocol and record["backbone"].startswith(name)
            ]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}")
        rows.append(cells)
    heads = ["features", *(column.title for column in COLUMNS)]
    Grid("Held-out digits, per cent (mean ± standard deviation over seeds)", heads, rows, words=1).show()
