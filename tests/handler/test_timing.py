"""What a request is told that it took: each stack's time is its own, also where issuing is computing."""

import numpy as np
import pytest

from batch_handler.runtimes.device import CpuDevice
from batch_handler.runtimes.noop import NoopRuntime
from batch_handler.runtimes.slots import Slot
from batch_handler.scoring import Query, Scorer
from batch_handler.signature import InputSpec, OutputSpec

B = 4
RECORD = InputSpec("x", np.dtype("u1"), (2,), (2,))
SCORE = OutputSpec("y", np.dtype("f4"), (1,))


class Paced(NoopRuntime):
    """A micro-batch takes a second of a clock that nothing else moves, while `run` is called as on a CPU; two of them
    are a stack.
    """

    def __init__(self):
        super().__init__(CpuDevice(), (RECORD,), (SCORE,))
        self.now = 0.0

    def prepare(self, micro_batch):
        return tuple(Slot(self._device, self._inputs, self._outputs, 2 * micro_batch) for _ in range(2))

    def run(self, slot, size):
        self.now += -(-size // B)
        super().run(slot, size)


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (1, 1), (2, 1, 3)])
def test_each_request_is_told_its_own_seconds(sizes):
    runtime = Paced()
    scorer = Scorer(runtime, (SCORE,), B, now=lambda: runtime.now)
    answers = scorer.score([Query((np.zeros((size * B, 2), np.uint8),), 0) for size in sizes])
    assert [answer.compute_ms for answer in answers] == [1000.0 * size for size in sizes]
    assert [answer.queue_ms for answer in answers] == [1000.0 * sum(sizes[:at]) for at in range(len(sizes))]
    assert scorer.micro_batch_seconds == 1.0


def test_a_micro_batch_that_is_not_full_says_nothing_of_full_ones():
    runtime = Paced()
    scorer = Scorer(runtime, (SCORE,), B, now=lambda: runtime.now)
    scorer.score([Query((np.zeros((B + 1, 2), np.uint8),), None)])
    assert scorer.micro_batch_seconds == np.inf
