"""Archives with trivial handlers, and ways to see what is left of a server."""

import asyncio
import json
import time
import zipfile

import psutil
import pytest

# Answers each request with what its worker saw.
ECHO = """
import json, os

def handle(rows, context):
    if rows is None:
        return None
    context.metrics.add_counter("BatchRequests", len(rows))
    replies = []
    for row in rows:
        body = row.get("body")
        replies.append(json.dumps({
            "type": type(body).__name__, "text": bytes(body or b"").decode(), "requests": len(rows),
            "environ": dict(os.environ), "folder": os.getcwd(), "pid": os.getpid(),
        }).encode())
    return replies
"""
CONFIG = "maxBatchDelay: 1\nresponseTimeout: 60\nstartupTimeout: 60\n"


@pytest.fixture(scope="session")
def make_archive(tmp_path_factory):
    """A function: handler source → path of an archive with it."""

    def make(handler=ECHO, name="echo"):
        path = tmp_path_factory.mktemp("archive") / f"{name}.mar"
        manifest = {"runtime": "python", "model": {"modelName": name, "modelVersion": "1.0", "handler": "entry.py",
                                                   "configFile": "model-config.yaml"}}
        with zipfile.ZipFile(path, "w") as mar:
            mar.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
            mar.writestr("model-config.yaml", CONFIG)
            mar.writestr("entry.py", handler)
        return path

    return make


class Family:
    """The processes under `root` by pid and start time, so that a pid used again is not taken for them."""

    def __init__(self, root):
        self.processes = root.children(recursive=True)

    def named(self, part):
        return [one for one in self.processes if part in " ".join(one.cmdline())]

    def alive(self):
        return [one for one in self.processes
                if one.is_running() and one.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)]

    async def gone(self, seconds=30):
        """Waits until nobody is alive; returns who still is after `seconds`."""
        end = time.monotonic() + seconds
        while (left := self.alive()) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return left

    def kill(self):
        for one in self.alive():
            one.kill()


@pytest.fixture
def family():
    """A function: a process → its Family, which is killed by pid after the test whatever happened."""
    seen = []

    def of(root):
        seen.append(Family(root))
        return seen[-1]

    yield of
    for one in seen:
        one.kill()
