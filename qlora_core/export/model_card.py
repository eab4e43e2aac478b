"""README.md of an adapter's folder: what it is, how to use it, and which servers need something else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def model_card(config: Mapping[str, Any], warnings: Sequence[str]) -> str:
    """Write the card.

    Args:
        config: the content of adapter_config.json.
        warnings: as `serving_warnings` gives them.
    """
    base_model = config["base_model_name_or_path"]
    quoted = json.dumps(base_model, ensure_ascii=False)  # a JSON string is a YAML string
    # A name without a slash is the service's own: on a model hub it may be nobody's, or a stranger's.
    loadable = quoted if "/" in base_model else f'"path/of/the/base/model"  # {base_model}'
    card = f"""---
base_model: {quoted}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- qlora
---

# LoRA adapter for {base_model}

Trained with QLoRA (base weights in NF4) by qlora_core. {_facts(config)}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base_model = {loadable}
base = AutoModelForCausalLM.from_pretrained(base_model)
model = PeftModel.from_pretrained(base, "path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```

The tokenizer and the chat template beside it are those it was trained with.
"""
    if warnings:
        card += "\n## Serving\n\n" + "".join(f"- {warning}\n" for warning in warnings)
    return card


def _facts(config: Mapping[str, Any]) -> str:
    scale = ", scaled by alpha / sqrt(rank)" if config["use_rslora"] else ""
    facts = (
        f"Rank {config['r']}, alpha {config['lora_alpha']}{scale}, dropout {config['lora_dropout']}, "
        f"on {', '.join(config['target_modules'])}."
    )
    if config["rank_pattern"] or config["alpha_pattern"]:
        facts += " Some layers have other ranks or alphas: see adapter_config.json."
    if config["modules_to_save"]:
        facts += f" Trained whole: {', '.join(config['modules_to_save'])}."
    return facts
