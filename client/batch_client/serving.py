"""What scores the records, open: servers that run already, or one started here for an archive."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

from batch_client.regions import Regions
from batch_client.spec import ServerSpec
from batch_client.tokens import CommandTokens, FileTokens, NoTokens, TokenSource
from batch_client.transport import HttpTransport, Transport

__all__ = ["Servers", "open_servers"]


@dataclass(frozen=True)
class Servers:
    """The way to a model: a transport, a source of tokens, the servers' base URLs, the model's name there; and what
    requests have in the shared memory of servers on this machine.

    alone: nobody else uses them.
    """

    transport: Transport
    tokens: TokenSource
    urls: tuple[str, ...]
    model: str
    regions: Regions = field(default_factory=Regions)
    alone: bool = False


@asynccontextmanager
async def open_servers(spec: ServerSpec) -> AsyncIterator[Servers]:
    """The servers that `spec` names; an embedded one ends with the block.

    Raises ServingError when an archive can't be served here.
    """
    async with HttpTransport() as transport:
        if spec.archive is None:
            with closing(Regions()) as regions:
                yield Servers(transport, _tokens_of(spec), spec.endpoints, spec.model or "", regions)
            return
        from batch_client.archives import local_archive  # noqa: PLC0415 - only --archive needs it
        from batch_client.server import EmbeddedServer, ServerSettings  # noqa: PLC0415 - only --archive needs it

        async with local_archive(spec.archive, anonymous=spec.anonymous) as archive:
            # As in a bulk lane: nobody else asks.
            settings = ServerSettings(archive=archive, workers=spec.workers, threads=spec.threads, batch_size=1)
            async with EmbeddedServer(settings) as server:
                # Its regions end with it.
                yield Servers(transport, server, (server.url,), server.model_name, alone=True)


def _tokens_of(spec: ServerSpec) -> TokenSource:
    if spec.token_file is not None:
        return FileTokens(Path(spec.token_file))
    return NoTokens() if spec.token_command is None else CommandTokens(spec.token_command)
