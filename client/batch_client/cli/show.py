"""`batch-client show`: a picture of some records with what the model said; with labels, how many are right."""

from __future__ import annotations

import io
import json
import math
import os
import tokenize
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import click

from batch_client.errors import DataError, MismatchError, UsageError, in_one_line
from batch_client.jsontext import parse_json
from batch_client.urls import split_url

if TYPE_CHECKING:
    import numpy as np

    from batch_client.picture import Panel
    from batch_client.reader import Source
    from batch_client.storage import Store

__all__ = ["command"]

MOST_RECORDS = 10_000_000
EVENLY, NOTABLE = 24, 16
# What reading the header raises of a file that is none of numpy's, or is cut off.
_NO_NPY = (ValueError, LookupError, SyntaxError, MemoryError, tokenize.TokenError)
_HEADER_BYTES = 16 << 10  # numpy reads none of more than 10,000
_BLOCK_BYTES = 32 << 20


@click.command("show")
@click.argument("output_url", metavar="OUTPUT")
@click.option("--labels", metavar="FILE.npy", help="The true classes (a .npy file or a Zarr array, path or URL): one "
              "for each record of the source, of the output, or of the range.")
@click.option("--records", metavar="A:B", help="Only records A to B-1, counted as in the source.")
@click.option("--source", metavar="URL", help="Where the scored array is now.  [default: where the run read it]")
@click.option("--anonymous", is_flag=True, help="Use storage without credentials: public buckets.")
@click.option("-o", "--output", "picture", metavar="FILE.png", type=click.Path(dir_okay=False, path_type=Path),
              help="The picture.  [default: the output's name with .png]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(output_url: str, *, picture: Path | None, as_json: bool, **options: Any) -> None:
    """Draw records of a published OUTPUT with their predictions: some evenly spaced, and the most doubtful ones.

    With --labels the wrong ones are marked and the accuracy is printed. Of several outputs the first with classes is
    shown.
    """
    from batch_client.api import run_until_complete

    labels = options["labels"] or ""
    if os.path.isfile(labels) and not labels.endswith(".npy"):  # noqa: PTH113 - which raises nothing for what is no path
        raise UsageError(f"--labels {labels}: this is a file of another kind; wanted a .npy file or a Zarr array")
    path = picture or Path(_place(output_url).stem + ".png")
    png, figures, sentence = run_until_complete(_show(output_url, **options))
    try:
        path.write_bytes(png)
    except OSError as error:
        raise UsageError(f"{path}: can't write the picture there: {error.strerror}") from error
    if as_json:
        click.echo(json.dumps({**figures, "picture": str(path)}))
        return
    click.echo(sentence)
    click.echo(f"picture: {path}")


def _place(url: str) -> PurePosixPath:
    """The path of a URL, or the path that it is: there a '#' or a '?' is a part of a name."""
    return PurePosixPath(split_url(url).path if "://" in url else url)


@dataclass(frozen=True)
class _Output:
    """What is shown of an output: the array `name` with the scores, `alone` if there is no other, and its status;
    `scored` is what it was made of.
    """

    name: str
    alone: bool
    scores: Source
    status: Source | None
    attributes: dict[str, Any]
    scored: _Scored | None

    @property
    def has_classes(self) -> bool:
        return math.prod(self.scores.geometry.record_shape) > 1


@dataclass(frozen=True)
class _Scored:
    """What a run says of itself: the model's outputs in its own order, shape and dtype of the source array."""

    outputs: list[str]
    shape: tuple[int, ...]
    dtype: str

    def require(self, place: str, inputs: Source) -> None:
        """Raises UsageError for another array than was scored; it may have grown since."""
        geometry = inputs.geometry
        known = (min(geometry.count, self.shape[0]), *geometry.record_shape)
        if (known, str(geometry.dtype)) != (self.shape, self.dtype):
            raise UsageError(f"{place}: found {geometry.dtype} of shape {geometry.shape}, wanted {self.dtype} of shape "
                             f"{self.shape}: is it the array that was scored?")


@dataclass(frozen=True)
class _Answers:
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


async def _show(output_url: str, *, labels: str | None, records: str | None, source: str | None,
                anonymous: bool) -> tuple[bytes, dict[str, Any], str]:
    """The picture, its figures, and the same in words."""
    from batch_client.picture import draw
    from batch_client.reader import open_source
    from batch_client.spec import Records
    from batch_client.storage import open_store

    output = await _open_output(output_url, anonymous=anonymous)
    scores, attributes = output.scores, output.attributes
    origin = attributes.get("origin", 0)
    if not isinstance(origin, int):
        raise MismatchError(f"{output_url}: no output of batch-client: its attribute origin is {str(origin)[:100]}, "
                            "wanted the number of its first record in the source")
    start, stop = _range(Records.parse(records) if records else Records(), origin, scores.geometry.count)
    if labels is not None and not output.has_classes:
        raise UsageError(f"--labels: output {output.name} has one number a record and no score for each class: there "
                         "is nothing to count as right")
    place = source or attributes.get("source")
    if not place:
        raise UsageError(f"{output_url}: it does not say what was scored; name it with --source URL")
    inputs = await open_source(open_store(place, anonymous=anonymous), attributes.get("source_array") or None)
    if output.scored is not None:
        output.scored.require(place, inputs)
    if inputs.geometry.count < stop:
        raise UsageError(f"{place}: found {inputs.geometry.count:,} records, wanted at least {stop:,}; "
                         "is it the array that was scored?")
    span = _Range(start, stop, origin, scores.geometry.count, inputs.geometry.count)
    truth = None if labels is None else await _labels(labels, span, anonymous=anonymous)
    answers = await _answers(scores, output.status, origin, start, stop, truth)
    panels = [await _panel(title, picks, inputs, scores, origin, answers) for title, picks in _choose(answers)]
    figures = _figures(output_url, output, answers)
    sentence = _sentence(figures) if output.alone else f"{output.name}: {_sentence(figures)}"
    return draw(f"{_place(output_url).name}: {sentence}", panels), figures, sentence


async def _open_output(url: str, *, anonymous: bool) -> _Output:
    from zarr.api import asynchronous as zarr_async
    from zarr.errors import ContainsArrayError, GroupNotFoundError

    from batch_client.layout import SPEC_KEY
    from batch_client.reader import UNREADABLE, open_source
    from batch_client.storage import open_store
    from batch_client.zarrstore import SourceStore

    store = open_store(url, anonymous=anonymous)
    try:
        group = await zarr_async.open_group(SourceStore(store), mode="r")
        shapes = {name: array.shape async for name, array in group.arrays()}
    except (FileNotFoundError, GroupNotFoundError, ContainsArrayError) as error:
        if await store.head(SPEC_KEY) is None:
            raise MismatchError(f"{url}: no published output there, nor one that was begun (no {SPEC_KEY})") from error
        raise MismatchError(f"{url}: not published yet: finish it with the same batch-client run; batch-client status "
                            "says how far it is") from error
    except UNREADABLE as error:
        raise DataError(f"{url}: its Zarr metadata can't be read ({in_one_line(error)})") from error
    status = await open_source(store, "record_status") if shapes.pop("record_status", None) is not None else None
    scored = await _scored(store)
    outputs = [] if scored is None else scored.outputs
    names = [name for name in outputs or sorted(shapes) if len(shapes.get(name, (0, 0, 0))) <= 2]
    if not names:
        kind = DataError if outputs else MismatchError
        raise kind(f"{url}: found arrays {shapes}, wanted one with a row of scores for each record")
    name = next((name for name in names if math.prod(shapes[name][1:]) > 1), names[0])
    return _Output(name, len(shapes) == 1, await open_source(store, name), status, dict(group.attrs), scored)


async def _scored(store: Store) -> _Scored | None:
    """What the run says of itself; None where it is not told."""
    from batch_client.layout import SPEC_KEY
    from batch_client.storage import child_url

    spec = await store.get(SPEC_KEY)
    if spec is None:
        return None
    try:
        said = parse_json(spec.data)
        return _Scored([str(name) for name, _, _ in said["outputs"]], tuple(map(int, said["source_shape"])),
                       str(said["source_dtype"]))
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"{child_url(store.url, SPEC_KEY)} can't be read ({error})") from error


@dataclass(frozen=True)
class _Range:
    """Records [start, stop) of a source of `whole`, of which [origin, origin + scored) are in the output."""

    start: int
    stop: int
    origin: int
    scored: int
    whole: int

    def first_label(self, shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> int:
        """Where in labels of this shape those of the range begin: there is one for each record of the range, of the
        output or of the source. Raises UsageError for others.
        """
        if len(shape) != 1 or dtype.kind not in "iub":
            raise UsageError(f"{where}: found {dtype} of shape {shape}, wanted one whole number a record")
        firsts = {self.whole: self.start, self.scored: self.start - self.origin, self.stop - self.start: 0}
        if shape[0] not in firsts:
            named = {self.whole: "of the source", self.scored: "of the output",
                     self.stop - self.start: f"of {self.start}:{self.stop}"}
            wanted = " or ".join(f"{count:,} (one for each record {which})" for count, which in sorted(named.items()))
            raise UsageError(f"{where}: found {shape[0]:,} labels, wanted {wanted}")
        return firsts[shape[0]]


def _range(records: Any, origin: int, count: int) -> tuple[int, int]:
    """The asked range [start, stop) in the source's numbering; the output holds [origin, origin + count)."""
    start = origin if records.start is None else records.start
    stop = origin + count if records.stop is None else records.stop
    if not origin <= start < stop <= origin + count:
        raise UsageError(f"--records {start}:{stop}: wanted A < B within {origin}:{origin + count}, which were scored")
    if stop - start > MOST_RECORDS:
        raise UsageError(f"{stop - start:,} records are more than the {MOST_RECORDS:,} that are looked at together; "
                         "name a range with --records A:B")
    return start, stop


async def _labels(where: str, span: _Range, *, anonymous: bool) -> np.ndarray:
    """The labels of the range, from a .npy file, local or in a store, or a Zarr array, of which no more is read."""
    from batch_client.reader import open_source
    from batch_client.storage import open_store

    if where.endswith(".npy"):
        return await _npy(where, span, anonymous=anonymous)
    source = await open_source(open_store(where, anonymous=anonymous), None)
    first = span.first_label(source.geometry.shape, source.geometry.dtype, where)
    return (await source.read(first, first + span.stop - span.start, allow_missing=True)).records.joined()


async def _npy(where: str, span: _Range, *, anonymous: bool) -> np.ndarray:
    """Of a small file all is read: a web server need not give parts."""
    import numpy as np
    from numpy.lib import format as npy

    from batch_client.storage import open_store

    folder, slash, name = where.rpartition("/")
    store = open_store(folder or (slash or "."), anonymous=anonymous)
    meta = await store.head(name)
    if meta is None:
        raise UsageError(f"{where}: no such file")
    whole = await store.get(name) if meta.size <= _BLOCK_BYTES else None

    async def part(start: int, stop: int) -> memoryview:
        if whole is not None:
            return whole.data[start:stop]
        blob = await store.get(name, start, stop)
        return memoryview(b"") if blob is None else blob.data

    try:
        header = io.BytesIO(await part(0, _HEADER_BYTES))
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(header)]
        shape, _, dtype = read(header)
        start = header.tell()
        if meta.size < start + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{meta.size:,} bytes for numbers of shape {shape}")
    except _NO_NPY as error:
        raise UsageError(f"{where}: not a .npy file of numbers ({in_one_line(error)})") from error
    start += span.first_label(shape, dtype, where) * dtype.itemsize
    return np.frombuffer(await part(start, start + (span.stop - span.start) * dtype.itemsize), dtype)


async def _answers(scores: Source, status: Source | None, origin: int, start: int, stop: int,
                   labels: np.ndarray | None) -> _Answers:
    """Reduce the scores of a range block by block."""
    import numpy as np

    geometry = scores.geometry
    rows = max(_BLOCK_BYTES // max(geometry.record_bytes, 1), 1)
    step = -(-rows // geometry.chunk_records) * geometry.chunk_records
    classes = np.empty(stop - start, np.int64)
    best = np.empty(stop - start, np.float32)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        values = _rows((await scores.read(first - origin, last - origin)).records.joined())
        unusable = ~np.isfinite(values).all(axis=1)
        if status is not None:
            unusable |= (await status.read(first - origin, last - origin)).records.joined() != 0
        chosen = np.where(unusable[:, None], 0, values).argmax(axis=1)
        part = slice(first - start, last - start)
        classes[part] = np.where(unusable, -1, chosen)
        best[part] = np.where(unusable, np.nan, values[np.arange(len(values)), chosen])
    return _Answers(start, stop, classes, best, labels)


def _rows(scores: np.ndarray) -> np.ndarray:
    return scores.reshape(len(scores), -1).astype("float64")


def _choose(answers: _Answers) -> list[tuple[str, list[int]]]:
    """Titles and places (within the range) of the records to draw."""
    import numpy as np

    count = answers.count
    if count <= EVENLY + NOTABLE:
        return [("", list(range(count)))]
    evenly = np.linspace(0, count - 1, EVENLY).round().astype(int).tolist()
    panels = [(f"{EVENLY} of {count:,} records, evenly spaced", evenly)]
    if answers.labels is None:
        without, scored = np.flatnonzero(answers.classes < 0), np.flatnonzero(answers.classes >= 0)
        doubtful = scored[np.argsort(answers.scores[scored], kind="stable")][:NOTABLE]
        if len(doubtful):
            panels.append((f"the {len(doubtful)} with the lowest best score", doubtful.tolist()))
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
                 answers: _Answers) -> Panel:
    """Read the picked records and their scores, each chunk of the source once."""
    import numpy as np

    from batch_client.picture import Panel

    numbers = [answers.start + pick for pick in picks]
    records = await _read_rows(inputs, numbers)
    values = _rows(await _read_rows(scores, [number - origin for number in numbers]))
    values[answers.classes[picks] < 0] = np.nan
    labels = None if answers.labels is None else answers.labels[picks]
    return Panel(title, records, values, labels, numbers)


async def _read_rows(source: Source, numbers: list[int]) -> np.ndarray:
    """Single records of a source, in the order of `numbers`, reading each chunk once."""
    import numpy as np

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


def _figures(url: str, output: _Output, answers: _Answers) -> dict[str, Any]:
    right = answers.right
    return {
        "output": url,
        "array": output.name,
        "range": f"{answers.start}:{answers.stop}",
        "records": answers.count,
        "without_score": int((answers.classes < 0).sum()),
        "right": right,
        "accuracy": None if right is None else right / answers.count,
    }


def _sentence(figures: dict[str, Any]) -> str:
    from batch_client.figures import counted, percent

    text = counted(figures["records"], "record")
    if figures["right"] is not None:
        text = f"{figures['right']:,} of {text} right, {percent(figures['accuracy'])}"
    if figures["without_score"]:
        text += f", {figures['without_score']:,} without a score"
    return text
