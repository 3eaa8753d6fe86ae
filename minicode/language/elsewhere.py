"""Does a code mean the same elsewhere? The stories' topics, in text that is unlike the training's.

Each topic's code is the one that detects it best in held-out stories, on which it is measured
first. Then come

two topics    stories that have two, from where the second comes in: whether it is found
other words   stories that tell of a topic in sentences that are in no other, and don't name it
FILE          the beginning of a text of yours: of a document what comes after a word that names a
              topic is about it. Words that no story has are read byte by byte.

precision     of the positions at which a topic's code fires, the share that is about it (in stories
              of those that are about any); and by chance, if it fired as often anywhere
recall        of the positions that are about a topic, the share at which its code fires

Both are of all topics together: each fire, and each position, counts as much.
"""

from itertools import count

import numpy as np

from minicode.language.documents import HELD_OUT, read_documents
from minicode.language.stories import stories
from minicode.runtime.progress import bar
from minicode.study.detectors import detect, matches, n_recorded, record_codes


def elsewhere(run, recording, kinds, paths):
    """{place: its measures, and by "codes" those of each topic}, and a table for people.

    recording and kinds as `held_out` gives them. ValueError for a run that is not on stories.
    """
    if not (run.tokenizer and run.data.topics):
        raise ValueError("--elsewhere wants a run on stories: of them the topics are known")
    labels, names = kinds["topic"]
    best = detect(recording, labels, names).f1.argmax(0)
    places = {"held-out stories": (recording.tokens, *of_stories(labels))}
    size = n_recorded(run), run.config.block_size
    in_other_words = map(stories().in_other_words, count(step=HELD_OUT))
    for place, told in ("two topics", two_topics()), ("other words", in_other_words):
        tokens, labels = run.data.windows_of(told, *size)
        places[f"stories, {place}"] = (tokens, *of_stories(labels))
    for path in paths:
        places[path] = of_file(run.data, path, 3 * size[0], size[1])
    result = {}
    for place, (tokens, about, among) in bar(places.items(), desc="elsewhere"):
        found = recording if tokens is recording.tokens else record_codes(run.model, tokens)
        rows = [counts(found, code, topic, among) for code, topic in zip(best, about)]
        codes = {}
        for name, code, row in zip(names, best, rows):
            codes[name] = {"code": str(found.names[code]), **measures(row)}
        result[place] = {**measures(np.sum(rows, axis=0)), "tokens": tokens.size, "codes": codes}
    return result, describe(result)


def counts(recording, code, about, among):
    """Of a code, whose topic the positions `about` are, bool (N), and some of all, `among` (N).

    How often it fires, is right, would be by chance, and how many positions there are to find.
    """
    fires = (recording.fired == code).any(1) & among
    by_chance = fires.sum() * about.sum() / among.sum()
    return fires.sum(), (fires & about).sum(), by_chance, about.sum()


def measures(row):
    fires, right, by_chance, there = row
    return {
        "fires": int(fires),
        "precision": float(right / max(1, fires)),
        "chance": float(by_chance / max(1, fires)),
        "recall": float(right / max(1, there)),
    }


def of_stories(labels):
    """The positions about each topic, bool (topics, N), and those about one of them, (N)."""
    labels = labels.ravel()
    return labels == np.arange(len(stories().topics))[:, None], labels >= 0


def two_topics():
    """Held-out stories that have two topics, with the second alone as their topic."""
    for number in count(step=HELD_OUT):
        story = stories().story(number)
        first, *others = dict.fromkeys(topic for _, topic in story if topic)
        if others:
            yield [(sentence, topic if topic != first else None) for sentence, topic in story]


def of_file(data, path, n, length):
    """Up to n windows of a file, the positions about each topic (topics, N), and all of them."""
    every = []
    for text, _ in read_documents([path]):
        every += [data.tokenizer.separator, *data.tokenizer.encode(text)]
        if len(every) >= n * length:
            break
    n = min(len(every) // length, n)
    if not n:
        raise ValueError(f"{path} has fewer than {length} tokens")
    tokens = np.array(every[: n * length]).reshape(n, length)
    begin = last_at(tokens == data.tokenizer.separator)
    texts = data.texts(tokens)
    about = []
    for mention in stories().mention.values():
        named = last_at(matches(texts, mention) == 0)
        about.append((named > begin).ravel())
    return tokens, np.array(about), np.ones(tokens.size, bool)


def last_at(there):
    """Of each position of a window (n, T) the last, up to it, where it is true; -1 for none."""
    at = np.where(there, np.arange(there.shape[1]), -1)
    return np.maximum.accumulate(at, axis=1)


def describe(result):
    """The table for people."""
    lines = [f"{'the best code of each topic':28}  tokens  fires  precision  by chance  recall"]
    for place, found in result.items():
        counted = f"{place:28}{found['tokens']:8}{found['fires']:7}"
        shares = f"{found['precision']:11.3f}{found['chance']:11.3f}{found['recall']:8.3f}"
        lines.append(counted + shares)
    return "\n".join(lines)
