"""Builds the extension module optimus._C from csrc/. Everything else is in pyproject.toml.

OPTIMUS_CUDA=auto|0|1 (default auto) chooses the CUDA backend: 0 leaves it out, 1 requires it, auto
takes it when this source tree has one.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ModuleNotFoundError as error:
    raise SystemExit(
        f"Building Optimus needs the Python module {error.name!r}, which is not installed here. "
        "Run `make setup`, or install torch, pybind11, ninja and numpy first."
    ) from error

CSRC = Path("csrc")
SOURCE_KINDS = ("", "torch", "torch-free", "cuda")


def read_sources() -> dict[str, list[str]]:
    """csrc/sources.txt by kind: '' is every build, the other kinds are line prefixes."""
    sources: dict[str, list[str]] = {kind: [] for kind in SOURCE_KINDS}
    for line in (CSRC / "sources.txt").read_text().splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        kind, separator, path = line.rpartition(":")
        if kind not in SOURCE_KINDS or (separator and not kind):
            raise SystemExit(f"csrc/sources.txt: unknown prefix in the line {line!r}.")
        sources[kind].append(str(CSRC / path.strip()))
    return sources


def check_cuda_choice(cuda_sources: list[str]) -> None:
    choice = os.environ.get("OPTIMUS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"OPTIMUS_CUDA must be auto, 0 or 1, got {choice!r}.")
    if choice == "1" and not cuda_sources:
        raise SystemExit(
            "OPTIMUS_CUDA=1 asks for the CUDA backend, but csrc/sources.txt lists no CUDA source. "
            "Use OPTIMUS_CUDA=auto or 0 for the CPU build."
        )


class BuildEngine(BuildExtension):
    def finalize_options(self) -> None:
        # In-place, editable and wheel builds share their objects, and ninja decides what is stale:
        # setuptools would look only at file times and miss a change of compiler flags or of torch.
        if self.build_temp is None:
            self.build_temp = f"build/extension-{sys.implementation.cache_tag}"
        super().finalize_options()
        self.force = True


sources = read_sources()
check_cuda_choice(sources["cuda"])
headers = sorted(str(p) for p in CSRC.rglob("*") if p.suffix in (".h", ".inl", ".txt"))

setup(
    ext_modules=[
        CppExtension(
            "optimus._C",
            sources[""] + sources["torch"],
            include_dirs=[str(CSRC.resolve())],
            depends=headers,
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                # As system headers: our warnings are for our code, and pybind11 comes before the
                # copy inside torch.
                *(f"-isystem{path}" for path in [pybind11.get_include(), *include_paths()]),
            ],
        )
    ],
    cmdclass={"build_ext": BuildEngine},
)
