"""What several of these share."""

import os
import subprocess

import pytest

from batch_client.cli import main


@pytest.fixture
def run_here(clean_environ, monkeypatch, capfd):
    """As run_cli, in this process and so without half a second of imports: for what is refused before anything begins.

    A function: words, working folder → how it ended and what it said.
    """
    for name in os.environ.keys() - clean_environ.keys():
        if not name.startswith("PYTEST_"):
            monkeypatch.delenv(name)

    def run(words, folder):
        monkeypatch.chdir(folder)
        capfd.readouterr()
        code = main([*map(str, words)])
        said = capfd.readouterr()
        return subprocess.CompletedProcess(words, code, said.out, said.err)

    return run
