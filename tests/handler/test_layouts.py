"""The layout of weights: channels_last where a module bears it, and as it was written where it does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from batch_handler.archive import pack
from batch_handler.model import Model
from batch_handler.signature import InputSpec

# LeNet as PyTorch's tutorial has it, a parameter that is looked at in another shape, and a kernel of 1 by 1, whose
# weights are in both layouts at once.
ARCH = """
import torch
from torch.nn import functional as F


class LeNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(1, 6, 5), torch.nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = torch.nn.Linear(400, 84), torch.nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.view(-1, 400))))


class Placed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.pos = torch.nn.Parameter(torch.arange(32.0).view(1, 2, 4, 4) / 32)

    def forward(self, x):
        return self.conv(x).flatten(1)[:, :32] + self.pos.view(1, 32)


class Pointwise(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 1))

    def forward(self, x):
        return self.conv(x).view(x.shape[0], -1)[:, :32]


class Supple(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.conv(x).flatten(1)[:, :32]
"""
IMAGE = InputSpec("image", np.dtype("u1"), (32, 32), (1, 32, 32), scale=1 / 255)


@pytest.fixture(params=["LeNet", "Placed", "Pointwise", "Supple"])
def made(request, tmp_path, pack_request):
    """A module, and what packs its weights."""
    source = tmp_path / "nets.py"
    source.write_text(ARCH)
    namespace = {"__name__": "nets"}
    exec(ARCH, namespace)  # noqa: S102 - the text above
    torch.manual_seed(5)
    module = namespace[request.param]().eval()
    torch.save(module.state_dict(), tmp_path / "net.pt")
    return module, dataclasses.replace(pack_request, model=tmp_path / "net.pt", output=tmp_path / "net.mar",
                                       arch=f"{source}:{request.param}", inputs=(IMAGE,), outputs=())


def wanted_of(module, images):
    with torch.inference_mode():
        return module(torch.from_numpy(images)[:, None].float() / 255).numpy()


def layout_of(module):
    return "channels_last" if type(module).__name__ == "Supple" else "contiguous"


@pytest.fixture
def pictures():
    return np.random.default_rng(3).integers(0, 256, (20, 32, 32)).astype(np.uint8)


@pytest.mark.parametrize("runtime", ["eager", "torchscript"])
def test_a_module_that_does_not_bear_channels_last_is_served_as_it_was_written(
    runtime, made, unpack, pictures
):
    module, request = made
    directory = unpack(pack(dataclasses.replace(request, runtime=runtime)))
    first, second = Model.open(directory), Model.open(directory)
    assert first.numerics["layout"] == second.numerics["layout"] == layout_of(module)
    np.testing.assert_allclose(first.score_bulk([pictures])[0], wanted_of(module, pictures), atol=1e-5)


def test_the_module_that_is_served_has_seen_no_record_before(pack_request, unpack, tmp_path, pictures):
    """It may keep what it sees first, such as how many records there are."""
    (tmp_path / "nets.py").write_text(f"""{ARCH}

class Keeps(Supple):
    records = None

    def forward(self, x):
        self.records = self.records or len(x)
        if self.records != 8 and len(x) == 8:
            raise ValueError("another number of records at first")
        return super().forward(x)
""")
    namespace = {"__name__": "nets"}
    exec(ARCH, namespace)  # noqa: S102 - the text above
    module = namespace["Supple"]().eval()
    torch.save(module.state_dict(), tmp_path / "net.pt")
    directory = unpack(pack(dataclasses.replace(
        pack_request, model=tmp_path / "net.pt", output=tmp_path / "net.mar", arch=f"{tmp_path / 'nets.py'}:Keeps",
        inputs=(IMAGE,), outputs=(), micro_batch=8)))
    np.testing.assert_allclose(Model.open(directory).score_bulk([pictures])[0], wanted_of(module, pictures), atol=1e-5)


@pytest.mark.parametrize("runtime", ["eager", "torchscript"])
def test_so_is_the_program_of_one(runtime, made, unpack, pictures, tmp_path):
    module, request = made
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(5, 1, 32, 32),)), path)
    directory = unpack(pack(dataclasses.replace(
        request, model=path, arch=None, trust_pickle=True, runtime=runtime, micro_batch=None)))
    opened = Model.open(directory)
    assert opened.numerics["layout"] == layout_of(module)
    np.testing.assert_allclose(opened.score_bulk([pictures])[0], wanted_of(module, pictures), atol=1e-5)


def test_memory_that_is_full_says_nothing_of_the_layout(made, unpack, monkeypatch):
    module, request = made
    directory = unpack(pack(request))
    real, calls = torch.nn.Module.__call__, []

    def full(self, *inputs):
        # Once: a module that is taken for one that does not bear the layout would be served in the other.
        if type(self).__name__ == type(module).__name__ and not calls:
            calls.append(self)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *inputs)

    monkeypatch.setattr(torch.nn.Module, "__call__", full)
    with pytest.raises(RuntimeError, match="memory is full"):
        Model.open(directory)
