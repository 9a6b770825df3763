"""YAML as plain data, for bodies that people write by hand: no anchors, so that a few lines cannot become millions."""

from __future__ import annotations

from typing import Any

import yaml

from dfastllm.errors import PayloadTooLargeError, ValidationError
from dfastllm.text.strict_yaml import StrictLoader

__all__ = ["read_yaml"]

LONGEST = 1 << 18  # bytes: a second of reading
_DEEPEST = 64


class _Loader(StrictLoader):
    """Refuses anchors as well, and what nests deeper than bodies of JSON may."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, "anchors and aliases are not taken", event.start_mark)
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.constructor.ConstructorError(None, None, f"it nests more than {_DEEPEST} deep", event.start_mark)
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self.depth -= 1
        return node


def read_yaml(data: bytes) -> Any:
    """What YAML bytes (UTF-8) hold. Raises PayloadTooLargeError and ValidationError."""
    if len(data) > LONGEST:
        raise PayloadTooLargeError(f"A body of YAML may have {LONGEST} bytes, got {len(data)}.", hint="Send JSON.")
    try:
        return _Loader(data.decode("utf-8-sig")).get_single_data()
    except UnicodeDecodeError as error:
        raise ValidationError(f"The body is not UTF-8: byte {error.start} is {data[error.start]:#04x}.") from None
    except (yaml.YAMLError, ValueError) as error:
        said = " ".join(str(error).split()).replace("<unicode string>", "the body")
        raise ValidationError(f"The body is not valid YAML: {said[:300]}.") from None
