"""The file of `run --report`: whatever becomes of it, a run ends with what it came to; nothing is left beside it."""

import os

import pytest

from batch_client.cli.run import _page_about
from batch_client.errors import DataError, StorageError, UsageError
from batch_client.events import Published
from batch_client.pipeline import execute
from batch_client.spec import RunSpec
from batch_client.transport import HttpReply
from support.simulated import URL, SimulatedServer
from support.virtual import run_virtually
from support.world import World

# A file name that is not UTF-8, as Python spells it.
LATIN = "memory://größe-\udcfc.zarr"


def spec(**changes):
    return RunSpec(**{"input": LATIN, "output": "memory://out", "endpoints": (URL,), "model": "toy", **changes})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files on this system")
def test_a_device_is_not_replaced_by_a_page(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="this is a device or a pipe"), _page_about(spec(), tmp_path / "pipe"):
        pytest.fail("the run began")
    assert (tmp_path / "pipe").is_fifo()


def run_with_page(page, server=None, **changes):
    world = World(1, server=server)
    with _page_about(spec(**changes), page) as observers:
        return run_virtually(execute(world.spec(), world.services(), observers))


class Surrogate(SimulatedServer):
    """Refuses everything in words that can't be encoded."""

    def answer(self, body, header_length):
        return HttpReply(400, {}, b'{"error": "\\ud800 is no text"}')


def broken(data):
    raise ZeroDivisionError(f"drawing {data.input}")


def test_a_name_that_is_no_text_is_drawn(tmp_path):
    page = tmp_path / "page.html"
    assert run_with_page(page).published
    assert "memory://größe-�.zarr" in page.read_text("utf-8")
    assert list(tmp_path.iterdir()) == [page]


def test_a_reason_that_is_no_text_is_drawn_and_the_run_ends_with_its_own_error(tmp_path):
    page = tmp_path / "page.html"
    with pytest.raises(DataError, match="nothing can be scored"):
        run_with_page(page, Surrogate())
    assert "� is no text" in page.read_text("utf-8")
    assert list(tmp_path.iterdir()) == [page]


def test_a_page_that_cant_be_drawn_is_one_line_beside_the_runs_own_error(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("batch_client.report.render", broken)
    with pytest.raises(DataError, match="nothing can be scored"):
        run_with_page(tmp_path / "page.html", Surrogate())
    assert capfd.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cant_be_drawn_is_said_after_what_the_run_came_to(tmp_path, monkeypatch):
    monkeypatch.setattr("batch_client.report.render", broken)
    with pytest.raises(StorageError, match=r"can't be drawn: ZeroDivisionError: drawing .* a bug"):
        run_with_page(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_text_that_cant_be_encoded_leaves_nothing_beside_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr("batch_client.report.render", lambda data: data.input)
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(StorageError, match="UnicodeEncodeError"):
        run_with_page(page)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_page_is_kept_where_the_output_was_published_before_and_written_where_there_is_none(tmp_path, capfd):
    page = tmp_path / "page.html"
    for text in ("the page of the run", None):
        if text is None:
            page.unlink()
        else:
            page.write_text(text)
        with _page_about(spec(), page) as (report,):
            report(Published("memory://out", "sha256:root", already=True))
        said = capfd.readouterr().err
        if text is not None:
            assert page.read_text() == text
            assert said == f"{page} is kept as it is: nothing was scored\n"
    assert "The output was published already; nothing was scored." in page.read_text()
    assert said == ""


def test_an_error_after_publication_is_not_called_one_before_it(tmp_path):
    page = tmp_path / "page.html"

    def print_in_vain():
        with _page_about(spec(), page) as (report,):
            report(Published("memory://out", "sha256:root"))
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        print_in_vain()
    assert "before its output was published" not in page.read_text()
