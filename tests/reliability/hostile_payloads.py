"""Payloads that would leave a mark on the disk if anything ran them, and the way by which each reaches Tessella.

A payload is a file or folder that an adversary sends; `plant` writes it below a folder and answers what the victim
would type. Every payload is armed: `test_hostile_payloads` fires the pickles on purpose to see that the mark appears.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

from tests.reliability.hostile_files import photo


class Payload(NamedTuple):
    """One attack. `use` is the victim's call; it may fail with a UserError, or not notice anything."""

    plant: Callable[[Path, Path, Path], Any]  # (folder to write into, path of the mark, a good run) -> what `use` takes
    use: str  # a name in `test_hostile_payloads.USES`
    pickled: bool = False  # the planted file is a pickle that can be fired


class Reduced:
    """Whatever unpickles this calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def triggers(mark: Path) -> dict[str, Reduced]:
    """Ways to leave a mark when unpickled."""
    shell, python = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    return {
        "os.system": Reduced(os.system, shell),
        "builtins.exec": Reduced(builtins.exec, python),
        "builtins.eval": Reduced(builtins.eval, python),
        "builtins.open": Reduced(builtins.open, str(mark), "w"),
        "subprocess.Popen": Reduced(subprocess.Popen, ["touch", str(mark)]),
        "os.mkdir": Reduced(os.mkdir, str(mark)),
        "shutil.copy": Reduced(shutil.copy, "/etc/hostname", str(mark)),
        "an inner pickle": Reduced(torch.storage._load_from_bytes, pickle.dumps(Reduced(os.system, shell))),
    }


def saved(wrap: Callable[[Any], Any], name: str = "weights.pth", trigger: str = "os.system", **options: Any) -> Payload:
    """A file of torch.save with a trigger somewhere in it."""

    def plant(folder: Path, mark: Path, run: Path) -> Path:
        torch.save(wrap(triggers(mark)[trigger]), folder / name, **options)
        return folder / name

    return Payload(plant, "weights")


def raw(
    name: str, protocol: int = 2, wrap: Callable[[bytes], bytes] = lambda data: data, use: str = "weights"
) -> Payload:
    """A bare pickle under another name."""

    def plant(folder: Path, mark: Path, run: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(wrap(pickle.dumps(triggers(mark)["os.system"], protocol)))
        return folder / name

    return Payload(plant, use, pickled=wrap(b"x") == b"x")


def in_run(name: str, content: Callable[[Path], bytes], use: str = "run") -> Payload:
    """A good run, of which one file is replaced or added; `*` in the name stands for the newest checkpoint."""

    def plant(folder: Path, mark: Path, run: Path) -> Path:
        shutil.copytree(run, folder / "run")
        newest = max((folder / "run/checkpoints").iterdir())
        file = newest / name.removeprefix("*/") if name.startswith("*/") else folder / "run" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content(mark))
        return folder / "run"

    return Payload(plant, use)


def pickled(mark: Path) -> bytes:
    return pickle.dumps({"weights": triggers(mark)["os.system"]})


def yaml_tag(tag: str) -> Callable[[Path], bytes]:
    """A configuration with a tag of Python's YAML."""
    return lambda mark: f"recipe: swav_cpu\nmethod: {tag.replace('MARK', str(mark))}\n".encode()


YAML_TAGS = {
    "apply": "!!python/object/apply:os.system ['touch MARK']",
    "apply with keywords": "!!python/object/apply:subprocess.check_call {args: [['touch', 'MARK']]}",
    "new": "!!python/object/new:os.system ['touch MARK']",
    "name": "!!python/name:os.system",
    "module": "!!python/module:antigravity",
    "object": "!!python/object:tests.reliability.hostile_payloads.Reduced {}",
    "exec": "!!python/object/new:type {args: [z, [], {extend: !!python/name:exec }], listitems: \"open('MARK', 'w')\"}",
}


def object_array(mark: Path) -> bytes:
    array = np.empty(1, dtype=object)
    array[0] = triggers(mark)["os.system"]
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def in_cache(name: str) -> Payload:
    """A folder of images whose index, in the cache, was replaced by arrays of objects."""

    def plant(folder: Path, mark: Path, run: Path) -> Path:
        (folder / "images").mkdir()
        (folder / "images/a.jpg").write_bytes(photo())
        from tessella.data.sources import open_images

        open_images(str(folder / "images"), cache=folder / "cache")
        (file,) = (folder / "cache").rglob(name)
        file.write_bytes(object_array(mark))
        return folder / "images"

    return Payload(plant, "cached images")


def archive(*members: str, use: str = "images") -> Payload:
    """A tar with a good image and pickles under names that other readers of such archives load."""

    def plant(folder: Path, mark: Path, run: Path) -> Path:
        with tarfile.open(folder / "a.tar", "w") as tar:
            for name, content in [("good.jpg", photo()), *((name, pickled(mark)) for name in members)]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return folder / "a.tar"

    return Payload(plant, use)


def named(data: str, use: str = "images") -> Payload:
    """A name that some reader takes for a program."""
    return Payload(lambda folder, mark, run: data.replace("MARK", str(mark)), use)


def listed(line: str) -> Payload:
    def plant(folder: Path, mark: Path, run: Path) -> Path:
        (folder / "list.csv").write_text("path,label\n" + line.replace("MARK", str(mark)) + "\n")
        return folder / "list.csv"

    return Payload(plant, "images")


def metadata_folder(name: str) -> Payload:
    """A folder as torch's distributed checkpoints are, whose metadata is a pickle."""

    def plant(folder: Path, mark: Path, run: Path) -> Path:
        (folder / "dcp").mkdir()
        (folder / "dcp" / name).write_bytes(pickled(mark))
        (folder / "dcp/__0_0.distcp").write_bytes(pickled(mark))
        return folder / "dcp"

    return Payload(plant, "weights")


def lying_header(header: bytes, length: int | None = None) -> Payload:
    def plant(folder: Path, mark: Path, run: Path) -> Path:
        claimed = len(header) if length is None else length
        (folder / "weights.safetensors").write_bytes(struct.pack("<Q", claimed) + header + bytes(64))
        return folder / "weights.safetensors"

    return Payload(plant, "weights")


def tensor_header(**fields: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | fields}).encode()


def zipped(name: str, compressed: bool) -> Payload:
    """The zip form of torch.save by hand, its pickle the trigger, compressed or not."""

    def plant(folder: Path, mark: Path, run: Path) -> Path:
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
            file.writestr("archive/data.pkl", pickled(mark))
            file.writestr("archive/version", "3\n")
            file.writestr("archive/byteorder", "little")
            if compressed:
                file.writestr("archive/data/0", bytes(2**24))
        return folder / name

    return Payload(plant, "weights")


def scripted(folder: Path, mark: Path, run: Path) -> Path:
    """A TorchScript archive: a program by itself."""
    with zipfile.ZipFile(folder / "weights.pt", "w") as file:
        file.writestr("archive/constants.pkl", pickled(mark))
        file.writestr("archive/data.pkl", pickled(mark))
        file.writestr("archive/code/__torch__.py", f"import os\nos.system('touch {mark}')\n")
    return folder / "weights.pt"


def cifar_folder(folder: Path, mark: Path, run: Path) -> Path:
    """CIFAR-100's Python version as a label map: `meta` is a pickle."""
    (folder / "cifar-100-python").mkdir()
    for name in ("meta", "train", "test"):
        (folder / "cifar-100-python" / name).write_bytes(pickled(mark))
    return folder / "cifar-100-python"


def imported_folder(folder: Path, mark: Path, run: Path) -> Path:
    """A folder of imported weights whose tensors are a pickle."""
    (folder / "imported").mkdir()
    facts = {"format": 2, "backbone": {"name": "resnet50"}, "method": None, "origin": "torchvision"}
    facts |= {"title": "a ResNet", "sha256": "0" * 64, "whole": True, "report": []}
    (folder / "imported/import.json").write_text(json.dumps(facts))
    for name in ("weights.safetensors", "backbone.safetensors", "method.safetensors"):
        (folder / "imported" / name).write_bytes(pickled(mark))
    return folder / "imported"


def shadowed_folder(folder: Path, mark: Path, run: Path) -> Path:
    """A folder of images with modules in it, named like those that a program imports."""
    (folder / "a.jpg").write_bytes(photo())
    for name in ("json", "numpy", "PIL", "simplejpeg", "selectors", "sitecustomize", "usercustomize", "tessella"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (folder / "tessella.pth").write_text(f"import os; open({str(mark)!r}, 'w').close()\n")
    return folder


def data_file(tag: str) -> Payload:
    def plant(folder: Path, mark: Path, run: Path) -> Path:
        (folder / "data.yaml").write_text(f"classes: {tag.replace('MARK', str(mark))}\n")
        return folder / "data.yaml"

    return Payload(plant, "data file")


PAYLOADS: dict[str, Payload] = {
    # torch.save, foreign weights
    **{f"pth, {name}": saved(lambda x: x, trigger=name) for name in triggers(Path("x"))},
    "pth, among tensors": saved(lambda x: {"state_dict": {"conv1.weight": torch.zeros(2), "evil": x}}),
    "pth, in an optimiser's state": saved(lambda x: {"model": {}, "optimizer": {"state": {0: {"step": x}}}}),
    "pth, as a key": saved(lambda x: {"epoch": 3, "args": [x]}, name="checkpoint.pth.tar"),
    "pth, older format": saved(lambda x: {"state_dict": x}, _use_new_zipfile_serialization=False),
    "pt, protocol 4": saved(lambda x: x, name="weights.pt", pickle_protocol=4),
    "bin": saved(lambda x: x, name="pytorch_model.bin"),
    "torch": saved(lambda x: x, name="swav.torch"),
    "zip by hand": zipped("weights.pth", compressed=False),
    "zip that unpacks to more": zipped("weights.pth", compressed=True),
    "TorchScript": Payload(scripted, "weights"),
    # bare pickles
    "pickle, protocol 0": raw("weights.pth", 0),
    "pickle, protocol 2": raw("weights.pth", 2),
    "pickle, protocol 5": raw("weights.pt", 5),
    "pickle named safetensors": raw("weights.safetensors"),
    "pickle, compressed as joblib's": raw("weights.bin", 2, zlib.compress),
    "pickle named as an image": raw("images/a.png", use="images of folder"),
    "pickle named as a list": raw("list.csv", 0, use="images"),
    "pickle named parquet": raw("list.parquet", 2, use="images"),
    "pickle named tar": raw("a.tar", 2, use="images"),
    "pickle named tar.gz": raw("a.tar.gz", 2, use="images"),
    "pickle as a label map": raw("map.csv", 0, use="label map"),
    "CIFAR's pickles as a label map": Payload(cifar_folder, "label map"),
    # distributed checkpoints
    "DCP": metadata_folder(".metadata"),
    "DCP in a run": in_run("*/.metadata", pickled),
    # run folders
    "run: tensors of the method": in_run("*/method.safetensors", pickled),
    "run: tensors of the optimiser": in_run("*/optimizer.safetensors", pickled, use="resume"),
    "run: state": in_run("*/state.json", pickled),
    "run: manifest": in_run("*/manifest.json", pickled),
    "run: product": in_run("backbone.safetensors", pickled),
    "run: records": in_run("evaluation.json", pickled, use="report"),
    "run: log": in_run("metrics.jsonl", pickled, use="report"),
    "run: surroundings": in_run("environment.json", pickled, use="report"),
    "run: configuration is a pickle": in_run("config.yaml", pickled),
    **{f"run: YAML {name}": in_run("config.yaml", yaml_tag(tag)) for name, tag in YAML_TAGS.items()},
    **{f"report: YAML {name}": in_run("config.yaml", yaml_tag(tag), use="report") for name, tag in YAML_TAGS.items()},
    **{f"data file: YAML {name}": data_file(tag) for name, tag in YAML_TAGS.items()},
    "imported folder": Payload(imported_folder, "weights"),
    # arrays of objects
    **{f"index of objects: {name}": in_cache(f"{name}.npy") for name in ("ids", "sizes", "key_bytes", "labels")},
    # archives and lists
    "tar with pickles": archive("a.pyd", "b.pkl", "c.pth", "d.pickle", "e.npy", "f.json", "g.cls"),
    "tar with pickled images": archive("evil.jpg", "a/evil.png"),
    "tar with pickled annotations": archive("annotations/instances_train.json", use="annotations"),
    "a name for a pipe": named("pipe:touch MARK"),
    "a name for a shell": named("$(touch MARK)"),
    "a name with a command behind": named("x; touch MARK"),
    "a pattern for a shell": named("`touch MARK`*.tar"),
    "a line for a pipe": listed("pipe:touch MARK|.jpg,1"),
    "a line for a shell": listed("$(touch MARK).jpg,1"),
    "weights by a pipe": named("pipe:touch MARK", use="weights"),
    "a network by a module": named("random:os.system?x=MARK", use="weights"),
    "a network by code": named("random:__import__('os').system('touch MARK')", use="weights"),
    "modules beside images": Payload(shadowed_folder, "scan from within"),
    # safetensors whose headers lie
    "header longer than the file": lying_header(b"{}", 2**62),
    "header of no JSON": lying_header(b"\x80\x04cos\nsystem\n."),
    "header with a type of code": lying_header(tensor_header(dtype="__import__('os').system('true')")),
    "header beyond the data": lying_header(tensor_header(data_offsets=[0, 2**60])),
    "header that goes backwards": lying_header(tensor_header(data_offsets=[16, 0])),
    "header of a negative shape": lying_header(tensor_header(shape=[-1, -4])),
    "header of an endless shape": lying_header(tensor_header(shape=[2**62, 2**62])),
    "header of deep nesting": lying_header(b'{"a":' + b"[" * 100_000),
    "header of a type without tensors": lying_header(tensor_header(dtype="F8_E8M0", data_offsets=[0, 4])),
}

assert safetensors.torch  # what reads the headers above
