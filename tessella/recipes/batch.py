"""What else to change when a recipe is run at another batch size.

Nothing is scaled behind anybody's back: these rules are told, and the user applies them. All learning rates go in
proportion to the batch; what else depends on it is each method's own. `WHY` says where a rule comes from.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tessella.methods import MethodConfig
from tessella.methods.coke import CokeConfig
from tessella.methods.mejigclu import MejigcluConfig
from tessella.methods.smog import SmogConfig
from tessella.methods.swav import SwavConfig
from tessella.recipes.imagenet import swav_imagenet_200ep, swav_imagenet_200ep_bs256
from tessella.run.config import RunConfig, to_dict

_QUEUE_BELOW = 1000  # images per forward: fewer make poor codes by themselves
_REGROUP_STEPS = 300  # SMoG's paper; an epoch of the released runs, which are at batch 4096
_SMOG_BATCH = 4096

# SwAV's official runs of ResNet-50 by batch size. Their learning rates are not in proportion.
_SWAV_PUBLISHED = {run.batch_size: run for run in (swav_imagenet_200ep(), swav_imagenet_200ep_bs256())}

WHY = {
    "swav": "learning rates in proportion to the batch, as SwAV's authors advise; 4096 and 256 on ImageNet as they "
    "published them (4.8 and 0.6, which are not in proportion). A queue below 1000 images per forward. Prototypes "
    "rest for as many images as here, on ImageNet about one epoch",
    "jigclu": "learning rates in proportion to the batch: ours, because 0.03 at 256 is all that is published",
    "mejigclu": "learning rates in proportion to the batch: ours, because 0.03 at 256 is all that is published. A "
    "smaller batch keeps the number of categories; a larger one has one category per slot, as in the paper",
    "smog": "learning rates in proportion to the batch: ours, because runs at 4096 are all that is published. On "
    "ImageNet groups are rebuilt every 300 steps, as the paper says, which at 4096 is an epoch",
    "coke": "learning rates in proportion to the batch, which for LARS is 1.6 x batch / 1024: ours, because 1024 is "
    "all that is published. The duals' rate is 0.02 min(batch, clusters), which is the published 20 at 1024",
}


def at_batch_size(config: RunConfig, batch_size: int, accumulate: int = 1) -> RunConfig:
    """A recipe at another batch size, changed as the rules say.

    Args:
        config: the recipe at its own batch size.
        batch_size: images per update.
        accumulate: micro-batches per update; codes, duals and the like depend on the images of one of them.
    """
    factor, rates = batch_size / config.batch_size, config.optimizer
    changed = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(
            rates,
            lr=_round(factor * rates.lr),
            warmup_lr=_round(factor * rates.warmup_lr),
            final_lr=_round(factor * rates.final_lr),
        ),
        method=_method_at(config.method, config.batch_size, batch_size, batch_size // accumulate),
        batch_size=batch_size,
        accumulate=accumulate,
    )
    published = _SWAV_PUBLISHED.get(batch_size)
    if published and any(config.optimizer == run.optimizer for run in _SWAV_PUBLISHED.values()):
        return dataclasses.replace(
            changed, optimizer=published.optimizer, method=_with_swav_batch(changed.method, published, accumulate)
        )
    return changed


def flags(before: RunConfig, after: RunConfig) -> dict[str, str]:
    """The options that turn one run into another: field, as in "optimizer.lr", -> the words to type.

    Batch size and accumulation are left out: they are what the user has given.
    """
    old, new = _leaves(to_dict(before)), _leaves(to_dict(after))
    return {
        name: f"--{name.replace('_', '-')} {_typed(value)}"
        for name, value in new.items()
        if name not in ("batch_size", "accumulate") and value != old.get(name)
    }


def _method_at(method: MethodConfig, old: int, new: int, together: int) -> MethodConfig:
    """A method's settings at `new` images per update, `together` of them in one forward; they were made for `old`."""
    match method:
        case SwavConfig():
            length, start = method.queue_length, method.queue_from_epoch
            if together < _QUEUE_BELOW <= old:
                length, start = 3840, 15
            elif old < _QUEUE_BELOW <= together:
                length = 0
            freeze = round(method.freeze_prototypes_steps * old / new)
            return dataclasses.replace(
                method, queue_length=length, queue_from_epoch=start, freeze_prototypes_steps=freeze
            )
        case MejigcluConfig(categories=None, slots="subsets") if new < old:
            return dataclasses.replace(method, categories=old)
        case SmogConfig(regroup_every=None) if old == _SMOG_BATCH != new:
            return dataclasses.replace(method, regroup_every=_REGROUP_STEPS)
        case CokeConfig() if together != old:
            return dataclasses.replace(method, dual_lr="auto")
    return method


def _with_swav_batch(method: MethodConfig, published: RunConfig, accumulate: int) -> MethodConfig:
    """The method with what a published run sets for its batch size."""
    assert isinstance(method, SwavConfig) and isinstance(published.method, SwavConfig)
    source = published.method if accumulate == 1 else method  # a batch in parts needs the queue of the parts
    return dataclasses.replace(
        method,
        queue_length=source.queue_length,
        queue_from_epoch=source.queue_from_epoch,
        freeze_prototypes_steps=published.method.freeze_prototypes_steps,
    )


def _round(x: float) -> float:
    return float(f"{x:.6g}")


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted names of all that is no dictionary."""
    if not isinstance(value, dict):
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= _leaves(inner, f"{name}.{key}" if name else key)
    return leaves


def _typed(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
