"""What scores the records, open: servers that run already, or one started here for an archive."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from batch_client.dialect import Outcome, Verdict, read_reply
from batch_client.errors import BatchClientError, CredentialsError, ServingError
from batch_client.regions import Regions
from batch_client.retry import full_jitter
from batch_client.spec import ServerSpec
from batch_client.tokens import CommandTokens, FileTokens, NoTokenError, NoTokens, TokenSource, authorization
from batch_client.transport import HttpReply, HttpTransport, Transport, TransportError

if TYPE_CHECKING:
    from batch_client.server import EmbeddedServer

__all__ = ["Servers", "ask_for_room", "open_servers", "turned_away"]

LOG_SECONDS = 10.0  # between looks at how large an embedded server's log is


@dataclass(frozen=True)
class Servers:
    """The way to a model: a transport, where the token of each server comes from, by its base URL, the model's name
    there; and what requests have in the shared memory of servers on this machine.

    alone: nobody else uses them.
    """

    transport: Transport
    tokens: Mapping[str, TokenSource]
    model: str
    regions: Regions = field(default_factory=Regions)
    alone: bool = False

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(self.tokens)


@asynccontextmanager
async def open_servers(spec: ServerSpec) -> AsyncIterator[Servers]:
    """The servers that `spec` names; an embedded one ends with the block.

    Raises ServingError when an archive can't be served here.
    """
    async with HttpTransport() as transport:
        if spec.archive is None:
            with closing(Regions()) as regions:
                yield Servers(transport, _tokens_of(spec), spec.model or "", regions)
            return
        from batch_client.archives import local_archive  # noqa: PLC0415 - only --archive needs it
        from batch_client.server import EmbeddedServer, ServerSettings  # noqa: PLC0415 - only --archive needs it

        async with local_archive(spec.archive, anonymous=spec.anonymous) as archive:
            # As in a bulk lane: nobody else asks.
            settings = ServerSettings(archive=archive, workers=spec.workers, threads=spec.threads, batch_size=1)
            async with EmbeddedServer(settings) as server:
                watch = asyncio.create_task(_keep_log_short(server))
                try:
                    # Its regions end with it.
                    yield Servers(transport, {server.url: server}, server.model_name, alone=True)
                finally:
                    watch.cancel()


async def _keep_log_short(server: EmbeddedServer) -> None:
    while True:
        server.tell_log()
        await asyncio.sleep(LOG_SECONDS)


def _tokens_of(spec: ServerSpec) -> dict[str, TokenSource]:
    urls = [url.rstrip("/") for url in spec.endpoints]
    files = [FileTokens(Path(file)) for file in spec.token_files]
    if len(files) > 1:
        return dict(zip(urls, files, strict=True))
    if files:
        return dict.fromkeys(urls, files[0])
    return dict.fromkeys(urls, NoTokens() if spec.token_command is None else CommandTokens(spec.token_command))


async def _ask(servers: Servers, method: str, url: str, path: str, seconds: float, *,
              headers: Mapping[str, str] | None = None, parts: Sequence[bytes] = ()) -> tuple[HttpReply, Verdict]:
    """What the server at `url` answers, and what that means; a token that it refuses is asked for anew, once.

    Raises ServingError for a server that gives no answer, CredentialsError where a token can't be had.
    """
    refused: str | None = None
    for again in (True, False):
        try:
            token = await servers.tokens[url].token(refused)
        except NoTokenError as error:
            raise NoTokenError(f"{url}: {error}") from error
        try:
            reply = await servers.transport.send(
                method, url + path, {**(headers or {}), **authorization(token)}, parts, seconds)
        except TransportError as error:
            raise ServingError(f"{url}: can't be reached ({error}): check --endpoint and that the server runs"
                               ) from error
        verdict = read_reply(reply.status, reply.body)
        if verdict.outcome is not Outcome.TOKEN or not again:
            break
        refused = token
    return reply, verdict


async def ask_for_room(servers: Servers, method: str, url: str, path: str, seconds: float, *, patience: float,
                       headers: Mapping[str, str] | None = None, parts: Sequence[bytes] = ()
                       ) -> tuple[HttpReply, Verdict]:
    """As `_ask`; an answer that there is no room is none yet, and for `patience` seconds asked for again: a full queue,
    or a worker that starts again.
    """
    now, rng = asyncio.get_running_loop().time, random.Random()  # noqa: S311 - spreads clients, and keeps no secret
    until = now() + patience
    for tries in itertools.count():
        reply, verdict = await _ask(servers, method, url, path, seconds, headers=headers, parts=parts)
        if verdict.outcome is not Outcome.BUSY or now() >= until:
            break
        await asyncio.sleep(min(full_jitter(tries, rng), max(0.0, until - now())))
    return reply, verdict


def turned_away(servers: Servers, url: str, verdict: Verdict) -> BatchClientError | None:
    """What to say of a server that lets nobody in, or not to this model; None of any other verdict."""
    if verdict.outcome is Outcome.TOKEN:
        if isinstance(servers.tokens[url], NoTokens):
            return CredentialsError(f"{url}: the server wants a token ({verdict.reason}): "
                                    "give one with --token-file or --token-command")
        order = ("; the first --token-file is for the first --endpoint, and so on"
                 if len(set(map(id, servers.tokens.values()))) > 1 else "")
        return CredentialsError(f"{url}: the server refuses the token ({verdict.reason}): "
                                f"give a valid one with --token-file or --token-command{order}")
    if verdict.outcome is Outcome.NO_MODEL:
        return ServingError(f"{url}: has no model {servers.model!r} ({verdict.reason}): check --model and the server's "
                            "models")
    return None
