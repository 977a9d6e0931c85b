"""The documentation against what is there: links, flags, modules and tests that it names."""

import re
from importlib import import_module
from pathlib import Path

import click
import pytest

from batch_client.cli import VERBS, batch_client

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
EXPLANATION = ROOT / "docs" / "explanation"
# Of Docker and curl, which the pages show in use.
FOREIGN = {"--build-arg", "--cpus", "--cpuset-cpus", "--data-binary", "--gpus", "--ipc", "--read-only", "--rm",
           "--shm-size", "--target", "--tmpfs"}
CLI = (ROOT / "docs" / "reference" / "cli.md").read_text()


def anchors(page):
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_of_every_verb_is_in_the_reference(verb):
    section = CLI.partition(f"\n## {verb}\n")[2].partition("\n## ")[0]
    shared = CLI.partition("\n## Flags that several verbs have\n")[2].partition("\n## ")[0]
    known = section + shared + (CLI.partition("\n## run\n")[2].partition("\n## ")[0] if verb == "plan" else "")
    assert section
    for option in import_module(f"batch_client.cli.{verb}").command.params:
        if isinstance(option, click.Option):
            for flag in option.opts:
                assert re.search(rf"`{flag}[ `]", known), flag


@pytest.fixture(scope="module")
def flags():
    """All flags that there are: of the program, its verbs and the benchmarks."""
    commands = [batch_client, *(import_module(f"batch_client.cli.{verb}").command for verb in VERBS)]
    ours = {flag for command in commands for option in command.params for flag in option.opts}
    scripts = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    return ours | set(re.findall(r'add_argument\("(--[\w-]+)"', scripts)) | {"--help"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name == "README.md" or "docs" in page.parts],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_that_a_page_names_exists(page, flags):
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())) - FOREIGN <= flags


@pytest.mark.parametrize("package", ["client/batch_client", "handler/batch_handler"])
def test_the_architecture_names_every_module_and_no_other(package):
    text = (EXPLANATION / "architecture.md").read_text().partition(f"\n### `{package}/`\n")[2].partition("\n### ")[0]
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    found = {path.relative_to(ROOT / package).as_posix() for path in (ROOT / package).rglob("*.py")}
    # Two files that say in their docstring what the folder is, and nothing else.
    silent = {"client/batch_client": {"demo/__init__.py"}, "handler/batch_handler": {"__init__.py"}}[package]
    assert set(re.findall(r"`([\w/]+\.py)`", tables)) == found - silent


def test_every_test_that_the_guarantees_name_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (EXPLANATION / "guarantees.md").read_text())
    assert len(named) > 20
    for path, test in named:
        assert re.search(rf"^(async )?def {test}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{test}"
