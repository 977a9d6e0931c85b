"""What the command line ends with when something below it ends the process."""

import click
import pytest

from batch_client import cli


@pytest.mark.parametrize("code", [0, 1, "usage: train.py DATA"])
def test_code_that_ends_the_process_is_a_bug(code, monkeypatch, capfd):
    @click.command()
    def ending():
        raise SystemExit(code)

    monkeypatch.setattr(cli, "batch_client", ending)
    assert cli.main([]) == 70
    assert f"a bug in batch-client, please report it with the lines above: SystemExit: {code}" in capfd.readouterr().err
