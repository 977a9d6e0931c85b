"""The seam to what computes: the CPU, a CUDA GPU, or (in tests) a device whose copies are late.

Rule: work is issued, not done. A caller may read or rewrite a buffer only after it waited for the event of
the last operation that touches it. On the CPU everything is done when the call returns, which hides such
mistakes; that is why the scripted device exists.

    DeviceError (RuntimeError)
    ├── CapacityError    the device's memory is full; the context is fine and smaller work may fit
    └── LostDeviceError  the context is poisoned: every later result would be wrong, the process must go
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

__all__ = [
    "NAMED_GPUS",
    "PRECISIONS",
    "CapacityError",
    "CpuDevice",
    "CudaDevice",
    "Device",
    "DeviceError",
    "Event",
    "LostDeviceError",
    "open_device",
    "set_exact",
]

Tensor = torch.Tensor

PRECISIONS: Mapping[str, torch.dtype | None] = {
    "float32": None,
    "tf32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# What CUDA_VISIBLE_DEVICES says where a GPU is not to be used.
_NO_GPU = ("", "-1", "NoDevFiles")

# What cuBLAS needs to give equal bits from one run to the next:
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility
_CUBLAS_WORKSPACE = ":4096:8"

# Environment: the GPUs as whoever started the server named them. TorchServe reads CUDA_VISIBLE_DEVICES too and takes
# nothing but indexes there; CUDA also takes UUIDs, and MIG instances have nothing else.
NAMED_GPUS = "BATCH_HANDLER_NAMED_GPUS"

# Settings by which oneDNN (https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html) and MKL choose
# other kernels than they would for this CPU, which give other bits. ATen's shows in its capability.
_KERNELS = (
    *(f"{prefix}_{name}" for prefix in ("ONEDNN", "DNNL") for name in (
        "MAX_CPU_ISA", "CPU_ISA_HINTS", "DEFAULT_FPMATH_MODE")),
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)

# And on a GPU, whatever was asked for (https://docs.pytorch.org/docs/stable/cuda_environment_variables.html).
_GPU_KERNELS = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_CUDNN_V8_API_DISABLED",
    "CUBLASLT_WORKSPACE_SIZE",
)


class DeviceError(RuntimeError):
    """The device, not the model, failed."""


class CapacityError(DeviceError):
    """The device's memory is full."""


class LostDeviceError(DeviceError):
    """The device's context is poisoned."""


class Event(Protocol):
    """Something issued to a device."""

    def wait(self) -> None:
        """Block the host until it is done; raises what the work raised."""

    def done(self) -> bool:
        """Whether it is; never blocks, never raises what the work raised."""


class Device(Protocol):
    """Where a runtime computes: buffers, and the three operations of a stack of micro-batches.

    `numerics` says what of the device decides bits; `torch_device` is where tensors live; `stack_bytes` is how large
    the inputs and outputs of a stack may be.
    """

    torch_device: torch.device
    numerics: Mapping[str, Any]
    stack_bytes: int

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host that copies can start from without another copy."""

    def mirror(self, host: Tensor) -> Tensor:
        """Memory of the device for what is in `host`; on the CPU the same memory."""

    def restore(self) -> None:
        """Make the settings that decide bits what `numerics` says, whatever a model's own code has made of them."""

    def settle(self) -> None:
        """Block until everything that was issued outside these operations, such as loading, is done."""

    def upload(self, hosts: Sequence[Tensor], targets: Sequence[Tensor]) -> Event:
        """Copy to the device."""

    def compute(self, work: Callable[[], tuple[Tensor, ...]], after: Event) -> tuple[list[Tensor], Event]:
        """Run the model once `after` is done; the list is filled with its tensors by then."""

    def download(self, sources: list[Tensor], hosts: Sequence[Tensor], after: Event) -> tuple[Sequence[Tensor], Event]:
        """Copy back; returns where on the host the bytes will be, which on the CPU is where they are."""


class _Done:
    def wait(self) -> None:
        """Nothing was left to do when the call returned."""

    def done(self) -> bool:
        return True


_DONE = _Done()


class CpuDevice:
    """The host itself: nothing is copied and everything is done at once.

    What is done beside the model finds the caches full of it, and takes five times as long as in a loop of its own: a
    micro-batch of a network of 17 ms had 0.53 ms of it, and 0.18 ms when all of it was done in stacks of ten, see
    `docs/reference/benchmarks.md`.
    """

    stack_bytes = 4 << 20

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self.restore()
        self.torch_device = torch.device("cpu")
        self.numerics: Mapping[str, Any] = {
            "device": "cpu",
            "cpu": _processor(),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": threads,
            **_set_of(_KERNELS),
        }

    def restore(self) -> None:
        torch.set_num_threads(self._threads)

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def mirror(self, host: Tensor) -> Tensor:
        return host

    def settle(self) -> None:
        """Nothing is ever pending."""

    def upload(self, hosts: Sequence[Tensor], targets: Sequence[Tensor]) -> Event:
        del hosts, targets
        return _DONE

    def compute(self, work: Callable[[], tuple[Tensor, ...]], after: Event) -> tuple[list[Tensor], Event]:
        del after
        return list(work()), _DONE

    def download(self, sources: list[Tensor], hosts: Sequence[Tensor], after: Event) -> tuple[Sequence[Tensor], Event]:
        del hosts, after
        return sources, _DONE


@dataclass(frozen=True)
class _CudaEvent:
    event: Any

    def wait(self) -> None:
        self.event.synchronize()

    def done(self) -> bool:
        # A poisoned context makes the question itself raise; waiting says so where errors are expected.
        try:
            return bool(self.event.query())
        except RuntimeError:
            return True


class CudaDevice:
    """A GPU with a stream for uploads and one for the model and its downloads.

    Downloads are small after the reductions and follow on the compute stream: on the upload stream, a
    download that waits for this micro-batch would hold up the upload of the next, which two slots are for. No stacks,
    for the same reason: the host's steps are hidden behind the device's.
    """

    stack_bytes = 0

    def __init__(self, index: int, *, threads: int = 1, precision: str = "float32") -> None:
        self._threads, self._precision = threads, precision
        self.restore()
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        self._uploads: Any = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call] # torch: no types
        self._work: Any = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call] # torch: no types
        self.numerics: Mapping[str, Any] = {
            "device": "cuda",
            "gpu": torch.cuda.get_device_name(index),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call] # torch ships none
            **_set_of(_GPU_KERNELS),
        }

    def restore(self) -> None:
        torch.set_num_threads(self._threads)
        set_exact(self._precision)

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def mirror(self, host: Tensor) -> Tensor:
        return torch.empty_like(host, device=self.torch_device)

    def settle(self) -> None:
        """The two streams do not wait for the default one, on which weights were moved and laid out."""
        torch.cuda.synchronize(self.torch_device)

    def upload(self, hosts: Sequence[Tensor], targets: Sequence[Tensor]) -> Event:
        with torch.cuda.stream(self._uploads):
            for host, target in zip(hosts, targets, strict=True):
                target.copy_(host, non_blocking=True)
        return self._record(self._uploads)

    def compute(self, work: Callable[[], tuple[Tensor, ...]], after: Event) -> tuple[list[Tensor], Event]:
        self._follow(after)
        with torch.cuda.stream(self._work):
            results = list(work())
        return results, self._record(self._work)

    def download(self, sources: list[Tensor], hosts: Sequence[Tensor], after: Event) -> tuple[Sequence[Tensor], Event]:
        self._follow(after)
        with torch.cuda.stream(self._work):
            for source, host in zip(sources, hosts, strict=True):
                host.copy_(source, non_blocking=True)
        # The one event that the host waits for: asleep, since the others of its few cores have work.
        return hosts, self._record(self._work, blocking=True)

    def _follow(self, after: Event) -> None:
        if isinstance(after, _CudaEvent):
            self._work.wait_event(after.event)

    def _record(self, stream: Any, *, blocking: bool = False) -> Event:
        event: Any = torch.cuda.Event(blocking=blocking)  # type: ignore[no-untyped-call] # torch ships none
        event.record(stream)
        return _CudaEvent(event)


def open_device(gpu_id: int | None, *, threads: int = 1, precision: str = "float32") -> Device:
    """The GPU that TorchServe gave this worker, or the CPU. Apple's MPS is never chosen by itself.

    A GPU that torch can't use is an error, and no reason to be slow without a word.
    """
    if precision not in PRECISIONS:
        raise DeviceError(f"precision is {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    if named := os.environ.get(NAMED_GPUS):
        os.environ["CUDA_VISIBLE_DEVICES"] = named
    given = gpu_id is not None and gpu_id >= 0 and os.environ.get("CUDA_VISIBLE_DEVICES", "any") not in _NO_GPU
    if given and not torch.cuda.is_available():
        made_for = f"is made for CUDA {torch.version.cuda}" if torch.version.cuda else "is made for CPUs"
        raise DeviceError(
            f"this worker has GPU {gpu_id}, which torch {torch.__version__} can't use: that {made_for}; wanted a "
            "driver (nvidia-smi) and a torch that go together, or CUDA_VISIBLE_DEVICES= to serve on the CPU"
        )
    if gpu_id is None or not given:
        if precision == "tf32":
            raise DeviceError("precision is tf32, which is of CUDA GPUs; wanted float32, bfloat16 or float16 on a CPU")
        return CpuDevice(threads)
    return CudaDevice(gpu_id, threads=threads, precision=precision)


def _processor() -> str:
    """Who made the processor, and which it is: the engines choose code paths and block sizes by that too."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n", 1)[0]
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    known = [said[name] for name in ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part") if name in said]
    return " ".join(known) or platform.machine()


def _set_of(names: Sequence[str]) -> dict[str, str]:
    return {name: value for name in names if (value := os.environ.get(name))}


def set_exact(precision: str) -> None:
    """Equal bits for equal input on a GPU: no autotuning, deterministic algorithms, TF32 only where chosen."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = _CUBLAS_WORKSPACE
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(mode=True)
    # Otherwise deterministic mode fills every fresh tensor with NaN, which costs a pass over memory.
    vars(torch.utils)["deterministic"].fill_uninitialized_memory = False
    tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    # From torch 2.9 on there is a setting an engine and operation, which those above leave as it is where a wider one,
    # torch.backends.fp32_precision, was set before.
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    engines: tuple[Any, ...] = (getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None), matmul)
    for engine in engines:
        if hasattr(engine, "fp32_precision"):
            engine.fp32_precision = "tf32" if tf32 else "ieee"
