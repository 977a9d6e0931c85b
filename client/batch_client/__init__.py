"""Score every record of a Zarr array with a model behind a server: ordered, complete, provable.

    from batch_client import RunSpec, run
    summary = run(RunSpec(input="s3://b/digits.zarr", output="s3://b/scores.zarr", archive="digits.mar"))

Names are imported when they are first used, so that the command line's help does not wait for zarr.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batch_client.api import run, run_async
    from batch_client.errors import BatchClientError
    from batch_client.events import Event, Observer
    from batch_client.spec import Records, RunSpec
    from batch_client.summary import RunSummary

    __version__: str

__all__ = [
    "BatchClientError",
    "Event",
    "Observer",
    "Records",
    "RunSpec",
    "RunSummary",
    "__version__",
    "run",
    "run_async",
]

_HOME = {
    "BatchClientError": "errors",
    "Event": "events",
    "Observer": "events",
    "Records": "spec",
    "RunSpec": "spec",
    "RunSummary": "summary",
    "run": "api",
    "run_async": "api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"batch_client.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *(name for name in __all__ if name not in globals())]


def _version() -> str:
    # Half of what a command imports before it can answer Ctrl-C.
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - as said

    try:
        return version("batch-client")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+unknown"
