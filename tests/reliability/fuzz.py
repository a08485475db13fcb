"""Fuzz one of our parsers for as long as you like: `python -m tests.reliability.fuzz TARGET [--runs N]`.

With atheris installed it is guided by coverage, and further options are libFuzzer's; without, examples are changed at
random by a seed that is printed. What breaks a parser is written to `fuzz-TARGET-*.bin`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np

from tests.reliability.parsers import REFUSALS, Target, targets


def attempt(target: Target, data: bytes) -> None:
    """Run a parser; its own refusals are no fault."""
    with suppress(*REFUSALS):
        target.run(data)


def by_chance(name: str, target: Target, runs: int, seed: int) -> int:
    """Number of inputs that broke the parser."""
    random, faults = np.random.default_rng(seed), 0
    print(f"{name}: {runs} runs from seed {seed}")
    for _ in range(runs):
        data = bytearray(target.seeds[random.integers(len(target.seeds))])
        for _ in range(random.integers(1, 8)):
            at, length = int(random.integers(len(data) + 1)), int(random.integers(0, 9))
            data[at : at + length] = random.bytes(int(random.integers(0, 9)))
        if random.random() < 0.2:
            del data[int(random.integers(len(data) + 1)) :]
        try:
            attempt(target, bytes(data))
        except Exception:
            faults += 1
            traceback.print_exc()
            Path(f"fuzz-{name.replace(' ', '-')}-{faults}.bin").write_bytes(data)
    return faults


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        known = targets(Path(folder))
        if given.target not in known:
            parser.error(f"the targets are {', '.join(known)}")
        try:
            import atheris
        except ImportError:
            return min(1, by_chance(given.target, known[given.target], given.runs, given.seed))
        words = [sys.argv[0], f"-runs={given.runs}", f"-seed={given.seed}", *rest]
        atheris.Setup(words, lambda data: attempt(known[given.target], data))
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
