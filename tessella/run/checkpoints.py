"""Checkpoints on disk: tensors and JSON in one folder, written whole or not at all, read only if undamaged.

    checkpoints/
      step-00000012/
        method.safetensors  optimizer.safetensors ...   the tensors, one file per group
        state.json                                      everything else that a resumed run needs
        manifest.json                                   size and sha256 of every file, sha256 of every tensor
      .saving-0123456789abcdef/                         a save that was killed; the next save removes it

A save fills a folder under a temporary name, syncs every file and the folder, and renames it (`tessella.files`). So a
killed process leaves the previous checkpoint or the complete new one. safetensors has no checksum; the hashes of the
manifest reveal what a disk or a copy has changed. Nothing is executed: JSON and safetensors only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tessella import files
from tessella.files import FileError, json_text

FORMAT = 1  # of the folder; raised when an older Tessella could not read a newer one's checkpoints

_MANIFEST = "manifest.json"
_STATE = "state.json"
_SUFFIX = ".safetensors"
_REPLACED = ".replaced"
_CHECKPOINT = re.compile(r"step-\d{8,18}(\.replaced)?")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # a plain file name on every system, no path
_MANIFEST_LIMIT = 64 << 20  # bytes; a hundred times the manifest of a network with thousands of tensors


class Damaged(Exception):
    """A checkpoint that cannot be trusted; the text names the file and, if it is known, the tensor."""


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
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    with files.explain_write_error(folder, needed):
        files.make_folder(folder)
        _remove_leftovers(folder)
        files.refuse_full_disk(folder, needed)
        with files.new_folder(target) as temporary:  # its old contents, if any, count until the new ones are there
            _fill(temporary, step, tensors, state)
    return target


def save_elsewhere(step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path | None:
    """Write a checkpoint into a new private folder for temporary files, because its own folder cannot take it.

    Args:
        step: as in `save`.
        tensors: as in `save`.
        state: as in `save`; values that JSON has no type for are written as text.

    Returns:
        The checkpoint; None if it cannot be written there either.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="tessella-"))
        try:
            return save(folder, step, tensors, json.loads(json.dumps(state, default=str), parse_constant=str))
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except Exception:  # the caller reports the first failure
        return None


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
    if state.get("step", manifest["step"]) != manifest["step"]:
        raise Damaged(f"{path.name}/{_STATE} is of step {state['step']!r}: it was copied from another checkpoint")
    return groups, state


def load_newest(
    folder: Path, on_damage: Callable[[str], object] = warnings.warn
) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Read the checkpoint with the highest step that is undamaged.

    Args:
        folder: where checkpoints lie; it may be missing.
        on_damage: called with the reason for each newer checkpoint that was skipped.

    Returns:
        Its folder, and what `load` gives; None if there is no valid checkpoint.
    """
    for path in _checkpoints(folder):
        try:
            return path, *load(path)
        except Damaged as damage:
            on_damage(str(damage))
    return None


def prune(folder: Path, keep: int = 2) -> None:
    """Remove what is older than the `keep` newest valid checkpoints, and what killed saves and removals have left.

    Damaged ones do not count: a run that had to go back to an earlier checkpoint must not lose its new ones to them. A
    damaged one that is newer stays until the run reaches its step and replaces it.

    Args:
        folder: where checkpoints lie.
        keep: at least 1.
    """
    assert keep >= 1, keep
    _remove_leftovers(folder)
    valid = 0
    for path in _checkpoints(folder):
        if valid >= keep:
            files.remove(path)
        elif _damage(path) is None:
            valid += 1


# --- writing ------------------------------------------------------------------------------------------------


def _fill(temporary: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    listed: dict[str, dict[str, Any]] = {}
    described: dict[str, dict[str, Any]] = {}
    for group, named in tensors.items():
        assert _GROUP.fullmatch(group), f"{group!r} cannot be a file name"
        owned = files.owned_tensors(named)
        listed[group + _SUFFIX] = _write_and_describe(temporary / (group + _SUFFIX), safetensors.torch.save(owned))
        described[group + _SUFFIX] = {name: _describe(tensor) for name, tensor in owned.items()}
    listed[_STATE] = _write_and_describe(temporary / _STATE, json_text(state).encode("ascii"))
    manifest = {
        "format": FORMAT,
        "step": step,
        "fingerprints": state.get("fingerprints", {}),
        "files": listed,
        "tensors": described,
    }
    files.write_bytes(temporary / _MANIFEST, _sealed(manifest))


def _write_and_describe(path: Path, data: bytes) -> dict[str, Any]:
    files.write_bytes(path, data)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _remove_leftovers(folder: Path) -> None:
    """Clear what killed saves and killed removals have left."""
    files.remove_unfinished(folder)
    for path in _checkpoints(folder):
        if path.name.endswith(_REPLACED) and path.with_name(path.name.removesuffix(_REPLACED)).exists():
            files.remove(path)


# --- reading ------------------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> list[Path]:
    """Folders named as checkpoints, newest first; of one step, the one being replaced last."""
    files.refuse_link(folder)
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: (_step_of(path), not path.name.endswith(_REPLACED)), reverse=True)


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
    if path.is_symlink():
        raise Damaged(f"{path.name} is a link, not a folder of this run")
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
    listed, tensors = manifest.get("files"), manifest.get("tensors")
    if not (isinstance(listed, dict) and isinstance(tensors, dict) and _STATE in listed):
        raise Damaged(f"{path.name}/{_MANIFEST} does not list the files of a checkpoint")
    for name, entry in listed.items():
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
    try:
        return files.read_bytes(path / name, limit)
    except FileError as error:
        what = "is missing" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        raise Damaged(f"{path.name}/{name} {what}") from error


def _what_changed(name: str, data: bytes, manifest: dict[str, Any]) -> str:
    if name == _STATE:
        return "its text"
    try:
        tensors = safetensors.torch.load(data)
    except Exception:  # damaged bytes raise errors of many types
        return "its header"
    listed = manifest["tensors"][name]
    changed = [key for key in listed if key not in tensors or _describe(tensors[key]) != listed[key]]
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


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest's bytes, which end with the hash of all that comes before it."""
    seal = hashlib.sha256(json_text(manifest).encode("ascii")).hexdigest()
    return json_text({**manifest, "sha256": seal}).encode("ascii")


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
