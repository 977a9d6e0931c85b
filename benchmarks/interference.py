"""Online queries beside a bulk run: how quick they stay, and what they cost the run.

    python benchmarks/interference.py [--queries 2000] [--rounds 10] [--cases two-lanes one-lane …] [--plot PNG]

Queries are single records at Poisson arrivals, 20 a second by default, open loop: a slow answer holds no later query
up, and latency counts from the moment when a query was due. Each round of each case is: queries alone, then a bulk run
that begins and warms up, then the run alone and the run with queries, two turns of each. The run's speed is what the
server's own counter says; its source is an array of a billion records that has no chunks (--allow-missing), so that it
never ends by itself. Idle and beside, alone and beside are taken within a minute of each other, since a machine's speed
drifts. The servers of both arrangements are up all the time, one of them idle.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import zarr
from measure import heading, machine, row, today
from workload import SMALL

from batch_client.eventloop import run_until_complete
from batch_client.server import EmbeddedServer, ServerSettings

RECORD = (28, 28)
ENDLESS = 1_000_000_000
WARM_SECONDS = 3.0
CONNECTIONS = 8  # of the asker: more than there ever are queries at a time in two lanes
TURNS = 2  # of the run alone, and of the run with queries, in a round
# Any token is good: the servers are on the loopback, and the runs need not follow renewals.
OPEN = {"disable_token_authorization": "true"}


@dataclass
class Case:
    """An arrangement of lanes and a size of bulk requests, and what was seen of it; latencies in ms.

    scheduling: the policy and niceness of a bulk lane's workers, if not those that the handler chooses.
    spinning: no run at all, but a loop of SCHED_IDLE on each core: what the machine does to queries when it is busy.
    """

    name: str
    online_workers: int
    request_records: int | None = None
    scheduling: tuple[int, int] | None = None
    spinning: bool = False
    idle: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    bulk_alone: list[float] = field(default_factory=list)
    bulk_beside: list[float] = field(default_factory=list)


CASES = (
    Case("one-lane", 0),
    Case("one-lane-512", 0, 512),
    Case("one-lane-256", 0, 256),
    Case("one-lane-128", 0, 128),
    Case("two-lanes", 1),
    Case("two-lanes-256", 1, 256),
)
# Not among the default ones: they show why the bulk lane's priority is what it is. Setting them needs root on Linux.
SCHEDULING = {
    "two-lanes-nice-0": ("SCHED_OTHER", 0), "two-lanes-nice-19": ("SCHED_OTHER", 19),
    "two-lanes-batch": ("SCHED_BATCH", 19), "two-lanes-idle": ("SCHED_IDLE", 19),
}
ALL = {case.name: case for case in CASES} | {"spinning": Case("spinning", 1, spinning=True)} | {
    name: Case(name, 1, scheduling=(getattr(os, policy), nice)) for name, (policy, nice) in SCHEDULING.items()
    if hasattr(os, policy)}


def main() -> None:
    options = arguments()
    chosen = [ALL[name] for name in dict.fromkeys(options.cases)]
    if len({case.scheduling is None for case in chosen if case.online_workers}) > 1:
        sys.exit("cases with a scheduling of their own and without share a server: compare with two-lanes-idle")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        archive = SMALL.pack(work, options.runtime, options.model)
        zarr.create_array(work / "in.zarr", shape=(ENDLESS, *RECORD), chunks=(1000, *RECORD), dtype="uint8")
        run_until_complete(measure(options, archive, work, chosen))
    report(options, chosen)
    if options.plot is not None:
        draw(chosen, options.plot)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=2000, help="of each case, over all rounds, idle and beside each")
    parser.add_argument("--rate", type=float, default=20.0, help="queries a second")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, help="of a bulk lane, or of the one lane  [default: cores]")
    parser.add_argument("--cases", nargs="+", choices=list(ALL),
                        default=[case.name for case in CASES])
    parser.add_argument("--model", type=Path, help="a whole pickled module that takes 1x28x28 [default: the demo's]")
    parser.add_argument("--runtime", choices=["eager", "torchscript"], default="torchscript")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the interference curve (needs matplotlib)")
    options = parser.parse_args()
    if options.queries < options.rounds * TURNS:
        parser.error(f"--queries {options.queries}: wanted at least {options.rounds * TURNS}, {TURNS} in each round")
    return options


async def measure(options: argparse.Namespace, archive: Path, work: Path, cases: list[Case]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        servers = {}
        for online_workers in sorted({case.online_workers for case in cases}):
            settings = ServerSettings(archive, workers=options.workers, online_workers=online_workers,
                                      extra_properties=OPEN)
            servers[online_workers] = await stack.enter_async_context(EmbeddedServer(settings))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        rng = random.Random(0)
        for number in range(options.rounds):
            for case in cases:
                one = Round(servers[case.online_workers], session, options, rng)
                async with contextlib.aclosing(one.asker):
                    await one.run(case, work, alone_first=number % 2 == 0)
                if not case.spinning:
                    print(f"round {number + 1}, {case.name}: bulk {case.bulk_beside[-1]:,.0f} records/s beside "
                          f"queries, {case.bulk_alone[-1]:,.0f} alone", flush=True)


class Round:
    """One round of one case at its server."""

    def __init__(self, server: EmbeddedServer, session: aiohttp.ClientSession, options: argparse.Namespace,
                 rng: random.Random) -> None:
        self.server = server
        self.session = session
        self.rng = rng
        self.rate = options.rate
        self.queries = options.queries // options.rounds // TURNS * TURNS
        self.answered = 0
        image = np.random.default_rng(0).integers(0, 256, RECORD, dtype=np.uint8).tolist()
        self.asker = Asker(server.url, f"/predictions/{server.model_name}", json.dumps([image]).encode())

    async def run(self, case: Case, work: Path, *, alone_first: bool) -> None:
        if case.scheduling is not None:
            described = await self.server.describe(self.server.lanes[-1].name)
            for worker in described["workers"]:
                schedule(worker["pid"], *case.scheduling)
        at_first = await self.records()
        await self.asker.open(CONNECTIONS)
        case.idle += await self.ask()
        if case.spinning:
            async with spinning():
                case.beside += await self.ask()
        else:
            await self.beside_bulk(case, work, alone_first=alone_first)
        if len(self.server.lanes) > 1:
            await self.check(at_first.get(self.server.model_name, 0) + self.answered)

    async def beside_bulk(self, case: Case, work: Path, *, alone_first: bool) -> None:
        async with self.bulk(case, work):
            await self.warm()
            # There and back: a speed that drifts steadily drifts the same for both.
            scored, seconds = {False: 0.0, True: 0.0}, {False: 0.0, True: 0.0}
            for beside in (False, True, True, False) if alone_first else (True, False, False, True):
                before, began, answered = await self.records(), time.perf_counter(), self.answered
                if beside:
                    case.beside += await self.ask(TURNS)
                else:
                    await asyncio.sleep(self.queries / TURNS / self.rate)
                after = await self.records()
                seconds[beside] += time.perf_counter() - began
                bulk = self.server.lanes[-1].name
                scored[beside] += after.get(bulk, 0) - before.get(bulk, 0)
                if len(self.server.lanes) == 1:
                    scored[beside] -= self.answered - answered
            case.bulk_alone.append(scored[False] / seconds[False])
            case.bulk_beside.append(scored[True] / seconds[True])

    async def check(self, wanted: float) -> None:
        """Queries, and nothing else, were scored in their lane. The counter is a moment behind the replies."""
        for _ in range(50):
            found = (await self.records()).get(self.server.model_name, 0)
            if found == wanted:
                return
            await asyncio.sleep(0.1)
        sys.exit(f"the online lane scored {found:,.0f} records, wanted {wanted:,.0f}: requests went to another lane")

    @contextlib.asynccontextmanager
    async def bulk(self, case: Case, work: Path) -> AsyncIterator[None]:
        """A bulk run for the length of the block; its output is thrown away."""
        output = work / "out.zarr"
        words = ["run", work / "in.zarr", output, "--allow-missing", "--log", "none", "--endpoint", self.server.url,
                 "--model", self.server.model_name]
        if case.request_records is not None:
            words += ["--request-records", case.request_records]
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "batch_client", *map(str, words),
                                                       stderr=asyncio.subprocess.PIPE)
        try:
            yield
            assert process.returncode is None, "the bulk run ended early"
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            _, said = await process.communicate()
            shutil.rmtree(output, ignore_errors=True)
        assert process.returncode == 75, said.decode()

    async def warm(self) -> None:
        start = await self.records()
        while await self.records() == start:  # noqa: ASYNC110 - the server's counter sends no events
            await asyncio.sleep(0.2)
        await asyncio.sleep(WARM_SECONDS)

    async def records(self) -> dict[str, float]:
        """What the server has scored, by lane."""
        async with self.session.get(self.server.metrics_url) as reply:
            text = await reply.text()
        return {name: float(value) for name, value in
                re.findall(r'^BatchRecords{.*ModelName="([^"]+)".*} (\S+)$', text, re.MULTILINE)}

    async def ask(self, turns: int = 1) -> list[float]:
        """Latencies in ms of one of `turns` equal parts of a round's queries: single records at Poisson arrivals, each
        from the moment when it was due; infinite for one that the server had no room for.
        """
        due = time.monotonic()  # uvloop's own time is in whole milliseconds

        async def one(due: float) -> float:
            await asyncio.sleep(due - time.monotonic())
            status, answer = await self.asker.ask()
            if status == 503:
                return math.inf
            assert len(json.loads(answer)["predictions"][0]) == 10, answer
            return (time.monotonic() - due) * 1e3

        async with asyncio.TaskGroup() as tasks:
            asked = []
            for _ in range(self.queries // turns):
                due += self.rng.expovariate(self.rate)
                asked.append(tasks.create_task(one(due)))
        latencies = [task.result() for task in asked]
        self.answered += sum(map(math.isfinite, latencies))
        return latencies


class Asker:
    """One query, asked over connections that stay. Who asks is elsewhere in real life, and here on the cores of the
    server: so the query is written once, and its way takes 0.4 ms of a core, where aiohttp's takes 1.0.
    """

    def __init__(self, url: str, path: str, body: bytes) -> None:
        where = urlsplit(url)
        self._where = where.hostname, where.port
        self._query = (f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
                       f"Content-Length: {len(body)}\r\n\r\n").encode() + body
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def open(self, connections: int) -> None:
        """Make connections, so that no query has to."""
        for _ in range(connections):
            self._idle.append(await asyncio.open_connection(*self._where))

    async def ask(self) -> tuple[int, bytes]:
        """The reply's status and body."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._where)
        writer.write(self._query)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)\r\n", head, re.IGNORECASE)
        assert length is not None, head
        body = await reader.readexactly(int(length[1]))
        self._idle.append((reader, writer))
        return int(head.split(b" ", 2)[1]), body

    async def aclose(self) -> None:
        """End the connections."""
        while self._idle:
            _, writer = self._idle.pop()
            writer.close()
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def spinning() -> AsyncIterator[None]:
    """Each core busy for the length of the block, with what gives way to anything else and touches no memory."""
    loop = "import os\nos.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"
    processes = [await asyncio.create_subprocess_exec(sys.executable, "-c", loop) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            await process.wait()


def schedule(pid: int, policy: int, nice: int) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)


def report(options: argparse.Namespace, cases: list[Case]) -> None:
    print(f"\n{today()}, {machine()}, {options.runtime}, "
          f"{len(cases[0].idle)} queries idle and beside in {options.rounds} rounds, {options.rate:g} a second")
    print(heading("case", "idle p50 / p99 ms", "beside p50 / p99 ms", "p99 ÷ idle", "turned away",
                  "bulk alone, records/s", "beside", "beside ÷ alone (range)"))
    for case in cases:
        (idle50, idle99), (beside50, beside99) = percentiles(case.idle), percentiles(case.beside)
        kept, away = shares(case), sum(map(math.isinf, case.beside))
        bulk = (f"{statistics.median(case.bulk_alone):,.0f}", f"{statistics.median(case.bulk_beside):,.0f}",
                f"{statistics.median(kept):.3f} ({min(kept):.3f} to {max(kept):.3f})") if case.bulk_alone else ("",) * 3
        print(row(case.name, f"{idle50:.1f} / {idle99:.1f}", f"{beside50:.1f} / {beside99:.1f}",
                  f"{beside99 / idle99:.2f}", away, *bulk))


def percentiles(latencies: list[float]) -> tuple[float, float]:
    middle, high = np.percentile(latencies, [50, 99], method="higher")
    return float(middle), float(high)


def shares(case: Case) -> list[float]:
    pairs = zip(case.bulk_beside, case.bulk_alone, strict=True)
    return [beside / alone for beside, alone in pairs if alone] or [math.nan]  # a window may be shorter than a batch


def draw(cases: list[Case], path: Path) -> None:
    """The interference curve: online latency against the bulk run's speed, p50 to p99 a bar, idle as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    idle50, idle99 = percentiles([latency for case in cases for latency in case.idle])
    axes.axhspan(idle50, idle99, color="0.88", label="queries alone, p50 to p99")
    for online_workers, label, color in ((0, "one lane", "#b5482f"), (1, "two lanes", "#1f6f8b")):
        ours = [case for case in cases if case.online_workers == online_workers and case.scheduling is None
                and not case.spinning]
        if not ours:
            continue
        speeds = [statistics.median(case.bulk_beside) for case in ours]
        middles, highs = zip(*(percentiles(case.beside) for case in ours), strict=True)
        axes.vlines(speeds, middles, highs, color=color, linewidth=2)
        axes.scatter(speeds, middles, marker="o", color=color, label=f"{label}, p50", zorder=3)
        axes.scatter(speeds, highs, marker="_", s=160, color=color, label=f"{label}, p99", zorder=3)
        for case, speed, high in zip(ours, speeds, highs, strict=True):
            size = "default requests" if case.request_records is None else f"requests of {case.request_records}"
            axes.annotate(size, (speed, high), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set(yscale="log", xlabel="bulk run, records/s, while queries come", ylabel="online latency, ms")
    axes.margins(x=0.15, y=0.15)
    axes.legend(fontsize=8, loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
