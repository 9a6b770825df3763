"""`dfastllm check`"""


def check() -> None:
    """x"""
