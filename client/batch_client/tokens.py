"""Bearer tokens of endpoints: where they come from, and the header that carries them. A token is never logged."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
from pathlib import Path
from typing import Protocol

from batch_client.errors import CredentialsError, ServingError, UsageError

__all__ = ["CommandTokens", "FileTokens", "NoTokenError", "NoTokens", "TokenSource", "authorization"]

COMMAND_SECONDS = 60
VISIBLE = range(ord("!"), ord("~") + 1)  # what a header can carry of a token (RFC 6750, section 2.1)


class NoTokenError(ServingError):
    """There is no token now: a server writes its file when it is ready, and removes it at its end. So it is as with a
    server that does not answer, and a scheduler starts again.
    """


class TokenSource(Protocol):
    """Where the bearer token of the endpoints comes from."""

    async def token(self, refused: str | None = None) -> str | None:
        """The token now, None where none is wanted; `refused` is one that a server has just turned down."""


class CommandTokens:
    """The standard output of a command, such as one that asks a secret store; run again when the token is refused.

    Its arguments may be secrets: of the command line, messages name the program alone.
    """

    def __init__(self, command: str) -> None:
        """Raises UsageError for a command line without a program or with an unclosed quote."""
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"--token-command: can't be split into words: {error}") from error
        if not self._words:
            raise UsageError("--token-command is empty: wanted a program that prints a token")
        self._token: str | None = None
        self._runs = 0
        self._running = asyncio.Lock()

    async def token(self, refused: str | None = None) -> str | None:
        """Requests that are refused together share one run, whatever it prints.

        Raises CredentialsError when the command fails or prints no token.
        """
        runs = self._runs
        async with self._running:
            if self._token is None or (self._token == refused and self._runs == runs):
                self._token = await self._run()
                self._runs += 1
            return self._token

    async def _run(self) -> str:
        name = f"--token-command {self._words[0]}"
        try:
            process = await asyncio.create_subprocess_exec(
                *self._words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise CredentialsError(f"{name}: can't be started ({error.strerror}): check its path") from None
        except ValueError:  # a word that no program can be given; its text is the whole command line
            raise CredentialsError(f"{name}: can't be started: a word of it has a null character") from None
        try:
            async with asyncio.timeout(COMMAND_SECONDS):
                said, _ = await process.communicate()
        except TimeoutError:
            raise CredentialsError(f"{name}: no answer in {COMMAND_SECONDS} s: run it by hand to see why") from None
        finally:
            if process.returncode is None:  # a run that is stopped does not wait for it
                process.kill()
                await process.wait()
        try:
            text = said.decode()
        except UnicodeDecodeError:
            raise CredentialsError(f"{name}: wanted a token on its standard output, found other bytes") from None
        if process.returncode or not text.strip():
            raise CredentialsError(f"{name}: exit {process.returncode}, wanted 0 and a token on its standard output: "
                                   "run it by hand to see why")
        return _one_word(name, text)


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
        """Raises NoTokenError where there is no such file, CredentialsError where it can't be read or holds something
        else.
        """
        if self._token is None or self._token == refused:
            try:
                text = self._path.read_text(encoding="utf-8")
            except FileNotFoundError:
                raise NoTokenError(f"--token-file {self._path}: there is no such file; wanted that of a server that "
                                   "runs: serve --token-out writes it once it is ready, and removes it at its end"
                                   ) from None
            except OSError as error:
                raise CredentialsError(f"--token-file {self._path}: can't be read: {error.strerror}") from error
            except UnicodeDecodeError as error:
                raise CredentialsError(f"--token-file {self._path}: is no text; wanted a token") from error
            self._token = _one_word(f"--token-file {self._path}", text)
        return self._token


def _one_word(source: str, text: str) -> str:
    """The token in `text`; raises CredentialsError, which does not show it, for what no header can carry."""
    token = text.strip()
    if not token:
        raise CredentialsError(f"{source}: wanted a token, found nothing")
    if not all(ord(character) in VISIBLE for character in token):
        raise CredentialsError(f"{source}: wanted one token alone, found white space or other signs within "
                               f"{len(token)} characters")
    return token


def authorization(token: str | None) -> dict[str, str]:
    """The header that carries a token; empty without one."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}
