"""The kernels' thread pool under ThreadSanitizer, which sees the race of a wrong region even where it goes well."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.kit.source import SRC

NATIVE = SRC / "kernels/native"
# Thousands of regions as small as they come, each with data of its own on the stack: a worker that comes late into a
# region that is over reads what the next one writes, or what is no longer there.
PROGRAM = """
#include <cstdio>
#include <vector>
#include "pool.h"
int main() {
  dfk::set_thread_count(8);
  for (int64_t region = 0; region < 16000; ++region) {
    const int64_t count = 2 + region % 4;
    std::vector<int64_t> done(static_cast<size_t>(count));
    std::vector<int> inside(8);
    dfk::parallel(count, [&](int64_t task, int worker) {
      ++inside[static_cast<size_t>(worker)];
      done[static_cast<size_t>(task)] += region + task;
    });
    for (int64_t task = 0; task < count; ++task) {
      if (done[static_cast<size_t>(task)] != region + task) return std::printf("task %d\\n", static_cast<int>(task)), 1;
    }
    if (region % 4000 == 3999) dfk::set_thread_count(8 - static_cast<int>(region / 4000));
  }
  std::puts("all done");
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_many_tiny_regions_have_no_race(tmp_path: Path) -> None:
    source, program = tmp_path / "regions.cpp", tmp_path / "regions"
    source.write_text(PROGRAM, encoding="utf-8")
    command = ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=thread", f"-I{NATIVE}", str(source)]
    built = subprocess.run([*command, str(NATIVE / "pool.cpp"), "-lpthread", "-o", str(program)], capture_output=True)
    if b"tsan" in built.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr.decode()
    ran = subprocess.run([str(program)], capture_output=True, text=True, env={"TSAN_OPTIONS": "halt_on_error=1"})
    assert (ran.returncode, ran.stdout) == (0, "all done\n"), ran.stderr[:3000]
