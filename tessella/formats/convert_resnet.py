"""Write the weights of a ResNet in the key layout of detectron2 or OpenMMLab. Needs torch, and nothing of Tessella.

    python convert_resnet.py detectron2 torchvision.pth resnet-detectron2.pth
    python convert_resnet.py openmmlab backbone.safetensors resnet-openmmlab.pth

torchvision, the input                          detectron2                       OpenMMLab
conv1.weight, bn1.*                             stem.conv1.weight, .norm.*       the same behind "backbone."
layer1.0.conv1.weight, layer1.0.bn1.*           res2.0.conv1.weight, .norm.*     the same behind "backbone."
layer2.0.downsample.0.weight, .downsample.1.*   res3.0.shortcut.weight, .norm.*  the same behind "backbone."
fc.*, *.num_batches_tracked                     left out                         left out

How the configurations use the file, and which mean and std belong to it, is in README.md beside this script.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def to_detectron2(state: Mapping[str, Any]) -> dict[str, Any]:
    """What detectron2's checkpointer reads; it matches the names by their ends."""
    return {"model": {_detectron2_key(key): value for key, value in state.items()}, "matching_heuristics": True}


def to_openmmlab(state: Mapping[str, Any]) -> dict[str, Any]:
    """What OpenMMLab's libraries read: `init_cfg=dict(type="Pretrained", checkpoint=FILE, prefix="backbone.")`."""
    return {"state_dict": {f"backbone.{key}": value for key, value in state.items()}, "meta": {}}


def _detectron2_key(key: str) -> str:
    key = re.sub(r"^layer(\d)\.", lambda stage: f"res{int(stage[1]) + 1}.", key)
    key = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", key)
    key = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", key)
    return key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


LAYOUTS = {"detectron2": to_detectron2, "openmmlab": to_openmmlab}


def main(words: list[str]) -> int:
    """Convert one file.

    Args:
        words: layout, input, output.

    Returns:
        The exit code.
    """
    if len(words) != 3 or words[0] not in LAYOUTS:
        print(f"usage: python convert_resnet.py {'|'.join(LAYOUTS)} INPUT OUTPUT.pth", file=sys.stderr)
        return 2
    layout, source, target = words[0], Path(words[1]), Path(words[2])
    if target.exists():
        print(f"{target} exists already: name another file", file=sys.stderr)
        return 2
    if source.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(source)
    else:
        state = torch.load(source, map_location="cpu", weights_only=True)
    state = {key: value for key, value in state.items() if not re.search(r"^fc\.|num_batches_tracked$", key)}
    torch.save(LAYOUTS[layout](state), target)
    print(f"Written: {target}, {len(state)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
