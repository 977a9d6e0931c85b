"""What kind of machine this is, and which GPUs it has."""

import pytest

from batch_client import machine
from batch_client.machine import cores, cpu_kind, device, gpu_variables, gpus


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


@pytest.mark.parametrize(("membership", "files", "wanted"), [
    ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),  # a container with a control group namespace
    ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1),  # a part of a core is left
    ("0::/a\n", {"a/cpu.max": "1000 100000\n"}, 1),
    ("0::/a\n", {"b/cpu.max": "100000 100000\n", "a/cpu.max": "max 100000\n"}, 64),
    ("4:cpu,cpuacct:/ecs/task/it\n0::/\n", {"cpu/ecs/task/cpu.cfs_quota_us": "300000\n",
                                            "cpu/ecs/task/cpu.cfs_period_us": "100000\n",
                                            "cpu/ecs/task/it/cpu.cfs_quota_us": "-1\n",
                                            "cpu/ecs/task/it/cpu.cfs_period_us": "100000\n"}, 3),
    ("1:cpu:/the/hosts/path\n", {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ("2:cpuset:/a\n", {"cpu/a/cpu.cfs_quota_us": "100000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 64),
    (None, {"cpu.max": "100000 100000\n"}, 64),
])
def test_the_cores_are_those_of_the_tightest_control_group(tmp_path, monkeypatch, membership, files, wanted):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    assert cores(tmp_path / "groups", tmp_path / "membership") == wanted


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
