"""A real training file from text that nobody wrote for us: the standard library's docstrings.

Sources are parsed with `ast` and never imported, so nothing of the library runs and modules for
other platforms count too. The validation split comes from `HELD_OUT_MODULES` only, and no answer
in it occurs anywhere outside them: a copied docstring would measure memory, not learning.
"""

import ast
import json
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path

from operations.demo.heldout import is_held_out

Message = dict[str, str]
"""One chat message: ``role`` and ``content``."""

MINIMUM_TRAIN = 1500
"""Fewer training examples than this means that the interpreter's library is not whole."""

_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# Where the documented Python code of a public module lives under a private name.
_PUBLIC_MODULES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
}
_ANSWER_WORDS = 3  # a shorter paragraph ("Internal.", "S.f() -> x") explains nothing
_ANSWER_CHARACTERS = 600
_QUESTIONS_SHOWN = 2


class DocstringSourceError(RuntimeError):
    """This interpreter's standard library cannot give a training file; the message says why."""


@dataclass(frozen=True)
class SourceFile:
    """One source file of the standard library."""

    module: str
    """Dotted name; a package's ``__init__.py`` has the package's name."""
    path: Path


@dataclass(frozen=True)
class Documented:
    """A public function, method, property or class, and what its docstring says."""

    qualified_name: str
    kind: str
    """``function``, ``method``, ``property`` or ``class``."""
    signature: str
    """Parameters in parentheses, without ``self``; empty where the source shows none."""
    docstring: str
    """The whole docstring, indentation removed."""
    held_out: bool

    @property
    def summary(self) -> str:
        """The docstring's first paragraph, every run of white space as one space."""
        return " ".join(self.docstring.split("\n\n")[0].split())


@dataclass(frozen=True)
class DemoFiles:
    """What `write_demo_files` wrote."""

    train: Path
    validation: Path
    n_train: int
    n_validation: int
    held_out_questions: tuple[list[Message], ...]
    """Two conversations out of the validation file, each ending with the user's question."""


def standard_library_folder() -> Path:
    """Return the folder that holds the running interpreter's standard-library sources.

    Raises:
        DocstringSourceError: there is no such folder, or it holds no Python source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if not any(folder.glob("*.py")):
        raise DocstringSourceError(
            f"this Python ships no standard-library sources: no .py file in {folder}. "
            "Use a Python that was installed with its library unpacked (not an embeddable zip)"
        )
    return folder


def source_files(folder: Path) -> Iterator[SourceFile]:
    """Yield the library's source files in the order of their names, without tests and tools."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in parts[:-1]):
            continue
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts:
            yield SourceFile(".".join(parts), path)


def documented_in(source: SourceFile) -> Iterator[Documented]:
    """Yield what is public and documented in one file, in the file's order.

    A private module yields nothing, unless it is the known implementation of a public one. Nor
    does a file that this interpreter cannot parse: the library ships some on purpose.
    """
    top, dot, rest = source.module.partition(".")
    module = _PUBLIC_MODULES.get(top, top) + dot + rest
    if any(part.startswith("_") for part in module.split(".")):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings; not ours to mend
            tree = ast.parse(source.path.read_bytes())
    except (SyntaxError, ValueError):
        return
    yield from _documented(tree, module, in_class=False, held_out=is_held_out(source.module))


def examples(documented: Iterable[Documented]) -> Iterator[tuple[Documented, list[Message]]]:
    """Turn definitions into chat examples, dropping those that explain nothing or run on."""
    for item in documented:
        answer = item.summary
        wordy = len(answer.split()) >= _ANSWER_WORDS and len(answer) <= _ANSWER_CHARACTERS
        if wordy and answer.isprintable():  # no control character, nothing UTF-8 cannot hold
            yield (
                item,
                [
                    {"role": "user", "content": _question(item)},
                    {"role": "assistant", "content": answer},
                ],
            )


def write_demo_files(
    folder: Path,
    *,
    max_train: int | None = None,
    max_validation: int | None = None,
    seed: int = 0,
) -> DemoFiles:
    """Write ``train.jsonl`` and ``validation.jsonl`` from the installed standard library.

    The same interpreter and seed always give the same bytes.

    Args:
        folder: where to write; made if it is missing.
        max_train: keep at most so many training examples; at least 1.
        max_validation: keep at most so many validation examples; at least 2.
        seed: of the order.

    Raises:
        DocstringSourceError: no sources, or fewer than `MINIMUM_TRAIN` training examples in them.
        ValueError: a limit is too small to leave a usable file.
        OSError: ``folder`` cannot be written.
    """
    if max_train is not None and max_train < 1:
        raise ValueError(f"max_train must be at least 1, not {max_train}")
    if max_validation is not None and max_validation < _QUESTIONS_SHOWN:
        raise ValueError(
            f"max_validation must be at least {_QUESTIONS_SHOWN}, not {max_validation}"
        )
    library = standard_library_folder()
    train, validation = split_examples(
        examples(item for source in source_files(library) for item in documented_in(source)),
        seed=seed,
    )
    if len(train) < MINIMUM_TRAIN or len(validation) < _QUESTIONS_SHOWN:
        raise DocstringSourceError(
            f"found {len(train)} training and {len(validation)} validation examples in {library}, "
            f"but the demo needs {MINIMUM_TRAIN} and {_QUESTIONS_SHOWN}: "
            "this Python's standard library is incomplete or has no docstrings"
        )
    train, validation = train[:max_train], validation[:max_validation]
    folder.mkdir(parents=True, exist_ok=True)
    return DemoFiles(
        train=_write(folder / "train.jsonl", train),
        validation=_write(folder / "validation.jsonl", validation),
        n_train=len(train),
        n_validation=len(validation),
        held_out_questions=tuple([messages[0]] for messages in validation[:_QUESTIONS_SHOWN]),
    )


def split_examples(
    found: Iterable[tuple[Documented, list[Message]]], *, seed: int
) -> tuple[list[list[Message]], list[list[Message]]]:
    """Return (training, validation) conversations, shuffled, no answer and no function twice.

    The first of several equal answers stays. One that also occurs outside the held-out modules
    does not count as held out, so it stays in training only.
    """
    kept: dict[bool, dict[str, list[Message]]] = {False: {}, True: {}}  # by answer
    functions: set[str] = set()
    for item, messages in found:
        answer = messages[-1]["content"].casefold()
        if item.qualified_name in functions or answer in kept[item.held_out]:
            continue  # a second definition, such as another platform's, or a copied docstring
        functions.add(item.qualified_name)
        kept[item.held_out][answer] = messages
    train = list(kept[False].values())
    validation = [kept[True][answer] for answer in kept[True] if answer not in kept[False]]
    order = random.Random(seed)  # noqa: S311 - an order, not a secret
    order.shuffle(train)
    order.shuffle(validation)
    return train, validation


def _documented(
    tree: ast.AST, prefix: str, *, in_class: bool, held_out: bool
) -> Iterator[Documented]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If | ast.Try):  # definitions for one platform or version
            yield from _documented(node, prefix, in_class=in_class, held_out=held_out)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            docstring = cleandoc(ast.get_docstring(node, clean=False) or "")
            if docstring:
                kind, signature = _kind_and_signature(node, in_class=in_class)
                yield Documented(name, kind, signature, docstring, held_out)
            if isinstance(node, ast.ClassDef):
                yield from _documented(node, name, in_class=True, held_out=held_out)


def _kind_and_signature(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, *, in_class: bool
) -> tuple[str, str]:
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.FunctionDef) and child.name == "__init__":
                return "class", _parameters(child.args)
        return "class", ""
    if not in_class:
        return "function", _parameters(node.args)
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if any(name.endswith(("property", ".setter")) for name in decorators):
        return "property", ""
    return "method", _parameters(node.args)


def _parameters(arguments: ast.arguments) -> str:
    text = ast.unparse(arguments)
    first, _, rest = text.partition(", ")
    if first in {"self", "cls"}:
        text = rest.removeprefix("/, ").removeprefix("/")
    return f"({text})"


def _question(item: Documented) -> str:
    called = f"`{item.qualified_name}{item.signature}`"
    if item.kind == "class":
        return f"What is the class {called} for?"
    if item.kind == "property":
        return f"What does the property {called} hold?"
    return f"What does {called} do?"


def _write(path: Path, conversations: Iterable[list[Message]]) -> Path:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for messages in conversations:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path
