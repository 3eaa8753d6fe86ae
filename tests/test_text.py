"""Language: the tokenizer, the stories and their ground truth, one's own text, runs on both."""

import json
import os
import re
from collections import Counter

import numpy as np
import pytest
import torch
from test_sample import as_json, printed
from test_train import refusal, same

from minicode import load_run
from minicode import train as training
from minicode.language import documents
from minicode.language.stories import Stories, stories
from minicode.language.text import Text
from minicode.language.tokenizer import SEPARATOR, Tokenizer
from minicode.runtime.files import write
from minicode.sample import main as sample
from minicode.train_text import main as train_text

TINY = [
    "--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=24", "--n-codes-head=16", "--k=2",
    "--steps=30", "--batch-size=4", "--eval-every=15", "--checkpoint-every=10", "--device=cpu",
]  # fmt: skip
HOSTILE = [
    "", " ", "a", "  two   runs of spaces  ", "\n\n\n", "a\r\nb\r\n\r\nc", "\0\0 a\0b",
    "tabs\t\tand\x0b\x0c\x1c\x85\u2028\u2029", "e\u0301 a\u0308\u0323 \u0301alone",
    "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u0645\u0631\u062d\u0628\u0627",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "\u6f22\u5b57\u304b\u306a", "\ufeffbom", "\u00a0\u3000", "\ud800 alone", "\udfff\ud800",
    "\ud83d\ude00", "x" * 50_000, " said" * 3 + "said  said", "_under_score __",
    "it's 3.14, 1,000!?", "".join(map(chr, range(0x250))),
    "".join(chr(i) for i in range(0, 0x110000, 97)), bytes(range(256)).decode("latin-1"),
]  # fmt: skip
ALPHABET = [
    " ", "\n", "said", " the", "a", ".", "\u0301", "\u200d", "\U0001f600", "\ud800", "\0",
    "_", "9", "\r",
]  # fmt: skip


def generator(seed=0):
    return np.random.default_rng(seed)


def story_of(number):
    return " ".join(sentence for sentence, _ in stories().story(number))


def train(folder, *flags):
    assert train_text(["--out", str(folder), *TINY, *map(str, flags)]) == 0
    return folder


@pytest.fixture(scope="module")
def story_text():
    return Text()


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    """A text of 60 stories; the first 4 stand once more at its end, among those held out."""
    lines = [story_of(number) for number in range(60)]
    path = tmp_path_factory.mktemp("own") / "own.txt"
    path.write_text("\n\n".join(lines + lines[:4]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def story_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "text")


# -- the tokenizer


@pytest.mark.parametrize("string", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_is_lost(string, story_text):
    odd = Tokenizer(["  ", "\r\n", " \u05e9\u05dc\u05d5\u05dd", "a", "\ufeff"])
    for tokenizer in (story_text.tokenizer, Tokenizer([]), odd):
        tokens = tokenizer.encode(string)
        assert tokenizer.decode(tokens) == string
        assert SEPARATOR not in tokens
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)


def test_nothing_is_lost_of_random_strings(story_text):
    rng = generator()
    tokenizer = story_text.tokenizer
    for _ in range(500):
        string = "".join(rng.choice(ALPHABET, size=rng.integers(1, 30)))
        assert tokenizer.decode(tokenizer.encode(string)) == string


def test_words_are_single_tokens_and_the_rest_is_bytes():
    tokenizer = Tokenizer([" dragon", "The"])
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("The dragon roars") == [258, 257, *b" roars"]
    no_text = [SEPARATOR, 258, 257, 0xFF, 0x80]  # encodes to these
    assert tokenizer.decode(no_text) == "\n\nThe dragon\ufffd\ufffd"


# -- the stories


def test_a_story_follows_from_its_number():
    assert Stories().story(7) == stories().story(7)
    many = {tuple(stories().story(number)) for number in range(3000)}
    assert len(many) == 3000


def test_grammar_has_topics_and_patterns():
    grammar = stories()
    of_the_paper = {"dragon", "slide", "friend", "flower", "fire", "royals", "baby"}
    assert len(grammar.topics) >= 12
    assert of_the_paper <= grammar.topics.keys()
    for _, *lots in grammar.topics.values():
        patterns = sum(lots, [])
        assert len(set(patterns)) == len(patterns) >= 25
    assert len(grammar.lines["shared"]) >= 20
    assert len(grammar.moods) >= 4
    before_a_topic = "".join(grammar.lines["opening"] + grammar.lines["about"])
    pieces = re.split(r"[{}|()]", before_a_topic)
    for mention in grammar.mention.values():
        assert not any(mention.search(piece) for piece in pieces)


def test_stories_keep_to_their_topics_and_are_well_formed():
    grammar = stories()
    n_mentions = Counter()
    n_with_two = 0
    for number in range(2000):
        story = grammar.story(number)
        before = None
        for sentence, topic in story:
            mentioned = {
                name for name, mention in grammar.mention.items() if mention.search(sentence)
            }
            assert mentioned <= ({topic} if topic else set()), (sentence, topic)
            assert re.fullmatch(r"[A-Z\"][^{}()|]*[.!?]\"?", sentence)
            assert "  " not in sentence
            assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", sentence)
            assert topic == before or topic in mentioned  # a topic comes in by its name
            before = topic
            n_mentions.update(mentioned)
        topics = {topic for _, topic in story} - {None}
        assert topics >= {topic for _, topic in story[-4:]} > set()
        n_with_two += len(topics) == 2
    assert 0.08 < n_with_two / 2000 < 0.17
    assert min(n_mentions[topic] for topic in grammar.topics) > 500


def test_names_and_pronouns_agree():
    grammar = stories()
    n_alike = 0
    for number in range(300):
        story = story_of(number)
        people = [he for name, _, he, *_ in grammar.people if re.search(rf"\b{name}\b", story)]
        assert 1 <= len(people) <= 2
        pronouns = set(people)
        if len(people) == 2 and len(pronouns) == 1:
            wrong = r"\b(he|him|his)\b" if pronouns == {"she"} else r"\b(she|her)\b"
            assert not re.search(wrong, story, re.I), story
            n_alike += 1
    assert n_alike > 50


def test_labels_are_the_topic_that_came_in_last(story_text):
    tokens, kinds = story_text.labelled(generator(), 60, 200)
    labels, names = kinds["topic"]
    assert names == list(stories().topics)
    assert labels.shape == tokens.shape
    assert set(labels.ravel()) == {-1, *range(len(names))}
    assert (labels[tokens == SEPARATOR] == -1).all()
    assert (tokens == story_text.held_out(generator(), 60, 200)).all()
    for topic, name in enumerate(names):
        word = " castle" if name == "royals" else f" {name}"
        there = labels[tokens == story_text.tokenizer.ids[word]]
        assert len(there)
        assert (there == topic).all()


def test_stories_that_are_held_out_are_never_trained_on(story_text, monkeypatch):
    numbers = []
    real = Stories.story

    def story(self, number):
        numbers.append(number)
        return real(self, number)

    monkeypatch.setattr(Stories, "story", story)
    story_text.sequences(generator(), 100, 129)
    assert len(numbers) > 50
    assert all(number % 10 for number in numbers)
    numbers.clear()
    story_text.held_out(generator(), 100, 129)
    assert len(numbers) > 50
    assert not any(number % 10 for number in numbers)


def test_loss_of_a_unigram_model(story_text):
    tokens = story_text.sequences(generator(1), 300, 128).ravel()
    held_out = story_text.held_out(generator(1), 300, 128).ravel()
    counts = np.bincount(tokens, minlength=story_text.vocab_size) + 1
    p = counts / counts.sum()
    assert story_text.loss_unigram == pytest.approx(-np.log(p[held_out]).mean(), abs=0.05)


def test_bits_per_byte_count_every_byte(story_text):
    tokens = story_text.held_out(generator(), 3, 50)
    texts = [story_text.tokenizer.decode(row[1:]) for row in tokens]
    n_bytes = sum(len(text.encode()) for text in texts)
    figures = story_text.measures(tokens, 2.0)
    assert figures["bits_per_byte"] == pytest.approx(2.0 * 3 * 49 / np.log(2) / n_bytes)


# -- the user's own text


def text_in(folder, *paths):
    """The text of some paths, settled in a new folder, and the tokens of its two parts."""
    own = Text([str(path) for path in paths], vocab=500)
    folder.mkdir()
    for name, content in own.files().items():
        write(folder / name, content)
    own.settle(folder)
    train, held_out = own.parts
    return own, train.tolist(), held_out.tolist()


def test_own_text_is_split_and_repeats_do_not_leak(own_file, tmp_path):
    own, train, held_out = text_in(tmp_path / "run", own_file)
    assert own.vocab_size == 500
    assert own.n_tokens == [len(train), len(held_out)]
    stories_in_file = own_file.read_text(encoding="utf-8").strip().split("\n\n")
    text = own.tokenizer.decode(train)
    rest = own.tokenizer.decode(held_out)
    # The four that are repeated are nowhere twice.
    assert text + rest == "\n\n".join(stories_in_file[:60]) + "\n\n"
    assert 0.03 < len(rest) / len(text) < 0.15


def test_windows_of_own_text_keep_to_their_part(own_file, tmp_path):
    own, *parts = text_in(tmp_path / "run", own_file)
    for part, draw in zip(parts, (own.sequences, own.held_out)):
        windows = draw(generator(), 50, 20)
        assert windows.shape == (50, 20)
        assert windows.dtype == np.int64
        assert all(str(window)[1:-1] in str(part) for window in windows.tolist())


def test_passages_are_spread_over_what_is_held_out(own_file, tmp_path):
    own, _, held_out = text_in(tmp_path / "run", own_file)
    found = own.passages(5, 20).tolist()
    last = len(held_out) - 20
    starts = [0, last // 4, last // 2, 3 * last // 4, last]
    assert found == [held_out[start : start + 20] for start in starts]
    assert own.passages(10**6, 20).shape == (len(held_out) // 20, 20)  # there are no more


def test_labels_of_own_text_are_its_words(own_file, tmp_path):
    own, *_ = text_in(tmp_path / "run", own_file)
    tokens, kinds = own.labelled(generator(), 9, 20)
    assert kinds.keys() == {"word", "after"}
    word, names = kinds["word"]
    after, _ = kinds["after"]
    assert (after[:, 1:] == word[:, :-1]).all()
    assert (after[:, 0] == -1).all()
    known = word >= 0
    assert known.any()
    for token, label in zip(tokens[known], word[known]):
        assert own.vocabulary[token].strip() == names[label]


def test_documents_are_cut_where_they_are_too_long_and_nothing_is_lost(
    own_file, tmp_path, monkeypatch
):
    lines = "\u00e4\u6f22\U0001f600 word\nline\r\n\r\n\n\nmore\n \n\n\n\n" * 30
    long = "\u6f22" * 400 + "\n" + "w " * 900
    odd = f"{lines}{long}\n\nend\r\n".encode()
    path = tmp_path / "odd.txt"
    path.write_bytes(odd)
    monkeypatch.setattr(documents, "LONGEST", 300)
    parts = list(documents.split_file(path))
    assert max(len(part) for _, part in parts) <= 300
    for start, part in parts:
        assert odd[start:].startswith(part)
        part.decode()  # no character is cut
    blank = rb"\r?\n\r?\n"
    assert re.sub(blank, b"", b"".join(part for _, part in parts)) == re.sub(blank, b"", odd)
    own, train, held_out = text_in(tmp_path / "run", own_file, path)
    assert "\u6f22" * 50 in own.tokenizer.decode(train + held_out)


def test_a_folder_is_its_files(own_file, tmp_path):
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "index").write_bytes(b"\0")
    (folder / ".hidden").write_bytes(b"\0")
    (folder / "empty").write_bytes(b"")
    text = own_file.read_text(encoding="utf-8")
    half = len(text) // 2
    (folder / "a.txt").write_text(text[:half], encoding="utf-8")
    (folder / "b.md").write_text(text[half:], encoding="utf-8")
    one = text_in(tmp_path / "x", folder)
    assert one == text_in(tmp_path / "y", folder / "a.txt", folder / "b.md")
    assert one[0] != Text([str(folder / "a.txt")], 500)


LATIN = "caf\u00e9 ".encode("latin-1") * 3000
BAD_TEXT = [
    (None, "there is no file or folder"),
    (b"", "too little text: 0 tokens to train on, 0 held out"),
    (b"\n\n \n\n", "too little text"),
    (b"Hello.", "too little text: 0 tokens to train on"),
    (b"one two three four\n\n" * 40, "too little text"),
    (b"word \n\n" * 9 + b"w\n\nx\n\nyz\n\n", "block_size must be below"),
    (LATIN, "is not UTF-8: byte 0xe9 at offset 3 (invalid continuation byte)"),
    (b"abc \n\n" * 2000 + b"\xff\xfe", "is not UTF-8: byte 0xff at offset 12000"),
    ("UTF-16".encode("utf-16"), "is not UTF-8: byte 0xff at offset 0 (invalid start byte)"),
]


def test_a_pipe_is_refused_as_one(tmp_path, capsys):
    """As in --data <(cat file): what is read twice can't be read from it."""
    reader, writer = os.pipe()
    line = refusal(
        train_text, "--out", tmp_path / "run", "--data", f"/dev/fd/{reader}", capsys=capsys
    )
    assert f"/dev/fd/{reader} is a pipe or a device" in line
    os.close(reader)
    os.close(writer)


def test_standard_input_is_read_where_it_is_a_file(own_file):
    with open(own_file, "rb") as file:
        assert Text(data=[f"/dev/fd/{file.fileno()}"]) == Text(data=[str(own_file)])


@pytest.mark.parametrize("content, words", BAD_TEXT)
def test_bad_text_ends_in_one_line(content, words, tmp_path, capsys):
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    flags = ["--out", tmp_path / "run", *TINY, "--data", path]
    assert words in refusal(train_text, *flags, capsys=capsys)
    assert not (tmp_path / "run").exists()


# -- training, and sampling


def test_run_on_stories(story_run, story_text):
    run = load_run(story_run)
    assert run.data == story_text
    assert run.tokenizer.decode(run.data.prompt("Once")[0]) == "\n\nOnce"
    summary = run.summary
    assert summary["dense"]["step"] == 25
    assert summary["loss_unigram"] == run.data.loss_unigram
    for figures in (summary, summary["dense"]):
        assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))
        assert 1.3 < figures["bits_per_byte"] < 2.9
        assert 0 < figures["accuracy"] < 1
    assert 0 <= summary["dead_code_fraction"] < 1
    assert summary["sites"].keys() == {"head.0"}
    assert training.evaluate(run.model, run.data, 0, 1024).items() <= summary.items()


OWN = ["--vocab=400", "--codebooks=head,mlp", "--n-codes=16"]


def test_resumed_run_ends_as_the_unbroken_one(own_file, tmp_path, monkeypatch, capsys):
    flags = ["--data", own_file, *OWN]
    one = train(tmp_path / "a", *flags)
    table = capsys.readouterr().out
    assert re.search(r"this run +dense, step 25 +unigram +sites zero\n", table)
    assert re.search(r"\ngain_kept +-?\d", table)
    real = training.train_step

    def dies(model, forward, optimizer, config, step, data):
        if step == 26:
            raise KeyError("killed")
        return real(model, forward, optimizer, config, step, data)

    other = tmp_path / "b"
    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(training, "train_step", dies)
        train(other, *flags)
    train(other, *flags, "--resume")
    weights = [torch.load(folder / "model.pt", weights_only=True) for folder in (one, other)]
    assert same(*weights)
    metrics = (one / "metrics.jsonl").read_bytes()
    assert (other / "metrics.jsonl").read_bytes() == metrics


def test_changed_text_is_another_run(own_file, tmp_path, capsys):
    folder = train(tmp_path / "run", "--data", own_file, *OWN, "--steps", "2")
    changed = tmp_path / "changed.txt"
    changed.write_text(
        own_file.read_text(encoding="utf-8").replace("dragon", "lizard"), encoding="utf-8"
    )
    flags = ["--out", folder, *TINY, "--data", changed, *OWN, "--steps", "2", "--resume"]
    line = refusal(train_text, *flags, capsys=capsys)
    assert "its data" in line or "vocab_size" in line


def test_a_run_needs_its_text_no_more(own_file, tmp_path, capsys):
    path = tmp_path / "own.txt"
    path.write_bytes(own_file.read_bytes())
    folder = train(tmp_path / "run", "--data", path, "--steps", "2")
    path.unlink()
    run = load_run(folder)
    assert training.evaluate(run.model, run.data, 0, 1024)["loss"] == run.summary["loss"]
    flags = ["--run", folder, "--prompt", "Once", "--max-new-tokens", "5"]
    assert as_json(capsys, *flags)["samples"][0].startswith("Once")
    file = folder / "tokens.bin"
    tokens = file.read_bytes()
    for damaged in (tokens[:-2], tokens[:-1], tokens + tokens[:2], b""):
        file.write_bytes(damaged)
        assert "tokens.bin is damaged" in refusal(sample, "--run", folder, capsys=capsys)
    file.unlink()
    assert "tokens.bin is damaged" in refusal(sample, "--run", folder, capsys=capsys)
    file.write_bytes(tokens)
    saved = json.loads((folder / "text.json").read_text(encoding="utf-8"))
    n_train, n_held_out = saved["n_tokens"]
    for n_tokens in ([7], [7, -1], [n_train, n_held_out + 1], [float(n_train), n_held_out]):
        (folder / "text.json").write_text(
            json.dumps({**saved, "n_tokens": n_tokens}), encoding="utf-8"
        )
        assert "tokens.bin is damaged" in refusal(sample, "--run", folder, capsys=capsys)


def test_samples_with_codes_and_without(story_run, capsys):
    flags = ["--run", story_run, "--prompt", "Once upon a time"]
    flags += ["--num-samples", "2", "--max-new-tokens", "8"]
    free = as_json(capsys, *flags)
    assert free == as_json(capsys, *flags)
    assert all(text.startswith("Once upon a time") for text in free["samples"])
    assert printed(capsys, *flags) == "\n\n---\n\n".join(free["samples"]) + "\n"
    outcomes = set()
    for code in range(8):
        forced = f"head.0.1.{code}"
        result = as_json(capsys, *flags, "--force-code", forced, "--block-code", "head.0.0.3")
        assert result["forced"] == [forced]
        outcomes.add(tuple(result["samples"]))
    assert len(outcomes) > 1


BAD_SAMPLES = [
    (["--force-code"], "a bare --force-code is the demonstration on TokFSM"),
    (["--force-code", "mlp.0.1"], "this model has no codebook at mlp.0; it has them at head.0"),
    (["--prompt", "Once " * 40], "the prompt leaves room for 0 tokens"),
    (["--prompt", "Once", "--max-new-tokens", "24"], "leaves room for 23 tokens, not for 24"),
]


@pytest.mark.parametrize("flags, words", BAD_SAMPLES)
def test_bad_samples_end_in_one_line(flags, words, story_run, capsys):
    assert words in refusal(sample, "--run", story_run, *flags, capsys=capsys)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--vocab", "256"], "vocab must be at least 257, not 256"),
        (["--vocab", "65537"], "vocab must be below 65537, not 65537"),
        (["--data"], "expected at least one argument"),
    ],
)
def test_bad_flags_end_in_one_line(flags, words, tmp_path, capsys):
    assert words in refusal(train_text, "--out", tmp_path / "run", *TINY, *flags, capsys=capsys)


def test_damaged_text_json_is_refused(story_run, tmp_path, capsys):
    saved = json.loads((story_run / "text.json").read_text(encoding="utf-8"))
    for name in ("config.json", "model.pt"):
        (tmp_path / name).write_bytes((story_run / name).read_bytes())
    for damage in (
        {"pieces": 3},
        {"pieces": [3]},
        {"pieces": None},
        {"pieces": saved["pieces"][:-1]},
        {"more": 1},
        {"vocab": 2048.0},
        {"data": 3},
        {"n_tokens": 7},
        {"n_tokens": ["7", 1]},
        {"loss_unigram": "7"},
    ):
        (tmp_path / "text.json").write_text(json.dumps({**saved, **damage}), encoding="utf-8")
        assert "text.json is damaged" in refusal(sample, "--run", tmp_path, capsys=capsys)
