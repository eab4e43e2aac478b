"""What an examination found: one line each."""

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warn", "FAIL"]
"""`warn`: it works, and will not for long, or not as meant. `FAIL`: something does not work."""


@dataclass(frozen=True)
class Finding:
    """One examined thing, how it is, and what to do where it is not well."""

    check: str
    level: Level
    message: str
    todo: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """Return it for JSON."""
        return asdict(self)

    def line(self) -> str:
        """Return it for people."""
        end = f": {self.todo}" if self.todo else ""
        return f"{self.level:<5}{self.check:<14}{self.message}{end}"


def ok(check: str, message: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", message)


def warn(check: str, message: str, todo: str) -> Finding:
    """It works, but."""
    return Finding(check, "warn", message, todo)


def fail(check: str, message: str, todo: str) -> Finding:
    """It does not work."""
    return Finding(check, "FAIL", message, todo)
