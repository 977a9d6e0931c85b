"""What the ceilings say: which part limits a run, and what to turn next. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batch_client.bench.search import Way
from batch_client.bench.tuner import Found

__all__ = ["Verdict", "table_of", "ways_of"]

# Below this part of the lowest ceiling, it is what is around the parts that costs.
NEAR = 0.85

_NEXT: Mapping[str, str] = {
    "model": "a GPU, more cores or more machines (run --endpoint, several times), or lower precision, if its scores "
             "are good enough (bench --precision bfloat16)",
    "wire": "larger requests (run --request-records), or several servers (run --endpoint, several times)",
    "read": "a machine nearer to the source, larger input chunks, or more read ahead (run --max-bytes-in-flight)",
    "write": "a machine nearer to the output, or larger output chunks (run --chunk-records)",
}
_SHARED = ("more in flight (run --in-flight), a longer run, where start and end count less; or fewer things that share "
           "the cores")


@dataclass(frozen=True)
class Verdict:
    """Records/s of each part alone, by name, and of the whole where it was measured."""

    ceilings: Mapping[str, float]
    whole: float | None = None

    @property
    def limiter(self) -> str:
        """The part with the lowest ceiling."""
        return min(self.ceilings, key=lambda name: self.ceilings[name])

    @property
    def reached(self) -> float | None:
        """The whole as a part of the lowest ceiling."""
        return None if self.whole is None else self.whole / self.ceilings[self.limiter]

    @property
    def next_step(self) -> str:
        """What to turn next."""
        return _SHARED if self.reached is not None and self.reached < NEAR else _NEXT[self.limiter]

    def lines(self) -> list[str]:
        """For people."""
        said = f"limited by: the {self.limiter}"
        if self.reached is not None:
            said += f"; the whole reaches {self.reached:.0%} of it"
        return [said, f"next: {self.next_step}"]


def table_of(rows: Sequence[tuple[str, float, str]], record_bytes: int) -> list[str]:
    """Lines of name, records/s, MB/s of records as they travel, and a note."""
    lines = [f"{'':<12}{'records/s':>12}{'MB/s':>9}"]
    for name, rate, note in rows:
        lines.append(f"{name:<12}{rate:>12,.0f}{rate * record_bytes / 1e6:>9,.1f}  {note}".rstrip())
    return lines


def ways_of(found: Found) -> list[str]:
    """Lines of everything that was tried, in order."""
    lines = ["runtime       micro-batch  workers  threads  allocator          records/s  against the best before"]
    for one in found.tried:
        way: Way = one.way
        said = one.failure or (f"{one.against_best:.2f}" if one is not found.tried[0] else "the beginning")
        rate = "-" if one.failure else f"{one.records_per_s:,.0f}"
        lines.append(f"{way.runtime:<14}{way.micro_batch:>11}{way.workers:>9}{way.threads:>9}  {way.allocator:<18}"
                     f"{rate:>10}  {said}")
    return lines
