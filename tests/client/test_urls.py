"""Places by their URLs: what is one, which is inside which, and what is none."""

from pathlib import Path

import pytest

from batch_client.buckets import is_inside, open_store
from batch_client.cli import main
from batch_client.errors import UsageError


@pytest.mark.parametrize(("inner", "outer", "wanted"), [
    ("s3://b/out", "s3://b/out", True), ("s3://b/out/in", "s3://b/out", True), ("s3a://b/out/in", "s3://b/out/", True),
    ("s3://b/out", "s3://b", True), ("s3://b/output", "s3://b/out", False), ("s3://b/out", "s3://b/out/in", False),
    ("s3://c/out/in", "s3://b/out", False), ("s3://b/old%20x/in", "s3://b/old x", True),
    ("S3://b/out", "s3://b/out", True), ("s3://b/old%2520x", "s3://b/old x", False),
    ("azure://c/out/in", "az://c/out", True), ("abfss://c@a.dfs.core.windows.net/out", "adl://c/out", True),
    ("abfs://c@a.dfs.core.windows.net/out", "abfss://d@a.dfs.core.windows.net/out", False),
    ("gs://b/out", "s3://b/out", False),
    ("abfss://c@one.dfs.core.windows.net/out", "abfss://c@two.dfs.core.windows.net/out", False),
    ("az://c/out/in", "abfss://c@two.dfs.core.windows.net/out", True),
])
def test_a_place_is_inside_another_by_its_folders(inner, outer, wanted):
    assert is_inside(inner, outer) == wanted


def test_links_lead_to_the_same_place(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    for name in ("out", "link/in", "out/../link"):
        assert is_inside(open_store(str(tmp_path / name)).url, open_store(str(tmp_path / "out")).url)


@pytest.mark.parametrize("path", ["a/../out", "a/%2e%2e/out", "./out", "out/.."])
def test_a_path_of_a_bucket_has_no_dots(path):
    """A store's library resolves them; so they would be another place than they are compared as."""
    with pytest.raises(UsageError, match=r"has '\.' or '\.\.' in its path"):
        open_store(f"s3://bucket/{path}", environ={})


@pytest.mark.parametrize("path", ["~nobody-has-this-home/x", "x" * 300])
def test_a_path_that_can_not_be_is_refused(path):
    with pytest.raises(UsageError, match="not a path that can be read or written"):
        open_store(path)


@pytest.mark.parametrize(("place", "wanted"), [
    ("run:1.zarr", "a path with a colon is written ./run:1.zarr"),
    ("s3:/data/in.zarr", "did you mean s3://data/in.zarr?"),
])
def test_a_colon_without_slashes_is_told_what_to_write(place, wanted):
    with pytest.raises(UsageError) as error:
        open_store(place, environ={})
    assert str(error.value).endswith(f"not a URL, which has :// after its scheme: {wanted}")


def test_a_path_with_a_colon_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store("//a:b@c/x").url == Path("//a:b@c/x").as_uri()
    assert open_store("./run:1.zarr").url == (tmp_path / "run:1.zarr").as_uri()


@pytest.mark.parametrize("cut", ["#2", "?version=2", "#", "?"])
@pytest.mark.parametrize("url", ["s3://b/run", "file:///tmp/run"])
def test_a_url_that_goes_on_after_its_path_is_no_place(url, cut):
    """What follows would be left out: `--overwrite` of run#2 would remove run."""
    with pytest.raises(UsageError, match="wanted %23 for a '#'") as error:
        open_store(url + cut)
    assert "version" not in str(error.value)
    assert open_store(f"file:///tmp/run{cut.replace('#', '%23').replace('?', '%3F')}").url.startswith("file:///tmp/run%")


@pytest.mark.parametrize("spelt", ["data/in.zarr", "data/../data/in.zarr", "absent/../data/./in.zarr",
                                   "link/../data/in.zarr", "deep/../in.zarr"])
def test_a_path_has_one_url_however_it_is_spelt(spelt, tmp_path, monkeypatch):
    """A run that goes on compares it: `../data` would be another source."""
    (tmp_path / "data/in.zarr").mkdir(parents=True)
    (tmp_path / "data/sub").mkdir()
    (tmp_path / "link").symlink_to("data")
    (tmp_path / "deep").symlink_to("data/sub")
    monkeypatch.chdir(tmp_path / "data")
    place = (tmp_path / "data/in.zarr").as_uri()
    for path in (str(tmp_path / spelt), f"../{spelt}", f"file://{tmp_path}/{spelt}"):
        assert open_store(path).url == place


def test_a_link_is_a_place_of_its_own(tmp_path):
    """On another machine it may lead to the same records by another way."""
    (tmp_path / "mount").mkdir()
    (tmp_path / "data").symlink_to("mount")
    assert open_store(str(tmp_path / "data/in.zarr")).url == (tmp_path / "data/in.zarr").as_uri()


OF_A_RUN = ["--endpoint", "http://127.0.0.1:9", "--model", "toy"]


@pytest.mark.parametrize("place", ["s3://me:secret@bucket/x", "https://me:secret@host/x", "s3://secret@bucket/x",
                                   "s3://me:secret@bucket/x?y", "file://me:secret@/x"])
@pytest.mark.parametrize("words", [
    ["status"], ["verify"], ["show"], ["plan", *OF_A_RUN, "in"], ["run", *OF_A_RUN, "in"],
    ["predict", *OF_A_RUN, "--records", "0:1"], ["bench"], ["bench", "model.mar"], ["serve"]], ids=" ".join)
def test_a_password_in_a_url_is_refused_and_not_shown(words, place, capfd):
    assert main([*words, place]) == 64
    said = capfd.readouterr().err
    wanted = "ARCHIVE is a URL: wanted a path" if words == ["serve"] else "has a user name or password in its URL"
    assert wanted in said
    assert "secret" not in said


@pytest.mark.parametrize(("words", "wanted"), [
    (["status", "https://host/x"], "OUTPUT https://host/x: a web server can't list what it holds, and so not what a"),
    (["verify", "http://host/x"], "OUTPUT http://host/x: a web server can't list"),
    (["bench", "model.mar", "https://host/x"], "INPUT https://host/x: a web server can't list"),
    (["bench", "model.mar", "in", "--output", "https://host/x"], "--output https://host/x: a web server can't list"),
    (["run", "https://host/x", "out", *OF_A_RUN], "INPUT https://host/x: a web server can't list what it holds, which"),
    (["run", "in", "HTTPS://host/x", *OF_A_RUN], "OUTPUT HTTPS://host/x: a web server can't list what it holds, and"),
    (["run", "in", "out", "--reuse", "https://host/x", *OF_A_RUN], "--reuse https://host/x: a web server can't list"),
])
def test_a_web_server_is_no_place_of_a_run(words, wanted, capfd):
    assert main(words) == 64
    assert wanted in capfd.readouterr().err
