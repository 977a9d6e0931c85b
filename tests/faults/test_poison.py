"""Records on which the model raises, or its worker exits or hangs: each costs itself, and nobody else a bit."""

import asyncio
import json
import random

import numpy as np
import pytest

from batch_client.answer import Prediction
from batch_client.dialect import Outcome, Verdict
from batch_client.endpoint import Pool
from batch_client.errors import DataError
from batch_client.figures import counted
from batch_client.pieces import Pieces
from batch_client.plan import Span
from batch_client.scorer import Scorer
from support.faults import (
    EXITS,
    FULL,
    HANGS,
    RAISES,
    Client,
    each_scale,
    images_of,
    open_output,
    opened,
    run,
    spoilt,
    write_source,
)

# Two in one request, one at a chunk's beginning; one at its end, that exits while the two before are taken apart.
FEW = {200: RAISES, 205: RAISES, 255: EXITS, 1024: RAISES}
MANY = {**FEW, 5000: EXITS, 9000: HANGS, 51_199: HANGS, 0: RAISES, 10_241: RAISES, 10_242: RAISES, 20_000: RAISES,
        30_000: RAISES, 40_000: RAISES, 50_000: RAISES}


class Company:
    """Stands for an exchange whose server raises on record 2; a probe of record 5 that has company goes down."""

    def __init__(self):
        self.pool = Pool(("http://nobody",), 4, lambda: 0.0, random.Random(1))

    async def ask(self, span, rows, room=None, at=""):
        if rows[2].any():
            return Verdict(Outcome.RAISED, "not this one")
        if rows[5].any() and room == self.pool.room:
            return Verdict(Outcome.FAILED, "a worker died")
        return Prediction({"y": rows.joined().astype(np.float32)}, np.zeros(span.count, np.uint8))

    async def pause(self, tries):
        pass

    def now(self):
        return 0.0


async def test_a_probe_that_goes_down_with_another_request_says_nothing_of_its_records():
    # Seen on TorchServe: an image that ends its worker, in a server batch with the probe of one that raises.
    rows, events = np.arange(1, 9, dtype=np.uint8)[:, None], []
    scored = await Scorer(Company(), 8, events.append).score(Span(0, 8, 0), Pieces([rows[:3], rows[3:]]))
    assert scored.status.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert [(one.index, one.reason) for one in scored.failures] == [(2, "not this one")]
    assert tuple(events) == scored.failures
    np.testing.assert_array_equal(np.delete(scored.outputs["y"], 2), np.delete(rows[:, 0], 2))


async def test_a_record_is_judged_where_zeros_were_answered():
    class Moving(Company):
        """One server raises on all records, and has eight of nine requests for them, since the well one has no room."""

        asked = 0

        async def ask(self, span, rows, room=None, at=""):
            records = rows.joined()
            self.asked += records.any()
            if records.any() and self.asked % 9:
                return Verdict(Outcome.RAISED, "out of memory", "http://sick")
            return Prediction({"y": records.astype(np.float32)}, np.zeros(span.count, np.uint8), server="http://well")

    rows = np.arange(1, 9, dtype=np.uint8)[:, None]
    scored = await Scorer(Moving(), 8, [].append).score(Span(0, 8, 0), Pieces([rows]))
    assert scored.failures == ()
    np.testing.assert_array_equal(scored.outputs["y"], rows)


async def test_a_model_that_raises_on_every_record_is_not_asked_six_times_for_each():
    class Raising(Company):
        requests = 0

        async def ask(self, span, rows, room=None, at=""):
            self.requests += 1
            if rows.joined().any():
                return Verdict(Outcome.RAISED, "index out of range")
            return Prediction({"y": rows.joined().astype(np.float32)}, np.zeros(span.count, np.uint8))

    exchange, rows, events = Raising(), np.ones((4096, 1), np.uint8), []
    with pytest.raises(DataError, match=r"11 records failed alone, the last of them record 10 \(index out of range\)"):
        await Scorer(exchange, 8, events.append, most_failed=10).score(Span(0, 4096, 0), Pieces([rows]))
    assert [event.index for event in events] == list(range(11))
    assert exchange.requests < 6 * 11 + 2 * 12 + 6  # two a halving


def dead_letters(output, environ):
    store = opened(output, environ)

    async def read():
        return [json.loads(bytes((await store.get(meta.key)).data)) async for meta in store.list("_run/failed/")]

    return [record for letter in asyncio.run(read()) for record in letter["records"]]


@each_scale
def test_records_that_raise_exit_or_hang(scale, undisturbed, moody_server, s3_environ, output):
    moods = MANY if scale is FULL else FEW
    bad = sorted(moods)
    url = f"{output}.zarr"
    write_source(url, s3_environ, spoilt(images_of(scale.records), moods), scale.source_chunk)
    # Nothing is accepted: nothing is published, and what failed is listed.
    stop = 1024 + 2 * scale.output_chunk
    part = ("--records", f"1024:{stop}")
    said = run(url, f"{output}-part", scale, moody_server.flags, s3_environ, *part, code=65)
    listed = [index for index in bad if 1024 <= index < stop]
    assert f"{counted(len(listed), 'record')} failed" in said
    assert sorted(record["index"] for record in dead_letters(f"{output}-part", s3_environ)) == listed
    with pytest.raises(FileNotFoundError):
        open_output(f"{output}-part", s3_environ)
    with Client(url, output, scale, moody_server.flags, s3_environ, "--max-failed", str(len(bad))) as client:
        summary = client.finish()
    assert (summary["failed"], summary["records"]) == (len(bad), scale.records)
    group = open_output(output, s3_environ)
    status = group["record_status"][:]
    assert np.flatnonzero(status == 1).tolist() == bad
    assert set(status) == {0, 1}
    good = np.setdiff1d(np.arange(scale.records), bad)
    np.testing.assert_array_equal(group["scores"][:][good].view(np.uint32),
                                  undisturbed(scale).scores[good].view(np.uint32))
    letters = {record["index"]: record for record in dead_letters(output, s3_environ)}
    assert sorted(letters) == bad
    for index, letter in letters.items():
        assert letter["attempts"] >= 3
        assert ("this model does not like" in letter["reason"]) == (moods[index] == RAISES), letter
