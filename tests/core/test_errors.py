"""What clients read of an error: status, code and type of each, and what its sentence is made of."""

from __future__ import annotations

import builtins
import inspect
import re

import pytest

from dfastllm import errors

# class: (HTTP status, machine-readable code, OpenAI type)
WIRE = {
    "AdapterError": (400, "bad_adapter", "invalid_request_error"),
    "AdapterNotFoundError": (404, "adapter_not_found", "invalid_request_error"),
    "AdaptersBusyError": (429, "adapters_busy", "rate_limit_error"),
    "AuthenticationError": (401, "invalid_api_key", "authentication_error"),
    "BudgetError": (402, "budget_spent", "server_error"),
    "CancelledError": (499, "cancelled", "server_error"),
    "CheckpointError": (500, "bad_checkpoint", "server_error"),
    "ContextLengthError": (400, "context_length_exceeded", "invalid_request_error"),
    "DownloadError": (500, "download_failed", "server_error"),
    "DataError": (400, "bad_data", "invalid_request_error"),
    "DatabaseError": (503, "database_unavailable", "server_error"),
    "DFastLLMError": (500, "internal_error", "server_error"),
    "ForbiddenError": (403, "forbidden", "permission_error"),
    "GenerationError": (500, "generation_failed", "server_error"),
    "KeyNotFoundError": (404, "key_not_found", "invalid_request_error"),
    "MalformedRequestError": (400, "malformed_request", "invalid_request_error"),
    "MisdirectedRequestError": (421, "wrong_host", "invalid_request_error"),
    "ModelLoadError": (500, "model_load_failed", "server_error"),
    "ModelNotFoundError": (404, "model_not_found", "invalid_request_error"),
    "NotReadyError": (503, "not_ready", "server_error"),
    "PayloadTooLargeError": (413, "payload_too_large", "invalid_request_error"),
    "PipelineNotFoundError": (404, "pipeline_not_found", "invalid_request_error"),
    "QueueFullError": (429, "queue_full", "rate_limit_error"),
    "RateLimitError": (429, "rate_limit_exceeded", "rate_limit_error"),
    "RequestNotFoundError": (404, "request_not_found", "invalid_request_error"),
    "SandboxError": (400, "module_failed", "invalid_request_error"),
    "SlowRequestError": (408, "request_too_slow", "invalid_request_error"),
    "StorageError": (500, "cannot_write", "server_error"),
    "TeacherError": (502, "teacher_failed", "server_error"),
    "TenantNotFoundError": (404, "tenant_not_found", "invalid_request_error"),
    "TimeoutError": (504, "timeout", "server_error"),
    "TokenizerError": (500, "bad_tokenizer", "server_error"),
    "TooManyConnectionsError": (503, "too_many_connections", "server_error"),
    "TrainingError": (500, "training_failed", "server_error"),
    "UnsupportedError": (400, "unsupported", "invalid_request_error"),
    "ValidationError": (400, "invalid_request", "invalid_request_error"),
}


def test_what_clients_decide_by_is_stable() -> None:
    """Codes and statuses are part of the API: clients retry, shorten or give up by them."""
    found = {
        name: (one.status, one.code, one.type)
        for name, one in inspect.getmembers(errors, inspect.isclass)
        if issubclass(one, errors.DFastLLMError)
    }
    assert found == WIRE, "a new error, or a changed one: write what clients read of it into the table above"
    codes = [code for _, code, _ in WIRE.values()]
    assert len(codes) == len(set(codes))


def test_the_tree_at_the_head_of_the_module_says_the_same() -> None:
    drawn = re.findall(r"(?:├──|└──) (\w+) +(\d{3})\b", errors.__doc__ or "")
    assert {name: int(status) for name, status in drawn} == {
        name: status for name, (status, _, _) in WIRE.items() if name != "DFastLLMError"
    }


@pytest.mark.parametrize("name", WIRE)
def test_an_error_says_what_and_the_way_out(name: str) -> None:
    make = getattr(errors, name)
    plain, hinted = make("it is wrong."), make("it is wrong.", param="x", hint="Mend it.")
    assert (str(plain), plain.message, plain.param, plain.hint) == ("it is wrong.", "it is wrong.", None, None)
    assert str(hinted) == hinted.message == "it is wrong. Mend it."
    assert (hinted.param, hinted.hint) == ("x", "Mend it.")
    with pytest.raises(TypeError):
        make("it is wrong.", "x")


def test_a_rate_limit_says_when_to_come_back() -> None:
    assert errors.RateLimitError("full.").retry_after == 1.0
    assert errors.QueueFullError("full.", retry_after=7.5).retry_after == 7.5


def test_they_are_what_python_calls_them() -> None:
    assert issubclass(errors.ValidationError, ValueError)
    assert issubclass(errors.ModelNotFoundError, LookupError)
    assert issubclass(errors.RequestNotFoundError, LookupError)
    assert issubclass(errors.TimeoutError, builtins.TimeoutError)
