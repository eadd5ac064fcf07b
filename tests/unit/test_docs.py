"""What the pages say can be followed: links and paths lead somewhere, commands and options exist, configuration is
valid, and what is named in passing (make targets, metrics, variables of the environment) is there.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from expertmesh.cli.main import build_app
from expertmesh.mesh.config import MeshConfig, parse_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "demo/model/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
ROOMS = {folder.name for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")}
GENERATED = ROOT / "docs/configuration.md"  # its patterns look like links
HELM_VALUES = ROOT / "docs/kubernetes.md"  # its keys are the chart's
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_COMMAND = re.compile(r"(?:^|[\s/])expertmesh ([a-z].*)")
_OUTPUT = re.compile(r"--(?:out|json) \S+")
_PATH = re.compile(r"(?<![\w./~$-])((?:[\w.-]+/)+[\w.*-]*)(?![\w$])")
_MODULE = re.compile(r"[a-z_0-9]+\.py")
_TARGET = re.compile(r"\bmake ([a-z-]+)")
_NAME = re.compile(r"\b(?:expertmesh|EXPERTMESH)_\w*[a-zA-Z]")
_SERIES = re.compile(r"_(?:total|sum|count|bucket)$")
_KEY = re.compile(r"[a-z_]+(?:\.[a-z_0-9]+)+")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(text_of(page))}


def blocks(page: Path, *languages: str) -> Iterator[str]:
    return (body for language, body in _FENCED.findall(text_of(page)) if language in languages)


def commands(page: Path) -> Iterator[str]:
    """The arguments of every ``expertmesh`` command, in examples and within the text."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            # `trace record -- expertmesh up`: both are looked at
            for part in line.split(" -- "):
                if found := _COMMAND.search(part):
                    yield found[1]
    for code in _INLINE.findall(_FENCED.sub("", text_of(page))):
        if code.startswith("expertmesh ") and "..." not in code:
            yield code.removeprefix("expertmesh ").replace("\n", " ").replace("\\|", " ").partition(" -- ")[0]


def code_of(page: Path) -> Iterator[str]:
    """What is set as code, in examples for a shell and within the text, without files that a command makes."""
    for code in (*blocks(page, "sh"), *_INLINE.findall(_FENCED.sub("", text_of(page)))):
        yield _OUTPUT.sub("", code)


@cache
def sources() -> str:
    """All that is written by hand: names are looked for in it."""
    files = (file for room in ROOMS - {"docs", "src", "tests"} for file in (ROOT / room).rglob("*"))
    kinds = {".py", ".proto", ".yaml", ".tpl", ".sh", ".sbatch"}
    return "\n".join(text_of(file) for file in files if file.suffix in kinds and not file.name.endswith("_pb2.py"))


def missing_path(code: str) -> str | None:
    """The first path or module in it that is not in the tree; only what begins with one of its folders is one."""
    for path in _PATH.findall(code):
        if path.partition("/")[0] in ROOMS and not any(ROOT.glob(path.rstrip("/"))):
            return str(path)
    if _MODULE.fullmatch(code) and not any(any((ROOT / room).rglob(code)) for room in ROOMS - {"src"}):
        return code
    return None


def missing_name(code: str) -> str | None:
    """The first metric or variable of the environment in it that no source has."""
    for name in _NAME.findall(code):
        base = _SERIES.sub("", name)
        if base not in sources() and base.removeprefix("expertmesh_") not in sources():
            return str(name)
    return None


@cache
def command_of(name: str) -> Any:
    return typer.main.get_command(build_app([name]))


def split(arguments: str) -> Iterator[str]:
    """As a shell does, up to a comment."""
    lexer = shlex.shlex(arguments, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return (word for word in lexer if word)


def unknown_part(arguments: str) -> str | None:
    """The first word of a command that the command line does not know; None = it knows them all."""
    words = [word.strip("[]()") for word in itertools.takewhile(lambda word: word[0] not in "|&;>", split(arguments))]
    command = command_of(words[0])
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands"):
        return words[0] if words and re.fullmatch(r"[a-z-]+", words[0]) else None
    options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    given = [word.partition("=")[0] for word in words if re.match(r"--\w", word)]
    return next((word for word in given if word not in options), None)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in _LINK.findall(_FENCED.sub("", text_of(page))):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if page == GENERATED or "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_exist(page: Path) -> None:
    unknown = [(arguments, part) for arguments in commands(page) if (part := unknown_part(arguments)) is not None]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_of_configuration_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        data = yaml.safe_load(block)
        if isinstance(data, dict) and data.keys() <= MeshConfig.model_fields.keys():
            parse_config(data, page.name)


@pytest.mark.parametrize("page", [page for page in PAGES if page != HELM_VALUES], ids=name_of)
def test_keys_exist(page: Path) -> None:
    unknown = []
    for code in _INLINE.findall(text_of(page)):
        section, *rest = code.split(".")
        if not _KEY.fullmatch(code) or section not in MeshConfig.model_fields:
            continue
        found: Any = MeshConfig
        for part in (section, *rest):
            field = getattr(found, "model_fields", {}).get(part)
            found = field.annotation if field is not None else None
            if field is None and code != "attention.request":  # a span
                unknown.append(code)
                break
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page: Path) -> None:
    assert not [path for code in code_of(page) if (path := missing_path(code)) is not None]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_has_the_targets(page: Path) -> None:
    makefile = text_of(ROOT / "Makefile")
    named = {target for code in code_of(page) for target in _TARGET.findall(code)}
    assert not [target for target in named if f"\n{target}:" not in makefile]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_metrics_and_variables_exist(page: Path) -> None:
    assert not [name for code in code_of(page) if (name := missing_name(code)) is not None]


def test_these_tests_see_what_is_wrong() -> None:
    assert missing_path("look at `mesh/no_such_module.py` and router/calls.py") == "mesh/no_such_module.py"
    assert missing_path("no_such_module.py") == "no_such_module.py"
    assert missing_path("python benchmarks/load.py with tests/tools/*.txt, deploy/") is None
    assert missing_name("`expertmesh_no_such_total`") == "expertmesh_no_such_total"
    assert missing_name("EXPERTMESH_ROUTER and `expertmesh_balancer_balancedness`") is None
    assert unknown_part("balancer statuss") == "statuss"
    assert unknown_part("up --atention 3") == "--atention"
    assert unknown_part("balancer drain expert-0 --force") is None
    assert len(list(commands(ROOT / "README.md"))) > 20
