"""The ablations: each idea changes what it says it changes, and leaves the Codebook as it was."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_train import refusal

from minicode import Codebook, ablate
from minicode.ablate import main
from minicode.interpret import main as interpret
from minicode.study import detectors, ideas, study


def test_rotation_hands_on_q_and_turns_the_gradient():
    torch.manual_seed(0)
    a = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    q = torch.randn(5, 8, dtype=torch.float64)
    grad = torch.randn(5, 8, dtype=torch.float64)
    out = ideas.rotation(None, a, q)
    out.backward(grad)
    torch.testing.assert_close(out, q)
    for i in range(5):
        one_q = q[i]
        one_a = a[i].detach()
        matrix = torch.autograd.functional.jacobian(
            lambda x, one_q=one_q: ideas.rotation(None, x, one_q), one_a
        )
        # It takes a to q, and keeps angles: its columns are orthogonal, of one length.
        torch.testing.assert_close(matrix @ one_a, one_q)
        length = one_q.norm() / one_a.norm()
        identity = torch.eye(8, dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.T, length**2 * identity)
        torch.testing.assert_close(a.grad[i], matrix.T @ grad[i])


def test_random_inputs_are_inputs():
    book = Codebook(6, 4, groups=2)
    x = torch.randn(50, 8)
    ideas.start_at_random(book, x)
    inputs = x.view(50, 2, 4)
    for group in range(2):
        for code in book.codes[group]:
            assert (inputs[:, group] == code).all(1).any()


ROWS = [(table, idea) for table in ideas.TABLES.values() for idea in table.rows]


def test_what_is_replaced_or_compared_are_rows_and_of_codebook():
    for table in ideas.TABLES.values():
        assert table.rows.keys() >= table.theirs.keys()
    assert {idea for _, idea in ROWS} >= ideas.REPLACED.keys()
    for methods in ideas.REPLACED.values():
        for name in methods:
            assert hasattr(Codebook, name)


@pytest.mark.parametrize("table, idea", ROWS, ids=lambda part: part if type(part) is str else "")
def test_the_flags_of_an_idea_are_flags(table, idea, tmp_path, capsys):
    flags = ["--out", str(tmp_path), *table.rows[idea].split(), "--steps", "0"]
    assert "steps must be at least 1" in refusal(
        ablate.COMMANDS[table.command], *flags, capsys=capsys
    )


SMALL = (
    "--n-states 16 --n-edges 3 --base 4 --n-layer 1 --n-head 2 --n-embd 16 --block-size 12 "
    "--n-codes 32 --n-codes-head 8"
)


def test_a_table_with_a_method_replaced_is_made_once(tmp_path, monkeypatch, capsys):
    used = []
    before = Codebook.start

    def start(self, inputs, generator=None):
        used.append(self)
        before(self, inputs, generator=generator)

    monkeypatch.setitem(ideas.FSM.rows, "a small one", SMALL)
    monkeypatch.setitem(ideas.REPLACED, "a small one", {"start": start})
    flags = ["--out", str(tmp_path), "--seeds", "1", "--steps", "2", "--only", "a small one"]
    main(flags)
    assert len(used) == 2  # head and mlp of one layer
    assert Codebook.start is before
    head, rule, row = capsys.readouterr().out.rstrip().splitlines()[-3:]
    assert head == "| idea | loss | transition accuracy | dead code fraction | control mlp |"
    assert rule == "| --- | --- | --- | --- | --- |"
    path = tmp_path / "fsm" / "a-small-one-0" / "answers.json"
    figures = json.loads(path.read_bytes())["training"]
    assert row.startswith(f"| a small one `{SMALL}` | {figures['loss']:.3f} | ")
    assert 0 <= figures["control_mlp"] <= 1
    assert figures["step"] == 2

    weights = path.with_name("model.pt").stat()
    main(flags)
    assert capsys.readouterr().out.rstrip().splitlines()[-3:] == [head, rule, row]
    assert path.with_name("model.pt").stat() == weights  # it is not trained again
    flags[flags.index("2")] = "3"
    assert "has other settings" in refusal(main, *flags, capsys=capsys)


def test_codes_are_interpreted_in_a_second_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detectors, "N_SEQUENCES", 16)
    monkeypatch.setattr(study, "control_study", partial(study.control_study, n_pairs=5))
    rows = {"small": SMALL, "dense": f"{SMALL} --codebooks none"}
    monkeypatch.setitem(ideas.TABLES, "results", replace(ideas.RESULTS, rows=rows))
    main(["results", "--out", str(tmp_path), "--seeds", "2", "--steps", "4"])
    lines = capsys.readouterr().out.splitlines()
    found = []
    for seed in range(2):
        folder = tmp_path / "results" / f"small-{seed}"
        found.append(json.loads((folder / "interpret.json").read_bytes()))
    precisions = [one["detectors"]["code_precision"] for one in found]
    controls = [one["control"]["all"]["inside"]["control"] for one in found]
    second = lines[lines.index("| `interpret ` | small | dense |") :]
    for name, values in (
        ("detectors code precision", precisions),
        ("control all inside control", controls),
    ):
        cell = f"{sum(values) / 2:.3f} ({min(values):.3f} to {max(values):.3f})"
        assert f"| {name} | {cell} | - |" in second
    folders = [str(tmp_path / "results" / f"small-{seed}") for seed in (1, 0)]
    asked = f"--compare {folders[1]}"
    third = second[second.index(f"| `interpret {asked}` | small | dense |".replace("_", " ")) :]
    shared = interpret(["--run", folders[0], *asked.split()])["mean_iou"]
    assert f"| mean iou | {shared:.3f} | - |" in third  # of seed 1 with seed 0


def test_each_question_is_asked_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detectors, "N_SEQUENCES", 16)
    monkeypatch.setitem(ideas.TABLES, "results", replace(ideas.RESULTS, rows={"small": SMALL}))
    flags = ["results", "--out", str(tmp_path), "--seeds", "2", "--steps", "4"]
    search = "--search '(0|1) 2' --recall 0"
    main([*flags, "--interpret", search])
    capsys.readouterr()
    asked = []

    def ask(argv):
        asked.append(argv[2:])
        return interpret(argv)

    monkeypatch.setattr(ablate, "interpret", ask)
    codes = [f"--code mlp.0.{i}" for i in range(2)]
    flags += [flag for question in (search, *codes) for flag in ("--interpret", question)]
    main(flags)
    assert asked == 2 * [question.split() for question in codes]
    last = capsys.readouterr().out.split("| `interpret ")[1:]
    assert [table.split("`")[0] for table in last] == [
        search, *codes, f"--compare {tmp_path}/results/small-0".replace("_", " ")
    ]  # fmt: skip
    for i, table in enumerate(last[1:3]):
        kept = [
            json.loads((tmp_path / "results" / f"small-{seed}" / "answers.json").read_bytes())
            for seed in range(2)
        ]
        counts = [one[codes[i]]["count"] for one in kept]
        assert f"| count | {sum(counts) / 2:.3f} ({min(counts):.3f} to " in table


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ideas.FSM.rows, "small", SMALL)
    flags = ["--out", str(tmp_path), "--seeds", "1", "--steps", "4", "--only", "small"]
    train = ablate.COMMANDS["train_fsm"]
    stopped = f"--steps 4 --eval-every 1 --seed 0 {SMALL}".split()
    folder = tmp_path / "fsm" / "small-0"
    with monkeypatch.context() as patch:
        patch.setattr("minicode.train.processes.stopping", lambda device: True)
        assert train(["--out", str(folder), *stopped]) == 130
    assert "step     1" in capsys.readouterr().out
    main(flags)
    out = capsys.readouterr().out
    assert "step     1" not in out and "step     4" in out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--only", "magic"], "there is no idea 'magic'; there are: the default"),
        (["magic"], "invalid choice: 'magic'"),
        (["--data", "x.txt"], "--data goes with the tables text and language alone"),
        (["--interpret", "--code mlp.0.1"], "--interpret goes with the tables results and"),
        (["results", "--interpret", "--serch x"], "unrecognized arguments: --serch x"),
        (["results", "--interpret", "--search 'x"], "No closing quotation"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--steps", "0"], "must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_line(flags, words, tmp_path, capsys):
    assert words in refusal(main, "--out", str(tmp_path), *flags, capsys=capsys)


def test_the_paper_stands_beside_its_table(tmp_path, monkeypatch, capsys):
    answers = {"training": {"loss": 1.2, "accuracy": 0.46}}
    monkeypatch.setattr(ablate, "answers", lambda *args: answers)
    main(["paper", "--out", str(tmp_path), "--only", "no codebooks", "--seeds", "2"])
    lines = capsys.readouterr().out.splitlines()
    mean = "1.200 (1.200 to 1.200) | 0.460 (0.460 to 0.460)"
    assert lines[2] == f"| no codebooks `--codebooks none` | {mean} | - | - |"
    assert lines[3] == "| no codebooks: the paper's | 1.179 | 0.464 | 0.968 | - |"
