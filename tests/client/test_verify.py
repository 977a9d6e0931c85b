"""`verify --replay`: what can't work is refused before the output is read."""

import pytest

from batch_client.cli import main
from support.faulty import calm
from support.virtual import run_virtually
from support.world import World

SERVER = ["--endpoint", "http://127.0.0.1:9", "--model", "toy"]


@pytest.mark.parametrize(("flags", "exact", "code", "wanted"), [
    ([], True, 64, "name what scores the records: --endpoint URL (repeatable) or --archive"),
    (["--endpoint", "127.0.0.1:9", "--model", "toy"], True, 64, "wanted a URL such as http://host:8080"),
    ([*SERVER, "--max-bytes-in-flight", "0"], True, 64, "--max-bytes-in-flight 0: wanted at least 1"),
    (SERVER, False, 64, "a --fast run promises no equal bytes"),
    (SERVER, True, 65, "is not what was published"),
])
def test_what_cant_be_replayed_is_refused_before_anything_is_read(flags, exact, code, wanted, monkeypatch, capfd):
    """The output is damaged, which who reads it finds."""
    world = World(1)
    run_virtually(world.live(calm(), exact=exact))
    del world.output.objects["y/c/0/0"]
    monkeypatch.setattr("batch_client.storage.open_store", lambda *_, **__: world.output)
    assert main(["verify", "out", "--replay", "1", *flags]) == code
    assert wanted in capfd.readouterr().err
