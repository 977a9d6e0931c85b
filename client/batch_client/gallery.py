"""Records of a published output beside what the model said of them: which ones are worth a look, and what can be
counted over all. Scores are reduced block by block, records read only where they are drawn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from batch_client.buckets import open_store
from batch_client.errors import DataError, MismatchError, UsageError
from batch_client.labels import Range, read_labels
from batch_client.layout import MANIFEST_KEY, SPEC_KEY, STATUS, SUCCESS_KEY
from batch_client.picture import Panel
from batch_client.publish import published_manifest
from batch_client.reader import Source, open_source
from batch_client.spec import Records, RunIdentity
from batch_client.storage import child_url

__all__ = ["Gallery", "open_gallery"]

MOST_RECORDS = 10_000_000
EVENLY, NOTABLE = 24, 16
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Gallery:
    """What to draw, and `figures` of the whole range as JSON has them; `alone` if the output has no other array."""

    panels: list[Panel]
    figures: dict[str, Any]
    alone: bool


@dataclass(frozen=True)
class _Output:
    """What is shown of an output: the array `name` with the scores, `alone` if there is no other, and its status."""

    run: RunIdentity
    name: str
    alone: bool
    scores: Source
    status: Source

    @property
    def classes(self) -> int:
        return math.prod(self.scores.geometry.record_shape)

    @property
    def has_classes(self) -> bool:
        return self.classes > 1


@dataclass(frozen=True)
class _Said:
    """What the model said of records [start, stop): class and its score, -1 and NaN where there is none; labels."""

    start: int
    stop: int
    classes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray | None

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def hits(self) -> np.ndarray:
        """For each record whether it is right: one without a score is not, whatever its label."""
        hits: np.ndarray = (self.classes >= 0) & (self.classes == self.labels)
        return hits

    @property
    def right(self) -> int | None:
        return None if self.labels is None else int(self.hits.sum())


async def open_gallery(output_url: str, *, labels: str | None, records: str | None, source: str | None,
                       anonymous: bool) -> Gallery:
    """Records of a published output, by default all that were scored, beside what was said of them.

    `labels` is where the true classes are, `records` the range A:B, `source` where the scored array is now. Raises
    UsageError, MismatchError and DataError for what can't be shown.
    """
    output = await _open_output(output_url, anonymous=anonymous)
    run, scores, origin = output.run, output.scores, output.run.start
    start, stop = _range(Records.parse(records) if records else Records(), origin, scores.geometry.count)
    if labels is not None and not output.has_classes:
        raise UsageError(f"--labels: output {output.name} has one number a record and no score for each class: there "
                         "is nothing to count as right")
    place = source or run.source
    try:
        inputs = await open_source(open_store(place, anonymous=anonymous), run.source_array or None)
    except DataError as error:
        if source is None:
            raise DataError(f"{error}; the run read it there: name where it is now with --source") from error
        raise
    _require_scored(place, inputs, run)
    span = Range(start, stop, origin, scores.geometry.count, inputs.geometry.count)
    truth = None if labels is None else await read_labels(labels, span, anonymous=anonymous)
    with _of_output(output_url):
        answers = await _answers(scores, output.status, origin, start, stop, truth)
    panels = [await _panel(title, picks, inputs, scores, origin, answers)
              for title, picks in _choose(answers, classes=output.has_classes)]
    return Gallery(panels, _figures(output_url, output, answers), output.alone)


async def _open_output(url: str, *, anonymous: bool) -> _Output:
    store = open_store(url, anonymous=anonymous)
    manifest = await published_manifest(store)
    if manifest is None:
        if await store.head(SPEC_KEY) is None:
            raise MismatchError(f"{url}: no published output there, nor one that was begun (no {SPEC_KEY})")
        raise MismatchError(f"{url}: not published yet (no {SUCCESS_KEY}): finish it with the same batch-client run; "
                            "batch-client status says how far it is")
    try:
        run = msgspec.convert(manifest.run, RunIdentity)
    except msgspec.ValidationError as error:
        raise MismatchError(f"{child_url(store.url, MANIFEST_KEY)} can't be read ({error})") from error
    shapes = {name: shape for name, _, shape in run.outputs}
    names = [name for name, shape in shapes.items() if len(shape) <= 1]
    if not names:
        raise DataError(f"{url}: its predictions have shapes {shapes}, wanted a row of scores for each record")
    name = next((name for name in names if math.prod(shapes[name]) > 1), names[0])
    with _of_output(url):
        scores, status = await open_source(store, name), await open_source(store, STATUS.name)
    return _Output(run, name, len(shapes) == 1, scores, status)


@contextmanager
def _of_output(url: str) -> Iterator[None]:
    """What can't be read within is said of a published output, and not, as a reader does, of an INPUT."""
    try:
        yield
    except DataError as error:
        found = re.split(": restore |; the group has ", str(error))[0]
        raise DataError(f"{url}: its predictions can't be read ({found}): restore what batch-client verify {url} "
                        "--deep names") from error


def _require_scored(place: str, inputs: Source, run: RunIdentity) -> None:
    """Raises UsageError for another array than was scored; it may have grown since."""
    found, shape = inputs.geometry, run.source_shape
    if ((min(found.count, shape[0]), *found.record_shape), str(found.dtype)) != (shape, run.source_dtype):
        raise UsageError(f"{place}: found {found.dtype} of shape {found.shape}, wanted {run.source_dtype} of shape "
                         f"{shape}: is it the array that was scored?")


def _range(records: Records, origin: int, count: int) -> tuple[int, int]:
    """The asked range [start, stop) in the source's numbering; the output holds [origin, origin + count)."""
    start = origin if records.start is None else records.start
    stop = origin + count if records.stop is None else records.stop
    if not origin <= start < stop <= origin + count:
        raise UsageError(f"--records {start}:{stop}: wanted A < B within {origin}:{origin + count}, which were scored")
    if stop - start > MOST_RECORDS:
        raise UsageError(f"{stop - start:,} records are more than the {MOST_RECORDS:,} that are looked at together; "
                         "name a range with --records A:B")
    return start, stop


async def _answers(scores: Source, status: Source, origin: int, start: int, stop: int,
                   labels: np.ndarray | None) -> _Said:
    """Reduce the scores of a range block by block."""
    geometry = scores.geometry
    rows = max(_BLOCK_BYTES // max(geometry.record_bytes, 1), 1)
    step = -(-rows // geometry.chunk_records) * geometry.chunk_records
    classes = np.empty(stop - start, np.int64)
    best = np.empty(stop - start, np.float32)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        values = _rows((await scores.read(first - origin, last - origin)).records.joined())
        unusable = (await status.read(first - origin, last - origin)).records.joined() != 0
        unusable |= ~np.isfinite(values).all(axis=1)
        chosen = np.where(unusable[:, None], 0, values).argmax(axis=1)
        part = slice(first - start, last - start)
        classes[part] = np.where(unusable, -1, chosen)
        best[part] = np.where(unusable, np.nan, values[np.arange(len(values)), chosen])
    return _Said(start, stop, classes, best, labels)


def _rows(scores: np.ndarray) -> np.ndarray:
    return scores.reshape(len(scores), -1).astype("float64")


def _choose(answers: _Said, *, classes: bool) -> list[tuple[str, list[int]]]:
    """Titles and places (within the range) of the records to draw; without `classes` each has one number."""
    count = answers.count
    if count <= EVENLY + NOTABLE:
        return [("", list(range(count)))]
    evenly = np.linspace(0, count - 1, EVENLY).round().astype(int).tolist()
    panels = [(f"{EVENLY} of {count:,} records, evenly spaced", evenly)]
    if answers.labels is None:
        without, scored = np.flatnonzero(answers.classes < 0), np.flatnonzero(answers.classes >= 0)
        ranked = scored[np.argsort(answers.scores[scored], kind="stable")]
        if classes:
            panels.append((f"the {len(ranked[:NOTABLE])} with the lowest best score", ranked[:NOTABLE].tolist()))
        else:
            low, high = ranked[:NOTABLE // 2], ranked[NOTABLE // 2:][:-NOTABLE // 2 - 1:-1]
            panels += [(f"the {len(low)} lowest", low.tolist()), (f"the {len(high)} highest", high.tolist())]
        panels = [(title, picks) for title, picks in panels if picks]
        if len(without):
            few = "" if len(without) <= NOTABLE else f"{NOTABLE} of "
            panels.append((f"{few}{len(without):,} without a score", without[:NOTABLE].tolist()))
        return panels
    wrong = np.flatnonzero(~answers.hits)
    surest = wrong[np.argsort(-np.nan_to_num(answers.scores[wrong], nan=-np.inf), kind="stable")][:NOTABLE]
    title = "the one that is wrong" if len(wrong) == 1 else f"all {len(wrong):,} that are wrong, the surest first"
    if len(wrong) > NOTABLE:
        title = f"of {len(wrong):,} that are wrong the {NOTABLE} that the model was surest of"
    return [*panels, (title, surest.tolist())] if len(wrong) else panels


async def _panel(title: str, picks: list[int], inputs: Source, scores: Source, origin: int,
                 answers: _Said) -> Panel:
    """Read the picked records and their scores, each chunk of the source once."""
    numbers = [answers.start + pick for pick in picks]
    records = await _read_rows(inputs, numbers)
    values = _rows(await _read_rows(scores, [number - origin for number in numbers]))
    values[answers.classes[picks] < 0] = np.nan
    labels = None if answers.labels is None else answers.labels[picks]
    return Panel(title, records, values, labels, numbers)


async def _read_rows(source: Source, numbers: list[int]) -> np.ndarray:
    """Single records of a source, in the order of `numbers`, reading each chunk once."""
    geometry = source.geometry
    found = np.empty((len(numbers), *geometry.record_shape), geometry.dtype)
    chunks: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        chunks.setdefault(number // geometry.chunk_records, []).append(place)
    for places in chunks.values():
        wanted = [numbers[place] for place in places]
        first = min(wanted)
        data = (await source.read(first, max(wanted) + 1, allow_missing=True)).records.joined()
        found[places] = data[[number - first for number in wanted]]
    return found


def _figures(url: str, output: _Output, answers: _Said) -> dict[str, Any]:
    right = answers.right
    return {
        "output": url,
        "array": output.name,
        "range": f"{answers.start}:{answers.stop}",
        "records": answers.count,
        "without_score": int((answers.classes < 0).sum()),
        "right": right,
        "accuracy": None if right is None else right / answers.count,
        "labels_of_no_class": None if answers.labels is None else int(
            ((answers.labels < 0) | (answers.labels >= output.classes)).sum()),
        "classes": output.classes,
    }
