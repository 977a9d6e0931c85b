"""What a request is told that it took: each stack's time is its own, also where issuing is computing."""

import numpy as np
import pytest

from batch_handler.runtimes.device import CapacityError, CpuDevice
from batch_handler.runtimes.noop import NoopRuntime
from batch_handler.runtimes.slots import Slot
from batch_handler.runtimes.transform import ModelError
from batch_handler.scoring import Failure, Query, Score, Scorer
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


class Poisoned(Paced):
    """Fails on a micro-batch with a 99, which takes it as long."""

    def run(self, slot, size):
        super().run(slot, size)
        if (slot.inputs[0][:size] == 99).any():
            raise ModelError("a record that this model does not like")


def beside_poison(micro_batches):
    """The answers to a query whose first and last micro-batch have poison in them, and the seconds that all took."""
    poison = Query((np.full((B // 2, 2), 99, np.uint8),))
    runtime = Poisoned()
    scorer = Scorer(runtime, (SCORE,), B, now=lambda: runtime.now)
    before, answer, after = scorer.score([poison, Query((np.zeros((micro_batches * B, 2), np.uint8),)), poison])
    assert before == after == Failure("a record that this model does not like")
    return answer, runtime.now


def test_a_query_beside_several_poison_records_is_scored_again_once():
    answer, seconds = beside_poison(10)
    assert isinstance(answer, Score)
    assert seconds == 11 + 10 + 2


def test_a_query_that_would_hold_up_its_server_batch_is_to_come_again():
    """TorchServe kills a worker, and all requests of the batch, after 120 s."""
    answer, seconds = beside_poison(45)
    assert (answer.status, answer.message) == (503, "other requests keep the server busy for now: ask again")
    assert seconds == 46 + 2


def test_a_query_that_came_alone_may_take_as_long_as_its_pieces_do():
    class Full(Paced):
        """Has no memory for more than half a micro-batch."""

        def run(self, slot, size):
            super().run(slot, size)
            if size > B // 2:
                raise CapacityError("memory is full")

    runtime = Full()
    (answer,) = Scorer(runtime, (SCORE,), B, now=lambda: runtime.now).score([Query((np.zeros((70 * B, 2), np.uint8),))])
    assert isinstance(answer, Score)
