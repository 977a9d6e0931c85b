"""npy, JSON and pictures: what is taken, and what each refusal says."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batch_handler import content
from batch_handler.oip import OipError, Tensor, TensorSpec
from support.npy import npy

GREY = TensorSpec("image", np.dtype("u1"), (4, 5))
FLOATS = TensorSpec("x", np.dtype("f4"), (2, 3))
SCALAR = TensorSpec("n", np.dtype("i8"), ())
MAX = 10
# Prints by how many KiB the memory has grown that a process has had at most, when a picture was refused twice.
OPENING = """
import resource, sys
import numpy as np
from batch_handler import content
from batch_handler.oip import OipError, TensorSpec

def refused(body):
    try:
        content.decode_image(body, TensorSpec("image", np.dtype("u1"), (4, 5)))
    except OipError as error:
        return str(error)

most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused(b"")  # imports Pillow's formats
body, before = sys.stdin.buffer.read(), most()
said = {refused(body), refused(body)}
print(most() - before)
sys.exit(0 if said == {sys.argv[1]} else str(said))
"""
ROWS = [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_npy_records_of_any_order(order, dtype):
    values = np.arange(24, dtype=dtype).reshape(4, 2, 3)
    found, single = content.decode_npy(npy(np.asarray(values, order=order)), FLOATS, MAX)
    np.testing.assert_array_equal(found, values)
    assert not single
    assert found.dtype == np.dtype("<f4")
    found, single = content.decode_npy(npy(values[0]), FLOATS, MAX)
    assert single
    assert found.shape == (1, 2, 3)


def npy_of(header):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def npy_sized(size):
    return npy_of(b"{'descr':'<f4','fortran_order':False,'shape':(%s,3)}" % size)


UNREADABLE = "the npy header can't be read: wanted descr, fortran_order and shape as numpy.save writes them"
SIZES = "wanted whole numbers from 0 to 2^62"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "does not start as npy"),
        (npy(np.zeros((2, 3), "f8")), "dtype float64, wanted float32"),
        (npy(np.zeros((3, 2), "f4")), "shape [3, 2], wanted [2, 3] or [n, 2, 3]"),
        (npy(np.zeros((1, 1, 2, 3), "f4")), "shape [1, 1, 2, 3]"),
        (npy(np.zeros((11, 2, 3), "f4")), "11 records, wanted at most 10"),
        (npy(np.zeros((2, 3), "f4"))[:-1], "has 23 bytes after its header, wanted 24"),
        (npy(np.zeros((2, 3), "f4")) + b"\0", "has 25 bytes after its header, wanted 24"),
        (npy(np.array([[{}]], object), allow_pickle=True), "dtype object"),
        (npy_of(b"(" * 65535), UNREADABLE),
        (npy_of(b"{'a': 1}        "), UNREADABLE),
        (npy_of(b"("), UNREADABLE),
        (npy_of(b"{'descr':'<f4','fortran_order':False,'shape':(1,16"), UNREADABLE),
        (npy_sized(b"2**70"), UNREADABLE),
        (npy_sized(b"True"), SIZES),
        (npy_sized(b"0x" + b"f" * 3900), SIZES),
        (b"\x93NUMPY\x03\x00\x10\x00", "version 3.0, wanted 1.0 or 2.0"),
        (npy(np.zeros((2, 3), "f4")).replace(b"(2, 3)", b"(-2,3)"), SIZES),
    ],
)
def test_a_wrong_npy_is_told_what_is_wrong(body, message):
    with pytest.raises(OipError) as caught:
        content.decode_npy(body, FLOATS, MAX)
    assert message in str(caught.value)


@given(st.binary(max_size=60))
def test_no_npy_header_raises_anything_else(tail):
    with pytest.raises(OipError):
        content.decode_npy(b"\x93NUMPY\x01\x00" + tail, FLOATS, MAX)


def test_json_records():
    value = [[[1, 2, None], [4, 5, 6]]]
    for body in (value, {"instances": value}, [{"x": value[0]}]):
        (found,) = content.decode_json(body, [FLOATS], MAX)
        np.testing.assert_array_equal(found, np.array([[[1, 2, np.nan], [4, 5, 6]]], "f4"))
    two = content.decode_json([{"x": value[0], "n": 3}], [FLOATS, SCALAR], MAX)
    assert two[1].tolist() == [3]
    assert content.decode_json([5, 6], [SCALAR], MAX)[0].tolist() == [5, 6]
    assert content.decode_json([], [FLOATS], MAX)[0].shape == (0, 2, 3)
    square = TensorSpec("x", np.dtype("f4"), (2, 2))  # as many records as a record has rows, and as many rows as values
    assert content.decode_json([[[1, 2], [3, 4]]] * 2, [square], MAX)[0].shape == (2, 2, 2)


@pytest.mark.parametrize(
    ("value", "specs", "message"),
    [
        (3, [FLOATS], "wanted a list"),
        ({"x": []}, [FLOATS], "wanted a list"),
        ([1] * 11, [SCALAR], "11 records, wanted at most 10"),
        ([1, 2, 3, 4, 5, 6], [FLOATS], "is not a list, wanted shape [2, 3]"),
        ([[1, 2, None], [4, 5, 6]], [FLOATS], "found one record, wanted a list of records"),
        ({"instances": [[1, 2, 3], [4, 5, 6]]}, [FLOATS], "found one record, wanted a list of records"),
        ([1, 2], [TensorSpec("x", np.dtype("f4"), (2,))], "found one record, wanted a list of records"),
        ([[1, 2, 3], [4, 5]], [FLOATS], "record 0: data of x is not nested by the shape of a record, [2, 3]"),
        ([[[1, 2], [3, 4]]], [FLOATS], "data of x is not nested by the shape of a record, [2, 3]"),
        ([[1, 2, 3, 4, 5, 6]], [FLOATS], "not nested by the shape of a record"),
        ([ROWS, ROWS[:1], []], [FLOATS], "record 1: data of x is not nested by the shape of a record, [2, 3]"),
        ([ROWS, ROWS, [[1, 2, 3], [4, 5, [6]]]], [FLOATS], "record 2: data of x holds [6], wanted values of float32"),
        ([ROWS, ROWS, [[1, 2, 3], [4, 5, 1e39]]], [FLOATS], "record 2: data of x holds a value outside float32"),
        ([ROWS, 7], [FLOATS], "record 1 of x is not a list, wanted shape [2, 3]"),
        ([[["a", 2, 3], [4, 5, 6]]], [FLOATS], "wanted values of float32"),
        ([{"x": ROWS}, {"y": 1}], [FLOATS], 'record 1 has ["y"], wanted x'),
        ([{"x": ROWS, "n": 1}, [1]], [FLOATS, SCALAR], "record 1 is [1], wanted an object by input name"),
        ([{"x": ROWS, "n": 1}, {"x": ROWS, "n": 2**63}], [FLOATS, SCALAR], "record 1: data of n holds 92233720"),
        ([1, True, 1.5], [SCALAR], "record 1: data of n holds true, wanted values of int64"),
        ([1.5], [SCALAR], "1.5, wanted values of int64"),
        ([2**63], [SCALAR], "outside int64"),
    ],
)
def test_wrong_json_records_are_told_what_is_wrong(value, specs, message):
    with pytest.raises(OipError) as caught:
        content.decode_json(value, specs, MAX)
    assert message in str(caught.value)


def picture(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def test_a_jpeg_of_scans_without_end_is_refused_unread():
    """Each is decoded over the whole picture: a thousand of ten bytes took a worker a second at 512 x 512."""
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", progressive=True, quality=100, subsampling=0)
    usual = buffer.getvalue()
    assert usual.count(b"\xff\xda") > 1
    np.testing.assert_allclose(content.decode_image(usual, GREY), grey[None], atol=4)
    scans = usual[:usual.rindex(b"\xff\xda")] + usual[usual.rindex(b"\xff\xda"):-2] * 100 + usual[-2:]
    with pytest.raises(OipError, match=r"has 10\d scans, wanted at most 100") as caught:
        content.decode_image(scans, GREY)
    assert caught.value.status == 413


def test_a_png_of_profiles_without_end_is_refused_unread():
    """Each of a KiB may inflate to one MiB."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(buffer, "PNG", icc_profile=b"profile")
    usual = buffer.getvalue()
    start = usual.index(b"iCCP") - 4
    profile = usual[start:start + 12 + int.from_bytes(usual[start:start + 4])]
    assert content.decode_image(usual, GREY).shape == (1, 4, 5)
    with pytest.raises(OipError, match="has 101 colour profiles, wanted at most 100") as caught:
        content.decode_image(usual[:start] + profile * 100 + usual[start:], GREY)
    assert caught.value.status == 413


def test_pictures():
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    np.testing.assert_array_equal(content.decode_image(picture(grey), GREY), grey[None])
    colour = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    last = TensorSpec("i", np.dtype("u1"), (4, 5, 3))
    first = TensorSpec("i", np.dtype("u1"), (3, 4, 5))
    np.testing.assert_array_equal(content.decode_image(picture(colour), last)[0], colour)
    np.testing.assert_array_equal(content.decode_image(picture(colour), first)[0], np.moveaxis(colour, -1, 0))
    assert content.decode_image(picture(colour, "JPEG"), GREY).shape == (1, 4, 5)
    assert content.decode_image(picture(grey), TensorSpec("i", np.dtype("u1"), (1, 4, 5))).shape == (1, 1, 4, 5)


@pytest.mark.parametrize("pixels", [np.uint16, np.int32, np.float32])
def test_a_picture_of_more_than_8_bits_is_refused_and_not_cut_off(pixels):
    with pytest.raises(OipError, match="wanted 8 bits a channel"):
        content.decode_image(picture(np.full((4, 5), 300, pixels), "TIFF"), GREY)


def test_a_colour_picture_of_16_bits_is_refused_and_not_rounded():
    rows = b"".join(b"\0" + bytes(5 * 6) for _ in range(4))
    with pytest.raises(OipError, match="RGB of 16 bits, wanted 8 bits a channel"):
        content.decode_image(png(struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0), rows), GREY)
    assert content.decode_image(png(struct.pack(">IIBBBBB", 5, 4, 8, 2, 0, 0, 0), b"".join(
        b"\0" + bytes(5 * 3) for _ in range(4))), GREY).shape == (1, 4, 5)


def png(header, rows):
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette(**options):
    image = Image.new("P", (5, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((2, 2), 0)
    return saved(image, **options)


def on_a_canvas(left, top):
    """A GIF of 5 x 4 with a frame of 4 x 4, or of 5 x 3, at that place."""
    body = bytearray(saved(Image.new("P", (5 - left, 4 - top), 1), "GIF"))
    body[6:10] = struct.pack("<HH", 5, 4)
    frame = body.index(b",") + 1
    body[frame:frame + 4] = struct.pack("<HH", left, top)
    return bytes(body)


@pytest.mark.parametrize("body", [
    saved(Image.new("RGBA", (5, 4), (9, 9, 9, 254))),
    saved(Image.new("LA", (5, 4), (9, 0))),
    saved(Image.new("RGBA", (5, 4), (9, 9, 9, 0)), "WEBP", lossless=True),
    saved(Image.new("RGB", (5, 4), (9, 9, 9)), transparency=(9, 9, 9)),
    saved(Image.new("L", (5, 4), 9), transparency=9),
    palette(transparency=0),
    palette(transparency=b"\xff\x80"),
    palette(kind="GIF", transparency=0),
    on_a_canvas(1, 0),
    on_a_canvas(0, 1),
], ids=["RGBA", "LA", "WebP", "RGB colour", "grey value", "palette", "palette alpha", "GIF", "GIF's left", "GIF's top"])
def test_a_picture_that_shines_through_is_refused(body):
    with pytest.raises(OipError, match="transparent in places, wanted it opaque: save it on a background") as caught:
        content.decode_image(body, GREY)
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [
    saved(Image.new("RGBA", (5, 4), (9, 9, 9, 255))),
    saved(Image.new("LA", (5, 4), (9, 255))),
    saved(Image.new("L", (5, 4), 9), transparency=8),
    palette(transparency=b"\xff\xff"),
    palette(kind="GIF"),
], ids=["RGBA", "LA", "grey value", "palette alpha", "GIF"])
def test_an_alpha_channel_that_is_opaque_everywhere_changes_nothing(body):
    assert content.decode_image(body, GREY).max() == 9


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_picture_that_viewers_turn_is_refused(kind, orientation):
    # Of a TIFF Pillow itself gives the size that viewers see.
    size = (4, 5) if kind == "TIFF" and orientation == 6 else (5, 4)
    body = saved(Image.new("L", size), kind, exif=turned(orientation))
    with pytest.raises(OipError, match=f"EXIF orientation is {orientation}, wanted 1: save it with its pixels upright"):
        content.decode_image(body, GREY)


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_an_orientation_that_turns_nothing_is_taken(orientation):
    body = saved(Image.new("L", (5, 4), 9), "PNG", exif=turned(orientation))
    assert content.decode_image(body, GREY).max() == 9


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of such EXIF
@given(st.binary(max_size=10), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_exif_that_is_broken_is_passed_over(tail, kind):
    # A tag other than the orientation's, and then anything.
    body = saved(Image.new("L", (5, 4)), kind, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01" + tail)
    assert content.decode_image(body, GREY).shape == (1, 4, 5)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_a_picture_of_several_frames_is_refused(kind):
    frames = [Image.new("L", (5, 4), level) for level in (0, 200)]
    with pytest.raises(OipError, match="several frames or pages, wanted one: save the one to score by itself"):
        content.decode_image(saved(frames[0], kind, save_all=True, append_images=frames[1:]), GREY)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_a_picture_of_several_frames_that_is_cut_off_is_refused_or_is_its_first(kind):
    frames = [Image.new("L", (5, 4), level) for level in (0, 200)]
    whole = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    for length in range(len(whole)):
        with suppress(OipError):
            assert not content.decode_image(whole[:length], GREY).any()


def test_a_photograph_with_a_preview_beside_it_is_one_picture():
    frames = [Image.new("RGB", (5, 4), level) for level in ("black", "white")]
    body = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert content.decode_image(body, GREY).max() == 0


def test_a_picture_of_another_size_is_refused_before_it_is_decoded():
    whole = picture(np.zeros((5, 4), np.uint8))
    # Cut after the header: decoding would fail with another message.
    with pytest.raises(OipError, match="the picture is 4 x 5, wanted 5 x 4"):
        content.decode_image(whole[:45], GREY)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(OipError, match="the picture"):
        content.decode_image(bomb, GREY)


def webp(n, *, animated):
    """A WebP of a few bytes that says it is n x n."""
    body = bytearray(saved(Image.new("L", (5, 4)), "WEBP", lossless=True))
    if not animated:
        bits = int.from_bytes(body[21:25], "little")
        body[21:25] = (bits >> 28 << 28 | n - 1 << 14 | n - 1).to_bytes(4, "little")
        return bytes(body)

    def chunk(kind, data):
        return kind + struct.pack("<I", len(data)) + data

    chunks = chunk(b"VP8X", b"\2\0\0\0" + 2 * (n - 1).to_bytes(3, "little")) + chunk(b"ANIM", bytes(6)) + chunk(
        b"ANMF", struct.pack("<IHIHI", 0, 0, 4, 3 << 8, 0) + bytes(body[12:]))
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def tiff(tile):
    """A TIFF of one tile of zeros, of which the picture is a corner."""
    pack = zlib.compressobj()
    data = b"".join(pack.compress(bytes(tile)) for _ in range(tile)) + pack.flush()
    data += bytes(len(data) % 2)
    tags = ((256, 5), (257, 4), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile), (324, 8),
            (325, len(data)))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)


@pytest.mark.parametrize(("body", "message"), [
    (webp(11_000, animated=True), "the picture is 11000 x 11000, wanted 5 x 4"),
    (webp(11_000, animated=False), "the picture is 11000 x 11000, wanted 5 x 4"),
    (saved(Image.new("L", (300, 200)), "WEBP"), "the picture is 300 x 200, wanted 5 x 4"),
    (tiff(8192), "the picture has tiles of 8192 x 8192, wanted at most 517 x 516"),
], ids=["animated WebP", "lossless WebP", "lossy WebP", "TIFF"])
def test_no_memory_is_taken_for_what_a_picture_claims_to_be(body, message):
    """In a worker, whose allocator keeps memory, opening or decoding it would touch all that is taken."""
    held = subprocess.run(
        [sys.executable, "-c", OPENING, message], input=body, check=True, capture_output=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)})
    assert int(held.stdout) < 32 << 10  # KiB


def test_a_picture_in_a_larger_tile_is_taken():
    assert content.decode_image(tiff(256), GREY).shape == (1, 4, 5)


def far_away():
    """A TIFF whose pixels are where no file ends."""
    tags = ((256, 4, 5), (257, 4, 4), (258, 4, 8), (259, 4, 1), (262, 4, 1), (273, 16, 8), (278, 4, 4), (279, 4, 20))
    return b"II*\0\x10\0\0\0" + b"\xff" * 8 + struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + bytes(4)


@pytest.mark.parametrize("body", [
    b"", b"GIF89a", far_away(), picture(np.zeros((4, 5), np.uint8))[:45],
    picture(np.zeros((4, 5), np.uint8)).replace(b"\x00\x00\x00\x0dIHDR", b"\x00\x00\x00\x0cIHDR"),
    picture(np.zeros((4, 5), np.uint8), "BMP")[:-4],
])
def test_a_broken_picture_is_refused(body):
    with pytest.raises(OipError, match="the picture can't be"):
        content.decode_image(body, GREY)


def test_a_model_that_takes_no_picture_says_what_to_send():
    with pytest.raises(OipError, match="send npy or JSON") as caught:
        content.decode_image(picture(np.zeros((2, 3), np.uint8)), FLOATS)
    assert caught.value.status == 415


def test_replies():
    scores = np.array([[1.5, np.nan], [2.0, np.inf]], "f4")
    np.testing.assert_array_equal(np.load(io.BytesIO(content.encode_npy(scores))), scores)
    one = [Tensor("s", scores)]
    assert json.loads(content.encode_predictions(one)) == {"predictions": [[1.5, None], [2.0, None]]}
    two = [*one, Tensor("n", np.array([7, 8]))]
    assert json.loads(content.encode_predictions(two))["predictions"][1] == {"s": [2.0, None], "n": 8}
