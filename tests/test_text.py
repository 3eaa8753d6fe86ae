"""Language: the tokenizer, the stories and their ground truth, the user's own text, training and sampling on both."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from test_sample import as_json
from test_train import refusal, same

from minicode import load_run
from minicode import train as training
from minicode.language import text
from minicode.language.stories import Stories, stories
from minicode.language.text import SEPARATOR, Text, Tokenizer, split_file
from minicode.runtime.runs import write
from minicode.sample import main as sample
from minicode.train_text import main as train_text

TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "24", "--n-codes-head", "16", "--k", "2", "--steps", "30", "--batch-size", "4", "--eval-every", "15", "--checkpoint-every", "10", "--device", "cpu"]
HOSTILE = [
    "", " ", "a", "  two   runs of spaces  ", "\n\n\n", "a\r\nb\r\n\r\nc", "\0\0 a\0b", "tabs\t\tand\x0b\x0c\x1c\x85\u2028\u2029",
    "e\u0301 a\u0308\u0323 \u0301alone", "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u0645\u0631\u062d\u0628\u0627",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308", "\u6f22\u5b57\u304b\u306a", "\ufeffbom", "\u00a0\u3000",
    "\ud800 alone", "\udfff\ud800", "\ud83d\ude00", "x" * 50_000, " said" * 3 + "said  said", "_under_score __", "it's 3.14, 1,000!?",
    "".join(map(chr, range(0x250))), "".join(chr(i) for i in range(0, 0x110000, 97)), bytes(range(256)).decode("latin-1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def story_text():
    return Text()


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    """A text of 60 stories; the first 4 stand once more at its end, among those that are held out."""
    lines = [" ".join(sentence for sentence, _ in stories().story(i)) for i in range(60)]
    path = tmp_path_factory.mktemp("own") / "own.txt"
    path.write_text("\n\n".join(lines + lines[:4]) + "\n")
    return path


@pytest.fixture(scope="module")
def story_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "text"
    assert train_text(["--out", str(folder), *TINY]) == 0
    return folder


# -- the tokenizer


@pytest.mark.parametrize("string", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_is_lost(string, story_text):
    for tokenizer in (
        story_text.tokenizer,
        Tokenizer([]),
        Tokenizer(["  ", "\r\n", " \u05e9\u05dc\u05d5\u05dd", "a", "\ufeff"]),
    ):
        tokens = tokenizer.encode(string)
        assert tokenizer.decode(tokens) == string and SEPARATOR not in tokens
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)


def test_nothing_is_lost_of_random_strings(story_text):
    rng = np.random.default_rng(0)
    alphabet = [
        " ",
        "\n",
        "said",
        " the",
        "a",
        ".",
        "\u0301",
        "\u200d",
        "\U0001f600",
        "\ud800",
        "\0",
        "_",
        "9",
        "\r",
    ]
    for _ in range(500):
        string = "".join(rng.choice(alphabet, size=rng.integers(1, 30)))
        assert story_text.tokenizer.decode(story_text.tokenizer.encode(string)) == string


def test_words_are_single_tokens_and_the_rest_is_bytes():
    tokenizer = Tokenizer([" dragon", "The"])
    assert (
        tokenizer.encode("The dragon roars") == [258, 257, *b" roars"]
        and tokenizer.vocab_size == 259
    )
    assert (
        tokenizer.decode([SEPARATOR, 258, 257, 0xFF, 0x80]) == "\n\nThe dragon\ufffd\ufffd"
    )  # which no text encodes to


# -- the stories


def test_a_story_follows_from_its_number():
    assert Stories().story(7) == stories().story(7) != stories().story(8)
    many = [tuple(stories().story(i)) for i in range(3000)]
    assert len(set(many)) == 3000


def test_grammar_has_topics_and_patterns():
    grammar = stories()
    assert (
        len(grammar.topics) >= 12
        and {"dragon", "slide", "friend", "flower", "fire", "royals", "baby"}
        <= grammar.topics.keys()
    )
    for _, *parts in grammar.topics.values():
        patterns = sum(parts, [])
        assert len(set(patterns)) == len(patterns) >= 20
    assert len(grammar.shared) >= 20 and len(grammar.moods) >= 4
    pieces = re.split(r"[{}|()]", "".join(grammar.openings + grammar.about))
    assert not any(
        mention.search(piece) for mention in grammar.mention.values() for piece in pieces
    )


def test_stories_keep_to_their_topics_and_are_well_formed():
    grammar, seen, two = stories(), Counter(), 0
    for number in range(2000):
        story = grammar.story(number)
        topics = {topic for _, topic in story} - {None}
        two += len(topics) == 2
        before = None
        for sentence, topic in story:
            mentioned = {
                name for name, mention in grammar.mention.items() if mention.search(sentence)
            }
            assert mentioned <= ({topic} if topic else set()), (sentence, topic)
            assert re.fullmatch(r"[A-Z\"][^{}()|]*[.!?]\"?", sentence) and "  " not in sentence
            assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", sentence)
            assert topic == before or topic in mentioned  # a topic comes in by its name
            before = topic
            seen.update(mentioned)
        assert topics and topics == {topic for _, topic in story[-4:]} | topics
    assert 0.08 < two / 2000 < 0.17 and min(seen[topic] for topic in grammar.topics) > 500


def test_names_and_pronouns_agree():
    grammar = stories()
    for number in range(300):
        story = " ".join(sentence for sentence, _ in grammar.story(number))
        people = [(name, kind) for name, kind in grammar.people if re.search(rf"\b{name}\b", story)]
        assert 1 <= len(people) <= 2
        if len({kind[1] for _, kind in people}) == 1 and len(people) == 2:
            she, he = (
                re.search(r"\b(she|her)\b", story, re.I),
                re.search(r"\b(he|him|his)\b", story, re.I),
            )
            assert not (he if people[0][1][1] == "she" else she), story


def test_labels_are_the_topic_that_came_in_last(story_text):
    tokens, labels = story_text.labelled(np.random.default_rng(0), 60, 200)
    ids, names = labels["topic"]
    assert (
        ids.shape == tokens.shape
        and names == list(stories().topics)
        and set(ids.ravel()) == {-1, *range(len(names))}
    )
    assert (ids[tokens == SEPARATOR] == -1).all()
    assert (tokens == story_text.held_out(np.random.default_rng(0), 60, 200)).all()
    stream, ids = tokens.ravel(), ids.ravel()
    for topic, name in enumerate(names):
        word = story_text.tokenizer.ids[{"royals": " castle"}.get(name, f" {name}")]
        where = ids[stream == word]
        assert len(where) and (where == topic).all()


def test_stories_that_are_held_out_are_never_trained_on(story_text, monkeypatch):
    numbers, real = [], Stories.story
    monkeypatch.setattr(
        Stories, "story", lambda self, number: numbers.append(number) or real(self, number)
    )
    story_text.sequences(np.random.default_rng(0), 100, 129)
    assert len(numbers) > 50 and not any(number % 10 == 0 for number in numbers)
    numbers.clear()
    story_text.held_out(np.random.default_rng(0), 100, 129)
    assert len(numbers) > 50 and all(number % 10 == 0 for number in numbers)


def test_loss_of_a_unigram_model(story_text):
    tokens = story_text.sequences(np.random.default_rng(1), 300, 128).ravel()
    held_out = story_text.held_out(np.random.default_rng(1), 300, 128).ravel()
    p = (np.bincount(tokens, minlength=story_text.vocab_size) + 1) / (
        len(tokens) + story_text.vocab_size
    )
    assert story_text.loss_unigram == pytest.approx(-np.log(p[held_out]).mean(), abs=0.05)


# -- one's own text


def tokens_of(folder, *paths, vocab=500):
    own = Text([str(path) for path in paths], vocab)
    folder.mkdir()
    for name, content in own.files().items():
        write(folder / name, content)
    own.settle(folder)
    return own, [part.tolist() for part in own.parts]


def test_own_text_is_split_and_repeats_do_not_leak(own_file, tmp_path):
    own, (train, held_out) = tokens_of(tmp_path / "a", own_file)
    documents = own_file.read_text().strip().split("\n\n")
    text, rest = own.tokenizer.decode(train), own.tokenizer.decode(held_out)
    assert (
        text + rest == "\n\n".join(documents[:60]) + "\n\n"
    )  # the four that are repeated are nowhere twice
    assert (
        rest
        and 0.03 < len(rest) / len(text) < 0.15
        and own.vocab_size == 500
        and own.n_tokens == [len(train), len(held_out)]
    )
    assert not {*text.split("\n\n")} & {*rest.split("\n\n")} - {""}
    windows = own.held_out(np.random.default_rng(0), 50, 20)
    assert windows.shape == (50, 20) and windows.dtype == np.int64
    assert all(str(window)[1:-1] in str(held_out) for window in windows.tolist())
    assert all(
        str(window)[1:-1] in str(train)
        for window in own.sequences(np.random.default_rng(0), 50, 20).tolist()
    )
    tokens, kinds = own.labelled(np.random.default_rng(0), 9, 20)
    (word, names), (after, _) = kinds["word"], kinds["after"]
    assert (
        kinds.keys() == {"word", "after"}
        and (after[:, 1:] == word[:, :-1]).all()
        and (after[:, 0] == -1).all()
    )
    for token, label in zip(tokens.flat, word.flat):
        assert label == -1 or own.vocabulary[token].strip() == names[label]


def test_documents_are_cut_where_they_are_too_long_and_nothing_is_lost(
    own_file, tmp_path, monkeypatch
):
    odd = (
        "\u00e4\u6f22\U0001f600 word\nline\r\n\r\n\n\nmore\n \n\n\n\n" * 30
        + "\u6f22" * 400
        + "\n"
        + "w " * 900
        + "\n\nend\r\n"
    )
    (tmp_path / "odd.txt").write_bytes(odd.encode())
    monkeypatch.setattr(text, "LONGEST", 300)
    documents = list(split_file(tmp_path / "odd.txt"))
    assert max(len(document) for _, document in documents) <= 300
    assert all(
        document.decode() and odd.encode()[start:].startswith(document)
        for start, document in documents
        if document
    )
    assert re.sub(r"\r?\n\r?\n", "", odd).encode() == re.sub(
        rb"\r?\n\r?\n", b"", b"".join(document for _, document in documents)
    )
    own, parts = tokens_of(tmp_path / "a", own_file, tmp_path / "odd.txt")
    assert "\u6f22" * 50 in own.tokenizer.decode(sum(parts, []))


def test_a_vocabulary_beyond_16_bits(own_file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Text,
        "__post_init__",
        lambda self, real=Text.__post_init__: (real(self), setattr(self, "vocab_size", 70_000)),
    )
    one = tokens_of(tmp_path / "a", own_file)[1]
    monkeypatch.undo()
    assert tokens_of(tmp_path / "b", own_file)[1] == one
    assert (tmp_path / "a" / "tokens.bin").stat().st_size == 2 * (
        tmp_path / "b" / "tokens.bin"
    ).stat().st_size


def test_a_folder_is_its_files(own_file, tmp_path):
    (tmp_path / "in" / ".git").mkdir(parents=True)
    (tmp_path / "in" / ".git" / "index").write_bytes(b"\0")
    half = len(own_file.read_text()) // 2
    (tmp_path / "in" / "a.txt").write_text(own_file.read_text()[:half])
    (tmp_path / "in" / "b.md").write_text(own_file.read_text()[half:])
    folder = tokens_of(tmp_path / "x", tmp_path / "in")
    assert folder == tokens_of(tmp_path / "y", tmp_path / "in" / "a.txt", tmp_path / "in" / "b.md")
    assert folder[0] != Text([str(tmp_path / "in" / "a.txt")], 500)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "there is no file or folder"),
        (b"", "there is no text, not a byte"),
        (b"\n\n \n\n", "too little text"),
        (b"Hello.", "too little text: 0 tokens to train on"),
        (b"one two three four\n\n" * 40, "too little text"),
        (b"word \n\n" * 9 + b"w\n\nx\n\nyz\n\n", "block_size (24) must be at most"),
        (b"a" * 5000 + b"\0", "is no text: there is a zero byte at offset 5000"),
        (
            "caf\u00e9 ".encode("latin-1") * 3000,
            "is not UTF-8: byte 0xe9 at offset 3 (invalid continuation byte)",
        ),
        (b"abc \n\n" * 2000 + b"\xff\xfe", "is not UTF-8: byte 0xff at offset 12000"),
        ("UTF-16".encode("utf-16"), "is no text: there is a zero byte at offset 3"),
    ],
)
def test_bad_text_ends_in_one_line(content, words, story_run, tmp_path, capsys):
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    assert words in refusal(
        train_text, "--out", tmp_path / "run", *TINY, "--data", path, capsys=capsys
    )
    assert not (tmp_path / "run").exists()


# -- training, and sampling


def test_run_on_stories(story_run):
    run = load_run(story_run)
    assert run.data == Text() and run.tokenizer.decode(run.data.prompt("Once")[0]) == "\n\nOnce"
    summary, dense = run.summary, run.summary["dense"]
    assert dense["step"] == 15 and summary["loss_unigram"] == run.data.loss_unigram
    for figures in (summary, dense):
        assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))
        assert 1.3 < figures["bits_per_byte"] < 2.9 and 0 < figures["accuracy"] < 1
    assert 0 <= summary["dead_code_fraction"] < 1 and summary["sites"].keys() == {"head.0"}
    assert training.evaluate(run.model, run.data, 0, 1024).items() <= summary.items()


def test_bits_per_byte_count_every_byte(story_text):
    tokens = story_text.held_out(np.random.default_rng(0), 3, 50)
    n_bytes = sum(len(story_text.tokenizer.decode(row[1:]).encode()) for row in tokens)
    figures = story_text.measures(None, 0, tokens, 2.0)
    assert figures["bits_per_byte"] == pytest.approx(2.0 * 3 * 49 / np.log(2) / n_bytes)


def test_resumed_run_ends_as_the_unbroken_one(own_file, tmp_path, monkeypatch, capsys):
    flags = [
        *TINY,
        "--data",
        str(own_file),
        "--vocab",
        "400",
        "--codebooks",
        "head,mlp",
        "--n-codes",
        "16",
    ]
    assert train_text(["--out", str(tmp_path / "a"), *flags]) == 0
    table = capsys.readouterr().out
    assert re.search(r"this run +dense, step 15 +unigram\n", table) and re.search(
        r"\ngain_kept +-?\d", table
    )
    real = training.train_step

    def dies(model, forward, optimizer, config, step, data):
        if step == 26:
            raise KeyError("killed")
        return real(model, forward, optimizer, config, step, data)

    monkeypatch.setattr(training, "train_step", dies)
    with pytest.raises(KeyError, match="killed"):
        train_text(["--out", str(tmp_path / "b"), *flags])
    monkeypatch.undo()
    assert train_text(["--out", str(tmp_path / "b"), *flags, "--resume"]) == 0
    one, other = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in "ab")
    assert same(one, other)
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (
        tmp_path / "b" / "metrics.jsonl"
    ).read_bytes()
    changed = tmp_path / "changed.txt"
    changed.write_text(own_file.read_text().replace("dragon", "lizard"))
    line = refusal(
        train_text, "--out", tmp_path / "b", *flags, "--data", changed, "--resume", capsys=capsys
    )
    assert "other settings than these (repeat its flags): its data" in line or "vocab_size" in line


def test_a_run_needs_its_text_no_more(own_file, tmp_path, capsys):
    path = tmp_path / "own.txt"
    path.write_bytes(own_file.read_bytes())
    folder = tmp_path / "run"
    assert train_text(["--out", str(folder), *TINY, "--data", str(path), "--steps", "2"]) == 0
    path.unlink()
    run = load_run(folder)
    assert training.evaluate(run.model, run.data, 0, 1024)["loss"] == run.summary["loss"]
    assert as_json(capsys, "--run", str(folder), "--prompt", "Once", "--max-new-tokens", "5")[
        "samples"
    ][0].startswith("Once")
    tokens = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(tokens[:-2])
    assert "tokens.bin is damaged" in refusal(sample, "--run", folder, capsys=capsys)
    (folder / "tokens.bin").unlink()
    assert "tokens.bin is damaged" in refusal(sample, "--run", folder, capsys=capsys)


def test_samples_with_codes_and_without(story_run, capsys):
    flags = [
        "--run",
        str(story_run),
        "--prompt",
        "Once upon a time",
        "--num-samples",
        "2",
        "--max-new-tokens",
        "8",
    ]
    free = as_json(capsys, *flags)
    assert free == as_json(capsys, *flags) and all(
        text.startswith("Once upon a time") for text in free["samples"]
    )
    outcomes = set()
    for code in range(8):
        result = as_json(
            capsys, *flags, "--force-code", f"head.0.1.{code}", "--block-code", "head.0.0.3"
        )
        assert result["forced"] == [f"head.0.1.{code}"]
        outcomes.add(tuple(result["samples"]))
    assert len(outcomes) > 1
    sample(flags)
    assert capsys.readouterr().out == "\n\n---\n\n".join(free["samples"]) + "\n"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--force-code"], "a bare --force-code is the demonstration on TokFSM"),
        (["--force-code", "mlp.0.1"], "this model has no codebook at mlp.0; it has them at head.0"),
        (["--prompt", "Once " * 40], "leaves room for 0 more in the block of 24"),
        (
            ["--prompt", "Once", "--max-new-tokens", "24"],
            "leaves room for 23 more in the block of 24, not for 24",
        ),
    ],
)
def test_bad_samples_end_in_one_line(flags, words, story_run, capsys):
    assert words in refusal(sample, "--run", story_run, *flags, capsys=capsys)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--vocab", "3"], "vocab must be at least 257"),
        (["--data"], "expected at least one argument"),
    ],
)
def test_bad_flags_end_in_one_line(flags, words, tmp_path, capsys):
    assert words in refusal(train_text, "--out", tmp_path / "run", *TINY, *flags, capsys=capsys)


def test_damaged_text_json_is_refused(story_run, tmp_path, capsys):
    saved = json.loads((story_run / "text.json").read_text())
    for name in ("config.json", "model.pt"):
        (tmp_path / name).write_bytes((story_run / name).read_bytes())
    for damage in ({"pieces": 3}, {"pieces": [3]}, {"more": 1}, {"pieces": saved["pieces"][:-1]}):
        (tmp_path / "text.json").write_text(json.dumps({**saved, **damage}))
        assert "text.json is damaged" in refusal(sample, "--run", tmp_path, capsys=capsys)
