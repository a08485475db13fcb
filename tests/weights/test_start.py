"""Runs that start from weights: what is taken, what starts anew, and that resume does not care."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessella.data.sources import open_images
from tessella.engine.build import build_state
from tessella.engine.pretrain import pretrain, resume
from tessella.errors import UserError
from tessella.methods import METHODS, MethodConfig, build_method
from tessella.methods.coke import CokeConfig
from tessella.methods.mejigclu import MejigcluConfig
from tessella.methods.method import Method, Setting
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.run.config import RunConfig, to_yaml
from tessella.weights.imported import import_weights
from tessella.weights.resolve import resolve_backbone, weights_sha256
from tessella.weights.start import init_from
from tests.engine.runs import assert_same, final_state, tiny_run
from tests.weights import official_nets as nets

ROOT = Path(__file__).resolve().parents[2]


def build(config: RunConfig) -> Method:
    return build_state(config, open_images(config.data), torch.device("cpu")).method


def state_of(method: Method) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def official_swav(folder: Path, **sizes: Any) -> Path:
    """SwAV's released layout in the size of a tiny run, but for what is given; its stem is for photos."""
    sizes = {"hidden": 32, "dim": 16, "prototypes": (20,)} | sizes
    torch.save(nets.released(nets.swav(nets.resnet(4), **sizes)), folder / "official.pth")
    return folder / "official.pth"


PHOTO_STEM = BackboneConfig("resnet10", 4)


# --- what is taken ------------------------------------------------------------------------------------------


def test_all_that_fits_is_taken_and_queues_start_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = pretrain(tiny_run(max_steps=3), tmp_path / "first")
    theirs = {k.removeprefix("method."): v for k, v in final_state(run).items() if k.startswith("method.")}
    assert theirs["queues.0.pushed"] > 0
    method = build(tiny_run(seed=5))
    capsys.readouterr()
    start = init_from(str(run), method)
    assert start.taken == ["backbone", "projector", "prototypes"] and start.initialised == {}
    for name, tensor in method.state_dict().items():
        expected = torch.zeros_like(tensor) if name.startswith("queues") else theirs[name]
        assert torch.equal(tensor, expected), name
    assert (
        capsys.readouterr().out == f"Taken from {run}: backbone, projector, prototypes. Randomly initialised: nothing\n"
    )
    start.write(tmp_path)
    assert json.loads((tmp_path / "start.json").read_text()) == start._asdict()
    assert start.backbone_sha256 == weights_sha256(resolve_backbone(str(run)).backbone)


def test_a_head_is_taken_whole_or_not_at_all(tmp_path: Path):
    config = tiny_run(backbone=PHOTO_STEM)
    file = official_swav(tmp_path, prototypes=(9,))
    method = build(config)
    before = state_of(method)
    start = init_from(str(file), method)
    assert start.taken == ["backbone", "projector"]
    assert start.initialised == {"prototypes": "prototypes.weight is (9, 16) there and (20, 16) here"}
    assert torch.equal(method.state_dict()["prototypes.weight"], before["prototypes.weight"])
    assert not torch.equal(method.state_dict()["projector.0.weight"], before["projector.0.weight"])

    start = init_from(str(official_swav(tmp_path, bn=False)), method)  # the same middle layer, but no norm
    assert "projector" not in start.taken and "only" in start.initialised["projector"]


def test_mejigclu_takes_jigclu_s_clustering_head_but_no_categories(tmp_path: Path):
    torch.save(nets.training(nets.jigclu(nets.resnet(4))), tmp_path / "jigclu.pth")
    start = init_from(str(tmp_path / "jigclu.pth"), build(tiny_run("mejigclu", backbone=PHOTO_STEM)))
    assert start.taken == ["backbone", "cluster_head"] and start.initialised == {}

    run = pretrain(tiny_run("mejigclu", max_steps=1), tmp_path / "run")
    method = build(tiny_run("mejigclu", seed=3))
    before = state_of(method)
    init_from(str(run), method)
    assert torch.equal(method.state_dict()["category_head.0.weight"], before["category_head.0.weight"])


def test_coke_keeps_centres_and_forgets_labels_and_duals(tmp_path: Path):
    torch.save(nets.training(nets.coke(nets.resnet(4), True, counts=(6, 8))), tmp_path / "coke.pth")
    setting, config = Setting(30, 8, 0), CokeConfig(centres=(6, 7), embedding_dim=16)
    method: Any = build_method(config, build_backbone(PHOTO_STEM), setting)
    start = init_from(str(tmp_path / "coke.pth"), method)
    assert start.taken == ["backbone", "projector", "predictor", "clusterings.0"]
    assert list(start.initialised) == ["clusterings.1"]
    centres = torch.load(tmp_path / "coke.pth", weights_only=True)["state_dict"]["module.pre_center_0"]
    assert torch.equal(method.clusterings[0].previous, centres.T)
    assert not method.clusterings[0].duals.any() and (method.labels.rows == -1).all()


def test_a_network_alone_starts_the_backbone_and_nothing_else(tmp_path: Path):
    torch.save(nets.resnet(4), tmp_path / "resnet.pth")
    start = init_from(str(tmp_path / "resnet.pth"), build(tiny_run(backbone=PHOTO_STEM)))
    assert start.taken == ["backbone"]
    assert start.initialised == {"projector": "not there", "prototypes": "not there"}


def test_another_network_is_refused_with_the_settings_that_would_fit(tmp_path: Path):
    file, out = official_swav(tmp_path), tmp_path / "run"
    with pytest.raises(UserError, match=r"conv1\.weight is \(4, 3, 7, 7\) there .* --backbone\.name resnet10 "
                       r"--backbone\.width 4 --backbone\.stem imagenet"):  # fmt: skip
        pretrain(tiny_run(init_from=str(file)), out)
    assert not out.exists()  # nothing to clear away before the next try
    with pytest.raises(UserError, match="starts from random weights anyway"):
        pretrain(tiny_run(init_from="random:resnet10"), tmp_path / "random")
    with pytest.raises(UserError, match="names no backbone"):
        pretrain(tiny_run(init_from=str(tmp_path / "nothing")), tmp_path / "nowhere")


@pytest.mark.parametrize("name", METHODS)
def test_no_method_takes_over_what_is_counted_by_image(name: str):
    config: MethodConfig = METHODS[name].Config()
    if isinstance(config, MejigcluConfig):
        config = MejigcluConfig(categories=4)

    def shapes(images: int) -> dict[str, torch.Size]:
        with torch.device("meta"):
            method = build_method(config, build_backbone(BackboneConfig("resnet10", 4)), Setting(images, 4, 0))
        kept = start_names(method)
        return {key: value.shape for key, value in method.state_dict().items() if key in kept}

    assert shapes(5000) == shapes(7000)


def start_names(method: Method) -> set[str]:
    from tessella.weights.start import _by_part

    return {name for part in _by_part(dict(method.state_dict()), method).values() for name in part}


# --- the run ------------------------------------------------------------------------------------------------


def test_a_frozen_backbone_keeps_its_weights_while_the_heads_learn(tmp_path: Path):
    file = official_swav(tmp_path)
    config = tiny_run(backbone=PHOTO_STEM, init_from=str(file), freeze_backbone_steps=3, max_steps=3)
    start = resolve_backbone(str(file)).backbone.state_dict()
    run = pretrain(config, tmp_path / "run")
    frozen, head = final_state(run), "method.projector.0.weight"
    for name, tensor in start.items():
        still = torch.equal(frozen[f"method.backbone.{name}"], tensor)
        statistics = "running" in name or "num_batches" in name
        assert still is not statistics, name  # batch norm counts on, as in any training step
    assert not torch.equal(frozen[head], torch.load(file, weights_only=True)["module.projection_head.0.weight"])
    assert not any("backbone" in name for name in frozen if name.startswith("optimizer."))
    moving = final_state(resume(run, {"max_steps": 5}))
    assert not torch.equal(moving["method.backbone.conv1.weight"], start["conv1.weight"])


def test_a_resumed_run_takes_nothing_from_its_start_again(tmp_path: Path):
    source = pretrain(tiny_run(seed=9, max_steps=2), tmp_path / "source")
    straight = pretrain(tiny_run(init_from=str(source), freeze_backbone_steps=4), tmp_path / "straight")
    sliced = pretrain(tiny_run(init_from=str(source), freeze_backbone_steps=4, max_steps=3), tmp_path / "sliced")
    source.rename(tmp_path / "elsewhere")
    resume(sliced, {"max_steps": 6})
    assert_same(final_state(straight), final_state(resume(sliced, {"max_steps": None})))


def test_a_run_that_saved_nothing_yet_starts_from_its_weights_again(tmp_path: Path):
    config = tiny_run(backbone=PHOTO_STEM, init_from=str(official_swav(tmp_path)), max_steps=1)
    straight = pretrain(config, tmp_path / "straight")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "config.yaml").write_text(to_yaml(config))
    assert_same(final_state(straight), final_state(resume(tmp_path / "lost")))


@pytest.mark.slow  # the start of three processes
def test_two_ranks_start_and_freeze_as_one(tmp_path: Path):
    config = tiny_run(backbone=PHOTO_STEM, init_from=str(official_swav(tmp_path)), freeze_backbone_steps=1, max_steps=2)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    script = "import sys; from pathlib import Path; from tessella.run.config import load_config as load\n"
    script += "from tessella.engine.pretrain import pretrain; pretrain(load(Path(sys.argv[1])), Path(sys.argv[2]))"
    (tmp_path / "script.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [str(tmp_path / name) for name in ("script.py", "config.yaml", "two")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Taken from ") == 1
    one, two = final_state(pretrain(config, tmp_path / "one")), final_state(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}")


def test_an_imported_folder_is_no_run_and_says_what_to_do(tmp_path: Path):
    import_weights(official_swav(tmp_path), tmp_path / "imported")
    with pytest.raises(UserError, match=r"nothing to resume.* --init-from .*imported"):
        resume(tmp_path / "imported")
