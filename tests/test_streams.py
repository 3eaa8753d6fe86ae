"""Streams and signals: what a command does when its output breaks, or is told to stop."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from test_train import SHORT

from minicode import Codebook
from minicode.train_fsm import main as train_fsm
from minicode.train_text import main as train_text

ROOT = Path(__file__).parent.parent
LETTERS = "é → ж"  # one of latin-1, and two beyond it
SIZE = (
    "--n-layer 1 --n-embd 8 --n-head 2 --block-size 16 --n-codes-head 8 --k 1 --batch-size 4 "
    "--steps 4 --eval-every 4 --device cpu"
)


def command(name, *flags):
    return [sys.executable, "-m", f"minicode.{name}", *map(str, flags)]


def run(arguments, **how):
    """Runs a command to its end, away from a terminal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= how.pop("more", {})
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", **how}
    return subprocess.run(arguments, env=environment, timeout=300, **how)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A run on a text whose letters few terminals have."""
    folder = tmp_path_factory.mktemp("runs")
    documents = [f"Caf{LETTERS} {number}." for number in range(100)]
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    flags = ["--out", folder / "run", "--data", folder / "text.txt", *SIZE.split()]
    assert train_text([str(flag) for flag in flags]) == 0
    return folder / "run"


# -- output that breaks

SHORT_COMMANDS = [
    ("sample", "--help"),
    ("sample", "--json"),
    ("interpret", "--code", "mlp.1.3"),
]


# Forks a process for each: they share the import of torch, and begin and end as commands do.
FORKS = """
import ast, os, runpy, sys
from minicode import control
from minicode.runtime import streams
folder, commands, outputs = sys.argv[1], *map(ast.literal_eval, sys.argv[2:])
for number, (name, *flags) in enumerate(commands):
    for stdout in outputs:
        child = os.fork()
        if child == 0:
            os.dup2(stdout, 1)
            os.dup2(os.open(f"{folder}/{stdout}-{number}", os.O_WRONLY | os.O_CREAT), 2)
            streams.begin()
            sys.argv = [name, *flags]
            runpy.run_module(f"minicode.{name}", run_name="__main__")
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"{stdout}-{number}", status, flush=True)
"""


@pytest.fixture(scope="module")
def endings(tiny_run, tmp_path_factory):
    """How the short commands end: {where they write to: [(exit status, stderr)]}."""
    folder = tmp_path_factory.mktemp("stderr")
    reader, writer = os.pipe()
    os.close(reader)
    outputs = {"a closed pipe": writer}
    if os.path.exists("/dev/full"):
        outputs["a full disk"] = os.open("/dev/full", os.O_WRONLY)
    descriptors = list(outputs.values())
    commands = [[*arguments, "--run", str(tiny_run)] for arguments in SHORT_COMMANDS]
    script = [sys.executable, "-c", FORKS, str(folder), repr(commands), repr(descriptors)]
    result = run(script, pass_fds=descriptors)
    assert result.returncode == 0, result.stderr
    ended = {name: [] for name in outputs}
    for line in result.stdout.splitlines():
        file, status = line.split()
        stderr = (folder / file).read_text(encoding="utf-8")
        for name, descriptor in outputs.items():
            if file.startswith(f"{descriptor}-"):
                ended[name].append((int(status), stderr))
    for descriptor in descriptors:
        os.close(descriptor)
    return ended


def test_a_short_command_ends_quietly_where_nobody_reads_on(endings):
    """As in `| head -1`, whose end of the pipe is closed."""
    assert len(endings["a closed pipe"]) == len(SHORT_COMMANDS)
    for status, stderr in endings["a closed pipe"]:
        assert status == -signal.SIGPIPE
        assert "Traceback" not in stderr
        assert "Broken pipe" not in stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_one_line(endings):
    assert len(endings["a full disk"]) == len(SHORT_COMMANDS)
    for status, stderr in endings["a full disk"]:
        assert status == 1
        assert stderr.splitlines()[-1] == "minicode: [Errno 28] No space left on device"
        assert "Traceback" not in stderr


@pytest.mark.parametrize("broken", ["2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1", "| true"])
def test_training_goes_on_without_its_output(broken, tmp_path):
    folder = tmp_path / "run"
    arguments = command("train_fsm", "--out", folder, *TINY, *SHORT)
    script = f'set -o pipefail; "$@" {broken}'
    result = run(["bash", "-c", script, "bash", *arguments])
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert (folder / "summary.json").exists()
    for path in folder.iterdir():  # none of them was taken for a stream that is closed
        assert b"transition accuracy" not in path.read_bytes()


def test_training_outlives_its_terminal(tmp_path):
    """The terminal goes after the first evaluation: SIGHUP, and then errors at every write."""
    folder = tmp_path / "run"
    arguments = command("train_fsm", "--out", folder, *TINY)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        os.execv(sys.executable, arguments)
    seen = b""
    while b"step    30 " not in seen:
        seen += os.read(terminal, 1024)
    assert not (folder / "summary.json").exists()
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (folder / "summary.json").exists()


# -- letters


@pytest.mark.parametrize("encoding, shown", [("latin-1", "é \\u2192"), ("ascii", "\\xe9 \\u2192")])
def test_letters_that_a_terminal_lacks_are_written_as_numbers(encoding, shown, text_run):
    commands = f"""
from minicode.runtime import streams
streams.begin()
from minicode import interpret, sample
sample.main(["--run", {str(text_run)!r}, "--prompt", {"Caf" + LETTERS!r}])
interpret.main(["--run", {str(text_run)!r}, "--search", "é"])
"""
    script = [sys.executable, "-c", commands]
    result = run(script, more={"PYTHONIOENCODING": encoding}, encoding=encoding)
    assert result.returncode == 0, result.stderr
    assert f"Caf{shown} \\u0436" in result.stdout
    assert "held-out tokens" in result.stdout


def test_no_file_is_read_in_the_encoding_of_the_locale(text_run):
    flags = ["--run", str(text_run)]
    out = ["--out", str(text_run.with_name("again")), *SIZE.split()]
    commands = f"""
from minicode import interpret, sample, train_text
sample.main({flags})
interpret.main({flags})
train_text.main({out})
"""
    strict = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning"]
    result = run([*strict, "-c", commands])
    assert result.returncode == 0, result.stderr


# -- signals


def test_ctrl_c_is_one_line_even_where_an_import_swallows_it(tmp_path):
    swallows = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    pass
"""
    (tmp_path / "torch.py").write_text(swallows, encoding="utf-8")
    more = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for name in ("sample", "interpret", "train_fsm"):
        result = run(command(name), more=more)
        assert result.returncode == -signal.SIGINT
        assert (result.stdout, result.stderr) == ("", "stopped\n")


@pytest.mark.parametrize("work, k", [("_move_to_means", 1), ("_fit", 2)])
def test_a_signal_is_heard_within_a_round_of_the_codebooks_start(work, k, tmp_path, monkeypatch):
    """Each round is searched in several parts here, as it is where there are many codes."""
    real = Codebook._parts
    at_work = getattr(Codebook, work)
    rounds = []
    parts = []

    def in_parts(self, a):
        for small in a.split(len(a) // 4):
            for part in real(self, small):
                parts.append(len(rounds))
                if parts[-2:] == [3, 3]:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield part

    def counted(self, *arguments):
        rounds.append(self.name)
        return at_work(self, *arguments)

    flags = ["--out", str(tmp_path / "run"), *TINY, "--k", str(k)]
    with monkeypatch.context() as patch:
        patch.setattr(Codebook, "_parts", in_parts)
        patch.setattr(Codebook, work, counted)
        assert train_fsm(flags) == 130
    assert rounds == ["head.0"] * 3  # of ten
    assert parts.count(3) == 2  # of four
    assert train_fsm([*flags, "--resume"]) == 0


def test_a_signal_while_dead_codes_are_revived_stops_after_the_step(tmp_path, monkeypatch):
    real = Codebook._seeds
    revived = []

    def interrupted(self, a, n, generator, *more, **how):
        revived.extend(more)
        if len(revived) == 1:  # there are none at their start
            revived.append(None)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, a, n, generator, *more, **how)

    monkeypatch.setattr(Codebook, "_seeds", interrupted)
    flags = ["--out", str(tmp_path / "run"), *TINY, "--n-codes", "400"]
    assert train_fsm(flags) == 130
    assert (tmp_path / "run" / "train_state.pt").exists()


DEAF = """
import ctypes, sys
from minicode import train
from minicode.train_fsm import main

def deaf(*_):
    print("deaf", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # waits for itself, and for no signal
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

train.train_step = deaf
main(sys.argv[1:])
"""


def test_a_second_signal_ends_a_training_at_once_whatever_it_is_in(tmp_path):
    arguments = [sys.executable, "-c", DEAF, "--out", str(tmp_path / "run"), *TINY]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as process:
        while process.stdout.readline() != b"deaf\n":
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=100) == 130
