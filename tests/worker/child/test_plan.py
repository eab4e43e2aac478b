"""How a job's settings become the engine's, and what a machine adds to them."""

import json
from pathlib import Path
from typing import Any

import pytest

from worker.child.plan import activation_bytes, train_config

_RESOLVED = {
    "n_epochs": 2,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "max_steps": 50,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "eval_steps": 5,
    "early_stopping_patience": 4,
    "load_best_at_end": False,
    "context_length": 128,
    "train_on_inputs": True,
    "packing": False,
    "optimizer": "adamw",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj"],
    "lora_exclude_modules": ["layers.0.self_attn.q_proj"],
    "lora_use_rslora": True,
}


def _model(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _spec(device: str) -> dict[str, Any]:
    return {
        "hyperparameters": _RESOLVED,
        "seed": 7,
        "device": device,
        "resume_point_every_s": 90.0,
    }


def test_every_hyperparameter_of_the_job_reaches_the_engine(tmp_path: Path) -> None:
    folder = _model(tmp_path, hidden_size=64, num_hidden_layers=2, intermediate_size=128)

    config = train_config(_spec("cpu"), folder).as_dict()

    lora = config.pop("lora")
    assert {name: config[name] for name in _RESOLVED if not name.startswith("lora_")} == {
        name: value for name, value in _RESOLVED.items() if not name.startswith("lora_")
    }
    assert {f"lora_{name}": value for name, value in lora.items() if value} == {
        name: value for name, value in _RESOLVED.items() if name.startswith("lora_") and value
    }
    assert (config["seed"], config["resume_point_every_s"]) == (7, 90.0)


def test_a_job_that_was_resolved_before_a_setting_existed_gets_the_engines_default(
    tmp_path: Path,
) -> None:
    folder = _model(tmp_path, hidden_size=64, num_hidden_layers=2, intermediate_size=128)
    new = ("warmup_steps", "max_steps", "eval_steps", "early_stopping_patience", "packing", "lora_use_rslora")  # fmt: skip
    older = {name: value for name, value in _RESOLVED.items() if name not in new}
    spec = {**_spec("cpu"), "hyperparameters": {**older, "warmup_ratio": 0.1}}

    config = train_config(spec, folder)

    assert (config.warmup_ratio, config.warmup_steps, config.max_steps) == (0.1, None, None)
    assert (config.eval_steps, config.early_stopping_patience, config.packing) == (0, 0, True)
    assert config.lora.use_rslora is False


@pytest.mark.parametrize(
    ("device", "layers", "recomputes"), [("cpu", 4, False), ("cpu", 40, True), ("cuda", 4, True)]
)
def test_a_small_model_on_a_cpu_keeps_its_activations_and_everything_else_recomputes_them(
    tmp_path: Path, device: str, layers: int, recomputes: bool
) -> None:
    folder = _model(tmp_path, hidden_size=256, num_hidden_layers=layers, intermediate_size=704)

    config = train_config(_spec(device), folder)

    assert config.gradient_checkpointing is recomputes


def test_activations_are_counted_from_the_config_and_an_unreadable_one_counts_as_large(
    tmp_path: Path,
) -> None:
    known = _model(tmp_path, text_config={"hidden_size": 8, "num_hidden_layers": 3})

    assert activation_bytes(known, 10) == 4 * 10 * 3 * (16 * 8 + 4 * 32)
    assert activation_bytes(_model(tmp_path, n_embd=8), 10) > 1 << 30
