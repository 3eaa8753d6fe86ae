"""Training: seeds, what a step changes, resume, a run's files, and mistakes that a user makes."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import pytest
import torch
from conftest import RUN_FILES, TINY, read_metrics

from minicode import FSM, GPT, Codebook, load_run
from minicode import train as training
from minicode.bench import main as bench
from minicode.codebook import codebooks
from minicode.runtime import progress
from minicode.runtime.runs import TrainConfig
from minicode.sample import main as sample
from minicode.train import evaluate, learning_rate
from minicode.train_fsm import PRESETS, RELEASED, compare
from minicode.train_fsm import main as train_fsm
from minicode.train_text import main as train_text

SHORT = ["--steps", "8", "--n-layer", "1", "--block-size", "8", "--n-codes", "8"]


def train(folder, *flags):
    assert train_fsm(["--out", str(folder), *TINY, *flags]) == 0
    return torch.load(folder / "model.pt", weights_only=True)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refusal(command, *arguments, capsys):
    """Runs a command that must end with exit status 2 and one line; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        command([str(argument) for argument in arguments])
    stderr = capsys.readouterr().err.strip()
    assert error.value.code == 2
    assert "error: " in stderr
    assert "\n" not in stderr
    return stderr


# -- the loop


@pytest.mark.parametrize(
    "method",
    [
        "--similarity distance",
        "--similarity cosine",
        "--dense-share 0 --k 2",
        "--refit 10 --k 2 --revive-every 1",
    ],
)
def test_a_few_steps_are_deterministic_and_change_every_parameter(method, tmp_path):
    flags = [*SHORT, *method.split()]
    one = train(tmp_path / "a", *flags)
    assert same(one, train(tmp_path / "b", *flags))
    assert not same(one, train(tmp_path / "c", *flags, "--seed", "1"))
    run = load_run(tmp_path / "a")
    torch.manual_seed(0)
    start = GPT(run.config).state_dict()
    names = [name for name, _ in run.model.named_parameters()]
    assert any(name.endswith("codes") for name in names)
    assert not [name for name in names if torch.equal(one[name], start[name])]


def test_gradients_of_a_step_are_those_of_loss_and_pulls(fsm):
    config = TrainConfig(
        vocab_size=5,
        block_size=12,
        n_embd=16,
        n_head=2,
        n_codes=32,
        n_codes_head=8,
        dense_share=0.0,
        autoencoding=2.0,
        commitment=3.0,
        steps=10,
        batch_size=4,
    )
    torch.manual_seed(0)
    model = GPT(config)
    other = GPT(config)
    other.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    training.train_step(model, model, optimizer, config, 0, fsm)
    _, loss = other(*training.batch(config, fsm, "cpu", 0, 0))
    for codebook in codebooks(other).values():
        loss = loss + 2.0 * codebook.autoencoding + 3.0 * codebook.commitment
    loss.backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


def test_run_folder(tiny_run):
    run = load_run(tiny_run)
    dense, last = read_metrics(tiny_run)
    assert (dense["step"], last["step"]) == (30, 60)
    assert "dead_code_fraction" not in dense
    assert 0 <= last["dead_code_fraction"] < 1
    assert run.summary["dense"] == dense
    assert run.summary["loss"] == last["loss"]
    assert run.summary["loss_floor"] == run.fsm.loss_floor(12)
    assert run.summary["tokens"] == 60 * 8 * 12
    assert sorted(path.name for path in tiny_run.iterdir()) == RUN_FILES
    assert evaluate(run.dense, run.fsm, 0, 256).items() <= dense.items()
    assert evaluate(run.model, run.fsm, 0, 1024).items() <= run.summary.items()
    assert run.fsm == FSM(16, 3, 4)
    assert not run.model.training


def test_reading_a_run_draws_no_random_numbers(tiny_run):
    before = torch.get_rng_state()
    assert load_run(tiny_run).dense
    assert torch.equal(torch.get_rng_state(), before)


def test_dead_codes_are_those_that_evaluation_never_chooses(tiny_run):
    run = load_run(tiny_run)
    with torch.no_grad():
        for codebook in codebooks(run.model).values():
            codebook.codes[:, 1:] = 1e6  # so far away that code 0 is always the nearest
    figures = evaluate(run.model, run.fsm, 0, 64)
    n_codes = 2 * (32 + 2 * 8)
    assert figures["dead_code_fraction"] == pytest.approx((n_codes - 6) / n_codes)
    assert figures["sites"]["mlp.0"].pop("fvu") > 1
    assert figures["sites"]["mlp.0"] == {
        "dead_code_fraction": pytest.approx(31 / 32),
        "perplexity": pytest.approx(1),
        "codes": 32,
    }


def test_dense_twin(tmp_path):
    train(tmp_path / "a", "--codebooks", "none", "--steps", "5")
    run = load_run(tmp_path / "a")
    assert codebooks(run.model) == {}
    assert run.summary["dense"] is None
    assert "dead_code_fraction" not in run.summary


def test_learning_rate_has_a_phase_for_each_model():
    config = TrainConfig(steps=1000, dense_share=0.5, lr=1.0, codebook_lr=0.2)
    assert learning_rate(config, 0) == pytest.approx(0.01)
    assert learning_rate(config, 99) > 0.9
    assert learning_rate(config, 499) == pytest.approx(0.1, abs=0.01)
    assert learning_rate(config, 500) == pytest.approx(0.2)
    assert learning_rate(config, 999) == pytest.approx(0.02, abs=0.001)
    dense = replace(config, codebooks="none")
    assert learning_rate(dense, 500) == pytest.approx(0.55)
    assert learning_rate(dense, 999) == pytest.approx(0.1, abs=0.001)


def test_when_a_run_is_evaluated_saved_and_revived():
    every = {"eval_every": 30, "checkpoint_every": 20, "revive_every": 5}
    config = TrainConfig(steps=100, dense_share=0.5, revive_after=0.7, **every)
    steps = range(1, 101)
    assert [step for step in steps if config.evaluation_is_due(step)] == [30, 50, 60, 90, 100]
    saved = [20, 30, 40, 50, 60, 80, 90, 100]
    assert [step for step in steps if config.checkpoint_is_due(step)] == saved
    assert [step for step in steps if config.revival_is_due(step)] == [85, 90, 95]
    never = replace(config, revive_every=0)
    assert not any(never.revival_is_due(step) for step in steps)


def test_paper_preset_is_the_papers_method():
    config = TrainConfig(**PRESETS["paper"])
    assert (config.n_layer, config.n_embd, config.n_head, config.block_size) == (4, 128, 4, 128)
    assert (config.n_codes, config.similarity, config.dense_steps) == (1000, "cosine", 0)
    assert config.sites() == ["head", "mlp"]
    assert (config.k, config.autoencoding, config.commitment) == (1, 1.0, 0.0)


def test_bfloat16(tmp_path):
    train(tmp_path / "a", *SHORT, "--dtype", "bfloat16")
    assert load_run(tmp_path / "a").summary["loss"] < 2


def test_seed_is_not_the_machines(tmp_path):
    train(tmp_path / "a", *SHORT, "--seed", "3", "--steps", "2")
    assert load_run(tmp_path / "a").fsm == FSM(16, 3, 4, seed=0)


def test_weights_that_are_no_numbers_stop_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "a", *SHORT, "--lr", "1e30")
    assert error.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the weights are no numbers after step 4: try a lower --lr than 1e+30" in last
    assert (tmp_path / "a" / "config.json").exists()
    assert not (tmp_path / "a" / "model.pt").exists()


# -- resuming


@pytest.mark.parametrize("stop_at", [20, 40])  # in the dense phase, and with codebooks
def test_resumed_run_ends_as_the_unbroken_one(stop_at, tiny_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    real = training.train_step

    def dies(model, forward, optimizer, config, step, data):
        if step == stop_at + 7:
            raise KeyError("killed")
        return real(model, forward, optimizer, config, step, data)

    monkeypatch.setattr(training, "train_step", dies)
    with pytest.raises(KeyError, match="killed"):
        train(folder)
    monkeypatch.undo()
    (folder / "metrics.jsonl").write_text(
        "{]\n", encoding="utf-8"
    )  # is made anew from the checkpoint
    assert same(train(folder, "--resume"), torch.load(tiny_run / "model.pt", weights_only=True))
    assert (folder / "metrics.jsonl").read_bytes() == (tiny_run / "metrics.jsonl").read_bytes()


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path):
    """The command is stopped after its first evaluation, which it announces on its output."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "minicode.train_fsm", "--out", str(folder), *TINY]
    process = subprocess.Popen(
        [*command, "--steps", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not process.stdout.readline().startswith("step    30 "):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "with --resume and not --overwrite, continues it" in stderr
    assert "Traceback" not in stderr
    state = torch.load(folder / "train_state.pt", weights_only=True)
    assert 30 <= state["step"] < 4000
    books = codebooks(load_run(folder).model).values()
    assert not any(codebook.enabled for codebook in books)


def test_a_signal_leaves_a_checkpoint_of_the_step_it_came_in(tmp_path, monkeypatch):
    real = training.train_step

    def interrupted(model, forward, optimizer, config, step, data):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, forward, optimizer, config, step, data)

    monkeypatch.setattr(training, "train_step", interrupted)
    assert train_fsm(["--out", str(tmp_path / "run"), *TINY, *SHORT]) == 130
    assert torch.load(tmp_path / "run" / "train_state.pt", weights_only=True)["step"] == 3


def test_a_signal_while_codebooks_start_is_not_kept_waiting_and_loses_nothing(
    tiny_run, tmp_path, monkeypatch
):
    real = Codebook.start
    started = []

    def interrupted(self, *arguments, **named):
        started.append(self.name)
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments, **named)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Codebook, "start", interrupted)
        assert train_fsm(["--out", str(folder), *TINY]) == 130
    assert started == ["head.0", "mlp.0"]  # of four
    assert torch.load(folder / "train_state.pt", weights_only=True)["step"] == 30
    assert train_fsm(["--out", str(folder), *TINY, "--resume"]) == 0
    one, other = (torch.load(run / "model.pt", weights_only=True) for run in (tiny_run, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_existing_runs_are_never_lost(tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refused(*flags):
        return refusal(train_fsm, "--out", folder, *TINY, *flags, capsys=capsys)

    either = "holds a run already: --resume continues it, --overwrite replaces it"
    assert either in refused()
    other_settings = "other settings than these (repeat its flags): steps"
    assert other_settings in refused("--resume", "--steps", 70)
    assert "its data" in refused("--resume", "--n-edges", 2)
    assert "k must be from 1" in refused("--overwrite", "--k", 99)
    assert "not allowed with argument" in refused("--resume", "--overwrite")
    assert "there is no room" in refused("--overwrite", "--batch-size", 10**11)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # Done already: it shows its figures again.
    assert train_fsm(["--out", str(folder), *TINY, "--resume"]) == 0


def test_a_folder_is_known_as_a_run_where_its_overwriting_was_killed(
    tiny_run, tmp_path, monkeypatch
):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "notes.txt").write_text("lr is too high", encoding="utf-8")

    def dies(*arguments, **named):
        raise KeyError("killed")

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(shutil, "rmtree", dies)
        train(folder, "--overwrite")
    assert not (folder / "model.pt").exists()
    train(folder, *SHORT, "--overwrite")
    assert load_run(folder).config.steps == 8
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "lr is too high"


def test_other_folders_are_left_alone(tmp_path, capsys):
    def refused(name, flag):
        return refusal(train_fsm, "--out", tmp_path / name, flag, capsys=capsys)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work", encoding="utf-8")
    assert "is not empty, and not a run" in refused("other", "--overwrite")
    assert "no run in" in refused("none", "--resume")
    assert not (tmp_path / "none").exists()


# -- what people see


@pytest.mark.parametrize("command", [train_fsm, train_text, sample, bench])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as error:
        command(["--help"])
    assert error.value.code == 0
    assert "usage: python -m minicode." in capsys.readouterr().out


@pytest.mark.parametrize("command", [train_fsm, train_text])
def test_flags_are_in_groups_and_their_help_has_no_figures_of_one_data_set(command, capsys):
    with pytest.raises(SystemExit):
        command(["--help"])
    text = capsys.readouterr().out
    headings = ["the data", "the model", "its codebooks", "training", "how codebooks learn"]
    for heading in [*headings, "where it runs"]:
        assert f"\n{heading}:\n" in text
    assert "accuracy" not in text
    assert "% dead" not in text


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What a short run prints where there is no terminal: (stdout, stderr)."""
    folder = tmp_path_factory.mktemp("told") / "run"
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        train(folder, *SHORT, "--steps", "40")
    return stdout.getvalue(), stderr.getvalue()


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(told):
    stdout, stderr = told
    lines = stderr.splitlines()
    assert lines.pop(10) == "starting the codebooks by k-means"
    assert [line.split()[:4] for line in lines[:2]] == [
        ["step", "2", "of", "40"],
        ["step", "4", "of", "40"],
    ]
    assert len(lines) == 20
    assert all(re.search(r"  loss \d\.\d+  about \d[\d:]+ left$", line) for line in lines)
    assert "of 40" not in stdout


def test_the_released_model_stands_beside_no_other_machine(told, tiny_run):
    stdout, _ = told
    assert "loss floor" in stdout
    assert "released" not in stdout
    run = load_run(tiny_run)
    assert "released" not in compare(run)
    of_its_size = replace(run, data=FSM())
    assert "released, 2.6 B tokens" in compare(of_its_size)
    assert f"{RELEASED['loss']}" in compare(of_its_size)


def test_with_a_terminal_there_is_a_bar_and_no_lines(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(tmp_path / "run", *SHORT)
    stderr = capsys.readouterr().err
    assert "8/8" in stderr
    assert "of 8" not in stderr
    assert "starting the codebooks" not in stderr


def test_only_rank_0_speaks(monkeypatch, capsys):
    monkeypatch.setattr(progress.processes, "rank", lambda: 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert progress.bar(total=2).disable
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    progress.say("hello")
    assert capsys.readouterr().err == ""


# -- mistakes, and files that are damaged or meant to do harm


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--k 9", "k must be from 1 to the 8 codes of the codebook, not 9"),
        ("--n-embd 30 --n-head 4", "n_embd (30) must be a multiple of n_head (4)"),
        ("--codebooks head,mpl", "there is no site 'mpl'"),
        ("--n-edges 17", "a machine needs"),
        ("--device warp", "device must be cpu, cuda or auto, not 'warp'"),
        ("--device cuda:99", "device 'cuda:99' can't be used here"),
        ("--n-codes 1000000000000", "there is no room for this model"),
        ("--batch-size 100000000000", "there is no room for this model, or its batches"),
        (f"--seed {2**63}", "seed must be below 9223372036854775808"),
        ("--block-size 3", "block_size must be at least 4, not 3"),
        ("--lr fast", "--lr: invalid float value: 'fast'"),
        ("--n-code 5 --stepps 3", "unrecognized arguments: --n-code 5 --stepps 3"),
        ("--preset papper", "invalid choice: 'papper'"),
    ],
)
def test_bad_settings_end_in_one_line(flags, words, tmp_path, capsys):
    folder = tmp_path / "run"
    assert words in refusal(train_fsm, "--out", folder, *TINY, *flags.split(), capsys=capsys)
    assert not folder.exists()


def test_a_name_that_is_no_utf8_is_said_to_be_no_more_than_that(tiny_run, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"run\xff")
    line = refusal(train_fsm, "--out", folder, *TINY, capsys=capsys)
    assert "has a name that is not UTF-8" in line
    assert not folder.exists()
    shutil.copytree(tiny_run, folder)
    line = refusal(sample, "--run", folder, capsys=capsys)
    assert "has a name that is not UTF-8" in line
    assert "damaged" not in line


def test_a_batch_that_processes_can_not_share_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minicode.runtime.processes.ranks", lambda: 3)
    line = refusal(train_fsm, "--out", tmp_path / "run", *TINY, capsys=capsys)
    assert "batch_size (8) must be a multiple of 3 (processes)" in line


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def truncate(folder):
    content = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(content[: len(content) // 2])


def change_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return damage


DAMAGE = {
    "truncated": (truncate, "model.pt is damaged, or no file of tensors"),
    "harmful": (
        lambda folder: torch.save({"codes": Harmful()}, folder / "model.pt"),
        "model.pt is damaged, or no file of tensors",
    ),
    "a pickle": (
        lambda folder: (folder / "model.pt").write_bytes(pickle.dumps(Harmful())),
        "model.pt is damaged, or no file of tensors",
    ),
    "other shape": (
        change_config(n_codes=33),
        "model.pt does not hold the model of config.json",
    ),
    "unknown setting": (change_config(n_heads=33), "unexpected keyword argument 'n_heads'"),
    "other type": (
        change_config(n_layer="2"),
        "config.json is damaged: n_layer must be of type int, not '2'",
    ),
    "other version": (change_config(version=3), "another version of minicode"),
    "half a file": (
        lambda folder: (folder / "fsm.json").write_text('{"n_states": 16', encoding="utf-8"),
        "fsm.json is damaged",
    ),
    "missing": (lambda folder: (folder / "model.pt").unlink(), "has no checkpoint yet"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_hostile_files_are_refused_in_one_line(
    name, tiny_run, tmp_path, capsys, monkeypatch
):
    damage, words = DAMAGE[name]
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    damage(folder)
    assert words in refusal(sample, "--run", folder, capsys=capsys)
    assert not (tmp_path / "executed").exists()


def test_hostile_checkpoint_is_refused_on_resume(tiny_run, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, folder / "train_state.pt")
    line = refusal(train_fsm, "--out", folder, *TINY, "--resume", capsys=capsys)
    assert "train_state.pt is damaged" in line
    assert not (tmp_path / "executed").exists()
