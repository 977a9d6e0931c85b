"""Clients that are killed, stopped, several at once, without disk space or with nobody who reads their log."""

import fcntl
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import psutil
import pytest
import zarr

from batch_client.errors import MismatchError
from batch_client.layout import SPEC_KEY
from batch_client.place import check_place
from batch_client.storage import MemoryStore
from support.cli import LONG, command, run_cli
from support.disks import small_disk
from support.faults import FULL, PACE, QUICK, Client, each_scale, images_of, only_full, run
from support.identities import identity_of
from support.proxy import FaultProxy


@each_scale
def test_a_client_that_is_killed_again_and_again(scale, sources, undisturbed, moody_archive, moody_server, s3_environ,
                                                 output):
    wanted = undisturbed(scale).root
    rng = random.Random(4)
    environ = {**s3_environ, "TOY_SECONDS": str(PACE)}
    # In a full run each life has a server of its own, which must not outlive it.
    server = moody_server.flags if scale is QUICK else ["--archive", moody_archive, "--workers", "1x1"]
    lives = 10 if scale is FULL else 3
    for _ in range(lives):
        with Client(sources(scale), output, scale, server, environ) as client:
            client.until_chunks(rng.randint(1, scale.chunks // 12))
            time.sleep(rng.random() / 10)
            family = psutil.Process(client.process.pid).children(recursive=True)
            assert (scale is QUICK) or any("java" in process.name() for process in family)
            client.process.kill()
            client.process.wait(LONG)
        assert client.process.returncode == -signal.SIGKILL
        assert psutil.wait_procs(family, LONG)[1] == [], "a server outlived its client"
    with Client(sources(scale), output, scale, server, environ) as client:
        summary = client.finish()
        assert any(event["adopted"] for event in client.events("chunk written")), "no work was lost by the kills"
    assert summary["root"] == wanted
    run_cli(["verify", "--deep", output], s3_environ, check=True)


@pytest.mark.parametrize(("scale", "count"), [
    pytest.param(QUICK, 2, id="quick-2"), pytest.param(FULL, 2, id="full-2", marks=pytest.mark.chaos),
    pytest.param(FULL, 4, id="full-4", marks=pytest.mark.chaos)])
def test_clients_at_once_on_one_output(count, scale, s3, sources, undisturbed, moody_server, s3_environ, output):
    wanted = undisturbed(scale).root
    with FaultProxy(s3.endpoint_url) as proxy, ExitStack() as stack:
        environ = {**s3_environ, "AWS_ENDPOINT_URL": proxy.url}
        clients = [stack.enter_context(Client(sources(scale), output, scale, moody_server.flags, environ))
                   for _ in range(count)]
        roots = [client.finish()["root"] for client in clients]
        writers = [len(client.events("chunk written")) for client in clients]
        created = Counter(seen.path for seen in proxy.seen if seen.method == "PUT" and seen.status == 200)
        refused = [seen for seen in proxy.seen if seen.method == "PUT" and seen.status in (409, 412)]
    assert roots == [wanted] * count
    assert min(writers) > 0, "one client had nothing to do"
    # Every object was made once, the group's metadata and the mark of success too.
    assert set(created.values()) == {1}
    assert {path.partition(output.removeprefix("s3:/"))[2] for path in created} >= {"/zarr.json", "/_SUCCESS"}
    assert refused, "no two clients ever met"
    run_cli(["verify", "--deep", output], s3_environ, check=True)


class PinnedMeanwhile(MemoryStore):
    """Another client begins the run just after it was looked for."""

    def __init__(self, spec):
        super().__init__()
        self._spec = spec

    async def get(self, key, start=None, stop=None):
        found = await super().get(key, start, stop)
        self.objects.setdefault(SPEC_KEY, self._spec)
        return found


async def test_a_run_that_another_client_begins_in_between():
    # Seen with four clients that started at once: the place was empty, and then was not.
    identity = identity_of()
    await check_place(PinnedMeanwhile(identity.to_json()), identity)
    with pytest.raises(MismatchError, match="another run"):
        await check_place(PinnedMeanwhile(replace(identity, model="y").to_json()), identity)


@only_full
def test_a_stop_with_work_in_flight(scale, sources, undisturbed, moody_server, s3_environ, output):
    with Client(sources(scale), output, scale, moody_server.flags, s3_environ) as client:
        client.until_chunks(2)
        client.process.send_signal(signal.SIGTERM)
        client.process.wait(20)
        assert "stopped before the end" in client.finish(75)
    summary = run(sources(scale), output, scale, moody_server.flags, s3_environ)
    assert 0 < summary["scored"] < scale.records
    assert summary["root"] == undisturbed(scale).root


def test_a_disk_that_is_full(undisturbed, moody_server, clean_environ, tmp_path):
    zarr.create_array(tmp_path / "in.zarr", data=images_of(QUICK.records), chunks=(QUICK.source_chunk, 12, 12))
    disk = tmp_path / "disk"
    disk.mkdir()
    words = (tmp_path / "in.zarr", disk / "out", QUICK, moody_server.flags, clean_environ)
    with small_disk(disk, 64 << 10):
        said = run(*words, code=74)
        assert "No space left" in said
        with pytest.raises(FileNotFoundError):
            zarr.open_group(disk / "out", mode="r")
        assert "No space left" in run(*words, code=74)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert run(*words)["root"] == undisturbed(QUICK).root
        run_cli(["verify", "--deep", disk / "out"], clean_environ, check=True)


@pytest.mark.parametrize("flags", [["--json"], []], ids=["json", "sentence"])
def test_a_log_that_nobody_reads(flags, sources, undisturbed, moody_server, s3_environ, output):
    wanted = undisturbed(QUICK).root
    ours, theirs = os.pipe()
    with open(ours, "rb") as log, open(theirs, "wb") as pipe:  # noqa: PTH123 - descriptors, not paths
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
        words = command("run", sources(QUICK), output, *QUICK.flags, "--log", "json", *flags, *moody_server.flags)
        with subprocess.Popen(words, env=s3_environ, stdout=subprocess.PIPE, stderr=pipe) as client:
            try:
                said, _ = client.communicate(timeout=LONG)
            finally:
                client.kill()
        pipe.close()
        heard = log.read()
    assert client.returncode == 0
    assert 0 < heard.count(b"chunk written") < QUICK.chunks, "the pipe was never full"
    if flags:
        assert json.loads(said)["root"] == wanted
