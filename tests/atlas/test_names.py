"""Events of names.json: what follows from them, and what goes over to another clustering."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tessella.atlas.names import carry, names_document, read_names, resolve, standing
from tessella.errors import UserError

FINE = ["1.1.1", "1.1.1", "1.1.2", "1.2.1", "2.1.1", "2.1.1"]
IDS = np.array([10, 11, 12, 13, 14, 15])


def name(clusters, text):
    return {"action": "name", "clusters": clusters, "name": text}


def labels(*events):
    return resolve(events, FINE, IDS).label


def test_a_name_holds_for_all_below_and_a_lower_one_counts_more():
    assert labels(name(["1"], "a")) == ["a", "a", "a", "a", "", ""]
    assert labels(name(["1"], "a"), name(["1.1.2"], "b")) == ["a", "a", "b", "a", "", ""]
    assert labels(name(["1.1.2"], "b"), name(["1"], "a")) == ["a", "a", "b", "a", "", ""]
    assert labels(name(["1.2", "2"], "both")) == ["", "", "", "both", "both", "both"]
    assert labels(name(["1"], "a"), name(["1"], "")) == [""] * 6


def test_a_path_is_no_prefix_of_another_number():
    assert resolve([name(["1"], "a")], ["1.1.1", "10.1.1"], np.array([1, 2])).label == ["a", ""]


def test_labels_of_images_count_more_than_clusters_and_drops_more_than_all():
    events = [name(["1"], "a"), {"action": "label", "images": ["11", "15"], "name": "odd"}]
    assert labels(*events) == ["a", "odd", "a", "a", "", "odd"]
    found = resolve([*events, {"action": "drop", "images": ["11", "12"]}], FINE, IDS)
    assert found.label == ["a", "", "", "a", "", "odd"]
    assert found.dropped.tolist() == [False, True, True, False, False, False]
    assert found.source == ["cluster 1", "", "", "cluster 1", "", "image"]
    assert labels(*events, {"action": "drop", "images": ["11"]}, {"action": "keep", "images": ["11"]})[1] == "odd"


def test_a_split_makes_two_clusters_that_are_named_and_split_as_others():
    split = {"action": "split", "cluster": "1.1.1", "images": ["11"]}
    found = resolve([split, name(["1.1.1.1"], "left"), name(["1.1"], "rest")], FINE, IDS)
    assert found.path[:2] == ["1.1.1.2", "1.1.1.1"]
    assert found.label == ["rest", "left", "rest", "", "", ""]


def test_undo_takes_back_one_event_after_the_other():
    events = [name(["1"], "a"), name(["2"], "b"), {"action": "undo"}, {"action": "undo"}, {"action": "undo"}]
    assert standing(events[:3]) == events[:1]
    assert standing(events) == []
    assert standing([*events, name(["2"], "c")]) == [name(["2"], "c")]


def test_names_go_over_where_four_fifths_agree_and_are_asked_about_where_half_do():
    before = {10: "cat", 11: "cat", 12: "cat", 13: "cat", 14: "dog", 15: "dog"}
    ids = np.arange(10, 18)
    new = ["1.1.1"] * 5 + ["1.2.1"] + ["2.1.1"] * 2  # 4 cats and a dog; a dog; two new images
    carried = carry([], before, new, ids)
    assert carried.events == [name(["1.1"], "cat"), name(["1.2"], "dog")] and carried.unsure == []
    mixed = carry([], before, ["1.1.1"] * 3 + ["1.2.1"] * 3 + ["2.1.1"] * 2, ids)
    assert mixed.unsure == [("1.2.1", "dog", pytest.approx(2 / 3))]
    kept = {"action": "drop", "images": ["10"]}
    assert kept in carry([kept], before, new, ids).events


def test_a_cluster_of_mostly_new_images_gets_no_name():
    assert carry([], {1: "cat"}, ["1.1.1"] * 4, np.array([1, 2, 3, 4])).events == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "no file of names"),
        ({"version": 2}, "version 2"),
        ({"events": {}}, "list of events"),
        ({"events": [{"action": "explode"}]}, "event 1"),
        ({"events": [{"action": "name", "clusters": "1", "name": "a"}]}, "`clusters` must be"),
        ({"events": [{"action": "name", "clusters": ["1"], "name": "a\nb"}]}, "control"),
        ({"events": [{"action": "name", "clusters": ["1"], "name": "a" * 300}]}, "200"),
        ({"events": [{"action": "label", "images": [1], "name": "a"}]}, "`images` must be"),
    ],
)
def test_a_file_that_is_no_names_json_is_refused_in_words(tmp_path, change, words):
    path = tmp_path / "names.json"
    path.write_text(json.dumps(names_document("a", "r", []) | change))
    with pytest.raises(UserError, match=words):
        read_names(path)
