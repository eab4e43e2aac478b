"""models.toml: what it may say, and errors that name the file and the entry."""

import re
from pathlib import Path

import pytest

from service.models.catalog import Catalog, CatalogError


def load(folder: Path, text: str) -> Catalog:
    path = folder / "models.toml"
    path.write_text(text)
    return Catalog.load(path)


def test_a_catalog_lists_folders_and_hub_repositories(tmp_path: Path) -> None:
    catalog = load(
        tmp_path,
        """
        [models.tiny-llama]
        path = "examples/tiny-llama"

        [models."llama-3.1-8b"]
        hub = "somebody/Llama-3.1-8B"
        revision = "0123abc"
        """,
    )

    tiny, llama = catalog.all()
    assert (tiny.id, tiny.path, tiny.hub) == (
        "tiny-llama",
        tmp_path / "examples" / "tiny-llama",  # relative to the file
        None,
    )
    assert (llama.id, llama.hub, llama.revision) == (
        "llama-3.1-8b",
        "somebody/Llama-3.1-8B",
        "0123abc",
    )
    assert tiny.created == int((tmp_path / "models.toml").stat().st_mtime)
    assert catalog.get("tiny-llama") == tiny
    assert catalog.get("unknown") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[models.a\n", "line 1"),
        ("", "no [models.<id>] entry"),
        ("models = 3", "no [models.<id>] entry"),
        ("[models]", "no [models.<id>] entry"),
        ('[models.a]\npath="x"\n[model.b]\npath="x"', "unknown entry 'model'"),
        ("[models]\na = 3", "[models.a]: is no table"),
        ('[models."a:b"]\npath="x"', "[models.a:b]: an id is"),
        ('[models."a/b"]\npath="x"', "[models.a/b]: an id is"),
        ('[models.""]\npath="x"', "[models.]: an id is"),
        ('[models.qwen-2.5]\npath="x"', "[models.qwen-2]: unknown field '5'"),
        ("[models.a]", "[models.a]: give either path (a folder) or hub"),
        ('[models.a]\npath="x"\nhub="a/b"\nrevision="1"', "[models.a]: give either"),
        ('[models.a]\nhub="a/b"', "[models.a]: hub needs revision"),
        ('[models.a]\nhub="b"\nrevision="1"', "[models.a]: hub 'b' is not organization/name"),
        ('[models.a]\npath="x"\nrevision="1"', "[models.a]: revision goes with hub"),
        ("[models.a]\npath=3", "[models.a]: path must be a string"),
        ('[models.a]\npath=" "', "[models.a]: path must be a string"),
        ('[models.a]\nfolder="x"', "[models.a]: unknown field 'folder'"),
    ],
)
def test_an_error_names_the_file_and_the_entry(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(CatalogError, match=re.escape(told)) as caught:
        load(tmp_path, text)

    assert str(caught.value).startswith(str(tmp_path / "models.toml"))


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'[models.a]\npath="\xff"')

    for name in ("nothing.toml", "latin.toml", "."):
        with pytest.raises(CatalogError, match=re.escape(str(tmp_path / name))):
            Catalog.load(tmp_path / name)
