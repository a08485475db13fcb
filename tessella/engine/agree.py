"""Before the first step: do all ranks run the same program on the same data?"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from pathlib import Path
from typing import Any

from tessella import dist
from tessella.data.sampler import Sampler
from tessella.data.sources import ImageSet
from tessella.errors import UserError
from tessella.run.config import FREE_FIELDS, RunConfig, flat, load_config, to_dict
from tessella.run.folder import versions

_MOST_SHOWN = 5  # differences
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def was_restarted(config: RunConfig, out: Path) -> bool:
    """Whether the launcher has restarted all ranks after one failed, and `out` holds this run; the same on every rank.

    Then `pretrain` means `resume`.
    """
    restarted = any(os.environ.get(name, "0") != "0" for name in _RESTARTS)
    return restarted and bool(
        dist.broadcast_object((out / "config.yaml").exists() and load_config(out / "config.yaml") == config)
    )


def require_agreement(config: RunConfig, images: ImageSet, sampler: Sampler, step: int) -> None:
    """Compare what each rank is about to do. On all ranks together; fields that may change on resume may differ.

    Args:
        config: of the run.
        images: the data set.
        sampler: which rows make up each step.
        step: complete updates, by the checkpoint that this rank has read.

    Raises:
        UserError: on every rank, if ranks differ; the text names the ranks and the differences.
    """
    if dist.world_size() == 1:
        return
    next_rows = sampler.batch(step // sampler.steps_per_epoch, step % sampler.steps_per_epoch)
    facts: dict[str, Any] = {
        "the number of images": len(images),
        "the fingerprint of the data": images.fingerprint,
        "the number of ranks": dist.world_size(),
        "the step of the checkpoint": step,
        "the hash of the next step's images": hashlib.sha256(next_rows.tobytes()).hexdigest()[:12],
        "the version of python": platform.python_version(),
        **{f"the version of {name}": version for name, version in versions().items()},
        **flat({name: value for name, value in to_dict(config).items() if name not in FREE_FIELDS}),
    }
    ranks = dist.gather_objects((socket.gethostname(), facts))
    differences = [
        f"{name} is {theirs.get(name)!r} on rank {rank} ({host}) and {value!r} on rank 0 ({ranks[0][0]})"
        for rank, (host, theirs) in enumerate(ranks)
        for name, value in ranks[0][1].items()
        if theirs.get(name) != value
    ]
    if differences:
        more = f"; and {len(differences) - _MOST_SHOWN} more" if len(differences) > _MOST_SHOWN else ""
        raise UserError(
            f"ranks do not agree: {'; '.join(differences[:_MOST_SHOWN])}{more}. Give every machine the same command, "
            "packages, images and run folder"
        )
