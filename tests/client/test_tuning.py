"""Tuning files: what is read, what is refused, and what wins over what."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_client.errors import ServingError, StorageError, UsageError
from batch_client.machine import device
from batch_client.server_config import ServerSettings, environment
from batch_client.server_process import settled
from batch_client.tuning import (
    ALLOCATORS,
    CLEARLY,
    MAX_BYTES,
    PRECISIONS,
    RUNTIMES,
    Tuning,
    better_tuning,
    read_tuning,
    require_place,
    tuning_path,
    write_tuning,
)
from batch_handler import runtimes as handler_runtimes
from support.measured import MEASURED, archive_in

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,30}", fullmatch=True)


@pytest.fixture
def archive(tmp_path):
    return archive_in(tmp_path)


def test_without_a_file_there_is_nothing_and_the_machine_is_not_looked_at(archive):
    assert read_tuning(archive, lambda: pytest.fail("asked")) is None
    tuning_path(archive, "x").parent.mkdir()
    assert read_tuning(archive, lambda: "cpu-avx2-2cores") is None


@given(device=NAMES, runtime=st.sampled_from(RUNTIMES), precision=st.sampled_from(PRECISIONS),
       counts=st.tuples(*[st.integers(1, 4096)] * 3),
       rate=st.floats(1e-6, 1e12), allocator=st.sampled_from(list(ALLOCATORS)),
       versions=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3))
def test_what_is_written_is_what_is_read(device, runtime, precision, counts, rate, allocator, versions):
    tuning = replace(MEASURED, device=device, runtime=runtime, precision=precision, workers=counts[0],
                     threads=counts[1], micro_batch=counts[2], records_per_s=rate, allocator=allocator,
                     versions=versions)
    again = Tuning.from_json(tuning.to_json().encode(), "here")
    assert replace(again, table=tuple(again.table)) == tuning


def test_the_file_beside_the_archive_is_found_and_replaced(archive):
    path = write_tuning(archive, replace(MEASURED, micro_batch=64))
    assert path == archive.parent / "digits.tuning" / "cpu-avx2-2cores.json"
    write_tuning(archive, MEASURED)
    assert read_tuning(archive, lambda: MEASURED.device).micro_batch == 256
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert read_tuning(archive, lambda: "cpu-avx512-2cores") is None


@pytest.mark.parametrize(("there", "better"), [
    ({"records_per_s": CLEARLY * MEASURED.records_per_s}, True),
    ({"records_per_s": 9e9, "workers": 1}, True), ({"records_per_s": 9e9, "precision": "bfloat16"}, False),
    ({"records_per_s": 1.04 * MEASURED.records_per_s}, False),
    ({"records_per_s": 9e9, "versions": {"torch": "2.12.0"}}, False),
    ({"records_per_s": 9e9, "model_digest": "sha256:" + "2" * 64}, False),
    ({"records_per_s": 9e9, "workers": 0}, False),
])
def test_a_file_is_better_that_is_clearly_quicker_for_the_same_and_can_be_taken(archive, there, better):
    assert better_tuning(archive, MEASURED) is None
    write_tuning(archive, replace(MEASURED, **there))
    found = better_tuning(archive, MEASURED)
    assert (found is not None) == better
    assert found is None or found.records_per_s == there["records_per_s"]
    assert better_tuning(archive, replace(MEASURED, device="cpu-avx512-2cores")) is None


def test_a_file_that_can_t_be_written_leaves_nothing_beside_it(archive):
    path = tuning_path(archive, MEASURED.device)
    path.mkdir(parents=True)
    with pytest.raises(StorageError, match=r"can't be written: Is a directory"):
        write_tuning(archive, MEASURED)
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UsageError, match="is a folder"):
        require_place(archive, MEASURED.device)


def test_a_place_for_the_file_is_looked_for_without_making_it(archive):
    require_place(archive, MEASURED.device)
    assert list(archive.parent.iterdir()) == [archive]
    write_tuning(archive, MEASURED)
    require_place(archive, MEASURED.device)
    assert [one.name for one in archive.with_suffix(".tuning").iterdir()] == [f"{MEASURED.device}.json"]
    with pytest.raises(UsageError, match=r"--save /proc/digits\.tuning/.*: can't write there: "):
        require_place(Path("/proc/digits.mar"), MEASURED.device)  # read-only, even for root
    archive.with_suffix(".tuning").rename(archive.parent / "elsewhere")
    archive.with_suffix(".tuning").write_text("in the way")
    with pytest.raises(UsageError, match="can't write there: Not a directory"):
        require_place(archive, MEASURED.device)


def test_a_file_of_another_model_is_refused_and_not_passed_over(archive):
    write_tuning(archive, replace(MEASURED, model_digest="sha256:" + "2" * 64))
    with pytest.raises(ServingError, match=r"measured for the model sha256:222.*has sha256:111.*--save`, or delete"):
        read_tuning(archive, lambda: MEASURED.device)


def test_a_file_of_another_kind_of_machine_than_its_name_says_is_refused(archive):
    path = write_tuning(archive, MEASURED)
    path.rename(path.with_name("cpu-avx2-4cores.json"))
    with pytest.raises(ServingError, match=r"4cores\.json was measured on another kind of machine than its name "
                                           r"says, cpu-avx2-2cores: measure again .* or delete the file$"):
        read_tuning(archive, lambda: "cpu-avx2-4cores")


@pytest.mark.parametrize("make", [lambda path: path.write_text("in the way"), lambda path: path.symlink_to("nowhere")])
def test_what_is_in_the_folder_s_place_is_refused_and_not_passed_over(archive, make):
    make(archive.with_suffix(".tuning"))
    with pytest.raises(ServingError, match=r"digits\.tuning is no folder, wanted one of tuning files.*: move it away$"):
        read_tuning(archive, lambda: MEASURED.device)


def test_a_file_that_can_t_be_read_is_not_to_be_measured_again(archive):
    tuning_path(archive, MEASURED.device).mkdir(parents=True)
    with pytest.raises(ServingError, match=r"json can't be read \(Is a directory\): make it a file that this user can "
                                           r"read, or move it away$"):
        read_tuning(archive, lambda: MEASURED.device)


def test_the_runtimes_and_precisions_of_files_are_those_of_the_handler():
    assert set(RUNTIMES) == set(handler_runtimes._RUNTIMES) - {"noop"}
    assert tuple(handler_runtimes.PRECISIONS) == PRECISIONS
    damaged = json.dumps({**json.loads(MEASURED.to_json()), "runtime": "jit"}).encode()
    with pytest.raises(ServingError, match="has runtime 'jit', wanted eager or torchscript or aot or onnx: measure"):
        Tuning.from_json(damaged, "here")


@pytest.mark.parametrize(("field", "value"), [
    ("format", 2), ("micro_batch", 0), ("micro_batch", "64"), ("micro_batch", True), ("workers", 10**9),
    ("threads", 1.5), ("runtime", "a\nb"), ("runtime", ""), ("precision", "x=y z"), ("precision", "int8"),
    ("runtime", "noop"), ("runtime", ["eager"]), ("allocator", "jemalloc"),
    ("records_per_s", 0), ("records_per_s", float("inf")), ("records_per_s", "9"), ("versions", {"a": 1}),
    ("table", [1]), ("micro-batch", 64), ("measured_at", "today\n"), ("allocator", ["glibc-held"]), ("device", None)])
def test_a_damaged_file_is_refused_in_one_line(field, value):
    text = json.dumps({**json.loads(MEASURED.to_json()), field: value}).encode()
    with pytest.raises(ServingError, match="here") as caught:
        Tuning.from_json(text, "here")
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_and_nothing_else_is_raised(data):
    with pytest.raises(ServingError):
        Tuning.from_json(data, "here")


def test_a_file_is_read_within_a_bound(archive):
    path = write_tuning(archive, MEASURED)
    path.write_bytes(b" " * MAX_BYTES + path.read_bytes())
    with pytest.raises(ServingError, match=f"over {MAX_BYTES:,} bytes"):
        read_tuning(archive, lambda: MEASURED.device)


def seen(archive, environ=None, **settings):
    """What a worker gets: its settings, and how many there are."""
    decided = settled(ServerSettings(archive, **settings), environ or {})
    return environment(environ or {}, "SECRET", archive.parent, decided, 7, (), None), decided.workers


@pytest.fixture
def tuned(archive):
    write_tuning(archive, replace(MEASURED, device=device({})))
    return archive


def test_the_file_wins_over_defaults(tuned):
    environ, workers = seen(tuned)
    assert workers == 3
    assert MEASURED.environment().items() <= environ.items()
    assert environ["BATCH_HANDLER_CEILING"] == "21400.5"
    assert not any(name.startswith("MALLOC_") for name in environ)


def test_without_it_the_defaults_hold_memory_and_promise_no_ceiling(archive):
    environ, workers = seen(archive, {"BATCH_HANDLER_CEILING": "1", "MALLOC_ARENA_MAX": "9"})
    assert workers >= 1
    assert ALLOCATORS["glibc-held"].items() <= environ.items()
    assert environ["BATCH_HANDLER_THREADS"] == "7"
    assert not {"BATCH_HANDLER_CEILING", "BATCH_HANDLER_MICRO_BATCH", "BATCH_HANDLER_RUNTIME"} & set(environ)


@pytest.mark.parametrize(("settings", "environ", "changed"), [
    ({"micro_batch": 32}, {}, {"BATCH_HANDLER_MICRO_BATCH": "32"}),
    ({}, {"BATCH_HANDLER_MICRO_BATCH": "16"}, {"BATCH_HANDLER_MICRO_BATCH": "16"}),
    ({"micro_batch": 32}, {"BATCH_HANDLER_MICRO_BATCH": "16"}, {"BATCH_HANDLER_MICRO_BATCH": "32"}),
    ({}, {"BATCH_HANDLER_RUNTIME": "eager"}, {"BATCH_HANDLER_RUNTIME": "eager"}),
    ({"threads": 5}, {}, {"BATCH_HANDLER_THREADS": "5", "OMP_NUM_THREADS": "5"}),
    ({"workers": 5}, {}, {"BATCH_HANDLER_THREADS": "7", "OMP_NUM_THREADS": "7"}),
])
def test_flags_win_over_variables_and_those_over_the_file_whose_ceiling_is_then_not_promised(
        tuned, settings, environ, changed):
    found, workers = seen(tuned, environ, **settings)
    assert changed.items() <= found.items()
    assert "BATCH_HANDLER_CEILING" not in found
    assert settings.get("workers", workers) == workers
    rest = {name: value for name, value in MEASURED.environment().items() if name not in changed}
    assert rest.items() <= found.items()


def test_what_else_would_decide_how_many_threads_a_worker_has_is_passed_over(archive):
    """Bits depend on them, and the fingerprint says what was asked for."""
    found, _ = seen(archive, {"OMP_DYNAMIC": "true", "OMP_THREAD_LIMIT": "1", "OMP_WAIT_POLICY": "PASSIVE"})
    assert {name for name in found if name.startswith("OMP_")} == {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"}
