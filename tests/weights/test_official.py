"""Official checkpoints: what was computed there is computed here, and nothing is lost or let in unseen."""

from __future__ import annotations

import argparse
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from tessella.errors import UserError
from tessella.methods import build_method
from tessella.methods.method import Method
from tessella.modules.backbone import build_backbone
from tessella.ops.montage import pool_cells
from tessella.weights.imported import import_weights, read_imported, report_lines
from tessella.weights.official import SETTING, Official, read_official, recognise
from tessella.weights.resolve import resolve_backbone
from tests.weights import official_nets as nets


def images(side: int = 64) -> Tensor:
    return torch.randn(3, 3, side, side)


def saved(content: Any, path: Path) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def equal(ours: Tensor, theirs: Tensor) -> None:
    """Relative error of at most 1e-5."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def rebuilt(official: Official) -> Any:
    """Our method with the imported weights; what is initialised as it is built."""
    assert official.method is not None
    method: Method = build_method(official.method, build_backbone(official.backbone), SETTING)
    method.load_state_dict(official.tensors, strict=False)
    return method.eval()


# --- what is computed ---------------------------------------------------------------------------------------

Wrap = Callable[[nets.State], Any]

SWAV: dict[str, tuple[Callable[[], nets.State], Wrap, str]] = {
    "released": (lambda: nets.swav(nets.resnet()), nets.released, "pth.tar"),
    "without prefix": (lambda: nets.swav(nets.resnet()), dict, "pth"),
    "safetensors": (lambda: nets.swav(nets.resnet()), nets.released, "safetensors"),
    "training": (lambda: nets.swav(nets.resnet()), nets.training, "pth.tar"),
    "training in 16 bits": (
        lambda: nets.swav(nets.resnet()), lambda s: nets.training(s, amp={"loss_scaler0": {"loss_scale": 65536.0}}),
        "pt",
    ),
    "VISSL": (lambda: nets.swav(nets.resnet()), lambda s: nets.vissl(s, numbered=True), "torch"),
    "VISSL, heads without number": (lambda: nets.swav(nets.resnet()), lambda s: nets.vissl(s, numbered=False), "torch"),
    "VISSL, three heads": (
        lambda: nets.swav(nets.resnet(), prototypes=(12, 12, 9)), lambda s: nets.vissl(s, numbered=True), "torch",
    ),
    "ResNet-50": (lambda: nets.swav(nets.resnet50()), nets.released, "pth"),
    "w2": (lambda: nets.swav(nets.resnet50(16), hidden=64), nets.released, "pth"),
    "w5": (lambda: nets.swav(nets.resnet50(20), hidden=80, bn=False), nets.released, "pth"),
    "DeepCluster-v2": (lambda: nets.swav(nets.resnet(), prototypes=(12, 12, 12)), nets.released, "pth.tar"),
}  # fmt: skip


@pytest.mark.parametrize("case", SWAV)
def test_swav_features_embeddings_and_scores_are_the_official_ones(case: str, tmp_path: Path):
    build, wrap, suffix = SWAV[case]
    state, x = build(), images()
    file = saved(wrap(state), tmp_path / f"anything.{suffix}")
    import_weights(file, tmp_path / "imported")
    for source in (file, tmp_path / "imported"):
        loaded = resolve_backbone(str(source))
        official = loaded.backbone.eval()(x)
        equal(official, nets.features(state, x))
        method: Any = loaded.method
        z = F.normalize(nets.head(state, "projection_head", nets.features(state, x)), dim=1)
        equal(method.projector(official), z)
        weights = [value for key, value in state.items() if key.startswith("prototypes")]
        for head, weight in zip(method.heads, weights, strict=True):
            equal(head(z), z @ F.normalize(weight, dim=1).T)
        assert torch.equal(method.assign(official), (z @ F.normalize(weights[0], dim=1).T).argmax(dim=1))
        assert loaded.transform.size == 224 and loaded.transform.std == (0.228, 0.224, 0.225)


@pytest.mark.parametrize("wrap", [nets.training, nets.released])
def test_jigclu_cells_embeddings_and_locations_are_the_official_ones(wrap: Wrap, tmp_path: Path):
    trunk = nets.resnet50()
    state, x = nets.jigclu(trunk), images(224)  # a map of 7 x 7, as in the official runs
    method = rebuilt(read_official(saved(wrap(state), tmp_path / "j.pth")))
    cells = F.adaptive_avg_pool2d(F.interpolate(nets.feature_map(trunk, x), (8, 8), mode="bilinear"), (2, 2))
    cells = cells.flatten(2).permute(2, 0, 1)  # (4, b, d): row by row
    ours = pool_cells(method.backbone.feature_map(x), 2)
    equal(ours, cells)
    rows = cells.flatten(0, 1)
    equal(method.cluster_head(ours.flatten(0, 1)), F.normalize(nets.head(state, "encoder.fc_clu", rows), dim=1))
    equal(method.location_head(ours.flatten(0, 1)), nets.apply_linear(state, "encoder.fc_loc", rows))


def test_mejigclu_embeddings_and_categories_are_those_of_its_layout(tmp_path: Path):
    trunk = nets.resnet()
    state, x = nets.mejigclu(trunk), images()
    facts = {"subset_seed": 3, "subset_n": 10, "subset_N": 500, "subset_hash": "c0ffee"}
    import_weights(saved(nets.training(state, **facts), tmp_path / "m.pth"), tmp_path / "imported")
    method: Any = resolve_backbone(str(tmp_path / "imported")).method
    features = nets.features(trunk, x)
    equal(method.backbone(x), features)
    equal(method.cluster_head(features), F.normalize(nets.head(state, "encoder.fc_clu", features), dim=1))
    equal(method.category_head(features), nets.head(state, "encoder.fc_cls", features))
    inside = read_official(saved(state | {"subset_seed": torch.tensor(3)}, tmp_path / "i.pth"))
    assert any(row.official == "*subset_*" and row.outcome == "left out" for row in inside.report)


@pytest.mark.parametrize("one_view", [True, False])
def test_coke_logits_of_both_branches_are_the_official_ones(one_view: bool, tmp_path: Path):
    trunk, temperature = nets.resnet(), 0.1 if one_view else 0.05
    state, x = nets.coke(trunk, one_view), images()
    file = saved(nets.training(state, arch="resnet50"), tmp_path / "c.pth.tar")
    import_weights(file, tmp_path / "imported")
    official, loaded = read_official(file), resolve_backbone(str(tmp_path / "imported"))
    assert official.method is not None
    assert official.method.views.views == (1 if one_view else 2)  # type: ignore[union-attr]
    assert ("two views or multi-crop" in official.title) is not one_view
    method: Any = loaded.method
    z = nets.head(state, "encoder.fc", nets.features(trunk, x))
    q = nets.head(state, "predictor", z)
    for h, clustering in enumerate(method.clusterings):
        centres = state[f"pre_center_{h}"]
        ours = method.projector(loaded.backbone.eval()(x))
        for mine, theirs in ((ours, z), (method.predictor(ours), q)):
            logits = F.normalize(mine, dim=1) @ clustering.previous.T / method.config.temperature
            equal(logits, F.normalize(theirs, dim=1) @ centres / temperature)
        equal(clustering.current.T, state[f"cur_center_{h}"])
        assert not clustering.duals.any() and not clustering.seen.any()  # of the other run's images and epoch
    assert len(method.labels.rows) == 0
    assert torch.equal(method.assign(nets.features(trunk, x)), (z @ state["pre_center_0"]).argmax(dim=1))


def test_smog_online_and_momentum_outputs_are_those_of_the_release(tmp_path: Path):
    state, x = nets.smog(), images()
    official = read_official(saved(nets.training(state), tmp_path / "s.pth.tar"))
    method = rebuilt(official)
    parts = {
        e: {k.removeprefix(e): v for k, v in state.items() if k.startswith(e)} for e in ("q_encoder.", "k_encoder.")
    }
    z = nets.head(state, "q_encoder.projection_head", nets.features(parts["q_encoder."], x))
    equal(method.projector(method.backbone(x)), z)
    equal(method.predictor(method.projector(method.backbone(x))),
          F.normalize(nets.head(state, "q_encoder.predictor_head", z), dim=1))  # fmt: skip
    momentum = method.momentum_encoder
    zk = nets.head(state, "k_encoder.projection_head", nets.features(parts["k_encoder."], x))
    equal(momentum["projector"](momentum["backbone"](x)), zk)
    anew = {row.ours for row in official.report if row.outcome == "initialised"}
    assert anew == {"groups", "bank.*"}


def test_what_cannot_assign_images_yet_is_a_backbone_only(tmp_path: Path):
    file = saved(nets.training(nets.smog()), tmp_path / "s.pth.tar")
    import_weights(file, tmp_path / "imported")
    assert resolve_backbone(str(tmp_path / "imported")).method is None  # its groups are random: no clusters to show


@pytest.mark.parametrize("wrap", [dict, nets.released, nets.training])
def test_a_plain_resnet_is_read_without_its_classifier(wrap: Wrap, tmp_path: Path):
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5).eval()
    random = nets.resnet(64)
    net.load_state_dict(random, strict=False)
    file = saved(wrap(net.state_dict()), tmp_path / "r.pth")
    x, loaded = images(), resolve_backbone(str(file))
    net.fc = torch.nn.Identity()
    equal(loaded.backbone.eval()(x), net(x))
    equal(nets.features(random, x), net(x))  # and the reference of this file is torchvision's network
    assert loaded.method is None
    row = next(row for row in read_official(file).report if row.outcome == "left out")
    assert (row.official, row.what) == ("fc.*", "2 tensors, 2,565 values")


def test_a_folder_gives_back_what_was_imported(tmp_path: Path):
    file = saved(nets.released(nets.swav(nets.resnet())), tmp_path / "s.pth")
    one, two = import_weights(file, tmp_path / "imported"), read_imported(tmp_path / "imported")
    assert one._replace(tensors={}) == two._replace(tensors={})
    assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in one.tensors.keys() | two.tensors.keys())
    assert "prototypes.weight" in "\n".join(report_lines(two))


# --- the published sizes ------------------------------------------------------------------------------------


def on_meta(build: Callable[[], nets.State]) -> nets.State:
    with torch.device("meta"):
        return build()


def parameters(state: nets.State) -> int:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return sum(value.numel() for key, value in state.items() if not key.endswith(buffers))


def test_the_released_resnet50_of_swav_has_328_entries_and_finds_a_place_for_each():
    state = on_meta(lambda: nets.swav(nets.resnet50(64), 2048, 128, (3000,)))
    assert (len(state), parameters(state)) == (328, 28_354_752)
    official = recognise(nets.released(state), "swav_800ep_pretrain.pth.tar")
    assert len(official.tensors) == 328
    assert official.backbone.name == "resnet50" and official.backbone.width == 64
    config: Any = official.method
    assert (config.prototypes, config.embedding_dim, config.hidden_dim, config.head_norm) == (3000, 128, 2048, True)


@pytest.mark.parametrize(
    ("widen", "hidden", "bn", "millions"), [(2, 8192, True, 93.9), (4, 8192, True, 375.4), (5, 10240, False, None)]
)
def test_the_wide_resnets_of_swav_are_told_by_their_shapes(widen: int, hidden: int, bn: bool, millions: float | None):
    state = on_meta(lambda: nets.swav(nets.resnet50(64 * widen), hidden, 128, (3000,), bn))
    official = recognise(nets.released(state), f"swav_RN50w{widen}_400ep_pretrain.pth.tar")
    config: Any = official.method
    assert (official.backbone.width, config.hidden_dim, config.head_norm) == (64 * widen, hidden, bn)
    backbone = {key: value for key, value in official.tensors.items() if key.startswith("backbone.")}
    assert millions is None or round(parameters(backbone) / 1e6, 1) == millions


def test_the_online_encoder_of_smog_has_339_entries_and_finds_a_place_for_each():
    state = on_meta(lambda: nets.smog(2048, 128, 64, deep=True))
    online = {key: value for key, value in state.items() if key.startswith("q_encoder.")}
    assert (len(online), parameters(online)) == (339, 28_501_312)
    official = recognise(nets.training(state), "checkpoint.pth.tar")
    assert len(official.tensors) == len(state)


@pytest.mark.parametrize(
    ("build", "origin"),
    [
        (lambda: nets.jigclu(nets.resnet50(64), 128), "jigclu"),
        (lambda: nets.mejigclu(nets.resnet50(64), 128, 256), "mejigclu"),
        (lambda: nets.coke(nets.resnet50(64), True, 128, (3000, 4000, 5000), 1_281_167), "coke"),
        (lambda: nets.coke(nets.resnet50(64), False, 128, (3000, 4000, 5000), 1_281_167), "coke"),
        (lambda: nets.swav(nets.resnet50(64), 2048, 128, (3000, 3000, 3000)), "deepclusterv2"),
    ],
)
def test_full_size_checkpoints_of_the_others_are_recognised_whole(build: Callable[[], nets.State], origin: str):
    official = recognise(nets.training(on_meta(build)), "any name")
    assert official.origin == origin and official.backbone.width == 64
    assert sum(key.startswith("backbone.") for key in official.tensors) == 318
    assert sum(row.outcome == "matched" for row in official.report) >= 3


# --- nothing lost, nothing let in unseen --------------------------------------------------------------------


def spoilt(change: Callable[[nets.State], object]) -> nets.State:
    state = nets.swav(nets.resnet())
    change(state)
    return nets.released(state)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "an extra tensor": (
        lambda: spoilt(lambda s: s.update({"layer9.weight": torch.ones(2)})), r"no place for layer9\.weight",
    ),
    "a missing tensor": (
        lambda: spoilt(lambda s: s.pop("layer2.0.bn1.bias")), r"it lacks layer2\.0\.bn1\.bias",
    ),
    "a wrong shape": (
        lambda: spoilt(lambda s: s.update({"layer3.0.conv2.weight": torch.ones(2, 2, 3, 3)})),
        r"wrong shape: layer3\.0\.conv2\.weight has shape \(2, 2, 3, 3\) "
        r"\(expected, as backbone\.layer3\.0\.conv2\.weight: \(32, 32, 3, 3\)\)",
    ),
    "a head of another width": (
        lambda: spoilt(lambda s: s.update({"projection_head.3.weight": torch.ones(5, 24)})),
        r"projection_head\.3\.weight has shape",
    ),
    "no prototypes": (lambda: spoilt(lambda s: s.pop("prototypes.weight")), r"lacks prototypes\.weight"),
    "a flat prototype": (
        lambda: spoilt(lambda s: s.update({"prototypes.weight": torch.ones(5)})), "too few dimensions",
    ),
    "a linear probe": (
        lambda: nets.training(nets.linear("linear", 2048, 1000)), "holds a linear classifier and no network",
    ),
    "SMoG's memory": (
        lambda: {"local_memory_embeddings": torch.ones(2, 3, 4), "local_memory_index": torch.arange(3)},
        "one rank's memory of SMoG",
    ),
    "SMoG's Swin": (
        lambda: nets.training({"q_encoder.enc_base.patch_embed.proj.weight": torch.ones(96, 3, 4, 4)}),
        "is SMoG's Swin",
    ),
    "SwAV's queue": (lambda: {"queue": torch.ones(2, 3, 4)}, "one rank's queue of SwAV"),
    "another project": (
        lambda: {"state_dict": {"module.encoder_q.conv1.weight": torch.ones(8, 3, 7, 7)}},
        r"has none of the known layouts .* it holds encoder_q\.conv1\.weight",
    ),
    "a network with other blocks": (
        lambda: nets.released(nets.swav(nets.resnet(8, (1, 1, 2, 1)))), r"its four stages have \[1, 1, 2, 1\] blocks",
    ),
    "VISSL without heads": (lambda: {"classy_state_dict": {"base_model": {}}}, "VISSL file without"),
    "no names": (lambda: [torch.ones(2)], "holds a list, not tensors by name"),
    "nothing": (lambda: {"epoch": 3}, "it holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(case: str, tmp_path: Path):
    build, message = WRONG[case]
    file = saved(build(), tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=message):
        import_weights(file, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_only_the_layout_that_was_asked_for_is_accepted(tmp_path: Path):
    file = saved(nets.training(nets.jigclu(nets.resnet())), tmp_path / "j.pth")
    assert read_official(file, "jigclu").origin == "jigclu"
    with pytest.raises(UserError, match="has the layout of jigclu, not of swav: leave --from out"):
        read_official(file, "swav")
    heads = saved(nets.released(nets.swav(nets.resnet(), prototypes=(12, 12))), tmp_path / "d.pth")
    assert read_official(heads, "swav").origin == "deepclusterv2"  # SwAV may have several heads, too


def test_counters_that_old_files_lack_are_no_obstacle(tmp_path: Path):
    state = {k: v for k, v in nets.jigclu(nets.resnet()).items() if not k.endswith("num_batches_tracked")}
    official = read_official(saved(nets.training(state), tmp_path / "j.pth"))
    row = next(row for row in official.report if row.ours == "*.num_batches_tracked")
    assert row.what == "12 counters"
    rebuilt(official)  # strict apart from them
    assert {name for name in official.tensors if "num_batches" in name} <= set(rebuilt(official).state_dict())


def test_the_report_accounts_for_everything_in_the_file(tmp_path: Path):
    official = read_official(saved(nets.training(nets.coke(nets.resnet(), True)), tmp_path / "c.pth"))
    assert {(row.official, row.ours, row.outcome) for row in official.report} == {
        ("encoder.conv1 ... layer4.*", "backbone.*", "matched"),
        ("encoder.fc.*", "projector.*", "matched"),
        ("predictor.*", "predictor.*", "matched"),
        ("pre_center_*", "clusterings.*.previous", "matched"),
        ("cur_center_*", "clusterings.*.current", "matched"),
        ("assign_labels", "", "left out"),
        ("label_val", "", "left out"),
        ("label_idx", "", "left out"),
        ("dual_*", "", "left out"),
        ("counter_*", "", "left out"),
        ("epoch", "", "left out"),
        ("optimizer", "", "left out"),
        ("", "clusterings.*.duals", "initialised"),
        ("", "clusterings.*.seen", "initialised"),
        ("", "label*.rows", "initialised"),
    }


# --- nothing is executed ------------------------------------------------------------------------------------


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("place", ["state_dict", "optimizer", "epoch", "note"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(place: str, tmp_path: Path):
    content = nets.training(nets.swav(nets.resnet()), **{place: Payload(tmp_path / "ran")})
    file = saved(content, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"\.system\) that only code from the file could rebuild"):
        import_weights(file, tmp_path / "imported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth"]


def test_harmless_values_of_training_scripts_are_no_obstacle(tmp_path: Path):
    more = {"best": np.float64(71.5), "seed": np.int64(31), "args": argparse.Namespace(lr=0.1), "arch": "resnet50"}
    official = read_official(saved(nets.training(nets.jigclu(nets.resnet()), **more), tmp_path / "j.pth"))
    assert {"best", "seed", "args", "arch"} <= {row.official for row in official.report if row.outcome == "left out"}


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04garbage", bytes(range(256)) * 8])
def test_what_is_no_checkpoint_is_said_to_be_unreadable(content: bytes, tmp_path: Path):
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as"):
            read_official(tmp_path / name)


def test_half_a_file_is_said_to_be_unreadable(tmp_path: Path):
    file = saved(nets.released(nets.swav(nets.resnet())), tmp_path / "s.pth")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot be read as a file of torch\.save"):
        read_official(file)


def test_what_torch_says_about_a_file_ends_in_whole_words(tmp_path: Path):
    (tmp_path / "s.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=r"save \(UnpicklingError: Unsupported operand \d+\): is it one"):
        read_official(tmp_path / "s.pth")


def test_a_folder_that_holds_something_and_a_file_that_is_not_there_are_refused(tmp_path: Path):
    (tmp_path / "note.txt").write_text("mine")
    file = saved(nets.released(nets.swav(nets.resnet())), tmp_path / "s.pth")
    with pytest.raises(UserError, match="not an empty folder"):
        import_weights(file, tmp_path)
    with pytest.raises(UserError, match="is no file"):
        import_weights(tmp_path / "gone.pth", tmp_path / "imported")


def test_jigclu_s_square_number_of_places_is_its_number_of_tiles(tmp_path: Path):
    state = nets.jigclu(nets.resnet())
    for places, fits in ((9, True), (5, False)):
        state |= nets.prefixed("encoder.", nets.linear("fc_loc", nets.dim_of(nets.resnet()), places))
        file = saved(nets.training(state), tmp_path / f"{places}.pth")
        if fits:
            config: Any = read_official(file).method
            assert config.tiles == math.isqrt(places)
        else:
            with pytest.raises(UserError, match=r"encoder\.fc_loc\.weight has shape"):
                read_official(file)


# --- files as training scripts write them -------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "model_state_dict", "student", "teacher"])
def test_weights_under_any_usual_name_are_read(key: str, tmp_path: Path):
    state = nets.resnet()
    content = {key: nets.released(state), "optimizer": {"state": {}}, "epoch": 3}
    official = read_official(saved(content, tmp_path / "net.pth"))
    assert official.title == f"a ResNet in torchvision's layout, training checkpoint, {key}"
    for name, value in state.items():
        assert torch.equal(official.tensors[f"backbone.{name}"], value)


def test_of_student_and_teacher_the_teacher_is_taken_and_the_report_says_so(tmp_path: Path):
    student, teacher = nets.resnet(), nets.resnet()
    inside = {f"backbone.{name}": value for name, value in teacher.items()} | nets.linear("head.mlp.0", 64, 8)
    content = {"student": nets.released(student), "teacher": inside, "center": torch.zeros(1, 8)}
    official = read_official(saved(content, tmp_path / "dino.pth"))
    assert torch.equal(official.tensors["backbone.conv1.weight"], teacher["conv1.weight"])
    left = {row.official: row.reason for row in official.report if row.outcome == "left out"}
    assert left["student"] == "another copy of the network: teacher is taken"
    assert "head.*" in left and "center" in left


def test_tensors_beside_the_weights_are_no_obstacle_and_are_listed(tmp_path: Path):
    beside = {"best_acc1": torch.tensor(71.5), "ema": {"a": [torch.ones(1)]}}
    official = read_official(saved(nets.training(nets.swav(nets.resnet()), **beside), tmp_path / "s.pth"))
    assert {"best_acc1", "ema"} <= {row.official for row in official.report if row.outcome == "left out"}


# --- small files that would cost much -----------------------------------------------------------------------


def test_lists_that_hold_each_other_are_never_walked_through(tmp_path: Path):
    endless: list[Any] = []
    for _ in range(60):
        endless = [endless, endless]  # 2 ** 60 leaves in some hundred bytes
    file = saved(nets.training(nets.resnet(), note=endless, notes={"more": endless}), tmp_path / "lists.pth")
    assert "note" in {row.official for row in read_official(file).report}


@pytest.mark.parametrize("trick", ["stride 0", "overlapping views"])
def test_a_small_file_cannot_claim_huge_tensors(trick: str, tmp_path: Path):
    state = nets.resnet()
    if trick == "stride 0":
        state["layer4.0.conv1.weight"] = torch.zeros(1, 1, 1, 1).expand(30_000, 30_000, 1, 1)
    else:
        values = torch.zeros(100_000)
        state |= {f"layer1.0.extra{i}": values[i : 90_000 + i] for i in range(50)}
    file = saved(state, tmp_path / "claims.pth")
    assert file.stat().st_size < 2e6
    with pytest.raises(UserError, match=r"claims tensors of [\d,]+ bytes and stores"):
        read_official(file)


def test_weights_that_are_tied_are_no_trick(tmp_path: Path):
    state = nets.resnet()
    state["layer1.0.conv2.weight"] = state["layer1.0.conv1.weight"]
    file = saved({"state_dict": state, "model": state}, tmp_path / "tied.pth")
    assert read_official(file).backbone.name == "resnet10"


@pytest.mark.parametrize("older", [False, True])
def test_tuples_that_hold_each_other_are_no_key(older: bool, tmp_path: Path):
    levels = b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60))  # each holds the one before twice
    pickled = b"\x80\x02)q\x00" + levels + b"}h\x3cK\x01s."  # 2 ** 60 leaves to hash
    file = saved({"state_dict": nets.resnet()}, tmp_path / "keys.pth")
    if older:
        torch.save(1, file, _use_new_zipfile_serialization=False)
        whole = file.read_bytes()
        file.write_bytes(whole.replace(b"\x80\x02K\x01.", pickled))
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match="tuples in tuples"):
        read_official(file)


def test_the_older_format_of_torch_is_read(tmp_path: Path):
    torch.save(nets.training(nets.resnet()), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_official(tmp_path / "old.pth").backbone.name == "resnet10"
