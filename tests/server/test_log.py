"""A server's log: a model that prints for weeks does not fill the disk, and why one did not load is found in it."""

import asyncio

from batch_client import server as server_module
from batch_client import serving
from batch_client.server import EmbeddedServer, ServerSettings
from batch_client.server_foreground import serve_forever
from batch_client.server_log import load_failure, silent_deaths
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


def log_of(*lines, stream="stdout"):
    return "".join(f"2026-11-22T23:02:32,253 [INFO ] W-9000-m_1.0-{stream} MODEL_LOG - {line}\n" for line in lines)


def test_the_reason_is_the_handlers_not_torchserves():
    assert load_failure(log_of("Torch worker started.")) is None
    missing = log_of("Backend worker process died.", "Traceback (most recent call last):",
                     "ModuleNotFoundError: No module named 'entry'", "",
                     "During handling of the above exception, another exception occurred:", "",
                     "ModuleNotFoundError: No module named 'ts.torch_handler.entry'")
    assert load_failure(missing) == "ModuleNotFoundError: No module named 'entry'"
    caused = log_of("Backend worker process died.", "KeyError: 'weights'", "",
                    "The above exception was the direct cause of the following exception:", "",
                    "batch_handler.errors.ModelError: weights.pt has another SHA-256")
    assert load_failure(caused) == "batch_handler.errors.ModelError: weights.pt has another SHA-256"
    no_torch = ("2026-11-22 [WARN ] W-1-m_1.0 BatchAggregator - Load model failed: m, error: Worker died.\n"
                + log_of("Traceback (most recent call last):", "ModuleNotFoundError: No module named 'torch'",
                         stream="stderr"))
    assert load_failure(no_torch) == "ModuleNotFoundError: No module named 'torch'"


def test_deaths_are_silent_until_a_worker_says_why():
    lost = "2026-11-22 [WARN ] W-{}-m_1.0 BatchAggregator - Load model failed: m, error: Worker died.\n"
    assert silent_deaths(log_of("Torch worker started.")) == 0
    assert silent_deaths(lost.format(1) + lost.format(2)) == 1
    silent = lost.format(1) + lost.format(2) + log_of("model_name: m, batchSize: 8") + lost.format(1)
    assert silent_deaths(silent) == 2
    assert silent_deaths(silent + log_of("ModuleNotFoundError: No module named 'torch'", stream="stderr")) == 0
    assert silent_deaths(silent + "Model worker did not respond in given time\n") == 0
