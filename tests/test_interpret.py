"""The command interpret, as a user calls it."""

import json
import shutil
import xml.etree.ElementTree as ET
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model
from test_train import refusal, train

from minicode import load_run
from minicode.codebook import codebooks
from minicode.interpret import main as interpret
from minicode.study import machine, study
from minicode.study.detectors import record_codes
from minicode.study.lookup import look_up
from minicode.study.picture import picture
from minicode.study.study import best_codes, tells

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module", autouse=True)
def few_pairs():
    """Control by so few pairs of states that it takes no time: its figures are not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "control_study", partial(study.control_study, n_pairs=20))
        patch.setattr(machine, "N_SEEDS", 2)
        yield


@pytest.fixture(scope="module")
def interpreted(tiny_run, tmp_path_factory):
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("interpret") / "fsm")
    interpret(["--run", str(folder), "--figures", str(folder.parent / "figures")])
    return folder


def as_json(capsys, *flags):
    capsys.readouterr()
    interpret([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def test_every_figure_has_its_name(interpreted, capsys):
    result = json.loads((interpreted / "interpret.json").read_text(encoding="utf-8"))
    assert result["purity"].keys() == {"bigram", "trigram"}
    assert len(result["purity"]["bigram"]) == 2
    names = {"code_precision", "neuron_precision", "code_wins", "states_with_code"}
    assert result["detectors"].keys() == names
    assert result["control"]["all"]["first"].keys() >= {"control", "jsd"}
    assert result["usage"]["mlp.0"]["codes"] == 32
    assert 0 <= result["usage"]["mlp.0"]["dead_code_fraction"] < 1
    assert as_json(capsys, "--run", interpreted) == result
    assert (interpreted / "report.html").stat().st_size < 2e6


def test_the_control_chart_says_in_words_what_is_forced(interpreted):
    figures = interpreted.parent / "figures"
    assert {path.name for path in figures.iterdir()} == {"detectors.svg", "control.svg"}
    texts = [text.text for text in ET.parse(figures / "control.svg").iter(SVG + "text")]
    words = ["codes of b, all sites", "codes of b, all MLPs", "codes of b at mlp.1 only"]
    words += ["random codes", "codes of a wrong state", "no codes (left alone)"]
    assert set(words) <= set(texts)
    assert not {"all_mlp", "first", "random_code"} & set(texts)


def test_a_chart_whose_points_all_level_is_not_on_the_page():
    level = [(0.2, 1.0, "a"), (0.9, 0.95, "b")]
    assert not tells("detectors", level)
    assert tells("detectors", [*level, (0.5, 0.5, "c")])
    assert tells("control", level)


def test_a_run_that_has_not_learnt_the_machine_is_told_of(interpreted, tmp_path, capsys):
    shutil.copytree(interpreted, tmp_path / "run")
    summary = json.loads((interpreted / "summary.json").read_text(encoding="utf-8"))
    for accuracy, told in ((0.5, True), (0.95, False)):
        changed = {**summary, "transition_accuracy": accuracy}
        (tmp_path / "run" / "summary.json").write_text(json.dumps(changed), encoding="utf-8")
        interpret(["--run", str(tmp_path / "run"), "--search", "3"])
        told_of = capsys.readouterr().err
        assert ("has not learnt the machine (transition accuracy 0.50)" in told_of) == told


def test_search_lists_the_detectors(interpreted, capsys):
    flags = ["--run", interpreted, "--search", " 3", "--precision", "0", "--recall", "0"]
    result = as_json(capsys, *flags)
    run = load_run(interpreted)
    tokens, _ = run.data.labelled(np.random.default_rng((0, 3)), 512, 12)
    assert result["matches"] == (tokens[:, 1::2] == 3).sum()
    assert len(result["codes"]) == 2 * (32 + 2 * 8)
    f1 = [row["f1"] for row in result["codes"]]
    assert f1 == sorted(f1, reverse=True)
    assert result["closest"] == result["codes"][:3]


def test_search_without_hits_shows_what_came_close(interpreted, capsys):
    flags = ["--run", interpreted, "--search", " 3", "--precision", "2"]
    result = as_json(capsys, *flags)
    assert result["codes"] == []
    assert len(result["closest"]) == 3
    interpret([*map(str, flags)])
    about, _, *rows = capsys.readouterr().out.splitlines()
    assert "6,144 held-out tokens" in about
    assert "0 codes detect it" in about
    assert [row.split()[0] for row in rows] == [row["code"] for row in result["closest"]]
    assert all("below" in row for row in rows)
    interpret(["--run", str(interpreted), "--search", "never there"])
    assert "occurs 0 times" in capsys.readouterr().out


def test_a_code_in_context(interpreted, capsys):
    run = load_run(interpreted)
    code = f"mlp.1.{codebooks(run.model)['mlp.1'].search(torch.zeros(1, 1, 16))[0, 0, 0]}"
    result = as_json(capsys, "--run", interpreted, "--code", code)
    assert result["code"] == code
    assert len(result["contexts"]) == min(20, result["count"])
    assert all(context.count("[") == 1 for context in result["contexts"])
    assert len(result["next"]) == 5
    interpret(["--run", str(interpreted), "--code", code])
    assert f"{code} fires at {result['count']} of 6,144 positions" in capsys.readouterr().out


def test_a_label_that_does_not_fit_is_not_what_a_code_stands_for(interpreted):
    run = load_run(interpreted)
    tokens, _ = run.data.labelled(np.random.default_rng(0), 16, 12)
    recording = record_codes(run.model, tokens)
    number = int(recording.count.argmax())
    fires = np.zeros(tokens.size, dtype=bool)
    fires[recording.where[number]] = True
    exactly = np.where(fires, 0, -1).reshape(tokens.shape)
    once = np.full(tokens.size, -1)
    once[recording.where[number][0]] = 0
    for labels, fits in ((exactly, True), (once.reshape(tokens.shape), False)):
        kinds = {"made": (labels, ["up"])}
        result, text = look_up(run, recording, kinds, recording.names[number])
        assert result["fits"] == fits
        assert ("stands for made up" in text) == fits
        assert ("no label fits; nearest: made up" in text) != fits


def test_the_best_codes_are_of_different_labels():
    model = make_model("mlp", k=1)
    recording = record_codes(model, np.zeros((1, 4), dtype=np.int64))
    labels = [None] * len(recording.names)
    recording.count = np.ones(len(labels), dtype=int)
    for number in range(12):
        labels[number] = ("state", f"{number // 2}", 1.0, 1.0, 1.0)
    labels[20] = ("digit", "7", 1.0, 0.94, 0.97)
    labels[21] = ("digit", "8", 0.6, 0.6, 0.6)
    labels[32] = ("state", "5", 1.0, 1.0, 1.0)  # of mlp.1
    recording.count[6] = 100
    rows = best_codes(recording, labels)
    first = [row["code"] for row in rows[:3]]
    assert first == ["mlp.0.6", "mlp.0.0", "mlp.0.2"]
    assert [row["label"] for row in rows[-2:]] == ["7", "8"]
    assert len(rows) == len({row["label"] for row in rows}) == 8


def test_runs_are_compared_by_their_agreement_alone(interpreted, tmp_path, capsys):
    train(tmp_path / "other", "--seed", "1")
    folder = shutil.copytree(interpreted, tmp_path / "fsm")
    (folder / "interpret.json").unlink()
    result = as_json(capsys, "--run", folder, "--compare", tmp_path / "other")
    shares = {"mean_iou", "chance", "weighted_iou", "weighted_chance"}
    assert result.keys() == {"with", "labels"} | shares
    kinds = {"state", "trigram", "bigram", "digit", "digit before"}
    assert result["labels"].keys() == kinds
    assert result["mean_iou"] > result["chance"]
    assert not (folder / "interpret.json").exists()
    interpret(["--run", str(folder), "--compare", str(tmp_path / "other")])
    line = capsys.readouterr().out
    assert f"{result['mean_iou']:.3f} (by chance: {result['chance']:.3f})" in line
    (tmp_path / "link").symlink_to(folder)
    flags = ["--run", folder, "--compare", tmp_path / "link"]
    assert "is the run itself" in refusal(interpret, *flags, capsys=capsys)


def test_the_picture_shows_a_sequence_and_what_forcing_makes_of_it(interpreted, tmp_path, capsys):
    path = tmp_path / "picture.svg"
    interpret(["--run", str(interpreted), "--picture", str(path)])
    assert f"wrote {path}" in capsys.readouterr().out
    root = ET.parse(path).getroot()
    assert path.stat().st_size < 120_000
    assert root.get("width") == "720"
    assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {
        "svg",
        "title",
        "style",
        "path",
        "text",
    }
    texts = [text.text for text in root.iter(SVG + "text")]
    assert any("Left alone in state" in text for text in texts)
    assert any("the codes of state" in text for text in texts)
    assert texts.count("written by the network") == 2
    # three columns of codes, at the two digits where they are forced
    forced = [path for path in root.iter(SVG + "path") if path.get("class") == "forced filled"]
    assert len(forced) == 3 * 2
    assert "prefers-color-scheme:dark" in path.read_text(encoding="utf-8")


def test_no_picture_of_text_or_of_a_block_without_room(interpreted, tmp_path, capsys):
    train(tmp_path / "short", "--block-size", "5", "--steps", "2")
    flags = ["--run", tmp_path / "short", "--picture", tmp_path / "p.svg"]
    assert "room for three states" in refusal(interpret, *flags, capsys=capsys)
    with pytest.raises(ValueError, match="on text: minicode.sample"):
        picture(SimpleNamespace(fsm=None), None, {}, tmp_path / "p.svg")
    assert not (tmp_path / "p.svg").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--run", "nowhere"], "there is no run in nowhere"),
        (["--run", __file__], "is a file, not the folder of a run"),
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
    train(tmp_path / "short", "--block-size", "8", "--steps", "2")
    line = refusal(interpret, "--run", tiny_run, "--compare", tmp_path / "short", capsys=capsys)
    assert "12 tokens are more than the block_size of 8" in line


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
    control = json.loads((tmp_path / "run" / "interpret.json").read_text(encoding="utf-8"))[
        "control"
    ]
    assert "all" in control
    assert ("all_mlp" in control) == (flags[0] == "--block-size")
    assert ("mean_difference" in control) == (flags[-1] == "1")


def test_one_question_at_a_time_and_a_hint_where_nothing_matches(interpreted, capsys):
    flags = ["--run", interpreted, "--search", "1", "--code", "mlp.0.1"]
    assert "--code: not allowed with argument --search" in refusal(interpret, *flags, capsys=capsys)
    interpret(["--run", str(interpreted), "--search", "nothing"])
    assert "a space before each state" in capsys.readouterr().out


def test_what_goes_wrong_ends_in_one_line(interpreted, tmp_path, capsys):
    folder = shutil.copytree(interpreted, tmp_path / "run")
    precious = tmp_path / "precious"
    precious.write_text("precious", encoding="utf-8")
    for name in ("interpret.json", "report.html.tmp"):  # a stranger's folder leads out of itself
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(precious)
    interpret(["--run", str(folder)])
    assert precious.read_text(encoding="utf-8") == "precious"
    (folder / "dense.pt").write_bytes((folder / "dense.pt").read_bytes()[:500])
    assert "dense.pt is damaged" in refusal(interpret, "--run", folder, capsys=capsys)
