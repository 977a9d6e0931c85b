"""What a server's answer means: one table from status and error type to an outcome.

The names of TorchServe's error types stand here and nowhere else in the client. Its `InternalServerException` comes as
500, 503 or 507 and means that the handler failed or the worker died with the batch; its `ServiceUnavailableException`
means a full queue or no worker; its refusal of a token is a 400. Our handler's own error, `{"error": …}`, is about one
request alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from batch_client.jsontext import parse_json

__all__ = ["Outcome", "Verdict", "read_reply"]

LONGEST_REASON = 300


class Outcome(Enum):
    """What came of one attempt; `exchange.py` decides what to do about it, and `scorer.py` where records may be why."""

    RESULT = "a result"
    BUSY = "the server has no room"
    FAILED = "the server failed while it held the request"
    RAISED = "the model failed on this request's records"
    REFUSED = "the server refuses this request"
    TOO_LARGE = "the request is too large for the server"
    TOKEN = "the token is wrong or expired"  # noqa: S105 - the text of an outcome
    NO_MODEL = "the server has no such model"
    BROKEN = "the connection broke"
    LATE = "no answer came in time"
    CORRUPT = "the reply does not belong to the request or was altered"
    OTHER_MODEL = "the reply is another model's"
    NOT_SHARED = "the server can't read the records in shared memory"


@dataclass(frozen=True)
class Verdict:
    """An outcome and the server's own words about it, one line; `server` is its URL, where it was asked for records."""

    outcome: Outcome
    reason: str = ""
    server: str = ""

    def __str__(self) -> str:
        return f"{self.outcome.value}: {self.reason}"


_BY_TYPE = {
    "ServiceUnavailableException": Outcome.BUSY,
    "InternalServerException": Outcome.FAILED,
    "InvalidKeyException": Outcome.TOKEN,
    "TokenAuthorizationException": Outcome.TOKEN,
    "ModelNotFoundException": Outcome.NO_MODEL,
    "ModelVersionNotFoundException": Outcome.NO_MODEL,
    "RequestTimeoutException": Outcome.FAILED,
}
_BY_STATUS = {
    401: Outcome.TOKEN,
    403: Outcome.TOKEN,
    404: Outcome.NO_MODEL,
    405: Outcome.NO_MODEL,
    408: Outcome.BROKEN,
    410: Outcome.NOT_SHARED,
    413: Outcome.TOO_LARGE,
    429: Outcome.BUSY,
    502: Outcome.BROKEN,
    503: Outcome.BUSY,
    504: Outcome.LATE,
}


def read_reply(status: int, body: bytes) -> Verdict:
    """The meaning of one HTTP answer; `body` is looked at only when it is no success."""
    if status == 200:
        return Verdict(Outcome.RESULT)
    kind, reason, own = _error_of(body)
    if own and status == 500:  # what our handler says; others say it with other statuses, of themselves
        return Verdict(Outcome.RAISED, f"{status}: {reason}")
    by_status = _BY_STATUS.get(status, Outcome.FAILED if status >= 500 else Outcome.REFUSED)
    return Verdict(_BY_TYPE.get(kind, by_status), f"{status}: {reason}" if reason else f"status {status}")


def _error_of(body: bytes) -> tuple[str, str, bool]:
    """The error's type, its text, and whether it is the handler's own `{"error": …}`, which is of one request."""
    try:
        value = parse_json(body[:65536])
    except ValueError:
        return "", _one_line(body[:LONGEST_REASON].decode("utf-8", "replace")), False
    if not isinstance(value, dict):
        return "", "", False
    own = isinstance(value.get("error"), str)
    return str(value.get("type", "")), _one_line(str(value["error"] if own else value.get("message") or "")), own


def _one_line(text: str) -> str:
    return " ".join(text.split())[:LONGEST_REASON]
