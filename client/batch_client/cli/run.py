"""`batch-client run`: flags → RunSpec → a published output."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batch_client.cli.options import run_options, spec_of
from batch_client.cli.stream import say
from batch_client.cli.verb import Verb
from batch_client.errors import StoppedError, StorageError, UsageError
from batch_client.files import replace_file, require_writable

if TYPE_CHECKING:
    from batch_client.events import Observer
    from batch_client.report import Report
    from batch_client.spec import RunSpec
    from batch_client.summary import RunSummary


@click.command("run", cls=Verb)
@click.argument("input_url", metavar="INPUT")
@click.argument("output_url", metavar="OUTPUT")
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the run's figures on stdout.")
@click.option("--log", type=click.Choice(["bar", "json", "none"]), default="bar", show_default=True,
              help="What standard error shows: a progress bar, JSON lines, nothing.")
@click.option("--report", "page", metavar="FILE.html", type=click.Path(path_type=Path),
              help="Write a report of the run, one page: speed, what limited it, latencies, retries, scores.")
def command(input_url: str, output_url: str, *, as_json: bool, log: str, page: Path | None, **options: Any) -> None:
    """Score every record of INPUT, a Zarr array, into OUTPUT, or go on with a run that was stopped.

    INPUT and OUTPUT are URLs (s3://bucket/path) or paths. The records are scored by the servers named with --endpoint,
    or by one that is started here for --archive.
    """
    from batch_client.eventloop import run_verb

    spec = spec_of(input_url, output_url, options)
    with _page_about(spec, page) as observers:
        try:
            summary = run_verb(_run(spec, log, observers))
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise StoppedError("stopped; the same command goes on from here") from None
        if as_json:
            click.echo(json.dumps(summary.to_value()))
        else:
            say(_sentence(summary))


async def _run(spec: RunSpec, log: str, observers: tuple[Observer, ...]) -> RunSummary:
    from batch_client.api import run_async
    from batch_client.cli.observers import LogLines, ProgressBar
    from batch_client.cli.stream import PatientStream

    stop = asyncio.Event()
    _stop_on_signals(stop)
    stream = PatientStream()
    shown: list[LogLines | ProgressBar] = []
    if log != "none":
        shown.append(ProgressBar(stream) if log == "bar" else LogLines(stream))
    try:
        return await run_async(spec, (*shown, *observers), stop)
    finally:
        for observer in shown:
            observer.close()
        stream.close()


@contextmanager
def _page_about(spec: RunSpec, page: Path | None) -> Iterator[tuple[Observer, ...]]:
    """The observers of a run that leaves a page behind, also where it ends early: then the run's own error stands,
    whatever becomes of the page. Raises UsageError before the run, and StorageError after one that went well.
    """
    if page is None:
        yield ()
        return
    from batch_client.buckets import is_inside, open_store
    from batch_client.report import Report
    from batch_client.urls import split_url

    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(page)):  # pathlib has made one slash of two
        raise UsageError(f"--report {page}: wanted a file on this machine, not a URL")
    require_writable(page, "--report")
    local = split_url(spec.output).scheme in ("", "file")
    if local and is_inside(page.absolute().as_uri(), open_store(spec.output).url):
        raise UsageError(f"--report {page} is in OUTPUT {spec.output}: wanted a place beside it")
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report {page}: the report is HTML: wanted a name that ends with .html")
    report = Report(spec.input)
    try:
        yield (report,)
    except BaseException as error:
        try:
            _write(page, report, str(error) or "it was interrupted")
        except StorageError as second:
            say(f"batch-client: {' '.join(str(second).split())}")
        raise
    _write(page, report)


def _write(page: Path, report: Report, ending: str = "") -> None:
    """The page, whole or not at all; none for a run that did not begin, and none over an earlier one where the output
    was published before. Raises StorageError, whatever went wrong: no page is worth the outcome of a run.
    """
    from batch_client.report import render

    if not report.has_something_to_say:
        return
    try:
        if report.found_published and page.exists():
            say(f"{page} is kept as it is: nothing was scored")
            return
        replace_file(page, render(report.data(ending)))
    except OSError as error:
        raise StorageError(f"{page}: the report can't be written: {error.strerror or error}") from error
    except Exception as error:
        raise StorageError(f"{page}: the report can't be drawn: {type(error).__name__}: {error}; a bug in "
                           "batch-client, please report it") from error


def _stop_on_signals(stop: asyncio.Event) -> None:
    """The first SIGINT, SIGTERM or SIGHUP drains; a second SIGINT or SIGTERM ends the run where it is, as safe as a
    kill. A terminal that is closed may say so twice.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def asked() -> None:
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    if sys.platform != "win32":
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            loop.add_signal_handler(signal.SIGHUP, stop.set)


def _sentence(summary: RunSummary) -> str:
    from batch_client.figures import counted, number

    if summary.already_published:
        bad = "".join(f", {count:,} {what}" for count, what in (
            (summary.failed, "failed"), (summary.not_finite, "not finite")) if count)
        return (f"{summary.output} was published already: {counted(summary.records, 'record')}{bad}, root "
                f"{summary.root}")
    scored = f"{counted(summary.scored, 'record')} in {summary.seconds:.1f} s"
    pace = f"{scored}, {number(summary.records_per_s)} records/s"
    if summary.reused:
        copied = f"{counted(summary.reused, 'record')} copied"
        scored, pace = (f"{copied}, {one if summary.scored else 'none scored'}" for one in (scored, pace))
    without = _without(summary)
    if not summary.published:
        return (f"{scored}{without}: this part is done, {summary.output} is published when all parts are"
                f"{_limited_by(summary)}")
    not_finite = f"{summary.not_finite:,} not finite, " if summary.not_finite else ""
    missing = (f"{counted(summary.missing_chunks, 'missing input chunk')} taken as the fill value, "
               if summary.missing_chunks else "")
    return (f"{pace}, {summary.failed:,} failed, {not_finite}{missing}"
            f"{counted(summary.retries, 'retry', 'retries')}{without} → {summary.output}{_limited_by(summary)}")


def _without(summary: RunSummary) -> str:
    """The servers that were left out to the end: what tells of them in the run may not be shown."""
    from batch_client.figures import counted

    if not summary.left_out:
        return ""
    return f", without {len(summary.left_out)} of {counted(len(summary.in_flight), 'server')}"


def _limited_by(summary: RunSummary) -> str:
    """How near to the ceiling, what kept it from more, and what to turn."""
    from batch_client.bottleneck import Limit

    if summary.limited_by is None:
        return ""
    achieved = ""
    if summary.percent_of_ceiling is not None:
        achieved = f"{summary.percent_of_ceiling:.0f} % of the model's ceiling, "
    return f"; {achieved}limited by {Limit(summary.limited_by).phrase}: {summary.advice}"
