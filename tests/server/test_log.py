"""A server's log on the disk: a model that prints for weeks does not fill it."""

import os

from batch_client import server as server_module
from batch_client import serving
from batch_client.server import EmbeddedServer, ServerSettings
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
        with server.log_path.open("r+") as log:
            server.shorten(log)
            assert os.fstat(log.fileno()).st_size > 100
