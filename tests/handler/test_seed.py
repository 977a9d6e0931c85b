"""The seed's trained model on real images: as right as it is in a notebook, and eval() not forgotten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from batch_handler.archive import PackRequest, pack
from batch_handler.draft import OutputDraft
from batch_handler.model import Model
from batch_handler.runtimes.protobuf import fields_of
from batch_handler.signature import InputSpec

SEED = Path(__file__).parents[3] / "shared" / "seed"

pytestmark = [
    pytest.mark.skipif(not (SEED / "fmnist.pyt").is_file(), reason="the seed's files are not on this machine"),
    # The model has Dropout2d behind a linear layer; torch warns at each forward, and it is not ours to change.
    pytest.mark.filterwarnings("ignore:dropout2d. Received a 2-D input:UserWarning"),
]


# Compiled packages are compared with their modules in test_engines and test_exactness: a compiler takes its time.
@pytest.mark.parametrize("runtime", ["eager", "torchscript", "onnx"])
def test_the_seed_model_is_right_1845_times(runtime, tmp_path, unpack):
    data = np.load(SEED / "fashion_mnist_2k.npz")
    request = PackRequest(
        model=SEED / "fmnist.pyt",
        output=tmp_path / "fmnist.mar",
        name="fmnist",
        inputs=(InputSpec("image", np.dtype("u1"), (28, 28), (1, 28, 28), 1 / 255),),
        outputs=(OutputDraft("scores", softmax=True),),
        model_config=b"",
        trust_pickle=True,
        runtime=runtime,
        golden={"image": data["images"][:4]},
    )
    model = Model.open(unpack(pack(request)))
    (scores,) = model.score_bulk([data["images"]])
    assert abs(int((scores.argmax(1) == data["labels"]).sum()) - 1845) <= 1
    module = torch.load(SEED / "fmnist.pyt", map_location="cpu", weights_only=False).eval()
    with torch.inference_mode():
        logits = module(torch.from_numpy(data["images"])[:, None].float() / 255)
        eager = torch.softmax(logits, -1).numpy()
    np.testing.assert_allclose(scores, eager, atol=1e-5)


def seed_graph(tmp_path, weights=None):
    """The seed's graph; `weights` in place of its own, which are another training's than those of fmnist.pyt."""
    content = (SEED / "fmnist.onnx").read_bytes()
    found = {}
    (graph,) = [value for number, value in fields_of(memoryview(content)) if number == 7]
    for initializer in (value for number, value in fields_of(graph) if number == 5):
        fields = list(fields_of(initializer))
        (name,) = [bytes(value).decode() for number, value in fields if number == 8]
        (raw,) = [bytes(value) for number, value in fields if number == 9]
        found[name] = np.frombuffer(raw, np.float32)
        if weights is not None:
            content = content.replace(raw, weights[name].numpy().tobytes())
    path = tmp_path / "graph.onnx"
    path.write_bytes(content)
    return path, found


@pytest.mark.parametrize(("own", "right"), [(True, 1843), (False, 1845)])
def test_the_seed_graph_gives_what_torch_gives_with_its_weights(own, right, tmp_path, unpack):
    data = np.load(SEED / "fashion_mnist_2k.npz")
    module = torch.load(SEED / "fmnist.pyt", map_location="cpu", weights_only=False).eval()
    path, found = seed_graph(tmp_path, None if own else module.state_dict())
    if own:
        # As shipped the two files agree in structure only: their weights are up to 0.54 apart.
        state = module.state_dict()
        assert set(found) == set(state)
        module.load_state_dict({name: torch.tensor(found[name]).reshape(state[name].shape) for name in state})
    request = PackRequest(
        model=path,
        output=tmp_path / "fmnist.mar",
        name="fmnist",
        inputs=(InputSpec("image", np.dtype("u1"), (28, 28), (1, 28, 28), 1 / 255),),
        outputs=(OutputDraft("scores", softmax=True),),
        model_config=b"",
    )
    (scores,) = Model.open(unpack(pack(request))).score_bulk([data["images"]])
    assert abs(int((scores.argmax(1) == data["labels"]).sum()) - right) <= 1
    with torch.inference_mode():
        eager = torch.softmax(module(torch.from_numpy(data["images"])[:, None].float() / 255), -1).numpy()
    np.testing.assert_allclose(scores, eager, atol=1e-5)
