"""A virtual environment for each contender that is not part of this project, made once and kept.

An environment is layered on the interpreter that runs the benchmark: its own packages come first, then those of the
benchmark, so torch, numpy and zarr are the same files for everybody and are not installed again. A package that a
contender needs in another version goes into its own environment and wins there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

__all__ = ["EnvironmentFailedError", "default_folder", "interpreter"]

REQUIREMENTS = Path(__file__).parent / "requirements"
INSTALL_SECONDS = 1800


class EnvironmentFailedError(Exception):
    """An environment that can't be made; the message is one line."""


def default_folder() -> Path:
    """Where environments are kept unless the caller says another place: the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "batch-client-benchmarks"


def interpreter(name: str, folder: Path, base: str = sys.executable) -> Path:
    """The Python of the environment with `requirements/NAME.txt`, made by `base` if it is not there as they are now.

    `base` is of the same minor version as this interpreter, whose compiled packages it has to load.

    Raises EnvironmentFailedError with pip's own reason.
    """
    home, wanted = folder / name, _wanted(name, base)
    python, done = home / "bin" / "python", home / "requirements.done"
    if done.is_file() and done.read_text("utf-8") == wanted:
        return python
    print(f"making the environment of {name} in {home}", flush=True)
    _call([base, "-m", "venv", "--clear", str(home)])
    _layer(python)
    _call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r",
           str(REQUIREMENTS / f"{name}.txt")])
    done.write_text(wanted, "utf-8")
    return python


def _wanted(name: str, base: str) -> str:
    """What an environment was made from: another interpreter or other versions make another one."""
    files = (REQUIREMENTS / f"{part}.txt" for part in ("shared", name))
    return "\n".join([base, sys.executable, sys.version, *(file.read_text("utf-8") for file in files)])


def _layer(python: Path) -> None:
    """Put the benchmark's packages behind the environment's own; its `.pth` files are not followed."""
    site = _call([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "benchmark.pth").write_text("".join(f"{path}\n" for path in sorted(ours)), "utf-8")


def _call(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFailedError(f"{command[0]}: {error}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise EnvironmentFailedError(next((line for line in said if line.startswith("ERROR")), said[-1]))
    return done.stdout
