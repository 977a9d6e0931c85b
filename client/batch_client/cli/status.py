"""`batch-client status`: how far a run is, from any machine; and taking an abandoned one away."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from batch_client.cli.options import typed_flags
from batch_client.cli.verb import Verb
from batch_client.errors import MismatchError, UsageError

if TYPE_CHECKING:
    from batch_client.progress import Progress
    from batch_client.storage import Store


@click.command("status", cls=Verb)
@click.argument("output_url", metavar="OUTPUT")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--clean", is_flag=True, help="List what an unpublished output holds, to be removed with --yes.")
@click.option("--yes", is_flag=True, help="With --clean: remove it.")
@click.option("--anonymous", is_flag=True, help="Use storage without credentials: public buckets.")
def command(output_url: str, *, as_json: bool, clean: bool, yes: bool, anonymous: bool) -> None:
    """Say how far the run into OUTPUT is: records done, rate, time left, failures, who wrote when."""
    from batch_client.buckets import open_store
    from batch_client.eventloop import run_verb
    from batch_client.urls import require_listed

    require_listed(output_url, "OUTPUT")
    store = open_store(output_url, anonymous=anonymous)
    if clean:
        if typed_flags("as_json"):
            raise UsageError("--clean and --json: what is to be removed is listed as text")
        click.echo(run_verb(_clean(store, yes=yes)))
        return
    if yes and typed_flags("yes"):
        raise UsageError("--yes: wanted only together with --clean")
    click.echo(run_verb(_status(store, as_json=as_json)))


async def _status(store: Store, *, as_json: bool) -> str:
    from batch_client.progress import progress_of

    progress = await progress_of(store)
    return json.dumps(asdict(progress)) if as_json else _lines(progress)


def _lines(progress: Progress) -> str:
    from batch_client.figures import counted, number, percent

    letters, speed, left = progress.chunks_with_dead_letters, progress.records_per_s, progress.seconds_left
    lines = [
        f"{progress.output}: {'published, ' + str(progress.root) if progress.published else 'not published'}",
        f"records  {progress.done:,} of {progress.records:,} ({percent(progress.done / progress.records)})",
        f"failed   {progress.failed:,}, and {progress.not_finite:,} not finite",
        f"chunks   {progress.chunks_done:,} of {progress.chunks:,}, {letters:,} with dead letters",
    ]
    if progress.removing:
        lines.append("removal  begun and not finished; --clean --yes or run --overwrite finishes it")
    if speed is not None and left is not None:
        lines.append(f"speed    {number(speed)} records/s, {left:,.0f} s left at that speed")
    for writer in progress.writers:
        when = datetime.fromtimestamp(writer.last_wrote, UTC).isoformat(timespec="seconds")
        lines.append(f"writer   {writer.name}: {counted(writer.segments, 'ledger segment')}, the last at {when}")
    return "\n".join(lines)


async def _clean(store: Store, *, yes: bool) -> str:
    from batch_client.figures import counted
    from batch_client.removal import contents_of, remove_output, require_unpublished

    await require_unpublished(store)
    found = await contents_of(store)
    if not found.objects:
        raise MismatchError(f"{store.url}: nothing is there")
    size = f"{counted(found.objects, 'object')}, {counted(found.nbytes, 'byte')}"
    if not yes:
        shown = "\n".join(f"  {meta.key}  {meta.size:,}" for meta in found.first)
        more = "\n  …" if found.objects > len(found.first) else ""
        return f"{store.url} holds {size}:\n{shown}{more}\nnothing removed; add --yes to remove all of it"
    await remove_output(store, published=False)
    return f"removed {size} from {store.url}"
