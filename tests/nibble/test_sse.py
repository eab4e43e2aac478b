import pytest

from nibble.sse import ServerEvent, parse

STREAM = (
    ": connected\r\n\r\n"
    'id: 1\nevent: message\ndata: {"message":\n'
    'data: "one\u2028line\x85still"}\n\n'
    "event: metrics\rid: 2\rdata:two\r\r"
    "data\n\n"
    "event: lost\n\n"
    "data: unfinished"
).encode()

EVENTS = [
    None,
    ServerEvent("1", "message", '{"message":\n"one\u2028line\x85still"}'),
    ServerEvent("2", "metrics", "two"),
    ServerEvent("2", "message", ""),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(STREAM)])
def test_events_are_the_same_however_the_bytes_arrive(size: int) -> None:
    chunks = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]

    events = list(parse(chunks))

    assert events == EVENTS


def test_an_event_comes_as_soon_as_its_blank_line_has_come() -> None:
    arrived: list[bytes] = []

    def chunks():  # noqa: ANN202
        for chunk in (b"data: a\n", b"\n", b"data: b\n\n"):
            arrived.append(chunk)
            yield chunk

    first = next(parse(chunks()))

    assert first == ServerEvent(None, "message", "a")
    assert arrived == [b"data: a\n", b"\n"]
