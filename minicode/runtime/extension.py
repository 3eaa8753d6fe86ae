"""Builds csrc/ against the torch that is installed, once, and loads it; says in one line why it could not.

The binary lies in a cache folder, under a name that holds everything it depends on, its own checksum at its end.
It is built in a private folder and moved there in one step: no lock, nothing stale, nothing half written.

MINICODE_EXT=auto (default): any obstacle leads to PyTorch, with one line on stderr; require: it is an error; off: PyTorch.
"""

import argparse
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

HERE = Path(__file__).resolve().parent.parent
ABI = int(torch._C._GLIBCXX_USE_CXX11_ABI)
FLAGS = "-O3 -std=c++20 -march=native -ffp-contract=fast -fno-math-errno -fopenmp -fPIC -w"


@functools.cache
def load():
    """The device types that the extension serves, and what it is or why there is none. Builds it at the first call."""
    mode = os.environ.get("MINICODE_EXT", "auto")
    if mode not in ("auto", "off", "require"):
        raise ValueError(f"MINICODE_EXT must be auto, off or require, not {mode!r}")
    if mode == "off":
        return (), "MINICODE_EXT=off"
    try:
        cuda, why_no_cuda = _find_cuda()
        if why_no_cuda:
            print(f"minicode: searching with PyTorch on the GPU: {why_no_cuda}", file=sys.stderr)
        binary = _load(cuda)
        return ("cpu", "cuda") if cuda else ("cpu",), str(binary)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:300]
        if mode == "require":
            raise ValueError(
                f"MINICODE_EXT=require, but the extension can't be used: {reason}"
            ) from None
        print(
            f"minicode: searching with PyTorch, without the C++ extension: {reason}",
            file=sys.stderr,
        )
        return (), reason


def _find_cuda():
    """(nvcc and the GPU's architecture, None), or (None, why not), or (None, None) where there is no GPU."""
    if not (torch.version.cuda and torch.cuda.is_available()):
        return None, None
    nvcc = shutil.which("nvcc") or shutil.which(
        os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc"
    )
    version = nvcc and re.search(r"release (\d+)", _output(nvcc, "--version"))
    if not version or version[1] != torch.version.cuda.split(".")[0]:
        found = f"nvcc is of CUDA {version[1]}" if version else "there is no nvcc"
        return None, f"{found}, torch of CUDA {torch.version.cuda}"
    return (nvcc, "sm_{}{}".format(*torch.cuda.get_device_capability())), None


def _load(cuda):
    """Loads the binary, after building it if it is not there; returns its path."""
    sources = HERE / "csrc" if (HERE / "csrc").exists() else HERE.parent / "csrc"
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if not compiler:
        raise RuntimeError(f"there is no C++ compiler ({', '.join(names)})")
    files = sorted(
        path
        for path in sources.iterdir()
        if path.suffix in (".cpp", ".h") or (cuda and path.suffix in (".cu", ".cuh"))
    )
    cpu = _output(compiler, "-march=native", "-Q", "--help=target") or _output(
        "grep", "-m1", "^flags", "/proc/cpuinfo"
    )
    parts = [
        torch.__version__,
        torch.version.cuda,
        sys.version,
        platform.machine(),
        cpu,
        FLAGS,
        ABI,
    ]
    parts += [cuda, cuda and _output(cuda[0], "--version"), _output(compiler, "--version")]
    parts += [path.read_text() for path in files]
    key = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minicode"
    binary = cache / f"topk-{key}.so"
    if not _intact(binary):
        cache.mkdir(parents=True, exist_ok=True)
        print(
            "minicode: compiling the search, once; it takes a quarter of a minute", file=sys.stderr
        )
        with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as folder:
            for path in files:
                shutil.copy(path, folder)
            built = _build(
                Path(folder),
                compiler,
                cuda,
                [path for path in files if path.suffix in (".cpp", ".cu")],
            )
            content = built.read_bytes()
            built.write_bytes(
                content + hashlib.sha256(content).digest()
            )  # a loader ignores what follows the ELF file
            os.replace(built, binary)
    torch.ops.load_library(binary)
    _register_fakes()
    return binary


def _intact(binary):
    content = binary.read_bytes() if binary.exists() else b""
    return len(content) > 32 and hashlib.sha256(content[:-32]).digest() == content[-32:]


def _output(*command):
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return ""
    return result.stdout if result.returncode == 0 else ""


def _build(folder, compiler, cuda, files):
    """Compiles with ninja, in a folder of its own; returns the binary."""
    try:
        import ninja

        program = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        program = shutil.which("ninja")
    if not program:
        raise RuntimeError("there is no ninja (pip install ninja)")
    root, compiler = Path(torch.__file__).parent, shlex.quote(compiler)
    flags = f"{FLAGS} -D_GLIBCXX_USE_CXX11_ABI={ABI} -isystem {shlex.quote(f'{root}/include')}"
    libraries = f"-L{shlex.quote(f'{root}/lib')} -lc10 -ltorch_cpu"
    rules = []
    if cuda:
        homes = (
            Path(cuda[0]).resolve().parent.parent,
            Path("/usr/local/cuda"),
        )  # nvcc may be a script that calls nvcc
        home = next(
            (home for home in homes if (home / "include" / "cuda_runtime.h").exists()), homes[0]
        )
        flags += f" -DMINICODE_CUDA -idirafter {home}/include"  # it may be /usr/include, whose place is last
        libraries += f" -lc10_cuda -L{home}/lib64 -lcudart"
        rules = [
            f"rule cuda\n command = {cuda[0]} -O3 -std=c++17 -arch={cuda[1]} -Xcompiler -fPIC -c $in -o $out"
        ]
    objects = [f"{path.name}.o" for path in files]
    rules += [
        f"rule cpp\n command = {compiler} {flags} -c $in -o $out",
        f"rule link\n command = {compiler} -shared -fopenmp $in {libraries} -o $out",
        *(
            f"build {name}: {'cuda' if path.suffix == '.cu' else 'cpp'} {path.name}"
            for name, path in zip(objects, files)
        ),
        f"build topk.so: link {' '.join(objects)}\n",
    ]
    (folder / "build.ninja").write_text("\n".join(rules))
    result = subprocess.run([program, "-C", str(folder)], capture_output=True, text=True)
    if result.returncode:
        lines = (result.stdout + result.stderr).splitlines() or ["no output"]
        raise RuntimeError(
            f"{compiler} failed: {next((line for line in lines if 'error' in line), lines[-1])}"
        )
    return folder / "topk.so"


def _register_fakes():
    def empty(x, k):
        return x.new_empty(*x.shape[:2], k), x.new_empty(*x.shape[:2], k, dtype=torch.int64)

    torch.library.register_fake(
        "minicode_native::topk", lambda x, codes, k, similarity, coarse: empty(x, k)
    )
    torch.library.register_fake(
        "minicode_native::topk_cuda", lambda x, codes, scale, offset, k, coarse: empty(x, k)
    )


def main():
    """python -m minicode.topk: says what the search uses here, and why."""
    parser = argparse.ArgumentParser(
        prog="python -m minicode.topk", description=main.__doc__.split(": ")[1]
    )
    parser.parse_args()
    try:
        devices, what = load()
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"the C++ extension: {what if devices else 'none, ' + what}")
    print(
        f"on a CPU:   {torch.ops.minicode_native.cpu_path() if devices else 'PyTorch, in chunks'}; {torch.get_num_threads()} threads"
    )
    gpu = "CUDA for k up to 32, float32; large searches on bfloat16 tensor cores first"
    print(f"on a GPU:   {gpu if 'cuda' in devices else 'PyTorch, in chunks'}")
