"""Regions of shared memory: whose folder is used, what is in a region, and what is left."""

# ruff: noqa: S108 - /dev/shm is the place that is tested

import errno
import fcntl
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from batch_client import regions as regions_module
from batch_client.regions import Regions, new_folder, remove_folder, sweep, usable_folder
from support.disks import small_disk

PARTS = [memoryview(b"one"), memoryview(b""), memoryview(b"two and three")]
WHOLE = b"onetwo and three"
pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm on this machine")


@pytest.fixture
def folder():
    made = new_folder()
    yield made
    remove_folder(made)
    assert not list(made.parent.glob(f"{made.name}*"))


@pytest.fixture
def regions():
    made = Regions()
    yield made
    made.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_is_in_memory_for_its_owner_alone_and_usable(folder):
    assert folder.parent == Path("/dev/shm")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert usable_folder(str(folder)) == folder


def age(folder, seconds=61):
    os.utime(folder, (0, time.time() - seconds))


def test_what_a_removal_that_was_killed_has_left_is_removed_by_the_next_server(folder):
    (folder / "r-1").write_bytes(b"records")
    going = folder.rename(f"{folder}.gone")
    assert usable_folder(str(going)) is None
    age(going)
    remove_folder(new_folder())
    assert not going.exists()


def test_a_folder_that_cant_be_swept_keeps_nobody_from_the_others(folder, monkeypatch):
    both = {folder, Path(tempfile.mkdtemp(prefix=regions_module.PREFIX, dir=regions_module.MEMORY))}
    mine = {one.stat().st_ino for one in both}
    refused = []

    def flock(handle, operation, real=fcntl.flock):
        if os.fstat(handle).st_ino in mine and not refused:
            refused.append(handle)
            raise OSError(errno.ENOLCK, "No locks available")
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    for left in (1, 0):
        for one in both:
            if one.exists():
                age(one)
        remove_folder(new_folder())
        assert len([one for one in both if one.exists()]) <= left  # another server may have swept too


@pytest.mark.parametrize(("locked", "seconds", "left"), [(False, 61, False), (True, 61, True), (False, 30, True)])
def test_an_old_folder_that_nobody_has_locked_is_removed_by_the_next_server(folder, locked, seconds, left):
    (folder / "r-1").write_bytes(b"records")
    age(folder, seconds)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if locked:
            fcntl.flock(handle, fcntl.LOCK_SH)
        remove_folder(new_folder())
    finally:
        os.close(handle)
    assert folder.exists() == left


@pytest.mark.parametrize("said", [
    None, 7, [], {}, "", "/dev/shm", "/dev/shm/", "/etc", "/dev/shm/batch-client-", "/dev/shm/batch-client-absent00",
    "/dev/shm/batch-client-../../tmp", "/dev/shm/batch-client-a/../abc", "/dev/shm/batch-client-\0bcdefgh",
])
def test_what_is_no_folder_of_a_server_is_refused(said):
    assert usable_folder(said) is None


@pytest.mark.parametrize("respell", [
    lambda folder: f"{folder}/", lambda folder: f"{folder}\n", lambda folder: f" {folder}", lambda folder: f"/{folder}",
    lambda folder: f"/dev/shm/../shm/{folder.name}", lambda folder: f"/dev/./shm/{folder.name}",
    lambda folder: folder.name, os.fsencode, lambda folder: folder,
    lambda folder: str(folder).upper(),
])
def test_a_folder_by_any_other_spelling_is_refused(respell, folder, monkeypatch):
    monkeypatch.chdir("/dev/shm")  # so that its bare name leads there too
    assert usable_folder(str(folder)) == folder
    assert usable_folder(respell(folder)) is None


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o704, 0o720, 0o755, 0o777, 0o1777])
def test_a_folder_that_others_can_open_is_refused(mode, folder):
    folder.chmod(mode)
    assert usable_folder(str(folder)) is None
    folder.chmod(0o700)
    assert usable_folder(str(folder)) == folder


def test_a_folder_of_another_user_is_refused(folder):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(folder, 12345, -1)
    assert usable_folder(str(folder)) is None
    os.chown(folder, 0, -1)
    assert usable_folder(str(folder)) == folder


def test_what_has_the_name_and_is_no_folder_is_refused(folder, tmp_path):
    tmp_path.chmod(0o700)
    folder.rmdir()
    makes = [lambda: folder.symlink_to(tmp_path), lambda: folder.write_text(""), lambda: os.mkfifo(folder)]
    for make in makes:
        make()
        if not folder.is_symlink():
            folder.chmod(0o700)
        try:
            assert usable_folder(str(folder)) is None
        finally:
            folder.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder))
        assert usable_folder(str(folder)) is None
    folder.unlink()


def answered(regions, folder, *regions_of_it):
    """Regions whose requests were answered, all at one time."""
    with ExitStack() as held:
        for name in regions_of_it:
            held.enter_context(regions.region(folder, name, PARTS)).answered = True


def test_a_region_has_its_parts_for_as_long_as_its_block_lasts(folder, regions):
    with regions.region(folder, "r-1", PARTS):
        assert (folder / "r-1").read_bytes() == WHOLE
        assert (folder / "r-1").stat().st_mode & 0o777 == 0o600
        with regions.region(folder, "r-2", [memoryview(b"other")]):
            assert names(folder) == ["r-1", "r-2"]
            assert (folder / "r-1").read_bytes() == WHOLE


def test_a_region_has_room_behind_its_parts_that_is_read_once_somebody_wrote_there(folder, regions):
    with regions.region(folder, "r-1", PARTS, 100) as region:
        path = folder / "r-1"
        assert path.stat().st_size == 100
        assert path.read_bytes() == WHOLE + bytes(100 - len(WHOLE))
        with path.open("r+b") as file:
            file.seek(90)
            file.write(b"0123456789")
        assert region.read(92, 3) == b"234"
        assert region.read(98, 5) == b"89"  # what there is
        assert region.read(200, 5) == b""
        region.answered = True
    # A file that has the room already keeps it, and one that has more keeps that; without outputs it is given back.
    for number, size, has in ((2, 50, 100), (3, 200, 200), (4, 0, len(WHOLE)), (5, 60, 60)):
        with regions.region(folder, f"r-{number}", PARTS, size) as region:
            region.answered = True
            assert (folder / f"r-{number}").stat().st_size == has
            assert region.read(0, len(WHOLE)) == WHOLE


def test_room_takes_no_memory_before_it_is_written(folder, regions):
    with regions.region(folder, "r-1", PARTS, 1 << 30):
        status = (folder / "r-1").stat()
        assert (status.st_size, status.st_blocks * 512 < 1 << 20) == (1 << 30, True)


def test_no_region_is_left_open(folder, regions):
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(20):
        with regions.region(folder, f"r-{number}", PARTS, 100):
            assert len(list(Path("/proc/self/fd").iterdir())) == opened + 1
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_a_file_is_used_again_under_the_next_name_and_the_old_name_leads_nowhere(folder, regions):
    with regions.region(folder, "r-1", PARTS) as region:
        first = (folder / "r-1").stat().st_ino
        region.answered = True
    for number in range(2, 9):
        with regions.region(folder, f"r-{number}", [memoryview(b"x" * number)]) as region:
            region.answered = True
            assert names(folder) == [f"r-{number}"]
            assert (folder / f"r-{number}").read_bytes() == b"x" * number
            assert (folder / f"r-{number}").stat().st_ino == first


def test_the_file_of_a_request_that_was_not_answered_is_no_other_regions(folder, regions):
    with regions.region(folder, "r-1", PARTS, 100):
        late = os.open(folder / "r-1", os.O_RDWR)  # of a server that has begun
    assert names(folder) == []
    with regions.region(folder, "r-2", PARTS, 100) as region:
        os.pwrite(late, b"late", 50)
        os.close(late)
        assert region.read(0, 100) == WHOLE + bytes(100 - len(WHOLE))


def test_what_fails_in_a_block_closes_and_removes_its_region(folder, regions):
    opened = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(KeyboardInterrupt), regions.region(folder, "r-1", PARTS, 100):
        raise KeyboardInterrupt
    for parts, size, error in ((PARTS, 1 << 63, OverflowError), ([*PARTS, "no bytes"], 0, TypeError)):
        with pytest.raises(error), regions.region(folder, "r-2", parts, size):  # so long; of what can't be written
            pytest.fail("there is no such region")
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_a_file_that_its_server_has_swept_costs_a_new_one(folder, regions):
    answered(regions, folder, "r-1")
    (folder / "r-1").unlink()
    with regions.region(folder, "r-2", PARTS):
        assert (folder / "r-2").read_bytes() == WHOLE


def test_close_removes_every_region(folder, regions):
    answered(regions, folder, "r-1", "r-2")
    assert len(names(folder)) == 2
    regions.close()
    assert names(folder) == []


def test_a_folder_that_is_gone_is_an_error_each_time_and_is_not_made(folder, regions):
    with regions.region(folder, "r-1", PARTS):
        pass
    remove_folder(folder)
    for number in range(2):
        with pytest.raises(FileNotFoundError), regions.region(folder, f"r-{number}", PARTS):
            pytest.fail("there is no such region")
    assert not folder.exists()


def test_a_link_in_the_place_of_a_region_is_not_written_through(folder, regions, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (folder / "r-1").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="File exists"), regions.region(folder, "r-1", PARTS):
        pytest.fail("it was opened")
    assert (tmp_path / "precious").read_text() == "mine"


@contextmanager
def small_files(path, nbytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limited", [small_disk, small_files])
def test_memory_that_is_full_is_an_error_and_nothing_is_left(limited, regions, tmp_path):
    with limited(tmp_path, 64 << 10):
        with regions.region(tmp_path, "r-1", [memoryview(bytes(32 << 10))]):
            with (pytest.raises(OSError, match=r"No space|too large"),
                  regions.region(tmp_path, "r-2", [memoryview(bytes(40 << 10)), memoryview(bytes(40 << 10))])):
                pytest.fail("it does not fit")
            assert names(tmp_path) == ["r-1"]  # the one that is in use
        assert names(tmp_path) == []  # nothing is kept for a next one
        # And with one that was free: it is given back too, as there is nothing to spare.
        others = Regions()
        with others.region(tmp_path, "r-3", [memoryview(bytes(8 << 10))]) as region:
            region.answered = True
        assert names(tmp_path) == ["r-3"]
        with (pytest.raises(OSError, match=r"No space|too large"),
              others.region(tmp_path, "r-4", [memoryview(bytes(80 << 10))])):
            pytest.fail("it does not fit")
        assert names(tmp_path) == []


def test_a_file_of_another_user_is_not_written_to(folder, regions):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    answered(regions, folder, "r-1")
    os.chown(folder / "r-1", 12345, -1)
    (folder / "r-1").write_bytes(b"theirs")
    with pytest.raises(OSError, match="another user"), regions.region(folder, "r-2", PARTS):
        pytest.fail("it is theirs")
    (folder / "r-3").write_bytes(b"theirs")
    with pytest.raises(FileExistsError), Regions().region(folder, "r-3", PARTS):
        pytest.fail("it is theirs")


def test_a_folder_that_was_given_up_keeps_nothing(folder, regions):
    answered(regions, folder, "r-1", "r-2")
    with regions.region(folder, "r-3", PARTS) as region:
        region.answered = True
        regions.give_up(folder)
        assert names(folder) == ["r-3"]
    assert names(folder) == []


def test_sweep_removes_what_is_old_and_nothing_else(folder, regions):
    with regions.region(folder, "r-1", PARTS), regions.region(folder, "r-2", PARTS):
        os.utime(folder / "r-1", (0, time.time() - 901))
        os.utime(folder / "r-2", (0, time.time() - 800))
        sweep(folder, 900)
        assert names(folder) == ["r-2"]
    sweep(folder, -1)
    assert names(folder) == []
    sweep(folder / "absent", 0)


def test_a_region_that_is_used_again_is_young_again(folder, regions):
    answered(regions, folder, "r-1")
    os.utime(folder / "r-1", (0, 0))
    with regions.region(folder, "r-2", PARTS):
        sweep(folder, 900)
        assert names(folder) == ["r-2"]


def test_a_folder_goes_while_somebody_makes_regions_in_it(folder):
    # A client whose server ends goes on for a moment. It must find no folder then, or the folder would be left.
    script = ("import itertools, pathlib, sys\nprint(flush=True)\n"
              "for n in itertools.count():\n    (pathlib.Path(sys.argv[1]) / f'r-{n}').write_bytes(b'x')")
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as busy:
        busy.stdout.readline()
        while not names(folder):
            time.sleep(0.001)
        remove_folder(folder)
        _, said = busy.communicate(timeout=30)
    assert b"FileNotFoundError" in said
    assert not list(folder.parent.glob(f"{folder.name}*"))
