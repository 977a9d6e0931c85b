"""What the Python API refuses before a run begins."""

import asyncio
import contextlib
import functools
import subprocess
import sys
import threading

import pytest
import zarr

from batch_client import RunSpec, run, run_async
from batch_client.api import STOP_SECONDS, calibrate, plan
from batch_client.errors import StoppedError, UsageError

SPEC = RunSpec(input="in", output="out", archive="model.mar")


async def awaited(event):
    """No observer: nobody awaits it."""


class Awaited:
    async def __call__(self, event):
        """As above."""


@pytest.mark.parametrize(("arguments", "wanted"), [
    (("digits.zarr",), "spec is a str: wanted a RunSpec"),
    ((SPEC, 7), "observers is a int: wanted a tuple"),
    ((SPEC, print), "wanted a tuple of them, such as"),
    ((SPEC, (print, "print")), "an observer is a str: wanted what can be called"),
    ((SPEC, (awaited,)), "observer awaited is a coroutine function"),
    ((SPEC, (functools.partial(awaited),)), "observer partial is a coroutine function"),
    ((SPEC, [Awaited()]), "observer Awaited is a coroutine function"),
])
def test_what_is_no_spec_and_no_observer_is_refused_at_once(arguments, wanted):
    for go in (run, lambda *given: asyncio.run(run_async(*given))):
        with pytest.raises(UsageError) as error:
            go(*arguments)
        assert wanted in str(error.value)


@pytest.mark.parametrize("go", [plan, calibrate])
async def test_what_is_no_spec_is_refused_by_the_others_too(go):
    with pytest.raises(UsageError, match="spec is a str: wanted a RunSpec"):
        await go("digits.zarr")


def test_dir_has_all_that_is_public_before_it_was_used():
    done = subprocess.run(
        [sys.executable, "-c", "import batch_client as b; print({*b.__all__} <= {*dir(b)}, 'run' in vars(b))"],
        capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


async def test_a_stop_that_no_loop_can_wait_for_is_refused():
    with pytest.raises(UsageError, match=r"stop is a threading\.Event: wanted an asyncio\.Event"):
        await run_async(SPEC, stop=threading.Event())


async def test_run_in_a_loop_says_what_to_call_instead():
    with pytest.raises(UsageError, match=r"await run_async\(spec\)"):
        run(SPEC)


async def test_a_stop_before_the_run_has_begun_is_not_waited_for(tmp_path):
    """A server that never answers holds the planning up; whoever stops meanwhile is told that nothing was scored."""
    zarr.create_array(tmp_path / "in.zarr", shape=(4, 2), chunks=(2, 2), dtype="uint8")
    stop, writers = asyncio.Event(), []

    def silent(reader, writer):
        writers.append(writer)
        stop.set()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        spec = RunSpec(input=str(tmp_path / "in.zarr"), output=str(tmp_path / "out"),
                       endpoints=(f"http://127.0.0.1:{port}",), model="m")
        with pytest.raises(StoppedError, match=r"^stopped before it scored anything; "):
            async with asyncio.timeout(STOP_SECONDS - 1):
                await run_async(spec, stop=stop)
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    assert writers
    assert not (tmp_path / "out").exists()
