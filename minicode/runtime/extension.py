"""Builds csrc/ against the torch that is installed, once, and loads it; else says why not.

The binary lies in a cache folder, under a name that holds everything it depends on, its own
checksum at its end. It is built in a private folder and moved there in one step: no lock, nothing
stale, nothing half written.

MINICODE_EXT=auto     (the default) any obstacle leads to PyTorch, with one line on stderr
MINICODE_EXT=require  any obstacle is an error
MINICODE_EXT=off      PyTorch
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from minicode.runtime.options import Parser

PACKAGE = Path(__file__).resolve().parent.parent
FLAGS = (
    "-O3 -std=c++20 -march=native -ffp-contract=fast -fno-math-errno -fopenmp -fPIC -w "
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
)
CUDA_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC"


@functools.cache
def load():
    """The device types that the extension serves, and what it is or why there is none.

    Builds it at the first call. ValueError where MINICODE_EXT requires it and it can't be used.
    """
    mode = os.environ.get("MINICODE_EXT", "auto")
    if mode not in ("auto", "off", "require"):
        raise ValueError(f"MINICODE_EXT must be auto, off or require, not {mode!r}")
    if mode == "off":
        return (), "MINICODE_EXT=off"
    try:
        cuda = _find_cuda()
        devices = ("cpu", "cuda") if cuda else ("cpu",)
        return devices, str(_load(cuda))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:300]
        if mode == "require":
            raise ValueError(
                f"MINICODE_EXT=require, but the extension can't be used: {reason}"
            ) from None
        _say(f"searching with PyTorch, without the C++ extension: {reason}")
        return (), reason


def _say(line):
    print(f"minicode: {line}", file=sys.stderr)


def _load(cuda):
    """Loads the binary, after building it if it is not there; returns its path."""
    compiler = _find_compiler()
    sources = _sources()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minicode"
    binary = cache / f"topk-{_key(compiler, cuda, sources)}.so"
    if not _intact(binary):
        cache.mkdir(parents=True, exist_ok=True)
        _say("compiling the search, once; it takes a quarter of a minute")
        with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as folder:
            built = _build(Path(folder), compiler, cuda, sources)
            content = built.read_bytes()
            # A loader ignores what follows the ELF file.
            built.write_bytes(content + hashlib.sha256(content).digest())
            os.replace(built, binary)
    torch.ops.load_library(binary)
    _register_fakes()
    return binary


def _intact(binary):
    """Whether the file ends with the checksum of what is before it."""
    content = binary.read_bytes() if binary.exists() else b""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


# -- what there is to build, and to build it with


def _find_cuda():
    """nvcc and the GPU's architecture; None without a GPU or, having said so, without an nvcc."""
    if not (torch.version.cuda and torch.cuda.is_available()):
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or f"{home}/bin/nvcc"
    major = torch.version.cuda.split(".")[0]
    if f"release {major}." not in _output(nvcc, "--version"):
        _say(f"searching with PyTorch on the GPU: there is no nvcc of CUDA {major}, as torch's")
        return None
    major, minor = torch.cuda.get_device_capability()
    return nvcc, f"sm_{major}{minor}"


def _find_compiler():
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(name):
            return shutil.which(name)
    raise RuntimeError(f"there is no C++ compiler ({', '.join(names)})")


def _sources():
    """The files of csrc/, which is part of an installed package, and beside it in a clone."""
    folder = PACKAGE / "csrc"
    if not folder.exists():
        folder = PACKAGE.parent / "csrc"
    return sorted(folder.glob("*.[ch]*"))


def _key(compiler, cuda, sources):
    """Stands for everything that the binary depends on: another of any, another key."""
    cpu = _output("grep", "-Em1", "^(flags|Features)", "/proc/cpuinfo")
    parts = [torch.__version__, torch.version.cuda, sys.version, platform.machine(), cpu]
    parts += [FLAGS, CUDA_FLAGS, _output(compiler, "--version"), cuda]
    if cuda:
        parts.append(_output(cuda[0], "--version"))
    parts += [path.read_text() for path in sources]
    text = "\0".join(map(str, parts))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _output(*command):
    """What a command prints, or nothing if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return ""
    return result.stdout if result.returncode == 0 else ""


# -- the build


def _build(folder, compiler, cuda, sources):
    """Compiles in this folder; returns the binary. RuntimeError with the first error's line."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise RuntimeError("there is no ninja (pip install ninja)") from None
    for path in sources:
        shutil.copy(path, folder)
    (folder / "build.ninja").write_text(_rules(compiler, cuda, sources))
    command = [f"{BIN_DIR}/ninja", "-C", folder]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stdout + result.stderr).splitlines()
        errors = [line for line in lines if "error" in line] or lines[-1:]
        raise RuntimeError(f"{compiler} failed: {' '.join(errors[:1])}")
    return folder / "topk.so"


def _rules(compiler, cuda, sources):
    """What ninja reads: how files are compiled and linked, and then which files."""
    compiler = shlex.quote(compiler)
    torch_home = shlex.quote(str(Path(torch.__file__).parent))
    flags = f"{FLAGS} -isystem {torch_home}/include"
    libraries = f"-L{torch_home}/lib -lc10 -ltorch_cpu"
    rules = ""
    if cuda:
        nvcc, arch = cuda
        flags += " -DMINICODE_CUDA"
        libraries += " -lc10_cuda -lcudart"
        # nvcc may be a script that calls another; its home may be /usr, whose headers come last.
        for home in (Path(nvcc).resolve().parent.parent, "/usr/local/cuda"):
            flags += f" -idirafter {home}/include"
            libraries += f" -L{home}/lib64"
        rules = f"rule cu\n command = {nvcc} {CUDA_FLAGS} -arch={arch} -c $in -o $out\n"
    rules += f"rule cpp\n command = {compiler} {flags} -c $in -o $out\n"
    rules += f"rule link\n command = {compiler} -shared -fopenmp $in {libraries} -o $out\n"
    objects = ""
    for path in sources:
        if path.suffix == ".cpp" or (path.suffix == ".cu" and cuda):
            rules += f"build {path.name}.o: {path.suffix[1:]} {path.name}\n"
            objects += f" {path.name}.o"
    return rules + f"build topk.so: link{objects}\n"


def _register_fakes():
    """Tells torch.compile the shapes of what the operators return."""

    def topk(x, codes, k, *how):
        scores = x.new_empty(*x.shape[:2], k)
        return scores, scores.long()

    def topk_cuda(x, codes, scale, offset, k, coarse):
        return topk(x, codes, k)

    def pursue(scores, offset, change, k):
        return topk(scores, change, k)

    torch.library.register_fake("minicode_native::topk", topk)
    torch.library.register_fake("minicode_native::pursue", pursue)
    torch.library.register_fake("minicode_native::topk_cuda", topk_cuda)


def main():
    """python -m minicode.topk"""
    parser = Parser("topk", "Says what the search uses here, and why; builds it if need be.")
    parser.parse_args()
    with parser.user_errors():
        devices, what = load()
    on_cpu = on_gpu = "PyTorch, in chunks"
    if devices:
        on_cpu = torch.ops.minicode_native.cpu_path()
    if "cuda" in devices:
        on_gpu = "CUDA for k up to 32, float32; large searches on bfloat16 tensor cores first"
    print(f"the C++ extension: {what if devices else f'none, {what}'}")
    print(f"on a CPU:   {on_cpu}; {torch.get_num_threads()} threads")
    print(f"on a GPU:   {on_gpu}")
