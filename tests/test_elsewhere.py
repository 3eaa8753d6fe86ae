"""Do the codes of the stories' topics mean the same in text that is told in another way?"""

import json
import re
from itertools import islice

import numpy as np
import pytest
from test_topics import stories_run  # noqa: F401
from test_train import refusal

from minicode import load_run
from minicode.interpret import main as interpret
from minicode.language import elsewhere
from minicode.language.stories import stories
from minicode.study.detectors import held_out, record_codes

LABELS = np.array([[-1, 0, 0, 1], [1, 1, 0, -1]])


def test_other_words_are_known_words_in_sentences_that_no_story_has():
    grammar = stories()
    told = {sentence for n in range(3000) for sentence, _ in grammar.story(n)}
    known = {word for sentence in told for word in re.findall(r"\w+", sentence)}
    topics = set()
    for number in range(300):
        (opening, first), *about = grammar.in_other_words(number)
        assert first is None
        assert len(about) == len({sentence for sentence, _ in about}) == 5
        assert len({topic for _, topic in about}) == 1
        for sentence, topic in about:
            assert sentence not in told
            assert set(re.findall(r"\w+", sentence)) <= known
            assert not any(mention.search(sentence) for mention in grammar.mention.values())
            assert re.fullmatch(r"[A-Z\"][^{}()|]*[.!?]\"?", sentence)
            topics.add(topic)
    assert topics == grammar.topics.keys()


def test_of_two_topics_the_second_alone_is_told():
    for story in islice(elsewhere.two_topics(), 50):
        told = [topic for _, topic in story]
        assert len(set(told)) == 2 and None in told
        assert told[-1] is not None
        named = {
            name for text, _ in story for name, by in stories().mention.items() if by.search(text)
        }
        assert len(named) == 2  # the first, of which nothing is asked, too


def test_measures_by_hand():
    class Recording:
        where = [np.array([0, 1, 2, 6, 7])]  # noqa: RUF012

    there, among = elsewhere.of_stories(LABELS)
    assert there.shape == (len(stories().topics), 8)
    found = elsewhere.measure(Recording, 0, there[0], among)
    # Of 6 positions with a topic 3 are of topic 0; it fires at 1, 2 and 6 of them, all right.
    assert found == {"precision": 1, "chance": 3 / 6, "recall": 1}
    found = elsewhere.measure(Recording, 0, there[1], np.ones(8, bool))
    assert found == {"precision": 0, "chance": 3 / 8, "recall": 0}


def test_a_file_is_about_a_topic_behind_its_word(stories_run, tmp_path):  # noqa: F811
    data = load_run(stories_run).data
    path = tmp_path / "text.txt"
    path.write_text(" ".join(["no", "dragon", *40 * ["no"]]), encoding="utf-8")
    n = len(data.tokenizer.encode(path.read_text(encoding="utf-8"))) // 4 * 4
    tokens, there, among = elsewhere.of_file(data, path, n)
    first = next(at for at, text in enumerate(data.texts(tokens)[0]) if text == " dragon")
    at = np.flatnonzero(there[list(stories().topics).index("dragon")])
    assert at.tolist() == [*range(first, min(n, first + elsewhere.NEAR))]
    assert there.sum() == len(at) and among.all()


def test_the_codes_are_those_of_home(stories_run, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "text.txt"
    path.write_text(
        "\n\n".join(40 * ["The king saw no dragon, and the king was sad."]), encoding="utf-8"
    )
    result = interpret(["--run", str(stories_run), "--elsewhere", str(path), "--json"])
    assert json.loads(capsys.readouterr().out) == result
    assert [*result] == ["at home", "two topics", "other words", str(path)]
    run = load_run(stories_run)
    tokens, kinds = held_out(run)
    recording = record_codes(run.model, tokens)
    labels = kinds["topic"][0].ravel()
    dragon = result["at home"]["codes"]["dragon"]
    fires = recording.where[[str(name) for name in recording.names].index(dragon["code"])]
    right = labels[fires] == run.data.topics.index("dragon")
    assert dragon["precision"] == pytest.approx(right.sum() / (labels[fires] >= 0).sum())
    assert result["other words"]["topics"] == 12
    assert result[str(path)]["codes"].keys() == {"dragon", "royals"}
    for place in result.values():
        means = [
            np.mean([row[name] for row in place["codes"].values()]) for name in elsewhere.MEASURES
        ]
        assert means == pytest.approx([place[name] for name in elsewhere.MEASURES])
        assert {row["code"] for row in place["codes"].values()} <= {
            row["code"] for row in result["at home"]["codes"].values()
        }


def test_what_cannot_be_asked_is_one_line(stories_run, tiny_run, tmp_path, capsys):  # noqa: F811
    asked = "--run", stories_run, "--elsewhere"
    path = tmp_path / "text.txt"
    assert "there is no file" in refusal(interpret, *asked, path, capsys=capsys)
    for text, words in (
        ("no topic", "has fewer than 32 tokens"),
        ("no topic " * 300, "none of the stories' topics is named often enough"),
    ):
        path.write_text(text, encoding="utf-8")
        assert words in refusal(interpret, *asked, path, capsys=capsys)
    line = refusal(interpret, "--run", tiny_run, "--elsewhere", capsys=capsys)
    assert "--elsewhere wants a run on stories" in line
