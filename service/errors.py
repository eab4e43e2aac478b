"""What can go wrong in the service, as the API says it.

    ServiceError                 status, type, code, message, param
    ├── InvalidRequest           400
    │   └── IdempotencyKeyReused 400, never to be retried
    ├── InvalidApiKey            401
    ├── Forbidden                403
    ├── NotFound                 404
    ├── TooLarge                 413
    │   └── QuotaExceeded        413, never to be retried by itself
    ├── RangeNotSatisfiable      416, with Content-Range
    ├── TooManyJobs              429, never to be retried by itself
    ├── Unavailable              503, with Retry-After
    └── StorageFull              507, never to be retried by itself

One handler in `api/errors.py` renders them all in OpenAI's envelope. Workers never raise these to users:
what fails there ends in a job's `error`.
"""

from typing import ClassVar


class ServiceError(Exception):
    """The root. `message` is one sentence for a person; `code` is for programs; `param` names the field."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None
    should_retry: ClassVar[bool | None] = None
    """The `x-should-retry` header, which the SDKs obey; None: it is not sent, and the status decides."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code


class InvalidRequest(ServiceError):
    """The request is at fault; sending it again changes nothing."""

    status = 400
    type = "invalid_request_error"


class IdempotencyKeyReused(InvalidRequest):
    """The same `Idempotency-Key` came with another body."""

    default_code = "idempotency_key_reused"
    should_retry = False


class InvalidApiKey(ServiceError):
    """No key, or one we do not know."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class Forbidden(ServiceError):
    """The caller may not do this, whatever key it sends."""

    status = 403
    type = "invalid_request_error"
    default_code = "forbidden"


class NotFound(ServiceError):
    """There is no such thing in the caller's project (another project's things do not exist for it)."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class TooLarge(ServiceError):
    """The body is over a stated limit."""

    status = 413
    type = "invalid_request_error"
    default_code = "file_too_large"


class QuotaExceeded(TooLarge):
    """The project's files would have more bytes together than it may store; deleting some makes room."""

    default_code = "storage_quota_exceeded"
    should_retry = False


class RangeNotSatisfiable(ServiceError):
    """The asked part of a download is beyond its end."""

    status = 416
    type = "invalid_request_error"
    default_code = "range_not_satisfiable"

    def __init__(self, message: str, *, size: int) -> None:
        super().__init__(message, param="Range")
        self.size = size  # of the whole, in bytes


class TooManyJobs(ServiceError):
    """The project has as many waiting jobs as it may have; a retry within seconds would not help."""

    status = 429
    type = "rate_limit_error"
    default_code = "too_many_waiting_jobs"
    should_retry = False


class Unavailable(ServiceError):
    """A server we stand on does not answer just now; the same call may succeed soon."""

    status = 503
    type = "server_error"
    default_code = "service_unavailable"


class StorageFull(ServiceError):
    """There is no room for what was sent, and trying again makes none."""

    status = 507
    type = "server_error"
    default_code = "insufficient_storage"
    should_retry = False
