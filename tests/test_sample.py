"""python -m minicode.sample, as a user calls it."""

import json

import pytest
import torch
from test_train import refusal, train

from minicode import load_run
from minicode.sample import main as sample
from minicode.study.machine import control, copy_codes, pairs


def as_json(capsys, *arguments):
    capsys.readouterr()
    sample([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_samples_start_with_the_prompt_and_repeat_with_the_seed(tiny_run, capsys):
    flags = ["--run", str(tiny_run), "--prompt", "31", "--num-samples", "4"]
    one, other = as_json(capsys, *flags), as_json(capsys, *flags)
    assert (
        one == other and one["prompt"] == "31" and one["forced"] == [] and len(one["samples"]) == 4
    )
    assert all(text.startswith("31 -") for text in one["samples"])
    assert one["samples"] != as_json(capsys, *flags, "--seed", "1")["samples"]
    assert len(set(as_json(capsys, *flags, "--temperature", "0")["samples"])) == 1
    sample(flags)
    assert capsys.readouterr().out.splitlines() == one["samples"]


def test_forced_and_blocked_codes_are_reported_and_act(tiny_run, capsys):
    flags = ["--run", str(tiny_run), "--prompt", "31", "--temperature", "0"]
    free = as_json(capsys, *flags)
    outcomes = set()
    for code in range(32):
        result = as_json(
            capsys,
            *flags,
            "--force-code",
            f"mlp.1.{code}",
            "--block-code",
            "mlp.0.3",
            "--num-samples",
            "1",
        )
        assert result["forced"] == [f"mlp.1.{code}"] and result["blocked"] == ["mlp.0.3"]
        outcomes.add(result["samples"][0])
    assert len(outcomes | set(free["samples"])) > 2


def test_codes_without_a_position_act_where_tokens_are_generated(tiny_run, capsys, monkeypatch):
    run, chosen = load_run(tiny_run), {}
    codebook = run.model.codebooks()["mlp.1"]
    codebook.register_forward_hook(lambda *_: chosen.update(
        {p: codebook.ids[0, i].item() for i, p in enumerate(run.model.span)}))  # fmt: skip
    monkeypatch.setattr("minicode.sample.load_run", lambda folder: run)
    sample(
        [
            "--run",
            str(tiny_run),
            "--prompt",
            "3102",
            "--max-new-tokens",
            "4",
            "--force-code",
            "mlp.1.9",
        ]
    )
    assert {p for p, code in chosen.items() if code == 9} >= {4, 5, 6, 7} and chosen.keys() == set(
        range(8)
    )
    before = [chosen[p] for p in range(4)]
    sample(["--run", str(tiny_run), "--prompt", "3102", "--max-new-tokens", "4"])
    assert [chosen[p] for p in range(4)] == before


def test_demonstration(tiny_run, capsys):
    result = as_json(capsys, "--run", str(tiny_run), "--prompt", "31", "--force-code")
    assert result["prompt"] == "31" and result["state"] != "31"
    assert len(result["forced"]) == 2 * 3 and all(code.endswith("@2") for code in result["forced"])
    assert all(text.startswith("31 -") for text in result["samples"] + result["samples_free"])
    run = load_run(tiny_run)
    a, b = pairs(run.fsm)
    for name, sites in (
        ("control_before", []),
        ("control_after", ["head.0", "mlp.0", "head.1", "mlp.1"]),
    ):
        intervene, generator = copy_codes(run.model, sites), torch.Generator().manual_seed(0)
        assert (
            result[name]
            == control(run.fsm, run.model, run.fsm.runs(a), b, intervene, generator)["control"]
        )
    sample(["--run", str(tiny_run), "--force-code"])
    assert f"{result['control_after']:.3f}  every site forced" in capsys.readouterr().out


def test_newest_run_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "there is no run in runs/ yet: python -m minicode.train_fsm makes one" in refusal(
        sample, capsys=capsys
    )
    train(tmp_path / "runs" / "one", "--steps", "2")
    train(tmp_path / "runs" / "two", "--steps", "2", "--codebooks", "none")
    torch.save(torch.load("runs/two/model.pt", weights_only=True), "runs/two/model.pt")
    sample([])
    assert capsys.readouterr().err == "of the newest run, runs/two:\n"
    assert "has no codebooks, or they were not started yet" in refusal(
        sample, "--force-code", capsys=capsys
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--run", "nowhere"],
            "there is no run in nowhere: python -m minicode.train_fsm --out nowhere makes one",
        ),
        (["--force-code", "mlp.1.32"], "mlp.1 has no code 32; its codes are 0 to 31"),
        (
            ["--force-code", "attn.1.3"],
            "this model has no codebook at attn.1; it has them at head.0, mlp.0",
        ),
        (["--force-code", "mlp-1-3"], "as in mlp.1.527@4"),
        (
            ["--block-code", "mlp.1.3@11", "--max-new-tokens", "4"],
            "mlp.1.3@11 had no effect: no input was that long",
        ),
        (
            ["--force-code", "mlp.1.3", "--force-code", "mlp.1.4"],
            "mlp.1.4: at most 1 codes can be forced at a site",
        ),
        (["--force-code", "mlp.1.3", "--force-code"], "goes with no other code"),
        (["--prompt", "4x"], "is not a list of states"),
        (["--prompt", "313"], "is not a list of states"),
        (
            ["--prompt", "31" * 7],
            "a prompt of 15 tokens leaves room for 0 more in the block of 12, not for 1",
        ),
        (
            ["--prompt", "31", "--max-new-tokens", "11"],
            "leaves room for 10 more in the block of 12, not for 11",
        ),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--temperature", "nan"], "--temperature must be at least 0"),
        (["--num-samples", "0"], "--num-samples must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_line(flags, words, tiny_run, capsys):
    run = [] if "--run" in flags else ["--run", tiny_run]
    assert words in refusal(sample, *run, *flags, capsys=capsys)
