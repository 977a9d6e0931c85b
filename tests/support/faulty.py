"""Faults drawn from a seed, between the client and its servers and stores."""

from __future__ import annotations

import asyncio
import json
import random

from batch_client.errors import StorageError
from batch_client.storage import MemoryStore
from batch_client.transport import HttpReply, TransportError


class CrashError(BaseException):
    """The client's process is gone: nothing of it runs any more."""


class Fate:
    """What happens at each I/O step of one world: step number → fault, drawn once from a seed."""

    SERVER = ("busy", "failed", "lost before", "lost after", "flipped", "cut", "swapped", "stale", "slow", "garbage")
    STORE = ("refused", "done and refused", "late", "crash before", "crash after")

    def __init__(self, rng, steps=60, faults=8, kinds=None):
        self.rng = rng
        self.at = set(rng.sample(range(1, steps), faults)) if faults else set()
        self.kinds = kinds
        self.step = 0
        self.injected = []

    def next(self, kinds):
        self.step += 1
        if self.step not in self.at:
            return None
        allowed = [kind for kind in kinds if self.kinds is None or kind in self.kinds]
        if not allowed:
            return None
        kind = self.rng.choice(allowed)
        self.injected.append(kind)
        return kind


class Life:
    """One client's process. Its death is final: every later step of it dies too."""

    def __init__(self):
        self.dead = False

    def die(self):
        self.dead = True
        raise CrashError

    def check(self):
        if self.dead:
            raise CrashError


class FaultyStore:
    """A store as one client sees it, with faults."""

    def __init__(self, inner: MemoryStore, fate, life):
        self.inner = inner
        self.url = inner.url
        self.fate = fate
        self.life = life
        self.late = []

    async def _around(self, what, *arguments):
        self.life.check()
        fault = self.fate.next(Fate.STORE)
        await asyncio.sleep(self.fate.rng.random() * 0.01)
        self.life.check()
        if fault == "crash before":
            self.life.die()
        if fault == "refused":
            raise StorageError(f"{self.url}: 503 SlowDown")
        if fault == "late" and what == "create":
            self.late.append(asyncio.ensure_future(self._later(*arguments)))
            raise StorageError(f"{self.url}: connection reset")
        result = await getattr(self.inner, what)(*arguments)
        if fault == "crash after":
            self.life.die()
        if fault in ("done and refused", "late"):
            raise StorageError(f"{self.url}: connection reset")
        return result

    async def _later(self, key, data):
        await asyncio.sleep(200)
        await self.inner.create(key, data)

    async def get(self, key, start=None, stop=None):
        return await self._around("get", key, start, stop)

    async def head(self, key):
        return await self._around("head", key)

    async def create(self, key, data):
        return await self._around("create", key, data)

    async def delete(self, key):
        return await self._around("delete", key)

    async def list(self, prefix):
        self.life.check()
        async for meta in self.inner.list(prefix):
            yield meta


class FaultyTransport:
    """A server as one client sees it, with faults on the way."""

    def __init__(self, server, fate, life):
        self.server = server
        self.fate = fate
        self.life = life
        self.replies = []

    async def send(self, method, url, headers, parts, deadline):
        self.life.check()
        if method == "GET":
            return await self.server.send(method, url, headers, parts, deadline)
        fault = self.fate.next(Fate.SERVER)
        await asyncio.sleep(self.fate.rng.random() * (30 if fault == "slow" else 0.05))
        self.life.check()
        if fault == "busy":
            return _error(503, "ServiceUnavailableException")
        if fault == "failed":
            return _error(self.fate.rng.choice([500, 503, 507]), "InternalServerException")
        if fault == "lost before":
            raise TransportError("connection refused")
        reply = await self.server.send(method, url, headers, parts, deadline)
        await asyncio.sleep(self.fate.rng.random() * 0.05)
        self.life.check()
        return self._altered(fault, reply)

    def _altered(self, fault, reply):
        earlier = list(self.replies)
        self.replies.append(reply)
        if fault == "lost after":
            raise TransportError("connection reset")
        if fault == "flipped":
            body = bytearray(reply.body)
            position = self.fate.rng.randrange(len(body) * 8)
            body[position // 8] ^= 1 << position % 8
            return HttpReply(200, reply.headers, bytes(body))
        if fault == "cut":
            return HttpReply(200, reply.headers, reply.body[: self.fate.rng.randrange(len(reply.body))])
        if fault in ("swapped", "stale") and earlier:
            return earlier[-1] if fault == "swapped" else earlier[0]
        if fault == "garbage":
            return HttpReply(200, {}, b"<html>a proxy's page</html>")
        return reply


def _error(status, kind):
    return HttpReply(status, {}, json.dumps({"code": status, "type": kind, "message": "m"}).encode())


def calm():
    """A life without faults."""
    return Fate(random.Random(0), faults=0)
