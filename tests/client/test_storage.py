"""Stores: what the simulated one does is what a real one does."""

import pytest

from batch_client.storage import MemoryStore, open_store


@pytest.fixture(params=["in memory", "on disk"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "in memory" else open_store(str(tmp_path / "out"))


async def test_an_object_that_exists_is_never_replaced(store):
    assert await store.create("a/b", b"first")
    assert not await store.create("a/b", b"second")
    assert bytes((await store.get("a/b")).data) == b"first"
