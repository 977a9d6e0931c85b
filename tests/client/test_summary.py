"""What a summary says: the time of a report, and the peak of a process, its own whoever started it."""

import subprocess
import sys
from dataclasses import replace

import pytest

from batch_client import summary
from batch_client.events import Published, RecordsScored
from batch_client.pipeline import execute
from batch_client.report import Report
from support.runs import records_of, services, source_of, spec
from support.simulated import SimulatedServer

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


async def test_a_summary_and_a_report_are_of_the_same_time():
    """Up to the last event: what observers and the summary take after it is no part of the run."""
    now = 0.0

    def later(event):
        nonlocal now
        now += {RecordsScored: 1.0, Published: 100.0}.get(type(event), 0.0)

    report = Report("memory://source", clock=lambda: now)
    these = replace(services(SimulatedServer(), source_of(records_of(400), (10, 3))), clock=lambda: now)
    found = await execute(spec(chunk_records=10), these, (report, later))
    assert found.seconds == report.data().seconds
    assert 0 < found.seconds < 100
    assert found.records_per_s == pytest.approx(400 / found.seconds, rel=1e-5)
    assert (await execute(spec(chunk_records=10), these, (later,))).seconds == 0
