"""What the SDK's errors mean to a user, and which of them may pass."""

import json
from typing import TYPE_CHECKING, Any, cast

from nibble.endings import Ending, ExitCode

if TYPE_CHECKING:
    from openai import APIStatusError


class _Service:
    """Whom this process speaks to, for messages."""

    address = "the service"
    key_source = "the environment"


def name_service(address: str, key_source: str) -> None:
    """Tell whom the messages are to name, and where its key came from."""
    _Service.address = address
    _Service.key_source = key_source


def ending_of(error: Exception) -> Ending | None:
    """What an SDK error means for the user; None for one that is not the SDK's."""
    import openai

    if isinstance(error, Ending):
        return error
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error
        return unreachable(f"cannot reach {_Service.address} ({cause})")
    if isinstance(error, openai.APIStatusError):
        return _status_ending(error)
    if isinstance(error, openai.OpenAIError | json.JSONDecodeError):
        return unreachable(f"{_Service.address} does not answer as this service would ({error})")
    return None


def unreachable(what: str) -> Ending:
    """Nobody is there, or somebody else is."""
    hint = "start one with `nibble up`, or point --base-url or NIBBLE_BASE_URL at yours."
    return Ending(ExitCode.UNREACHABLE, f"{what}: is the service running there? If not, {hint}")


def is_passing(error: Exception) -> bool:
    """Whether the same call may succeed in a while: no connection, or the service (or a proxy's page) says so."""
    import openai

    if isinstance(error, Ending):
        return error.code is ExitCode.UNREACHABLE
    if isinstance(error, openai.APIStatusError):
        return _may_pass(error)
    return isinstance(error, openai.APIConnectionError | json.JSONDecodeError)


def _may_pass(error: "APIStatusError") -> bool:
    """Whether to ask again is worth it; the service says so itself where the status misleads (a full disk's 507)."""
    if error.response.headers.get("x-should-retry") == "false":
        return False
    return error.status_code >= 500 or error.status_code in (408, 429)


def _status_ending(error: "APIStatusError") -> Ending:
    body: object = error.body
    envelope = cast("dict[str, Any]", body) if isinstance(body, dict) else {}
    message = str(envelope.get("message") or error.message).strip()
    fields = {name: envelope.get(name) for name in ("message", "type", "param", "code")}
    fields |= {"message": message, "status": error.status_code}
    if error.status_code == 401:
        message = (
            f"{_Service.address} does not take the API key from {_Service.key_source}: {message}"
        )
    code = ExitCode.REFUSED
    if _may_pass(error) and error.status_code != 429:
        code = ExitCode.UNREACHABLE
        message = f"{_Service.address} cannot serve this now ({error.status_code}): {message}"
    return Ending(code, message, error=fields)
