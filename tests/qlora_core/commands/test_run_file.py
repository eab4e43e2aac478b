"""A run's file: what it may say, and how each mistake in it is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_core import LoraConfig, TrainConfig
from qlora_core.commands.run_file import read_run_file
from qlora_core.errors import ConfigError

LEAST = """
[model]
path = "model"
[data]
train = "train.jsonl"
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(folder: Path, text: str) -> str:
    file = write(folder, text)

    with pytest.raises(ConfigError) as refused:
        read_run_file(file)

    assert str(file) in refused.value.message
    return refused.value.message


def test_what_is_left_out_is_as_the_engine_has_it(tmp_path: Path) -> None:
    run = read_run_file(write(tmp_path, LEAST))

    assert run.config == TrainConfig()
    assert (run.output, run.data.validation, run.data.samples) == (None, None, ())
    assert (run.model.block_size, run.model.skip_modules) == (64, ("lm_head",))


def test_settings_arrive_under_the_names_of_the_engine(tmp_path: Path) -> None:
    text = f"""{LEAST}
    samples = ["What?"]
    [train]
    n_epochs = 5
    warmup_ratio = 0.1
    [lora]
    r = 8
    lora_alpha = 4
    target_modules = ["q_proj", "v_proj"]
    rank_pattern = {{ "layers.0.self_attn.q_proj" = 2 }}
    """

    run = read_run_file(write(tmp_path, text))

    lora = LoraConfig(
        r=8,
        alpha=4,
        target_modules=("q_proj", "v_proj"),
        rank_pattern={"layers.0.self_attn.q_proj": 2},
    )
    assert run.config == TrainConfig(n_epochs=5, warmup_ratio=0.1, lora=lora)
    assert run.data.samples == ("What?",)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = 'output = "../out"\n[model]\npath = "model"\n[data]\ntrain = "/data/train.jsonl"\n'

    run = read_run_file(write(tmp_path, text))

    assert run.model.path == tmp_path / "model"
    assert run.data.train == Path("/data/train.jsonl")
    assert run.output is not None
    assert run.output.resolve() == tmp_path.parent / "out"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[model\n", "at line 1, column 7"),
        ("x = 1\n" + LEAST, "there is no setting x; it has output, model, data, train, lora"),
        (LEAST + "[trai]\n", "there is no setting trai; did you mean train?"),
        (LEAST + "[train]\nlearning_rat = 1\n", "[train] has no setting learning_rat; did you mean learning_rate?"),
        (LEAST + "[lora]\nlearning_rate = 1\n", "[lora] has no setting learning_rate; it belongs in [train]"),
        ("learning_rate = 1\n" + LEAST, "there is no setting learning_rate; it belongs in [train]"),
        (LEAST + "[train]\nlora = 1\n", "[train] has no setting lora"),
        (LEAST + "[train]\nlearning_rate = 'fast'\n", "train.learning_rate must be a number above 0 and up to 10, not 'fast'"),
        (LEAST + "[train]\nn_epochs = 0\n", "train.n_epochs must be a whole number from 1 to 1000, not 0"),
        (LEAST + "[train]\nwarmup_ratio = 0.1\nwarmup_steps = 1\n", "train.warmup_ratio and warmup_steps are both given"),
        (LEAST + "[lora]\nr = 0\n", "lora.r must be a whole number from 1 to 65536, not 0"),
        (LEAST + "[lora]\nalpha = 8\nlora_alpha = 8\n", "lora.alpha is given twice"),
        ("lora = 3\n" + LEAST, "lora must be a section, [lora], not 3"),
        ("[data]\ntrain = 'x'\n", "model.path is missing"),
        ("[model]\npath = 'x'\n", "data.train is missing"),
        ("[data]\ntrain = 3\n[model]\npath = 'x'\n", "data.train must be a string, not 3"),
        ("[data]\ntrain = ''\n[model]\npath = 'x'\n", "data.train must be a string, not ''"),
        (LEAST + "samples = 'What?'\n", "data.samples must be a list of strings, not 'What?'"),
        ("[model]\npath = 'x'\ndevice = 'gpu'\n[data]\ntrain = 'x'\n", "model.device must be one of auto, cpu, cuda, not 'gpu'"),
        ("[model]\npath = 'x'\nquantize = 1\n[data]\ntrain = 'x'\n", "model.quantize must be true or false, not 1"),
        ("[model]\npath = 'x'\nblock_size = true\n[data]\ntrain = 'x'\n", "model.block_size must be a whole number, not True"),
        ("output = 7\n" + LEAST, "output must be a string, not 7"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_names_the_line_or_the_setting(
    tmp_path: Path, text: str, sentence: str
) -> None:
    told = refusal(tmp_path, text)

    assert sentence in told
    assert "\n" not in told


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b'output = "\xff"\n')

    with pytest.raises(ConfigError, match="is not TOML"):
        read_run_file(file)


def test_a_context_that_the_model_has_no_room_for_is_refused_or_where_none_is_asked_for_taken_from_it(
    tmp_path: Path,
) -> None:
    silent = read_run_file(write(tmp_path, LEAST))
    asking = read_run_file(write(tmp_path, f"{LEAST}[train]\ncontext_length = 300\n"))

    assert silent.with_context(128).context_length == 128
    assert silent.with_context(None).context_length == TrainConfig().context_length
    assert asking.with_context(300).context_length == 300
    with pytest.raises(ConfigError, match=r"train.context_length is 300, .* made for 128 tokens"):
        asking.with_context(128)
