"""Language: little stories made on the spot, whose topics are known, or the user's own text; and the tokenizer.

A token is a piece of text, most often a word with the space before it, or one byte of a piece that the vocabulary
does not hold. So nothing is lost: decode(encode(s)) == s. Between two documents stands a token of its own:

    SEPARATOR Once _upon _a _time , ... SEPARATOR There _was _once ...      (_ is a space)
"""

import codecs
import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

from minicode.language.stories import stories
from minicode.language.tokenizer import (
    PIECES,
    SEPARATOR,
    Tokenizer,
    decode_utf8,
    list_files,
    split_file,
    to_bytes,
)
from minicode.runtime.options import option

N_WORDS = 200  # frequent words that codes may stand for
HELD_OUT = (
    10  # one in so many: stories with a number that it divides, or the last part of the user's text
)


@dataclass(eq=False)
class Text:
    """What a model of language is trained on. With no `data` it is stories. The rest follows from the text."""

    file: ClassVar = "text.json"  # its name in a run's folder, and that of the tokens of the user's own text beside it
    tokens_file: ClassVar = "tokens.bin"
    least_block: ClassVar = 2
    sample_length: ClassVar = 100
    group: ClassVar = 0  # tokens that make one word; 0: each token has its own spaces
    between: ClassVar = "\n\n---\n\n"  # samples
    data: list | None = option(
        None,
        "files or folders of UTF-8 text; without: stories, made on the spot",
        {"nargs": "+", "metavar": "FILE"},
    )
    vocab: int = option(2048, "tokens in the vocabulary, at most: 257, and the most frequent words")
    pieces: list | None = option(None, "those words", flag=False)
    fingerprint: str = option("", "hash of the text, or of the grammar of the stories", flag=False)
    n_tokens: list | None = option(None, "tokens to train on, and held out", flag=False)
    loss_unigram: float = option(
        0.0, "loss on held-out text when only each token's frequency is known", flag=False
    )

    def __post_init__(self):
        if self.vocab <= SEPARATOR:
            raise ValueError(f"vocab must be at least {SEPARATOR + 1}, not {self.vocab}")
        self.data = [str(path) for path in self.data] if self.data else None
        if self.pieces is None:
            self._count()
        self.tokenizer = Tokenizer(self.pieces)
        self.vocab_size = self.tokenizer.vocab_size
        self.vocabulary = [
            self.show([SEPARATOR, token]) for token in range(self.vocab_size)
        ]  # the text of each token
        self.most_block = math.inf if self.data is None else min(self.n_tokens) - 1
        self.detected = (
            ("word", "after") if self.data else ("topic",)
        )  # what codes are compared with neurons on
        self.topics = [] if self.data else list(stories().topics)

    def __str__(self):
        about = (
            f"stories on {len(self.topics)} topics"
            if self.data is None
            else f"{sum(self.n_tokens):,} tokens of your own text"
        )
        return f"{about}, a vocabulary of {self.vocab_size}"

    def __eq__(self, other):
        return isinstance(other, Text) and (self.fingerprint, self.pieces) == (
            other.fingerprint,
            other.pieces,
        )

    def _count(self):
        """Reads the text once: the vocabulary by frequency in the training part, and the figures that follow."""
        counts, n_documents, digest = (
            (Counter(), Counter()),
            [0, 0],
            hashlib.blake2b(digest_size=16),
        )
        for text, held_out in self._documents():
            counts[held_out].update(PIECES.findall(text))
            n_documents[held_out] += 1
            digest.update(text.encode())
        self.fingerprint = digest.hexdigest()
        often = sorted(
            (-n, piece) for piece, n in counts[0].items() if n > 1 and len(to_bytes(piece)) > 1
        )
        self.pieces = [piece for _, piece in often[: self.vocab - SEPARATOR - 1]]
        tokenizer = Tokenizer(self.pieces)
        used = np.zeros((2, tokenizer.vocab_size))
        for part in range(2):
            used[part, SEPARATOR] = n_documents[part]
            for piece, n in counts[part].items():
                np.add.at(used[part], tokenizer.encode(piece), n)
        self.n_tokens = [int(n) for n in used.sum(1)]
        if min(self.n_tokens) < 2:
            raise ValueError(
                f"{' '.join(self.data)}: too little text: {self.n_tokens[0]} tokens to train on, {self.n_tokens[1]} held out"
            )
        p = (used[0] + 1) / (used[0] + 1).sum()
        self.loss_unigram = float(-(used[1] * np.log(p)).sum() / used[1].sum())

    def _documents(self):
        """(text, whether it is held out) of each document: the first stories, or the user's text from start to end.

        Of the user's text the last tenth is held out, but for what stands in the part before it, word for word.
        """
        if self.data is None:
            for number in range(4000):
                yield (
                    " ".join(sentence for sentence, _ in stories().story(number)),
                    number % HELD_OUT == 0,
                )
            return
        paths = list_files(self.data)
        total, before, seen = sum(path.stat().st_size for path in paths), 0, set()
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="reading", leave=False, disable=None
        ) as bar:
            for path in paths:
                for offset, content in split_file(path):
                    text, end = decode_utf8(path, offset, content), before + offset + len(content)
                    bar.update(end - bar.n)
                    held_out, known = end > total * (1 - 1 / HELD_OUT), hash(content.strip())
                    if not held_out:
                        seen.add(known)
                    if text.strip() and not (held_out and known in seen):
                        yield text, held_out
                before += path.stat().st_size

    dtype = property(
        lambda self: np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<i4")
    )  # of the tokens in their file

    def files(self):
        """What a run's folder keeps of the data, by file: the tokens of the user's own text, and all else as JSON."""
        files = {self.file: json.dumps(asdict(self))}
        if self.data:
            tokens = (
                token
                for text, _ in self._documents()
                for token in (*self.tokenizer.encode(text), SEPARATOR)
            )
            files = {self.tokens_file: np.fromiter(tokens, self.dtype), **files}
        return files

    def settle(self, folder):
        """Finds the tokens of the user's own text in a run's folder, memory-mapped."""
        if self.data is None:
            return
        path = folder / self.tokens_file
        if not path.is_file() or path.stat().st_size != sum(self.n_tokens) * self.dtype.itemsize:
            raise ValueError(
                f"{path} is damaged: it does not hold the {sum(self.n_tokens)} tokens of {folder / self.file}"
            )
        tokens = np.memmap(path, self.dtype, mode="r")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(
                f"{path} is damaged: there are tokens in it beyond the vocabulary of {self.vocab_size}"
            )
        self.parts = tokens[: self.n_tokens[0]], tokens[self.n_tokens[0] :]

    # -- what is trained on, and what is not

    def sequences(self, rng, n, length):
        """n windows of `length` tokens of the training part: int64 (n, length)."""
        return self._windows(rng, n, length, held_out=False)[0]

    def held_out(self, rng, n, length):
        """The same of what is never trained on."""
        return self._windows(rng, n, length, held_out=True)[0]

    def labelled(self, rng, n, length):
        """Held-out windows (n, length), and what is known of each position: {kind: (labels (n, length), -1 for none, names)}.

        topic: of stories, the one that came in last, from that sentence on. word: the frequent word that stands there;
        after: the one before it.
        """
        tokens, labels = self._windows(rng, n, length, held_out=True)
        words = [i for i, piece in enumerate(self.tokenizer.pieces) if re.search(r"\w", piece)][
            :N_WORDS
        ]
        number = np.full(self.vocab_size, -1)
        number[np.array(words, dtype=int) + SEPARATOR + 1] = np.arange(len(words))
        here, names = number[tokens], [self.tokenizer.pieces[i].strip() for i in words]
        before = np.concatenate((np.full((n, 1), -1), here[:, :-1]), axis=1)
        kinds = {"word": (here, names), "after": (before, names)}
        return tokens, kinds if self.data else {"topic": (labels, self.topics), **kinds}

    def _windows(self, rng, n, length, held_out):
        if self.data:
            part = self.parts[held_out]
            starts = rng.integers(len(part) - length + 1, size=n)
            return np.stack([part[start : start + length] for start in starts]).astype(
                np.int64
            ), None
        tokens, labels = (
            [],
            [],
        )  # of one story after the other; each window goes on where the last one ended
        while len(tokens) < n * length:
            number = HELD_OUT * int(rng.integers(1 << 48)) + (
                0 if held_out else int(rng.integers(1, HELD_OUT))
            )
            tokens.append(SEPARATOR)
            labels.append(-1)
            for i, (sentence, topic) in enumerate(stories().story(number)):
                new = self.tokenizer.encode(" " * (i > 0) + sentence)
                tokens += new
                labels += [self.topics.index(topic) if topic else -1] * len(new)
        return tuple(np.array(row[: n * length]).reshape(n, length) for row in (tokens, labels))

    # -- people, measures, files

    def mentions(self, topic, text):
        """Whether a text mentions a topic of the stories, in so many words."""
        return bool(stories().mention[topic].search(text))

    def prompt(self, text):
        """The tokens (1, T) of the beginning of a document."""
        return torch.tensor([[SEPARATOR, *self.tokenizer.encode(text)]])

    def show(self, tokens):
        """A sequence (T,) from a separator on, for people."""
        return self.tokenizer.decode(tokens[1:]).encode(errors="replace").decode()

    def texts(self, tokens):
        """The text of each token of tokens (n, T); a character of several tokens stands at the last of them."""
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in tokens]
        return [
            [decoder.decode(self.tokenizer.bytes[token]) for token in row]
            for row, decoder in zip(tokens, decoders)
        ]

    def measures(self, tokens, loss):
        """What the loss on sequences (n, T) means in other units; every byte of the text is counted, once."""
        targets = tokens[:, 1:]
        bits = float(loss / math.log(2) * targets.size / self.tokenizer.sizes[targets].sum())
        return {
            "perplexity": math.exp(loss),
            "bits_per_byte": bits,
            "loss_unigram": self.loss_unigram,
        }

    @classmethod
    def from_json(cls, data):
        """The text of `files`. Every value is checked: the user's files are not looked for again."""
        words, numbers = data["pieces"], [data["vocab"], *data["n_tokens"]]
        strings = all(type(s) is str for s in (data["fingerprint"], *words, *(data["data"] or [])))
        whole = len(numbers) == 3 and all(type(n) is int and n >= 0 for n in numbers)
        if (
            not strings
            or not whole
            or len(set(words)) != len(words)
            or not math.isfinite(data["loss_unigram"])
        ):
            raise ValueError(
                "its words must be different strings, and its numbers finite, and whole but for the loss"
            )
        return cls(**data)
