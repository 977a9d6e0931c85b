"""What a store answers after the end of a run is not printed as a traceback."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import obstore
import pytest
import uvloop
from obstore.store import HTTPStore

from batch_client.eventloop import run_until_complete


class SlowServer(ThreadingHTTPServer):
    """Answers every GET once `may_answer` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), SlowHandler)
        self.asked, self.may_answer = threading.Event(), threading.Event()


class SlowHandler(BaseHTTPRequestHandler):
    server: SlowServer

    def do_GET(self) -> None:
        self.server.asked.set()
        assert self.server.may_answer.wait(60)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[SlowServer]:
    with SlowServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.may_answer.set()
        server.shutdown()
        thread.join()


def answered_late(server: SlowServer, run: Callable[..., Any], errors: Callable[[], str]) -> str:
    """Close the loop of a read by obstore that nobody awaits, then let it be answered: what that printed."""
    store = HTTPStore(f"http://127.0.0.1:{server.server_port}", client_options={"allow_http": True})

    async def leave_a_read() -> weakref.ref[Any]:
        read = weakref.ref(obstore.get_async(store, "object"))
        assert await asyncio.to_thread(server.asked.wait, 60)
        return read

    read = run(leave_a_read())
    assert read() is not None  # obstore's thread holds it, until it has answered
    server.may_answer.set()
    printed, end = "", time.monotonic() + 60
    while read() is not None and not printed:
        assert time.monotonic() < end
        time.sleep(0.005)
        repr(store)  # what obstore's threads let go is freed at its next call
        printed += errors()
    return printed + errors()


def test_a_late_answer_of_a_store_prints_nothing(server, capfd):
    assert answered_late(server, run_until_complete, lambda: capfd.readouterr().err) == ""


def test_a_late_answer_to_a_loop_of_asyncio_prints_a_traceback(server, capfd):
    """The control: the answer of the test above was late."""
    printed = answered_late(server, asyncio.run, lambda: capfd.readouterr().err)
    assert "Traceback" in printed


def test_another_thread_reaches_a_loop_that_runs():
    async def main() -> bool:
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        await asyncio.to_thread(loop.call_soon_threadsafe, came.set)
        return await asyncio.wait_for(came.wait(), 60)

    assert run_until_complete(main())


def test_another_error_of_a_loop_is_not_hidden(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(uvloop.Loop, "call_soon_threadsafe", broken, raising=False)
            with pytest.raises(RuntimeError, match="broken"):
                asyncio.get_running_loop().call_soon_threadsafe(print)

    run_until_complete(main())


def test_a_closed_loop_still_says_so_where_it_is_used():
    async def main() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    loop = run_until_complete(main())
    with pytest.raises(RuntimeError, match="closed"):
        loop.call_soon(print)
