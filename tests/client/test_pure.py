"""Retry bucket, jitter, dialect, spec: decisions without I/O."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_client.dialect import Outcome, read_reply
from batch_client.errors import MismatchError, UsageError, one_error
from batch_client.retry import RESERVE, RetryBucket, full_jitter
from batch_client.spec import Records, RunIdentity, RunSpec


def leaves(bucket, count, now=0.0):
    """When so many requests, one behind the other, have leave to be repeated."""
    for _ in range(count):
        while wait := bucket.delay(now):
            now += wait
        yield now


def emptied(bucket):
    while not bucket.delay(0.0):
        pass
    return bucket


@pytest.mark.parametrize("cause", [ValueError("why"), None])
def test_an_error_out_of_a_task_group_keeps_its_own_cause_and_not_the_group(cause):
    error = MismatchError("that")
    error.__cause__ = cause
    with pytest.raises(MismatchError, match="that") as caught, one_error():
        raise ExceptionGroup("several", [error])
    assert caught.value.__cause__ is cause
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("servers", [1, 40])
def test_an_empty_bucket_leaves_one_probe_a_second(servers):
    """Of each server."""
    reserve, times = int(RESERVE) * servers, [*leaves(RetryBucket(servers), 24 * servers)]
    assert times[:reserve] == [0] * reserve
    assert times[reserve::servers] == pytest.approx([0, 1, 2, 3])


def test_successes_pay_for_retries():
    bucket = emptied(RetryBucket())
    for _ in range(11):
        bucket.succeeded()
    assert [*leaves(bucket, 3)] == [0, 1, 2]  # one was paid for


def test_successes_pay_for_those_who_wait_already():
    bucket = emptied(RetryBucket())
    assert bucket.delay(0.25) == 0.75
    for _ in range(50):
        bucket.succeeded()
    assert [*leaves(bucket, 4, 0.25)] == [0.25] * 4


def test_old_successes_pay_for_no_more_than_the_reserve():
    bucket = RetryBucket()
    for _ in range(1000):
        bucket.succeeded()
    assert [*leaves(bucket, 24)] == [0] * 21 + [1, 2, 3]  # the reserve's twenty, then a probe a second


@given(st.integers(0, 10_000), st.integers())
def test_jitter_is_bounded(attempt, seed):
    assert 0 <= full_jitter(attempt, random.Random(seed)) <= 10


TORCHSERVE = [
    (503, "ServiceUnavailableException", Outcome.BUSY),
    (503, "InternalServerException", Outcome.FAILED),
    (500, "InternalServerException", Outcome.FAILED),
    (507, "InternalServerException", Outcome.FAILED),
    (400, "InvalidKeyException", Outcome.TOKEN),
    (404, "ModelNotFoundException", Outcome.NO_MODEL),
    (413, "", Outcome.TOO_LARGE),
]


@pytest.mark.parametrize(("status", "kind", "wanted"), TORCHSERVE)
def test_torchserves_answers_mean_what_the_table_says(status, kind, wanted):
    body = json.dumps({"code": status, "type": kind, "message": "a\nb"}).encode()
    verdict = read_reply(status, body)
    assert verdict.outcome is wanted
    assert "\n" not in verdict.reason


@pytest.mark.parametrize(("status", "body", "wanted"), [
    (200, b"", Outcome.RESULT),
    (400, b'{"error": "dtype int8, wanted uint8"}', Outcome.REFUSED),
    (415, b'{"error": "x"}', Outcome.REFUSED),
    (401, b"no", Outcome.TOKEN),
    (429, b"", Outcome.BUSY),
    (500, b'{"error": "the model raised"}', Outcome.RAISED),
    (503, b'{"error": "queue is full"}', Outcome.BUSY),
    (504, b'{"status": 504, "error": "Gateway Timeout"}', Outcome.LATE),
    (502, b"<html>", Outcome.BROKEN),
    (500, b"\xff\xfe", Outcome.FAILED),
    (302, b"", Outcome.REFUSED),
    (500, b"[" * 100_000, Outcome.FAILED),
])
def test_other_servers_answers_go_by_status(status, body, wanted):
    assert read_reply(status, body).outcome is wanted


@pytest.mark.parametrize(("options", "wanted"), [
    ({}, "found neither"),
    ({"archive": "m", "endpoints": ("http://h",), "model": "m"}, "not both"),
    ({"endpoints": ("http://h",)}, "also needs --model NAME"),
    ({"endpoints": ("h:80",), "model": "m"}, "--endpoint h:80: wanted a URL"),
    ({"archive": "m", "in_flight": 0}, "--in-flight 0: wanted at least 1"),
    ({"archive": "m", "codec": "lz4"}, "--codec 'lz4': wanted one of"),
    ({"archive": "m", "output": "in"}, "INPUT and OUTPUT are both in"),
    ({"archive": "m", "workers": 0}, "--workers 0: wanted at least 1"),
])
def test_specs_that_can_not_work_are_refused_when_made(options, wanted):
    with pytest.raises(UsageError, match=wanted):
        RunSpec(**{"input": "in", "output": "out", **options})


@pytest.mark.parametrize(("field", "value", "wanted"), [
    ("chunk_records", "100", "chunk_records '100': wanted a whole number"),
    ("chunk_records", 100.0, "chunk_records 100.0: wanted a whole number"),
    ("in_flight", "4", "in_flight '4': wanted a whole number"),
    ("in_flight", None, "in_flight None: wanted a whole number"),
    ("workers", True, "workers True: wanted a whole number"),
    ("max_bytes_in_flight", "64M", "max_bytes_in_flight '64M': wanted a whole number"),
    ("max_failed", None, "max_failed None: wanted a whole number"),
    ("patience", "x", "patience 'x': wanted a number"),
    ("patience", None, "patience None: wanted a number"),
    ("patience", True, "patience True: wanted a number"),
    ("part", "1/2", "part '1/2': wanted two whole numbers, such as (1, 8)"),
    ("part", (1,), "part (1,): wanted two whole numbers, such as (1, 8)"),
    ("part", (1, 2.0), "part (1, 2.0): wanted two whole numbers, such as (1, 8)"),
    ("input", None, "input None: wanted a URL or a path"),
    ("output", Path, "output <class 'pathlib"),
    ("reuse", b"old", "reuse b'old': wanted a URL or a path"),
    ("model", 7, "model 7: wanted text"),
    ("records", (0, 10), "records (0, 10): wanted Records(…)"),
    ("records", None, "records None: wanted Records(…)"),
    ("exact", "no", "exact 'no': wanted True or False"),
    ("endpoints", "http://me:secret@host:8080", "endpoints is a str: wanted a tuple of texts"),
    ("endpoints", (7,), "endpoints (7,): wanted a tuple of texts"),
    ("endpoints", None, "endpoints None: wanted a tuple of texts"),
])
def test_a_field_of_another_kind_is_refused_when_the_spec_is_made(field, value, wanted):
    with pytest.raises(UsageError) as error:
        RunSpec(**{"input": "in", "output": "out", "archive": "m", field: value})
    assert str(error.value).startswith(wanted)


@pytest.mark.parametrize("ends", [(1.0, 2), (0, "2"), (False, 2)])
def test_ends_of_a_range_that_are_no_whole_numbers_are_refused_when_it_is_made(ends):
    with pytest.raises(UsageError, match=r"(start|stop) .*: wanted a whole number"):
        Records(*ends)


def test_paths_and_numbers_of_other_libraries_are_kept_as_plain_ones():
    spec = RunSpec(input=Path("in"), output=Path("out"), archive=Path("m"), reuse=Path("old"), in_flight=np.int64(4),
                   part=[np.uint8(1), 2], patience=np.float32(2), records=Records(np.int32(1), 9))
    kept = (spec.input, spec.output, spec.archive, spec.reuse, spec.in_flight, spec.part, spec.patience)
    assert kept == ("in", "out", "m", "old", 4, (1, 2), 2.0)
    assert {type(value) for value in (spec.in_flight, *spec.part, spec.records.start)} == {int}
    servers = {"endpoints": ["http://h"], "model": "m", "token_files": [Path("t")]}
    assert RunSpec(input="in", output="out", **servers).token_files == ("t",)


@pytest.mark.parametrize(("text", "wanted"), [("3:7", (3, 7)), (":7", (0, 7)), ("3:", (3, 9)), (":", (0, 9))])
def test_ranges_as_people_type_them(text, wanted):
    assert Records.parse(text).resolve(9) == wanted


@pytest.mark.parametrize("text", ["", "3", "-1:4", "a:b", "1:2:3", "1.5:2"])
def test_ranges_that_are_none(text):
    with pytest.raises(UsageError, match="wanted A:B"):
        Records.parse(text)


def identity(**changes):
    return RunIdentity(**{
        "source": "s", "source_array": "",
        "source_metadata": "m", "source_shape": (3, 2), "source_dtype": "uint8", "source_encoding": "e",
        "start": 0, "stop": 3, "grid_records": 3, "chunk_records": 3, "micro_batch": 4, "codec": "none", "model": "toy",
        "model_digest": "d", "fingerprint": "f", "outputs": (("y", "float32", (2,)),), "exact": True, "numerics": {},
        **changes})


def test_another_run_is_told_apart_by_each_differing_field():
    identity().require_same(identity().to_json(), "out")
    with pytest.raises(MismatchError, match=r"codec \(there 'zstd', now 'none'\); model_digest"):
        identity().require_same(identity(codec="zstd", model_digest="e").to_json(), "out")
    with pytest.raises(MismatchError, match=r"run: numerics.threads \(there 2, now 1\); choose"):
        identity(numerics={"threads": 1, "a": 0}).require_same(
            identity(numerics={"threads": 2, "a": 0}).to_json(), "out")
    with pytest.raises(MismatchError, match=r"numerics.a \(there None, now absent\); choose"):
        identity().require_same(identity(numerics={"a": None}).to_json(), "out")
    there, now = (f"s3://bucket/{'ab' * 16}{end}" for end in "12")
    with pytest.raises(MismatchError, match=rf"source \(there '{there}', now '{now}'\).*there cdcdcdcdcdcd…, now"):
        identity(source=now, model_digest="sha256:" + "ab" * 32).require_same(
            identity(source=there, model_digest="cd" * 32).to_json(), "out")
    # What a later version keeps beside is none of this run's business.
    identity().require_same(json.dumps({**json.loads(identity().to_json()), "more": 1}).encode(), "out")
    for stored in (b"not json", b"[]", b"3", b"null"):
        with pytest.raises(MismatchError, match="can't be read"):
            identity().require_same(stored, "out")
    with pytest.raises(MismatchError, match=r"nested too deeply.*not an output of batch-client"):
        identity().require_same(b"[" * 1_000_000, "out")
