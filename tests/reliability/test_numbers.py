"""Numbers gone wrong: found soon, undone, named, survived; and the run is the same however it was looked at."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessella import dist
from tessella.cli import main
from tessella.data.batch import Batch
from tessella.data.loader import Loader
from tessella.data.sources import open_images
from tessella.data.views import CropGroup, ViewSpec
from tessella.engine import numbers
from tessella.engine import pretrain as engine
from tessella.engine.build import build_sampler
from tessella.engine.memory import needed_bytes
from tessella.engine.numbers import Guard
from tessella.engine.pretrain import pretrain, resume
from tessella.errors import UserError
from tessella.methods import views_of
from tessella.methods.coke import CokeConfig
from tessella.methods.method import Progress
from tessella.methods.swav import Swav
from tessella.optim import OptimizerConfig
from tessella.recipes import recipe
from tessella.report.run import write_report
from tessella.run.checkpoints import load
from tessella.run.config import RunConfig
from tests.engine.runs import assert_same, final_state, tiny_run
from tests.newest import newest
from tests.ranks import on_ranks

FIVE = ("swav", "jigclu", "mejigclu", "smog", "coke")


def config(method: str = "swav", **changes: Any) -> RunConfig:
    """Three epochs of five steps, a look at the end of each."""
    changes = {"epochs": 3, "log_every": 100} | changes
    if method != "coke":
        return tiny_run(method, **changes)
    views = ViewSpec((CropGroup(1, 16, (0.3, 1.0)),))
    coke = CokeConfig(
        centres=(8, 12), embedding_dim=16, dual_lr="auto", average_from_epoch=1, label_slots=2, views=views
    )
    return dataclasses.replace(tiny_run("jigclu", **changes), method=coke)


def spoil(monkeypatch: pytest.MonkeyPatch, steps: dict[int, int] | None = None, row: int | None = None) -> list[int]:
    """Make pixels NaN: of the first image of some steps, so many times, or of one image whenever it comes.

    Returns the rows of the images, filled as it happens.
    """
    straight, left, rows = Loader.epoch, dict(steps or {}), list[int]()

    def epoch(self: Loader, number: int, first_step: int = 0) -> Iterator[list[Batch]]:
        for offset, batches in enumerate(straight(self, number, first_step)):
            step = number * self.sampler.steps_per_epoch + first_step + offset
            for batch in batches:
                which = batch.instances == (-1 if row is None else row)
                if left.get(step, 0) > 0:
                    left[step] -= 1
                    which[0] = True
                for crops in batch.views:
                    crops[:, which] = torch.nan
                rows.extend(batch.instances[which].tolist())
            yield batches

    monkeypatch.setattr(Loader, "epoch", epoch)
    return rows


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in found if line["kind"] == kind]


def assert_finite(run: Path) -> None:
    for name, tensor in final_state(run).items():
        assert torch.isfinite(tensor.float()).all(), name


ALWAYS = 10**6


@pytest.mark.parametrize("method", FIVE)
def test_a_step_with_a_broken_image_is_left_out_and_the_image_named(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = spoil(monkeypatch, {7: ALWAYS})
    run = pretrain(config(method), tmp_path / "run")
    [alarm] = lines(run, "alarm")
    assert alarm["name"] == "step_left_out" and alarm["step"] == 8 and alarm["by_themselves"]
    assert set(rows) == {rows[0]} and alarm["images"] == [str(open_images("digits::test").key(rows[0]))]
    assert "step 7 makes numbers NaN" in alarm["text"] and alarm["images"][0] in alarm["text"]
    assert_finite(run)
    assert int(final_state(run)["monitor.left_out"]) == 1 and int(final_state(run)["step"]) == 15


def test_a_run_that_was_cut_and_resumed_leaves_out_what_a_straight_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, {3: ALWAYS, 11: ALWAYS})  # in mid-epoch, the queue in use
    straight = pretrain(config(), tmp_path / "straight")
    cut = pretrain(config(max_steps=2), tmp_path / "cut")  # before the first; then while looking closely; and beyond
    for step in (4, 6, 12, None):
        resume(cut, {"max_steps": step})
    assert_same(final_state(straight), final_state(cut))
    assert lines(straight, "alarm") == lines(cut, "alarm") and len(lines(cut, "alarm")) == 2


def test_a_process_that_dies_before_it_has_told_anybody_makes_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, {7: ALWAYS})
    straight = pretrain(config(), tmp_path / "straight")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(Guard, "go_back", dies)
        pretrain(config(), tmp_path / "killed")
    assert_same(final_state(straight), final_state(resume(tmp_path / "killed")))
    assert lines(straight, "step") == lines(tmp_path / "killed", "step")


@pytest.mark.parametrize(("minutes", "log_every"), [(1e-9, 1), (10.0, 1), (1e-9, 4)])
def test_the_result_does_not_depend_on_when_it_was_saved_or_looked_at(
    minutes: float, log_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spoil(monkeypatch, {6: ALWAYS})
    expected = pretrain(config(max_steps=9), tmp_path / "expected")
    run = pretrain(config(max_steps=9, checkpoint_minutes=minutes, log_every=log_every), tmp_path / "run")
    assert_same(final_state(expected), final_state(run))


@pytest.mark.parametrize("method", ["smog", *(pytest.param(m, marks=pytest.mark.slow) for m in FIVE if m != "smog")])
def test_numbers_that_are_fine_the_second_time_change_nothing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clean = final_state(pretrain(config(method), tmp_path / "clean"))
    spoil(monkeypatch, {7: 1})
    run = pretrain(config(method), tmp_path / "run")
    state = final_state(run)
    looked = "monitor.close_until"
    assert int(state.pop(looked)) == 10 and int(clean.pop(looked)) == 0
    assert_same(clean, state)
    assert lines(run, "alarm") == [] and "back to the last checkpoint" in lines(run, "event")[0]["text"]


@pytest.mark.parametrize("where", ["weight", "buffer", "optimizer"])
def test_weights_that_are_spoilt_while_the_loss_is_fine_are_found_and_never_saved(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The loss of the last step knows nothing of what its update does."""
    clean = final_state(pretrain(config(), tmp_path / "clean"))
    spoilt, build, step_of = [], engine.build_state, Swav.after_update

    def known(*args: Any) -> Any:
        states.append(build(*args))
        return states[-1]

    def after_update(method: Swav, progress: Progress) -> None:
        step_of(method, progress)
        if progress.step == 14 and not spoilt:
            norm, moments = method.backbone.bn1, states[0].optimizer.state[method.backbone.bn1.weight]
            parts = {"weight": norm.weight, "buffer": norm.running_var, "optimizer": moments["momentum_buffer"]}
            spoilt.append(parts[where])
            spoilt[0].data[1] = torch.inf

    states: list[Any] = []
    monkeypatch.setattr(engine, "build_state", known)
    monkeypatch.setattr(Swav, "after_update", after_update)
    state = final_state(pretrain(config(), tmp_path / "run"))
    assert spoilt and int(state.pop("monitor.close_until")) == 15
    clean.pop("monitor.close_until")
    assert_same(clean, state)


def test_a_look_is_at_most_ten_steps_away_and_none_waits_for_the_device_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    looks, look = [], numbers._finite_on_all_ranks

    def counted(*args: Any) -> bool:
        looks.append(1)
        return look(*args)

    monkeypatch.setattr(numbers, "_finite_on_all_ranks", counted)
    quiet = config(epochs=2, batch_size=12)  # 30 steps per epoch
    pretrain(quiet, tmp_path / "quiet")
    assert len(looks) == 6
    monkeypatch.undo()
    spoil(monkeypatch, {33: ALWAYS})
    run = pretrain(quiet, tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    [event] = [json.loads(line) for line in text.splitlines() if '"event"' in line]
    assert event["timing"] == {"found_at": 40, "back_to": 0}  # nothing was saved: no epoch lasted a minute
    assert [alarm["step"] for alarm in lines(run, "alarm")] == [34]


def test_an_image_that_spoils_every_epoch_ends_the_run_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, row=17)
    key = re.escape(str(open_images("digits::test").key(17)))
    with pytest.raises(UserError, match=rf"{key}\. The run may leave out 3 steps.*the 4th.*Repair or remove"):
        pretrain(config(epochs=6, checkpoint_minutes=1e-9), tmp_path / "run")
    checkpoint = newest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    tensors, _ = load(checkpoint)
    assert all(torch.isfinite(t.float()).all() for group in tensors.values() for t in group.values())
    assert [alarm["images"] for alarm in lines(tmp_path / "run", "alarm")] == [
        [str(open_images("digits::test").key(17))]
    ] * 4
    more = resume(tmp_path / "run", {"max_left_out": 9})  # whoever has looked may go on
    assert int(final_state(more)["monitor.left_out"]) >= 4


@pytest.mark.parametrize("method", ["swav", *(pytest.param(m, marks=pytest.mark.slow) for m in FIVE[1:])])
def test_a_run_that_diverges_ends_with_advice_and_has_saved_no_broken_weight(method: str, tmp_path: Path):
    wild = OptimizerConfig("sgd", lr=1e6, weight_decay=1e6, warmup_epochs=0)
    with pytest.raises(UserError, match=r"lower learning rate .*now 1e\+06") as stop:
        pretrain(dataclasses.replace(config(method, checkpoint_minutes=1e-9), optimizer=wild), tmp_path / "run")
    assert "by itself" not in str(stop.value) or "none of its" in str(stop.value)
    saved = newest(tmp_path / "run" / "checkpoints")
    tensors = load(saved)[0] if saved else {}
    assert all(torch.isfinite(t.float()).all() for group in tensors.values() for t in group.values())


def test_a_run_that_may_leave_nothing_out_ends_at_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, {7: ALWAYS})
    with pytest.raises(UserError, match=r"step 7 makes numbers NaN.*may leave out 0 steps"):
        pretrain(config(max_left_out=0), tmp_path / "run")


def on_two(folder: str) -> dict[str, Tensor]:
    rank, world_size = str(dist.rank()), str(dist.world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    with pytest.MonkeyPatch.context() as patch:
        if dist.rank() == 1:  # only this rank sees it
            spoil(patch, {7: ALWAYS})
        run = pretrain(config(), Path(folder) / "run")
    dist.barrier()
    return {} if dist.rank() else final_state(run)


def test_ranks_leave_out_together_what_one_of_them_has_seen(tmp_path: Path):
    state, _ = on_ranks(2, on_two, str(tmp_path))
    assert int(state["monitor.left_out"]) == 1 and int(state["step"]) == 15
    [alarm] = lines(tmp_path / "run", "alarm")
    assert alarm["step"] == 8 and alarm["by_themselves"] and len(alarm["images"]) == 1
    assert "of its 64 images" in alarm["text"]


def test_the_page_of_the_run_tells_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, {7: ALWAYS})
    page = write_report(pretrain(config(max_steps=10), tmp_path / "run")).read_text()
    assert "step 7 makes numbers NaN or infinite" in page


# --- memory -------------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Any:
    def forward(*_: object) -> None:
        raise error

    return forward


def test_a_full_gpu_is_told_with_an_estimate_and_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    monkeypatch.setattr(engine, "_forward_backward", failing(full))
    with pytest.raises(UserError) as stop:
        pretrain(config(precision="32"), tmp_path / "run")
    text = str(stop.value)
    assert "another 2.00 GiB" in text and re.search(r"needs about \d+ MiB, .* on each", text) and "64 images" in text
    ways = ("1) --accumulate 2", "2) --backbone.activation_checkpointing", "3) --precision bf16", "4) smaller views")
    for way in ways:
        assert way in text, text


def test_a_full_gpu_ends_the_command_with_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(engine, "_forward_backward", failing(torch.OutOfMemoryError("CUDA out of memory.")))
    words = ["pretrain", "swav_cpu", "--data", "digits::test", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert "memory is full" in said and "\n" not in said.partition("tessella: ")[2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476736 bytes"
        ),
    ],
)
def test_a_full_machine_is_told_too(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "_forward_backward", failing(error))
    with pytest.raises(UserError, match=r"the machine's memory is full.*--batch-size, now 64"):
        pretrain(config(), tmp_path / "run")


def test_a_decoding_thread_that_finds_no_memory_ends_the_run_and_blames_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Loader, "_fill", failing(MemoryError()))
    monkeypatch.setattr("tessella.data.loader._fits_device", lambda *_: False)
    with pytest.raises(UserError, match="the machine's memory is full"):
        pretrain(config(), tmp_path / "run")
    assert not (tmp_path / "run" / "unreadable.txt").exists()


@pytest.mark.parametrize("recipe_name", ["swav_cpu", "jigclu_cpu", "smog_cpu"])
def test_the_estimate_of_memory_is_near_what_autograd_holds(recipe_name: str):
    """Counted on real tensors of the whole step, heads and losses and all."""
    run = dataclasses.replace(recipe(recipe_name), data="digits::test", batch_size=32, device="cpu", precision="32")
    images = open_images(run.data)
    state = engine.build_state(run, images, torch.device("cpu"))
    loader = Loader(
        images, views_of(run.method), build_sampler(run, images, state.method), seed=0, device="cpu", workers=1
    )
    [batch] = next(loader.epoch(0))
    held: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t
    ):
        state.method(batch, Progress(0, 10, 1))
    own = {t.untyped_storage()._cdata for t in (*state.method.parameters(), *state.method.buffers())}
    measured = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)
    fixed, of_batch = needed_bytes(run, state.method, 1)
    assert fixed >= 3 * sum(p.nbytes for p in state.method.parameters() if p.requires_grad)
    assert 0.75 < of_batch / measured < 1.25, (of_batch, measured)
