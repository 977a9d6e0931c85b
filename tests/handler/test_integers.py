"""Records of integers: who packs is told what the model gets, and how it gets integers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from batch_client.cli import main
from batch_handler.archive import read_description
from batch_handler.draft import parse_signature
from batch_handler.model import Model
from batch_handler.signature import InputSpec
from support.onnx_files import model, node, value_info

WORDS = """
import torch


def make_model():
    return torch.nn.Sequential(torch.nn.Embedding(7, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))


def make_linear():
    return torch.nn.Linear(4, 2)


class Rest(torch.nn.Module):
    def forward(self, x):
        return torch.remainder(x.long(), 1009)


class Padded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.words = torch.nn.Embedding(9, 8, padding_idx=0)
        self.encoder = torch.nn.TransformerEncoder(layer, 1)

    def forward(self, x):
        return self.encoder(self.words(x), src_key_padding_mask=x == 0)[:, 0]


def make_rest():
    return Rest()
"""
HINT = "; records become float32; cast = false in a --signature file keeps int64\n"
FLOATS_HINT = ("; the model gets int64 as it travels: --scale 1, or cast = true in a --signature file, makes it float32"
               "\n")
LARGE = 2**40 + np.arange(8).reshape(2, 4)  # float32 holds none of them but the first


@pytest.fixture
def packing(tmp_path, capfd):
    """A function that packs what a callable makes: the exit code and what was said."""
    (tmp_path / "words.py").write_text(WORDS)
    namespace = {}
    exec(WORDS, namespace)  # noqa: S102 - the text above

    def run(name, *flags):
        torch.save(namespace[name]().state_dict(), tmp_path / "w.pt")
        code = main(["pack", str(tmp_path / "w.pt"), "--arch", f"{tmp_path}/words.py:{name}",
                     "-o", str(tmp_path / "w.mar"), *flags])
        return code, capfd.readouterr().err

    return run


def test_a_model_that_wants_integers_and_got_floats_says_how_to_keep_them(packing, tmp_path):
    signature = tmp_path / "words.toml"
    signature.write_text('[[inputs]]\nname = "x"\ndtype = "int64"\nshape = [4]\ncast = true\n')
    code, said = packing("make_model", "--signature", str(signature))
    assert code == 65
    assert "the model raised RuntimeError on records of x [4]: " in said
    assert said.endswith(HINT)
    code, said = packing("make_model", "--input", "x:int64:4")
    assert code == 0
    assert "takes x: int64 (4,)\n" in said


def test_a_model_that_wants_floats_and_got_integers_says_how_to_get_them(packing):
    code, said = packing("make_linear", "--input", "x:int64:4")
    assert code == 65
    assert said.endswith(FLOATS_HINT)
    code, said = packing("make_linear", "--input", "x:int64:4", "--scale", "1")
    assert code == 0
    assert "takes x: int64 (4,) (as float32 in the model)\n" in said


@pytest.mark.parametrize("cast", ["true", "false"])
def test_indices_of_a_kind_that_no_table_takes_are_told_which_one_to_pack(cast, packing, tmp_path):
    signature = tmp_path / "words.toml"
    signature.write_text(f'[[inputs]]\nname = "x"\ndtype = "int16"\nshape = [4]\ncast = {cast}\n')
    code, said = packing("make_model", "--signature", str(signature))
    assert code == 65
    assert said.endswith("; indices, such as of words, are packed as int64 (--input NAME:int64:SHAPE): runs send these "
                         "so, too\n")
    assert packing("make_model", "--input", "x:int64:4")[0] == 0


def test_an_index_that_a_table_lacks_is_no_matter_of_floats(packing, tmp_path):
    np.save(tmp_path / "golden.npy", np.full((2, 4), 7))
    code, said = packing("make_model", "--golden", str(tmp_path / "golden.npy"))
    assert code == 65
    assert said.endswith("index out of range in self\n")


@pytest.mark.parametrize("runtime", ["eager", "torchscript", "onnx"])
def test_large_integers_reach_the_model_as_they_are(runtime, packing, tmp_path, unpack):
    np.save(tmp_path / "golden.npy", LARGE)
    code, _ = packing("make_rest", "--golden", str(tmp_path / "golden.npy"), "--runtime", runtime)
    assert code == 0
    (rests,) = Model.open(unpack(tmp_path / "w.mar")).score_bulk([LARGE])
    np.testing.assert_array_equal(rests, LARGE % 1009)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's, of its own encoder
@pytest.mark.parametrize(("runtime", "said"), [
    ("eager", "non-zero numel (given a micro-batch of zeros, with which free places are filled)\n"),
    ("torchscript", "w.pt: the module can't be traced with a micro-batch of zeros, wanted one that can or runtime "),
])
def test_a_model_that_takes_no_zeros_is_told_of_them(runtime, said, packing, tmp_path):
    np.save(tmp_path / "golden.npy", np.arange(1, 9).reshape(2, 4))
    code, found = packing("Padded", "--golden", str(tmp_path / "golden.npy"), "--runtime", runtime)
    assert code == 65
    assert said in found


@pytest.mark.parametrize(("said", "is_cast"), [
    ('dtype = "int64"', False), ('dtype = "uint32"', False), ('dtype = "int16"', True), ('dtype = "bool"', True),
    ('dtype = "float64"', True), ('dtype = "int64"\ncast = true', True), ('dtype = "int32"\nscale = 1.0', True),
    ('dtype = "int32"\nmean = [0.5]', True), ('dtype = "int32"\nstd = [0.5]', True),
])
def test_integers_that_float32_would_round_are_not_cast_unasked(said, is_cast):
    (spec,) = parse_signature(f'[[inputs]]\nname = "x"\nshape = [4]\n{said}\n').inputs
    assert spec.cast == is_cast


def test_an_archive_that_says_nothing_of_casts_casts(pack_request):
    described = dataclasses.replace(pack_request.inputs[0], dtype=np.dtype("i8")).to_json()
    assert "cast" not in described
    assert InputSpec.from_json(described).cast


def test_a_graph_of_floats_takes_integers_where_that_is_asked_for(tmp_path, capfd):
    path = tmp_path / "m.onnx"
    path.write_bytes(model([node("Abs", ["x"], ["y"])], [value_info("x", ["n", 4], 1)], [value_info("y", ["n", 4], 1)]))
    flags = ["pack", str(path), "-o", str(tmp_path / "m.mar"), "--input", "x:int64:4", "--output-name", "y"]
    assert main(flags) == 65
    assert capfd.readouterr().err.endswith(FLOATS_HINT)
    assert main([*flags, "--scale", "1"]) == 0
    assert read_description(tmp_path / "m.mar").inputs[0].cast


@pytest.mark.parametrize(("flags", "takes"), [
    (["--input", "x:int16:4"], "int16 (4,) (as float32 in the model)"),
    (["--input", "x:uint8:4", "--scale", "1/255"], "uint8 (4,) (as float32 in the model)"),
    (["--input", "x:float32:4"], "float32 (4,)"),
])
def test_what_records_become_is_said_where_they_change(flags, takes, packing):
    code, said = packing("make_linear", *flags)
    assert code == 0
    assert f"takes x: {takes}\n" in said


@pytest.mark.parametrize(("flags", "noted"), [
    (["--input", "x:uint8:4"], True),
    (["--input", "x:uint8:4", "--scale", "1/255"], False),
    (["--input", "x:int16:4"], False),
    (["--input", "x:float32:4"], False),
])
def test_bytes_that_nothing_scales_are_told_of(flags, noted, packing):
    code, said = packing("make_linear", *flags)
    assert code == 0
    note = ("note: x's values 0 to 255 reach the model as they are: where it was trained on 0 to 1, pack with "
            "--scale 1/255 (scale in a --signature file)\n")
    assert (note in said) == noted


@pytest.mark.parametrize("flags", [["--input", "x:float32:5"], ["--input", "x:uint8:5", "--scale", "1/255"]])
def test_where_nothing_else_could_be_wanted_nothing_is_said_of_it(flags, packing):
    code, said = packing("make_linear", *flags)
    assert code == 65
    assert "cast" not in said
