"""Small methods and batches that tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella import dist
from tessella.data.batch import Batch
from tessella.data.views import CropGroup, ViewSpec
from tessella.methods.jigclu import Jigclu, JigcluConfig
from tessella.methods.mejigclu import Mejigclu, MejigcluConfig
from tessella.methods.method import Method, Setting
from tessella.methods.smog import Smog, SmogConfig, two_pipelines
from tessella.methods.swav import Swav, SwavConfig
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.modules.norm import synchronise_batch_norm

BATCH = 8
CROPS = ViewSpec((CropGroup(2, 16, (0.3, 1.0)), CropGroup(2, 8, (0.1, 0.3))))


def swav(seed: int = 0, batch: int = BATCH, **settings: object) -> Swav:
    torch.manual_seed(seed)
    config = SwavConfig(**{"prototypes": 12, "embedding_dim": 16, "hidden_dim": 32, "views": CROPS} | settings)
    return Swav(config, build_backbone(BackboneConfig("resnet10", 4, "small")), Setting(100, batch, seed)).train()


def jigclu(seed: int = 0, batch: int = BATCH, **settings: object) -> Jigclu:
    torch.manual_seed(seed)
    config = JigcluConfig(**{"tile_size": 8, "embedding_dim": 16} | settings)
    return Jigclu(config, build_backbone(BackboneConfig("resnet10", 4, "small")), Setting(100, batch, seed)).train()


def mejigclu(seed: int = 0, batch: int = BATCH, accumulate: int = 1, **settings: object) -> Mejigclu:
    torch.manual_seed(seed)
    config = MejigcluConfig(**{"tile_size": 8, "embedding_dim": 16} | settings)
    backbone = build_backbone(BackboneConfig("resnet10", 4, "small"))
    return Mejigclu(config, backbone, Setting(100, batch, seed, accumulate)).train()


def smog(seed: int = 0, batch: int = BATCH, images: int = 4 * BATCH, accumulate: int = 1, **settings: object) -> Smog:
    torch.manual_seed(seed)
    views = two_pipelines(CROPS.groups)
    config = SmogConfig(**{"groups": 6, "embedding_dim": 16, "hidden_dim": 32, "views": views} | settings)
    backbone = build_backbone(BackboneConfig("resnet10", 4, "small"))
    return Smog(config, backbone, Setting(images, batch, seed, accumulate)).train()


def random_batch(method: Method, batch: int = BATCH, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    groups = method.view_spec(method.config).groups
    views = tuple(torch.randn(g.views, batch, 3, g.size, g.size, generator=generator) for g in groups)
    return Batch(views, torch.arange(batch))


def this_ranks_share(batch: Batch) -> Batch:
    share = len(batch.instances) // dist.world_size()
    mine = slice(dist.rank() * share, (dist.rank() + 1) * share)
    return Batch(tuple(group[:, mine] for group in batch.views), batch.instances[mine])


def averaged_gradients(method: nn.Module) -> dict[str, Tensor]:
    """What DDP makes of the ranks' gradients: their mean."""
    return {
        name: dist.all_reduce_sum(p.grad) / dist.world_size()
        for name, p in method.named_parameters()
        if p.grad is not None
    }


def on_this_rank(method: Method) -> Method:
    """The method as the engine sets it up when there are several ranks."""
    return synchronise_batch_norm(method, torch.device("cpu")) if dist.world_size() > 1 else method
