"""A pretend device without float64, as Apple's GPUs: its tensors compute on the CPU and refuse double precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("meta")  # torch takes no tensor for one of a device that it was built without


class _OnDevice(Tensor):
    """A tensor that says it is on `DEVICE`; its values lie on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> _OnDevice:
        if values.dtype == torch.float64:
            raise TypeError("this device has no float64")
        wrapped = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=DEVICE)
        wrapped.values = values
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class NoFloat64(TorchDispatchMode):
    """Within it, `DEVICE` can be used."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, _OnDevice)]
    asked = kwargs.get("device")
    on_device = torch.device(asked) == DEVICE if asked is not None else bool(inputs)
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map_only(_OnDevice, lambda x: x.values, (args, kwargs))
    result = function(*args, **kwargs)
    if function._schema.name.endswith("_") and inputs:  # in place: the same tensor comes back
        return inputs[0]
    return tree_map_only(Tensor, _OnDevice, result) if on_device else result
