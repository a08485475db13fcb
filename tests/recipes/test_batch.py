"""Rules for other batch sizes: what they say, and that they only say it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tessella.cli import main
from tessella.methods import METHODS, Method
from tessella.recipes import RECIPES, recipe
from tessella.recipes.batch import at_batch_size, flags
from tessella.run.config import RunConfig, to_dict


def applied(config: RunConfig, words: dict[str, str], batch_size: int) -> RunConfig:
    """What `tessella pretrain` would make of the flags, by its own parser."""
    import tyro

    line = [part for flag in words.values() for part in flag.split()]
    parsed: Any = tyro.cli(
        RunConfig, args=["--batch-size", str(batch_size), *line], default=config, config=(tyro.conf.AvoidSubcommands,)
    )
    return parsed


# --- the specifications' points -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "batch_size", "rates"), [
    ("swav_imagenet_200ep", 256, (0.0, 0.6, 0.0006)),        # published
    ("swav_imagenet_200ep_bs256", 4096, (0.3, 4.8, 0.0048)),  # published
    ("swav_imagenet_w4_400ep", 4096, (0.3, 4.8, 0.0048)),    # published, the same at 2560 and 4096
    ("swav_imagenet_200ep", 1024, (0.075, 1.2, 0.0012)),     # in proportion
    ("swav_imagenet_200ep_bs256", 512, (0.0, 1.2, 0.0012)),  # in proportion from its own point
    ("coke_imagenet_1000ep_1x224", 256, (0.0, 0.4, 0.0)),    # 1.6 x batch / 1024
    ("coke_imagenet_800ep_multicrop", 4096, (0.0, 6.4, 0.0)),
    ("jigclu_imagenet_200ep", 512, (0.0, 0.06, 0.0)),        # 0.03 at 256
    ("mejigclu_imagenet_200ep", 64, (0.0, 0.0075, 0.0)),
    ("smog_imagenet_400ep", 512, (0.00125, 0.6, 0.0006)),    # 4.8 at 4096
    ("swav_cifar10", 128, (0.0, 0.001, 0.0)),                # lightly: 0.001 x batch / 128
    ("smog_cifar10", 512, (0.0, 0.12, 0.0)),                 # 0.06 x batch / 256
])  # fmt: skip
def test_learning_rates_follow_the_rule(name: str, batch_size: int, rates: tuple[float, ...]):
    found = at_batch_size(recipe(name), batch_size).optimizer
    assert (found.warmup_lr, found.lr, found.final_lr) == pytest.approx(rates)


def test_swav_s_two_published_batch_sizes_lead_to_each_other():
    for name, batch_size, other in [
        ("swav_imagenet_200ep", 256, "swav_imagenet_200ep_bs256"),
        ("swav_imagenet_400ep_bs256", 4096, "swav_imagenet_400ep"),
    ]:
        expected = dataclasses.replace(recipe(other), recipe=name)
        found = at_batch_size(recipe(name), batch_size)
        if batch_size == 4096:  # the epoch from which a queue of length 0 would be filled
            found = dataclasses.replace(found, method=dataclasses.replace(found.method, queue_from_epoch=15))
        assert found == expected


def test_swav_gets_a_queue_below_1000_images_per_forward_and_loses_it_above():
    large, small = recipe("swav_imagenet_200ep"), recipe("swav_imagenet_200ep_bs256")
    assert at_batch_size(large, 1000).method.queue_length == 0
    assert at_batch_size(large, 999).method.queue_length == 3840
    assert at_batch_size(large, 4096, accumulate=8).method.queue_length == 3840  # codes are made of 512 images
    assert at_batch_size(small, 2048).method.queue_length == 0
    assert at_batch_size(small, 4096, accumulate=16).method.queue_length == 3840
    assert at_batch_size(recipe("swav_cifar10"), 128).method.queue_length == 0  # never had one


def test_swav_s_prototypes_rest_for_as_many_images_as_before():
    for batch_size in (512, 1024, 2048):
        steps = at_batch_size(recipe("swav_imagenet_100ep"), batch_size).method.freeze_prototypes_steps
        assert steps * batch_size == 313 * 4096


def test_smog_regroups_every_300_steps_on_imagenet_and_every_epoch_on_small_images():
    assert at_batch_size(recipe("smog_imagenet_400ep"), 256).method.regroup_every == 300
    assert at_batch_size(recipe("smog_cifar10"), 512).method.regroup_every is None


def test_mejigclu_keeps_its_categories_when_the_batch_shrinks():
    assert at_batch_size(recipe("mejigclu_imagenet_200ep"), 64).method.categories == 256
    assert at_batch_size(recipe("mejigclu_imagenet_200ep"), 512).method.categories is None  # at least one per slot


def test_coke_lets_its_duals_follow_the_batch():
    assert at_batch_size(recipe("coke_imagenet_1000ep_2x224"), 256).method.dual_lr == "auto"
    assert at_batch_size(recipe("coke_imagenet_1000ep_2x224"), 1024, accumulate=4).method.dual_lr == "auto"


# --- for all recipes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_at_its_own_batch_size_a_recipe_is_as_it_is(name: str):
    config = recipe(name)
    assert at_batch_size(config, config.batch_size) == config
    assert not flags(config, config)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("factor", [0.25, 2])
def test_every_rule_changes_the_rate_and_gives_a_run_that_can_be_built(name: str, factor: float):
    config = recipe(name)
    changed = at_batch_size(config, int(factor * config.batch_size))
    assert changed.batch_size == factor * config.batch_size and changed.epochs == config.epochs
    assert changed.optimizer.lr == pytest.approx(factor * config.optimizer.lr, rel=1e-5)


@pytest.mark.parametrize("name", [
    "swav_imagenet_200ep", "jigclu_64px", "mejigclu_imagenet_200ep", "smog_imagenet_400ep",
    "coke_imagenet_800ep_multicrop",
])  # fmt: skip
def test_the_flags_typed_at_the_command_line_do_what_the_rule_says(name: str):
    config = recipe(name)
    batch_size = config.batch_size // 4
    expected = at_batch_size(config, batch_size)
    assert to_dict(applied(config, flags(config, expected), batch_size)) == to_dict(expected)


def test_the_flags_leave_out_what_the_user_has_given():
    config = recipe("swav_imagenet_200ep")
    assert not {"batch_size", "accumulate"} & set(flags(config, at_batch_size(config, 512, accumulate=2)))


def test_every_method_says_where_its_rule_is_from():
    assert all(METHODS[name].batch_rule != Method.batch_rule for name in METHODS)


# --- the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def note(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path):
    """What `tessella pretrain RECIPE ...` says on standard error before it would train, and with which run."""
    runs: list[RunConfig] = []
    monkeypatch.setattr("tessella.engine.pretrain.pretrain", lambda config, out: runs.append(config))

    def said(line: str) -> tuple[str, RunConfig]:
        assert main(["pretrain", *line.split(), "--data", "digits", "--out", str(tmp_path / "run")]) == 0
        return capsys.readouterr().err, runs[-1]

    return said


def test_pretrain_names_the_rule_s_flags_and_scales_nothing(note):
    told, run = note("swav_imagenet_200ep --batch-size 512")
    assert told.count("\n") == 1 and told.startswith("tessella: note: ")
    for flag in ("--optimizer.lr 0.6", "--optimizer.warmup-lr 0.0375", "--method.queue-length 3840"):
        assert flag in told
    assert "tessella recipes swav_imagenet_200ep" in told
    assert run.optimizer.lr == 4.8 and run.batch_size == 512


@pytest.mark.parametrize("line", [
    "swav_imagenet_200ep",
    "swav_imagenet_200ep --batch-size 4096",
    "swav_imagenet_200ep --batch-size 512 --optimizer.lr 1.0",
    "swav_imagenet_200ep --batch-size 512 --optimizer.lr=4.8",  # as it was, but on purpose
    "swav_imagenet_200ep --batch-size 512 --optimizer.name adamw",  # no rule leads from one optimiser to another
])  # fmt: skip
def test_pretrain_says_nothing_where_there_is_nothing_to_say(line: str, note):
    assert note(line)[0] == ""


def test_pretrain_does_not_repeat_what_was_given(note):
    told, run = note("swav_imagenet_200ep --batch-size 512 --method.queue-length 1024")
    assert "--optimizer.lr 0.6" in told and "queue-length" not in told
    assert run.method.queue_length == 1024


def test_a_batch_in_parts_is_told_of_what_its_parts_need(note):
    told, _ = note("swav_imagenet_200ep --accumulate 16")
    assert "for 4096 in 16 parts" in told and "--method.queue-length 3840" in told and "--optimizer" not in told


def test_other_ranks_keep_quiet(note, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert note("swav_imagenet_200ep --batch-size 512")[0] == ""
