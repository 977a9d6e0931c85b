"""An embedded TorchServe with any settings, its token in a file, its processes by pid: for tests that disturb it."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import psutil

from batch_client.server import EmbeddedServer, ServerSettings

CALL_SECONDS = 120
# Settings of a server that takes any token: several endpoints of one run must share theirs.
OPEN = {"disable_token_authorization": "true"}


def shared_memory_of(family):
    """The folder of the server that is in this family of processes: its workers say so."""
    worker = next(process for process in family if "model_service_worker" in " ".join(process.cmdline()))
    return Path(worker.environ()["BATCH_HANDLER_SHARED_MEMORY"])


class Served:
    """In a `with` block: a server in an event loop of its own thread, so that a test may block.

    The token file is rewritten within a moment whenever the server's token is renewed.
    """

    def __init__(self, archive, folder, pace=0.0, environ=None, **settings):
        self.model = "toy"
        self.token_file = folder / "token"
        self._settings = ServerSettings(archive=archive, threads=1, **{"workers": 2, **settings})
        self._environ = {**os.environ, "TOY_SECONDS": str(pace), **(environ or {})}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="served", daemon=True)
        self._server = None

    def __enter__(self):
        self._thread.start()
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self):
        self._server = EmbeddedServer(self._settings, environ=self._environ)
        self._call(self._server.start())
        self._renewals = 0
        self._keeper = asyncio.run_coroutine_threadsafe(self._keep_token(self._server), self._loop)

    def stop(self):
        if self._server is not None:
            self._keeper.cancel()
            self._call(self._server.stop())
            self._server = None

    def replace(self, archive):
        """Another archive on the same port; the first server has ended before."""
        self.stop()
        self._settings = ServerSettings(**{**vars(self._settings), "archive": archive})
        self.start()

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_SECONDS)

    async def _keep_token(self, server):
        written = ""
        while True:
            token = await server.token()
            if token != written:
                new = self.token_file.with_suffix(".new")
                new.write_text(token or "none")
                new.replace(self.token_file)
                self._renewals += written != ""
                written = token
            await asyncio.sleep(min(1.0, server.renewal_due_in() + 0.01))

    @property
    def renewals(self):
        return self._renewals

    @property
    def url(self):
        return self._server.url

    @property
    def flags(self):
        return self.flags_for(self.url)

    def flags_for(self, *urls):
        """What `run` needs to use this server's token at these addresses."""
        endpoints = [word for url in urls for word in ("--endpoint", url)]
        return [*endpoints, "--model", self.model, "--token-file", str(self.token_file)]

    @property
    def log_path(self):
        return self._server.log_path

    @property
    def metrics_url(self):
        return self._server.metrics_url

    @property
    def shared(self):
        """The folder that it shares with clients, None without one."""
        return self._server._alive().shared

    def workers(self, lane=None):
        """Pids of the workers that TorchServe holds for ready, of one lane."""
        described = self._call(self._server.describe(lane))
        return [worker["pid"] for worker in described["workers"] if worker["status"] == "READY"]

    def java(self):
        guard = psutil.Process(self._server._alive().guard.pid)
        return next(child for child in guard.children() if "java" in child.name())
