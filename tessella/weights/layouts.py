"""The layouts of official checkpoints: those that the methods declare, and that of torchvision's ResNets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tessella.methods import METHODS
from tessella.methods.layout import Layout, OfficialFile


def _network(file: OfficialFile) -> tuple[str, None]:
    return "a ResNet in torchvision's layout", None


_TORCHVISION = Layout(
    "torchvision",
    "layer1.*",
    {"backbone.*": "*"},
    _network,
    left_out={
        "fc.*": "a classifier of the classes that it was trained on",
        "head.*": "a head of the method that trained it",
    },
)

_PROBE = {
    "linear.*": "holds a linear classifier and no network: import the pre-trained file that it was trained on, and "
    "`tessella evaluate` trains its own probe"
}


def layouts() -> Iterator[Layout]:
    """All layouts; torchvision's comes last, because files of other layouts may have its keys too."""
    for name in METHODS:
        yield from METHODS[name].layouts
    yield _TORCHVISION


def refused() -> Mapping[str, str]:
    """Patterns of keys -> why such a file cannot be imported, unless it holds a ResNet as well."""
    return _PROBE | {pattern: reason for layout in layouts() for pattern, reason in layout.refused.items()}
