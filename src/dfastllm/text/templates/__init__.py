"""Chat templates from the inside: the sandbox and its limits, the form of messages, what people wrote in a rendering."""

__all__: list[str] = []
