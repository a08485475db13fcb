import numpy as np
import pytest

from tessella.data.label_map import read_label_map
from tessella.errors import UserError
from tessella.protocols.clustering import ClusteringConfig, clustering
from tests.protocols.planted import Tiny, eval_data, planted_images


def table(tmp_path, text):
    path = tmp_path / "map.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("header", ["", "class,superclass\n", "\ufeffClass, Superclass\n"])
def test_a_table_maps_classes(tmp_path, header):
    text = header + 'apple,fruit\n"pear, green",fruit\r\n\ncar,vehicle\ncar,vehicle\n'
    assert read_label_map(table(tmp_path, text)) == {"apple": "fruit", "pear, green": "fruit", "car": "vehicle"}


@pytest.mark.parametrize(
    ("text", "said"), [("a,b\na,c\n", "'a' twice"), ("a,b,c\n", "class,superclass"), ("a,\n", "a,"), ("\n", "is empty")]
)
def test_a_table_that_says_two_things_or_none_is_refused(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read_label_map(table(tmp_path, text))


def test_a_missing_map_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_label_map(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_label_map(tmp_path)


def cifar100(folder, coarse, fine):
    records = np.zeros((len(fine), 2 + 3072), np.uint8)
    records[:, 0], records[:, 1] = coarse, fine
    records.tofile(folder / "train.bin")
    (folder / "fine_label_names.txt").write_text("apple\naquarium_fish\nbaby\nbear\n")
    (folder / "coarse_label_names.txt").write_text("fish\nfruit\n\n")
    return folder


def test_cifar100s_own_superclasses_are_read_from_its_records(tmp_path):
    folder = cifar100(tmp_path, [1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 1, 0])
    expected = {"apple": "fruit", "aquarium_fish": "fish", "baby": "fruit", "bear": "fish"}
    assert read_label_map(folder) == expected


def test_records_that_contradict_themselves_or_are_cut_are_refused(tmp_path):
    with pytest.raises(UserError, match="contradict"):
        read_label_map(cifar100(tmp_path, [1, 0], [0, 0]))
    with pytest.raises(UserError, match="contradict"):
        read_label_map(cifar100(tmp_path, [1, 0], [0, 9]))
    (tmp_path / "train.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="not whole"):
        read_label_map(tmp_path)


def test_superclasses_are_what_a_protocol_sees():
    train, test = (planted_images(90, classes=4, seed=seed, name=str(seed)) for seed in (1, 2))
    data = eval_data(train, test, label_map={"0": "even", "1": "odd", "2": "even", "3": "odd", "7": "never"})
    assert data.classes == ["even", "odd"]
    assert data.labels("train").tolist() == [row % 2 for row in range(90)]
    scores = clustering(Tiny(), data, ClusteringConfig(clusters=4, seeds=(0,)))
    assert scores["classes"] == 2 and scores["purity"] == 1.0 and "accuracy" not in scores
    assert clustering(Tiny(), data, ClusteringConfig(seeds=(0,)))["clusters"] == 2


def test_a_class_that_the_map_forgets_is_named():
    with pytest.raises(UserError, match="no class for '1' and 1 other"):
        eval_data(label_map={"0": "x"})
