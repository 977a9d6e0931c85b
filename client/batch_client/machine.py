"""What this machine has for a server. Rule: nothing is changed, and nothing kept but the list of GPUs: a process sees
those that were there when it first asked, and the driver's program is slow.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from batch_client.errors import ServingError

__all__ = ["cores", "cpu_kind", "device", "free_ports", "gpu_variables", "gpus", "has_address", "is_taken"]

DEVICES = Path("/dev")
# Of NVIDIA's driver, of WSL, of Jetson, of ROCm.
GPU_DEVICES = ("nvidia[0-9]*", "dxg", "nvgpu*", "nvhost-gpu*", "kfd")
# Below the ephemeral range of Linux and macOS: no outgoing connection takes a port that was just free.
_PORTS = range(10_240, 32_768)
CPUINFO_BYTES = 1 << 16  # the first core says what all are
# From the widest: the first that a core has names it.
_INSTRUCTIONS = (("amx_tile", "amx"), ("avx512f", "avx512"), ("avx2", "avx2"), ("sve", "sve"), ("asimd", "neon"))


def cores(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: its affinity, and the CPU quotas of its control group and of those above it.

    In a container `membership` may name the host's path, which is not there: the mounted top is then its own group.
    """
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = membership.read_text("utf-8", "replace").splitlines()
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers == "" or "cpu" in controllers.split(","):  # version 2, or 1
            top = groups / ("cpu" if controllers else "")
            group = top / path.lstrip("/")
            usable = min([usable, *(_quota(one) for one in (group, *group.parents) if one.is_relative_to(top))])
    return usable


def _quota(group: Path) -> int:
    """Cores that a control group may use; more than any machine has where it has no limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text("ascii").split()
        return max(1, int(quota) // int(period))
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period"))
        if int(quota) > 0:  # -1 is none
            return max(1, int(quota) // int(period))
    return sys.maxsize


def gpus(environ: Mapping[str, str]) -> int:
    """GPUs that a worker would see, without importing torch."""
    return len(_gpu_names(environ))


def gpu_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What TorchServe and its workers get instead of CUDA_VISIBLE_DEVICES.

    TorchServe takes nothing but indexes there (ConfigManager.java parses each as an integer, or does not start); CUDA
    also takes UUIDs, by which alone MIG instances are known. So it gets indexes, and the workers the names.
    """
    names = _visible(environ)
    if names is None:
        return {}
    if not gpus(environ):
        return {"CUDA_VISIBLE_DEVICES": ""}
    if all(name.isdigit() for name in names):
        return {"CUDA_VISIBLE_DEVICES": ",".join(names)}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(len(names)))), "BATCH_HANDLER_NAMED_GPUS": ",".join(names)}


def device(environ: Mapping[str, str]) -> str:
    """What kind of machine this is for a model: `cpu-avx2-2cores`, `cuda-NVIDIA_A10G`, `cuda-NVIDIA_A10G-4gpus`.

    Machines of one kind share their tuning file. Letters, digits, '.', '_', '+' and '-' only.
    """
    names = _gpu_names(environ)
    if names:
        kinds = "+".join(sorted({re.sub(r"[^A-Za-z0-9.]+", "_", name) for name in names}))
        return f"cuda-{kinds}" if len(names) == 1 else f"cuda-{kinds}-{len(names)}gpus"
    cpuinfo = ""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as file:
        cpuinfo = file.read(CPUINFO_BYTES)
    return f"cpu-{cpu_kind(cpuinfo, platform.machine())}-{cores()}cores"


def cpu_kind(cpuinfo: str, machine: str) -> str:
    """The widest vector instructions that /proc/cpuinfo lists, or else the architecture."""
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = listed[1].split() if listed else []
    return next((name for flag, name in _INSTRUCTIONS if flag in flags), machine.lower() or "any")


def _gpu_names(environ: Mapping[str, str]) -> list[str]:
    wanted = _visible(environ)
    if wanted == []:
        return []
    nvidia_smi = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if nvidia_smi is None and not any(True for pattern in GPU_DEVICES for _ in DEVICES.glob(pattern)):
        return []  # whatever a variable says
    listed = () if nvidia_smi is None else _listed_by(nvidia_smi)
    if wanted is None:
        return [name for _, name, _ in listed]
    by_id = {ident: name for index, name, uuid in listed for ident in (index, uuid)}
    return [by_id.get(ident, "GPU") for ident in wanted]


def _visible(environ: Mapping[str, str]) -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names; None where it is not set."""
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return None
    return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]


@functools.cache
def _listed_by(nvidia_smi: str) -> tuple[tuple[str, str, str], ...]:
    """Index, name and UUID of each GPU."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, timeout=20, check=False)
        return tuple(re.findall(r"^GPU (\d+): (.*?) \(UUID: ([^)]*)\)", done.stdout, re.MULTILINE))
    return ()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that were free a moment ago. Raises ServingError where there are not as many."""
    tried = random.SystemRandom().sample(_PORTS, len(_PORTS))
    free = list(islice((port for port in tried if not is_taken("127.0.0.1", port)), count))
    if len(free) < count:
        raise ServingError(f"{len(free)} ports are free on the loopback, wanted {count}: end what listens there")
    return free


def has_address(address: str) -> bool:
    """Whether a server here can take requests at this address or host name."""
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, place in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as one:
            one.bind(place)
            return True
    return False


def is_taken(address: str, port: int) -> bool:
    """Whether somebody listens at this port of an address of this machine."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Java: connections that have ended don't count
        try:
            one.bind((address, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
