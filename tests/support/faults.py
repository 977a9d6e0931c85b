"""What the fault tests share: how large they are, their sources and model, and a client that can be watched and ended.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr
from obstore.store import S3Store
from zarr.storage import ObjectStore

from batch_client.buckets import open_store
from batch_client.zarrstore import SourceStore
from support.cli import LONG, command, run_cli, until

# Seconds of a micro-batch of 16 records, so that a run lasts long enough to be disturbed, whatever the machine.
PACE = 0.01
RAISES, EXITS, HANGS = 1, 2, 3
RECORD_BYTES = 12 * 12
NETWORK = '''
"""The small image model of the tests, slowed down on request, that some images make raise, exit or hang."""

import os
import time

import torch

PACE = float(os.environ.get("TOY_SECONDS", "0"))


class Moody(torch.nn.Module):
    """Passes images on. One that begins with pixels 1, 2, 3 makes it raise (then 1), exit (2) or hang (3)."""

    def forward(self, images):
        time.sleep(PACE)
        first = (images[:, 0, 0, :4] * 255).round().int()
        moods = first[(first[:, :3] == torch.tensor([1, 2, 3])).all(1), 3].tolist()
        if 1 in moods:
            raise ValueError("this model does not like such an image")
        if 2 in moods:
            os._exit(9)
        if 3 in moods:
            time.sleep(3600)
        return images


def make_model():
    return torch.nn.Sequential(
        Moody(), torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(4), torch.nn.Flatten(),
        torch.nn.Linear(16, 10))
'''
# A worker that is stopped, or hangs, is given up after a few seconds.
CONFIG = b"maxBatchDelay: 1\nresponseTimeout: 4\nstartupTimeout: 120\nmaxRetryTimeoutInSec: 300\n"


@dataclass(frozen=True)
class Scale:
    """Sizes of a run, in records, and how often it is disturbed."""

    name: str
    records: int
    source_chunk: int
    output_chunk: int
    request: int
    times: int

    @property
    def chunks(self):
        return -(-self.records // self.output_chunk)

    @property
    def flags(self):
        return ["--chunk-records", self.output_chunk, "--request-records", self.request, "--in-flight", 4]


QUICK = Scale("quick", 4096, 64, 128, 16, 2)
FULL = Scale("full", 51_200, 256, 512, 64, 10)
_FULL = pytest.param(FULL, id="full", marks=pytest.mark.chaos)
each_scale = pytest.mark.parametrize("scale", [pytest.param(QUICK, id="quick"), _FULL])
only_full = pytest.mark.parametrize("scale", [_FULL])


def images_of(records):
    images = np.random.default_rng(records).integers(0, 256, (records, 12, 12), dtype=np.uint8)
    images[:, 0, 0] |= 4  # none begins as those do that the model does not like
    return images


def spoilt(images, moods):
    """Images of which some, by index, begin as those that the model does not like."""
    images = images.copy()
    for index, mood in moods.items():
        images[index, 0, :4] = 1, 2, 3, mood
    return images


def s3_store(url, environ):
    """An obstore store for what a test itself writes; not through the client."""
    bucket, _, path = url.removeprefix("s3://").partition("/")
    return S3Store(
        bucket, prefix=path, endpoint=environ["AWS_ENDPOINT_URL"], region="us-east-1",
        access_key_id=environ["AWS_ACCESS_KEY_ID"], secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
        client_options={"allow_http": True})


def write_source(url, environ, images, chunk, compressors=None):
    return zarr.create_array(store=ObjectStore(s3_store(url, environ)), data=images, chunks=(chunk, *images.shape[1:]),
                             compressors=compressors, overwrite=True)


def opened(url, environ):
    """The store that the client has at `url` where the variables are those of `environ`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        return open_store(url)


def open_output(url, environ):
    return zarr.open_group(SourceStore(opened(url, environ)), mode="r")


def run(source, output, scale, server_flags, environ, *flags, code=0):
    """A run to its end: its summary, or what it said where another exit code is wanted."""
    done = run_cli(["run", source, output, *scale.flags, "--json", "--log", "none", *server_flags, *flags], environ,
                   timeout=LONG)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout) if code == 0 else said_in_one_line(done.stderr)


def said_in_one_line(text):
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("batch-client: ")]
    assert len(lines) == 1, text
    return lines[0]


class Client:
    """`run` in the background, in a `with` block that ends it by its pid whatever happens."""

    def __init__(self, source, output, scale, server_flags, environ, *flags):
        self._arguments = command("run", source, output, *scale.flags, "--json", "--log", "json", *server_flags, *flags)
        self._environ = environ
        self._folder = tempfile.TemporaryDirectory(prefix="batch-client-tests-")
        self._out, self._log = (Path(self._folder.name) / name for name in ("out", "log"))
        self._said = None

    def __enter__(self):
        with self._out.open("wb") as out, self._log.open("wb") as log:
            self.process = subprocess.Popen(self._arguments, env=self._environ, stdout=out, stderr=log)
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._said = self.log
        self._folder.cleanup()

    @property
    def log(self):
        return self._log.read_text() if self._said is None else self._said

    def events(self, event):
        """The log's lines of one kind."""
        lines = [json.loads(line) for line in self.log.splitlines(keepends=True)
                 if line.startswith("{") and line.endswith("}\n")]
        return [line for line in lines if line["event"] == event]

    def until(self, condition):
        """Wait until `condition()` holds; the run must be going on still."""
        until(condition, lambda: self.process.poll() is None, lambda: self.log)

    def until_chunks(self, count):
        self.until(lambda: len(self.events("chunk written")) >= count)

    def finish(self, code=0):
        self.process.wait(LONG)
        assert self.process.returncode == code, f"exit {self.process.returncode}\n{self.log[-3000:]}"
        return json.loads(self._out.read_text()) if code == 0 else said_in_one_line(self.log)
