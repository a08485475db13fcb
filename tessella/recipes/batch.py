"""What else to change when a recipe is run at another batch size.

Nothing is scaled automatically: the rules are shown, and the user applies them. Each method has its own rule, see
`Method.at_batch_size`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tessella.methods import method_of
from tessella.methods.method import BatchChange
from tessella.run.config import RunConfig, flat, to_dict


def at_batch_size(config: RunConfig, batch_size: int, accumulate: int = 1) -> RunConfig:
    """A recipe at another batch size, changed by the rules; codes, duals and the like depend on the micro-batch."""
    change = BatchChange(config.batch_size, batch_size, batch_size // accumulate)
    method, rates = method_of(config.method).at_batch_size(config.method, config.optimizer, change)
    return dataclasses.replace(config, method=method, optimizer=rates, batch_size=batch_size, accumulate=accumulate)


def flags(before: RunConfig, after: RunConfig) -> dict[str, str]:
    """The options that turn one run into another, without batch size and accumulation: field -> words to type."""
    old, new = flat(to_dict(before)), flat(to_dict(after))
    return {
        name: f"--{name.replace('_', '-')} {_typed(value)}"
        for name, value in new.items()
        if name not in ("batch_size", "accumulate") and value != old.get(name)
    }


def _typed(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
