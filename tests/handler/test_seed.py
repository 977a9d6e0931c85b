"""The seed's trained model on real images: as right as it is in a notebook, and eval() not forgotten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from batch_handler.archive import PackRequest, pack
from batch_handler.model import Model
from batch_handler.signature import InputSpec, OutputDraft

SEED = Path(__file__).parents[3] / "shared" / "seed"

pytestmark = [
    pytest.mark.skipif(not (SEED / "fmnist.pyt").is_file(), reason="the seed's files are not on this machine"),
    # The model has Dropout2d behind a linear layer; torch warns at each forward, and it is not ours to change.
    pytest.mark.filterwarnings("ignore:dropout2d. Received a 2-D input:UserWarning"),
]


@pytest.mark.parametrize("runtime", ["eager", "torchscript"])
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
