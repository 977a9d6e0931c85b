"""Whole runs of the real client against a simulated server and real stores on disk and in memory."""

import asyncio
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_client.cli.plan import _figures
from batch_client.cli.run import _sentence
from batch_client.errors import DataError, MismatchError, StoppedError
from batch_client.events import ChunkWritten, Published, RecordsScored, RequestSent, RunStarted, StepEnded
from batch_client.pipeline import execute, plan_run
from batch_client.spec import Records
from batch_client.storage import MemoryStore, open_store
from batch_client.verify import verify_output
from batch_handler.oip import HEADER_LENGTH, Tensor, decode_reply, encode_reply
from support.runs import opened, records_of, refused, services, source_of, spec
from support.simulated import BINARY, SimulatedServer
from support.virtual import virtually
from support.world import CHUNK, World


async def score(records, chunks=(10, 3), server=None, **options):
    server = server or SimulatedServer(records.shape[1:], records.dtype)
    output = MemoryStore("memory://out")
    source = source_of(records, chunks)
    summary = await execute(spec(**options), services(server, source, output))
    return summary, output


class LoggedStore(MemoryStore):
    """A store that takes a moment for each object and writes down which chunks were asked for."""

    def __init__(self, inner, log):
        super().__init__(inner.url)
        self.objects = inner.objects
        self.log = log

    async def get(self, key, start=None, stop=None):
        if "c/" in key:
            self.log.append(key)
        await asyncio.sleep(0.001)
        return await super().get(key, start, stop)


async def test_the_first_requests_do_not_wait_for_more_than_the_first_output_chunk():
    records, log = records_of(300), []
    source = LoggedStore(source_of(records, (10, 3)), log)

    def observe(event):
        if isinstance(event, RequestSent):
            log.append("sent")

    await execute(spec(chunk_records=30, request_records=8), services(SimulatedServer(), source), (observe,))
    assert set(log[:log.index("sent")]) == {"c/0/0", "c/1/0", "c/2/0"}
    # Then others are read while requests are under way.
    assert len(set(log[:log.index("sent") + 40])) > 10


@pytest.mark.parametrize("kind", [RunStarted, RequestSent, RecordsScored, StepEnded, ChunkWritten, Published])
async def test_a_cancelled_future_in_an_observer_ends_the_run_like_any_error_of_it(kind):
    future = asyncio.get_running_loop().create_future()
    future.cancel()

    def ask_it(event):
        if isinstance(event, kind):
            future.result()

    source = source_of(records_of(95), (10, 3))
    with pytest.raises((RuntimeError, ExceptionGroup)) as caught:
        await execute(spec(), services(SimulatedServer(), source), (ask_it,))
    error = caught.value
    while isinstance(error, ExceptionGroup):
        (error, *_) = error.exceptions
    assert str(error).startswith(f"observer ask_it raised CancelledError at {kind.__name__}: wanted one that does not")


async def test_predictions_are_in_order_and_every_record_has_a_status():
    records = records_of(95)
    server = SimulatedServer()
    summary, output = await score(records, server=server, chunk_records=30, request_records=8)
    group = opened(output)
    np.testing.assert_array_equal(group["y"][:], server.expected(records, 30))
    assert (group["record_status"][:] == 0).all()
    assert (summary.records, summary.scored, summary.failed) == (95, 95, 0)
    assert summary.requests == server.requests == 4 + 4 + 4 + 1
    assert group.attrs["source"] == "memory://source"
    assert group.attrs["root"] == summary.root


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_geometry_gives_each_record_its_own_prediction_in_its_own_place(data):
    count = data.draw(st.integers(1, 60))
    chunk = data.draw(st.integers(1, 25))
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    micro_batch = data.draw(st.integers(1, 7))
    options = {"records": Records(start, stop), "max_bytes_in_flight": data.draw(st.integers(3 * chunk, 9 * chunk)),
               "in_flight": data.draw(st.integers(1, 5))}
    if data.draw(st.booleans()):
        options["chunk_records"] = chunk * data.draw(st.integers(1, 3))
    if data.draw(st.booleans()):
        options["request_records"] = micro_batch * data.draw(st.integers(1, 3))

    async def go():
        records = records_of(count, seed=count)
        server = SimulatedServer(micro_batch=micro_batch)
        source = source_of(records, (chunk, data.draw(st.sampled_from([1, 2, 3]))))
        output = MemoryStore("memory://out")
        parts = services(server, source, output)
        plan = await plan_run(spec(**options), parts)
        summary = await execute(spec(**options), parts)
        assert summary.requests == plan.request_count
        group = opened(output)
        np.testing.assert_array_equal(group["y"][:], server.expected(records[start:stop], plan.grid_records, start))

    asyncio.run(go())


@pytest.mark.parametrize("options", [
    {"shards": (20, 4), "chunks": (5, 2)}, {"chunks": (7, 4)}, {"chunks": (100, 1)},
    {"chunks": (6, 4), "zarr_format": 2}, {"chunks": (6, 4), "zarr_format": 2, "order": "F"},
])
@pytest.mark.parametrize("dtype", ["uint8", "float32", ">f4", "int16", "bool"])
async def test_sources_of_every_layout_are_read_the_same(options, dtype):
    records = records_of(50, (4,)).astype(dtype)
    server = SimulatedServer((4,), np.float32)
    source = source_of(records, **options)
    output = MemoryStore("memory://out")
    summary = await execute(spec(request_records=8), services(server, source, output))
    assert summary.records == 50
    grid = json.loads(output.objects["_run/spec.json"])["grid_records"]
    group = opened(output)
    np.testing.assert_array_equal(group["y"][:], server.expected(records.astype(np.float32), grid))


async def test_metadata_comes_last_and_the_groups_after_the_arrays():
    order = []

    class Recording(MemoryStore):
        async def create(self, key, data):
            order.append(key)
            return await super().create(key, data)

    source = source_of(records_of(40), (10, 3))
    await execute(spec(chunk_records=10), services(SimulatedServer(), source, Recording("memory://out")))
    chunks = [index for index, key in enumerate(order) if "/c/" in key]
    manifest = order.index("_run/manifest.json")
    assert order[0] == "_run/spec.json"
    assert max(chunks) < order.index("_run/manifest/00000000.json") == manifest - 1
    assert order[-4:] == ["y/zarr.json", "record_status/zarr.json", "zarr.json", "_SUCCESS"]
    assert len(order) == len(set(order))


async def test_xarray_opens_the_output_without_a_warning(tmp_path):
    records = records_of(40)
    source = source_of(records, (10, 3))
    place = str(tmp_path / "o")
    await execute(spec(output=place), services(SimulatedServer(), source, open_store(place)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = xarray.open_zarr(tmp_path / "o")
    assert found["y"].dims == ("record", "y_1")
    assert found["y"].shape == (40, 2)
    assert found["record_status"].dtype == np.uint8


async def test_in_flight_is_bounded_and_reached():
    server = SimulatedServer(seconds=0.002)
    summary, _ = await score(records_of(400), server=server, request_records=4, in_flight=5)
    assert server.most_at_once == 5
    assert summary.in_flight == (5,)


async def test_requests_are_cut_by_what_the_server_says_a_micro_batch_takes_and_the_bytes_are_the_same():
    class Slow(SimulatedServer):
        def metadata(self):
            described = super().metadata()
            return replace(described, parameters={**described.parameters, "micro_batch_ms": 50.0})

    records = records_of(400)
    usual, _ = await score(records, chunk_records=400)
    slow, _ = await score(records, server=Slow(), chunk_records=400)
    # Two micro-batches fit 0.1 s; in a run of one chunk all requests are among the last: of a quarter, one micro-batch.
    assert (usual.requests, slow.requests) == (4, 400 // 4)
    assert slow.root == usual.root


async def test_nothing_opens_before_the_end_and_the_same_command_goes_on(tmp_path):
    records = records_of(200)
    server = SimulatedServer(seconds=0.005)
    source = source_of(records, (10, 3))
    output = MemoryStore("memory://out")
    stop = asyncio.Event()
    seen = []

    def observe(event):
        seen.append(event)
        if sum(isinstance(event, ChunkWritten) for event in seen) == 3:
            stop.set()

    with pytest.raises(StoppedError, match="goes on from there"):
        await execute(spec(chunk_records=10, in_flight=2), services(server, source, output), (observe,), stop)
    assert not [key for key in output.objects if key.endswith("zarr.json")]
    done = [event.index for event in seen if isinstance(event, ChunkWritten)]
    assert 3 <= len(done) < 20
    # The chunks of what is there are kept, whatever the command says of them by now: nothing.
    summary = await execute(spec(in_flight=2), services(server, source, output, seed=2))
    assert summary.scored == 200 - 10 * len(done)
    whole, fresh = await score(records, chunk_records=10)
    assert summary.root == whole.root
    np.testing.assert_array_equal(opened(output)["y"][:], opened(fresh)["y"][:])


async def test_a_published_run_is_found_done():
    records = records_of(20)
    source = source_of(records, (10, 3))
    output = MemoryStore("memory://out")
    first = await execute(spec(), services(SimulatedServer(), source, output))
    before = dict(output.objects)
    events = []
    again = await execute(spec(), services(SimulatedServer(), source, output), (events.append,))
    assert again.already_published
    assert again.root == first.root
    assert output.objects == before
    assert events == [Published("memory://out", first.root, already=True)]


class WithNan(SimulatedServer):
    """Its first record has no finite prediction."""

    def predict(self, records, first_row):
        y = super().predict(records, first_row)
        y[0] = np.nan if first_row == 0 else y[0]
        return y


async def test_a_prediction_that_is_not_finite_is_counted_apart_whoever_asks():
    source, output = source_of(records_of(20), (20, 3)), MemoryStore("memory://out")
    first = await execute(spec(), services(WithNan(), source, output))
    again = await execute(spec(), services(WithNan(), source, output))
    strict = await execute(spec(require_finite=True), services(WithNan(), source, output))
    for summary in (first, again, strict):
        assert (summary.failed, summary.not_finite) == (0, 1)
    assert [summary.already_published for summary in (first, again, strict)] == [False, True, True]
    assert " 0 failed, 1 not finite, 0 retries → memory://out" in _sentence(first)
    assert " 0 failed, 0 retries → " in _sentence(replace(first, not_finite=0))


@pytest.mark.parametrize(("options", "field"), [
    ({"codec": "zstd"}, "codec"), ({"records": Records(0, 10)}, "stop"), ({"chunk_records": 10}, "grid_records"),
])
async def test_another_run_at_the_same_place_is_refused(options, field):
    source = source_of(records_of(20), (10, 3))
    output = MemoryStore("memory://out")
    await execute(spec(), services(SimulatedServer(), source, output))
    with pytest.raises(MismatchError, match=field):
        await execute(spec(**options), services(SimulatedServer(), source, output))


async def test_another_model_at_the_same_place_is_refused():
    source = source_of(records_of(20), (10, 3))
    output = MemoryStore("memory://out")
    await execute(spec(), services(SimulatedServer(), source, output))
    with pytest.raises(MismatchError, match=r"its model is sha256:new, that of OUTPUT memory://out is sha256:\S+; "
                       r"serve that model, or let `run` have another OUTPUT, or --overwrite$"):
        await execute(spec(), services(SimulatedServer(digest="sha256:new"), source, output))


async def test_a_place_with_something_else_is_refused_and_left_alone():
    source = source_of(records_of(20), (10, 3))
    output = MemoryStore("memory://out")
    output.objects["zarr.json"] = b"{}"
    with pytest.raises(MismatchError, match="is no output of batch-client"):
        await execute(spec(), services(SimulatedServer(), source, output))
    assert output.objects == {"zarr.json": b"{}"}


class Answering(SimulatedServer):
    """A server that alters its first answers."""

    def __init__(self, *changes):
        super().__init__()
        self.changes = list(changes)
        self.before = None

    def answer(self, body, header_length):
        reply = super().answer(body, header_length)
        return self.changes.pop(0)(self, body, reply) if self.changes else reply


def swapped(server, body, reply):
    """The reply to the request before, of equal shape; the first reply has none before it."""
    reply, server.before = server.before or reply, reply
    return reply


def flipped(position):
    def change(server, body, reply):
        data = bytearray(reply.body)
        data[position] ^= 1
        return type(reply)(200, reply.headers, bytes(data))
    return change


def cut(server, body, reply):
    return type(reply)(200, reply.headers, reply.body[:-3])


def says(status):
    """Of every record, in a reply that is sound otherwise."""
    def change(server, body, reply):
        answer = decode_reply(reply.body, int(reply.headers[HEADER_LENGTH.lower()]), max_tensor_bytes=1 << 20)
        data = np.full_like(answer.outputs[1].data, status)
        outputs = (answer.outputs[0], Tensor("record_status", data))
        message = encode_reply(replace(answer, outputs=outputs), binary=BINARY)
        return type(reply)(200, {HEADER_LENGTH.lower(): str(message.header_length)}, message.join())
    return change


def failed(server, body, reply):
    return type(reply)(503, {}, b'{"code": 503, "type": "InternalServerException", "message": "Prediction failed"}')


def busy(server, body, reply):
    return type(reply)(503, {}, b'{"code": 503, "type": "ServiceUnavailableException", "message": "no room"}')


def refuses(server, body, reply):
    return type(reply)(400, {}, b'{"error": "image is 3, wanted 4"}')


@pytest.mark.parametrize("changes", [
    [flipped(-1)], [flipped(-20)], [cut], [failed, failed], [busy] * 5, [swapped] * 2,
    [cut, busy, failed, flipped(-2)], [says(1)], [says(3)],
])
async def test_a_bad_answer_is_asked_again_and_never_taken(changes):
    records = records_of(40)
    server = Answering(*changes)
    summary, output = await score(records, server=server, request_records=8)
    np.testing.assert_array_equal(opened(output)["y"][:], server.expected(records, 40))
    assert summary.retries >= 1


async def test_the_first_event_says_what_is_coming():
    events = []
    source = source_of(records_of(20), (10, 3))
    await execute(spec(), services(SimulatedServer(), source), (events.append,))
    assert isinstance(events[0], RunStarted)
    assert events[0].plan.count == 20


async def test_a_request_that_the_server_refuses_ends_the_run_with_its_reason():
    source = source_of(records_of(40), (10, 3))
    wanted = "records 0 to 7: the server refuses this request, and on zeros in their place too (400: image is 3, wanted"
    await refused(DataError, wanted, source, Answering(*[refuses] * 9), request_records=8, in_flight=1)


async def test_a_model_that_changes_under_the_run_is_never_mixed_in():
    source = source_of(records_of(80), (10, 3))

    class Exchanged(SimulatedServer):
        def answer(self, body, header_length):
            if self.requests == 3:
                self.digest = "sha256:other"
            return super().answer(body, header_length)

    output = await refused(MismatchError, "its model is sha256:other", source, Exchanged(), chunk_records=10,
                           in_flight=1)
    assert not [key for key in output.objects if key.endswith("zarr.json")]


async def test_numerics_that_change_under_the_run_are_never_mixed_in():
    source = source_of(records_of(80), (10, 3))

    class Moved(SimulatedServer):
        """The same model on another kind of machine."""

        def answer(self, body, header_length):
            if self.requests == 3:
                self.fingerprint = "other numerics"
            return super().answer(body, header_length)

    output = await refused(MismatchError, "with numerics other numerics, this run's is", source, Moved(),
                           chunk_records=10, in_flight=1)
    assert not [key for key in output.objects if key.endswith("zarr.json")]


@pytest.mark.parametrize("chunk", [10, 30, 100])
async def test_what_plan_says_is_written_is_what_verify_counts_but_for_the_checksums(chunk):
    source, output = source_of(records_of(100), (10, 3)), MemoryStore("memory://out")
    figures = _figures(await plan_run(spec(chunk_records=chunk), services(SimulatedServer(), source)))
    await execute(spec(chunk_records=chunk), services(SimulatedServer(), source, output))
    found = await verify_output(output)
    assert figures["objects_written"] == found.objects
    assert figures["bytes_to_write"] + 4 * found.objects == found.nbytes


@virtually
async def test_a_stop_before_anything_was_scored_writes_nothing():
    world = World(1)
    stop = asyncio.Event()
    stop.set()
    with pytest.raises(StoppedError):
        await execute(world.spec(), world.services(), stop=stop)
    assert world.output.objects == {}


@virtually
async def test_a_chunk_that_somebody_removed_is_read_as_what_no_record_has():
    """Neither as a number that a model may give, nor as ok."""
    world = World(1)
    await world.live()
    for key in ("record_status/c/1", "y/c/1/0"):
        del world.output.objects[key]
    group = zarr.open_group(zarr.storage.MemoryStore({
        key: zarr.core.buffer.cpu.Buffer.from_bytes(data) for key, data in world.output.objects.items()}), mode="r")
    assert set(group["record_status"][CHUNK:2 * CHUNK]) == {255}
    assert np.isnan(group["y"][CHUNK:2 * CHUNK]).all()
    assert set(group["record_status"][:CHUNK]) == {0}
