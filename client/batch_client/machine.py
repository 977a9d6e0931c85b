"""What this machine has for a server. Rule: everything here is looked up now, and nothing is changed or kept."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["cores", "free_ports", "gpus"]


def cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its control group."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        usable = min(usable, max(1, int(quota) // int(period)))
    return usable


def gpus(environ: Mapping[str, str]) -> int:
    """GPUs that a worker would see, without importing torch."""
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    nvidia_smi = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if nvidia_smi is None:
        return 0
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, timeout=20, check=False)
        return len(re.findall(r"^GPU \d", done.stdout, re.MULTILINE))
    return 0


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
