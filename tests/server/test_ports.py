"""Where a server listens: ports that somebody else has, and addresses of other machines."""

import asyncio

import pytest

from batch_client import server as server_module
from batch_client import server_process
from batch_client.errors import ServingError, UsageError
from batch_client.machine import free_ports, has_address
from batch_client.server import EmbeddedServer, ServerSettings


@pytest.mark.parametrize("flag", ["port", "metrics_port"])
async def test_a_port_that_is_taken_is_named_before_the_start(flag, make_archive, monkeypatch):
    made = []
    monkeypatch.setattr(server_module, "launch", made.append)
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    try:
        wanted = rf"^127\.0\.0\.1:{port} is taken: end what listens there, or take another --port or --metrics-port$"
        with pytest.raises(ServingError, match=wanted):
            await EmbeddedServer(ServerSettings(make_archive(), workers=1, **{flag: port})).start()
    finally:
        taken.close()
        await taken.wait_closed()
    assert made == []


async def test_a_port_that_is_taken_meanwhile_is_named(make_archive, monkeypatch):
    monkeypatch.setattr(server_module, "is_taken", lambda *_: False)
    made, launch = [], server_module.launch
    monkeypatch.setattr(server_module, "launch", lambda *arguments: made.append(launch(*arguments)) or made[-1])
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    try:
        wanted = f"Failed to bind to address.*:{port}: end what listens there, or take another --port"
        with pytest.raises(ServingError, match=wanted):
            await EmbeddedServer(ServerSettings(make_archive(), workers=1, port=port)).start()
    finally:
        taken.close()
        await taken.wait_closed()
    assert [start.folder.exists() for start in made] == [False]  # the message has all that its log would say


async def test_an_address_of_another_machine_is_refused_before_the_start(make_archive):
    server = EmbeddedServer(ServerSettings(make_archive(), workers=1, address="192.0.2.1"))  # nobody's: RFC 5737
    with pytest.raises(UsageError, match=r"^--address 192\.0\.2\.1: not an address of this machine$"):
        await server.start()
    server = EmbeddedServer(ServerSettings(make_archive(), workers=1, address="::1"))
    with pytest.raises(UsageError, match=r"^--address ::1: wanted a name or an IPv4 address"):
        await server.start()
    assert all(map(has_address, ("127.0.0.1", "localhost", "0.0.0.0")))  # noqa: S104 - asked about, not served


def test_free_ports_are_none_that_outgoing_connections_get():
    ports = free_ports(100)
    assert len(set(ports)) == 100
    assert max(ports) < 32_768


async def test_a_free_port_that_was_taken_in_between_costs_another_start(make_archive, monkeypatch):
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    free_ports = server_process.free_ports
    asked = []

    def not_so_free(count):
        asked.append(free_ports(count))
        if len(asked) == 1:
            asked[0][0] = taken.sockets[0].getsockname()[1]
        return asked[-1]

    monkeypatch.setattr(server_process, "free_ports", not_so_free)
    try:
        async with EmbeddedServer(ServerSettings(make_archive(), workers=1)) as server:
            assert len(asked) == 2
            assert [worker["status"] for worker in (await server.describe())["workers"]] == ["READY"]
    finally:
        taken.close()
        await taken.wait_closed()


async def test_ports_that_are_always_taken_in_between_are_said_without_a_flag_that_only_serve_has(
        make_archive, monkeypatch):
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    ports = [taken.sockets[0].getsockname()[1], *server_process.free_ports(4)]
    monkeypatch.setattr(server_process, "free_ports", lambda _: ports)
    monkeypatch.setattr(server_module, "STARTS", 1)
    try:
        with pytest.raises(ServingError, match=r"no free ports for TorchServe .*: try again$"):
            await EmbeddedServer(ServerSettings(make_archive(), workers=1)).start()
    finally:
        taken.close()
        await taken.wait_closed()
