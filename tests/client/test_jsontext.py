"""JSON in a place that anybody may have written: what nests too deeply is refused like any other damage."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from batch_client.dialect import Outcome, Verdict, read_reply
from batch_client.errors import MismatchError
from batch_client.jsontext import canonical_json, parse_json
from batch_client.layout import MANIFEST_KEY, SPEC_KEY
from batch_client.manifest import read_manifest
from batch_client.prepare import _stored_run
from batch_client.progress import progress_of
from batch_client.storage import MemoryStore

DEEP = b"[" * 1_000_000


def test_text_that_nests_too_deeply_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    assert parse_json(memoryview(b"[[1]]")) == [[1]]


@pytest.mark.parametrize(("text", "value"), [
    (rb'"a\ud800"', "a\ufffd"), (rb'{"\uDFFF": 1}', {"\ufffd": 1}),
    (rb'["\udc00\ud800", "\ud800\ud800b"]', ["\ufffd\ufffd", "\ufffd\ufffdb"]),
    (b'"\xed\xa0\x80"', "\ufffd"), (rb'"\ud83d\ude00"', "\U0001f600"), (rb'"\\ud800"', r"\ud800"),
])
def test_half_of_a_surrogate_pair_could_not_be_written_again(text: bytes, value: object) -> None:
    found = parse_json(text)
    assert found == value
    assert parse_json(canonical_json(found)) == value


def test_a_reason_with_half_of_a_surrogate_pair_is_our_handlers_all_the_same() -> None:
    assert read_reply(500, rb'{"error": "\ud800 is no text"}') == Verdict(Outcome.RAISED, "500: \ufffd is no text")


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
