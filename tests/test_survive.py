"""Runs that survive: kills, full disks, several processes, and files from strangers."""

import builtins
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import RUN_FILES, TINY, read_metrics
from test_train import refusal

from minicode import Codebook, load_run
from minicode import train as training
from minicode.runtime import files
from minicode.runtime.session import open_session
from minicode.train_fsm import main as train_fsm

ROOT = Path(__file__).parent.parent
SMALLER = (
    "--codebooks mlp --n-layer 1 --n-embd 8 --n-codes 8 --batch-size 32 --block-size 6 "
    "--steps 12 --eval-every 4 --checkpoint-every 3 --revive-every 2 --revive-after 0"
)
SMALL = [*TINY, *SMALLER.split()]


def weights(folder, name="model.pt"):
    return torch.load(folder / name, weights_only=True)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one, other):
    """Equal but for rounding. The bias of the keys changes nothing, and so drifts."""
    assert one.keys() == other.keys()
    for name in one:
        skip = slice(16, 32) if name.endswith("c_attn.bias") else slice(0)
        for state in (one, other):
            state[name].view(-1)[skip] = 0
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def in_child(function, log):
    """Calls a function in a process of its own, forked from this one; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 99
        with open(log, "w", buffering=1, encoding="utf-8") as file:
            sys.stdout = file
            sys.stderr = file
            try:
                status = function()
            except SystemExit as error:
                status = error.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- kills and full disks


@pytest.fixture(scope="module", autouse=True)
def few_sequences(tiny_run):
    """Evaluations on so few that they take no time; but not those of the run of all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "n_evaluated", lambda data, at_the_end: 32)
        yield


@pytest.fixture(scope="module")
def small_run(few_sequences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert train_fsm(["--out", str(folder), *SMALL]) == 0
    return folder


def killed(folder, what, nth):
    """Trains, and dies by SIGKILL when `what` happens for the nth time."""
    count = itertools.count()
    step = training.train_step
    nearest = Codebook._nearest
    replace = os.replace

    def happens(event):
        if event == what and next(count) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_step(model, forward, optimizer, config, n, data):
        happens("a dense step" if n < config.dense_steps else "a step with codebooks")
        return step(model, forward, optimizer, config, n, data)

    def dying_nearest(*arguments):
        happens("k-means")
        return nearest(*arguments)

    def dying_replace(temporary, path):
        happens(f"before {path.name} is replaced")
        replace(temporary, path)
        happens(f"after {path.name} is replaced")

    class Half(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            happens(f"half of {Path(self.name).stem}")
            return super().write(content[len(content) // 2 :])

    def half_open(path, mode):
        return (Half if Path(path).suffix == ".tmp" else builtins.open)(path, mode)

    training.train_step = dying_step
    Codebook._nearest = dying_nearest
    os.replace = dying_replace
    files.open = half_open
    return train_fsm(["--out", str(folder), *SMALL])


# What happens in a small run, and how often at least after its first time.
MOMENTS = {"a dense step": 5, "k-means": 8, "a step with codebooks": 5}
WRITES = {
    "config.json": 0,
    "fsm.json": 0,
    "metrics.jsonl": 5,
    "model.pt": 5,
    "train_state.pt": 5,
    "dense.pt": 0,
    "summary.json": 0,
}
for name, times in WRITES.items():
    for moment in ("half of {}", "before {} is replaced", "after {} is replaced"):
        MOMENTS[moment.format(name)] = times


def test_killed_at_any_moment_a_run_resumes_and_ends_as_the_unbroken_one(small_run, tmp_path):
    assert len(MOMENTS) >= 20
    rng = random.Random(0)
    metrics = (small_run / "metrics.jsonl").read_bytes()
    for i, (what, times) in enumerate(MOMENTS.items()):
        folder = tmp_path / str(i)
        nth = rng.randint(0, times)
        status = in_child(lambda f=folder, w=what, n=nth: killed(f, w, n), tmp_path / "log")
        assert status == -signal.SIGKILL, (what, nth)
        resume = ["--resume"] if (folder / "config.json").exists() else []
        assert train_fsm(["--out", str(folder), *SMALL, *resume]) == 0, (what, nth)
        assert same(weights(folder), weights(small_run)), (what, nth)
        assert (folder / "metrics.jsonl").read_bytes() == metrics, (what, nth)
        assert sorted(path.name for path in folder.iterdir()) == RUN_FILES, (what, nth)


def test_a_full_disk_stops_the_run_with_one_line_and_leaves_the_checkpoint(small_run, tmp_path):
    """The checkpoint grows by the moments of the codes; the room is for those before."""
    folder = tmp_path / "run"
    room = (small_run / "train_state.pt").stat().st_size - 1

    def train():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        return train_fsm(["--out", str(folder), *SMALL])

    assert in_child(train, tmp_path / "log") == 1
    log = (tmp_path / "log").read_text(encoding="utf-8")
    wrong = f"{folder / 'train_state.pt'} could not be written: File too large"
    assert log.splitlines()[-1] == f"python -m minicode.train_fsm: error: {wrong}"
    assert "Traceback" not in log
    assert not list(folder.glob("*.tmp"))
    assert 0 < weights(folder, "train_state.pt")["step"] < 12
    assert train_fsm(["--out", str(folder), *SMALL, "--resume"]) == 0
    assert same(weights(folder), weights(small_run))


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, monkeypatch, capsys):
    real = training.train_step

    def breaks(model, forward, optimizer, config, step, data):
        loss = real(model, forward, optimizer, config, step, data)
        if step == 8:
            model.wpe.weight.data[0, 0] = torch.nan
        return loss

    monkeypatch.setattr(training, "train_step", breaks)
    with pytest.raises(SystemExit) as error:
        train_fsm(["--out", str(tmp_path / "run"), *SMALL])
    assert error.value.code == 1
    assert "the weights are no numbers after step 9" in capsys.readouterr().err
    assert weights(tmp_path / "run", "train_state.pt")["step"] == 8


FULL = "CUDA out of memory. Tried to allocate 9 GiB."
ON_CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
FULL_MEMORY = [
    (torch.OutOfMemoryError(FULL), FULL),
    (RuntimeError(ON_CPU), ON_CPU),
    (MemoryError(), "there is not enough memory"),
]


@pytest.mark.parametrize("error, words", FULL_MEMORY)
def test_a_memory_that_is_full_is_one_line(error, words, tmp_path, monkeypatch, capsys):
    def fills(*args):
        raise error

    monkeypatch.setattr(training, "train_step", fills)
    with pytest.raises(SystemExit) as exit:
        train_fsm(["--out", str(tmp_path / "run"), *SMALL])
    assert exit.value.code == 1
    assert capsys.readouterr().err.endswith(f"error: {words}\n")


def test_another_error_is_not_taken_for_a_full_memory(tmp_path, monkeypatch):
    def breaks(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(training, "train_step", breaks)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train_fsm(["--out", str(tmp_path / "run"), *SMALL])


def test_a_folder_belongs_to_one_training_until_that_ends(tmp_path, capsys):
    """However it ends: here it is killed."""
    folder = tmp_path / "run"
    long = ["--steps", "1000000", "--dense-share", "0.9"]
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        with suppress(BaseException):
            sys.stdout = open(writer, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
            train_fsm(["--out", str(folder), *SMALL, *long])
        os._exit(99)
    os.close(writer)
    try:
        with open(reader, encoding="utf-8") as printed:
            assert any(line.startswith("step     4 ") for line in printed)
            config = (folder / "config.json").read_bytes()
            for flags in (["--overwrite"], ["--resume", *long]):
                line = refusal(train_fsm, "--out", folder, *SMALL, *flags, capsys=capsys)
                assert line.endswith(f"another process is training in {folder}")
            assert load_run(folder).config.steps == 1000000  # to read it is free
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert (folder / "config.json").read_bytes() == config
    assert train_fsm(["--out", str(folder), *SMALL, "--overwrite"]) == 0
    assert load_run(folder).summary["step"] == load_run(folder).config.steps == 12


def test_a_training_that_is_refused_leaves_no_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    assert "k must be" in refusal(train_fsm, "--out", folder, *SMALL, "--k", 99, capsys=capsys)
    assert not folder.exists()


# -- several processes

WORKER = '''
"""What each of two processes does: trains in five ways, and writes down how that ended for it."""
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
from minicode import train
from minicode.runtime import processes
from minicode.runtime import session as sessions
from minicode.fsm import FSM
from minicode.runtime.runs import TrainConfig

folder = Path(sys.argv[1])
config = TrainConfig(**eval(sys.argv[2]))
processes.join()
rank = processes.rank()
real_step = train.train_step
real_write = sessions.write_tensors

def open_session(name, resume=False):
    return sessions.open_session(config, FSM(16, 3, 4), folder / name, resume)

def stopped_on_one_rank(model, forward, optimizer, config, step, data):
    if (rank, step) == (1, 44):
        os.kill(os.getpid(), signal.SIGTERM)
    return real_step(model, forward, optimizer, config, step, data)

def full_disk(path, data):
    raise OSError("full")

def dies(model, forward, optimizer, config, step, data):
    if (rank, step) == (1, 25):
        os._exit(3)
    return real_step(model, forward, optimizer, config, step, data)

train.train_step = stopped_on_one_rank
first = open_session("two")
assert train.train(first) is None and first.step == 45
train.train_step = real_step
again = open_session("two", resume=True)
assert again.step == 45
assert (train.train(again) != {}) == (rank == 0)
config = replace(config, refit=10, seed=1)
train.train(open_session("refit"))
sessions.write_tensors = full_disk
try:
    train.train(open_session("full"))
except OSError as error:
    assert str(error) == "full"
    real_write(folder / f"rank{rank}.pt", again.model.state_dict())
sessions.write_tensors = real_write
train.train_step = dies
train.train(open_session("dies"))
'''


@pytest.fixture(scope="module")
def job(tiny_run, tmp_path_factory):
    """What two processes left that torchrun started: their folder, and how they ended."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = repr(vars(load_run(tiny_run).config))
    command = [*start, str(folder / "worker.py"), str(folder), settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, timeout=120
    )
    assert (folder / "rank0.pt").exists(), result.stderr
    return folder, result


def test_two_processes_train_as_one(job, tiny_run):
    folder, result = job
    # Printed by one of them alone, of two runs:
    assert result.stdout.count("step    60 ") == 2
    assert result.stdout.count("step    30 ") == 2
    assert "Warning" not in result.stderr
    two = weights(folder / "two")
    assert same(weights(folder, "rank0.pt"), two)
    assert same(weights(folder, "rank1.pt"), two)
    close(two, weights(tiny_run))
    for line, other in zip(read_metrics(folder / "two"), read_metrics(tiny_run), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_two_processes_refit_codes_as_one(job, tmp_path):
    folder, _ = job
    assert train_fsm([*TINY, "--refit", "10", "--seed", "1", "--out", str(tmp_path / "one")]) == 0
    close(weights(folder / "refit"), weights(tmp_path / "one"))


def test_a_process_that_dies_ends_the_job(job):
    folder, result = job
    assert result.returncode != 0
    assert weights(folder / "dies", "train_state.pt")["step"] == 20


# -- files from strangers


def change_json(name, **changes):
    def damage(folder):
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**data, **changes}), encoding="utf-8")

    return damage


def change_text(name, text):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def change_weights(name, change):
    def damage(folder):
        state = weights(folder)
        state[name] = change(state["wte.weight"])
        torch.save(state, folder / "model.pt")

    return damage


def claims_to_be_huge(folder):
    """The file is small, and its tensors have the shapes of the config: by a stride of zero."""
    change_json("config.json", n_codes=10**10)(folder)
    huge = {"codes": (1, 10**10, 8), "usage": (1, 10**10)}
    state = {}
    for name, tensor in weights(folder).items():
        shape = huge.get(name.removeprefix("h.0.mlp.mlp_codebook."), tensor.shape)
        state[name] = torch.tensor(0.0).expand(shape)
    torch.save(state, folder / "model.pt")


def compressed(folder):
    old = zipfile.ZipFile(folder / "model.pt")
    new = zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED)
    with old, new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + bytes(10**6))
    os.replace(folder / "new", folder / "model.pt")


CODES = "h.0.mlp.mlp_codebook.codes"
NAN_CODES = torch.full((1, 8, 8), torch.nan)
TOO_MANY = {"n_states": 10**5, "successors": [[0, 1, 2]] * 10**5}
HOSTILE = [
    (change_json("config.json", n_codes=10**12), "not (1, 1000000000000, 8) torch.float32"),
    (change_json("config.json", n_codes=10**30), "n_codes must be below 9223372036854775808"),
    (change_json("config.json", n_layer=10**12), "n_layer must be below 10001"),
    (change_json("config.json", n_layer=10**4), "for 10000 layers"),
    (change_json("config.json", vocab_size=10**9), "its vocab_size is 5, config.json's 1000000000"),
    (change_json("config.json", lr=float("nan")), "lr must be at least 0, not nan"),
    (change_json("fsm.json", n_states=10**6), "n_states must be below 10001, not 1000000"),
    (change_json("fsm.json", n_states=16.0), "n_states must be of type int, not 16.0"),
    (change_json("fsm.json", **TOO_MANY), "n_states must be below 10001, not 100000"),
    (change_json("summary.json", loss="low"), "summary.json is damaged"),
    (change_json("summary.json", loss=float("inf")), "summary.json is damaged: loss is inf"),
    (change_text("summary.json", "[" * 10**5), "summary.json is damaged"),
    (change_text("summary.json", "[1]"), "summary.json is damaged"),
    (claims_to_be_huge, " bytes, for 1 layers"),
    (compressed, "model.pt is damaged, or no file of tensors"),
    (change_weights(CODES, lambda wte: NAN_CODES), "mlp_codebook.codes holds NaN"),
    (change_weights("wte.weight", lambda wte: wte / 0), "wte.weight holds NaN or infinity"),
    (change_weights("wte.weight", lambda wte: wte.double()), "torch.float64, not (5, 8) torch.f"),
    (change_weights("wte.weight", lambda wte: wte.T), "is (8, 5) torch.float32, not (5, 8)"),
    (change_weights("wte.weight", lambda wte: wte.to_sparse()), "nbytes"),
    (change_weights("more", lambda wte: wte), "unknown or missing: more"),
]


@pytest.mark.parametrize("damage, words", HOSTILE)
def test_hostile_values_are_refused_by_name(damage, words, small_run, tmp_path):
    folder = shutil.copytree(small_run, tmp_path / "run")
    damage(folder)
    with pytest.raises(ValueError) as error:
        load_run(folder)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def change_moment(**moment):
    return lambda state: state["optimizer"][0].update(moment)


HOSTILE_CHECKPOINTS = [
    (change_moment(exp_avg=torch.zeros(3)), "exp_avg is (3,) torch.float32, not (5, 8)"),
    (change_moment(exp_avg=torch.zeros(5, 8).to_sparse()), "exp_avg is no plain tensor"),
    (change_moment(exp_avg_sq=torch.full((5, 8), torch.nan)), "exp_avg_sq holds NaN"),
    (
        lambda state: state["optimizer"].update({99: {}}),
        "is not a checkpoint of this run: list index out of range",
    ),
    (lambda state: state.update(step=13), "step 13"),
    (lambda state: state.update(seconds=float("nan")), "nan seconds"),
    (lambda state: state.update(metrics=[{"loss": float("nan")}]), "loss is nan"),
    (lambda state: state.update(metrics=[5]), "is not a checkpoint of this run"),
    (lambda state: state["model"].pop("wte.weight"), "unknown or missing: wte.weight"),
]


@pytest.mark.parametrize("change, words", HOSTILE_CHECKPOINTS)
def test_hostile_checkpoints_are_refused_by_name(change, words, small_run, tmp_path):
    folder = shutil.copytree(small_run, tmp_path / "run")
    run = load_run(small_run)
    state = weights(folder, "train_state.pt")
    change(state)
    torch.save(state, folder / "train_state.pt")
    with pytest.raises(ValueError) as error:
        open_session(run.config, run.fsm, folder, resume=True)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def mutate(content, rng):
    """The bytes with a few of them flipped, deleted, put in, cut off or repeated."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        i = rng.randrange(len(content) + 1)
        n = rng.choice((1, 2, 16))
        kind = rng.randrange(5)
        if kind == 0 and i < len(content):
            content[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[i : i + n]
        elif kind == 2:
            content[i:i] = rng.choice((rng.randbytes(n), b"9" * n, b"-", b"null", b"[" * n))
        elif kind == 3 and rng.random() < 0.3:
            del content[i:]
        else:
            content[i:i] = content[i : i + 10 * n]
    return bytes(content)


def mutate_inside(content, rng):
    """A zip file, whole and with true checksums, of which one part is mutated."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        pickles = [name for name in old.namelist() if name.endswith("data.pkl")]
        chosen = rng.choice(pickles * 20 + old.namelist())
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, mutate(part, rng) if name == chosen else part)
    return out.getvalue()


def test_mutated_files_give_a_valid_run_or_one_line(small_run, tmp_path):
    folder = shutil.copytree(small_run, tmp_path / "run")
    run = load_run(small_run)
    rng = random.Random(0)
    outcomes = {"refused": 0, "valid": 0}

    def resumed():
        return open_session(run.config, run.fsm, folder, resume=True).model

    def outcome(read):
        try:
            model = read()
        except ValueError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 600
            return "refused"
        assert model(run.fsm.prompt("00"))[0].shape == (1, 3, 5)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        return "valid"

    for i in range(252):
        path = folder / RUN_FILES[i % len(RUN_FILES)]
        content = path.read_bytes()
        inside = path.suffix == ".pt" and rng.random() < 0.7
        path.write_bytes(mutate_inside(content, rng) if inside else mutate(content, rng))
        ways = [lambda: load_run(folder).model, resumed]
        if path.name == "dense.pt":
            ways.append(lambda: load_run(folder).dense)
        for read in ways:
            outcomes[outcome(read)] += 1
        path.write_bytes(content)
    assert min(outcomes.values()) > 50
