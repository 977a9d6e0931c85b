"""`batch-client` and `python -m batch_client`."""

import contextlib
import ctypes
import sys

from batch_client.cli import main

# malloc.h. Chunks and requests come and go in equal sizes: memory above a threshold would come from the kernel and go
# back to it each time, and each thread that decodes would have its own. New pages were a tenth of a run's CPU.
# 32 MiB is the most that every glibc takes, and the first: one that refuses it keeps its own rules for all.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
ALLOCATOR = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 256 << 20, M_ARENA_MAX: 1}


def keep_memory() -> None:
    """Have the C library keep what is freed; for a process of our own, not for a program that uses the library."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            all(mallopt(option, value) for option, value in ALLOCATOR.items())


def entry_point() -> None:
    keep_memory()
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry_point()
