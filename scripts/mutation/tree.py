"""Clean copies of a commit, each with an interpreter that imports its own files and its own build of the kernels.

The working tree is never touched. A copy shares the packages of the environment that runs this and nothing of its
`dfastllm`: an editable install maps module names to the working tree, so a copy gets a virtual environment whose path
names the copy's `src` first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Tree", "prepare"]

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("src/dfastllm/kernels")
BEGIN_COVERAGE = 'import os; "COVERAGE_PROCESS_START" in os.environ and __import__("coverage").process_startup()\n'


@dataclass(frozen=True)
class Tree:
    """One copy.

    root: the checked-out files
    python: its interpreter
    build: where cmake keeps the objects of its kernels
    """

    root: Path
    python: Path
    build: Path

    def environment(self) -> dict[str, str]:
        """The environment of a process of this copy: one thread, no bytecode of the caller's settings."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DFASTLLM_", "PYTHON"))}
        return {**kept, "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": str(self.python.parent.parent)}

    def compile(self) -> bool:
        """Build the kernels and put them beside the package; False when a change does not compile."""
        done = subprocess.run(["cmake", "--build", str(self.build), "--parallel", "2"], capture_output=True, text=True)
        if done.returncode == 0:
            self._place(self.root / KERNELS)
        return done.returncode == 0

    def _place(self, folder: Path) -> None:
        for extension in self.build.glob("_native*.so"):
            new = folder / f".{extension.name}"
            shutil.copy2(extension, new)
            new.replace(folder / extension.name)  # a process that has the old one mapped keeps it


def prepare(commit: str, folder: Path, like: Tree | None = None) -> Tree:
    """The copy of `commit` in `folder`, made or brought to that commit. like: a copy of the same commit, whose kernels
    serve here too; such a copy has no build. Raises CalledProcessError when git, the virtual environment or the build
    fails."""
    folder = folder.resolve()
    root, environment = folder / "tree", folder / "environment"
    if not root.exists():
        folder.mkdir(parents=True, exist_ok=True)
        run("git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(root))
        (root / ".git/info/exclude").write_text("*.so\n", encoding="utf-8")
    run("git", "-C", str(root), "checkout", "--quiet", "--force", "--detach", commit)
    tree = Tree(root, environment / "bin/python", folder / "build")
    if not tree.python.exists():
        interpreter(tree, environment)
    if like is not None:
        for extension in (like.root / KERNELS).glob("_native*.so"):
            shutil.copy2(extension, root / KERNELS)
        return tree
    run(
        "cmake", "-S", str(root), "-B", str(tree.build), "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={tree.python}",
    )  # fmt: skip
    if not tree.compile():
        raise RuntimeError(f"the kernels of {commit} do not compile in {tree.build}")
    return tree


def interpreter(tree: Tree, environment: Path) -> None:
    """A virtual environment of the copy: this one's packages and commands, the copy's own `dfastllm`."""
    run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    packages = Path(sysconfig.get_path("purelib"))
    own = next(environment.glob("lib/python*/site-packages"))
    (own / "copy.pth").write_text(f"{tree.root / 'src'}\n{packages}\n{BEGIN_COVERAGE}", encoding="utf-8")
    for command in Path(sys.executable).parent.iterdir():
        if not command.name.startswith(("python", "pip", "activate", "Activate", "dfastllm")):
            (environment / "bin" / command.name).symlink_to(command)
    script = environment / "bin/dfastllm"
    script.write_text(f"#!{tree.python}\nimport sys\n\nfrom dfastllm.cli import main\n\nsys.exit(main())\n", "utf-8")
    script.chmod(0o755)
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(own),
        "coverage>=7.10",
        "nanobind>=3.1",
    )


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
