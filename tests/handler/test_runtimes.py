"""Devices and slots: whatever order work lands in, and whatever the model does, the numbers are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batch_handler.runtimes import device as devices
from batch_handler.runtimes.device import CapacityError, CpuDevice, LostDeviceError, open_device
from batch_handler.runtimes.slots import SlotRuntime, most_stacked
from batch_handler.runtimes.transform import ModelError, Preprocess, collect
from batch_handler.scoring import Failure, Query, Score, Scorer
from batch_handler.signature import InputSpec, OutputSpec
from support.scripted import ScriptedDevice, ScriptedEvent

WIDTH = 16  # a micro-batch of B such records is a multiple of 64 bytes, so it can be stacked
INPUT = InputSpec("x", np.dtype("i2"), (WIDTH,), (WIDTH,))
OUTPUT = OutputSpec("y", np.dtype("f4"), (WIDTH,))
B = 4
STACKED = 3 * B * WIDTH * 8  # bytes of three micro-batches' inputs and outputs


def double(values: torch.Tensor) -> torch.Tensor:
    return values * 2 + 1


def scorer_on(device: Any, forward: Any = double, **options: Any) -> Scorer:
    runtime = SlotRuntime(forward, device, [INPUT], [OUTPUT], numerics={})
    return Scorer(runtime, [OUTPUT], B, **options)


def records(count: int, start: int = 0) -> np.ndarray:
    # Never 99, which `picky` does not like.
    return (np.arange(count * WIDTH).reshape(count, WIDTH) % 50 + start).astype(np.int16)


queries = st.lists(
    st.builds(
        lambda count, first: Query((records(count, count),), first),
        st.integers(0, 20),
        st.none() | st.integers(0, 9),
    ),
    max_size=4,
)


@given(st.lists(st.integers(0, 5), max_size=60), queries, st.sampled_from([0, STACKED]))
def test_late_copies_change_no_number(script, asked, stack_bytes):
    device = ScriptedDevice(script, stack_bytes=stack_bytes)
    for query, score in zip(asked, scorer_on(device).score(asked), strict=True):
        assert isinstance(score, Score)
        np.testing.assert_array_equal(score.outputs[0], query.inputs[0] * 2.0 + 1)


class _Impatient(ScriptedDevice):
    """The planted bug: waits for nothing, as code without events would."""

    def download(self, sources, hosts, after):
        landing, event = super().download(sources, hosts, after)
        assert isinstance(event, ScriptedEvent)
        event.wait = lambda: None  # type: ignore[method-assign] # the bug
        return landing, event


@pytest.mark.parametrize("stack_bytes", [0, STACKED])
@pytest.mark.parametrize("script", [[], [0, 1, 0] * 40, [1, 0, 0] * 40])
def test_reuse_before_the_event_is_caught(script, stack_bytes):
    asked = Query((records(60),), 0)
    (score,) = scorer_on(_Impatient(script, stack_bytes=stack_bytes)).score([asked])
    assert isinstance(score, Score)
    assert not np.array_equal(score.outputs[0], asked.inputs[0] * 2.0 + 1)


def picky(values: torch.Tensor) -> torch.Tensor:
    if bool((values == 99).any()):
        raise ValueError("99\nand more")
    return double(values)


@pytest.mark.parametrize("device", [CpuDevice, ScriptedDevice])
def test_a_record_that_the_model_raises_on_fails_its_own_request_only(device):
    guilty = records(6, 10).copy()
    guilty[5, 0] = 99
    asked = [
        Query((records(6),)),
        Query((guilty,)),
        Query((records(1, 3),)),
        Query((guilty,), 2),
        Query((records(9),), 0),
    ]
    answers = scorer_on(device(), picky).score(asked)
    assert [type(answer) for answer in answers] == [Score, Failure, Score, Failure, Score]
    assert answers[1] == Failure("the model raised ValueError: 99", 500)
    for index in (0, 2, 4):
        np.testing.assert_array_equal(answers[index].outputs[0], asked[index].inputs[0] * 2.0 + 1)


@given(
    st.lists(st.integers(0, 5), max_size=60), st.lists(st.integers(0, 19), max_size=3), st.sampled_from([0, STACKED])
)
def test_failures_between_micro_batches_leave_the_others_right(script, bad, stack_bytes):
    values = records(20)
    values[bad, 1] = 99
    good = Query((records(20, 200),), 0)
    device = ScriptedDevice(script, stack_bytes=stack_bytes)
    answers = scorer_on(device, picky).score([Query((values,)), good])
    assert isinstance(answers[0], Failure if bad else Score)
    np.testing.assert_array_equal(answers[1].outputs[0], good.inputs[0] * 2.0 + 1)


def test_full_memory_halves_online_micro_batches_and_fails_bulk():
    def hungry(values: torch.Tensor) -> torch.Tensor:
        if len(values) > 2 and bool(values.any()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return double(values)

    asked = [Query((records(7, 1),)), Query((records(2, 1),)), Query((records(4, 1),), 0)]
    answers = scorer_on(CpuDevice(), hungry).score(asked)
    for index in (0, 1):
        np.testing.assert_array_equal(answers[index].outputs[0], asked[index].inputs[0] * 2.0 + 1)
    assert isinstance(answers[2], Failure)
    assert answers[2].status == 507


class _Counting(ScriptedDevice):
    """Counts what is issued."""

    issued = 0

    def compute(self, work, after):
        self.issued += 1
        return super().compute(work, after)


def test_micro_batches_of_a_stack_are_computed_one_by_one():
    seen = []

    def watched(values: torch.Tensor) -> torch.Tensor:
        seen.append((len(values), values.data_ptr() % 64))
        return double(values)

    device = _Counting(stack_bytes=STACKED)
    scorer = scorer_on(device, watched)
    seen.clear()
    device.issued = 0
    asked = Query((records(7 * B),), 1)
    (score,) = scorer.score([asked])
    assert seen == [(B, 0)] * 8
    assert device.issued == 3
    assert scorer.micro_batches == 8
    assert isinstance(score, Score)
    np.testing.assert_array_equal(score.outputs[0], asked.inputs[0] * 2.0 + 1)


@pytest.mark.parametrize("stack_bytes", [0, STACKED])
@pytest.mark.parametrize("buffers", [1, 2])
def test_a_model_that_returns_the_same_memory_again_gets_every_row_right(buffers, stack_bytes):
    kept = [torch.empty(B, WIDTH) for _ in range(buffers)]
    turns = iter(range(10_000))

    def thrifty(values: torch.Tensor) -> torch.Tensor:
        out = kept[next(turns) % buffers][: len(values)]
        torch.mul(values, 2, out=out)
        return out.add_(1)

    scorer = scorer_on(ScriptedDevice(stack_bytes=stack_bytes), thrifty)
    for start in (1, 7):
        asked = Query((records(7 * B, start),), 1)
        (score,) = scorer.score([asked])
        assert isinstance(score, Score)
        np.testing.assert_array_equal(score.outputs[0], asked.inputs[0] * 2.0 + 1)


@pytest.mark.parametrize("micro_batches", [2, 7])
@pytest.mark.parametrize("names", [["y"], ["doubled", "y"]])
def test_a_model_that_works_in_what_it_returned_before_gets_every_row_right(names, micro_batches):
    kept = [torch.empty(B, WIDTH), torch.empty(B, WIDTH)]

    def swapping(values: torch.Tensor) -> list[torch.Tensor]:
        kept.reverse()
        torch.mul(values, 2, out=kept[0])
        torch.add(kept[0], 1, out=kept[1])
        return kept[-len(names):]

    specs = [OutputSpec(name, np.dtype("f4"), (WIDTH,)) for name in names]
    device = ScriptedDevice(stack_bytes=2 * STACKED)
    asked = Query((records(micro_batches * B, 1),), 0)
    (score,) = Scorer(SlotRuntime(swapping, device, [INPUT], specs, numerics={}), specs, B).score([asked])
    assert isinstance(score, Score)
    for name, found in zip(names, score.outputs, strict=True):
        np.testing.assert_array_equal(found, asked.inputs[0] * 2.0 + (name == "y"))


def test_a_model_that_returns_its_input_is_right_in_a_stack():
    asked = Query((records(7 * B),), 0)
    (score,) = scorer_on(ScriptedDevice(stack_bytes=STACKED), lambda values: values).score([asked])
    assert isinstance(score, Score)
    np.testing.assert_array_equal(score.outputs[0], asked.inputs[0])


def test_run_is_refused_outside_of_a_session():
    runtime = SlotRuntime(double, CpuDevice(), [INPUT], [OUTPUT], numerics={})
    slot, _ = runtime.prepare(B)
    with pytest.raises(RuntimeError, match="session"):
        runtime.run(slot, B)


@pytest.mark.parametrize("rows", [lambda turn: B + (-1) ** turn, lambda turn: B - 1], ids=["in turn", "always"])
def test_a_model_that_gives_other_rows_than_it_was_asked_is_caught_in_a_stack_too(rows):
    turns = iter(range(1000))

    def shifting(values: torch.Tensor) -> torch.Tensor:
        if not bool(values.any()):  # while it warms up
            return double(values)
        return torch.ones(rows(next(turns)), WIDTH)

    (answer,) = scorer_on(ScriptedDevice(stack_bytes=STACKED), shifting).score([Query((records(2 * B, 1),), 0)])
    assert isinstance(answer, Failure)
    assert "wanted" in answer.message or "equal size" in answer.message


@pytest.mark.parametrize(
    ("width", "micro_batch", "stack_bytes", "wanted"),
    [
        (784, 128, 4 << 20, 10),
        (784, 128, 0, 1),
        (150_528, 128, 4 << 20, 1),
        (3, 128, 4 << 20, 32),
        # Its second micro-batch would begin where no tensor does.
        (3, 4, 4 << 20, 1),
        (16, 1, 4 << 20, 32),
    ],
)
def test_stacks_are_as_large_as_the_bytes_allow_and_aligned(width, micro_batch, stack_bytes, wanted):
    inputs = (InputSpec("x", np.dtype("u1"), (width,), (width,)),)
    assert most_stacked(inputs, (OutputSpec("y", np.dtype("f4"), (10,)),), micro_batch, stack_bytes) == wanted


def test_memory_that_is_full_at_load_refuses_the_model():
    def never(values: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(CapacityError, match="memory is full"):
        scorer_on(CpuDevice(), never)


def test_a_query_whose_outputs_have_no_room_fails_alone(monkeypatch):
    fine, huge = Query((records(3, 1),)), Query((records(5, 1),))
    scorer = scorer_on(CpuDevice(), double)
    (wanted,) = scorer.score([fine])
    real = np.empty

    def full(shape, dtype):
        if shape[0] == 5:
            raise MemoryError("no room")
        return real(shape, dtype)

    monkeypatch.setattr(np, "empty", full)
    for order in ([huge, fine], [fine, huge]):
        answers = dict(zip(map(id, order), scorer.score(order), strict=True))
        assert answers[id(huge)] == Failure("no room", 507)
        np.testing.assert_array_equal(answers[id(fine)].outputs[0], wanted.outputs[0])


def test_a_lost_context_ends_the_worker_at_once():
    seen: list[BaseException] = []

    def lost(values: torch.Tensor) -> torch.Tensor:
        if bool(values.any()):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return double(values)

    scorer = scorer_on(CpuDevice(), lost, on_lost=seen.append)
    with pytest.raises(LostDeviceError):
        scorer.score([Query((records(3, 1),))])
    assert isinstance(seen[0], LostDeviceError)


def test_the_cpu_copies_nothing():
    device = CpuDevice()
    host = device.host_buffer((2, 3), torch.uint8)
    assert device.mirror(host) is host
    results, event = device.compute(lambda: (host,), device.upload([host], [host]))
    landed, _ = device.download(results, [torch.empty(0)], event)
    assert landed[0] is host


def test_settings_that_choose_other_kernels_are_in_the_numerics_and_no_others(monkeypatch):
    plain = CpuDevice().numerics
    assert set(plain) == {"device", "cpu", "isa", "threads"}
    for name in ("ONEDNN_VERBOSE", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MKL_CBWR", "")
    assert CpuDevice().numerics == plain
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert CpuDevice().numerics == {**plain, "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}


def test_a_wrong_precision_is_refused():
    with pytest.raises(devices.DeviceError, match="wanted one of float32"):
        open_device(None, precision="int8")


@pytest.mark.parametrize("dtype", ["u1", "f4", "f8", "?", "u2"])
def test_preprocessing_is_the_formula_and_leaves_the_records_alone(dtype):
    spec = InputSpec("x", np.dtype(dtype), (4, 6), (2, 3, 4), 0.5, (1.0, 2.0), (4.0, 8.0))
    given_ = (np.arange(48).reshape(2, 4, 6) % 2).astype(dtype)
    before = given_.copy()
    found = Preprocess(spec, torch.device("cpu"))(torch.from_numpy(given_)).numpy()
    mean, std = (np.array(v).reshape(1, 2, 1, 1) for v in (spec.mean, spec.std))
    np.testing.assert_allclose(found, (given_.reshape(2, 2, 3, 4).astype("f8") * 0.5 - mean) / std, rtol=1e-6)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(given_, before)


def test_integers_stay_integers_without_cast():
    spec = InputSpec("ids", np.dtype("i8"), (5,), (5,), cast=False)
    assert Preprocess(spec, torch.device("cpu"))(torch.zeros((2, 5), dtype=torch.int64)).dtype == torch.int64


def test_outputs_are_taken_by_order_or_by_name_and_checked():
    specs = [OutputSpec("a", np.dtype("f4"), (2,), softmax=True), OutputSpec("b", np.dtype("i8"), ())]
    a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[3]])
    for raw in ((a, b), [a, b], {"b": b, "a": a, "more": a}):
        first, second = collect(raw, specs, 1)
        assert first.tolist() == [[0.5, 0.5]]
        assert second.tolist() == [3]
    for raw in (a, (a,), {"a": a}, (a, 3), "x", (a, torch.zeros(2, 1)), (torch.zeros(1, 3), b)):
        with pytest.raises(ModelError, match="wanted"):
            collect(raw, specs, 1)


def test_bfloat16_is_a_choice_and_in_the_numerics():
    linear = torch.nn.Linear(WIDTH, WIDTH)
    runtime = SlotRuntime(linear, CpuDevice(), [INPUT], [OUTPUT], numerics={}, precision="bfloat16")
    slot, _ = runtime.prepare(B)
    slot.inputs[0][:] = 1
    with runtime.session():
        runtime.run(slot, 2)
        (found,) = slot.wait()
    assert found.shape == (2, WIDTH)
    assert runtime.numerics["precision"] == "bfloat16"
