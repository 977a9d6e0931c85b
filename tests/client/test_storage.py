"""Stores: what the simulated one does is what a real one does."""

import pytest

from batch_client.errors import StorageError, UsageError
from batch_client.storage import MemoryStore, open_store


@pytest.fixture(params=["in memory", "on disk"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "in memory" else open_store(str(tmp_path / "out"))


async def test_an_object_that_exists_is_never_replaced(store):
    assert await store.create("a/b", b"first")
    assert not await store.create("a/b", b"second")
    assert bytes((await store.get("a/b")).data) == b"first"


@pytest.mark.parametrize("url", ["s3://bucket:443/out", "S3://bucket:/out", "gs://bucket:9000", "az://container:1/out"])
def test_a_bucket_has_no_port(url):
    """It would be passed over, and a place that is named twice would not be known as one."""
    with pytest.raises(UsageError, match="has a port, which no bucket has"):
        open_store(url)


async def test_where_the_library_gives_up_one_line_says_where_to_look(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_TOKEN", "two\nlines")  # which can be no header, and Rust panics
    with pytest.raises(StorageError, match=r"^reading az://c/x/key: obstore gave up: look for .* line breaks") as error:
        await open_store("az://c/x").get("key")
    assert "\n" not in str(error.value)
