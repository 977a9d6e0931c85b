"""The command line as whoever starts it sees it: descriptors, signals, working folders."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import zarr

from batch_client.cli import main
from batch_client.machine import free_ports
from support.cli import command, heeded, run_cli, until


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_stream_is_no_reason_to_abort(closed, clean_environ, tmp_path):
    """A service manager may start it so."""
    zarr.create_array(tmp_path / "in.zarr", data=np.zeros((5, 2), np.uint8))
    for words, code in ((["status", "nothing"], 78), (["run", "in.zarr", "out", "--endpoint", "http://127.0.0.1:9",
                                                      "--model", "m"], 69)):
        line = subprocess.list2cmdline(command(*words))
        done = subprocess.run(["/bin/sh", "-c", f"{line} {closed}"], env=clean_environ, cwd=tmp_path,
                              capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
        assert "2>" in closed or done.stderr.count("\n") == 1


ENDS = """
import os, sys
from batch_client import __main__ as program, cli

class Late:
    def __del__(self, write=os.write):
        write(2, b"taken apart")

late = Late()
cli.main = lambda words: print("said", end="") or 65
sys.exit(cli.main([])) if sys.argv[1:] else program.entry_point()
"""


def test_a_process_ends_before_its_interpreter_is_taken_apart(clean_environ):
    """While it is, a thread of the store's library with a late answer would abort the process: exit -6 for any."""
    for words, left in (([], ""), (["without"], "taken apart")):
        done = subprocess.run([sys.executable, "-c", ENDS, *words], env=clean_environ, capture_output=True, text=True,
                              timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (65, "said", left)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["click", "uvloop", "numpy"])
def test_a_stop_while_modules_are_imported_is_one_line(module, number, clean_environ, tmp_path):
    """The first is imported before the arguments are looked at, the others by the verb."""
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(f"import signal\nsignal.raise_signal({int(number)})\n")
    environ = {**clean_environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), clean_environ.get("PYTHONPATH", "")])}
    words = command("plan", "in", "out", "--endpoint", "http://127.0.0.1:9", "--model", "m")
    script = [sys.executable, "-c", "from batch_client.__main__ import entry_point; entry_point()"]
    for line in (words, [*script, *words[3:]]):
        with heeded(number):
            done = subprocess.run(line, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60,
                                  check=False)
        assert done.returncode == 75, done.stderr
        assert done.stderr.split() == ["batch-client:", "stopped"]


@pytest.mark.parametrize(("verb", "wanted"), [
    (["run", "in", "out"], "batch-client: stopped; the same command goes on from here"),
    (["plan", "in", "out"], "batch-client: stopped"), (["predict", "one.npy"], "batch-client: stopped")])
def test_only_a_run_goes_on_where_it_was_stopped(verb, wanted, monkeypatch, capfd):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("batch_client.eventloop.run_verb", lambda main: main.close() or stopped())
    assert main([*verb, "--endpoint", "http://127.0.0.1:9", "--model", "m"]) == 75
    assert capfd.readouterr().err.strip() == wanted


@pytest.fixture
def short():
    """A folder with a path that is short enough for sockets below it, as those of tmp_path are not."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(params=[signal.SIGTERM, signal.SIGHUP])
def number(request):
    with heeded(request.param):
        yield request.param


@pytest.mark.parametrize("ignored", [False, True])
def test_a_verb_that_is_ended_takes_its_server_and_files_with_it(number, ignored, toy_archive, clean_environ, short):
    """Also where Ctrl-C is ignored, as in jobs that a shell has in the background."""
    shell = ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh"] if ignored else []
    words = [*shell, *command("predict", "-", "--archive", toy_archive.as_uri(), "--workers", "1")]
    with subprocess.Popen(words, env={**clean_environ, "TMPDIR": str(short)}, stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write("[[0]]")
        process.stdin.close()
        process.stdin = None
        root = psutil.Process(process.pid)
        until(lambda: any("ModelServer" in words_of(one) for one in root.children(recursive=True)),
              lambda: process.poll() is None, process.stderr.read)
        family = root.children(recursive=True)
        assert len(list(short.iterdir())) == 2  # the archive's and the server's
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert list(short.iterdir()) == []
    psutil.wait_procs(family, timeout=30)
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_what_a_pack_that_was_killed_has_left_goes_with_the_next(clean_environ, tmp_path):
    (tmp_path / "net.py").write_text(SLOW_TO_BUILD)
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "weights.pt")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    words = ["pack", "weights.pt", "--arch", "net.py:build", "--input", "x:float32:3"]
    environ = {**clean_environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command(*words), env={**environ, "SLOW": "1"}, cwd=tmp_path, stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout.readline() == "building\n"
        process.kill()
    (left,) = temporary.iterdir()
    assert list(left.glob("batch-pack-*/*"))
    os.utime(left, (0, 0))
    run_cli(words, environ, cwd=tmp_path, check=True)
    assert list(temporary.iterdir()) == []


SLOW_TO_BUILD = """
import os, time, torch

def build():
    if "SLOW" in os.environ:
        print("building", flush=True)
        time.sleep(600)
    return torch.nn.Linear(3, 2)
"""


def words_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_server_whose_starter_has_left_serves(toy_archive, toy_images, clean_environ, tmp_path):
    """`serve … | true`: nobody reads what it prints."""
    reading, writing = os.pipe()
    os.close(reading)
    port = free_ports(1)[0]
    np.save(tmp_path / "one.npy", toy_images[0])
    words = command("serve", toy_archive, "--workers", "1", "--online-workers", "0", "--token-out", tmp_path / "token",
                    "--log-dir", tmp_path / "log", "--port", port)
    with subprocess.Popen(words, env=clean_environ, stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        until((tmp_path / "token").exists, lambda: process.poll() is None, process.stderr.read)
        run_cli(["predict", tmp_path / "one.npy", "--endpoint", f"http://127.0.0.1:{port}", "--model", "toy",
                 "--token-file", tmp_path / "token"], clean_environ, check=True)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


def test_a_file_that_is_merely_there_names_no_program(clean_environ, tmp_path):
    """The folder may have come with somebody's data."""
    settings = tmp_path / "batch-client.toml"
    settings.write_text(f'[predict]\ntoken-command = "touch {tmp_path / "ran"}"\n')
    words = ["predict", "-", "--endpoint", "http://127.0.0.1:9", "--model", "m"]
    done = run_cli(words, clean_environ, cwd=tmp_path, stdin=b"[[0]]")
    assert done.returncode == 64
    assert b"must not name: say --config" in done.stderr
    assert run_cli(["status", "nothing"], clean_environ, cwd=tmp_path).returncode == 78  # which would not start it
    assert not (tmp_path / "ran").exists()
    # Whoever names the file has read it: there the program is started, and gives no token.
    done = run_cli(["--config", settings, *words], clean_environ, cwd=tmp_path, stdin=b"[[0]]")
    assert done.returncode == 77, done.stderr
    assert (tmp_path / "ran").exists()


def test_a_query_of_inline_json_is_told_what_a_query_is(clean_environ, tmp_path):
    done = run_cli(["predict", json.dumps([list(range(500))]), "--endpoint", "http://127.0.0.1:9", "--model", "m"],
                   clean_environ, cwd=tmp_path)
    assert done.returncode == 64
    assert "File name too long" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("records", "wanted"), [
    (np.full((3, 12, 12), 0.7, np.float32), "records are float32, model toy takes uint8"),
    (np.ones((3, 6, 24), np.uint8), "a record has shape (6, 24), model toy takes (12, 12)"),
])
def test_records_of_an_array_are_asked_about_as_a_run_would_score_them(
        records, wanted, toy_server, clean_environ, tmp_path):
    zarr.create_array(tmp_path / "in.zarr", data=records)
    done = run_cli(["predict", tmp_path / "in.zarr", "--records", "0:1", *toy_server.flags], clean_environ)
    assert done.returncode == 65
    assert wanted in done.stderr
    assert done.stdout == ""


def test_a_damaged_picture_is_the_querys_fault(toy_server, clean_environ, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0cIHDR" + os.urandom(40))
    done = run_cli(["predict", tmp_path / "bad.png", *toy_server.flags], clean_environ)
    assert done.returncode == 65
    assert "the picture can't be" in done.stderr
