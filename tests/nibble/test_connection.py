from pathlib import Path

import pytest

from nibble import connection
from nibble.endings import Ending, ExitCode
from service.settings import Settings


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "first-api-key").write_text("sk-nibble-first\n")
    return tmp_path


def test_the_address_is_the_options_then_nibbles_then_openais_then_the_default() -> None:
    variables = {
        "NIBBLE_BASE_URL": "http://nibble:1/v1",
        "OPENAI_BASE_URL": "http://openai:2/v1",
        "NIBBLE_API_KEY": "k",
    }
    addresses = []
    for option, left_out in ((None, None), ("http://option", None), (None, "NIBBLE_BASE_URL")):
        kept = {name: value for name, value in variables.items() if name != left_out}
        addresses.append(connection.resolve(option, kept).base_url)
    addresses.append(connection.resolve(None, {"NIBBLE_API_KEY": "k"}).base_url)

    assert addresses == [
        "http://nibble:1/v1",
        "http://option/v1",
        "http://openai:2/v1",
        "http://127.0.0.1:8000/v1",
    ]


def test_the_key_is_nibbles_then_openais_then_the_local_services_first(data_dir: Path) -> None:
    file = {"NIBBLE_DATA_DIR": str(data_dir)}
    openai = {"OPENAI_API_KEY": "sk-openai", **file}
    nibble = {"NIBBLE_API_KEY": " sk-nibble\n", **openai}

    found = [connection.resolve(None, variables) for variables in (nibble, openai, file)]

    assert [where.api_key for where in found] == ["sk-nibble", "sk-openai", "sk-nibble-first"]
    assert [where.key_source for where in found] == [
        "NIBBLE_API_KEY",
        "OPENAI_API_KEY",
        str(data_dir / "first-api-key"),
    ]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "[::1]"])
def test_the_first_key_is_for_this_machine(data_dir: Path, host: str) -> None:
    where = connection.resolve(f"http://{host}:8000/v1", {"NIBBLE_DATA_DIR": str(data_dir)})

    assert where.api_key == "sk-nibble-first"


@pytest.mark.parametrize(
    "host", ["nibble.example", "10.0.0.1", "localhost.example", "[2001:db8::1]"]
)
def test_the_first_key_goes_to_no_other_machine(data_dir: Path, host: str) -> None:
    with pytest.raises(Ending, match="NIBBLE_API_KEY") as refusal:
        connection.resolve(f"http://{host}:8000/v1", {"NIBBLE_DATA_DIR": str(data_dir)})

    assert refusal.value.code is ExitCode.REFUSED


def test_the_first_key_is_looked_for_where_the_service_puts_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    assert connection.first_key_file({}) == Settings().first_key_file
    monkeypatch.setenv("NIBBLE_DATA_DIR", "~/elsewhere")
    assert connection.first_key_file() == Settings().first_key_file


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nibble",
        "ftp://host/v1",
        "http://",
        "http://host:x/v1",
        "http://host:99999",
        "http://[::1",
    ],
)
def test_what_is_no_http_address_is_refused(url: str) -> None:
    with pytest.raises(Ending, match="address") as refusal:
        connection.check_base_url(url)

    assert refusal.value.code is ExitCode.REFUSED


@pytest.mark.parametrize("key", ["sk-ü", "two\nlines", "nul\0"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(Ending, match="NIBBLE_API_KEY") as refusal:
        connection.resolve(None, {"NIBBLE_API_KEY": key})

    assert key not in refusal.value.message
