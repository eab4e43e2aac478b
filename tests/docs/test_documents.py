"""What the documents name exists: links, files and folders, commands of the command line, targets of make."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from nibble.main import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_TOP = "api|worker|service|qlora_core|nibble|operations|migrations|tests|docs|examples|bench"
_PATH = re.compile(rf"`((?:{_TOP})/[\w./-]*)")
_COMMAND = re.compile(
    r"(?:^|[\s`/])nibble ((?:files|jobs|models|keys|up|demo|doctor|dump|restore)\b(?: [a-z]+)?)",
    re.MULTILINE,
)
_MAKE = re.compile(r"\bmake ([a-z][a-z-]*)\b")


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_link_leads_somewhere(document: Path) -> None:
    links = [link for link in _LINK.findall(document.read_text()) if "://" not in link]

    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_path_that_is_named_exists(document: Path) -> None:
    paths = {path.rstrip(".") for path in _PATH.findall(document.read_text())}

    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_that_is_named_exists(document: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    unknown = set()
    for named in _COMMAND.findall(document.read_text()):
        noun, _, verb = named.partition(" ")
        verbs = getattr(commands[noun], "commands", {})
        if verb and verbs and verb not in verbs:
            unknown.add(named)

    assert unknown == set()


def test_every_target_of_make_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(
        line
        for document in DOCUMENTS
        for line in re.findall(r"`make [^`]*`|^make .*$", document.read_text(), re.MULTILINE)
    )

    named = set(_MAKE.findall(code))

    assert {"demo", "test"} <= named
    assert named - targets == set()


def test_every_decision_is_in_the_index_under_a_number_of_its_own() -> None:
    folder = ROOT / "docs" / "decisions"
    decisions = sorted(path.name for path in folder.glob("*.md") if path.name != "README.md")

    listed = _LINK.findall((folder / "README.md").read_text())

    assert sorted(listed) == decisions
    assert [name[:4] for name in decisions] == [f"{n:04}" for n in range(1, len(decisions) + 1)]
