"""LoraConfig: bounds, both spellings, and PEFT's rules for patterns."""

import json
import tomllib

import pytest
from peft.utils.other import get_pattern_key

from qlora_core import ConfigError, LoraConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a whole number from 1 to 65536, not 0"),
        ({"r": 65537}, "r must be a whole number"),
        ({"r": 4.0}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"r": "4"}, "r must be a whole number from 1 to 65536, not '4'"),
        ({"alpha": 0}, "alpha must be a number above 0, up to 1048576, not 0"),
        ({"alpha": float("nan")}, "alpha must be a number above 0"),
        ({"alpha": "32"}, "alpha must be a number above 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), not -0.1"),
        ({"dropout": None}, r"dropout must be in \[0, 1\), not None"),
        ({"use_rslora": 1}, "use_rslora must be true or false, not 1"),
        ({"target_modules": ()}, "target_modules must be .* not empty"),
        ({"target_modules": ""}, "target_modules must be .* not empty"),
        ({"target_modules": None}, "target_modules must be a list of names, not None"),
        ({"target_modules": ["q_proj", ""]}, "target_modules must be a list of names"),
        ({"target_modules": ["q_proj", 3]}, "target_modules must be a list of names"),
        ({"target_modules": "q_(proj"}, r"target_modules has 'q_\(proj', which is no regular expression"),
        ({"exclude_modules": "all-linear"}, 'exclude_modules cannot be "all-linear"'),
        ({"exclude_modules": "["}, "exclude_modules has '\\[', which is no regular expression"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, not 'lm_head'"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map names"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern for 'q_proj' must be a whole number"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern has '\\(', which is no regular expression"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern for 'q_proj' must be a number above 0"),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_out_of_its_bounds_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)  # pyright: ignore[reportArgumentType]


def test_lists_become_tuples_and_the_config_can_be_hashed() -> None:
    config = LoraConfig(
        target_modules=["q_proj", "q_proj"],  # pyright: ignore[reportArgumentType]
        modules_to_save=["lm_head"],  # pyright: ignore[reportArgumentType]
        rank_pattern={"q_proj": 2},
    )

    assert config.target_modules == ("q_proj",)
    assert config.modules_to_save == ("lm_head",)
    assert hash(config) == hash(LoraConfig.from_dict(config.as_dict()))


def test_a_config_goes_through_json_and_back() -> None:
    config = LoraConfig(
        r=8,
        alpha=16,
        dropout=0.1,
        target_modules=("q_proj", "up_proj"),
        exclude_modules=r".*layers\.0\..*",
        use_rslora=True,
        rank_pattern={"b": 2, "a": 3},
        alpha_pattern={"q_proj": 0.5},
        modules_to_save=("embed_tokens",),
    )

    again = LoraConfig.from_dict(json.loads(json.dumps(config.as_dict())))

    assert again == config
    assert list(again.rank_pattern) == ["b", "a"]  # the first that matches counts


def test_toml_may_use_pefts_names() -> None:
    table = tomllib.loads(
        """
        r = 8
        lora_alpha = 16
        lora_dropout = 0.05
        target_modules = '.*\\.(q|v)_proj'
        rank_pattern = { q_proj = 4 }
        """
    )

    config = LoraConfig.from_dict(table)

    assert (config.alpha, config.dropout) == (16, 0.05)
    assert config.target_modules == r".*\.(q|v)_proj"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 8}, "no setting rank; it has alpha, .*, r, "),
        ({"alpha": 1, "lora_alpha": 2}, "alpha is given twice"),
    ],
    ids=str,
)
def test_unknown_and_doubled_settings_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig.from_dict(values)


@pytest.mark.parametrize(
    "key",
    ["q_proj", "self_attn.q_proj", "proj", r".*\.0\..*q_proj", "^model.layers.0.self_attn.q_proj", "q_proj|k_proj"],
)  # fmt: skip
@pytest.mark.parametrize(
    "path", ["model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.k_proj", "q_proj"]
)
def test_patterns_match_what_they_match_in_peft(key: str, path: str) -> None:
    config = LoraConfig(r=1, alpha=1, rank_pattern={key: 7}, alpha_pattern={key: 9})

    in_peft = get_pattern_key([key], path) == key
    assert config.rank_of(path) == (7 if in_peft or key == path else 1)
    assert config.alpha_of(path) == (9 if in_peft or key == path else 1)
