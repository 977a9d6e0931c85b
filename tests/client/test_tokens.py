"""Tokens from commands and files: how often they are asked, and that no message shows a secret."""

import asyncio
import shlex
import subprocess
import sys
import traceback

import psutil
import pytest

from batch_client import tokens
from batch_client.errors import CredentialsError, UsageError
from batch_client.tokens import CommandTokens, FileTokens, NoTokenError

SECRET = "hunter2"


def python(code, *words):
    """The command line of a Python program, with a secret among its words."""
    return shlex.join([sys.executable, "-c", code, SECRET, *map(str, words)])


def counting(path, printed):
    """A command that adds a line to `path` and prints `printed`, in which N is the count."""
    return python("import pathlib, sys; p = pathlib.Path(sys.argv[2]); p.open('a').write('x'); n = p.stat().st_size\n"
                  f"print({printed!r}.replace('N', str(n)))", path)


def shown(error):
    """All that a person may get to see of an error, in one line or as a traceback."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("printed", ["token-N", "always-the-same"])
async def test_requests_that_are_refused_together_share_one_run(tmp_path, printed):
    source = CommandTokens(counting(tmp_path / "runs", printed))
    first = set(await asyncio.gather(*(source.token() for _ in range(8))))
    assert first == {printed.replace("N", "1")}
    second = set(await asyncio.gather(*(source.token(refused=first.copy().pop()) for _ in range(8))))
    assert second == {printed.replace("N", "2")}
    assert (tmp_path / "runs").read_text() == "xx"


@pytest.mark.parametrize(("command", "message"), [
    ("", "--token-command is empty"),
    ("   ", "--token-command is empty"),
    (f"vault '{SECRET}", "--token-command: can't be split into words: No closing quotation"),
])
def test_a_command_line_that_is_none_is_refused_at_once(command, message):
    with pytest.raises(UsageError) as caught:
        CommandTokens(command)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)


FAILING = {
    "slow": (python("import time; time.sleep(60)"), "no answer in 0.2 s"),
    "missing": (f"/no/such/program {SECRET}", "/no/such/program: can't be started (No such file or directory)"),
    "failed": (python("import sys; sys.exit(3)"), "exit 3, wanted 0 and a token"),
    "silent": (python("print()"), "exit 0, wanted 0 and a token"),
    "binary": (python(f"import sys; sys.stdout.buffer.write(b'{SECRET}\\xff')"), "found other bytes"),
    "two lines": (python(f"print('{SECRET}\\nb')"), "wanted one token alone"),
    "two words": (python(f"print('{SECRET} b')"), "wanted one token alone"),
    "not ASCII": (python(f"print('{SECRET}\\xe9')"), "wanted one token alone"),
}


@pytest.mark.parametrize(("command", "message"), FAILING.values(), ids=FAILING)
async def test_a_command_that_gives_no_token_is_named_without_its_secrets(monkeypatch, command, message):
    if message.startswith("no answer"):
        monkeypatch.setattr(tokens, "COMMAND_SECONDS", 0.2)
    with pytest.raises(CredentialsError) as caught:
        await CommandTokens(command).token()
    assert message in str(caught.value)
    assert shlex.split(command)[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in shown(caught.value)


def test_a_stop_does_not_wait_for_a_command_and_leaves_none(tmp_path):
    hanging = python("import os, pathlib, sys, time; pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))\n"
                     "time.sleep(600)", tmp_path / "pid")

    async def asked():
        asking = asyncio.create_task(CommandTokens(hanging).token())
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait([asking])
        return asking.cancelled()

    assert asyncio.run(asyncio.wait_for(asked(), 60))
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_command_does_not_read_our_standard_input():
    asked = python("import sys; print(repr(sys.stdin.read()))")
    program = ("import asyncio; from batch_client.tokens import CommandTokens; "
               f"print(asyncio.run(CommandTokens({asked!r}).token()))")
    done = subprocess.run([sys.executable, "-c", program], input="records", capture_output=True, text=True, check=True)
    assert done.stdout == "''\n"


@pytest.mark.parametrize("content", ["", " \n"])
async def test_a_file_without_a_token_is_refused(tmp_path, content):
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(CredentialsError, match="wanted a token, found nothing"):
        await FileTokens(path).token()


@pytest.mark.parametrize("content", [f"{SECRET}\nother", f"Bearer {SECRET}", f"{SECRET}\x00"])
async def test_a_file_that_holds_more_than_a_token_is_refused(tmp_path, content):
    path = tmp_path / "token"
    path.write_text(content)
    source = FileTokens(path)
    with pytest.raises(CredentialsError, match="wanted one token alone") as caught:
        await source.token()
    assert SECRET not in shown(caught.value)
    path.write_text(f"  {SECRET}\n")
    assert await source.token() == SECRET


async def test_a_file_that_is_missing_is_named_once(tmp_path):
    with pytest.raises(NoTokenError) as error:
        await FileTokens(tmp_path / "tok").token()
    assert str(error.value).startswith(f"--token-file {tmp_path / 'tok'}: there is no such file; wanted that of")
    assert str(error.value).count("tok") == 3  # the flag's name, the file's, and that of serve's flag
    assert error.value.exit_code == 69
    with pytest.raises(CredentialsError, match="can't be read: Is a directory") as error:
        await FileTokens(tmp_path).token()
    assert error.value.exit_code == 77
