"""Standard error that never blocks the run: a reader that stops reading loses log lines, not predictions."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from typing import TextIO

__all__ = ["PatientStream", "say"]

MOST_WAITING = 1 << 20  # characters; a piece that comes before that may go beyond it
CLOSE_SECONDS = 1.0


class PatientStream:
    """A text stream written by a thread of its own; pieces that find MOST_WAITING in its queue are dropped."""

    def __init__(self, target: TextIO | None = None) -> None:
        self._target = target or sys.stderr
        self._descriptor = _descriptor_of(self._target)
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._waiting = 0
        self._lock = threading.RLock()  # tqdm writes when it is collected, which may be anywhere in a `write`
        self._thread = threading.Thread(target=self._drain, name="stderr", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        with self._lock:
            if text and self._waiting < MOST_WAITING:
                self._waiting += len(text)
                self._queue.put(text)
        return len(text)

    def flush(self) -> None:
        """Nothing to do: the thread flushes after each piece."""

    def isatty(self) -> bool:
        return self._target.isatty()

    @property
    def encoding(self) -> str:
        return self._target.encoding or "utf-8"

    def fileno(self) -> int:
        return self._target.fileno()

    def close(self) -> None:
        """Wait a moment for what is still queued."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _drain(self) -> None:
        while (text := self._queue.get()) is not None:
            # Nobody listens any more; the run goes on.
            with contextlib.suppress(OSError, ValueError):
                self._write(text)
            with self._lock:
                self._waiting -= len(text)

    def _write(self, text: str) -> None:
        if self._descriptor is None:
            self._target.write(text)
            self._target.flush()
            return
        # Not through the target: a thread stuck in its buffer holds a lock that the interpreter wants at its end.
        data = text.encode(self.encoding, "backslashreplace")
        while data:
            data = data[os.write(self._descriptor, data):]


def say(line: str) -> None:
    """One line on standard error; a reader that has stopped reading misses it, and the process ends all the same."""
    stream = PatientStream()
    stream.write(f"{line}\n")
    stream.close()


def _descriptor_of(target: TextIO) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return target.fileno()
    return None
