"""URL → a bucket or a folder as a `Store`, through obstore. Foreign errors are mapped here, once."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import obstore
from obstore import exceptions as foreign
from obstore import store as obstores

from batch_client.errors import BatchClientError, CredentialsError, DataError, StorageError, UsageError
from batch_client.storage import Blob, Meta, child_url
from batch_client.store_settings import plain_http, s3_config
from batch_client.urls import WEB, require_path_alone, split_url

__all__ = ["ObjectStore", "is_inside", "open_store"]

# After this long without the store a run is better stopped and resumed. obstore repeats 5xx itself, and reads whose
# connection is lost, but those only for some two seconds.
RETRY_SECONDS = 60
TRIES = 8  # of writes that the store calls conflicts
AGAIN_SECONDS, MOST_AGAIN_SECONDS = 0.05, 5.0  # before the second try; twice as long before each other one
STREAMED_BYTES = 1 << 20

_T = TypeVar("_T")


class ObjectStore:
    """A Store through obstore."""

    def __init__(self, url: str, inner: obstores.ObjectStore, prefix: str = "") -> None:
        self.url = url
        self._inner = inner
        self._prefix = prefix
        self._answered = False

    async def get(self, key: str, start: int | None = None, stop: int | None = None) -> Blob | None:
        options = _range_options(start, stop)

        async def read() -> tuple[obstore.Bytes, Any]:
            result = await obstore.get_async(self._inner, self._prefix + key, options=options)
            return await result.bytes_async(), result.meta

        with self._mapped("reading", key):
            try:
                data, meta = await self._repeated(read)
            except (FileNotFoundError, foreign.NotFoundError) as error:
                if _NO_BUCKET.search(str(error)):
                    raise
                return None
            except foreign.GenericError as error:
                if _BELOW_A_FILE.search(_said(error)):
                    return None
                raise
            return Blob(memoryview(data), meta.get("e_tag"))

    async def stream(self, key: str) -> AsyncIterator[memoryview]:
        """An object's bytes in pieces as they come, the first one empty; none if there is no such object."""
        with self._mapped("reading", key), suppress(FileNotFoundError, foreign.NotFoundError):
            result = await self._repeated(lambda: obstore.get_async(self._inner, self._prefix + key))
            yield memoryview(b"")
            async for piece in result.stream(min_chunk_size=STREAMED_BYTES):
                yield memoryview(piece)

    async def head(self, key: str) -> Meta | None:
        with self._mapped("looking at", key):
            try:
                meta = await self._repeated(lambda: obstore.head_async(self._inner, self._prefix + key))
            except (FileNotFoundError, foreign.NotFoundError):
                return None
            except foreign.GenericError as error:
                if _BELOW_A_FILE.search(_said(error)):
                    return None
                raise
            return Meta(key, meta["size"], meta.get("e_tag"), meta["last_modified"].timestamp())

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        async def put() -> None:
            await obstore.put_async(self._inner, self._prefix + key, data, mode="create", use_multipart=False)

        for tries in range(TRIES):
            with self._mapped("writing", key):
                try:
                    await self._repeated(put, write=True)
                except (FileExistsError, foreign.AlreadyExistsError, foreign.PreconditionError):
                    # S3 also says "conflict" when two writers meet and neither has won yet.
                    if await self.head(key) is not None:
                        return False
                else:
                    return True
            await asyncio.sleep(AGAIN_SECONDS * 2**tries)
        raise StorageError(f"writing {child_url(self.url, key)}: the store reports conflicts and keeps no object there")

    async def delete(self, key: str) -> None:
        async def remove() -> None:
            await obstore.delete_async(self._inner, self._prefix + key)

        with self._mapped("deleting", key):
            try:
                await self._repeated(remove, write=True)
            except (FileNotFoundError, foreign.NotFoundError):
                return

    async def list(self, prefix: str) -> AsyncIterator[Meta]:
        last: str | None = None
        pauses = _pauses()
        with self._mapped("listing", prefix):
            while True:
                try:
                    async for batch in obstore.list(self._inner, prefix=self._prefix + prefix or None, offset=last):
                        self._answered = True
                        pauses = _pauses()  # a long listing may be cut any number of times
                        for meta in batch:
                            last = meta["path"]
                            yield Meta(last[len(self._prefix):], meta["size"], meta.get("e_tag"),
                                       meta["last_modified"].timestamp())
                except foreign.BaseError as error:
                    again = _CUT_PAGE.search(str(error)) or self._is_away(error)
                    if not again or (pause := next(pauses, None)) is None:
                        raise
                    await asyncio.sleep(pause)
                else:
                    self._answered = True
                    return

    async def _repeated(self, call: Callable[[], Awaitable[_T]], *, write: bool = False) -> _T:
        """What `call` gives, which is made again while the store is away.

        A write or removal in any case, since obstore repeats none: it does not know that ours may be done twice. A
        second create finds the first one's object, as it finds another client's.
        """
        pauses = _pauses()
        while True:
            try:
                result = await call()
            except foreign.GenericError as error:
                if not self._is_away(error, in_any_case=write) or (pause := next(pauses, None)) is None:
                    raise
            except _ANSWERS:
                self._answered = True
                raise
            else:
                self._answered = True
                return result
            await asyncio.sleep(pause)

    def _is_away(self, error: Exception, *, in_any_case: bool = False) -> bool:
        """Whether a request found no store where there was one. One that never answered may not be there at all."""
        return (in_any_case or self._answered) and _LOST.search(_said(error)) is not None

    @contextmanager
    def _mapped(self, doing: str, key: str) -> Any:
        try:
            yield
        except (foreign.BaseError, OSError, ValueError) as error:
            raise _translate(error, doing, child_url(self.url, key)) from error
        except Exception as error:
            if type(error).__name__ != "RustPanic":  # of its futures, which obstore has no name for
                raise
            raise StorageError(f"{doing} {child_url(self.url, key)}: obstore gave up: look for missing parts and line "
                               "breaks in the variables that name the store and its credentials") from error


def _pauses() -> Iterator[float]:
    """Seconds before each other try, for RETRY_SECONDS from now on; spread, since many requests lose it at once."""
    end = time.monotonic() + RETRY_SECONDS

    def pauses() -> Iterator[float]:
        pause = AGAIN_SECONDS
        while time.monotonic() < end:
            yield pause * random.uniform(0.5, 1)  # noqa: S311 - no secret
            pause = min(2 * pause, MOST_AGAIN_SECONDS)

    return pauses()


def is_inside(url: str, place: str) -> bool:
    """Whether the store at one URL is the one at `place`, or below it; links of the file system are followed."""
    inner, outer = (_resolved(one) for one in (url, place))
    accounts = {split_url(one).hostname for one in (url, place) if "@" in split_url(one).netloc}
    return len(accounts) < 2 and (inner == outer or inner.startswith(f"{outer}/"))


# Other schemes of the same stores (object_store's `ObjectStoreScheme`).
_ALIASES = {"s3a": "s3", "azure": "az", "adl": "az", "abfs": "az", "abfss": "az"}


def _resolved(url: str) -> str:
    if url.startswith("file:"):
        with suppress(OSError, RuntimeError):  # links that lead in a circle
            url = Path(unquote(split_url(url).path)).resolve().as_uri()
    scheme, _, path = url.partition("://")
    scheme = _ALIASES.get(scheme.lower(), scheme.lower())
    if scheme == "az":  # container@account, where the account may also be a variable's
        container, slash, rest = path.partition("/")
        path = container.partition("@")[0] + slash + rest
    # obstore takes a URL's escapes for what they stand for.
    return f"{scheme}://{unquote(path)}".rstrip("/")


def open_store(url: str, *, anonymous: bool = False, environ: Mapping[str, str] = os.environ,
               seconds: float = RETRY_SECONDS) -> ObjectStore:
    """The store at a URL or a path.

    `s3://bucket/path` takes its settings from the usual AWS variables (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, …); with
    `anonymous` requests are not signed. A local folder is made by the first write. `seconds` is what a
    request may take, its body included.

    Raises UsageError for a URL that no store understands, CredentialsError where none can be found.
    """
    scheme = split_url(url).scheme
    require_path_alone(url)
    if len(scheme) <= 1 or scheme == "file":
        return _local_store(url)
    if {".", ".."} & {*unquote(split_url(url).path).split("/")}:
        raise UsageError(f"{url}: has '.' or '..' in its path: wanted a path without")
    config: dict[str, Any] = {}
    if scheme not in WEB and re.search(r":\d*$", split_url(url).netloc):
        # obstore passes over it: two URLs would be one place.
        raise UsageError(f"{url}: has a port, which no bucket has: wanted it in the store's endpoint, such as "
                         "AWS_ENDPOINT_URL")
    if scheme == "http" and not plain_http(environ):
        raise UsageError(f"{url}: anybody on the way could alter what comes over plain HTTP: wanted https://, or for a "
                         "network of your own an AWS_ENDPOINT_URL that begins with http://")
    if scheme in ("s3", "s3a"):
        config = s3_config(environ, anonymous=anonymous)
    elif anonymous and scheme not in WEB:  # which sign nothing
        config = {"skip_signature": True}
    try:
        inner = obstores.from_url(
            url.rstrip("/"),
            client_options={"allow_http": plain_http(environ),
                            "timeout": timedelta(seconds=seconds)},
            retry_config={"max_retries": 10, "retry_timeout": timedelta(seconds=RETRY_SECONDS),
                          "backoff": {"init_backoff": timedelta(milliseconds=50),
                                      "max_backoff": timedelta(seconds=5), "base": 2}},
            **config,
        )
    except (foreign.BaseError, ValueError, TypeError) as error:
        raise UsageError(f"{url}: not a place that can be read or written ({_first_line(error)}): "
                         "wanted s3://bucket/path, gs://…, az://…, file:///path or a path") from error
    return ObjectStore(url.rstrip("/"), inner)


def _local_store(url: str) -> ObjectStore:
    given = unquote(split_url(url).path) if url.startswith("file:") else url
    if not given:  # would be the working folder
        raise UsageError("a place to read or write is empty: wanted s3://bucket/path, file:///path or a path")
    try:
        path = _plain(Path(given).expanduser().absolute())
        # obstore wants its root to exist, and a refused run must not leave an empty folder: so the root is the nearest
        # folder that exists, and the rest is part of each key; the first write makes the folders.
        root = path
        while not root.is_dir():
            if root.exists():
                raise UsageError(f"{root}: this is a file; wanted a folder")
            root = root.parent
    except PermissionError as error:
        raise StorageError(f"{url}: permission denied") from error
    # RuntimeError: a home that nobody has.
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{url}: not a path that can be read or written ({_first_line(error)})") from error
    prefix = path.relative_to(root).as_posix()
    # Below the root a folder goes with its last object, as on an object store.
    inner = obstores.LocalStore(prefix=root, automatic_cleanup=True)
    return ObjectStore(path.as_uri(), inner, "" if prefix == "." else prefix + "/")


def _plain(path: Path) -> Path:
    """Without '.' and '..': a run that goes on compares where its records came from. Links stay, since they may lead to
    one place by another way on each machine; but behind one '..' is what the system says it is.
    """
    plain = Path(os.path.normpath(path))
    return plain if plain.resolve() == path.resolve() else path.resolve()


def _range_options(start: int | None, stop: int | None) -> obstore.GetOptions | None:
    if start is None and stop is None:
        return None
    if start is not None and start < 0:
        return {"range": {"suffix": -start}}
    if stop is None:
        return {"range": {"offset": start or 0}}
    return {"range": (start or 0, stop)}


_SKEW = re.compile(r"RequestTimeTooSkewed|RequestExpired|time.{0,20}skew", re.IGNORECASE)
_BAD_KEY = re.compile(
    r"InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|AccessDenied|InvalidClientTokenId|"
    r"status code: 40[13]\b", re.IGNORECASE)
_METADATA_SERVICE = re.compile(r"169\.254\.169\.254|/latest/api/token")
_NO_CREDENTIALS = re.compile(r"instance metadata|credential|MissingCredentials", re.IGNORECASE)
_NO_BUCKET = re.compile(r"NoSuchBucket|bucket.{0,40}not (found|exist)", re.IGNORECASE)
_ODD_NAME = re.compile(r'invalid path: Error parsing Path "(.*?)": ', re.DOTALL)
_BELOW_A_FILE = re.compile(r"\(os error 20\)")  # where a store of objects has none of that key
_LOST = re.compile(r"^HTTP error: ")
# What only a store says.
_ANSWERS = (FileNotFoundError, FileExistsError, foreign.NotFoundError, foreign.AlreadyExistsError,
            foreign.PreconditionError, foreign.PermissionDeniedError, foreign.UnauthenticatedError)
_CUT_PAGE = re.compile(r"list response body")


# The variables that have credentials, by the beginning of a URL.
_VARIABLES = {"gs": "GOOGLE_APPLICATION_CREDENTIALS", "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"}
_AWS_VARIABLES = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"


def _translate(error: Exception, what: str, url: str) -> BatchClientError:
    """`error`, which came of doing `what` to `url`, as one of ours."""
    said, doing = _said(error), f"{what} {url}"
    if _SKEW.search(said):
        return StorageError(f"{doing}: the store says that this machine's clock is wrong: set the clock and try again")
    if _NO_BUCKET.search(said):
        return UsageError(f"{doing}: there is no such bucket: mend the URL, or, for an output, create it first")
    if _METADATA_SERVICE.search(str(error)) or _NO_CREDENTIALS.search(said):
        variables = _VARIABLES.get(_resolved(url).partition(":")[0], _AWS_VARIABLES)
        return CredentialsError(f"{doing}: found no credentials: set {variables}, or use --anonymous for a public "
                                "bucket")
    if isinstance(error, foreign.PermissionDeniedError | foreign.UnauthenticatedError) or _BAD_KEY.search(said):
        return CredentialsError(f"{doing}: the store refused the credentials ({_code_of(said)}): check the keys "
                                "and their rights to this place; --anonymous sends none, and is for public places")
    if odd := _ODD_NAME.search(str(error)):
        return DataError(f"{doing}: the file {odd[1].strip('/')!r} has a name that no key can have: rename or remove "
                         "it, and run the same command again")
    found = "permission denied" if isinstance(error, PermissionError) else _first_line(error)
    todo = ": check the network and, where one is set, AWS_ENDPOINT_URL" if _LOST.search(said) else ""
    return StorageError(f"{doing}: {found}{todo}")


def _said(error: Exception) -> str:
    """What the store said stands after the dash; before it is the request, whose names may contain anything."""
    return str(error).partition(" - ")[2] or re.sub(r"\S*/\S*", "", str(error))


def _code_of(text: str) -> str:
    found = re.search(r"<Code>([A-Za-z]+)</Code>", text)
    return found.group(1) if found else "access denied"


def _first_line(error: BaseException) -> str:
    """The foreign message's essence: obstore appends a debug dump after the first lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = " ".join((lines or [type(error).__name__])[0].split())
    return re.sub(r" in [\d.]+\S?s(, after \d+ retries, max_retries: \d+, retry_timeout: \S+)?(?= -)", "", line)[:300]
