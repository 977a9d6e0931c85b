"""Records in memory that client and server share: whatever becomes of it, the output is the same, nothing is left."""

import os
import signal
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from batch_client.machine import free_ports
from batch_client.regions import remove_folder
from support.cli import LONG, until
from support.disks import small_disk
from support.faults import PACE, QUICK, RECORD_BYTES, Client, Scale, run
from support.proxy import FaultProxy
from support.served import OPEN, Served, shared_memory_of

NOT_SHARED = "the server can't read the records in shared memory"
REQUEST_BYTES = QUICK.request * RECORD_BYTES
RECORD_OUTPUT_BYTES = 10 * 4
# Requests whose outputs, 20 KiB each, are large enough to be left in memory.
WIDE = Scale("wide", 4096, 512, 1024, 512, 1)
OUTPUT_BYTES = WIDE.request * RECORD_OUTPUT_BYTES
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm on this machine")  # noqa: S108 - the place itself


def posted(server, sources, environ, output, scale=QUICK):
    """A run's root, and the bytes of each request's body."""
    root, seen = exchanged(server, sources, environ, output, scale)
    return root, [one.size for one in seen]


def exchanged(server, sources, environ, output, scale):
    """A run's root, and what a proxy saw of its requests."""
    with FaultProxy(server.url) as proxy:
        root = run(sources(scale), output, scale, server.flags_for(proxy.url), environ)["root"]
        return root, [seen for seen in proxy.seen if seen.method == "POST"]


def test_records_are_in_memory_or_in_bodies_and_the_root_is_the_same(
        sources, undisturbed, moody_server, bodies_server, s3_environ, output):
    before = set(moody_server.shared.iterdir())  # of clients that other tests have killed
    root, sizes = posted(moody_server, sources, s3_environ, f"{output}-memory")
    assert max(sizes) < REQUEST_BYTES / 2
    assert set(moody_server.shared.iterdir()) <= before, "a client has left regions"
    assert bodies_server.shared is None
    other, sizes = posted(bodies_server, sources, s3_environ, f"{output}-bodies")
    assert min(sizes) > REQUEST_BYTES
    assert root == other == undisturbed(QUICK).root


def test_larger_outputs_are_in_memory_too_and_the_root_is_the_same(
        sources, undisturbed, moody_server, bodies_server, s3_environ, output):
    root, near = exchanged(moody_server, sources, s3_environ, f"{output}-memory", WIDE)
    other, far = exchanged(bodies_server, sources, s3_environ, f"{output}-bodies", WIDE)
    assert root == other == undisturbed(WIDE).root
    assert max(seen.replied for seen in near if seen.size < WIDE.request * RECORD_BYTES) < OUTPUT_BYTES / 4
    assert min(seen.replied for seen in far if seen.status == 200) > OUTPUT_BYTES
    # The control: smaller ones are in the replies of both.
    _, small = exchanged(moody_server, sources, s3_environ, f"{output}-small", QUICK)
    assert min(seen.replied for seen in small if seen.status == 200) > QUICK.request * RECORD_OUTPUT_BYTES


def test_one_run_uses_servers_of_both_kinds(sources, undisturbed, moody_server, bodies_server, s3_environ, output):
    with FaultProxy(moody_server.url) as near, FaultProxy(bodies_server.url) as far:
        flags = moody_server.flags_for(near.url, far.url)
        assert run(sources(QUICK), output, QUICK, flags, s3_environ)["root"] == undisturbed(QUICK).root
        for proxy, in_bodies in ((near, False), (far, True)):
            sizes = {seen.size > REQUEST_BYTES for seen in proxy.seen if seen.method == "POST"}
            assert sizes == {in_bodies}


@pytest.mark.parametrize("number", [None, signal.SIGTERM], ids=["the end", "SIGTERM"])
def test_a_run_with_a_server_of_its_own_leaves_no_memory(
        number, sources, undisturbed, moody_archive, s3_environ, output):
    environ = {**s3_environ, "TOY_SECONDS": str(PACE)}
    with Client(sources(QUICK), output, QUICK, ["--archive", moody_archive, "--workers", "1x1"], environ) as client:
        client.until_chunks(2)
        family = psutil.Process(client.process.pid).children(recursive=True)
        shared = shared_memory_of(family)
        assert shared.stat().st_mode & 0o777 == 0o700
        regions = [path for path in shared.iterdir() if path.stat().st_size == REQUEST_BYTES]
        assert 0 < len(regions) <= 4
        if number is not None:
            client.process.send_signal(number)
            client.process.wait(LONG)
        else:
            assert client.finish()["root"] == undisturbed(QUICK).root
        assert psutil.wait_procs(family, LONG)[1] == []
    assert not list(shared.parent.glob(f"{shared.name}*"))


@contextmanager
def server_of_its_own(archive, folder, **settings):
    """A server whose folder a test may spoil."""
    with Served(archive, folder, PACE, workers=1, extra_properties=OPEN, **settings) as server:
        yield server


@pytest.mark.parametrize("spoil", [
    lambda folder: folder.rmdir(), lambda folder: folder.chmod(0o755),
    pytest.param(lambda folder: os.chown(folder, 12345, -1), marks=AS_ROOT),
], ids=["gone", "open to others", "another user's"])
def test_memory_that_is_not_ours_from_the_start_is_not_used(
        spoil, sources, undisturbed, moody_archive, s3_environ, output, tmp_path):
    with server_of_its_own(moody_archive, tmp_path) as server:
        spoil(server.shared)
        root, sizes = posted(server, sources, s3_environ, output)
        assert min(sizes) > REQUEST_BYTES
        assert root == undisturbed(QUICK).root


def test_memory_that_goes_in_the_middle_of_a_run(sources, undisturbed, moody_archive, s3_environ, output, tmp_path):
    with server_of_its_own(moody_archive, tmp_path) as server, FaultProxy(server.url) as proxy, Client(
            sources(QUICK), output, QUICK, server.flags_for(proxy.url), s3_environ) as client:
        client.until_chunks(3)
        server.shared.rename(server.shared.with_name(f"{server.shared.name}.test"))
        summary = client.finish()
        in_bodies = [seen.size > REQUEST_BYTES for seen in proxy.seen if seen.method == "POST"]
        server.shared.with_name(f"{server.shared.name}.test").rename(server.shared)
    assert (summary["root"], summary["failed"]) == (undisturbed(QUICK).root, 0)
    assert {False, True} == set(in_bodies)
    assert not any(in_bodies[:20])
    assert all(in_bodies[-20:])


def test_memory_that_is_full(sources, undisturbed, moody_archive, s3_environ, output, tmp_path):
    with server_of_its_own(moody_archive, tmp_path) as server, small_disk(server.shared, 8 << 10):
        root, sizes = posted(server, sources, s3_environ, output)
        assert list(server.shared.iterdir()) == []
    assert root == undisturbed(QUICK).root
    in_bodies = [size > REQUEST_BYTES for size in sizes]
    assert set(in_bodies) == {False, True}
    assert all(in_bodies[5:])


def test_a_server_that_comes_back_with_another_folder(
        sources, undisturbed, moody_archive, s3_environ, output, tmp_path):
    with server_of_its_own(moody_archive, tmp_path, port=free_ports(1)[0]) as server, Client(
            sources(QUICK), output, QUICK, server.flags, s3_environ) as client:
        client.until_chunks(3)
        old = server.shared
        server.stop()
        until(lambda: not old.exists())
        old.mkdir(mode=0o700)  # as where the first one was killed with its guard: nobody reads it any more
        try:
            server.start()
            assert server.shared != old
            summary = client.finish()
            reasons = " ".join(event["reason"] for event in client.events("request retried"))
            left = list(old.iterdir())
        finally:
            remove_folder(old)
    assert left == []
    assert (summary["root"], summary["failed"]) == (undisturbed(QUICK).root, 0)
    assert NOT_SHARED in reasons
