"""What packing saves: forward and backward passes over the same optimizer steps, packed into rows and padded.

`.venv/bin/python -m bench.packing` prints tokens per second of both, in turns, with the examples' lengths as chats have
them (lognormal), and keeps them in `bench/results/`. On a CPU it counts the process's own time on one thread, which other work
on the machine changes little; on a GPU the clock's.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.surroundings import RESULTS, ROOT, commit
from qlora_core.data import Batching, Dataset, epoch_order, pass_tokens, windows
from qlora_core.data.dataset import Examples
from qlora_core.models import load_model
from qlora_core.nn import LoraConfig, add_lora
from qlora_core.text import EncodedExample
from qlora_core.train.loss import SupervisedLoss
from qlora_core.train.packing import choose_packing


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-llama")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--examples", type=int, default=64, help="of each round")
    parser.add_argument("--mean-tokens", type=float, default=200, help="of an example")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = load_model(arguments.model, device=arguments.device, compute_dtype=dtype)
    add_lora(model, LoraConfig())
    model.train()
    loss_of, packing = SupervisedLoss(model), choose_packing(model)
    dataset = _dataset(arguments.examples, arguments.mean_tokens)
    rows: list[dict[str, Any]] = []
    for batch_size in arguments.batch_sizes:
        found: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(arguments.rounds + 1):
            for packed in (True, False) if turn % 2 else (False, True):
                batching = Batching(4096, packed, 0, pass_tokens(device))
                rate = _tokens_per_s(loss_of, dataset, batching, batch_size, device)
                if turn > 0:  # the first warms up
                    found[packed].append(rate)
        rows.append({"batch_size": batch_size, "packed": found[True], "padded": found[False]})
        print(
            f"batch size {batch_size}: packed {statistics.median(found[True]):,.0f} tokens/s, "
            f"padded {statistics.median(found[False]):,.0f} tokens/s"
        )
    if arguments.keep:
        _keep(device, {"packing": packing.value, "lengths": list(dataset.lengths), "rows": rows})
    return 0


def _dataset(count: int, mean_tokens: float) -> Dataset:
    draw = random.Random(0)  # noqa: S311 - lengths, no secret
    report: Any = None  # nothing here reads it
    examples: list[EncodedExample] = []
    for _ in range(count):
        length = min(1024, int(mean_tokens * draw.lognormvariate(-0.32, 0.8)) + 8)
        ids = [draw.randrange(4, 3000) for _ in range(length)]
        trained = [index * 3 > length for index in range(length)]
        examples.append(EncodedExample(ids, trained, False, sum(trained), length))
    return Dataset(Examples.of(examples), report)


def _tokens_per_s(
    loss_of: SupervisedLoss, dataset: Dataset, batching: Batching, batch_size: int, device: torch.device
) -> float:  # fmt: skip
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    began, tokens = clock(), 0
    for window in windows(epoch_order(len(dataset), seed=0, epoch=0), batch_size):
        for batch in batching.split(dataset, window):
            loss_of(batch.to(device)).loss.backward()
            tokens += batch.n_tokens
    if device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (clock() - began)


def _keep(device: torch.device, found: dict[str, Any]) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"packing-{device.type}-{commit()}.json"
    file.write_text(json.dumps({"device": name, "torch": torch.__version__} | found) + "\n")
    print(f"Kept in {file.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
