"""`batch-client run`: flags → RunSpec → a published output."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from batch_client.cli.options import run_options, spec_of

if TYPE_CHECKING:
    from batch_client.events import Observer
    from batch_client.spec import RunSpec
    from batch_client.summary import RunSummary


@click.command("run")
@click.argument("input_url", metavar="INPUT")
@click.argument("output_url", metavar="OUTPUT")
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the run's figures on stdout.")
@click.option("--log", type=click.Choice(["bar", "json", "none"]), default="bar", show_default=True,
              help="What standard error shows: a progress bar, JSON lines, nothing.")
def command(input_url: str, output_url: str, *, as_json: bool, log: str, **options: Any) -> None:
    """Score every record of INPUT, a Zarr array, into OUTPUT, or go on with a run that was stopped.

    INPUT and OUTPUT are URLs (s3://bucket/path) or paths. The records are scored by the servers named with --endpoint,
    or by one that is started here for --archive.
    """
    from batch_client.api import run_until_complete
    from batch_client.cli.stream import say

    spec = spec_of(input_url, output_url, options)
    summary = run_until_complete(_run(spec, log))
    if as_json:
        click.echo(json.dumps(summary.to_value()))
    else:
        say(_sentence(summary))


async def _run(spec: RunSpec, log: str) -> RunSummary:
    from batch_client.api import run_async
    from batch_client.cli.observers import LogLines, ProgressBar
    from batch_client.cli.stream import PatientStream

    stop = asyncio.Event()
    _stop_on_signals(stop)
    stream = PatientStream()
    shown: list[LogLines | ProgressBar] = []
    if log != "none":
        shown.append(ProgressBar(stream) if log == "bar" else LogLines(stream))
    observers: tuple[Observer, ...] = tuple(shown)
    try:
        return await run_async(spec, observers, stop)
    finally:
        for observer in shown:
            observer.close()
        stream.close()


def _stop_on_signals(stop: asyncio.Event) -> None:
    """The first SIGINT or SIGTERM drains; the second ends the run where it is, as safe as a kill."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def asked() -> None:
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    if sys.platform != "win32":
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked)


def _sentence(summary: RunSummary) -> str:
    if summary.already_published:
        return f"{summary.output} was published already: {summary.records:,} records, root {summary.root}"
    scored = f"{summary.scored:,} records in {summary.seconds:.1f} s"
    if not summary.published:
        return (f"{scored}: this part is done, {summary.output} is published when all parts are"
                f"{_limited_by(summary)}")
    return (f"{scored}, {summary.records_per_s:,.0f} records/s, {summary.failed:,} failed, {summary.retries:,} retries "
            f"→ {summary.output}{_limited_by(summary)}")


def _limited_by(summary: RunSummary) -> str:
    """How near to the ceiling, what kept it from more, and what to turn."""
    from batch_client.bottleneck import Limit

    if summary.limited_by is None:
        return ""
    achieved = ""
    if summary.percent_of_ceiling is not None:
        achieved = f"{summary.percent_of_ceiling:.0f} % of the model's ceiling, "
    return f"; {achieved}limited by {Limit(summary.limited_by).phrase}: {summary.advice}"
