import numpy as np
import pytest
import torch

from tessella.data.sources import ArrayImages
from tessella.errors import UserError
from tessella.protocols.subsets import balanced_rows, listed_rows, share_rows, stratified_split


def test_the_held_out_part_is_a_share_of_every_class():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3 + [3])
    fit, held = stratified_split(labels, 0.1, seed=0)
    assert torch.equal(torch.cat([fit, held]).sort().values, torch.arange(len(labels)))
    assert torch.bincount(labels[held], minlength=4).tolist() == [10, 5, 1, 0]
    assert torch.equal(held, stratified_split(labels, 0.1, seed=0)[1])
    assert not torch.equal(held, stratified_split(labels, 0.1, seed=1)[1])


def test_few_labels_are_balanced_nested_and_reproducible():
    labels = torch.arange(100) % 5
    one, ten = balanced_rows(labels, 1, 0, 3), balanced_rows(labels, 10, 0, 3)
    assert torch.bincount(labels[ten]).tolist() == [10] * 5 and len(ten.unique()) == 50
    assert set(one.tolist()) <= set(ten.tolist())
    assert torch.equal(ten, balanced_rows(labels, 10, 0, 3))
    assert not torch.equal(ten, balanced_rows(labels, 10, 0, 4))
    with pytest.raises(UserError, match=r"21 labels per class .* has only 20"):
        balanced_rows(labels, 21, 0, 0)


def test_a_share_is_balanced_nested_and_reproducible():
    labels = torch.arange(1281) % 7
    one, ten = share_rows(labels, 0.01, 0), share_rows(labels, 0.1, 0)
    assert (len(one), len(ten)) == (13, 128) and torch.equal(ten, ten.unique())
    counts = torch.bincount(labels[ten])
    assert int(counts.max() - counts.min()) <= 1
    assert set(one.tolist()) <= set(ten.tolist())
    assert torch.equal(ten, share_rows(labels, 0.1, 0)) and not torch.equal(ten, share_rows(labels, 0.1, 1))
    assert torch.equal(share_rows(labels, 1.0, 0), torch.arange(1281))


def test_a_share_holds_one_image_of_each_class_and_all_of_a_small_one():
    labels = torch.tensor([0] * 90 + [1] * 2 + [2] * 90)
    assert torch.bincount(labels[share_rows(labels, 0.001, 0)]).tolist() == [1, 1, 1]
    assert torch.bincount(labels[share_rows(labels, 0.22, 0)]).tolist() == [19, 2, 19]


def named(*keys):
    return ArrayImages("named", np.zeros((len(keys), 4, 4, 3), np.uint8), np.zeros(len(keys), int), keys=list(keys))


def written(tmp_path, text):
    path = tmp_path / "1percent.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_list_of_simclrs_kind_names_images_by_file_and_class(tmp_path):
    images = named("n01/n01_10.JPEG", "n01/n01_7.JPEG", "n02/n02_10.JPEG", "n02/n02_3.JPEG")
    assert listed_rows(images, written(tmp_path, "n02_10.JPEG\r\nn01_7.JPEG\n\n")).tolist() == [1, 2]


def test_a_list_may_hold_keys_or_plain_names_that_occur_once(tmp_path):
    images = named("cat/1.png", "cat/a b.png", "dog/1.png", "dog/ö_2.png")
    assert listed_rows(images, written(tmp_path, "./cat/1.png\na b.png\nö_2.png\nö_2.png")).tolist() == [0, 1, 3]


@pytest.mark.parametrize("line", ["1.png", "mouse_1.png", "cat/9.png"])
def test_a_list_that_does_not_fit_the_images_is_refused_with_an_example(tmp_path, line):
    images = named("cat/1.png", "dog/1.png")
    with pytest.raises(UserError, match=rf"1 of the 2 names .* for example '{line}' .*'cat/1.png'"):
        listed_rows(images, written(tmp_path, f"cat/1.png\n{line}"))


def test_an_empty_or_missing_list_is_refused(tmp_path):
    with pytest.raises(UserError, match="is empty"):
        listed_rows(named("a"), written(tmp_path, "\n \n"))
    with pytest.raises(UserError, match="cannot be read"):
        listed_rows(named("a"), tmp_path / "nothing.txt")
