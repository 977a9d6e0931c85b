"""`batch-client serve`: one archive, in the foreground, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batch_client.cli.options import WORKERS, split_workers
from batch_client.cli.stream import PatientStream
from batch_client.cli.verb import Verb
from batch_client.errors import UsageError

if TYPE_CHECKING:
    from batch_client.server import EmbeddedServer

__all__ = ["command"]


@click.command("serve", cls=Verb)
@click.argument("archive")
@click.option("--workers", type=WORKERS, callback=split_workers, metavar="W[xT]", help="Worker processes, and "
              "threads of each, such as 2x4. Default: the tuning file's, else one a GPU or a core.")
@click.option("--online-workers", type=click.IntRange(0), help="Those of a lane of its own for online queries; "
              "bulk runs use the others at low priority. 0: one lane for both. Default: 1, on GPUs 0.")
@click.option("--micro-batch", type=click.IntRange(1),
              help="Records in one run of the model. Default: the tuning file's, or the archive's.")
@click.option("--address", default="127.0.0.1", show_default=True,
              help="Where to take requests. Any other than the loopback needs a TLS proxy in front.")
@click.option("--port", type=click.IntRange(1, 65535), help="Where to take requests. Default: a free one.")
@click.option("--metrics-port", type=click.IntRange(1, 65535),
              help="Prometheus metrics (no token) at ADDRESS. Default: a free one of the loopback.")
@click.option("--token-out", "token_file", type=click.Path(path_type=Path),
              help="Keep the current token in this file, for `run --token-file`; it is replaced when it is renewed.")
@click.option("--log-dir", type=click.Path(path_type=Path),
              help="Write the server's log here instead of to stderr.")
def command(archive: str, token_file: Path | None, log_dir: Path | None, **server: Any) -> None:
    """Serve ARCHIVE, a file made by `pack`, until Ctrl-C."""
    # aiohttp is slow to import, and `batch-client serve --help` imports this module.
    from batch_client.eventloop import run_verb
    from batch_client.server import ServerSettings
    from batch_client.server_foreground import serve_forever

    def announce(server: EmbeddedServer) -> None:
        lines = [f"serving {server.model_name} at {server.url}"]
        if len(server.lanes) > 1:
            online, bulk = server.lanes
            lines.append(f"workers: {online.workers} for online queries, {bulk.workers} for bulk runs ({bulk.name})")
        lines += [f"metrics at {server.metrics_url}",
                  f"token in {token_file}" if token_file else "requests need a token: start with --token-out PATH"]
        try:
            click.echo("\n".join(lines))
        except OSError:  # who started it has stopped reading: that is no reason not to serve
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    if "://" in archive:
        raise UsageError("ARCHIVE is a URL: wanted a path: fetch the archive first")
    settings = ServerSettings(archive=Path(archive), log_dir=log_dir, **server)
    # Whoever reads the log may stop reading: that must not stop the loop that renews tokens.
    stream = PatientStream()

    def echo(text: str) -> None:
        stream.write(text)

    def warn(line: str) -> None:
        stream.write(f"batch-client: {line}\n")

    try:
        with suppress(KeyboardInterrupt, asyncio.CancelledError):
            run_verb(serve_forever(settings, announce, token_file=token_file, echo=None if log_dir else echo,
                                   warn=warn))
    finally:
        stream.close()
