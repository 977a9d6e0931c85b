"""What the command line ends with: settings that can't be, something below it that ends the process."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import zarr

from batch_client import cli
from batch_client.errors import StoppedError
from support.cli import command, run_cli


@pytest.mark.parametrize("code", [0, 1, "usage: train.py DATA"])
def test_code_that_ends_the_process_is_a_bug(code, monkeypatch, capfd):
    @click.command()
    def ending():
        raise SystemExit(code)

    monkeypatch.setattr(cli, "batch_client", ending)
    assert cli.main([]) == 70
    assert f"a bug in batch-client, please report it with the lines above: SystemExit: {code}" in capfd.readouterr().err


@pytest.mark.parametrize(("verb", "line", "wanted"), [
    ("run", "in-flight = 1.5", "in-flight is 1.5: wanted a whole number"),
    ("run", "chunk_records = 100.9", "chunk_records is 100.9: wanted a whole number"),
    ("plan", "max-failed = true", "max-failed is True: wanted a whole number"),
    ("serve", "port = [8080]", "port is [8080]: wanted a whole number"),
    ("verify", "replay = 2.5", "replay is 2.5: wanted a whole number"),
    ("pack", "micro-batch = 128.0", "micro-batch is 128.0: wanted a whole number"),
    ("run", "patience = true", "patience is True: wanted a number"),
    ("bench", "budget = 2026-01-01", "budget is 2026-01-01: wanted a number"),
])
def test_a_number_of_a_settings_file_is_what_the_flag_takes(verb, line, wanted, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch-client.toml").write_text(f"[{verb}]\n{line}\n")
    assert cli.main([verb]) == 64
    assert capfd.readouterr().err == f"batch-client: batch-client.toml: [{verb}] {wanted}\n"


def test_a_size_of_a_settings_file_is_no_truth_value(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch-client.toml").write_text("[run]\nmax-bytes-in-flight = true\n")
    assert cli.main(["run", "in", "out"]) == 64
    assert "True: wanted a number of bytes such as 64M" in capfd.readouterr().err


@pytest.mark.parametrize("words", [["--config", "cfg.toml"], ["--config=cfg.toml"]])
def test_where_the_settings_file_is_named_is_said(words, capfd):
    assert cli.main(["run", "in", "out", *words]) == 64
    assert capfd.readouterr().err == (
        "batch-client: --config stands before the verb: wanted batch-client --config FILE run …\n")


@pytest.mark.parametrize(("flag", "value"), [
    ("--max-bytes-in-flight", "9" * 5000), ("--max-bytes-in-flight", "9" * 5000 + "M"), ("--part", "1/" + "9" * 5000),
    ("--part", "9" * 5000 + "/1"), ("--in-flight", "9" * 5000), ("--records", "0:" + "9" * 5000),
])
def test_a_number_of_thousands_of_digits_is_no_number(flag, value, capfd):
    assert cli.main(["run", "in", "out", "--archive", "model.mar", flag, value]) == 64
    assert "a bug" not in capfd.readouterr().err


@pytest.mark.parametrize(("flag", "wanted"), [("--golden", "is not a file"), ("--signature", "can't be read: ")])
def test_a_file_that_packing_lacks_is_named_with_its_flag(flag, wanted, tmp_path, capfd):
    (tmp_path / "w.pt").touch()
    assert cli.main(["pack", str(tmp_path / "w.pt"), flag, str(tmp_path / "nothing")]) == 64
    said = capfd.readouterr().err
    assert said.startswith(f"batch-client: {flag} {tmp_path}/nothing")
    assert wanted in said


def test_a_price_that_is_set_for_other_commands_is_no_mistake_of_a_plan_without_a_time(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["plan", "in", "out", "--endpoint", "http://127.0.0.1:9", "--model", "m"]
    assert cli.main([*words, "--price-per-hour", "2"]) == 64
    assert "--price-per-hour needs the run's time: add --calibrate" in capfd.readouterr().err
    monkeypatch.setenv("BATCH_CLIENT_PRICE_PER_HOUR", "2")
    assert cli.main(words) == 65
    assert "no Zarr array there" in capfd.readouterr().err


@pytest.mark.parametrize("page", ["out", "out/report.html", "elsewhere/../out/report.html"])
def test_a_report_in_the_output_is_refused_before_the_run(page, tmp_path, monkeypatch, capfd):
    """It would be what is no object of the output, or the output's folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("out",) if "/" in page else ():
        (tmp_path / folder).mkdir()
    (tmp_path / "elsewhere").mkdir()
    assert cli.main(["run", "in", "out", "--archive", "m.mar", "--report", page]) == 64
    assert f"--report {page} is in OUTPUT out: wanted a place beside it" in capfd.readouterr().err


@pytest.mark.parametrize("page", ["report.pdf", "report"])
def test_a_report_is_not_given_the_name_of_another_kind(page, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "in", "out", "--archive", "m.mar", "--report", page]) == 64
    assert f"--report {page}: the report is HTML: wanted a name that ends with .html" in capfd.readouterr().err


@pytest.mark.parametrize("page", ["s3://bucket/report.html", "file:///tmp/report.html"])
def test_a_report_has_no_url(page, capfd):
    assert cli.main(["run", "in", "out", "--archive", "m.mar", "--report", page]) == 64
    assert "wanted a file on this machine, not a URL" in capfd.readouterr().err


@pytest.mark.parametrize("value", ['"http://one"', '["http://one"]'])
def test_a_flag_that_may_be_repeated_takes_a_list_or_one_value_in_a_settings_file(value, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch-client.toml").write_text(f"[run]\nendpoint = {value}\n")
    assert cli.main(["run", "in", "out"]) == 64
    assert "--endpoint also needs --model NAME" in capfd.readouterr().err


@pytest.mark.parametrize("value", ["0", '"0"'])
def test_a_whole_number_of_a_settings_file_is_taken_with_and_without_quotes(value, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch-client.toml").write_text(f"[run]\nin-flight = {value}\n")
    assert cli.main(["run", "in", "out", "--archive", "model.mar"]) == 64
    assert "--in-flight 0: wanted at least 1" in capfd.readouterr().err


@pytest.mark.parametrize("value", ["7", "[7]", "[true]", "{a = 1}"])
def test_a_flag_that_may_be_repeated_takes_nothing_but_texts(value, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch-client.toml").write_text(f"[run]\ntoken-file = {value}\n")
    assert cli.main(["run", "in", "out", "--endpoint", "http://one", "--model", "m"]) == 64
    assert "batch-client: batch-client.toml: [run] token-file is " in capfd.readouterr().err


@pytest.mark.parametrize(("words", "wanted"), [
    ([], "or --archive MODEL.mar, not both (--endpoint is set in {file}, --archive is set in {file})"),
    (["--patience", "-1"], "--patience': -1.0 is not in the range x>=0. (see batch-client run --help)"),
    (["--archive", "m.mar", "--in-flight", "0"], "--in-flight 0: wanted at least 1"),
    (["--archive", "m.mar"], "--max-failed -1: wanted at least 0 (--max-failed is set by BATCH_CLIENT_MAX_FAILED)"),
])
@pytest.mark.parametrize("named", [[], ["--config", "other.toml"]])
def test_where_a_setting_came_from_that_nobody_typed_is_said(words, wanted, named, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCH_CLIENT_MAX_FAILED", "-1")
    file = named[-1] if named else "batch-client.toml"
    (tmp_path / file).write_text('[run]\narchive = "m.mar"\nendpoint = "http://one"\n')
    assert cli.main([*named, "run", "in", "out", *words]) == 64
    assert capfd.readouterr().err.endswith(f"{wanted.format(file=file)}\n")


@pytest.fixture
def specs(monkeypatch):
    """What `run` would do, and what else is asked for, instead of doing it."""
    seen = []

    async def stop(spec, *_):
        seen.append(spec)
        raise StoppedError("seen")

    monkeypatch.setattr("batch_client.api.run_async", stop)
    return seen


@pytest.mark.parametrize(("words", "variables", "settings", "wanted"), [
    (["--endpoint", "http://one", "--model", "m"], {}, 'archive = "m.mar"', {"archive": None}),
    (["--archive", "m.mar"], {"ENDPOINT": "http://one", "MODEL": "m"}, "", {"endpoints": (), "model": None}),
    ([], {"ARCHIVE": "m.mar"}, 'endpoint = "http://one"', {"endpoints": (), "archive": "m.mar"}),
    (["--archive", "m.mar"], {"TOKEN_FILE": "a:b"}, "", {"token_files": ()}),
    (["--archive", "m.mar"], {"TOKEN_FILE": "a", "TOKEN_COMMAND": "c"}, "", {"token_files": (), "token_command": None}),
    (["--endpoint", "http://one", "--model", "m", "--token-file", "a"], {"TOKEN_COMMAND": "c"}, "",
     {"token_files": ("a",), "token_command": None}),
    (["--endpoint", "http://one", "--model", "m", "--token-command", "c"], {}, 'token-file = ["a", "b"]',
     {"token_files": (), "token_command": "c"}),
])
def test_of_flags_that_exclude_each_other_the_nearest_is_taken(
        words, variables, settings, wanted, specs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(f"BATCH_CLIENT_{name}", value)
    (tmp_path / "batch-client.toml").write_text(f"[run]\n{settings}\n")
    assert cli.main(["run", "in", "out", *words]) == 75
    assert {name: getattr(specs[0], name) for name in wanted} == wanted


def test_what_is_to_be_removed_is_no_json(capfd):
    assert cli.main(["status", "out", "--clean", "--json"]) == 64
    assert "--clean and --json: what is to be removed is listed as text" in capfd.readouterr().err


def test_flags_that_exclude_each_other_are_refused_where_they_are_as_near(monkeypatch, capfd):
    monkeypatch.setenv("BATCH_CLIENT_TOKEN_FILE", "a")
    monkeypatch.setenv("BATCH_CLIENT_TOKEN_COMMAND", "c")
    assert cli.main(["run", "in", "out", "--endpoint", "http://one", "--model", "m"]) == 64
    assert "--token-file and --token-command: wanted one or the other (--token-file is set by" in capfd.readouterr().err


@pytest.mark.parametrize(("name", "value", "words", "code", "said"), [
    ("YES", "1", ["status", "no-output"], 78, "no output of batch-client"),
    ("OUTPUT", "x", ["bench", "no.mar"], 69, "no.mar: there is no such file"),
    ("SIGNATURE", "none.toml", ["pack", "m.pt", "--input", "x:float32:zero"], 64, "--input 'zero': wanted a shape"),
])
def test_a_variable_for_another_command_is_passed_over(name, value, words, code, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pt").touch()
    monkeypatch.setenv(f"BATCH_CLIENT_{name}", value)
    assert cli.main(words) == code
    error = capfd.readouterr().err
    assert said in error
    assert name.lower() not in error


def test_where_a_value_came_from_that_is_none_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch-client.toml").write_text('[run]\nin-flight = "many"\n')
    assert cli.main(["run", "in", "out"]) == 64
    assert capfd.readouterr().err.endswith(
        "(--in-flight is set in batch-client.toml; see batch-client run --help)\n")


def test_a_standard_input_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, capfd):
    with (tmp_path / "written").open("wb") as written:  # as of a shell's 0>written
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.FileIO(written.fileno(), "rb", closefd=False)))
        assert cli.main(["predict", "-", "--archive", "model.mar"]) == 64
    assert capfd.readouterr().err == f"batch-client: standard input: {os.strerror(errno.EBADF)}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that Linux has")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"]])
def test_a_full_disk_behind_standard_output_is_said(words, unbuffered, clean_environ):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command(*words), stdout=full, stderr=subprocess.PIPE, text=True, check=False,
                              env={**clean_environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 74
    assert done.stderr == "batch-client: standard output or error can't be written: No space left on device\n"


def test_a_full_disk_elsewhere_is_not_called_standard_output(monkeypatch, capfd):
    @click.command()
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cli, "batch_client", full)
    assert cli.main([]) == 70
    assert "standard output" not in capfd.readouterr().err


@pytest.mark.parametrize(("verb", "code"), [("status", 78), ("verify", 78)])
def test_a_verb_that_only_looks_does_not_wait_for_what_scores_to_be_imported(verb, code, clean_environ, tmp_path):
    program = ("import sys; from batch_client.cli import main; code = main(sys.argv[1:]); "
               "sys.exit('aiohttp' if 'aiohttp' in sys.modules else code)")
    done = subprocess.run([sys.executable, "-c", program, verb, "nothing"], cwd=tmp_path, env=clean_environ, text=True,
                          capture_output=True, check=False)
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize(("variables", "shown"), [({}, False), ({"PYTHONWARNINGS": "default"}, True)])
def test_warnings_of_libraries_are_shown_to_those_who_ask(variables, shown, clean_environ, tmp_path):
    """zarr has one for what is in a group and is no part of it."""
    zarr.create_group(tmp_path / "in.zarr").create_array("images", shape=(4, 2), dtype="u1")
    (tmp_path / "in.zarr/stray").mkdir()
    (tmp_path / "in.zarr/stray/notes.txt").write_text("mine")
    done = run_cli(["run", "in.zarr", "out", "--endpoint", "http://127.0.0.1:9", "--model", "toy"],
                   {**clean_environ, **variables}, tmp_path)
    assert done.returncode == 65
    assert ("ZarrUserWarning" in done.stderr) == shown
    assert shown or len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("verb", "said"), [
    ("plan", "--calibrate Score the first records for 20 s and forecast the run's time. "),
    ("predict", "repeat it for several (but for predict: one)."),
])
def test_help_promises_no_more_than_a_verb_does(verb, said, capfd):
    assert cli.main([verb, "--help"]) == 0
    assert said in " ".join(capfd.readouterr().out.split())
