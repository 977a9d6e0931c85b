"""The peak of a process is its own, whoever started it, and never what a run ends with."""

import subprocess
import sys

import pytest

from batch_client import summary

OWN = "from batch_client.summary import peak_memory; print(peak_memory())"
NAMED = f"""
from pathlib import Path
Path("/proc/self/comm").write_bytes("größer".encode())
{OWN}
"""
LARGE = f"""
import os, sys
ballast = bytearray(400 << 20)
os.execv(sys.executable, [sys.executable, "-c", {OWN!r}])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell only what getrusage says")
def test_the_peak_is_not_that_of_the_program_before():
    peak = int(subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True).stdout)
    assert 10 << 20 < peak < 300 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file")
def test_the_peak_of_a_process_with_any_name_is_found():
    peak = int(subprocess.run([sys.executable, "-c", NAMED], capture_output=True, text=True, check=True).stdout)
    assert peak > 10 << 20


def test_where_the_system_does_not_say_the_peak_is_0(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(summary, "STATUS", tmp_path / "not mounted")
    assert summary.peak_memory() == 0
