"""A seeded HTTP proxy that spoils some of what passes: requests refused, replies cut, lost, altered, exchanged or late.

It keeps every byte of a request, so that signatures (SigV4 signs `Host`) still hold, and has an event loop in a thread
of its own, so that a test may block. One connection to the target a request: simple, and nothing is left half-read.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from urllib.parse import urlsplit

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
PARTNER_SECONDS = 2.0
NO_LINGER = struct.pack("ii", 1, 0)  # a close sends RST


@dataclass(frozen=True)
class Fault:
    """What is done to a share (`chance`) of the requests whose method and path match, to at most `most` of them.

    busy: 503 with S3's SlowDown, not forwarded. reset: dropped before it is forwarded. cut: half of the reply's body.
    lost: forwarded, the reply dropped. Every other connection that is dropped is closed, the rest are reset (TCP's FIN
    and RST, which clients may tell apart). silent: not forwarded, and no answer as long as the client waits. late: held
    for `seconds`, then forwarded. flip: one bit of the reply's body. swap: the reply of another request of equal size.
    """

    kind: str
    chance: float
    methods: str = "GET PUT POST HEAD DELETE"
    path: str = ""
    most: int = 1 << 30
    seconds: float = 0.0


@dataclass(frozen=True)
class Seen:
    """A request that reached the proxy: when (time.monotonic), what, the status that was sent back (0: none), and the
    bytes of its body and of the reply's.
    """

    at: float
    method: str
    path: str
    status: int
    size: int
    replied: int


class FaultProxy:
    """In a `with` block: `url` leads to `target`. `injected` counts faults by kind; `down` turns every request away."""

    def __init__(self, target: str, *faults: Fault, seed: int = 0):
        self._target = (urlsplit(target).hostname, urlsplit(target).port)
        self.faults = list(faults)
        self.injected = Counter()
        self.seen: list[Seen] = []
        self.down = False
        self._rng = random.Random(seed)
        self._waiting = defaultdict(list)
        self._due = [0.0] * len(faults)
        self._tasks = set()
        self._dropped = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self):
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_):
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _close(self):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            while (request := await read_message(reader)) is not None and await self._serve(request, reader, writer):
                pass
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # either side has gone, or the test is over
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve(self, request, reader, writer):
        """Answer one request; False when the connection is to be dropped."""
        method, path = request[0].split(b" ", 2)[:2]
        method, path = method.decode(), path.decode()
        fault = self._draw(method, path, len(request[1]))
        reply = await self._reply(fault, request, reader)
        cut = fault is not None and fault.kind == "cut" and reply is not None and len(reply[1]) > 1
        if cut:
            self.injected["cut"] += 1
            reply = (reply[0], reply[1][:len(reply[1]) // 2])
        status = 0 if reply is None else int(reply[0].split()[1])
        replied = 0 if reply is None else len(reply[1])
        self.seen.append(Seen(time.monotonic(), method, path, status, len(request[1]), replied))
        if reply is None:
            self._dropped += 1
            if self._dropped % 2:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            return False
        writer.write(reply[0] + reply[1])
        await writer.drain()
        return not cut and b"\r\nconnection: close\r\n" not in reply[0].lower()

    def _draw(self, method, path, size):
        if self.down:
            return Fault("reset", 1.0)
        if self._waiting[size]:
            return Fault("swap", 1.0)
        drawn = None
        for number, fault in enumerate(self.faults):
            if method in fault.methods.split() and re.search(fault.path, path):
                # Its mean is the fault's share, and however few the requests are, no fault is left out by chance.
                self._due[number] += 2 * fault.chance * self._rng.random()
                if drawn is None and self._due[number] >= 1 and self.injected[fault.kind] < fault.most:
                    self._due[number] -= 1
                    drawn = fault
        return drawn

    async def _reply(self, fault, request, reader):
        """The reply's head and body, None for no reply. Counts what it injects."""
        kind = fault and fault.kind
        if kind in ("reset", "silent", "busy", "late", "lost"):
            self.injected[kind] += not self.down
        if kind == "silent":
            await reader.read(1)  # returns when the client has gone
        elif kind == "busy":
            head = f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(SLOW_DOWN)}"
            return f"{head}\r\n\r\n".encode(), b"" if request[0].startswith(b"HEAD") else SLOW_DOWN
        elif kind == "late":
            await asyncio.sleep(fault.seconds)
        if kind in ("reset", "silent"):
            return None
        head, body = await self._forward(request)
        if kind == "flip" and body:
            self.injected["flip"] += 1
            at = self._rng.randrange(8 * len(body))
            body = bytearray(body)
            body[at // 8] ^= 1 << at % 8
        elif kind == "swap":
            head, body = await self._swapped(len(request[1]), (head, body))
        return None if kind == "lost" else (head, bytes(body))

    async def _swapped(self, size, reply):
        if self._waiting[size]:
            other, theirs = self._waiting[size].pop()
            other.set_result(reply)
            self.injected["swap"] += 2
            return theirs
        partner = asyncio.get_running_loop().create_future()
        self._waiting[size].append((partner, reply))
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(partner), PARTNER_SECONDS)
        self._waiting[size] = [one for one in self._waiting[size] if one[0] is not partner]
        return partner.result() if partner.done() else reply

    async def _forward(self, request):
        reader, writer = await asyncio.open_connection(*self._target)
        try:
            writer.write(b"".join(request))
            reply = await read_message(reader, bodiless=request[0].startswith(b"HEAD"))
        finally:
            writer.transport.abort()
        if reply is None:
            raise EOFError
        return reply


async def read_message(reader, *, bodiless=False):
    """Head and body of one HTTP/1.1 message as they are on the wire (chunks too); None at the end of the stream."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    is_reply = head.startswith(b"HTTP/")
    if bodiless or (is_reply and head.split(b" ", 2)[1] in (b"204", b"304")):
        return head, b""
    if re.search(rb"\r\ntransfer-encoding:\s*chunked", head, re.IGNORECASE):
        body = b""
        while not body.endswith(b"0\r\n\r\n"):
            size = await reader.readuntil(b"\r\n")
            body += size + await reader.readexactly(int(size, 16) + 2)
        return head, body
    if found := re.search(rb"\r\ncontent-length:\s*(\d+)", head, re.IGNORECASE):
        return head, await reader.readexactly(int(found[1]))
    return head, await reader.read() if is_reply else b""
