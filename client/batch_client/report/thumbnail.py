"""A record as a small PNG, written with the standard library: the bare client has nothing that draws."""

from __future__ import annotations

import struct
import zlib

import numpy as np

__all__ = ["thumbnail"]

# Pixels: larger pictures are thinned out to this, smaller than the second are no pictures.
MOST, LEAST = 96, 8
_GREY, _RGB = 0, 2


def thumbnail(record: np.ndarray) -> bytes | None:
    """PNG of a uint8 record (H, W), (H, W, 1), (1, H, W), (H, W, 3) or (3, H, W); None for any other."""
    pixels = _as_pixels(record)
    if pixels is None or min(pixels.shape[:2]) < LEAST:
        return None
    step = -(-max(pixels.shape[:2]) // MOST)
    return _png(np.ascontiguousarray(pixels[::step, ::step]))


def _as_pixels(record: np.ndarray) -> np.ndarray | None:
    """(H, W) or (H, W, 3)."""
    if record.dtype != np.uint8:
        return None
    if record.ndim == 3 and record.shape[0] in (1, 3) and record.shape[2] not in (1, 3):
        record = np.moveaxis(record, 0, -1)
    if record.ndim == 3 and record.shape[2] == 1:
        record = record[..., 0]
    return record if record.ndim == 2 or (record.ndim == 3 and record.shape[2] == 3) else None


def _png(pixels: np.ndarray) -> bytes:
    """https://www.w3.org/TR/png-3/: 8 bits a sample, each row after a byte that says it is not filtered."""
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _GREY if pixels.ndim == 2 else _RGB, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks)
