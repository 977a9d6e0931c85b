"""The guard alone, with a shell in the place of Java."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

GUARD = Path(__file__).parents[2] / "client" / "batch_client" / "server_guard.py"
# A command with a child of its own; it says the child's pid.
STUBBORN = "trap '' TERM; sleep 600 & echo $!; wait; wait"
OBEDIENT = "sleep 600 & echo $!; wait"


@pytest.fixture
def guarded(tmp_path):
    """A function: shell script → the guard, the lifeline and the pid of the script's child."""
    started = []

    def start(script, shared="", grace="0.2"):
        lifeline, ours = os.pipe()
        guard = subprocess.Popen([sys.executable, "-I", "-S", str(GUARD), str(lifeline), grace, str(tmp_path),
                                  str(shared), "/bin/sh", "-c", script], pass_fds=(lifeline,), stdout=subprocess.PIPE)
        os.close(lifeline)
        child = psutil.Process(int(guard.stdout.readline()))
        started.append((guard, ours, child))
        return started[-1]

    yield start
    for guard, ours, child in started:
        for process in (guard, child):
            if process.poll() is None if process is guard else process.is_running():
                process.kill()
        guard.wait()
        guard.stdout.close()
        if ours in open_descriptors():
            os.close(ours)


def open_descriptors():
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()} if sys.platform == "linux" else set()


@pytest.mark.parametrize("script", [OBEDIENT, STUBBORN])
def test_the_end_of_the_lifeline_ends_the_whole_group(guarded, script):
    guard, ours, child = guarded(script)
    os.close(ours)
    guard.wait(30)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_signal_to_the_guard_ends_the_group(guarded):
    guard, _, child = guarded(OBEDIENT)
    guard.send_signal(signal.SIGTERM)
    guard.wait(30)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_the_guard_ends_with_its_command_and_its_status(guarded):
    guard, _, child = guarded("sleep 600 & echo $!; exit 7")
    assert guard.wait(30) == 7
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_all_but_the_log_goes_and_the_lock_by_which_it_is_known_later(guarded, tmp_path):
    for name in ("tmp/models", "models"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "m.mar").symlink_to(tmp_path)
    (tmp_path / "models").chmod(0o500)
    for name in ("key_file.json", "config.properties", "server-1.log"):
        (tmp_path / name).write_text("")
    guard, ours, _ = guarded(OBEDIENT)
    os.close(ours)
    guard.wait(30)
    assert {entry.name for entry in tmp_path.iterdir()} == {"server-1.log", "lock"}


def test_shared_memory_goes_with_all_that_is_in_it_and_nothing_else(guarded, tmp_path, tmp_path_factory):
    place = tmp_path_factory.mktemp("memory")
    shared, other, precious = place / "ours", place / "theirs", place / "precious"
    for folder in (shared, other):
        folder.mkdir()
        (folder / "region").write_text("records")
    precious.write_text("mine")
    (shared / "link").symlink_to(precious)
    guard, ours, _ = guarded(OBEDIENT, shared)
    assert (shared / "region").exists()
    os.close(ours)
    assert guard.wait(30) == 128 + signal.SIGTERM
    assert sorted(path.name for path in place.iterdir()) == ["precious", "theirs"]
    assert (other / "region").exists()
    assert precious.read_text() == "mine"
    assert not tmp_path.exists()  # it had no log


@pytest.mark.parametrize("shares", [True, False])
def test_its_folders_are_locked_for_as_long_as_the_guard_lives(guarded, tmp_path, tmp_path_factory, shares):
    shared = tmp_path_factory.mktemp("memory")
    guard, _, _ = guarded(OBEDIENT, shared)
    handle = os.open(shared if shares else tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        guard.kill()
        guard.wait()
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def test_a_folder_that_the_client_has_removed_before_is_no_error(guarded, tmp_path_factory):
    guard, ours, _ = guarded(OBEDIENT, tmp_path_factory.mktemp("memory") / "absent")
    os.close(ours)
    assert guard.wait(30) == 128 + signal.SIGTERM


def test_children_of_the_client_do_not_hold_the_lifeline(guarded):
    guard, ours, _ = guarded(OBEDIENT)
    bystander = subprocess.Popen(["/bin/sleep", "600"])
    try:
        os.close(ours)
        assert guard.wait(30) == 128 + signal.SIGTERM
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
