"""What bench asks of the handler: answers in JSON lines from a process as a worker's is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from batch_client.bench import workers
from batch_handler.measure import prepare
from batch_handler.model import Model, ModelLoadError, Tuning


def ask(*words, stdin="", environ=None):
    return subprocess.run([sys.executable, "-m", "batch_handler.measure", *map(str, words)], input=stdin, text=True,
                          capture_output=True, timeout=120, check=False, env={**os.environ, **(environ or {})})


@pytest.fixture(scope="module")
def prepared(tiny_dir, pack_request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return folder, prepare(pack_request.output, folder)


def test_an_archive_is_described_and_unpacked(prepared, tiny):
    folder, said = prepared
    assert (said["name"], said["digest"], said["micro_batch"]) == ("tiny", tiny.digest, tiny.micro_batch)
    assert said["runtimes"][0] == "eager"
    assert said["record_bytes"] == 36
    assert said["metadata"]["parameters"] == {"model_digest": tiny.digest, "micro_batch": tiny.micro_batch}
    wanted = tiny.metadata().to_json()
    assert [said["metadata"][name] for name in ("name", "inputs", "outputs")] == [
        wanted[name] for name in ("name", "inputs", "outputs")]
    assert Model.open(folder / "model").digest == tiny.digest


def test_the_archive_without_a_model_gives_zeros_under_another_digest(prepared, tiny, tmp_path):
    folder, _ = prepared
    with zipfile.ZipFile(folder / "noop.mar") as mar:
        assert "MAR-INF/MANIFEST.json" in mar.namelist()
        mar.extractall(tmp_path)
    noop = Model.open(tmp_path)
    assert noop.digest != tiny.digest
    assert noop.numerics["runtime"] == "noop"
    scores, = noop.score_bulk([np.zeros((50, 6, 6), np.uint8)])
    assert scores.shape == (50, 3)
    assert not scores.any()


def test_no_setting_makes_a_models_archive_give_zeros(prepared):
    with pytest.raises(ModelLoadError, match="runtime is 'noop', wanted one of eager"):
        Model.open(prepared[0] / "model", Tuning(runtime="noop"))


def test_scoring_answers_each_window(prepared):
    environ = {"BATCH_HANDLER_MICRO_BATCH": "32"}
    done = ask("score", prepared[0] / "model", -1, stdin="64\n0.05\n0.05\n", environ=environ)
    ready, told, *windows = map(json.loads, done.stdout.splitlines())
    assert ready["ready"]
    assert ready["micro_batch_ms"] > 0
    assert told == {"request_records": 64}
    assert len(windows) == 2
    for window in windows:
        assert window["records"] % 64 == 0
        assert window["records"] > 0
        assert window["seconds"] >= 0.05


@pytest.mark.parametrize(("words", "environ", "reason"), [
    (("score", "{model}", -1), {"BATCH_HANDLER_RUNTIME": "tensorrt"}, "runtime is 'tensorrt'"),
    (("score", "{folder}", -1), {}, "model.json"),
    (("prepare", "{folder}/nothing.mar", "{folder}"), {}, "nothing.mar"),
    (("guess",), {}, "wanted prepare or score"),
])
def test_a_failure_is_an_answer_too(prepared, tmp_path, words, environ, reason):
    places = {"model": prepared[0] / "model", "folder": tmp_path}
    done = ask(*(str(word).format(**places) for word in words), environ=environ)
    assert done.returncode == 1
    assert reason in json.loads(done.stdout)["error"]


async def test_an_archive_may_take_longer_to_unpack_than_a_window_to_end(tiny_dir, pack_request, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 0.0)
    words = ["prepare", str(pack_request.output), str(tmp_path)]
    assert (await workers.ask_handler(words, os.environ))["name"] == "tiny"


NOISY = """
import os
import sys

from batch_handler import measure


def prepare(archive, folder):
    print("hello", flush=True)
    os.write(1, b"from a library")
    return {"name": "x"}


measure.prepare = prepare
sys.exit(measure.main(["prepare", "a", "b"]))
"""


def test_what_a_model_prints_is_no_answer():
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True, timeout=120, check=False)
    assert json.loads(done.stdout) == {"name": "x"}
    assert "hello" in done.stderr
