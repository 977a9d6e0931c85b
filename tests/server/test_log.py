"""A server's log on the disk: a model that prints for weeks does not fill it."""

import asyncio

from batch_client import server as server_module
from batch_client import serving
from batch_client.server import EmbeddedServer, ServerSettings
from batch_client.server_foreground import serve_forever
from batch_client.serving import open_servers
from batch_client.spec import ServerSpec


async def test_the_log_of_a_run_does_not_grow_for_ever(make_archive, monkeypatch, until):
    """TorchServe says more at its start than is left of it here."""
    monkeypatch.setattr(server_module, "MOST_LOG_BYTES", 100)
    monkeypatch.setattr(serving, "LOG_SECONDS", 0.01)
    async with open_servers(ServerSpec(archive=make_archive(), workers=1)) as servers:
        (server,) = servers.tokens.values()
        log = server.log_path
        await until(lambda: log.stat().st_size < 100)
        assert log.stat().st_size < 100
        assert (await server.describe())["workers"][0]["status"] == "READY"
    assert not log.exists()


async def test_a_log_in_a_folder_that_somebody_named_is_left_alone(make_archive, monkeypatch, tmp_path):
    monkeypatch.setattr(server_module, "MOST_LOG_BYTES", 100)
    async with EmbeddedServer(ServerSettings(make_archive(), workers=1, log_dir=tmp_path)) as server:
        server.tell_log()
        assert server.log_path.stat().st_size > 100


async def test_the_log_is_told_while_a_model_loads(make_archive, tmp_path, until):
    loading = f"""
import os, time

def handle(rows, context):
    print("it loads", flush=True)
    while not os.path.exists({str(tmp_path / "go")!r}):
        time.sleep(0.01)
    return [""]
"""
    told, ready = [], asyncio.Event()
    serving = asyncio.create_task(serve_forever(ServerSettings(make_archive(loading), workers=1),
                                                lambda _: ready.set(), echo=told.append))
    await until(lambda: "it loads" in "".join(told))
    assert "it loads" in "".join(told)
    assert not ready.is_set()
    (tmp_path / "go").touch()
    await ready.wait()
    serving.cancel()
    await asyncio.wait([serving])
    assert "".join(told).count("it loads") == 1
