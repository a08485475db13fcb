"""A fixed split of the training images; a run refuses to continue with another one."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from tessella import dist
from tessella.errors import UserError
from tessella.ops.partition import partition


class Partition(nn.Module):
    """Which of C parts each training image belongs to, for the whole run; see `ops.partition` for the arguments.

    The split is a function of the constructor's numbers, so only they and a checksum are saved. Loading other numbers
    is refused, unless `images` is 0, as for an evaluation: what was learnt about one split is wrong about another. The
    seed is below 2**63.
    """

    def __init__(self, images: int, parts: int, seed: int) -> None:
        super().__init__()
        rows = partition(images, parts, seed)
        checksum = int.from_bytes(hashlib.sha256(rows.astype("<i4").tobytes()).digest()[:8], "little") >> 1
        self._facts = {"seed": seed, "parts": parts, "images": images, "checksum": checksum}
        for name, value in self._facts.items():
            self.register_buffer(name, torch.tensor(value))
        # Not a buffer: it is no state, and DDP would broadcast it every step.
        self._part_of_row = torch.from_numpy(rows)
        self.register_load_state_dict_pre_hook(_refuse_another_split)

    def forward(self, instances: Tensor) -> Tensor:
        """Part of each image: (n,) rows of the data set -> (n,) int64 in [0, C)."""
        if self._part_of_row.device != instances.device:
            self._part_of_row = self._part_of_row.to(instances.device)
        return self._part_of_row[instances].long()

    def assert_equal_on_ranks(self) -> None:
        """Assert that every rank made the same split. Every rank must call it; waits for the device."""
        checksums = dist.gather(torch.tensor([self._facts["checksum"]], device=self.get_buffer("checksum").device))
        assert (checksums == checksums[0]).all(), "the ranks have cut the images into different parts"


def _refuse_another_split(module: Partition, state: dict[str, Any], prefix: str, *_: object) -> None:
    ours, saved = module._facts, {name: int(state.get(prefix + name, value)) for name, value in module._facts.items()}
    if ours["images"] and saved != ours:
        raise UserError(
            f"the saved run cut {saved['images']} images into {saved['parts']} parts (seed {saved['seed']}), this one "
            f"cuts {ours['images']} into {ours['parts']} (seed {ours['seed']}): continue with the same images, "
            "batch_size, categories and partition_seed, or start a new run"
        )
