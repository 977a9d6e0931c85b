"""A file on this machine, replaced: whoever opens it sees all of the old text or all of the new one."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace `path` at once by `text` in UTF-8, or leave it as it is and nothing beside it; raises OSError.

    mode: permissions of the new file, less the process's umask. The text is written to a new file in the same folder
    first, under a name that nobody can lay a link at beforehand. It is not synced to the disk: a power cut may lose it.
    """
    data = text.encode()
    new = path.parent / f".{secrets.token_hex(8)}.part"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
