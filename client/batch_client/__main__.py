"""`batch-client` and `python -m batch_client`.

Rule: what takes long to import is imported where Ctrl-C is answered already.
"""

import contextlib
import ctypes
import os
import signal
import sys
import warnings
from typing import NoReturn

# malloc.h. Chunks and requests come and go in equal sizes: memory above a threshold would come from the kernel and go
# back to it each time, and each thread that decodes would have its own. New pages were a tenth of a run's CPU.
# 32 MiB is the most that every glibc takes, and the first: one that refuses it keeps its own rules for all.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
ALLOCATOR = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 256 << 20, M_ARENA_MAX: 1}
STOPPED = 75  # StoppedError's code, before its module is there
LEAST_OTHER = 3  # the first descriptor that is no standard stream


def keep_memory() -> None:
    """Have the C library keep what is freed; for a process of our own, not for a program that uses the library."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            all(mallopt(option, value) for option, value in ALLOCATOR.items())


def have_standard_streams() -> None:
    """A descriptor under 3 that is closed would become another file's, which libuv takes for a bug and aborts."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < LEAST_OTHER:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115 - for as long as the process lives
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 - as above
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115 - as above


def end_like_ctrl_c() -> None:
    """A SIGTERM, or a SIGHUP of a terminal that is closed, lets a verb without a handler of its own clean up too."""
    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # what cleans up is not to be cut off by the next of the kind
        if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.SIG_DFL):  # as jobs in the background have it
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    for name in ("SIGTERM", "SIGHUP"):
        if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


def end_process(code: int) -> NoReturn:
    """End without taking the interpreter apart. A thread of the store's library that answers meanwhile, to a read that
    nobody waits for any more, finds no interpreter and aborts the process, whatever its exit code was to be:
    https://github.com/python/cpython/issues/87135.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, and what could be said of that was said
            stream.flush()
    os._exit(code)


def entry_point() -> NoReturn:
    try:
        have_standard_streams()
        end_like_ctrl_c()
        keep_memory()
        if not sys.warnoptions:  # Python's -W or PYTHONWARNINGS
            warnings.simplefilter("ignore")  # of libraries, for who writes code: an error is one line, a log has JSON
        from batch_client.cli import main  # noqa: PLC0415 - see the rule

        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # between two instructions of these; main answers its own
        code = STOPPED
        with contextlib.suppress(OSError):
            os.write(2, b"batch-client: stopped\n")
    end_process(code)


if __name__ == "__main__":
    entry_point()
