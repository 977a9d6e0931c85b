"""URLs as people give them."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

from batch_client.errors import UsageError

__all__ = ["require_path_alone", "split_url"]


def split_url(url: str) -> SplitResult:
    """The parts of a URL or a path. Raises UsageError for one that has none, such as `s3://[bucket/path`.

    A user's name, a password and a query are not shown.
    """
    try:
        return urlsplit(url)
    except ValueError:
        shown = re.sub("//[^/]*@", "//…@", re.split("[?#]", url)[0])[:200]
        raise UsageError(f"{shown}: not a URL: wanted one such as s3://bucket/path or http://host:8080") from None


def require_path_alone(url: str) -> None:
    """Raises UsageError for a URL that goes on after its path: that would be left out, and the rest is another place's.
    And for what has a URL's colon without its slashes, as a path may.

    What follows may be a signature, and is not shown.
    """
    scheme = split_url(url).scheme
    if len(scheme) > 1 and (cut := re.search("[?#]", url)):
        raise UsageError(f"{url[:cut.start()]}{cut[0]}…: no place has a {cut[0]!r} in its URL: wanted %23 for a '#' "
                         "and %3F for a '?' of a name, and no query, such as signed URLs have")
    if len(scheme) > 1 and scheme != "file" and "://" not in url:
        rest = url[len(scheme) + 1:]
        wanted = (f"did you mean {scheme}://{rest.lstrip('/')}?" if rest.startswith("/") else
                  f"a path with a colon is written ./{url}")
        raise UsageError(f"{url}: not a URL, which has :// after its scheme: {wanted}")
