"""Steering language: the codes that stand for topics and words, and what forcing them does."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_measures import by_hand
from test_sample import as_json, printed
from test_train import refusal

from minicode import force, load_run
from minicode.control import GENERATED
from minicode.interpret import main as interpret
from minicode.language import topics
from minicode.language.topics import count_mentions, expand, find_codes, held_out, mention, near
from minicode.sample import main as sample
from minicode.study.detectors import detect, record_codes
from minicode.train_text import main as train_text

SMALL = [
    "--n-layer=2", "--n-head=2", "--n-embd=16", "--block-size=32", "--n-codes-head=16", "--k=4",
    "--steps=60", "--batch-size=8", "--eval-every=60", "--device=cpu",
]  # fmt: skip


def train(folder, *flags):
    assert train_text(["--out", str(folder), *SMALL, *map(str, flags)]) == 0
    return folder


@pytest.fixture(scope="module")
def stories_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("topics") / "text")


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    documents = [
        f"The king said {word} {i} times to <script> the queen."
        for i in range(60)
        for word in ("yes", "no", "maybe", "hello", "never")
    ]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return train(folder / "run", "--data", folder / "text.txt", "--steps", "20")


def head_of(code):
    return code.rsplit(".", 1)[0]


# -- codes that stand for a topic or a word


def test_codes_of_a_label_are_twice_as_precise_as_chance():
    recording = by_hand([[0, 0, 0, 1, 1, 2, 2, 3]])
    # Code 0 is right 2 times of 3, code 1 once of 2; by chance 3 of 8.
    labels = np.array([[0, 0, -1, 0, -1, -1, -1, -1]])
    assert find_codes(recording, labels, ["x"]) == {"x": []}
    labels = np.array([[0, 0, -1, -1, -1, -1, -1, -1]])
    assert find_codes(recording, labels, ["x"]) == {"x": ["mlp.0.0"]}


def test_codes_of_topics_against_the_definition(stories_run):
    run = load_run(stories_run)
    tokens, kinds = held_out(run)
    recording = record_codes(run.model, tokens[:100])
    labels, names = kinds["topic"]
    labels = labels[:100]
    found = detect(recording, labels, names)
    number = {str(code): i for i, code in enumerate(recording.names)}
    result = find_codes(recording, labels, names)
    assert list(result) == names
    assert any(result.values())
    for i, codes in enumerate(result.values()):
        assert len(codes) <= topics.MOST
        heads = [head_of(code) for code in codes]
        assert all(heads.count(head) <= topics.PER_HEAD for head in heads)
        f1 = [found.f1[number[code], i] for code in codes]
        assert f1 == sorted(f1, reverse=True)


def test_near_a_word_by_hand():
    rows = [
        ["The", " king", " is", " dead", ",", " long", " live", " the", " King", "!"],
        ["kings", " sing", "", "", "", "", "", "", "", ""],
    ]
    labels = near(rows, mention("word:king"))
    assert labels[0].tolist() == [0] * 9 + [-1]
    assert (labels[1] == -1).all()


def test_mentions_are_counted_by_samples():
    samples = ["A dragon saw two dragons.", "Dragons!", "A dragonfly, and a king.", "kings"]
    assert count_mentions("topic:dragon", samples) == 2
    assert count_mentions("topic:royals", samples) == 2
    assert count_mentions("word:king", samples) == 1
    assert count_mentions("word:a.", samples) == 0  # a word is no pattern


# -- what texts become by them


@pytest.mark.parametrize("codes", [[], ["head.0.0.3", "head.0.0.5"]])
def test_continuations_are_those_of_the_model(codes, stories_run):
    run = load_run(stories_run)
    texts, perplexity = topics.continuations(run, codes)
    expected = []
    for seed, text in enumerate(topics.PROMPTS):
        prompt = run.data.prompt(text).repeat(topics.N_SAMPLES, 1)
        start = prompt.shape[1]
        generator = torch.Generator().manual_seed(seed)
        with force(run.model, codes, GENERATED):
            tokens = run.model.generate(prompt, 33 - start, generator=generator)
        assert texts[: len(tokens)] == [run.tokenizer.decode(row) for row in tokens[:, start:]]
        texts = texts[len(tokens) :]
        with torch.no_grad():
            log_p = run.dense(tokens[:, :-1])[0].log_softmax(-1)
        own = log_p.gather(-1, tokens[:, 1:, None])  # of token t + 1, at t
        expected.append(np.exp(-own[:, start - 1 :].mean().item()))
    assert not texts
    assert perplexity == pytest.approx(np.prod(expected) ** (1 / len(expected)), rel=1e-5)


@pytest.fixture(scope="module")
def interpreted_run(stories_run, tmp_path_factory):
    """A copy of the run, what interpret printed of it, and its steering table."""
    folder = shutil.copytree(stories_run, tmp_path_factory.mktemp("interpreted") / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topics, "N_SAMPLES", 1)
        interpret(["--run", str(folder)])
    return folder, json.loads((folder / "interpret.json").read_text())["steering"]


def test_steering_table_is_kept_with_the_run(interpreted_run):
    _, table = interpreted_run
    rows = table["topics"]
    assert len(rows) == 12
    assert {"dragon", "royals"} <= rows.keys()
    shares = {"before", "after", "random"}
    for row in rows.values():
        assert row.keys() == {*shares, "perplexity_before", "perplexity_after", "codes"}
    for share in shares:
        assert table["mean"][share] == pytest.approx(np.mean([row[share] for row in rows.values()]))
    lines = topics.describe(table).splitlines()
    assert [line.split()[0] for line in lines] == ["topic", *rows, "mean"]
    assert f"{table['mean']['after']:.1%}" in lines[-1]


def test_forced_topic_is_named_and_its_mentions_are_counted(interpreted_run, capsys):
    folder, table = interpreted_run
    run = load_run(folder)
    named = [name for name, row in table["topics"].items() if row["codes"]]
    topic = f"topic:{named[0]}"
    codes = table["topics"][named[0]]["codes"]
    assert expand(run, topic) == codes

    flags = ["--run", folder, "--prompt", "Once", "--num-samples", "3", "--force-code", topic]
    result = as_json(capsys, *flags)
    assert result["forced"] == codes
    assert len(result["samples"]) == len(result["samples_free"]) == 3
    for samples, mentions in ("samples", "mentions"), ("samples_free", "mentions_free"):
        assert result[mentions] == {topic: count_mentions(topic, result[samples])}
    out = printed(capsys, *flags)
    assert out.startswith("left alone:\n\nOnce")
    assert f"\n\n{topic} forced:\n\nOnce" in out
    forced, mentions = out.splitlines()[-2:]
    assert forced == "forced: " + " ".join(codes)
    n_free, n_forced = result["mentions_free"][topic], result["mentions"][topic]
    assert mentions == f"mentions {named[0]}: {n_free} of 3 left alone, {n_forced} of 3 forced"


def test_several_names_are_all_told_and_the_prompt_does_not_count(stories_run, capsys, monkeypatch):
    own = {
        "topic:dragon": ["head.0.0.3"],
        "word:king": ["head.0.1.5"],
        "head.1.0.2": ["head.1.0.2"],
    }
    monkeypatch.setattr("minicode.sample.expand", lambda run, text: own[text])
    asked = [flag for text in own for flag in ("--force-code", text)]
    flags = ["--run", stories_run, "--num-samples", "2", "--max-new-tokens", "1", *asked]
    flags += ["--prompt", "The dragon saw a king"]
    monkeypatch.setattr("minicode.model.GPT.generate", lambda self, tokens, *_: tokens)
    result = as_json(capsys, *flags)
    assert result["samples"] == ["The dragon saw a king"] * 2
    assert result["mentions"] == {"topic:dragon": 0, "word:king": 0}
    out = printed(capsys, *flags)
    assert "\n\ntopic:dragon word:king forced:\n\n" in out
    assert out.splitlines()[-3:] == [
        "forced: head.0.0.3 head.0.1.5 head.1.0.2",
        "mentions dragon: 0 of 2 left alone, 0 of 2 forced",
        "mentions king: 0 of 2 left alone, 0 of 2 forced",
    ]


def test_random_codes_are_as_many_and_others(stories_run, monkeypatch):
    run = load_run(stories_run)
    forced = []

    def continuations(run, codes):
        forced.append(codes)
        return ["a dragon"], 2.0

    monkeypatch.setattr(topics, "continuations", continuations)
    tokens, kinds = held_out(run)
    table = topics.steering_table(run, record_codes(run.model, tokens), *kinds["topic"])
    rows = table["topics"].values()
    assert len(forced) == 1 + 2 * len(rows)  # left alone; own codes and others, topic by topic
    for row, own, others in zip(rows, forced[1::2], forced[2::2]):
        assert own == row["codes"]
        assert len(set(others)) == len(own)
        assert not set(own) & set(others)
        assert sorted(map(head_of, own)) == sorted(map(head_of, others))
    assert table["topics"]["dragon"]["after"] == 1
    assert table["topics"]["moon"]["before"] == 0


# -- the user's own text


def test_own_text_is_interpreted_by_its_words(own_run, capsys):
    capsys.readouterr()
    interpret(["--run", str(own_run), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert "steering" not in result
    assert "purity" not in result
    assert result["best_codes"][0]["kind"] == "word"
    page = (own_run / "report.html").read_text()
    data = page.split("application/json")[1].split("</script>")[0]
    assert "<script>" not in data
    run = load_run(own_run)
    tokens, _ = held_out(run)
    labels = near(run.data.texts(tokens), mention("word:55"))
    expected = find_codes(record_codes(run.model, tokens), labels, ["55"])["55"]
    assert expand(run, "word:55") == expected != []


def test_text_in_bytes_is_found_and_shown(tmp_path, capsys):
    documents = [f"\u5929\u6c14 na\u00efve{i} \u597d" for i in range(400)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    data = ["--data", tmp_path / "text.txt"]
    folder = train(tmp_path / "run", *data, "--steps", "4", "--vocab", "257")
    run = load_run(folder)
    row = [*run.tokenizer.encode("na\u00efve"), 256]
    assert run.data.texts([row]) == [["n", "a", "", "\u00ef", "v", "e", "\n\n"]]
    interpret(["--run", str(folder), "--search", "na(\u00ef)ve", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["matches"] > 100
    interpret(["--run", str(folder)])  # a vocabulary without words
    tokens = np.fromfile(folder / "tokens.bin", "<u2")
    tokens[7] = 60_000
    tokens.tofile(folder / "tokens.bin")
    assert "does not hold the tokens of text.json" in refusal(
        interpret, "--run", folder, capsys=capsys
    )


# -- bad input


BAD_INPUT = [
    ("--force-code topic:dinosaur", "there is no topic 'dinosaur'; there are dragon, slide"),
    ("--force-code subject:dragon", "'subject:dragon' is not a code"),
    ("--force-code word:zebra", "word:zebra: no code stands for it, or it is not in the held-out"),
    ("--prompt " + "word_" * 40, "leaves room for 0 tokens"),
]


@pytest.mark.parametrize("flags, words", BAD_INPUT)
def test_bad_input_ends_in_one_line(flags, words, stories_run, capsys):
    assert words in refusal(sample, "--run", stories_run, *flags.split(), capsys=capsys)


def test_topics_of_other_runs(own_run, tiny_run, capsys):
    flags = ["--force-code", "topic:dragon"]
    line = refusal(sample, "--run", own_run, *flags, capsys=capsys)
    assert "there are none of your own text: try word:" in line
    line = refusal(sample, "--run", tiny_run, *flags, capsys=capsys)
    assert "topic:dragon: only a run on text has topics and words" in line
