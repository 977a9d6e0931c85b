"""Whether and when again. Pure: time and randomness are passed in.

Retries are paid for by successes (a token bucket: `RESERVE` to begin with, `GAIN` earned by each success), so that a
server in trouble sees little more than its normal load; an empty bucket leaves one probe a second. Waiting times have
full jitter (Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import random

__all__ = ["RetryBucket", "full_jitter"]

RESERVE = 20.0
GAIN = 0.1
PROBE_SECONDS = 1.0
BASE_SECONDS = 0.1
CAP_SECONDS = 10.0


def full_jitter(attempt: int, rng: random.Random, base: float = BASE_SECONDS, cap: float = CAP_SECONDS) -> float:
    """Seconds to wait before try number `attempt` (1 is the first repetition): uniform in [0, min(cap, base·2ⁿ))."""
    return rng.random() * min(cap, base * 2.0 ** min(attempt, 30))


class RetryBucket:
    """The run's purse for repeated requests."""

    def __init__(self, reserve: float = RESERVE, gain: float = GAIN) -> None:
        self._most = reserve
        self._gain = gain
        self._tokens = reserve
        self._next_probe = float("-inf")

    def succeeded(self) -> None:
        self._tokens = min(self._most, self._tokens + self._gain)

    def delay(self, now: float) -> float:
        """Take leave to repeat one request: seconds to wait until it may go, 0 if at once."""
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return 0.0
        self._next_probe = max(now, self._next_probe + PROBE_SECONDS)
        return self._next_probe - now
