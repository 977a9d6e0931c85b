"""`make gpu-check` runs from end to end on a CPU, sees bits that differ, and says so where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from batch_handler.archive import PackRequest, pack
from batch_handler.draft import OutputDraft
from batch_handler.signature import InputSpec

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"
REPEATABLE = "torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))"
# Weights that are drawn when the module is built, and not part of what is packed.
OTHER_EACH_LIFE = f"torch.nn.Sequential(*{REPEATABLE}, torch.nn.Dropout(0.0), Noise())"
FAILS_LATER = f"torch.nn.Sequential(*{REPEATABLE}, Tired())"
ARCH = """
import os
import torch

class Noise(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = int.from_bytes(os.urandom(2)) * 1e-11

    def forward(self, scores):
        return scores + self.shift

class Tired(torch.nn.Module):
    runs = 0

    def forward(self, scores):
        self.runs += 1
        if self.runs > 60:
            raise ValueError("a record that this model does not like")
        return scores

def make_model():
    return {module}
"""


def checked(tmp_path, module):
    (tmp_path / "arch.py").write_text(ARCH.format(module=module))
    torch.manual_seed(1)
    torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).state_dict(), tmp_path / "tiny.pt")
    archive = pack(PackRequest(
        model=tmp_path / "tiny.pt", output=tmp_path / "tiny.mar", name="tiny", version="1",
        inputs=(InputSpec("x", np.dtype("u1"), (4, 4), (4, 4), scale=1 / 255),), outputs=(OutputDraft("scores"),),
        arch=f"{tmp_path / 'arch.py'}:make_model", model_config=b"minWorkers: 1\n", micro_batch=8))
    return script("--device", "cpu", "--archive", str(archive), "--records", "100", "--restarts", "2")


def script(*words):
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("module", "code", "said"), [(REPEATABLE, 0, "equal"), (OTHER_EACH_LIFE, 1, "DIFFERENT")])
def test_bits_over_restarts_are_compared(tmp_path, module, code, said):
    done = checked(tmp_path, module)
    assert (done.returncode, done.stderr) == (code, "")
    for runtime in ("eager", "torchscript"):
        assert f"| bits over 2 restarts, {runtime} | {said} |" in done.stdout


def test_a_process_that_fails_is_told_from_bits_that_differ(tmp_path):
    done = checked(tmp_path, FAILS_LATER)
    assert done.returncode == 3
    assert "a record that this model does not like" in done.stderr
    assert done.stderr.endswith("a process of the check failed with exit code 1, for the reason above\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_that_nothing_was_checked():
    done = script()
    assert done.returncode == 2
    assert "nothing was checked" in done.stderr
