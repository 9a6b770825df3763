"""YAML as plain data, for bodies that people write by hand."""

from __future__ import annotations

from typing import Any

import yaml

from dfastllm.errors import PayloadTooLargeError, ValidationError
from dfastllm.text.strict_yaml import StrictLoader

__all__ = ["read_yaml"]

LONGEST = 1 << 18  # bytes: a second of reading


def read_yaml(data: bytes) -> Any:
    """What YAML bytes (UTF-8) hold. Raises PayloadTooLargeError and ValidationError."""
    if len(data) > LONGEST:
        raise PayloadTooLargeError(f"A body of YAML may have {LONGEST} bytes, got {len(data)}.", hint="Send JSON.")
    try:
        return StrictLoader(data.decode("utf-8-sig")).get_single_data()
    except UnicodeDecodeError as error:
        raise ValidationError(f"The body is not UTF-8: byte {error.start} is {data[error.start]:#04x}.") from None
    except (yaml.YAMLError, ValueError) as error:
        said = " ".join(str(error).split()).replace("<unicode string>", "the body")
        raise ValidationError(f"The body is not valid YAML: {said[:300]}.") from None
