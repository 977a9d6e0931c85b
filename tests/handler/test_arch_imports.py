"""Code that only the working folder has is missing when a model is packed, as it is where the model is served."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import pytest
import torch

ARCH = """
import torch


def make_model():
    from neighbour import WIDTH
    return torch.nn.Linear(WIDTH, 2)
"""
PACK = ["pack", "w.pt", "--input", "x:float32:4", "-o", "w.mar", "--arch"]


@pytest.fixture
def run(tmp_path):
    """Run Python in a folder with an architecture, what that imports, and weights."""
    (tmp_path / "late.py").write_text(ARCH)
    (tmp_path / "early.py").write_text("from neighbour import WIDTH\n" + ARCH)
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    torch.save(torch.nn.Linear(4, 2).state_dict(), tmp_path / "w.pt")

    def done(*words, more=()):
        path = os.pathsep.join([*(place for place in sys.path if place), *map(str, more)])
        return subprocess.run([sys.executable, *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
                              capture_output=True, text=True, timeout=120, check=False)

    return done


@pytest.mark.parametrize("arch", ["early.py", "late.py", "early"])
def test_what_only_the_working_folder_has_is_refused_when_it_is_packed(arch, run):
    done = run("-m", "batch_client", *PACK, f"{arch}:make_model")
    assert done.returncode == 65
    assert f"arch {arch}:make_model can't be " in done.stderr
    missing = "early" if arch == "early" else "neighbour"
    assert done.stderr.endswith(f"ModuleNotFoundError: No module named '{missing}'\n")
    assert done.stderr.count("\n") == 1


def test_what_to_do_about_a_file_beside_the_code_is_said(run, tmp_path):
    done = run("-m", "batch_client", *PACK, "early.py:make_model")
    assert ("wanted what it imports installed or on PYTHONPATH, here and where it is served, or only where it is "
            "packed with --runtime onnx or aot, whose archives need no code: ModuleNotFoundError: ") in done.stderr
    done = run("-m", "batch_client", *PACK, "early.py:make_model", "--runtime", "onnx", more=[tmp_path])
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "w.mar") as mar:
        assert not [name for name in mar.namelist() if name.startswith("arch")]


@pytest.mark.parametrize("arch", ["early.py", "late.py", "early"])
def test_what_is_on_the_path_for_another_reason_is_found(arch, run, tmp_path):
    done = run("-m", "batch_client", *PACK, f"{arch}:make_model", more=[tmp_path])
    assert done.returncode == 0, done.stderr


def test_the_path_is_as_it_was_afterwards(run):
    done = run("-c", "import sys; from batch_client.cli import main; before = list(sys.path); "
               f"code = main({[*PACK, 'early.py:make_model']!r}); sys.exit(code if before == sys.path else 1)")
    assert done.returncode == 65
