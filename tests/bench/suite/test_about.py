"""What the report says of where it was measured."""

from __future__ import annotations

import pytest

from dfastllm.bench.suite.about import environment
from tests.kit.suite_example import results


@pytest.mark.parametrize(("local", "warned"), [(True, False), (False, True), (None, True)])
def test_a_machine_that_may_not_be_the_servers_is_said_to_be_the_clients(local: bool | None, warned: bool) -> None:
    """The machine's figures are the client's: of the server only where that is known to run here."""
    made = results()
    there = made.environment.model_copy(update={"server_is_local": local})
    lines = environment(made.model_copy(update={"environment": there})).lines
    assert any("Some Processor" in line for line in lines)
    assert any(line == "The machine is the client's; the server's may be another." for line in lines) == warned
