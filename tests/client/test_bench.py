"""The search for the best way to run a model, on a machine whose speeds are known; and the ceilings."""

import asyncio
import math
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import import_module

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_client.bench import ceilings
from batch_client.bench.ceilings import read_alone, wire_alone, write_alone
from batch_client.bench.search import Space, Way, decided, next_way, ratio, shares, space_of, wins
from batch_client.bench.session import BenchSpec
from batch_client.bench.tuner import find_best
from batch_client.cli.options import AMOUNT
from batch_client.errors import ServingError, UsageError
from batch_client.plan import MAX_REPLY_BYTES, MAX_REQUEST_BYTES, OutputGeometry, RequestSize, default_request
from batch_client.reader import open_source
from batch_client.regions import new_folder, remove_folder
from batch_client.storage import MemoryStore
from batch_handler.shared import SharedMemory
from support.plans import plan_of, spec
from support.runs import source_of
from support.simulated import SimulatedServer

START = Way("eager", 128, 2, 1, "held")
SPACE = Space(("eager", "torchscript"), ((2, 1), (1, 2)), ("held", "default"), 4096)


class Machine:
    """Ways with known speeds on a virtual clock, where loading takes as long as measuring does; it drifts."""

    def __init__(self, speed, load=2.0, drift=0.0, broken=()):
        self.now, self.resident, self.most_resident, self.opened = 0.0, 0, 0, []
        self._speed, self._load, self._drift, self._broken = speed, load, drift, broken

    def clock(self):
        return self.now

    @asynccontextmanager
    async def open(self, way, seconds):
        assert seconds > 0
        self.opened.append(way)
        self.now += self._load
        if way in self._broken:
            raise ServingError("golden records differ")
        self.resident += 1
        self.most_resident = max(self.most_resident, self.resident)
        try:
            yield _Trial(self, way)
        finally:
            self.resident -= 1

    def measure(self, way, seconds):
        self.now += seconds
        return self._speed(way) * math.exp(-self._drift * self.now)

    def find(self, seconds, space=SPACE):
        return find_best(START, space, self.open, seconds=seconds, clock=self.clock, say=lambda _: None)


class _Trial:
    def __init__(self, machine, way):
        self._machine, self._way = machine, way

    async def window(self, seconds):
        return self._machine.measure(self._way, seconds)


def smooth(peak, runtimes, pairs):
    """Speeds that are products of one factor a setting, with a single peak in the micro-batch."""
    def speed(way):
        return (10_000 * runtimes[way.runtime] * pairs[way.workers] * (1.1 if way.allocator == "held" else 1.0)
                / (1 + 0.2 * abs(math.log2(way.micro_batch / peak))))
    return speed


@given(peak=st.sampled_from([16, 32, 64, 128, 256, 1024, 4096]), eager=st.sampled_from([0.3, 1.0, 2.0]),
       one=st.sampled_from([0.5, 1.0, 1.5]), drift=st.sampled_from([0.0, 0.001]))
async def test_the_best_way_is_found_even_where_the_machine_gets_slower(peak, eager, one, drift):
    speed = smooth(peak, {"eager": eager, "torchscript": 1.0}, {1: one, 2: 1.0})
    machine = Machine(speed, drift=drift)
    found = await machine.find(10_000)
    assert found.complete
    best = found.best
    assert (best.micro_batch, best.allocator) == (peak, "held")
    assert best.runtime == ("eager" if eager >= 1.0 else "torchscript")
    assert best.workers == (1 if one == 1.5 else 2)
    assert found.gain == pytest.approx(speed(best) / speed(START), rel=0.02)
    assert machine.resident == 0
    assert machine.most_resident == 2
    once, again = machine.opened[:len(found.tried)], machine.opened[len(found.tried):]
    assert len(set(once)) == len(once)
    assert again == ([] if best == START else [START])


@given(budget=st.floats(5, 300), load=st.floats(0.1, 20))
async def test_the_budget_is_kept_and_the_beginning_is_always_measured(budget, load):
    machine = Machine(smooth(1024, {"eager": 1.0, "torchscript": 2.0}, {1: 1.0, 2: 1.0}), load=load)
    found = await machine.find(budget)
    one_way = load + 11 * 1.5
    assert machine.now <= max(budget, one_way)
    assert found.tried[0].way == START
    assert found.records_per_s > 0
    assert found.complete or machine.now > budget - 2 * one_way


async def test_a_way_that_does_not_work_is_passed_over_with_its_reason():
    broken = [replace(START, runtime="torchscript")]
    machine = Machine(smooth(128, {"eager": 1.0, "torchscript": 9.0}, {1: 1.0, 2: 1.0}), broken=broken)
    found = await machine.find(1000)
    assert found.best == START
    assert [one.failure for one in found.tried if one.way in broken] == ["golden records differ"]


async def test_a_model_that_does_not_load_at_all_ends_the_search():
    machine = Machine(lambda _: 1.0, broken=[START])
    with pytest.raises(ServingError, match="golden"):
        await machine.find(1000)
    assert machine.resident == 0


async def test_when_the_best_way_itself_is_gone_no_other_is_blamed_for_it():
    machine = Machine(lambda _: 5000.0)
    measure = machine.measure

    def dying(way, seconds):
        if way == START and len(machine.opened) > 2:
            raise ServingError("the process ended with -9")
        return measure(way, seconds)

    machine.measure = dying
    with pytest.raises(ServingError, match="-9"):
        await machine.find(1000)
    assert machine.resident == 0


async def test_ways_that_are_as_quick_change_nothing():
    found = await Machine(lambda _: 5000.0).find(1000)
    assert (found.best, found.gain, found.records_per_s) == (START, 1.0, 5000.0)


async def test_a_beginning_that_does_not_load_beside_the_best_keeps_what_was_found():
    """Each fits beside its neighbour, and not the first beside the last."""
    machine = Machine(smooth(1024, {"eager": 1.0, "torchscript": 3.0}, {1: 1.0, 2: 1.0}))
    opening = machine.open

    def open_once(way, seconds):
        if way == START and START in machine.opened:
            raise ServingError("no room in memory")
        return opening(way, seconds)

    machine.open = open_once
    found = await machine.find(10_000)
    assert (found.best.runtime, found.best.micro_batch) == ("torchscript", 1024)
    assert found.gain > 3
    assert found.records_per_s == pytest.approx(found.gain * found.tried[0].records_per_s)
    assert machine.resident == 0


@pytest.mark.parametrize(("really", "wanted"), [(1.0, 1.0), (1.08, 1.08)])
async def test_a_gain_is_what_is_seen_beside_the_beginning_and_not_a_lucky_series(really, wanted):
    """The rival is a tenth quicker than it really is, until it is the best way."""
    other = replace(START, runtime="torchscript")
    machine = Machine(lambda way: 5000.0 * (really if way.runtime == "torchscript" else 1.0))
    measure = machine.measure

    def lucky(way, seconds):
        return measure(way, seconds) * (1.1 if way == other and len(machine.opened) == 2 else 1.0)

    machine.measure = lucky
    found = await machine.find(1000)
    assert found.gain == pytest.approx(wanted)
    assert found.best == (START if really == 1.0 else other)
    assert found.records_per_s == pytest.approx(5000.0 * wanted)


@given(st.lists(st.floats(1e3, 1e6), min_size=2, max_size=6), st.floats(0.5, 2))
def test_a_steady_ratio_is_seen_through_any_linear_drift(ends, wanted):
    first, last = ends[0], ends[-1]
    steps = 10
    rates = [first + (last - first) * step / steps for step in range(steps + 1)]
    assert ratio(rates[::2], [rate * wanted for rate in rates[1::2]]) == pytest.approx(wanted)


def test_one_lucky_median_is_no_win():
    assert wins([100] * 6, [103] * 5)
    assert wins([100] * 6, [99, 103, 103, 103, 103])
    assert not wins([100] * 6, [90, 99, 103, 150, 150])
    assert not wins([100] * 6, [101] * 5)
    assert not wins([100] * 3, [60, 300])


def test_a_clear_loser_is_given_up_early_and_a_close_one_is_not():
    assert decided([100, 100, 100], [50, 50])
    assert not decided([100, 100], [50])
    assert not decided([100, 100, 100], [101, 102])
    assert decided([100] * 6, [101] * 5)


def test_what_is_worth_trying_on_a_machine():
    def pairs(**machine):
        return space_of(["eager"], ["held"], micro_batch=128, **{"record_bytes": 784, "gpus": 0, **machine}).splits

    assert pairs(cores=1) == ((1, 1),)
    assert pairs(cores=2) == ((2, 1), (1, 2))
    assert pairs(cores=16) == ((16, 1), (1, 16), (4, 4))
    assert pairs(cores=8, gpus=1) == ((1, 8), (2, 4))
    tried = [START]
    while (way := next_way(START, replace(SPACE, most_micro_batch=200), tried)) is not None:
        tried.append(way)
    assert {way.micro_batch for way in tried} == {32, 64, 128}


@pytest.mark.parametrize(("first", "most", "reached"), [
    (1, 4096, {1, 8}), (2, 4096, {2, 8}), (8, 4096, {8, 16, 32}), (12, 4096, {8, 12, 24, 48}), (1, 3, {1, 3}),
    (3, 3, {3}),
])
def test_from_below_the_least_micro_batch_the_least_is_tried(first, most, reached):
    best = replace(START, micro_batch=first)
    tried = [best]
    while (way := next_way(best, replace(SPACE, most_micro_batch=most), tried)) is not None:
        tried.append(way)
    assert {way.micro_batch for way in tried} == reached
    assert len(set(tried)) == len(tried)


async def test_a_search_that_begins_with_single_records_finds_the_best_micro_batch():
    machine = Machine(smooth(64, {"eager": 1.0, "torchscript": 1.0}, {1: 1.0, 2: 1.0}))
    found = await find_best(replace(START, micro_batch=1), SPACE, machine.open, seconds=10_000, clock=machine.clock,
                            say=lambda _: None)
    assert found.best.micro_batch == 64


@given(record_bytes=st.integers(1, MAX_REQUEST_BYTES), data=st.data())
def test_no_micro_batch_is_tried_that_no_request_can_carry(record_bytes, data):
    micro_batch = data.draw(st.integers(1, min(65_536, MAX_REQUEST_BYTES // record_bytes)))
    space = space_of(["eager"], ["held"], cores=2, gpus=0, record_bytes=record_bytes, micro_batch=micro_batch)
    assert micro_batch <= space.most_micro_batch <= MAX_REQUEST_BYTES // record_bytes


def test_a_request_asks_for_no_more_than_a_reply_can_carry():
    """An embedding's records are small, and its outputs are not: `bench` and `run` ask alike."""
    most = RequestSize.at(shared_memory=True, alone=True)
    assert default_request(8, 4097, 128, 32_768, None, most) == MAX_REPLY_BYTES // (4097 * 128) * 128 < 32_768
    assert default_request(8, 5, 128, 32_768, None, most) == 32_768


@pytest.mark.parametrize(("record_bytes", "micro_batch", "todo"), [
    (3 * 224 * 224 * 4, 128, "128 records has 77,070,336 bytes, .* at most 62,914,560: pack it with --micro-batch 104"),
    (100 << 20, 1, "no server takes such a record"),
])
def test_an_archive_whose_own_micro_batch_no_request_can_carry_is_refused(record_bytes, micro_batch, todo):
    with pytest.raises(ServingError, match=todo):
        space_of(["eager"], ["held"], cores=2, gpus=0, record_bytes=record_bytes, micro_batch=micro_batch)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_that_never_ends_is_none(budget):
    with pytest.raises(UsageError, match="wanted seconds"):
        BenchSpec(archive="m.mar", budget=budget)


@pytest.mark.parametrize(("verb", "flags"), [("bench", {"budget"}), ("plan", {
    "patience", "price_per_hour", "price_per_1000_puts", "price_per_1000_gets"}), ("run", {"patience"})])
@pytest.mark.parametrize("text", ["nan", "inf", "1e999"])
def test_amounts_are_finite(verb, flags, text):
    options = [one for one in import_module(f"batch_client.cli.{verb}").command.params if one.type is AMOUNT]
    assert {one.name for one in options} == flags
    for option in options:
        with pytest.raises(click.BadParameter, match="wanted a finite number"):
            option.type_cast_value(None, text)
        assert option.type_cast_value(None, "2.5") == 2.5


async def test_the_wire_is_measured_through_shared_memory_where_a_run_would_use_it():
    folder = new_folder()
    try:
        server = SimulatedServer(shared_memory=SharedMemory(folder))
        assert await wire_alone(server.servers(), spec(), 8, 0.01) > 0
    finally:
        remove_folder(folder)
    assert server.shared == server.requests > 0


def test_as_many_chunks_are_read_and_written_at_a_time_as_in_a_run():
    plan = plan_of(count=64_000, chunk=100, record=(4,), chunk_records=100, request_records=128)
    at_once = plan.units_at_once(spec().in_flight)
    assert at_once == 34
    store, source = _Crowded(), _Crowded("memory://source")
    source.objects = source_of(np.zeros((64_000, 4), np.uint8), (100, 4)).objects

    async def both():
        await write_alone(store, plan, spec(), 0.2)
        await read_alone(await open_source(source, None), plan, spec(), 0.2)

    asyncio.run(both())
    assert store.most_at_once >= at_once
    assert source.most_at_once >= at_once


class _Crowded(MemoryStore):
    """Counts what is asked of it at a time; each request takes a moment."""

    now = most_at_once = 0

    async def create(self, key, data):
        async with self.busy():
            return await super().create(key, data)

    async def get(self, key, *args, **options):
        async with self.busy():
            return await super().get(key, *args, **options)

    @asynccontextmanager
    async def busy(self):
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        await asyncio.sleep(0.005)
        self.now -= 1
        yield


async def test_writing_is_measured_with_no_more_than_a_bound(monkeypatch):
    monkeypatch.setattr(ceilings, "MOST_WRITTEN", 50_000)
    plan, store = plan_of(count=64_000, chunk=100, chunk_records=100), MemoryStore()
    assert await write_alone(store, plan, spec(), 30.0) > 0
    assert 50_000 <= sum(map(len, store.objects.values())) < 60_000


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int16, np.bool_, np.float32, np.float16])
async def test_what_is_written_to_measure_writing_is_random_in_any_dtype(dtype):
    plan = plan_of(count=1000, chunk=1000, output=OutputGeometry("label", np.dtype(dtype), ()))
    store = MemoryStore()
    assert await write_alone(store, plan, spec(), 0.01) > 0
    (chunk,) = (data for key, data in store.objects.items() if key.startswith("label/c"))
    values = np.frombuffer(chunk, dtype, 1000)
    half = 0.5 if np.dtype(dtype).kind in "bf" else np.iinfo(dtype).max // 2 + np.iinfo(dtype).min // 2
    assert 400 < (values > half).sum() < 600


@pytest.mark.parametrize("with_input", [True, False])
def test_the_budget_is_shared_out_whole(with_input):
    assert sum(shares(120, with_input=with_input).values()) == pytest.approx(120)
