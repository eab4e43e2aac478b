"""The documentation works with the network cable out, and says what the API does."""

import hashlib
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
import pytest

SWAGGER = Path(str(files("api") / "static" / "swagger-ui"))


class Addresses(HTMLParser):
    """Every address a page names, and its inline scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag
        self.found += [value for name, value in attrs if name in {"src", "href"} and value]


@pytest.fixture
def openapi(steady: httpx2.Client) -> dict[str, Any]:
    document: dict[str, Any] = steady.get("/openapi.json").json()
    return document


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_every_address_a_page_names_is_ours_and_answers(steady: httpx2.Client, page: str) -> None:
    html = steady.get(page)

    named = Addresses(html.text).found
    assert named
    for address in [*named, "/openapi.json"]:
        assert address.startswith("/")
        assert not address.startswith("//")
        assert steady.get(address).status_code == 200
    assert re.findall(r"https?:|//[a-z]", html.text) == []
    policy = html.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|\*", policy)


def test_no_stylesheet_or_script_fetches_from_elsewhere() -> None:
    css = (SWAGGER / "swagger-ui.css").read_text()

    fetched = re.findall(r"url\(\s*[\"']?([^\"')]+)", css) + re.findall(r"@import\s+(\S+)", css)

    assert [address for address in fetched if not address.startswith(("data:", "#"))] == []


def test_the_vendored_files_are_unmodified() -> None:
    note = (SWAGGER / "VENDORED.md").read_text()
    recorded = {
        name: sha256 for sha256, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", note, re.MULTILINE)
    }

    present = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in SWAGGER.iterdir()
        if path.name != "VENDORED.md"
    }

    assert present == recorded
    assert "LICENSE" in present


def test_the_upload_s_form_is_described_although_the_route_reads_it_itself(
    openapi: dict[str, Any],
) -> None:
    body = openapi["paths"]["/v1/files"]["post"]["requestBody"]

    schema = body["content"]["multipart/form-data"]["schema"]
    assert schema["required"] == ["file", "purpose"]
    assert schema["properties"]["file"] == {"type": "string", "format": "binary"}
    assert "fine-tune" in schema["properties"]["purpose"]["enum"]
    assert "expires_after[seconds]" in schema["properties"]


def test_every_route_under_v1_asks_for_the_key_and_documents_the_envelope(
    openapi: dict[str, Any],
) -> None:
    for path, methods in openapi["paths"].items():
        for operation in methods.values():
            if not path.startswith("/v1/"):
                assert "security" not in operation
                continue
            assert operation["security"] == [{"HTTPBearer": []}]
            assert "401" in operation["responses"]
            for status, response in operation["responses"].items():
                if status >= "400":
                    content = response["content"]["application/json"]
                    assert content["schema"]["$ref"].endswith("/ErrorOut")
            assert operation.get("summary")
            assert operation.get("description"), f"{path} has no sentence"


def test_the_document_names_only_errors_that_are_sent(openapi: dict[str, Any]) -> None:
    statuses = {
        status
        for methods in openapi["paths"].values()
        for operation in methods.values()
        for status in operation["responses"]
    }

    assert "422" not in statuses
