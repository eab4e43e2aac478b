"""Whether what came back is what was asked for.

The SDK does not check answers: a proxy's HTML page arrives as a `str` where a job was promised, and breaks inside the SDK
where a list was. Whoever uses an answer's fields asks here first, so that a wrong address ends in a sentence.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from nibble.failures import unreachable

if TYPE_CHECKING:
    from openai.types.fine_tuning import FineTuningJob

T = TypeVar("T")


def expect(kind: type[T], answer: object) -> T:
    """`answer`, which is a `kind` with an id.

    Raises:
        Ending: it is something else, so the address is not this service's (unreachable).
    """
    if isinstance(answer, kind) and isinstance(getattr(answer, "id", None), str):
        return answer
    raise unreachable(f"what answers is no fine-tuning service (it sent {str(answer)[:40]!r})")


def expect_job(answer: object) -> "FineTuningJob":
    """`answer`, which is a job with an id and a status; else as `expect`."""
    from openai.types.fine_tuning import FineTuningJob

    job = expect(FineTuningJob, answer)
    status: object = getattr(job, "status", None)
    return job if isinstance(status, str) else expect(FineTuningJob, status)


def expect_list(kind: type[T], ask: Callable[[], Iterable[T]], *, limit: int) -> list[T]:
    """The first `limit` things of a list, over as many pages as it takes; each as `expect`."""
    try:
        found = list(islice(ask(), limit))
    except (AttributeError, TypeError) as error:  # from inside the SDK, when no list came
        raise unreachable("what answers is no fine-tuning service (it sent no list)") from error
    return [expect(kind, item) for item in found]
