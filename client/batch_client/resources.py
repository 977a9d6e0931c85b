"""Where the files of `serve_config/` are: one resolver for a checkout, a wheel and the container.

A wheel carries them as `batch_client/_serve_config`. An editable install does not (hatchling's force-include is not
seen there), so the checkout's own folder is used. `BATCH_CLIENT_SERVE_CONFIG` names another folder outright.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from batch_client.errors import ServingError

__all__ = ["serve_config_dir"]

REQUIRED = ("config.properties", "log4j2.xml", "model-config.yaml", "metrics.yaml")


def serve_config_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder with the server's configuration templates.

    Raises ServingError, naming what is missing and where it was looked for.
    """
    package = Path(__file__).resolve().parent
    named = environ.get("BATCH_CLIENT_SERVE_CONFIG")
    candidates = [Path(named).absolute()] if named else [package / "_serve_config", package.parents[1] / "serve_config"]
    for folder in candidates:
        if all((folder / name).is_file() for name in REQUIRED):
            return folder
    places = " or ".join(str(folder) for folder in candidates)
    raise ServingError(f"no serve_config with {', '.join(REQUIRED)} in {places}: reinstall batch-client, "
                       "or set BATCH_CLIENT_SERVE_CONFIG to such a folder")
