"""The peak of a process is its own, whoever started it."""

import subprocess
import sys

import pytest

OWN = "from batch_client.summary import peak_memory; print(peak_memory())"
LARGE = f"""
import os, sys
ballast = bytearray(400 << 20)
os.execv(sys.executable, [sys.executable, "-c", {OWN!r}])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell only what getrusage says")
def test_the_peak_is_not_that_of_the_program_before():
    peak = int(subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True).stdout)
    assert 10 << 20 < peak < 300 << 20
