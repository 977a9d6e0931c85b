"""A package that AOTInductor compiled ahead of time: native code, made by `pack`, for one kind of CPU.

Rule: a package is loaded only where it says that it can run. Code for instructions that a CPU lacks would end the
worker without a word, so the platform, the instruction set and torch's version are compared first.

Compiling needs a C++ compiler, running does not.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from batch_handler.runtimes.device import Device
from batch_handler.runtimes.foreign import foreign, raise_if_device, said
from batch_handler.runtimes.program import export_program
from batch_handler.runtimes.slots import SlotRuntime
from batch_handler.runtimes.transform import ModelError
from batch_handler.signature import InputSpec, ModelDescription

__all__ = ["Package", "compile_package", "missing_instructions", "open_aot", "open_package"]

Tensor = torch.Tensor

# What `compile_package` adds to the metadata that torch writes.
_RECORDS = "BATCH_HANDLER_RECORDS"
_TORCH = "BATCH_HANDLER_TORCH"

# torch's names of x86 instruction sets, each with all that is before it, and the compiler's names for code that
# every CPU with them runs. Its default would be this very CPU (-march=native).
_X86 = ("DEFAULT", "AVX2", "AVX512")
_MARCH = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}


class Package:
    """A loaded package as a callable that takes `fixed` records at a time and no other number.

    Packages with a dynamic number were no faster here, and AOTInductor narrowed it on its own: code exported
    for 1 to 65,536 records and compiled with 128 refused fewer than 16.
    """

    def __init__(self, loader: Any, fixed: int) -> None:
        # pytree has no public name in torch; the package's own description of its arguments is written in it.
        from torch.utils import _pytree as pytree  # noqa: PLC0415 - private to torch, used here alone

        self._loader = loader
        self._outputs = pytree.treespec_loads(loader.get_call_spec()[1])
        self._unflatten = pytree.tree_unflatten
        self.fixed = fixed

    def __call__(self, *inputs: Tensor) -> Any:
        return self._unflatten(self._loader.boxed_run([tensor.contiguous() for tensor in inputs]), self._outputs)


def open_aot(description: ModelDescription, directory: Path, device: Device, precision: str) -> SlotRuntime:
    """The package of an archive on a device."""
    package = open_package(directory / description.weights.file, device.torch_device, description.micro_batch)
    return SlotRuntime(
        package,
        device,
        description.inputs,
        description.outputs,
        numerics={"runtime": "aot"},
        precision=precision,
        fixed=package.fixed,
    )


def open_package(path: Path, device: torch.device, records: int) -> Package:
    """Load a package; one that does not say how many records it takes gets `records` at a time.

    Raises `ModelError` for one that can't run here. torch's own `aoti_load_package` compiles test programs to
    learn the CPU's instructions, seconds at each load, and only warns of those that are missing.
    """
    # Otherwise compiled code reads beyond the end of a tensor that is smaller than it was compiled for.
    os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
    loader: Any = torch._C._aoti.AOTIModelPackageLoader  # noqa: SLF001 - its public way compiles programs
    with foreign(f"{path.name} can't be loaded as a compiled package:"):
        metadata: Mapping[str, str] = loader.load_metadata_from_package(str(path), "model")
        _check(metadata, device)
        loaded = loader(str(path), "model", False, 1, device.index or 0 if device.type == "cuda" else -1)
        return Package(loaded, int(metadata.get(_RECORDS, records)))


def compile_package(module: torch.nn.Module, inputs: Sequence[InputSpec], micro_batch: int, path: Path) -> None:
    """Write the package of a module, for the CPU and `micro_batch` records at a time.

    Raises `ModelError` where torch can't export or compile it.
    """
    import torch._inductor.config  # noqa: PLC0415 - slow to import, and only `pack` compiles
    from torch._inductor import aoti_compile_and_package  # noqa: PLC0415 - slow to import
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415 - slow to import

    with warnings.catch_warnings():
        # torch's own, about its own code.
        warnings.simplefilter("ignore")
        exported = export_program(module, inputs, micro_batch)
        config: dict[str, Any] = {
            # Constants are laid out for the kernels that use them.
            "freezing": True,
            # As many as the worker that runs it has, not as many as the machine that compiles it.
            "cpp.dynamic_threads": True,
            "aot_inductor.metadata": {_RECORDS: str(micro_batch), _TORCH: _release(torch.__version__)},
        }
        march = _MARCH.get(torch.backends.cpu.get_cpu_capability())
        if march is not None:
            if not hasattr(torch._inductor.config.cpp, "march"):  # noqa: SLF001 - its public name
                raise ModelError(f"torch {torch.__version__} compiles for this very CPU alone, wanted a newer one")
            config["cpp.march"] = march
        try:
            with torch.no_grad():
                aoti_compile_and_package(exported, package_path=str(path), inductor_configs=config)
        except Exception as error:
            if isinstance(error, InvalidCxxCompiler) or "InvalidCxxCompiler" in str(error):
                raise ModelError(
                    "compiling needs a C++ compiler and none was found, wanted g++ (or CXX=…), or another runtime"
                ) from error
            raise_if_device(error)
            raise ModelError(f"the module can't be compiled, wanted another runtime: {said(error)}") from error


def _check(metadata: Mapping[str, str], device: torch.device) -> None:
    """Raise `ModelError` for a package that is for another kind of machine or another torch."""
    wanted = metadata.get("AOTI_DEVICE_KEY", device.type)
    if wanted != device.type:
        raise ModelError(f"the package was compiled for {wanted}, this worker computes on {device.type}")
    for what, found, here in (
        ("platform", metadata.get("AOTI_PLATFORM"), sys.platform),
        ("machine", metadata.get("AOTI_MACHINE"), platform.machine()),
        ("torch", metadata.get(_TORCH), _release(torch.__version__)),
    ):
        if found not in (None, here):
            raise ModelError(f"the package was compiled for {what} {found}, this is {here}: pack it again here")
    missing = missing_instructions(metadata.get("AOTI_CPU_ISA", ""), torch.backends.cpu.get_cpu_capability(), _beside())
    if missing:
        raise ModelError(f"the package was compiled for {missing}, which this CPU lacks: pack it on one like this")


def _beside() -> frozenset[str]:
    """What this CPU has beside torch's capability, by the names that torch gives to a package."""
    found = {
        "AVX512_VNNI": torch.cpu._is_vnni_supported(),  # noqa: SLF001 - torch has no public name for it
        "AMX_TILE": torch.cpu._is_amx_tile_supported(),  # noqa: SLF001 - torch has no public name for it
    }
    return frozenset(name for name, has in found.items() if has)


def missing_instructions(compiled: str, here: str, beside: frozenset[str]) -> str:
    """Which of a package's instruction sets, such as "AVX512 AMX_TILE", a CPU of torch's capability `here` lacks that
    has those of `beside` too.
    """
    lacking = []
    for name in compiled.split():
        if name in _X86:
            lacks = here not in _X86 or _X86.index(here) < _X86.index(name)
        elif name.startswith(("AVX512", "AMX")):
            lacks = name not in beside
        else:
            lacks = False  # other architectures: the machine's name was compared
        if lacks:
            lacking.append(name)
    return " ".join(lacking)


def _release(version: str) -> str:
    """Major and minor: what torch's compiled interface is kept stable within."""
    return ".".join(version.split(".")[:2])
