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


async def until(condition, said=lambda: ""):
    """Returns when `condition()` is true: other processes send no events."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, said()
        await asyncio.sleep(0.02)


@pytest.fixture(name="until")
def until_fixture():
    return until


class Family:
    """The processes under `root`, without those in `but`, by pid and start time, so that a pid used again is not taken
    for them.
    """

    def __init__(self, root, but=()):
        self.commands = {one: self.command(one) for one in root.children(recursive=True) if one not in but}

    @staticmethod
    def command(process):
        try:
            return " ".join(process.cmdline())
        except psutil.Error:  # it ended while we looked
            return ""

    def named(self, part):
        return [one for one, command in self.commands.items() if part in command]

    def alive(self):
        return [one for one in self.commands
                if one.is_running() and one.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)]

    async def gone(self):
        """Returns when nobody is alive."""
        await until(lambda: not self.alive(), lambda: f"still there: {self.alive()}")

    def kill(self):
        for one in self.alive():
            one.kill()


@pytest.fixture
def family():
    """A function: a process → its Family, which is killed by pid after the test whatever happened.

    Whatever ran before the test, such as servers that other tests share, belongs to nobody's family.
    """
    seen = []
    others = psutil.Process().children(recursive=True)

    def of(root):
        seen.append(Family(root, others))
        return seen[-1]

    yield of
    for one in seen:
        one.kill()
