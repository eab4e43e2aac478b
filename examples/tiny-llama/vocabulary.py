"""tiny-llama's tokenizer: byte-level BPE learned from the training text, and its chat template."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 3072  # a multiple of 64, so that every matrix divides into NF4 blocks
DOCUMENT_START = "<|endoftext|>"
PAD = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
UNTRAINED = (PAD, TURN_START, TURN_END)
"""Special tokens that never occur in the pre-training text."""

CHAT_TEMPLATE = """\
{%- if tools -%}
{{ '<|im_start|>tools\\n' }}
{%- for tool in tools -%}
{{ (tool['function'] or tool) | tojson + '\\n' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
{%- for call in message['tool_calls'] or [] -%}
{{ '<tool_call>' + (call['function'] or call) | tojson + '</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def train_tokenizer(documents: Iterable[str]) -> Tokenizer:
    """Learn `VOCABULARY` tokens; every text survives encoding and decoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[DOCUMENT_START, *UNTRAINED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def with_chat_template(tokenizer: Tokenizer, *, context_length: int) -> PreTrainedTokenizerFast:
    """Wrap the tokenizer as transformers wants it; ``save_pretrained`` writes its files."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_START,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
