"""A job's sample prompts, encoded while its files are checked: what cannot be asked is said before the training."""

from collections.abc import Sequence
from typing import Any

from qlora_core.text import ExampleError, TemplateError, TextEncoder
from qlora_core.text.formats import shortened
from worker.child.report import Report
from worker.reasons import JobError

_SHOWN_CHARACTERS = 400


def check_prompts(
    prompts: Sequence[Sequence[dict[str, Any]]], encoder: TextEncoder, report: Report
) -> JobError | None:
    """Return the job's error if a prompt cannot be encoded; tell of prompts that leave no room for an answer."""
    for index, messages in enumerate(prompts):
        name = f"sample_prompts[{index}]"
        try:
            n_tokens = len(encoder.encode_prompt(messages))
        except ExampleError as error:
            return _invalid(name, error.message.replace("{example}", name, 1))
        except TemplateError as error:
            return _invalid(name, f"{name}: {shortened(error.message, _SHOWN_CHARACTERS)}")
        if encoder.context_length is not None and n_tokens >= encoder.context_length:
            report.message(
                f"{name} has {n_tokens} tokens, which leaves no room for an answer within the base model's context"
                f" length of {encoder.context_length} tokens: its answers will be empty",
                level="warn",
                data={"kind": "sample_prompt_too_long", "param": name, "n_tokens": n_tokens},
            )
    return None


def _invalid(name: str, message: str) -> JobError:
    return {"code": "invalid_sample_prompt", "message": message, "param": name}
