"""A run folder from somebody else: nothing that it names is fetched, and what does not fit is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessella.cli import main
from tessella.engine.pretrain import pretrain
from tessella.errors import UserError
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig
from tessella.run.backbone_file import read_backbone
from tessella.run.checkpoints import load, save
from tessella.run.config import to_yaml
from tessella.weights.resolve import resolve_backbone
from tests.engine.runs import tiny_run
from tests.newest import newest

STEPS = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESSELLA_CACHE", str(folder / "cache"))
        yield pretrain(tiny_run(max_steps=STEPS), folder / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def one_line(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with code 2."""
    capsys.readouterr()
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# --- what it names is not fetched ---------------------------------------------------------------------------

NAMED = [("data", "hf:someone/photos"), ("data", "cifar10"), ("data", "mnist::train")]
NAMED += [("init_from", "timm:resnet18"), ("init_from", "torchvision:resnet50")]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("field", "name"), NAMED)
def test_resume_does_not_fetch_what_only_the_run_names(
    field: str, name: str, run: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.rmtree(run / "checkpoints")
    (run / "config.yaml").write_text(to_yaml(tiny_run(**{field: name})))
    assert f"give --{field.replace('_', '-')} {name}" in one_line(f"resume {run}", capsys)


@pytest.mark.usefixtures("no_network")
def test_report_and_evaluate_do_not_fetch_what_only_the_run_names(run: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("hf:someone/photos", "cifar10"):
        (run / "config.yaml").write_text(to_yaml(tiny_run(data=name, init_from="timm:resnet50", max_steps=STEPS)))
        assert main(["report", str(run)]) == 0
        assert f"the page shows less: {name}" in capsys.readouterr().err
    judged = f"evaluate {run} --train digits::train --test digits::test --protocols knn --device cpu"
    assert main(f"{judged} --out {run}".split()) == 0


@pytest.mark.usefixtures("no_network")
def test_a_network_of_timm_that_a_run_names_is_built_and_not_fetched(tmp_path: Path):
    config = tiny_run(backbone=BackboneConfig("timm:test_resnet"), max_steps=1)
    loaded = resolve_backbone(str(pretrain(config, tmp_path / "run")))
    assert loaded.config.name == "timm:test_resnet"


def test_what_the_user_types_is_fetched(run: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []

    def opened(name: str, *, download: bool = True, **options: Any) -> Any:
        asked.append(download)
        raise UserError("that is all")

    monkeypatch.setattr("tessella.run.folder.open_images", opened)
    monkeypatch.setattr("tessella.report.run.open_images", opened)
    for words in ("resume {}", "resume {} --data digits::test", "report {}", "report {} --data digits::test"):
        main(words.format(run).split())
    assert asked == [False, True, False, True]


# --- what does not fit --------------------------------------------------------------------------------------


def reseal(run: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change the newest checkpoint and write it again, with hashes that fit."""
    path = newest(run / "checkpoints")
    assert path is not None
    tensors, state = load(path)
    change(tensors, state)
    shutil.rmtree(run / "checkpoints")
    save(run / "checkpoints", STEPS, tensors, state)


def reshaped(group: str, name: str) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda tensors, state: tensors[group].update({name: torch.zeros(3)})


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "a weight of another shape": reshaped("method", "backbone.conv1.weight"),
    "a momentum that would be stretched": reshaped("optimizer", "backbone.conv1.weight/momentum_buffer"),
    "a momentum of nothing": reshaped("optimizer", "nothing/momentum_buffer"),
    "a monitor of another shape": lambda tensors, state: tensors.update(monitor={"x": torch.zeros(1)}),
    "no method": lambda tensors, state: tensors.pop("method"),
    "no optimizer": lambda tensors, state: tensors.pop("optimizer"),
    "another step": lambda tensors, state: state.update(step=1),
    "a step in words": lambda tensors, state: state.update(step="two"),
    "no config": lambda tensors, state: state.pop("config"),
    "a config that is a list": lambda tensors, state: state.update(config=[1]),
    "a method that is a list": lambda tensors, state: state["config"].update(method={"name": ["swav"]}),
    "fingerprints that are a list": lambda tensors, state: state.update(fingerprints=[1]),
    "a weight of another type": lambda tensors, state: tensors["method"].update(
        {"backbone.conv1.weight": tensors["method"]["backbone.conv1.weight"].double()}
    ),
    "one number for a momentum": lambda tensors, state: tensors["optimizer"].update(
        {"backbone.conv1.weight/momentum_buffer": torch.tensor(1.0)}
    ),
    "the state of another optimizer": lambda tensors, state: tensors["optimizer"].update(
        {"backbone.conv1.weight/exp_avg": torch.zeros_like(tensors["method"]["backbone.conv1.weight"])}
    ),
    "epochs of no steps": lambda tensors, state: state.update(steps_per_epoch=0),
    "epochs of many steps": lambda tensors, state: state.update(steps_per_epoch=10**9),
    "hashes of images that are words": lambda tensors, state: state.update(contents={"a": "b"}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_checkpoint_that_fits_its_hashes_but_not_the_run_is_one_line(
    case: str, run: Path, capsys: pytest.CaptureFixture[str]
):
    reseal(run, CHANGES[case])
    (run / "config.yaml").write_text(to_yaml(tiny_run(max_steps=STEPS + 1)))
    said = one_line(f"resume {run}", capsys)
    assert "checkpoint" in said or "state.json" in said


@pytest.mark.parametrize("step", [11, 10**9, 10**17])
def test_a_checkpoint_of_a_step_that_the_run_does_not_have_is_one_line(
    step: int, run: Path, capsys: pytest.CaptureFixture[str]
):
    tensors, state = load(run / "checkpoints" / f"step-{STEPS:08d}")
    save(run / "checkpoints", step, tensors, state | {"step": step})
    before = (run / "backbone.safetensors").read_bytes()
    assert f"step {step} of 2 epochs of 5 steps" in one_line(f"resume {run} --max-steps None", capsys)
    assert (run / "backbone.safetensors").read_bytes() == before


@pytest.mark.parametrize("value", [-1.0, float("nan"), 3.0])
def test_an_optimizer_that_has_counted_other_steps_is_one_line(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pretrain(tiny_run("jigclu", optimizer=OptimizerConfig("adamw", lr=0.001), max_steps=1), tmp_path / "run")
    path = newest(tmp_path / "run" / "checkpoints")
    assert path is not None
    tensors, state = load(path)
    tensors["optimizer"]["backbone.conv1.weight/step"].fill_(value)
    save(tmp_path / "run" / "checkpoints", 1, tensors, state)
    assert "after 1 steps" in one_line(f"resume {tmp_path / 'run'} --max-steps 2", capsys)


def test_an_allowed_change_is_written_when_the_run_can_go_on(run: Path, capsys: pytest.CaptureFixture[str]):
    before = (run / "config.yaml").read_text()
    one_line(f"resume {run} --epochs 9 --allow epochs --data {run}/nothing", capsys)
    assert (run / "config.yaml").read_text() == before


def test_a_range_that_config_yaml_leaves_is_said_with_the_file(run: Path, capsys: pytest.CaptureFixture[str]):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("batch_size: 64", "batch_size: 0"))
    assert f"{run}/config.yaml: batch_size=0 must be at least 1" in one_line(f"resume {run}", capsys)


def test_several_machines_without_a_launcher_are_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said = one_line(f"pretrain swav_cpu --data digits::test --out {tmp_path / 'run'} --nodes 2 --device cpu", capsys)
    assert "torchrun --nnodes=2" in said and not (tmp_path / "run").exists()


def test_a_network_in_words_of_odd_numbers_is_one_line():
    for options in ("width=²", f"width={'9' * 5000}", "size=²", "width=0", "width=-1"):
        with pytest.raises(UserError):
            resolve_backbone(f"random:resnet10?{options}")


def test_weights_of_another_shape_in_a_checkpoint_are_no_backbone(run: Path):
    for change in (CHANGES["a weight of another shape"], CHANGES["no method"]):
        reseal(run, change)
        with pytest.raises(UserError, match="the weights of run do not fit"):
            resolve_backbone(str(run))


# --- the product --------------------------------------------------------------------------------------------


def test_the_product_alone_says_its_network_its_images_and_its_origin(finished: Path):
    product = read_backbone(finished / "backbone.safetensors")
    assert product is not None and product.origin["steps"] == STEPS and product.origin["method"] == "swav"
    of_file, of_run = (resolve_backbone(str(path)) for path in (finished / "backbone.safetensors", finished))
    assert (of_file.config, of_file.transform) == (of_run.config, of_run.transform)
    assert of_run.backbone.transform == of_run.transform and of_run.transform.size == 16
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(of_file.backbone.eval()(x), of_run.backbone.eval()(x))


def test_a_product_that_has_changed_is_refused(run: Path, tmp_path: Path):
    shutil.rmtree(run / "checkpoints")
    file = run / "backbone.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in (12, header // 2, header + 5, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"backbone\.safetensors (has changed|cannot be read|is not the network)"):
            resolve_backbone(str(run))
    save_file(load_file(write(file, whole)), file)  # the same tensors without their description
    with pytest.raises(UserError, match=r"is not the network of config\.yaml"):
        resolve_backbone(str(run))
    file.write_bytes(whole)
    (run / "config.yaml").write_text(to_yaml(tiny_run(backbone=BackboneConfig("resnet10", 8, "small"))))
    with pytest.raises(UserError, match=r"is not the network of config\.yaml"):
        resolve_backbone(str(run))


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


# --- facts of wrong types -----------------------------------------------------------------------------------


def test_an_import_json_of_wrong_types_is_one_line(tmp_path: Path):
    from tessella.weights.imported import import_weights
    from tests.weights import official_nets as nets

    torch.save(nets.released(nets.swav(nets.resnet())), tmp_path / "s.pth")
    import_weights(tmp_path / "s.pth", tmp_path / "imported")
    path = tmp_path / "imported" / "import.json"
    facts = json.loads(path.read_text())
    for name in (*facts, ""):
        for value in (None, 3, "word", [1], {"name": ["x"]}, {1: 2}):
            changed = value if not name else facts | {name: value}
            if changed == facts or (name in ("file", "method") and value in (None, "word")) or name == "file":
                continue
            if (name == "title" and value == "word") or (name == "sha256" and value == "word"):
                continue
            path.write_text(json.dumps(changed))
            with pytest.raises(UserError):
                resolve_backbone(str(tmp_path / "imported"))


@pytest.mark.parametrize("field", ["scores", "train", "transform", "weights", "backbone", "baseline"])
def test_records_of_wrong_types_are_one_line(field: str, tmp_path: Path):
    from tessella.evaluation.records import read_records

    record = {"protocol": "knn", "scores": {"top1": 1.0}, "train": {"fingerprint": "a"}, "weights": "b"}
    (tmp_path / "evaluation.json").write_text(json.dumps([record]))
    assert read_records(tmp_path) == [record]
    for value in (7, [1]):
        (tmp_path / "evaluation.json").write_text(json.dumps([record | {field: value}]))
        with pytest.raises(UserError, match="not a list of records"):
            read_records(tmp_path)
