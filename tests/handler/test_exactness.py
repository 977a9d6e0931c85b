"""A bulk record's bits depend on its place, the model and the fingerprint; on nobody else's records."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_handler.archive import pack
from batch_handler.draft import OutputDraft
from batch_handler.model import Model, Tuning
from batch_handler.oip import STATUS_NOT_FINITE, STATUS_OK
from batch_handler.runtimes.device import CpuDevice
from batch_handler.scoring import Query
from batch_handler.signature import InputSpec

WIDE = InputSpec("image", np.dtype("f4"), (6, 6), (1, 6, 6))
HOSTILE = [np.nan, np.inf, -np.inf, 3e38, -3e38]


class _Unstacked(CpuDevice):
    stack_bytes = 0


@pytest.fixture(scope="module", params=["eager", "torchscript", "aot", "onnx"])
def floats_dir(request, pack_request, unpack, tmp_path_factory):
    """The tiny model on raw floats, so that NaN and infinities get in."""
    folder = tmp_path_factory.mktemp("floats")
    change = {"inputs": (WIDE,), "output": folder / "floats.mar", "runtime": request.param, "micro_batch": 16}
    return unpack(pack(dataclasses.replace(pack_request, **change)))


@pytest.fixture(scope="module")
def floats(floats_dir):
    return Model.open(floats_dir)


@pytest.fixture(scope="module")
def values():
    return np.random.default_rng(5).normal(size=(48, 6, 6)).astype(np.float32)


def bits(array):
    return array.view(np.uint32)


def test_hostile_neighbours_change_no_bit_of_a_record(floats, values):
    clean = floats.score_bulk([values])[0]
    for poison in HOSTILE:
        spoilt = values.copy()
        spoilt[1::2] = poison
        found = floats.score_bulk([spoilt])[0]
        np.testing.assert_array_equal(bits(found[::2]), bits(clean[::2]))


def test_online_requests_beside_a_bulk_request_change_no_bit(floats, values):
    clean = floats.score_bulk([values])[0]
    noise = np.full((7, 6, 6), np.inf, np.float32)
    answers = floats.score([Query((noise,)), Query((values,), 0), Query((noise,)), Query((values[:5],), 0)])
    np.testing.assert_array_equal(bits(answers[1].outputs[0]), bits(clean))
    np.testing.assert_array_equal(bits(answers[3].outputs[0]), bits(clean[:5]))


def test_stacks_change_no_bit(floats_dir, floats, values):
    alone = Model.open(floats_dir, device=_Unstacked())
    for count, first in ((48, 0), (48, 5), (33, 15), (16, 0)):
        stacked, single = (model.score_bulk([values[:count]], first)[0] for model in (floats, alone))
        np.testing.assert_array_equal(bits(stacked), bits(single))


def test_bits_do_not_depend_on_how_a_run_is_cut(floats, values):
    clean = floats.score_bulk([values])[0]
    for cut in (1, 7, 16, 33):
        parts = [floats.score_bulk([values[a : a + cut]], a)[0] for a in range(0, len(values), cut)]
        np.testing.assert_array_equal(bits(np.concatenate(parts)), bits(clean))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    begin=st.integers(0, 40),
    count=st.integers(1, 40),
    before=st.lists(st.integers(1, 20), max_size=2),
    noise=st.sampled_from(HOSTILE),
)
def test_bits_are_a_function_of_the_place_alone(floats, values, begin, count, before, noise):
    # Whatever range is asked for, after and beside whatever else: what the slots held before must not show.
    clean = floats.score_bulk([values])[0]
    mine = values[begin : begin + count]
    others = [Query((np.full((records, 6, 6), noise, np.float32),)) for records in before]
    found = floats.score([*others, Query((mine,), begin)])[-1].outputs[0]
    np.testing.assert_array_equal(bits(found), bits(clean[begin : begin + count]))


def test_a_restarted_worker_gives_the_same_bits(tiny_dir, tiny, images):
    again = Model.open(tiny_dir)
    assert again.fingerprint == tiny.fingerprint
    np.testing.assert_array_equal(bits(again.score_bulk([images])[0]), bits(tiny.score_bulk([images])[0]))


COUPLED = (
    "import torch\n"
    "class Coupled(torch.nn.Module):\n"
    "    def forward(self, x):\n"
    "        return x.flatten(1)[:, :3] + x.mean()\n"
    "def make_model():\n    return Coupled()\n"
)


@pytest.fixture(scope="module")
def coupled(pack_request, unpack, tmp_path_factory):
    """A model whose rows touch each other plainly, as an unlucky kernel's do in the last bit."""
    folder = tmp_path_factory.mktemp("coupled")
    (folder / "coupled.py").write_text(COUPLED)
    torch.save({}, folder / "none.pt")
    request = dataclasses.replace(
        pack_request,
        model=folder / "none.pt",
        arch=f"{folder / 'coupled.py'}:make_model",
        inputs=(WIDE,),
        outputs=(OutputDraft("scores"),),
        output=folder / "coupled.mar",
        # As many as there are golden records: rows that touch each other make their outputs depend on that.
        micro_batch=4,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "_check_rows", lambda *_: None)  # which refuses such a model
        return Model.open(unpack(pack(request)))


def neighbours_change_bits(score) -> bool:
    """Whether a request of 8 records gets other bits beside other requests than alone."""
    mine = np.random.default_rng(0).random((8, 6, 6)).astype(np.float32)
    other = np.full((3, 6, 6), 5, np.float32)
    alone = score([mine])[0]
    beside = score([other, mine, other])[1]
    return not np.array_equal(bits(alone), bits(beside))


def test_bulk_requests_of_a_coupling_model_do_not_see_each_other(coupled):
    def bulk(requests):
        return [score.outputs[0] for score in coupled.score([Query((r,), 0) for r in requests])]

    assert not neighbours_change_bits(bulk)


def test_the_same_check_catches_a_handler_that_computes_whatever_batch_it_gets(coupled):
    def naive(requests):
        batch = torch.from_numpy(np.concatenate(requests))[:, None]
        scores = (batch.flatten(1)[:, :3] + batch.mean()).numpy()
        return np.split(scores, np.cumsum([len(r) for r in requests])[:-1])

    def online(requests):
        return [score.outputs[0] for score in coupled.score([Query((r,)) for r in requests])]

    assert neighbours_change_bits(naive)
    # Online requests share micro-batches; that is what bulk requests are for.
    assert neighbours_change_bits(online)


def test_status_tells_which_records_are_not_finite(floats, values):
    spoilt = values[:5].copy()
    spoilt[2] = np.nan
    (score,) = floats.score([Query((spoilt,), 0)])
    assert score.status.dtype == np.uint8
    finite = np.isfinite(score.outputs[0]).all(axis=1)
    np.testing.assert_array_equal(score.status, np.where(finite, STATUS_OK, STATUS_NOT_FINITE))
    # Optimised graphs fuse convolution and ReLU into a kernel that may turn NaN into 0.
    if floats.description.runtime == "eager":
        assert score.status.tolist() == [STATUS_OK, STATUS_OK, STATUS_NOT_FINITE, STATUS_OK, STATUS_OK]


def test_micro_batch_and_threads_are_in_the_fingerprint_and_not_in_the_digest(tiny_dir, tiny):
    other = Model.open(tiny_dir, Tuning(micro_batch=4))
    assert other.micro_batch == 4
    assert other.digest == tiny.digest
    assert other.fingerprint != tiny.fingerprint
    assert len(tiny.fingerprint) == 16


THRIFTY = """
import torch


class Thrifty(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = torch.empty(64, 6, 6)

    def forward(self, images):
        images.sub_(0.5).div_(0.25)
        return torch.mul(images[:, 0], 2, out=self.kept[: len(images)])
"""


@pytest.mark.parametrize("buffer", ["self.kept", "torch.empty(64, 6, 6)"])
def test_a_model_that_changes_its_input_in_place_is_right_from_the_first_stack_on(
    buffer, pack_request, tmp_path, unpack
):
    (tmp_path / "thrifty.py").write_text(THRIFTY.replace("out=self.kept", f"out={buffer}"))
    torch.save({}, tmp_path / "m.pt")
    values = np.random.default_rng(5).random((64, 6, 6), np.float32)
    change = {"arch": f"{tmp_path}/thrifty.py:Thrifty", "model": tmp_path / "m.pt", "output": tmp_path / "x.mar",
              "inputs": (WIDE,), "outputs": (), "micro_batch": 16}
    directory = unpack(pack(dataclasses.replace(pack_request, **change)))
    with np.load(directory / "golden.npz") as golden:
        np.testing.assert_array_equal(golden["output.scores"], (golden["input.image"] - 0.5) / 0.25 * 2)
    opened = Model.open(directory)
    for _ in range(2):
        np.testing.assert_array_equal(opened.score_bulk([values])[0], (values - 0.5) / 0.25 * 2)
