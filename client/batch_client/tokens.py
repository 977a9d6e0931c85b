"""Bearer tokens of endpoints: where they come from, and the header that carries them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from batch_client.errors import CredentialsError

__all__ = ["FileTokens", "NoTokens", "TokenSource", "authorization"]


class TokenSource(Protocol):
    """Where the bearer token of the endpoints comes from."""

    async def token(self, refused: str | None = None) -> str | None:
        """The token now, None where none is wanted; `refused` is one that a server has just turned down."""


class NoTokens:
    """For servers that want no token."""

    async def token(self, refused: str | None = None) -> str | None:  # noqa: ARG002 - the protocol's argument
        return None


class FileTokens:
    """A token in a file, read anew when it is refused: another program may renew it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._token: str | None = None

    async def token(self, refused: str | None = None) -> str | None:
        """Raises CredentialsError when the file can't be read."""
        if self._token is None or self._token == refused:
            try:
                self._token = self._path.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise CredentialsError(f"--token-file {self._path}: can't be read: {error}") from error
        return self._token


def authorization(token: str | None) -> dict[str, str]:
    """The header that carries a token; empty without one."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}
