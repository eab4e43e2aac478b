"""A run's folder: begun once, gone on with when asked, one process at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_core.commands.run_folder import RunFolder, text_fingerprints, weights_fingerprint
from qlora_core.errors import ConfigError
from qlora_core.train import Notice, RunStarted

INPUTS = {"data.train": "abc", "model.block_size": 64}
STARTED = RunStarted(3, 0, 4, 1, 10, 20, "cpu", 0, 0)


@pytest.fixture
def config() -> bytes:
    return b"# mine\n"


def start(path: Path, config: bytes) -> RunFolder:
    folder = RunFolder(path, resume=False)
    with folder.begun(config, folder.settled(INPUTS)):
        folder.tell(STARTED)
    return folder


def test_a_new_folder_keeps_what_began_the_run_and_what_it_told(
    tmp_path: Path, config: bytes
) -> None:
    folder = start(tmp_path / "a" / "out", config)

    assert (folder.path / "config.toml").read_text() == "# mine\n"
    assert json.loads((folder.path / "inputs.json").read_text()).items() >= INPUTS.items()
    (event,) = folder.events()
    assert event.pop("at") > 0
    assert event == STARTED.as_dict()


def test_a_run_is_gone_on_with_only_when_asked(tmp_path: Path, config: bytes) -> None:
    start(tmp_path / "out", config)

    with pytest.raises(ConfigError, match="has a run in it; go on with it by --resume"):
        RunFolder(tmp_path / "out", resume=False)

    assert RunFolder(tmp_path / "out", resume=True).is_begun


def test_what_never_came_to_its_first_step_is_begun_anew(tmp_path: Path, config: bytes) -> None:
    failed = RunFolder(tmp_path / "out", resume=False)
    with failed.begun(config, failed.settled(INPUTS)):
        failed.tell(Notice("warn", "before the start"))

    folder = start(tmp_path / "out", b"# mended\n")

    assert [event["kind"] for event in folder.events()] == ["run_started"]
    assert (folder.path / "config.toml").read_text() == "# mended\n"


def test_files_of_somebody_else_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")

    for resume in (False, True):
        with pytest.raises(ConfigError, match="has files in it"):
            RunFolder(tmp_path / "out", resume=resume)
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "out" / "thesis.txt", resume=False)


def test_a_run_goes_on_only_as_it_began_and_with_the_time_it_began(
    tmp_path: Path, config: bytes
) -> None:
    folder = RunFolder(tmp_path / "out", resume=False)
    first = folder.settled(INPUTS)
    with folder.begun(config, first):
        folder.tell(STARTED)
    again = RunFolder(tmp_path / "out", resume=True)

    assert again.settled(INPUTS) == first
    with pytest.raises(ConfigError, match=r"data.train is not what it was when the run"):
        again.settled({**INPUTS, "data.train": "changed"})


def test_a_folder_whose_record_is_broken_is_refused(tmp_path: Path, config: bytes) -> None:
    for broken in ("{", "[]", "{}", '{"began": "then"}'):
        start(tmp_path / broken, config)
        (tmp_path / broken / "inputs.json").write_text(broken)

        with pytest.raises(ConfigError, match=r"inputs\.json is not what began the run"):
            RunFolder(tmp_path / broken, resume=True).settled(INPUTS)


def test_a_run_without_a_record_of_its_inputs_is_refused(tmp_path: Path, config: bytes) -> None:
    start(tmp_path / "out", config)
    (tmp_path / "out" / "inputs.json").unlink()

    with pytest.raises(ConfigError, match=r"inputs\.json is not what began the run"):
        RunFolder(tmp_path / "out", resume=True).settled(INPUTS)


def test_other_versions_are_told_and_not_refused(tmp_path: Path, config: bytes) -> None:
    folder = RunFolder(tmp_path / "out", resume=False)
    with folder.begun(config, folder.settled(INPUTS, {"torch": "1", "tokenizers": "2"})):
        folder.tell(STARTED)
    again = RunFolder(tmp_path / "out", resume=True)

    again.settled(INPUTS, {"torch": "1", "tokenizers": "2"})
    assert again.changed_versions == []
    found = again.settled(INPUTS, {"torch": "1", "tokenizers": "3"})

    assert again.changed_versions == ["tokenizers 2, now 3"]
    assert found["versions"] == {"torch": "1", "tokenizers": "2"}


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_change_of_any_tensor_changes_the_fingerprint_of_the_weights(
    tmp_path: Path, at: int
) -> None:
    tensors = {f"layer.{i}": torch.full((3, 300_000), float(i)) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = weights_fingerprint(tmp_path)
    assert weights_fingerprint(tmp_path) == before

    tensors[f"layer.{at}"] += 1
    save_file(tensors, tmp_path / "model.safetensors")

    assert weights_fingerprint(tmp_path) != before


def test_broken_weights_have_a_fingerprint_too(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)

    assert len(weights_fingerprint(tmp_path)) == 64


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ],
)
def test_whatever_says_how_text_becomes_tokens_has_a_fingerprint(tmp_path: Path, name: str) -> None:
    absent = text_fingerprints(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("one")
    one = text_fingerprints(tmp_path)
    (tmp_path / name).write_text("other")
    other = text_fingerprints(tmp_path)

    (changed,) = (key for key in absent if absent[key] != one[key])
    assert [key for key in one if one[key] != other[key]] == [changed]
    assert changed == f"model.path/{name.partition('/')[0]}"


def test_two_at_once_are_refused(tmp_path: Path, config: bytes) -> None:
    start(tmp_path / "out", config)
    first, second = (RunFolder(tmp_path / "out", resume=True) for _ in range(2))

    with (
        first.begun(config, INPUTS),
        pytest.raises(ConfigError, match="another process is training"),
        second.begun(config, INPUTS),
    ):
        pass


def test_a_run_that_another_process_began_and_ended_meanwhile_is_not_written_over(
    tmp_path: Path, config: bytes
) -> None:
    late = RunFolder(tmp_path / "out", resume=False)
    start(tmp_path / "out", config)

    with pytest.raises(ConfigError, match="meanwhile"), late.begun(config, INPUTS):
        pass

    assert [event["kind"] for event in late.events()] == ["run_started"]


def test_a_line_that_a_kill_has_torn_is_passed_over(tmp_path: Path, config: bytes) -> None:
    start(tmp_path / "out", config)
    with (tmp_path / "out" / "events.jsonl").open("a") as file:
        file.write('{"at": 1, "kind": "step_met')
    folder = RunFolder(tmp_path / "out", resume=True)

    with folder.begun(config, INPUTS):
        folder.tell(Notice("info", "again"))

    assert [event["kind"] for event in folder.events()] == ["run_started", "notice"]
