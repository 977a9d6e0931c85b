"""What one request can take of a worker that others wait for is bounded, and refused before the work."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from batch_handler import content, oip
from batch_handler.oip import InferRequest, OipError, Tensor, TensorSpec


@pytest.mark.parametrize("letter", ["a", "\0", "\U0001f600"], ids=["plain", "six bytes", "twelve bytes"])
def test_an_id_is_repeated_up_to_a_thousand_characters(ask, letter):
    """The replies of a server batch are one message, which Java reads again and again while it grows."""
    asked = [oip.encode_request(InferRequest(letter * length, (Tensor("image", np.zeros((1, 6, 6), "u1")),), (),
                                             {"binary_data_output": True})) for length in (1000, 1001)]
    (taken, reply), (status, error) = ask(*asked)
    assert (taken, reply.id) == (200, letter * 1000)
    assert (status, error) == (400, "id has 1001 characters, wanted at most 1000")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_has_not_far_more_bytes_than_its_pixels_could_have(kind):
    """Pillow takes 25 s for as many empty chunks as a body may have."""
    spec = TensorSpec("image", np.dtype("u1"), (4, 5))
    body, most = io.BytesIO(), 4 * (5 + 512) * (4 + 512) + (1 << 20)
    Image.new("L", (5, 4), 9).save(body, kind)
    padded = body.getvalue().ljust(most, b"\0")
    assert content.decode_image(padded, spec).max() == 9
    with pytest.raises(OipError, match=f"has {most + 1} bytes, wanted at most {most} for 5 x 4") as caught:
        content.decode_image(padded + b"\0", spec)
    assert caught.value.status == 413


@pytest.mark.parametrize("options", [{"format": "JPEG", "quality": 100, "subsampling": 0}, {"format": "BMP"}])
def test_a_picture_of_noise_is_never_too_large(options):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3)).astype("u1")
    body = io.BytesIO()
    Image.fromarray(noise).save(body, **options)
    assert content.decode_image(body.getvalue(), TensorSpec("image", np.dtype("u1"), noise.shape)).shape[0] == 1
