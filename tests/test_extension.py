"""The extension: its ways of scoring agree, and whatever goes wrong with its build is said."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_topk import KINDS, make, same, same_but_for_rounding

from minicode import topk_codes
from minicode.runtime import extension
from minicode.runtime.arguments import SIMILARITIES

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    not shutil.which("c++") and not os.environ.get("CI"), reason="there is no C++ compiler here"
)


# -- the coarse pass, where the CPU has it


def search(x, codes, k, similarity, coarse):
    assert extension.load("cpu")[0]
    kind = SIMILARITIES.index(similarity)
    return torch.ops.minicode_native.topk(x, codes, k, kind, coarse)


@needs_compiler
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_coarse_pass_gives_the_answer_of_float32_throughout(kind, similarity):
    """The same but for float32's rounding; on whole numbers, which it does not round, to a bit."""
    generator = torch.Generator().manual_seed(0)
    for n_groups, n_rows, n_codes, dim, k in [
        (2, 300, 700, 95, 1),
        (1, 260, 1100, 64, 8),
        (1, 256, 4096, 64, 100),
        (1, 256, 8192, 8, 3),
        (2, 300, 600, 768, 1),
    ]:
        x, codes = make(kind, n_groups, n_rows, n_codes, dim, generator)
        found = search(x, codes, k, similarity, coarse=True)
        same_but_for_rounding(x, codes, k, similarity, *found)
        x = (3 * x).round()
        codes = (3 * codes).clamp(-300, 300).round()
        found = search(x, codes, k, similarity, coarse=True)
        assert same(found, search(x, codes, k, similarity, coarse=False))


@needs_compiler
@pytest.mark.parametrize("of_x, of_codes", [(1e10, 1e30), (1e-9, 1e-36)])
@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_the_coarse_pass_where_products_leave_the_range_of_float32(draw, of_x, of_codes):
    """x·c is infinite, or all but 0, before it is divided by |c|; infinity less infinity loses."""
    torch.manual_seed(0)
    x = draw(1, 300, 64)
    codes = draw(1, 1200, 64)
    if draw is torch.rand:
        x += 0.5
        codes += 0.5
    x *= of_x
    codes *= of_codes
    found = search(x, codes, 3, "cosine", coarse=True)
    assert same(found, search(x, codes, 3, "cosine", coarse=False))


NAN_OF_GPUS = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)


@needs_compiler
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("value", [0, torch.nan, NAN_OF_GPUS, torch.inf, 2.0**100])
def test_the_coarse_pass_and_what_is_not_finite_or_too_large(value, similarity):
    """Rows and a code that are not among those whose mean is subtracted.

    So all other rows take the coarse pass.
    """
    torch.manual_seed(0)
    x = torch.randn(1, 1024, 64).mul(3).round()
    codes = torch.randn(1, 2048, 64).mul(3).round()
    x[0, 1, 5] = torch.nan
    x[0, 3] = torch.inf
    x[0, 5] = -torch.inf
    x[0, 7] = 2.0**100
    x[0, 9] = 2.0**-100
    codes[0, 7, 2] = value
    for k in (1, 5):
        found = search(x, codes, k, similarity, coarse=True)
        assert same(found, search(x, codes, k, similarity, coarse=False))


# -- the build, in this process; what is built is not loaded


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    return tmp_path_factory.mktemp("objects")


@pytest.fixture
def compiler(objects, tmp_path):
    """A compiler that compiles a file once for all tests, and then hands out what it made.

    It doesn't optimise: what it makes is hardly run.
    """
    real = shutil.which("c++")
    script = tmp_path / "c++"
    script.write_text(
        f"""#!/bin/sh
last= source= out=
for word in "$@"; do
  [ "$last" = -c ] && source=$(basename "$word")
  [ "$last" = -o ] && out=$word
  last=$word
done
[ -n "$source" ] || exec {real} "$@"
made={objects}/$source
if [ ! -f "$made" ]; then
  {real} "$@" -O0 || exit 1
  cp "$out" "$made.$$" && mv "$made.$$" "$made"
fi
cp "$made" "$out"
""",
        encoding="utf-8",
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def load(tmp_path, monkeypatch, capfd):
    """load(device, **environment): whether it is served, and what was written on stderr.

    Nothing is loaded twice into a process: the binary that would be is kept in load.binaries.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MINICODE_EXT", "MINICODE_MARCH"):
        monkeypatch.delenv(name, raising=False)

    uncached = extension.load.__wrapped__

    def load(device="cpu", **more):
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops, "load_library", load.binaries.append)
            patch.setattr(extension, "_register_fakes", lambda device: None)
            for name, value in more.items():
                patch.setenv(name, str(value))
            capfd.readouterr()
            serves, _ = uncached(device)
            return serves, capfd.readouterr().err

    load.binaries = []
    return load


def assert_fallback(loaded, *words):
    """It is not served, and one line says why."""
    serves, stderr = loaded
    assert not serves
    lines = [line for line in stderr.splitlines() if not line.startswith("minicode: compiling")]
    assert len(lines) == 1
    assert lines[0].startswith("minicode: searching with PyTorch, without the C++ extension: ")
    for word in words:
        assert word in lines[0]


def test_no_compiler(load, tmp_path):
    loaded = load(PATH=tmp_path / "nothing", CXX="c++")
    assert_fallback(loaded, "there is no C++ compiler c++")


def test_a_compiler_that_fails(load, tmp_path):
    script = tmp_path / "broken"
    script.write_text(
        "#!/bin/sh\necho 'fatal error: this compiler is too old' >&2\nexit 1\n", encoding="utf-8"
    )
    script.chmod(0o755)
    assert_fallback(load(CXX=script), "the compiler failed", "this compiler is too old")
    assert not list((tmp_path / "minicode").iterdir())


def test_a_compiler_that_fails_and_says_nothing(load, tmp_path):
    script = tmp_path / "silent"
    script.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    assert_fallback(load(CXX=script), "the compiler failed: ninja: build stopped")


@needs_compiler
def test_a_cpu_that_the_compiler_does_not_know(load):
    assert_fallback(load(MINICODE_MARCH="no-such-cpu"), "no-such-cpu")


@needs_compiler
def test_linking_that_fails_says_what_is_missing(load, compiler, tmp_path):
    script = tmp_path / "linker"
    script.write_text(
        f"""#!/bin/sh
case "$*" in *-shared*)
  echo "x.o: in function f: undefined reference to 'topk_gone'" >&2
  echo "collect2: error: ld returned 1 exit status" >&2
  exit 1
esac
exec {compiler} "$@"
""",
        encoding="utf-8",
    )
    script.chmod(0o755)
    assert_fallback(load(CXX=script), "undefined reference to 'topk_gone'")


@needs_compiler
def test_compilers_are_named_and_wrapped_as_for_other_build_tools(load, compiler, tmp_path):
    wrapper = tmp_path / "ccache"
    log = tmp_path / "log"
    wrapper.write_text(f"""#!/bin/sh\necho "$*" >> {log}\nexec "$@"\n""", encoding="utf-8")
    wrapper.chmod(0o755)
    flags = {"CXXFLAGS": "-DMINE='a b'", "LDFLAGS": "-Wl,--as-needed"}
    serves, _ = load(CXX=f"{wrapper} {compiler} -DOWN", **flags)
    assert serves
    commands = [line for line in log.read_text(encoding="utf-8").splitlines() if " -o " in line]
    assert all(f"{compiler} -DOWN " in command for command in commands)
    compiled = [command for command in commands if " -c " in command]
    assert len(compiled) == len(extension.SOURCES["cpu"])
    assert all("-DMINE=a b" in command for command in compiled)
    (linked,) = [command for command in commands if " -shared " in command]
    assert "-Wl,--as-needed" in linked

    load(CXX=f"{wrapper} {compiler} -DOWN")
    assert load.binaries[0] != load.binaries[1]


@needs_compiler
def test_the_cpu_asks_for_no_gpu_and_does_not_need_its_compiler(
    load, compiler, tmp_path, monkeypatch
):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        """#!/bin/sh
case "$1" in --version) echo "release 13.0,"; exit;; esac
echo "topk_cuda.cu(1): error: no such architecture" >&2
exit 1
""",
        encoding="utf-8",
    )
    nvcc.chmod(0o755)
    asked = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append(1) or True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: asked.append(1) or (9, 0))
    assert load("cpu", CXX=compiler, CUDACXX=nvcc)[0]
    assert not asked

    serves, stderr = load("cuda", CXX=compiler, CUDACXX=nvcc)
    assert not serves
    assert asked
    last = stderr.splitlines()[-1]
    assert last.startswith("minicode: searching with PyTorch on the GPU, without the C++ extension")
    assert "error: no such architecture" in last


def test_a_device_that_there_are_no_kernels_for(load):
    assert load("mps") == (False, "")


def test_every_source_is_named():
    named = {*extension.SOURCES["cpu"], *extension.SOURCES["cuda"], *extension.HEADERS}
    assert named | {"README.md"} == {path.name for path in (ROOT / "csrc").iterdir()}


@needs_compiler
def test_no_ninja(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert_fallback(load(), "there is no ninja (pip install ninja)")


@needs_compiler
def test_a_cache_folder_that_can_not_be_written(load, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert_fallback(load(XDG_CACHE_HOME=tmp_path / "file"), "Not a directory")


def test_off(load, tmp_path):
    assert load(MINICODE_EXT="off") == (False, "")
    assert not (tmp_path / "minicode").exists()


REFUSED = {
    "require": "MINICODE_EXT=require, but the extension can't be used: there is no C++ compiler",
    "yes": "MINICODE_EXT must be auto, off or require, not 'yes'",
}


@pytest.mark.parametrize("mode", REFUSED)
def test_require_without_a_compiler_and_nonsense_are_errors(load, mode, monkeypatch, capfd):
    with pytest.raises(ValueError) as error:
        load(MINICODE_EXT=mode, CXX="/nowhere")
    assert str(error.value).startswith(REFUSED[mode])

    monkeypatch.setattr(
        extension, "load", lambda device: load(device, MINICODE_EXT=mode, CXX="/nowhere")
    )
    monkeypatch.setattr(sys, "argv", ["topk"])
    with pytest.raises(SystemExit) as end:
        extension.main()
    assert end.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"python -m minicode.topk: error: {REFUSED[mode]}")


@needs_compiler
def test_built_once_corrupt_ones_again_and_another_torch_apart(
    load, compiler, tmp_path, monkeypatch
):
    serves, stderr = load(CXX=compiler)
    assert serves
    assert stderr == "minicode: compiling the search, once; it takes a quarter of a minute\n"
    assert load(CXX=compiler) == (True, "")
    binary, again = load.binaries
    assert again == binary
    content = binary.read_bytes()
    half = content[: len(content) // 2]
    one_byte_wrong = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    for damaged in (b"", half, one_byte_wrong):
        binary.write_bytes(damaged)
        _, stderr = load(CXX=compiler)
        assert "compiling" in stderr
        assert load.binaries[-1] == binary
        assert len(binary.read_bytes()) == len(content)

    load(CXX=compiler, MINICODE_MARCH="x86-64")
    assert load.binaries[-1] != binary

    monkeypatch.setattr(torch, "__version__", "2.99.0")
    _, stderr = load(CXX=compiler)
    assert "compiling" in stderr
    assert load.binaries[-1] != binary
    assert load(CXX=compiler) == (True, "")
    assert len(list((tmp_path / "minicode").iterdir())) == 3


@needs_compiler
def test_the_headers_of_cuda_may_lie_among_those_of_the_system(tmp_path, monkeypatch):
    """As Debian has them: in /usr/include, which no compiler may be given first."""
    monkeypatch.setattr(extension, "_find_nvcc", lambda: ("/usr/bin/nvcc", "13.0", "sm_80"))
    source = tmp_path / "sources" / "some.cpp"
    source.parent.mkdir()
    source.write_text("#include <cstdlib>\n", encoding="utf-8")
    with suppress(RuntimeError):  # there may be nothing of CUDA to link
        extension._build(tmp_path, extension._rules("cuda", [source]), [source])
    assert "-idirafter /usr/include " in (tmp_path / "build.ninja").read_text(encoding="utf-8")
    assert (tmp_path / "some.cpp.o").exists()


# -- in processes of their own

SEARCH = """
import torch
from minicode import topk_codes
from minicode.topk import definition
x, codes = torch.randn(1, 100, 8), torch.randn(1, 300, 8)
assert (topk_codes(x[0], codes[0], 3)[1] == definition(x, codes, 3, "cosine")[1][0]).all()
print("right")
"""


def start(code, cache=None, path=ROOT, **more):
    """Runs Python code in a process whose standard output is read."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path), **more}
    environment.pop("MINICODE_EXT", None)
    if cache:
        environment["XDG_CACHE_HOME"] = str(cache)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
        cwd="/",
        start_new_session=True,
    )


@needs_compiler
def test_two_processes_build_at_once_in_folders_with_spaces_in_their_names(tmp_path, compiler):
    code = tmp_path / "my code"
    cache = tmp_path / "my cache"
    for folder in ("minicode", "csrc"):
        shutil.copytree(ROOT / folder, code / folder)
    (code / "csrc" / "left_from_an_old_build.cpp").write_text("not C++", encoding="utf-8")
    both = [start(SEARCH, cache, code, CXX=str(compiler)) for _ in range(2)]
    for process in both:
        stdout, stderr = process.communicate()
        assert stdout == "right\n", stderr
        assert "PyTorch" not in stderr
    (binary,) = (cache / "minicode").iterdir()
    assert binary.suffix == ".so"


@needs_compiler
def test_a_kill_in_the_middle_of_a_build(load, compiler, tmp_path):
    """The compiler tells through a pipe that it has begun, then waits for another to be closed."""
    begun = tmp_path / "begun"
    end = tmp_path / "end"
    os.mkfifo(begun)
    os.mkfifo(end)
    held_open = os.open(end, os.O_RDWR)
    waits = tmp_path / "waits"
    waits.write_text(
        f"""#!/bin/sh
case "$*" in
  *-c*) mkdir {tmp_path}/first || exit 1; exec 3< {end}; echo > {begun}; read x <&3;;
  *) exec {shutil.which("c++")} "$@";;
esac
""",
        encoding="utf-8",
    )
    waits.chmod(0o755)
    code = "from minicode.runtime import extension; extension.load('cpu')"
    process = start(code, tmp_path, CXX=str(waits))
    begun.read_text(encoding="utf-8")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    os.close(held_open)
    left = list((tmp_path / "minicode").iterdir())
    assert len(left) == 1
    assert left[0].name.startswith("build-")

    _, stderr = load(CXX=compiler)
    assert "compiling" in stderr
    assert load(CXX=compiler) == (True, "")


@needs_compiler
def test_use_after_a_fork():
    x = torch.randn(200, 8)
    codes = torch.randn(300, 8)
    before = topk_codes(x, codes, 2)[1]
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # ends it where it hangs
        same_ids = False
        try:
            same_ids = torch.equal(topk_codes(x, codes, 2)[1], before)
        finally:
            os._exit(0 if same_ids else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_command_tells_what_is_used():
    command = [sys.executable, "-m", "minicode.topk"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
    assert result.returncode == 0
    assert "on a CPU: " in result.stdout
    assert "RuntimeWarning" not in result.stderr


def test_command_and_a_flag_that_there_is_not(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["topk", "--foo"])
    with pytest.raises(SystemExit) as end:
        extension.main()
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "python -m minicode.topk: error: unrecognized arguments: --foo\n"
