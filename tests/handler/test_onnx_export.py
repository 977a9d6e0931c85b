"""`pack --runtime onnx`: modules of many kinds as graphs that give what they gave, and what can't be one."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch

from batch_handler.archive import ArchiveError, pack, read_description
from batch_handler.draft import OutputDraft
from batch_handler.model import Model, ModelLoadError, Tuning
from batch_handler.signature import InputSpec


class Several(torch.nn.Module):
    """Gives a mapping, in another order than anybody asks for, with more in it than tensors."""

    def forward(self, images, weights):
        total = (images * weights[:, None]).sum(1)
        return {"total": total, "notes": ["none"], "doubled": images * 2, "shape": images.shape[1]}


class Bound(torch.nn.Module):
    """A module whose code knows how many records it gets."""

    def forward(self, values):
        return values.reshape(8, 6).cumsum(1)


class Counting(torch.nn.Module):
    """A module that does another thing with few records: a graph says one of both."""

    def forward(self, values):
        return values * 2 if values.shape[0] > 5 else values


class Halved(torch.nn.Module):
    """Gives what numpy can't hold, under a name that its graph has for something else."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 2)

    def forward(self, values):
        return (self.layer(values) * 2).to(torch.bfloat16)


class Untranslated(torch.nn.Module):
    """Has an operation that ONNX has no words for."""

    def forward(self, values):
        return torch.linalg.eigvalsh(values.reshape(-1, 6, 1) @ values.reshape(-1, 1, 6))


OWN_CODE = """
import torch


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(36, 3)

    def forward(self, images):
        return self.layer(torch.relu(images.flatten(1)))
"""


class Branching(torch.nn.Module):
    """What its records are decides what is computed: no graph can say that."""

    def forward(self, values):
        return values * 2 if values.sum() > 0 else values


FLAT = (InputSpec("values", np.dtype("f4"), (6,), (6,)),)


def pickled(request, module, folder, **change):
    torch.save(module, folder / "whole.pt")
    return dataclasses.replace(
        request, model=folder / "whole.pt", arch=None, output=folder / "x.mar", trust_pickle=True,
        **{"inputs": FLAT, "outputs": (), "runtime": "onnx", **change},
    )


def test_a_module_becomes_a_graph_and_runs_like_before(pack_request, tiny, tmp_path, unpack, images):
    request = dataclasses.replace(pack_request, runtime="onnx", output=tmp_path / "first.mar")
    packed = pack(request)
    described = read_description(packed)
    assert (described.runtime, described.weights.kind, described.weights.arch) == ("onnx", "onnx", None)
    # The weights are inside the graph, and nobody's code is needed.
    assert set(described.files) == {"model.onnx", "golden.npz"}
    (wanted,) = tiny.score_bulk([images])
    for micro_batch in (1, 3, 8):
        opened = Model.open(unpack(packed), Tuning(micro_batch=micro_batch))
        assert opened.numerics["runtime"] == "onnx"
        np.testing.assert_allclose(opened.score_bulk([images])[0], wanted, atol=1e-5)


def test_a_graph_says_nothing_of_where_it_was_made(pack_request, tmp_path, unpack):
    # Of a copy of this file in a folder of another name each time.
    (tmp_path / "own.py").write_text(OWN_CODE)
    torch.save({"layer.weight": torch.ones(3, 36), "layer.bias": torch.ones(3)}, tmp_path / "own.pt")
    first, second = (
        pack(dataclasses.replace(pack_request, model=tmp_path / "own.pt", arch=f"{tmp_path}/own.py:Own",
                                 runtime="onnx", output=tmp_path / f"{name}.mar"))
        for name in ("first", "second")
    )
    assert first.read_bytes() == second.read_bytes()
    graph = (unpack(first) / "model.onnx").read_bytes()
    assert b"forward" not in graph
    assert b".py" not in graph


def test_micro_batches_of_one_do_not_bind_a_graph_to_one(pack_request, tmp_path, unpack, images):
    packed = pack(dataclasses.replace(pack_request, runtime="onnx", micro_batch=1, output=tmp_path / "x.mar"))
    for micro_batch in (1, 4):
        opened = Model.open(unpack(packed), Tuning(micro_batch=micro_batch))
        assert opened.score_bulk([images])[0].shape == (len(images), 3)


def test_outputs_are_found_by_name_whatever_else_a_module_gives(pack_request, tmp_path, unpack):
    inputs = (InputSpec("images", np.dtype("f4"), (4,), (4,)), InputSpec("weights", np.dtype("f4"), (), ()))
    outputs = (OutputDraft("doubled"), OutputDraft("total"))
    packed = pack(pickled(pack_request, Several(), tmp_path, inputs=inputs, outputs=outputs))
    records = np.arange(20, dtype=np.float32).reshape(5, 4)
    doubled, total = Model.open(unpack(packed)).score_bulk([records, np.arange(5, dtype=np.float32)])
    np.testing.assert_array_equal(doubled, records * 2)
    np.testing.assert_array_equal(total, records.sum(1) * np.arange(5))


def test_a_module_that_is_bound_to_a_number_of_records_gets_that_many(pack_request, tmp_path, unpack):
    golden = {"values": np.ones((8, 6), np.float32)}
    packed = pack(pickled(pack_request, Bound(), tmp_path, micro_batch=8, golden=golden))
    records = np.arange(30, dtype=np.float32).reshape(5, 6)
    opened = Model.open(unpack(packed))
    np.testing.assert_array_equal(opened.score_bulk([records])[0], records.cumsum(1))
    with pytest.raises(ModelLoadError, match="takes 8 records at a time"):
        Model.open(unpack(packed), Tuning(micro_batch=4))


def test_a_graph_that_is_right_for_some_numbers_of_records_is_bound_to_one(pack_request, tmp_path, unpack):
    golden = {"values": np.ones((8, 6), np.float32)}
    packed = pack(pickled(pack_request, Counting(), tmp_path, micro_batch=8, golden=golden))
    with pytest.raises(ModelLoadError, match="takes 8 records at a time"):
        Model.open(unpack(packed), Tuning(micro_batch=4))


def test_outputs_may_be_bfloat16_and_have_names_of_the_graph(pack_request, tmp_path, unpack):
    torch.manual_seed(3)
    module, records = Halved(), np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6)
    packed = pack(pickled(pack_request, module, tmp_path, outputs=(OutputDraft("linear"),)))
    opened = Model.open(unpack(packed))
    assert read_description(packed).outputs[0].dtype == np.float32
    with torch.inference_mode():
        wanted = module(torch.from_numpy(records)).float().numpy()
    # One step of bfloat16, which has 8 bits.
    np.testing.assert_allclose(opened.score_bulk([records])[0], wanted, rtol=2**-7)


@pytest.mark.parametrize(("runtime", "module", "message"), [
    ("onnx", Branching(), "the module can't be exported, wanted another runtime: "),
    ("aot", Branching(), "the module can't be exported, wanted another runtime: "),
    ("onnx", Untranslated(), "can't be exported as ONNX, wanted another runtime: .*_linalg_eigh"),
])
def test_a_module_that_is_no_graph_is_refused_in_one_line(runtime, module, message, pack_request, tmp_path, capfd):
    with pytest.raises(ArchiveError, match=message) as caught:
        pack(pickled(pack_request, module, tmp_path, runtime=runtime))
    # torch itself writes dozens of lines.
    assert capfd.readouterr() == ("", "")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "x.mar").exists()


def test_more_weights_than_onnx_can_hold_are_refused_before_anything_is_made(pack_request, tmp_path, monkeypatch):
    monkeypatch.setattr("batch_handler.runtimes.onnx_export.MAX_BYTES", 100)
    with pytest.raises(ArchiveError, match="has 940 bytes of weights, wanted at most 100, the most that ONNX can hold"):
        pack(dataclasses.replace(pack_request, runtime="onnx", output=tmp_path / "x.mar"))


@pytest.mark.parametrize("absent", ["onnx_ir", "onnxscript"])
def test_without_the_exporter_one_line_says_what_to_install(absent, pack_request, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ArchiveError, match=rf'exporting as ONNX needs {absent}: pip install "batch-client\[onnx\]"'):
        pack(dataclasses.replace(pack_request, runtime="onnx", output=tmp_path / "x.mar"))


class Pair(torch.nn.Module):
    def forward(self, values):
        return {"half": values.mean(1), "whole": values.sum(1)}


def test_of_the_outputs_of_a_graph_one_may_be_taken_by_its_name(pack_request, tmp_path, unpack):
    graph = unpack(pack(pickled(pack_request, Pair(), tmp_path))) / "model.onnx"
    request = dataclasses.replace(pack_request, model=graph, arch=None, inputs=(), output=tmp_path / "one.mar")
    with pytest.raises(ArchiveError, match=r"outputs \['half', 'whole'\], wanted scores: name one of them with --"):
        pack(dataclasses.replace(request, outputs=(OutputDraft("scores"),)))
    opened = Model.open(unpack(pack(dataclasses.replace(request, outputs=(OutputDraft("whole"),)))))
    values = np.arange(12, dtype="f4").reshape(2, 6)
    np.testing.assert_allclose(opened.score_bulk([values])[0], values.sum(1), rtol=1e-6)
    # Named as the graph does not: in the graph's order.
    two = pack(dataclasses.replace(request, outputs=(OutputDraft("a"), OutputDraft("b"))))
    assert [spec.name for spec in read_description(two).outputs] == ["a", "b"]
