"""`predict` at a server that has no room: it asks again, and says what is the matter where that does not end."""

from __future__ import annotations

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from batch_client import cli
from batch_client.cli import predict
from support.web import in_a_thread

FULL = {"code": 503, "type": "ServiceUnavailableException",
        "message": 'Model "toy" has no worker to serve inference request. Please use scale workers API to add workers.'}


@contextmanager
def server_that_is_full(times):
    """A server that answers so many queries as TorchServe does whose queue is full; its URL, and what it received."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            full = len(received) <= times
            body = json.dumps(FULL if full else {"predictions": [[1.5]]}).encode()
            self.send_response(503 if full else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with in_a_thread(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, received


@pytest.fixture
def query(tmp_path):
    path = tmp_path / "one.json"
    path.write_text("[[1, 2]]")
    return str(path)


def test_a_server_whose_queue_is_full_is_asked_the_same_again(query, capsys):
    with server_that_is_full(3) as (url, received):
        assert cli.main(["predict", query, "--endpoint", url, "--model", "toy"]) == 0
    assert received == [b"[[1, 2]]"] * 4
    assert json.loads(capsys.readouterr().out) == {"predictions": [[1.5]]}


def test_one_server_is_asked_and_who_names_two_is_told(query, capsys, monkeypatch):
    with server_that_is_full(0) as (url, received):
        two = ["--endpoint", url, "--endpoint", "http://127.0.0.1:9"]
        assert cli.main(["predict", query, *two, "--model", "toy"]) == 64
        assert "--endpoint is given 2 times, wanted once: predict asks one server" in capsys.readouterr().err
        assert received == []
        monkeypatch.setenv("BATCH_CLIENT_ENDPOINT", f"{url} http://127.0.0.1:9")
        assert cli.main(["predict", query, "--model", "toy"]) == 0


def test_a_queue_that_stays_full_is_said_in_words_of_ours(query, capsys, monkeypatch):
    monkeypatch.setattr(predict, "SECONDS", 1.0)
    with server_that_is_full(10_000) as (url, received):
        assert cli.main(["predict", query, "--endpoint", url, "--model", "toy"]) == 69
    assert len(received) > 2
    said = capsys.readouterr().err
    assert f"{url}: the server had no room for 1 s: its queue is full, or its workers are starting again" in said
    assert "no worker to serve" not in said
