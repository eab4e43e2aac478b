"""`nibble jobs create`: upload what is local, create the job, and with --wait see it through."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

from nibble import output
from nibble.commands.ends import end_with, fetch_adapter, follow, show_job
from nibble.commands.options import BaseUrl, Json, Patience
from nibble.connection import connect
from nibble.download import check_target
from nibble.endings import exit_code_of, guarded, refused
from nibble.submission import Submission, hyperparameters, number_or_auto, pairs, submit
from nibble.upload import check_local, is_file_id, taken_back, upload

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob

_TRAINING = "Hyperparameters (each may be auto)"


@dataclass(frozen=True)
class Amount:
    """An option's number, or "auto"."""

    value: float | str


def _amount(text: str) -> Amount:
    try:
        return Amount(number_or_auto(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor auto.") from None


def _option(*names: str, text: str) -> OptionInfo:
    return typer.Option(
        *names, help=text, parser=_amount, metavar="NUMBER", rich_help_panel=_TRAINING
    )


@guarded
def create(
    train: Annotated[
        str, typer.Argument(metavar="TRAIN", help="A JSONL file, or an uploaded one's id.")
    ],
    model: Annotated[str, typer.Option(help="The base model: see `nibble models list`.")],
    validation: Annotated[str | None, typer.Option(help="A JSONL file, or an id.")] = None,
    suffix: Annotated[
        str | None, typer.Option(help="A word in the fine-tuned model's name.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the run repeatable.")] = None,
    epochs: Annotated[
        Amount | None, _option("--epochs", text="Passes over the training file.")
    ] = None,
    batch_size: Annotated[Amount | None, _option("--batch-size", text="Examples per step.")] = None,
    lr_multiplier: Annotated[
        Amount | None, _option("--lr-multiplier", text="Times the base rate.")
    ] = None,
    learning_rate: Annotated[
        Amount | None, _option("--learning-rate", text="The peak rate itself.")
    ] = None,
    lora_r: Annotated[Amount | None, _option("--lora-r", text="The adapter's rank.")] = None,
    lora_alpha: Annotated[
        Amount | None, _option("--lora-alpha", text="Its scale, times the rank.")
    ] = None,
    lora_dropout: Annotated[Amount | None, _option("--lora-dropout", text="From 0 to 0.9.")] = None,
    lora_target_modules: Annotated[
        str | None,
        typer.Option(help="all-linear, or names like q_proj,v_proj.", rich_help_panel=_TRAINING),
    ] = None,
    lora_use_rslora: Annotated[
        bool | None,
        typer.Option(help="Scale by the rank's root instead.", rich_help_panel=_TRAINING),
    ] = None,
    warmup_ratio: Annotated[
        Amount | None, _option("--warmup-ratio", text="Share of the steps.")
    ] = None,
    warmup_steps: Annotated[
        Amount | None, _option("--warmup-steps", text="The same in steps.")
    ] = None,
    lr_scheduler_type: Annotated[
        str | None,
        typer.Option(help="linear, cosine or constant.", rich_help_panel=_TRAINING),
    ] = None,
    weight_decay: Annotated[Amount | None, _option("--weight-decay", text="From 0 to 1.")] = None,
    max_grad_norm: Annotated[
        Amount | None, _option("--max-grad-norm", text="Clips gradients.")
    ] = None,
    context_length: Annotated[
        Amount | None, _option("--context-length", text="Tokens per example.")
    ] = None,
    max_steps: Annotated[
        Amount | None, _option("--max-steps", text="End after so many steps at the latest.")
    ] = None,
    eval_steps: Annotated[
        Amount | None, _option("--eval-steps", text="Validate every so many steps, too.")
    ] = None,
    early_stopping_patience: Annotated[
        Amount | None,
        _option(
            "--early-stopping-patience", text="End after so many validations without improvement."
        ),
    ] = None,
    load_best_at_end: Annotated[
        bool | None,
        typer.Option(help="Keep the best adapter, or the last.", rich_help_panel=_TRAINING),
    ] = None,
    train_on_inputs: Annotated[
        bool | None, typer.Option(help="Train the prompts, too.", rich_help_panel=_TRAINING)
    ] = None,
    hyperparameter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other one.", rich_help_panel=_TRAINING),
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Kept with the job.")
    ] = None,
    sample_prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Answered by the base and by the adapter at the end."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job to its end.")] = False,
    download: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Implies --wait; a new folder for the adapter."),
    ] = None,
    timeout: Patience = 300.0,
    base_url: BaseUrl = None,
    json: Json = False,
) -> None:
    """Create a fine-tuning job.

    Local files are uploaded first. With --wait the exit code says how the job ended: 0 succeeded, 1 failed, 2 refused,
    3 cancelled, 4 the service cannot be reached. Ctrl-C leaves the job running.
    """
    amounts = {
        "n_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate_multiplier": lr_multiplier,
        "learning_rate": learning_rate,
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "warmup_ratio": warmup_ratio,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "context_length": context_length,
        "max_steps": max_steps,
        "eval_steps": eval_steps,
        "early_stopping_patience": early_stopping_patience,
    }
    named = {name: amount.value for name, amount in amounts.items() if amount is not None}
    words = {
        "lora_target_modules": _modules(lora_target_modules),
        "lr_scheduler_type": lr_scheduler_type,
        "lora_use_rslora": lora_use_rslora,
        "load_best_at_end": load_best_at_end,
        "train_on_inputs": train_on_inputs,
    }
    chosen = hyperparameters(named | words, hyperparameter or ())
    labels = pairs("--metadata", metadata or ())
    target = check_target(download) if download else None
    local = [_local(argument) for argument in (train, validation)]
    with connect(base_url) as client:
        if any(local):
            # A wrong key or model is told before anything is uploaded.
            client.models.retrieve(model)
        try:
            ids = [
                upload(client, path).id if path else argument
                for path, argument in zip(local, (train, validation), strict=True)
            ]
            submission = Submission(
                model=model,
                training_file=ids[0] or "",
                validation_file=ids[1],
                suffix=suffix,
                seed=seed,
                hyperparameters=chosen,
                metadata=labels,
                sample_prompts=tuple(sample_prompt or ()),
            )
            uploaded = [
                file_id for path, file_id in zip(local, ids, strict=True) if path and file_id
            ]
            with taken_back(client, uploaded):
                job = submit(client, submission)
        except KeyboardInterrupt as interrupt:
            output.say("Interrupted before the job's id was known; look with: nibble jobs list")
            raise typer.Exit(exit_code_of(interrupt)) from None
        output.say(f"Created {job.id}.")
        if wait or target:
            _see_through(client, job, target, patience_s=timeout, json=json)
            return
        show_job(job, json=json)
        output.say(f"Watch it with: nibble jobs watch {job.id}")


def _see_through(
    client: "OpenAI",
    job: "FineTuningJob",
    target: Path | None,
    *,
    patience_s: float,
    json: bool,
) -> None:
    job = follow(client, job.id, patience_s=patience_s)
    adapter = None
    if target and job.status == "succeeded":
        adapter = fetch_adapter(client, job.id, target, patience_s=patience_s)
    show_job(job, json=json, adapter=adapter)
    end_with(job)


def _local(argument: str | None) -> Path | None:
    """The file that an argument names; None for an id, or where there is no argument."""
    if argument is None or is_file_id(argument):
        return None
    if not argument:
        raise refused("an empty file name was given.")
    return check_local(Path(argument))


def _modules(text: str | None) -> str | list[str] | None:
    if text is None or text in ("all-linear", "auto"):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
