"""The reader of `bench.streaming`: loads the file that its argument names, draws from an epoch, says what it took."""

import json
import resource
import sys
import time
from pathlib import Path

from qlora_core.data import Batching, epoch_order, load_dataset, windows
from qlora_core.text import TextEncoder
from qlora_core.text.processes import usual_processes


def main() -> None:
    """Print one line of JSON."""
    task = json.loads(sys.argv[1])
    path, processes = Path(task["path"]), task["processes"]
    encoder = TextEncoder.from_folder(task["model"])
    began = time.perf_counter()
    dataset = load_dataset(
        path, encoder, context_length=1024, processes=processes, folder=path.parent
    )
    seconds = time.perf_counter() - began
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    batching = Batching(max_tokens=4096, packed=True, pad_id=encoder.pad_id, pass_tokens=64)

    began, drawn = time.perf_counter(), 0
    for window in windows(epoch_order(len(dataset), seed=0, epoch=0), 32):
        drawn += sum(batch.n_tokens for batch in batching.split(dataset, window))
        if time.perf_counter() - began > task["epoch_seconds"]:
            break
    told = {
        "examples": len(dataset),
        "tokens": dataset.report.n_tokens,
        "processes": usual_processes(path.stat().st_size) if processes is None else processes,
        "seconds": seconds,
        "cpu_seconds": sum(one.ru_utime + one.ru_stime for one in used),
        "drawn": drawn,
        "drawn_seconds": time.perf_counter() - began,
        # Calculated: four bytes a token.
        "disk_mb": dataset.report.n_tokens * 4 / 1e6,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
