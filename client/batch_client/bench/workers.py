"""The workers of one way to run a model, without a server around them: processes with a worker's environment and code.

Rule: nothing of them outlives the block that they are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

from batch_client.errors import ServingError

__all__ = ["Workers", "ask_handler", "workers_of"]

# A window ends with a request that began in it, and a heavy model's takes a while.
ANSWER_SECONDS = 120.0
# An archive of many GB is unpacked from wherever it is, which is what a worker's loading may take too.
PREPARE_SECONDS = 600.0
END_SECONDS = 5.0


class Workers:
    """Processes that are ready to score requests of `records` records for as long as they are asked to; `filled` is the
    part of a run's micro-batches that has records.
    """

    def __init__(self, processes: Sequence[_Process], records: int, filled: float) -> None:
        self._processes = processes
        self.records = records
        self._filled = filled

    async def window(self, seconds: float) -> float:
        """Records/s of a run by all processes together, while each scores for `seconds`, and at least one request.

        Raises ServingError when one fails.
        """
        for process in self._processes:
            process.tell(f"{seconds}\n")
        answers = [await process.answer(seconds + ANSWER_SECONDS) for process in self._processes]
        return self._filled * sum(float(answer["records"]) / float(answer["seconds"]) for answer in answers)


@asynccontextmanager
async def workers_of(
    directory: Path, environ: Mapping[str, str], *, count: int, records_of: Callable[[float | None], int], gpus: int,
    seconds: float, filled: float = 1.0,
) -> AsyncIterator[Workers]:
    """`count` processes that have loaded the model in `directory`. `records_of` says how many records a request has,
    given the seconds that a micro-batch takes, None if unknown: the least of all processes, which load side by side.
    `filled`: the part of a run's micro-batches that has records.

    Raises ServingError when one has not within `seconds`, with the handler's reason.
    """
    async with contextlib.AsyncExitStack() as stack:
        processes = []
        for number in range(count):
            words = ["score", str(directory), str(number % gpus if gpus else -1)]
            processes.append(await stack.enter_async_context(_process(words, environ, directory)))
        try:
            async with asyncio.timeout(seconds):
                ready = [await process.answer(seconds) for process in processes]
                took = min(float(answer["micro_batch_ms"]) for answer in ready) / 1e3
                records = records_of(took if 0 < took < math.inf else None)
                for process in processes:
                    process.tell(f"{records}\n")
                for process in processes:
                    await process.answer(seconds)
        except TimeoutError:
            raise ServingError(f"not loaded within {seconds:.0f} s") from None
        yield Workers(processes, records, filled)


async def ask_handler(words: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """One answer of `batch_handler.measure`, such as what an archive holds. Raises ServingError with its reason."""
    async with _process(words, environ, None) as process:
        return await process.answer(PREPARE_SECONDS)


class _Process:
    def __init__(self, process: asyncio.subprocess.Process, errors: IO[bytes]) -> None:
        self._process = process
        self._errors = errors

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        # To one that has ended nothing can be said, of which asyncio makes an OSError and uvloop a RuntimeError; how it
        # ended, `answer` says.
        with contextlib.suppress(OSError, RuntimeError):
            self._process.stdin.write(line.encode())

    async def answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), seconds)
        except TimeoutError:
            raise ServingError(f"no answer within {seconds:.0f} s") from None
        if not line:
            raise ServingError(await self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ServingError(str(answer["error"]))
        return answer

    async def _last_words(self) -> str:
        code = await self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        if "No module named" in last:
            return f'the handler is not installed here ({last[:100]}): pip install "batch-client[serve]"'
        return f"the process ended with {code}: {last[:200] or 'it said nothing'}"


@asynccontextmanager
async def _process(words: Sequence[str], environ: Mapping[str, str], folder: Path | None) -> AsyncIterator[_Process]:
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "batch_handler.measure", *words, env=dict(environ), cwd=folder,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors,
            start_new_session=True,  # so that a Ctrl-C reaches us alone
        )
        try:
            yield _Process(process, errors)
        finally:
            # It holds nothing that is worth a farewell.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.wait_for(process.wait(), END_SECONDS)
