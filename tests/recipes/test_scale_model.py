"""The paper model of scale: its payloads are those that the code hands to the collectives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as torch_dist

from tessella.methods.method import Method, Progress
from tests.methods.test_coke import ONE, coke
from tests.methods.tiny import BATCH, jigclu, mejigclu, random_batch, smog, swav, this_ranks_share
from tests.ranks import on_ranks

CASES: dict[str, Any] = {
    "swav": lambda: swav(queue_length=2 * BATCH, queue_from_epoch=0),
    "jigclu": jigclu,
    "mejigclu": mejigclu,
    "smog": smog,
    "coke": lambda: coke(ONE),
}
KINDS = {"all_reduce": "reduce", "all_gather": "gather", "all_to_all_single": "exchange"}


def payloads(name: str) -> dict[str, int]:
    """Bytes that one rank hands to each kind of collective in the forward and backward pass of one step."""
    method: Method = CASES[name]()
    batch = this_ranks_share(random_batch(method))
    if name == "smog":
        method.bank.write(batch.instances, torch.zeros(2, len(batch.instances), 16))
    seen: Counter[str] = Counter()

    def counting(kind: str) -> Any:
        original = getattr(torch_dist, kind)

        def collective(first: Any, *rest: Any, **options: Any) -> Any:
            handed_in = first if kind == "all_reduce" else rest[0]
            seen[KINDS[kind]] += handed_in.numel() * handed_in.element_size()
            return original(first, *rest, **options)

        return mock.patch.object(torch_dist, kind, collective)

    with counting("all_reduce"), counting("all_gather"), counting("all_to_all_single"):
        method(batch, Progress(1, 4, 10)).loss.backward()
    return dict(seen)


def payloads_of_all() -> dict[str, dict[str, int]]:
    return {name: payloads(name) for name in CASES}


def test_the_model_counts_what_two_ranks_send(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import scale_model

    sent = on_ranks(2, payloads_of_all)[0]
    for name, make in CASES.items():
        expected: Counter[str] = Counter()
        config = make().config
        for kind, payload in scale_model.cost(config, BATCH // 2, ranks=2).sent:
            expected[kind] += int(payload)
        if name == "smog":  # a CPU sums in single precision
            expected["reduce"] -= 4 * config.groups * config.group_sets * (config.embedding_dim + 1)
        assert sent[name] == dict(expected), name
