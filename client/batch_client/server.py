"""An embedded TorchServe, for people without an endpoint.

Rule: it is ready when it is handed over, watched while it serves, and never left behind. What it runs on is in `java`
and `machine`, what it is told in `server_config`, its process in `server_process`, why a start fails in `server_log`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import aiohttp

from batch_client.errors import CredentialsError, ServingError, UsageError
from batch_client.java import Java, find_java, torchserve_home
from batch_client.machine import gpus, has_address, is_taken
from batch_client.regions import sweep
from batch_client.server_config import Model, ServerSettings, model_of
from batch_client.server_lanes import Lane, lanes_of
from batch_client.server_log import last_words, load_failure, silent_deaths, taken_port
from batch_client.server_process import ServerProcess, launch, settled

__all__ = ["EmbeddedServer", "ServerSettings"]

ANOTHER_PORT = "end what listens there, or take another --port or --metrics-port"
POLL_SECONDS, MOST_POLL_SECONDS = 0.1, 5.0  # between looks at a server that is starting
LOG_SETTLE_SECONDS = 0.5  # a dying worker's traceback comes in many lines
SILENT_DEATHS = 3  # of one worker, before its end counts as one without a word
SILENCE_SECONDS = 30.0  # at most, until a worker that died without a word has died again
RENEWAL_TRIES = 10  # of a token's renewal while the old one still lives
LOST_SECONDS = 5.0  # between tries of one that TorchServe made and could not write down: the old one is dead
STARTS = 3  # tries, when somebody else took a free port in between
MOST_LOG_BYTES = 64 << 20  # of a log in the private folder: a model may print for each batch
ABANDONED_SECONDS = 900.0  # no client waits as long for an answer
REFUSED = 400  # what TorchServe answers to a token that it does not take


class _PortTakenError(Exception):
    """A port is somebody else's, in TorchServe's words. For one that nobody asked for the next start takes another."""


class EmbeddedServer:
    """TorchServe with one model, as an async context manager.

    `token` makes it a token source for an endpoint at `url`. `echo` gets its log, from the start to the end, whenever
    `tell_log` is called.
    """

    def __init__(self, settings: ServerSettings, *, environ: Mapping[str, str] = os.environ,
                 echo: Callable[[str], None] | None = None) -> None:
        self._settings = settings
        self._echo = echo
        self._log: IO[str] | None = None  # from which is told; it may be deleted meanwhile
        self._environ = environ
        self._model = Model("", "")
        self._lanes: tuple[Lane, ...] = ()
        self._running: ServerProcess | None = None
        self._session: aiohttp.ClientSession | None = None
        self._renewing = asyncio.Lock()
        self._renew_at: dict[str, float] = {}
        self._keys: dict[str, str | None] = {}  # as last read: a request must not cost a look at the key file
        self._api_key: str | None = None  # makes the others, and stays: a full disk takes it from the key file

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def model_name(self) -> str:
        return self._model.name

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """That of online queries, then that of bulk runs; one for both has the model's name."""
        return self._lanes

    @property
    def url(self) -> str:
        """Where to send requests from this machine."""
        return self._alive().address("inference_address")

    @property
    def management_url(self) -> str:
        return self._alive().address("management_address")

    @property
    def metrics_url(self) -> str:
        return f"{self._alive().address('metrics_address')}/metrics"

    @property
    def log_path(self) -> Path:
        return self._alive().log_path

    def _alive(self) -> ServerProcess:
        if self._running is None:
            raise ServingError("the embedded server is not started")
        return self._running

    async def start(self) -> None:
        """Starts TorchServe and returns when every worker is ready.

        Raises UsageError for an address that is another machine's; ServingError when something is missing on this one,
        a port is taken, the tuning file can't be taken, the model does not load (with the handler's own reason) or
        `startup_seconds` are over.
        """
        self._model = model_of(self._settings.archive)
        await asyncio.to_thread(self._require_address)
        home = torchserve_home()
        java = await asyncio.to_thread(find_java, self._environ)
        self._settings = await asyncio.to_thread(settled, self._settings, self._environ)
        on_gpus = await asyncio.to_thread(gpus, self._environ)
        assert self._settings.workers is not None  # noqa: S101 - settled
        self._lanes = lanes_of(self._model.name, self._settings.workers, self._settings.online_workers, on_gpus,
                               self._settings.batch_size)
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10))
        for left in reversed(range(STARTS)):
            try:
                await self._start_once(java, home)
            except _PortTakenError as taken:
                await self._end()
                asked = self._asked_for(str(taken))
                if asked or not left:
                    await self.stop()
                    raise ServingError(f"{taken}: {ANOTHER_PORT}" if asked else
                                       f"no free ports for TorchServe in {STARTS} starts, others took them in between: "
                                       "try again") from None
            except BaseException as error:
                if self._running is not None:
                    self._running.failed = isinstance(error, ServingError)
                await self.stop()
                raise
            else:
                return

    def _require_address(self) -> None:
        """Raises UsageError and ServingError where nothing can listen: sooner than Java's stack trace would say so."""
        if ":" in self._settings.address:
            raise UsageError(f"--address {self._settings.address}: wanted a name or an IPv4 address, such as 0.0.0.0: "
                             "TorchServe takes no other")
        if not has_address(self._settings.address):
            raise UsageError(f"--address {self._settings.address}: not an address of this machine")
        for port in (self._settings.port, self._settings.metrics_port):
            if port and is_taken(self._settings.address, port):
                raise ServingError(f"{self._settings.address}:{port} is taken: {ANOTHER_PORT}")

    async def stop(self) -> None:
        """Ends TorchServe and its workers, and removes its files; the log stays if it ended or failed by itself."""
        await self._end()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def token(self, refused: str | None = None) -> str | None:
        """The current inference token, renewed at half its life.

        `refused` is one that the server has just refused: if it is still the current one, another is made. The old one
        dies at once for everyone, so renewals are done one at a time. Where a renewal fails, the old token stays: it
        may live on, and whether it does the server says.

        Raises ServingError when the server has ended, CredentialsError where it takes one that could not be read.
        """
        if self.ended():
            raise self._end_error()
        return await self._key("inference", refused)

    def require_key_file(self) -> None:
        """Raises CredentialsError where TorchServe could not write down the token that it takes now."""
        if self._alive().key("inference") is None:
            raise CredentialsError(f"TorchServe's key file in {self._alive().folder} can't be read, as where the disk "
                                   "was full when it made a token, which nobody knows then: make room there")

    def renewal_due_in(self) -> float:
        """Seconds until `token` will make another one."""
        return max(0.0, self._renew_at["inference"] - _now())

    async def describe(self, lane: str | None = None) -> dict[str, Any]:
        """TorchServe's description of a lane, by default the one of the plain name: `workers` with their `pid` and
        `status`, queue and batch size.

        Raises ServingError when the server has ended or refuses.
        """
        name = lane or self.model_name
        try:
            status, body = await self._management(f"/models/{name}")
        except (aiohttp.ClientError, TimeoutError) as error:
            if self.ended():
                raise self._end_error() from error
            raise ServingError(f"TorchServe does not answer: {str(error) or type(error).__name__}") from error
        if status != 200:
            raise ServingError(f"TorchServe does not describe {name}: {status} {body.strip()[:200]}")
        described: dict[str, Any] = json.loads(body)[0]
        return described

    def last_words(self) -> str:
        """What stands last in the server's log."""
        return last_words(self._alive().log())

    def tell_log(self) -> None:
        """Give what has been logged since the last time to `echo`, and empty the log once it is large; not one in a
        folder that somebody named.
        """
        if self._log is None:
            return
        if self._echo is not None:
            self._echo(self._log.read())
        if self._settings.log_dir is None and os.fstat(self._log.fileno()).st_size > MOST_LOG_BYTES:
            self._log.seek(0)
            self._log.truncate()  # TorchServe appends

    def sweep(self) -> None:
        """Remove what clients that were killed have left in shared memory."""
        if (shared := self._alive().shared) is not None:
            sweep(shared, ABANDONED_SECONDS)

    def ended(self) -> bool:
        """Whether TorchServe has ended by itself."""
        return self._alive().ended()

    def _end_error(self) -> ServingError:
        return ServingError(f"TorchServe with the model {self.model_name} has ended (log: {self.log_path}): "
                            f"{self.last_words()}")

    # Starting

    async def _start_once(self, java: Java, home: Path) -> None:
        self._running = launch(self._settings, self._model, self._lanes, java, home, self._environ)
        self._log = self._running.log_path.open("r+", encoding="utf-8", errors="replace")
        self._log.seek(self._running.log_start)
        self._keys, self._api_key = {}, None
        self._renew_at = dict.fromkeys(("inference", "management"), _now() + self._half_life)
        try:
            async with asyncio.timeout(self._settings.startup_seconds):
                await self._ready()
        except TimeoutError:
            raise ServingError(f"the model {self.model_name} was not ready after {self._settings.startup_seconds:g} s "
                               f"(log: {self.log_path}): {self.last_words()}") from None
        self._running.ready = True

    async def _ready(self) -> None:
        while True:
            self.tell_log()
            self._check_loading()
            began = asyncio.get_running_loop().time()
            with contextlib.suppress(aiohttp.ClientConnectionError, TimeoutError):
                asked = [(lane, *await self._management(f"/models/{lane.name}")) for lane in self._lanes]
                if all(status == 200 and _ready_workers(body) >= lane.workers for lane, status, body in asked):
                    return
                if any(status == 404 for _, status, _ in asked):
                    await self._give_up("TorchServe did not register the model")
            if load_failure(self._alive().log()) is not None:
                await self._give_up("a worker died")
            # At most half of the time is spent asking: on GPUs TorchServe runs nvidia-smi for each worker first.
            await asyncio.sleep(min(max(POLL_SECONDS, asyncio.get_running_loop().time() - began), MOST_POLL_SECONDS))

    def _check_loading(self) -> None:
        """Raises when TorchServe found a port taken or has ended by itself."""
        log = self._alive().log()
        if taken := taken_port(log):  # workers die of it too: this reason comes first
            raise _PortTakenError(taken)
        if self.ended():
            raise ServingError(f"TorchServe ended at its start (log: {self.log_path}): {last_words(log)}")

    def _asked_for(self, taken: str) -> bool:
        """Whether what TorchServe said of a port is about one that was asked for."""
        asked = {str(port) for port in (self._settings.port, self._settings.metrics_port) if port is not None}
        said = set(re.findall(r":(\d+)", taken))
        return bool(asked & said if said else asked)

    async def _give_up(self, otherwise: str) -> None:
        """Raises with the reason in the log, given a moment to be written whole, and another death if there is none."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SILENCE_SECONDS):
                await asyncio.sleep(LOG_SETTLE_SECONDS)
                while 0 < silent_deaths(self._alive().log()) < SILENT_DEATHS:
                    self._check_loading()
                    await asyncio.sleep(LOG_SETTLE_SECONDS)
        self._check_loading()
        reason = load_failure(self._alive().log()) or otherwise
        raise ServingError(f"the model {self.model_name} does not load (log: {self.log_path}): {reason}")

    # Talking to the management API

    async def _management(self, path: str) -> tuple[int, str]:
        key = await self._key("management")
        status, body = await self._get(path, key)
        if status == REFUSED:
            status, body = await self._get(path, await self._key("management", key))
        return status, body

    async def _key(self, kind: str, refused: str | None = None) -> str | None:
        """The current token of a kind, as `token` has it; None while TorchServe starts."""
        async with self._renewing:
            key = self._keys.get(kind)
            if key is None or key == refused:  # a renewal that we gave up may have been made
                key = self._read(kind)
            if (key is not None and key == refused) or self._due(kind):
                await self._renew(kind)
                key = self._read(kind)
            if key is None and refused is not None:
                self.require_key_file()
            self._keys[kind] = key or self._keys.get(kind)
            return self._keys[kind]

    def _read(self, kind: str) -> str | None:
        self._api_key = self._api_key or self._alive().key("API")
        return self._alive().key(kind)

    async def _get(self, path: str, key: str | None) -> tuple[int, str]:
        if self._session is None:
            raise ServingError("the embedded server is not started")
        headers = {"Authorization": f"Bearer {key}"}
        async with self._session.get(self.management_url + path, headers=headers) as reply:
            return reply.status, await reply.text(errors="replace")

    @property
    def _half_life(self) -> float:
        """Of a token, in seconds."""
        return self._settings.token_minutes * 30

    def _due(self, kind: str) -> bool:
        return _now() >= self._renew_at[kind] and self._api_key is not None

    async def _renew(self, kind: str) -> None:
        """Asks for a new token. TorchServe answers without a body and writes it to its key file.

        One that it does not make leaves the old one, which has half its life left; it is asked again before that ends.
        On a full disk it makes one and can't write it (its generateKeyFile empties the file): it is asked again soon.
        """
        asked = _now()
        made = False
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            status, _ = await self._get(f"/token?type={kind}", self._api_key)
            made = status == 200
        if self._alive().key(kind) is None:
            self._renew_at[kind] = _now() + LOST_SECONDS
        else:
            self._renew_at[kind] = asked + self._half_life if made else _now() + self._half_life / RENEWAL_TRIES

    # Ending

    async def _end(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            await running.end()
        if self._log is not None:
            self.tell_log()  # its last words too
            self._log.close()
            self._log = None


def _now() -> float:
    """Seconds by the clock that TorchServe ends tokens by, which goes on while a machine sleeps."""
    return time.time()


def _ready_workers(description: str) -> int:
    return sum(worker.get("status") == "READY" for worker in json.loads(description)[0].get("workers", ()))
