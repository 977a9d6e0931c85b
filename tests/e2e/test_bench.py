"""`bench --save` on real parts, and who takes what it saves."""

import json
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import zarr

from support.cli import ServeProcess, command, run_cli


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
    done = run_cli(["bench", archive, source, "--output", scratch, "--budget", "20", "--save", "--json"], clean_environ,
                   check=True)
    assert not [path for path in scratch.rglob("*") if path.is_file()]
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
    end = time.monotonic() + 30  # the file is written just after `serve` has said where it is
    while not server.token_file.exists() and time.monotonic() < end:
        time.sleep(0.02)
    request = urllib.request.Request(f"{server.url}/predictions/toy", headers=server.headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def test_everything_is_measured_and_the_best_is_saved(benched):
    archive, said, progress = benched
    path, value = saved(archive)
    assert said["tuning_file"] == str(path)
    assert set(said["ceilings"]) == {"model", "wire", "read", "write"}
    assert min(*said["ceilings"].values(), said["whole"]) > 0
    assert said["limited_by"] in said["ceilings"]
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bench_that_is_stopped_leaves_nothing(toy_archive, clean_environ, tmp_path, number):
    environ = {**clean_environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command("bench", toy_archive, "--budget", "600"), env=environ, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as bench:
        said = [bench.stderr.readline() for _ in range(3)]
        assert "best" in said[-1]
        family = psutil.Process(bench.pid).children(recursive=True)
        assert family
        bench.send_signal(number)
        _, rest = bench.communicate(timeout=60)
    assert bench.returncode == 75
    assert rest.splitlines()[-1] == "batch-client: stopped: nothing was saved, and nothing is left running"
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert list(tmp_path.iterdir()) == []
    assert not Path(toy_archive).with_suffix(".tuning").exists()


@pytest.mark.parametrize(("words", "code", "reason"), [
    (["nothing.mar"], 69, "no such file"),
    (["{toy}", "nothing.zarr"], 65, "no Zarr array"),
    (["{toy}", "--budget", "0"], 64, "--budget 0: wanted seconds"),
    (["{toy}", "--output", "x"], 64, "name an INPUT"),
    (["s3://bucket/toy.mar", "--save"], 64, "not on this machine"),
    (["{text}"], 69, "not a zip file"),
])
def test_what_can_t_be_measured_is_refused_in_one_line(toy_archive, clean_environ, tmp_path, words, code, reason):
    (tmp_path / "text.mar").write_text("no archive")
    places = {"toy": toy_archive, "text": tmp_path / "text.mar"}
    done = run_cli(["bench", *(word.format(**places) for word in words)], clean_environ, cwd=tmp_path)
    assert done.returncode == code
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
