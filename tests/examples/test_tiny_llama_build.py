"""The scripts that made tiny-llama, from the folder where they are run."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from operations.demo.docstrings import source_files, standard_library_folder
from operations.demo.heldout import is_held_out

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def corpus() -> Iterator[ModuleType]:
    yield from imported("corpus")


@pytest.fixture(scope="module")
def pretrain() -> Iterator[ModuleType]:
    yield from imported("pretrain")


def imported(name: str) -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))
        del sys.modules[name]


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
        )
    )


def stream_of(tokens: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 64, (tokens,), dtype=torch.int16)


def test_a_held_out_module_is_in_the_held_out_text_and_nowhere_else(
    corpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, held_out = 'def f(x):\n    """Do it."""\n', 'def g(y):\n    """Be it."""\n'
    (tmp_path / "getpass.py").write_text(seen)
    (tmp_path / "heapq.py").write_text(held_out)
    monkeypatch.setattr(corpus, "standard_library_folder", lambda: tmp_path)

    assert sorted(corpus.training_documents(0)) == [seen, "getpass.f(x)\n    Do it.\n"]
    assert corpus.held_out_documents() == [held_out, "heapq.g(y)\n    Be it.\n"]


@pytest.mark.slow
def test_no_held_out_source_is_in_the_training_text_and_all_of_it_is_kept_for_validation(
    corpus: ModuleType,
) -> None:
    training, held_out = set(corpus.training_documents(0)), set(corpus.held_out_documents())

    sources = [each for each in source_files(standard_library_folder()) if is_held_out(each.module)]
    texts = {text for each in sources if (text := each.path.read_text("utf-8")).strip()}

    assert len(texts) > 20
    assert texts <= held_out
    assert not training & held_out
    assert not any("class TextWrapper" in document for document in training)


def test_a_pass_takes_every_piece_once_and_targets_are_the_next_tokens(
    pretrain: ModuleType,
) -> None:
    stream = torch.arange(30_000, dtype=torch.int16)
    batches = (len(stream) - 1 - 256) // 256 // 16

    pieces = [pretrain.batch(stream, index, length=256, seed=3) for index in range(batches)]

    inputs = torch.cat([each for each, _ in pieces])
    assert inputs.shape == (batches * 16, 256)
    assert inputs.unique().numel() == inputs.numel()
    assert all(torch.equal(targets, given + 1) for given, targets in pieces)


def test_the_unigram_loss_of_evenly_spread_tokens_is_the_logarithm_of_their_number(
    pretrain: ModuleType,
) -> None:
    stream = torch.arange(64, dtype=torch.int16).repeat(50)

    loss = pretrain.unigram_loss(stream, stream, vocabulary=64)

    assert loss == pytest.approx(4.158883, abs=1e-6)  # ln 64


def test_the_held_out_loss_is_the_models_own_loss_in_windows(pretrain: ModuleType) -> None:
    model, stream = small_model(), stream_of(17 * 32 + 1)

    actual = pretrain.heldout_loss(model, stream, length=32)

    inputs, targets = stream[:-1].long().view(17, 32), stream[1:].long().view(17, 32)
    with torch.inference_mode():
        logits = model(input_ids=inputs).logits.log_softmax(-1)
    expected = -logits.gather(-1, targets[..., None]).mean().item()
    assert actual == pytest.approx(expected, abs=1e-5)


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(
    pretrain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, budget = stream_of(20_000), pretrain.Budget(minutes=1, steps=9)
    monkeypatch.setattr(pretrain, "_CHECKPOINT_EVERY_S", 0.0)
    unbroken, broken, resumed = small_model(), small_model(), small_model()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    stops = iter([False, False, True])

    def stop_at_the_third_checkpoint() -> float:
        if next(stops):
            raise KeyboardInterrupt
        return 0.0

    def run(model: LlamaForCausalLM, folder: str, *, resume: bool, validate: object) -> object:
        return pretrain.pretrain(
            model,
            stream,
            budget=budget,
            seed=0,
            folder=tmp_path / folder,
            resume=resume,
            validate=validate,
        )

    run(unbroken, "a", resume=False, validate=lambda: 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(broken, "b", resume=False, validate=stop_at_the_third_checkpoint)
    counters = run(resumed, "b", resume=True, validate=lambda: 0.0)

    assert (counters.step, counters.long_steps) == (9, 1)  # type: ignore[attr-defined]
    for name, weight in unbroken.named_parameters():
        assert torch.equal(weight, resumed.get_parameter(name)), name


def test_resuming_without_a_checkpoint_says_what_to_do(
    pretrain: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"nothing to resume.*leave --resume out"):
        pretrain.pretrain(
            small_model(),
            stream_of(6_000),
            budget=pretrain.Budget(minutes=1, steps=1),
            seed=0,
            folder=tmp_path,
            resume=True,
            validate=lambda: 0.0,
        )


@pytest.mark.slow
def test_the_build_writes_a_model_that_transformers_loads(tmp_path: Path) -> None:
    work, output = tmp_path / "work", tmp_path / "model"
    command = [
        sys.executable,
        str(SCRIPTS / "build.py"),
        "--steps",
        "2",
        "--held-out-tokens",
        "4097",
    ]

    subprocess.run(
        [*command, "--work", str(work), "--output", str(output)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=True,
        timeout=280,
    )

    assert json.loads((output / "training.json").read_text())["steps"] == 2
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(output).eos_token_id == 3
