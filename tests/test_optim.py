"""Update rules and schedules, step by step, against the specification's numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.optim import LARC, LARS, OptimizerConfig, build_optimizer, learning_rate


def slow_larc(p: torch.Tensor, g: torch.Tensor, wd: float, trust: float = 0.001) -> torch.Tensor:
    if p.norm() == 0 or g.norm() == 0:
        return g
    return trust * p.norm() / (g.norm() + wd * p.norm() + 1e-8) * (g + wd * p)


def test_larc_gives_the_hand_checked_step():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([0.6, 0.8])
    LARC([p], lr=4.8, momentum=0.9, weight_decay=1e-6, trust=0.001).step()
    torch.testing.assert_close(p.detach(), torch.tensor([3 - 0.0144, 4 - 0.0192]), atol=1e-6, rtol=0)


def test_larc_equals_the_rule_tensor_by_tensor_over_many_steps():
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.randn(2))]
    slow = [p.detach().clone() for p in parameters]
    buffers: list[torch.Tensor | None] = [None, None, None]
    optimizer = LARC(parameters, lr=0.5, momentum=0.9, weight_decay=0.01, trust=0.001)
    for _ in range(4):
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            g = slow_larc(slow[i], p.grad, 0.01)
            buffers[i] = g.clone() if buffers[i] is None else 0.9 * buffers[i] + g
            slow[i] = slow[i] - 0.5 * buffers[i]
        optimizer.step()
    for p, expected in zip(parameters, slow, strict=True):
        torch.testing.assert_close(p.detach(), expected)
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_larc_leaves_a_zero_parameter_its_raw_gradient_and_skips_missing_gradients():
    zero, frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    zero.grad = torch.tensor([1.0, 2.0, 3.0])
    LARC([zero, frozen], lr=0.1, momentum=0.9, weight_decay=1e-6, trust=0.001).step()
    torch.testing.assert_close(zero.detach(), torch.tensor([-0.1, -0.2, -0.3]))
    assert torch.equal(frozen.detach(), torch.ones(3))


def test_swav_schedule_is_linspace_then_cosine_per_step():
    config = OptimizerConfig(lr=4.8, warmup_epochs=10, warmup_lr=0.3, final_lr=0.0048)
    steps, epochs = 312, 100
    rates = [learning_rate(config, step, steps, epochs) for step in range(steps * epochs)]
    t = np.arange(steps * (epochs - 10))
    cosine = 0.0048 + 0.5 * (4.8 - 0.0048) * (1 + np.cos(np.pi * t / len(t)))
    np.testing.assert_allclose(rates, np.concatenate([np.linspace(0.3, 4.8, steps * 10), cosine]), rtol=1e-12)
    assert rates[3119] == rates[3120] == 4.8 and 0.0048 < rates[-1] < 0.00481


def test_jigclu_schedule_is_a_cosine_that_steps_with_the_epoch():
    config = OptimizerConfig(lr=0.03, per_epoch=True)
    assert learning_rate(config, 0, 5004, 200) == learning_rate(config, 5003, 5004, 200) == 0.03
    np.testing.assert_allclose(learning_rate(config, 100 * 5004 + 7, 5004, 200), 0.015)
    assert learning_rate(config, 199 * 5004, 5004, 200) < 3e-6


def test_norms_and_biases_can_be_kept_from_decay():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    groups = build_optimizer(net, OptimizerConfig(decay_norm_and_bias=False, weight_decay=0.1)).param_groups
    assert [len(g["params"]) for g in groups] == [1, 3] and [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert len(build_optimizer(net, OptimizerConfig()).param_groups) == 1


def test_a_transformer_s_position_embedding_and_tokens_are_spared_together_with_norms_and_biases():
    spared_besides = {
        "timm:test_vit": {"net.cls_token", "net.pos_embed"},
        "timm:test_vit2": {"net.pos_embed", "net.reg_token"},
    }
    for name, expected in spared_besides.items():
        net = nn.ModuleDict({"backbone": build_backbone(BackboneConfig(name)), "head": nn.Linear(64, 2)})
        config = OptimizerConfig("adamw", decay_norm_and_bias=False, weight_decay=0.05)
        decayed, spared = build_optimizer(net, config).param_groups
        names = {id(p): key for key, p in net.named_parameters()}
        assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
        assert {names[id(p)] for p in spared["params"] if p.dim() > 1} == {f"backbone.{key}" for key in expected}
        assert all(p.dim() > 1 for p in decayed["params"])


def test_swin_s_tables_of_relative_positions_are_spared():
    with torch.device("meta"):
        net = build_backbone(BackboneConfig("timm:swin_tiny_patch4_window7_224"))
    spared = build_optimizer(net, OptimizerConfig("adamw", decay_norm_and_bias=False)).param_groups[1]["params"]
    names = {id(p): key for key, p in net.named_parameters()}
    matrices = [names[id(p)] for p in spared if p.dim() > 1]
    assert len(matrices) == 12 and all("relative_position_bias_table" in name for name in matrices)


def test_lars_scales_matrices_by_their_decayed_gradient_and_leaves_vectors_to_plain_sgd():
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.zeros(2, 2))]
    slow = [p.detach().clone() for p in parameters]
    buffers = [torch.zeros_like(p) for p in slow]
    optimizer = LARS(parameters, lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.001)
    for _ in range(4):
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            g = p.grad.clone()
            if p.dim() > 1:
                g = g + 0.1 * slow[i]
                if slow[i].norm() > 0 and g.norm() > 0:
                    g = 0.001 * slow[i].norm() / g.norm() * g
            buffers[i] = 0.9 * buffers[i] + g
            slow[i] = slow[i] - 0.5 * buffers[i]
        optimizer.step()
    for p, expected in zip(parameters, slow, strict=True):
        torch.testing.assert_close(p.detach(), expected)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert isinstance(build_optimizer(nn.Linear(2, 2), OptimizerConfig("lars")), LARS)


def test_coke_schedule_is_nothing_then_shares_of_the_warm_up_then_a_cosine():
    config = OptimizerConfig("lars", lr=1.6, zero_lr_epochs=1, warmup_epochs=10, warmup_end="next")
    s, epochs = 1251, 1001
    assert {learning_rate(config, t, s, epochs) for t in range(s)} == {0.0}
    for t in range(s, 11 * s):
        np.testing.assert_allclose(learning_rate(config, t, s, epochs), 1.6 * max(1, t - s) / (10 * s), rtol=1e-12)
    for t in (11 * s, 11 * s + 1, 500 * s, epochs * s - 1):
        cosine = 1.6 * (1 + np.cos(np.pi * (t - 11 * s) / ((epochs - 11) * s))) / 2
        np.testing.assert_allclose(learning_rate(config, t, s, epochs), cosine, rtol=1e-9)
    assert learning_rate(config, 11 * s, s, epochs) == 1.6 and learning_rate(config, epochs * s - 1, s, epochs) < 1e-9
