"""Geometry of a run: records → output chunks, read blocks and requests. Pure; nothing here is materialised.

Three grids lie over the source's axis 0, all of them from record 0 of the whole source, so that a range, a part or a
resumed run computes each record in the same place as a full run would:

- the *grid*: output chunks of the full run, `grid_records` each, whole input chunks;
- *requests*: within a grid chunk, from its first record, `request_records` each, a multiple of the micro-batch B, or
  `tail_request_records` in the last chunks, from `tail_start` on;
- *places*: record i of a grid chunk sits at i mod B of its micro-batch.

The chunks that are stored, *units*, begin at the range's first record; they equal the grid when the range begins on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from batch_client.errors import DataError, UsageError
from batch_client.spec import MIB, RunSpec

__all__ = ["MAX_CHUNK_RECORDS", "MAX_REPLY_BYTES", "MAX_REQUEST_BYTES", "Geometry", "OutputGeometry", "Plan",
           "RequestSize", "Span", "Unit", "default_request", "make_plan", "reply_bytes_of", "require_possible"]

# Each object of an output chunk costs the store and the client milliseconds, however small it is.
MAX_CHUNK_RECORDS = 32_768
MAX_CHUNK_BYTES_IN = 64 * MIB
MAX_CHUNK_BYTES_OUT = 8 * MIB
# Of a request's body; and of what lies in shared memory, where only the number of requests costs.
REQUEST_BYTES = 1 * MIB
SHARED_REQUEST_BYTES = 4 * MIB
# A request's share of a worker: long enough that what each request costs beside the model is a few percent of it, short
# enough that a slow model has its requests spread over all workers; and that others are not kept waiting, where there
# are others.
REQUEST_COMPUTE_SECONDS = 0.1
ALONE_COMPUTE_SECONDS = 0.5
# The last requests of a run are a quarter as long, so that a few workers end at nearly the same time.
TAIL_REQUESTS = 8
TAIL_SHARE = 4
# Output chunks of a short run are at most a 32nd of it, or 8 MiB in, 8,192 records and an eighth of it: a write after
# the last prediction, and what a kill loses, stay small, however slow the model is.
LEAST_CHUNKS = 32
SHORT_CHUNK_BYTES_IN = 8 * MIB
SHORT_CHUNK_RECORDS = 8192
LEAST_SHORT_CHUNKS = 8
# Assembled chunks held at a time, beside the byte budget of the records.
OUTPUT_BYTES = 64 * MIB
# Every source object of a chunk is named in its ledger row; and a chunk is assembled and encoded in memory.
MOST_SOURCE_OBJECTS = 200_000
LARGEST_CHUNK_BYTES_OUT = 1 << 30
# Eight bytes of memory each (ledger.py): 400 MB, and more objects than anybody would wait for.
MOST_UNITS = 50_000_000
# The most empty places, a record, that a smaller chunk may have in its last micro-batch: they are computed like others.
MAX_EMPTY_PLACES = 0.01
# The server's own bound on one body, either way (serve_config/config.properties), leaves room for the header.
MAX_REQUEST_BYTES = 60 * MIB
MAX_REPLY_BYTES = 60 * MIB


@dataclass(frozen=True)
class RequestSize:
    """The most of a request where nobody says how many records: bytes of it, and seconds of a worker's compute."""

    nbytes: int = REQUEST_BYTES
    seconds: float = REQUEST_COMPUTE_SECONDS

    @classmethod
    def at(cls, *, shared_memory: bool, alone: bool) -> RequestSize:
        """For servers with which the client shares memory or not, whose workers have no other requests or have."""
        return cls(SHARED_REQUEST_BYTES if shared_memory else REQUEST_BYTES,
                   ALONE_COMPUTE_SECONDS if alone else REQUEST_COMPUTE_SECONDS)


@dataclass(frozen=True)
class Geometry:
    """The source array as far as planning needs it.

    shape: records along axis 0, then the record's shape. chunk_records: records in one chunk (shard, if sharded) of the
    source along axis 0. chunk_objects: objects that hold these records, more than one where other axes are chunked too.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    chunk_records: int
    chunk_objects: int = 1

    @property
    def count(self) -> int:
        return self.shape[0]

    @property
    def record_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def record_bytes(self) -> int:
        return math.prod(self.record_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutputGeometry:
    """One model output: its name, dtype and the shape of one record's value."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def record_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Unit:
    """One output chunk: `index` in the output, records [start, stop) of the source."""

    index: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Span:
    """Records [start, stop) that travel together; `first_row` is the place in their grid chunk."""

    start: int
    stop: int
    first_row: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """All decisions about sizes for one run; units, blocks and requests are computed when asked for."""

    source: Geometry
    wire_dtype: np.dtype[np.generic]
    outputs: tuple[OutputGeometry, ...]
    start: int
    stop: int
    grid_records: int
    chunk_records: int
    micro_batch: int
    request_records: int
    tail_start: int
    tail_request_records: int
    block_records: int
    max_bytes_in_flight: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def unit_count(self) -> int:
        return -(-self.count // self.chunk_records)

    @property
    def filled_places(self) -> float:
        """The part of the model's work that is for records: a chunk's last micro-batch may have empty places."""
        records = min(self.grid_records, self.source.count)
        return records / (-(-records // self.micro_batch) * self.micro_batch)

    @property
    def unit_bytes_out(self) -> int:
        """Bytes of one assembled output chunk, its status row included."""
        return self.chunk_records * (1 + sum(output.record_bytes for output in self.outputs))

    def units_at_once(self, in_flight: int) -> int:
        """Output chunks that are worked on at a time, where servers take `in_flight` requests together: as many as
        their requests, the budget of bytes and the memory for outputs ask for.
        """
        for_requests = -(-in_flight // -(-self.chunk_records // self.request_records)) + 2
        for_bytes = self.max_bytes_in_flight // max(1, self.chunk_records * self.source.record_bytes) + 2
        least = 2 if self.unit_bytes_out <= OUTPUT_BYTES else 1
        return max(least, min(for_requests, for_bytes, OUTPUT_BYTES // self.unit_bytes_out))

    @property
    def wire_record_bytes(self) -> int:
        return math.prod(self.source.record_shape) * self.wire_dtype.itemsize

    @property
    def objects_read(self) -> int:
        """Objects of the source that hold the records; a chunk that two units share is read by both."""
        size = self.source.chunk_records
        chunks = (self.stop - 1) // size - self.start // size + 1
        end_row = (self.start + self.chunk_records) % size
        return self.source.chunk_objects * (chunks + (self.unit_count - 1 if end_row else 0))

    @property
    def objects_written(self) -> int:
        """Chunks of the outputs and of the status; the ledger and the metadata are not among them."""
        return self.unit_count * (len(self.outputs) + 1)

    @property
    def request_count(self) -> int:
        """Requests of an undisturbed run."""
        return (self._requests_between(self.start, self.tail_start, self.request_records)
                + self._requests_between(self.tail_start, self.stop, self.tail_request_records))

    def _requests_between(self, start: int, stop: int, size: int) -> int:
        """Of whole units: cells of the request grid, and those that a unit's end cuts in two."""
        if start == stop:
            return 0
        cells_a_chunk = -(-self.grid_records // size)
        first, last = (record // self.grid_records * cells_a_chunk + record % self.grid_records // size
                       for record in (start, stop - 1))
        units = -(-(stop - start) // self.chunk_records)
        cut = (start + self.chunk_records) % self.grid_records % size
        return last - first + 1 + (units - 1 if cut else 0)

    def request_size(self, record: int) -> int:
        """Records in a cell of the request grid at `record`."""
        return self.request_records if record < self.tail_start else self.tail_request_records

    def unit(self, index: int) -> Unit:
        start = self.start + index * self.chunk_records
        return Unit(index, start, min(start + self.chunk_records, self.stop))

    def unit_of(self, record: int) -> int:
        """The index of the unit that record number `record` of the source is in."""
        return (record - self.start) // self.chunk_records

    def units(self) -> Iterator[Unit]:
        return (self.unit(index) for index in range(self.unit_count))

    def part(self, part: tuple[int, int] | None) -> range:
        """The units of part (i, n) of the run, all of them for None; parts differ by one unit at most."""
        number, parts = part or (1, 1)
        return range(self.unit_count * (number - 1) // parts, self.unit_count * number // parts)

    def records_in(self, units: Sequence[int] | np.ndarray) -> int:
        """Records of these units together, which are in order: all are full but the output's last."""
        return (len(units) - 1) * self.chunk_records + self.unit(int(units[-1])).count if len(units) else 0

    def blocks(self, unit: Unit) -> Iterator[tuple[int, int]]:
        """Record ranges to read one after another: whole input chunks, a share of the byte budget each, from the first
        record of a grid chunk on, as requests.
        """
        start = unit.start
        while start < unit.stop:
            grid_start = start - start % self.grid_records
            stop = start + self.block_records - (start - grid_start) % self.block_records
            stop = min(stop, grid_start + self.grid_records, unit.stop)
            yield start, stop
            start = stop

    def requests(self, start: int, stop: int) -> Iterator[Span]:
        """Records [start, stop) cut at the request grid."""
        while start < stop:
            grid_start = start - start % self.grid_records
            first_row = start - grid_start
            size = self.request_size(start)
            cut = grid_start + (first_row // size + 1) * size
            end = min(cut, grid_start + self.grid_records, stop)
            yield Span(start, end, first_row)
            start = end


def make_plan(
    spec: RunSpec,
    source: Geometry,
    wire_dtype: np.dtype[np.generic],
    outputs: tuple[OutputGeometry, ...],
    micro_batch: int,
    micro_batch_seconds: float | None = None,
    most: RequestSize = RequestSize(),
) -> Plan:
    """Choose every size of a run.

    An output chunk follows `_default_chunk`. A request is as many micro-batches as fit the bytes of `most` and, where
    the server says what one takes, its seconds, at least one; the last ones of a run have a quarter of that.

    Raises DataError for a source without records, UsageError for sizes that can't be met; both numbers are in the text.
    """
    start, stop = require_possible(spec, source)
    grid = spec.chunk_records or _default_chunk(source, outputs, micro_batch)
    if (units := -(-(stop - start) // grid)) > MOST_UNITS:
        raise UsageError(f"records {start:,} to {stop - 1:,} in output chunks of {grid:,} are {units:,} chunks, the "
                         f"most is {MOST_UNITS:,}: raise --chunk-records, or take fewer with --records")
    chunk = min(grid, stop - start)
    _require_bearable(chunk, source, outputs)
    wire_bytes = max(1, math.prod(source.record_shape) * wire_dtype.itemsize)
    reply_bytes = reply_bytes_of(outputs)
    request = _request(spec, micro_batch, wire_bytes, reply_bytes,
                       default_request(wire_bytes, reply_bytes, micro_batch, grid, micro_batch_seconds, most))
    chunk_bytes = _input_chunk_bytes(source)
    # Whole requests: what one has of an earlier block is not in its lease, and leases are what bounds memory.
    least = -(-request // source.chunk_records)
    share = min(max(1, spec.max_bytes_in_flight // 8 // chunk_bytes // least) * least,
                spec.max_bytes_in_flight // chunk_bytes)
    tail = request if spec.request_records else max(1, request // micro_batch // TAIL_SHARE) * micro_batch
    return Plan(
        source=source,
        wire_dtype=wire_dtype,
        outputs=outputs,
        start=start,
        stop=stop,
        grid_records=grid,
        chunk_records=chunk,
        micro_batch=micro_batch,
        request_records=request,
        tail_start=start + max(0, stop - start - TAIL_REQUESTS * request) // chunk * chunk,
        tail_request_records=tail,
        block_records=source.chunk_records * share,
        max_bytes_in_flight=spec.max_bytes_in_flight,
    )


def require_possible(spec: RunSpec, source: Geometry) -> tuple[int, int]:
    """The range [start, stop) of the source that is to be scored.

    Raises what of `make_plan` needs no model: DataError for a source without records, UsageError for a range or sizes
    that it can't have.
    """
    if source.count == 0:
        raise DataError(f"{spec.input}: the source has no records: its axis 0 has length 0")
    chunk_bytes = _input_chunk_bytes(source)
    if chunk_bytes > spec.max_bytes_in_flight:
        raise UsageError(
            f"one input chunk is {chunk_bytes:,} bytes ({source.chunk_records:,} records of {source.record_bytes:,}), "
            f"over --max-bytes-in-flight {spec.max_bytes_in_flight:,}: raise that to at least {chunk_bytes}")
    grid = spec.chunk_records
    if grid and grid % source.chunk_records and grid < source.count:
        nearest = max(1, round(grid / source.chunk_records)) * source.chunk_records
        raise UsageError(f"--chunk-records {grid}: wanted a multiple of the source's {source.chunk_records} records a "
                         f"chunk, such as {nearest}")
    return spec.records.resolve(source.count)


def _input_chunk_bytes(source: Geometry) -> int:
    return source.chunk_records * max(source.record_bytes, 1)


def reply_bytes_of(outputs: tuple[OutputGeometry, ...]) -> int:
    """Bytes that a record's outputs and its status have in a reply."""
    return 1 + sum(output.record_bytes for output in outputs)


def _require_bearable(chunk: int, source: Geometry, outputs: tuple[OutputGeometry, ...]) -> None:
    """Refuse an output chunk that its ledger row or the memory could not hold; `chunk` is in records."""
    objects = -(-chunk // source.chunk_records) * source.chunk_objects
    nbytes = chunk * sum(output.record_bytes for output in outputs)
    smaller = "lower --chunk-records" if chunk > source.chunk_records else "store the source in smaller chunks"
    if objects > MOST_SOURCE_OBJECTS:
        raise UsageError(f"an output chunk of {chunk:,} records would be read from {objects:,} objects, the most is "
                         f"{MOST_SOURCE_OBJECTS:,}: {smaller}")
    if nbytes > LARGEST_CHUNK_BYTES_OUT:
        raise UsageError(f"an output chunk of {chunk:,} records would have {nbytes:,} bytes, the most is "
                         f"{LARGEST_CHUNK_BYTES_OUT:,}: {smaller}")


def _request(spec: RunSpec, micro_batch: int, wire_bytes: int, reply_bytes: int, usual: int) -> int:
    """Records in a request: what the person says, else the usual number.

    wire_bytes, reply_bytes: of one record.
    """
    if micro_batch * reply_bytes > MAX_REPLY_BYTES:
        fitting = MAX_REPLY_BYTES // reply_bytes
        todo = f"pack the model with a --micro-batch of at most {fitting}" if fitting else "one record has too many"
        raise DataError(f"the outputs of one micro-batch of {micro_batch} are {micro_batch * reply_bytes:,} bytes, a "
                        f"reply has at most {MAX_REPLY_BYTES:,}: {todo}")
    request = spec.request_records or usual
    if request % micro_batch:
        raise UsageError(f"--request-records {request}: wanted a multiple of the server's micro-batch, {micro_batch}")
    if request > micro_batch and request * wire_bytes > MAX_REQUEST_BYTES:
        raise UsageError(f"--request-records {request}: a request would be {request * wire_bytes:,} bytes, the most is "
                         f"{MAX_REQUEST_BYTES:,}")
    if request * reply_bytes > MAX_REPLY_BYTES:
        raise UsageError(f"--request-records {request}: a reply would be {request * reply_bytes:,} bytes, the most is "
                         f"{MAX_REPLY_BYTES:,}")
    return request


def _default_chunk(source: Geometry, outputs: tuple[OutputGeometry, ...], micro_batch: int) -> int:
    """Records of an output chunk: whole input chunks of at most 8 MiB out, 64 MiB in and 32,768 records in all, and of
    no more than a 32nd of the source or, if that is more, 8 MiB in, 8,192 records and an eighth of it; at least one. Of
    the numbers over half of what that allows the one that fills its last micro-batch best, to a thousandth; where none
    does to a hundredth, the next larger one that does, or else the best of all.
    """
    record_bytes, bytes_out = max(source.record_bytes, 1), max(1, sum(output.record_bytes for output in outputs))
    most = min(MAX_CHUNK_RECORDS, MAX_CHUNK_BYTES_OUT // bytes_out, MAX_CHUNK_BYTES_IN // record_bytes,
               MOST_SOURCE_OBJECTS // source.chunk_objects * source.chunk_records)
    short = min(SHORT_CHUNK_RECORDS, SHORT_CHUNK_BYTES_IN // record_bytes, source.count // LEAST_SHORT_CHUNKS)
    wanted = min(most, max(source.count // LEAST_CHUNKS, short))

    def empty_places(chunks: int) -> float:
        """Places of an output chunk's last micro-batch that no record has, a record: they are computed all the same."""
        records = chunks * source.chunk_records
        return round(-records % micro_batch / records, 3)

    fitting = max(1, wanted // source.chunk_records)
    usual = range(fitting, fitting // 2, -1)
    larger = range(fitting, min(most, source.count) // source.chunk_records + 1)
    best = min(usual, key=empty_places)
    if empty_places(best) > MAX_EMPTY_PLACES:
        enough = (chunks for chunks in larger if empty_places(chunks) <= MAX_EMPTY_PLACES)
        best = next(enough, None) or min([best, *larger], key=empty_places)
    return best * source.chunk_records


def default_request(wire_bytes: int, reply_bytes: int, micro_batch: int, grid: int, micro_batch_seconds: float | None,
                    most: RequestSize = RequestSize()) -> int:
    """Records in a request where nobody says how many: whole micro-batches within the bytes of `most`, those of a reply
    and a grid chunk of `grid` records and, where it is known what a micro-batch takes, the seconds of `most`; at least
    one micro-batch. wire_bytes, reply_bytes: of one record, over 0.
    """
    count = min(most.nbytes // (wire_bytes * micro_batch), MAX_REPLY_BYTES // (reply_bytes * micro_batch))
    if micro_batch_seconds is not None:
        count = min(count, round(most.seconds / micro_batch_seconds))
    return max(1, min(count, -(-grid // micro_batch))) * micro_batch
