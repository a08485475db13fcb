"""The cost benchmark: what it compares, and that its figures are what they are called."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tessella.modules.backbone import BackboneConfig

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "method_cost.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("method_cost", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["method_cost"] = module  # where dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # as for a script that is run
        spec.loader.exec_module(module)
    return module


def options(script: ModuleType, **changes: Any) -> Any:
    small = BackboneConfig("resnet10", 16, "small")
    return script.Options(**{"backbone": small, "batch_size": 4, "images": 100, "rounds": 2, "memory": False} | changes)


def test_the_five_methods_are_compared_on_one_backbone_and_coke_with_one_view_too(script):
    found = script.cases(options(script))
    assert list(found) == [
        "JigClu, 2x2 tiles of 16", "MEJigClu, 2x2 tiles of 16", "CoKe, 1x32", "CoKe, 2x32", "SwAV, 2x32",
        "SMoG, 2 x (2x32)",
    ]  # fmt: skip
    assert {(run.backbone.name, run.batch_size) for run in found.values()} == {("resnet10", 4)}


def test_another_size_scales_large_and_small_crops(script):
    found = script.cases(options(script, size=112, recipes=("swav_imagenet_200ep", "jigclu_imagenet_200ep")))
    assert list(found) == ["SwAV, 2x112 + 6x48", "JigClu, 2x2 tiles of 56"]


def test_every_case_has_its_forwards_its_times_and_their_ratio(script):
    result = script.measure(options(script))
    assert [row["forwards"] for row in result["cases"]] == [1, 1, 1, 2, 2, 4]
    assert [row["forwards_without_backward"] for row in result["cases"]] == [0, 0, 0, 0, 0, 2]
    assert result["clock"] == "processor"  # tests run on one thread
    for row in result["cases"]:
        low, high = row["seconds_range"]
        assert 0 < low <= row["seconds"] <= high and 0 < row["times_bare"] < 100
        assert all(
            len(row["rounds"][f"{kind}_{clock}"]) == 2 for kind in ("bare", "step") for clock in ("wall", "processor")
        )
        assert row["peak_bytes"] is None
    json.dumps(result)
    assert len(list(script.lines(result))) == 6


def test_the_method_s_own_steps_train_it(script):
    case = script.Case(
        script.cases(options(script, recipes=("jigclu_cifar10",)))["JigClu, 2x2 tiles of 16"], options(script)
    )
    case.progress = case.progress._replace(step=1)
    for group in case.optimizer.param_groups:
        group["lr"] = 0.1
    before = case.method.backbone.conv1.weight.detach().clone()
    case.step()
    assert not before.equal(case.method.backbone.conv1.weight)


def test_the_bare_backbone_makes_a_backward_pass_only_where_the_method_has_one(script):
    case = script.Case(script.cases(options(script))["SMoG, 2 x (2x32)"], options(script))
    case.prepare_bare()
    seen: list[tuple[int, bool]] = []
    case.bare.register_forward_pre_hook(lambda _, x: seen.append((len(x[0]), torch.is_grad_enabled())))
    case.bare_step()
    assert seen == [(2 * 4, True), (2 * 4, False)]  # two views of four images through each encoder


@pytest.mark.slow  # two fresh processes
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory can be followed on Linux only")
def test_peak_memory_is_measured_in_a_process_of_its_own_and_grows_with_the_batch(script, monkeypatch):
    def peak(batch: int) -> int:
        words = (
            f"--backbone.name resnet10 --backbone.width 16 --images 100 --recipes jigclu_cifar10 --batch-size {batch}"
        )
        monkeypatch.setattr(sys, "argv", ["method_cost.py", *words.split()])
        return script.memory("JigClu, 2x2 tiles of 16", options(script, batch_size=batch))

    assert 1e6 < peak(16) < peak(128) < 1e9
