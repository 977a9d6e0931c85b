"""JSON that others wrote, read safely, and one spelling of our own."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["canonical_json", "parse_json"]

# Written as an escape, or as the three bytes that UTF-8 would have for it; json takes both.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


def canonical_json(value: object) -> bytes:
    """One value, one spelling: sorted keys, no spaces, UTF-8; what digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse_json(text: bytes | memoryview) -> Any:
    """Any JSON value; ValueError is all that it raises, for text that nests deeper than Python can follow as well.

    Half of a surrogate pair is no character and could not be written again: it is read as U+FFFD.
    """
    data = bytes(text)
    try:
        value = json.loads(data)
        if _SURROGATE.search(data):
            units = json.dumps(value, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
            value = json.loads(units.decode("utf-16-le", "replace"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value
