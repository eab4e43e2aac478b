"""`nibble doctor`: one line for each thing examined; exit status 1 where one does not work."""

from typing import Annotated

import typer
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from nibble import output
from nibble.commands.options import Json
from nibble.endings import ExitCode, guarded, refused
from operations.doctor import gpus, machine, queue, servers
from operations.doctor.finding import Finding, fail
from operations.running import with_running_service
from operations.up import DataDir
from service import db
from service.settings import Settings, SettingsInvalid, read_settings

_STYLES = {"ok": "", "warn": "yellow", "FAIL": "red"}


@guarded
def doctor(
    data_dir: DataDir = None,
    probe: Annotated[
        bool, typer.Option(help="Try a kernel on each GPU that no worker holds.")
    ] = True,
    json: Json = False,
) -> None:
    """Examine the service: servers, schema, GPUs, disk, clock, queue; say what to do where something is wrong."""
    try:
        settings = with_running_service(read_settings(data_dir=data_dir))
    except SettingsInvalid as error:
        raise refused(str(error)) from error
    findings = examine(settings, probe=probe)
    ill = [finding for finding in findings if finding.level == "FAIL"]
    if json:
        told = [finding.as_dict() for finding in findings]
        output.print_json({"object": "doctor", "ok": not ill, "findings": told})
    else:
        for finding in findings:
            output.results().print(
                output.Text(output.plain(finding.line()), style=_STYLES[finding.level])
            )
    raise typer.Exit(int(ExitCode.FAILED if ill else ExitCode.SUCCEEDED))


def examine(settings: Settings, *, probe: bool) -> list[Finding]:
    """Examine everything; what cannot be asked because the database is away is left out."""
    findings: list[Finding] = []
    if settings.data_dir.is_dir():
        findings += [machine.examine_folder(settings), machine.examine_disk(settings)]
        findings.append(servers.examine_storage(settings))
    else:
        todo = "start the service there, or name its folder with --data-dir"
        findings.append(fail("data folder", f"{settings.data_dir} is no folder", todo))
    findings += _examine_database(settings)
    findings += [servers.examine_broker(settings), servers.examine_api(settings)]
    findings += gpus.examine_gpus(probe=probe)
    return findings


def _examine_database(settings: Settings) -> list[Finding]:
    if settings.database_url is None:
        todo = "start the service (`nibble up`), name its folder with --data-dir, or set NIBBLE_DATABASE_URL"
        return [fail("database", f"none runs over {settings.data_dir}", todo)]
    engine = db.connect(settings, pool_size=1)
    try:
        return _ask_database(settings, engine)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().split("\n", 1)[0]
        return [fail("database", reason, "start it, or mend NIBBLE_DATABASE_URL")]
    finally:
        engine.dispose()


def _ask_database(settings: Settings, engine: Engine) -> list[Finding]:
    migrations = servers.examine_migrations(engine)
    with db.transaction(db.sessions(engine)) as session:
        findings = [servers.examine_database(session), migrations, servers.examine_clock(session)]
        if migrations.level == "ok":  # in another schema the tables are other ones
            findings.append(queue.examine_workers(session))
            findings.append(queue.examine_queue(session, settings))
            findings.append(queue.examine_leases(session, settings))
    return findings
