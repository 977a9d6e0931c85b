"""What one request can take of a worker that others wait for is bounded, and refused before the work."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from batch_handler import content, oip, service
from batch_handler.exchange import Exchange, Pending, Request
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
    with pytest.raises(OipError, match=f"has {most + 1} bytes, wanted at most {most}: save it as 5 x 4,") as caught:
        content.decode_image(padded + b"\0", spec)
    assert caught.value.status == 413


@pytest.mark.parametrize("options", [{"format": "JPEG", "quality": 100, "subsampling": 0}, {"format": "BMP"}])
def test_a_picture_of_noise_is_never_too_large(options):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3)).astype("u1")
    body = io.BytesIO()
    Image.fromarray(noise).save(body, **options)
    assert content.decode_image(body.getvalue(), TensorSpec("image", np.dtype("u1"), noise.shape)).shape[0] == 1


@pytest.mark.parametrize("opening", [b"[", b"{", b'{"inputs": ['])
@pytest.mark.parametrize("headers", [{"content-type": "application/json"}, {oip.HEADER_LENGTH.lower(): "20000"}])
def test_json_has_not_far_more_lists_than_its_records_could_have(tiny, opening, headers):
    """Twenty million empty lists are read for seconds, and have 1.6 GB."""
    exchange, most = Exchange(tiny, max_records=2), 2 * (1 + 1 + 6) + 4096  # a record is 6 lists in one
    least = opening.count(b"[") + opening.count(b"{")
    # Cut off: what is parsed is refused otherwise.
    many = [exchange.read(Request((opening + b"[" * (most - least) + more).ljust(20_000), headers))
            for more in (b"", b"[")]
    assert [reply.status for reply in many] == [400, 413]
    assert json.loads(many[1].body)["error"] == (
        f"the JSON has {most + 1} lists and objects, wanted at most {most} for 2 records")


def test_json_of_as_many_records_as_may_be_is_taken_in_any_form(tiny, images, monkeypatch):
    monkeypatch.setattr("batch_handler.exchange._OTHER_LISTS", 5)
    exchange, records = Exchange(tiny, max_records=50), images.tolist()
    tensor = {"name": "image", "datatype": "UINT8", "shape": [50, 6, 6], "data": records}
    for value in (records, {"instances": [{"image": record} for record in records]}, {"inputs": [tensor]}):
        asked = exchange.read(Request(json.dumps(value).encode(), {"content-type": "application/json"}))
        assert isinstance(asked, Pending), asked


@pytest.mark.parametrize(("headers", "what"), [
    ({"content-type": "application/json"}, "body"), ({oip.HEADER_LENGTH.lower(): "5002"}, "header")])
def test_a_number_of_too_many_digits_is_refused_in_our_words(tiny, headers, what):
    reply = Exchange(tiny).read(Request(b"[" + b"9" * 5000 + b"]", headers))
    assert (reply.status, json.loads(reply.body)) == (
        400, {"error": f"the JSON {what} can't be parsed: an integer has over 4300 digits"})


def test_of_what_is_broken_nothing_is_left_in_a_worker_and_its_log(tiny_dir, make_context, monkeypatch):
    monkeypatch.setattr(service, "_WORKER", {})
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "true")
    picture = io.BytesIO()
    Image.new("L", (6, 6)).save(picture, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0f\x01")
    bodies = [picture.getvalue(), *(
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header for header in (
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (1if 1else 2, 6, 6)}",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (1L, 6L, 6L)}"))]
    context = make_context(tiny_dir, {"content-type": "image/jpeg"}, *[{"content-type": "application/x-npy"}] * 2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        service.handle(None, make_context(tiny_dir))
        service.handle([{"body": body} for body in bodies], context)
        for module in (TiffImagePlugin, content):
            assert not [key for key in vars(module).get("__warningregistry__", {}) if key != "version"]
    assert [context.get_response_status(index)[0] for index in range(3)] == [200, 400, 400]
    assert told == []
