"""What a run leaves on disk: checkpoints, resume points, and the adapter at its end."""

from __future__ import annotations

import time
from concurrent.futures import wait
from pathlib import Path

from qlora_core.export import save_adapter, save_tokenizer_files
from qlora_core.train.events import CheckpointSaved, ResumePointSaved
from qlora_core.train.folders import step_folder
from qlora_core.train.progress import Progress
from qlora_core.train.resume.files import discard_old_points
from qlora_core.train.resume.points import save_resume_point
from qlora_core.train.run import Run
from qlora_core.whole_folder import written_whole


def keep_adapter(run: Run, folder: Path) -> None:
    """Write the adapter as it stands, with the tokenizer it was trained with."""
    run.before_writing()
    with written_whole(folder) as unfinished:
        save_adapter(run.model, unfinished, base_model_name_or_path=run.base_model)
        if run.encoder.folder is not None:
            save_tokenizer_files(run.encoder.folder, unfinished)


def keep_checkpoint(run: Run, progress: Progress) -> None:
    """Write the adapter of an epoch's end and tell it with its figures."""
    folder = step_folder(run.output_dir / "checkpoints", progress.step)
    keep_adapter(run, folder)
    run.sink(
        CheckpointSaved(
            step=progress.step,
            epoch=progress.epoch,
            folder=str(folder),
            train_loss=progress.step_loss,
            train_mean_token_accuracy=progress.step_accuracy,
            full_valid_loss=progress.valid_loss,
            full_valid_mean_token_accuracy=progress.valid_accuracy,
        )
    )


def resume_point_is_due(run: Run) -> bool:
    """Whether the last one is so old that too much would have to be done again."""
    return time.monotonic() - run.resume_point_at >= run.config.resume_point_every_s


def resume_points(run: Run) -> Path:
    """Name the folder of a run's resume points."""
    return run.output_dir / "resume"


def keep_resume_point(run: Run, progress: Progress) -> None:
    """Write everything needed to go on exactly from here; the points that it makes superfluous go while the run goes on."""
    settle_resume_points(run)
    run.before_writing()
    folder = save_resume_point(
        resume_points(run),
        model=run.model,
        optimizer=run.optimizer,
        progress=progress,
        best=run.best,
        identity=run.identity,
        plan=run.plan.as_dict(),
    )
    run.freeing = discard_old_points(resume_points(run), progress.step)
    run.resume_point_at = time.monotonic()
    run.sink(ResumePointSaved(progress.step, str(folder)))


def settle_resume_points(run: Run) -> None:
    """Wait until the superfluous ones are gone."""
    if run.freeing is not None:
        wait([run.freeing])
