"""Which jobs a GPU has room for.

A job's need is what the estimate says of its most frugal form: one example in a pass, what is kept for the backward pass
in the host's memory. A run that begins with more and finds memory ended becomes as frugal as that by itself, so a job
is only ever kept from a GPU where it could not run at all. What is unknown (a CPU, an estimate that does not know the
model) keeps no job from anywhere.
"""

from collections.abc import Sequence

RESERVED_BYTES = 1 << 30
"""Of a GPU's memory: for a CUDA context and what an allocator cannot use. Not measured yet."""


def room(memory_bytes: int | None) -> int | None:
    """Return what a device with so much memory has for a job's tensors; None, unknown, stays None."""
    return None if memory_bytes is None else max(0, memory_bytes - RESERVED_BYTES)


def fits(needed_bytes: int | None, room_bytes: int | None) -> bool:
    """Say whether a job may be tried on a device with this room."""
    return needed_bytes is None or room_bytes is None or needed_bytes <= room_bytes


def why_unfit(needed_bytes: int | None, rooms: Sequence[int | None]) -> str | None:
    """Say that no device has room for a job, and what would have; None: one has, or there is no device at all."""
    known = [room_bytes for room_bytes in rooms if room_bytes is not None]
    if needed_bytes is None or not rooms or len(known) < len(rooms) or needed_bytes <= max(known):
        return None
    return (
        f"The job needs a GPU with {_gib(needed_bytes + RESERVED_BYTES)} of memory, and the largest that a worker has now"
        f" has {_gib(max(known) + RESERVED_BYTES)}: it waits for a larger one. A smaller base model, context_length or"
        " lora_r needs less."
    )


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
