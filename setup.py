"""Builds the extension module optimus._C from csrc/. Everything else is in pyproject.toml.

OPTIMUS_CUDA=auto|0|1 (default auto) chooses the CUDA backend: 0 leaves it out, 1 requires it, auto
takes it when nvcc is found. nvcc compiles the .cu files here, not torch's CUDAExtension, which
needs a CUDA build of torch: so the CPU wheel of torch builds and links the real kernels, and the
module imports on a machine without a GPU (the CUDA runtime is linked statically).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
# The same flags as in CMakeLists.txt: one Hopper build with its own instructions, one for the rest,
# and PTX that GPUs later than Hopper compile when they load it.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_80,code=compute_80",
    f"-I{CSRC.resolve()}",
    "-DOPTIMUS_WITH_CUDA",
]


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


def find_nvcc() -> str | None:
    """The CUDA compiler to build with, or None when the build is without CUDA."""
    choice = os.environ.get("OPTIMUS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"OPTIMUS_CUDA must be auto, 0 or 1, got {choice!r}.")
    if choice == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if nvcc is None and choice == "1":
        raise SystemExit(
            "OPTIMUS_CUDA=1 asks for the CUDA backend, but nvcc was not found in CUDA_HOME, on the "
            "PATH or in /usr/local/cuda. Use OPTIMUS_CUDA=auto or 0 for the CPU build."
        )
    return nvcc


def toolkit_folders(nvcc: str) -> tuple[list[str], list[str]]:
    """Include and library folders, as nvcc itself would pass them on."""
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", "unused"],
        capture_output=True,
        text=True,
    ).stderr

    def folders(name: str, flag: str) -> list[str]:
        line = re.search(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE)
        words = shlex.split(line.group(1)) if line else []
        return [word[len(flag) :] for word in words if word.startswith(flag)]

    libraries = folders("LIBRARIES", "-L")
    return folders("INCLUDES", "-I"), libraries + [str(Path(path).parent) for path in libraries]


def is_current(target: Path, depfile: Path, command_file: Path, command: str) -> bool:
    """Whether `target` came from this command and is newer than every file it was made of."""
    if not (target.exists() and depfile.exists() and command_file.exists()):
        return False
    if command_file.read_text() != command:
        return False
    built = target.stat().st_mtime
    inputs = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(os.path.exists(path) and os.stat(path).st_mtime <= built for path in inputs)


def compile_cuda(nvcc: str, source: str, folder: Path) -> str:
    target = folder / Path(source).relative_to(CSRC).with_suffix(".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    depfile, command_file = target.with_suffix(".d"), target.with_suffix(".command")
    command = [nvcc, *NVCC_FLAGS, "-MD", "-MF", str(depfile), "-c", source, "-o", str(target)]
    if not is_current(target, depfile, command_file, shlex.join(command)):
        print(f"nvcc {source}", flush=True)
        subprocess.run(command, check=True)
        command_file.write_text(shlex.join(command))
    return str(target)


class BuildEngine(BuildExtension):
    def finalize_options(self) -> None:
        # In-place, editable and wheel builds share their objects, and ninja decides what is stale:
        # setuptools would look only at file times and miss a change of compiler flags or of torch.
        if self.build_temp is None:
            self.build_temp = f"build/extension-{sys.implementation.cache_tag}"
        super().finalize_options()
        self.force = True

    def build_extensions(self) -> None:
        nvcc = find_nvcc()
        if nvcc is not None:
            self.add_cuda(nvcc)
        super().build_extensions()

    def add_cuda(self, nvcc: str) -> None:
        kernels = [path for path in sources["cuda"] if path.endswith(".cu")]
        folder = Path(self.build_temp) / "cuda"
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
            objects = list(pool.map(lambda source: compile_cuda(nvcc, source, folder), kernels))
        include_dirs, library_dirs = toolkit_folders(nvcc)
        for extension in self.extensions:
            extension.sources += [path for path in sources["cuda"] if not path.endswith(".cu")]
            extension.extra_objects += objects
            extension.define_macros.append(("OPTIMUS_WITH_CUDA", None))
            extension.extra_compile_args += [f"-isystem{path}" for path in include_dirs]
            extension.library_dirs += library_dirs
            extension.libraries += ["cudart_static", "rt", "dl", "pthread"]


sources = read_sources()
headers = sorted(str(p) for p in CSRC.rglob("*") if p.suffix in (".h", ".inl", ".cuh", ".txt"))

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
