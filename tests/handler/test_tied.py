"""Weights that a module has under several names, once in a safetensors file or under each name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model

from batch_handler.archive import ArchiveError, pack
from batch_handler.model import Model
from batch_handler.signature import InputSpec

ARCH = """
import torch


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = torch.nn.Embedding(7, 5), torch.nn.Linear(5, 7)
        self.layer.weight = self.table.weight
        self.register_buffer("rows", self.table.weight.detach()[2:4])

    def forward(self, words):
        return self.layer(self.table(words)[:, 0]) + self.rows.sum()


class Apart(torch.nn.Module):
    def __init__(self):
        super().__init__()
        memory = torch.zeros(10)
        self.left, self.right = torch.nn.Parameter(memory[:5]), torch.nn.Parameter(memory[5:])
        self.empty = torch.nn.Parameter(torch.zeros(0))

    def forward(self, words):
        return words + self.left.sum() + self.right.sum()
"""
RECORD = InputSpec("words", np.dtype("i8"), (1,), (1,), cast=False)


@pytest.fixture
def made(tmp_path, pack_request):
    """A function from a class to a module of it, and what packs m.safetensors with it."""
    (tmp_path / "tied.py").write_text(ARCH)
    namespace = {"__name__": "tied"}
    exec(ARCH, namespace)  # noqa: S102 - the text above

    def make(name):
        torch.manual_seed(4)
        return namespace[name]().eval(), dataclasses.replace(
            pack_request, model=tmp_path / "m.safetensors", output=tmp_path / "m.mar", inputs=(RECORD,), outputs=(),
            arch=f"{tmp_path}/tied.py:{name}")

    return make


@pytest.mark.parametrize("once", [True, False])
def test_tied_weights_are_taken_once_or_under_each_name(once, made, unpack):
    module, request = made("Tied")
    if once:
        save_model(module, request.model)
    else:
        save_file({name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()}, request.model)
    words = np.arange(7)[:, None]
    with torch.inference_mode():
        wanted = module(torch.from_numpy(words)).numpy()
    scored = Model.open(unpack(pack(request))).score_bulk([words])[0]
    np.testing.assert_allclose(scored, wanted, atol=1e-5)


@pytest.mark.parametrize(("name", "kept", "missing"), [
    ("Tied", ["table.weight", "layer.weight"], '"layer.bias"'),
    ("Apart", ["left", "empty"], '"right"'),
    ("Apart", ["left", "right"], '"empty"'),
])
def test_what_is_really_missing_is_named(name, kept, missing, made):
    module, request = made(name)
    save_file({key: module.state_dict()[key].clone() for key in kept}, request.model)
    with pytest.raises(ArchiveError, match=rf"fit .*:{name}: .*Missing key\(s\) in state_dict: {missing}\. *$"):
        pack(request)
