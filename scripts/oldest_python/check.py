"""What the old interpreter runs: import every module of the client, replay the golden transcripts of HTTP to it.

Runs where there are no sockets and no dfastllm: the server of the transcripts is a stand-in that nothing asks.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import types

sys.path[:0] = ["/repository/clients/python/src", "/site", "/repository"]
_ERRORS = "SSLError SSLZeroReturnError SSLWantReadError SSLWantWriteError SSLEOFError SSLSyscallError"


def stand_in_for_ssl() -> types.ModuleType:
    """The names that httpx, anyio and websockets look up when they are imported."""
    module = types.ModuleType("ssl")
    for name in _ERRORS.split():
        setattr(module, name, type(name, (OSError,), {}))
    for name in ("SSLContext", "SSLObject", "SSLSocket", "MemoryBIO", "TLSVersion", "VerifyMode"):
        setattr(module, name, type(name, (), {}))
    module.create_default_context = lambda *_, **__: module.SSLContext()  # type: ignore[attr-defined]
    return module


def imported() -> list[str]:
    """Every module of the client."""
    client = importlib.import_module("dfastllm_client")
    names = [found.name for found in pkgutil.iter_modules(client.__path__)]
    for name in names:
        importlib.import_module(f"dfastllm_client.{name}")
    return names


async def replayed() -> int:
    """How many transcripts the client says and understands as it did. Raises AssertionError."""
    server = types.ModuleType("clients.golden.server")
    server.Platform = server.golden_server = object  # type: ignore[attr-defined]
    sys.modules["clients.golden.server"] = server
    from clients.golden.scenarios import played
    from clients.golden.transcripts import loaded
    from tests.kit.replay import replaying_transport

    transcripts = [one for one in loaded() if one.scenario.transport == "http"]
    for one in transcripts:
        came = await played(one.scenario, "http://replay", None, replaying_transport(one.lines))
        assert came == one.outcomes, f"{one.scenario.name}: {came} is not {one.outcomes}"
    return len(transcripts)


async def main() -> None:
    assert sys.version_info[:2] == (3, 10), sys.version
    sys.modules.setdefault("ssl", stand_in_for_ssl())
    modules = imported()
    count = await replayed()
    assert modules
    assert count
    print(f"Python {sys.version.split()[0]}: {len(modules)} modules imported, {count} transcripts replayed alike")


await main()  # noqa: F704  (Pyodide takes it at the top)
