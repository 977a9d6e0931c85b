"""A server in the foreground: until it is cancelled, with its token in a file and its log told.

Rule: what goes wrong beside the server (a reader that left, a full disk) does not end it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from batch_client.errors import CredentialsError, ServingError, UsageError
from batch_client.files import replace_file, require_writable
from batch_client.server import EmbeddedServer, ServerSettings
from batch_client.server_lanes import Lane

__all__ = ["serve_forever"]

WATCH_SECONDS = 2.0  # between looks at the log and the life of a server that serves
# From a look that found its workers ready to the next: an answer takes TorchServe 10 ms of a core, which the model
# could have had.
WORKERS_SECONDS = 30.0
MISSING_SECONDS = 60.0  # with fewer ready than were started, until it is said: one that died is back sooner
HOPELESS_SECONDS = 600.0  # without a ready worker; TorchServe itself gives a worker up after maxRetryTimeoutInSec


async def serve_forever(
    settings: ServerSettings,
    announce: Callable[[EmbeddedServer], None],
    *,
    token_file: Path | None = None,
    echo: Callable[[str], None] | None = None,
    warn: Callable[[str], None] = print,
) -> NoReturn:
    """Serves until it is cancelled, and ends the server then.

    announce: called once, when every worker is ready. token_file: holds the current token with mode 0600, is replaced
    at each renewal (the old token dies then) and removed at the end. echo: gets the server's log as it grows, from its
    first line on, and the last of one that does not start. warn: gets a line where something beside the server goes
    wrong, or a worker is missing.

    Raises UsageError when the token file can't be written at the start, ServingError when the server does not start,
    ends by itself, or has had no worker for HOPELESS_SECONDS.
    """
    if token_file is not None:
        require_writable(token_file, "--token-out")
    async with EmbeddedServer(settings, echo=echo) as server:
        with _secret(token_file) as write:
            write(await server.token())  # before it is said to be there
            announce(server)
            await _watch(server, write, warn)


async def _watch(server: EmbeddedServer, write: Callable[[str | None], None], warn: Callable[[str], None]) -> NoReturn:
    workers, failing = _Workers(server, warn), False
    while True:
        server.tell_log()
        failing = await _told(server, write, warn, failing=failing)
        server.sweep()
        await workers.look()
        await asyncio.sleep(min(WATCH_SECONDS, server.renewal_due_in() + 0.1))


async def _told(server: EmbeddedServer, write: Callable[[str | None], None], warn: Callable[[str], None], *,
                failing: bool) -> bool:
    """Whether the token can't be written, by us or TorchServe: a disk is full, a folder gone. Those who know it go on
    meanwhile.
    """
    try:
        write(await server.token())
        server.require_key_file()
    except (UsageError, CredentialsError) as error:
        if not failing:
            warn(f"{error}; it is tried again every few seconds, and nobody is told of the current token until then")
        return True
    if failing:
        warn("the current token is told again")
    return False


class _Workers:
    """A server's workers, looked at now and then."""

    def __init__(self, server: EmbeddedServer, warn: Callable[[str], None]) -> None:
        self._server, self._warn = server, warn
        self._last_ready = self._last_all = time.monotonic()
        self._missing = False

    async def look(self) -> None:
        """Raises ServingError when a lane has had no ready worker for HOPELESS_SECONDS."""
        now = time.monotonic()
        if now - self._last_ready < WORKERS_SECONDS:
            return
        try:
            ready = [await self._ready_in(lane) for lane in self._server.lanes]
        except CredentialsError:  # of this something is said already, and it is no worker's fault
            self._last_ready = now
            return
        except ServingError:  # a slow answer says nothing yet, and an end `token` will see
            ready = []
        if ready and all(ready):
            self._last_ready = now
        elif now - self._last_ready > HOPELESS_SECONDS:
            raise ServingError(f"no worker has been ready for {HOPELESS_SECONDS:g} s: {self._server.last_words()}")
        if ready:
            self._say(sum(ready), sum(lane.workers for lane in self._server.lanes), now)

    async def _ready_in(self, lane: Lane) -> int:
        described = await self._server.describe(lane.name)
        return sum(worker["status"] == "READY" for worker in described["workers"])

    def _say(self, ready: int, started: int, now: float) -> None:
        if ready >= started:
            self._last_all = now
        missing = now - self._last_all > MISSING_SECONDS
        if missing and not self._missing:
            self._warn(f"{ready} of {started} workers are ready: TorchServe gives up one that fails to start for some "
                       "minutes; the log says why they died, and only a new `serve` brings back one that was given up")
        if self._missing and not missing:
            self._warn(f"all {started} workers are ready again")
        self._missing = missing


@contextlib.contextmanager
def _secret(path: Path | None) -> Iterator[Callable[[str | None], None]]:
    """A function that puts a token into the file; what it wrote, and nothing else, is removed after the block."""
    written: str | None = None

    def write(token: str | None) -> None:
        nonlocal written
        if path is not None and token is not None and token != written:
            _write_secret(path, token)
            written = token

    try:
        yield write
    finally:
        if path is not None and written is not None:
            with contextlib.suppress(OSError, UnicodeDecodeError):  # by now it is somebody else's
                if path.read_text("ascii") == written:
                    path.unlink()


def _write_secret(path: Path, text: str) -> None:
    """Replaces `path` at once by a file that only its owner can read; raises UsageError when that can't be done."""
    try:
        replace_file(path, text, 0o600)
    except OSError as error:
        raise UsageError(f"--token-out {path}: can't be written: {error.strerror}") from error
