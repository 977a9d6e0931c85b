"""The command line as a user runs it: in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

LONG = 300  # seconds that nothing here takes; a wait's bound, not a promise

def command(*arguments):
    return [sys.executable, "-m", "batch_client", *map(str, arguments)]


def run_cli(arguments, environ, cwd=None, check=False, timeout=180, stdin=None):
    """Run a command to its end. With `check` a failure shows what the command said."""
    done = subprocess.run(command(*arguments), env=environ, cwd=cwd, capture_output=True, text=stdin is None,
                          timeout=timeout, check=False, input=stdin)
    if check:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def until(condition, going_on=lambda: True, said=lambda: ""):
    """Wait until `condition()` holds, as long as `going_on()`."""
    end = time.monotonic() + LONG
    while not condition():
        assert going_on(), f"ended too early: {said()[-2000:]}"
        assert time.monotonic() < end, said()[-2000:]
        time.sleep(0.02)


@contextmanager
def heeded(number):
    """Whatever is started meanwhile does not ignore this signal, though this process may (`nohup make test &`)."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


class ServeProcess:
    """`batch-client serve` in the background, with its URL and a current token."""

    def __init__(self, archive: Path, folder: Path, environ, *flags):
        self.token_file = folder / "token"
        self.log_dir = folder / "log"
        self._arguments = command("serve", archive, "--token-out", self.token_file, "--log-dir", self.log_dir, *flags)
        self._environ = environ
        self.model = archive.stem

    def __enter__(self):
        self.process = subprocess.Popen(self._arguments, env=self._environ, stdout=subprocess.PIPE, text=True)
        said = []
        for line in self.process.stdout:
            said.append(line)
            found = re.search(r"metrics at (\S+)", line)
            if found:
                self.metrics_url = found[1]
            if line.startswith("token"):
                break
        found = re.search(r"at (http\S+)", "".join(said))
        assert found, said
        self.url = found[1]
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.stdout.close()

    @property
    def token(self):
        return self.token_file.read_text().strip()

    @property
    def flags(self):
        """What `run` and `predict` need to use this server."""
        return ["--endpoint", self.url, "--model", self.model, "--token-file", str(self.token_file)]

    @property
    def headers(self):
        return {"Authorization": f"Bearer {self.token}"}
