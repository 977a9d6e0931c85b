"""Folders for the length of a command: gone with it, and where it was killed with the next command of its kind."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batch_client.errors import ServingError
from batch_client.folders import LOCK, UNLOCKED_SECONDS, sweep_folders, temporary_folder
from batch_client.server_guard import LOG_SECONDS, clean

HOLDER = """
import sys, time
from batch_client.folders import temporary_folder
with temporary_folder(sys.argv[1]) as folder:
    (folder / "weights").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("error", [KeyboardInterrupt, ImportError("no boto3"), OSError("gone")])
def test_a_folder_is_gone_after_its_block_however_that_ends(place: Path, error: BaseException) -> None:
    def interrupted() -> None:
        with temporary_folder("a") as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
            (folder / "x").mkdir()
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        interrupted()
    assert list(place.iterdir()) == []


def test_a_place_that_takes_no_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ServingError, match=r"nowhere.*set TMPDIR"), temporary_folder("a"):
        pytest.fail("there is no such place")


def test_a_machine_without_any_place_for_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    with pytest.raises(ServingError, match=r"No usable temporary directory.*set TMPDIR"), temporary_folder("a"):
        pytest.fail("there is no such place")


def test_of_a_server_that_was_killed_with_its_guard_only_the_log_stays_and_that_for_a_week(place: Path) -> None:
    folders = [place / f"batch-client-server-{name * 8}" for name in "abc"]
    for folder in folders:
        (folder / "tmp").mkdir(parents=True)
        (folder / "tmp" / "weights").write_bytes(bytes(9))
        for name in (LOCK, "key_file.json", "server-1.log"):
            (folder / name).touch()
        folder.chmod(0o700)
    (folders[1] / LOCK).unlink()  # of one that has no guard yet, or of an earlier version
    old = time.time() - 2 * UNLOCKED_SECONDS
    for folder in folders:
        os.utime(folder, (old, old))
    with (folders[2] / LOCK).open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sweep_folders(place, "batch-client-server-", clean, LOCK)
    assert [len(list(folder.iterdir())) for folder in folders] == [2, 3, 4]
    assert (folders[0] / "server-1.log").exists()
    os.utime(folders[0] / "server-1.log", (0, time.time() - LOG_SECONDS - 1))
    os.utime(folders[0], (old, old))
    sweep_folders(place, "batch-client-server-", clean, LOCK)
    assert [folder.exists() for folder in folders] == [False, True, True]


def test_what_a_killed_command_left_goes_with_the_next_of_its_kind_and_nothing_else_does(
        place: Path, clean_environ: dict[str, str]) -> None:
    def holder(kind: str) -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen([sys.executable, "-c", HOLDER, kind], env={**clean_environ, "TMPDIR": str(place)},
                                   stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    holders = [holder(kind) for kind in ("bench", "bench", "archive")]
    try:
        (_, alive), *left = holders
        for process, _ in left:
            process.kill()
            process.wait()
        (_, killed), (_, another_kind) = left
        foreign = [place / "batch-client-bench-notes", place / "batch-client-bench-12345678.txt"]
        link = place / "batch-client-bench-abcdefgh"
        link.symlink_to(place / "elsewhere")
        for folder in (*foreign, place / "elsewhere"):
            folder.mkdir(mode=0o700)
        with temporary_folder("bench"):  # younger than what a command needs to lock it
            assert killed.is_dir()
        old = time.time() - 2 * UNLOCKED_SECONDS
        for folder in (alive, killed, another_kind, *foreign, place / "elsewhere"):
            os.utime(folder, (old, old))
        with temporary_folder("bench") as own:
            assert set(place.iterdir()) == {own, alive, another_kind, *foreign, link, place / "elsewhere"}
    finally:
        for process, _ in holders:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
