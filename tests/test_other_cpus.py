"""The search compiled for CPUs unlike this one, by tests/search_on_cpu.cpp, and its inner loops."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from minicode.runtime import extension

ROOT = Path(__file__).parent.parent
TILES = f"-march=native -mamx-tile -mamx-bf16 -include {ROOT}/tests/amx_on_cpu.h"
CPUS = {  # flags, what of this CPU they need, the compiler, what runs it, what it says of its path
    "AVX2": ("-march=haswell", "avx2 fma", "g++", [], "bytes (AVX2)"),
    "AVX-VNNI": ("-march=alderlake", "avx_vnni", "g++", [], "bytes (VNNI)"),
    "AMX": (TILES, "avx512_bf16", "g++", [], "bfloat16 tiles (AMX)"),
    "Arm": (
        "-march=armv8.2-a+dotprod -static",
        "",
        "aarch64-linux-gnu-g++",
        ["qemu-aarch64"],
        "bytes (dot products of Arm)",
    ),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(name): the program for one of CPUS; skips where it can't be made or run here."""
    folder = tmp_path_factory.mktemp("programs")
    has = ""
    if os.path.exists("/proc/cpuinfo"):
        has = Path("/proc/cpuinfo").read_text(encoding="utf-8")

    def compile(name):
        flags, needs, compiler, runner, _ = CPUS[name]
        for program in (compiler, *runner):
            if not shutil.which(program):
                pytest.skip(f"there is no {program}")
        for feature in needs.split():
            if feature not in has.split():
                pytest.skip(f"this CPU has no {feature}")
        program = folder / name
        if not program.exists():
            sources = [ROOT / "tests/search_on_cpu.cpp"]
            sources += [ROOT / "csrc" / file for file in ("topk_cpu.cpp", "topk_coarse.cpp")]
            command = [compiler, *extension.FLAGS.split(), "-O2", *flags.split()]
            subprocess.run([*command, f"-I{ROOT}/csrc", *sources, "-o", program], check=True)
        return program

    return compile


@pytest.mark.parametrize("name", CPUS)
def test_the_search_on_other_cpus(name, compiled):
    program = compiled(name)
    *_, runner, path = CPUS[name]
    result = subprocess.run([*runner, program], stdout=subprocess.PIPE, encoding="utf-8")
    assert result.stdout.startswith(path)
    assert result.returncode == 0


def inner_loops(binary):
    """The instructions of each loop of each tile of products, by objdump."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", binary]
    listing = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
    loops = []
    for function in listing.split("\n\n"):
        name, _, body = function.partition("\n")
        if "multiply_tile<" not in name:
            continue
        lines = re.findall(r"^\s+([0-9a-f]+):\s+(.+)$", body, re.MULTILINE)
        for address, instruction in lines:
            back = re.match(r"j\w+ +([0-9a-f]+) ", instruction)
            if back and int(back[1], 16) < int(address, 16):
                inside = range(int(back[1], 16), int(address, 16))
                loops.append([text for at, text in lines if int(at, 16) in inside])
    return loops


def needed_extension():
    served, binary = extension.load("cpu")
    if not served:
        pytest.skip(binary)
    return binary


@pytest.mark.parametrize("cpu", ["this", "AVX2"])
def test_sums_stay_in_registers(cpu, compiled):
    """No inner loop stores anything, or loads from the stack."""
    if not shutil.which("objdump") or platform.machine() != "x86_64":
        pytest.skip("there is no objdump, or it writes another CPU's instructions")
    binary = compiled(cpu) if cpu == "AVX2" else needed_extension()
    products = re.compile("fmadd|vpdp|vpmaddubsw|mulps")
    loops = [loop for loop in inner_loops(binary) if sum(map(bool, map(products.search, loop))) > 8]
    assert loops
    for loop in loops:
        for instruction in loop:
            assert "(%rsp" not in instruction and "(%rbp" not in instruction
            assert not re.match(r"v?mov\w+ +%[xyz]mm\d+,.*\(", instruction)
