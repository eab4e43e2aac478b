"""`nibble queue` and `nibble workers`: what waits, for what, and who works."""

from typing import Any, cast

from nibble import output
from nibble.commands.options import BaseUrl, Json
from nibble.connection import connect
from nibble.endings import guarded
from nibble.failures import unreachable

_OWN_LIMIT = 1_000


@guarded
def show_queue(base_url: BaseUrl = None, json: Json = False) -> None:
    """Show your jobs that run or wait, in the order of their turn, and how many others there are."""
    with connect(base_url) as client:
        answer = client.get(f"/fine_tuning/queue?limit={_OWN_LIMIT}", cast_to=object)
    queue = _with_data(answer)
    if json:
        output.print_json(queue)
        return
    jobs: list[dict[str, Any]] = queue["data"]
    rows = (
        (
            job["id"],
            job["status"],
            job["queue_position"],
            output.local_time(job["expected_start"]),
            output.local_time(job["estimated_finish"]),
            output.size(job["memory_needed_bytes"]),
        )
        for job in jobs
    )
    output.print_table(
        ("JOB", "STATUS", "POSITION", "EXPECTED START", "ESTIMATED FINISH", "NEEDS"),
        rows,
        empty="None of your jobs run or wait.",
    )
    for job in jobs:
        if job["waits_because"]:
            output.say(f"{job['id']}: {job['waits_because']}")
    others: dict[str, int] = queue["others"]
    output.say(
        f"Of other projects {others['running']} run and {others['queued']} wait for training."
    )


@guarded
def show_workers(base_url: BaseUrl = None, json: Json = False) -> None:
    """Show the workers, their GPUs, and what they are at."""
    with connect(base_url) as client:
        answer = client.get("/fine_tuning/workers", cast_to=object)
    workers = _with_data(answer)
    if json:
        output.print_json(workers)
        return
    listed: list[dict[str, Any]] = workers["data"]
    rows = (
        (
            worker["id"],
            worker["host"],
            worker["status"],
            output.local_time(worker["seen_at"]),
            f"{worker['training']}/{worker['train_slots']}",
            f"{worker['validating']}/{worker['validate_slots']}",
            ", ".join(_device(device) for device in worker["devices"]) or None,
        )
        for worker in listed
    )
    output.print_table(
        ("WORKER", "HOST", "STATUS", "LAST HEARD OF", "TRAINING", "VALIDATING", "DEVICES"),
        rows,
        empty="No worker is there.",
    )
    for worker in listed:
        if worker["problem"]:
            output.say(f"{worker['id']}: {worker['problem']}")


def _device(device: dict[str, Any]) -> str:
    if device["memory_bytes"] is None:
        return str(device["name"])
    free = output.size(device["free_memory_bytes"]) or "unknown"
    return f"{device['name']} ({free} of {output.size(device['memory_bytes'])} free)"


def _with_data(answer: object) -> dict[str, Any]:
    """`answer`, which is an object with a list "data"; else something else than the service has answered."""
    if isinstance(answer, dict):
        found = cast("dict[str, Any]", answer)
        if isinstance(found.get("data"), list):
            return found
    raise unreachable(
        f"what answers is no fine-tuning service (it sent {cast('object', answer)!s:.40})"
    )
