"""The packages of a folder of wheels that this interpreter lacks, one a line: what scripts/gpu-check installs."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["missing"]


def missing(wheels: Path) -> list[str]:
    """Names, each once, in order."""
    found = set()
    for wheel in wheels.glob("*.whl"):
        name = wheel.name.split("-")[0]
        try:
            version(name)
        except PackageNotFoundError:
            found.add(name)
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(missing(Path(sys.argv[1]))))
