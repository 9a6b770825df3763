"""Every error dfastllm raises on purpose. Imports no room.

    DFastLLMError
    ├── ValidationError            400  a request or a setting that cannot be honoured
    │   ├── MalformedRequestError  400  what is not HTTP, or can be read in two ways
    │   ├── MisdirectedRequestError 421  sent to a name that is not this server's
    │   ├── ContextLengthError     400  prompt (plus canvas) longer than the model's context
    │   ├── DataError              400  a data set that is missing, or has no row that can be used
    │   ├── SandboxError           400  a module of a pipeline that failed, or wanted more than it may have
    │   └── UnsupportedError       400  a known field this model or decoder cannot honour
    ├── AuthenticationError        401
    ├── ForbiddenError             403  a key that may not do this
    ├── ModelNotFoundError         404
    │   └── AdapterNotFoundError   404
    ├── RequestNotFoundError       404
    ├── PipelineNotFoundError      404
    ├── TenantNotFoundError        404
    │   └── KeyNotFoundError       404  of a tenant, by its id
    ├── SlowRequestError           408  a request that did not come whole in time
    ├── PayloadTooLargeError       413
    ├── RateLimitError             429  carries retry_after
    │   ├── QueueFullError         429  the waiting queue is at its limit
    │   └── AdaptersBusyError      429  every place for an adapter is taken by running requests
    ├── CancelledError             499  the client went away or asked to cancel
    ├── ModelLoadError             500  a checkpoint that cannot be read
    │   ├── AdapterError           400  a LoRA adapter that cannot be read, or fits another model
    │   ├── CheckpointError        500  missing, extra or mis-shaped tensors, corrupt files
    │   ├── DownloadError          500  a model that cannot be fetched
    │   └── TokenizerError         500  missing, unreadable or wrong tokenizer
    ├── StorageError               500  a file that cannot be written
    ├── TrainingError              500  a run that cannot go on: a loss or gradient that is no number
    ├── GenerationError            500  the engine failed while serving a request
    ├── TeacherError               502  a teacher that gave no answer, or none that can be used
    │   └── BudgetError            402  the tokens or the money for teacher calls are spent
    ├── NotReadyError              503  still loading, or shutting down
    │   ├── TooManyConnectionsError 503  no place for one more
    │   └── DatabaseError          503  the database of tenants does not answer, or cannot be used
    └── TimeoutError               504

Each has `code` (machine-readable, stable), `status` (HTTP), `param` (the offending field or None) and
`hint` (what to do). `str(error)` is the full sentence shown to people.
"""

from __future__ import annotations

import builtins

__all__ = [
    "AdapterError",
    "AdapterNotFoundError",
    "AdaptersBusyError",
    "AuthenticationError",
    "BudgetError",
    "CancelledError",
    "CheckpointError",
    "ContextLengthError",
    "DFastLLMError",
    "DataError",
    "DatabaseError",
    "DownloadError",
    "ForbiddenError",
    "GenerationError",
    "KeyNotFoundError",
    "MalformedRequestError",
    "MisdirectedRequestError",
    "ModelLoadError",
    "ModelNotFoundError",
    "NotReadyError",
    "PayloadTooLargeError",
    "PipelineNotFoundError",
    "QueueFullError",
    "RateLimitError",
    "RequestNotFoundError",
    "SandboxError",
    "SlowRequestError",
    "StorageError",
    "TeacherError",
    "TenantNotFoundError",
    "TimeoutError",
    "TokenizerError",
    "TooManyConnectionsError",
    "TrainingError",
    "UnsupportedError",
    "ValidationError",
]


class DFastLLMError(Exception):
    """Root of the tree. `type` is the OpenAI error type of the family."""

    status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} {hint}")
        self.message = str(self)
        self.param = param
        self.hint = hint


class ValidationError(DFastLLMError, ValueError):
    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class MalformedRequestError(ValidationError):
    """`status` of one may be 426 (no upgrade), 431 (a head too large), 501 (an unknown transfer coding) or 505 (another
    version)."""

    code = "malformed_request"


class MisdirectedRequestError(ValidationError):
    status = 421
    code = "wrong_host"


class ContextLengthError(ValidationError):
    code = "context_length_exceeded"


class DataError(ValidationError):
    code = "bad_data"


class UnsupportedError(ValidationError):
    code = "unsupported"


class SandboxError(ValidationError):
    code = "module_failed"


class AuthenticationError(DFastLLMError):
    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class ForbiddenError(DFastLLMError):
    status = 403
    code = "forbidden"
    type = "permission_error"


class ModelNotFoundError(DFastLLMError, LookupError):
    status = 404
    code = "model_not_found"
    type = "invalid_request_error"


class AdapterNotFoundError(ModelNotFoundError):
    code = "adapter_not_found"


class RequestNotFoundError(DFastLLMError, LookupError):
    status = 404
    code = "request_not_found"
    type = "invalid_request_error"


class PipelineNotFoundError(DFastLLMError, LookupError):
    status = 404
    code = "pipeline_not_found"
    type = "invalid_request_error"


class TenantNotFoundError(DFastLLMError, LookupError):
    status = 404
    code = "tenant_not_found"
    type = "invalid_request_error"


class KeyNotFoundError(TenantNotFoundError):
    code = "key_not_found"


class PayloadTooLargeError(DFastLLMError):
    status = 413
    code = "payload_too_large"
    type = "invalid_request_error"


class SlowRequestError(DFastLLMError):
    status = 408
    code = "request_too_slow"
    type = "invalid_request_error"


class RateLimitError(DFastLLMError):
    """`retry_after` is in seconds."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"

    def __init__(
        self, message: str, *, retry_after: float = 1.0, param: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, param=param, hint=hint)
        self.retry_after = retry_after


class QueueFullError(RateLimitError):
    code = "queue_full"


class AdaptersBusyError(RateLimitError):
    code = "adapters_busy"


class CancelledError(DFastLLMError):
    status = 499
    code = "cancelled"


class ModelLoadError(DFastLLMError):
    code = "model_load_failed"


class AdapterError(ModelLoadError):
    """400, since whoever asks for an adapter names its directory."""

    status = 400
    code = "bad_adapter"
    type = "invalid_request_error"


class CheckpointError(ModelLoadError):
    code = "bad_checkpoint"


class DownloadError(ModelLoadError):
    code = "download_failed"


class TokenizerError(ModelLoadError):
    code = "bad_tokenizer"


class StorageError(DFastLLMError):
    code = "cannot_write"


class TrainingError(DFastLLMError):
    """`names`: the losses, or gradients, that are not finite; () where it is about something else."""

    code = "training_failed"

    def __init__(
        self, message: str, *, names: tuple[str, ...] = (), param: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, param=param, hint=hint)
        self.names = names


class GenerationError(DFastLLMError):
    code = "generation_failed"


class TeacherError(DFastLLMError):
    """`reason` is the kind of failure in a word: connect, timeout, reset, http_503, bad_json, ..."""

    status = 502
    code = "teacher_failed"

    def __init__(
        self, message: str, *, reason: str = "failed", param: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, param=param, hint=hint)
        self.reason = reason


class BudgetError(TeacherError):
    status = 402
    code = "budget_spent"


class NotReadyError(DFastLLMError):
    status = 503
    code = "not_ready"


class TooManyConnectionsError(NotReadyError):
    code = "too_many_connections"


class DatabaseError(NotReadyError):
    code = "database_unavailable"


class TimeoutError(DFastLLMError, builtins.TimeoutError):
    status = 504
    code = "timeout"
