"""URLs as people give them. Rule: what can't be a place is refused as it is read, and no secret of one is shown."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

from batch_client.errors import UsageError

__all__ = ["WEB", "require_listed", "require_path_alone", "split_url"]

WEB = ("http", "https")


def split_url(url: str) -> SplitResult:
    """The parts of a URL or a path. Raises UsageError for one that has none, such as `s3://[bucket/path`.

    A user's name, a password and a query are not shown.
    """
    try:
        return urlsplit(url)
    except ValueError:
        raise UsageError(f"{_shown(url)}: not a URL: wanted one such as s3://bucket/path or http://host:8080") from None


def _shown(url: str) -> str:
    return re.sub("//[^/]*@", "//…@", re.split("[?#]", url)[0])[:200]


def require_listed(place: str, name: str) -> None:
    """Raises UsageError where INPUT, OUTPUT or --reuse, as `name` says, is no place for it."""
    _require_no_user(place, name)
    if split_url(place).scheme in WEB:
        why = "which proves that a source has not changed" if name == "INPUT" else "and so not what a run has written"
        raise UsageError(f"{name} {_shown(place)}: a web server can't list what it holds, {why}: use s3://, gs://, "
                         "az:// or a path")


def _require_no_user(url: str, name: str) -> None:
    scheme, netloc = split_url(url)[:2]
    user = netloc.rpartition("@")[0]
    if scheme and (":" in user or (user and scheme not in ("abfs", "abfss"))):  # where a container is
        instead = "fetch what is there first" if scheme in WEB else "give credentials by the store's variables"
        raise UsageError(f"{name} has a user name or password in its URL, which would be stored in outputs and shown: "
                         f"{instead}")


def require_path_alone(url: str) -> None:
    """Raises UsageError for a URL that goes on after its path: that would be left out, and the rest is another place's.
    And for one with a user's name or a password, and for what has a URL's colon without its slashes, as a path may.

    What follows may be a signature, and is not shown.
    """
    _require_no_user(url, _shown(url))
    scheme = split_url(url).scheme
    if len(scheme) > 1 and (cut := re.search("[?#]", url)):
        raise UsageError(f"{url[:cut.start()]}{cut[0]}…: no place has a {cut[0]!r} in its URL: wanted %23 for a '#' "
                         "and %3F for a '?' of a name, and no query, such as signed URLs have")
    if len(scheme) > 1 and scheme != "file" and "://" not in url:
        rest = url[len(scheme) + 1:]
        wanted = (f"did you mean {scheme}://{rest.lstrip('/')}?" if rest.startswith("/") else
                  f"a path with a colon is written ./{url}")
        raise UsageError(f"{url}: not a URL, which has :// after its scheme: {wanted}")
