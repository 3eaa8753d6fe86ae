"""Do the codes of the stories' topics mean the same in text that is told in another way?"""

import json
import re
from itertools import islice

import numpy as np
import pytest
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
    fired = np.array([[9, 0], [0, 9], [0, 1], [9, 9], [9, 9], [9, 9], [1, 0], [0, 9]])

    class Recording:  # code 0 fires at 0, 1, 2, 6 and 7
        pass

    Recording.fired = fired
    about, among = elsewhere.of_stories(LABELS)
    assert about.shape == (len(stories().topics), 8)
    # Of the 6 positions with a topic 3 are of topic 0; it fires at 3 of them: 1, 2 and 6.
    found = elsewhere.counts(Recording, 0, about[0], among)
    assert found == (3, 3, 3 * 3 / 6, 3)
    assert elsewhere.measures(found) == {"fires": 3, "precision": 1, "chance": 0.5, "recall": 1}
    found = elsewhere.counts(Recording, 0, about[1], np.ones(8, bool))
    assert found == (5, 0, 5 * 3 / 8, 3)
    nothing = elsewhere.measures((0, 0, 0.0, 0))
    assert nothing == {"fires": 0, "precision": 0, "chance": 0, "recall": 0}


def test_a_document_is_about_a_topic_from_its_word_on(stories_run, tmp_path):
    data = load_run(stories_run).data
    path = tmp_path / "text.txt"
    no = " no no no"
    path.write_text(f"no dragon{no}\n\n{no} a king\n\n{no}{no}", encoding="utf-8")
    tokens, about, among = elsewhere.of_file(data, path, 5, 4)
    assert tokens.shape == (5, 4) and among.all()
    texts = [text for row in data.texts(tokens) for text in row]
    dragon, royals = (list(stories().topics).index(name) for name in ("dragon", "royals"))
    (first,) = (at for at, text in enumerate(texts) if text == " dragon")
    (king,) = (at for at, text in enumerate(texts) if text == " king")
    ends = [at for at, text in enumerate(texts) if text == "\n\n"]
    assert len(ends) == 3
    # Up to the end of its window of 4, or of its document.
    end = min(first // 4 * 4 + 4, ends[1])
    assert np.flatnonzero(about[dragon]).tolist() == [*range(first, end)]
    end = min(king // 4 * 4 + 4, ends[2])
    assert np.flatnonzero(about[royals]).tolist() == [*range(king, end)]
    assert about.sum() == about[[dragon, royals]].sum()


def test_the_codes_are_those_of_home(stories_run, tmp_path, capsys):
    path = tmp_path / "text.txt"
    text = 40 * ["The king saw no dragon, and the king was sad."]
    path.write_text("\n\n".join(text), encoding="utf-8")
    result = interpret(["--run", str(stories_run), "--elsewhere", str(path), "--json"])
    assert json.loads(capsys.readouterr().out) == result
    home = "held-out stories"
    assert [*result] == [home, "stories, two topics", "stories, other words", str(path)]
    run = load_run(stories_run)
    tokens, kinds = held_out(run)
    recording = record_codes(run.model, tokens)
    labels = kinds["topic"][0].ravel()
    dragon = result[home]["codes"]["dragon"]
    fires = recording.where[[str(name) for name in recording.names].index(dragon["code"])]
    right = labels[fires] == run.data.topics.index("dragon")
    assert dragon["precision"] == pytest.approx(right.sum() / (labels[fires] >= 0).sum())
    for place in result.values():
        rows = place["codes"]
        assert rows.keys() == stories().topics.keys()
        assert place["fires"] == sum(row["fires"] for row in rows.values())
        right = sum(row["fires"] * row["precision"] for row in rows.values())
        assert place["precision"] == pytest.approx(right / place["fires"])
        assert [row["code"] for row in rows.values()] == [
            row["code"] for row in result[home]["codes"].values()
        ]


def test_what_cannot_be_asked_is_one_line(stories_run, tiny_run, tmp_path, capsys):
    asked = "--run", stories_run, "--elsewhere"
    path = tmp_path / "text.txt"
    assert "there is no file" in refusal(interpret, *asked, path, capsys=capsys)
    path.write_text("no topic", encoding="utf-8")
    assert "has fewer than 32 tokens" in refusal(interpret, *asked, path, capsys=capsys)
    line = refusal(interpret, "--run", tiny_run, "--elsewhere", capsys=capsys)
    assert "--elsewhere wants a run on stories" in line
