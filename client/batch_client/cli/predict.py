"""`batch-client predict`: one query, one answer, printed."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batch_client.cli.options import array_options, server_options, typed_flags
from batch_client.cli.verb import Verb
from batch_client.errors import BatchClientError, DataError, ServingError, UsageError
from batch_client.jsontext import parse_json

if TYPE_CHECKING:
    from batch_client.reader import Block, Source
    from batch_client.serving import Servers
    from batch_client.spec import Records, ServerSpec

# A query is a handful of records; whole arrays are what `run` is for.
MOST_BYTES = 32 << 20
IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".bmp": "image/bmp",
          ".gif": "image/gif", ".tif": "image/tiff", ".tiff": "image/tiff"}
NPY, JSON = "application/x-npy", "application/json"
# For how long an answer is waited for, and for how long a server that has no room is asked again.
SECONDS = 120.0
KINDS = "npy, JSON, PNG, JPEG, GIF or BMP"


@dataclass(frozen=True)
class _Query:
    content_type: str
    body: bytes


@click.command("predict", cls=Verb)
@click.argument("query", metavar="QUERY")
@server_options
@array_options
def command(query: str, **options: Any) -> None:
    """Score QUERY and print the answer as JSON on stdout.

    QUERY is an image file, an .npy or .json file, - for standard input, or a Zarr array with --records A:B.
    """
    from batch_client.eventloop import run_verb
    from batch_client.spec import Records, ServerSpec

    if (count := len(options["endpoints"])) > 1 and (flag := typed_flags("endpoints")):  # settings are for run too
        raise UsageError(f"{flag} is given {count} times, wanted once: predict asks one server")
    text, array = options.pop("records"), options.pop("array")
    spec = ServerSpec(**options)
    records = Records.parse(text) if text else None
    if records is not None and os.path.isfile(query):  # noqa: PTH113 - which raises nothing for what is no path
        raise UsageError(f"{query}: this is a file; --records are of a Zarr array: leave it out to score the file")
    click.echo(run_verb(_predict(query, records, array, spec)))


async def _predict(query: str, records: Records | None, array: str | None, spec: ServerSpec) -> str:
    from batch_client.serving import open_servers

    if records is None:
        prepared = _read_query(query)
        async with open_servers(spec) as servers:
            return await _send(servers, prepared)
    source, block = await _read_records(query, records, array, anonymous=spec.anonymous)
    async with open_servers(spec) as servers:
        return await _send(servers, await _as_query(servers, source, block))


def _read_query(query: str) -> _Query:
    if query == "-":
        name, content_type = "standard input", ""
        try:
            body = sys.stdin.buffer.read(MOST_BYTES + 1)
        except OSError as error:
            raise UsageError(f"{name}: {error.strerror}") from error
    else:
        name = query
        path = Path(query)
        content_type = IMAGES.get(path.suffix.lower()) or {".npy": NPY, ".json": JSON}.get(path.suffix.lower(), "")
        try:
            if path.is_dir():
                raise UsageError(f"{query}: a folder; for records of a Zarr array add --records A:B")
            with path.open("rb") as file:
                body = file.read(MOST_BYTES + 1)
        except OSError as error:
            hint = "; for records of a Zarr array add --records A:B" if "://" in query else ""
            raise UsageError(f"{query[:200]}: {error.strerror}{hint}") from error
    if not body:
        raise UsageError(f"{name}: is empty; wanted {KINDS}")
    content_type = content_type or _sniff(name, body)
    if len(body) > MOST_BYTES:
        raise UsageError(f"{name}: more than {MOST_BYTES:,} bytes; score it with batch-client run")
    return _Query(content_type, body)


def _sniff(name: str, body: bytes) -> str:
    """The content type of a body whose name says none, by its first bytes."""
    signatures = ((b"\x93NUMPY", NPY), (b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"),
                  (b"GIF8", "image/gif"), (b"BM", "image/bmp"))
    for start, content_type in signatures:
        if body.startswith(start):
            return content_type
    if body.lstrip()[:1] in (b"[", b"{"):
        return JSON
    raise UsageError(f"{name}: begins with {body[:8]!r}; wanted {KINDS}")


async def _read_records(url: str, records: Records, array: str | None, *, anonymous: bool) -> tuple[Source, Block]:
    from batch_client.buckets import open_store
    from batch_client.reader import open_source

    source = await open_source(open_store(url, anonymous=anonymous), array)
    start, stop = records.resolve(source.geometry.count)
    nbytes = (stop - start) * source.geometry.record_bytes
    if nbytes > MOST_BYTES:
        raise UsageError(f"--records {start}:{stop}: {nbytes:,} bytes, a query has at most {MOST_BYTES:,}; "
                         "score them with batch-client run")
    return source, await source.read(start, stop)


async def _as_query(servers: Servers, source: Source, block: Block) -> _Query:
    """Records as an .npy of the dtype and shape that the model takes, as `run` would send them.

    Raises DataError where `run` would refuse them.
    """
    import numpy as np

    from batch_client.contract import fetch_contract
    from batch_client.prepare import geometry_for

    contract = await fetch_contract(servers, servers.urls[0])
    geometry_for(source, contract)
    file = io.BytesIO()
    np.save(file, contract.on_the_wire(block.records.joined()), allow_pickle=False)
    return _Query(NPY, file.getvalue())


async def _send(servers: Servers, query: _Query) -> str:
    from batch_client.dialect import Outcome
    from batch_client.serving import ask_for_room, turned_away

    url = servers.urls[0]
    reply, verdict = await ask_for_room(
        servers, "POST", url, f"/predictions/{servers.model}", SECONDS, patience=SECONDS,
        headers={"Content-Type": query.content_type, "Accept": JSON}, parts=(query.body,))
    if verdict.outcome is Outcome.RESULT:
        return _pretty(reply.body)
    if (refusal := turned_away(servers, url, verdict)) is not None:
        raise refusal
    if verdict.outcome is Outcome.BUSY:  # TorchServe's own words are of workers to add, whatever there are
        raise ServingError(f"{url}: the server had no room for {SECONDS:.0f} s: its queue is full, or its workers are "
                           "starting again: send fewer queries at once, or ask again later")
    blame: dict[Outcome, type[BatchClientError]] = {
        Outcome.REFUSED: DataError, Outcome.RAISED: DataError, Outcome.TOO_LARGE: DataError}
    raise blame.get(verdict.outcome, ServingError)(f"{url}: {verdict.outcome.value}: {verdict.reason}")


def _pretty(body: bytes) -> str:
    """One record's prediction a line."""
    try:
        value = parse_json(body)
    except ValueError:
        return body.decode("utf-8", "replace")
    if isinstance(value, dict) and isinstance(value.get("predictions"), list):
        lines = ",\n  ".join(json.dumps(prediction) for prediction in value["predictions"])
        return f'{{"predictions": [\n  {lines}]}}'
    return json.dumps(value)
