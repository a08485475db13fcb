"""A pack is its source, with smaller files: the same names, ids, classes and randomness."""

import contextlib
import errno
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from tessella.data import pack as module
from tessella.data.decode import Unreadable
from tessella.data.pack import pack
from tessella.data.sources import open_images
from tessella.errors import UserError
from tessella.files import sha256

SETTINGS = {"short_side": 64, "quality": 90, "workers": 2}


def photo(number, width, height):
    """Smooth, as photos are, so that JPEG loses little."""
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    planes = [np.sin(x * (i + 1) + number) + np.cos(y * (3 - i) + number) for i in range(3)]
    return Image.fromarray((np.stack(planes, -1) * 60 + 128).clip(0, 255).astype(np.uint8))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Eleven photos in two classes below train/ and one below test/, in three shards."""
    monkeypatch.setenv("TESSELLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 4)
    for number in range(11):
        folder = tmp_path / "photos" / ("test" if number == 10 else "train") / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        photo(number, 150 + number, 100).save(folder / f"{number}.png")
    return str(tmp_path / "photos")


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_names_ids_and_classes_are_the_source_s_and_images_are_smaller(photos, tmp_path):
    source = open_images(f"{photos}::train", labels=True)
    packed = pack(source, tmp_path / "pack", **SETTINGS)
    again = open_images(str(tmp_path / "pack"), labels=True)
    assert [again.key(i) for i in range(10)] == [source.key(i) for i in range(10)]
    assert again.ids.tolist() == source.ids.tolist()
    assert again.classes == source.classes and again.labels.tolist() == source.labels.tolist()
    assert again.sizes.min(axis=1).tolist() == [64] * 10
    assert packed.images == 10 and packed.unreadable == 0 and packed.kept == 0 and packed.psnr > 35
    assert packed.bytes == again.index.byte_sizes.sum() and packed.source_bytes == source.index.byte_sizes.sum()


def test_pixels_are_those_of_the_shrunken_image_within_what_a_jpeg_loses(photos, tmp_path):
    pack(open_images(photos), tmp_path / "pack", **SETTINGS)
    source, again = open_images(photos), open_images(str(tmp_path / "pack"))
    for row in range(len(again)):
        width, height = again.sizes[row]
        expected = Image.fromarray(source.image(row)).resize((width, height), Image.Resampling.BILINEAR)
        assert np.abs(again.image(row).astype(int) - np.asarray(expected)).mean() < 2


def test_a_part_of_a_pack_is_a_pack_of_the_part(photos, tmp_path):
    pack(open_images(photos, labels=True), tmp_path / "pack", **SETTINGS)
    part, source = (open_images(f"{where}::train", labels=True) for where in (tmp_path / "pack", photos))
    assert [part.key(i) for i in range(10)] == [source.key(i) for i in range(10)]
    assert part.ids.tolist() == source.ids.tolist() and part.labels.tolist() == source.labels.tolist()
    assert part.image(3).shape[0] == 64
    with pytest.raises(UserError, match=r"no part 'trian'.*train"):
        open_images(f"{tmp_path / 'pack'}::trian")


def test_a_jpeg_that_would_not_become_smaller_is_taken_over_byte_by_byte(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSELLA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small").mkdir()
    target = io.BytesIO()
    photo(1, 60, 50).save(target, "JPEG", quality=40)
    (tmp_path / "small/a.jpg").write_bytes(target.getvalue())
    photo(2, 60, 50).save(tmp_path / "small/b.jpg", quality=100, subsampling=0)
    packed = pack(open_images(str(tmp_path / "small")), tmp_path / "pack", **SETTINGS)
    images = open_images(str(tmp_path / "pack"))
    assert packed.kept == 1 and images.read(0) == target.getvalue()
    assert len(images.read(1)) < (tmp_path / "small/b.jpg").stat().st_size


def test_killed_between_any_two_images_it_goes_on_and_equals_one_that_was_not(photos, tmp_path, monkeypatch):
    images = open_images(photos, labels=True)
    pack(images, tmp_path / "straight", **SETTINGS)
    encode = module.encode_for_pack
    for victim in range(11):

        def killed(source, row, victim=victim, **settings):
            if row == victim:
                raise KeyboardInterrupt
            return encode(source, row, **settings)

        out = tmp_path / f"killed-{victim}"
        monkeypatch.setattr(module, "encode_for_pack", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(images, out, **SETTINGS)
        with pytest.raises(UserError, match="not finished"):
            open_images(str(out))
        monkeypatch.setattr(module, "encode_for_pack", encode)
        pack(images, out, **SETTINGS)
        assert files_of(out) == files_of(tmp_path / "straight")


def test_finished_shards_are_not_made_again(photos, tmp_path, monkeypatch):
    images, seen = open_images(photos), []
    encode = module.encode_for_pack

    def counted(source, row, **settings):
        seen.append(row)
        if len(seen) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(source, row, **settings)

    monkeypatch.setattr(module, "encode_for_pack", counted)
    with pytest.raises(UserError, match=r"No space left.*again"):
        pack(images, tmp_path / "pack", **SETTINGS)
    before = list(seen)
    pack(images, tmp_path / "pack", **SETTINGS)
    assert sorted(seen) == sorted([*range(11), *(row for row in before if row >= 8)])


def test_given_again_all_is_read_and_compared_with_its_hashes(photos, tmp_path):
    images, out = open_images(photos), tmp_path / "pack"
    first = pack(images, out, **SETTINGS)
    assert pack(images, out, **SETTINGS) == first._replace(written=False)
    shard = out / "shard-00001.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[2000] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(UserError, match=r"shard-00001\.tar is damaged"):
        pack(images, out, **SETTINGS)


@pytest.mark.parametrize("other", [{"quality": 80}, {"short_side": 32}])
def test_other_settings_are_refused_and_named(photos, tmp_path, other):
    pack(open_images(photos), tmp_path / "pack", **SETTINGS)
    (name, value), *_ = other.items()
    with pytest.raises(UserError, match=f"{name} {SETTINGS[name]} instead of {value}"):
        pack(open_images(photos), tmp_path / "pack", **SETTINGS | other)


def test_other_images_and_foreign_folders_are_refused(photos, tmp_path):
    pack(open_images(photos), tmp_path / "pack", **SETTINGS)
    with pytest.raises(UserError, match="other images"):
        pack(open_images(f"{photos}::train"), tmp_path / "pack", **SETTINGS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(UserError, match="holds other files: choose another --out, a folder that is new or empty"):
        pack(open_images(photos), tmp_path / "full", **SETTINGS)


def test_what_a_copy_lost_is_seen_when_the_pack_is_opened(photos, tmp_path):
    pack(open_images(photos), tmp_path / "pack", **SETTINGS)
    for number, harm in enumerate(
        [
            lambda p: (p / "shard-00002.tar").unlink(),
            lambda p: os.truncate(p / "shard-00000.tar", 1000),
            lambda p: (p / "index/ids.npy").write_bytes(b"x"),
            lambda p: np.save(p / "index/sizes.npy", np.zeros((3, 2))),
            lambda p: (p / "pack.json").write_text("{"),
            lambda p: (p / "pack.json").write_text(
                (p / "pack.json").read_text().replace("shard-00000", "../../shard-00000")
            ),
        ]
    ):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(tmp_path / "pack", copy)
        harm(copy)
        with pytest.raises(UserError, match="copy the pack again"):
            open_images(str(copy))


def test_an_index_that_points_outside_costs_the_image_not_the_run(photos, tmp_path):
    pack(open_images(photos), tmp_path / "pack", **SETTINGS)
    offsets = np.load(tmp_path / "pack/index/source_offset.npy")
    offsets[0], offsets[1] = -5, 2**62
    np.save(tmp_path / "pack/index/source_offset.npy", offsets)
    rewrite(tmp_path / "pack")
    images = open_images(str(tmp_path / "pack"))
    for row in (0, 1):
        with pytest.raises(Unreadable):
            images.read(row)
    assert images.image(2).ndim == 3


def test_odd_names_and_damaged_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSELLA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [b"new\nline.png", b"broken\xff utf8.png", "ü ∞.png".encode(), b"-dash.png"]
    for number, name in enumerate(names):
        target = io.BytesIO()
        photo(number, 100, 90).save(target, "PNG")
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(target.getvalue())
    half = io.BytesIO()
    photo(9, 100, 90).save(half, "JPEG")
    (folder / "half.jpg").write_bytes(half.getvalue()[:900])
    packed = pack(open_images(str(folder)), tmp_path / "pack", **SETTINGS)
    again = open_images(str(tmp_path / "pack"))
    keys = {again.key(row).encode("utf-8", "surrogateescape") for row in range(len(again))}
    assert keys == set(names)
    assert packed.unreadable == 1 and again.unreadable[0][0] == "half.jpg"
    assert "damaged or truncated" in json.loads((tmp_path / "pack/pack.json").read_text())["unreadable"][0][1]


@pytest.mark.parametrize("wrong", [{"quality": 0}, {"quality": 101}, {"short_side": 8}])
def test_settings_out_of_range_are_refused(photos, tmp_path, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        pack(open_images(photos), tmp_path / "pack", **SETTINGS | wrong)
    assert not (tmp_path / "pack").exists()


def rewrite(folder):
    """A pack whose description another program has written, with the right hashes of whatever arrays there are."""
    description = json.loads((folder / "pack.json").read_text())
    description["columns"] = {name: sha256(folder / f"index/{name}.npy") for name in description["columns"]}
    (folder / "pack.json").write_text(json.dumps(description))


def test_a_flipped_bit_in_the_index_of_a_pack_is_noticed(photos, tmp_path):
    pack(open_images(photos), tmp_path / "pack", **SETTINGS)
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "pack/index").iterdir()):
        whole = path.read_bytes()
        for _ in range(10):
            content, bit = bytearray(whole), int(rng.integers(8 * len(whole)))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            with pytest.raises(UserError, match=rf"the index of .* is damaged \({path.name} is not what was written\)"):
                open_images(str(tmp_path / "pack"))
        path.write_bytes(whole)
    assert len(open_images(str(tmp_path / "pack"))) == 11


ODD_VALUES = [None, -1, 1.5, "x", "../x", [], [1], {}, {"a": 1}, True, 2**70]


def test_values_of_other_types_in_the_description_of_a_pack_are_refused_in_one_line(photos, tmp_path):
    pack(open_images(photos), tmp_path / "pack", **SETTINGS)
    whole = json.loads((tmp_path / "pack/pack.json").read_text())
    for name in whole:
        for value in ODD_VALUES:
            (tmp_path / "pack/pack.json").write_text(json.dumps(whole | {name: value}))
            with contextlib.suppress(UserError):  # a count or a name may be another one
                open_images(str(tmp_path / "pack"))
                pack(open_images(photos), tmp_path / "pack", **SETTINGS)
    for name in ("file", "bytes", "sha256", "images"):
        for value in ODD_VALUES:
            shards = [whole["shards"][0] | {name: value}, *whole["shards"][1:]]
            (tmp_path / "pack/pack.json").write_text(json.dumps(whole | {"shards": shards}))
            with contextlib.suppress(UserError):
                open_images(str(tmp_path / "pack"))


@pytest.mark.parametrize("name", ["ids", "sizes", "labels", "byte_sizes", "key_bytes", "key_offsets", "source_offset"])
def test_arrays_that_are_no_index_are_refused_or_cost_the_images_they_touch(photos, tmp_path, name):
    pack(open_images(photos), tmp_path / "pack", **SETTINGS)
    path = tmp_path / f"pack/index/{name}.npy"
    whole = np.load(path)
    wrong = [whole.astype(float), whole[:-1], whole[None], whole.astype("U8"), np.array(3), np.full_like(whole, 77)]
    if name != "key_bytes":
        wrong += [-whole - 7, np.full_like(whole, np.iinfo(whole.dtype).max)]
    for array in wrong:
        np.save(path, array)
        rewrite(tmp_path / "pack")
        try:
            images = open_images(str(tmp_path / "pack"), labels=name == "labels")
        except UserError:
            continue
        for row in range(len(images)):
            images.key(row)
            with contextlib.suppress(Unreadable):
                images.image(row)
