"""The monitor's figures mean what they say, and its alarms come when, and only when, they should."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tessella.methods.method import MethodOutput, Progress
from tessella.run.monitor import LASTING_STEPS, WARMUP_STEPS, Alarm, Monitor
from tests.ranks import on_ranks

K, D = 10, 16
LOG_EVERY = 20


def clock(step: int) -> Progress:
    return Progress(step, 1000, 100)


def unit_rows(n: int = 256, dim: int = D, cone: float = 0.0) -> Tensor:
    """Random directions, drawn towards one of them by `cone`."""
    rows = torch.randn(n, dim)
    rows[:, 0] += cone * math.sqrt(dim)
    return torch.nn.functional.normalize(rows)


def a_step(loss: float = 1.0, embeddings: Tensor | None = None, assignments: Any = None) -> MethodOutput:
    embeddings = unit_rows() if embeddings is None else embeddings
    assignments = None if assignments is None else torch.as_tensor(assignments)
    return MethodOutput(torch.tensor(loss), {}, embeddings, assignments)


def a_monitor(collapse_loss: float | None = math.log(K), clusters: int | None = K, dim: int = D) -> Monitor:
    return Monitor(collapse_loss, clusters, dim)


def report_of(*steps: MethodOutput, monitor: Monitor | None = None) -> dict[str, float]:
    monitor = monitor or a_monitor()
    for step in steps:
        monitor.observe(step)
    return monitor.report()


def test_equal_embeddings_of_equal_images_are_no_collapse():
    monitor = a_monitor()
    monitor.identical_images = True
    said = []
    for step in range(LOG_EVERY, 20 * LOG_EVERY, LOG_EVERY):
        equal = a_step(math.log(K), embeddings=unit_rows(1).expand(64, D), assignments=[0] * 64)
        said += monitor.alarms(report_of(equal, monitor=monitor), clock(step))
    [alarm] = said
    assert alarm.name == "collapsed_embeddings" and "The network has not collapsed" in alarm.text


# --- figures ------------------------------------------------------------------------------------------------


def test_distance_to_collapse_is_0_at_the_collapse_loss_and_1_at_loss_0():
    assert report_of(a_step(math.log(K)))["loss_to_collapse"] == pytest.approx(0, abs=1e-6)
    assert report_of(a_step(0.0))["loss_to_collapse"] == 1
    assert report_of(a_step(2 * math.log(K)))["loss_to_collapse"] == pytest.approx(-1)


def test_embedding_std_is_1_for_isotropic_and_0_for_equal_embeddings():
    assert report_of(a_step(embeddings=unit_rows(4096)))["embedding_std"] == pytest.approx(1, abs=0.01)
    assert report_of(a_step(embeddings=unit_rows(1).expand(64, D)))["embedding_std"] == pytest.approx(0, abs=1e-6)


def test_embedding_std_equals_a_loop_over_dimensions():
    rows = unit_rows(64, cone=1.0)
    mean_std = sum(float(((c - c.mean()) ** 2).mean().sqrt()) for c in rows.double().T) / D
    assert report_of(a_step(embeddings=rows))["embedding_std"] == pytest.approx(mean_std * math.sqrt(D), rel=1e-6)


def test_effective_rank_counts_the_dimensions_in_use():
    basis = torch.eye(D)[:4]
    rows = torch.cat((basis, -basis)).repeat(8, 1)
    assert report_of(a_step(embeddings=rows))["effective_rank"] == pytest.approx(4, rel=1e-6)


def test_cluster_evenness_is_the_perplexity_of_the_epochs_histogram_over_k():
    steps = [a_step(assignments=[0, 1, 2, 2]), a_step(assignments=[2, 3, 2, 2])]
    shares = [1 / 8, 1 / 8, 5 / 8, 1 / 8]
    perplexity = math.exp(-sum(p * math.log(p) for p in shares))
    assert report_of(*steps)["cluster_evenness"] == pytest.approx(perplexity / K)
    assert report_of(a_step(assignments=range(K)))["cluster_evenness"] == pytest.approx(1)


def test_dead_clusters_are_only_counted_once_each_could_have_had_ten_images():
    few = torch.arange(10 * K - 1) % 7
    assert "dead_clusters" not in report_of(a_step(assignments=few))
    assert report_of(a_step(assignments=torch.arange(10 * K) % 7))["dead_clusters"] == pytest.approx(0.3)


def test_a_new_epoch_forgets_the_assignments():
    monitor = a_monitor()
    report_of(a_step(assignments=[0] * 200), monitor=monitor)
    monitor.observe(a_step(assignments=[0] * 200))
    monitor.epoch_start()
    figures = report_of(a_step(assignments=range(K)), monitor=monitor)
    assert figures["cluster_evenness"] == pytest.approx(1) and "dead_clusters" not in figures


def test_a_method_without_clusters_or_collapse_loss_has_no_such_figures():
    figures = report_of(a_step(), monitor=a_monitor(None, None))
    assert figures.keys() == {"embedding_std", "effective_rank"}


def test_broken_embeddings_are_reported_and_do_not_stop_the_run():
    figures = report_of(a_step(math.nan, torch.full((8, D), math.nan), [0] * 8))
    assert math.isnan(figures["embedding_std"]) and math.isnan(figures["effective_rank"])
    assert a_monitor().alarms(figures, clock(1)) == []  # such a step is undone, and said to be, before it gets here


def test_a_step_that_was_left_out_does_not_count():
    monitor = a_monitor()
    monitor.observe(a_step(assignments=[0, 1]))
    monitor.observe(a_step(math.nan, assignments=[2, 3]), left_out=True)
    monitor.merge()
    assert monitor.assigned.tolist() == [1, 1] + [0] * (K - 2) and monitor.nonfinite_here == 0


def test_blank_images_are_counted_whatever_their_colour():
    views = torch.rand(4, 3, 8, 8)
    views[1], views[2] = 0.5, torch.tensor([0.1, -2.0, 3.0])[:, None, None]
    monitor = a_monitor()
    monitor.observe(a_step(), views)
    assert monitor.report()["blank_images"] == 0.5


def test_observing_never_waits_for_the_device():
    # A tensor on the meta device has no values: whatever would read one fails.
    monitor = a_monitor().to("meta")
    step = MethodOutput(
        *(torch.zeros(shape, device="meta") for shape in ((), (), (8, D))),
        torch.zeros(8, dtype=torch.long, device="meta"),
    )
    monitor.observe(step._replace(metrics={}))
    with pytest.raises(Exception, match="meta"):
        monitor.report()


def test_observing_keeps_no_graph_alive():
    weight = torch.ones(D, requires_grad=True)
    monitor = a_monitor()
    monitor.observe(MethodOutput(weight.sum(), {}, unit_rows(8) * weight, None))
    assert not any(t.requires_grad for t in (monitor._loss, monitor._embeddings, *monitor.buffers()))


# --- ranks and resume ---------------------------------------------------------------------------------------


def a_run() -> list[MethodOutput]:
    generator = torch.Generator().manual_seed(3)
    assignments = torch.randint(K, (6, 40), generator=generator)
    losses = [2.0, math.nan, 2.1, 2.2, 2.3, 2.4]
    return [
        a_step(loss, torch.nn.functional.normalize(torch.randn(40, D, generator=generator)), row)
        for loss, row in zip(losses, assignments, strict=True)
    ]


def figures_of_a_rank(rank_count: int) -> list[dict[str, float]]:
    import torch.distributed as torch_dist

    monitor, reports = a_monitor(), []
    rank = torch_dist.get_rank() if rank_count > 1 else 0
    for i, step in enumerate(a_run()):
        mine = slice(rank * 40 // rank_count, (rank + 1) * 40 // rank_count)
        assert step.assignments is not None
        monitor.observe(MethodOutput(step.loss, {}, step.embeddings[mine], step.assignments[mine]))
        if i % 2:
            reports.append(monitor.report())
    monitor.merge()
    return [
        *reports,
        {f"{name}/{i}": x for name, v in monitor.state_dict().items() for i, x in enumerate(v.flatten().tolist())},
    ]


def test_two_ranks_report_and_save_what_one_process_does():
    alone = figures_of_a_rank(1)
    for reports in on_ranks(2, figures_of_a_rank, 2):
        for got, expected in zip(reports, alone, strict=True):
            assert got == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_resumed_monitor_reports_what_a_straight_one_does(stop: int):
    def reports(steps: list[MethodOutput], monitor: Monitor, first: int) -> list[dict[str, float]]:
        out = []
        for i, step in enumerate(steps, start=first):
            monitor.observe(step)
            if i % 2:
                out.append(monitor.report())
        return out

    straight = reports(a_run(), a_monitor(), 0)
    killed, resumed = a_monitor(), a_monitor()
    before = reports(a_run()[:stop], killed, 0)
    resumed.load_state_dict(killed.state_dict())
    assert repr(before + reports(a_run()[stop:], resumed, stop)) == repr(straight)


def test_a_resumed_monitor_raises_the_alarms_that_a_straight_one_does():
    def alarms(monitor: Monitor, numbers: range) -> list[int]:
        said = []
        for number in numbers:
            monitor.observe(a_step(math.log(K), unit_rows(1).expand(32, D), [0] * 32))
            step = number * LOG_EVERY
            said += [step for _ in monitor.alarms(monitor.report(), clock(step))]
        return said

    straight = alarms(a_monitor(), range(1, 20))
    assert straight
    for stop in range(1, 19):
        killed, resumed = a_monitor(), a_monitor()
        before = alarms(killed, range(1, stop))
        resumed.load_state_dict(killed.state_dict())
        assert before + alarms(resumed, range(stop, 20)) == straight


# --- alarms -------------------------------------------------------------------------------------------------


def alarms_of(report_at: Any, steps: int = 600, log_every: int = LOG_EVERY) -> list[tuple[int, Alarm]]:
    """What a run says whose figures at a step are `report_at(step)`, laid over those of a healthy run."""
    monitor = a_monitor()
    healthy = {
        "loss_to_collapse": 0.3,
        "embedding_std": 0.8,
        "effective_rank": 9.0,
        "cluster_evenness": 0.7,
        "dead_clusters": 0.1,
    }
    said = []
    for step in range(log_every, steps + 1, log_every):
        said += [(step, alarm) for alarm in monitor.alarms(healthy | report_at(step), clock(step))]
    return said


COLLAPSES = {
    "collapsed_embeddings": [{"embedding_std": 0.01}, {"effective_rank": 0.0}, {"effective_rank": 1.5}],
    "loss_at_collapse": [{"loss_to_collapse": 1e-5}, {"loss_to_collapse": -2e-4}],
    "few_clusters": [{"cluster_evenness": 0.02}, {"dead_clusters": 0.97}],
    "blank_images": [{"blank_images": 0.95}],
}


@pytest.mark.parametrize(("name", "figures"), [(n, f) for n, many in COLLAPSES.items() for f in many])
def test_a_collapse_is_noticed_within_200_steps_and_said_once(name: str, figures: dict[str, float]):
    for start, log_every in ((0, 20), (300, 20), (0, 1), (300, 50)):
        said = alarms_of(lambda step, start=start: figures if step > start else {}, 2000, log_every)
        assert [alarm.name for _, alarm in said] == [name]
        assert start < said[0][0] <= start + 200


def test_the_text_says_what_was_seen_what_is_normal_and_what_to_do():
    for figures in ({"embedding_std": 0.01}, {"loss_to_collapse": 0.0}, {"dead_clusters": 0.99}):
        [(_, alarm)] = alarms_of(lambda step, figures=figures: figures)
        for word in (
            "healthy",
            "epsilon 0.03",
            "prototypes frozen for longer",
            "queue",
            "learning rate",
            "augmentation",
        ):
            assert word in alarm.text
        assert "\n" not in alarm.text


@pytest.mark.parametrize("distance", [1e-4, -4e-4])
def test_a_loss_below_that_of_a_collapse_has_learned_and_one_far_above_does_not_rest_there(distance: float):
    assert alarms_of(lambda step: {"loss_to_collapse": distance}) == []


@pytest.mark.parametrize("log_every", [1, 20])
def test_a_run_that_starts_like_a_collapsed_one_raises_no_alarm(log_every: int):
    collapsed = {
        "loss_to_collapse": 0.0,
        "embedding_std": 0.01,
        "effective_rank": 1.0,
        "cluster_evenness": 0.01,
        "dead_clusters": 0.99,
    }
    before = WARMUP_STEPS - 1
    assert alarms_of(lambda step: collapsed if step <= before else {}, log_every=log_every) == []


@pytest.mark.parametrize("log_every", [1, 5, 20])
def test_a_dip_that_passes_raises_no_alarm(log_every: int):
    dip = {"loss_to_collapse": 0.0, "embedding_std": 0.01, "cluster_evenness": 0.01}
    assert alarms_of(lambda step: dip if step % LASTING_STEPS else {}, log_every=log_every) == []


def test_two_reports_far_apart_are_not_enough():
    assert alarms_of(lambda step: {"loss_to_collapse": 0.0} if step <= 1000 else {}, 2000, log_every=500) == []


def test_an_alarm_that_cleared_is_said_again_when_it_comes_back():
    figures = {"embedding_std": 0.01}
    said = alarms_of(lambda step: figures if step <= 200 or step > 300 else {})
    assert [alarm.name for _, alarm in said] == ["collapsed_embeddings"] * 2


def test_reports_too_early_in_an_epoch_to_know_neither_raise_nor_clear_the_alarm_about_clusters():
    def figures(step: int) -> dict[str, float]:
        return {"cluster_evenness": 0.02, "dead_clusters": 0.98}

    monitor = a_monitor()
    said = []
    for step in range(LOG_EVERY, 2000, LOG_EVERY):
        report = {
            "embedding_std": 0.8,
            "effective_rank": 9.0,
            "cluster_evenness": 0.02,
        }
        if step % 100 >= 40:
            report |= figures(step)
        said += monitor.alarms(report, clock(step))
    assert [alarm.name for alarm in said] == ["few_clusters"]


def test_healthy_embeddings_and_assignments_raise_no_alarm():
    for cone in (0.0, 1.0, 3.0):  # mean cosines up to 0.9, as in a fresh network
        monitor, said = a_monitor(dim=128), []
        for number in range(1, 15):
            step = number * LOG_EVERY
            monitor.observe(a_step(2.0, unit_rows(128, 128, cone), torch.randint(K, (128,))))
            said += monitor.alarms(monitor.report(), clock(step))
        assert said == []


@pytest.mark.parametrize(
    ("dim", "rank", "alarmed"), [(128, 7.5, True), (2048, 7.5, True), (128, 8.5, False), (16, 5.5, False)]
)
def test_how_few_directions_are_too_few_depends_on_how_many_there_are(dim: int, rank: float, alarmed: bool):
    monitor, said = a_monitor(dim=dim), []
    for step in range(LOG_EVERY, 300, LOG_EVERY):
        said += monitor.alarms({"embedding_std": 0.5, "effective_rank": rank}, clock(step))
    assert [alarm.name for alarm in said] == ["collapsed_embeddings"] * alarmed
