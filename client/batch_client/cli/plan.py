"""`batch-client plan`: the sizes of a run, before it; with --calibrate its time and cost as well."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from batch_client.cli.options import AMOUNT, run_options, spec_of, typed_flags
from batch_client.cli.verb import Verb
from batch_client.errors import UsageError

if TYPE_CHECKING:
    from batch_client.calibrate import Calibration
    from batch_client.events import Event
    from batch_client.forecast import Prices
    from batch_client.plan import Plan
    from batch_client.spec import RunSpec


LEAST_SECONDS = 1.0  # of a calibration: in less the first answers, and the machine's whims, are most of it


@click.command("plan", cls=Verb)
@click.argument("input_url", metavar="INPUT")
@click.argument("output_url", metavar="OUTPUT")
@run_options
@click.option("--calibrate", is_flag=True, help="Score the first records for 20 s and forecast the run's time.")
@click.option("--price-per-hour", type=AMOUNT, help="What the machines cost an hour; needs --calibrate.")
@click.option("--price-per-1000-puts", type=AMOUNT, help="What the store asks for 1,000 writes.")
@click.option("--price-per-1000-gets", type=AMOUNT, help="What the store asks for 1,000 reads.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(input_url: str, output_url: str, *, calibrate: bool, as_json: bool, **options: Any) -> None:
    """Show what `run` with the same words would do. Nothing is written, and no record is sent but with --calibrate."""
    from batch_client import api
    from batch_client.eventloop import run_verb
    from batch_client.events import RecordsCast, ServerLeftOut, SourceIsMasked, SourceIsPacked
    from batch_client.forecast import Prices

    asked = [options.pop(f"price_per_{what}") for what in ("hour", "1000_puts", "1000_gets")]
    if not calibrate:
        if typed_flags("price_per_hour"):
            raise UsageError("--price-per-hour needs the run's time: add --calibrate")
        asked[0] = None  # of a variable or a file, which are for other commands too
    prices = None if asked == [None] * 3 else Prices(*(price or 0.0 for price in asked))
    spec = spec_of(input_url, output_url, options)
    left_out: list[str] = []
    said: dict[str, str] = {}
    notices = {SourceIsPacked: "source_is_packed", SourceIsMasked: "source_is_masked", RecordsCast: "records_are_cast"}

    def observe(event: Event) -> None:
        if isinstance(event, ServerLeftOut):
            left_out.append(event.reason)
        for kind, name in notices.items():
            if isinstance(event, kind):
                said[name] = str(event)

    if calibrate:
        found = _if_long_enough(run_verb(api.calibrate(spec, (observe,))))
        figures = _figures(found.plan) | said | _forecast(found) | _cost(found.plan, prices, found, spec)
    else:
        plan = run_verb(api.plan(spec, (observe,)))
        figures = _figures(plan) | said | {"left_out": left_out} | _cost(plan, prices, None, spec)
    if as_json:
        click.echo(json.dumps(figures))
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {_shown(value)}")


def _if_long_enough(found: Calibration) -> Calibration:
    """Without a forecast where all of a small array was scored in no time."""
    return found if found.seconds >= LEAST_SECONDS else replace(found, forecast=None)


def _shown(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "; ".join(value) or "no server"
    if isinstance(value, list):
        middle, low, high = map(_rounded, value)
        return f"{middle}  (95 %: {low} to {high})"
    if value is None:
        return "unknown: too few answers, or too short a time, to forecast from"
    return f"{value:,}" if isinstance(value, int | float) else value


def _rounded(number: float) -> str:
    """With two decimals, or the two digits that mean something of what is below 1, such as the cost of a short run."""
    return f"{number:,.0f}" if number >= 100 else f"{number:,.2f}" if number >= 1 else f"{number:.2g}"


def _forecast(found: Calibration) -> dict[str, Any]:
    """Figures with an interval are [forecast, low end, high end]."""
    from batch_client.figures import significant

    guess = found.forecast
    return {
        "calibrated_with_records": found.records,
        "calibrated_in_seconds": significant(found.seconds),
        "failed_in_calibration": found.failed,
        "left_out": list(found.left_out),
        "seconds": None if guess is None else [significant(value) for value in
                                               (guess.seconds, guess.seconds_low, guess.seconds_high)],
        "records_per_s": None if guess is None else significant(guess.records_per_s),
        "peak_memory_bytes": found.peak_memory_bytes,
    }


def _cost(plan: Plan, prices: Prices | None, found: Calibration | None, spec: RunSpec) -> dict[str, Any]:
    from batch_client.figures import significant
    from batch_client.forecast import cost_of

    if prices is None:
        return {}
    cost = cost_of(plan, prices, None if found is None else found.forecast, 1 if spec.part is None else spec.part[1])
    if found is None:
        return {"cost_of_requests": significant(cost.total)}
    if found.forecast is None:
        return {"cost": None}
    return {"cost": [significant(value) for value in (cost.total, cost.low, cost.high)]}


def _figures(plan: Plan) -> dict[str, Any]:
    largest = min(plan.request_records, plan.chunk_records)  # no request goes beyond its output chunk
    return {
        "records": plan.count,
        "range": f"{plan.start}:{plan.stop}",
        "record": f"{plan.source.dtype} {plan.source.record_shape}",
        "outputs": ", ".join(f"{output.name} {output.dtype} {output.shape}" for output in plan.outputs),
        "chunks": plan.unit_count,
        "chunk_records": plan.chunk_records,
        "objects_read": plan.objects_read,
        "objects_written": plan.objects_written,
        "requests": plan.request_count,
        "request_records": largest,
        "tail_request_records": min(plan.tail_request_records, plan.chunk_records),
        "bytes_a_request": largest * plan.wire_record_bytes,
        "micro_batch": plan.micro_batch,
        "decoded_bytes_to_read": plan.count * plan.source.record_bytes,
        "bytes_to_send": plan.count * plan.wire_record_bytes,
        "bytes_to_write": plan.unit_count * plan.unit_bytes_out,  # the last chunk is stored as full as the others
        "max_bytes_in_flight": plan.max_bytes_in_flight,
        "bytes_a_chunk_out": plan.unit_bytes_out,
    }
