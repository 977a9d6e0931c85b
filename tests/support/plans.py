"""Plans to test with: one of given sizes, and any."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from batch_client.plan import Geometry, OutputGeometry, RequestSize, make_plan
from batch_client.spec import Records, RunSpec

ANYWHERE = RequestSize()
SCORES = OutputGeometry("scores", np.dtype(np.float32), (10,))


def spec(**options):
    return RunSpec(input="a", output="b", archive="m.mar", **options)


def plan_of(count=1000, chunk=100, record=(28, 28), dtype=np.uint8, micro_batch=64, output=SCORES,
            micro_batch_seconds=None, most=ANYWHERE, **options):
    geometry = Geometry((count, *record), np.dtype(dtype), chunk)
    return make_plan(spec(**options), geometry, np.dtype(dtype), (output,), micro_batch, micro_batch_seconds, most)


@st.composite
def plans(draw):
    count = draw(st.integers(1, 300))
    chunk = draw(st.integers(1, 40))
    micro_batch = draw(st.integers(1, 16))
    start = draw(st.integers(0, count - 1))
    stop = draw(st.integers(start + 1, count))
    options = {"records": Records(start, stop)}
    if draw(st.booleans()):
        options["chunk_records"] = chunk * draw(st.integers(1, 4))
    if draw(st.booleans()):
        options["request_records"] = micro_batch * draw(st.integers(1, 5))
    budget = draw(st.integers(chunk, chunk * 20))
    seconds = draw(st.sampled_from([None, 0.1, 0.02, 0.01]))
    return plan_of(count, chunk, (1,), micro_batch=micro_batch, micro_batch_seconds=seconds,
                   max_bytes_in_flight=budget, **options)
