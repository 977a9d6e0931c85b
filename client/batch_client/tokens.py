"""Bearer tokens of endpoints: where they come from, and the header that carries them. A token is never logged."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
from pathlib import Path
from typing import Protocol

from batch_client.errors import CredentialsError

__all__ = ["CommandTokens", "FileTokens", "NoTokens", "TokenSource", "authorization"]

COMMAND_SECONDS = 60


class TokenSource(Protocol):
    """Where the bearer token of the endpoints comes from."""

    async def token(self, refused: str | None = None) -> str | None:
        """The token now, None where none is wanted; `refused` is one that a server has just turned down."""


class CommandTokens:
    """The standard output of a command, such as one that asks a secret store; run again when the token is refused."""

    def __init__(self, command: str) -> None:
        self._words = shlex.split(command)
        self._token: str | None = None

    async def token(self, refused: str | None = None) -> str | None:
        """Raises CredentialsError when the command fails or prints nothing."""
        if self._token is None or self._token == refused:
            self._token = await asyncio.to_thread(self._run)
        return self._token

    def _run(self) -> str:
        try:
            done = subprocess.run(self._words, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired, ValueError) as error:
            raise CredentialsError(f"--token-command {self._words[:1]}: {type(error).__name__}: {error}") from error
        if done.returncode or not done.stdout.strip():
            raise CredentialsError(f"--token-command {self._words[0]}: exit {done.returncode}, wanted 0 and a token on "
                                   "its standard output")
        return done.stdout.strip()


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
