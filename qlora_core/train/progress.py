"""Progress: where a run is, and the figures it has gathered; a resume point holds all of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run is, and the figures it has gathered.

    Attributes:
        step: optimizer steps done.
        epoch: the one that the next step belongs to, from 0.
        window: steps done in that epoch.
        seen_tokens: over the whole run, trained or not.
        trained_tokens: over the whole run.
        epoch_loss_sum, epoch_tokens: summed loss and trained tokens of the epoch so far.
        train_loss: mean over the last epoch, or over what there is of the first.
        step_loss, step_accuracy: of the last step that counted.
        valid_loss, valid_accuracy: of the last validation.
        best_valid_loss, best_step: of the validation with the smallest loss after a step of training.
        validations_without_improvement: how many in a row have not been better than that one.
        not_finite_in_a_row: steps skipped just before.
    """

    step: int = 0
    epoch: int = 0
    window: int = 0
    seen_tokens: int = 0
    trained_tokens: int = 0
    epoch_loss_sum: float = 0.0
    epoch_tokens: int = 0
    train_loss: float = 0.0
    step_loss: float | None = None
    step_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    best_valid_loss: float | None = None
    best_step: int | None = None
    validations_without_improvement: int = 0
    not_finite_in_a_row: int = 0
