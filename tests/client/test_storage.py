"""Stores: what the simulated one does is what a real one does."""

import pytest
from obstore.exceptions import GenericError

from batch_client.errors import CredentialsError, StorageError, UsageError
from batch_client.storage import MemoryStore, _translate, open_store


@pytest.fixture(params=["in memory", "on disk"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "in memory" else open_store(str(tmp_path / "out"))


async def test_an_object_that_exists_is_never_replaced(store):
    assert await store.create("a/b", b"first")
    assert not await store.create("a/b", b"second")
    assert bytes((await store.get("a/b")).data) == b"first"


async def test_below_an_object_there_is_none(store):
    await store.create("a", b"an object, and on disk a file")
    assert await store.get("a/zarr.json") is None
    assert await store.head("a/zarr.json") is None


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


@pytest.mark.parametrize(("url", "variables"), [
    ("s3://b/x", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"),
    ("gs://b/x", "GOOGLE_APPLICATION_CREDENTIALS"),
    ("abfs://c@a/x", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
])
def test_where_no_credentials_are_found_the_stores_own_variables_are_named(url, variables):
    found = _translate(GenericError("HTTP error: http://169.254.169.254/latest: no route"), "reading", url)
    assert isinstance(found, CredentialsError)
    assert f"found no credentials: set {variables}, or" in str(found)


def test_plain_http_is_taken_only_where_somebody_means_it():
    with pytest.raises(UsageError, match="anybody on the way could alter what comes over plain HTTP"):
        open_store("http://host/models", environ={})
    open_store("http://host/models", environ={"AWS_ENDPOINT_URL": "http://minio:9000"})


@pytest.mark.parametrize(("text", "kind"), [
    ("Error performing PUT http://s/b/y/c/403/0 in 1ms - Server returned non-2xx status code: 503: slow", StorageError),
    ("Unable to write /data/credentials/403: No space left on device", StorageError),
    ("Error performing PUT http://s/b/x in 1ms - Server returned non-2xx status code: 403 Forbidden", CredentialsError),
])
def test_what_a_store_said_is_not_looked_for_in_names(text, kind):
    assert type(_translate(GenericError(text), "writing", "x")) is kind
