"""Which models there are for a project, and where a base model's files are."""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from service import clock
from service.errors import NotFound
from service.models import repository
from service.models.catalog import BaseModel, Catalog
from service.settings import Settings

_TEXT_FILES = ("*.json", "*.jinja")
_FILES = ("*.safetensors", *_TEXT_FILES)
"""All that is ever downloaded: no pickle, no code."""
_LOCAL_OWNER = "nibble"


class ModelUnavailable(Exception):
    """A base model's files are not here and cannot be fetched; the message says why and what to do."""


@dataclass(frozen=True)
class ModelCard:
    """A model as the API lists it."""

    id: str
    created: int
    owned_by: str


def list_models(
    session: Session, catalog: Catalog, settings: Settings, project_id: str
) -> list[ModelCard]:
    """Return the base models, then the project's own ones, newest first."""
    own = repository.fine_tuned(session, project_id)
    return [_card(model) for model in catalog.all()] + [
        ModelCard(
            job.fine_tuned_model,
            clock.unix(job.finished_at or job.created_at),
            settings.organization_id,
        )
        for job in own
        if job.fine_tuned_model is not None
    ]


def get_model(
    session: Session, catalog: Catalog, settings: Settings, project_id: str, model_id: str
) -> ModelCard:
    """Return one model: a base model, a fine-tuned one, or a checkpoint.

    Raises:
        NotFound: there is none of this name in the catalog or in the project.
    """
    base = catalog.get(model_id)
    if base is not None:
        return _card(base)
    job = repository.find_fine_tuned(session, project_id, model_id)
    if job is not None:
        created = clock.unix(job.finished_at or job.created_at)
        return ModelCard(model_id, created, settings.organization_id)
    checkpoint = repository.find_checkpoint(session, project_id, model_id)
    if checkpoint is not None:
        return ModelCard(model_id, clock.unix(checkpoint.created_at), settings.organization_id)
    raise NotFound(
        f"The model '{model_id}' does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


def resolve_folder(model: BaseModel, cache_dir: Path, *, weights: bool = True) -> Path:
    """Return the local folder of a base model's files, downloaded from the hub if need be.

    Args:
        model: of the catalog.
        cache_dir: where downloads are kept; a model that is there is not asked for again.
        weights: False: only what is small is downloaded (configuration, tokenizer, template, weight index).

    Raises:
        ModelUnavailable: the folder is missing, or the hub does not answer or does not have it.
    """
    if model.path is not None:
        if not model.path.is_dir():
            raise ModelUnavailable(
                f"model {model.id}: the folder {model.path} of models.toml does not exist"
            )
        return model.path
    if model.hub is None:
        raise ModelUnavailable(f"model {model.id}: models.toml names neither a folder nor a hub")
    files = _FILES if weights else _TEXT_FILES
    return _download(model.id, model.hub, model.revision, cache_dir, files)


def file_names(model: BaseModel, folder: Path, cache_dir: Path) -> set[str]:
    """Return the names in a base model's resolved `folder`, and of what its repository has beside them.

    Pickle files and weights are named here without being downloaded. No network: `resolve_folder` kept the listing;
    where it could not (a cache that was filled elsewhere), the folder alone counts.
    """
    here = {path.name for path in folder.glob("*") if path.is_file()}
    if model.hub is None or model.path is not None:
        return here
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(model.hub, revision=model.revision, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:
        return here
    return here | {file.path for file in tree}


def _download(
    model_id: str, hub: str, revision: str | None, cache_dir: Path, files: tuple[str, ...]
) -> Path:
    # Imported here: the API lists models without it, and it takes a second.
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    try:
        folder = snapshot_download(
            hub, revision=revision, cache_dir=cache_dir, allow_patterns=list(files)
        )
    except (HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise ModelUnavailable(
            f"model {model_id}: {hub} at revision {revision} cannot be fetched from the hub ({reason}). Check the"
            " network and the name, or put the files into a folder and name it as path in models.toml."
        ) from error
    return Path(folder)


def _card(model: BaseModel) -> ModelCard:
    owner = _LOCAL_OWNER if model.hub is None else model.hub.split("/", 1)[0]
    return ModelCard(model.id, model.created, owner)
