"""The codes of a topic, chosen by what they do: those that make a text be about it.

Codes that fire where a topic is the subject need not bring it about (paper, section 5.2, forces
them all). So each of those that fire near its words is tried: the code is taken that, forced, turns
what is said next the most towards the topic; then the one that does beside the first; and so on, as
long as the dense model is surprised by no more than a budget.

topic:dragon                     a topic of the stories, with its two lists of words
words:king,queen/crown,throne    codes are chosen by king and queen, texts counted by the others
word:king                        both by one word: what is counted is then what was asked for
"""

import json
import re
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from minicode.codebook import codebooks
from minicode.control import force
from minicode.language.stories import one_of, stories
from minicode.model import evaluating
from minicode.notation import Code
from minicode.runtime.files import read_json, write
from minicode.runtime.precision import autocast
from minicode.runtime.progress import bar
from minicode.study.detectors import detect_one, n_recorded, record_codes

BUDGET = 0.25  # nats a token by which forced codes may surprise the dense model
CHOICES = "steering.json"  # its name in a run's folder
MOST = 12  # codes of a topic
N_CANDIDATES = 8  # codes that are tried for each of them
NEAR = 16  # tokens: a topic is what is said so near to its words
N_WINDOWS = 1024  # of the text trained on, in which its words are looked for
N_TRIED = 32  # of them, those on which codes are tried
N_TRIED_PRETRAINED = 8


# -- topics


@dataclass(frozen=True)
class Topic:
    name: str  # as it was asked for
    chosen_by: re.Pattern  # the words near which its codes fire
    counted_by: re.Pattern  # and those by which a text is said to mention it

    @property
    def title(self):
        """dragon of topic:dragon; king of words:king,queen/crown."""
        return re.split("[,/]", self.name.split(":", 1)[1])[0]

    def count(self, texts):
        """How many of the texts mention it."""
        return sum(bool(self.counted_by.search(text)) for text in texts)

    def tokens(self, tokenizer):
        """The tokens that are one of the words it is chosen by."""
        pieces = tokenizer.ids.items()
        return [number for piece, number in pieces if self.chosen_by.fullmatch(piece.strip())]

    def counted_tokens(self, vocabulary):
        """The tokens in whose text, by a run's vocabulary, one of the counted words stands."""
        return [number for number, text in enumerate(vocabulary) if self.counted_by.search(text)]


def is_topic(text):
    return text.startswith(("topic:", "word:", "words:"))


def find_topic(run, text):
    """The topic of topic:NAME, word:WORD or words:LIST/LIST; ValueError if there is none."""
    kind, _, name = text.partition(":")
    if not run.tokenizer:
        raise ValueError(f"{text}: only a run on text has topics and words")
    if kind == "topic":
        if name not in run.data.topics:
            there_are = ", ".join(run.data.topics) or "none of your own text: try words:"
            raise ValueError(f"there is no topic {name!r}; there are {there_are}")
        return Topic(text, stories().mention[name], stories().about[name])
    lists = [part.split(",") for part in name.split("/")] if kind == "words" else [[name]]
    if len(lists) > 2 or not all(word.strip() for words in lists for word in words):
        raise ValueError(f"{text}: write words:king,queen, or words:king,queen/crown,throne")
    patterns = [one_of(re.escape(word.strip()) for word in words) for words in lists]
    topic = Topic(text, patterns[0], patterns[-1])
    if not topic.tokens(run.tokenizer):
        raise ValueError(f"{text}: none of its words is in the vocabulary of {run.folder}")
    return topic


# -- their codes


def codes_of_topics(run, topics, budget):
    """{topic: its codes, as texts}, none where no code does anything; kept with the run."""
    run.sites()
    path = run.folder / CHOICES
    keys = {topic: f"{topic.name} {budget:g}" for topic in topics}
    books = codebooks(run.model).values()
    weights = b"".join(book.codes.detach().cpu().numpy().tobytes() for book in books)
    stamp = zlib.crc32(weights)  # of another model's codes nothing is taken
    known = {}
    if path.exists():
        known = read_json(path, lambda data: checked(run, data, stamp))
    missing = [topic for topic in topics if keys[topic] not in known]
    if missing:
        effect = Effect(run)
        for topic in missing:
            known[keys[topic]] = choose_codes(effect, topic, budget)
        with suppress(OSError):  # a folder that can't be written to does not keep it
            write(path, json.dumps({"stamp": stamp, "codes": known}, indent=1))
    return {topic: known[key] for topic, key in keys.items()}


def checked(run, data, stamp):
    """The codes in what a file of choices holds, {name: codes}; nothing, if of another model."""
    if data["stamp"] != stamp:
        return {}
    for codes in data["codes"].values():
        if type(codes) is not list or len(codes) > MOST:
            raise ValueError("no list of codes")
        for text in codes:
            if Code.parse(text, run.model).position is not None:
                raise ValueError(f"{text} names a position")
    return data["codes"]


def choose_codes(effect, topic, budget):
    """Forward choice by effect: see the top of this file."""
    pull = effect.pull_of(topic)
    if pull is None:
        return []
    candidates = effect.near(topic)
    free = effect.after([])
    best = (free @ pull).mean()
    most = effect.surprise(free) + budget
    chosen = []
    with bar(desc=f"codes of {topic.title}", unit=" tried") as tries:
        while len(chosen) < MOST:
            found = {}
            for code in effect.with_room(candidates, chosen)[:N_CANDIDATES]:
                p = effect.after([*chosen, code])
                towards = (p @ pull).mean()
                if towards > best and effect.surprise(p) <= most:
                    found[code] = towards
                else:
                    candidates.remove(code)
                tries.update()
            if not found:
                break
            code = max(found, key=found.get)
            chosen.append(code)
            candidates.remove(code)
            best = found[code]
    return chosen


class Effect:
    """What the codes of a run do when they are forced everywhere, measured on text trained on."""

    def __init__(self, run):
        self.run = run
        rng = np.random.default_rng((run.config.seed, 5))
        self.tokens = run.data.sequences(rng, N_WINDOWS, run.config.block_size)
        tried = self.tokens[:N_TRIED]
        if run.data.model:  # it is larger, as is its vocabulary
            tried = tried[:N_TRIED_PRETRAINED, :64]
        self.tried = torch.from_numpy(tried).to(run.model.device)
        judge = run.dense or run.model
        with evaluating(judge):
            logits, _ = judge(self.tried)
        self.expected = logits.log_softmax(-1)

    @cached_property
    def recording(self):
        """The codes that fire in the first windows; only a choice needs them."""
        return record_codes(self.run.model, self.tokens[: n_recorded(self.run)])

    def after(self, codes):
        """The distribution of each next token with codes forced: (n, T, vocab_size)."""
        model = self.run.model
        # As it was trained, which may be faster.
        with autocast(self.run.config, model.device), evaluating(model), force(model, codes):
            logits, _ = model(self.tried)
        return logits.float().softmax(-1)

    def surprise(self, p):
        """How a token drawn from `after` surprises the dense model, on average: nats a token."""
        return -(p * self.expected).sum(-1).mean().item()

    def places(self, topic):
        """Where one of the topic's words stands at most NEAR tokens away: bool (n, T)."""
        there = np.isin(self.tokens, topic.tokens(self.run.tokenizer))
        around = np.pad(there, ((0, 0), (NEAR, NEAR)))
        return sliding_window_view(around, 2 * NEAR + 1, axis=1).any(-1)

    def pull_of(self, topic, smooth=20):
        """How much more frequent each token is near the topic's words, in nats: (vocab_size,).

        0 for the words by which texts are counted: they take no part in the choice. None where the
        topic's words do not come at all.
        """
        near = self.places(topic)
        if not near.any():
            return None
        n_tokens = self.run.data.vocab_size
        everywhere = np.bincount(self.tokens.ravel(), minlength=n_tokens)
        here = np.bincount(self.tokens[near], minlength=n_tokens)
        expected = near.mean()
        share = (here + smooth * expected) / (everywhere + smooth)
        pull = np.log(share / expected)
        vocabulary = self.run.data.vocabulary
        for token in topic.counted_tokens(vocabulary):
            if not topic.chosen_by.search(vocabulary[token]):
                pull[token] = 0
        return torch.tensor(pull, dtype=torch.float32, device=self.tried.device)

    def near(self, topic):
        """The codes that detect the places near the topic's words best, best first."""
        there = self.places(topic)[: len(self.recording.tokens)]
        found = detect_one(self.recording, there)
        best_first = np.argsort(-found.f1, kind="stable")
        return [str(self.recording.names[i]) for i in best_first[: 5 * N_CANDIDATES]]

    def with_room(self, candidates, chosen):
        """Those that can be forced beside the chosen ones: at most k of one codebook are."""
        taken = Counter(text.rpartition(".")[0] for text in chosen)
        books = codebooks(self.run.model)
        free = []
        for text in candidates:
            site = Code.parse(text, self.run.model).site
            if taken[text.rpartition(".")[0]] < books[site].k:
                free.append(text)
        return free
