"""Steering language: the codes that stand for topics and words, and what forcing them does."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import train_small_text
from test_sample import as_json, printed
from test_train import refusal

from minicode import force, load_run
from minicode.control import GENERATED
from minicode.interpret import main as interpret
from minicode.language import steering, topics
from minicode.language.topics import Effect, choose_codes, codes_of_topics, find_topic
from minicode.notation import Code
from minicode.sample import main as sample
from minicode.study.detectors import detect


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    documents = [
        f"The king said {word} {i} times to <script> the queen."
        for i in range(60)
        for word in ("yes", "no", "maybe", "hello", "never")
    ]
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return train_small_text(folder / "run", "--data", folder / "text.txt", "--steps", "20")


def head_of(code):
    return code.rsplit(".", 1)[0]


# -- topics, by their two lists of words


def test_mentions_are_counted_by_samples(stories_run):
    run = load_run(stories_run)
    samples = ["A king saw two kings.", "Kings!", "A kingdom, and a queen.", "a dragon roared"]
    for name, count in (("word:king", 1), ("words:a/king,kings", 2), ("words:king/queen", 1)):
        assert find_topic(run, name).count(samples) == count
    assert find_topic(run, "words:king/a.").count(samples) == 0  # a word is no pattern
    assert find_topic(run, "words:king/Kings!,(").count([*samples, "a ( b"]) == 2
    dragon = find_topic(run, "topic:dragon")
    assert dragon.count(samples) == 1  # by the roar: not by the word that its codes are chosen by
    assert dragon.title == "dragon"
    assert find_topic(run, "words:king,queen/crown").title == "king"


def test_tokens_of_a_topic_are_its_whole_words(stories_run):
    run = load_run(stories_run)
    tokens = find_topic(run, "topic:dragon").tokens(run.tokenizer)
    words = {run.tokenizer.decode([token]).strip().lower() for token in tokens}
    assert words == {"dragon", "dragons"}
    own = find_topic(run, "words:KING,queen").tokens(run.tokenizer)
    assert {run.tokenizer.decode([token]).strip().lower() for token in own} == {"king", "queen"}
    royals = find_topic(run, "topic:royals")
    assert not royals.counted_by.search("The king, the queen and a princess in a castle")


@pytest.mark.parametrize("topic", ["dragon", "royals", "rain"])
def test_a_story_is_counted_by_words_that_its_codes_are_not_chosen_by(topic, stories_run):
    topic = find_topic(load_run(stories_run), f"topic:{topic}")
    counting = re.findall(r"\w\w+", topic.counted_by.pattern)
    assert len(counting) >= 9
    assert not any(topic.chosen_by.search(word) for word in counting)


# -- what codes do to a topic


@pytest.fixture(scope="module")
def effect(stories_run):
    return Effect(load_run(stories_run))


def test_places_are_near_the_words_and_their_tokens_pull(effect):
    topic = find_topic(effect.run, "topic:dog")
    words = topic.tokens(effect.run.tokenizer)
    near = effect.places(topic)
    for row, there in list(zip(effect.tokens, near))[:200]:
        at = np.flatnonzero(np.isin(row, words))
        distance = np.abs(np.arange(len(row))[:, None] - at).min(1, initial=99)
        assert ((distance <= topics.NEAR) == there).all()
    pull = effect.pull_of(topic)
    share = near.mean()
    for token in (words[0], effect.tokens[near][7]):
        n_here = (effect.tokens[near] == token).sum()
        n = (effect.tokens == token).sum()
        wanted = np.log((n_here + 20 * share) / (n + 20) / share)
        if not topic.counted_by.search(effect.run.data.vocabulary[token]):
            assert pull[token] == pytest.approx(wanted, abs=1e-5)
    assert pull[words[0]] > 0
    # The words by which texts are counted take no part in the choice.
    counted = effect.run.tokenizer.ids[" leash"]
    assert pull[counted] == 0
    assert effect.pull_of(find_topic(effect.run, "word:leash"))[counted] > 0


@torch.no_grad()
@pytest.mark.parametrize("codes", [[], ["head.0.0.3", "head.1.1.5"]])
def test_effects_against_their_definitions(codes, effect):
    model = effect.run.model
    with force(model, codes):
        wanted = model(effect.tried)[0].softmax(-1)
    p = effect.after(codes)
    assert torch.equal(p, wanted)
    expected = effect.run.dense(effect.tried)[0].softmax(-1)
    cross = [-(a * b.log()).sum().item() for a, b in zip(p.flatten(0, 1), expected.flatten(0, 1))]
    assert effect.surprise(p) == pytest.approx(np.mean(cross), rel=1e-4)


def test_codes_that_are_tried_detect_the_places(effect):
    topic = find_topic(effect.run, "topic:dog")
    names = effect.near(topic)
    assert len(set(names)) == 5 * topics.N_CANDIDATES
    labels = np.where(effect.places(topic)[: len(effect.recording.tokens)], 0, -1)
    f1 = detect(effect.recording, labels, ["dog"]).f1[:, 0]
    number = {str(code): i for i, code in enumerate(effect.recording.names)}
    order = [f1[number[name]] for name in names]
    assert order == sorted(order, reverse=True)
    assert order[0] == f1.max()


def test_no_more_codes_of_a_head_than_k(effect):
    candidates = [f"head.0.1.{i}" for i in range(6)] + ["head.1.1.3"]
    assert effect.with_room(candidates, candidates[:3]) == candidates  # k is 4
    assert effect.with_room(candidates[4:], candidates[:4]) == ["head.1.1.3"]


class Known:
    """Codes of known effect: pull and surprise, which add up."""

    PULL = {"a": 2.0, "b": 1.0, "c": 1.5, "d": -1.0, "e": 0.1}
    COST = {"a": 0.1, "b": 0.05, "c": 0.3, "d": 0.0, "e": 0.04}

    def pull_of(self, topic):
        return torch.ones(1)

    def near(self, topic):
        return list(self.PULL)

    def with_room(self, candidates, chosen):
        return list(candidates)

    def after(self, codes):
        self.codes = codes
        return torch.tensor([sum((self.PULL[code] for code in codes), 0.0)])

    def surprise(self, p):
        return 2 + sum(self.COST[code] for code in self.codes)


@pytest.mark.parametrize(
    "budget, most, wanted",
    [(0.2, 9, "a b e"), (0.5, 9, "a c b e"), (9, 2, "a c"), (0.09, 9, "b e")],
)
def test_codes_are_chosen_by_their_effect_within_a_budget(budget, most, wanted, monkeypatch):
    monkeypatch.setattr(topics, "MOST", most)
    topic = topics.Topic("word:x", None, None)
    assert choose_codes(Known(), topic, budget + 1e-9) == wanted.split()
    assert choose_codes(Known(), topic, 0.001) == []


def test_a_topic_that_is_never_told_of_has_no_codes(effect):
    nowhere = topics.Topic("word:x", re.compile("zebra"), re.compile("zebra"))
    assert choose_codes(effect, nowhere, 1.0) == []


def test_chosen_codes_are_kept_with_the_run(stories_run, tmp_path, monkeypatch):
    folder = shutil.copytree(stories_run, tmp_path / "text")
    asked = []

    def choose(effect, topic, budget):
        asked.append(budget)
        return [f"head.0.0.{len(asked)}"]

    def codes(budget):
        run = load_run(folder)
        dog = find_topic(run, "topic:dog")
        return codes_of_topics(run, [dog], budget)[dog]

    monkeypatch.setattr(topics, "choose_codes", choose)
    assert codes(0.1) == codes(0.1) == ["head.0.0.1"]
    assert codes(0.5) == ["head.0.0.2"]
    assert codes(0.5) == ["head.0.0.2"]
    path = folder / topics.CHOICES
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**kept, "stamp": 0}), encoding="utf-8")  # of another model
    assert codes(0.5) == ["head.0.0.3"]
    for damaged in (5, "abc", [5], [["a"]], ["head.0.0.1@0"], ["mlp.9.4"], None, {"head.0.0.1": 1}):
        path.write_text(json.dumps({**kept, "codes": {"topic:dog 0.5": damaged}}), encoding="utf-8")
        with pytest.raises(ValueError, match="steering.json is damaged"):
            codes(0.5)
    train_small_text(folder, "--overwrite", "--steps", "2")
    assert not path.exists()


# -- what texts become by them


@pytest.mark.parametrize("codes", [[], ["head.0.0.3", "head.0.0.5"]])
def test_continuations_are_those_of_the_model(codes, stories_run):
    run = load_run(stories_run)
    texts, perplexity = steering.continuations(run, codes)
    expected = []
    for seed, text in enumerate(steering.PROMPTS):
        prompt = run.data.prompt(text).repeat(steering.N_SAMPLES, 1)
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


def test_the_baseline_adds_to_the_logits_of_words(stories_run, monkeypatch):
    run = load_run(stories_run)
    monkeypatch.setattr(steering, "BIAS", 1000.0)
    words = find_topic(run, "words:dog").tokens(run.tokenizer)
    texts, _ = steering.continuations(run, [], words)
    assert all(set(text.lower().split()) == {"dog"} for text in texts)
    assert steering.continuations(run, []) == steering.continuations(run, [], [])


def test_random_codes_are_as_many_others_that_cost_as_much(stories_run):
    run = load_run(stories_run)
    codes = ["head.0.0.3", "head.0.0.5", "head.1.1.2"]

    class Costs:
        tried = []

        def after(self, forced):
            return forced

        def surprise(self, forced):
            cost = sum(Code.parse(code, run.model).id for code in forced)
            if forced != codes:
                self.tried.append((abs(cost - 10), forced))
            return cost

    others = steering.random_codes(run, Costs(), codes, np.random.default_rng(0))
    assert len(Costs.tried) == steering.N_RANDOM
    assert (min(cost for cost, _ in Costs.tried), others) in Costs.tried
    for _, forced in Costs.tried:
        assert len({*forced, *codes}) == 6
        assert list(map(head_of, forced)) == list(map(head_of, codes))


def test_the_share_in_the_data_is_of_texts_behind_the_words(own_run):
    run = load_run(own_run)
    queen, zebra = (find_topic(run, f"words:king/{word}") for word in ("queen", "zebra"))
    nowhere = topics.Topic("word:zebra", re.compile("zebra"), queen.counted_by)
    shares = steering.shares_in_data(run, [queen, zebra, nowhere])
    assert shares[queen] > 0.9  # a few words later
    assert shares[zebra] == 0
    assert shares[nowhere] is None
    assert steering.shares_in_data(run, [queen]) == {queen: shares[queen]}


@pytest.fixture(scope="module")
def interpreted_run(stories_run, tmp_path_factory):
    """A copy of the run, and the steering table of what interpret found there."""
    folder = shutil.copytree(stories_run, tmp_path_factory.mktemp("interpreted") / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering, "N_SAMPLES", 1)
        patch.setattr(steering, "N_RANDOM", 2)
        patch.setattr(steering, "shares_in_data", partial(steering.shares_in_data, most=32))
        patch.setattr(topics, "N_CANDIDATES", 3)
        patch.setattr(topics, "MOST", 2)
        interpret(["--run", str(folder)])
    return folder, json.loads((folder / "interpret.json").read_text(encoding="utf-8"))["steering"]


def test_steering_table_is_kept_with_the_run(interpreted_run):
    folder, table = interpreted_run
    rows = table["topics"]
    assert len(rows) == 12
    assert {"dragon", "royals"} <= rows.keys()
    assert table["budget"] == topics.BUDGET
    shares = {*steering.WAYS, "in_data"}
    prices = {f"perplexity_{way}" for way in steering.WAYS}
    kept = json.loads((folder / topics.CHOICES).read_text(encoding="utf-8"))
    for name, row in rows.items():
        assert row.keys() == {*shares, *prices, "codes"}
        assert kept["codes"][f"topic:{name} {topics.BUDGET:g}"] == row["codes"]
    assert any(row["codes"] for row in rows.values())
    for share in shares:
        assert table["mean"][share] == pytest.approx(np.mean([row[share] for row in rows.values()]))
    lines = steering.describe(table).splitlines()
    assert [line.split()[0] for line in lines] == ["texts", *rows, "mean"]
    assert f"{table['mean']['after']:.1%}" in lines[-1]


def test_forced_topic_is_named_and_its_mentions_are_counted(interpreted_run, capsys):
    folder, table = interpreted_run
    title, row = next((title, row) for title, row in table["topics"].items() if row["codes"])
    codes = row["codes"]
    name = f"topic:{title}"
    flags = ["--run", folder, "--prompt", "Once", "--num-samples", "3", "--force-code", name]
    result = as_json(capsys, *flags)
    assert result["forced"] == codes
    assert len(result["samples"]) == len(result["samples_free"]) == 3
    topic = find_topic(load_run(folder), name)
    for samples, mentions in ("samples", "mentions"), ("samples_free", "mentions_free"):
        assert result[mentions] == {name: topic.count(result[samples])}
    out = printed(capsys, *flags)
    assert out.startswith("left alone:\n\nOnce")
    assert f"\n\n{name} forced:\n\nOnce" in out
    forced, mentions = out.splitlines()[-2:]
    assert forced == "forced: " + " ".join(codes)
    n_free, n_forced = result["mentions_free"], result["mentions"]
    assert mentions == (
        f"words about {title}: {n_free[name]} of 3 left alone, {n_forced[name]} of 3 forced"
    )


def test_several_names_are_all_told_and_the_prompt_does_not_count(stories_run, capsys, monkeypatch):
    own = {
        "topic:dragon": ["head.0.0.3"],
        "words:king,queen/crown": ["head.0.1.5"],
        "head.1.0.2": ["head.1.0.2"],
    }
    monkeypatch.setattr(
        topics, "codes_of_topics", lambda run, asked, _: {topic: own[topic.name] for topic in asked}
    )
    asked = [flag for text in own for flag in ("--force-code", text)]
    flags = ["--run", stories_run, "--num-samples", "2", "--max-new-tokens", "1", *asked]
    flags += ["--prompt", "The dragon with a crown roared"]
    monkeypatch.setattr("minicode.model.GPT.generate", lambda self, tokens, *_: tokens)
    result = as_json(capsys, *flags)
    assert result["samples"] == ["The dragon with a crown roared"] * 2
    assert result["mentions"] == {"topic:dragon": 0, "words:king,queen/crown": 0}
    out = printed(capsys, *flags)
    assert "\n\ntopic:dragon words:king,queen/crown forced:\n\n" in out
    assert out.splitlines()[-3:] == [
        "forced: head.0.0.3 head.0.1.5 head.1.0.2",
        "words about dragon: 0 of 2 left alone, 0 of 2 forced",
        "words about king: 0 of 2 left alone, 0 of 2 forced",
    ]


# -- the user's own text


def test_own_text_is_interpreted_by_its_words(own_run, capsys):
    capsys.readouterr()
    interpret(["--run", str(own_run), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert "steering" not in result
    assert "purity" not in result
    assert result["best_codes"][0]["kind"] == "word"
    page = (own_run / "report.html").read_text(encoding="utf-8")
    data = page.split("application/json")[1].split("</script>")[0]
    assert "<script>" not in data


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(steering, "N_RANDOM", 2)
    monkeypatch.setattr(topics, "N_CANDIDATES", 3)
    monkeypatch.setattr(topics, "MOST", 2)


def test_own_text_is_steered_by_its_words(own_run, quick, capsys):
    asked = ["words:yes,no/maybe,hello", "word:queen"]
    interpret(["--run", str(own_run), "--budget", "1", "--json", "--steer", *asked])
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["steering"]
    assert list(table["topics"]) == ["yes", "queen"]
    assert table["budget"] == 1
    for flags, words in (
        (["--steer", "word:zebra"], "word:zebra: none of its words is in the vocabulary"),
        (["--budget", "nan"], "budget must be at least 0, not nan"),
        (["--steer", "word:yes", "--search", "yes"], "not allowed with"),
    ):
        assert words in refusal(interpret, "--run", own_run, *flags, capsys=capsys)
    twice = ["words:yes,no/maybe", "word:yes"]
    line = refusal(interpret, "--run", own_run, "--budget", 1, "--steer", *twice, capsys=capsys)
    assert "two topics begin with the same word" in line


def test_text_in_bytes_is_found_and_shown(tmp_path, capsys):
    documents = [f"\u5929\u6c14 na\u00efve{i} \u597d" for i in range(400)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    data = ["--data", tmp_path / "text.txt"]
    folder = train_small_text(tmp_path / "run", *data, "--steps", "4", "--vocab", "257")
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
    ("--force-code word:zebra", "word:zebra: none of its words is in the vocabulary of "),
    ("--force-code words:dog/", "words:dog/: write words:king,queen, or words:king,queen/crown"),
    ("--force-code words:a/b/c", "words:a/b/c: write words:king,queen, or"),
    ("--force-code topic:dog --budget -1", "budget must be at least 0, not -1"),
    ("--prompt " + "word_" * 40, "leaves room for 0 tokens"),
]


@pytest.mark.parametrize("flags, words", BAD_INPUT)
def test_bad_input_ends_in_one_line(flags, words, stories_run, capsys):
    assert words in refusal(sample, "--run", stories_run, *flags.split(), capsys=capsys)


def test_topics_of_other_runs(own_run, tiny_run, capsys):
    flags = ["--force-code", "topic:dragon"]
    line = refusal(sample, "--run", own_run, *flags, capsys=capsys)
    assert "there are none of your own text: try words:" in line
    line = refusal(sample, "--run", tiny_run, *flags, capsys=capsys)
    assert "topic:dragon: only a run on text has topics and words" in line
