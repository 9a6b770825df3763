"""What scripts/cycles reads from assembly and from llvm-mca."""

from __future__ import annotations

import pytest
from scripts.cycles.record import ROUNDS, read_cycles, read_marks

LOOP = """
	# LLVM-MCA-BEGIN w8g_6_3072
	vpaddd	%ymm0, %ymm1, %ymm2
	# LLVM-MCA-END w8g_6_3072
	jne	.L3
	/* LLVM-MCA-BEGIN w4g_1_1024 */
	sdot	v28.4s, v10.16b, v4.16b
	/* LLVM-MCA-END w4g_1_1024 */
	b.ne	.LBB0_1
"""


def test_marks_are_read_in_order() -> None:
    assert read_marks(LOOP) == ["w8g_6_3072", "w4g_1_1024"]


@pytest.mark.parametrize(
    "jump", ["jne	.L3", "b.ne	.LBB0_1", "bl	add_group", "call	add_group", "cbnz	x1, .L2"]
)
def test_a_jump_behind_a_mark_is_refused(jump: str) -> None:
    with pytest.raises(ValueError, match="w4g_1_1024 holds a jump"):
        read_marks(LOOP.replace("sdot	v28.4s, v10.16b, v4.16b", jump))


def test_cycles_are_of_one_round() -> None:
    report = (
        f"Iterations: {ROUNDS}\nTotal Cycles:      {50 * ROUNDS}\nTotal uOps: 7\n\nTotal Cycles:      {3 * ROUNDS}\n"
    )
    assert read_cycles(report) == [50.0, 3.0]
