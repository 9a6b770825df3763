"""The server's modules know each other in one direction: no circles, those for type checkers included."""

from __future__ import annotations

from graphlib import TopologicalSorter

from tests.kit.source import imported, modules


def test_no_circles() -> None:
    room = {module.name: module for module in modules() if module.room == "server"}
    graph = {
        name: {
            near
            for target, _ in imported(module)
            for near in (target, target.rpartition(".")[0])  # a module, or a name of one
            if near in room and near not in (name, "dfastllm.server")
        }
        for name, module in room.items()
        if not name.endswith(".server")  # the package itself names its public functions
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("dfastllm.server.serving") < order.index("dfastllm.server.jobs")
