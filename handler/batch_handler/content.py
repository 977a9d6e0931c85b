"""The simple bodies of `/predictions/{name}` ⇄ arrays: npy, JSON and pictures.

Rule: what a body claims (a header's length, a shape, a picture's size) is compared with the signature before
anything of that size is allocated or decoded, and nothing is unpickled. Refusals are `OipError`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile

from batch_handler.oip import Array, OipError, Tensor, TensorSpec, datatype_of
from batch_handler.tensors import Buffer, flattened, from_json_numbers, shown, to_json_numbers

__all__ = [
    "decode_image",
    "decode_json",
    "decode_npy",
    "encode_npy",
    "encode_predictions",
]

_NPY_MAGIC = b"\x93NUMPY"
# numpy writes 118 bytes for a plain array; structured dtypes, the only long headers, are refused anyway.
_MAX_NPY_HEADER = 4096
_NPY_READERS: Mapping[tuple[int, int], Callable[..., Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# Formats that people send; each further one is a parser that strangers' bytes reach.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# Pillow cuts grey pixels of more than 8 bits off at 255, and leaves the low byte of colours of 16 away; those it calls
# by the mode of 8 bits and tells apart in what it is about to decode only.
_IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
# Tags of a TIFF, and how many pixels more than a picture a tile may have a side: writers' defaults are for large ones.
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_MARGIN = 512
# What a picture's body may have beside its pixels, such as a colour profile. Pillow takes half a second for a MiB of
# empty chunks.
_BESIDE_PIXELS = 1 << 20
# What takes long however few bytes it has, by a file's first two: a scan of a JPEG is decoded over the whole picture
# (progressive ones have some ten), and each colour profile of a PNG is inflated (one may be there).
_COSTLY = {b"\xff\xd8": (b"\xff\xda", "scans"), b"\x89P": (b"iCCP", "colour profiles")}
_MOST_COSTLY = 100
# Those that turn or mirror a picture; others have no meaning, and viewers take them as upright too.
_TURNED = range(2, 9)


def decode_npy(body: Buffer, spec: TensorSpec, max_records: int) -> tuple[Array, bool]:
    """Records of an npy body as (n, *shape), and whether it was one record without the axis in front."""
    shape, fortran, dtype, start = _npy_header(body)
    if dtype.hasobject or dtype.newbyteorder("<") != spec.dtype.newbyteorder("<"):
        raise OipError(f"npy has dtype {dtype}, wanted {spec.dtype}")
    single = shape == spec.shape
    if not single and shape[1:] != spec.shape:
        raise OipError(f"npy has shape {list(shape)}, wanted {list(spec.shape)} or {spec.shape_of_many}")
    _check_records(1 if single else shape[0], max_records)
    wanted = math.prod(shape) * dtype.itemsize
    found = len(body) - start
    if found != wanted:
        raise OipError(f"npy has {found} bytes after its header, wanted {wanted} for shape {list(shape)}")
    raw = np.frombuffer(body, dtype, offset=start)
    array = raw.reshape(shape, order="F" if fortran else "C")
    if dtype.kind == "b" and raw.size and raw.view(np.uint8).max() > 1:
        raise OipError("npy has a byte that is neither 0 nor 1, wanted bool")
    return np.ascontiguousarray(array[None] if single else array, spec.dtype), single


def decode_json(value: Any, specs: Sequence[TensorSpec], max_records: int) -> tuple[Array, ...]:
    """Records of `[...]` or `{"instances": [...]}`, one array an input; raises `OipError`.

    A record is a nested list, or an object by input name, which models of several inputs need.
    """
    records = value.get("instances") if isinstance(value, dict) else value
    if not isinstance(records, list):
        raise OipError('the JSON body has no records, wanted a list or {"instances": [...]}')
    _check_records(len(records), max_records)
    return tuple(_json_column(records, spec, alone=len(specs) == 1) for spec in specs)


def decode_image(body: Buffer, spec: TensorSpec) -> Array:
    """One picture as (1, *shape); its bytes and its size are compared before its pixels are decoded. One that people
    see otherwise than its pixels are stored is refused.
    """
    mode, height, width = _picture_of(spec)
    most = 4 * (width + _MARGIN) * (height + _MARGIN) + _BESIDE_PIXELS
    if len(body) > most:
        raise OipError(f"the picture has {len(body)} bytes, wanted at most {most}: save it as {width} x "
                       f"{height}, and without what is not pixels", 413)
    mark, what = _COSTLY.get(bytes(body[:2]), (b"", ""))
    if mark and (found := bytes(body).count(mark)) > _MOST_COSTLY:
        raise OipError(f"the picture has {found} {what}, wanted at most {_MOST_COSTLY}: save it anew", 413)
    try:
        _check_size(_webp_canvas(body) or (width, height), width, height)
        picture = Image.open(io.BytesIO(body), formats=_IMAGE_FORMATS)
        _check_picture(picture, width, height)
        _check_seen(picture)
        pixels = np.asarray(picture.convert(mode))
    except UnidentifiedImageError as error:
        raise OipError(f"the picture can't be read, wanted {', '.join(_IMAGE_FORMATS)}") from error
    except (OipError, MemoryError):
        raise
    except Exception as error:  # what Pillow raises on broken pictures is anything
        raise OipError(f"the picture can't be decoded: {str(error)[:120] or type(error).__name__}") from error
    if mode == "RGB" and spec.shape[0] == 3 and spec.shape[-1] != 3:
        pixels = np.moveaxis(pixels, -1, 0)
    return np.ascontiguousarray(pixels).reshape(1, *spec.shape)


def _webp_canvas(body: Buffer) -> tuple[int, int] | None:
    """The size that a WebP claims, None for other pictures: its decoder takes memory of that size as it is opened.

    https://developers.google.com/speed/webp/docs/riff_container
    """
    head = bytes(memoryview(body)[:30]).ljust(30, b"\0")
    if head[:4] + head[8:12] != b"RIFFWEBP":
        return None
    if head[12:16] == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _check_size(size: tuple[int, int], width: int, height: int) -> None:
    if size != (width, height):
        raise OipError(f"the picture is {size[0]} x {size[1]}, wanted {width} x {height}")


def _check_picture(picture: Image.Image, width: int, height: int) -> None:
    _check_size(picture.size, width, height)
    # Of a TIFF whole tiles are decoded, however much of them is in the picture.
    tags = getattr(picture, "tag_v2", {})
    wide, high = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
    if wide > width + _MARGIN or high > height + _MARGIN:
        raise OipError(f"the picture has tiles of {wide} x {high}, wanted at most {width + _MARGIN} x "
                       f"{height + _MARGIN}")
    pixel = f"{picture.mode} of 16 bits" if _has_16_bits(picture) else picture.mode
    if pixel not in _IMAGE_MODES:
        raise OipError(f"the picture's pixels are {pixel}, wanted 8 bits a channel, grey or colour")


def _check_seen(picture: Image.Image) -> None:
    """Refuse what stored pixels alone do not show: more frames, a turn, what shines through."""
    # A JPEG with a preview or a gain map beside it (MPO) is one picture all the same.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise OipError("the picture has several frames or pages, wanted one: save the one to score by itself")
    if (orientation := _orientation(picture)) in _TURNED:
        raise OipError(f"the picture's EXIF orientation is {orientation}, wanted 1: save it with its pixels upright")
    # What the frame of a GIF leaves of its canvas is transparent too.
    uncovered = isinstance(picture, GifImageFile) and picture.tile[0].extents != (0, 0, *picture.size)
    if uncovered or (picture.has_transparency_data
                     and picture.convert("RGBA").getchannel("A").getextrema() != (255, 255)):
        raise OipError("the picture is transparent in places, wanted it opaque: save it on a background")
    picture.info.pop("transparency", None)  # of which Pillow would warn as it converts a palette


def _orientation(picture: Image.Image) -> Any:
    if picture.format == "PNG":
        picture.load()  # its EXIF may follow the pixels
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - what Pillow raises on broken EXIF is anything; viewers pass it over
        return None


def _has_16_bits(picture: Image.Image) -> bool:
    # The raw modes of what is to be decoded, such as RGB;16B.
    return ";16" in str(getattr(picture, "tile", ""))


def encode_npy(array: Array) -> bytes:
    """An array as npy, version 1.0."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def encode_predictions(outputs: Sequence[Tensor]) -> bytes:
    """`{"predictions": [...]}` in the order of the records; not finite becomes null."""
    columns = [to_json_numbers(tensor.data) for tensor in outputs]
    predictions: list[Any]
    if len(columns) == 1:
        predictions = columns[0]
    else:
        names = [tensor.name for tensor in outputs]
        predictions = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return json.dumps({"predictions": predictions}, separators=(",", ":"), allow_nan=False).encode()


def _npy_header(body: Buffer) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    head = io.BytesIO(bytes(memoryview(body)[: _MAX_NPY_HEADER + 16]))
    if head.getvalue()[:6] != _NPY_MAGIC:
        raise OipError("the body does not start as npy")
    try:
        version = np.lib.format.read_magic(head)
        read = _NPY_READERS.get(version)
        shape, fortran, dtype = ((), False, None) if read is None else read(head, _MAX_NPY_HEADER)
    # numpy evaluates the header as a literal: what that raises on nonsense is anything, and says how it is done.
    except Exception as error:
        raise OipError("the npy header can't be read: wanted descr, fortran_order and shape as numpy.save writes "
                       "them") from error
    if dtype is None:
        raise OipError(f"npy has version {version[0]}.{version[1]}, wanted 1.0 or 2.0")
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in shape):  # others may have too many digits to name
        raise OipError("npy has a shape that no array has, wanted whole numbers from 0 to 2^62")
    return shape, fortran, dtype, head.tell()


def _check_records(records: int, max_records: int) -> None:
    if records > max_records:
        raise OipError(f"the request has {records} records, wanted at most {max_records}", 413)


def _is_nested(value: Any, shape: Sequence[int]) -> bool:
    """Whether lists of `value` are as long and as deep as `shape` says, and no deeper."""
    flat = flattened([value], shape)
    return flat is not None and not any(isinstance(leaf, list | Mapping) for leaf in flat)


def _json_column(records: list[Any], spec: TensorSpec, *, alone: bool) -> Array:
    if alone and records and spec.shape and _is_nested(records, spec.shape):
        raise OipError("found one record, wanted a list of records: put it into [ ]")
    column = []
    for index, record in enumerate(records):
        if isinstance(record, Mapping):
            if spec.name not in record:
                raise OipError(f"record {index} has {shown(sorted(record))}, wanted {spec.name}")
            column.append(record[spec.name])
        elif alone:
            column.append(record)
        else:
            raise OipError(f"record {index} is {shown(record)}, wanted an object by input name")
        if spec.shape and not isinstance(column[-1], list):
            raise OipError(f"record {index} of {spec.name} is not a list, wanted shape {list(spec.shape)}")
    return from_json_numbers(column, spec.dtype, (len(records), *spec.shape), spec.name)


def _picture_of(spec: TensorSpec) -> tuple[str, int, int]:
    """The mode, height and width of the picture that a record is."""
    shape = spec.shape
    if datatype_of(spec.dtype) == "UINT8":
        if len(shape) == 2:
            return "L", shape[0], shape[1]
        if len(shape) == 3 and shape[-1] in (1, 3):
            return ("L" if shape[-1] == 1 else "RGB"), shape[0], shape[1]
        if len(shape) == 3 and shape[0] in (1, 3):
            return ("L" if shape[0] == 1 else "RGB"), shape[1], shape[2]
    raise OipError(
        f"the model takes {spec.name} as {spec.dtype} {list(shape)}, which is no picture; send npy or JSON", 415
    )
