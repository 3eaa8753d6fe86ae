"""Training: seeds, what a step changes, resume, the files of a run, and every mistake a user can make."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import RUN_FILES, TINY

from minicode import FSM, GPT, load_run
from minicode import train as training
from minicode.bench import main as bench
from minicode.runtime import runs
from minicode.runtime.runs import TrainConfig
from minicode.sample import main as sample
from minicode.train import evaluate, learning_rate
from minicode.train_fsm import PRESETS
from minicode.train_fsm import main as train_fsm
from minicode.train_text import main as train_text


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
    stderr = capsys.readouterr().err
    last = stderr.strip().split("\n")[-1]
    assert error.value.code == 2 and "error: " in last and stderr.strip() == last
    return last


@pytest.mark.parametrize(
    "method",
    [[], ["--decay", "none", "--similarity", "cosine"], ["--dense-share", "0", "--k", "2"]],
)
def test_twenty_steps_are_deterministic_and_change_every_parameter(method, tmp_path):
    flags = ["--steps", "20", *method]
    one, other = train(tmp_path / "a", *flags), train(tmp_path / "b", *flags)
    assert same(one, other)
    assert not same(one, train(tmp_path / "c", *flags, "--seed", "1"))
    torch.manual_seed(0)
    start = GPT(load_run(tmp_path / "a").config).state_dict()
    names = [name for name, _ in load_run(tmp_path / "a").model.named_parameters()]
    unchanged = [name for name in names if torch.equal(one[name], start[name])]
    assert not unchanged and any(name.endswith("codes") for name in names)


def test_gradients_of_a_step_are_those_of_loss_and_pulls(fsm):
    config = TrainConfig(vocab_size=5, block_size=12, n_embd=16, n_head=2, n_codes=32, n_codes_head=8, decay=None,
                         dense_share=0.0, autoencoding=2.0, commitment=3.0, steps=10, batch_size=4)  # fmt: skip
    torch.manual_seed(0)
    model = GPT(config)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    training.train_step(model, model, optimizer, config, 0, fsm)
    got = {name: p.grad for name, p in model.named_parameters()}
    other = GPT(config)
    other.load_state_dict(start)
    loss = other(*training.batch(config, fsm, "cpu", 0, 0))[1]
    for codebook in other.codebooks().values():
        loss = loss + 2.0 * codebook.autoencoding + 3.0 * codebook.commitment
    loss.backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


def test_run_folder(tiny_run):
    run = load_run(tiny_run)
    metrics = runs.read_metrics(tiny_run)
    assert [line["step"] for line in metrics] == [30, 60]
    assert "dead_code_fraction" not in metrics[0] and 0 <= metrics[1]["dead_code_fraction"] < 1
    assert run.summary["dense"] == metrics[0] and run.summary["loss"] == metrics[1]["loss"]
    assert (
        run.summary["loss_floor"] == run.fsm.loss_floor(12) and run.summary["tokens"] == 60 * 8 * 12
    )
    assert sorted(path.name for path in tiny_run.iterdir()) == RUN_FILES
    assert evaluate(run.dense, run.fsm, 0, 256).items() <= run.summary["dense"].items()
    assert evaluate(run.model, run.fsm, 0, 1024).items() <= run.summary.items()
    assert run.fsm == FSM(16, 3, 4) and not run.model.training


def test_dead_codes_are_those_that_evaluation_never_chooses(tiny_run):
    run = load_run(tiny_run)
    with torch.no_grad():
        for codebook in run.model.codebooks().values():
            codebook.codes[:, 1:] = 1e6  # so far away that code 0 is always the nearest
    figures = evaluate(run.model, run.fsm, 0, 1024)
    n_codes = 2 * (32 + 2 * 8)
    assert figures["dead_code_fraction"] == pytest.approx((n_codes - 6) / n_codes)
    assert figures["sites"]["mlp.0"] == {
        "dead_code_fraction": pytest.approx(31 / 32),
        "perplexity": pytest.approx(1),
    }


def test_dense_twin(tmp_path):
    train(tmp_path / "a", "--codebooks", "none", "--steps", "5")
    run = load_run(tmp_path / "a")
    assert (
        run.model.codebooks() == {}
        and run.summary["dense"] is None
        and "dead_code_fraction" not in run.summary
    )


def test_learning_rate_has_a_phase_for_each_model():
    config = TrainConfig(steps=1000, dense_share=0.5, lr=1.0, codebook_lr=0.2)
    assert learning_rate(config, 99) > 0.9 and learning_rate(config, 0) == pytest.approx(0.01)
    assert learning_rate(config, 499) == pytest.approx(0.1, abs=0.01)
    assert learning_rate(config, 500) == pytest.approx(0.2) and learning_rate(
        config, 999
    ) == pytest.approx(0.02, abs=0.001)
    dense = replace(config, codebooks="none")
    assert learning_rate(dense, 500) == pytest.approx(0.55) and learning_rate(
        dense, 999
    ) == pytest.approx(0.1, abs=0.001)


def test_paper_preset_is_the_papers_method():
    config = TrainConfig(**PRESETS["paper"])
    assert (config.n_layer, config.n_embd, config.n_head, config.block_size) == (4, 128, 4, 128)
    assert (config.n_codes, config.similarity, config.decay, config.dense_steps) == (
        1000,
        "cosine",
        None,
        0,
    )
    assert (
        config.sites() == ["head", "mlp"]
        and config.k == 1
        and config.autoencoding == 1.0
        and config.commitment == 0.0
    )


@pytest.mark.parametrize("stop_at", [20, 40])  # in the dense phase, and with codebooks
def test_resumed_run_ends_as_the_unbroken_one(stop_at, tiny_run, tmp_path, monkeypatch):
    folder, real = tmp_path / "run", training.train_step

    def dies(model, forward, optimizer, config, step, data):
        if step == stop_at + 7:
            raise KeyError("killed")
        return real(model, forward, optimizer, config, step, data)

    monkeypatch.setattr(training, "train_step", dies)
    with pytest.raises(KeyError, match="killed"):
        train(folder)
    monkeypatch.undo()
    (folder / "metrics.jsonl").open("a").write('{"step": 9')  # half a line, as a kill leaves it
    assert same(train(folder, "--resume"), torch.load(tiny_run / "model.pt", weights_only=True))
    assert (folder / "metrics.jsonl").read_bytes() == (tiny_run / "metrics.jsonl").read_bytes()


def test_ctrl_c_leaves_a_run_that_resumes(tiny_run, tmp_path):
    """The command is stopped after its first evaluation, which it announces on its output."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "minicode.train_fsm",
        "--out",
        str(tmp_path / "run"),
        *TINY,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--steps", "4000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=environment)  # fmt: skip
    while not process.stdout.readline().startswith("step    30 "):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert (
        process.returncode == 130
        and "with --resume and not --overwrite, continues it" in stderr
        and "Traceback" not in stderr
    )
    state = torch.load(tmp_path / "run" / "train_state.pt", weights_only=True)
    assert 30 <= state["step"] < 4000 and state["step"] % 20  # not one of the regular checkpoints
    model = load_run(tmp_path / "run").model
    assert not any(codebook.enabled for codebook in model.codebooks().values())


@pytest.mark.parametrize("command", [train_fsm, train_text, sample, bench])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as error:
        command(["--help"])
    assert error.value.code == 0 and "usage: python -m minicode." in capsys.readouterr().out


def test_seed_is_not_the_machines(tmp_path):
    train(tmp_path / "a", "--seed", "3", "--steps", "2")
    assert load_run(tmp_path / "a").fsm == FSM(16, 3, 4, seed=0)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "a", "--lr", "1e30")
    assert (
        error.value.code == 1
        and "try a lower --lr" in capsys.readouterr().err.strip().splitlines()[-1]
    )
    assert (tmp_path / "a" / "config.json").exists()


def test_damaged_metrics_are_refused_on_resume(tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "metrics.jsonl").write_text("{]\n")
    assert "metrics.jsonl is damaged" in refusal(
        train_fsm, "--out", folder, *TINY, "--resume", capsys=capsys
    )


def test_bfloat16_and_compile(tmp_path):
    train(tmp_path / "a", "--dtype", "bfloat16", "--steps", "6")
    assert load_run(tmp_path / "a").summary["loss"] < 2


def test_existing_runs_are_never_lost(tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    line = refusal(train_fsm, "--out", folder, *TINY, capsys=capsys)
    assert "holds a run already: --resume continues it, --overwrite replaces it" in line
    assert "other settings than these (repeat its flags): steps" in refusal(
        train_fsm, "--out", folder, *TINY, "--resume", "--steps", 70, capsys=capsys
    )
    assert "its data" in refusal(
        train_fsm, "--out", folder, *TINY, "--resume", "--n-edges", 2, capsys=capsys
    )
    refusal(train_fsm, "--out", folder, *TINY, "--overwrite", "--k", 99, capsys=capsys)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (
        train_fsm(["--out", str(folder), *TINY, "--resume"]) == 0
    )  # done already: shows its figures again
    assert "not allowed with argument" in refusal(
        train_fsm, "--out", folder, "--resume", "--overwrite", capsys=capsys
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    assert "is not empty, and not a run" in refusal(
        train_fsm, "--out", tmp_path / "other", "--overwrite", capsys=capsys
    )
    assert "no run in" in refusal(train_fsm, "--out", tmp_path / "none", "--resume", capsys=capsys)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--k", "9"], "k (9) is more than the 8 codes of a head codebook"),
        (["--n-embd", "30", "--n-head", "4"], "n_embd (30) must be a multiple of n_head (4)"),
        (["--codebooks", "head,mpl"], "there is no site 'mpl'"),
        (["--n-edges", "17"], "a machine needs"),
        (["--device", "warp"], "device must be cpu, cuda or auto, not 'warp'"),
        (["--device", "cuda:99"], "device 'cuda:99' can't be used here"),
        (["--n-codes", "1000000000000"], "there is no room for this model"),
        (["--seed", str(2**63)], "seed must be below 9223372036854775808"),
        (["--accumulate", "3"], "batch_size (8) must be a multiple of 3 (processes x accumulate)"),
        (["--block-size", "3"], "block_size (3) must be at least 4 here"),
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--n-code", "5", "--stepps", "3"], "unrecognized arguments: --n-code 5 --stepps 3"),
        (["--preset", "papper"], "invalid choice: 'papper'"),
    ],
)
def test_bad_settings_end_in_one_line(flags, words, tmp_path, capsys):
    assert words in refusal(train_fsm, "--out", tmp_path / "run", *TINY, *flags, capsys=capsys)
    assert not (tmp_path / "run").exists()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def damage_truncate(folder):
    content = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(content[: len(content) // 2])


def damage_pickle(folder):
    torch.save({"codes": Harmful()}, folder / "model.pt")


def damage_plain_pickle(folder):
    (folder / "model.pt").write_bytes(pickle.dumps(Harmful()))


def damage_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_codes": 33}))


def damage_unknown(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_heads": 33}))


def damage_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": "2"}))


def damage_version(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "version": 99}))


def damage_json(folder):
    (folder / "fsm.json").write_text('{"n_states": 16')


def damage_missing(folder):
    (folder / "model.pt").unlink()


@pytest.mark.parametrize(
    "damage, words",
    [
        (damage_truncate, "model.pt is damaged, or no file of tensors"),
        (damage_pickle, "model.pt is damaged, or no file of tensors"),
        (damage_plain_pickle, "model.pt is damaged, or no file of tensors"),
        (damage_shape, "model.pt does not hold the model of config.json"),
        (damage_unknown, "config.json is damaged: unknown or missing: n_heads"),
        (damage_type, "config.json is damaged: n_layer is '2'"),
        (damage_version, "another version of minicode"),
        (damage_json, "fsm.json is damaged"),
        (damage_missing, "has no checkpoint yet"),
    ],
)
def test_damaged_and_hostile_files_are_refused_in_one_line(
    damage, words, tiny_run, tmp_path, capsys, monkeypatch
):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    damage(folder)
    assert words in refusal(sample, "--run", folder, capsys=capsys)
    assert not (tmp_path / "executed").exists()


def test_hostile_checkpoint_is_refused_on_resume(tiny_run, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, folder / "train_state.pt")
    assert "train_state.pt is damaged" in refusal(
        train_fsm, "--out", folder, *TINY, "--resume", capsys=capsys
    )
    assert not (tmp_path / "executed").exists()
