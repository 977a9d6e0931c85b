"""Servers whose model computes in another way than the one that an output was begun with."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from batch_client.errors import MismatchError
from batch_client.pipeline import execute
from batch_client.storage import MemoryStore
from support.runs import records_of, services, source_of, spec
from support.simulated import SimulatedServer


class Numerics(SimulatedServer):
    """Says these numerics of its model."""

    def __init__(self, **numerics):
        super().__init__()
        self.numerics = numerics
        self.fingerprint = json.dumps(numerics)

    def metadata(self):
        said = super().metadata()
        return replace(said, parameters={**said.parameters, "numerics": self.numerics})


BEGUN = {"device": "cpu", "cpu": "A", "runtime": "eager", "layout": "channels_last", "precision": "float32",
         "micro_batch": 128, "threads": 1}
BESIDE = "(settings win over a tuning file beside the archive, which may be what changed)"


@pytest.mark.parametrize(("there", "now", "said"), [
    (BEGUN, {**BEGUN, "threads": 2},
     f"threads 2; that of OUTPUT memory://out has threads 1; serve it in that way, with --workers Wx1 {BESIDE}"),
    (BEGUN, {**BEGUN, "runtime": "torchscript", "optimised": True, "micro_batch": 256, "precision": "bfloat16"},
     ("runtime 'torchscript', precision 'bfloat16', micro_batch 256; that of OUTPUT memory://out has "
      "runtime 'eager', precision 'float32', micro_batch 128; serve it in that way, with BATCH_HANDLER_RUNTIME=eager "
      f"BATCH_HANDLER_PRECISION=float32 BATCH_HANDLER_MICRO_BATCH=128 {BESIDE}")),
    (BEGUN, {"device": "cuda", "gpu": "A10G", "runtime": "eager", "precision": "float32", "micro_batch": 128},
     "device 'cuda'; that of OUTPUT memory://out has device 'cpu'; serve it in that way"),
    (BEGUN, {**BEGUN, "cpu": "B", "MKL_CBWR": "COMPATIBLE"},
     "MKL_CBWR 'COMPATIBLE', cpu 'B'; that of OUTPUT memory://out has MKL_CBWR absent, cpu 'A'; serve it in that way"),
    (BEGUN, {**BEGUN, "threads": 2, "cpu": "B"},
     "threads 2, cpu 'B'; that of OUTPUT memory://out has threads 1, cpu 'A'; serve it in that way"),
    ({**BEGUN, "runtime": "a b\n"}, BEGUN,
     "runtime 'eager'; that of OUTPUT memory://out has runtime 'a b\\n'; serve it in that way"),
])
async def test_other_numerics_at_the_same_place_are_refused_with_what_differs_and_how_to_have_them_back(
        there, now, said):
    source = source_of(records_of(20), (10, 3))
    output = MemoryStore("memory://out")
    await execute(spec(), services(Numerics(**there), source, output))
    with pytest.raises(MismatchError) as caught:
        await execute(spec(), services(Numerics(**now), source, output))
    assert str(caught.value) == (f"http://simulated: its model has {said}, or let `run` have another OUTPUT, or "
                                 "--overwrite")


async def test_numerics_of_which_nothing_is_known_are_named_by_their_fingerprints():
    source = source_of(records_of(20), (10, 3))
    output = MemoryStore("memory://out")
    first, second = Numerics(), Numerics()
    first.fingerprint, second.fingerprint = "one", "other"
    await execute(spec(), services(first, source, output))
    with pytest.raises(MismatchError, match="its model has numerics other; that of OUTPUT memory://out has numerics "
                                            "one; serve it in that way, or"):
        await execute(spec(), services(second, source, output))
