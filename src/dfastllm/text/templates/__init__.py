"""Chat templates from the inside: the sandbox and its limits, the form of messages, and what of a text people wrote."""

__all__: list[str] = []
