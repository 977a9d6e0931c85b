"""JSON that others wrote, read safely, and one spelling of our own."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["canonical_json", "parse_json"]


def canonical_json(value: object) -> bytes:
    """One value, one spelling: sorted keys, no spaces, UTF-8; what digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse_json(text: bytes | memoryview) -> Any:
    """Any JSON value; ValueError is all that it raises, for text that nests deeper than Python can follow as well."""
    try:
        return json.loads(bytes(text))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
