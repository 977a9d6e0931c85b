"""The loop of a verb: what a store answers after the end is not printed, and signals end it, whatever runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
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

from batch_client.__main__ import end_like_ctrl_c
from batch_client.eventloop import run_until_complete, run_verb
from support.cli import heeded
from support.web import in_a_thread


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
    server = SlowServer()
    with in_a_thread(server):
        yield server
        server.may_answer.set()


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


class RaisesWhenFreed:
    """A signal that comes while C calls Python: what its handler raises there is printed, and lost."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


async def signalled(number: int) -> str:
    freed = RaisesWhenFreed(number)
    del freed
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.Event().wait(), 1)
    return "went on"


@pytest.fixture(params=[signal.SIGTERM, signal.SIGHUP])
def ending(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal that a verb answers, in a process that ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with heeded(signal.SIGTERM), heeded(signal.SIGHUP):
            end_like_ctrl_c()
            yield request.param
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_verb_ends_at_a_signal_in_what_c_calls_though_sigint_is_ignored(ending):
    handler = signal.getsignal(ending)
    with pytest.raises(asyncio.CancelledError):
        run_verb(signalled(ending))
    assert signal.getsignal(ending) is handler


def test_what_a_verb_added_to_its_loop_is_taken_back(ending):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]

    async def main() -> None:
        for number in numbers:
            asyncio.get_running_loop().add_signal_handler(number, print)
        assert [signal.getsignal(number) for number in numbers] != before

    run_verb(main())
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_after_the_verb_ended_is_no_longer_its_own(ending):
    """A thread that asyncio waits for at the end may take long."""
    entered = threading.Event()

    def slow() -> None:
        entered.set()
        time.sleep(0.5)
        signal.pthread_kill(threading.main_thread().ident, ending)
        time.sleep(0.5)

    async def main() -> None:
        asyncio.get_running_loop().run_in_executor(None, slow)
        assert await asyncio.to_thread(entered.wait, 60)

    with pytest.raises(KeyboardInterrupt):
        run_verb(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_signal_raises_in_what_c_calls_is_lost(ending):
    """The control: without the verb's handlers it goes on."""
    assert run_until_complete(signalled(ending)) == "went on"


def test_a_verb_goes_on_at_a_hangup_that_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_verb(signalled(signal.SIGHUP)) == "went on"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
