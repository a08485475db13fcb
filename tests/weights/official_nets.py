"""The official networks, built a second time: tensors by the published tables of keys, and plain functions on them.

Nothing here comes from the package. Weights are random, running statistics away from their defaults.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def linear(key: str, dim_in: int, dim_out: int, bias: bool = True) -> State:
    state = {f"{key}.weight": torch.randn(dim_out, dim_in) / dim_in**0.5}
    return state | ({f"{key}.bias": torch.randn(dim_out) / 10} if bias else {})


def norm(key: str, channels: int, affine: bool = True) -> State:
    state = {f"{key}.weight": torch.rand(channels) + 0.5, f"{key}.bias": torch.randn(channels) / 10} if affine else {}
    return state | {
        f"{key}.running_mean": torch.randn(channels) / 10,
        f"{key}.running_var": torch.rand(channels) + 0.5,
        f"{key}.num_batches_tracked": torch.tensor(7),
    }


def conv(key: str, dim_in: int, dim_out: int, kernel: int) -> State:
    return {f"{key}.weight": torch.randn(dim_out, dim_in, kernel, kernel) / (dim_in * kernel**2) ** 0.5}


def resnet(width: int = 8, blocks: tuple[int, ...] = (1, 1, 1, 1), bottleneck: bool = False) -> State:
    """Keys and shapes of torchvision's ResNet, without fc; `width` channels in the stem."""
    state = conv("conv1", 3, width, 7) | norm("bn1", width)
    channels_in = width
    for stage, depth in enumerate(blocks):
        inner = width * 2**stage
        out = inner * (4 if bottleneck else 1)
        for number in range(depth):
            key = f"layer{stage + 1}.{number}"
            kernels, widths = ((1, 3, 1), (inner, inner, out)) if bottleneck else ((3, 3), (inner, out))
            dim = channels_in
            for n, (kernel, channels) in enumerate(zip(kernels, widths, strict=True), start=1):
                state |= conv(f"{key}.conv{n}", dim, channels, kernel) | norm(f"{key}.bn{n}", channels)
                dim = channels
            if number == 0 and (stage > 0 or channels_in != out):
                state |= conv(f"{key}.downsample.0", channels_in, out, 1) | norm(f"{key}.downsample.1", out)
            channels_in = out
    return state


def resnet50(width: int = 8) -> State:
    return resnet(width, (3, 4, 6, 3), bottleneck=True)


def dim_of(trunk: State) -> int:
    return list(trunk.values())[-3].shape[0]


# --- what the networks compute, in eval mode ----------------------------------------------------------------


def apply_norm(state: State, key: str, x: Tensor) -> Tensor:
    weight, bias = state.get(f"{key}.weight"), state.get(f"{key}.bias")
    return F.batch_norm(x, state[f"{key}.running_mean"], state[f"{key}.running_var"], weight, bias)


def apply_linear(state: State, key: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{key}.weight"], state.get(f"{key}.bias"))


def feature_map(state: State, x: Tensor) -> Tensor:
    """As SwAV's code has it: a zero pad of 1, then the first convolution with padding 2."""
    x = F.conv2d(F.pad(x, (1, 1, 1, 1)), state["conv1.weight"], stride=2, padding=2)
    x = F.max_pool2d(F.relu(apply_norm(state, "bn1", x)), 3, 2, 1)
    for stage in (1, 2, 3, 4):
        number = 0
        while f"layer{stage}.{number}.conv1.weight" in state:
            x = _block(state, f"layer{stage}.{number}", x, stride=2 if stage > 1 and number == 0 else 1)
            number += 1
    return x


def _block(state: State, key: str, x: Tensor, stride: int) -> Tensor:
    shortcut, last = x, 3 if f"{key}.conv3.weight" in state else 2
    if f"{key}.downsample.0.weight" in state:
        shortcut = F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=stride)
        shortcut = apply_norm(state, f"{key}.downsample.1", shortcut)
    for n in range(1, last + 1):
        weight = state[f"{key}.conv{n}.weight"]
        strided = n == last - 1  # the 3x3 convolution of a bottleneck, the first one of a basic block
        x = F.conv2d(x, weight, stride=stride if strided else 1, padding=weight.shape[2] // 2)
        x = apply_norm(state, f"{key}.bn{n}", x)
        x = F.relu(x) if n < last else x
    return F.relu(x + shortcut)


def features(state: State, x: Tensor) -> Tensor:
    return feature_map(state, x).mean(dim=(2, 3))


def head(state: State, key: str, x: Tensor, activation: Any = F.relu) -> Tensor:
    """An nn.Sequential of Linear, BatchNorm and activations, by the numbers in its keys; a missing number activates."""
    numbers = sorted({int(k.removeprefix(f"{key}.").split(".")[0]) for k in state if k.startswith(f"{key}.")})
    for number in range(numbers[-1] + 1):
        at = f"{key}.{number}"
        if f"{at}.running_mean" in state:
            x = apply_norm(state, at, x)
        else:
            x = apply_linear(state, at, x) if number in numbers else activation(x)
    return x


# --- the projects -------------------------------------------------------------------------------------------


def swav(trunk: State, hidden: int = 24, dim: int = 16, prototypes: tuple[int, ...] = (12,), bn: bool = True) -> State:
    state = trunk | linear("projection_head.0", dim_of(trunk), hidden)
    state |= norm("projection_head.1", hidden) if bn else {}
    state |= linear(f"projection_head.{3 if bn else 2}", hidden, dim)
    if len(prototypes) == 1:
        return state | linear("prototypes", dim, prototypes[0], bias=False)
    for i, count in enumerate(prototypes):
        state |= linear(f"prototypes.prototypes{i}", dim, count, bias=False)
    return state


def jigclu(trunk: State, dim: int = 16) -> State:
    d = dim_of(trunk)
    heads = linear("fc_clu.0", d, d) | linear("fc_clu.2", d, dim) | linear("fc_loc", d, 4)
    return prefixed("encoder.", trunk | heads)


def mejigclu(trunk: State, dim: int = 16, categories: int = 10) -> State:
    d = dim_of(trunk)
    heads = linear("fc_clu.0", d, d) | linear("fc_clu.2", d, dim)
    return prefixed("encoder.", trunk | heads | linear("fc_cls.0", d, d) | linear("fc_cls.2", d, categories))


def coke(trunk: State, one_view: bool, dim: int = 16, counts: tuple[int, ...] = (6, 8), images: int = 30) -> State:
    d = dim_of(trunk)
    fc = linear("fc.0", d, d) | norm("fc.1", d) | linear("fc.3", d, d) | norm("fc.4", d)
    state = prefixed("encoder.", trunk | fc | linear("fc.6", d, dim) | norm("fc.7", dim))
    state |= linear("predictor.0", dim, d) | norm("predictor.1", d) | linear("predictor.3", d, dim)
    for h, count in enumerate(counts):
        state |= {
            f"pre_center_{h}": F.normalize(torch.randn(dim, count), dim=0),
            f"cur_center_{h}": F.normalize(torch.randn(dim, count), dim=0),
            f"dual_{h}": torch.rand(count),
            f"counter_{h}": torch.ones(count),
        }
    if not one_view:
        return state | {"assign_labels": torch.ones(len(counts), images, dtype=torch.long)}
    return state | {
        "assign_labels": torch.ones(len(counts), images, 5, dtype=torch.long),
        "label_val": torch.zeros(len(counts), images, 5),
        "label_idx": torch.zeros(len(counts), images, dtype=torch.long),
    }


def smog(hidden: int = 24, dim: int = 16, width: int = 8, deep: bool = False) -> State:
    state: State = {}
    for encoder in ("q_encoder.", "k_encoder."):
        trunk = resnet50(width) if deep else resnet(width)
        part = trunk | linear("projection_head.0", dim_of(trunk), hidden) | norm("projection_head.1", hidden)
        part |= linear("projection_head.3", hidden, dim) | norm("projection_head.4", dim, affine=False)
        if encoder == "q_encoder.":
            part |= linear("predictor_head.0", dim, hidden) | norm("predictor_head.1", hidden)
            part |= linear("predictor_head.3", hidden, dim)
        state |= prefixed(encoder, part)
    return state


# --- how they are saved -------------------------------------------------------------------------------------


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def released(state: State) -> State:
    return prefixed("module.", state)


def training(state: State, **more: Any) -> dict[str, Any]:
    """As a training script saves it, with a real optimiser's state."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    return {"epoch": 200, "state_dict": released(state), "optimizer": optimizer.state_dict()} | more


def vissl(state: State, numbered: bool) -> dict[str, Any]:
    """SwAV's tensors as VISSL keeps them."""
    heads = {k: v for k, v in state.items() if k.startswith(("projection_head", "prototypes"))}
    trunk = prefixed("_feature_blocks.", {k: v for k, v in state.items() if k not in heads})
    heads = {k.replace("prototypes.prototypes", "prototypes").replace("prototypes.w", "prototypes0.w"): v
             for k, v in heads.items()}  # fmt: skip
    model = {"trunk": trunk, "heads": prefixed("0.", heads) if numbered else heads}
    state_dict = {"base_model": {"model": model, "meta": {}}, "optimizer": {"lr": 0.1}, "train_phase_idx": 799}
    return {"classy_state_dict": state_dict, "phase": 799, "loss": 2.5}
