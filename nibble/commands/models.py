"""`nibble models …`."""

import typer

from nibble import output
from nibble.answers import expect_list
from nibble.commands.options import BaseUrl, Json
from nibble.connection import connect
from nibble.endings import guarded

app = typer.Typer(help="Models that can be fine-tuned, and those that were.", no_args_is_help=True)


@app.command("list")
@guarded
def list_models(base_url: BaseUrl = None, json: Json = False) -> None:
    """List the models of the service."""
    from openai.types import Model

    with connect(base_url) as client:
        found = expect_list(Model, client.models.list, limit=10_000)
        if json:
            output.print_json({"object": "list", "data": [m.to_dict(mode="json") for m in found]})
            return
        rows = ((model.id, model.owned_by, output.local_time(model.created)) for model in found)
        output.print_table(
            ("MODEL", "OWNED BY", "CREATED"), rows, empty="The service's catalog has no models."
        )
