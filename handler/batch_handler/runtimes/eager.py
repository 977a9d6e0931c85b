"""A module run as it was written: state_dict, safetensors, a whole pickle, or an exported program.

Rule: nothing is unpickled unless the archive says that whoever packed it trusted it. That goes for exported
programs too: `torch.export.load` falls back to pickle, and evaluates the shape expressions it reads.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch.export.passes import move_to_device_pass

from batch_handler.runtimes.device import Device
from batch_handler.runtimes.foreign import foreign, raise_if_device, said
from batch_handler.runtimes.slots import SlotRuntime, autocast
from batch_handler.runtimes.transform import ModelError, example_inputs
from batch_handler.signature import ModelDescription, Weights

__all__ = ["build_module", "fixed_records", "load_module", "open_eager"]

_MOST_NAMED = 10
# What a wrapper, which has its module under this name, puts before the names of the weights.
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile


def open_eager(description: ModelDescription, directory: Path, device: Device, precision: str) -> SlotRuntime:
    """The module of an archive on a device, with channels_last weights where it has 2-d convolutions and bears them."""
    module, layout = load_module(description, directory, device.torch_device, precision)
    return SlotRuntime(
        module,
        device,
        description.inputs,
        description.outputs,
        numerics={"runtime": "eager", "layout": layout},
        precision=precision,
        fixed=fixed_records(module),
    )


def load_module(
    description: ModelDescription, directory: Path, device: torch.device, precision: str = "float32"
) -> tuple[torch.nn.Module, str]:
    """The module of an archive in eval mode on `device`, and its memory layout.

    Weights in channels_last make the convolutions choose that layout, whatever the input has: 1.3 times the
    speed on the CPU here, with bits that do not change with a record's place. A module may ask for the other one,
    as `x.view(n, -1)` does of what a convolution gives, and raises here; it stays as it was written.
    """
    weights = description.weights
    module = _on_device(weights, directory, device)
    exported = weights.kind == "exported"  # its layers are calls in a graph, not modules
    if any(isinstance(part, torch.nn.Conv2d) for part in module.modules()) or (
        exported and any(weight.dim() == 4 for weight in module.parameters())
    ):
        # Of the archive alone, so that every worker finds the same; two records have all the strides that more have.
        examples = example_inputs(description.inputs, fixed_records(module) or 2, device)
        runs = _runs(_channels_last(module), examples, precision)
        # Anew, and one at a time: a forward may keep what it saw, and a kernel of 1 by 1 does not turn back.
        del module
        module = _on_device(weights, directory, device)
        if runs:
            return _channels_last(module), "channels_last"
    return module, "contiguous"


def _channels_last(module: torch.nn.Module) -> torch.nn.Module:
    with foreign("the module can't be laid out as channels_last:"):
        return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return] # torch: no such stub


def _on_device(weights: Weights, directory: Path, device: torch.device) -> torch.nn.Module:
    module = build_module(weights, directory, device)
    with foreign(f"the module can't be put on {device.type}:"):
        return module.to(device).requires_grad_(requires_grad=False)


def _runs(module: torch.nn.Module, examples: Sequence[torch.Tensor], precision: str) -> bool:
    """Whether a module takes the examples; raises `DeviceError`, which says nothing of the module."""
    try:
        with foreign(""), torch.inference_mode(), autocast(precision, examples[0].device):
            module(*examples)
    except ModelError:  # no local has it: with its own traceback that would keep the module in memory
        return False
    return True


def build_module(weights: Weights, directory: Path, device: torch.device | None = None) -> torch.nn.Module:
    """The module of a weights file, on the CPU, in eval mode; raises `ModelError` with one line.

    `device` is where it will be put: an exported program has the devices of its own tensors inside.
    """
    path = directory / weights.file
    if weights.kind == "exported":
        return _load_exported(path, device or torch.device("cpu"))
    if weights.kind == "pickle":
        return _evaluated(_unpickle(path))
    module = _call_arch(weights.arch or "", directory)
    state: Mapping[str, torch.Tensor] = {}
    try:
        if weights.kind == "safetensors":
            state = _with_tied(load_file(path, device="cpu"), module.state_dict())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state)
    except (Exception, SystemExit) as error:  # the module's own code, and files of every kind of damage
        raise_if_device(error)
        lines = str(error).splitlines() or [type(error).__name__]
        reason = _wrapped(state, module) or " ".join(lines)[:300]
        raise ModelError(f"the weights do not fit {weights.arch}: {reason}") from error
    return _evaluated(module)


def _wrapped(state: Mapping[str, torch.Tensor], module: torch.nn.Module) -> str | None:
    """What to do with weights of a `module` that was in wrappers as they were saved; None for others."""
    names, wrappers = [str(name) for name in state], ""
    while found := [prefix for prefix in _WRAPPERS if names and all(name.startswith(prefix) for name in names)]:
        wrappers += found[0]
        names = [name.removeprefix(found[0]) for name in names]
    if not wrappers or any(name.startswith(_WRAPPERS) for name, _ in module.named_parameters()):
        return None
    return (f"all names of the weights begin with {wrappers!r}: save model.{wrappers}state_dict() instead, or take "
            "that off the names")


def _with_tied(state: Mapping[str, torch.Tensor], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a safetensors file holds, and what it leaves out since another name of the same memory is in it.

    `safetensors.torch.save_model` writes such memory once. What is left out is a module's own tensor here: copied on
    itself it changes nothing, and it has its value as soon as the other name has.
    """
    # Where each tensor of the module begins and ends in memory.
    spans = {
        name: (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for name, tensor in own.items()
        if isinstance(tensor, torch.Tensor) and tensor.nbytes and tensor.is_contiguous()
    }
    held = [spans[name] for name in state if name in spans]
    left_out = [name for name in spans if name not in state]
    tied = [
        name for name in left_out if any(begin <= spans[name][0] and spans[name][1] <= end for begin, end in held)
    ]
    return {**state, **{name: own[name] for name in tied}}


def fixed_records(module: torch.nn.Module) -> int | None:
    """How many records an exported program was made for, if it takes no other number; None of other modules."""
    if not isinstance(module, torch.fx.GraphModule):
        return None
    inputs = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    sizes = [value.shape[0] for value in inputs if isinstance(value, torch.Tensor) and value.dim()]
    # A size that was exported as dynamic is a symbol.
    return next((size for size in sizes if isinstance(size, int)), None)


def _evaluated(module: torch.nn.Module) -> torch.nn.Module:
    with foreign("the module can't be set to eval mode:"):
        return module.eval()


def _load_exported(path: Path, device: torch.device) -> torch.nn.Module:
    with foreign(f"{path.name} can't be loaded as an exported program:"):  # it unpickles, so it runs any code
        program = torch.export.load(path)
        if device.type != "cpu":
            # Constants, new tensors and checks name the device that it was exported on; `module.to` moves weights.
            program = move_to_device_pass(program, device)
        module: torch.nn.Module = program.module()
    return module


def _unpickle(path: Path) -> torch.nn.Module:
    # Unpickling runs any code, such as a training script that ends itself.
    with foreign(f"{path.name} can't be unpickled:"):
        try:
            module = torch.load(path, map_location="cpu", weights_only=False)
        except (ImportError, AttributeError) as error:
            raise ModelError(
                f"{path.name} can't be unpickled, wanted the code of its classes where Python finds it (installed, or "
                "on PYTHONPATH, which the working folder is not), here and where it is served, or the module's "
                f"state_dict packed with --arch: {said(error)}"
            ) from error
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"{path.name} holds {type(module).__name__}, wanted a torch.nn.Module")
    return module


def _call_arch(arch: str, directory: Path) -> torch.nn.Module:
    source, _, name = arch.partition(":")
    with foreign(f"arch {arch} can't be imported:"):
        try:
            module = _import(source, directory)
        except ImportError as error:
            raise ModelError(
                f"arch {arch} can't be imported, wanted what it imports installed or on PYTHONPATH, here and where it "
                "is served, or only where it is packed with --runtime onnx or aot, whose archives need no code: "
                f"{said(error)}"
            ) from error
        maker = getattr(module, name, None)
        if not callable(maker):
            raise ModelError(f"arch {arch}: there is no callable {name}{_instead(module)}")
    with foreign(f"arch {arch} can't be called without arguments:"):
        made = maker()
    if not isinstance(made, torch.nn.Module):
        raise ModelError(f"arch {arch} returned {type(made).__name__}, wanted a torch.nn.Module")
    return made


def _instead(module: ModuleType) -> str:
    """What a module defines that could be meant."""
    names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")
             and getattr(value, "__module__", None) == module.__name__]
    more = [f"{len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    return f", wanted one of {', '.join(names[:_MOST_NAMED] + more)}" if names else ""


def _import(source: str, directory: Path) -> ModuleType:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    path = directory / source
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no file {source}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
