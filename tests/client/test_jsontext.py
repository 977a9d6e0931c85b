"""JSON in a place that anybody may have written: what nests too deeply is refused like any other damage."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from batch_client.dialect import read_reply
from batch_client.errors import MismatchError
from batch_client.jsontext import parse_json
from batch_client.layout import MANIFEST_KEY, SPEC_KEY
from batch_client.ledger import rows_from_json
from batch_client.manifest import read_manifest
from batch_client.prepare import _stored_run
from batch_client.progress import progress_of
from batch_client.storage import MemoryStore

DEEP = b"[" * 1_000_000


def test_text_that_nests_too_deeply_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    with pytest.raises(ValueError, match="nested too deeply"):
        rows_from_json(DEEP)
    assert parse_json(memoryview(b"[[1]]")) == [[1]]


@pytest.mark.parametrize("text", [rb'"\ud800"', rb'{"\uDFFF": 1}', rb'["\udc00\ud800"]'])
def test_half_of_a_surrogate_pair_could_not_be_written_again(text: bytes) -> None:
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        parse_json(text)
    assert parse_json(rb'"\ud83d\ude00"') == "\U0001f600"
    # Of a reply that has one the bytes are the reason.
    verdict = read_reply(500, b'{"error": %s}' % text)
    verdict.reason.encode()
    assert verdict.reason


@pytest.mark.parametrize("read", [progress_of, read_manifest])
async def test_an_output_with_such_text_is_no_output(read: Callable[[MemoryStore], Awaitable[object]]) -> None:
    store = MemoryStore()
    store.objects = {SPEC_KEY: DEEP, MANIFEST_KEY: DEEP}
    with pytest.raises(MismatchError, match=r"^[^\n]*can't be read [^\n]*nested too deeply[^\n]*$"):
        await read(store)


async def test_a_run_that_finds_such_text_sees_no_earlier_run() -> None:
    store = MemoryStore()
    store.objects = {SPEC_KEY: DEEP}
    assert await _stored_run(store) == {}
