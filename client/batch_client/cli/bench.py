"""`batch-client bench`: how quick a model can be here, what limits a run, and the best settings for this machine."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import click

from batch_client.cli.options import AMOUNT, bytes_option, missing_option, typed_flags
from batch_client.cli.pack import LOSES_NAN
from batch_client.cli.stream import PatientStream, say
from batch_client.cli.verb import Verb
from batch_client.errors import StoppedError
from batch_client.tuning import PRECISIONS

if TYPE_CHECKING:
    from batch_client.bench.session import BenchReport
    from batch_client.bench.tuner import Found

NOTES = {
    "wire": "TorchServe without a model",
    "reading": "INPUT",
    "writing": "OUTPUT",
}


@click.command("bench", cls=Verb)
@click.argument("archive", metavar="ARCHIVE")
@click.argument("input_url", metavar="[INPUT]", required=False)
@click.option("--budget", type=AMOUNT, default=120.0, show_default=True, metavar="SECONDS",
              help="How long to measure, about; servers that are started take some seconds more.")
@click.option("--save", is_flag=True, help="Write the best settings beside ARCHIVE, where `run --archive` and `serve` "
              "take them on machines of this kind.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="float32", show_default=True,
              help="What the model computes in. Others than float32 change its scores: look at them first.")
@click.option("--output", metavar="URL", help="Write to a folder of its own below this place, and remove it after; "
              "needs INPUT.  [default: a temporary folder on this machine]")
@click.option("--array", metavar="NAME", help="The array to read, when INPUT is a group.")
@bytes_option
@missing_option
@click.option("--anonymous", is_flag=True, help="Use storage without credentials: public buckets.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(input_url: str | None, *, as_json: bool, **options: Any) -> None:
    """Measure the model of ARCHIVE on this machine, in many ways, and everything around it.

    With INPUT, a Zarr array that the model takes, reading it, writing predictions and the whole run are measured too.
    """
    from batch_client.bench.session import BenchSpec, bench
    from batch_client.eventloop import run_verb

    if input_url is None and not typed_flags("output"):
        options["output"] = None  # of a variable or a file, for another command
    spec = BenchSpec(input=input_url, **options)
    stream = PatientStream()

    def tell(line: str) -> None:
        stream.write(f"{line}\n")

    try:
        report = run_verb(bench(spec, tell))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise StoppedError("stopped before the end; nothing is left running") from None
    finally:
        stream.close()
    if as_json:
        click.echo(json.dumps(report.to_value()))
    else:
        for line in _lines(report, local=options["output"] is None):
            click.echo(line)
    if note := note_of(report.found):
        say(f"note: {note}")
    if report.unsaved is not None:
        raise report.unsaved


def note_of(found: Found) -> str | None:
    """What is lost with the best runtime that the archive's own may keep."""
    best = found.best.runtime
    return None if best == found.tried[0].way.runtime else LOSES_NAN.get(best)


def _lines(report: BenchReport, *, local: bool) -> list[str]:
    from batch_client.bench.verdict import table_of, ways_of

    found, ceilings = report.found, report.ceilings
    notes = NOTES | {"model": str(found.best)} | ({"writing": "a temporary folder here"} if local else {})
    rows = [(f"{part.value} alone", rate, notes[part.value]) for part, rate in ceilings.rates.items()]
    if ceilings.whole is not None:
        rows.append(("the whole", ceilings.whole.records_per_s, f"{ceilings.whole.records:,} records"))
    ended = "" if found.complete else "; not all was tried: a larger --budget finds more"
    precision = report.tuning.precision
    defaults = "the defaults" if precision == "float32" else f"the defaults in {precision}"
    lines = [f"{report.model} on {report.tuning.device}", "", *ways_of(found), "",
             f"best: {found.best}, {found.gain:.2f} times as quick as {defaults}{ended}" if found.compared else
             f"only {found.best} was tried: a larger --budget compares it with other settings", "",
             *table_of(rows, report.record_bytes), "", *ceilings.lines()]
    if report.saved is not None:
        lines.append(f"saved: {report.saved}")
    if report.kept is not None:
        lines.append(f"kept: {report.kept}")
    return lines
