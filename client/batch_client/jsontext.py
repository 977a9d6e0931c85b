"""JSON that others wrote, read safely, and one spelling of our own."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["canonical_json", "parse_json"]

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def canonical_json(value: object) -> bytes:
    """One value, one spelling: sorted keys, no spaces, UTF-8; what digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse_json(text: bytes | memoryview) -> Any:
    """Any JSON value; ValueError is all that it raises, for text that nests deeper than Python can follow as well, and
    for half a surrogate pair, which is no character and can't be written again.
    """
    data = bytes(text)
    try:
        value = json.loads(data)
        if _SURROGATE.search(data):
            canonical_json(value)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair") from error
    return value
