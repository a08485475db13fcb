"""What runs on the training device works on one without float64 (`--device mps`)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tessella.methods.method import MethodOutput
from tessella.ops import layout
from tessella.ops.assignment import sinkhorn
from tessella.ops.grouping import group_sums, moved_groups, nearest_group, spherical_kmeans
from tessella.ops.kmeans import kmeans, online_means
from tessella.protocols.lowshot import _sum_over_ranks
from tessella.run.monitor import Monitor
from tests.no_float64 import DEVICE, NoFloat64

ROWS = F.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(3)), dim=1)


@pytest.fixture(autouse=True)
def _without_float64(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layout, "_NO_FLOAT64", {DEVICE.type})
    with NoFloat64():
        yield


def test_the_pretend_device_refuses_float64_and_computes_otherwise():
    x = ROWS.to(DEVICE)
    torch.testing.assert_close((x + torch.ones(8, device=DEVICE)).cpu(), ROWS + 1)
    with pytest.raises(TypeError, match="no float64"):
        x.double()
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(3, dtype=torch.float64, device=DEVICE)


def test_the_monitor_reports_the_same_figures():
    step = MethodOutput(torch.tensor(1.0), {}, ROWS, torch.arange(60) % 5)
    reports = []
    for device in (torch.device("cpu"), DEVICE):
        monitor = Monitor(math.log(5), 5, 8)
        for name, buffer in list(monitor._buffers.items()):
            monitor._buffers[name] = buffer.to(device)
        monitor.observe(MethodOutput(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in step)))
        reports.append(monitor.report())
    assert reports[0] == pytest.approx(reports[1]) and len(reports[0]) >= 4


def test_groups_move_and_are_rebuilt_alike():
    groups = ROWS[:6]
    x, there = ROWS.to(DEVICE), groups.to(DEVICE)
    own = nearest_group(x, there)
    assert torch.equal(own.cpu(), nearest_group(ROWS, groups))
    moved = moved_groups(there, *group_sums(x, own, 6), 0.9)
    torch.testing.assert_close(moved.cpu(), moved_groups(groups, *group_sums(ROWS, own.cpu(), 6), 0.9))
    torch.testing.assert_close(spherical_kmeans(x, there, 5).cpu(), spherical_kmeans(ROWS, groups, 5))


def test_clusters_and_codes_are_alike():
    mine, theirs = (kmeans(x, 4, seed=0, restarts=2) for x in (ROWS.to(DEVICE), ROWS))
    assert mine.inertia == pytest.approx(theirs.inertia, rel=1e-4)
    means, seen = torch.zeros(4, 8), torch.zeros(4)
    there = online_means(*(x.to(DEVICE) for x in (means, seen, ROWS, theirs.assignments)))
    torch.testing.assert_close(there[0].cpu(), online_means(means, seen, ROWS, theirs.assignments)[0])
    scores = ROWS @ ROWS[:10].T
    codes = sinkhorn(scores.to(DEVICE), 0.02, 3).cpu()
    torch.testing.assert_close(codes, sinkhorn(scores, 0.02, 3), atol=1e-4, rtol=0)


def test_scores_of_single_precision_devices_are_summed_on_the_host():
    values = np.arange(3.0)
    assert _sum_over_ranks(values, SimpleNamespace(device=DEVICE)).tolist() == values.tolist()
