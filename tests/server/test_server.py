"""One real TorchServe: what it answers, what it refuses, and what it shows to whom."""

import asyncio
import json
import os
from pathlib import Path

import aiohttp
import psutil
import pytest
import pytest_asyncio

from batch_client.server import EmbeddedServer, ServerSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRETS = {"AWS_SECRET_ACCESS_KEY": "hidden", "AWS_PROFILE": "hidden", "HF_TOKEN": "hidden", "DB_PASSWORD": "hidden",
           "DB_PASS": "hidden", "PASSPHRASE": "hidden", "API_KEYS": "hidden", "TOKENS": "hidden", "AUTHTOKEN": "hidden",
           "SECRETKEY": "hidden", "GITHUB_PAT": "hidden",
           "BATCH_CLIENT_TOKEN_FILE": "hidden", "TS_ALLOWED_URLS": ".*", "TS_ENABLE_MODEL_API": "true",
           "BATCH_HANDLER_BULK_LANE": "hidden"}
HARMLESS = {"TOKENIZERS_PARALLELISM": "false", "BYPASS_CACHE": "1", "KEYBOARD": "de", "PATIENCE": "3"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(make_archive):
    settings = ServerSettings(make_archive(), workers=2, threads=1, micro_batch=64)
    async with EmbeddedServer(settings, environ=os.environ | SECRETS | HARMLESS) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session():
    async with aiohttp.ClientSession() as http:
        yield http


@pytest_asyncio.fixture(loop_scope="module")
async def ask(server, session):
    """A function: method, url → status and body, with the inference token."""

    async def send(method, url, **arguments):
        headers = {"Authorization": f"Bearer {await server.token()}"} | arguments.pop("headers", {})
        async with session.request(method, url, headers=headers, **arguments) as reply:
            return reply.status, await reply.text()

    return send


def keys(server):
    return json.loads((server.log_path.parent / "key_file.json").read_text())


@pytest.mark.parametrize("path", ["predictions/echo", "v2/models/echo/infer"])
async def test_a_body_reaches_the_handler_as_it_was_sent(server, ask, path):
    kind = {"Content-Type": "application/octet-stream"}
    status, body = await ask("POST", f"{server.url}/{path}", data=b'{"a": 1} ', headers=kind)
    assert status == 200
    seen = json.loads(body)
    assert (seen["type"], seen["text"]) == ("bytearray", '{"a": 1} ')


async def test_the_body_of_a_metadata_request_is_empty(server, ask):
    status, body = await ask("GET", f"{server.url}/predictions/echo")
    assert status == 200
    assert json.loads(body)["text"] == ""


async def test_requests_at_once_share_a_server_batch(server, ask):
    replies = await asyncio.gather(*(ask("POST", f"{server.url}/predictions/echo", data=b"x") for _ in range(64)))
    assert {status for status, _ in replies} == {200}
    assert max(json.loads(body)["requests"] for _, body in replies) > 1


async def test_workers_get_their_share_of_the_machine_and_no_secrets(server, ask):
    _, body = await ask("POST", f"{server.url}/predictions/echo", data=b"")
    seen = json.loads(body)
    environ = seen["environ"]
    assert [name for name, value in environ.items() if value == "hidden"] == []
    assert environ["TOKENIZERS_PARALLELISM"] == "false"
    assert {name: environ[name] for name in ("OMP_NUM_THREADS", "BATCH_HANDLER_THREADS", "BATCH_HANDLER_MICRO_BATCH")
            } == {"OMP_NUM_THREADS": "1", "BATCH_HANDLER_THREADS": "1", "BATCH_HANDLER_MICRO_BATCH": "64"}
    assert environ["MALLOC_TRIM_THRESHOLD_"] == environ["MALLOC_MMAP_THRESHOLD_"] == str(1 << 30)
    folders = [Path(entry) for entry in environ["PYTHONPATH"].split(os.pathsep) if entry]
    assert folders
    assert all(folder.is_absolute() for folder in folders)
    # Neither can they read them from Java's own environment.
    java = psutil.Process(seen["pid"]).parent()
    assert not set(SECRETS) & set(java.environ())


async def test_everything_it_writes_is_in_its_private_folder(server, ask):
    _, body = await ask("POST", f"{server.url}/predictions/echo", data=b"")
    folder = server.log_path.parent
    assert Path(json.loads(body)["folder"]).is_relative_to(folder)
    assert folder.stat().st_mode & 0o077 == 0
    java = psutil.Process(json.loads(body)["pid"]).parent()
    assert Path(java.cwd()) == folder
    ours = [one.path for one in java.open_files() if one.path.endswith(".log")]
    assert set(ours) == {str(server.log_path)}


async def test_describe_names_the_workers(server):
    described = await server.describe()
    assert [worker["status"] for worker in described["workers"]] == ["READY", "READY"]
    assert all(psutil.pid_exists(worker["pid"]) for worker in described["workers"])
    assert described["batchSize"] == 8
    assert described["jobQueueStatus"]["remainingCapacity"] == 64


async def test_metrics_show_the_handlers_own(server, ask, session):
    await ask("POST", f"{server.url}/predictions/echo", data=b"")
    async with session.get(server.metrics_url) as reply:
        text = await reply.text()
    for name in ("BatchRequests{", "ts_inference_requests_total{", "QueueTime{", "Requests2XX{"):
        assert name in text
    for name in ("BatchRecords", "MicroBatches", "RejectedRequests"):
        assert f"# TYPE {name} counter" in text


@pytest.mark.parametrize("path", ["predictions/echo", "v2/models/echo/infer", "ping"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
async def test_no_answer_without_the_token(server, session, path, headers):
    async with session.post(f"{server.url}/{path}", data=b"x", headers=headers) as reply:
        assert reply.status == 400
        assert (await reply.json(content_type=None))["type"] == "InvalidKeyException"


async def test_a_token_is_kept_until_it_is_refused(server):
    token = await server.token()
    assert await server.token() == token
    assert await server.token(refused="another") == token


async def test_a_refused_token_is_replaced_once_for_everyone(server, ask):
    token = await server.token()
    assert set(await asyncio.gather(*(server.token(refused=token) for _ in range(5)))) == {await server.token()}
    assert await server.token() != token
    status, _ = await ask("POST", f"{server.url}/predictions/echo", data=b"x")
    assert status == 200


SOMEWHERE = "https://example.invalid/evil.mar"


@pytest.mark.parametrize("path", [
    f"models?url={SOMEWHERE}",
    "models?url=file:///etc/passwd",
    "models?url=../../etc/passwd",
    "models?url=echo.mar&model_name=second",
    f"workflows?url={SOMEWHERE.replace('.mar', '.war')}",
    "workflows?url=file:///etc/passwd",
    "workflows?url=../models/echo.mar",
])
async def test_nothing_is_registered_over_http(server, session, path):
    headers = {"Authorization": f"Bearer {keys(server)['management']['key']}"}
    async with session.post(f"{server.management_url}/{path}", headers=headers) as reply:
        assert reply.status >= 400, await reply.text()
    async with session.get(f"{server.management_url}/models", headers=headers) as reply:
        assert [model["modelName"] for model in (await reply.json(content_type=None))["models"]] == ["echo"]


async def test_the_served_model_cannot_be_removed_over_http(server, session):
    headers = {"Authorization": f"Bearer {keys(server)['management']['key']}"}
    async with session.delete(f"{server.management_url}/models/echo", headers=headers) as reply:
        assert reply.status >= 400
    assert (await server.describe())["modelName"] == "echo"


async def test_only_the_loopback_is_listened_on(server):
    java = psutil.Process((await server.describe())["workers"][0]["pid"]).parent()
    for process in [java, *java.children(recursive=True)]:
        listening = [one.laddr.ip for one in process.net_connections() if one.status == psutil.CONN_LISTEN]
        assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1"}
        assert listening or process != java


async def test_the_key_file_is_its_owners(server):
    assert (server.log_path.parent / "key_file.json").stat().st_mode & 0o777 == 0o600


async def test_the_log_is_short_and_has_no_line_a_request(server, ask):
    before = server.log_path.read_text()
    for _ in range(10):
        await ask("POST", f"{server.url}/predictions/echo", data=b"x")
    assert server.log_path.read_text() == before
    assert "WARNING: " not in before.replace("WARNING: sun.reflect.Reflection.getCallerClass", "")
