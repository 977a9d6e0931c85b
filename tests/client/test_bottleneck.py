"""What a run was limited by: the stage that was made slow is the one that is named, and no other."""

import asyncio
import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batch_client.bottleneck import BACKLOG, Limit, Totals, Waiting, find_bottleneck, knee
from batch_client.contract import contract_of
from batch_client.events import (
    Published,
    RequestDone,
    RequestSent,
    RunStarted,
    ServerJoined,
    Step,
    StepBegan,
    StepEnded,
)
from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.report import Report
from batch_client.report.page import render
from batch_client.spec import RunSpec
from batch_client.storage import MemoryStore
from batch_client.timesheet import Timesheet
from batch_client.transport import HttpReply
from batch_handler.oip import HEADER_LENGTH, decode_request
from support.plans import plan_of
from support.runs import source_of
from support.simulated import URL, Breaking, SimulatedServer
from support.virtual import virtually

RECORDS = np.random.default_rng(2).integers(0, 99, (640, 3), np.uint8)


class Workers(SimulatedServer):
    """Computes so many requests at once, each for `compute` seconds; the rest queue. Each also travels for `wire`
    seconds, and where there is `later` from so many seconds on for that long. The first `ill` requests are failed after
    a while, or turned away at once."""

    def __init__(self, workers=2, compute=0.1, wire=0.01, ill=0, turned_away=0, ceiling=None, later=None):
        super().__init__()
        self.began, self.later = asyncio.get_running_loop().time(), later
        self.free = asyncio.Semaphore(workers)
        self.compute, self.wire, self.ill, self.turned_away, self.ceiling = compute, wire, ill, turned_away, ceiling

    def metadata(self):
        said = super().metadata()
        if self.ceiling is not None:
            said.parameters["ceiling_records_per_s"] = self.ceiling
        return said

    async def send(self, method, url, headers, parts, deadline):
        if method == "GET":
            return await super().send(method, url, headers, parts, deadline)
        if self.turned_away:
            self.turned_away -= 1
            return HttpReply(503, {}, b'{"code": 503, "type": "ServiceUnavailableException", "message": "full"}')
        moved = self.later is not None and asyncio.get_running_loop().time() >= self.began + self.later[0]
        await asyncio.sleep(self.later[1] if moved else self.wire)
        async with self.free:
            await asyncio.sleep(self.compute)
            if self.ill:
                self.ill -= 1
                return HttpReply(500, {}, b'{"code": 500, "type": "InternalServerException", "message": "ill"}')
            return await super().send(method, url, headers, parts, deadline)

    def reply_parameters(self):
        return {**super().reply_parameters(), "compute_ms": self.compute * 1e3}


class Slow(MemoryStore):
    """A store whose chunks take their time, each on its own."""

    def __init__(self, url, objects=None, get=0.0, create=0.0):
        super().__init__(url)
        self.objects.update(objects or {})
        self.get_seconds, self.create_seconds = get, create

    async def get(self, key, start=None, stop=None):
        if "c/" in key:
            await asyncio.sleep(self.get_seconds)
        return await super().get(key, start, stop)

    async def create(self, key, data):
        if "/c/" in key:
            await asyncio.sleep(self.create_seconds)
        return await super().create(key, data)


@pytest.fixture(scope="module")
def source():
    return source_of(RECORDS, (16, 3)).objects


@virtually
async def scored(source, server=None, get=0.0, create=0.0, cpu=lambda: 0.0, **options):
    """The summary of a run of 160 requests, on a virtual clock."""
    # Made in here: it belongs to the loop.
    served = Workers(**(server or {}))
    spec = RunSpec(**{"input": "memory://slow", "output": "memory://out", "endpoints": (URL,), "model": "toy",
                      "chunk_records": 16, "request_records": 4, "in_flight": 4, **options})
    services = Services(served.servers(), Slow("memory://slow", source, get=get),
                        Slow("memory://out", create=create), rng=random.Random(3),
                        clock=lambda: asyncio.get_running_loop().time(), cpu=cpu)
    return await execute(spec, services)


SCENARIOS = {
    "two workers that always compute": ({}, Limit.MODEL),
    "a fast store before slow workers": ({"get": 0.05, "create": 0.05}, Limit.MODEL),
    "a server far away, with too few in flight": ({"server": {"workers": 8, "compute": 0.005, "wire": 0.5}},
                                                  Limit.IN_FLIGHT),
    "one request at a time for two workers": ({"in_flight": 1}, Limit.IN_FLIGHT),
    "a slow source": ({"get": 4.0}, Limit.READING),
    "a source a little slower than the workers": ({"get": 1.2}, Limit.READING),
    "a slow source and eight idle workers": ({"get": 1.0, "server": {"workers": 8}}, Limit.READING),
    "a slow output": ({"create": 4.0}, Limit.WRITING),
    "a server that was ill for most of the run": ({"server": {"compute": 0.02, "ill": 60}, "patience": 9e9},
                                                  Limit.FAILURES),
    "a server without room for most of the run": ({"server": {"compute": 0.002, "turned_away": 12}}, Limit.FAILURES),
    "a run of one chunk": ({"chunk_records": 640, "request_records": 320, "get": 3.0}, Limit.ENDS),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_stage_that_is_slow_is_named(name, source):
    options, limit = SCENARIOS[name]
    summary = scored(source, **options)
    assert summary.limited_by == limit.value, summary.time_shares
    assert sum(summary.time_shares.values()) == pytest.approx(1, abs=0.001)
    assert summary.advice


def test_records_that_fail_are_what_is_said_where_looking_for_them_took_the_time():
    totals = Totals(seconds=10, waited={(Waiting.SERVERS, 1): 10.0}, in_flight=1, requests=10, request_seconds=2,
                    compute_seconds=2, least_overhead=0, wasted_seconds=8, cpu_seconds=1, attempts=14)
    servers, records = find_bottleneck(totals), find_bottleneck(replace(totals, failed=2))
    assert servers.limit is records.limit is Limit.FAILURES
    assert "servers' logs" in servers.advice
    assert records.advice.startswith("records that fail are looked for one by one")


class Dying(Workers):
    """A record that begins with 255 ends the worker, which starts again for ten seconds."""

    async def send(self, method, url, headers, parts, deadline):
        if method == "POST":
            request = decode_request(b"".join(parts), int(headers[HEADER_LENGTH]), max_tensor_bytes=1 << 20)
            if (request.inputs[0].data[:, 0] == 255).any():
                self.back = asyncio.get_running_loop().time() + 10.0
                return HttpReply(500, {}, b'{"code": 500, "type": "InternalServerException", "message": "died"}')
            await asyncio.sleep(self.back - asyncio.get_running_loop().time())
        return await super().send(method, url, headers, parts, deadline)

    back = 0.0


@virtually
async def test_a_server_that_starts_again_for_each_record_that_ends_it_is_no_far_one():
    records = RECORDS.copy()
    records[70, 0] = 255
    source = source_of(records, (16, 3))
    served = Dying(compute=0.05)
    services = Services(served.servers(), source, MemoryStore("memory://out"),
                        rng=random.Random(3), clock=lambda: asyncio.get_running_loop().time(), cpu=lambda: 0.0)
    spec = RunSpec(input="memory://slow", output="memory://out", endpoints=(URL,), model="toy", chunk_records=16,
                   request_records=4, in_flight=4, max_failed=1)
    summary = await execute(spec, services)
    assert summary.failed == 1
    assert summary.limited_by == Limit.FAILURES.value
    assert summary.advice.startswith("records that fail are looked for one by one")


@virtually
async def test_where_every_request_has_a_bad_record_failures_are_the_limit():
    """Then no request but those that look for it is ever answered."""
    records = RECORDS.copy()
    records[::4, 0] = 255
    source = source_of(records, (16, 3))
    report = Report("memory://slow", asyncio.get_running_loop().time, lambda: 0.0)
    services = Services(Breaking(seconds=0.01).servers(), source, MemoryStore("memory://out"),
                        rng=random.Random(3), clock=asyncio.get_running_loop().time, cpu=lambda: 0.0)
    spec = RunSpec(input="memory://slow", output="memory://out", endpoints=(URL,), model="toy", chunk_records=16,
                   request_records=4, in_flight=4, max_failed=160)
    summary, page = await execute(spec, services, (report,)), render(report.data())
    assert summary.failed == 160
    assert summary.limited_by == Limit.FAILURES.value
    assert summary.advice.startswith("records that fail are looked for one by one")
    assert "Limited by <strong>failures</strong>" in page
    assert "attempts gave no result" in page
    assert "<dt>records scored: failed</dt><dd>160</dd>" in page


def test_what_made_it_slow_is_what_is_named(source):
    """The negative control: the same run without the slow stage is limited by something else."""
    assert scored(source).limited_by == scored(source, get=0.01, create=0.01).limited_by == Limit.MODEL.value


@pytest.fixture(scope="module")
def many():
    """Of 1,000 requests: with two workers that compute for 0.1 s each, a run of many spans."""
    return source_of(np.random.default_rng(2).integers(0, 99, (4000, 3), np.uint8), (16, 3)).objects


def test_a_way_that_becomes_longer_is_no_queue(many):
    """For 20 s of the run two workers compute all the time; from then on a request travels for ten times as long as it
    computes, which the shortest way of the run would call a queue at the model."""
    summary = scored(many, server={"wire": 0.001, "later": (20.0, 1.0)})
    assert summary.limited_by == Limit.WIRE.value, summary.time_shares


def test_a_queue_that_always_stands_is_no_longer_way(many):
    """The negative control: each request of the later spans finds a queue, and the model is the limit all the same."""
    summary = scored(many, server={"workers": 1, "wire": 0.001}, in_flight=8)
    assert summary.seconds > 90
    assert summary.limited_by == Limit.MODEL.value, summary.time_shares
    assert summary.time_shares[Limit.MODEL.value] > 0.95


def test_a_budget_that_the_requests_hold_is_the_thing_to_raise(source):
    summary = scored(source, max_bytes_in_flight=48, in_flight=64, server={"workers": 64, "compute": 1.0})
    assert (summary.limited_by, summary.advice) == (Limit.READING.value, "raise --max-bytes-in-flight")


def test_an_event_loop_that_is_never_idle_is_the_limit_whatever_waits(source):
    ticks = itertools.count(0.0, 1e3)
    assert scored(source, cpu=lambda: next(ticks)).limited_by == Limit.CLIENT.value


def answered_at(now):
    """The account of a run whose one request was answered after half a second; `now` holds the time."""
    sheet = Timesheet(lambda: now[0], lambda: 0.0)
    sheet(RunStarted(plan_of(), "out", "m", "d", 0, "f", 4, None, 1000, 0))
    sheet(RequestSent("http://one", 4))
    now[0] = 0.5
    sheet(RequestDone("http://one", 4, 1, 1, 0.5, 100.0))
    return sheet


@pytest.mark.parametrize(("seconds", "limit"), [(0.9, Limit.ENDS), (16.0, Limit.WRITING)])
def test_a_store_that_is_away_at_the_end_is_no_matter_of_a_short_run(seconds, limit):
    now = [0.0]
    sheet = answered_at(now)
    sheet(StepBegan(Step.WRITE))
    now[0] += seconds
    sheet(StepEnded(Step.WRITE, seconds))
    now[0] += 0.01
    sheet(Published("out", "root"))
    assert find_bottleneck(sheet.totals()).limit is limit


def test_publishing_for_long_is_the_end_of_a_run():
    now = [0.0]
    sheet = answered_at(now)
    now[0] += 5.0
    sheet(Published("out", "root"))
    assert find_bottleneck(sheet.totals()).limit is Limit.ENDS


def test_places_are_those_of_all_servers_that_take_part_by_now():
    sheet = Timesheet(lambda: 0.0, lambda: 0.0)
    sheet(RunStarted(plan_of(), "out", "m", "d", 0, "f", 4, None, 1000, 0))
    assert sheet.totals().in_flight == 4
    sheet(ServerJoined("http://two", 60.0, 8))
    assert sheet.totals().in_flight == 8


def test_what_is_computed_after_the_run_is_none_of_it():
    """Whoever asks for the verdict may have done something else before, or ask in another thread."""
    now, computed = [0.0], [0.0]
    sheet = Timesheet(lambda: now[0], lambda: computed[0])
    sheet(RunStarted(plan_of(), "o", "m", "d", 0, "f", 4, None, 1000, 0))
    now[0], computed[0] = 2.0, 0.5
    sheet(Published("o", "root"))
    now[0], computed[0] = 9.0, 7.0
    assert (sheet.totals().seconds, sheet.totals().cpu_seconds) == (2.0, 0.5)


def test_far_below_the_ceiling_more_workers_are_not_the_advice(source):
    near, far = (scored(source, server={"ceiling": ceiling, "compute": 0.1}) for ceiling in (80.0, 200.0))
    assert near.limited_by == far.limited_by == "model"
    assert near.advice == "add workers, GPUs or endpoints"
    assert "other cores" in far.advice


@virtually
async def test_clients_that_share_servers_are_told_that_others_have_the_rest(source):
    served = Workers(ceiling=80.0)

    async def client(number):
        spec = RunSpec(input="memory://slow", output="memory://out", endpoints=(URL,), model="toy",
                       chunk_records=16, request_records=4, in_flight=4)
        return await execute(spec, Services(
            served.servers(), Slow("memory://slow", source), MemoryStore("memory://out"),
            rng=random.Random(number), clock=lambda: asyncio.get_running_loop().time(), cpu=lambda: 0.0))

    for summary in await asyncio.gather(client(1), client(2)):
        assert summary.percent_of_ceiling < 85
        assert "other clients that use these servers have the rest" in summary.advice


@pytest.mark.parametrize("wire", [0.01, 0.1, 0.5])
def test_far_servers_that_compute_all_the_time_are_limited_by_the_model(source, wire):
    """As far as the model's ceiling says that they do: two workers, four records in 0.1 s each."""
    summary = scored(source, in_flight=64, server={"ceiling": 80.0, "compute": 0.1, "wire": wire})
    assert summary.percent_of_ceiling > 70
    assert summary.limited_by == "model"


def test_where_the_model_was_not_measured_measuring_it_is_the_advice(source):
    unmeasured = scored(source, server={"compute": 0.1})
    assert unmeasured.limited_by == "model"
    assert "(bench --save), or add workers" in unmeasured.advice


def test_a_ceiling_that_the_server_states_is_compared_with(source):
    summary = scored(source, server={"ceiling": 80.0, "compute": 0.1})
    assert summary.ceiling_records_per_s == 80.0
    # Two workers, four records in 0.1 s each: 80 records/s, less the beginning and the end.
    assert 90 < summary.percent_of_ceiling < 100
    assert scored(source).percent_of_ceiling is None


@pytest.mark.parametrize(("said", "taken"), [
    (100, 100.0), (12.5, 12.5), (0, None), (-1, None), ("fast", None), (True, None), (None, None),
    (float("inf"), None), (float("nan"), None),
])
def test_only_a_rate_is_taken_for_a_ceiling(said, taken):
    tensor = {"datatype": "FP32", "shape": [-1, 3]}
    body = {"name": "m", "versions": ["1"], "platform": "", "inputs": [{"name": "x", **tensor}],
            "outputs": [{"name": "y", **tensor}], "parameters": {"ceiling_records_per_s": said}}
    assert contract_of("http://s", json.dumps(body).encode()).ceiling == taken


def test_a_server_of_another_kind_is_none_to_bench():
    silent = Totals(1.0, {(Waiting.SERVERS, 1): 1.0}, 4, 1, 1.0, 0.0, 0.0, 0.0, 0.0, 1)
    assert find_bottleneck(silent).advice == "add workers, GPUs or endpoints"
    assert "bench" in find_bottleneck(replace(silent, compute_seconds=0.9)).advice


seconds = st.floats(0, 1e6)


@st.composite
def totals(draw):
    waited = draw(st.dictionaries(st.tuples(st.sampled_from(Waiting), st.integers(0, 40)), seconds, max_size=12))
    requests = draw(st.integers(0, 1000))
    compute, overhead, queued, wasted = (draw(seconds) for _ in range(4))
    least = overhead / max(requests, 1)
    return Totals(sum(waited.values()), waited, draw(st.integers(1, 40)), requests,
                  compute + requests * least + queued, compute, least, wasted, draw(seconds),
                  requests + draw(st.integers(0, 100)))


@example(Totals(1.0, {(Waiting.SERVERS, 1): 1.0, (Waiting.READ, 0): 1.0}, 1, 1, 1.0, 0.0, 0.0, 0.0, 0.0, 1))
@example(Totals(1.0, {(Waiting.SERVERS, 1): 1.0}, 1, 0, 0.0, 0.0, 0.0, 1.0, 0.0, 5))  # nothing was ever answered
@given(totals())
def test_shares_are_of_the_whole_and_the_limit_is_one_of_them(sums):
    found = find_bottleneck(sums)
    if found is None:
        assert sums.attempts == 0 or not sum(sums.waited.values())
        return
    assert sum(found.shares.values()) == pytest.approx(1)
    assert all(share >= 0 for share in found.shares.values())
    assert found.evidence
    assert found.advice


@given(workers=st.integers(1, 12), more=st.integers(1, 20), compute=st.floats(0.01, 10), wire=st.floats(0, 1))
def test_the_knee_of_a_full_server_is_its_workers_and_what_travels(workers, more, compute, wire):
    """W workers that always compute finish W / c requests a second, of which each is active for c + o."""
    wanted = workers * (compute + wire * compute) / compute
    in_flight = int(wanted) + 1 + more
    run, requests = 100.0, 100.0 * workers / compute
    sums = Totals(run, {(Waiting.SERVERS, in_flight): run}, in_flight, round(requests), in_flight * run,
                  requests * compute, wire * compute * requests / round(requests), 0.0, 0.0, round(requests))
    assert in_flight - wanted >= BACKLOG
    assert knee(sums) == pytest.approx(wanted, rel=1e-6)


def test_without_a_backlog_no_knee_was_seen():
    sums = Totals(10, {(Waiting.READ, 3): 10.0}, 8, 30, 30.0, 30.0, 0.0, 0.0, 0.0, 30)
    assert knee(sums) == float("inf")
    found = find_bottleneck(sums)
    assert found.limit is Limit.READING
    assert found.shares[Limit.READING] == 1
