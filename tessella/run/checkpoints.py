"""Checkpoints as files: tensors and JSON in one folder, written whole or not at all, read only if undamaged.

    checkpoints/
      step-00000012/
        method.safetensors  optimizer.safetensors ...   the tensors, one file per group
        state.json                                      everything else that a run needs to go on
        manifest.json                                   size and sha256 of every file, sha256 of every tensor
      .saving-step-00000024/                            a save that was killed; the next save removes it

A save fills a folder under a temporary name, syncs every file and the folder, and gives it its name by one
rename; so a killed process leaves the previous checkpoint or the complete new one. safetensors itself has no
checksum: the manifest finds what a disk or a copy has changed. Nothing here runs code from a file: JSON and
safetensors only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tessella.errors import UserError

FORMAT = 1  # of the folder; raised when an older Tessella could not read a newer one's checkpoints

_MANIFEST = "manifest.json"
_STATE = "state.json"
_SUFFIX = ".safetensors"
_TEMPORARY = ".saving-"
_DISCARDED = ".discarded-"
_REPLACED = ".replaced"
_CHECKPOINT = re.compile(r"step-\d{8,18}(\.replaced)?")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # a plain file name on every system, no path
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, quota, limit on a file's size
_MANIFEST_LIMIT = 64 << 20  # bytes; a hundred times the manifest of a network with thousands of tensors


class Damaged(Exception):
    """A checkpoint that cannot be trusted; the text names the file and, where it can be told, the tensor."""


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write one checkpoint, whole or not at all.

    Args:
        folder: where checkpoints lie; made if missing.
        step: complete updates, in [0, 1e18). An existing checkpoint of this step is replaced, without a
            moment at which neither could be read.
        tensors: group ("method", "optimizer", ...) -> name -> tensor of any dtype, shape, layout and device.
        state: JSON values. `state["fingerprints"]`, if there, is also written into the manifest.

    Returns:
        `folder/step-NNNNNNNN`.

    Raises:
        UserError: the disk or the quota is full, or the folder cannot be written; the earlier checkpoints are
            untouched.
    """
    target = folder / f"step-{step:08d}"
    temporary = folder / (_TEMPORARY + target.name)
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    with explain_write_error(folder, needed):
        _make_folder(folder)
        _remove_leftovers(folder)
        refuse_full_disk(folder, needed)
        try:
            _fill(temporary, step, tensors, state)
            _publish(temporary, target)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read one checkpoint and check every byte of it.

    Args:
        path: a folder that `save` returned.

    Returns:
        The tensors on the CPU and the state, as they were given to `save`.

    Raises:
        Damaged: something is missing, changed, or not what a checkpoint may hold.
    """
    manifest = _read_manifest(path)
    groups: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {}
    for name in manifest["files"]:
        data = _read_file(path, name, manifest)
        if name == _STATE:
            state = _parse_json_object(path, name, data)
        else:
            groups[name.removesuffix(_SUFFIX)] = _parse_tensors(path, name, data, manifest)
    return groups, state


def load_newest(
    folder: Path, on_damage: Callable[[str], object] = warnings.warn
) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Read the checkpoint with the highest step that is undamaged.

    Args:
        folder: where checkpoints lie; it may be missing.
        on_damage: told about each newer checkpoint that was passed over, and why.

    Returns:
        Its folder, and what `load` gives; None if there is no valid checkpoint.
    """
    for path in _checkpoints(folder):
        try:
            return path, *load(path)
        except Damaged as damage:
            on_damage(str(damage))
    return None


def newest(folder: Path, on_damage: Callable[[str], object] = warnings.warn) -> Path | None:
    """The checkpoint with the highest step whose every byte is as it was written.

    Args:
        folder: where checkpoints lie; it may be missing.
        on_damage: told about each newer checkpoint that was passed over, and why.

    Returns:
        Its folder; None if there is no valid checkpoint.
    """
    for path in _checkpoints(folder):
        damage = _damage(path)
        if damage is None:
            return path
        on_damage(damage)
    return None


def prune(folder: Path, keep: int = 2) -> None:
    """Remove what is older than the `keep` newest valid checkpoints, and what killed saves and removals have left.

    Damaged ones do not count: a run that had to go back behind damaged checkpoints must not lose its new ones
    to them. A damaged one that is newer stays until the run reaches its step and replaces it.

    Args:
        folder: where checkpoints lie.
        keep: at least 1.
    """
    assert keep >= 1, keep
    if folder.is_dir():
        _remove_leftovers(folder)
    valid = 0
    for path in _checkpoints(folder):
        if valid >= keep:
            _discard(path)
        elif _damage(path) is None:
            valid += 1


def drop_later(folder: Path, step: int) -> None:
    """Remove checkpoints of later steps: of a run that has begun an epoch anew, they would count as its newest.

    Args:
        folder: where checkpoints lie.
        step: of the newest one that counts.
    """
    for path in _checkpoints(folder):
        if _step_of(path) > step:
            _discard(path)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all; what was there before stays until the new one is complete.

    Args:
        path: the file; its folder must exist.
        text: characters that UTF-8 cannot hold (parts of foreign file names) are written as backslash
            escapes.

    Raises:
        UserError: the disk or the quota is full.
    """
    _write_atomic(path, text.encode("utf-8", errors="backslashreplace"))


def write_json_atomic(path: Path, value: Any) -> None:
    """Write a value as indented JSON through `write_text_atomic`.

    Args:
        path: the file; its folder must exist.
        value: JSON values.

    Raises:
        UserError: the disk or the quota is full.
        ValueError: a number is NaN or infinite, which JSON cannot say.
    """
    write_text_atomic(path, _json_text(value))


def write_tensors_atomic(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file, whole or not at all.

    Args:
        path: the file; its folder must exist.
        tensors: name -> tensor of any dtype, shape, layout and device.

    Raises:
        UserError: the disk or the quota is full.
    """
    _write_atomic(path, safetensors.torch.save(_owned(tensors)))


@contextlib.contextmanager
def explain_write_error(folder: Path, needed: int) -> Iterator[None]:
    """Turn an error of the file system into one that says what to mend; for a full disk, how much is needed and free.

    Args:
        folder: where the body writes.
        needed: bytes that it writes.

    Raises:
        UserError: instead of any OSError: a full disk, a read-only or vanished folder, a stale mount, ...
    """
    try:
        yield
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _FULL_DISK:
            raise _full_disk(folder, needed, cause) from error
        raise UserError(
            f"cannot write in {str(folder)!r}: {cause}. What was saved before is untouched: mend this, then resume"
        ) from error


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Find out before anything is written.

    Args:
        folder: where `needed` bytes are to be written.
        needed: bytes.

    Raises:
        UserError: they do not fit.
    """
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return  # then writing tells
    if disk.total and needed > disk.free:  # some network file systems know neither
        raise _full_disk(folder, needed, os.strerror(errno.ENOSPC))


def _full_disk(folder: Path, needed: int, cause: str) -> UserError:
    return UserError(
        f"cannot write {needed:,} bytes in {str(folder)!r}: {cause}; {_free_bytes(folder)} bytes "
        "are free. What was saved before is untouched: make room or raise the quota, then resume"
    )


def is_unfinished(path: Path) -> bool:
    """Whether a name is that of a file or folder in the making."""
    return path.name.startswith(_TEMPORARY)


def remove_unfinished(folder: Path) -> None:
    """Clear files that killed writers have left in a folder; only for who alone writes there."""
    for path in folder.iterdir():
        if is_unfinished(path) and path.is_file():
            path.unlink(missing_ok=True)


# --- writing ------------------------------------------------------------------------------------------------


def _fill(temporary: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    temporary.mkdir()
    files: dict[str, dict[str, Any]] = {}
    described: dict[str, dict[str, Any]] = {}
    for group, named in tensors.items():
        assert _GROUP.fullmatch(group), f"{group!r} cannot be a file name"
        owned = _owned(named)
        data = safetensors.torch.save(owned)
        files[group + _SUFFIX] = _write_and_describe(temporary / (group + _SUFFIX), data)
        described[group + _SUFFIX] = {name: _describe(tensor) for name, tensor in owned.items()}
    files[_STATE] = _write_and_describe(temporary / _STATE, _json_text(state).encode("ascii"))
    manifest = {
        "format": FORMAT,
        "step": step,
        "fingerprints": state.get("fingerprints", {}),
        "files": files,
        "tensors": described,
    }
    _write_file(temporary / _MANIFEST, _sealed(manifest))
    _sync_folder(temporary)


def _publish(temporary: Path, target: Path) -> None:
    replaced = target.with_name(target.name + _REPLACED)
    if target.exists():
        # `newest` reads this name too: the old one counts until the new one is there.
        target.rename(replaced)
    temporary.rename(target)
    _sync_folder(target.parent)
    if replaced.exists():
        _discard(replaced)


def _write_atomic(path: Path, data: bytes) -> None:
    temporary = path.with_name(_TEMPORARY + path.name)
    with explain_write_error(path.parent, len(data)):
        try:
            _write_file(temporary, data)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _write_and_describe(path: Path, data: bytes) -> dict[str, Any]:
    _write_file(path, data)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_file(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(descriptor, rest) :]  # one call writes 2 GiB at most
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make names in `folder` survive a power cut: fsync of a file does not cover its name."""
    if os.name == "nt":
        return  # Windows cannot open a folder for this
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(folder.parent)


def _remove_leftovers(folder: Path) -> None:
    """Clear what killed saves and killed removals have left."""
    for path in list(folder.iterdir()):
        if path.name.startswith((_TEMPORARY, _DISCARDED)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.endswith(_REPLACED) and path.with_name(path.name.removesuffix(_REPLACED)).exists():
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint. Renamed first, so that a half-removed one is never taken for a damaged one."""
    gone = path.with_name(_DISCARDED + path.name)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)  # what a network file system holds on to, the next save removes


def _free_bytes(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number of"


# --- reading ------------------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, newest first; of one step, the one being replaced last."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_step_of(path), not path.name.endswith(_REPLACED)), reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removesuffix(_REPLACED).removeprefix("step-"))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        manifest = _read_manifest(path)
        for name in manifest["files"]:
            _read_file(path, name, manifest)
    except Damaged as damage:
        return str(damage)
    return None


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked against its own hash; names in it are plain file names."""
    data = _read_bytes(path, _MANIFEST, _MANIFEST_LIMIT)
    manifest = _parse_json_object(path, _MANIFEST, data)
    if not isinstance(manifest.get("format"), int) or manifest["format"] > FORMAT:
        raise Damaged(
            f"{path.name}/{_MANIFEST} is not of a format that this Tessella reads (up to {FORMAT}): "
            "if a newer one wrote it, upgrade"
        )
    if data != _resealed(manifest):
        raise Damaged(f"{path.name}/{_MANIFEST} has changed since it was written")
    if manifest.get("step") != _step_of(path):
        raise Damaged(f"{path.name}/{_MANIFEST} is of step {manifest.get('step')}: the folder was renamed or copied")
    files, tensors = manifest.get("files"), manifest.get("tensors")
    if not (isinstance(files, dict) and isinstance(tensors, dict) and _STATE in files):
        raise Damaged(f"{path.name}/{_MANIFEST} does not list the files of a checkpoint")
    for name, entry in files.items():
        group = name.removesuffix(_SUFFIX)
        if name != _STATE and (group == name or not _GROUP.fullmatch(group) or not _is_table(tensors.get(name))):
            raise Damaged(f"{path.name}/{_MANIFEST} lists {name!r}, which cannot be a file of a checkpoint")
        if not (
            isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        ):
            raise Damaged(f"{path.name}/{_MANIFEST} does not give size and sha256 of {name!r}")
    return manifest


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())


def _read_file(path: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """A listed file's bytes, checked against the manifest."""
    entry = manifest["files"][name]
    data = _read_bytes(path, name, entry["size"])
    if len(data) != entry["size"]:
        raise Damaged(f"{path.name}/{name} has {len(data):,} of {entry['size']:,} bytes")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise Damaged(f"{path.name}/{name} has changed since it was written: {_what_changed(name, data, manifest)}")
    return data


def _read_bytes(path: Path, name: str, limit: int) -> bytes:
    """Bytes of a regular file of at most `limit` bytes; nothing endless is ever read."""
    file = path / name
    try:
        if not file.is_file():
            raise Damaged(f"{path.name}/{name} is missing")
        size = file.stat().st_size
        if size > limit:
            raise Damaged(f"{path.name}/{name} has {size:,} bytes, where at most {limit:,} are expected")
        return file.read_bytes()
    except OSError as error:
        raise Damaged(f"{path.name}/{name} cannot be read: {error.strerror}") from error


def _what_changed(name: str, data: bytes, manifest: dict[str, Any]) -> str:
    if name == _STATE:
        return "its text"
    try:
        found = safetensors.torch.load(data)
    except Exception:  # whatever the parser says about damaged bytes
        return "its header"
    listed = manifest["tensors"][name]
    changed = [key for key in listed if key not in found or _describe(found[key]) != listed[key]]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"tensor {', '.join(ascii(key) for key in changed[:3])}{more}" if changed else "its header"


def _parse_tensors(path: Path, name: str, data: bytes, manifest: dict[str, Any]) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the parser's own, and torch's for a dtype that it does not know
        raise Damaged(f"{path.name}/{name} is not a safetensors file: {error}") from error
    listed = manifest["tensors"][name]
    if tensors.keys() != listed.keys():
        different = sorted(tensors.keys() ^ listed.keys())
        raise Damaged(f"{path.name}/{name} and its manifest differ in tensor {different[0]!a}")
    for key, tensor in tensors.items():
        if [listed[key].get("dtype"), listed[key].get("shape")] != [_dtype_name(tensor), list(tensor.shape)]:
            raise Damaged(f"{path.name}/{name}: tensor {key!a} is not of the dtype and shape in the manifest")
    return tensors


def _owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each on the CPU: safetensors refuses views and tensors that share memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _describe(tensor: Tensor) -> dict[str, Any]:
    values = tensor.reshape(-1).view(torch.uint8).numpy()
    return {
        "dtype": _dtype_name(tensor),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(values.data).hexdigest(),
    }


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# --- JSON ---------------------------------------------------------------------------------------------------


def _json_text(value: Any) -> str:
    # ASCII: a file name that is not UTF-8 then survives as an escape
    return json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest's bytes, which end with the hash of all that comes before it."""
    seal = hashlib.sha256(_json_text(manifest).encode("ascii")).hexdigest()
    return _json_text({**manifest, "sha256": seal}).encode("ascii")


def _resealed(manifest: dict[str, Any]) -> bytes | None:
    """The bytes that a read manifest should have; None if `save` cannot have written it."""
    try:
        return _sealed({key: value for key, value in manifest.items() if key != "sha256"})
    except (ValueError, RecursionError):
        return None


def _parse_json_object(path: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path.name}/{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Damaged(f"{path.name}/{name} is not a JSON object")
    return value
