"""Networks of timm as backbones: maps that lie where the pixels lay, pooling, stems, and refusals before a run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tessella.data.batch import Batch
from tessella.errors import UserError
from tessella.methods.jigclu import Jigclu, JigcluConfig
from tessella.methods.method import Progress, Setting
from tessella.modules.backbone import BackboneConfig, TimmBackbone, build_backbone, try_backbone
from tessella.ops.montage import pool_cells, stitch

VIT, SWIN = "timm:test_vit", "timm:swin_tiny_patch4_window7_224"
MAPS = [
    BackboneConfig(VIT, pool="average"),
    BackboneConfig("timm:test_vit2"),  # register token, own average and a norm behind it
    BackboneConfig(SWIN),
    BackboneConfig("timm:test_convnext"),
    BackboneConfig("timm:resnet10t"),
    BackboneConfig("timm:resnet18", stem="small"),
]


def named(config: BackboneConfig) -> str:
    return f"{config.name.removeprefix('timm:')}-{config.pool}"


def without_mixing(config: BackboneConfig) -> TimmBackbone:
    """A ViT whose tokens never meet and do not know their place: what is left is where they lie."""
    vit = build_backbone(config)
    assert isinstance(vit, TimmBackbone)
    vit.net.blocks, vit.net.norm, vit.net.fc_norm = nn.Identity(), nn.Identity(), nn.Identity()
    nn.init.zeros_(vit.net.pos_embed)
    return vit.eval()


@pytest.mark.parametrize("name", [VIT, "timm:test_vit2"])
def test_the_cells_of_a_vit_s_map_lie_where_their_tiles_lay(name: str):
    vit = without_mixing(BackboneConfig(name, pool="average"))
    tiles = torch.randn(4, 5, 3, 1, 1).expand(-1, -1, -1, 64, 64)  # of one colour each
    cells = pool_cells(vit.feature_map(stitch(tiles, 2)), 2)  # (slot, montage, d)
    alone = torch.stack([vit.feature_map(tile).mean(dim=(2, 3)) for tile in tiles])
    torch.testing.assert_close(cells, alone, atol=1e-5, rtol=1e-4)
    assert (cells[0] - cells[1]).abs().max() > 0.1


def test_a_vit_s_map_of_an_oblong_image_has_its_rows_and_columns():
    vit = without_mixing(BackboneConfig(VIT, pool="average"))
    x = torch.randn(2, 3, 32, 96)
    patch = vit.feature_map(x[:, :, 16:32, 48:64])
    whole = vit.feature_map(x)
    assert whole.shape == (2, 64, 2, 6)
    torch.testing.assert_close(whole[:, :, 1, 3], patch[:, :, 0, 0])


@pytest.mark.parametrize("config", MAPS, ids=named)
def test_a_jigclu_step_reaches_every_parameter(config: BackboneConfig):
    torch.manual_seed(0)
    backbone, size = build_backbone(config), 16 if config.stem == "small" else 32
    method = Jigclu(JigcluConfig(tile_size=size, embedding_dim=16), backbone, Setting(100, 4, 0)).train()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    batch = Batch((torch.randn(4, 4, 3, size, size),), torch.arange(4))
    losses = []
    for _ in range(2):
        loss = method(batch, Progress(0, 4, 10)).loss
        optimizer.zero_grad()
        loss.backward()
        assert not [name for name, p in method.named_parameters() if p.grad is None]
        optimizer.step()
        losses.append(loss.detach())
    assert losses[1] != losses[0] and torch.isfinite(torch.stack(losses)).all()


@pytest.mark.parametrize("config", MAPS, ids=named)
def test_average_pooling_is_the_mean_of_the_map(config: BackboneConfig):
    net = build_backbone(BackboneConfig(config.name, stem=config.stem, pool="average")).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net(x), net.feature_map(x).mean(dim=(2, 3)))
    assert net(x).shape == (2, net.feature_dim)


@pytest.mark.parametrize("name", [VIT, SWIN, "timm:test_convnext"])
def test_a_map_is_normalised_at_every_position(name: str):
    y = build_backbone(BackboneConfig(name)).eval().feature_map(3 * torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(y.mean(dim=1), torch.zeros_like(y[:, 0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.var(dim=1, correction=0), torch.ones_like(y[:, 0]), atol=0.02, rtol=0)


def test_its_own_pooling_is_timm_s():
    import timm

    theirs = timm.create_model("test_vit", num_classes=0).eval()
    ours = build_backbone(BackboneConfig(VIT)).eval()
    ours.net.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(ours(x), theirs(x))
    averaged = build_backbone(BackboneConfig(VIT, pool="average"))
    assert averaged.state_dict().keys() == ours.state_dict().keys()  # weights do not depend on the pooling


@pytest.mark.parametrize("stem", ["imagenet", "small", "small-pool"])
def test_a_timm_resnet_equals_ours_with_every_stem(stem: str):
    ours = build_backbone(BackboneConfig("resnet18", stem=stem)).eval()
    theirs = build_backbone(BackboneConfig("timm:resnet18", stem=stem)).eval()
    theirs.net.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs.feature_map(x), ours.feature_map(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-4, rtol=1e-4)


def gradients(recompute: bool) -> list[Tensor]:
    torch.manual_seed(0)
    net = build_backbone(BackboneConfig(VIT, drop_path=0.5, activation_checkpointing=recompute)).train()
    torch.manual_seed(1)
    net(torch.randn(8, 3, 32, 32)).square().sum().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def test_recomputation_drops_the_same_blocks_again():
    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (BackboneConfig("resnet19"), "unknown backbone 'resnet19'.*did you mean"),
        (BackboneConfig("vit_tiny_patch16_224"), "did you mean timm:vit_tiny_patch16_224"),
        (BackboneConfig("torchvision:resnet50"), "torchvision's networks are timm's too.*did you mean resnet50"),
        (BackboneConfig("timm:no_such_net"), "timm has no network"),
        (BackboneConfig("resnet18", drop_path=0.1), "drop_path=0.1 is for networks of timm"),
        (BackboneConfig("timm:vgg11", drop_path=0.1), "cannot be built with drop_path=0.1"),
        (BackboneConfig("timm:resnet18", width=128), "width=128 is for our own ResNets"),
        (BackboneConfig(VIT, stem="small"), "stem=small is for ResNets that start with a 7x7"),
        (BackboneConfig("timm:resnet10t", stem="small-pool"), "stem=small-pool is for ResNets"),
    ],
    ids=lambda value: value.name if isinstance(value, BackboneConfig) else "",
)
def test_what_a_network_cannot_be_is_refused_with_what_to_change(config: BackboneConfig, text: str):
    with pytest.raises(UserError, match=text):
        build_backbone(config)


@pytest.mark.parametrize(
    ("config", "images", "montages", "text"),
    [
        (BackboneConfig(VIT), [64], [64], "evaluated by its class token: use --backbone.pool average"),
        (BackboneConfig("timm:vit_tiny_patch16_224"), [64, 100], [], "cannot take images of 100 x 100 pixels"),
        (BackboneConfig(VIT, pool="average"), [64], [72], "cannot take images of 72 x 72 pixels"),
        (BackboneConfig("timm:mixer_s32_224"), [224], [224], "has no feature map"),
        (BackboneConfig("timm:mixer_s32_224"), [96], [], "cannot take images of 96 x 96 pixels"),
        (BackboneConfig("timm:mobilenetv3_small_050"), [64], [64], r"would not train \(net.conv_head.weight"),
    ],
    ids=lambda value: value.name if isinstance(value, BackboneConfig) else "",
)
def test_a_network_that_cannot_take_the_views_is_refused_before_the_run(
    config: BackboneConfig, images: list[int], montages: list[int], text: str
):
    with pytest.raises(UserError, match=text):
        try_backbone(config, images, montages)


@pytest.mark.parametrize("config", MAPS, ids=named)
def test_a_network_that_can_is_not(config: BackboneConfig):
    before = torch.get_rng_state()
    try_backbone(config, images=[32], montages=[64])
    assert torch.equal(torch.get_rng_state(), before)
