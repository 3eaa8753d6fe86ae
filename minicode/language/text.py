"""Language: stories made on the spot, whose topics are known, or the user's own text."""

import codecs
import json
import math
import re
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from minicode.language.documents import HELD_OUT, read_documents
from minicode.language.pretrained import FOLDER as PRETRAINED
from minicode.language.pretrained import PretrainedTokenizer, sizes, small_files
from minicode.language.stories import stories
from minicode.language.tokenizer import PIECES, SEPARATOR, Tokenizer, to_bytes
from minicode.runtime.files import reading
from minicode.runtime.options import check_options, option

N_STORIES = 4000  # that the vocabulary is counted on
N_WORDS = 200  # frequent words that codes may stand for


def perplexity(loss):
    """exp(loss), but for a loss so large that no float holds it: then about the largest float."""
    return math.exp(min(loss, 709))


@cache
def first_stories():
    """(text, whether it is held out) of each story that the vocabulary is counted on."""
    found = []
    for number in range(N_STORIES):
        sentences = [sentence for sentence, _ in stories().story(number)]
        found.append((" ".join(sentences), number % HELD_OUT == 0))
    return found


def documents(paths):
    """(text, whether it is held out) of each document of the user, or of the first stories."""
    return read_documents(paths) if paths else first_stories()


@dataclass(eq=False)
class Text:
    """What a model of language is trained on: stories, or what is in `data`.

    The other fields follow from the text, and are counted where they are not given.
    """

    file = "text.json"  # its name in a run's folder
    tokens_file = "tokens.bin"  # and that of the tokens of the user's own text
    least_block = 2
    sample_length = 100
    group = 0  # tokens that make one word; 0: each token has its own spaces
    between = "\n\n---\n\n"  # samples
    data: list | None = option(
        None,
        "files or folders of UTF-8 text; without: stories, made on the spot",
        {"nargs": "+", "metavar": "FILE"},
    )
    vocab: int = option(
        2048,
        "tokens in the vocabulary, at most: 257, and the most frequent words",
        least=257,
        below=65_537,
    )
    model: str | None = option(
        None,
        "a local folder of a Hugging Face model (config, safetensors, tokenizer): it is finetuned, "
        "and its tokenizer reads the text",
        {"metavar": "FOLDER"},
    )
    pieces: list | None = option(None, "those words", flag=False)
    n_tokens: list | None = option(None, "tokens to train on, and held out", flag=False)
    loss_unigram: float = option(
        0.0, "loss on held-out text when only each token's frequency is known", flag=False
    )

    def __post_init__(self):
        check_options(self)
        if self.model:
            self.pieces = []
            self.tokenizer = PretrainedTokenizer(self.model)
        else:
            if self.pieces is None:
                self._count_pieces()
            self.tokenizer = Tokenizer(self.pieces)
        self.vocab_size = self.tokenizer.vocab_size
        self.written_as = "<u2" if self.vocab_size <= 1 << 16 else "<u4"  # tokens, in their file
        if self.n_tokens is None:
            self._read()
        self.vocabulary = [self.show([0, token]) for token in range(self.vocab_size)]
        self.most_block = min(*self.n_tokens, self.tokenizer.most_tokens) - 1
        self.topics = [] if self.data else list(stories().topics)
        # What codes are compared with neurons on:
        self.detected = ("word", "after") if self.data else ("topic",)

    def __str__(self):
        if self.data:
            about = f"{sum(self.n_tokens):,} tokens of your own text"
        else:
            about = f"stories on {len(self.topics)} topics"
        return f"{about}, a vocabulary of {self.vocab_size}"

    def __eq__(self, other):
        """Whether both are the same text, by all that is counted of it."""
        return (
            isinstance(other, Text)
            and self.pieces == other.pieces
            and self.n_tokens == other.n_tokens
            and math.isclose(self.loss_unigram, other.loss_unigram)
        )

    # -- read once, before the training

    def _count_pieces(self):
        """The vocabulary, by frequency in the part to train on."""
        counts = Counter()
        for text, held_out in documents(self.data):
            if not held_out:
                counts.update(PIECES.findall(text))
        frequent = [
            (-n, piece) for piece, n in counts.items() if n > 1 and len(to_bytes(piece)) > 1
        ]
        n_pieces = self.vocab - SEPARATOR - 1
        self.pieces = [piece for _, piece in sorted(frequent)[:n_pieces]]

    def _read(self):
        """Reads the text as tokens, and what is known by their frequency."""
        parts = array("I"), array("I")  # to train on, and held out
        for text, held_out in documents(self.data):
            parts[held_out].extend([*self.tokenizer.encode(text), self.tokenizer.separator])
        self.n_tokens = [len(part) for part in parts]
        n_train, n_held_out = self.n_tokens
        if min(self.n_tokens) < 2:
            found = f"{n_train} tokens to train on, {n_held_out} held out"
            raise ValueError(f"too little text: {found}")
        self.parts = [np.asarray(part) for part in parts]
        train, held_out = (np.bincount(part, minlength=self.vocab_size) for part in self.parts)
        p = (train + 1) / (n_train + self.vocab_size)
        self.loss_unigram = float(-(held_out * np.log(p)).sum() / n_held_out)

    def sizes(self):
        """What the configuration of a model has to be for this text, or is where it has one."""
        own = sizes(self.model) if self.model else {}
        return {"vocab_size": self.vocab_size, **own}

    # -- files

    def files(self):
        """What a run's folder keeps: the tokens of the user's own text, and all else as JSON."""
        files = small_files(self.model) if self.model else {}
        if self.data:
            files[self.tokens_file] = np.concatenate(self.parts).astype(self.written_as)
        return {**files, self.file: json.dumps(asdict(self))}

    def settle(self, folder):
        """Finds the tokens of the user's own text in a run's folder, memory-mapped."""
        if not self.data:
            return
        path = folder / self.tokens_file
        with reading(path):
            tokens = np.memmap(path, self.written_as, mode="r")
            if len(tokens) != sum(self.n_tokens) or tokens.max() >= self.vocab_size:
                raise ValueError(f"it does not hold the tokens of {self.file}")
            self.parts = np.split(tokens, self.n_tokens[:1])

    @classmethod
    def from_json(cls, data, folder):
        """The text of `files` in a run's folder: the user's own are not read again."""
        if data["pieces"] is None or data["n_tokens"] is None:
            raise ValueError("it lacks the words")
        if data["model"]:
            data["model"] = str(folder / PRETRAINED)
        return cls(**data)

    # -- what is trained on, and what is not

    def sequences(self, rng, n, length):
        """n windows of `length` tokens of the training part: int64 (n, length)."""
        return self._windows(rng, n, length, held_out=False)[0]

    def held_out(self, rng, n, length):
        """The same of what is never trained on."""
        return self._windows(rng, n, length, held_out=True)[0]

    def passages(self, n, length):
        """Evenly spaced windows (n, length) of the user's held-out text, fewer if it is short."""
        windows = sliding_window_view(self.parts[1], length)
        n = min(n, len(self.parts[1]) // length)
        starts = np.linspace(0, len(windows) - 1, n).astype(int)
        return windows[starts].astype(np.int64)

    def labelled(self, rng, n, length):
        """Held-out windows (n, length), and {kind: (labels (n, length), names)}, -1 for no label.

        topic: of stories, the one that came in last, from that sentence on. word: the frequent word
        that stands there; after: the one before it.
        """
        tokens, topics = self._windows(rng, n, length, held_out=True)
        words = self._words()
        names = [self.vocabulary[token].strip() for token in words]
        label_of = np.full(self.vocab_size, -1)
        label_of[words] = np.arange(len(words))
        here = label_of[tokens]
        before = np.insert(here[:, :-1], 0, -1, axis=1)
        kinds = {} if self.data else {"topic": (topics, self.topics)}
        return tokens, {**kinds, "word": (here, names), "after": (before, names)}

    def _words(self):
        """The tokens of the most frequent words."""
        by_frequency = range(SEPARATOR + 1, self.vocab_size)
        if self.model:
            some = self.sequences(np.random.default_rng(0), N_STORIES, 64)
            by_frequency = np.argsort(-np.bincount(some.ravel()), kind="stable")
        return [t for t in by_frequency if re.search(r"\w", self.vocabulary[t])][:N_WORDS]

    def _windows(self, rng, n, length, held_out):
        """Windows, and the topic at each position (None for the user's own text): (n, length)."""
        if self.data:
            windows = sliding_window_view(self.parts[held_out], length)
            return windows[rng.integers(len(windows), size=n)].astype(np.int64), None
        return self.windows_of(self._stories(rng, held_out), n, length)

    def _stories(self, rng, held_out):
        """Stories without end, drawn from those to train on or those that are held out."""
        while True:
            number = HELD_OUT * rng.integers(1 << 48)
            if not held_out:
                number += rng.integers(1, HELD_OUT)
            yield stories().story(int(number))

    def windows_of(self, told, n, length):
        """Windows of stories, lists of (sentence, topic), and their topics: (n, length) each."""
        tokens = []  # one story after the other: a window goes on where the last one ended
        labels = []
        while len(tokens) < n * length:
            tokens.append(self.tokenizer.separator)
            labels.append(-1)
            space = ""
            for sentence, topic in next(told):
                new = self.tokenizer.encode(space + sentence)
                tokens += new
                labels += [self.topics.index(topic) if topic else -1] * len(new)
                space = " "
        shape = (n, length)  # what is more is cut off
        return np.resize(tokens, shape), np.resize(labels, shape)

    # -- for people

    def prompt(self, text):
        """The tokens (1, T) of the beginning of a document."""
        return torch.tensor([[self.tokenizer.separator, *self.tokenizer.encode(text)]])

    def show(self, tokens):
        """A sequence (T,) from a separator on, for people."""
        return self.tokenizer.decode(tokens[1:]).encode(errors="replace").decode()

    def texts(self, tokens):
        """The text of each token of tokens (n, T); a character of several stands at the last."""
        texts = []
        for row in tokens:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            texts.append([decoder.decode(self.tokenizer.bytes[token]) for token in row])
        return texts

    def measures(self, tokens, loss):
        """The loss on sequences (n, T) in other units; every byte of the text counts once."""
        targets = tokens[:, 1:]
        n_bytes = sum(len(self.tokenizer.bytes[token]) for token in targets.flat)
        return {
            "perplexity": perplexity(loss),
            "bits_per_byte": float(loss / math.log(2) * targets.size / n_bytes),
            "loss_unigram": self.loss_unigram,
        }
