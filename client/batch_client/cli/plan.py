"""`batch-client plan`: the sizes of a run, before it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from batch_client.cli.options import run_options, spec_of

if TYPE_CHECKING:
    from batch_client.plan import Plan


@click.command("plan")
@click.argument("input_url", metavar="INPUT")
@click.argument("output_url", metavar="OUTPUT")
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(input_url: str, output_url: str, *, as_json: bool, **options: Any) -> None:
    """Show what `run` with the same words would do. No record is sent and nothing is written."""
    from batch_client import api

    figures = _figures(api.run_until_complete(api.plan(spec_of(input_url, output_url, options))))
    if as_json:
        click.echo(json.dumps(figures))
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        click.echo(f"{name.replace('_', ' '):<{width}}  {value:,}" if isinstance(value, int) else
                   f"{name.replace('_', ' '):<{width}}  {value}")


def _figures(plan: Plan) -> dict[str, Any]:
    out = sum(output.record_bytes for output in plan.outputs) + 1
    return {
        "records": plan.count,
        "range": f"{plan.start}:{plan.stop}",
        "record": f"{plan.source.dtype} {plan.source.record_shape}",
        "outputs": ", ".join(f"{output.name} {output.dtype} {output.shape}" for output in plan.outputs),
        "chunks": plan.unit_count,
        "records_a_chunk": plan.chunk_records,
        "objects_written": plan.unit_count * (len(plan.outputs) + 1),
        "requests": plan.request_count,
        "records_a_request": plan.request_records,
        "bytes_a_request": plan.request_records * plan.wire_record_bytes,
        "micro_batch": plan.micro_batch,
        "bytes_to_read": plan.count * plan.source.record_bytes,
        "bytes_to_send": plan.count * plan.wire_record_bytes,
        "bytes_to_write": plan.count * out,
        "memory_for_records": plan.max_bytes_in_flight,
        "memory_a_chunk_out": plan.unit_bytes_out,
    }
