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

_SHOWN = 5  # differences
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def goes_on(config: RunConfig, out: Path) -> bool:
    """Whether the launcher has started all ranks anew, after one failed, and there is this run to go on with.

    Then `pretrain` means `resume`. The same answer on every rank.

    Args:
        config: of the run that was asked for.
        out: its folder.
    """
    again = any(os.environ.get(name, "0") != "0" for name in _RESTARTS)
    return again and bool(
        dist.broadcast_object((out / "config.yaml").exists() and load_config(out / "config.yaml") == config)
    )


def require_agreement(config: RunConfig, images: ImageSet, order: Sampler, step: int) -> None:
    """Compare what each rank is about to do. On all ranks together; nothing in a run of one.

    Args:
        config: of the run; what may change on resume may differ between ranks.
        images: the data set.
        order: which rows make up each step.
        step: updates that are complete, by the checkpoint that this rank has read.

    Raises:
        UserError: on every rank, if ranks differ; the text says which, in what, and how.
    """
    if dist.world_size() == 1:
        return
    next_rows = order.batch(step // order.steps_per_epoch, step % order.steps_per_epoch)
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
    disagreement = differences(dist.gather_objects((socket.gethostname(), facts)))
    if disagreement:
        more = f"; and {len(disagreement) - _SHOWN} more" if len(disagreement) > _SHOWN else ""
        raise UserError(
            f"ranks do not agree: {'; '.join(disagreement[:_SHOWN])}{more}. Give every machine the same command, the "
            "same packages, the same images and the same run folder"
        )


def differences(ranks: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """In what ranks differ from rank 0, one sentence each.

    Args:
        ranks: host and facts of each rank.
    """
    host, expected = ranks[0]
    return [
        f"{name} is {facts.get(name)!r} on rank {rank} ({there}) and {value!r} on rank 0 ({host})"
        for rank, (there, facts) in enumerate(ranks)
        for name, value in expected.items()
        if facts.get(name) != value
    ]
