import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from operations.demo import docstrings
from operations.demo.docstrings import (
    DemoFiles,
    DocstringSourceError,
    SourceFile,
    documented_in,
    examples,
    split_examples,
    write_demo_files,
)
from operations.demo.heldout import HELD_OUT_MODULES, is_held_out

SOURCE = '''
"""A module."""

def heappush(heap, item, /, *, key=None):
    """Push an item.

    The second paragraph is not the answer.
    """

def _private():
    """Nobody asks for this."""

def bare():
    pass

async def wait(fs):
    """Wait for
    all    of them."""

class Heap(list):
    """A list in heap order."""

    def __init__(self, items=()):
        """Take the items."""

    def pop(self):
        """Remove the smallest item."""

    @property
    def top(self):
        """The smallest item, still there."""

    @classmethod
    def from_sorted(cls, items):
        """Make a heap from a sorted list."""

if True:
    def only_here():
        """Defined on one platform."""
'''


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_demo_files(tmp_path_factory.mktemp("demo"))


def conversations(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]


def asked_about(conversation: list[dict[str, str]]) -> str:
    called = conversation[0]["content"].split("`")[1]
    return called.partition("(")[0]


def module_source(tmp_path: Path, text: str, module: str = "heapq") -> SourceFile:
    path = tmp_path / "module.py"
    path.write_text(text, encoding="utf-8")
    return SourceFile(module, path)


def test_the_installed_library_gives_enough_examples_and_the_counts_are_those_of_the_files(
    written: DemoFiles,
) -> None:
    train, validation = conversations(written.train), conversations(written.validation)

    assert len(train) == written.n_train >= 1500
    assert len(validation) == written.n_validation
    assert 150 <= written.n_validation <= 400


def test_every_line_is_a_question_about_one_name_and_a_non_empty_answer(
    written: DemoFiles,
) -> None:
    for conversation in conversations(written.train) + conversations(written.validation):
        user, assistant = conversation
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert asked_about(conversation).count(".") >= 1
        assert len(assistant["content"].split()) >= 3
        assert assistant["content"] == " ".join(assistant["content"].split())


def test_validation_asks_about_held_out_modules_only_and_training_never_does(
    written: DemoFiles,
) -> None:
    train = {asked_about(each) for each in conversations(written.train)}
    validation = {asked_about(each) for each in conversations(written.validation)}

    assert not any(is_held_out(name) for name in train)
    assert all(is_held_out(name) for name in validation)
    assert {name.partition(".")[0] for name in validation} <= set(HELD_OUT_MODULES)


def test_no_function_and_no_answer_occurs_twice(written: DemoFiles) -> None:
    every = conversations(written.train) + conversations(written.validation)

    functions = [asked_about(each) for each in every]
    answers = [each[1]["content"].casefold() for each in every]

    assert len(set(functions)) == len(functions)
    assert len(set(answers)) == len(answers)


def test_the_held_out_questions_are_validation_conversations_without_their_answers(
    written: DemoFiles,
) -> None:
    first, second = conversations(written.validation)[:2]

    assert list(written.held_out_questions) == [first[:1], second[:1]]


def test_the_same_seed_gives_the_same_bytes_and_limits_only_cut_the_end(
    written: DemoFiles, tmp_path: Path
) -> None:
    short = write_demo_files(tmp_path, max_train=7, max_validation=3)

    assert short.train.read_bytes().splitlines() == written.train.read_bytes().splitlines()[:7]
    assert (
        short.validation.read_bytes().splitlines()
        == written.validation.read_bytes().splitlines()[:3]
    )
    assert (short.n_train, short.n_validation) == (7, 3)


def test_another_seed_gives_another_order_of_the_same_examples(tmp_path: Path) -> None:
    source = module_source(tmp_path, SOURCE, "sockets")
    found = list(examples(documented_in(source)))

    orders = [split_examples(found, seed=seed)[0] for seed in range(4)]

    assert all(sorted(map(str, order)) == sorted(map(str, orders[0])) for order in orders)
    assert any(order != orders[0] for order in orders)


def test_definitions_become_questions_with_their_kind_and_signature(tmp_path: Path) -> None:
    source = module_source(tmp_path, SOURCE)

    found = [messages for _, messages in examples(documented_in(source))]

    assert [(each[0]["content"], each[1]["content"]) for each in found] == [
        ("What does `heapq.heappush(heap, item, /, *, key=None)` do?", "Push an item."),
        ("What does `heapq.wait(fs)` do?", "Wait for all of them."),
        ("What is the class `heapq.Heap(items=())` for?", "A list in heap order."),
        ("What does `heapq.Heap.pop()` do?", "Remove the smallest item."),
        ("What does the property `heapq.Heap.top` hold?", "The smallest item, still there."),
        ("What does `heapq.Heap.from_sorted(items)` do?", "Make a heap from a sorted list."),
        ("What does `heapq.only_here()` do?", "Defined on one platform."),
    ]


@pytest.mark.parametrize(
    "docstring",
    ["Too short.", "word " * 200, "A bell \\x07 rings in it.", "Half a pair \\ud800 of two."],
    ids=["short", "long", "control", "surrogate"],
)
def test_a_docstring_that_makes_no_answer_is_left_out(tmp_path: Path, docstring: str) -> None:
    source = module_source(tmp_path, f'def f():\n    """{docstring}"""\n')

    assert list(examples(documented_in(source))) == []


@pytest.mark.parametrize("text", ["def f(:\n", "x = '\0'\n", "# coding: nonsense\n"], ids=repr)
def test_a_file_that_cannot_be_parsed_is_passed_over(tmp_path: Path, text: str) -> None:
    assert list(documented_in(module_source(tmp_path, text))) == []


def test_a_docstring_copied_from_a_seen_module_is_not_validated_on(tmp_path: Path) -> None:
    text = 'def close():\n    """Close the file."""\n'
    seen = documented_in(module_source(tmp_path, text, "aifc"))
    held_out = documented_in(module_source(tmp_path, text, "zipfile"))

    train, validation = split_examples(examples([*held_out, *seen]), seed=0)

    assert [asked_about(each) for each in train] == ["aifc.close"]
    assert validation == []


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("json", True),
        ("json.decoder", True),
        ("_json", True),
        ("_pyjson", True),
        ("jsonschema", False),
        ("xml.json", False),
    ],
)
def test_a_private_implementation_is_held_out_with_its_module(module: str, expected: bool) -> None:
    assert is_held_out(module) is expected


def test_an_interpreter_without_library_sources_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda _name: str(tmp_path))

    with pytest.raises(DocstringSourceError, match="ships no standard-library sources"):
        write_demo_files(tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_a_library_with_too_few_docstrings_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heapq.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda _name: str(tmp_path))

    with pytest.raises(DocstringSourceError, match="found 0 training and 7 validation examples"):
        write_demo_files(tmp_path / "out")


@pytest.mark.parametrize("limits", [{"max_train": 0}, {"max_validation": 1}], ids=str)
def test_a_limit_that_leaves_no_usable_file_is_refused(
    tmp_path: Path, limits: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        write_demo_files(tmp_path, **limits)


def test_tests_and_installed_packages_are_no_sources(tmp_path: Path) -> None:
    for name in ["os.py", "json/__init__.py", "test/test_os.py", "site-packages/x.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    found: Iterator[SourceFile] = docstrings.source_files(tmp_path)

    assert [source.module for source in found] == ["json", "os"]
