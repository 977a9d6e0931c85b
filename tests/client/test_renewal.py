"""A token that expires during a run, and what gives another that is away at that moment."""

import asyncio
from collections import Counter

import numpy as np
import pytest

from batch_client import exchange
from batch_client.errors import CredentialsError
from batch_client.events import RequestDone, RequestRetried, RequestSent
from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.serving import Servers
from batch_client.storage import MemoryStore
from batch_client.transport import HttpReply
from batch_client.verify import verify_output
from support.runs import records_of, services, source_of, spec
from support.simulated import URL, SimulatedServer
from support.virtual import virtually


class Guarded(SimulatedServer):
    """Takes one token, which changes at the third request."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens
        self.wanted = "first"

    async def send(self, method, url, headers, parts, deadline):
        self.wanted = "second" if self.requests >= 2 else "first"
        if headers.get("Authorization") != f"Bearer {self.wanted}":
            return HttpReply(400, {}, b'{"type": "InvalidKeyException", "message": "Token Authentication failed"}')
        return await super().send(method, url, headers, parts, deadline)

    def servers(self, urls=(URL,)):
        return Servers(self, dict.fromkeys(urls, self.tokens), "toy")


class Renewing:
    """Gives the first token, then fails so many times, then gives the second."""

    def __init__(self, failures):
        self.failures = failures
        self.current = "first"

    async def token(self, refused=None):
        if refused == self.current:
            if self.failures:
                self.failures -= 1
                raise CredentialsError("--token-command vault: exit 1")
            self.current = "second"
        return self.current


@pytest.mark.parametrize("failures", [0, 3])
async def test_a_renewal_that_fails_for_a_moment_costs_a_moment(failures):
    records = records_of(40)
    source = source_of(records, (10, 3))
    output, server, seen = MemoryStore("memory://out"), Guarded(Renewing(failures)), []
    await execute(spec(chunk_records=10), services(server, source, output), (lambda event: seen.append(type(event)),))
    assert seen.count(RequestSent) == seen.count(RequestDone) + seen.count(RequestRetried)
    assert seen.count(RequestRetried) > failures
    assert server.tokens.failures == 0
    assert server.tokens.current == "second"
    assert (await verify_output(output, deep=True)).records == len(records)


class OwnTokens(SimulatedServer):
    """Several servers with a token each, of which a later one takes the place at their third request."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def wanted(self, url):
        return f"{url} {self.seen[url] > 2}".replace(" ", "-")

    async def send(self, method, url, headers, parts, deadline):
        here = url[:url.index("/", len("http://"))]
        if headers.get("Authorization") != f"Bearer {self.wanted(here)}":
            return HttpReply(400, {}, b'{"type": "InvalidKeyException", "message": "Token Authentication failed"}')
        self.seen[here] += 1
        return await super().send(method, url, headers, parts, deadline)


class Lookup:
    """The token of one of them, asked for when it is refused; how often."""

    def __init__(self, server, url):
        self.server, self.url, self.asked = server, url, 0
        self.current = server.wanted(url)

    async def token(self, refused=None):
        if refused == self.current:
            self.current, self.asked = self.server.wanted(self.url), self.asked + 1
        return self.current


@virtually
async def test_each_server_has_its_own_token_and_its_own_renewal():
    records, server, output = records_of(400), OwnTokens(), MemoryStore("memory://out")
    server.seconds = 1.0  # in which the pause after a refusal ends
    tokens = {url: Lookup(server, url) for url in ("http://one", "http://two")}
    found = Services(Servers(server, tokens, "toy"), source_of(records, (4, 3)), output,
                     clock=asyncio.get_running_loop().time)
    await execute(spec(chunk_records=4, endpoints=tuple(tokens), request_records=4), found)
    assert (await verify_output(output, deep=True)).records == len(records)
    assert [source.asked for source in tokens.values()] == [1, 1]


async def test_a_renewal_that_goes_on_failing_ends_the_run_with_its_reason(monkeypatch):
    monkeypatch.setattr(exchange, "TOKEN_SECONDS", 0.2)
    source = source_of(records_of(40), (10, 3))
    output = MemoryStore("memory://out")
    with pytest.raises(CredentialsError) as error:
        await execute(spec(chunk_records=10), services(Guarded(Renewing(np.inf)), source, output))
    assert "refuses the token" in str(error.value)
    assert "no other is to be had: --token-command vault: exit 1" in str(error.value)
    assert "\n" not in str(error.value)


async def test_a_first_token_that_can_not_be_had_ends_the_run_at_once():
    source = source_of(records_of(40), (10, 3))
    tokens = Renewing(np.inf)
    tokens.token = _none
    with pytest.raises(CredentialsError, match="can't be read"):
        await execute(spec(chunk_records=10), services(Guarded(tokens), source, MemoryStore("memory://out")))


async def _none(refused=None):
    raise CredentialsError("--token-file t: can't be read")
