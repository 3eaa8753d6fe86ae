"""python -m minicode.sample, as a user calls it."""

import json

import pytest
import torch
from test_train import refusal, train

from minicode import load_run
from minicode.codebook import codebooks
from minicode.sample import main as sample
from minicode.study.machine import control, copy_codes, pairs


def as_json(capsys, *arguments):
    capsys.readouterr()
    sample([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def printed(capsys, *arguments):
    capsys.readouterr()
    sample([*map(str, arguments)])
    return capsys.readouterr().out


def test_samples_start_with_the_prompt_and_repeat_with_the_seed(tiny_run, capsys):
    flags = ["--run", tiny_run, "--prompt", "31", "--num-samples", "4"]
    result = as_json(capsys, *flags)
    assert result == as_json(capsys, *flags)
    assert result["prompt"] == "31"
    assert result["forced"] == []
    assert len(result["samples"]) == 4
    assert all(text.startswith("31 -") for text in result["samples"])
    assert printed(capsys, *flags).splitlines() == result["samples"]
    assert as_json(capsys, *flags, "--seed", 2**63 - 1)["samples"] != result["samples"]
    most_probable = as_json(capsys, *flags, "--temperature", "0")["samples"]
    assert len(set(most_probable)) == 1


def test_forced_and_blocked_codes_are_reported_and_act(tiny_run, capsys):
    flags = ["--run", tiny_run, "--prompt", "31", "--temperature", "0", "--num-samples", "1"]
    outcomes = set(as_json(capsys, *flags)["samples"])
    for code in range(32):
        forced = f"mlp.1.{code}"
        result = as_json(capsys, *flags, "--force-code", forced, "--block-code", "mlp.0.3")
        assert result["forced"] == [forced]
        assert result["blocked"] == ["mlp.0.3"]
        outcomes.add(result["samples"][0])
    assert len(outcomes) > 2


def test_codes_without_a_position_act_where_tokens_are_generated(tiny_run, monkeypatch):
    run = load_run(tiny_run)
    codebook = codebooks(run.model)["mlp.1"]
    chosen = {}

    def keep(*_):
        for i, position in enumerate(run.model.positions.number[0].tolist()):
            chosen[position] = codebook.ids[0, i].item()

    codebook.register_forward_hook(keep)
    monkeypatch.setattr("minicode.sample.load_run", lambda folder: run)
    flags = ["--run", str(tiny_run), "--prompt", "3102", "--max-new-tokens", "4"]
    sample([*flags, "--force-code", "mlp.1.9"])
    assert chosen.keys() == set(range(8))
    assert [chosen[position] for position in range(4, 8)] == [9] * 4
    before = [chosen[position] for position in range(4)]
    sample(flags)
    assert [chosen[position] for position in range(4)] == before


def test_demonstration(tiny_run, capsys):
    flags = ["--run", tiny_run, "--prompt", "31", "--force-code"]
    result = as_json(capsys, *flags)
    assert result["prompt"] == "31"
    assert result["state"] != "31"
    assert len(result["forced"]) == 2 * 3  # layers; two heads and an MLP
    assert all(code.endswith("@2") for code in result["forced"])
    assert all(text.startswith("31 -") for text in result["samples"] + result["samples_free"])
    fsm = load_run(tiny_run).fsm
    model = load_run(tiny_run).model
    a, b = pairs(fsm)
    every_site = ["head.0", "mlp.0", "head.1", "mlp.1"]
    for name, sites in ("control_before", []), ("control_after", every_site):
        generator = torch.Generator().manual_seed(0)
        expected = control(fsm, model, fsm.runs(a), b, copy_codes(model, sites), generator)
        assert result[name] == expected["control"]
    assert f"{result['control_after']:.3f}  every site forced" in printed(capsys, *flags)


def test_demonstration_says_whether_the_run_has_learnt(tiny_run, capsys, monkeypatch):
    flags = ["--run", tiny_run, "--force-code"]
    for accuracy, warned in (0.12, True), (0.899, True), (0.9, False), (0.99, False):
        monkeypatch.setattr(
            "minicode.study.machine.transition_accuracy", lambda *_, share=accuracy: share
        )
        before_the_table = printed(capsys, *flags).split("left alone")[0]
        warning = f"\nThis run has not learnt its machine: transition accuracy {accuracy:.3f}.\n"
        assert (warning in before_the_table) == warned
        assert ("has not learnt" in before_the_table) == warned


def test_newest_run_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refusal(sample, capsys=capsys)
    assert "there is no run in runs/ yet: python -m minicode.train_fsm makes one" in line
    train(tmp_path / "runs" / "one", "--steps", "2")
    train(tmp_path / "runs" / "two", "--steps", "2", "--codebooks", "none")
    torch.save(torch.load("runs/two/model.pt", weights_only=True), "runs/two/model.pt")
    capsys.readouterr()
    sample([])
    assert capsys.readouterr().err == "of the newest run, runs/two:\n"
    line = refusal(sample, "--force-code", capsys=capsys)
    assert "has no codebooks, or they were not started yet" in line


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit):
        sample(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--force-code [CODE] keep a code active, or those of a topic or of words" in out
    assert "--block-code CODE never choose this code" in out
    assert "--list-topics" not in out


NOWHERE = "there is no run in nowhere: python -m minicode.train_fsm --out nowhere makes one"
BAD_INPUT = [
    ("--run nowhere", NOWHERE),
    ("--force-code mlp.1.32", "mlp.1 has no code 32; its codes are 0 to 31"),
    ("--force-code attn.1.3", "this model has no codebook at attn.1; it has them at head.0, mlp.0"),
    ("--force-code mlp-1-3", "as in mlp.1.527@4"),
    (
        "--block-code mlp.1.3@11 --max-new-tokens 4",
        "mlp.1.3@11 had no effect: no input has a position",
    ),
    ("--force-code mlp.1.3 --force-code mlp.1.4", "mlp.1.4: at most 1 codes can be forced at a"),
    ("--force-code mlp.1.3 --force-code", "goes with no other code"),
    ("--block-code mlp.1.3 --force-code", "goes with no other code"),
    ("--prompt 4x", "is not a list of states"),
    ("--prompt 313", "is not a list of states"),
    ("--prompt " + "31" * 7, "the prompt leaves room for 0 tokens, not for 1"),
    ("--prompt 31 --max-new-tokens 11", "the prompt leaves room for 10 tokens, not for 11"),
    ("--temperature -1", "temperature must be at least 0"),
    ("--temperature nan", "temperature must be at least 0"),
    ("--num-samples 1000000000000", "num_samples must be below 10001, not 1000000000000"),
    ("--num-samples 0", "num_samples must be at least 1"),
    ("--max-new-tokens 0", "max_new_tokens must be at least 1"),
    ("--top-k 0", "top_k must be at least 1"),
    ("--seed -1", "seed must be at least 0, not -1"),
    (f"--seed {2**63}", f"seed must be below {2**63}, not {2**63}"),
    (f"--seed {2**63} --force-code", f"seed must be below {2**63}, not {2**63}"),
    ("--temperature inf", "temperature must be below 1e+38, not inf"),
    (f"--num-samples {10**30}", "num_samples must be below 10001"),
    (f"--max-new-tokens {10**30}", "max_new_tokens must be below 9223372036854775808"),
    (f"--top-k {10**30}", "top_k must be below 9223372036854775808"),
    ("--budget nan", "budget must be at least 0, not nan"),
    ("--budget inf", "budget must be below 1e+38, not inf"),
    ("--force-code mlp.1." + "9" * 5000, "is not a code"),
    ("--force-code mlp." + "9" * 5000 + ".1", "this model has no codebook at mlp.9"),
    ("--force-code head.0." + "9" * 5000 + ".1", "this model has no codebook at head.0.9"),
]


@pytest.mark.parametrize("flags, words", BAD_INPUT)
def test_bad_input_ends_in_one_line(flags, words, tiny_run, capsys):
    run = [] if "--run" in flags else ["--run", tiny_run]
    assert words in refusal(sample, *run, *flags.split(), capsys=capsys)
