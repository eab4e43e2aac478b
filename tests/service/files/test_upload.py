"""What an upload accepts, below HTTP: names, the first line, the disk's last bytes."""

import asyncio
import time

import pytest

from service.errors import InvalidRequest, StorageFull, TooLarge
from service.files.upload import FirstLine, Upload, base_name, check_room
from service.settings import Settings
from service.storage import Storage


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("training.jsonl", "training.jsonl"),
        ("../../etc/passwd", "passwd"),
        (r"C:\Users\me\training.jsonl", "training.jsonl"),
        (r"..\..\training.jsonl", "training.jsonl"),
        ("/", None),
        ("", None),
        (".", None),
        ("a/..", None),
        ("  ", None),
        ("a\x00b", None),
        ("a\r\nb", None),
        ("x" * 255, "x" * 255),
        ("x" * 256, None),
        ("daten für alle.jsonl", "daten für alle.jsonl"),
        (".hidden", ".hidden"),
    ],
)
def test_only_the_last_part_of_a_name_is_kept(sent: str, kept: str | None) -> None:
    if kept is None:
        with pytest.raises(InvalidRequest):
            base_name(sent)
    else:
        assert base_name(sent) == kept


def test_a_megabyte_of_blank_lines_holds_nobody_up() -> None:
    line = FirstLine()
    started = time.process_time()

    for _ in range(16):
        line.add(b"\n" * 65_536)
    took_s = time.process_time() - started
    line.add(b"abc\n")

    assert took_s < 1.5  # quadratic work took more than two seconds
    with pytest.raises(InvalidRequest, match="Line 1048577 is not a dictionary"):
        line.check()


@pytest.mark.parametrize("piece", [1, 3, 1000])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"messages": []}', None),
        (b'{"messages": []}\nrubbish', None),  # the rest is the job's to check
        (b'\r\n\n  {"messages": []}  \r\n', None),
        (b'\xef\xbb\xbf{"a": 1}\n', None),
        (b'\xef\xbb\xbf\r\n\n{"a": 1}\n', None),  # nothing but a mark in the first line
        (b'\n\xef\xbb\xbf{"a": 1}\n', "Line 2 is not a dictionary"),  # a mark that is none
        (b"{}\n", None),
        (b"[]\n", 'Line 1 is not a dictionary (HINT: line starts with: "[]...")'),
        (b"\n\nabc\n", 'Line 3 is not a dictionary (HINT: line starts with: "abc...")'),
        (b"{'a': 1}\n", "Line 1 is not valid JSON: at column 2, a name in double quotes"),
        (
            b'\n{"a": ' + b"1" * 5000 + b"}\n",
            "Line 2 is not valid JSON that can be read: a number has",
        ),
        (b'{"a": 1}\r{"a": 2}\r', "Line 1 has carriage returns alone where lines end"),
        ('{"a": 1}\n'.encode("utf-16"), "Line 1 is not UTF-8 but UTF-16; save the file as UTF-8."),
        (b'{"a": "\xff"}\n', "Line 1 is not valid UTF-8: byte 8 of the line is 0xff."),
        (b'{"a": ' + b"[" * 100_000 + b"\n", "Line 1 is nested too deeply."),
        (b" \n \t\r\n  abc\n", 'Line 3 is not a dictionary (HINT: line starts with: "abc...")'),
        (b"   ", "The file is empty: it has blank lines only."),
        (b"\n\n", "The file is empty: it has blank lines only."),
        (b"\xef\xbb\xbf", "The file is empty: it has blank lines only."),
    ],
)
def test_the_first_line_must_be_a_json_object(content: bytes, told: str | None, piece: int) -> None:
    line = FirstLine()

    for start in range(0, len(content), piece):
        line.add(content[start : start + piece])

    if told is None:
        line.check()
    else:
        with pytest.raises(InvalidRequest) as caught:
            line.check()
        assert told in caught.value.message


def test_a_first_line_of_many_megabytes_is_judged_by_its_start() -> None:
    line = FirstLine()
    for _ in range(40):
        line.add(b'{"messages": "' + b"x" * 100_000)

    line.check()

    assert line.is_whole


def test_many_megabytes_of_lines_that_end_in_carriage_returns_are_told_so() -> None:
    line = FirstLine()
    for _ in range(40):
        line.add(b'{"messages": "' + b"x" * 100_000 + b'"}\r')

    with pytest.raises(InvalidRequest, match="carriage returns"):
        line.check()


@pytest.mark.parametrize(
    ("declared", "limits", "wanted"),
    [
        (None, {}, None),
        (1_000, {}, None),
        (1_001, {"max_upload_bytes": 1_000}, TooLarge),
        (1_000, {"max_upload_bytes": 1_000}, None),
        (None, {"min_free_bytes": 1 << 60}, StorageFull),
        (1 << 60, {"max_upload_bytes": 1 << 61}, StorageFull),
    ],
)
def test_room_is_checked_by_what_is_declared(
    settings: Settings, declared: int | None, limits: dict[str, int], wanted: type[Exception] | None
) -> None:
    limited = settings.model_copy(update=limits)
    storage = Storage.open(settings)

    if wanted is None:
        check_room(limited, storage, declared)
    else:
        with pytest.raises(wanted):
            check_room(limited, storage, declared)


def test_a_disk_that_runs_low_meanwhile_ends_the_upload(settings: Settings) -> None:
    storage = Storage.open(settings)
    free = storage.free_bytes()
    assert free is not None
    low = settings.model_copy(update={"min_free_bytes": free + (1 << 40)})  # others filled it

    async def scenario() -> None:
        upload = Upload(low, storage, project_id="proj_default", filename="a.bin", stored_bytes=0)
        try:
            for _ in range(40):
                await upload.write(b"x" * 1_000_000, purpose="batch")
        finally:
            await upload.abort()

    with pytest.raises(StorageFull):
        asyncio.run(scenario())
