"""YAML as plain data in which nothing that was written is lost: a key that is there twice is an error. No anchors, so
that a few lines cannot become millions, or hold themselves."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["StrictLoader"]

_DEEPEST = 64  # as bodies of JSON


class StrictLoader(yaml.SafeLoader):
    """Plain data only. Raises yaml.YAMLError, with its place, for a key that is written twice, since one of the two
    would be ignored, for a key that is no text, for anchors and aliases, and for what nests too deep."""

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

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                said = f"key {key.value!r} is there twice" if isinstance(key, yaml.ScalarNode) else "a key is no text"
                raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]
