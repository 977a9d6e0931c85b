"""A small disk, for what is to find it full."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest


@contextmanager
def small_disk(path, nbytes):
    """A disk of so many bytes over a folder, which is the owner's alone."""
    if sys.platform != "linux":
        pytest.skip("a small disk needs Linux's tmpfs")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes},mode=0700", "tmpfs", path],
                          capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)  # a process may still be ending there
