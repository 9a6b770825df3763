"""How the values of this room refuse a bad field."""

from __future__ import annotations

from dfastllm.errors import ValidationError

__all__ = ["require"]


def require(ok: bool, message: str, param: str) -> None:
    """Raises ValidationError with `message`, naming `param`, unless `ok`."""
    if not ok:
        raise ValidationError(message, param=param)
