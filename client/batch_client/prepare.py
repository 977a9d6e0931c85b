"""Everything that can refuse a run, asked before its first object is written: source, servers, sizes, place."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from batch_client.agreement import ANY_NUMERICS, Wanted, agree
from batch_client.buckets import is_inside, open_store
from batch_client.contract import ModelContract
from batch_client.endpoint import Pool
from batch_client.errors import DataError, MismatchError, UsageError
from batch_client.events import Event, RecordsCast, SourceIsMasked, SourceIsPacked
from batch_client.jsontext import canonical_json, parse_json
from batch_client.layout import SPEC_KEY, SUCCESS_KEY
from batch_client.plan import Geometry, Plan, RequestSize, make_plan, require_possible
from batch_client.reader import Source, open_source
from batch_client.serving import Servers, open_servers
from batch_client.spec import RunIdentity, RunSpec
from batch_client.storage import Store

__all__ = ["Prepared", "Services", "geometry_for", "open_services", "prepare"]


@dataclass(frozen=True)
class Services:
    """The parts of the world that a run touches; a simulation passes others. `cpu` gives the CPU seconds of the thread
    that runs the event loop.
    """

    servers: Servers
    source_store: Store
    output_store: Store
    reuse_store: Store | None = None
    clock: Callable[[], float] = time.monotonic
    rng: random.Random = field(default_factory=random.Random)
    cpu: Callable[[], float] = time.thread_time


@asynccontextmanager
async def open_services(spec: RunSpec) -> AsyncIterator[Services]:
    """Everything that `spec` names, open: stores, and servers to score with.

    Raises what opening them raises.
    """
    source_store = open_store(spec.input, anonymous=spec.anonymous)
    output_store = open_store(spec.output, anonymous=spec.anonymous)
    reuse_store = None if spec.reuse is None else open_store(spec.reuse, anonymous=spec.anonymous)
    # What can't be scored, or written there, should not wait for a server to start.
    source = await _open_apart(spec, source_store, output_store, reuse_store)
    require_possible(spec, source.geometry)
    async with open_servers(spec) as servers:
        yield Services(servers, source_store, output_store, reuse_store)


@dataclass(frozen=True)
class Prepared:
    """A run that nothing speaks against."""

    source: Source
    contract: ModelContract
    plan: Plan
    identity: RunIdentity
    pool: Pool

    def tell_of_numbers(self, emit: Callable[[Event], None]) -> None:
        """Why the records' numbers may not be those that the model was trained on."""
        if self.source.packing is not None:
            emit(SourceIsPacked(self.source.url, *self.source.packing))
        if self.source.missing is not None:
            emit(SourceIsMasked(self.source.url, self.source.missing))
        dtype, taken = self.source.geometry.dtype, self.contract.input_dtype
        if taken.kind == "f" and dtype.kind != "f":
            emit(RecordsCast(self.source.url, str(dtype), self.contract.input_name, str(taken)))


async def prepare(spec: RunSpec, services: Services,
                  instead: str = "or let `run` have another OUTPUT, or --overwrite") -> Prepared:
    """Open the source, agree with the servers on the model, choose all sizes. Writes nothing. `instead` says what else
    can be done where the servers have another model than the output.

    Raises DataError, ServingError, CredentialsError, UsageError, or MismatchError when the servers have another model
    than the output that is there already.
    """
    source = await _open_apart(spec, services.source_store, services.output_store, services.reuse_store)
    pool = Pool(services.servers.urls, spec.in_flight, services.clock, services.rng, spec.patience)
    begun = await _stored_run(services.output_store)
    stored = None if spec.overwrite else _model_of(begun, services.output_store, instead, exact=spec.exact)
    contract = await agree(services.servers, pool, stored, exact=spec.exact)
    geometry = geometry_for(source, contract)

    def sized(earlier: Mapping[str, Any]) -> Prepared:
        """With output chunks as large as those of `earlier`, unless the caller has said how large."""
        chosen = replace(spec, chunk_records=spec.chunk_records or _chunk_of(earlier, geometry))
        plan = make_plan(chosen, geometry, contract.input_dtype, contract.outputs, contract.micro_batch,
                         contract.micro_batch_seconds, _request_size(contract, services.servers))
        if contract.micro_batch_seconds is not None:
            for endpoint in pool.endpoints:
                endpoint.limiter.expect(contract.micro_batch_seconds * plan.request_records / plan.micro_batch)
        return Prepared(source, contract, plan, _identity(spec, services, source, contract, plan), pool)

    if begun and not spec.overwrite:
        return sized(begun)
    if begun and await services.output_store.head(SUCCESS_KEY) is None:
        # Of another run, which is replaced, the size is no matter; whether this one goes on, the pipeline decides.
        with suppress(UsageError):
            prepared = sized(begun)
            if canonical_json(begun) == prepared.identity.to_json():
                return prepared
    return sized({} if services.reuse_store is None else await _stored_run(services.reuse_store))


async def _open_apart(spec: RunSpec, source_store: Store, output_store: Store, reuse_store: Store | None) -> Source:
    """The source. Raises what opening it raises, UsageError where the output would be in what is read, or around it."""
    output = output_store.url
    for name, store in (("INPUT", source_store), ("--reuse", reuse_store)):
        if store is not None and is_inside(store.url, output):
            raise UsageError(f"{name} {store.url} is in OUTPUT {output}: the output needs a place of its own")
    source = await open_source(source_store, spec.array)
    for name, place in (("INPUT", source.url), ("--reuse", reuse_store and reuse_store.url)):
        if place and is_inside(output, place):
            raise UsageError(f"OUTPUT {output} is in {name} {place}: the output needs a place of its own")
    if is_inside(source.url, output):  # an array of a group around the output
        raise UsageError(f"INPUT {source.url} is in OUTPUT {output}: the output needs a place of its own")
    return source


def _request_size(contract: ModelContract, servers: Servers) -> RequestSize:
    return RequestSize.at(shared_memory=contract.shared_memory is not None,
                          alone=servers.alone or contract.bulk_lane is not None)


async def _stored_run(store: Store) -> Mapping[str, Any]:
    """The identity of the run that an output belongs to; empty where there is none, or none that can be read: what it
    is, the comparison of identities says.
    """
    blob = await store.get(SPEC_KEY)
    try:
        stored = {} if blob is None else parse_json(blob.data)
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) else {}


def _model_of(stored: Mapping[str, Any], store: Store, instead: str, *, exact: bool) -> Wanted | None:
    """The model of the run that an output belongs to."""
    try:
        there = stored["exact"]
        model = Wanted(str(stored["model_digest"]), str(stored["fingerprint"]), dict(stored["numerics"]),
                       f"that of OUTPUT {store.url}", instead)
    except (KeyError, TypeError, ValueError):
        return None
    if there != exact:
        raise MismatchError(f"{store.url} belongs to a run {'without' if there else 'with'} --fast: go on with it in "
                            "the same way, or choose another OUTPUT")
    return model


def _chunk_of(stored: Mapping[str, Any], source: Geometry) -> int | None:
    """Records in an output chunk of an earlier run, which goes on or is reused with the same, whatever the rule is by
    now; None where the source can't have such chunks.
    """
    records = stored.get("grid_records")
    if not isinstance(records, int) or records < 1 or (records % source.chunk_records and records < source.count):
        return None
    return records


def geometry_for(source: Source, contract: ModelContract) -> Geometry:
    """The source's geometry, once it is clear that the model takes its records; raises DataError where it does not."""
    found = source.geometry
    there, wanted = _squeezed(found.record_shape), _squeezed(contract.input_shape)
    if there != wanted:
        instead = "score another array, or pack the model for these records"
        if sorted(there) == sorted(wanted):
            instead = ("axes in another order, and records are reshaped, not transposed: transpose in the model that "
                       "is packed (such as x.permute(0, 3, 1, 2)), or write the array in the model's order")
        raise DataError(f"{source.url}: a record has shape {found.record_shape}, model {contract.name} takes "
                        f"{contract.input_shape}: {instead}")
    # numpy calls 64-bit integers in 64-bit floats safe, which have 53 bits for them.
    rounded = found.dtype.kind in "iu" and found.dtype.itemsize == 8 and contract.input_dtype.kind == "f"
    if rounded or not np.can_cast(found.dtype, contract.input_dtype, "safe"):
        raise DataError(f"{source.url}: records are {found.dtype}, model {contract.name} takes {contract.input_dtype}, "
                        "which can't hold them all: convert the array, or pack the model for this dtype")
    return found


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _identity(spec: RunSpec, services: Services, source: Source, contract: ModelContract,
              plan: Plan) -> RunIdentity:
    return RunIdentity(
        source=services.source_store.url,
        source_array=spec.array or "",
        source_metadata=source.metadata_digest,
        source_shape=source.geometry.shape,
        source_dtype=str(source.geometry.dtype),
        source_encoding=source.encoding_digest,
        start=plan.start,
        stop=plan.stop,
        grid_records=plan.grid_records,
        chunk_records=plan.chunk_records,
        micro_batch=plan.micro_batch,
        codec=spec.codec,
        model=contract.name,
        model_digest=contract.digest,
        fingerprint=contract.fingerprint if spec.exact else ANY_NUMERICS,
        outputs=tuple((output.name, str(output.dtype), output.shape) for output in plan.outputs),
        exact=spec.exact,
        numerics=contract.numerics if spec.exact else {},
    )
