import json
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from typer.testing import Result

Run = Callable[..., Result]


def test_a_file_is_uploaded_and_its_id_is_all_that_stdout_says(
    nibble: Run, client: openai.OpenAI, training_file: Path
) -> None:
    result = nibble("files", "upload", training_file)

    assert result.exit_code == 0
    file_id = result.stdout.strip()
    assert client.files.content(file_id).read() == training_file.read_bytes()
    assert client.files.retrieve(file_id).filename == "train.jsonl"
    assert "Uploaded train.jsonl" in result.stderr


def test_several_files_are_uploaded_listed_and_deleted_as_json(
    nibble: Run, client: openai.OpenAI, training_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(training_file.read_bytes())

    uploaded = json.loads(nibble("files", "upload", training_file, other, "--json").stdout)["data"]
    listed = json.loads(nibble("files", "list", "--limit", 2, "--json").stdout)["data"]
    ids = [file["id"] for file in uploaded]
    deleted = json.loads(nibble("files", "delete", *ids, "--json").stdout)["data"]

    assert [file["filename"] for file in uploaded] == ["train.jsonl", "other.jsonl"]
    assert {file["id"] for file in listed} == set(ids)
    assert [(file["id"], file["deleted"]) for file in deleted] == [(id_, True) for id_ in ids]
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(ids[0])


def test_the_list_is_tab_separated_where_there_is_no_terminal(
    nibble: Run, client: openai.OpenAI, training_file: Path
) -> None:
    file_id = nibble("files", "upload", training_file).stdout.strip()

    line = nibble("files", "list", "--limit", 1).stdout

    assert line.split("\t")[:4] == [file_id, "train.jsonl", "1.7 KiB", "fine-tune"]


def test_models_of_the_catalog_are_listed(nibble: Run, client: openai.OpenAI) -> None:
    lines = nibble("models", "list").stdout.splitlines()
    models = json.loads(nibble("models", "list", "--json").stdout)

    assert "tiny" in [line.split("\t")[0] for line in lines]
    assert models["object"] == "list"
    assert "tiny" in [model["id"] for model in models["data"]]


def test_a_file_that_is_not_jsonl_is_refused_with_the_services_own_words(
    nibble: Run, client: openai.OpenAI, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("prompt,completion\n")

    result = nibble("files", "upload", path, "--json")

    assert result.exit_code == 2
    assert "Expected file to have JSONL format" in result.stderr
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == 2
    assert error["status"] == 400
    assert error["param"] == "file"
