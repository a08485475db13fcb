"""Several processes from Python: a script under torchrun trains as one run; a notebook is told what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tessella.engine.launch import require_program
from tessella.errors import UserError

SCRIPT = """
import sys
import tessella

tessella.pretrain(
    "digits::test", "swav_cpu", sys.argv[1], device="cpu", workers=1, batch_size=16, max_steps=2,
    **{"backbone.name": "resnet10", "backbone.width": 4},
)
print("done")
"""


@pytest.mark.parametrize("devices", [2, 8])
def test_a_notebook_is_told_how_to_use_its_gpus(devices: int, monkeypatch: pytest.MonkeyPatch):
    program = types.ModuleType("__main__")
    program.__file__ = "train.py"
    monkeypatch.setitem(sys.modules, "__main__", program)
    require_program(devices)
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    with pytest.raises(UserError, match=rf"(?s){devices} GPUs are visible.*--nproc-per-node={devices}"):
        require_program(devices)


def test_a_kernel_of_jupyter_is_no_program(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        require_program(2)


@pytest.mark.slow
def test_a_script_on_two_processes_makes_one_run(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launchers = ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])
    for number, launcher in enumerate(launchers, start=1):
        command = [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path / f"run{number}")]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and done.stdout.count("done") == number, done.stderr
    one, two = (load_file(tmp_path / f"run{number}" / "backbone.safetensors") for number in (1, 2))
    assert all((one[name].double() - two[name].double()).abs().max() < 1e-5 for name in one)
