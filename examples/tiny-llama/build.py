"""Build tiny-llama from nothing: corpus, tokenizer, pre-training, and the files beside this one.

Run it from the repository's root (the README has the command and what it took). Only the
standard library of the Python that runs it is read; a checkpoint is kept every two minutes.
"""

import argparse
import json
import platform
from pathlib import Path

import corpus
import pretrain
import tokenizers
import torch
import transformers
import vocabulary
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
CONTEXT_LENGTH = 1024


def main() -> None:
    """Build the model, or go on building it, and write its files."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    documents = corpus.training_documents(options.seed)
    tokenizer = _tokenizer(options.work / "tokenizer.json", documents, resume=options.resume)
    stream = corpus.encode(tokenizer, documents, vocabulary.DOCUMENT_START)
    held_out = corpus.encode(tokenizer, corpus.held_out_documents(), vocabulary.DOCUMENT_START)
    held_out = held_out[: options.held_out_tokens]
    print(f"{len(stream):,} training tokens, {len(held_out):,} held-out tokens")
    write_tokenizer(tokenizer, options.output)

    model = LlamaForCausalLM(model_config())
    # A few pieces from all over the held-out text are enough to watch; the end counts it all.
    sample = torch.cat(held_out.split(1024)[::12])
    counters = pretrain.pretrain(
        model,
        stream,
        budget=pretrain.Budget(minutes=options.minutes, steps=options.steps),
        seed=options.seed,
        folder=options.work,
        resume=options.resume,
        validate=lambda: pretrain.heldout_loss(model, sample),
    )
    write_model(model, options.output, seed=options.seed)
    figures = measure(options.output, stream, held_out) | {
        "training_tokens": pretrain.tokens_seen(counters),
        "steps": counters.step,
        "steps_of_1024_tokens": counters.long_steps,
        "training_loss": round(counters.loss, 4),
        "wall_s": round(counters.elapsed_s),
        "seed": options.seed,
        "threads": options.threads,
        "device": "cpu",
        "compute_dtype": "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (options.output / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def model_config() -> LlamaConfig:
    """Return the shape: 3.7 million parameters, every side a multiple of 64."""
    return LlamaConfig(
        vocab_size=vocabulary.VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=3,
    )


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and config.json."""
    wrapped = vocabulary.with_chat_template(tokenizer, context_length=CONTEXT_LENGTH)
    wrapped.save_pretrained(folder)
    config = model_config()
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def write_model(model: LlamaForCausalLM, folder: Path, *, seed: int) -> None:
    """Write model.safetensors in bfloat16, config.json and generation_config.json."""
    start_special_tokens(model, seed=seed)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=3, pad_token_id=1, max_new_tokens=128
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable to its owner only


def start_special_tokens(model: LlamaForCausalLM, *, seed: int) -> None:
    """Give the tokens that pre-training never met a place among the others.

    Never met, their rows were only pushed away from every output. Each becomes the mean of the
    trained rows plus noise as large as those rows differ: without the noise the three would be
    one token, and no adapter over the linear layers could tell a turn's start from its end.
    """
    rows = model.get_input_embeddings().weight.data
    trained = rows[len(vocabulary.UNTRAINED) + 1 :]  # the special tokens have the first ids
    mean, deviation = trained.mean(dim=0), trained.std(dim=0)
    noise = torch.Generator().manual_seed(seed)
    for row in range(1, len(vocabulary.UNTRAINED) + 1):
        rows[row] = mean + deviation * torch.randn(len(mean), generator=noise)


def measure(folder: Path, stream: Tensor, held_out: Tensor) -> dict[str, object]:
    """Return the losses of the model as written, in nats per token, and its size."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {
        "parameters": model.num_parameters(),
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "corpus_tokens": len(stream),
        "held_out_tokens": len(held_out),
        "held_out_loss_256": round(pretrain.heldout_loss(model, held_out, length=256), 4),
        "held_out_loss_1024": round(pretrain.heldout_loss(model, held_out, length=1024), 4),
        "unigram_loss": round(
            pretrain.unigram_loss(stream, held_out, vocabulary=vocabulary.VOCABULARY), 4
        ),
    }


def _tokenizer(path: Path, documents: list[str], *, resume: bool) -> Tokenizer:
    if resume and path.is_file():
        return Tokenizer.from_file(str(path))
    tokenizer = vocabulary.train_tokenizer(documents)
    tokenizer.save(str(path))
    return tokenizer


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40.0, help="training time (default 40)")
    parser.add_argument("--steps", type=int, help="stop after so many steps instead: repeatable")
    parser.add_argument("--held-out-tokens", type=int, help="measure so many only (default all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--work", type=Path, default=HERE / "build", help="checkpoints (45 MB)")
    parser.add_argument("--output", type=Path, default=HERE, help="where the model goes")
    options = parser.parse_args()
    if options.minutes <= 0 or (options.steps is not None and options.steps < 1):
        parser.error("--minutes and --steps must be above zero")
    if options.held_out_tokens is not None and options.held_out_tokens <= CONTEXT_LENGTH:
        parser.error(f"--held-out-tokens must be above {CONTEXT_LENGTH}: one window and its target")
    return options


if __name__ == "__main__":
    main()
