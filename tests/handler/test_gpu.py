"""What a GPU's worker is held to, as far as a machine without one can show it."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
import zipfile

import numpy as np
import pytest
import torch

from batch_client import machine
from batch_handler import scoring
from batch_handler.archive import PackRequest, pack
from batch_handler.draft import OutputDraft
from batch_handler.model import Model, ModelLoadError, Tuning
from batch_handler.runtimes import device as devices
from batch_handler.runtimes.device import NAMED_GPUS, CpuDevice, DeviceError, open_device
from batch_handler.runtimes.eager import build_module
from batch_handler.runtimes.slots import SlotRuntime
from batch_handler.runtimes.torchscript import open_torchscript
from batch_handler.scoring import Failure, Query, Scorer
from batch_handler.signature import InputSpec, OutputSpec, Weights

INPUT, OUTPUT = InputSpec("x", np.dtype("f4"), (4,), (4,)), OutputSpec("y", np.dtype("f4"), (1,))


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", NAMED_GPUS):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("visible", [None, "0", "GPU-a,GPU-b"])
def test_a_gpu_that_torch_cant_use_is_an_error_and_no_reason_to_be_slow(monkeypatch, visible):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError, match=r"has GPU 0, which torch .* can't use: that is made for .*; wanted a driver"):
        open_device(0)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(("gpu", "visible"), [(None, None), (-1, None), (0, ""), (0, "-1"), (0, "NoDevFiles")])
def test_the_cpu_is_for_who_has_no_gpu_or_wants_none(monkeypatch, gpu, visible):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert isinstance(open_device(gpu), CpuDevice)


@pytest.mark.usefixtures("no_cuda")
def test_a_worker_sees_the_gpus_that_were_named(monkeypatch):
    """As the client names them. TorchServe was given their indexes; CUDA reads the variable when it is first used,
    which is after this.
    """
    monkeypatch.setattr(machine, "_gpu_names", lambda _: ["GPU", "GPU"])
    given = machine.gpu_variables({"CUDA_VISIBLE_DEVICES": "GPU-a,MIG-b"})
    assert set(given) == {"CUDA_VISIBLE_DEVICES", NAMED_GPUS}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError):
        open_device(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a,MIG-b"


EXACT = """
import os
import torch
from batch_handler.runtimes.device import set_exact

cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
torch.backends.fp32_precision = "tf32"  # which the older settings do not undo
cudnn.benchmark, matmul.allow_tf32, cudnn.allow_tf32 = True, True, True
for precision, kept in (("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")):
    torch.use_deterministic_algorithms(mode=False)
    set_exact(precision)
    assert {cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision} == {kept}, precision
    assert (cudnn.allow_tf32, matmul.allow_tf32) == (kept == "tf32",) * 2, precision
    assert torch.are_deterministic_algorithms_enabled()
    assert not cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""


def test_exact_settings_win_over_what_a_models_code_has_set():
    """In a process of its own: they are settings of a whole process."""
    environ = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    done = subprocess.run([sys.executable, "-c", EXACT], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_settings_are_restored_once_a_models_own_code_has_run(tmp_path):
    """Here the number of threads, which is in the fingerprint; on a GPU all that `set_exact` sets."""
    (tmp_path / "arch.py").write_text(
        "import torch\n\ndef make_model():\n    torch.set_num_threads(1)\n    return torch.nn.Linear(4, 1)\n")
    torch.save(torch.nn.Linear(4, 1).state_dict(), tmp_path / "w.pt")
    archive = pack(PackRequest(
        model=tmp_path / "w.pt", output=tmp_path / "m.mar", name="m", version="1", inputs=(INPUT,),
        outputs=(OutputDraft("y"),), arch=f"{tmp_path / 'arch.py'}:make_model", model_config=b"minWorkers: 1\n",
        micro_batch=8))
    unpacked = tmp_path / "model"
    zipfile.ZipFile(archive).extractall(unpacked)
    before = torch.get_num_threads()
    try:
        model = Model.open(unpacked, Tuning(threads=2))
        assert (torch.get_num_threads(), model.numerics["threads"]) == (2, 2)
    finally:
        torch.set_num_threads(before)


def test_what_a_device_says_as_it_is_opened_is_a_reason(tiny_dir, monkeypatch):
    """Engines raise plain RuntimeErrors there, which would be a traceback in the log and nothing to the client."""
    for said, wanted in (("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`", "memory is full"),
                         ("CUDA error: invalid device ordinal", "the device's context is lost"),
                         ("no such thing", "RuntimeError: no such thing")):
        def failing(*_: object, said: str = said, **__: object) -> None:
            raise RuntimeError(said)

        monkeypatch.setattr("batch_handler.model.open_device", failing)
        with pytest.raises(ModelLoadError, match=wanted) as caught:
            Model.open(tiny_dir, Tuning(gpu_id=0))
        assert "\n" not in str(caught.value)


def scorer_of(module, places=16):
    device = CpuDevice(1)
    device.stack_bytes = 0
    return Scorer(SlotRuntime(module, device, (INPUT,), (OUTPUT,), numerics={}), (OUTPUT,), places)


def full(activation, held):
    deeper = activation.clone()
    held.append(weakref.ref(deeper))
    raise torch.OutOfMemoryError("CUDA out of memory")


class Hungry(torch.nn.Module):
    """Has memory for so many records, and says of each run how much earlier ones still hold."""

    def __init__(self, most):
        super().__init__()
        self.most, self.armed, self.runs, self.held = most, False, [], []

    def forward(self, x):
        activation = torch.zeros(len(x), 100)
        if self.armed:
            self.runs.append((len(x), sum(ref() is not None for ref in self.held)))
            self.held.append(weakref.ref(activation))
            if len(x) > self.most:
                try:
                    full(activation, self.held)
                except torch.OutOfMemoryError:
                    kept = activation.clone()
                    self.held.append(weakref.ref(kept))
                    raise RuntimeError("CUDA out of memory, said again") from KeyError("another cause")
        return x.sum(1, keepdim=True) + activation[:, :1]


def test_what_had_no_room_is_let_go_before_less_is_tried():
    module = Hungry(most=2)
    scorer = scorer_of(module)
    module.armed = True
    values = np.arange(64, dtype="f4").reshape(16, 4)
    (score,) = scorer.score([Query((values,))])
    np.testing.assert_array_equal(score.outputs[0][:, 0], values.sum(1))
    assert [records for records, _ in module.runs] == [16, 8, 4] + [2] * 8  # the first that fails is the last
    assert {held for _, held in module.runs} == {0}


def test_a_query_that_has_room_nowhere_is_refused_for_that():
    module = Hungry(most=0)
    scorer = scorer_of(module)
    module.armed = True
    (failure,) = scorer.score([Query((np.ones((16, 4), "f4"),))])
    assert isinstance(failure, Failure)
    assert failure.status == 507
    assert [records for records, _ in module.runs] == [16, 8, 4, 2, 1]


def test_a_lost_worker_has_its_reason_heard_before_it_ends(monkeypatch, caplog):
    steps = []
    monkeypatch.setattr(scoring.logging, "shutdown", lambda: steps.append("log"))
    monkeypatch.setattr(scoring.time, "sleep", steps.append)
    monkeypatch.setattr(scoring.os, "_exit", lambda code: steps.append(f"exit {code}"))
    scoring.exit_process(devices.LostDeviceError("the device's context is lost"))
    assert steps == ["log", scoring.HEARD_SECONDS, "exit 71"]
    assert "the device's context is lost" in caplog.text


class Shifted(torch.nn.Module):
    """Makes a tensor, and casts: an exported program has the device of both inside."""

    def forward(self, x):
        return x.half().float() + torch.arange(4, dtype=torch.float32, device=x.device)


def test_an_exported_program_goes_with_what_it_names_to_another_device(tmp_path):
    many = torch.export.Dim("many", min=1, max=64)
    program = torch.export.export(Shifted(), (torch.zeros(8, 4),), dynamic_shapes=({0: many},))
    torch.export.save(program, tmp_path / "m.pt2")
    weights = Weights("m.pt2", "exported")
    meta = torch.device("meta")
    assert build_module(weights, tmp_path, meta)(torch.zeros(3, 4, device=meta)).device == meta
    with pytest.raises(RuntimeError, match="device"):  # what it was before
        build_module(weights, tmp_path).to(meta)(torch.zeros(3, 4, device=meta))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's, of what the product traces
def test_graphs_are_fused_on_a_cpu_alone(tiny_dir, monkeypatch):
    """cuDNN's convolution with ReLU inside is called by torch with `deterministic` off."""
    description = Model.open(tiny_dir, Tuning(threads=1)).description
    device = CpuDevice(1)
    assert open_torchscript(description, tiny_dir, device, "float32").numerics["optimised"] == "optimised"

    class Elsewhere:
        type = "cuda"

    monkeypatch.setattr("batch_handler.runtimes.torchscript.load_module",
                        lambda *_: (build_module(description.weights, tiny_dir), "contiguous"))
    monkeypatch.setattr("batch_handler.runtimes.torchscript._trace", lambda module, *_: torch.jit.script(
        torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU()).eval()))
    elsewhere = CpuDevice(1)
    elsewhere.torch_device = Elsewhere()
    monkeypatch.setattr("batch_handler.runtimes.torchscript.SlotRuntime",
                        lambda script, *_, numerics, **__: (script, numerics))
    script, numerics = open_torchscript(description, tiny_dir, elsewhere, "float32")
    assert numerics["optimised"] == "frozen"
    assert "aten::_convolution" in str(script.graph) or "aten::conv2d" in str(script.graph)
