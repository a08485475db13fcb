"""How well clusters that are computed without labels agree with the classes.

    unit features -> k-means with one cluster per class -> accuracy (best one-to-one map), NMI, ARI, purity
                     or with several (over-clustering)  -> accuracy when each cluster is named after its majority

The figure depends on the split: the papers differ, so the record names it. Superclasses, such as the 20 of CIFAR-100,
come from the data's label map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.errors import UserError
from tessella.ops import metrics
from tessella.ops.kmeans import kmeans
from tessella.protocols.features import EvalData, progress
from tessella.protocols.protocol import Protocol
from tessella.protocols.scoring import permuted, save_predictions
from tessella.ranges import PositiveInt, Repeats, Seed


@dataclass(frozen=True)
class ClusteringConfig:
    """k-means on unit features: k-means++ starts, the best restart by inertia counts, never by labels."""

    version: ClassVar[int] = 1
    split: Literal["test", "train"] = "test"
    clusters: PositiveInt | None = None  # default: as many as the split has classes, times the next
    clusters_per_class: PositiveInt = 1  # above 1: over-clustering
    restarts: Repeats = 10
    iterations: PositiveInt = 300
    seeds: tuple[Seed, ...] = (0, 1, 2)  # scores are means over these


def clustering(backbone: nn.Module, data: EvalData, config: ClusteringConfig) -> dict[str, Any]:
    """Cluster one split's features and compare with its classes.

    Returns:
        The figures of `score_assignments`, means over the seeds; `std` holds their standard deviations over
        the seeds (sample formula; absent with one seed); `split`, `clusters` and `classes` say what was
        compared.
    """
    features = data.features(backbone, config.split)
    assert features.labels is not None
    present, labels = features.labels.unique(return_inverse=True)
    k = config.clusters or config.clusters_per_class * len(present)
    x = F.normalize(features.x.to(data.device), dim=1)
    runs, assigned = [], {}
    for seed in progress(config.seeds, f"k-means with {k} clusters", len(config.seeds)):
        assignments = kmeans(x, k, restarts=config.restarts, iterations=config.iterations, seed=seed).assignments
        runs.append(score_assignments(assignments, labels, k))
        assigned[f"cluster_{seed}"] = assignments.tolist()
    columns = {"label": [data.classes[i] for i in features.labels.tolist()]} | assigned
    name = data.file_name(f"{_kind(config)}-{config.split}")
    save_predictions(data.predictions, name, data.images(config.split), features.rows, columns)
    names = [name for name in runs[0] if name != "permuted"]
    scores: dict[str, Any] = {name: float(np.mean([run[name] for run in runs])) for name in names}
    chance = [run["permuted"] for run in runs]
    scores["permuted"] = {name: float(np.mean([one[name] for one in chance])) for name in chance[0]}
    if len(runs) > 1:
        scores["std"] = {name: float(np.std([run[name] for run in runs], ddof=1)) for name in names}
    return scores | {"split": config.split, "clusters": k, "classes": len(present)}


def score_assignments(assignments: Tensor, labels: Tensor, clusters: int) -> dict[str, Any]:
    """Agreement of hard assignments with labels, k-means's or a method's own.

    Args:
        assignments: (n,) int64 in [0, clusters).
        labels: (n,) int64, every class from 0 to the largest present.
        clusters: K, empty ones included. With K above the number of classes, purity grows with K and NMI and
            ARI are the figures to compare.

    Returns:
        `accuracy`, where there are as many clusters as classes; `nmi` (arithmetic mean), `ari`, `purity` (accuracy when
        each cluster is named after its majority), `used_clusters`, `perplexity` of the cluster sizes, `largest_share`.
        `permuted`: the agreements to expect with the labels in a random order.

    Raises:
        UserError: there is no image.
    """
    if not len(labels):
        raise UserError("there are no images to score: give a test set with at least one readable image")
    sizes = assignments.bincount(minlength=clusters).numpy()
    by_chance = permuted(lambda order: _agreement(assignments, labels[torch.from_numpy(order)], clusters), len(labels))
    return _agreement(assignments, labels, clusters) | {
        "permuted": by_chance,
        "used_clusters": float((sizes > 0).sum()),
        "perplexity": metrics.perplexity(sizes),
        "largest_share": float(sizes.max() / sizes.sum()),
    }


def _agreement(assignments: Tensor, labels: Tensor, clusters: int) -> dict[str, float]:
    table = metrics.contingency(assignments, labels, clusters, int(labels.max()) + 1)
    scores = {"accuracy": metrics.clustering_accuracy(table)} if table.shape[0] == table.shape[1] else {}
    return scores | {
        "nmi": metrics.normalised_mutual_information(table),
        "ari": metrics.adjusted_rand_index(table),
        "purity": metrics.purity(table),
    }


def _kind(config: ClusteringConfig) -> str:
    return "overclustering" if config.clusters_per_class > 1 else "clustering"


CLUSTERING = Protocol(
    "k-means",
    ClusteringConfig,
    clustering,
    {
        "clustering": ClusteringConfig(),
        "clustering-train": ClusteringConfig(split="train"),
        "overclustering": ClusteringConfig(clusters_per_class=10),
    },
    {"accuracy": "ACC", "nmi": "NMI", "ari": "ARI"},
    quick={"classes": ("clustering", "overclustering")},
    name_of=lambda config: _kind(config) if config.split == "test" else f"{_kind(config)}-{config.split}",
)
