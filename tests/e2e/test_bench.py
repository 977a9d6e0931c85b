"""`bench --save` on real parts, and who takes what it saves."""

import asyncio
import json
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import psutil
import pytest
import zarr

from batch_client.bench.verdict import Ceilings
from batch_client.bench.workers import ask_handler, workers_of
from batch_client.bottleneck import Limit
from batch_client.errors import ServingError
from batch_client.eventloop import run_until_complete
from batch_client.plan import default_request
from support.cli import ServeProcess, command, heeded, run_cli, until

SLOW = """
import time

import torch


class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(144, 2)

    def forward(self, images):
        time.sleep(0.2)
        return self.linear(images.flatten(1))
"""


@pytest.fixture(scope="module")
def source(toy_images, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "in.zarr"
    zarr.create_array(path, data=toy_images, chunks=(100, 12, 12))
    return path


@pytest.fixture(scope="module")
def benched(toy_archive, source, clean_environ, tmp_path_factory):
    """An archive with its tuning file, what bench printed, and what it said meanwhile."""
    folder = tmp_path_factory.mktemp("benched")
    archive = Path(shutil.copy(toy_archive, folder))
    scratch = folder / "scratch"
    done = run_cli(["bench", archive, source, "--output", scratch, "--budget", "5", "--save", "--json"], clean_environ,
                   check=True)
    assert not scratch.exists()
    return archive, json.loads(done.stdout), done.stderr


def saved(archive):
    (path,) = (archive.parent / f"{archive.stem}.tuning").iterdir()
    return path, json.loads(path.read_text())


def altered(archive, folder, **changes):
    """A copy of an archive whose tuning file says something else."""
    path, value = saved(archive)
    copy = Path(shutil.copy(archive, folder))
    (folder / path.parent.name).mkdir()
    (folder / path.parent.name / path.name).write_text(json.dumps(value | changes))
    return copy


def metadata(server):
    request = urllib.request.Request(f"{server.url}/predictions/toy", headers=server.headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def test_everything_is_measured_and_the_best_is_saved(benched):
    archive, said, progress = benched
    path, value = saved(archive)
    assert said["tuning_file"] == str(path)
    assert set(said["ceilings"]) == {"model", "wire", "reading", "writing"}
    assert min(*said["ceilings"].values(), said["whole"]) > 0
    lowest = min(said["ceilings"], key=said["ceilings"].get)
    verdict = Ceilings({Limit(part): rate for part, rate in said["ceilings"].items()}, lower=True)
    # Far below the lowest ceiling it is the run's own, `test_bench_report.py`.
    assert said["limited_by"] in {limit.value for limit in Limit}
    assert said["advice"] == verdict.advice or said["whole"] < said["ceilings"][lowest]
    assert said["tried"][0]["runtime"] == "eager"
    assert {name: value[name] for name in said["best"]} == said["best"]
    assert value["records_per_s"] == said["ceilings"]["model"]
    assert value["table"] == said["tried"]
    assert "model alone: eager, micro-batches of 16" in progress
    assert "wire alone" in progress


def test_serve_takes_the_file_and_its_fingerprint_says_so(benched, toy_server, clean_environ, tmp_path):
    archive = altered(benched[0], tmp_path, micro_batch=64, workers=1, threads=1, runtime="torchscript",
                      records_per_s=4321.5)
    with ServeProcess(archive, tmp_path, clean_environ) as server:
        tuned = metadata(server)
    plain = metadata(toy_server)
    parameters = tuned["parameters"]
    assert (parameters["micro_batch"], parameters["numerics"]["runtime"]) == (64, "torchscript")
    assert parameters["ceiling_records_per_s"] == 4321.5
    assert parameters["model_digest"] == plain["parameters"]["model_digest"]
    assert parameters["fingerprint"] != plain["parameters"]["fingerprint"]
    assert "ceiling_records_per_s" not in plain["parameters"]


def test_a_run_takes_the_file_too_and_a_flag_wins_over_it(benched, source, clean_environ, tmp_path):
    archive = altered(benched[0], tmp_path, micro_batch=64, workers=2, threads=2)
    words = ["run", source, tmp_path / "out.zarr", "--archive", archive, "--workers", "1x1", "--json"]
    run_cli(words, clean_environ, check=True)
    run = json.loads((tmp_path / "out.zarr" / "_run" / "spec.json").read_text())
    assert run["micro_batch"] == 64
    assert run["numerics"]["threads"] == 1


def test_a_file_that_was_measured_for_another_model_serves_nothing(benched, source, clean_environ, tmp_path):
    archive = altered(benched[0], tmp_path, model_digest="sha256:" + "0" * 64)
    done = run_cli(["run", source, tmp_path / "out.zarr", "--archive", archive], clean_environ)
    assert done.returncode == 69
    assert "was measured for the model sha256:000000000000" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_was_measured_is_printed_although_it_can_t_be_saved(toy_archive, clean_environ, tmp_path):
    archive = Path(shutil.copy(toy_archive, tmp_path))
    with subprocess.Popen(command("bench", archive, "--budget", "1", "--save", "--json"), env=clean_environ, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as bench:
        next(line for line in bench.stderr if line.startswith("model alone"))
        archive.with_suffix(".tuning").write_text("in the way")
        said, rest = bench.communicate(timeout=120)
    assert bench.returncode == 74
    assert json.loads(said)["tuning_file"] is None
    assert json.loads(said)["ceilings"]["wire"] > 0
    assert rest.splitlines()[-1].endswith("json can't be written: File exists")


def test_a_better_file_is_kept_and_what_was_measured_is_printed(benched, clean_environ, tmp_path):
    archive = altered(benched[0], tmp_path, records_per_s=1e12)
    path, value = saved(archive)
    done = run_cli(["bench", archive, "--budget", "1", "--save", "--json"], clean_environ, check=True)
    said = json.loads(done.stdout)
    assert said["tuning_file"] is None
    assert said["tuning_kept"]["file"] == str(path)
    assert said["tuning_kept"]["records_per_s"] == 1e12 > said["ceilings"]["model"]
    assert f"kept: {path} says 1,000,000,000,000 records/s, measured " in done.stderr
    assert saved(archive) == (path, value)


def test_the_best_settings_are_saved_before_anything_after_them_can_fail(toy_archive, clean_environ, tmp_path):
    """The last chunk is not there, which reading finds; a run would go on with --allow-missing, and so does bench."""
    archive = Path(shutil.copy(toy_archive, tmp_path))
    array = zarr.create_array(tmp_path / "hole.zarr", shape=(40_000, 12, 12), chunks=(8192, 12, 12), dtype="uint8")
    array[:32_768] = 1
    words = ["bench", archive, tmp_path / "hole.zarr", "--budget", "3", "--save"]
    done = run_cli(words, clean_environ)
    assert done.returncode == 65
    assert "chunk c/4/0/0 (among records" in done.stderr.splitlines()[-1]
    assert f"saved: {saved(archive)[0]}" in done.stderr.splitlines()
    saved(archive)[0].unlink()
    done = run_cli([*words, "--allow-missing"], clean_environ, check=True)
    assert done.stdout.endswith(f"saved: {saved(archive)[0]}\n")


def test_a_worker_that_is_killed_between_windows_is_told_of_in_one_line(toy_archive, clean_environ, tmp_path):
    async def bench():
        await ask_handler(["prepare", str(toy_archive), str(tmp_path)], clean_environ)
        async with workers_of(tmp_path / "model", clean_environ, count=1, records_of=lambda _: 16, gpus=0,
                              seconds=120) as workers:
            assert await workers.window(0.01) > 0
            (child,) = (one for one in psutil.Process().children() if "batch_handler.measure" in one.cmdline())
            child.kill()
            # The loop takes notice of its end: here nobody takes its exit code away.
            await asyncio.to_thread(until, lambda: not child.is_running())
            await asyncio.sleep(0.2)  # the loop has seen its pipes end
            await workers.window(0.01)

    with pytest.raises(ServingError, match="the process ended with -9") as caught:
        run_until_complete(bench())
    assert "\n" not in str(caught.value)


def test_a_model_is_measured_in_requests_of_the_size_that_a_run_would_send(clean_environ, tmp_path):
    import safetensors.torch

    scope = {}
    exec(SLOW, scope)  # noqa: S102 - the text above
    (tmp_path / "slow.py").write_text(SLOW)
    safetensors.torch.save_file(scope["Slow"]().state_dict(), tmp_path / "slow.safetensors")
    run_cli(["pack", "slow.safetensors", "--arch", "slow.py:Slow", "--input", "image:uint8:12x12", "--model-shape",
             "1x12x12", "--micro-batch", "16", "-o", "slow.mar"], clean_environ, cwd=tmp_path, check=True)
    told = []

    def records_of(took):
        told.append(took)
        return default_request(144, 9, 16, 8192, took)

    async def bench():
        await ask_handler(["prepare", str(tmp_path / "slow.mar"), str(tmp_path)], clean_environ)
        async with workers_of(tmp_path / "model", clean_environ, count=2, records_of=records_of, gpus=0,
                              seconds=120) as workers:
            return workers.records

    assert run_until_complete(bench()) == 16
    assert min(told) >= 0.2
    assert default_request(144, 9, 16, 8192, None) == 7280


@pytest.mark.parametrize(("words", "said"), [
    (["w.safetensors"], "w.safetensors is not a model archive (MAR-INF/MANIFEST.json: File is not a zip file)"),
    (["ARCHIVE", "--precision", "tf32"], "toy.mar: precision is tf32, which is of CUDA GPUs"),
])
def test_what_cant_be_measured_is_named_as_it_was_given(words, said, toy_archive, clean_environ, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(bytes(100))
    words = [str(toy_archive) if word == "ARCHIVE" else word for word in words]
    environ = {**clean_environ, "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = run_cli(["bench", *words, "--budget", "5"], environ, cwd=tmp_path)
    assert done.returncode == 69
    last = done.stderr.splitlines()[-1]
    assert last.startswith("batch-client: ")
    assert said in last
    assert str(tmp_path / "batch-client-bench") not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bench_that_is_stopped_leaves_nothing(toy_archive, clean_environ, tmp_path, number):
    environ = {**clean_environ, "TMPDIR": str(tmp_path)}
    with heeded(number), subprocess.Popen(command("bench", toy_archive, "--budget", "600"), env=environ, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as bench:
        said = [bench.stderr.readline() for _ in range(3)]
        assert "best" in said[-1]
        family = psutil.Process(bench.pid).children(recursive=True)
        assert family
        bench.send_signal(number)
        _, rest = bench.communicate(timeout=60)
    assert bench.returncode == 75
    assert rest.splitlines()[-1] == "batch-client: stopped before the end; nothing is left running"
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert list(tmp_path.iterdir()) == []
    assert not Path(toy_archive).with_suffix(".tuning").exists()


@pytest.mark.parametrize(("words", "code", "reason"), [
    (["nothing.mar"], 69, "batch-client: archive nothing.mar: there is no such file"),
    (["{toy}", "nothing.zarr"], 65, "no Zarr array"),
    (["{toy}", "--budget", "0"], 64, "--budget 0: wanted seconds"),
    (["{toy}", "--output", "x"], 64, "name an INPUT"),
    (["s3://bucket/toy.mar", "--save"], 64, "not on this machine"),
    (["{text}"], 69, "not a zip file"),
    (["{toy}", "--budget", "nan"], 64, "wanted a finite number"),
    (["{toy}", "empty.zarr"], 65, "no records"),
    (["{toy}", "wide.zarr"], 65, "a record has shape (9, 12), model toy takes (12, 12)"),
    (["{toy}", "wide.zarr", "--output", "text.mar"], 64, "this is a file; wanted a folder"),
    (["{blocked}", "--save"], 64, "can't write there"),
    (["{toy}", "holes.zarr"], 65, "chunk c/0/0/0 (among records 0 to 4) is missing"),
    (["{toy}", "s3://[abc/x"], 64, "not a URL"),
])
def test_what_can_t_be_measured_is_refused_in_one_line(toy_archive, run_here, tmp_path, words, code, reason):
    (tmp_path / "text.mar").write_text("no archive")
    zarr.create_array(tmp_path / "empty.zarr", shape=(0, 12, 12), chunks=(1, 12, 12), dtype="uint8")
    zarr.create_array(tmp_path / "wide.zarr", shape=(5, 9, 12), chunks=(1, 9, 12), dtype="uint8")
    zarr.create_array(tmp_path / "holes.zarr", shape=(5, 12, 12), chunks=(5, 12, 12), dtype="uint8")
    blocked = Path(shutil.copy(toy_archive, tmp_path / "blocked.mar"))
    blocked.with_suffix(".tuning").write_text("in the way")
    places = {"toy": toy_archive, "text": tmp_path / "text.mar", "blocked": blocked}
    done = run_here(["bench", *(word.format(**places) for word in words)], tmp_path)
    assert done.returncode == code
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "model alone" not in done.stderr
