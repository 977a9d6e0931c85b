"""argv → exit code: the group of verbs, settings from flags, environment and TOML, and the one error handler."""

from __future__ import annotations

import asyncio
import os
import sys
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from batch_client import __version__
from batch_client.cli.stream import say
from batch_client.cli.verb import CONFIG, origins
from batch_client.errors import BatchClientError, StoppedError, StorageError, UsageError

__all__ = ["main"]

# Verb → its one-line help: shown without importing what the verb needs.
VERBS = {
    "run": "Score an array in order, or go on with a run that was stopped.",
    "plan": "Show what a run would do, and with --calibrate how long it takes; writes nothing.",
    "predict": "Score one query and print the answer.",
    "status": "Say how far a run is, from any machine; --clean takes an abandoned one away.",
    "verify": "Prove an output complete; --deep reads every byte, --replay scores some of it again.",
    "show": "Draw sample records with their predictions; with labels, how many are right.",
    "pack": "Make an archive of a trained model.",
    "serve": "Serve an archive in the foreground.",
    "bench": "Measure how quick a model can be here, what limits a run, and the best settings.",
}
ENVIRONMENT = "BATCH_CLIENT"
# What click would cut off, take as 1 or raise TypeErrors of: a flag's type → what TOML may give for it. Numbers may be
# in quotes, as on the command line.
TOML_KINDS: dict[type[click.ParamType[Any]], tuple[type, ...]] = {
    click.types.IntParamType: (int, str),
    click.types.FloatParamType: (int, float, str),
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in VERBS:
            return None
        command = import_module(f"batch_client.cli.{cmd_name}").command
        assert isinstance(command, click.Command)  # noqa: S101 - each verb's module ends with it
        # Settings have the flag's name in every verb: BATCH_CLIENT_IN_FLIGHT, not BATCH_CLIENT_RUN_IN_FLIGHT.
        for flag, option in _flags(command).items():
            option.envvar = f"{ENVIRONMENT}_{flag.upper().replace('-', '_')}"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), envvar=f"{ENVIRONMENT}_CONFIG",
              help=f"TOML file with a table for each verb.  [default: {CONFIG}, if there is one]")
@click.version_option(__version__, prog_name="batch-client")
@click.pass_context
def batch_client(context: click.Context, config: Path | None) -> None:
    """Score every record of a Zarr array with a PyTorch model: ordered, complete, provable.

    Settings come from flags, then BATCH_CLIENT_* variables, then the TOML file, then defaults.
    """
    context.default_map = _settings(config)
    if config is None and context.invoked_subcommand is not None:
        _require_named(context.default_map, context.invoked_subcommand)


def _settings(config: Path | None) -> dict[str, Any]:
    path = config or Path(CONFIG)
    if config is None and not os.path.isfile(path):  # noqa: PTH113 - which raises nothing where no right is
        return {}
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: can't be read as TOML: {error}") from error
    return {verb: _defaults(path, verb, table) for verb, table in tables.items()}


def _require_named(settings: Mapping[str, Any], verb: str) -> None:
    """Raises UsageError where a settings file that nobody named would have this verb start a program: the folder may
    have come with somebody's data. (Archive and endpoints are what a command is about, and are taken from it.)
    """
    if "token_command" in settings.get(verb, {}):
        raise UsageError(f"{CONFIG}: [{verb}] has token-command, a program to start, which a file that is merely in "
                         f"the working folder must not name: say --config {CONFIG}, or --token-command")


def _defaults(path: Path, verb: str, table: Any) -> dict[str, Any]:
    """A verb's table, by the names that click has for the flags."""
    command = batch_client.get_command(click.Context(batch_client), verb)
    if command is None or not isinstance(table, dict):
        raise UsageError(f"{path}: {verb!r} is no table of a verb; wanted {', '.join(f'[{known}]' for known in VERBS)}")
    flags = _flags(command)
    defaults = {}
    for name, value in table.items():
        option = flags.get(name.replace("_", "-"))
        if option is None:
            raise UsageError(f"{path}: [{verb}] has no setting {name!r}; wanted {', '.join(sorted(flags))}")
        for kind, taken in TOML_KINDS.items():
            if isinstance(option.type, kind) and (isinstance(value, bool) or not isinstance(value, taken)):
                wanted = "a number" if float in taken else "a whole number"
                raise UsageError(f"{path}: [{verb}] {name} is {str(value)[:100]}: wanted {wanted}")
        values = [value] if option.multiple and isinstance(value, str) else value
        if option.multiple and not (isinstance(values, list) and all(isinstance(one, str) for one in values)):
            raise UsageError(f"{path}: [{verb}] {name} is {str(value)[:100]}: wanted a text, or a list of them")
        defaults[str(option.name)] = values
    return defaults


def _flags(command: click.Command) -> dict[str, click.Option]:
    """A command's options by their long flag, without the dashes."""
    return {max(option.opts, key=len).lstrip("-"): option for option in command.params
            if isinstance(option, click.Option)}


def main(argv: Sequence[str]) -> int:
    """Run the command line and return its exit code; errors are one line on stderr."""
    stdout = sys.stdout
    try:
        batch_client.main(list(argv), prog_name="batch-client", standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except SystemExit as ended:
        # With standalone_mode off click ends so at a closed standard output alone, which it has then wrapped: whoever
        # read it has left, and what was to be done is done.
        return 0 if sys.stdout is not stdout else _report(ended)
    except (Exception, KeyboardInterrupt, asyncio.CancelledError) as error:  # noqa: BLE001 - the last handler: nothing may leave as a traceback
        return _report(error)
    return 0


def _report(error: BaseException) -> int:
    """Print what went wrong in one line; a bug of ours also with its traceback. Returns the exit code."""
    code = BatchClientError.exit_code
    match error:
        case BatchClientError():
            message, code = str(error), error.exit_code
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), err=True)
            return UsageError.exit_code
        case click.UsageError(ctx=click.Context() as context):
            message, code = error.format_message(), UsageError.exit_code
            named = origins(context, message)
            message += f" ({named + '; ' if named else ''}see {context.command_path} --help)"
        case click.ClickException():
            message, code = f"{error.format_message()} (see batch-client --help)", UsageError.exit_code
        case click.Abort() | KeyboardInterrupt() | asyncio.CancelledError():
            message, code = "stopped", StoppedError.exit_code
        case OSError() if _is_of_echo(error):
            message, code = f"standard output or error can't be written: {error.strerror}", StorageError.exit_code
        case _:
            traceback.print_exception(error)
            message = f"a bug in batch-client, please report it with the lines above: {type(error).__name__}: {error}"
    say(f"batch-client: {' '.join(message.split())}")
    return code


def _is_of_echo(error: OSError) -> bool:
    """Whether it was raised where click, which prints all results and help, writes to its stream: that tells a full
    disk there from any other.
    """
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_code is click.echo.__code__
