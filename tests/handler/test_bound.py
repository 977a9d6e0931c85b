"""A graph that is bound to its micro-batch would fail each query: it is refused, and no other model is."""

from __future__ import annotations

import dataclasses
import re
import warnings

import pytest
import torch

from batch_handler import model as models
from batch_handler.archive import ArchiveError, pack
from batch_handler.model import Model, ModelLoadError, Tuning
from batch_handler.scoring import Query, Score

ARCH = """
import torch


class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(36, 3)

    def forward(self, x):
        return super().forward(x.reshape({records}, -1))
"""
REFUSED = re.escape(
    "the model takes 8 records at a time and fails on a query of 4, wanted runtime eager, or a module that takes any "
    "number: a trace keeps len(x), and not x.shape[0]: the model raised RuntimeError: "
)


@pytest.fixture
def packing(tmp_path, pack_request):
    torch.manual_seed(3)
    torch.save(torch.nn.Linear(36, 3).state_dict(), tmp_path / "w.pt")

    def request(records, **change):
        (tmp_path / "net.py").write_text(ARCH.format(records=records))
        change = {"model": tmp_path / "w.pt", "arch": f"{tmp_path}/net.py:Net", "outputs": (), **change}
        return dataclasses.replace(pack_request, output=tmp_path / "x.mar", **change)

    return request


def test_a_trace_that_is_bound_to_its_micro_batch_is_refused(packing, unpack, monkeypatch):
    with pytest.raises(ArchiveError, match=rf"^w\.pt: {REFUSED}"):
        pack(packing("len(x)", runtime="torchscript"))
    # What is served under another runtime than it was packed for, and what was packed before.
    directory = unpack(pack(packing("len(x)")))
    with pytest.raises(ModelLoadError, match=REFUSED):
        Model.open(directory, Tuning(runtime="torchscript"))
    Model.open(directory)
    monkeypatch.setattr(models, "_ROWS_SECONDS", 0.0)  # it is slower
    Model.open(directory, Tuning(runtime="torchscript"))


@pytest.mark.parametrize("count", [5, 6, 7])
def test_so_is_one_whose_golden_records_would_be_filled_up_to_a_micro_batch(count, packing, images):
    with pytest.raises(ArchiveError, match=REFUSED):
        pack(packing("len(x)", runtime="torchscript", golden={"image": images[:count]}))


@pytest.mark.parametrize("runtime", ["eager", "torchscript"])
@pytest.mark.parametrize(("micro_batch", "records"), [(3, 2), (8, 4)])
def test_so_is_one_that_takes_no_record_alone(runtime, micro_batch, records, packing, images, tmp_path):
    torch.save(torch.nn.Linear(36, 1).state_dict(), tmp_path / "one.pt")
    (tmp_path / "one.py").write_text(ARCH.format(records="x.shape[0]").replace("36, 3", "36, 1").replace(
        "-1))", "-1)).squeeze()"))
    request = packing("", model=tmp_path / "one.pt", arch=f"{tmp_path}/one.py:Net", runtime=runtime,
                      micro_batch=micro_batch, golden={"image": images[:records]})
    with pytest.raises(ArchiveError, match=re.escape(
        f"one.pt: the model takes {micro_batch} records at a time and fails on a query of 1, wanted a module that "
        "takes any number: x.squeeze() drops the axis of a single record, x.squeeze(-1) does not: output scores has "
        "shape [], wanted [1]")):
        pack(request)


def test_one_that_was_packed_for_bulk_runs_is_served_in_larger_micro_batches_too(packing, unpack, images, tmp_path):
    torch.save(torch.nn.Linear(36, 1).state_dict(), tmp_path / "one.pt")
    (tmp_path / "one.py").write_text(ARCH.format(records="x.shape[0]").replace("36, 3", "36, 1").replace(
        "-1))", "-1)).squeeze()"))
    directory = unpack(pack(packing("", model=tmp_path / "one.pt", arch=f"{tmp_path}/one.py:Net", micro_batch=4,
                                    golden={"image": images[:4]})))
    (score,) = Model.open(directory, Tuning(micro_batch=8)).score([Query((images[:8],), first_row=0)])
    assert isinstance(score, Score)


@pytest.mark.parametrize("records", ["x.shape[0]", "x.size(0)"])
def test_a_trace_that_takes_any_number_is_served(records, packing, unpack, images):
    opened = Model.open(unpack(pack(packing(records, runtime="torchscript"))))
    for count in (1, 3, 4, 8, 9):
        (score,) = opened.score([Query((images[:count],))])
        assert isinstance(score, Score)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
def test_so_is_one_with_as_many_golden_records_as_somebody_has(count, packing, images):
    assert pack(packing("x.shape[0]", runtime="torchscript", golden={"image": images[:count]})).is_file()


def test_a_graph_that_somebody_bound_is_served_to_bulk_requests_as_before(packing, images, tmp_path):
    """Its golden records are as many as it takes, so nobody packed it for queries."""
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3), torch.nn.Unflatten(0, (8, 1)),
                                 torch.nn.Flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: TorchScript is deprecated
        torch.jit.save(torch.jit.trace(module, torch.zeros(8, 1, 6, 6)), tmp_path / "m.ts")
    assert pack(packing("len(x)", model=tmp_path / "m.ts", arch=None, golden={"image": images[:8]})).is_file()
