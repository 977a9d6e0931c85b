"""Folders for the length of a command: gone with it, and where it was killed with the next command of its kind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batch_client.errors import ServingError
from batch_client.folders import UNLOCKED_SECONDS, temporary_folder

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


def test_a_folder_is_gone_after_its_block_however_that_ends(place: Path) -> None:
    def interrupted() -> None:
        with temporary_folder("a") as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
            (folder / "x").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(place.iterdir()) == []


def test_a_place_that_takes_no_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ServingError, match=r"nowhere.*set TMPDIR"), temporary_folder("a"):
        pytest.fail("there is no such place")


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
