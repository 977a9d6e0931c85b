"""One request, one reply, over HTTP: the seam between client and servers. A simulation is one more implementation."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

__all__ = ["HttpReply", "HttpTransport", "LateError", "Transport", "TransportError"]

CONNECT_SECONDS = 10
LARGEST_REPLY = 256 << 20


class TransportError(Exception):
    """No whole reply came: refused, reset, cut short or too late. The message is one line."""


class LateError(TransportError):
    """It was not there at the deadline."""


@dataclass(frozen=True)
class HttpReply:
    """An answer; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport(Protocol):
    """Sends one request and returns its one reply."""

    async def send(self, method: str, url: str, headers: Mapping[str, str], parts: Sequence[bytes | memoryview],
                   deadline: float) -> HttpReply:
        """Raises TransportError when no whole reply came, LateError when none had by the deadline. `parts` are the
        body's pieces in order; `deadline` is in seconds from now.
        """


class _Parts(Payload):
    """A body in pieces, sent without joining them, with its length known (no chunked encoding)."""

    def __init__(self, parts: Sequence[bytes | memoryview]) -> None:
        super().__init__(parts, content_type="application/octet-stream")
        self._parts = parts
        self._size = sum(len(part) for part in parts)

    async def write(self, writer: AbstractStreamWriter) -> None:
        for part in self._parts:
            await writer.write(part)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        if content_length is not None and content_length != self._size:
            raise ValueError(f"a body of {self._size} bytes can't be sent as {content_length}")
        await self.write(writer)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return b"".join(self._parts).decode(encoding, errors)


class HttpTransport:
    """Keep-alive connections through aiohttp; use it in an `async with` block."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            # Bodies are read as they come; without the header aiohttp asks for compressed ones.
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, method: str, url: str, headers: Mapping[str, str], parts: Sequence[bytes | memoryview],
                   deadline: float) -> HttpReply:
        if self._session is None:
            raise RuntimeError("HttpTransport is used outside its async with block")
        try:
            async with asyncio.timeout(deadline):
                data = _Parts(parts) if parts else None
                async with self._session.request(method, url, data=data, headers=headers,
                                                 allow_redirects=False) as response:
                    body = await _read(response)
                    return HttpReply(response.status, {k.lower(): v for k, v in response.headers.items()}, body)
        except aiohttp.ConnectionTimeoutError as error:
            raise TransportError(f"no connection within {CONNECT_SECONDS:g} s") from error
        except TimeoutError as error:
            raise LateError(f"no answer within {deadline:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            said = f"{type(error).__name__}: {error}".replace(" ssl:default", "")  # said of http too
            raise TransportError(" ".join(said.split())[:200]) from error


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The whole body, bounded before it is held."""
    length = response.content_length
    if length is None:
        pieces: list[bytes] = []
        length = 0
        async for piece in response.content.iter_chunked(1 << 20):
            length += len(piece)
            if length > LARGEST_REPLY:
                break
            pieces.append(piece)
        else:
            return b"".join(pieces)
    elif length <= LARGEST_REPLY:
        return await response.read()
    raise TransportError(f"a reply of {length} bytes or more, the most is {LARGEST_REPLY}")
