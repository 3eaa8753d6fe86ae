"""The codes of a topic, chosen by what they do: those that make its words more probable.

Codes that fire where a topic is the subject need not bring it about (paper, section 5.2, chooses
them so). Here they are chosen one after the other, by measured effect: the code that, forced,
raises the log-odds of the topic's words most where one of them comes next; then the one that does
beside the first; and so on, as long as the dense model is surprised by no more than a budget.

topic:dragon                     a topic of the stories, with its two lists of words
words:king,queen/crown,throne    codes are chosen by king and queen, texts counted by the others
word:king                        both by one word: what is counted is then what was asked for
"""

import json
import re
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from minicode.control import codes_of, force
from minicode.language.stories import one_of, stories
from minicode.model import evaluating
from minicode.runtime.files import read_json, write

BUDGET = 0.2  # nats a token by which forced codes may surprise the dense model
CHOICES = "steering.json"  # its name in a run's folder
MOST = 12  # codes of a topic
N_CANDIDATES = 12  # codes that are tried for each of them
LENGTH = 48  # tokens of a text on which they are tried
N_TEXTS = 48  # of such texts


# -- topics


@dataclass(frozen=True)
class Topic:
    name: str  # as it was asked for
    chosen_by: re.Pattern  # the words that its codes are to make more probable
    counted_by: re.Pattern  # and those by which a text is said to mention it

    @property
    def title(self):
        """dragon of topic:dragon; king of words:king,queen/crown."""
        return re.split("[,/]", self.name.split(":", 1)[1])[0]

    def count(self, texts):
        """How many of the texts mention it."""
        return sum(bool(self.counted_by.search(text)) for text in texts)

    def tokens(self, tokenizer):
        """The tokens that are one of the words it is chosen by. ValueError if there are none."""
        pieces = tokenizer.ids.items()
        found = [number for piece, number in pieces if self.chosen_by.fullmatch(piece.strip())]
        if not found:
            raise ValueError(f"{self.name}: none of its words is in the vocabulary of the run")
        return found


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
    return Topic(text, patterns[0], patterns[-1])


# -- their codes


def codes_of_topic(run, topic, budget=BUDGET):
    """The codes of a topic, as texts; chosen once, and kept with the run."""
    run.sites()
    path = run.folder / CHOICES
    known = read_json(path, dict) if path.exists() else {}
    key = f"{topic.name} {budget:g}"
    if key not in known:
        known[key] = choose_codes(run, topic, budget)
        with suppress(OSError):  # a folder that can't be written to does not keep it
            write(path, json.dumps(known, indent=1))
    return known[key]


def choose_codes(run, topic, budget):
    """Forward choice by effect: see the top of this file. ValueError where no code has any."""
    effect = Effect(run, topic)
    best = effect.log_odds([])
    most = effect.surprise([]) + budget
    chosen = []
    with tqdm(desc=f"codes of {topic.title}", unit=" tried", leave=False, disable=None) as bar:
        while len(chosen) < MOST:
            found = {}
            for code in effect.promising(chosen):
                found[code] = effect.log_odds([*chosen, code])
                bar.update()
            better = [code for code in found if found[code] > best]
            better.sort(key=found.get, reverse=True)
            within = (code for code in better if effect.surprise([*chosen, code]) <= most)
            code = next(within, None)
            if code is None:
                break
            chosen.append(code)
            best = found[code]
    if not chosen:
        cost = f"a cost of {budget:g} nats a token"
        raise ValueError(f"{topic.name}: no code makes it more probable at {cost}")
    return [str(code) for code in chosen]


class Effect:
    """What codes do when they are forced everywhere: to a topic's words, and to all others."""

    def __init__(self, run, topic):
        self.model = run.model
        self.words = topic.tokens(run.tokenizer)
        rng = np.random.default_rng((run.config.seed, 5))
        length = min(LENGTH, run.config.block_size)
        tokens, self.at = places(run.data, self.words, length, rng)
        if not len(tokens):
            raise ValueError(f"{topic.name}: its words do not come in the text trained on")
        self.tokens = torch.from_numpy(tokens).to(run.model.device)
        text = run.data.sequences(rng, N_TEXTS // 2, length)
        self.text = torch.from_numpy(text).to(run.model.device)
        judge = run.dense or run.model
        with evaluating(judge):
            logits, _ = judge(self.text)
        self.expected = logits.log_softmax(-1)

    def logits(self, tokens, codes):
        """The model's, with codes forced: (n, T, vocab_size)."""
        with evaluating(self.model), self.forcing(codes):
            return self.model(tokens)[0]

    def forcing(self, codes):
        return force(self.model, [str(code) for code in codes])

    def log_odds(self, codes):
        """Of the topic's words, where one of them comes next, in nats; mean over such places."""
        return self._log_odds(self.logits(self.tokens, codes)).item()

    def surprise(self, codes):
        """How much the next token, drawn by the model, surprises the dense one: nats a token."""
        p = self.logits(self.text, codes).softmax(-1)
        return -(p * self.expected).sum(-1).mean().item()

    def promising(self, chosen):
        """The codes that would raise the log-odds most beside those chosen, to first order.

        Forced, a code takes the place of the last of the k: the log-odds change by about their
        difference times the slope of the log-odds at the codebook's output.
        """
        gains = []
        codes = []
        for site, slope in self.slopes(chosen).items():
            codebook = self.model.codebooks()[site]
            slope = slope.unflatten(-1, (codebook.groups, -1))  # (n, T, G, d)
            last = codebook.sum_codes(codebook.ids[..., -1:])
            lost = (slope * last).sum((0, 1, 3)).unsqueeze(-1)  # (G, 1)
            gain = torch.einsum("ntgd,gcd->gc", slope, codebook.codes.detach()) - lost
            gains += gain.flatten().tolist()
            codes += codes_of(site, codebook)
        n_chosen = Counter((code.site, code.group) for code in chosen)
        found = []
        for number in np.argsort(-np.array(gains)):
            code = codes[number]
            room = self.model.codebooks()[code.site].k - n_chosen[code.site, code.group]
            if room and code not in chosen:
                found.append(code)
            if len(found) == N_CANDIDATES:
                break
        return found

    def slopes(self, chosen):
        """Of the log-odds, at the output of each codebook: {site: (n, T, groups * dim)}."""
        outputs = {}

        def keep(codebook, inputs, output):
            outputs[codebook] = output

        codebooks = self.model.codebooks()
        with ExitStack() as stack:
            for codebook in codebooks.values():
                stack.callback(codebook.register_forward_hook(keep).remove)
            with evaluating(self.model), torch.enable_grad(), self.forcing(chosen):
                odds = self._log_odds(self.model(self.tokens)[0])
        slopes = torch.autograd.grad(odds, [outputs[codebook] for codebook in codebooks.values()])
        return dict(zip(codebooks, slopes))

    def _log_odds(self, logits):
        here = logits[torch.arange(len(self.at)), self.at].double()  # (n, vocab_size)
        p = here.softmax(-1)[:, self.words].sum(-1)
        return torch.logit(p, eps=1e-12).mean()


def places(data, words, length, rng):
    """Text trained on, and where one of the words comes next: tokens (n, length), positions (n,).

    None of the words is among the tokens before.
    """
    tokens = []
    at = []
    for _ in range(64):
        windows = data.sequences(rng, 128, length + 1)
        comes = np.isin(windows, words)
        first = comes.argmax(1)
        use = comes.any(1) & (first >= length // 3)
        tokens += list(windows[use, :-1])
        at += list(first[use] - 1)
        if len(at) >= N_TEXTS:
            break
    return np.array(tokens[:N_TEXTS]), torch.tensor(at[:N_TEXTS])
