"""What a report gathered → one HTML page: no script, nothing to load, light and dark, well-formed as XML too.

Names, reasons and messages come from servers and stores: all text is escaped. A chart's title says what it shows.
"""

from __future__ import annotations

import base64
import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from batch_client.bottleneck import Bottleneck, Limit
from batch_client.figures import axis_labels, counted, number
from batch_client.report.charts import columns, nice_ticks, shares_bar, text_of
from batch_client.report.collect import SCORED, ReportData, Sample
from batch_client.report.sketches import LogHistogram
from batch_client.report.style import STYLE

__all__ = ["render"]

STATUSES = ("ok", "failed", "not finite")
_SHOWN_SAMPLES = 8
_LONG_END = 0.05  # of the run's time
_SCORE_COLUMNS = 40
_LATENCY_COLUMNS_A_DOUBLING = 4
# A column of a few requests shows their size, not the speed.
_MOST_COLUMNS, _LEAST_COLUMNS, _REQUESTS_A_COLUMN = 120, 6, 4


def render(data: ReportData) -> str:
    """The page of a run that began, or that was found published."""
    found = data.bottleneck
    heading = _heading(data)
    parts = [
        f"<h1>{text_of(heading)}</h1>",
        _ending(data),
        *(f'<p class="ending">The run went on without a server: {text_of(reason)}</p>' for reason in _left_out(data)),
        "" if found is None else _verdict(found),
        _section("This run", _definitions(_figures(data))),
        *([] if found is None else _charts(data, found)),
        _section("Servers", _servers(data)) if len(data.servers) > 1 else "",
        _section("Sample predictions", _samples(data)) if data.samples else "",
        _section("What was run", _definitions(_identity(data), "long")),
    ]
    return ('<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8"/>'
            '<meta http-equiv="Content-Security-Policy" '
            'content="default-src \'none\'; style-src \'unsafe-inline\'; img-src data:"/>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
            f"<title>{text_of(heading)}</title><style>{STYLE}</style></head><body><main>\n"
            + "\n".join(part for part in parts if part) + "\n</main></body></html>\n")


def _left_out(data: ReportData) -> list[str]:
    more = data.left_out_count - len(data.left_out)
    return [*data.left_out, *([f"and {more:,} more like that"] if more else [])]


def _section(title: str, body: str) -> str:
    return f"<section><h2>{text_of(title)}</h2>{body}</section>"


def _figure(title: str, note: str, chart: str) -> str:
    said = f"<p>{text_of(note)}</p>" if note else ""
    return f"<figure><figcaption><h2>{text_of(title)}</h2>{said}</figcaption>{chart}</figure>"


def _definitions(rows: Iterable[tuple[str, str]], kind: str = "short") -> str:
    items = "".join(f"<div><dt>{text_of(name)}</dt><dd>{text_of(value)}</dd></div>" for name, value in rows)
    return f'<dl class="{kind}">{items}</dl>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells of `rows` are HTML already."""
    return ('<div class="wide"><table><thead><tr>' + "".join(f"<th>{text_of(name)}</th>" for name in head)
            + "</tr></thead><tbody>"
            + "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
            + "</tbody></table></div>")


def _heading(data: ReportData) -> str:
    output = data.started.output if data.started else data.published.output if data.published else ""
    name = output.rstrip("/").rpartition("/")[2] or output
    if data.started is None:
        return f"{name}: published before this run"
    if data.published is None:
        return f"{name}: {counted(data.stored, 'record')} stored, not published"
    return f"{name}: {counted(data.stored, 'record')} scored in {_seconds(data.seconds)}"


def _ending(data: ReportData) -> str:
    if data.ending and data.published is None:
        return f'<p class="ending">This run ended before its output was published: {text_of(data.ending)}</p>'
    if data.published is None:
        return '<p class="ending">This part is done; the output is published when all parts are.</p>'
    if data.published.already:
        return '<p class="ending">The output was published already; nothing was scored.</p>'
    return ""


def _verdict(found: Bottleneck) -> str:
    return (f'<p class="verdict">Limited by <strong>{text_of(found.limit.phrase)}</strong>: {text_of(found.evidence)}. '
            f"Next: {text_of(found.advice)}.</p>")


def _figures(data: ReportData) -> list[tuple[str, str]]:
    rate = data.stored / data.seconds if data.seconds > 0 else 0.0
    rows = [("records scored and stored by this run", f"{data.stored:,}"), ("time", _seconds(data.seconds)),
            ("records stored/s", number(rate))]
    if data.started is not None:
        total = data.started.plan.count
        rows.insert(0, ("records of the output", f"{total:,}"))
        if before := data.started.done - data.reused:
            rows.insert(1, ("proven before", f"{before:,}"))
        if data.reused:
            rows.insert(1, ("copied from an earlier output", f"{data.reused:,}"))
        if data.started.ceiling is not None:
            rows += [("the model's ceiling, records/s", number(data.started.ceiling)),
                     ("percent of the ceiling", f"{100 * rate / data.started.ceiling:.0f} %")]
    rows += [(f"records scored: {name}", f"{count:,}") for name, count in zip(STATUSES, data.statuses, strict=True)]
    if data.held:
        rows.append(("chunks held back", f"{data.held:,}"))
    rows += [("requests", f"{data.requests:,}"), ("attempts without a result", f"{data.retries:,}")]
    if data.latency.total:
        rows += [(f"{percent} % of requests within", _seconds(data.latency.percentile(percent)))
                 for percent in (50, 90, 99)]
    return [*rows, ("bytes read for what is stored", _bytes(data.bytes_read)),
            ("bytes written", _bytes(data.bytes_written))]


def _identity(data: ReportData) -> list[tuple[str, str]]:
    rows = [("input", data.input)]
    if data.started is not None:
        rows += [("output", data.started.output), ("model", data.started.model), ("digest", data.started.model_digest),
                 ("numerics fingerprint", data.started.fingerprint)]
    if data.published is not None:
        rows += [] if data.started else [("output", data.published.output)]
        rows.append(("root hash", data.published.root))
    return rows


def _charts(data: ReportData, found: Bottleneck) -> list[str]:
    return [_throughput(data), _time(found), _latency(data.latency) if data.latency.total else "", _retries(data),
            _scores(data) if len(data.scores) > 1 else ""]


def _throughput(data: ReportData) -> str:
    width, rates = _rates(data)
    ceiling = data.started.ceiling if data.started else None
    average = sum(data.timeline.amounts(SCORED)) / data.seconds if data.seconds > 0 else 0.0
    level = None if ceiling is None else (ceiling, f"the model's ceiling, {number(ceiling)}")
    chart = columns([("records", rates)], x_label="seconds since the first read", y_label="records/s",
                    x_ticks=_time_ticks(width * len(rates)), level=level)
    return _figure(f"{number(average)} records/s on average, {number(max(rates))} at best",
                   f"Predictions that arrived, each column {_seconds(width)}.", chart)


def _rates(data: ReportData) -> tuple[float, list[float]]:
    """Seconds of a column, and records/s in each; the last prediction is in the last one, whose rate is until then."""
    most = min(_MOST_COLUMNS, max(_LEAST_COLUMNS, data.requests // _REQUESTS_A_COLUMN))
    amounts, width = _merged(_to_the_end(data, SCORED), data.timeline.width, most)
    last = data.last_prediction - width * (len(amounts) - 1)
    if len(amounts) > 1 and last < width / 2:  # too short for a rate of its own
        amounts[-2:] = [amounts[-2] + amounts[-1]]
        last += width
    rates = [amount / width for amount in amounts]
    return width, [*rates[:-1], amounts[-1] / last if last > 0 and amounts[-1] else rates[-1]] if rates else [0.0]


def _to_the_end(data: ReportData, name: str) -> list[int]:
    """Amounts over time; a run that was not published has nothing since its last prediction, as in an outage."""
    amounts = data.timeline.amounts(name)
    if data.published is None and data.seconds - data.last_prediction > _LONG_END * data.seconds:
        amounts += [0] * (int(data.seconds / data.timeline.width) + 1 - len(amounts))
    return amounts


def _merged(amounts: list[int], width: float, most: int = _MOST_COLUMNS) -> tuple[list[int], float]:
    while len(amounts) > most:
        amounts = [sum(amounts[at:at + 2]) for at in range(0, len(amounts), 2)]
        width *= 2
    return amounts, width


def _time_ticks(seconds: float) -> list[tuple[float, str]]:
    ticks = nice_ticks(0.0, seconds, 8) if seconds > 0 else []
    return [(tick / seconds, label) for tick, label in zip(ticks, axis_labels(ticks), strict=True)]


def _time(found: Bottleneck) -> str:
    shares = sorted(found.shares.items(), key=lambda share: -share[1])
    largest, share = shares[0]
    return _figure(f"{share * 100:.0f} % of the time went to {largest.phrase}",
                   "Each instant belongs to what the run waited for at it; what went on beside that cost no time.",
                   shares_bar([(_SHARES[limit], share) for limit, share in shares]))


_SHARES = {
    Limit.MODEL: "the model: servers computed", Limit.WIRE: "the wire: requests and replies travelled",
    Limit.READING: "reading: too few records for the servers", Limit.WRITING: "writing: chunks were stored first",
    Limit.CLIENT: "the client: nothing else was under way",
    Limit.FAILURES: "failures: servers that rested, or gave no result",
    Limit.ENDS: "start and end: before the first request, after the last reply",
}


def _latency(latency: LogHistogram) -> str:
    per = _LATENCY_COLUMNS_A_DOUBLING
    counts = latency.coarser(per)
    low, high = min(counts), max(counts) + 1
    exact = {percent: latency.percentile(percent) for percent in (50, 90, 99)}

    def place(seconds: float) -> float:
        return min(1.0, max(0.0, (math.log2(seconds) * per - low) / (high - low)))

    ends = 2.0 ** (low / per), 2.0 ** (high / per)
    chart = columns(
        [("requests", [counts.get(at, 0) for at in range(low, high)])], x_label="time of a request (logarithmic)",
        y_label="requests",
        x_ticks=[(place(tick), _seconds(tick)) for tick in _round_numbers(*ends)],
        marks=[(place(seconds), f"{percent} % within {_seconds(seconds)}") for percent, seconds in exact.items()])
    return _figure(f"Half of the requests took {_seconds(exact[50])} or less, one in a hundred over "
                   f"{_seconds(exact[99])}", "From asking for a connection to the last byte received.", chart)


def _round_numbers(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis; a short one has those of a linear axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors if low <= factor * 10.0**decade <= high]
    return ticks if len(ticks) >= 3 else nice_ticks(low, high)


def _retries(data: ReportData) -> str:
    reasons = [name for name in data.timeline.names() if name != SCORED]
    if not reasons:
        return _section("Every request gave a result at its first attempt", "")
    series, width = [], data.timeline.width
    for reason in reasons:
        amounts, width = _merged(_to_the_end(data, reason), data.timeline.width)
        series.append((f"{reason}: {sum(amounts):,}", amounts))
    chart = columns(series, x_label="seconds since the first read", y_label="attempts",
                    x_ticks=_time_ticks(width * len(series[0][1])))
    return _figure(f"{data.retries:,} attempts gave no result, most often: {reasons[0]}",
                   f"They were repeated, or their records taken apart; each column {_seconds(width)}.", chart)


def _scores(data: ReportData) -> str:
    low, high = _score_range(data.scores)
    # In halves, since the difference of two floats may be over the largest one.
    counts, _ = np.histogram(data.scores / 2, _SCORE_COLUMNS, (low / 2, high / 2))
    middle = float(np.median(data.scores / 2)) * 2

    def place(value: float) -> float:
        return (value / 2 - low / 2) / (high / 2 - low / 2)

    ticks = nice_ticks(low, high, 8)
    chart = columns([("records", [float(count) for count in counts])],
                    x_label=f"highest value of {data.score_name} for a record", y_label="records of the sample",
                    x_ticks=[(place(tick), label) for tick, label in zip(ticks, axis_labels(ticks), strict=True)],
                    marks=[(place(middle), f"median {middle:.6g}")])
    return _figure(f"At least half of the records score {middle:.6g} or more",
                   f"Of {len(data.scores):,} records, evenly spaced among those scored.", chart)


def _score_range(scores: np.ndarray) -> tuple[float, float]:
    """Of the axis; wide enough for columns that differ, whatever finite floats the scores are."""
    low, high = float(scores.min()), float(scores.max())
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    largest = max(abs(low), abs(high))
    if high / 2 - low / 2 < max(1e-9 * largest, 1e-300):
        more = max(0.5, 1e-9 * largest)
        low, high = max(low - more, -sys.float_info.max), min(high + more, sys.float_info.max)
    return low, high


def _servers(data: ReportData) -> str:
    return _table(["server", "requests", "records in them", "attempts without a result", "outages"],
                  [[text_of(url), f"{server.requests:,}", f"{server.records:,}", f"{server.retries:,}",
                   f"{server.outages:,}"]
                   for url, server in data.servers.items()])


def _samples(data: ReportData) -> str:
    count, last = min(len(data.samples), _SHOWN_SAMPLES), len(data.samples) - 1
    shown = [data.samples[at * last // max(1, count - 1)] for at in range(count)]
    pictures = any(sample.picture for sample in shown)
    head = ["record", *(["picture"] if pictures else []), "status", "highest", "at place", "first values"]
    return _table(head, [_row(sample, pictures=pictures) for sample in shown])


def _row(sample: Sample, *, pictures: bool) -> list[str]:
    picture = [] if not pictures else ["" if sample.picture is None else (
        f'<img alt="record {sample.index}" src="data:image/png;base64,{base64.b64encode(sample.picture).decode()}"/>')]
    return [f"{sample.index:,}", *picture, STATUSES[sample.status],
            "none" if math.isnan(sample.highest) else f"{sample.highest:.6g}",
            "none" if sample.top is None else str(sample.top),
            _values(sample.values)]


def _values(values: Sequence[float]) -> str:
    """Of one kind, so that they compare: decimals where the largest has any."""
    decimals = 0.1 <= max(map(abs, values), default=0.0) < 100
    return " ".join(f"{value:.3f}" if decimals else f"{value:.3g}" for value in values)


def _seconds(seconds: float) -> str:
    if seconds >= 120:
        minutes = round(seconds / 60)
        return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _bytes(count: int) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,} bytes"
