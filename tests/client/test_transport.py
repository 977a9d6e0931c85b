"""Requests over real connections: what a proxy on the way may make of them."""

from aiohttp import web

from batch_client.transport import HttpTransport


async def test_replies_come_as_they_are_also_through_a_proxy_that_compresses_for_those_who_ask():
    async def compressing(request):
        reply = web.Response(text="x" * 5000)
        reply.enable_compression()  # as the request's Accept-Encoding says
        return reply

    app = web.Application()
    app.router.add_get("/", compressing)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with HttpTransport() as transport:
            url = "http://{}:{}/".format(*runner.addresses[0])
            assert (await transport.send("GET", url, {}, (), 10)).body == b"x" * 5000
            asked = await transport.send("GET", url, {"Accept-Encoding": "gzip"}, (), 10)
            assert asked.body != b"x" * 5000, "nothing here compresses"
    finally:
        await runner.cleanup()
