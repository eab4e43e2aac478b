"""`nibble files …`."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from nibble import output
from nibble.answers import expect, expect_list
from nibble.commands.options import BaseUrl, Json, an_id
from nibble.connection import connect
from nibble.endings import guarded
from nibble.upload import check_local, upload

app = typer.Typer(help="Training and validation files, and what jobs made.", no_args_is_help=True)


@app.command("upload")
@guarded
def upload_files(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE…", help="JSONL files.")],
    purpose: Annotated[str, typer.Option(help="What they are for.")] = "fine-tune",
    base_url: BaseUrl = None,
    json: Json = False,
) -> None:
    """Upload files and print their ids."""
    for path in paths:
        check_local(path)
    with connect(base_url) as client:
        uploaded = [upload(client, path, purpose=purpose) for path in paths]
        if json:
            output.print_json(
                {"object": "list", "data": [file.to_dict(mode="json") for file in uploaded]}
            )
            return
        for file in uploaded:
            output.print_result(file.id)


@app.command("list")
@guarded
def list_files(
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 100,
    purpose: Annotated[str | None, typer.Option(help="Only those of this purpose.")] = None,
    base_url: BaseUrl = None,
    json: Json = False,
) -> None:
    """List uploaded and produced files."""
    from openai import omit
    from openai.types import FileObject

    with connect(base_url) as client:
        ask = functools.partial(client.files.list, limit=min(limit, 1000), purpose=purpose or omit)
        files = expect_list(FileObject, ask, limit=limit)
        if json:
            output.print_json(
                {"object": "list", "data": [file.to_dict(mode="json") for file in files]}
            )
            return
        rows = (
            (f.id, f.filename, output.size(f.bytes), f.purpose, output.local_time(f.created_at))
            for f in files
        )
        output.print_table(
            ("FILE", "NAME", "SIZE", "PURPOSE", "CREATED"), rows, empty="There are no files yet."
        )


@app.command("delete")
@guarded
def delete_files(
    ids: Annotated[list[str], typer.Argument(metavar="FILE-ID…", parser=an_id)],
    base_url: BaseUrl = None,
    json: Json = False,
) -> None:
    """Delete files; jobs that already use one keep what they need."""
    from openai.types import FileDeleted

    with connect(base_url) as client:
        deleted: list[FileDeleted] = []
        for file_id in ids:
            deleted.append(expect(FileDeleted, client.files.delete(file_id)))
            output.say(f"Deleted {file_id}.")
        if json:
            output.print_json(
                {"object": "list", "data": [file.to_dict(mode="json") for file in deleted]}
            )
