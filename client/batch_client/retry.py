"""Whether and when again. Pure: time and randomness are passed in.

Retries are paid for by successes (a token bucket: `RESERVE` a server to begin with, `GAIN` earned by each success), so
that a server in trouble sees little more than its normal load; an empty bucket leaves one probe a second and server.
Waiting times have full jitter (Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import random

__all__ = ["RetryBucket", "full_jitter"]

RESERVE = 20.0
GAIN = 0.1
PROBE_SECONDS = 1.0
BASE_SECONDS = 0.1
CAP_SECONDS = 10.0


def full_jitter(attempt: int, rng: random.Random) -> float:
    """Seconds to wait before try number `attempt` (1 is the first repetition): uniform in [0, min(cap, base·2ⁿ))."""
    return rng.random() * min(CAP_SECONDS, BASE_SECONDS * 2.0 ** min(attempt, 30))


class RetryBucket:
    """The run's purse for repeated requests at so many servers."""

    def __init__(self, servers: int = 1) -> None:
        self._most = self._tokens = 0.0
        self._next_probe = float("-inf")
        self.resize(servers)

    def resize(self, servers: int) -> None:
        """There are more servers, or fewer, by now: what is saved stays, and each new one brings its reserve."""
        most = RESERVE * max(1, servers)
        self._tokens = min(most, self._tokens + max(0.0, most - self._most))
        self._most = most
        self._between_probes = PROBE_SECONDS / max(1, servers)

    def succeeded(self) -> None:
        self._tokens = min(self._most, self._tokens + GAIN)

    def delay(self, now: float) -> float:
        """Take leave to repeat one request: 0 where it is given, else the seconds after which to ask again; successes
        may have paid by then.
        """
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return 0.0
        if now >= self._next_probe:
            self._next_probe = now + self._between_probes
            return 0.0
        return self._next_probe - now
