"""What `bench` concludes, prints and saves."""

import json
import zipfile
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import zarr

from batch_client.bench import session as session_module
from batch_client.bench.search import Way
from batch_client.bench.session import BenchReport, BenchSpec, _Session
from batch_client.bench.tuner import Found, Measured
from batch_client.bench.verdict import Ceilings, Whole, can_be_lowered
from batch_client.bench.workers import Workers
from batch_client.bottleneck import Limit
from batch_client.buckets import open_store
from batch_client.errors import ServingError
from batch_client.reader import open_source
from batch_client.tuning import Tuning, tuning_path
from batch_handler import runtimes as handler_runtimes
from support.simulated import SimulatedServer

START = Way("eager", 128, 2, 1, "glibc-held")
TUNING = Tuning(device="here", model_digest="sha256:1", runtime="eager", micro_batch=128, workers=2, threads=1,
                precision="float32", allocator="glibc-held", records_per_s=20_000.0,
                measured_at="2026-01-01T00:00:00+00:00", versions={"torch": "2.13.0"})
RATES = {Limit.MODEL: 20_000.0, Limit.WIRE: 600_000.0, Limit.READING: 9_000.0, Limit.WRITING: 100_000.0}
SHORT = "nothing to turn in so short a run"


def report_of(tuning=TUNING, ceilings=None, **fields):
    found = Found(START, 20_000.0, tried=[Measured(START, 20_000.0, 1.0)], complete=True)
    return BenchReport("toy", 784, found, tuning, ceilings or Ceilings({Limit.MODEL: 20_000.0}), **fields)


def printed(report):
    return import_module("batch_client.cli.bench")._lines(report, local=True)


@pytest.mark.parametrize(("whole", "limit", "said", "advice"), [
    (None, Limit.READING, "reading", "larger input chunks"),
    (Whole(9_000, 8_800.0, Limit.MODEL, "add workers"), Limit.READING,
     "reading; the whole reaches 98% of this ceiling", "larger input chunks"),
    (Whole(90, 900.0, Limit.ENDS, SHORT), Limit.ENDS,
     "start and end; the whole reaches 10% of the lowest ceiling, reading", SHORT),
    (Whole(90, 4_500.0, Limit.READING, "raise --in-flight"), Limit.READING,
     "reading; the whole reaches 50% of this ceiling", "raise --in-flight"),
    (Whole(90, 4_500.0, None, ""), Limit.READING, "reading; the whole reaches 50% of this ceiling",
     "larger input chunks"),
])
def test_the_lowest_ceiling_limits_unless_the_whole_is_far_below_it_and_says_what_limited_it(
        whole, limit, said, advice):
    report = report_of(ceilings=Ceilings(RATES, whole))
    value, lines = report.to_value(), printed(report)
    assert (report.ceilings.limit, value["limited_by"]) == (limit, limit.value)
    assert f"limited by: {said}" in lines
    assert advice in value["advice"]
    assert f"advice: {value['advice']}" in lines
    assert value["ceilings"] == {part.value: rate for part, rate in RATES.items()}
    assert (value["whole"], value["whole_records"]) == ((whole.records_per_s, whole.records) if whole else (None, 0))
    assert whole is None or any(line.startswith("the whole ") and f"{whole.records:,} rec" in line for line in lines)


@pytest.mark.parametrize(("runtime", "precision", "advised"), [
    ("eager", "float32", True), ("torchscript", "float32", True), ("eager", "bfloat16", False),
    ("torchscript", "tf32", False), ("onnx", "float32", False), ("aot", "float32", False),
])
def test_lower_precision_is_advised_where_it_can_be_had(runtime, precision, advised):
    lower = can_be_lowered(runtime, precision)
    assert ("--precision bfloat16" in Ceilings({Limit.MODEL: 1.0, Limit.WIRE: 9.0}, lower=lower).advice) == advised
    assert "--precision" not in Ceilings({Limit.MODEL: 9.0, Limit.WIRE: 1.0}, lower=lower).advice
    offered = [one for one in ("bfloat16", "float16") if one in handler_runtimes._RUNTIMES[runtime]]
    assert lower == (bool(offered) and precision == "float32")


@pytest.mark.parametrize(("first", "best", "noted"), [
    ("eager", "torchscript", True), ("eager", "eager", False), ("torchscript", "torchscript", False),
    ("torchscript", "eager", False),
])
def test_a_best_runtime_that_may_lose_nan_is_noted_unless_the_archive_has_it(first, best, noted):
    tried = [Measured(replace(START, runtime=runtime), 1.0, 1.0) for runtime in (first, best)]
    note = import_module("batch_client.cli.bench").note_of(Found(tried[-1].way, tried=tried))
    assert (note is not None) == noted
    assert note is None or "NaN" in note


@pytest.mark.parametrize(("precision", "than"), [("float32", "the defaults"), ("bfloat16", "the defaults in bfloat16")])
def test_a_gain_is_over_the_defaults_in_the_same_precision(precision, than):
    (best,) = [line for line in printed(report_of(replace(TUNING, precision=precision))) if line.startswith("best: ")]
    assert best.endswith(f"1.00 times as quick as {than}")


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "digits.mar"
    with zipfile.ZipFile(path, "w") as mar:
        mar.writestr("model.json", json.dumps({"digest": TUNING.model_digest}))
    return path


def test_what_was_compared_with_nothing_is_not_called_the_best():
    report = report_of()
    alone = replace(report.found, complete=False)
    assert f"only {START} was tried: a larger --budget compares it with other settings" in printed(
        replace(report, found=alone))
    for found in (report.found, replace(alone, tried=alone.tried * 2)):
        assert any(line.startswith("best: eager") for line in printed(replace(report, found=found)))


def test_a_better_tuning_file_is_kept_and_both_figures_are_said(archive, tmp_path):
    said = []
    session = _Session(BenchSpec(archive=str(archive), save=True), None, archive, tmp_path, said.append, {})
    path = tuning_path(archive, "here")
    assert session._saved(TUNING) == (path, None, None)
    assert session._saved(replace(TUNING, records_per_s=19_900.0)) == (path, None, None)
    assert session._saved(TUNING) == (path, None, None)
    there = path.read_bytes()
    saved, kept, unsaved = session._saved(replace(TUNING, records_per_s=9_000.0))
    assert saved is unsaved is None
    assert path.read_bytes() == there
    line = (f"kept: {path} says 20,000 records/s, measured 2026-01-01T00:00:00+00:00, and this bench found "
            "9,000: delete the file to save these settings")
    assert said == [*[f"saved: {path}"] * 3, line]
    report = report_of(kept=kept)
    assert printed(report)[-1] == line
    assert report.to_value()["tuning_file"] is None
    assert report.to_value()["tuning_kept"] == {
        "file": str(path), "records_per_s": 20_000.0, "measured_at": "2026-01-01T00:00:00+00:00"}
    assert session._saved(replace(TUNING, precision="bfloat16", records_per_s=8_000.0)) == (path, None, None)
    path.unlink()
    assert session._saved(replace(TUNING, records_per_s=9_000.0)) == (path, None, None)


async def test_with_an_input_a_micro_batch_counts_by_what_its_chunks_put_into_it(archive, tmp_path, monkeypatch):
    """Of these pictures an output chunk has 400: four micro-batches of 100, or three of 128 and 16 in a fourth."""
    noted = {}

    @asynccontextmanager
    async def note(_, environ, *, records_of, filled, **__):
        noted[int(environ["BATCH_HANDLER_MICRO_BATCH"])] = filled
        yield Workers([], records_of(None), filled)

    monkeypatch.setattr(session_module, "workers_of", note)
    zarr.create_array(tmp_path / "in.zarr", shape=(100_000, 224, 224, 3), chunks=(100, 224, 224, 3), dtype=np.uint8)
    source = await open_source(open_store(str(tmp_path / "in.zarr")), None)
    server = SimulatedServer((224, 224, 3), micro_batch=128)
    for given in (source, None):
        session = _Session(BenchSpec(archive=str(archive), input="in"), given, archive, tmp_path, print, {})
        session._model = {"metadata": server.metadata().to_json(), "micro_batch": 128, "digest": "",
                          "record_bytes": 224 * 224 * 3, "versions": {}}
        session._require_fitting(session._run_spec())
        for micro_batch in (100, 128):
            async with session._opened(replace(START, micro_batch=micro_batch), 1.0):
                pass
        assert noted == ({100: 1.0, 128: 400 / 512} if given else {100: 1.0, 128: 1.0})
        # The file says what the model can do, whatever source it is to score later.
        assert session._tuning(START, Found(START, 400.0)).records_per_s == (512.0 if given else 400.0)


async def test_the_empty_places_of_micro_batches_are_no_records():
    class Steady:
        def tell(self, line):
            pass

        async def answer(self, seconds):
            return {"records": 1000, "seconds": 2.0}

    assert await Workers([Steady(), Steady()], 128, 0.75).window(1.0) == 750


async def test_a_way_that_fails_says_so_of_the_archive_and_not_of_the_copy_that_is_measured(archive, tmp_path):
    said, folder = [], tmp_path / "batch-client-bench-x"
    session = _Session(BenchSpec(archive=str(archive), budget=1e6), None, archive, folder, said.append, {})
    session._model = {"runtime": "eager", "runtimes": ["eager", "torchscript"], "micro_batch": 128, "record_bytes": 784}
    opened = []

    class Steady:
        """Quicker in larger micro-batches, so that the best is not where the search begins."""

        def __init__(self, way):
            self.way = way

        async def window(self, seconds):
            return 100.0 * self.way.micro_batch

    @asynccontextmanager
    async def open_some(way, seconds):
        if way.runtime == "torchscript" or way in opened:
            raise ServingError(f"model in {folder / 'model'}: no room for {folder / 'model' / 'weights.pt'}")
        opened.append(way)
        yield Steady(way)

    session._opened = open_some
    found = await session._search()
    reason = "digits.mar: no room for digits.mar/weights.pt"
    assert {one.failure for one in found.tried if one.way.runtime == "torchscript"} == {reason}
    assert said[-1] == f"model alone: the best could not be compared with the beginning once more: {reason}"
    session._model |= {"digest": "sha256:1", "versions": {}}
    report = BenchReport("toy", 784, found, session._tuning(found.best, found), Ceilings({Limit.MODEL: 1.0}))
    for shown in (printed(report), report.to_value()["tried"], report.tuning.to_json()):
        assert reason in str(shown)
        assert str(folder) not in str(shown)
