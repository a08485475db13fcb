"""Evaluation of frozen features that are there: kNN, k-means and the fast linear probe beside other code.

    python benchmarks/evaluation_speed.py --out benchmarks/results/evaluation_speed_cpu.json

The features are synthetic: one direction per class plus noise, so that classes overlap. Every peer gets the same rows
and the same settings, and its answers are compared with ours: predictions, inertia, loss. What solo-learn does is
written here from its description, because it cannot be installed beside a current torch.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.table import Table
from side_by_side import compared, in_turn, installed, report, table
from torch import Tensor

from tessella.ops.kmeans import kmeans
from tessella.protocols.knn import knn_predict
from tessella.protocols.linear import fit_logistic

_BLOCK = 256  # queries of one call of the peers' kNN, a batch of a usual validation loader


@dataclass(frozen=True)
class Options:
    """Sizes; the issue's."""

    images: int = 50_000
    dim: int = 512
    queries: int = 2_000
    k: int = 200
    temperature: float = 0.1
    classes: tuple[int, ...] = (10, 1000)  # of the kNN
    clusters: int = 10
    probe_images: int = 10_000
    rounds: int = 3
    threads: int = 1
    memory: bool = True  # peak memory at two numbers of images, each in a fresh process
    seed: int = 0
    out: Path | None = None


def features(images: int, dim: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows and their classes, which overlap: each class is one direction, drowned in noise."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (images,), generator=generator)
    return F.normalize(0.25 * means[labels] + torch.randn(images, dim, generator=generator), dim=1), labels


# --- kNN ------------------------------------------------------------------------------------------------------


def knn_cases(options: Options, classes: int) -> dict[str, Callable[[], Tensor]]:
    """Predictions of all queries."""
    bank, labels = features(options.images, options.dim, classes, options.seed)
    queries, _ = features(options.queries, options.dim, classes, options.seed + 1)
    k, t = options.k, options.temperature

    def ours() -> Tensor:
        return knn_predict(bank, labels, queries, classes=classes, ks=[k], temperatures=[t])[k, t]

    def solo() -> Tensor:
        """As solo-learn's classifier: retrieved labels become one-hot rows, which are weighted and summed."""
        predicted = []
        for part in queries.split(_BLOCK):
            similarity, rows = (part @ bank.T).topk(k, largest=True, sorted=True)
            one_hot = torch.zeros(len(part) * k, classes).scatter_(1, labels[rows].view(-1, 1), 1)
            votes = (one_hot.view(len(part), k, classes) * (similarity / t).exp()[..., None]).sum(dim=1)
            predicted.append(votes.sort(dim=1, descending=True).indices[:, 0])
        return torch.cat(predicted)

    cases: dict[str, Callable[[], Tensor]] = {"solo-learn's way": solo, "tessella": ours}
    if installed("sklearn"):
        from sklearn.neighbors import KNeighborsClassifier

        def weights(distance: Any) -> Any:
            import numpy

            return numpy.exp((1 - distance) / t)

        model = KNeighborsClassifier(k, weights=weights, algorithm="brute", metric="cosine").fit(bank, labels)
        cases = {"scikit-learn": lambda: torch.from_numpy(model.predict(queries))} | cases
    if installed("lightly"):
        from lightly.utils.benchmarking.knn import knn_predict as theirs

        def lightly() -> Tensor:
            parts = [theirs(part, bank.T, labels, classes, k, t)[:, 0] for part in queries.split(_BLOCK)]
            return torch.cat(parts)

        cases = {"lightly": lightly} | cases
    return cases


# --- k-means and the probe ------------------------------------------------------------------------------------


def kmeans_cases(options: Options) -> dict[str, Callable[[], float]]:
    """Inertia of one start by k-means++ and up to 300 iterations."""
    x, _ = features(options.images, options.dim, options.clusters, options.seed)
    cases: dict[str, Callable[[], float]] = {
        "tessella": lambda: kmeans(x, options.clusters, restarts=1, seed=options.seed).inertia
    }
    if installed("sklearn"):
        from sklearn.cluster import KMeans

        rows = x.numpy()

        def theirs() -> float:
            return float(KMeans(options.clusters, n_init=1, tol=1e-4, random_state=options.seed).fit(rows).inertia_)

        cases = {"scikit-learn": theirs} | cases
    return cases


def probe_cases(options: Options) -> dict[str, Callable[[], Tensor]]:
    """Class scores of the training rows under the multinomial logistic regression with C = 0.01.

    scikit-learn stops at a gradient of 1e-4 of its own accord; ours goes on to 1e-6.
    """
    x, labels = features(options.probe_images, options.dim, options.clusters, options.seed)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    c = 0.01

    def ours() -> Tensor:
        return F.linear(x, *fit_logistic(x, labels, options.clusters, c))

    cases: dict[str, Callable[[], Tensor]] = {"tessella": ours}
    if installed("sklearn"):
        from sklearn.linear_model import LogisticRegression

        rows, names = x.numpy(), labels.numpy()

        def theirs(tolerance: float) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = LogisticRegression(C=c, max_iter=1000, tol=tolerance).fit(rows, names)
            return torch.from_numpy(model.decision_function(rows)).float()

        peers = {f"scikit-learn, tol {t:g}": partial(theirs, t) for t in (1e-6, 1e-4)}
        cases = peers | cases
    return cases


def objective(scores: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(scores, labels))


# --- memory ---------------------------------------------------------------------------------------------------

_MEMORY = """
import sys, torch
sys.path.insert(0, {folder!r})
from evaluation_speed import Options, features, knn_predict, kmeans
torch.set_num_threads(1)
options = Options()
images = int(sys.argv[1])
bank, labels = features(images, options.dim, 10, 0)
queries, _ = features(options.queries, options.dim, 10, 1)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark := now
def resident(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
before = resident("VmRSS")
if sys.argv[2] == "knn":
    knn_predict(bank, labels, queries, classes=10, ks=[200], temperatures=[0.1])
else:
    kmeans(bank, 10, restarts=1, iterations=3, seed=0)
print((resident("VmHWM") - before) / 1024, bank.numel() * 4 / 2**20)
"""


def memory(options: Options) -> list[dict[str, Any]]:
    """How far the peak rises above the features themselves, for half and for all of the images, in MiB."""
    rows = []
    for what in ("knn", "kmeans"):
        for images in (options.images // 2, options.images):
            code = _MEMORY.format(folder=str(Path(__file__).parent))
            command = [sys.executable, "-c", code, str(images), what]
            done = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            rows.append(
                {"case": f"{what}, {images:,} images", "rise_mib": float(done[0]), "features_mib": float(done[1])}
            )
    return rows


# --- measuring ------------------------------------------------------------------------------------------------


def measure(options: Options) -> dict[str, list[dict[str, Any]]]:
    """All tables by title; the first case of each is the base."""
    found: dict[str, list[dict[str, Any]]] = {}
    for classes in options.classes:
        cases = knn_cases(options, classes)
        answers = {name: run() for name, run in cases.items()}
        rows = compared(in_turn(cases, options.rounds), next(iter(cases)))
        for row in rows:
            row["per_second"] = 1000 * options.queries / row["ms"]
            row["as_ours"] = float((answers[row["case"]] == answers["tessella"]).float().mean())
        title = (
            f"kNN: {options.queries} queries, bank {options.images} x {options.dim}, k {options.k}, {classes} classes"
        )
        found[title] = rows
    clusterings = kmeans_cases(options)
    inertia = {name: run() for name, run in clusterings.items()}
    rows = compared(in_turn(clusterings, options.rounds), next(iter(clusterings)))
    found[f"k-means: {options.images} x {options.dim}, {options.clusters} clusters"] = [
        row | {"inertia": inertia[row["case"]]} for row in rows
    ]
    probes = probe_cases(options)
    _, labels = features(options.probe_images, options.dim, options.clusters, options.seed)
    losses = {name: objective(run(), labels) for name, run in probes.items()}
    rows = compared(in_turn(probes, options.rounds), next(iter(probes)))
    found[f"L-BFGS probe: {options.probe_images} x {options.dim}, {options.clusters} classes, C 0.01"] = [
        row | {"loss": losses[row["case"]]} for row in rows
    ]
    return found


_MORE = {"per_second": "queries/s", "as_ours": "answers as ours", "inertia": "inertia", "loss": "train loss"}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    results = measure(options)
    tables: list[Table] = []
    for title, rows in results.items():
        tables.append(table(title, rows, {key: name for key, name in _MORE.items() if key in rows[0]}))
    peaks = memory(options) if options.memory else []
    if peaks:
        shown = Table("case", "MiB above the features", "MiB of features", title="Peak memory")
        for row in peaks:
            shown.add_row(row["case"], f"{row['rise_mib']:.0f}", f"{row['features_mib']:.0f}")
        tables.append(shown)
    missing = [peer for peer, module in (("lightly", "lightly"), ("scikit-learn", "sklearn")) if not installed(module)]
    settings = {key: value for key, value in asdict(options).items() if key != "out"}
    result = {"options": settings, "missing_peers": missing, "tables": results, "memory": peaks}
    report(tables, result, "evaluation_speed.py", options.out)
    if missing:
        print(f"not installed, so not compared: {', '.join(missing)}")


if __name__ == "__main__":
    main()
