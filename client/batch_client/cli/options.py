"""Flags that several verbs share, and how they become a `RunSpec`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import click
from click.core import ParameterSource

from batch_client.errors import UsageError
from batch_client.spec import CODECS, Records, RunSpec

__all__ = ["AMOUNT", "SERVER_OPTIONS", "WORKERS", "array_options", "bytes_option", "keep_nearest", "missing_option",
           "run_options", "server_options", "spec_of", "split_workers", "typed_flags"]

F = TypeVar("F", bound=Callable[..., Any])
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class ByteSize(click.ParamType[int]):
    """A number of bytes, with K, M or G (of 1,024) if wanted: `64M`, `67108864`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if type(value) is int:  # True, which a settings file may have, is one too
            return value
        found = re.fullmatch(r"(\d{1,18})\s*([KMG]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        if found is None:
            self.fail(f"{value!r}: wanted a number of bytes such as 64M", param, ctx)
        return int(found[1]) * _UNITS[found[2].upper()]


class FiniteRange(click.FloatRange):
    """A number within bounds that is neither NaN, which is within any, nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r}: wanted a finite number", param, ctx)
        return number


class WorkersAndThreads(click.ParamType[tuple[int, int | None]]):
    """Processes, and threads of each if wanted: `2`, `2x4`."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None,
                ctx: click.Context | None) -> tuple[int, int | None]:
        found = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", str(value).strip())
        if found is None:
            self.fail(f"{value!r}: wanted processes, and threads of each if need be, such as 2 or 2x4", param, ctx)
        return int(found[1]), int(found[2]) if found[2] else None


AMOUNT = FiniteRange(min=0)
BYTES = ByteSize()
WORKERS = WorkersAndThreads()


def split_workers(ctx: click.Context, param: click.Parameter, value: tuple[int, int | None] | None) -> int | None:
    """What a command gets: `workers`, and `threads` beside it."""
    del param
    workers, ctx.params["threads"] = value or (None, None)
    return workers


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function
    return decorate


bytes_option = click.option(
    "--max-bytes-in-flight", type=BYTES, default="64M", show_default=True,
    help="Bytes of records held in memory. Raise it for large input chunks or a distant store.")
_server_flags = _stack(
    click.option("--endpoint", "endpoints", multiple=True, metavar="URL",
                 help="A server to use, such as http://host:8080; repeat it for several (but for predict: one)."),
    click.option("--archive", metavar="MODEL.mar",
                 help="Serve this archive here for the length of the command (a path, s3:// or https://)."),
    click.option("--model", metavar="NAME", help="The model's name at the endpoints."),
    click.option("--token-file", "token_files", multiple=True, type=click.Path(), metavar="FILE",
                 help="File with the endpoints' token, or repeated one with that of each; read again when refused."),
    click.option("--token-command", metavar="COMMAND", help="Command that prints the token; run again when refused."),
    click.option("--workers", type=WORKERS, callback=split_workers, metavar="W[xT]", help="Worker processes of the "
                 "server of --archive, and threads of each, such as 2x4.  [default: tuned, or GPUs, or cores]"),
)


# Of a setting, from the nearest to the farthest.
_SOURCES = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP,
            ParameterSource.DEFAULT)
# The parameters of `_server_flags`.
SERVER_OPTIONS = ("endpoints", "archive", "model", "token_files", "token_command", "workers")
# What the flags of the one way to score, by their parameter, make useless: flags of the other way.
_USELESS_BESIDE = {
    "archive": ("--archive", ("model", "token_files", "token_command"), "servers that run already (--endpoint)"),
    "endpoints": ("--endpoint", ("workers",), "a server that is started here (--archive)"),
}


def server_options(function: F) -> F:
    """The flags that say what scores, and a refusal of those that would say nothing."""
    @wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        keep_nearest(options, ("endpoints",), ("archive",))
        keep_nearest(options, ("token_files",), ("token_command",))
        ways = [_USELESS_BESIDE[name] for name in _USELESS_BESIDE if options.get(name)]
        if len(ways) == 1:  # both are refused as that
            ((flag, useless, wanted),) = ways
            if typed := typed_flags(*useless):
                raise UsageError(f"{typed} says nothing beside {flag}: it is for {wanted}")
            _pass_over(options, useless)  # of variables and files it is no mistake: they are for other commands too
        return function(*arguments, **options)

    return _server_flags(cast("F", checked))


def keep_nearest(options: dict[str, Any], *groups: Sequence[str]) -> None:
    """Of groups of parameters that exclude each other, pass over those that were given farther from the command than
    another: a flag wins over a variable, a variable over the settings file. Those that are as near stay, to be refused.
    """
    given = {group: min(distances) for group in groups
             if (distances := [_distance(name) for name in group if options.get(name)])}
    for group, distance in given.items():
        if distance > min(given.values()):
            _pass_over(options, group)


def _distance(name: str) -> int:
    source = click.get_current_context().get_parameter_source(name)
    return _SOURCES.index(source) if source in _SOURCES else 0


def _pass_over(options: dict[str, Any], names: Sequence[str]) -> None:
    """As if these parameters were not given."""
    empty = {tuple: (), bool: False}
    options.update({name: empty.get(type(options[name])) for name in names if name in options})


def typed_flags(*names: str) -> str:
    """Those flags of these parameters that stand on the command line, and not in variables or settings, as a list."""
    context = click.get_current_context()
    return ", ".join(option.opts[0] for option in context.command.params if option.name in names
                     and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE)


missing_option = click.option("--allow-missing", is_flag=True,
                              help="Take the fill value for input chunks that are not there.")
array_options = _stack(
    click.option("--array", metavar="NAME", help="The array to score, when INPUT is a group."),
    click.option("--records", metavar="A:B", help="Only records A to B-1 of INPUT."),
    click.option("--anonymous", is_flag=True, help="Use storage without credentials: public buckets."),
)
run_options = _stack(
    server_options,
    array_options,
    click.option("--chunk-records", type=int,
                 help="Records in an output chunk, whole input chunks.  [default: those of what goes on, else up to "
                      "32768, 8 MiB out, and 64 MiB or a 32nd of INPUT in]"),
    click.option("--request-records", type=int,
                 help="Records in a request, whole micro-batches. Raise it for tiny records, lower it where online "
                      "queries share its workers.  [default: up to 0.1 s of compute and 1 MiB; 0.5 s where nobody "
                      "else waits, 4 MiB on this machine]"),
    click.option("--in-flight", type=int, default=32, show_default=True,
                 help="The most requests at one endpoint at a time; the run finds the fewest that keep it busy. Raise "
                      "it for servers with more than 16 workers, lower it to leave them to others."),
    bytes_option,
    click.option("--codec", type=click.Choice(CODECS), default="none", show_default=True,
                 help="Compression of the output."),
    click.option("--patience", type=AMOUNT, default=600.0, show_default=True, metavar="SECONDS",
                 help="Stop, resumable, when no request was answered for this long."),
    missing_option,
    click.option("--fast", is_flag=True, help="Give up equal bytes: records share micro-batches as they come, and "
                 "servers may differ in numerics."),
    click.option("--max-failed", type=int, default=0, show_default=True, help="Publish with up to this many failed "
                 "records in all; others are listed and their chunks held back."),
    click.option("--require-finite", is_flag=True, help="Let NaN and infinite predictions count against --max-failed, "
                 "too."),
    click.option("--part", metavar="I/N", help="Score the I-th of N parts; whoever completes the run publishes it."),
    click.option("--reuse", metavar="OLD", help="Copy the chunks of this earlier output that are still true."),
    click.option("--overwrite", is_flag=True, help="Delete the OUTPUT that is there first; an unfinished one "
                 "of this very run goes on."),
)


def spec_of(input_url: str, output_url: str, options: dict[str, Any]) -> RunSpec:
    """The RunSpec of a command's flags. Raises UsageError for flags that can't work."""
    records, part, fast = options.pop("records"), options.pop("part"), options.pop("fast")
    return RunSpec(input=input_url, output=output_url, records=Records.parse(records) if records else Records(),
                   part=None if part is None else _part_of(part), exact=not fast, **options)


def _part_of(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,18})/(\d{1,18})", text)
    if found is None:
        raise UsageError(f"--part {text!r}: wanted I/N with 1 <= I <= N, such as 1/8")
    return int(found[1]), int(found[2])
