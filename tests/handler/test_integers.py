"""Records of integers: who packs is told what the model gets, and how it gets integers."""

from __future__ import annotations

import pytest
import torch

from batch_client.cli import main

WORDS = """
import torch


def make_model():
    return torch.nn.Sequential(torch.nn.Embedding(7, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))


def make_linear():
    return torch.nn.Linear(4, 2)
"""
HINT = "; records become float32; cast = false in a --signature file keeps int64\n"


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
    code, said = packing("make_model", "--input", "x:int64:4")
    assert code == 65
    assert "the model raised RuntimeError on records of x [4]: " in said
    assert said.endswith(HINT)
    signature = tmp_path / "words.toml"
    signature.write_text('[[inputs]]\nname = "x"\ndtype = "int64"\nshape = [4]\ncast = false\n')
    code, said = packing("make_model", "--signature", str(signature))
    assert code == 0
    assert "takes x: int64 (4,)\n" in said


@pytest.mark.parametrize(("flags", "takes"), [
    (["--input", "x:int64:4"], "int64 (4,) (as float32 in the model)"),
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
