"""Log lines: one JSON object each, on standard error, from structlog and from the standard library alike.

What is bound with `structlog.contextvars` (request id, job id) is on every line of that context. Secrets never
get in: whatever looks like one of our keys is blanked out before a line is written.
"""

import logging
import re
import sys

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_SECRET = re.compile(
    r"""sk-nibble-[A-Za-z0-9_-]+|(?<=bearer\s)[^\s"\\]+|(?<=://)[^\s/@"]*:[^\s/@"]*(?=@)""",
    re.IGNORECASE,
)
_BLANK = "[secret]"


def configure(level: str = "INFO") -> None:
    """Send every log line of this process to standard error as JSON, from `level` (DEBUG … ERROR) on.

    Raises:
        ValueError: there is no such level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r} is none of DEBUG, INFO, WARNING, ERROR, CRITICAL")
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _Formatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _drop_colours,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(default=str),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(number)
    # It says twice per look at the schema that it looks, and `/readyz` looks often.
    logging.getLogger("alembic.runtime.migration").setLevel(max(number, logging.WARNING))


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger `name`; its events are constant names, the data are fields."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def blank_secrets(text: str) -> str:
    """Return `text` with everything that looks like a key, or a password in an address, blanked out."""
    return _SECRET.sub(_BLANK, text)


def _drop_colours(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event.pop("color_message", None)  # uvicorn's second copy of its message
    return event


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """Blanks secrets in the finished line: fields may be nested, and tracebacks quote anything."""

    def format(self, record: logging.LogRecord) -> str:
        return blank_secrets(super().format(record))
