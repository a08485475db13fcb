"""The figures of a record that people look at: what they are called, and how sure they are."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_LABELS = {  # name among the scores -> in words; in the order of a table
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "k1": "nearest neighbour",
    "accuracy": "accuracy",
    "nmi": "NMI",
    "ari": "ARI",
    "purity": "purity",
    "map": "mean AP",
    "box_ap": "box AP",
    "box_ap50": "box AP50",
    "box_ap75": "box AP75",
    "box_ap_small": "box AP, small objects",
    "box_ap_medium": "box AP, medium objects",
    "box_ap_large": "box AP, large objects",
    "mask_ap": "mask AP",
    "mask_ap50": "mask AP50",
    "mask_ap75": "mask AP75",
    "mask_ap_small": "mask AP, small objects",
    "mask_ap_medium": "mask AP, medium objects",
    "mask_ap_large": "mask AP, large objects",
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "near_duplicate_share": "test images with a near-copy in train",
    "best_test_top1": "best epoch, picked on test",
    "best_test_miou": "best evaluation, picked on test",
}
_COUNTED = {  # pattern of names -> in words
    r"top1_(\d{1,6})": "top-1, {} label{} per class",
    r"map_(\d{1,6})": "mean AP, {} positive{} per class",
}


class Value(NamedTuple):
    """A figure in [0, 1], and its spread over seeds or draws, or else where it lies by chance."""

    mean: float
    std: float | None = None  # sample formula
    interval: tuple[float, float] | None = None  # 95 %
    chance: float | None = None  # what the same predictions score with the labels in a random order

    @property
    def text(self) -> str:
        """In per cent."""
        return f"{100 * self.mean:.1f}"

    @property
    def spread(self) -> str:
        """As it stands behind the figure; empty if it is not known."""
        if self.std is not None:
            return f"± {100 * self.std:.1f}"
        if self.interval is not None:
            return f"[{100 * self.interval[0]:.1f}, {100 * self.interval[1]:.1f}]"
        return ""

    def __str__(self) -> str:
        return f"{self.text} {self.spread}".rstrip()


def values_of(scores: Mapping[str, Any]) -> dict[str, Value]:
    """Name -> figure, those that a table shows, in its order; what is not a number is passed over."""
    return {name: Value(scores[name], *_spread(scores, name), _chance(scores, name)) for name in _shown(scores)}


def values_over_seeds(every: Sequence[Mapping[str, Any]]) -> dict[str, Value]:
    """As `values_of`, of several trainings that differ in their seed alone: mean and spread over these."""
    if len(every) == 1:
        return values_of(every[0])
    parts = [values_of(scores) for scores in every]
    shared = [name for name in parts[0] if all(name in part for part in parts)]
    found = {}
    for name in shared:
        values = [part[name].mean for part in parts]
        chances = [chance for part in parts if (chance := part[name].chance) is not None]
        chance = statistics.fmean(chances) if chances else None
        found[name] = Value(statistics.fmean(values), statistics.stdev(values), None, chance)
    return found


def label(name: str) -> str:
    """A figure in words."""
    for pattern, words in _COUNTED.items():
        match = re.fullmatch(pattern, name)
        if match:
            return words.format(match[1], "s" * (match[1] != "1"))
    return _LABELS[name]


def columns(names: Iterable[str]) -> list[str]:
    """Names of figures in the order of a table."""
    return sorted(set(names), key=_order)


def is_number(value: Any) -> bool:
    """Whether it is a number that can be shown; records may come from elsewhere."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12  # no NaN either


def _shown(scores: Mapping[str, Any]) -> Iterator[str]:
    known = [name for name in scores if name in _LABELS or any(re.fullmatch(p, str(name)) for p in _COUNTED)]
    return (name for name in columns(known) if is_number(scores[name]))


def _order(name: str) -> tuple[float, int]:
    number = re.search(r"_(\d{1,6})$", name)
    if name in _LABELS:
        return list(_LABELS).index(name), 0
    return list(_LABELS).index("k1") + 0.5, int(number[1]) if number else 0


def _near_copies(records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [copies for record in records if isinstance(copies := record.get("near_copies"), Mapping)]
    count, share = (found[-1].get(name) if found else None for name in ("near_duplicates", "near_duplicate_share"))
    if not is_number(count) or not is_number(share):
        return []
    if not count:
        return ["No test image has a near-copy among the train images."]
    verb = "image is a near-copy" if count == 1 else "images are near-copies"
    return [f"{count:,} test {verb} of train images ({100 * share:.1f} %): there, scores measure memory."]  # type: ignore[operator]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _spread(scores: Mapping[str, Any], name: str) -> tuple[float | None, tuple[float, float] | None]:
    stds = scores.get("std")
    found = stds.get(name) if isinstance(stds, Mapping) else None
    number = re.search(r"_(\d{1,6})$", name)
    if found is None and number and name not in _LABELS:
        found = scores.get(f"std_{number[1]}")
    interval = scores.get(f"{name}_interval")
    if is_number(found):
        return float(found), None  # type: ignore[arg-type]
    if isinstance(interval, list | tuple) and len(interval) == 2 and all(map(is_number, interval)):
        return None, (float(interval[0]), float(interval[1]))
    return None, None


def _chance(scores: Mapping[str, Any], name: str) -> float | None:
    permuted = scores.get("permuted")
    found = permuted.get(name) if isinstance(permuted, Mapping) else None
    return float(found) if is_number(found) else None  # type: ignore[arg-type]


def facts(records: Sequence[Mapping[str, Any]]) -> str:
    """How many test images there were, what guessing would score, and what else touches every score, as sentences."""
    sentences = []
    tests = [record["test"] for record in records if isinstance(record.get("test"), Mapping)]
    images = next((t["images"] for t in tests if is_number(t.get("images")) and t["images"] > 0), None)
    classes = next((t["classes"] for t in tests if is_number(t.get("classes")) and t["classes"] > 0), None)
    if images:
        sentences.append(f"{images:,.0f} test images.")
    skipped = max((t["skipped"] for t in tests if is_number(t.get("skipped"))), default=0)
    if skipped:
        sentences.append(f"{skipped:,.0f} more could not be read.")
    if classes and all(record.get("kind", "classes") == "classes" for record in records):
        sentences.append(f"Guessing one of {classes:,.0f} classes would score {100 / classes:.1f} %.")
    sentences += _near_copies(records)
    warnings = [warning for record in records for warning in _list(record.get("warnings"))]
    sentences += [f"Beware: {warning}." for warning in dict.fromkeys(map(str, warnings))]
    return " ".join(sentences)
