"""Holds a server's life to its client's: `python server_guard.py LIFELINE GRACE FOLDER SHARED COMMAND…`.

LIFELINE is the read end of a pipe whose write end only the client has. When it closes, because the client stopped the
server or was killed, the command gets SIGTERM, after GRACE seconds SIGKILL, and then whatever is left of its process
group: TorchServe's Java does not end with its parent, and a worker in the middle of a batch not with its Java. The
unpacked model, the keys and all else in FOLDER go too but for the log, which is kept for a week, and all of SHARED,
which is "" where there is none; a client that was killed can't remove them. Both are locked meanwhile: where guard and
client are killed together, a later server finds them without a lock and does the same.

Run as a file, not as a module, so that starting it imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["clean", "main"]

PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_SECONDS = 1.0
LOG_SECONDS = 7 * 24 * 3600.0  # for which the log of a server whose client was killed is kept
LOCK = "lock"  # in a folder on disk; as in folders.py


def die_with(parent: int) -> Callable[[], None] | None:
    """What the command's process does before it becomes the command: on Linux, asks to be killed with its parent."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return ask


def wakeups() -> int:
    """A descriptor that becomes readable when the command ends or this process is asked to."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return readable


def wait(command: subprocess.Popen[bytes], lifeline: int, woken: int) -> None:
    """Returns when the command has ended, the lifeline is closed, the parent is gone or a signal asks for the end."""
    parent = os.getppid()
    while command.poll() is None:
        ready, _, _ = select.select([lifeline, woken], [], [], POLL_SECONDS)
        # A forked child of the client may hold the lifeline open; who our parent is can't be held.
        if lifeline in ready or os.getppid() != parent:
            return
        if woken in ready and set(os.read(woken, 64)) - {signal.SIGCHLD}:
            return


def clean(folder: Path) -> None:
    """Removes what is in the command's folder but a log that is not old, and the folder where there is none.

    The lock stays with a log, so that a later server knows the folder as left and removes it in its time.
    """
    with contextlib.suppress(OSError):
        (folder / "models").chmod(0o700)  # which its command may only read
    entries: list[Path] = []
    with contextlib.suppress(OSError):
        entries = list(folder.iterdir())
    kept = {entry for entry in entries if entry.suffix == ".log" and _is_recent(entry)}
    if kept:
        kept.add(folder / LOCK)
    for entry in entries:
        with contextlib.suppress(OSError):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry not in kept:
                entry.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_recent(log: Path) -> bool:
    try:
        return time.time() - log.lstat().st_mtime < LOG_SECONDS
    except OSError:  # somebody else has removed it
        return False


def remove(folder: Path) -> None:
    """Removes a folder in which others may be making files: under another name they can't."""
    going = folder.with_name(f"{folder.name}.gone")
    with contextlib.suppress(OSError):
        folder.rename(going)
    for path in (going, folder):
        shutil.rmtree(path, ignore_errors=True)


def lock(place: Path, flags: int = os.O_RDONLY) -> None:
    """Holds a file or a folder locked for as long as this process lives, so that it is not taken for one left."""
    with contextlib.suppress(OSError):
        fcntl.flock(os.open(place, flags, 0o600), fcntl.LOCK_EX if flags else fcntl.LOCK_SH)


def end(command: subprocess.Popen[bytes], grace: float) -> None:
    if command.poll() is None:
        command.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(grace)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left (macOS says EPERM)
        os.killpg(command.pid, signal.SIGKILL)
    command.wait()


def main(arguments: list[str]) -> int:
    """Run the command until it or its client ends; its exit code, or 128 and the number of the signal that ended it."""
    lifeline, grace, folder, shared = int(arguments[0]), float(arguments[1]), Path(arguments[2]), arguments[3]
    woken = wakeups()
    lock(folder / LOCK, os.O_RDWR | os.O_CREAT)
    lock(folder)  # which systemd-tmpfiles goes by: it removes what is old in /tmp, but nothing below a locked folder
    if shared:
        lock(Path(shared))
    command = subprocess.Popen(
        arguments[4:],
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=die_with(os.getpid()),  # noqa: PLW1509 - this process has one thread
    )
    try:
        wait(command, lifeline, woken)
    finally:
        end(command, grace)
        try:
            clean(folder)
        finally:
            if shared:
                remove(Path(shared))
    return command.returncode if command.returncode >= 0 else 128 - command.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
