"""Names of clusters and labels of images: the log of what a person has decided, and what follows from it.

The page writes `names.json`; `tessella label` and all that follows read it. An event is one action:

    {"action": "name", "clusters": ["2.1", "3"], "name": "beach", "time": "2026-01-31T09:30:00Z"}
    {"action": "split", "cluster": "2.1.3", "images": ["81925", ...]}
    {"action": "label", "images": ["81925", ...], "name": "beach"}
    {"action": "drop", "images": ["81925", ...]}
    {"action": "keep", "images": ["81925", ...]}
    {"action": "undo"}

- *name*: a cluster's images get the name. Several clusters in one event are merged: they are one class. A cluster below
  a named one may have a name of its own, which counts for its images. The name "" takes a name away.
- *split*: the images that are listed become PATH.1, the others PATH.2, clusters as any other.
- *label*: single images; counts more than any cluster's name. The name "" takes the label away.
- *drop*, *keep*: dropped images get no label and are left out of all that follows; *keep* takes a drop back.
- *undo*: the last event that is neither an undo nor taken back already is taken back.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tessella import files
from tessella.errors import UserError

Event = dict[str, Any]

FORMAT, VERSION = "tessella names", 1
_LIMIT = 1 << 30  # bytes of names.json
_LONGEST = 200  # characters of a name
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # kinds of characters that no name has; joiners of emoji are none of them
_SURE, _ASKED = 0.8, 0.5  # share of a new cluster's labelled images that carry a name over; that is asked about
_FIELDS = {  # action -> what it needs
    "name": ("clusters", "name"),
    "split": ("cluster", "images"),
    "label": ("images", "name"),
    "drop": ("images",),
    "keep": ("images",),
    "undo": (),
}


class Labels(NamedTuple):
    """What follows from events for each image."""

    label: list[str]  # (n,) "" for none, or for a dropped image
    source: list[str]  # (n,) "image", "cluster 2.1", or ""
    dropped: NDArray[np.bool_]  # (n,)
    path: list[str]  # (n,) cluster, after splits


class Carried(NamedTuple):
    """Names that go over to another clustering."""

    events: list[Event]
    unsure: list[tuple[str, str, float]]  # path of a fine cluster, the name that most of it had, their share


def read_names(path: Path) -> tuple[str, list[Event]]:
    """The clustering that a names.json belongs to, and its events.

    Raises:
        UserError: not such a file, or an event that is none of the module's.
    """
    document = files.read_json(path, _LIMIT)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} is no file of names: give the names.json that the page of an atlas has saved")
    if document.get("version") != VERSION:
        raise UserError(f"{path} is of version {document.get('version')!r}; this Tessella reads version {VERSION}")
    events = document.get("events")
    if not isinstance(events, list):
        raise UserError(f"{path} has no list of events")
    for number, event in enumerate(events, start=1):
        problem = _problem(event)
        if problem:
            raise UserError(f"{path}, event {number}: {problem}")
    return str(document.get("revision", "")), events


def names_document(atlas: str, revision: str, events: Sequence[Event]) -> dict[str, Any]:
    """What names.json holds."""
    return {"format": FORMAT, "version": VERSION, "atlas": atlas, "revision": revision, "events": list(events)}


def _problem(event: Any) -> str:
    if not isinstance(event, dict) or event.get("action") not in _FIELDS:
        return f"its action is none of {', '.join(_FIELDS)}"
    for name in _FIELDS[event["action"]]:
        value = event.get(name)
        if name in ("clusters", "images"):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                return f"`{name}` must be a list of texts"
        elif not isinstance(value, str):
            return f"`{name}` must be a text"
        elif name == "name" and (len(value) > _LONGEST or any(unicodedata.category(c) in _CONTROL for c in value)):
            return f"a name has at most {_LONGEST} characters, none of them a control character"
    return ""


def standing(events: Iterable[Event]) -> list[Event]:
    """The events that no undo has taken back."""
    left: list[Event] = []
    for event in events:
        if event["action"] != "undo":
            left.append(event)
        elif left:
            left.pop()
    return left


def resolve(events: Iterable[Event], fine: Sequence[str], ids: NDArray[np.int64]) -> Labels:
    """Label of each image.

    Args:
        events: in order.
        fine: (n,) path of each image's fine cluster.
        ids: (n,) of the images.
    """
    names: dict[str, str] = {}
    halves: dict[str, set[str]] = {}
    labels: dict[str, str] = {}
    dropped: set[str] = set()
    for event in standing(events):
        action = event["action"]
        if action == "name":
            names.update(dict.fromkeys(event["clusters"], event["name"]))
        elif action == "split":
            halves[event["cluster"]] = set(event["images"])
        elif action == "label":
            labels.update(dict.fromkeys(event["images"], event["name"]))
        elif action == "drop":
            dropped.update(event["images"])
        else:
            dropped.difference_update(event["images"])
    found, sources, paths = [], [], []
    for path, number in zip(fine, ids.tolist(), strict=True):
        image = str(number)
        while path in halves:
            path += ".1" if image in halves[path] else ".2"
        paths.append(path)
        named = next((above for above in _upwards(path) if names.get(above)), "")
        label = labels.get(image) or names.get(named, "")
        source = "image" if labels.get(image) else f"cluster {named}" if named else ""
        left_out = image in dropped
        found.append("" if left_out else label)
        sources.append("" if left_out else source)
    return Labels(found, sources, np.array([str(number) in dropped for number in ids.tolist()], bool), paths)


def _upwards(path: str) -> Iterable[str]:
    """A cluster and those above it."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def carry(events: Sequence[Event], before: dict[int, str], fine: Sequence[str], ids: NDArray[np.int64]) -> Carried:
    """Names for another clustering, perhaps with other images.

    Labels of single images and drops stay. A fine cluster gets a name if four fifths of those of its images that had a
    label from a cluster had this one, and they are at least half of it; if only half agree, it is asked about.

    Args:
        events: of the old clustering.
        before: id of an image -> label that it had from a cluster.
        fine: (n,) path of each image's new fine cluster.
        ids: (n,) of the images.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for path, number in zip(fine, ids.tolist(), strict=True):
        members[path].append(number)
    chosen: dict[str, str] = {}
    unsure = []
    for path, numbers in members.items():
        had = Counter(before[number] for number in numbers if before.get(number))
        if not had:
            continue
        name, count = had.most_common(1)[0]
        share = count / had.total()
        if share >= _SURE and had.total() >= _ASKED * len(numbers):
            chosen[path] = name
        elif share >= _ASKED:
            unsure.append((path, name, share))
    clusters = _joined(chosen, members)
    kept = [event for event in standing(events) if event["action"] in ("label", "drop", "keep")]
    named = [{"action": "name", "clusters": sorted(paths), "name": name} for name, paths in sorted(clusters.items())]
    return Carried(named + kept, sorted(unsure))


def _joined(names: dict[str, str], clusters: Iterable[str]) -> dict[str, list[str]]:
    """Name -> clusters, where a cluster all of whose children have one name stands for them."""
    names, known = dict(names), set(clusters)
    while True:
        children: dict[str, list[str]] = defaultdict(list)
        for path in known:
            above = path.rpartition(".")[0]
            if above:
                children[above].append(path)
        merged = {
            above: names[below[0]]
            for above, below in children.items()
            if len({names.get(path) for path in below}) == 1 and names.get(below[0])
        }
        if not merged:
            break
        for above in merged:
            for path in children[above]:
                names.pop(path)
        names |= merged
        # Only complete families go up further: a parent stands for its children from here on.
        known = {path for path in known if path.rpartition(".")[0] not in children} | set(children)
    found: dict[str, list[str]] = defaultdict(list)
    for path, name in names.items():
        found[name].append(path)
    return found
