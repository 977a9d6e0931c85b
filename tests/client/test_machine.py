"""What kind of machine this is, and which GPUs it has."""

import pytest

from batch_client import machine
from batch_client.machine import cpu_kind, device, gpu_variables, gpus


@pytest.mark.parametrize(("text", "machine", "kind"), [
    ("flags\t\t: fpu avx avx2\n", "x86_64", "avx2"),
    ("flags\t: avx2 avx512f avx512_bf16\nflags\t: avx2\n", "x86_64", "avx512"),
    ("flags\t: avx2 avx512f amx_tile\n", "x86_64", "amx"),
    ("flags\t: sse2\n", "x86_64", "x86_64"),
    ("Features\t: fp asimd\n", "aarch64", "neon"),
    ("Features\t: fp asimd sve\n", "aarch64", "sve"),
    ("", "arm64", "arm64"),
    ("", "", "any"),
])
def test_the_kind_of_a_cpu(text, machine, kind):
    assert cpu_kind(text, machine) == kind


@pytest.mark.parametrize(("listed", "visible", "name"), [
    ("GPU 0: NVIDIA A10G (UUID: GPU-a)", None, "cuda-NVIDIA_A10G"),
    ("GPU 0: NVIDIA A10G (UUID: GPU-a)\nGPU 1: NVIDIA A10G (UUID: GPU-b)", None, "cuda-NVIDIA_A10G-2gpus"),
    ("GPU 0: NVIDIA A10G (UUID: GPU-a)\nGPU 1: Tesla T4 (UUID: GPU-b)", None, "cuda-NVIDIA_A10G+Tesla_T4-2gpus"),
    ("GPU 0: NVIDIA A10G (UUID: GPU-a)\nGPU 1: Tesla T4 (UUID: GPU-b)", "1", "cuda-Tesla_T4"),
    ("GPU 0: NVIDIA A10G (UUID: GPU-a)\nGPU 1: Tesla T4 (UUID: GPU-b)", "GPU-a", "cuda-NVIDIA_A10G"),
])
def test_gpus_are_named_as_their_driver_names_them(tmp_path, listed, visible, name):
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\necho >> {tmp_path}/starts\ncat <<'END'\n{listed}\nEND\n")
    driver.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert device(environ) == name
    assert device(environ | {"CUDA_VISIBLE_DEVICES": ""}).startswith("cpu-")
    assert gpus(environ) == gpus(environ)
    assert (tmp_path / "starts").read_text() == "\n"  # the program is slow


@pytest.mark.parametrize(("visible", "given"), [
    (None, {}),
    ("", {"CUDA_VISIBLE_DEVICES": ""}),
    ("-1", {"CUDA_VISIBLE_DEVICES": ""}),
    ("1", {"CUDA_VISIBLE_DEVICES": "1"}),
    ("0, 1", {"CUDA_VISIBLE_DEVICES": "0,1"}),
    ("GPU-b", {"CUDA_VISIBLE_DEVICES": "0", "BATCH_HANDLER_NAMED_GPUS": "GPU-b"}),
    ("MIG-1 ,MIG-2", {"CUDA_VISIBLE_DEVICES": "0,1", "BATCH_HANDLER_NAMED_GPUS": "MIG-1,MIG-2"}),
])
def test_torchserve_gets_indexes_of_gpus_and_the_workers_their_names(tmp_path, monkeypatch, visible, given):
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    (tmp_path / "nvidia0").touch()
    environ = {"PATH": "/nowhere"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert gpu_variables(environ) == given
    (tmp_path / "nvidia0").unlink()  # no GPU here, whatever a variable says
    assert gpu_variables(environ) == ({} if visible is None else {"CUDA_VISIBLE_DEVICES": ""})


def test_a_variable_makes_no_gpu_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    environ = {"PATH": "/nowhere", "CUDA_VISIBLE_DEVICES": "0"}
    assert device(environ).startswith("cpu-")
    for name in ("nvidia0", "nvhost-gpu", "kfd"):
        (tmp_path / name).touch()
        assert device(environ) == "cuda-GPU"
        (tmp_path / name).unlink()
