"""The extension: its two ways of scoring agree, and whatever goes wrong with its build, the answer is right."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_topk import make, same_but_for_rounding

from minicode.runtime import extension
from minicode.topk import SIMILARITIES

ROOT = Path(__file__).parent.parent
SEARCH = """
import sys, torch
{before}
from minicode import topk_codes
from minicode.topk import definition
x, codes = torch.randn(1, 100, 8), torch.randn(1, 300, 8)
assert (topk_codes(x[0], codes[0], 3)[1] == definition(x, codes, 3, "cosine")[1][0]).all()
print("right")
"""
needs_compiler = pytest.mark.skipif(
    not shutil.which("c++") and not os.environ.get("CI"), reason="there is no C++ compiler here"
)


@needs_compiler
@pytest.mark.parametrize("kind", ["plain", "common", "near", "scales", "equal"])
def test_the_coarse_pass_gives_the_answer_of_float32_throughout(kind):
    """The codes scored in bfloat16 first, and those scored in float32 throughout: the same but for float32's rounding,
    and on whole numbers, where float32 rounds no product, the same to the last bit."""
    assert extension.load()[0]
    generator = torch.Generator().manual_seed(0)
    for n_rows, n_codes, dim, k in (
        (300, 700, 95, 1),
        (260, 1100, 64, 8),
        (256, 4096, 64, 100),
        (256, 8192, 8, 3),
        (300, 600, 768, 1),
    ):
        for similarity, name in enumerate(SIMILARITIES):
            x, codes = make(kind, 1 + (k == 1), n_rows, n_codes, dim, generator)
            same_but_for_rounding(
                x, codes, k, name, *torch.ops.minicode_native.topk(x, codes, k, similarity, True)
            )
            x, codes = (3 * x).round(), (3 * codes).clamp(-300, 300).round()
            coarse, plain = (
                torch.ops.minicode_native.topk(x, codes, k, similarity, how)
                for how in (True, False)
            )
            assert torch.equal(coarse[1], plain[1]) and torch.equal(coarse[0], plain[0])


@needs_compiler
@pytest.mark.parametrize("of_x, of_codes", [(1e10, 1e30), (1e-9, 1e-36)])
def test_the_coarse_pass_where_products_leave_the_range_of_float32(of_x, of_codes):
    """x·c is infinite, or all but 0, before it is divided by |c|; where it is infinity less infinity, it loses."""
    assert extension.load()[0]
    torch.manual_seed(0)
    for x, codes in (
        (torch.rand(1, 300, 64) + 0.5, torch.rand(1, 1200, 64) + 0.5),
        (torch.randn(1, 300, 64), torch.randn(1, 1200, 64)),
    ):
        coarse, plain = (
            torch.ops.minicode_native.topk(of_x * x, of_codes * codes, 3, 0, how)
            for how in (True, False)
        )
        assert torch.equal(coarse[1], plain[1]) and torch.equal(coarse[0], plain[0])


@needs_compiler
@pytest.mark.parametrize("value", [0, torch.nan, "the NaN of GPUs", torch.inf, 2.0**100])
def test_the_coarse_pass_and_what_is_not_finite_or_too_large(value):
    """Rows and a code that are not among those whose mean is subtracted, so that all other rows take the coarse pass."""
    assert extension.load()[0]
    torch.manual_seed(0)
    x, codes = torch.randn(1, 1024, 64).mul(3).round(), torch.randn(1, 2048, 64).mul(3).round()
    x[0, 1, 5], x[0, 3], x[0, 5], x[0, 7], x[0, 9] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        2.0**100,
        2.0**-100,
    )
    codes[0, 7, 2] = (
        torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        if isinstance(value, str)
        else value
    )
    for similarity in range(3):
        for k in (1, 5):
            coarse, plain = (
                torch.ops.minicode_native.topk(x, codes, k, similarity, how)
                for how in (True, False)
            )
            assert torch.equal(coarse[1], plain[1]) and torch.equal(coarse[0], plain[0])


@needs_compiler
def test_the_headers_of_cuda_may_lie_among_those_of_the_system(tmp_path, monkeypatch):
    """As Debian has them: nvcc in /usr/bin, cuda_runtime.h in /usr/include, which no compiler may be given first."""
    monkeypatch.setattr(Path, "exists", lambda path: True)
    (tmp_path / "some.cpp").write_text("#include <cstdlib>\n")
    with suppress(RuntimeError):  # there may be nothing of CUDA to link
        extension._build(tmp_path, "c++", ("/usr/bin/nvcc", "sm_80"), [tmp_path / "some.cpp"])
    assert os.path.exists(tmp_path / "some.cpp.o")


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    return tmp_path_factory.mktemp("objects")


@pytest.fixture
def compiler(objects, tmp_path):
    """A compiler that compiles a file once for all tests, and then hands out what it made."""
    script = tmp_path / "c++"
    script.write_text(f"""#!/bin/sh
last= source= out=
for word in "$@"; do
  [ "$last" = -c ] && source=$(basename "$word"); [ "$last" = -o ] && out=$word; last=$word
done
[ -n "$source" ] || exec {shutil.which("c++")} "$@"
[ -f {objects}/"$source" ] || {{ {shutil.which("c++")} "$@" && cp "$out" {objects}/"$source".$$ && mv {objects}/"$source".$$ {objects}/"$source"; exit; }}
cp {objects}/"$source" "$out"
""")
    script.chmod(0o755)
    return script


def environment(cache, **more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MINICODE")}
    return {
        **kept,
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **more,
    }


def search(cache, before="", **more):
    """A search in a process of its own; returns what it wrote on stderr. The answer must be right in any case."""
    command = [sys.executable, "-c", SEARCH.format(before=before)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment(cache, **more), cwd="/"
    )
    assert result.stdout == "right\n" and result.returncode == 0, result.stderr
    return result.stderr


def binaries(cache):
    return sorted((cache / "minicode").glob("*.so"))


def fallback(stderr, *words):
    """One line, which says why."""
    lines = [line for line in stderr.splitlines() if not line.startswith("minicode: compiling")]
    assert len(lines) == 1 and lines[0].startswith(
        "minicode: searching with PyTorch, without the C++ extension: "
    )
    assert all(word in lines[0] for word in words)


def test_no_compiler(tmp_path):
    (tmp_path / "bin").mkdir()
    fallback(
        search(tmp_path, PATH=str(tmp_path / "bin"), CXX="c++"), "there is no C++ compiler (c++)"
    )


def test_a_compiler_that_fails(tmp_path):
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho 'fatal error: this compiler is too old' >&2\nexit 1\n")
    script.chmod(0o755)
    fallback(search(tmp_path, CXX=str(script)), "broken failed", "this compiler is too old")
    assert not binaries(tmp_path) and not list((tmp_path / "minicode").iterdir())


@needs_compiler
def test_no_ninja(tmp_path):
    (tmp_path / "bin").mkdir()
    stderr = search(
        tmp_path, "sys.modules['ninja'] = None", PATH=str(tmp_path / "bin"), CXX=shutil.which("c++")
    )
    fallback(stderr, "there is no ninja (pip install ninja)")


@needs_compiler
def test_a_cache_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    fallback(search(tmp_path / "file"), "Not a directory")


@needs_compiler
def test_require_and_off_and_nonsense(tmp_path):
    command = [sys.executable, "-c", SEARCH.format(before="")]
    for more, words in (
        (
            {"MINICODE_EXT": "require", "CXX": "/nowhere"},
            "MINICODE_EXT=require, but the extension can't be used: there is no C++",
        ),
        ({"MINICODE_EXT": "yes"}, "MINICODE_EXT must be auto, off or require, not 'yes'"),
    ):
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment(tmp_path, **more), cwd="/"
        )
        assert result.returncode == 1 and words in result.stderr.splitlines()[-1]
        main = [sys.executable, "-m", "minicode.topk"]
        result = subprocess.run(
            main, capture_output=True, text=True, env=environment(tmp_path, **more), cwd=ROOT
        )
        assert (
            result.returncode == 2
            and words in result.stderr
            and len(result.stderr.splitlines()) == 1
        )
    result = subprocess.run(
        [*main, "--foo"], capture_output=True, text=True, env=environment(tmp_path), cwd=ROOT
    )
    assert (
        result.returncode == 2
        and "unrecognized arguments: --foo" in result.stderr
        and not result.stdout
    )
    assert search(tmp_path, MINICODE_EXT="off") == "" and not (tmp_path / "minicode").exists()


@needs_compiler
def test_built_once_corrupt_ones_again_and_another_torch_apart(tmp_path, compiler):
    assert search(tmp_path, CXX=str(compiler)).startswith("minicode: compiling the search, once")
    assert search(tmp_path, CXX=str(compiler)) == ""
    (binary,) = binaries(tmp_path)
    content = binary.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:5000] + b"x" + content[5001:]):
        binary.write_bytes(damaged)
        assert "compiling" in search(tmp_path, CXX=str(compiler))
        assert binaries(tmp_path) == [binary] and len(binary.read_bytes()) == len(content)
    assert "compiling" in search(tmp_path, "torch.__version__ = '2.99.0'", CXX=str(compiler))
    assert len(binaries(tmp_path)) == 2 and search(tmp_path, CXX=str(compiler)) == ""


@needs_compiler
def test_folders_with_spaces_in_their_names(tmp_path, compiler):
    shutil.copytree(ROOT / "minicode", tmp_path / "my code" / "minicode")
    shutil.copytree(ROOT / "csrc", tmp_path / "my code" / "csrc")
    stderr = search(tmp_path / "my cache", CXX=str(compiler), PYTHONPATH=str(tmp_path / "my code"))
    assert (
        "compiling" in stderr
        and "PyTorch" not in stderr
        and len(binaries(tmp_path / "my cache")) == 1
    )


@needs_compiler
def test_two_processes_build_at_once(tmp_path, compiler):
    command = [sys.executable, "-c", SEARCH.format(before="")]
    both = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(tmp_path, CXX=str(compiler)),
            cwd="/",
        )
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in both] == ["right\n"] * 2
    assert len(binaries(tmp_path)) == 1 and len(list((tmp_path / "minicode").iterdir())) == 1


@needs_compiler
def test_a_kill_in_the_middle_of_a_build(tmp_path, compiler):
    """The compiler tells through a pipe that it has begun, then waits for a pipe that nobody writes to."""
    begun, never = tmp_path / "begun", tmp_path / "never"
    os.mkfifo(begun)
    os.mkfifo(never)
    real = compiler.read_text()
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-c*) echo > {begun}; read x < {never};; *) exec {shutil.which("c++")} "$@";; esac\n'
    )
    command = [sys.executable, "-c", SEARCH.format(before="")]
    process = subprocess.Popen(
        command, env=environment(tmp_path, CXX=str(compiler)), cwd="/", start_new_session=True
    )
    begun.read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if shutil.which("pkill"):
        subprocess.run(
            ["pkill", "-KILL", "-f", str(tmp_path)]
        )  # ninja's children are in groups of their own, and wait for ever
    assert (
        not binaries(tmp_path) and len(list((tmp_path / "minicode").iterdir())) == 1
    )  # what the kill left
    compiler.write_text(real)
    assert (
        "compiling" in search(tmp_path, CXX=str(compiler))
        and search(tmp_path, CXX=str(compiler)) == ""
    )


@needs_compiler
def test_use_after_a_fork():
    code = """
import os, torch
from minicode import topk_codes
x, codes = torch.randn(200, 8), torch.randn(300, 8)
before = topk_codes(x, codes, 2)[1]
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(topk_codes(x, codes, 2)[1], before) else 1)
assert os.waitpid(child, 0)[1] == 0
print("right")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert result.stdout == "right\n", result.stderr


def test_command_tells_what_is_used():
    result = subprocess.run(
        [sys.executable, "-m", "minicode.topk"], capture_output=True, text=True, cwd=ROOT
    )
    assert (
        result.returncode == 0
        and "the C++ extension: " in result.stdout
        and "RuntimeWarning" not in result.stderr
    )
