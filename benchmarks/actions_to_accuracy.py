"""Name clusters, not images: accuracy of labels and of a classifier against the number of a person's actions.

    python benchmarks/actions_to_accuracy.py --backbone RUN|timm:FOLDER --train LABELLED --test LABELLED --out FILE.json

A simulated annotator sees the atlas of the train images. It knows the true classes, and each action costs one:

- *clusters*: goes through the middle clusters, largest first. One action names a cluster by the class of most of the
  images that it looks at (nine spread evenly from typical to odd; it never counts the others). If fewer than seven of
  nine are of one class, it opens the cluster instead, one action, and goes on with the fine clusters in it.
- *random*, *typical first*, *coverage first*, *select*: one action labels one image. Typical first is scikit-activeml's
  TypiClust (Hacohen et al., ICML 2022), coverage first its CoreSet (Sener and Savarese, ICLR 2018); select is
  `tessella select`. `pip install scikit-activeml`.

Figures: share of the train images that have a label, share of these that are right, and the accuracy on the test images
of logistic regression on the labelled ones. Minutes: 4 s for a label, 6 s for a name, 3 s for opening a cluster; these
are assumptions, stated with the result.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from skactiveml.pool import CoreSet, TypiClust
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import tessella
from tessella.atlas.clusters import cluster
from tessella.atlas.neighbours import exact_neighbours
from tessella.atlas.scores import scores
from tessella.atlas.select import choose
from tessella.atlas.shards import Vectors
from tessella.data.sources import open_images

SECONDS = {"label": 4.0, "name": 6.0, "open": 3.0}
STEPS = (10, 20, 50, 100, 200, 500, 1000)
LOOKED_AT = 9  # images of a cluster
PURE, FAIRLY_PURE = 7 / 9, 0.5  # shares of one class: to name a middle cluster, and a fine one
LIBRARY = 200  # labels that scikit-activeml orders; it takes minutes for more


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--backbone", required=True)
    words.add_argument("--train", required=True)
    words.add_argument("--test", required=True)
    words.add_argument("--images", type=int, default=3000, help="of the train images, drawn at random")
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--features", help="a .npz with x, y, test_x, test_y in the place of a backbone's")
    words.add_argument("--out", type=Path, required=True)
    given = words.parse_args()
    x, y, test_x, test_y = loaded(given)
    rows = []
    for seed in range(given.seeds):
        for name, history in annotated(x, y, seed).items():
            for actions in STEPS:
                state = next((state for state in reversed(history) if state["actions"] <= actions), None)
                if state is None or actions > history[-1]["actions"]:
                    continue
                labelled = state["labels"] >= 0
                classifier = fitted_accuracy(x, state["labels"], test_x, test_y)
                row = {
                    "annotator": name,
                    "seed": seed,
                    "actions": actions,
                    "minutes": round(state["seconds"] / 60, 2),
                    "labelled": float(labelled.mean()),
                    "labels_right": float((state["labels"][labelled] == y[labelled]).mean()),
                    "classifier": classifier,
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    facts = {
        "command": " ".join(sys.argv),
        "tessella": version("tessella"),
        "torch": version("torch"),
        "scikit-learn": version("scikit-learn"),
        "machine": platform.processor() or platform.machine(),
        "train images": len(y),
        "test images": len(test_y),
        "classes": int(y.max()) + 1,
        "seconds per action": SECONDS,
        "date": time.strftime("%Y-%m-%d"),
    }
    given.out.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    print_table(rows)


def loaded(given: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features and classes of train and test."""
    if given.features:
        with np.load(given.features) as file:
            return tuple(file[name] for name in ("x", "y", "test_x", "test_y"))  # type: ignore[return-value]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for part, most in ((given.train, given.images), (given.test, None)):
            images = open_images(part, labels=True)
            out = Path(folder) / f"{len(found)}.parquet"
            features = tessella.embed(given.backbone, images, out)
            labels = np.asarray(images.labels)[features.rows]
            chosen = np.arange(len(labels))
            if most is not None and most < len(labels):
                chosen = np.sort(np.random.default_rng(0).choice(len(labels), most, replace=False))
            found += [features.x.numpy()[chosen], labels[chosen]]
    return tuple(found)  # type: ignore[return-value]


def annotated(x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Annotator -> states: actions and seconds so far, and the labels that follow (-1: none)."""
    vectors = Vectors.of_array(x.astype(np.float32))
    tree = cluster(vectors, seed=seed)
    nearest = exact_neighbours(vectors, 16)
    found = scores(vectors, tree, nearest, np.full(len(y), -1, np.int32))
    paths = np.array(tree.paths)[tree.fine]
    random = np.random.default_rng(seed)
    table = {
        "cluster": paths.tolist(),
        "typicality": found.typicality,
        "margin": found.margin,
        "copy_group": np.full(len(y), -1, np.int32),
        "flags": [""] * len(y),
    }
    nothing = np.zeros(len(y), bool)
    picks = [row for row, _ in choose(table, nothing, nothing, vectors, max(STEPS))]
    unknown = np.full(len(y), np.nan)
    unit = F.normalize(torch.from_numpy(x).float(), dim=1).numpy()
    most = min(max(STEPS), len(y))
    return {
        "clusters": by_clusters(paths, found.typicality, y),
        "random": by_images(random.permutation(len(y))[:most], y),
        "select": by_images(np.array(picks), y),
        "typical first": by_images(TypiClust(random_state=seed).query(unit, unknown, batch_size=LIBRARY), y),
        "coverage first": by_images(CoreSet(random_state=seed).query(unit, unknown, batch_size=LIBRARY), y),
    }


def by_images(order: np.ndarray, y: np.ndarray) -> list[dict[str, Any]]:
    """One action, one label."""
    history = []
    labels = np.full(len(y), -1)
    for actions, row in enumerate(order.tolist(), start=1):
        labels[row] = y[row]
        if actions in STEPS:
            history.append({"actions": actions, "seconds": actions * SECONDS["label"], "labels": labels.copy()})
    return history


def by_clusters(paths: np.ndarray, typicality: np.ndarray, y: np.ndarray) -> list[dict[str, Any]]:
    """Name what looks pure, open the rest; of what is mixed to the end label images, typical first."""
    labels = np.full(len(y), -1)
    history: list[dict[str, Any]] = []

    def act(kind: str, rows: np.ndarray | None = None, label: int = -1) -> None:
        if rows is not None:
            labels[rows] = label
        before = history[-1]["seconds"] if history else 0.0
        history.append({"actions": len(history) + 1, "seconds": before + SECONDS[kind], "labels": labels.copy()})

    middle = np.array([path.rpartition(".")[0] for path in paths])
    opened: list[np.ndarray] = []
    for rows in largest_first([np.flatnonzero(middle == name) for name in np.unique(middle)]):
        label, share = seen(rows, typicality, y)
        if share >= PURE:
            act("name", rows, label)
        else:
            act("open")
            opened += [rows[paths[rows] == name] for name in np.unique(paths[rows])]
    mixed: list[np.ndarray] = []
    for rows in largest_first(opened):
        label, share = seen(rows, typicality, y)
        if share >= FAIRLY_PURE:
            act("name", rows, label)
        else:
            mixed.append(rows[np.argsort(-typicality[rows], kind="stable")])
    for depth in range(max(map(len, mixed), default=0)):
        for rows in mixed:
            if depth < len(rows) and len(history) < max(STEPS):
                act("label", rows[depth : depth + 1], int(y[rows[depth]]))
    return history


def largest_first(parts: list[np.ndarray]) -> list[np.ndarray]:
    return sorted(parts, key=len, reverse=True)


def seen(rows: np.ndarray, typicality: np.ndarray, y: np.ndarray) -> tuple[int, float]:
    """The class of most of the images that are looked at, and its share."""
    order = rows[np.argsort(-typicality[rows], kind="stable")]
    looked_at = order[np.unique(np.linspace(0, len(order) - 1, LOOKED_AT).round().astype(int))]
    kinds, counts = np.unique(y[looked_at], return_counts=True)
    return int(kinds[counts.argmax()]), float(counts.max() / len(looked_at))


def fitted_accuracy(x: np.ndarray, labels: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> float:
    """Of logistic regression on the labelled images."""
    rows = np.flatnonzero(labels >= 0)
    if len(np.unique(labels[rows])) < 2:
        return float((test_y == labels[rows][0]).mean()) if len(rows) else 0.0
    scale = StandardScaler().fit(x)
    model = LogisticRegression(C=0.01, max_iter=100).fit(scale.transform(x[rows]), labels[rows])
    return float((model.predict(scale.transform(test_x)) == test_y).mean())


def print_table(rows: list[dict[str, Any]]) -> None:
    """Mean over seeds; test accuracy of the classifier."""
    names = list(dict.fromkeys(row["annotator"] for row in rows))
    print("\nclassifier, per cent (labels right) after N actions")
    for name in names:
        cells = []
        for actions in STEPS:
            found = [row for row in rows if row["annotator"] == name and row["actions"] == actions]
            if found:
                mean = 100 * np.mean([row["classifier"] for row in found])
                right = 100 * np.mean([row["labels_right"] for row in found])
                cells.append(f"{actions}: {mean:.1f} ({right:.0f})")
        print(f"{name:<15}", "  ".join(cells))


if __name__ == "__main__":
    main()
