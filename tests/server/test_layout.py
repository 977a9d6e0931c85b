"""serve_config/ is found wherever the package lives, and the Dockerfile's lines fit what they copy and start."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batch_client.cli.serve import command
from batch_client.errors import ServingError
from batch_client.resources import REQUIRED, serve_config_dir
from batch_client.server import EmbeddedServer, ServerSettings
from batch_client.server_config import _escape

ROOT = Path(__file__).parents[2]


def stages():
    """The Dockerfile's instructions, (NAME, rest), by the name of their stage."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    found, current = {}, None
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, rest = line.strip().split(maxsplit=1)
        if name == "FROM":
            current = found.setdefault(rest.split(" AS ")[1], [])
        elif current is not None:
            current.append((name, rest))
    return found


def instruction(stage, name):
    return next(rest for one, rest in stages()[stage] if one == name)


def copy_like_docker(target):
    """Follows the COPY lines of the stage that holds the sources."""
    for name, rest in stages()["source"]:
        if name == "COPY":
            *sources, destination = shlex.split(rest)
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, target / destination, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, target / destination)


@pytest.fixture(scope="module")
def docker_source(tmp_path_factory):
    target = tmp_path_factory.mktemp("src")
    copy_like_docker(target)
    return target


def installed_from(source, tmp_path):
    """A folder with a wheel of `source` installed in it."""
    for arguments in (
        ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)],
        ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "site")],
    ):
        wheels = [str(wheel) for wheel in (tmp_path / "dist").glob("*.whl")] if "pip" in arguments else []
        done = subprocess.run([sys.executable, *arguments, *wheels], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / "site"


def found_by(site, folder):
    """What serve_config_dir says in a process that sees only `site`."""
    code = "from batch_client.resources import serve_config_dir; print(serve_config_dir())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder,
                          env={"PYTHONPATH": str(site), "PATH": os.environ["PATH"]})
    return Path(done.stdout.strip())


def test_a_checkout_uses_its_own_folder():
    assert serve_config_dir({}) == ROOT / "serve_config"


@pytest.mark.parametrize("origin", ["checkout", "dockerfile"])
def test_a_wheel_carries_it(tmp_path, origin, docker_source):
    site = installed_from(ROOT if origin == "checkout" else docker_source, tmp_path)
    assert found_by(site, tmp_path) == site / "batch_client" / "_serve_config"
    for name in REQUIRED:
        carried = site / "batch_client" / "_serve_config" / name
        assert carried.read_bytes() == (ROOT / "serve_config" / name).read_bytes()
    # The guard is started as a file, so it has to be one.
    assert (site / "batch_client" / "server_guard.py").is_file()


def test_a_folder_may_be_named_from_where_the_command_is(tmp_path, monkeypatch):
    for name in REQUIRED:
        (tmp_path / "here" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "here" / name).touch()
    monkeypatch.chdir(tmp_path)
    assert serve_config_dir({"BATCH_CLIENT_SERVE_CONFIG": "here"}) == tmp_path / "here"


@pytest.mark.parametrize("value", ["/home/josé/x", "C:\\x", "/home/ключ", "/home/😀", "a\nb", "/plain"])
def test_java_reads_a_value_back_as_it_is(value):
    escaped = _escape(value)
    assert escaped.isascii()
    assert "\n" not in escaped
    assert read_as_java(escaped) == value


def read_as_java(text):
    """What java.util.Properties makes of a value (its documentation, `load`)."""
    units, at = [], 0
    while at < len(text):
        if text[at] != "\\":
            units.append(ord(text[at]))
            at += 1
        elif text[at + 1] == "u":
            units.append(int(text[at + 2:at + 6], 16))
            at += 6
        else:
            units.append(ord({"n": "\n", "t": "\t", "r": "\r", "f": "\f"}.get(text[at + 1], text[at + 1])))
            at += 2
    return b"".join(unit.to_bytes(2, "little") for unit in units).decode("utf-16-le")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ServingError, match=str(tmp_path)):
        serve_config_dir({"BATCH_CLIENT_SERVE_CONFIG": str(tmp_path)})


@pytest.mark.parametrize(("text", "said"), [
    ("blacklist_env_vars=AWS_.*\n", "has no vmargs: begin with a copy"),
    ("# nothing", "has no vmargs and no blacklist_env_vars: begin with a copy"),
    ("# für uns\n", "can't be read: 'ascii' codec"),
])
async def test_a_folder_of_ones_own_that_lacks_what_a_start_reads_is_named(text, said, make_archive, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(ROOT / "serve_config", own)
    (own / "config.properties").write_text(text, "utf-8")
    server = EmbeddedServer(ServerSettings(make_archive(), workers=1),
                            environ={**os.environ, "BATCH_CLIENT_SERVE_CONFIG": str(own)})
    with pytest.raises(ServingError, match=f"{own / 'config.properties'} {said}"):
        await server.start()


def test_the_image_starts_what_the_command_line_understands():
    words = json.loads(instruction("server", "ENTRYPOINT")) + json.loads(instruction("server", "CMD"))
    assert words[:2] == ["batch-client", "serve"]
    context = command.make_context("serve", words[2:])
    assert context.params["archive"] == "/models/model.mar"
    assert context.params["address"] == "127.0.0.1"
    assert str(context.params["port"]) in instruction("server", "HEALTHCHECK")
    assert str(context.params["token_file"]) in instruction("server", "HEALTHCHECK")


@pytest.mark.parametrize("stage", ["client", "server"])
def test_the_images_run_as_somebody_without_rights(stage):
    assert instruction(stage, "USER").split(":")[0] not in ("root", "0")
    assert isinstance(json.loads(instruction(stage, "ENTRYPOINT")), list)


def test_what_is_installed_is_pinned_and_what_it_is_built_with():
    for stage in ("client-environment", "torch"):  # server-environment is made from torch
        names = [name for name, _ in stages()[stage]]
        assert ("ENV", "PIP_CONSTRAINT=/src/constraints.txt") in stages()[stage]
        assert names.index("ENV") < names.index("RUN")
