"""Tuning files: what is read, what is refused, and what wins over what."""

import json
import random
import time
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_client import buckets
from batch_client.archives import local_archive
from batch_client.buckets import open_store
from batch_client.errors import CredentialsError, ServingError, StorageError, UsageError
from batch_client.machine import device
from batch_client.server_config import ServerSettings, environment
from batch_client.server_process import settled
from batch_client.storage import MemoryStore
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
from support.cli import until
from support.web import in_a_thread

DIGEST = "sha256:" + "1" * 64
MEASURED = Tuning(device="cpu-avx2-2cores", model_digest=DIGEST, runtime="torchscript", micro_batch=256, workers=3,
                  threads=2, precision="float32", allocator="glibc-default", records_per_s=21_400.5,
                  measured_at="2026-01-01T00:00:00+00:00", versions={"torch": "2.13.0"}, table=({"workers": 3},))
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,30}", fullmatch=True)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "digits.mar"
    with zipfile.ZipFile(path, "w") as mar:
        mar.writestr("model.json", json.dumps({"digest": DIGEST}))
    return path


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


async def test_an_archive_that_is_fetched_brings_its_file(tuned):
    async with local_archive(tuned.as_uri()) as fetched:
        assert fetched != tuned
        assert read_tuning(fetched, lambda: device({})).micro_batch == MEASURED.micro_batch


@pytest.mark.parametrize("size", [1, 99, 100, 101, 305])
async def test_an_archive_comes_in_pieces(tmp_path, monkeypatch, size):
    monkeypatch.setattr("batch_client.archives.PIECE_BYTES", 100)
    data = random.Random(size).randbytes(size)
    (tmp_path / "large.mar").write_bytes(data)
    async with local_archive((tmp_path / "large.mar").as_uri()) as fetched:
        assert fetched.read_bytes() == data
        folder = fetched.parent
    assert not folder.exists()
    with pytest.raises(ServingError, match="no such object"):
        async with local_archive((tmp_path / "other.mar").as_uri()):
            pass


async def test_an_archive_comes_in_pieces_from_s3(s3, s3_environ, monkeypatch, archive):
    for name, value in s3_environ.items():
        monkeypatch.setenv(name, value)
    assert await open_store("s3://data/models").create("digits.mar", archive.read_bytes())
    monkeypatch.setattr("batch_client.archives.PIECE_BYTES", -(-archive.stat().st_size // 3))
    async with local_archive("s3://data/models/digits.mar") as fetched:
        assert fetched.read_bytes() == archive.read_bytes()
    with pytest.raises(ServingError, match="no such object"):
        async with local_archive("s3://data/models/other.mar"):
            pass


async def test_an_archive_that_is_replaced_while_it_is_fetched_is_refused(monkeypatch):
    class Replaced(MemoryStore):
        async def get(self, key, start=None, stop=None):
            blob = await super().get(key, start, stop)
            if stop is not None:
                self.objects[key] = b"new" * 100
            return blob

    store = Replaced()
    store.objects["digits.mar"] = b"old" * 100
    monkeypatch.setattr("batch_client.archives.PIECE_BYTES", 100)
    monkeypatch.setattr("batch_client.archives.open_store", lambda *_, **__: store)
    with pytest.raises(StorageError, match=r"digits\.mar was replaced while it was fetched"):
        async with local_archive("s3://models/digits.mar"):
            pass


async def test_a_store_that_shows_only_the_archive_has_no_file(archive, monkeypatch):
    class Guarded(MemoryStore):
        async def head(self, key):
            if key not in self.objects:
                raise CredentialsError("access denied")  # what S3 says to whom may not list
            return await super().head(key)

    store = Guarded()
    store.objects["digits.mar"] = archive.read_bytes()
    monkeypatch.setattr("batch_client.archives.open_store", lambda *_, **__: store)
    async with local_archive("s3://models/digits.mar") as fetched:
        assert read_tuning(fetched, lambda: device({})) is None


async def test_a_tuning_file_that_finds_no_room_here_is_said(archive, monkeypatch, tmp_path):
    class Blocking(MemoryStore):
        async def head(self, key):
            if key.endswith(".json"):
                (folder,) = temporary.iterdir()
                (folder / "digits.tuning").write_text("in the way")  # any error of the disk: root writes anywhere
            return await super().head(key)

    store, temporary = Blocking(), tmp_path / "temporary"
    store.objects = {"digits.mar": archive.read_bytes(),
                     f"digits.tuning/{device({})}.json": MEASURED.to_json().encode()}
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr("batch_client.archives.open_store", lambda *_, **__: store)
    with pytest.raises(ServingError, match=r"no room for it here .*: set TMPDIR"):
        async with local_archive("s3://models/digits.mar"):
            pass
    assert list(temporary.iterdir()) == []


@contextmanager
def _web(archive, answer, seconds=0, first=1, meanwhile=lambda: None):
    """The URL of an archive on a web server, which gives `answer` (status, body) for every other name.

    `seconds` go by, or `meanwhile` is called, after the `first` bytes of the archive.
    """
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            status, body = (200, archive.read_bytes()) if self.path == f"/{quote(archive.name)}" else answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:first])
                time.sleep(seconds if status == 200 else 0)
                meanwhile()
                self.wfile.write(body[first:])

        do_GET = do_HEAD  # noqa: N815 - names that http.server wants

        def log_message(self, *_):
            pass

    with in_a_thread(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield f"{url}/{quote(archive.name)}"


@pytest.mark.parametrize("answer", [
    (404, b""), (400, b"Bad Request"), (403, b"no"), (405, b""), (200, b"<html>Log in</html>"), (200, b""),
    (200, b'{"error": "no such page"}'), (200, b" " * MAX_BYTES + MEASURED.to_json().encode()),
])
async def test_a_web_server_that_has_no_file_has_none_whatever_it_answers(archive, monkeypatch, answer):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # says that plain HTTP is meant
    with _web(archive, answer) as url:
        async with local_archive(url) as fetched:
            assert fetched.read_bytes() == archive.read_bytes()
            assert read_tuning(fetched, lambda: device({})) is None


async def test_a_web_server_that_has_a_file_gives_it_and_a_damaged_one_is_refused(archive, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with _web(archive, (200, replace(MEASURED, device=device({})).to_json().encode())) as url:
        async with local_archive(url) as fetched:
            assert read_tuning(fetched, lambda: device({})).micro_batch == MEASURED.micro_batch
    with _web(archive, (200, json.dumps({"format": 1, "workers": 3}).encode())) as url:
        async with local_archive(url) as fetched:
            with pytest.raises(ServingError, match="has other fields"):
                read_tuning(fetched, lambda: device({}))


async def test_a_web_server_may_take_longer_than_a_store_has_patience(archive, monkeypatch):
    """It has to send the whole archive in one answer."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(buckets.open_store, "__kwdefaults__", buckets.open_store.__kwdefaults__ | {"seconds": 1})
    with _web(archive, (404, b""), seconds=3) as url:
        async with local_archive(url) as fetched:
            assert fetched.read_bytes() == archive.read_bytes()


async def test_what_has_come_from_the_web_is_in_the_file_before_the_rest_comes(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    archive, seen = tmp_path / "large.mar", []
    archive.write_bytes(random.Random(1).randbytes(4 << 20))

    def is_there():
        return any(path.stat().st_size for path in (tmp_path / "temporary").rglob("large.mar"))

    def meanwhile():
        until(is_there)
        seen.append(is_there())

    with _web(archive, (404, b""), first=3 << 20, meanwhile=meanwhile) as url:
        async with local_archive(url) as fetched:
            assert fetched.read_bytes() == archive.read_bytes()
    assert seen == [True]


async def test_an_archives_name_may_be_escaped_in_its_url(archive, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    archive = archive.rename(archive.with_name("a #1 ü?.mar"))
    with _web(archive, (404, b"")) as url:
        assert "%20%231%20%C3%BC%3F.mar" in url
        async with local_archive(url) as fetched:
            assert (fetched.name, fetched.read_bytes()) == (archive.name, archive.read_bytes())


async def test_an_empty_archive_on_a_web_server_is_one_that_is_there(archive, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    archive.write_bytes(b"")
    with _web(archive, (404, b"")) as url:
        async with local_archive(url) as fetched:
            assert fetched.read_bytes() == b""


@pytest.mark.parametrize(("url", "wanted"), [
    ("https://host/emb.mar?X-Signature=secret", "https://host/emb.mar?…: no place has a '?' in its URL"),
    ("https://host/emb.mar#secret", "https://host/emb.mar#…: no place has a '#' in its URL"),
    ("s3://data/emb.mar?secret/x.mar", "s3://data/emb.mar?…: no place has a '?' in its URL"),
    ("s3://data/..%2F..%2Femb.mar", "'../../emb.mar' can't be a file's name"),
    ("s3://data/emb%00.mar", "can't be a file's name"),
    ("s3://data/..", "'..' can't be a file's name"),
    ("s3://data/.", "'.' can't be a file's name"),
    ("s3://data/", "wanted an object below a bucket or host, such as s3://bucket/model.mar"),
    ("https://me:secret@[host/emb.mar?secret", "https://…@[host/emb.mar: not a URL"),
    ("s3://[data/emb.mar", "not a URL"),
])
async def test_a_url_that_is_more_than_an_objects_path_is_refused_without_the_rest(url, wanted):
    with pytest.raises(UsageError) as error:
        async with local_archive(url):
            pass
    assert wanted in str(error.value)
    assert "secret" not in str(error.value)


class _Failing(MemoryStore):
    async def head(self, key):
        raise StorageError("500 Internal Server Error")

    async def stream(self, key):
        yield self.objects[key]


@pytest.mark.parametrize(("scheme", "store", "text", "error", "wanted"), [
    ("https", _Failing, b"", None, ""),
    ("s3", _Failing, b"", StorageError, "500 Internal Server Error"),
    ("s3", MemoryStore, b"<html>", ServingError, "is not JSON"),
    ("s3", MemoryStore, b" " * MAX_BYTES + b"{}", ServingError, "is over 1,048,576 bytes"),
])
async def test_a_store_that_fails_or_has_a_damaged_file_is_heard(
        archive, monkeypatch, scheme, store, text, error, wanted):
    found = store()
    found.objects = {"digits.mar": archive.read_bytes(), f"digits.tuning/{device({})}.json": text}
    monkeypatch.setattr("batch_client.archives.open_store", lambda *_, **__: found)

    async def read():
        async with local_archive(f"{scheme}://models/digits.mar") as fetched:
            return read_tuning(fetched, lambda: device({}))

    if error is None:
        assert await read() is None
    else:
        with pytest.raises(error, match=wanted):
            await read()
