"""Steering language: the codes that stand for topics and words, and what forcing them does."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_sample import as_json, printed
from test_train import refusal

from minicode import force, load_run
from minicode.control import GENERATED, Code
from minicode.interpret import main as interpret
from minicode.language import steering, topics
from minicode.language.topics import Effect, choose_codes, codes_of_topic, find_topic, places
from minicode.sample import main as sample
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


# -- topics, by their two lists of words


def test_mentions_are_counted_by_samples(stories_run):
    run = load_run(stories_run)
    samples = ["A king saw two kings.", "Kings!", "A kingdom, and a queen.", "a dragon roared"]
    for name, count in (("word:king", 1), ("words:x/king,kings", 2), ("words:king/queen", 1)):
        assert find_topic(run, name).count(samples) == count
    assert find_topic(run, "word:a.").count(samples) == 0  # a word is no pattern
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
    counting = topic.counted_by.pattern.strip("\\b()").split("|")
    assert len(counting) >= 9
    assert not any(topic.chosen_by.search(word) for word in counting)


# -- what codes do to a topic


class Windows:
    """Text of 1 to 9, in which 0 stands for the word that comes."""

    def sequences(self, rng, n, length):
        self.drawn = rng.integers(0, 10, (n, length))
        return self.drawn


def test_places_are_where_the_word_comes_for_the_first_time():
    tokens, at = places(Windows(), [0], 12, np.random.default_rng(0))
    data = Windows()
    windows = data.sequences(np.random.default_rng(0), 128, 13)
    assert len(tokens) == topics.N_TEXTS
    for row, end in zip(tokens, at.tolist()):
        assert end >= 3
        assert 0 not in row[: end + 1]
        (whole,) = [window for window in windows if (window[:-1] == row).all()]
        assert whole[end + 1] == 0
    tokens, at = places(Windows(), [10], 12, np.random.default_rng(0))
    assert len(tokens) == len(at) == 0


@pytest.fixture(scope="module")
def effect(stories_run):
    run = load_run(stories_run)
    return Effect(run, find_topic(run, "topic:dog"))


@torch.no_grad()
@pytest.mark.parametrize("codes", [[], ["head.0.0.3", "head.1.1.5"]])
def test_effects_against_their_definitions(codes, effect, stories_run):
    run = load_run(stories_run)
    with force(effect.model, codes):
        p = effect.model(effect.tokens)[0].softmax(-1)
        drawn = effect.model(effect.text)[0].softmax(-1)
    odds = []
    for row, at in enumerate(effect.at):
        chance = p[row, at, effect.words].sum().double()
        odds.append((chance / (1 - chance)).log().item())
    assert effect.log_odds(codes) == pytest.approx(np.mean(odds), rel=1e-4)
    expected = run.dense(effect.text)[0].softmax(-1)
    cross = [
        -(a * b.log()).sum().item() for a, b in zip(drawn.flatten(0, 1), expected.flatten(0, 1))
    ]
    assert effect.surprise(codes) == pytest.approx(np.mean(cross), rel=1e-4)


@pytest.mark.parametrize("codes", [[], ["head.1.0.2"]])
def test_slopes_against_differences(codes, effect):
    chosen = [Code.parse(code, effect.model) for code in codes]
    slopes = effect.slopes(chosen)
    torch.manual_seed(0)
    for site, codebook in effect.model.codebooks().items():
        step = 0.01 * torch.randn_like(slopes[site])
        if site == "head.1":
            step[..., :8] = 0  # where a forced code may stand
        with codebook.register_forward_hook(lambda _, x, out, step=step: out + step):
            more = effect.log_odds(chosen)
        with codebook.register_forward_hook(lambda _, x, out, step=step: out - step):
            less = effect.log_odds(chosen)
        if site == "head.1":  # below the last codebook, other codes may be chosen
            assert (more - less) / 2 == pytest.approx((slopes[site] * step).sum().item(), rel=0.02)
        assert slopes[site].abs().sum() > 0


def test_promising_codes_are_new_and_have_room(effect):
    codes = [f"head.1.0.{i}" for i in range(4)]  # k of them
    chosen = [Code.parse(code, effect.model) for code in codes]
    found = effect.promising(chosen)
    assert len(set(found)) == topics.N_CANDIDATES
    assert all((code.site, code.group) != ("head.1", 0) for code in found)
    found = effect.promising(chosen[:3])
    assert not set(found) & set(chosen[:3])
    # One code at a time, what they do goes with what they were thought to do.
    free = effect.log_odds([])
    best = [effect.log_odds([code]) - free for code in effect.promising([])]
    assert np.mean(best) > 0


class Known:
    """Codes of known effect: log-odds and cost, which add up."""

    GAIN = {"a": 2.0, "b": 1.0, "c": 1.5, "d": -1.0, "e": 0.1}
    COST = {"a": 0.1, "b": 0.05, "c": 0.3, "d": 0.0, "e": 0.04}

    def __init__(self, run, topic):
        pass

    def promising(self, chosen):
        return [code for code in self.GAIN if code not in chosen]

    def log_odds(self, codes):
        return -4 + sum(self.GAIN[code] for code in codes)

    def surprise(self, codes):
        return 2 + sum(self.COST[code] for code in codes)


@pytest.mark.parametrize(
    "budget, most, wanted",
    [(0.2, 9, "a b e"), (0.5, 9, "a c b e"), (9, 2, "a c"), (0.09, 9, "b e")],
)
def test_codes_are_chosen_by_their_effect_within_a_budget(budget, most, wanted, monkeypatch):
    monkeypatch.setattr(topics, "Effect", Known)
    monkeypatch.setattr(topics, "MOST", most)
    topic = topics.Topic("word:x", None, None)
    assert choose_codes(None, topic, budget + 1e-9) == wanted.split()
    with pytest.raises(ValueError, match="word:x: no code makes it more probable at a cost of 0"):
        choose_codes(None, topic, 0.001)


def test_chosen_codes_are_kept_with_the_run(stories_run, tmp_path, monkeypatch):
    folder = shutil.copytree(stories_run, tmp_path / "text")
    run = load_run(folder)
    asked = []

    def choose(run, topic, budget):
        asked.append(budget)
        return [f"head.0.0.{len(asked)}"]

    monkeypatch.setattr(topics, "choose_codes", choose)
    dog = find_topic(run, "topic:dog")
    assert codes_of_topic(run, dog) == codes_of_topic(run, dog) == ["head.0.0.1"]
    assert codes_of_topic(run, dog, 0.5) == ["head.0.0.2"]
    assert codes_of_topic(load_run(folder), dog, 0.5) == ["head.0.0.2"]
    assert asked == [topics.BUDGET, 0.5]
    train(folder, "--overwrite", "--steps", "2")
    assert not (folder / topics.CHOICES).exists()


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
    topic = find_topic(run, "words:king/queen")
    words = topic.tokens(run.tokenizer)
    assert steering.share_in_data(run, topic, words) > 0.9  # a few words later
    nowhere = find_topic(run, "words:king/zebra")
    assert steering.share_in_data(run, nowhere, words) == 0


@pytest.fixture(scope="module")
def interpreted_run(stories_run, tmp_path_factory):
    """A copy of the run, and the steering table of what interpret found there."""
    folder = shutil.copytree(stories_run, tmp_path_factory.mktemp("interpreted") / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering, "N_SAMPLES", 1)
        patch.setattr(steering, "N_RANDOM", 2)
        patch.setattr(topics, "N_CANDIDATES", 3)
        patch.setattr(topics, "MOST", 2)
        interpret(["--run", str(folder)])
    return folder, json.loads((folder / "interpret.json").read_text())["steering"]


def test_steering_table_is_kept_with_the_run(interpreted_run):
    folder, table = interpreted_run
    rows = table["topics"]
    assert len(rows) == 12
    assert {"dragon", "royals"} <= rows.keys()
    assert table["budget"] == topics.BUDGET
    shares = {*steering.WAYS, "in_data"}
    prices = {f"perplexity_{way}" for way in steering.WAYS}
    kept = json.loads((folder / topics.CHOICES).read_text())
    for name, row in rows.items():
        assert row.keys() == {*shares, *prices, "codes"}
        assert kept[f"topic:{name} {topics.BUDGET:g}"] == row["codes"] != []
    for share in shares:
        assert table["mean"][share] == pytest.approx(np.mean([row[share] for row in rows.values()]))
    lines = steering.describe(table).splitlines()
    assert [line.split()[0] for line in lines] == ["texts", *rows, "mean"]
    assert f"{table['mean']['after']:.1%}" in lines[-1]


def test_forced_topic_is_named_and_its_mentions_are_counted(interpreted_run, capsys):
    folder, table = interpreted_run
    codes = table["topics"]["dragon"]["codes"]
    flags = ["--run", folder, "--prompt", "Once", "--num-samples", "3"]
    flags += ["--force-code", "topic:dragon"]
    result = as_json(capsys, *flags)
    assert result["forced"] == codes
    assert len(result["samples"]) == len(result["samples_free"]) == 3
    dragon = find_topic(load_run(folder), "topic:dragon")
    for samples, mentions in ("samples", "mentions"), ("samples_free", "mentions_free"):
        assert result[mentions] == {"topic:dragon": dragon.count(result[samples])}
    out = printed(capsys, *flags)
    assert out.startswith("left alone:\n\nOnce")
    assert "\n\ntopic:dragon forced:\n\nOnce" in out
    forced, mentions = out.splitlines()[-2:]
    assert forced == "forced: " + " ".join(codes)
    n_free, n_forced = result["mentions_free"], result["mentions"]
    counts = (n_free["topic:dragon"], n_forced["topic:dragon"])
    assert mentions == f"about dragon: {counts[0]} of 3 left alone, {counts[1]} of 3 forced"


def test_several_names_are_all_told_and_the_prompt_does_not_count(stories_run, capsys, monkeypatch):
    own = {
        "topic:dragon": ["head.0.0.3"],
        "words:king,queen/crown": ["head.0.1.5"],
        "head.1.0.2": ["head.1.0.2"],
    }
    monkeypatch.setattr("minicode.sample.codes_of_topic", lambda run, topic, _: own[topic.name])
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
        "about dragon: 0 of 2 left alone, 0 of 2 forced",
        "about king: 0 of 2 left alone, 0 of 2 forced",
    ]


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
    twice = ["words:yes,no/maybe", "word:yes"]
    line = refusal(interpret, "--run", own_run, "--budget", 1, "--steer", *twice, capsys=capsys)
    assert "two topics begin with the same word" in line


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
    ("--force-code word:zebra", "word:zebra: none of its words is in the vocabulary of the run"),
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
