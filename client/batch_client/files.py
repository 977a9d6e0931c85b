"""Files of this machine: one that is replaced at once, and whether it can be."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from batch_client.errors import UsageError

__all__ = ["replace_file", "require_writable"]


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


def require_writable(path: Path, flag: str, folder: Path | None = None) -> None:
    """Raises UsageError where `replace_file` can't write what `flag` names: to be told before the work, not after it.

    folder: where the file's own will be made, if that is not there yet.
    """
    try:
        # It would be replaced; /dev/stdout is a link, and leads to a file where that is the standard output.
        is_device = path.absolute().parent == Path("/dev") or (path.exists() and not path.is_file())
        if path.is_dir() or is_device:
            found = "a folder" if path.is_dir() else "a device or a pipe"
            raise UsageError(f"{flag} {path}: this is {found}; wanted a file in a folder that exists")
        with tempfile.TemporaryFile(dir=folder or path.parent):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {path}: can't write there: {error.strerror}") from error
