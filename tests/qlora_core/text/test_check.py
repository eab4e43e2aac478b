"""The check of whole files: every bad line is reported, and no file makes it raise, hang or swell."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_core.text import DatasetReport, TextEncoder, check_dataset
from qlora_core.text.scanning import LONGEST_LINE_BYTES

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b c"}]}


@pytest.fixture
def encoder(make_folder: Any) -> TextEncoder:
    return TextEncoder.from_folder(make_folder("chatml"))


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _check(
    encoder: TextEncoder, folder: Path, *lines: bytes | dict[str, Any], **options: Any
) -> DatasetReport:
    path = folder / "train.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else _line(line) for line in lines))
    return check_dataset(path, encoder, **{"context_length": 512, **options})


def test_a_good_file_is_counted(encoder: TextEncoder, tmp_path: Path) -> None:
    report = _check(encoder, tmp_path, *[GOOD] * 12, b"\n", b"  \r\n")

    assert report.problem is None
    assert (report.format, report.n_lines, report.n_examples) == ("chat", 12, 12)
    one = encoder.encode(GOOD, context_length=512)
    assert report.n_tokens == 12 * len(one.input_ids)
    assert report.n_trained_tokens == 12 * one.n_trained_tokens
    assert report.longest_tokens == len(one.input_ids)
    json.dumps(report.as_dict())


def test_fewer_than_ten_examples_is_openais_message(encoder: TextEncoder, tmp_path: Path) -> None:
    report = _check(encoder, tmp_path, *[GOOD] * 7)

    assert report.problem is not None
    assert report.problem.code == "invalid_n_examples"
    assert report.problem.message == (
        "Training file has 7 example(s), but must have at least 10 examples"
    )


def test_the_problem_is_openais_message_for_the_first_bad_line(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    bad = {"messages": [GOOD["messages"][0], {"content": "a"}]}

    report = _check(encoder, tmp_path, *[GOOD] * 99, bad)

    assert report.problem is not None
    assert report.problem.code == "invalid_training_file"
    assert report.problem.message == (
        "The job failed due to an invalid training file. Invalid file format. Example 100, message 2 "
        "Discriminator 'role' is missing in value"
    )
    assert [(e.line, e.code, e.field) for e in report.errors] == [
        (100, "missing_role", "messages[1].role")
    ]


def test_all_bad_lines_are_counted_and_the_first_hundred_described(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    report = _check(encoder, tmp_path, *[GOOD, b"no\n"] * 150)

    assert (report.n_errors, len(report.errors), report.n_examples) == (150, 100, 150)
    assert [error.line for error in report.errors[:3]] == [2, 4, 6]
    assert report.problem is not None
    assert "(150 bad lines in all; the next: 4, 6, 8," in report.problem.message


NOT_JSONL = [b"plain text\n", b"[1, 2]\n", b'"text"\n', b"null\n", b"1" * 10_000 + b"\n"]


@pytest.mark.parametrize("line", NOT_JSONL, ids=lambda line: line[:12].decode())
def test_what_is_not_jsonl_gets_the_documented_message(
    line: bytes, encoder: TextEncoder, tmp_path: Path
) -> None:
    report = _check(encoder, tmp_path, line, *[GOOD] * 10)

    start = line.decode().strip()[:20]
    assert [(e.line, e.code) for e in report.errors] == [(1, "not_jsonl")]
    assert report.errors[0].message == (
        "Expected file to have JSONL format, where every line is a JSON dictionary. "
        f'Line 1 is not a dictionary (HINT: line starts with: "{start}...").'
    )


QUOTE = b'"'

ODD = {
    "invalid utf-8": (b'{"messages": "\xff"}\n', "invalid_utf8", "0xff"),
    "utf-16": ('{"messages": []}\n'.encode("utf-16"), "invalid_utf8", "UTF-16"),
    "half a surrogate": (_line({**GOOD, "messages": [{"role": "assistant", "content": "\ud800"}]}),
                         "invalid_unicode", "surrogate"),
    "deep": (b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "nested_too_deeply", "deeply"),
    "deep inside": (b'{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"function": {"name": "f", "p": '
                    + b"[" * 900 + b"]" * 900 + b"}}]}\n", "nested_too_deeply", "deeply"),
    "cut in the middle": (_line(GOOD)[:-20], "not_jsonl",
                          f"column {_line(GOOD)[:-20].rindex(QUOTE) + 1}, the string that begins there has no end."),
    "not a number": (b'{"a": NaN}\n', "not_jsonl", "Line 1 is not valid JSON, which has no NaN."),
    "carriage returns": (_line(GOOD).replace(b"\n", b"\r") * 12, "not_jsonl", "Line 1 has carriage returns alone"),
    "braces in the value": (_line({"messages": [{"role": "{example}{0}", "content": ""}]}),
                            "unknown_role", '"{example}{0}"'),
    "special token": (_line({"messages": [{"role": "user", "content": "<|im_end|>"}, *GOOD["messages"]]}),
                      "special_token", "Example 1 message contains an invalid token: <|im_end|>."),
    "template refuses": (_line({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}),
                         "chat_template_error", "refuses"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_line_is_an_error_and_the_rest_is_still_read(
    name: str, encoder: TextEncoder, tmp_path: Path
) -> None:
    line, code, message = ODD[name]
    if not line.endswith(b"\n"):
        line += b"\n"

    report = _check(encoder, tmp_path, line, *[GOOD] * 10)

    assert [(e.line, e.code) for e in report.errors] == [(1, code)]
    assert message in report.errors[0].message
    assert report.n_examples == (0 if name == "utf-16" else 10)


def test_a_byte_order_mark_and_duplicate_keys_are_tolerated(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    doubled = b'{"messages": 1, ' + _line(GOOD)[1:]

    report = _check(encoder, tmp_path, b"\xef\xbb\xbf" + _line(GOOD), doubled, *[GOOD] * 10)

    assert report.problem is None
    assert report.n_examples == 12


def test_a_line_of_a_hundred_megabytes_is_refused_in_little_memory(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        file.write(_line(GOOD))
        file.write(b'{"messages": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n')
        file.write(_line(GOOD))
    tracemalloc.start()

    report = check_dataset(path, encoder, context_length=512, min_examples=1)

    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(e.line, e.code) for e in report.errors] == [(2, "line_too_long")]
    assert report.n_examples == 2
    assert peak_bytes < 4 * LONGEST_LINE_BYTES


HUGE = "x" * 100_000
CALLS = [{"function": {"name": HUGE}}]
HUGE_PARTS: dict[str, Any] = {
    "field name": {"role": "assistant", "content": "a", HUGE: 1},
    "role": {"role": HUGE, "content": "a"},
    "weight": {"role": "assistant", "content": "a", "weight": HUGE},
    "part type": {"role": "assistant", "content": [{"type": HUGE}]},
    "call": {"role": "assistant", "tool_calls": CALLS},
}


@pytest.mark.parametrize("name", HUGE_PARTS)
def test_a_report_stays_small_whatever_it_quotes(
    name: str, make_folder: Any, tmp_path: Path
) -> None:
    folder = make_folder("chatml")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception(messages[0]['tool_calls'][0].function.name) }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = TextEncoder.from_folder(folder)

    report = _check(encoder, tmp_path, *[{"messages": [HUGE_PARTS[name]]}] * 100)

    assert (report.n_errors, len(report.errors)) == (100, 100)
    assert all(len(e.message) < 600 and len(e.field or "") < 200 for e in report.errors)
    assert len(json.dumps(report.as_dict())) < 100_000


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_file_says_so(content: bytes, encoder: TextEncoder, tmp_path: Path) -> None:
    report = _check(encoder, tmp_path, content)

    assert report.problem is not None
    assert report.problem.code == "invalid_training_file"
    assert "The file is empty." in report.problem.message
    assert report.format is None


def test_formats_do_not_mix(encoder: TextEncoder, tmp_path: Path) -> None:
    report = _check(encoder, tmp_path, *[GOOD] * 10, {"prompt": "a", "completion": "b"})

    assert [(e.line, e.code) for e in report.errors] == [(11, "mixed_formats")]


def test_long_examples_are_truncated_and_those_with_nothing_left_dropped(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    long_answer = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "word " * 90},
        ]
    }
    long_question = {"messages": [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "a"}]}  # fmt: skip
    silent = {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "weight": 0}]}

    report = _check(
        encoder, tmp_path, *[GOOD] * 8, long_answer, long_question, silent, context_length=50
    )

    assert report.problem is None
    assert (report.n_lines, report.n_examples, report.n_truncated, report.n_dropped) == (
        11,
        9,
        1,
        2,
    )
    assert report.n_dropped_truncated == 1
    assert report.longest_tokens > 90


def test_nothing_left_to_train_is_a_problem(encoder: TextEncoder, tmp_path: Path) -> None:
    silent = {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "weight": 0}]}

    report = _check(encoder, tmp_path, *[silent] * 10)

    assert report.problem is not None
    assert report.problem.code == "invalid_training_file"
    assert "anything to train on" in report.problem.message
    assert report.n_dropped == 10


def test_a_single_example_without_anything_to_train_is_told_in_the_singular(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    silent = {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "weight": 0}]}

    report = _check(encoder, tmp_path, silent, min_examples=1)

    assert report.problem is not None
    assert "Its only example does not have anything to train on" in report.problem.message


def test_a_model_without_a_template_is_said_once(make_folder: Any, tmp_path: Path) -> None:
    folder = make_folder("chatml")
    (folder / "tokenizer_config.json").unlink()

    report = _check(TextEncoder.from_folder(folder), tmp_path, *[GOOD] * 10)

    assert report.n_errors == 1
    assert "no chat template" in report.errors[0].message


def test_progress_ends_at_the_files_size(encoder: TextEncoder, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    _check(encoder, tmp_path, *[GOOD] * 200, on_progress=lambda *done: seen.append(done))

    size = (tmp_path / "train.jsonl").stat().st_size
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)


def test_neither_torch_nor_transformers_is_loaded() -> None:
    code = (
        "import sys, qlora_core.text; from qlora_core import TextEncoder, check_dataset; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], timeout=60)

    assert done.returncode == 0


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
_FIELDS = st.sampled_from(
    ["role", "content", "weight", "name", "tool_calls", "function_call", "type", "text", "function"]
)
_MESSAGE = st.dictionaries(_FIELDS, st.sampled_from(["user", "assistant", "text"]) | _JSON, max_size=4)  # fmt: skip
_LINE = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(_MESSAGE | _JSON, max_size=3) | _JSON,
        "tools": _JSON,
        "functions": _JSON,
        "parallel_tool_calls": _JSON,
        "prompt": _JSON,
        "completion": _JSON,
    },
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(_LINE.map(json.dumps).map(str.encode) | st.binary(max_size=30), max_size=4))
def test_whatever_the_lines_say_each_is_counted_once(
    lines: list[bytes], encoder: TextEncoder, tmp_path: Path
) -> None:
    report = _check(encoder, tmp_path, *[line.replace(b"\n", b" ") + b"\n" for line in lines])

    assert report.n_lines == report.n_examples + report.n_dropped + report.n_errors
    assert (report.problem is None) == (report.n_errors == 0 and report.n_lines >= 10)
    assert json.dumps(report.as_dict())
