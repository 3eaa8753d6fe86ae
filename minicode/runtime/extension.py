"""Builds csrc/ against the torch that is installed, once, and loads it; else says why not.

There is a library for the CPU and one for GPUs: one serves where the other can't be built, and no
command on the CPU looks for a GPU. A binary lies in a cache folder, under a name that holds
everything it depends on, its own checksum at its end. It is built in a private folder and moved
there in one step: no lock, nothing stale, nothing half written.

MINICODE_EXT=auto     (the default) any obstacle leads to PyTorch, with one line on stderr
MINICODE_EXT=require  any obstacle is an error
MINICODE_EXT=off      PyTorch
MINICODE_MARCH=haswell  the CPU that it is compiled for, as g++'s -march (the default: native)

CXX and CUDACXX name the compilers, with their arguments or a wrapper in front ("ccache g++");
CXXFLAGS, CUDAFLAGS and LDFLAGS come after our own; CUDAHOSTCXX, CUDA_HOME and CUDA_PATH are read.
"""

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from minicode.runtime.options import Parser

PACKAGE = Path(__file__).resolve().parent.parent
SOURCES = {  # by name: an old build folder may have others beside them
    "cpu": (
        "topk_cpu.cpp",
        "topk_coarse.cpp",
        "pursuit_cpu.cpp",
        "peak_cpu.cpp",
        "register_cpu.cpp",
    ),
    "cuda": ("topk_cuda.cu", "topk_coarse.cu", "register_cuda.cpp"),
}
HEADERS = (
    "topk.h",
    "topk_cpu.h",
    "candidates.h",
    "coarse_integers.h",
    "coarse_tiles.h",
    "topk_cuda.cuh",
    "register.h",
)
FLAGS = (
    "-O3 -std=c++20 -ffp-contract=fast -fno-math-errno -fopenmp -fPIC -w "
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
)
CUDA_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC"
REAL_ERROR = re.compile(r"error|fatal|undefined reference|multiple definition|cannot find")


@functools.cache
def load(device):
    """Whether the extension serves a type of device, and what it is, or why there is none.

    Builds it at the first call. ValueError where MINICODE_EXT requires it and it can't be used.
    """
    mode = os.environ.get("MINICODE_EXT", "auto")
    if mode not in ("auto", "off", "require"):
        raise ValueError(f"MINICODE_EXT must be auto, off or require, not {mode!r}")
    if mode == "off":
        return False, "MINICODE_EXT=off"
    if device not in SOURCES:
        return False, f"there is none for {device}"
    try:
        return True, str(_load(device))
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:300]
        if mode == "require":
            raise ValueError(
                f"MINICODE_EXT=require, but the extension can't be used: {reason}"
            ) from None
        where = " on the GPU" if device == "cuda" else ""
        _say(f"searching with PyTorch{where}, without the C++ extension: {reason}")
        return False, reason


def _say(line):
    print(f"minicode: {line}", file=sys.stderr)


def _load(device):
    """Loads the binary for a device, after building it if it is not there; returns its path."""
    sources = _sources(device)
    rules = _rules(device, sources)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minicode"
    texts = [path.read_text(encoding="utf-8") for path in sources]
    key = hashlib.sha256("\0".join([rules, *texts]).encode()).hexdigest()[:24]
    binary = cache / f"topk-{device}-{key}.so"
    if not _intact(binary):
        cache.mkdir(parents=True, exist_ok=True)
        _say("compiling the search, once; it takes a quarter of a minute")
        with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as folder:
            built = _build(Path(folder), rules, sources)
            content = built.read_bytes()
            # A loader ignores what follows the ELF file.
            built.write_bytes(content + hashlib.sha256(content).digest())
            os.replace(built, binary)
    torch.ops.load_library(binary)
    _register_fakes(device)
    return binary


def _intact(binary):
    """Whether the file ends with the checksum of what is before it."""
    content = binary.read_bytes() if binary.exists() else b""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


# -- what there is to build, and to build it with


def _sources(device):
    """The files of csrc/, which is part of an installed package, and beside it in a clone."""
    folder = PACKAGE / "csrc"
    if not folder.exists():
        folder = PACKAGE.parent / "csrc"
    return [folder / name for name in (*SOURCES[device], *HEADERS)]


def _rules(device, sources):
    """What ninja reads: how files are compiled and linked, and which; RuntimeError if none can be.

    Its first line is what else the binary depends on: with the sources' text that is everything.
    """
    cxx = _words("CXX", _first_of("c++", "g++", "clang++"))
    compiler = shlex.split(cxx)[0]
    if not shutil.which(compiler):
        raise RuntimeError(f"there is no C++ compiler {compiler}")
    torch_home = shlex.quote(str(Path(torch.__file__).parent))
    march = shlex.quote(os.environ.get("MINICODE_MARCH") or "native")
    flags = f"{FLAGS} -march={march} -isystem {torch_home}/include"
    libraries = f"-L{torch_home}/lib -lc10 -ltorch_cpu"
    cpu = _output("grep -Em1 '^(flags|Features)' /proc/cpuinfo")
    versions = [torch.__version__, torch.version.cuda, sys.version, platform.machine(), cpu]
    versions.append(_output(f"{cxx} --version"))
    nvcc = ""
    if device == "cuda":
        nvcc, version, arch = _find_nvcc()
        versions.append(version)
        libraries += " -lc10_cuda -lcudart"
        # nvcc may be a script that calls another; its home may be /usr, whose headers come last.
        program = shlex.split(nvcc)[0]
        nvcc_home = Path(shutil.which(program) or program).resolve().parent.parent
        for home in (nvcc_home, _cuda_home()):
            flags += f" -idirafter {home}/include"
            libraries += f" -L{home}/lib64"
        host = os.environ.get("CUDAHOSTCXX")
        host = f" -ccbin {shlex.quote(host)}" if host else ""
        nvcc += f" {CUDA_FLAGS} -arch={arch}{host} {_words('CUDAFLAGS')}"
    commands = {
        "cpp": f"{cxx} {flags} {_words('CXXFLAGS')} -c $in -o $out",
        "cu": f"{nvcc} -c $in -o $out",
        "link": f"{cxx} -shared -fopenmp $in {libraries} {_words('LDFLAGS')} -o $out",
    }
    rules = f"# {' '.join(str(versions).split())}\n"
    for name, command in commands.items():
        rules += f"rule {name}\n command = {command}\n"
    objects = ""
    for path in sources:
        if path.suffix in (".cpp", ".cu"):
            rules += f"build {path.name}.o: {path.suffix[1:]} {path.name}\n"
            objects += f" {path.name}.o"
    return rules + f"build topk.so: link{objects}\n"


def _find_nvcc():
    """The command that is torch's CUDA's nvcc, what it says it is, and the GPU's architecture."""
    if not torch.version.cuda:
        raise RuntimeError("this torch is built without CUDA")
    nvcc = _words("CUDACXX", _first_of("nvcc", f"{_cuda_home()}/bin/nvcc"))
    version = _output(f"{nvcc} --version")
    major = torch.version.cuda.split(".")[0]
    if f"release {major}." not in version:
        raise RuntimeError(f"there is no nvcc of CUDA {major}, as torch's")
    major, minor = torch.cuda.get_device_capability()
    return nvcc, version, f"sm_{major}{minor}"


def _cuda_home():
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"


def _words(variable, default=""):
    """An environment variable, if it has any words: these, quoted for a shell; else the default."""
    return shlex.join(shlex.split(os.environ.get(variable, ""))) or default


def _first_of(*names):
    """The first of these programs that there is; the last, if there is none; quoted."""
    return shlex.quote(next(filter(shutil.which, names), names[-1]))


def _output(command):
    """What a command prints, or nothing if it fails."""
    how = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": 60}
    try:
        return subprocess.run(shlex.split(command), check=True, **how).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


# -- the build


def _build(folder, rules, sources):
    """Compiles in this folder; returns the binary. RuntimeError with the first error's line."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise RuntimeError("there is no ninja (pip install ninja)") from None
    for path in sources:
        shutil.copy(path, folder)
    (folder / "build.ninja").write_text(rules, encoding="utf-8")
    command = [f"{BIN_DIR}/ninja", "-C", folder]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if result.returncode:
        lines = (result.stdout + result.stderr).splitlines()
        # What ninja says itself, and the commands that it repeats, say nothing.
        said = [line for line in lines if not line.startswith(("FAILED", "[", "ninja"))]
        errors = [line for line in said if REAL_ERROR.search(line)] or lines[-1:]
        raise RuntimeError(f"the compiler failed: {errors[0]}")
    return folder / "topk.so"


def _register_fakes(device):
    """Tells torch.compile the shapes of what the operators return."""

    def topk(x, codes, k, *how):
        scores = x.new_empty(*x.shape[:2], k)
        return scores, scores.long()

    def topk_cuda(x, codes, scale, offset, k, coarse):
        return topk(x, codes, k)

    fakes = {"topk": topk, "pursuit": topk} if device == "cpu" else {"topk_cuda": topk_cuda}
    for name, fake in fakes.items():
        torch.library.register_fake(f"minicode_native::{name}", fake)


def main():
    """python -m minicode.topk"""
    parser = Parser("topk", "Says what the search uses here, and why; builds it if need be.")
    parser.parse_args()
    with parser.user_errors():
        serves_cpu, about_cpu = load("cpu")
        has_gpu = torch.cuda.is_available()
        serves_gpu, about_gpu = load("cuda") if has_gpu else (False, "there is no GPU")
    on_cpu = on_gpu = "PyTorch, in chunks"
    if serves_cpu:
        on_cpu = torch.ops.minicode_native.cpu_path()
    if serves_gpu:
        on_gpu = "CUDA for k up to 32, float32; large searches on bfloat16 tensor cores first"
    print(f"on a CPU:   {on_cpu}; {torch.get_num_threads()} threads ({about_cpu})")
    print(f"on a GPU:   {on_gpu} ({about_gpu})")
