"""Runs whose records are in shared memory: the output is the same, and where there is no such memory they are sent."""

import os
import random
from dataclasses import replace

import numpy as np
import pytest

from batch_client import exchange
from batch_client.errors import DataError
from batch_client.events import RequestDone
from batch_client.pipeline import execute
from batch_client.regions import new_folder, remove_folder
from batch_client.transport import HttpReply
from batch_handler.shared import SharedMemory
from support.disks import small_disk
from support.faulty import Fate
from support.simulated import SimulatedServer
from support.virtual import run_virtually, virtually
from support.world import World

if new_folder_made := new_folder():
    remove_folder(new_folder_made)
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
pytestmark = pytest.mark.skipif(new_folder_made is None, reason="no /dev/shm on this machine")


@pytest.fixture
def memory():
    folder = new_folder()
    yield SharedMemory(folder)
    remove_folder(folder)
    assert not folder.exists()


class Changing(SimulatedServer):
    """Something happens to it just before it answers a request, by the number of answers before."""

    def __init__(self, happens, **options):
        super().__init__(seconds=0.01, **options)
        self.happens = happens
        self.answers = 0

    def answer(self, body, header_length):
        self.happens.pop(self.answers, lambda: None)()
        self.answers += 1
        return super().answer(body, header_length)


def run_at(server, **options):
    return run_virtually(World(1, server=server, **options).live())


def test_records_are_left_in_memory_and_the_output_is_the_same(root, memory):
    server = SimulatedServer(seconds=0.01, shared_memory=memory)
    summary = run_at(server)
    assert (summary.root, summary.retries) == (root, 0)
    assert server.shared == server.requests == 24
    # Files are used again: there are no more than requests were in flight at once.
    assert 0 < len(list(memory.folder.iterdir())) <= 4 < server.requests
    sent = SimulatedServer(seconds=0.01)
    assert run_at(sent).root == root
    assert sent.shared == 0


@pytest.fixture
def outputs_in_memory(monkeypatch):
    """However small they are."""
    monkeypatch.setattr(exchange, "SHARED_OUTPUT_BYTES", 1)


@pytest.mark.parametrize("exact", [False, True])
def test_outputs_come_back_in_memory_and_the_output_is_the_same(root, memory, outputs_in_memory, exact):
    server = SimulatedServer(seconds=0.01, shared_memory=memory)
    exchange.SHARED_OUTPUT_BYTES = 4 * 8  # four records of two float32
    summary = run_at(server, exact=exact)
    assert (summary.root == root, summary.retries) == (exact, 0)
    assert server.returned == server.shared == server.requests == 24
    small = SimulatedServer(seconds=0.01, shared_memory=memory)
    exchange.SHARED_OUTPUT_BYTES += 1
    assert run_at(small, exact=exact).root == summary.root
    assert (small.returned, small.shared) == (0, 24)


def test_bytes_received_are_those_of_the_reply_and_of_memory(memory, outputs_in_memory):
    received = {}
    for place, shared in (("memory", memory), ("body", None)):
        seen = []
        world = World(1, SimulatedServer(shared_memory=shared), chunk_records=96, request_records=96)
        services = world.services()
        run_virtually(execute(world.spec(), services, (seen.append,)))
        received[place] = [event.bytes_received for event in seen if isinstance(event, RequestDone)]
    ((ours,), (theirs,)) = received.values()
    # The JSON header says more of an output in memory than of one behind it, but less than the 768 bytes of this one.
    assert 0 <= ours - theirs < 400


@pytest.mark.parametrize("unusable", [
    lambda folder: folder.rmdir(), lambda folder: folder.chmod(0o755),
    pytest.param(lambda folder: os.chown(folder, 12345, -1), marks=AS_ROOT),
], ids=["gone", "open to others", "another user's"])
def test_a_folder_that_is_not_ours_is_not_used(root, memory, unusable):
    unusable(memory.folder)
    server = SimulatedServer(seconds=0.01, shared_memory=memory)
    assert run_at(server).root == root
    assert server.shared == 0
    if memory.folder.exists():
        assert list(memory.folder.iterdir()) == []
        os.chown(memory.folder, os.geteuid(), -1)


def test_a_folder_that_goes_meanwhile_costs_the_requests_in_flight_another_try(root, memory):
    server = Changing({10: lambda: remove_folder(memory.folder)}, shared_memory=memory)
    summary = run_at(server)
    assert (summary.root, summary.failed) == (root, 0)
    assert 0 < server.shared < 24
    assert 0 < summary.retries <= 4
    assert not memory.folder.exists()


def test_a_server_that_reads_another_folder_gets_bodies(root, memory):
    # Another server has taken the place of the one that was asked for its metadata, whose folder was left.
    other = new_folder()
    server = Changing({}, shared_memory=memory)
    server.happens[10] = lambda: setattr(server, "shared_memory", SharedMemory(other))
    try:
        summary = run_at(server)
    finally:
        remove_folder(other)
    assert (summary.root, summary.failed) == (root, 0)
    assert 0 < server.shared < 24
    assert 0 < summary.retries <= 4


def test_a_server_that_has_no_shared_memory_any_more_gets_bodies_and_no_record_is_convicted(root, memory):
    server = Changing({}, shared_memory=memory)
    server.happens[10] = lambda: setattr(server, "shared_memory", None)
    summary = run_at(server)
    assert (summary.root, summary.failed) == (root, 0)
    assert 0 < summary.retries <= 4


def test_memory_that_is_full_costs_no_request(root, memory):
    with small_disk(memory.folder, 8 << 10):  # two pages, four requests at once
        server = SimulatedServer(seconds=0.01, shared_memory=memory)
        summary = run_at(server)
        assert 0 < server.shared <= 4
        assert len(list(memory.folder.iterdir())) <= 2
    assert (summary.root, summary.retries) == (root, 0)


RECORDS = np.random.default_rng(5).integers(0, 99, (96, 1020), np.uint8)  # four of them take a page, nearly


def test_memory_that_has_no_room_for_outputs_has_the_records_all_the_same(memory, outputs_in_memory):
    wanted = run_at(SimulatedServer(record_shape=(1020,), seconds=0.01), records=RECORDS)
    with small_disk(memory.folder, 4 << 10):  # one page: the records of one request at a time
        server = SimulatedServer(record_shape=(1020,), seconds=0.01, shared_memory=memory)
        summary = run_at(server, records=RECORDS, in_flight=1)
        assert (server.returned, server.sent_instead) == (0, 1)  # and then they are not asked for any more
        assert server.shared == server.requests == 24
    assert (summary.root, summary.retries) == (wanted.root, 0)


class Older(SimulatedServer):
    """As the handler was before outputs could be in memory."""

    def extents(self, request):
        self.asked = getattr(self, "asked", 0) + any(output.extent for output in request.outputs)
        return {}


def test_a_server_that_does_not_know_of_outputs_in_memory_is_asked_no_more(root, memory, outputs_in_memory):
    server = Older(seconds=0.01, shared_memory=memory)
    summary = run_at(server)
    assert (summary.root, summary.retries) == (root, 0)
    assert 0 < server.asked <= 4
    assert server.shared == 24


@pytest.mark.parametrize("pages", [4, 5, 6, 7])
def test_where_there_is_room_for_records_or_outputs_the_records_have_it(memory, outputs_in_memory, pages):
    # Four requests at once; the records of each take a page, and their outputs another.
    wanted = run_at(SimulatedServer(record_shape=(1020,), seconds=0.01), records=RECORDS)
    with small_disk(memory.folder, pages << 12):
        server = SimulatedServer(record_shape=(1020,), seconds=0.01, shared_memory=memory)
        summary = run_at(server, records=RECORDS)
    assert (summary.root, summary.retries) == (wanted.root, 0)
    # Those that were under way when the memory was full cost the others a body, once.
    assert server.requests - server.shared <= 4
    assert server.returned + server.sent_instead < server.requests - 8  # and outputs are not asked for any more


@pytest.mark.parametrize("seed", range(12))
@virtually
async def test_faults_on_the_way_change_nothing(root, memory, outputs_in_memory, seed):
    world = World(seed, server=SimulatedServer(seconds=0.01, shared_memory=memory))
    fate = Fate(random.Random(seed))
    await world.until_published(fate)
    await world.settle()
    await world.check(root)
    assert fate.injected
    assert world.server.returned > 0


def test_what_other_servers_say_of_shared_memory_is_not_taken(root, memory):
    class Liar(SimulatedServer):
        def metadata(self):
            metadata = super().metadata()
            return replace(metadata, parameters={**metadata.parameters, "shared_memory": "/etc"})

    server = Liar(seconds=0.01)
    assert run_at(server).root == root
    assert server.shared == 0


class Gone(SimulatedServer):
    """Answers every request with 410, as a gateway may whose upstream was withdrawn."""

    def answer(self, body, header_length):
        return HttpReply(410, {}, b'{"error": "gone"}')


def test_410_to_a_body_is_a_refusal_and_no_word_about_memory(root):
    server = Gone(seconds=0.01)
    with pytest.raises(DataError, match="410: gone"):
        run_at(server)
    assert server.requests < 24
