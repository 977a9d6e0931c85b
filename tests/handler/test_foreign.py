"""What engines and models raise: told apart, in one bounded line, and blamed on nobody who is not to blame."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from batch_handler import archive as archives
from batch_handler import model as models
from batch_handler.archive import ArchiveError, pack
from batch_handler.exchange import failed
from batch_handler.model import Model, ModelLoadError, Tuning
from batch_handler.runtimes.device import CapacityError, CpuDevice, LostDeviceError
from batch_handler.runtimes.foreign import classify, foreign, raise_if_device, said
from batch_handler.runtimes.slots import SlotRuntime
from batch_handler.runtimes.transform import ModelError
from batch_handler.scoring import Failure, Query, Score, Scorer
from batch_handler.signature import InputSpec, OutputSpec


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("x"), CapacityError),
        (RuntimeError("CUDA error: out of memory"), CapacityError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), CapacityError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), CapacityError),
        (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel"), LostDeviceError),
        (
            RuntimeError(
                "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Gemm node. "
                "Status Message: CUDA failure 700: an illegal memory access was encountered ; GPU=0"
            ),
            LostDeviceError,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), CapacityError),
        (RuntimeError("GET was unable to find an engine to execute this computation"), CapacityError),
        (RuntimeError("CUDA driver error: an illegal memory access was encountered"), LostDeviceError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), LostDeviceError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling"), RuntimeError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling"), RuntimeError),
        (RuntimeError("shape mismatch"), RuntimeError),
        (ValueError("CUDA error"), ValueError),
        (MemoryError(), CapacityError),
        (CapacityError("CUDA error: out of memory"), CapacityError),
    ],
)
def test_errors_are_told_apart(error, kind):
    assert type(classify(error)) is kind
    assert "\n" not in str(classify(error))


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(3), ValueError("x"), KeyError("x")])
def test_whatever_a_model_raises_is_a_model_error(error):
    """contextlib takes a StopIteration, and an error that it is the cause of, for the generator's own."""
    with pytest.raises(ModelError, match=rf"^the model raised {type(error).__name__}"), foreign("the model raised"):
        raise error


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's, of what the product traces
def test_what_torchscript_says_is_what_the_operation_said():
    """Its first lines only say where."""
    table = torch.nn.Embedding(3, 2)
    traced = torch.jit.trace(table, torch.tensor([0]))
    errors = []
    for module in (table, traced):
        with pytest.raises((IndexError, RuntimeError)) as caught:
            module(torch.tensor([7]))
        errors.append(caught.value)
    assert "TorchScript interpreter" in str(errors[1])
    assert said(errors[0]) == "IndexError: index out of range in self"
    assert said(errors[1]) == "RuntimeError: index out of range in self"
    lost = str(errors[1]).replace("index out of range in self", "CUDA error: assert\nCompile with `TORCH_USE_CUDA_DSA`")
    assert said(RuntimeError(lost)) == "RuntimeError: CUDA error: assert"
    assert said(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert said(RuntimeError(" \n")) == "RuntimeError"


def test_a_device_error_is_no_cause_of_itself():
    error = CapacityError("memory is full")
    with pytest.raises(CapacityError) as caught:
        raise_if_device(error)
    assert caught.value is error
    assert error.__cause__ is None


def test_what_a_model_says_at_length_is_cut(caplog):
    """A reply of more than 64 MiB would end the worker, and a client looks at 64 KiB of one that is no success."""
    def wordy(values: torch.Tensor) -> torch.Tensor:
        if bool((values == 13).any()):
            raise ValueError(f"bad values {values.flatten().tolist() * 1000}")
        return values * 2

    spec, output = InputSpec("x", np.dtype("i2"), (16,), (16,)), OutputSpec("y", np.dtype("f4"), (16,))
    scorer = Scorer(SlotRuntime(wordy, CpuDevice(), [spec], [output], numerics={}), [output], 4)
    good, bad = np.ones((3, 16), np.int16), np.full((1, 16), 13, np.int16)
    fine, failure = scorer.score([Query((good,)), Query((bad,))])
    assert isinstance(fine, Score)
    assert isinstance(failure, Failure)
    assert failure.message.startswith("the model raised ValueError: bad values [13.0, 13.0")
    assert len(failed(failure).body) < 500
    assert len(caplog.text) < 600


HUNGRY = """
import torch

MORE = 1 << 60  # than any machine has


class Hungry(torch.nn.Linear):
    def __init__(self):
        super().__init__(36, 3)

    def forward(self, x):
        return super().forward(x.flatten(1))


class AtStart(Hungry):
    def __init__(self):
        super().__init__()
        {deed}


class WithWeights(Hungry):
    def load_state_dict(self, *args, **kwargs):
        {deed}


class Evaluated(Hungry):
    def train(self, mode=True):
        {deed}


class Moved(Hungry):
    def to(self, *args, **kwargs):
        {deed}


class Computing(Hungry):
    def forward(self, x):
        {deed}


class Traced(Hungry):
    def forward(self, x):
        if torch.jit.is_tracing():
            {deed}
        return super().forward(x)


def imported():
    raise AssertionError("not reached")


if {whole}:
    {deed}
"""


@pytest.mark.parametrize("deed", ["bytearray(MORE)", "torch.empty(MORE, dtype=torch.uint8)"])
@pytest.mark.parametrize("name", ["AtStart", "WithWeights", "Evaluated", "Moved", "Computing", "Traced", "imported"])
def test_memory_that_is_full_is_not_blamed_on_the_model(name, deed, pack_request, tmp_path):
    source = tmp_path / "hungry.py"
    source.write_text(HUNGRY.format(deed=deed, whole=name == "imported"))
    torch.save(torch.nn.Linear(36, 3).state_dict(), tmp_path / "w.pt")
    request = dataclasses.replace(pack_request, model=tmp_path / "w.pt", arch=f"{source}:{name}", outputs=(),
                                  runtime="torchscript", output=tmp_path / "x.mar")
    with pytest.raises(ArchiveError, match=r"^w\.pt: memory is full: \w+"):
        pack(request)


def test_nor_on_a_file(pack_request, tmp_path):
    class Hungry:
        def __reduce__(self):
            return (bytearray, (1 << 60,))

    path = tmp_path / "m.pt"
    torch.save(Hungry(), path)
    with pytest.raises(ArchiveError, match=r"^m\.pt: memory is full: MemoryError"):
        pack(dataclasses.replace(pack_request, model=path, trust_pickle=True, arch=None, output=tmp_path / "x.mar"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_nor_is_another_kind_of_file_taken_for_it(error, pack_request, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(ArchiveError, match=r"^tiny\.pt: memory is full: \w+"):
        pack(dataclasses.replace(pack_request, output=tmp_path / "x.mar"))


def test_a_worker_says_so_and_serves_no_graph_that_memory_kept_from_being_optimised(tiny_dir, monkeypatch):
    def full(script):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.jit, "freeze", full)
    with pytest.raises(ModelLoadError, match=r"memory is full: RuntimeError: DefaultCPUAllocator"):
        Model.open(tiny_dir, Tuning(runtime="torchscript"))


def test_so_do_both_where_our_own_arrays_have_no_room(tiny_dir, pack_request, tmp_path, monkeypatch):
    def full(*args):
        raise MemoryError("Unable to allocate 1. EiB")

    monkeypatch.setattr(models, "read_golden", full)
    words = "memory is full: MemoryError: Unable to allocate 1. EiB$"
    with pytest.raises(ModelLoadError, match=words):
        Model.open(tiny_dir)
    with pytest.raises(ArchiveError, match=rf"^tiny\.pt: {words}"):
        pack(dataclasses.replace(pack_request, output=tmp_path / "x.mar"))
    monkeypatch.setattr(archives, "golden_records", full)
    with pytest.raises(ArchiveError, match=rf"^tiny\.pt: {words}"):
        pack(dataclasses.replace(pack_request, output=tmp_path / "x.mar"))
