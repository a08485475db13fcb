"""A checkpoint is there whole or not at all, and what is damaged is never read."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessella import files
from tessella.errors import UserError
from tessella.run import checkpoints as checkpoint_files
from tessella.run.checkpoints import Damaged, load, prune, save
from tests.newest import newest

Tensors = dict[str, dict[str, Tensor]]


def tensors_of(value: int) -> Tensors:
    return {
        "method": {
            "a.weight": torch.full((16,), float(value)),
            "b.weight": torch.arange(12).reshape(3, 4) + value,
        },
        "optimizer": {"a.weight/momentum_buffer": torch.full((4, 4), -float(value))},
    }


def state_of(value: int) -> dict[str, Any]:
    return {"value": value, "note": "é\n", "fingerprints": {"data": f"f{value}"}}


def assert_holds(path: Path, value: int) -> None:
    tensors, state = load(path)
    assert state == state_of(value)
    torch.testing.assert_close(tensors, tensors_of(value), rtol=0, atol=0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ignore(text: str) -> None:
    pass


# --- what goes in comes out ---------------------------------------------------------------------------------


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path: Path):
    base = torch.randn(6, 8)
    tensors = {
        "half": base.bfloat16(),
        "large": torch.tensor([2**62 + 1, -1]),
        "flags": base > 0,
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 5),
        "transposed": base.T,
        "part of another": base[2:4, ::2],
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "odd name / \n é": base.to(torch.uint8),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "with gradient": torch.ones(2, requires_grad=True),
    }
    loaded, _ = load(save(tmp_path, 3, {"all": tensors, "none": {}}, {}))
    assert loaded["none"] == {} and loaded["all"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = loaded["all"][name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        expected = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(got.reshape(-1).view(torch.uint8), expected), name


def test_the_state_comes_back_and_its_fingerprints_are_in_the_manifest(tmp_path: Path):
    path = save(tmp_path / "run" / "checkpoints", 12, tensors_of(1), state_of(1))
    assert path.name == "step-00000012"
    assert_holds(path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["fingerprints"] == {"data": "f1"}
    assert manifest["tensors"]["method.safetensors"]["b.weight"]["shape"] == [3, 4]


def test_saving_leaves_the_tensors_alone(tmp_path: Path):
    tensors = tensors_of(1)
    before = {name: tensor.data_ptr() for name, tensor in tensors["method"].items()}
    save(tmp_path, 1, tensors, {})
    assert before == {name: tensor.data_ptr() for name, tensor in tensors["method"].items()}


# --- killed and failing saves -------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` and no `except OSError` sees it."""


SYSTEM_CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


@contextmanager
def failing_at(call: int, error: BaseException) -> Iterator[None]:
    """Let the n-th system call fail; a write that fails has written half."""
    count = 0

    def wrapped(name: str, real: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise error
            return real(*args, **kwargs)

        return function

    with pytest.MonkeyPatch.context() as patch:
        for name in SYSTEM_CALLS:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield


def fresh(folder: Path) -> None:
    pass


def with_an_older_one(folder: Path) -> None:
    save(folder, 1, tensors_of(1), state_of(1))


def with_one_of_the_same_step(folder: Path) -> None:
    save(folder, 2, tensors_of(1), state_of(1))


def with_leftovers_of_a_kill(folder: Path) -> None:
    save(folder, 2, tensors_of(1), state_of(1))
    shutil.copytree(folder / "step-00000002", folder / "step-00000002.replaced")
    shutil.copytree(folder / "step-00000002", folder / ".saving-step-00000002")


def with_only_the_one_being_replaced(folder: Path) -> None:
    save(folder, 2, tensors_of(1), state_of(1))
    (folder / "step-00000002").rename(folder / "step-00000002.replaced")


BEFORE = [
    fresh,
    with_an_older_one,
    with_one_of_the_same_step,
    with_leftovers_of_a_kill,
    with_only_the_one_being_replaced,
]


def every_failure(tmp_path: Path, before: Any, error: BaseException) -> Iterator[tuple[Path, BaseException]]:
    """Folders in which a save of step 2 failed at system call 1, 2, ... until one succeeds."""
    for call in range(1, 200):
        folder = tmp_path / str(call)
        before(folder)
        try:
            with failing_at(call, error):
                save(folder, 2, tensors_of(2), state_of(2))
        except (type(error), UserError) as raised:
            yield folder, raised
        else:
            assert_holds(newest(folder, pytest.fail), 2)
            if call > 10 and all(not path.name.startswith(".") for path in folder.iterdir()):
                return
    pytest.fail("no save ever succeeded")


@pytest.mark.parametrize("before", BEFORE)
def test_a_save_killed_anywhere_leaves_the_previous_or_the_complete_new_checkpoint(before: Any, tmp_path: Path):
    failures = 0
    for folder, _ in every_failure(tmp_path, before, Killed()):
        failures += 1
        found = newest(folder, pytest.fail)
        if found is None:
            assert before is fresh
        else:
            value = load(found)[1]["value"]
            assert value == 2 or before is not fresh
            assert_holds(found, value)
        # and the next save cleans up
        save(folder, 3, tensors_of(3), state_of(3))
        assert_holds(newest(folder, pytest.fail), 3)
        assert all(
            path.name in {f"step-0000000{i}" for i in (1, 2, 3)} | {"step-00000002.replaced"}
            for path in folder.iterdir()
        )
    assert failures > 15


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained_and_costs_nothing(code: int, tmp_path: Path):
    explained = 0
    for folder, raised in every_failure(tmp_path, with_an_older_one, OSError(code, os.strerror(code))):
        assert isinstance(raised, UserError)
        explained += 1
        found = newest(folder, pytest.fail)
        assert found is not None
        assert_holds(found, load(found)[1]["value"])
        if found.name == "step-00000001":
            assert names(folder) == ["step-00000001"]
        # 16 float32, 12 int64, 16 float32
        assert "224 bytes" in str(raised) and "bytes are free" in str(raised)
    assert explained > 15


def test_a_real_limit_on_file_sizes_is_explained_and_leaves_nothing_behind(tmp_path: Path):
    save(tmp_path, 1, tensors_of(1), state_of(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write 400,000 bytes.*make room"):
            save(tmp_path, 2, {"method": {"w": torch.zeros(100_000)}}, {})
        with pytest.raises(UserError, match="cannot write 200,000 bytes"):
            files.write_text(tmp_path / "x.txt", "x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000001"]
    assert_holds(tmp_path / "step-00000001", 1)


def test_everything_is_synced_before_the_checkpoint_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[tuple[str, str]] = []
    opened: dict[int, str] = {}
    real_open, real_fsync, real_replace = os.open, os.fsync, os.replace

    def recorded_open(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = real_open(path, *args, **kwargs)
        opened[descriptor] = ".saving-" if ".saving-" in str(path) else str(path)
        return descriptor

    def recorded_fsync(descriptor: int) -> None:
        done.append(("sync", Path(opened[descriptor]).name))
        real_fsync(descriptor)

    def recorded_replace(source: Any, target: Any, **kwargs: Any) -> None:
        done.append(("rename", Path(target).name))
        real_replace(source, target, **kwargs)

    monkeypatch.setattr(os, "open", recorded_open)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    path = save(tmp_path, 5, tensors_of(1), state_of(1))
    monkeypatch.undo()
    rename = done.index(("rename", "step-00000005"))
    assert {name for _, name in done[:rename]} == {file.name for file in path.iterdir()} | {".saving-"}
    assert done[rename - 1] == ("sync", ".saving-")
    assert done[rename + 1 :] == [("sync", tmp_path.name)]


def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "value.json"
    for call in range(1, 20):
        files.write_json(path, {"value": "old"})
        try:
            with failing_at(call, Killed()):
                files.write_json(path, {"value": "new"})
        except Killed:
            assert json.loads(path.read_text())["value"] in ("old", "new")
        else:
            break
    assert json.loads(path.read_text()) == {"value": "new"}
    assert 5 < call < 20
    assert names(tmp_path) == ["value.json"]


def test_text_that_utf8_cannot_hold_is_still_written(tmp_path: Path):
    files.write_text(tmp_path / "names.txt", "caf\udce9.jpg é")
    assert (tmp_path / "names.txt").read_text(encoding="utf-8") == "caf\\udce9.jpg é"
    files.write_json(tmp_path / "names.json", ["caf\udce9.jpg"])
    assert json.loads((tmp_path / "names.json").read_text(encoding="utf-8")) == ["caf\udce9.jpg"]


def test_json_without_a_word_for_nan_is_refused(tmp_path: Path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", float("nan"))
    assert names(tmp_path) == []


def test_single_safetensors_files_are_readable_by_the_library(tmp_path: Path):
    from safetensors.torch import load_file

    files.write_tensors(tmp_path / "backbone.safetensors", {"w": torch.ones(2, 3).T})
    assert torch.equal(load_file(tmp_path / "backbone.safetensors")["w"], torch.ones(3, 2))


# --- damage -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Step 2, with a valid step 1 behind it."""
    save(tmp_path, 1, tensors_of(1), state_of(1))
    return save(tmp_path, 2, tensors_of(2), state_of(2))


def assert_damaged(checkpoint: Path, file: str) -> str:
    with pytest.raises(Damaged, match=file) as raised:
        load(checkpoint)
    heard: list[str] = []
    assert newest(checkpoint.parent, heard.append) == checkpoint.parent / "step-00000001"
    assert heard == [str(raised.value)]
    return heard[0]


def test_a_flipped_bit_anywhere_is_found(checkpoint: Path):
    positions = torch.Generator().manual_seed(1)
    for file in sorted(checkpoint.iterdir()):
        data = file.read_bytes()
        for position in torch.randint(len(data), (25,), generator=positions).tolist():
            for bit in (0, 5):
                flipped = bytearray(data)
                flipped[position] ^= 1 << bit
                file.write_bytes(flipped)
                assert_damaged(checkpoint, file.name)
        file.write_bytes(data)
    assert newest(checkpoint.parent, pytest.fail) == checkpoint


def test_the_damaged_tensor_is_named(checkpoint: Path):
    file = checkpoint / "method.safetensors"
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    offsets = json.loads(data[8 : 8 + header])["b.weight"]["data_offsets"]
    data[8 + header + offsets[0] + 3] ^= 1
    file.write_bytes(data)
    text = assert_damaged(checkpoint, "method.safetensors")
    assert "tensor 'b.weight'" in text and "a.weight" not in text


def test_a_truncated_or_longer_file_is_found(checkpoint: Path):
    for file in sorted(checkpoint.iterdir()):
        data = file.read_bytes()
        for length in (0, 1, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:length])
            assert_damaged(checkpoint, file.name)
        file.write_bytes(data + b" ")
        assert_damaged(checkpoint, file.name)
        file.write_bytes(data)


def test_missing_and_swapped_files_are_found(checkpoint: Path):
    for file in sorted(checkpoint.iterdir()):
        hidden = file.rename(checkpoint.parent / "hidden")
        assert_damaged(checkpoint, f"{file.name} is missing")
        hidden.rename(file)
    other = checkpoint.parent / "step-00000001" / "method.safetensors"
    shutil.copy(other, checkpoint / "method.safetensors")
    assert_damaged(checkpoint, "method.safetensors")


def test_files_that_the_manifest_does_not_list_are_not_read(checkpoint: Path):
    (checkpoint / ".DS_Store").write_bytes(b"x")
    (checkpoint / "extra.safetensors").write_bytes(b"not tensors")
    assert_holds(newest(checkpoint.parent, pytest.fail), 2)


def test_what_is_no_file_is_not_waited_for(checkpoint: Path):
    (checkpoint / "state.json").unlink()
    os.mkfifo(checkpoint / "state.json")
    assert_damaged(checkpoint, "state.json cannot be read: not a regular file")
    (checkpoint / "state.json").unlink()
    (checkpoint / "state.json").symlink_to("/dev/zero")
    assert_damaged(checkpoint, "state.json cannot be read: not a regular file")


def rename_file(old: str, new: str) -> Any:
    def change(manifest: dict[str, Any]) -> None:
        for table in (manifest["files"], manifest["tensors"]):
            if old in table:
                table[new] = table.pop(old)

    return change


LIES = {
    "a path upwards": rename_file("method.safetensors", "../step-00000001/method.safetensors"),
    "an absolute path": rename_file("method.safetensors", "/etc/passwd.safetensors"),
    "a hidden file": rename_file("method.safetensors", ".saving.safetensors"),
    "a pickle": rename_file("method.safetensors", "method.pkl"),
    "a null byte": rename_file("method.safetensors", "method\0.safetensors"),
    "an endless name": rename_file("method.safetensors", "m" * 5000 + ".safetensors"),
    "no state": rename_file("state.json", "state.safetensors"),
    "no files": lambda manifest: manifest.pop("files"),
    "files as a list": lambda manifest: manifest.update(files=["method.safetensors"]),
    "an entry as text": lambda manifest: manifest["files"].update({"state.json": "x"}),
    "size as text": lambda manifest: manifest["files"]["state.json"].update(size="12"),
    "a huge size": lambda manifest: manifest["files"]["state.json"].update(size=10**400),
    "a negative size": lambda manifest: manifest["files"]["state.json"].update(size=-1),
    "no hash": lambda manifest: manifest["files"]["state.json"].pop("sha256"),
    "a file that is not there": lambda manifest: (
        manifest["files"].update({"ghost.safetensors": {"size": 1, "sha256": ""}}),
        manifest["tensors"].update({"ghost.safetensors": {}}),
    ),
    "a tensor that is not there": lambda manifest: manifest["tensors"]["method.safetensors"].update(ghost={}),
    "another dtype": lambda manifest: manifest["tensors"]["method.safetensors"]["a.weight"].update(dtype="int8"),
    "another shape": lambda manifest: manifest["tensors"]["method.safetensors"]["a.weight"].update(shape=[4, 4]),
    "tensors as numbers": lambda manifest: manifest["tensors"].update({"method.safetensors": {"a.weight": 1}}),
    "no format": lambda manifest: manifest.pop("format"),
    "a newer format": lambda manifest: manifest.update(format=checkpoint_files.FORMAT + 1),
    "a huge format": lambda manifest: manifest.update(format=10**400),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_under_a_valid_seal_is_refused(lie: str, checkpoint: Path):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    LIES[lie](manifest)
    (checkpoint / "manifest.json").write_bytes(checkpoint_files._sealed(manifest))
    with pytest.raises(Damaged):
        load(checkpoint)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "NaN",
        '{"format": NaN}',
        "[" * 100_000,
        "9" * 10_000,
        "\xff",
        '{"format": 1e999}',
        '{"format": 1, "x": 1e999}',
        '{"format": 1, "x": NaN}',
        '{"format": 1, "x": ' + "[" * 900 + "]" * 900 + "}",
    ],
)
def test_a_manifest_that_is_not_a_json_object_is_refused(text: str, checkpoint: Path):
    (checkpoint / "manifest.json").write_bytes(text.encode("latin-1"))
    assert_damaged(checkpoint, "manifest.json")


def test_tensors_in_another_format_are_refused_even_with_the_right_hash(checkpoint: Path):
    torch.save({"a.weight": torch.zeros(1)}, checkpoint / "method.safetensors")
    data = (checkpoint / "method.safetensors").read_bytes()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["method.safetensors"] = {
        "size": len(data),
        "sha256": checkpoint_files.hashlib.sha256(data).hexdigest(),
    }
    (checkpoint / "manifest.json").write_bytes(checkpoint_files._sealed(manifest))
    with pytest.raises(Damaged, match=r"method\.safetensors is not a safetensors file"):
        load(checkpoint)


# --- which ones count ---------------------------------------------------------------------------------------


def test_there_is_no_newest_checkpoint_in_a_missing_empty_or_foreign_folder(tmp_path: Path):
    assert newest(tmp_path / "missing", pytest.fail) is None
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-00000012.txt").mkdir()
    (tmp_path / "step-00000013").write_text("a file")
    assert newest(tmp_path, pytest.fail) is None


def test_the_newest_is_the_one_of_the_highest_step_not_of_the_latest_date(tmp_path: Path):
    for step in (5, 100_000_000, 99_999_999):
        path = save(tmp_path, step, {}, {})
        os.utime(path, (step % 7, step % 7))
    assert newest(tmp_path, pytest.fail) == tmp_path / "step-100000000"


def test_pruning_keeps_the_two_of_the_highest_steps(tmp_path: Path):
    prune(tmp_path / "missing")
    for step in (3, 1, 12, 2):
        save(tmp_path, step, {}, {})
    prune(tmp_path)
    assert names(tmp_path) == ["step-00000003", "step-00000012"]


def test_pruning_never_trades_a_valid_checkpoint_for_a_damaged_one(tmp_path: Path):
    # The run went back from 300 and 200, both damaged, to 100, and has just saved 150.
    for step in (50, 100, 150, 200, 300):
        save(tmp_path, step, {}, {})
    for step in (200, 300):
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    prune(tmp_path)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (100, 150, 200, 300)]
    heard: list[str] = []
    assert newest(tmp_path, heard.append) == tmp_path / "step-00000150"
    assert len(heard) == 2
    save(tmp_path, 200, {}, {})  # the run reaches the damaged one's step
    assert newest(tmp_path, ignore) == tmp_path / "step-00000200"


def test_a_pruning_killed_anywhere_leaves_no_half_removed_checkpoint(tmp_path: Path):
    for call in range(1, 100):
        folder = tmp_path / str(call)
        for step in (1, 2, 3):
            save(folder, step, tensors_of(step), state_of(step))
        try:
            with failing_at(call, Killed()):
                prune(folder)
        except Killed:
            for path in folder.glob("step-*"):
                assert_holds(path, int(path.name[-1]))
            assert {"step-00000002", "step-00000003"} <= set(names(folder))
        else:
            assert names(folder) == ["step-00000002", "step-00000003"]
            break
    assert call > 5


def test_damage_is_a_warning_unless_somebody_listens(checkpoint: Path):
    (checkpoint / "state.json").unlink()
    with pytest.warns(UserWarning, match=r"step-00000002/state\.json is missing"):
        assert newest(checkpoint.parent) == checkpoint.parent / "step-00000001"
