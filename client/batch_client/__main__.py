"""`batch-client` and `python -m batch_client`."""

import contextlib
import ctypes
import sys

from batch_client.cli import main

# malloc.h: the size above which memory comes from the kernel and goes back to it each time, and how much free memory
# goes back. Pages of chunks and requests, which are about equal, were a tenth of a run's CPU.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, HELD = -1, -3, 256 << 20


def entry_point() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
                ctypes.CDLL(None).mallopt(option, HELD)
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry_point()
