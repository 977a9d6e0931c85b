"""A small convolutional model, packed once, and TorchServe contexts made of its real classes."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batch_handler import oip
from batch_handler.archive import PackRequest, pack
from batch_handler.counts import Counts
from batch_handler.draft import OutputDraft
from batch_handler.exchange import Exchange
from batch_handler.model import Model
from batch_handler.service import METRICS, Service
from batch_handler.shared import SharedMemory
from batch_handler.signature import InputSpec

ARCH = '''
import torch


class Fragile(torch.nn.Module):
    """Raises on a record whose first pixel is 13 and whose second is 7; otherwise passes pixels on."""

    def forward(self, pixels):
        first = (pixels[:, 0, 0, :2] * 255).round()
        bad = (first[:, 0] == 13) & (first[:, 1] == 7)
        if bool(bad.any()):
            raise ValueError("a record that this model does not like")
        return pixels


class Named(torch.nn.Sequential):
    """Gives its scores by name, beside what nobody wants."""

    def forward(self, pixels):
        return {"none": None, "whole": pixels.sum((1, 2, 3)), "scores": super().forward(pixels)}


def make_model():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    )


def make_fragile():
    return torch.nn.Sequential(Fragile(), *make_model())


def make_named():
    return Named(*make_model())
'''
IMAGE = InputSpec("image", np.dtype("u1"), (6, 6), (1, 6, 6), scale=1 / 255, mean=(0.3,), std=(0.5,))
MICRO_BATCH = 8


@pytest.fixture(scope="session")
def arch_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arch") / "tiny.py"
    path.write_text(ARCH)
    return path


@pytest.fixture(scope="session")
def tiny_module(arch_file: Path) -> torch.nn.Module:
    namespace: dict[str, Any] = {}
    exec(arch_file.read_text(), namespace)  # noqa: S102 - the text above
    torch.manual_seed(7)
    module: torch.nn.Module = namespace["make_model"]()
    return module.eval()


@pytest.fixture(scope="session")
def pack_request(
    tmp_path_factory: pytest.TempPathFactory, arch_file: Path, tiny_module: torch.nn.Module
) -> PackRequest:
    folder = tmp_path_factory.mktemp("packed")
    torch.save(tiny_module.state_dict(), folder / "tiny.pt")
    return PackRequest(
        model=folder / "tiny.pt",
        output=folder / "tiny.mar",
        name="tiny",
        version="1.2",
        inputs=(IMAGE,),
        outputs=(OutputDraft("scores", softmax=True),),
        arch=f"{arch_file}:make_model",
        model_config=b"minWorkers: 1\n",
        micro_batch=MICRO_BATCH,
    )


@pytest.fixture(scope="session")
def unpack(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Unzip an archive as TorchServe does."""

    def unzip(archive: Path) -> Path:
        folder = tmp_path_factory.mktemp("model")
        with zipfile.ZipFile(archive) as mar:
            mar.extractall(folder)
        return folder

    return unzip


@pytest.fixture(scope="session")
def tiny_dir(pack_request: PackRequest, unpack) -> Path:
    return unpack(pack(pack_request))


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> Model:
    return Model.open(tiny_dir)


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (50, 6, 6)).astype(np.uint8)


@pytest.fixture(scope="session")
def tiny_scores(tiny_module: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """What the model gives for the images, by torch alone."""
    values = torch.from_numpy(images)[:, None].float() / 255
    with torch.inference_mode():
        return torch.softmax(tiny_module((values - 0.3) / 0.5), -1).numpy()


class Counters:
    """What a worker's metrics cache is asked to count."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def add_counter(self, name: str, value: int, idx: Any = None, dimensions: Any = None) -> None:
        assert dimensions == []
        self.values[name] = self.values.get(name, 0) + value


@pytest.fixture
def make_context() -> Callable[..., Any]:
    with warnings.catch_warnings():
        # ts/__init__.py reads its version from a file that it leaves open.
        warnings.simplefilter("ignore", ResourceWarning)
        from ts.context import Context, RequestProcessor

    def make(directory: Path, *headers: Mapping[str, Any]) -> Any:
        context = Context("tiny", str(directory), None, len(headers), None, "0.12.0", metrics=Counters())
        context.request_processor = [RequestProcessor(dict(one)) for one in headers]
        context.request_ids = {index: str(index) for index in range(len(headers))}
        return context

    return make


@pytest.fixture
def memory(tmp_path):
    """A server's shared memory; that it is in memory is not what these tests are about."""
    folder = tmp_path / "memory"
    folder.mkdir(mode=0o700)
    return SharedMemory(folder)


@pytest.fixture
def ask(tiny, tiny_dir, make_context, memory):
    """Send messages as one server batch; each answer is its status and what it says."""

    def send(*messages, shared=memory, **headers):
        service = Service(tiny, Exchange(tiny, shared_memory=shared), Counts(METRICS, seconds=0))
        rows = [{"body": bytearray(message.join())} for message in messages]
        context = make_context(tiny_dir, *(
            {"content-type": "application/octet-stream", oip.HEADER_LENGTH: str(message.header_length), **headers}
            for message in messages))
        answers = []
        for index, body in enumerate(service.handle(rows, context)):
            status, given = context.get_response_status(index)[0], context.get_response_headers(index)
            if status == 200:
                length = given.get(oip.HEADER_LENGTH)
                reply = oip.decode_reply(body, None if length is None else int(length), max_tensor_bytes=1 << 24,
                                         shared=memory.read)
                answers.append((status, reply))
            else:
                answers.append((status, json.loads(body)["error"]))
        return answers

    return send
