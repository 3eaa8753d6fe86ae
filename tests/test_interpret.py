"""The command interpret, as a user calls it."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_train import refusal, train

from minicode import load_run
from minicode.interpret import main as interpret


@pytest.fixture(scope="module")
def interpreted(tiny_run, tmp_path_factory):
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("interpret") / "fsm")
    train(folder.parent / "other", "--seed", "1")
    interpret(
        [
            "--run",
            str(folder),
            "--compare",
            str(folder.parent / "other"),
            "--figures",
            str(folder.parent / "figures"),
        ]
    )
    return folder


def test_every_figure_has_its_name(interpreted, capsys):
    result = json.loads((interpreted / "interpret.json").read_text())
    assert result["purity"].keys() == {"bigram", "trigram"} and len(result["purity"]["bigram"]) == 2
    assert result["detectors"].keys() == {
        "code_precision",
        "neuron_precision",
        "code_wins",
        "states_with_code",
    }
    assert (
        result["seeds"].keys() == {"with", "mean_iou", "chance"}
        and result["seeds"]["mean_iou"] > result["seeds"]["chance"]
    )
    assert result["control"]["all"]["first"].keys() >= {"control", "jsd", "kl"}
    assert (
        result["usage"]["mlp.0"]["codes"] == 32
        and 0 <= result["usage"]["mlp.0"]["dead_code_fraction"] < 1
    )
    interpret(["--run", str(interpreted), "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again == {name: value for name, value in result.items() if name != "seeds"}
    stored, tokens = (
        np.load(interpreted / "codes.npy", mmap_mode="r"),
        np.load(interpreted / "tokens.npy"),
    )
    assert stored.dtype == np.int16 and stored.shape == (512, 12, 6) and tokens.shape == (512, 12)
    figures = {path.name for path in (interpreted.parent / "figures").iterdir()}
    assert figures == {"usage.svg", "purity.svg", "detectors.svg", "control.svg"}
    assert (interpreted / "report.html").stat().st_size < 2e6


def test_search_lists_the_detectors(interpreted, capsys):
    interpret(
        ["--run", str(interpreted), "--search", " 3", "--precision", "0", "--recall", "0", "--json"]
    )
    result = json.loads(capsys.readouterr().out)
    run = load_run(interpreted)
    tokens, _ = run.data.labelled(np.random.default_rng((0, 3)), 512, 12)
    assert result["matches"] == (tokens[:, 1::2] == 3).sum() and len(result["codes"]) == 2 * (
        32 + 2 * 8
    )
    f1 = [row["f1"] for row in result["codes"]]
    assert f1 == sorted(f1, reverse=True)
    interpret(["--run", str(interpreted), "--search", " 3", "--precision", "2"])
    assert "0 codes detect it" in capsys.readouterr().out


def test_a_code_in_context(interpreted, capsys):
    run = load_run(interpreted)
    code = f"mlp.1.{run.model.codebooks()['mlp.1'].search(torch.zeros(1, 1, 16))[0, 0, 0]}"
    interpret(["--run", str(interpreted), "--code", code, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["code"] == code and len(result["contexts"]) == min(20, result["count"])
    assert (
        all(context.count("[") == 1 for context in result["contexts"]) and len(result["next"]) == 5
    )
    interpret(["--run", str(interpreted), "--code", code])
    assert f"{code} fires at {result['count']} of 6,144 positions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--run", "nowhere"], "there is no run in nowhere"),
        (["--search", "("], "'(' is not a regular expression"),
        (["--code", "mlp.1.99"], "mlp.1 has no code 99; its codes are 0 to 31"),
        (["--compare", "nowhere"], "there is no run in nowhere"),
        (["--recall", "much"], "--recall: invalid float value: 'much'"),
    ],
)
def test_bad_input_ends_in_one_line(flags, words, tiny_run, capsys):
    run = [] if "--run" in flags else ["--run", tiny_run]
    assert words in refusal(interpret, *run, *flags, capsys=capsys)


def test_runs_that_cannot_be_interpreted_or_compared(tiny_run, tmp_path, capsys):
    train(tmp_path / "dense", "--codebooks", "none", "--steps", "2")
    assert "has no codebooks" in refusal(interpret, "--run", tmp_path / "dense", capsys=capsys)
    train(tmp_path / "other", "--n-edges", "2", "--steps", "2")
    line = refusal(interpret, "--run", tiny_run, "--compare", tmp_path / "other", capsys=capsys)
    assert "are on different data" in line


@pytest.mark.parametrize(
    "flags",
    [
        ["--codebooks", "block", "--n-codes", "1"],
        ["--block-size", "5"],
        ["--codebooks", "mlp_mid", "--dense-share", "0"],
    ],
)
def test_odd_runs_are_interpreted_all_the_same(flags, tmp_path, capsys):
    train(tmp_path / "run", *flags, "--steps", "4")
    interpret(["--run", str(tmp_path / "run"), "--json"])
    control = json.loads((tmp_path / "run" / "interpret.json").read_text())["control"]
    assert "all" in control and ("all_mlp" in control) == (flags[0] == "--block-size")
    assert ("mean_difference" in control) == (flags[-1] == "1")


def test_what_goes_wrong_ends_in_one_line(interpreted, tmp_path, capsys):
    folder = shutil.copytree(interpreted, tmp_path / "run")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("codes.npy", "report.html.tmp"):  # a stranger's folder leads out of itself
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(precious)
    interpret(["--run", str(folder)])
    assert precious.read_text() == "precious"
    (folder / "dense.pt").write_bytes((folder / "dense.pt").read_bytes()[:500])
    assert "dense.pt is damaged" in refusal(interpret, "--run", folder, capsys=capsys)
    train(tmp_path / "short", "--block-size", "8", "--steps", "2")
    assert "is shorter than that of" in refusal(
        interpret, "--run", interpreted, "--compare", tmp_path / "short", capsys=capsys
    )
