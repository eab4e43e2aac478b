"""Models: the catalog's base models, and what jobs of this project made of them."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from api.deps import CallerDep, CatalogDep, SessionDep, SettingsDep
from api.errors import errors
from service.errors import NotFound
from service.models import actions

router = APIRouter(prefix="/models", tags=["Models"])


class ModelOut(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str

    @classmethod
    def of(cls, card: actions.ModelCard) -> "ModelOut":
        """Show a model."""
        return cls(id=card.id, created=card.created, owned_by=card.owned_by)


class ModelList(BaseModel):
    """All models at once: this list has no pages."""

    object: Literal["list"] = "list"
    data: list[ModelOut]


@router.get("", responses=errors())
def list_models(
    caller: CallerDep, session: SessionDep, catalog: CatalogDep, settings: SettingsDep
) -> ModelList:
    """List the base models, and the models your jobs made, newest first."""
    cards = actions.list_models(session, catalog, settings, caller.project_id)
    return ModelList(data=[ModelOut.of(card) for card in cards])


# A name may hold "/" (older SDKs send it bare), hence the path.
@router.get("/{model:path}", responses=errors(NotFound))
def get_model(
    model: str, caller: CallerDep, session: SessionDep, catalog: CatalogDep, settings: SettingsDep
) -> ModelOut:
    """Describe one model: a base model, a fine-tuned one, or a checkpoint."""
    return ModelOut.of(actions.get_model(session, catalog, settings, caller.project_id, model))
