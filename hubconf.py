"""For `torch.hub`: a backbone that `tessella export` or a run has written, as a torch module.

net = torch.hub.load("FOLDER OF THIS REPOSITORY", "backbone", source="local", weights="exported/")
"""

from typing import Any

dependencies = ["torch", "torchvision", "timm", "safetensors"]


def backbone(weights: str) -> Any:
    """A backbone in eval mode, with its `transform`; see `tessella.load_backbone`.

    Args:
        weights: a run, a folder of `tessella export`, a weights file, torchvision:NAME, timm:NAME or random:NAME.
    """
    import tessella

    return tessella.load_backbone(weights)
