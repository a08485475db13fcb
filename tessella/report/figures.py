"""The figures of a record: which are shown, what they are called, and how certain they are."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_LABELS = {  # pattern of a score's name -> label, in the order of a table; a number in the name goes into the label
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "k1": "nearest neighbour",
    r"top1_(\d{1,6})": "top-1, {} label{} per class",
    r"map_(\d{1,6})": "mean AP, {} positive{} per class",
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
_COPIES = ("near_duplicates", "near_duplicate_share")


class Value(NamedTuple):
    """A score in [0, 1] with its spread over seeds or draws or, without one, its confidence interval."""

    label: str
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
        """The text behind the figure; empty if nothing is known."""
        if self.std is not None:
            return f"± {100 * self.std:.1f}"
        if self.interval is not None:
            return f"[{100 * self.interval[0]:.1f}, {100 * self.interval[1]:.1f}]"
        return ""

    def __str__(self) -> str:
        return f"{self.text} {self.spread}".rstrip()


def values_of(scores: Mapping[str, Any], measures: Mapping[str, str] | None = None) -> dict[str, Value]:
    """The scores that a table shows, by name, in the order of the table; what is not a number is left out.

    Args:
        scores: of a record.
        measures: labels of further scores to show, as the record's protocol declares them.
    """
    chance = table_in(scores, "permuted")
    values = []
    for name, score in scores.items():
        place = _place_and_label(name, measures or {})
        if place is not None and is_number(score):
            by_chance = float(chance[name]) if is_number(chance.get(name)) else None
            values.append((place, name, Value(place[-1], score, *_spread(scores, name), by_chance)))
    return {name: value for _, name, value in sorted(values)}


def values_over_seeds(
    trainings: Sequence[Mapping[str, Any]], measures: Mapping[str, str] | None = None
) -> dict[str, Value]:
    """As `values_of`, for the scores of trainings that differ in the seed only: mean and spread over them."""
    every = [values_of(scores, measures) for scores in trainings]
    if len(every) == 1:
        return every[0]
    averages = {}
    for name in every[0]:
        values = [one[name] for one in every if name in one]
        if len(values) == len(every):
            means, chances = [v.mean for v in values], [v.chance for v in values if v.chance is not None]
            chance = statistics.fmean(chances) if chances else None
            averages[name] = Value(values[0].label, statistics.fmean(means), statistics.stdev(means), None, chance)
    return averages


def facts(records: Sequence[Mapping[str, Any]]) -> str:
    """What holds for all scores, as sentences: the number of test images, the score of guessing, near-copies."""
    tests = [table_in(record, "test") for record in records]
    sizes = {
        name: max((test[name] for test in tests if is_number(test.get(name))), default=0)
        for name in ("images", "classes", "skipped")
    }
    sentences = []
    if sizes["images"] > 0:
        sentences.append(f"{sizes['images']:,.0f} test images.")
    if sizes["skipped"] > 0:
        sentences.append(f"{sizes['skipped']:,.0f} more could not be read.")
    if sizes["classes"] > 0 and all(record.get("kind", "classes") == "classes" for record in records):
        guessing = 100 / sizes["classes"]
        sentences.append(f"Guessing one of {sizes['classes']:,.0f} classes would score {guessing:.1f} %.")
    sentences += _near_copies(records)
    warnings = [str(warning) for record in records for warning in list_in(record, "warnings")]
    return " ".join(sentences + [f"Beware: {warning}." for warning in dict.fromkeys(warnings)])


def is_number(value: Any) -> bool:
    """Whether a value can be shown as a number; records may come from elsewhere."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12  # False for NaN


def table_in(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The table of this name in a record; empty if there is none."""
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def list_in(record: Mapping[str, Any], name: str) -> list[Any]:
    """The list of this name in a record; empty if there is none."""
    value = record.get(name)
    return value if isinstance(value, list) else []


def _place_and_label(name: Any, measures: Mapping[str, str]) -> tuple[int, int, str] | None:
    """Where a score stands in a table, and its label; None if it is not shown."""
    for row, (pattern, label) in enumerate(_LABELS.items()):
        if match := re.fullmatch(pattern, str(name)):
            number = int(match[1]) if match.groups() else 0
            return row, number, label.format(number, "s" * (number != 1))
    return (len(_LABELS), 0, measures[name]) if name in measures else None


def _spread(scores: Mapping[str, Any], name: str) -> tuple[float | None, tuple[float, float] | None]:
    """Standard deviation, or else the 95 % interval, if the record has one."""
    std = table_in(scores, "std").get(name, scores.get(f"std_{name.rpartition('_')[2]}"))
    interval = scores.get(f"{name}_interval")
    if is_number(std):
        return float(std), None
    if isinstance(interval, list | tuple) and len(interval) == 2 and all(map(is_number, interval)):
        return None, (float(interval[0]), float(interval[1]))
    return None, None


def _near_copies(records: Sequence[Mapping[str, Any]]) -> list[str]:
    searches = [search for record in records if (search := table_in(record, "near_copies"))]
    count, share = (searches[-1].get(name) for name in _COPIES) if searches else (None, None)
    if count is None or share is None or not is_number(count) or not is_number(share):
        return []
    if not count:
        return ["No test image has a near-copy among the train images."]
    verb = "image is a near-copy" if count == 1 else "images are near-copies"
    return [f"{count:,} test {verb} of train images ({100 * share:.1f} %): there, scores measure memory."]
