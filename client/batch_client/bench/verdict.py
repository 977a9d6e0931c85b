"""What the ceilings say: which part limits a run, and what to turn next. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batch_client.bench.search import Way
from batch_client.bench.tuner import Found
from batch_client.bottleneck import Limit
from batch_client.figures import number

__all__ = ["Ceilings", "Whole", "can_be_lowered", "table_of", "ways_of"]

# Below this part of the lowest ceiling, something else costs, and the run's own account says what.
NEAR = 0.85

_ADVICE: Mapping[Limit, str] = {
    Limit.MODEL: "another runtime (pack --runtime), a GPU, or more cores or machines (run --endpoint, several times)",
    Limit.WIRE: "larger requests (run --request-records), or several servers (run --endpoint, several times)",
    Limit.READING: "a machine nearer to the source, larger input chunks, or more read ahead (run "
                   "--max-bytes-in-flight)",
    Limit.WRITING: "a machine nearer to the output, or larger output chunks (run --chunk-records)",
}
_LOWER = "; or lower precision, if its scores are good enough (bench --precision bfloat16)"
# What is compiled or exported has its dtypes inside.
_LOWERED = ("eager", "torchscript")


@dataclass(frozen=True)
class Whole:
    """A run over the first `records`: records/s, and what limited it and what to turn next by its own summary."""

    records: int
    records_per_s: float
    limit: Limit | None
    advice: str


@dataclass(frozen=True)
class Ceilings:
    """Records/s of each part alone, and the whole where it was measured. lower: whether the model `can_be_lowered`."""

    rates: Mapping[Limit, float]
    whole: Whole | None = None
    lower: bool = False

    @property
    def lowest(self) -> Limit:
        """The part with the lowest ceiling."""
        return min(self.rates, key=lambda part: self.rates[part])

    @property
    def reached(self) -> float | None:
        """The whole as a part of the lowest ceiling."""
        return None if self.whole is None else self.whole.records_per_s / self.rates[self.lowest]

    @property
    def limit(self) -> Limit:
        """What limits a run: the lowest ceiling, or what the whole says of itself where it is far below that."""
        return self._verdict[0]

    @property
    def advice(self) -> str:
        """What to turn next."""
        return self._verdict[1]

    def lines(self) -> list[str]:
        """For people."""
        said = f"limited by: {self.limit.phrase}"
        if self.reached is not None:
            ceiling = "this ceiling" if self.limit is self.lowest else f"the lowest ceiling, {self.lowest.phrase}"
            said += f"; the whole reaches {self.reached:.0%} of {ceiling}"
        return [said, f"advice: {self.advice}"]

    @property
    def _verdict(self) -> tuple[Limit, str]:
        if self.whole is not None and self.whole.limit is not None and (self.reached or 0.0) < NEAR:
            return self.whole.limit, self.whole.advice
        return self.lowest, _ADVICE[self.lowest] + _LOWER * (self.lower and self.lowest is Limit.MODEL)


def can_be_lowered(runtime: str, precision: str) -> bool:
    """Whether a model that runs so could run in lower precision."""
    return precision == "float32" and runtime in _LOWERED


def table_of(rows: Sequence[tuple[str, float, str]], record_bytes: int) -> list[str]:
    """Lines of name, records/s, MB/s of records as they travel, and a note."""
    lines = [f"{'':<15}{'records/s':>12}{'MB/s':>9}"]
    for name, rate, note in rows:
        lines.append(f"{name:<15}{number(rate):>12}{rate * record_bytes / 1e6:>9,.1f}  {note}".rstrip())
    return lines


def ways_of(found: Found) -> list[str]:
    """Lines of everything that was tried, in order."""
    lines = ["runtime       micro-batch  workers  threads  allocator          records/s  against the best before"]
    for one in found.tried:
        way: Way = one.way
        said = one.failure or (f"{one.against_best:.2f}" if one is not found.tried[0] else "the beginning")
        rate = "-" if one.failure else number(one.records_per_s)
        lines.append(f"{way.runtime:<14}{way.micro_batch:>11}{way.workers:>9}{way.threads:>9}  {way.allocator:<18}"
                     f"{rate:>10}  {said}")
    return lines
