"""A folder gives what lies below it, however odd its names, links and files."""

from __future__ import annotations

import os
import re
import socket

import numpy as np
import pytest
from PIL import Image

from tessella.data.decode import HEIC, Unreadable
from tessella.data.sources import open_images
from tessella.data.sources.messages import not_read
from tessella.engine.pretrain import pretrain
from tessella.errors import UserError
from tests.data.pictures import assert_equal_sets, keys, pack, write_image
from tests.engine.runs import tiny_run


def test_a_folder_gives_its_images_sorted_by_path_with_sizes_and_stable_ids(folder):
    images = open_images(str(folder))
    assert keys(images) == sorted(keys(images))
    assert set(keys(images)) == {
        *("cat/a.jpg", "cat/c.png", "cat/deep/er/b.JPEG", "dog/a.jpg", "dog/b.webp", "dog/wide.png")
    }
    assert len(images) == 6 and images.name == str(folder) and images.unreadable == []
    assert images.ids.dtype == np.int64 and images.sizes.dtype == np.int32
    assert len(set(images.ids.tolist())) == 6 and (images.ids >= 0).all()
    for row in range(6):
        pixels = images.image(row)
        assert (pixels.shape[1], pixels.shape[0]) == tuple(images.sizes[row])
        assert images.read(row) == (folder / images.key(row)).read_bytes()
    assert images.uniform_size is None
    assert open_images(f"{folder}::cat").uniform_size == (12, 8)


def test_labels_are_the_first_folders_and_only_shown_when_asked_for(folder):
    unlabelled, labelled = open_images(str(folder)), open_images(str(folder), labels=True)
    assert unlabelled.labels is None and unlabelled.classes is None
    assert labelled.classes == ["cat", "dog"]
    assert [labelled.classes[label] for label in labelled.labels] == [key.split("/")[0] for key in keys(labelled)]
    assert labelled.labels.dtype == np.int64
    assert labelled.fingerprint == unlabelled.fingerprint


def test_an_image_without_a_class_is_named_when_labels_are_asked_for(folder):
    write_image(folder / "loose.jpg")
    assert len(open_images(str(folder))) == 7
    with pytest.raises(UserError, match=r"no class for 1 of its 7 images, for example loose\.jpg"):
        open_images(str(folder), labels=True)


def test_labels_of_the_wrong_level_are_refused_with_the_right_one_named(folder):
    with pytest.raises(UserError, match=re.escape(f"for example {folder.parent}::pictures")):
        open_images(str(folder.parent), labels=True)
    archive = pack(folder.parent / "above.tar", folder.parent)
    with pytest.raises(UserError, match=re.escape(f"for example {archive}::pictures")):
        open_images(str(archive), labels=True)


def test_damaged_files_are_listed_with_a_reason_and_the_rest_is_used(folder, monkeypatch):
    (folder / "cat/empty.jpg").write_bytes(b"")
    (folder / "cat/text.png").write_text("hello")
    (folder / "cat/.hidden.jpg").write_text("hidden files do not count")
    (folder / "cat/broken.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "cat/pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(folder)  # the path of a socket must be short
        listener.bind("socket.jpg")
        images = open_images(str(folder))
    assert len(images) == 6
    reasons = dict(images.unreadable)
    assert set(reasons) == {
        *("cat/broken.jpg", "cat/empty.jpg", "cat/pipe.jpg", "cat/text.png", "socket.jpg"),
    }
    assert "empty" in reasons["cat/empty.jpg"] and "nowhere" in reasons["cat/broken.jpg"]
    assert reasons["cat/pipe.jpg"] == reasons["socket.jpg"] == "not a regular file"


def test_of_several_links_to_a_folder_the_first_by_name_counts(tmp_path):
    write_image(tmp_path / "elsewhere/x.jpg")
    (tmp_path / "images").mkdir()
    for name in ("c", "a", "d", "b"):
        (tmp_path / "images" / name).symlink_to(tmp_path / "elsewhere")
    assert keys(open_images(str(tmp_path / "images"))) == ["a/x.jpg"]


def test_links_to_folders_are_followed_once_and_loops_end(folder, tmp_path):
    elsewhere = write_image(tmp_path / "elsewhere/bird/x.jpg").parent.parent
    for link, target in {
        "loop": ".",
        "cat/up": "..",
        "a-second-name-of-cat": "cat",
        "more": elsewhere,
        "more-again": elsewhere,
    }.items():
        (folder / link).symlink_to(target)
    images = open_images(str(folder))
    assert len(images) == 7
    assert {key.split("/")[0] for key in keys(images)} == {"cat", "dog", "more"}


def test_names_with_line_breaks_and_broken_utf8_work(tmp_path):
    names = [b"new\nline.jpg", b"latin-\xe9.jpg", "grüß.jpg".encode(), b'comma,"quote".jpg', b" space .jpg"]
    for name in names:
        write_image(tmp_path / "plain.jpg").rename(tmp_path / os.fsdecode(name))
    for _ in range(2):  # built, then from the cache
        images = open_images(str(tmp_path))
        assert sorted(os.fsencode(key) for key in keys(images)) == sorted(names)
        assert all(images.image(row).shape == (8, 12, 3) for row in range(5))


def test_a_folder_without_permission_is_listed(folder, monkeypatch):
    original = os.scandir

    def scandir(path: str):
        if path.endswith("dog/"):  # root, who may run the tests, would be let in
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    images = open_images(str(folder))
    assert len(images) == 3 and "Permission denied" in dict(images.unreadable)["dog/"]


def test_an_image_that_vanishes_is_unreadable_when_read(folder):
    images = open_images(str(folder))
    (folder / images.key(0)).unlink()
    with pytest.raises(Unreadable, match="No such file"):
        images.image(0)


def test_a_part_of_a_folder_is_as_good_as_the_folder(folder):
    assert_equal_sets(open_images(f"{folder}::cat"), open_images(str(folder / "cat")))
    with pytest.raises(UserError, match=r"no part 'cats'.*there are cat"):
        open_images(f"{folder}::cats")


def test_a_thousand_reads_do_not_depend_on_the_working_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    images = open_images("pictures")
    monkeypatch.chdir("/")
    assert images.image(0).shape == (8, 12, 3)
    assert_equal_sets(images, open_images(str(folder)))


def test_files_that_are_not_read_are_counted_by_ending_in_folders_and_archives(folder, tmp_path):
    for name in ("cat/one.HEIC", "dog/two.heic", "film.mp4", "no_ending", ".DS_Store", "odd.an-endless-ending"):
        (folder / name).write_bytes(b"x")
    expected = {".heic": 2, ".mp4": 1, "no ending": 2, "hidden": 1, ".md": 1}
    if HEIC:
        del expected[".heic"]
    for data in (folder, pack(tmp_path / "images.tar", folder)):
        for _ in range(2):  # from the files, from the cache
            assert open_images(str(data)).passed_over == expected


def test_what_is_passed_over_is_said_with_the_extra_that_reads_it():
    assert not_read({".mp4": 3, "hidden": 1, ".heic": 1200}) == (
        "1,200 .heic, 3 .mp4, 1 hidden; .heic is read after: pip install 'tessella[heic]'"
    )
    assert not_read({f".{number}": number for number in range(1, 9)}) == "8 .8, 7 .7, 6 .6, 5 .5, 4 .4, 3 .3, 3 others"


def test_a_folder_of_nothing_but_films_says_so(tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "films/a.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no images: .* It holds 1 \.mp4\.$"):
        open_images(str(tmp_path / "films"))


def test_a_run_says_at_its_start_which_files_it_does_not_read(tmp_path, capsys):
    for number in range(64):
        Image.new("RGB", (16, 16), (3 * number, 0, 0)).save(tmp_path / f"{number}.png")
    for name in ("a.mov", "b.mov", "film.mp4"):
        (tmp_path / name).write_bytes(b"not looked at")
    pretrain(tiny_run("jigclu", data=str(tmp_path), max_steps=1), tmp_path.parent / f"{tmp_path.name}-run")
    assert "64 images (not read: 2 .mov, 1 .mp4)" in capsys.readouterr().out
