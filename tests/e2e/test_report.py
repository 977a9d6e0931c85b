"""`run --report` as a user has it: a page after every run that began, also after one that ended early."""

import asyncio
import json
import os
import resource
import shutil
import subprocess
import xml.etree.ElementTree as ET

import pytest
import zarr

from batch_client.api import run, run_async
from batch_client.cli.run import _page_about
from batch_client.errors import StoppedError, StorageError
from batch_client.events import RecordsScored
from batch_client.spec import RunSpec
from support.cli import command, run_cli


@pytest.fixture
def folder(tmp_path, toy_images):
    zarr.create_array(tmp_path / "in.zarr", data=toy_images, chunks=(50, 12, 12), fill_value=0)
    return tmp_path


def text_of(page):
    return "".join(ET.fromstring(page.read_text().partition("\n")[2]).itertext())  # noqa: S314 - our own page


def test_a_run_leaves_a_page_and_says_what_limited_it(folder, clean_environ, toy_server):
    done = run_cli(["run", "in.zarr", "out.zarr", "--request-records", "64", "--report", "page.html",
                    *toy_server.flags], clean_environ, cwd=folder, check=True)
    assert "; limited by " in done.stderr.splitlines()[-1]
    text = text_of(folder / "page.html")
    assert "1,000 records scored" in text
    assert "Limited by" in text
    assert toy_server.model in text
    before = (folder / "page.html").read_bytes()
    again = run_cli(["run", "in.zarr", "out.zarr", "--report", "page.html", *toy_server.flags], clean_environ,
                    cwd=folder, check=True)
    assert "limited by" not in again.stderr
    assert again.stderr.splitlines()[-1] == "page.html is kept as it is: nothing was scored"
    assert (folder / "page.html").read_bytes() == before
    run_cli(["run", "in.zarr", "out.zarr", "--report", "other.html", *toy_server.flags], clean_environ, cwd=folder,
            check=True)
    assert "published already" in text_of(folder / "other.html")


def test_a_page_that_cant_be_written_takes_nothing_from_what_the_run_came_to(folder, clean_environ, toy_server):
    """No file may have more than 8 KiB, less than a page and more than an output chunk: 74, with the figures."""
    run = command("run", "in.zarr", "out.zarr", "--chunk-records", "100", "--report", "page.html", "--json", "--log",
                  "none", *toy_server.flags)
    small = 8 << 10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    done = subprocess.run(run, env=clean_environ, cwd=folder, text=True, capture_output=True, check=False, timeout=180,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small))
    assert done.stderr == "batch-client: page.html: the report can't be written: File too large\n"
    assert done.returncode == 74
    assert json.loads(done.stdout)["published"]
    assert sorted(path.name for path in folder.iterdir()) == ["in.zarr", "out.zarr"]


def test_an_input_whose_name_is_not_utf_8_has_a_page(folder, clean_environ, toy_server):
    name = os.fsdecode(b"in-\xfc.zarr")
    (folder / "in.zarr").rename(folder / name)
    run_cli(["run", name, "out.zarr", "--report", "page.html", *toy_server.flags], clean_environ, cwd=folder,
            check=True)
    assert "in-\ufffd.zarr" in text_of(folder / "page.html")
    assert sorted(path.name for path in folder.iterdir()) == [name, "out.zarr", "page.html"]


def test_a_run_that_ends_early_leaves_a_page_that_says_why(folder, clean_environ, toy_server):
    (folder / "in.zarr" / "c" / "19" / "0" / "0").unlink()
    done = run_cli(["run", "in.zarr", "out.zarr", "--chunk-records", "50", "--report", "page.html",
                    *toy_server.flags], clean_environ, cwd=folder)
    assert done.returncode == 65
    text = text_of(folder / "page.html")
    assert "ended before its output was published" in text
    assert "--allow-missing" in text
    assert sorted(path.name for path in folder.iterdir()) == ["in.zarr", "out.zarr", "page.html"]


async def test_a_run_that_is_stopped_leaves_a_page(folder, toy_server):
    stop = asyncio.Event()

    def at_the_first(event):
        if isinstance(event, RecordsScored):
            stop.set()

    spec = RunSpec(input=str(folder / "in.zarr"), output=str(folder / "out.zarr"), chunk_records=50, in_flight=1,
                   endpoints=(toy_server.url,), model=toy_server.model, token_files=(str(toy_server.token_file),))
    with pytest.raises(StoppedError), _page_about(spec, folder / "page.html") as observers:
        await run_async(spec, (at_the_first, *observers), stop)
    assert "stopped before the end" in text_of(folder / "page.html")


def test_a_page_that_can_no_longer_be_written_is_said_and_the_output_is_there(folder, clean_environ, toy_server):
    """The folder goes away while the run is on: 74, and the same command finds the output published."""
    place = folder / "pages"
    place.mkdir()

    def drop(event):
        if isinstance(event, RecordsScored):
            shutil.rmtree(place, ignore_errors=True)

    spec = RunSpec(input=str(folder / "in.zarr"), output=str(folder / "out.zarr"), endpoints=(toy_server.url,),
                   model=toy_server.model, token_files=(str(toy_server.token_file),))

    with pytest.raises(StorageError, match="the report can't be written: No such file or directory"), \
            _page_about(spec, place / "page.html") as observers:
        run(spec, (drop, *observers))
    assert (folder / "out.zarr" / "zarr.json").exists()
