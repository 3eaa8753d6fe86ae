"""Steering language: the codes that stand for topics and words, and what forcing them does."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from test_measures import by_hand
from test_sample import as_json
from test_train import refusal

from minicode import force, load_run
from minicode.control import GENERATED
from minicode.interpret import main as interpret
from minicode.language.topics import (
    MOST,
    PER_HEAD,
    expand,
    find_codes,
    generate,
    held_out,
    near,
    perplexity_of,
    steering_table,
)
from minicode.sample import main as sample
from minicode.study.detectors import detect, record_codes
from minicode.train_text import main as train_text

SMALL = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "32", "--n-codes-head", "16", "--k", "4", "--steps", "60", "--batch-size", "8", "--eval-every", "60", "--device", "cpu"]


@pytest.fixture(scope="module")
def stories_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("topics") / "text"
    assert train_text(["--out", str(folder), *SMALL]) == 0
    return folder


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "text.txt").write_text(
        "\n\n".join(
            f"The king said {word} {i} times to <script> the queen."
            for i in range(60)
            for word in ["yes", "no", "maybe", "hello", "never"]
        )
    )
    assert (
        train_text(
            [
                "--out",
                str(folder / "run"),
                "--data",
                str(folder / "text.txt"),
                *SMALL,
                "--steps",
                "20",
            ]
        )
        == 0
    )
    return folder / "run"


def test_codes_of_a_label_are_twice_as_precise_as_chance():
    recording = by_hand([[0, 0, 0, 1, 1, 2, 2, 3]])
    recording.model.codebooks = lambda real=recording.model.codebooks(): {
        "mlp.0": type("C", (), {"n_codes": 4, "k": 2})
    }
    labels = np.array(
        [[0, 0, -1, 0, -1, -1, -1, -1]]
    )  # code 0: 2 of 3, code 1: 1 of 2, and 3 of 8 by chance
    assert find_codes(recording, labels, ["x"]) == {"x": []}  # none is twice as precise as chance
    labels = np.array([[0, 0, -1, -1, -1, -1, -1, -1]])
    assert find_codes(recording, labels, ["x"]) == {"x": ["mlp.0.0"]}


def test_codes_of_topics_against_the_definition(stories_run):
    run = load_run(stories_run)
    tokens, kinds = held_out(run)
    recording = record_codes(run.model, tokens[:100])
    labels, names = kinds["topic"][0][:100], kinds["topic"][1]
    found = detect(recording, labels, names)
    for i, (name, codes) in enumerate(find_codes(recording, labels, names).items()):
        assert name == names[i] and len(codes) <= MOST
        heads = [code.rsplit(".", 1)[0] for code in codes]
        assert all(heads.count(head) <= min(PER_HEAD, 4) for head in heads)
        f1 = [found.f1[list(map(str, recording.names)).index(code), i] for code in codes]
        assert f1 == sorted(f1, reverse=True)


def test_near_a_word_by_hand():
    rows = [
        ["The", " king", " is", " dead", ",", " long", " live", " the", " King", "!"],
        ["kings", " sing", "", "", "", "", "", "", "", ""],
    ]
    labels = near(rows, "king")
    assert labels[0].tolist() == [0] * 9 + [-1] and (labels[1] == -1).all()


def test_perplexity_against_the_loss(stories_run):
    model, tokens = load_run(stories_run).model, torch.randint(0, 255, (3, 20))
    with torch.no_grad():
        logits = model(tokens)[0].log_softmax(-1)
    expected = [logits[i, t - 1, tokens[i, t]].item() for i in range(3) for t in range(7, 20)]
    assert perplexity_of(model, tokens, 7) == pytest.approx(np.exp(-np.mean(expected)), rel=1e-5)


def test_generation_with_no_codes_is_generation(stories_run):
    run = load_run(stories_run)
    prompt = run.data.prompt("Once upon a time").repeat(3, 1)
    samples, perplexity = generate(run, "Once upon a time", [], 3, 5, 100)
    tokens = run.model.generate(
        prompt, 33 - prompt.shape[1], generator=torch.Generator().manual_seed(5)
    )
    assert (
        samples == [run.data.tokenizer.decode(row) for row in tokens[:, prompt.shape[1] :].tolist()]
        and perplexity > 1
    )
    forced, _ = generate(run, "Once upon a time", ["head.0.0.3", "head.0.0.5"], 3, 5, 100)
    with force(run.model, ["head.0.0.3", "head.0.0.5"], GENERATED):
        tokens = run.model.generate(
            prompt, 33 - prompt.shape[1], generator=torch.Generator().manual_seed(5)
        )
    assert forced == [
        run.data.tokenizer.decode(row) for row in tokens[:, prompt.shape[1] :].tolist()
    ]


def test_steering_table_is_kept_with_the_run(stories_run, monkeypatch, capsys):
    monkeypatch.setattr(
        "minicode.interpret.topics.steering_table", lambda *args: steering_table(*args, n_samples=1)
    )
    interpret(["--run", str(stories_run)])
    out = capsys.readouterr().out
    table = json.loads((stories_run / "steering.json").read_text())
    assert table == json.loads((stories_run / "interpret.json").read_text())["steering"]
    assert len(table["topics"]) == 12 and {"dragon", "royals"} <= table["topics"].keys()
    for topic in table["topics"].values():
        assert topic.keys() == {
            "before",
            "after",
            "random",
            "perplexity_before",
            "perplexity_after",
            "codes",
        }
    assert table["mean"]["after"] == pytest.approx(
        np.mean([topic["after"] for topic in table["topics"].values()])
    )
    assert re.search(r"^dragon .*2\.5 % +65\.0 %$", out, flags=re.M) and "topic " in out
    run = load_run(stories_run)
    name = next(name for name in table["topics"] if table["topics"][name]["codes"])
    assert expand(run, f"topic:{name}") == table["topics"][name]["codes"]
    (stories_run / "steering.json").rename(stories_run / "away")
    assert (
        expand(run, f"topic:{name}") == table["topics"][name]["codes"]
    )  # found anew, and the same
    (stories_run / "away").rename(stories_run / "steering.json")
    result = as_json(
        capsys,
        "--run",
        str(stories_run),
        "--prompt",
        "Once",
        "--force-code",
        f"topic:{name}",
        "--num-samples",
        "2",
    )
    assert (
        result["forced"] == table["topics"][name]["codes"]
        and len(result["samples"]) == len(result["samples_free"]) == 2
    )
    sample(["--run", str(stories_run), "--list-topics"])
    assert capsys.readouterr().out.split() == list(table["topics"])


def test_own_text_is_interpreted_by_its_words(own_run, capsys):
    interpret(["--run", str(own_run), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (
        "steering" not in result
        and "purity" not in result
        and result["best_codes"][0]["kind"] == "word"
    )
    assert (
        "<script>"
        not in (own_run / "report.html")
        .read_text()
        .split("application/json")[1]
        .split("</script>")[0]
    )
    run = load_run(own_run)
    tokens, _ = held_out(run)
    labels = near(run.data.texts(tokens), "55")
    assert (
        expand(run, "word:55")
        == find_codes(record_codes(run.model, tokens), labels, ["55"])["55"]
        != []
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--force-code", "topic:dinosaur"],
            "there is no topic 'dinosaur'; there are dragon, slide",
        ),
        (
            ["--force-code", "subject:dragon"],
            "'subject:dragon' is no code; on a run of text, topic:NAME and word:WORD are too",
        ),
        (["--force-code", "word:zebra"], "word:zebra: it does not occur in the held-out text"),
        (["--prompt", "word " * 40], "leaves room for 0 more"),
    ],
)
def test_bad_input_ends_in_one_line(flags, words, stories_run, capsys):
    assert words in refusal(sample, "--run", stories_run, *flags, capsys=capsys)


def test_topics_of_other_runs(own_run, tiny_run, capsys):
    assert "your own text has none: try word:" in refusal(
        sample, "--run", own_run, "--force-code", "topic:dragon", capsys=capsys
    )
    assert "'topic:dragon' is no code" in refusal(
        sample, "--run", tiny_run, "--force-code", "topic:dragon", capsys=capsys
    )
    sample(["--run", str(tiny_run), "--list-topics"])
    assert "has no topics" in capsys.readouterr().out


def test_random_codes_are_as_many_and_others(stories_run, monkeypatch):
    run, forced = load_run(stories_run), []
    monkeypatch.setattr(
        "minicode.language.topics.generate",
        lambda run, prompt, codes, *more: forced.append(list(codes)) or (["a dragon"], 2.0),
    )
    tokens, kinds = held_out(run)
    table = steering_table(run, record_codes(run.model, tokens), *kinds["topic"])
    forced = forced[::4]  # of four prompts
    for topic, own, others in zip(table["topics"].values(), forced[1::2], forced[2::2]):
        assert own == topic["codes"] and len(set(others)) == len(own) and not set(own) & set(others)
        assert sorted(code.rsplit(".", 1)[0] for code in own) == sorted(
            code.rsplit(".", 1)[0] for code in others
        )
    assert table["topics"]["dragon"]["after"] == 1 and table["topics"]["moon"]["before"] == 0


def test_damaged_and_stale_steering(stories_run, tmp_path, capsys):
    folder = shutil.copytree(stories_run, tmp_path / "run")
    for content in ("{}", "[]", '{"topics": {"dragon": {"codes": 5}}}', "[" * 100_000):
        (folder / "steering.json").write_text(content)
        assert "steering.json is damaged" in refusal(
            sample, "--run", folder, "--force-code", "topic:dragon", capsys=capsys
        )
    (folder / "summary.json").unlink()  # unfinished: what was found belongs to other weights
    assert (
        train_text(["--out", str(folder), *SMALL, "--resume"]) == 0
        and not (folder / "steering.json").exists()
    )


def test_text_in_bytes_is_found_and_shown(tmp_path, capsys):
    text = "\n\n".join(f"\u5929\u6c14 na\u00efve{i} \u597d" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    flags = [*SMALL, "--steps", "4", "--vocab", "257"]
    assert (
        train_text(["--out", str(tmp_path / "run"), "--data", str(tmp_path / "text.txt"), *flags])
        == 0
    )
    run = load_run(tmp_path / "run")
    row = [*run.data.tokenizer.encode("na\u00efve"), 256]
    assert run.data.texts([row]) == [["n", "a", "", "\u00ef", "v", "e", "\n\n"]]
    interpret(["--run", str(tmp_path / "run"), "--search", "na(\u00ef)ve", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["matches"] > 100
    interpret(["--run", str(tmp_path / "run")])  # a vocabulary without words
    tokens = np.fromfile(tmp_path / "run" / "tokens.bin", "<u2")
    tokens[7] = 60_000
    tokens.tofile(tmp_path / "run" / "tokens.bin")
    assert "beyond the vocabulary of 257" in refusal(
        interpret, "--run", tmp_path / "run", capsys=capsys
    )
