"""A verb, whose errors also say where a setting came from that nobody typed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from batch_client.errors import UsageError

__all__ = ["CONFIG", "Verb", "origins"]

CONFIG = "batch-client.toml"


class Verb(click.Command):
    """A command of batch-client."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name != "--config":
                raise
            raise UsageError("--config stands before the verb: wanted batch-client --config FILE "
                             f"{ctx.info_name} …") from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            if found := origins(ctx, str(error)):
                raise UsageError(f"{error} ({found})") from error
            raise


def origins(context: click.Context, message: str) -> str:
    """Where the flags that a message names came from, of those that are not on the command line; "" if there are
    none.
    """
    config: Path | None = context.find_root().params.get("config")
    found = []
    for option in context.command.params:
        if not isinstance(option, click.Option) or option.name is None:
            continue
        flag = max(option.opts, key=len)
        if not re.search(rf"{re.escape(flag)}(?![\w-])", message):
            continue
        match context.get_parameter_source(option.name):
            case ParameterSource.DEFAULT_MAP:
                found.append(f"{flag} is set in {config or CONFIG}")
            case ParameterSource.ENVIRONMENT:
                found.append(f"{flag} is set by {option.envvar}")
    return ", ".join(found)
