"""What one request can take of a worker that others wait for is bounded, and refused before the work."""

from __future__ import annotations

import numpy as np
import pytest

from batch_handler import oip
from batch_handler.oip import InferRequest, Tensor


@pytest.mark.parametrize("letter", ["a", "\0", "\U0001f600"], ids=["plain", "six bytes", "twelve bytes"])
def test_an_id_is_repeated_up_to_a_thousand_characters(ask, letter):
    """The replies of a server batch are one message, which Java reads again and again while it grows."""
    asked = [oip.encode_request(InferRequest(letter * length, (Tensor("image", np.zeros((1, 6, 6), "u1")),), (),
                                             {"binary_data_output": True})) for length in (1000, 1001)]
    (taken, reply), (status, error) = ask(*asked)
    assert (taken, reply.id) == (200, letter * 1000)
    assert (status, error) == (400, "id has 1001 characters, wanted at most 1000")
