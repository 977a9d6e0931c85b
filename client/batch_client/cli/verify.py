"""`batch-client verify`: prove an output complete, without a model; or with one, score some of it again."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from batch_client.cli.options import SERVER_OPTIONS, bytes_option, server_options, typed_flags
from batch_client.cli.verb import Verb
from batch_client.errors import DataError, UsageError

if TYPE_CHECKING:
    from batch_client.replay import Replay
    from batch_client.storage import Store
    from batch_client.verify import Verification


@click.command("verify", cls=Verb)
@click.argument("output_url", metavar="OUTPUT")
@click.option("--deep", is_flag=True, help="Read every byte and compare it with the manifest.")
@click.option("--replay", "replays", type=click.IntRange(1), metavar="N",
              help="Score N random chunks again and compare the bits; needs --endpoint or --archive.")
@server_options
@bytes_option
@click.option("--anonymous", is_flag=True, help="Use storage without credentials: public buckets.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(output_url: str, *, deep: bool, replays: int | None, as_json: bool, **options: Any) -> None:
    """Check that OUTPUT is what was published: every chunk is there, once, with its size.

    Exit code 0 if it is; 65 names what is missing or altered.
    """
    from batch_client.eventloop import run_verb
    from batch_client.figures import counted

    # Variables and settings say what to score with where something is scored; typed it is a mistake.
    if replays is None and (typed := typed_flags(*SERVER_OPTIONS)):
        raise UsageError(f"{typed}: wanted only together with --replay N")
    verification, replayed = run_verb(_verify(output_url, deep, replays, options))
    if as_json:
        click.echo(json.dumps(asdict(verification) | ({} if replayed is None else {"replayed": asdict(replayed)})))
        return
    missing = (f", {counted(verification.missing_chunks, 'missing input chunk')} taken as the fill value"
               if verification.missing_chunks else "")
    click.echo(f"{verification.output}: {counted(verification.records, 'record')} in "
               f"{counted(verification.objects, 'object')} ({counted(verification.nbytes, 'byte')}) as the manifest "
               f"says{', every byte' if deep else ''}; "
               f"{verification.failed:,} failed, {verification.not_finite:,} not finite{missing}; "
               f"root {verification.root}")
    if replayed is not None:
        click.echo(f"scored again: {counted(replayed.records, 'record')} in "
                   f"{counted(len(replayed.chunks), 'chunk')}, all bits equal")


async def _verify(output_url: str, deep: bool, replays: int | None,  # noqa: FBT001 - called once, right above
                  options: dict[str, Any]) -> tuple[Verification, Replay | None]:
    from batch_client.buckets import open_store
    from batch_client.urls import require_listed

    require_listed(output_url, "OUTPUT")
    store = open_store(output_url, anonymous=options["anonymous"])
    if replays is None:
        return await _proven(store, deep=deep), None
    from batch_client.cli.observers import ProgressBar
    from batch_client.cli.stream import PatientStream
    from batch_client.manifest import read_manifest
    from batch_client.prepare import open_services
    from batch_client.publish import published_manifest
    from batch_client.reader import open_source
    from batch_client.replay import replay, require_exact
    from batch_client.spec import Records, RunSpec

    # What can't work is refused before hours of reading. The INPUT is known when the manifest is proven: until then it
    # is one that no OUTPUT can be.
    spec = RunSpec(input="memory://", output=output_url, **options)
    if (manifest := await published_manifest(store)) is not None:
        require_exact(manifest)
    verification = await _proven(store, deep=deep)
    run = (await read_manifest(store)).run
    spec = replace(
        spec, input=run["source"], array=run["source_array"] or None, records=Records(run["start"], run["stop"]),
        chunk_records=run["grid_records"], codec=run["codec"], exact=run["exact"])
    try:
        await open_source(open_store(spec.input, anonymous=spec.anonymous), spec.array)
    except DataError as error:
        raise DataError(f"{error}; the run read it there, as the manifest says: bring it back to that place, or verify "
                        "without --replay") from error
    stream = PatientStream()
    try:
        async with open_services(spec) as services:
            return verification, await replay(spec, services, replays, (ProgressBar(stream),))
    finally:
        stream.close()


async def _proven(store: Store, *, deep: bool) -> Verification:
    """What `verify_output` finds, with a bar for the bytes that are read where somebody looks; cron would mail it."""
    from batch_client.verify import verify_output

    if not deep or not sys.stderr.isatty():
        return await verify_output(store, deep=deep)
    from batch_client.cli.observers import new_bar
    from batch_client.cli.stream import PatientStream

    stream = PatientStream()
    bar = new_bar(stream, "reading", None, unit="B")

    def advance(done: int, whole: int) -> None:
        bar.total = whole
        bar.update(done - bar.n)

    try:
        return await verify_output(store, deep=True, advance=advance)
    finally:
        bar.close()
        stream.close()
