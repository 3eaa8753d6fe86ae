"""Does a code mean the same elsewhere? The stories' topics, in text that is unlike the training's.

The code that detects a topic best in held-out stories is taken to

two topics    the second topic of stories that have two
other words   stories that tell of it in sentences which are in no other, and don't name it
FILE          text of yours: a topic is there up to NEAR tokens after a word that names it

precision     of the positions at which it fires, the share where its topic is the subject; in
              stories without those that have no topic yet. chance: the share of all positions
recall        of the positions where its topic is the subject, the share at which it fires

All are means over topics, in a file over those of which there are LEAST positions.
"""

from itertools import count

import numpy as np
from tqdm import tqdm

from minicode.language.documents import HELD_OUT, read_documents
from minicode.language.stories import stories
from minicode.study.detectors import detect, matches, n_recorded, record_codes

NEAR = 32  # tokens
LEAST = 100  # positions
MOST_WINDOWS = 1500  # of a file
MEASURES = ("precision", "chance", "recall")


def elsewhere(run, recording, kinds, paths):
    """What the best codes of the topics do there: a dict by place, and a table for people.

    Of a place the means, "topics": how many there are, and "codes": {topic: those of its code}.
    recording and kinds as `held_out` gives them. ValueError for a run that is not on stories, and
    for a file in which no topic is named often enough.
    """
    if not (run.tokenizer and run.data.topics):
        raise ValueError("--elsewhere wants a run on stories: of them the topics are known")
    labels, names = kinds["topic"]
    best = detect(recording, labels, names).f1.argmax(0)
    result = {}
    bar = tqdm([*places(run, recording, labels, paths)], "elsewhere", leave=False, disable=None)
    for place, tokens, there, among in bar:
        often = there.sum(1) >= LEAST
        if not often.any():
            raise ValueError(f"{place}: none of the stories' topics is named often enough")
        found = recording if place == "at home" else record_codes(run.model, tokens)
        codes = {}
        for topic in np.flatnonzero(often):
            code = best[topic]
            row = measure(found, code, there[topic], among)
            codes[names[topic]] = {"code": str(found.names[code]), **row}
        means = {name: float(np.mean([row[name] for row in codes.values()])) for name in MEASURES}
        result[place] = {"topics": len(codes), **means, "codes": codes}
    return result, describe(result)


def places(run, recording, labels, paths):
    """(name, tokens (n, T), there, among): where each topic is the subject, bool (topics, N), and
    where it could be, bool (N).
    """
    yield "at home", recording.tokens, *of_stories(labels)
    size = n_recorded(run), run.config.block_size
    for place, told in ("two topics", two_topics()), ("other words", in_other_words()):
        tokens, labels = run.data.windows_of(told, *size)
        yield place, tokens, *of_stories(labels)
    for path in paths:
        yield path, *of_file(run.data, path, size[1])


def measure(recording, code, there, among):
    """Of a code where its topic is the subject, bool (N), among some of all positions, bool (N)."""
    fires = np.zeros(len(there), bool)
    fires[recording.where[code]] = True
    fires &= among
    right = (fires & there).sum()
    return {
        "precision": float(right / max(1, fires.sum())),
        "chance": float(there.sum() / among.sum()),
        "recall": float(right / there.sum()),
    }


def of_stories(labels):
    """Where each topic is the subject, bool (topics, N), and where one of them is, (N)."""
    labels = labels.ravel()
    return labels == np.arange(len(stories().topics))[:, None], labels >= 0


def two_topics():
    """Held-out stories that have two topics, with the second alone as their topic."""
    for number in count(step=HELD_OUT):
        story = stories().story(number)
        first, *others = dict.fromkeys(topic for _, topic in story if topic)
        if others:
            yield [(sentence, topic if topic != first else None) for sentence, topic in story]


def in_other_words():
    return map(stories().in_other_words, count(step=HELD_OUT))


def of_file(data, path, length):
    """Windows of a file, where each topic is the subject (topics, N), and everywhere (N)."""
    every = []
    for text, _ in read_documents([path]):
        every += [*data.tokenizer.encode(text), data.tokenizer.separator]
        if len(every) >= MOST_WINDOWS * length:
            break
    n = min(len(every) // length, MOST_WINDOWS)
    if not n:
        raise ValueError(f"{path} has fewer than {length} tokens")
    tokens = np.array(every[: n * length]).reshape(n, length)
    texts = data.texts(tokens)
    there = []
    for mention in stories().mention.values():
        named = matches(texts, mention) == 0
        near = named.copy()
        for distance in range(1, min(NEAR, length)):
            near[:, distance:] |= named[:, :-distance]
        there.append(near.ravel())
    return tokens, np.array(there), np.ones(tokens.size, bool)


def describe(result):
    """The table for people."""
    lines = [f"{'the best code of each topic':28}topics  precision  by chance  recall"]
    for place, found in result.items():
        precision, chance, recall = (found[name] for name in MEASURES)
        lines.append(f"{place:28}{found['topics']:6}{precision:11.3f}{chance:11.3f}{recall:8.3f}")
    return "\n".join(lines)
