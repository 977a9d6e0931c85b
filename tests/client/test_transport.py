"""Requests over real connections: what a server, or a proxy on the way, may make of them."""

import asyncio

import pytest
from aiohttp import web

from batch_client import transport
from batch_client.transport import HttpTransport, LateError, TransportError
from support.web import serving


async def test_replies_come_as_they_are_also_through_a_proxy_that_compresses_for_those_who_ask():
    async def compressing(request):
        reply = web.Response(text="x" * 5000)
        reply.enable_compression()  # as the request's Accept-Encoding says
        return reply

    async with serving(web.get("/", compressing)) as url, HttpTransport() as client:
        assert (await client.send("GET", url, {}, (), 10)).body == b"x" * 5000
        asked = await client.send("GET", url, {"Accept-Encoding": "gzip"}, (), 10)
        assert asked.body != b"x" * 5000, "nothing here compresses"


async def test_a_redirect_is_an_answer_and_what_was_sent_goes_nowhere_else():
    seen = []

    async def here(request):
        raise web.HTTPTemporaryRedirect("/elsewhere")

    async def elsewhere(request):
        seen.append(request.headers.get("Authorization"))
        return web.Response(text="{}")

    async with serving(web.post("/", here), web.post("/elsewhere", elsewhere)) as url, HttpTransport() as client:
        reply = await client.send("POST", url, {"Authorization": "Bearer secret"}, (b"records",), 10)
    assert reply.status == 307
    assert seen == []


async def test_a_reply_that_is_not_there_at_the_deadline_is_late():
    over = asyncio.Event()

    async def never(request):
        await over.wait()

    async with serving(web.get("/", never)) as url, HttpTransport() as client:
        with pytest.raises(LateError, match="no answer within"):
            await client.send("GET", url, {}, (), 0.01)
        over.set()


@pytest.mark.parametrize("chunked", [False, True], ids=["of a length", "chunked"])
async def test_a_reply_over_the_bound_is_not_held(chunked, monkeypatch):
    monkeypatch.setattr(transport, "LARGEST_REPLY", 4999)

    async def large(request):
        reply = web.Response(body=b"x" * int(request.query["bytes"]))
        if chunked:
            reply.enable_chunked_encoding()
        return reply

    async with serving(web.get("/", large)) as url, HttpTransport() as client:
        assert len((await client.send("GET", f"{url}/?bytes=4999", {}, (), 10)).body) == 4999
        with pytest.raises(TransportError, match="5000 bytes or more, the most is 4999"):
            await client.send("GET", f"{url}/?bytes=5000", {}, (), 10)
