"""Runs that survive: kills, full disks, several processes, and files from strangers, damaged or meant to do harm."""

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
from pathlib import Path

import pytest
import torch
from conftest import RUN_FILES, TINY

from minicode import Codebook, load_run
from minicode import train as training
from minicode.runtime import runs
from minicode.train import open_session
from minicode.train_fsm import main as train_fsm

ROOT = Path(__file__).parent.parent
SMALL = [*TINY, *(
    "--codebooks mlp --n-layer 1 --n-embd 8 --n-codes 8 --batch-size 32 --steps 20 --eval-every 5 --checkpoint-every 4 "
    "--revive-every 3"
).split()]  # fmt: skip


def weights(folder, name="model.pt"):
    return torch.load(folder / name, weights_only=True)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one, other):
    """Equal but for rounding. The bias of the keys changes nothing, and so drifts as rounding has it."""
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
        try:
            sys.stdout = sys.stderr = open(log, "w", buffering=1)
            status = function()
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- kills and full disks


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert train_fsm(["--out", str(folder), *SMALL]) == 0
    return folder


def killed(folder, what, nth):
    """Trains, resuming what is there, and dies by SIGKILL when `what` happens for the nth time."""
    count = itertools.count()
    step, start, replace, opened = training.train_step, Codebook._assign, os.replace, builtins.open

    def happens(event):
        if event == what and next(count) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_step(model, forward, optimizer, config, n, data):
        happens("a dense step" if n < config.dense_steps else "a step with codebooks")
        return step(model, forward, optimizer, config, n, data)

    def dying_start(*arguments):
        happens("k-means")
        return start(*arguments)

    def dying_replace(temporary, path):
        happens(f"before {path.name} is replaced")
        replace(temporary, path)
        happens(f"after {path.name} is replaced")

    class Half(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            happens(f"half of {Path(self.name).stem}")
            return super().write(content[len(content) // 2 :])

    training.train_step, Codebook._assign, os.replace = dying_step, dying_start, dying_replace
    runs.open = lambda path, mode: (
        Half(path, mode) if Path(path).suffix == ".tmp" else opened(path, mode)
    )
    resume = ["--resume"] if (folder / "config.json").exists() else []
    return train_fsm(["--out", str(folder), *SMALL, *resume])


WRITES = {
    "config.json": 0,
    "fsm.json": 0,
    "train_state.pt": 4,
    "model.pt": 4,
    "metrics.jsonl": 3,
    "summary.json": 0,
}
MOMENTS = [("a dense step", 8), ("k-means", 8), ("a step with codebooks", 8)] + [
    (moment.format(name), times)
    for name, times in WRITES.items()
    for moment in ("half of {}", "before {} is replaced", "after {} is replaced")
]  # what happens, and how often at least after its first time


def test_killed_at_any_moment_a_run_resumes_and_ends_as_the_unbroken_one(small_run, tmp_path):
    assert len(MOMENTS) >= 20
    rng = random.Random(0)
    for i, (what, times) in enumerate(MOMENTS):
        folder, nth = tmp_path / str(i), rng.randint(0, times)
        assert in_child(lambda: killed(folder, what, nth), tmp_path / "log") == -signal.SIGKILL, (
            what,
            nth,
        )
        resume = ["--resume"] if (folder / "config.json").exists() else []
        assert train_fsm(["--out", str(folder), *SMALL, *resume]) == 0, (what, nth)
        assert same(weights(folder), weights(small_run)), (what, nth)
        assert (folder / "metrics.jsonl").read_bytes() == (
            small_run / "metrics.jsonl"
        ).read_bytes(), (what, nth)
        assert sorted(path.name for path in folder.iterdir()) == RUN_FILES, (what, nth)


def test_a_full_disk_stops_the_run_with_one_line_and_leaves_the_checkpoint(tiny_run, tmp_path):
    """The checkpoint grows by the moments of the codes; the room is for those before."""
    folder, room = tmp_path / "run", (tiny_run / "train_state.pt").stat().st_size - 1

    def train():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        return train_fsm(["--out", str(folder), *TINY])

    assert in_child(train, tmp_path / "log") == 1
    assert (tmp_path / "log").read_text().splitlines()[-1] == (
        f"python -m minicode.train_fsm: error: {folder / 'train_state.pt'} could not be written: File too large"
    )
    assert "Traceback" not in (tmp_path / "log").read_text() and not list(folder.glob("*.tmp"))
    assert weights(folder, "train_state.pt")["step"] == 20
    assert train_fsm(["--out", str(folder), *TINY, "--resume"]) == 0
    assert same(weights(folder), weights(tiny_run))


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, monkeypatch, capsys):
    real = training.train_step

    def breaks(model, forward, optimizer, config, step, data):
        loss = real(model, forward, optimizer, config, step, data)
        if step == 39:
            model.wpe.weight.data[0, 0] = torch.nan
        return loss

    monkeypatch.setattr(training, "train_step", breaks)
    with pytest.raises(SystemExit) as error:
        train_fsm(["--out", str(tmp_path / "run"), *TINY])
    assert (
        error.value.code == 1
        and "the weights are no numbers after step 40" in capsys.readouterr().err
    )
    assert weights(tmp_path / "run", "train_state.pt")["step"] == 20


def test_a_gpu_that_is_full_is_one_line(tmp_path, monkeypatch, capsys):
    def fills(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(training, "train_step", fills)
    with pytest.raises(SystemExit) as error:
        train_fsm(["--out", str(tmp_path / "run"), *TINY])
    assert error.value.code == 1 and capsys.readouterr().err.endswith(
        "error: CUDA out of memory. Tried to allocate 9 GiB.\n"
    )


# -- several processes


def test_a_batch_in_parts_is_the_same_batch(tiny_run, tmp_path):
    assert train_fsm(["--out", str(tmp_path / "run"), *TINY, "--accumulate", "4"]) == 0
    close(weights(tmp_path / "run"), weights(tiny_run))


WORKER = '''
"""What each of two processes does: trains in three ways, and writes down how that ended for it."""
import os, signal, sys
from pathlib import Path
import torch
from minicode import train
from minicode.runtime import processes
from minicode.fsm import FSM
from minicode.runtime.runs import TrainConfig

folder, settings = Path(sys.argv[1]), eval(sys.argv[2])
processes.join()
rank, real_step, real_write = processes.rank(), train.train_step, train.write_tensors
machine = FSM(16, 3, 4)

def stopped_on_one_rank(model, forward, optimizer, config, step, data):
    if (rank, step) == (1, 44):
        os.kill(os.getpid(), signal.SIGTERM)
    return real_step(model, forward, optimizer, config, step, data)

def full_disk(path, data):
    raise OSError("full")

def session(name, **more):
    resume = more.pop("resume", False)
    return train.open_session(TrainConfig(**settings, **more), machine, folder / name, resume)

train.train_step = stopped_on_one_rank
first = session("gradient", accumulate=2)
assert train.train(first) is None and first.step == 45
train.train_step = real_step
again = session("gradient", accumulate=2, resume=True)
assert again.step == 45 and (train.train(again) != {}) == (rank == 0)
averages = session("averages", decay=0.9)
train.train(averages)
train.write_tensors = full_disk
try:
    train.train(session("full"))
except OSError as error:
    assert str(error) == "full"
    states = {"gradient": again.model.state_dict(), "averages": averages.model.state_dict()}
    real_write(folder / f"rank{rank}.pt", states)
processes.leave()
'''

DIES = """
import os
from minicode import train, train_fsm
from minicode.runtime import processes
real = train.train_step
def dies(model, forward, optimizer, config, step, data):
    if (processes.rank(), step) == (1, 25):
        os._exit(3)
    return real(model, forward, optimizer, config, step, data)
train.train_step = dies
train_fsm.main()
"""


def torchrun(code, folder, *arguments):
    (folder / "worker.py").write_text(code)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*start, str(folder / "worker.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_two_processes_train_as_one(tiny_run, tmp_path):
    config = load_run(tiny_run).config
    settings = {
        name: value for name, value in vars(config).items() if name not in ("decay", "accumulate")
    }
    result = torchrun(WORKER, tmp_path, str(tmp_path), repr(settings))
    assert result.returncode == 0, result.stderr
    assert (
        result.stdout.count("step    60 ") == 2 and "Warning" not in result.stderr
    )  # printed by one of them
    assert train_fsm(["--out", str(tmp_path / "one"), *TINY, "--decay", "0.9"]) == 0
    states = [weights(tmp_path, f"rank{rank}.pt") for rank in (0, 1)]
    for name, one in {"gradient": tiny_run, "averages": tmp_path / "one"}.items():
        assert same(states[0][name], states[1][name]) and same(
            states[0][name], weights(tmp_path / name)
        )
        close(weights(tmp_path / name), weights(one))
        for line, other in zip(
            runs.read_metrics(tmp_path / name), runs.read_metrics(one), strict=True
        ):
            assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_a_process_that_dies_ends_the_job(tmp_path):
    result = torchrun(DIES, tmp_path, "--out", str(tmp_path / "run"), *TINY)
    assert result.returncode != 0 and weights(tmp_path / "run", "train_state.pt")["step"] == 20


# -- files from strangers


def change_json(name, **changes):
    def damage(folder):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **changes}))

    return damage


def change_tensors(**changes):
    def damage(folder):
        state = weights(folder)
        changed = {name.replace("__", "."): change(state) for name, change in changes.items()}
        torch.save({**state, **changed}, folder / "model.pt")

    return damage


def claims_to_be_huge(folder):
    """The file is small, and its tensors have the shapes of the configuration: by a stride of zero."""
    change_json("config.json", n_codes=10**10)(folder)
    names = {"codes": (1, 10**10, 8), "usage": (1, 10**10)}
    shapes = {
        name: names.get(name.removeprefix("h.0.mlp.mlp_codebook."), t.shape)
        for name, t in weights(folder).items()
    }
    torch.save(
        {name: torch.tensor(0.0).expand(shape) for name, shape in shapes.items()},
        folder / "model.pt",
    )


def compressed(folder):
    with (
        zipfile.ZipFile(folder / "model.pt") as old,
        zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name) + bytes(10**6))
    os.replace(folder / "new", folder / "model.pt")


@pytest.mark.parametrize("damage, words", [
    (change_json("config.json", n_codes=10**12), "it has "),
    (change_json("config.json", n_codes=10**30), "model.pt does not hold the model of config.json"),
    (change_json("config.json", n_layer=10**12), "for 1000000000000 layers"),
    (change_json("config.json", vocab_size=10**9), "its vocab_size is 5, config.json's 1000000000"),
    (change_json("config.json", lr=float("nan")), "lr must be at least 0, not nan"),
    (change_json("fsm.json", n_states=10**6), "n_states must be below 10001, not 1000000"),
    (change_json("fsm.json", n_states=16.0), "the numbers of a machine must be whole"),
    (change_json("fsm.json", n_states=10**5, successors=[[0, 1, 2]] * 10**5), "n_states from 2 to 10,000"),
    (change_json("summary.json", loss="low"), "summary.json is damaged"),
    (change_json("summary.json", loss=float("inf")), "summary.json is damaged: loss is inf"),
    (lambda folder: (folder / "summary.json").write_text("[" * 10**5), "summary.json is damaged"),
    (lambda folder: (folder / "summary.json").write_text("[1]"), "summary.json is damaged"),
    (claims_to_be_huge, " bytes, of "),
    (compressed, "model.pt is damaged, or no file of tensors"),
    (change_tensors(h__0__mlp__mlp_codebook__codes=lambda s: torch.full((1, 8, 8), torch.nan)), "mlp_codebook.codes holds NaN"),
    (change_tensors(wte__weight=lambda s: s["wte.weight"] / 0), "wte.weight holds NaN or infinity"),
    (change_tensors(wte__weight=lambda s: s["wte.weight"].double()), "wte.weight is (5, 8) torch.float64, not (5, 8) torch.f"),
    (change_tensors(wte__weight=lambda s: s["wte.weight"].T), "wte.weight is (8, 5) torch.float32, not (5, 8) torch.float32"),
    (change_tensors(wte__weight=lambda s: s["wte.weight"].to_sparse()), "wte.weight is no plain tensor"),
    (change_tensors(more=lambda s: s["wte.weight"]), "unknown or missing: more"),
])  # fmt: skip
def test_hostile_values_are_refused_by_name(damage, words, small_run, tmp_path):
    folder = shutil.copytree(small_run, tmp_path / "run")
    damage(folder)
    with pytest.raises(ValueError) as error:
        load_run(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (lambda state: state["optimizer"][0].update(exp_avg=torch.zeros(3)), "exp_avg is (3,) torch.float32, not (5, 8)"),
    (lambda state: state["optimizer"][0]["exp_avg_sq"].fill_(torch.nan), "exp_avg_sq holds NaN"),
    (lambda state: state["optimizer"].update({99: {}}), "is not a checkpoint of this run: 99"),
    (lambda state: state.update(step=21), "step 21"),
    (lambda state: state.update(seconds=float("nan")), "nan seconds"),
    (lambda state: state.update(step=5), "metrics.jsonl"),
    (lambda state: state["model"].pop("wte.weight"), "unknown or missing: wte.weight"),
])  # fmt: skip
def test_hostile_checkpoints_are_refused_by_name(change, words, small_run, tmp_path):
    folder, run = shutil.copytree(small_run, tmp_path / "run"), load_run(small_run)
    state = weights(folder, "train_state.pt")
    (folder / "metrics.jsonl").write_text(
        "{}\n" if words == "metrics.jsonl" else (folder / "metrics.jsonl").read_text()
    )
    change(state)
    torch.save(state, folder / "train_state.pt")
    with pytest.raises(ValueError) as error:
        open_session(run.config, run.fsm, folder, resume=True)
    assert words in str(error.value) and "\n" not in str(error.value)


def mutate(content, rng):
    """The bytes with a few of them flipped, deleted, put in, cut off or repeated."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        i, n = rng.randrange(len(content) + 1), rng.choice((1, 2, 16))
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
        parts = [name for name in old.namelist() if name.endswith("data.pkl")] * 20 + old.namelist()
        chosen = rng.choice(parts)
        for name in old.namelist():
            new.writestr(name, mutate(old.read(name), rng) if name == chosen else old.read(name))
    return out.getvalue()


def test_mutated_files_give_a_valid_run_or_one_line(small_run, tmp_path):
    folder, run = shutil.copytree(small_run, tmp_path / "run"), load_run(small_run)
    rng, outcomes = random.Random(0), {"refused": 0, "valid": 0}
    for i in range(504):
        path = folder / RUN_FILES[i % len(RUN_FILES)]
        content = path.read_bytes()
        inside = path.suffix == ".pt" and rng.random() < 0.7
        path.write_bytes(mutate_inside(content, rng) if inside else mutate(content, rng))
        ways = [
            lambda: load_run(folder).model,
            lambda: open_session(run.config, run.fsm, folder, resume=True).model,
        ]
        for read in [*ways, lambda: load_run(folder).dense] if path.name == "dense.pt" else ways:
            try:
                model = read()
                assert model(run.fsm.prompt("00"))[0].shape == (1, 3, 5)
                assert all(parameter.isfinite().all() for parameter in model.parameters())
                outcomes["valid"] += 1
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 600, (i, path.name)
                outcomes["refused"] += 1
        path.write_bytes(content)
    assert min(outcomes.values()) > 100
