"""One `bench`: the search, the ceilings and the whole, one after the other; what it starts and writes is gone after it.

The tuning file is the one thing that stays, and only where it is asked for.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from batch_client import __version__
from batch_client.archives import local_archive
from batch_client.bench.ceilings import read_alone, wire_alone, write_alone
from batch_client.bench.search import Way, shares, space_of
from batch_client.bench.tuner import Found, Trial, find_best
from batch_client.bench.verdict import Ceilings, Whole, can_be_lowered
from batch_client.bench.workers import ask_handler, workers_of
from batch_client.bottleneck import Limit
from batch_client.buckets import open_store
from batch_client.budget import ByteBudget
from batch_client.contract import ModelContract, contract_of
from batch_client.errors import BatchClientError, StorageError, UsageError
from batch_client.figures import number, significant
from batch_client.folders import temporary_folder
from batch_client.java import find_java, torchserve_home
from batch_client.machine import cores, device, gpu_variables, gpus
from batch_client.pipeline import execute
from batch_client.plan import MAX_CHUNK_RECORDS, Plan, RequestSize, default_request, make_plan, reply_bytes_of
from batch_client.prepare import Services, geometry_for, prepare
from batch_client.reader import Source, open_source
from batch_client.regions import MEMORY
from batch_client.resources import serve_config_dir
from batch_client.server import EmbeddedServer, ServerSettings
from batch_client.server_config import environment, model_of, parse_properties, template_of
from batch_client.serving import Servers
from batch_client.spec import MIB, Records, RunSpec
from batch_client.storage import Store, child_url
from batch_client.stream import UnitStream
from batch_client.transport import HttpTransport
from batch_client.tuning import (
    ALLOCATORS,
    DEFAULT_ALLOCATOR,
    Tuning,
    better_tuning,
    require_place,
    tuning_path,
    write_tuning,
)
from batch_client.urls import require_listed, split_url

__all__ = ["BenchReport", "BenchSpec", "Kept", "bench"]

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """What a person asks for.

    archive: path or URL. input, array, anonymous, max_bytes_in_flight, allow_missing: a source to measure reading and
    the whole with, as in RunSpec.
    output: a place for what is written meanwhile, None for a temporary folder here. budget: seconds of measurement.
    precision: of the model. save: write the tuning file beside the archive.
    """

    archive: str
    input: str | None = None
    array: str | None = None
    output: str | None = None
    anonymous: bool = False
    max_bytes_in_flight: int = 64 * MIB
    allow_missing: bool = False
    budget: float = 120.0
    precision: str = "float32"
    save: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.budget < math.inf:
            raise UsageError(f"--budget {self.budget:g}: wanted seconds")
        if self.output is not None and self.input is None:
            raise UsageError("--output is where predictions for INPUT are written: name an INPUT too")
        if self.save and len(split_url(self.archive).scheme) > 1:
            raise UsageError(f"--save writes beside the archive and {self.archive} is not on this machine: fetch it, "
                             "measure that, and copy the tuning folder beside the original")


@dataclass(frozen=True)
class Kept:
    """A tuning file that was not replaced: what it says, and what was found, which is slower."""

    path: Path
    there: Tuning
    found: Tuning

    def __str__(self) -> str:
        there = self.there
        return (f"{self.path} says {number(there.records_per_s)} records/s, measured "
                f"{there.measured_at or 'at a time that it does not say'}, and this bench found "
                f"{number(self.found.records_per_s)}: delete the file to save these settings")

    def to_value(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"file": str(self.path), "records_per_s": self.there.records_per_s,
                "measured_at": self.there.measured_at}


@dataclass(frozen=True)
class BenchReport:
    """What was measured. `saved` is the tuning file if one was written, `kept` the better one that was there, `unsaved`
    why it could not be written.
    """

    model: str
    record_bytes: int
    found: Found
    tuning: Tuning
    ceilings: Ceilings
    saved: Path | None = None
    kept: Kept | None = None
    unsaved: StorageError | None = None

    def to_value(self) -> dict[str, Any]:
        """What `--json` prints."""
        ceilings, whole = self.ceilings, self.ceilings.whole
        return {
            "model": self.model, "device": self.tuning.device, "model_digest": self.tuning.model_digest,
            "best": vars(self.found.best), "precision": self.tuning.precision,
            "gain": round(self.found.gain, 3), "search_complete": self.found.complete,
            "tried": [one.to_value() for one in self.found.tried],
            "ceilings": {part.value: significant(rate) for part, rate in ceilings.rates.items()},
            "whole": None if whole is None else significant(whole.records_per_s),
            "whole_records": 0 if whole is None else whole.records,
            "limited_by": ceilings.limit.value, "advice": ceilings.advice,
            "tuning_file": None if self.saved is None else str(self.saved),
            "tuning_kept": None if self.kept is None else self.kept.to_value(),
        }


async def bench(spec: BenchSpec, say: Say, environ: Mapping[str, str] = os.environ) -> BenchReport:
    """Measure `spec.archive` on this machine; `say` gets a line whenever something else is measured.

    Raises the errors of `batch_client.errors`, and what can be refused at once before anything is measured.
    """
    torchserve_home()
    require_listed(spec.input or "", "INPUT")
    require_listed(spec.output or "", "--output")
    await asyncio.to_thread(find_java, environ)
    source = None
    if spec.input is not None:
        source = await open_source(open_store(spec.input, anonymous=spec.anonymous), spec.array)
    if spec.output is not None:
        open_store(spec.output, anonymous=spec.anonymous)
    async with local_archive(spec.archive, anonymous=spec.anonymous) as archive:
        with temporary_folder("bench") as folder:
            try:
                return await _Session(spec, source, archive, folder, say, environ).run()
            except BatchClientError as error:
                raise type(error)(_named(str(error), folder, spec.archive)) from error


def _named(text: str, folder: Path, archive: str) -> str:
    """What the handler says of the unpacked copy in `folder`, said of the archive: nobody has asked about the copy."""
    unpacked = folder / "model"
    return text.replace(f"model in {unpacked}", archive).replace(str(unpacked), archive)


class _Session:
    def __init__(self, spec: BenchSpec, source: Source | None, archive: Path, folder: Path, say: Say,
                 environ: Mapping[str, str]) -> None:
        self._spec = spec
        self._source = source
        self._archive = archive
        self._folder = folder
        self._say = say
        self._environ = environ
        self._seconds = shares(spec.budget, with_input=spec.input is not None)
        self._gpus = 0
        self._device = ""
        self._model: dict[str, Any] = {}
        self._contract: ModelContract | None = None
        self._reply_bytes = 1
        self._request_records: dict[Way, int] = {}

    async def run(self) -> BenchReport:
        """Measure the model alone, the wire, reading and writing where there is an INPUT, then the whole, in records/s.

        Raises BatchClientError for what can't be measured; most of it before anything is.
        """
        self._say(f"reading {self._spec.archive}")
        self._gpus = await asyncio.to_thread(gpus, self._environ)
        self._device = await asyncio.to_thread(device, self._environ)
        if self._spec.save:
            require_place(self._archive, self._device)
        await asyncio.to_thread(model_of, self._archive)  # what is no archive is said as by the other verbs
        self._model = await ask_handler(["prepare", str(self._archive), str(self._folder)], self._environ)
        run = self._run_spec()
        self._require_fitting(run)
        await self._require_storage(run)
        found = await self._search()
        tuning = self._tuning(found.best, found)
        saved, kept, unsaved = self._saved(tuning) if self._spec.save else (None, None, None)
        rates = {Limit.MODEL: found.records_per_s}
        noop = replace(tuning, runtime="noop", precision="float32")
        async with self._served(self._folder / "noop.mar", noop) as servers:
            self._say("wire alone: TorchServe without a model")
            rates[Limit.WIRE] = await wire_alone(servers, run, self._request_records[found.best], self._seconds["wire"])
            if self._source is not None:
                async with self._scratch("write") as output:
                    rates |= await self._storage(run, servers, output)
        whole = None
        if self._source is not None:
            records = max(1, min(self._source.geometry.count, int(min(rates.values()) * self._seconds["whole"])))
            whole = await self._whole(run, tuning, records)
        ceilings = Ceilings(rates, whole, lower=can_be_lowered(tuning.runtime, tuning.precision))
        return BenchReport(self._model["name"], self._model["record_bytes"], found, tuning, ceilings, saved, kept,
                           unsaved)

    def _require_fitting(self, run: RunSpec) -> None:
        """Raises what `run` would be refused with: for its model, and for its source where there is one."""
        self._contract = contract_of(self._spec.archive, json.dumps(self._model["metadata"]).encode())
        self._reply_bytes = reply_bytes_of(self._contract.outputs)
        self._plan_of(run, self._contract.micro_batch)

    def _plan_of(self, run: RunSpec, micro_batch: int) -> Plan | None:
        """What a run over the source would choose with such micro-batches; None where there is no source."""
        if self._source is None or self._contract is None:
            return None
        contract = self._contract
        return make_plan(run, geometry_for(self._source, contract), contract.input_dtype, contract.outputs, micro_batch)

    async def _require_storage(self, run: RunSpec) -> None:
        """Raises what reading the first records and writing an object raise: not after minutes of measuring."""
        plan = self._plan_of(run, self._model["micro_batch"])
        if self._source is None or plan is None:
            return
        budget = ByteBudget(run.max_bytes_in_flight)
        stream = UnitStream(self._source, plan, plan.unit(0), budget, run.allow_missing)
        async for _, _, lease in stream.spans():
            lease.release()
        async with self._scratch("try") as output:
            await output.create("try", b"a place for predictions")

    def _saved(self, tuning: Tuning) -> tuple[Path | None, Kept | None, StorageError | None]:
        """The tuning file, the better one that is there, or why there is none: what is measured is not lost for that,
        nor for what follows.
        """
        there = better_tuning(self._archive, tuning)
        if there is not None:
            kept = Kept(tuning_path(self._archive, there.device), there, tuning)
            self._say(f"kept: {kept}")
            return None, kept, None
        try:
            path = write_tuning(self._archive, tuning)
        except StorageError as error:
            return None, None, error
        self._say(f"saved: {path}")
        return path, None, None

    async def _search(self) -> Found:
        workers = self._gpus or cores()
        start = Way(self._model["runtime"], self._model["micro_batch"], workers, max(1, cores() // workers),
                    DEFAULT_ALLOCATOR)
        space = space_of(
            self._model["runtimes"], tuple(ALLOCATORS), cores=cores(), gpus=self._gpus,
            record_bytes=max(self._model["record_bytes"], self._reply_bytes), micro_batch=start.micro_batch)
        name = self._archive.name
        found = await find_best(start, space, self._opened, seconds=self._seconds["model"], clock=time.monotonic,
                                say=lambda line: self._say(_named(line, self._folder, name)))
        found.tried = [replace(one, failure=_named(one.failure, self._folder, name)) for one in found.tried]
        return found

    @asynccontextmanager
    async def _opened(self, way: Way, seconds: float) -> AsyncIterator[Trial]:
        plan = self._plan_of(self._run_spec(), way.micro_batch)
        grid_records = MAX_CHUNK_RECORDS if plan is None else plan.grid_records

        def records_of(took: float | None) -> int:
            return default_request(max(1, self._model["record_bytes"]), self._reply_bytes, way.micro_batch,
                                   grid_records, took, RequestSize.at(shared_memory=MEMORY.is_dir(), alone=True))

        tuning = self._tuning(way)
        settings = ServerSettings(self._archive, workers=way.workers, threads=way.threads, tuning=tuning)
        kept_back = parse_properties(template_of(serve_config_dir(self._environ)))["blacklist_env_vars"]
        environ = environment(self._environ, kept_back, self._folder, settings, way.threads, (), None)
        environ |= tuning.environment() | gpu_variables(self._environ)
        async with workers_of(self._folder / "model", environ, count=way.workers, records_of=records_of,
                              gpus=self._gpus, seconds=seconds,
                              filled=self._filled(way)) as workers:
            self._request_records[way] = workers.records
            yield workers

    def _filled(self, way: Way) -> float:
        """The part of the places in micro-batches that the source's records fill."""
        plan = self._plan_of(self._run_spec(), way.micro_batch)
        return 1.0 if plan is None else plan.filled_places

    def _tuning(self, way: Way, found: Found | None = None) -> Tuning:
        return Tuning(
            device=self._device, model_digest=self._model["digest"], precision=self._spec.precision, **vars(way),
            versions={"batch-client": __version__, **self._model["versions"]},
            # What the model can do, whatever source it is to score later.
            records_per_s=1.0 if found is None else significant(found.records_per_s / self._filled(way)),
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            table=() if found is None else [one.to_value() for one in found.tried])

    def _run_spec(self) -> RunSpec:
        # Without an INPUT nothing is read or written, and the names stand for nothing.
        return RunSpec(input=self._spec.input or "input", output=self._spec.output or str(self._folder / "output"),
                       archive=str(self._archive), array=self._spec.array, anonymous=self._spec.anonymous,
                       max_bytes_in_flight=self._spec.max_bytes_in_flight,
                       allow_missing=self._spec.allow_missing)

    @asynccontextmanager
    async def _served(self, archive: Path, tuning: Tuning) -> AsyncIterator[Servers]:
        settings = ServerSettings(archive, tuning=tuning, batch_size=1)
        environ = {name: value for name, value in self._environ.items() if name not in tuning.environment()}
        async with EmbeddedServer(settings, environ=environ) as server, HttpTransport() as transport:
            yield Servers(transport, {server.url: server}, server.model_name, alone=True)

    @asynccontextmanager
    async def _scratch(self, name: str) -> AsyncIterator[Store]:
        """A place that nobody else has, empty again afterwards."""
        base = self._spec.output or str(self._folder)
        url = f"{base.rstrip('/')}/bench-{secrets.token_hex(8)}-{name}"
        store = open_store(url, anonymous=self._spec.anonymous)
        try:
            yield store
        finally:
            for key in [meta.key async for meta in store.list("")]:
                await store.delete(key)
            place = split_url(store.url)
            if place.scheme == "file":  # where what a write that was cut off leaves is in no listing
                await asyncio.to_thread(shutil.rmtree, unquote(place.path), ignore_errors=True)

    async def _storage(self, run: RunSpec, servers: Servers, output: Store) -> dict[Limit, float]:
        source = open_store(run.input, anonymous=run.anonymous)
        prepared = await prepare(run, Services(servers, source, output))
        self._say(f"reading alone: {prepared.source.url}")
        reading = await read_alone(prepared.source, prepared.plan, run, self._seconds["reading"])
        self._say(f"writing alone: {'a temporary folder' if self._spec.output is None else child_url(output.url, '')}")
        writing = await write_alone(output, prepared.plan, run, self._seconds["writing"])
        return {Limit.READING: reading, Limit.WRITING: writing}

    async def _whole(self, run: RunSpec, tuning: Tuning, records: int) -> Whole:
        """A run over the first `records`."""
        source_store = open_store(run.input, anonymous=run.anonymous)
        async with self._served(self._archive, tuning) as servers, self._scratch("whole") as output:
            self._say(f"the whole: {records:,} records")
            spec = replace(run, output=output.url, records=Records(0, records), max_failed=records)
            summary = await execute(spec, Services(servers, source_store, output))
        limit = None if summary.limited_by is None else Limit(summary.limited_by)
        return Whole(records, summary.records_per_s, limit, summary.advice)
