"""One started TorchServe as a process: its private folder, its guard, and the lifeline that holds it.

Rule: whatever a start makes is gone after its end, but for a log that somebody will want to read. Java runs under
`server_guard.py`, which ends it when this process stops or dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from batch_client.errors import ServingError
from batch_client.folders import LOCK, sweep_folders
from batch_client.java import Java, java_command
from batch_client.machine import cores, device, free_ports, gpu_variables, gpus
from batch_client.regions import new_folder, remove_folder
from batch_client.resources import serve_config_dir
from batch_client.server_config import (
    LOOPBACK,
    PORTS,
    Model,
    ServerSettings,
    configuration,
    environment,
    parse_properties,
    with_tuning,
)
from batch_client.server_guard import clean
from batch_client.server_lanes import Lane
from batch_client.tuning import read_tuning

__all__ = ["ServerProcess", "launch", "settled"]

# Between SIGTERM and SIGKILL. Java resets requests in flight at once, and then waits 3 s for nothing.
JAVA_GRACE_SECONDS = 0.2
PREFIX = "batch-client-server-"
LOG_END_BYTES = 4 << 20  # of a log, where it is searched for what happened
# Bytes of a Unix socket's path that the kernel takes; workers listen on such ones, named after ports of five digits.
SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107


@dataclass
class ServerProcess:
    """One started TorchServe: its guard, the lifeline that holds it, and where its files are."""

    guard: subprocess.Popen[bytes]
    lifeline: int
    folder: Path
    shared: Path | None  # the folder that it shares with clients on this machine
    log_path: Path
    log_start: int  # where this start's lines begin in the log
    properties: Mapping[str, str]
    ready: bool = False  # every worker was ready once
    failed: bool = False  # the start was given up, for a reason that is in the log

    def address(self, key: str) -> str:
        """Where a client on this machine reaches what the property `key` names."""
        return self.properties[key].replace("//0.0.0.0:", f"//{LOOPBACK}:")

    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self.guard.poll() is not None

    def log(self) -> str:
        """What this start has logged, of much the end: a model may print for weeks."""
        with contextlib.suppress(FileNotFoundError), self.log_path.open("rb") as stream:
            stream.seek(max(self.log_start, os.fstat(stream.fileno()).st_size - LOG_END_BYTES))
            return stream.read().decode("utf-8", "replace")
        return ""

    def key(self, kind: str) -> str | None:
        """The current token of this kind from TorchServe's key file; there is none while it starts."""
        try:
            keys: dict[str, Any] = json.loads((self.folder / "key_file.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        key: str | None = keys.get(kind, {}).get("key")
        return key

    async def end(self) -> None:
        """Ends TorchServe and its workers, and removes its files; the log stays if it ended or failed by itself."""
        keep_log = self.failed or (self.ready and self.ended())
        os.close(self.lifeline)
        try:
            await asyncio.to_thread(_reap, self.guard)
        finally:
            _remove(self.folder, self.shared, keep=self.log_path if keep_log else None)


def settled(settings: ServerSettings, environ: Mapping[str, str]) -> ServerSettings:
    """`settings` with the tuning file for this kind of machine, if there is one, and with a number of workers.

    Raises ServingError for a tuning file that can't be taken.
    """
    tuning = settings.tuning or read_tuning(settings.archive, lambda: device(environ))
    if tuning is not None:
        settings = with_tuning(settings, tuning)
    return replace(settings, workers=settings.workers or gpus(environ) or cores())


def launch(
    settings: ServerSettings, model: Model, lanes: Sequence[Lane], java: Java, home: Path, environ: Mapping[str, str],
) -> ServerProcess:
    """Starts Java under its guard, in a new private folder. Raises ServingError when that can't be done."""
    try:
        sweep_folders(Path(tempfile.gettempdir()), PREFIX, clean, LOCK)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    except OSError as error:
        raise ServingError(f"the server can't be started: it needs a temporary folder ({error}); set TMPDIR to a place "
                           "that can be written") from error
    shared = new_folder() if settings.shared_memory else None
    try:
        _require_short(folder)
        for name in ("models", "workflows", "tmp"):
            (folder / name).mkdir()
        archive = folder / "models" / f"{model.name}.mar"
        archive.symlink_to(settings.archive.absolute())
        (folder / "models").chmod(0o500)
        templates = serve_config_dir(environ)
        config = folder / "config.properties"
        # Workers listen on sockets named after their port in the private temp dir; on ports only without epoll.
        worker_port = random.randrange(20_000, 30_000)  # noqa: S311 - no secret
        text = configuration(settings, model, lanes, free_ports(PORTS), worker_port, folder, templates)
        config.write_text(text, "ascii")
        properties = parse_properties(text)
        log_dir = (settings.log_dir or folder).absolute()
        log_dir.mkdir(parents=True, exist_ok=True)
        log = log_dir / f"server-{properties['inference_address'].rsplit(':', 1)[1]}.log"
        command = [
            *java_command(java, home, folder, templates / "log4j2.xml", properties["vmargs"]),
            "--python", sys.executable, "-f", str(config), "-s", str(folder / "models"),
            "-w", str(folder / "workflows"), "-ncs", "-m", ",".join(f"{lane.name}={archive.name}" for lane in lanes),
        ]
        share = max(1, cores() // lanes[-1].workers)
        seen = environment(environ, properties["blacklist_env_vars"], folder / "tmp", settings, share, lanes, shared)
        seen |= gpu_variables(environ)
        with log.open("ab") as stream:
            log_start = stream.tell()
            guard, lifeline = _guarded(command, folder, shared, seen, stream)
    except BaseException as error:
        _remove(folder, shared, keep=None)
        if isinstance(error, OSError):
            raise ServingError(f"the server can't be started: {error}") from error
        raise
    return ServerProcess(guard, lifeline, folder, shared, log, log_start, properties)


def _require_short(folder: Path) -> None:
    """Raises ServingError where the workers' sockets can't be in a folder of so long a path."""
    found = len(os.fsencode(folder / "tmp" / ".ts.sock.65535"))
    if found > SOCKET_PATH_BYTES:
        raise ServingError(f"the server can't be started: a worker's socket in {folder} would have a path of {found} "
                           f"bytes, the most is {SOCKET_PATH_BYTES}: set TMPDIR to a shorter path")


def _guarded(
    command: list[str], folder: Path, shared: Path | None, seen: Mapping[str, str], output: IO[bytes],
) -> tuple[subprocess.Popen[bytes], int]:
    """Starts `command` in `folder` under the guard, which cleans that and `shared`; returns the guard and the lifeline
    that this process alone holds.
    """
    lifeline, ours = os.pipe()  # neither is inherited
    try:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("server_guard.py")),
             str(lifeline), str(JAVA_GRACE_SECONDS), str(folder), str(shared or ""), *command],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=dict(seen),
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


def _remove(folder: Path, shared: Path | None, keep: Path | None) -> None:
    """Removes a server's private folders, but for the log `keep` if that is in one."""
    if shared is not None:
        remove_folder(shared)
    with contextlib.suppress(OSError):
        (folder / "models").chmod(0o700)
    if keep is None or keep.parent != folder:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        clean(folder)
