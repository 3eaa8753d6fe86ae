"""TokFSM (paper, section 4.1): a finite state machine, written as digits, whose ground truth is known.

N states; each goes to one of n_edges random successors with equal probability. State 38 is written as the
tokens 3 8, so the network never sees a state, only digits. A sequence is BOS, then states:

    BOS 3 8 0 7 9 1 ...     the states 38 -> 07 -> 91, the tokens [10, 3, 8, 0, 7, 9, 1, ...]
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch

from minicode.runtime.options import option

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(eq=False)
class FSM:
    """A machine made from its numbers. `successors` is (N, n_edges); `transition_matrix` (N, N) float64, rows sum to 1."""

    file: ClassVar = "fsm.json"  # its name in a run's folder
    most_block: ClassVar = math.inf  # tokens in a block, for there is no end to the data
    sample_length: ClassVar = 24  # tokens of a sample
    between: ClassVar = "\n"  # samples
    n_states: int = option(100, "states of the machine")
    n_edges: int = option(10, "successors of a state, all equally probable")
    base: int = option(10, "base in which a state is written, 2 to 36")
    seed: int = option(0, "seed of the machine's edges", flag=False)
    successors: np.ndarray | None = option(
        None, "the edges (N, n_edges), different in each row; none: drawn", flag=False
    )

    def __post_init__(self):
        if (
            not 2 <= self.n_states <= 10_000
            or not 2 <= self.base <= len(DIGITS)
            or not 1 <= self.n_edges <= self.n_states
        ):
            needs = "n_states from 2 to 10,000, a base from 2 to 36, n_edges from 1 to n_states"
            raise ValueError(
                f"a machine needs {needs}, not {(self.n_states, self.base, self.n_edges)}"
            )
        self.digits = 1  # a state's length in tokens
        while self.base**self.digits < self.n_states:
            self.digits += 1
        self.bos, self.vocab_size, self.least_block = self.base, self.base + 1, 2 * self.digits
        self.vocabulary = [*DIGITS[: self.base], "BOS"]  # the text of each token
        if self.successors is None:
            every = np.tile(np.arange(self.n_states), (self.n_states, 1))
            self.successors = np.random.default_rng(self.seed).permuted(every, axis=1)[
                :, : self.n_edges
            ]
        self.successors = np.sort(self.successors, axis=1)
        self.transition_matrix = np.zeros((self.n_states, self.n_states))
        np.put_along_axis(self.transition_matrix, self.successors, 1 / self.n_edges, axis=1)

    def __str__(self):
        return f"TokFSM: {self.n_states} states, {self.n_edges} edges each"

    # -- states and tokens

    def encode(self, states):
        """States (...) as digits (..., digits), the highest first."""
        powers = self.base ** np.arange(self.digits)[::-1]
        return np.asarray(states)[..., None] // powers % self.base

    def decode(self, tokens):
        """Digits (..., T) as states (..., T // digits); -1 where they are none (BOS among them, or N and above)."""
        tokens = np.asarray(tokens)
        n = tokens.shape[-1] // self.digits
        digits = tokens[..., : n * self.digits].reshape(*tokens.shape[:-1], n, self.digits)
        states = digits @ self.base ** np.arange(self.digits)[::-1]
        return np.where((digits < self.base).all(-1) & (states < self.n_states), states, -1)

    def allowed(self, states):
        """Which transitions of states (..., n) the machine allows: bool (..., n - 1)."""
        before, after = states[..., :-1], states[..., 1:]
        return (before >= 0) & (after >= 0) & (self.transition_matrix[before, after] > 0)

    def sequences(self, rng, n, length):
        """n sequences of `length` tokens, BOS included: int64 (n, length). The first state is uniform."""
        n_states = -(-(length - 1) // self.digits)
        states = np.empty((n, n_states), dtype=np.int64)
        states[:, 0] = rng.integers(self.n_states, size=n)
        choices = rng.integers(self.n_edges, size=(n, n_states))
        for i in range(1, n_states):
            states[:, i] = self.successors[states[:, i - 1], choices[:, i]]
        tokens = np.full((n, 1 + n_states * self.digits), self.bos)
        tokens[:, 1:] = self.encode(states).reshape(n, -1)
        return tokens[:, :length]

    held_out = sequences  # what a model is evaluated on: as endless as what it is trained on

    def name(self, state):
        """A state for people: its digits, such as "07"; "??" for a -1 of decode."""
        return "".join(DIGITS[d] for d in self.encode(state)) if state >= 0 else "?" * self.digits

    def show(self, tokens):
        """A sequence (T,) from BOS on, for people: its states, with an x before one that may not follow."""
        states = self.decode(tokens[1:])
        marks = ["", *(" -> " if ok else " -x " for ok in self.allowed(states))]
        rest = "".join(
            (DIGITS[: self.base] + "?")[d] for d in tokens[1 + len(states) * self.digits :]
        )
        text = "".join(mark + self.name(state) for mark, state in zip(marks, states))
        return f"{text} .. {rest}" if rest else text

    def prompt(self, text):
        """BOS and the states that a text names, such as "38" or "38 07": tokens (1, T)."""
        digits = "".join(text.lower().split())
        valid = DIGITS[: self.base]
        if not set(digits) <= set(valid):
            raise ValueError(
                f"prompt {text!r}: write states as digits ({valid}), such as {self.name(self.n_states // 3)}"
            )
        tokens = [valid.index(digit) for digit in digits]
        if len(tokens) % self.digits or -1 in self.decode(tokens):
            last = self.name(self.n_states - 1)
            raise ValueError(
                f"prompt {text!r} is not a list of states: they are {self.name(0)} to {last}"
            )
        return torch.tensor([[self.bos, *tokens]])

    # -- ground truth

    detected = ("state", "bigram")  # what codes are compared with neurons on
    group = property(lambda self: self.digits)  # tokens that make one word

    def texts(self, tokens):
        """The text of each token of tokens (n, T), with a space before each state."""
        space = 1 % self.digits
        return [
            [" " * (i % self.digits == space) + self.vocabulary[t] for i, t in enumerate(row)]
            for row in tokens
        ]

    def labelled(self, rng, n, length):
        """Sequences (n, length), and what is known of each position: {kind: (labels (n, length), -1 for none, names)}.

        state: at its last digit. trigram: a state and the first digit of the next one, at that digit. bigram: the last
        two digits, wherever they stand. digit: the last.
        """
        tokens = self.held_out(rng, n, length)
        digit = np.where(tokens < self.base, tokens, -1)
        bigram, state, trigram = (np.full((n, length), -1) for _ in range(3))
        bigram[:, 2:] = digit[:, 1:-1] * self.base + digit[:, 2:]
        ends = state[:, self.digits :: self.digits]
        ends[:] = self.decode(tokens[:, 1:])[:, : ends.shape[1]]
        firsts = trigram[:, self.digits + 1 :: self.digits]
        firsts[:] = (
            ends[:, : firsts.shape[1]] * self.base + digit[:, self.digits + 1 :: self.digits]
        )
        digits, states = self.vocabulary[: self.base], [self.name(s) for s in range(self.n_states)]
        pairs, trigrams = (
            [x + y for x in digits for y in digits],
            [f"{s} {d}" for s in states for d in digits],
        )
        return tokens, {
            "state": (state, states),
            "trigram": (trigram, trigrams),
            "bigram": (bigram, pairs),
            "digit": (digit, digits),
        }

    def prefixes(self):
        """Every state as a prompt, and every state with each first digit that may follow: tokens (n, T) each."""
        states = self.runs(np.arange(self.n_states))
        s, d = np.nonzero(
            self.transition_matrix @ np.eye(self.base)[self.encode(np.arange(self.n_states))[:, 0]]
        )
        return states, torch.cat((states[s], torch.from_numpy(d)[:, None]), dim=1)

    def loss_floor(self, length):
        """The entropy of the source, in nats a token, over the `length` tokens that follow BOS.

        No model's expected loss is lower. Exact: the first state, the distribution over states as it
        changes from step to step, and a state cut off by the end are all counted as they are.
        """
        n, rest = divmod(length, self.digits)
        rows = np.concatenate(
            (self.transition_matrix, np.full((1, self.n_states), 1 / self.n_states))
        )  # the last: at first

        def entropy(n_digits):
            """Of the first n_digits digits of the next state, given the one before, in nats: (N + 1)."""
            p = np.add.reduceat(
                rows, np.arange(0, self.n_states, self.base ** (self.digits - n_digits)), axis=1
            )
            return -(p * np.log(np.where(p > 0, p, 1))).sum(1)

        before, total, whole = np.eye(self.n_states + 1)[-1], 0.0, entropy(self.digits)
        for _ in range(n):
            total, before = total + before @ whole, np.append(before @ rows, 0)
        return float((total + before @ entropy(rest)) / length)

    def measures(self, tokens, loss):
        """What a loss on sequences (n, T) is held against."""
        return {"loss_floor": self.loss_floor(tokens.shape[1] - 1)}

    # -- control

    def runs(self, states):
        """The prompts BOS s for states (n): tokens (n, 1 + digits)."""
        states = np.asarray(states)
        return torch.from_numpy(
            np.concatenate((np.full((len(states), 1), self.bos), self.encode(states)), axis=1)
        )

    # -- files

    def __eq__(self, other):
        return isinstance(other, FSM) and self.to_json() == other.to_json()

    def files(self):
        """What a run's folder keeps of the data, by file."""
        return {self.file: json.dumps(self.to_json())}

    def settle(self, folder):
        """Finds what else there is in a run's folder: nothing."""

    def to_json(self):
        return {**asdict(self), "successors": self.successors.tolist()}

    @classmethod
    def from_json(cls, data):
        """The machine that to_json described; its edges are the saved ones, whatever NumPy draws today."""
        numbers = {name: value for name, value in data.items() if name != "successors"}
        if not all(type(value) is int for value in numbers.values()):
            raise ValueError(f"the numbers of a machine must be whole, not {numbers}")
        n_states, n_edges, ordered = (
            data["n_states"],
            data["n_edges"],
            np.sort(np.asarray(data["successors"]), axis=-1),
        )
        fits = ordered.shape == (n_states, n_edges) and ordered.dtype.kind == "i"
        if (
            not fits
            or ordered.min() < 0
            or ordered.max() >= n_states
            or (ordered[:, 1:] == ordered[:, :-1]).any()
        ):
            raise ValueError(
                f"successors must be {n_edges} different states for each of {n_states}"
            )
        return cls(**{**data, "successors": ordered})
