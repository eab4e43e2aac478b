"""Names of fine-tuned models: `ft:{base}:{organization}:{suffix}:{8 letters}`, as OpenAI forms them.

Clients cut them at ":", so no part may hold one: the catalog and `service.jobs.spec.SUFFIX` see to it.
"""

from service.ids import random_letters
from service.tables import Job

_LETTERS = 8


def fine_tuned_model_name(job: Job, organization: str) -> str:
    """Return a new name for what `job` made; without a suffix there are two colons in a row."""
    return f"ft:{job.model}:{organization}:{job.suffix or ''}:{random_letters(_LETTERS)}"


def checkpoint_name(job: Job, organization: str, step_number: int) -> str:
    """Return a new name for what `job` had learnt at a step."""
    return f"{fine_tuned_model_name(job, organization)}:ckpt-step-{step_number}"
