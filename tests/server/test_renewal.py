"""A server's tokens and its watch, with a management API that fails on purpose: nothing here starts Java."""

import asyncio
import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from batch_client import server as server_module
from batch_client import server_foreground
from batch_client.errors import CredentialsError, ServingError, UsageError
from batch_client.server import EmbeddedServer, ServerSettings
from batch_client.server_config import Model
from batch_client.server_foreground import _secret, _watch, serve_forever
from batch_client.server_lanes import Lane
from batch_client.server_process import ServerProcess
from support.web import serving

SLOW = 0.2  # seconds that a call of the management API may take here


class Management:
    """TorchServe's management API: makes tokens and describes the model, or fails as `how` says."""

    def __init__(self, folder):
        self.key_file = folder / "key_file.json"
        self.how = "well"
        self.made = self.described = 0
        self.workers = 1
        self.write()

    def write(self):
        keys = {kind: {"key": f"{kind}-{self.made}"} for kind in ("inference", "management")}
        keys["API"] = {"key": "API-0"}  # which stays
        self.key_file.write_text(json.dumps(keys))

    async def renew(self, request):
        if request.headers["Authorization"] != "Bearer API-0":
            raise web.HTTPBadRequest
        if self.how == "describes only":
            raise web.HTTPServiceUnavailable
        await self._fail()
        self.made += 1
        if self.how == "disk is full":  # as TorchServe's generateKeyFile: the keys in memory, then the file
            self.key_file.write_text("")
            raise web.HTTPInternalServerError
        self.write()
        return web.Response()

    async def describe(self, request):
        self.described += 1
        await self._fail()
        if self.how == "first is dead" and request.headers["Authorization"] == "Bearer management-0":
            raise web.HTTPBadRequest
        if self.how == "disk is full":
            raise web.HTTPBadRequest  # whatever token we have
        return web.json_response([{"workers": [{"status": "READY"}] * self.workers}])

    async def _fail(self):
        if self.how == "slow":
            await asyncio.sleep(SLOW * 5)
        if self.how == "refuses":
            raise web.HTTPBadRequest


@pytest.fixture
def management(tmp_path):
    return Management(tmp_path)


@pytest.fixture
def guard():
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@pytest.fixture
async def running(tmp_path, management, guard):
    """An EmbeddedServer that runs, but for Java: its guard is a `sleep`."""
    log = tmp_path / "server.log"
    log.write_text("started\nOutOfMemoryError: killed\n\tat org.pytorch.serve.ModelServer\n")
    routes = web.get("/token", management.renew), web.get("/models/echo", management.describe)
    async with serving(*routes) as url, aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(SLOW)) as session:
        server = EmbeddedServer(ServerSettings(Path("echo.mar")))
        server._model = Model("echo", "1.0")
        server._lanes = (Lane("echo", 1, 8),)
        server._session = session
        properties = {"management_address": url}
        server._running = ServerProcess(guard, -1, tmp_path, None, log, 0, properties, ready=True)
        server._renew_at = dict.fromkeys(("inference", "management"), time.time() + 1800)
        with log.open("r+") as server._log:
            yield server


def due(server):
    server._renew_at = dict.fromkeys(("inference", "management"), time.time())


def end(server):
    server._running.guard.kill()
    server._running.guard.wait()


@pytest.mark.parametrize("how", ["slow", "refuses"])
async def test_a_renewal_that_fails_leaves_the_old_token(running, management, how):
    assert await running.token() == "inference-0"
    management.how = how
    due(running)
    assert await running.token() == "inference-0"
    assert 100 < running.renewal_due_in() < 1800  # later, but well before the old one ends
    assert await running.token(refused="inference-0") == "inference-0"
    management.how = "well"
    due(running)
    assert await running.token() == "inference-1"
    assert running.renewal_due_in() > 1700


async def test_a_renewal_that_was_given_up_and_made_all_the_same_is_found(running, management):
    assert await running.token() == "inference-0"
    management.made += 1
    management.write()
    assert await running.token(refused="inference-0") == "inference-1"
    assert management.made == 1
    assert await running.token(refused="inference-1") == "inference-2"


async def test_a_token_that_died_while_the_machine_slept_is_renewed(running, management):
    """Nothing was due by the clock that stood still."""
    management.how = "first is dead"
    assert (await running.describe())["workers"] == [{"status": "READY"}]
    assert management.made == 1


async def test_a_token_that_is_lost_on_a_full_disk_is_made_again_once_there_is_room(running, management, monkeypatch):
    monkeypatch.setattr(server_module, "LOST_SECONDS", 0.0)
    assert await running.token() == "inference-0"
    await running.describe()
    management.how = "disk is full"
    due(running)
    assert await running.token() == "inference-0"  # a run goes on with it until it is refused
    with pytest.raises(CredentialsError, match=r"key file in .* can't be read, .*: make room there$"):
        await running.token(refused="inference-0")
    with pytest.raises(CredentialsError):
        await running.describe()
    management.how = "well"
    assert await running.token(refused="inference-0") == f"inference-{management.made}"
    assert (await running.describe())["workers"] == [{"status": "READY"}]


async def test_a_lost_token_is_not_asked_for_all_the_time(running, management):
    await running.token()
    management.how = "disk is full"
    due(running)
    await running.token()
    for _ in range(10):
        with pytest.raises(CredentialsError):
            await running.token(refused="inference-0")
    assert management.made == 1
    assert 0 < running.renewal_due_in() <= server_module.LOST_SECONDS


async def test_a_disk_that_is_full_for_a_while_at_a_renewal_ends_nothing(running, management, monkeypatch, tmp_path):
    monkeypatch.setattr(server_foreground, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(server_foreground, "WORKERS_SECONDS", 0.0)
    monkeypatch.setattr(server_foreground, "HOPELESS_SECONDS", 0.0)
    monkeypatch.setattr(server_module, "LOST_SECONDS", 0.0)
    said = []
    with _secret(tmp_path / "token") as write:
        await running.describe()
        watching = asyncio.create_task(_watch(running, write, said.append))
        await until((tmp_path / "token").exists)
        management.how = "disk is full"
        due(running)
        await until(lambda: management.made > 5 or watching.done())
        assert not watching.done()
        assert len(said) == 1
        management.how = "well"
        await until(lambda: (tmp_path / "token").read_text() != "inference-0")
        await until(lambda: said[-1] == "the current token is told again")
        watching.cancel()
        await asyncio.wait([watching])


async def test_a_token_file_that_can_not_be_written_for_a_while_ends_nothing(running, monkeypatch, tmp_path):
    monkeypatch.setattr(server_foreground, "WATCH_SECONDS", 0.01)
    folder, moved, said = tmp_path / "secrets", tmp_path / "moved", []
    folder.mkdir()
    with _secret(folder / "token") as write:
        watching = asyncio.create_task(_watch(running, write, said.append))
        await until((folder / "token").exists)
        folder.rename(moved)
        due(running)
        await until(lambda: any("it is tried again" in line for line in said))
        await asyncio.sleep(0.1)
        assert not watching.done()
        assert sum("it is tried again" in line for line in said) == 1
        moved.rename(folder)
        await until(lambda: (folder / "token").read_text() == "inference-1")
        await until(lambda: said[-1] == "the current token is told again")
        watching.cancel()
        await asyncio.wait([watching])


async def test_a_log_that_somebody_deletes_ends_nothing(running, monkeypatch):
    monkeypatch.setattr(server_foreground, "WATCH_SECONDS", 0.001)
    monkeypatch.setattr(server_module, "MOST_LOG_BYTES", 100)
    told = []
    running._echo = told.append
    with running.log_path.open("a") as server:  # as TorchServe has it
        watching = asyncio.create_task(_watch(running, unwritten, told.append))
        await until(lambda: len(told) > 3)
        running.log_path.unlink()
        for number in range(3):
            server.write(f"line {number} {'x' * 200}\n")
            server.flush()
            await until(lambda number=number: f"line {number} " in "".join(told))
            seen = len(told)
            await until(lambda seen=seen: len(told) > seen + 3)
            assert os.fstat(server.fileno()).st_size < 100  # its place on the disk is free again
        watching.cancel()
        await asyncio.wait([watching])
    assert watching.cancelled()
    assert [line.split()[1] for line in "".join(told).splitlines() if line.startswith("line")] == ["0", "1", "2"]


def unwritten(_):
    """Where no token file is wanted."""


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - files, and lists that others fill
            await asyncio.sleep(0.005)


async def test_the_key_file_is_not_read_for_every_request(running, management):
    await running.token()
    management.key_file.unlink()
    assert await running.token() == "inference-0"


async def test_a_management_token_that_is_not_renewed_is_used_on(running, management):
    management.how = "describes only"
    due(running)
    assert (await running.describe())["workers"] == [{"status": "READY"}]
    management.how = "slow"
    with pytest.raises(ServingError, match=r"does not answer: \w"):
        await running.describe()


async def test_a_server_that_has_ended_is_named_with_its_last_words(running):
    await running.token()
    end(running)
    for asked in (running.token(), running.token(refused="inference-0")):
        with pytest.raises(ServingError, match=r"echo has ended \(log: .*server\.log\): OutOfMemoryError: killed$"):
            await asked


async def test_a_large_log_is_not_read_whole_for_the_last_words(running):
    with running.log_path.open("r+b") as log:
        log.truncate(1 << 40)  # a file with a hole: it takes no disk, and no machine's memory has room for it
        log.seek(0, os.SEEK_END)
        log.write(b"\nOutOfMemoryError: killed\n")
    end(running)
    with pytest.raises(ServingError, match=r"server\.log\): OutOfMemoryError: killed$"):
        await running.token()


async def test_the_watch_goes_on_through_a_slow_moment_and_notices_the_end(running, management, monkeypatch, tmp_path):
    monkeypatch.setattr(server_foreground, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(server_foreground, "WORKERS_SECONDS", 0.01)
    token_file = tmp_path / "token"
    stack = contextlib.ExitStack()
    watching = asyncio.create_task(_watch(running, stack.enter_context(_secret(token_file)), print))
    management.how = "slow"
    await asyncio.sleep(3 * SLOW)
    assert not watching.done()
    assert token_file.read_text() == "inference-0"
    assert token_file.stat().st_mode & 0o777 == 0o600
    management.how = "well"
    end(running)
    with pytest.raises(ServingError, match="has ended"):
        await watching
    stack.close()
    assert not token_file.exists()


@pytest.mark.parametrize(("how", "seconds", "in_each_round"), [
    ("well", 1e9, False), ("well", 0.0, True), ("refuses", 0.02, True)])
async def test_workers_that_are_ready_are_seldom_looked_at(running, management, monkeypatch, how, seconds,
                                                           in_each_round):
    monkeypatch.setattr(server_foreground, "WATCH_SECONDS", 0.001)
    monkeypatch.setattr(server_foreground, "WORKERS_SECONDS", seconds)
    management.how = how
    rounds, enough = 0, asyncio.Event()

    def count(_):
        nonlocal rounds
        rounds += 1
        if rounds == 200:
            enough.set()

    running._echo = count
    watching = asyncio.create_task(_watch(running, unwritten, print))
    async with asyncio.timeout(60):
        await enough.wait()
    watching.cancel()
    assert (management.described > 20) == in_each_round
    assert (management.described == 0) != in_each_round


async def test_a_worker_that_was_given_up_is_said_once_and_so_is_its_return(running, management, monkeypatch):
    monkeypatch.setattr(server_foreground, "WATCH_SECONDS", 0.001)
    monkeypatch.setattr(server_foreground, "WORKERS_SECONDS", 0.0)
    monkeypatch.setattr(server_foreground, "MISSING_SECONDS", 0.0)
    running._lanes, management.workers, said = (Lane("echo", 2, 8),), 2, []
    watching = asyncio.create_task(_watch(running, unwritten, said.append))
    for workers, line in ((1, "1 of 2 workers are ready: "), (2, "all 2 workers are ready again")):
        seen = management.described
        await until(lambda seen=seen: management.described > seen + 3)
        management.workers = workers
        await until(lambda line=line: said and said[-1].startswith(line))
    watching.cancel()
    await asyncio.wait([watching])
    assert len(said) == 2


async def test_a_server_that_never_answers_is_hopeless_in_the_end(running, management, monkeypatch):
    monkeypatch.setattr(server_foreground, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(server_foreground, "WORKERS_SECONDS", 0.01)
    monkeypatch.setattr(server_foreground, "HOPELESS_SECONDS", 2 * SLOW)
    management.how = "refuses"
    with pytest.raises(ServingError, match=r"no worker has been ready for .* s: OutOfMemoryError: killed$"):
        await _watch(running, unwritten, print)


async def test_a_token_file_of_somebody_else_stays_when_the_start_fails(tmp_path):
    existing = tmp_path / "existing"
    existing.write_text("precious")
    with pytest.raises(ServingError, match="there is no archive"):
        await serve_forever(ServerSettings(tmp_path / "missing.mar"), print, token_file=existing)
    assert existing.read_text() == "precious"


def test_only_what_was_written_is_removed(tmp_path):
    path = tmp_path / "token"
    with _secret(path) as write:
        write("mine")
    assert not path.exists()
    with _secret(path) as write:
        write("mine")
        path.write_text("another server's")
    assert path.read_text() == "another server's"
    with _secret(path):
        pass
    assert path.read_text() == "another server's"


@pytest.mark.parametrize(("place", "why"), [
    ("nowhere/token", "can't write there: No such file"), ("file/token", "can't write there: Not a directory"),
    (".", "this is a folder; wanted a file"), ("pipe", "this is a device or a pipe; wanted a file")])
async def test_a_token_file_that_cant_be_written_is_refused_before_the_start(tmp_path, place, why):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    # There is no archive either: that would be found at the start.
    with pytest.raises(UsageError, match=rf"--token-out .*: {why}") as caught:
        await serve_forever(ServerSettings(tmp_path / "missing.mar"), print, token_file=tmp_path / place)
    assert "\n" not in str(caught.value)


def test_a_token_file_that_can_no_longer_be_written_is_named(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    with _secret(folder / "token") as write:
        folder.rmdir()
        with pytest.raises(UsageError, match="can't be written: No such file or directory"):
            write("mine")
