"""Archives that are fetched: in pieces, whole, with the tuning file beside them; and what keeps one from coming."""

import json
import random
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import pytest

from batch_client import storage
from batch_client.archives import local_archive
from batch_client.errors import CredentialsError, ServingError, StorageError, UsageError
from batch_client.machine import device
from batch_client.storage import MemoryStore, open_store
from batch_client.tuning import MAX_BYTES, read_tuning, write_tuning
from support.cli import until
from support.measured import MEASURED, archive_in
from support.web import in_a_thread


@pytest.fixture
def archive(tmp_path):
    return archive_in(tmp_path)


async def test_an_archive_that_is_fetched_brings_its_file(archive):
    write_tuning(archive, replace(MEASURED, device=device({})))
    async with local_archive(archive.as_uri()) as fetched:
        assert fetched != archive
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
    monkeypatch.setattr(storage.open_store, "__kwdefaults__", storage.open_store.__kwdefaults__ | {"seconds": 1})
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
