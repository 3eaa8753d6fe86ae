"""TokFSM (paper, section 4.1): a finite state machine, written as digits, that is known wholly.

N states; each goes to one of n_edges random successors with equal probability. State 38 is written
as the tokens 3 8, so the network never sees a state, only digits. A sequence is BOS, then states:

    BOS 3 8 0 7 9 1 ...     the states 38 -> 07 -> 91, the tokens [10, 3, 8, 0, 7, 9, 1, ...]
"""

import json
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch

from minicode.runtime.options import check_options, option

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(eq=False)
class FSM:
    """A machine made from its numbers; ValueError for those of which none can be made.

    successors          (N, n_edges) int64: the states that may follow each, in rising order
    transition_matrix   (N, N) float64: the probability of each next state; rows sum to 1
    digits              tokens that write a state; also `group`, the tokens that make one word
    bos, vocab_size     the token BOS, which is `base`, and the number of tokens with it
    vocabulary          the text of each token
    """

    model = None  # of transformers: none
    file = "fsm.json"  # its name in a run's folder
    most_block = math.inf  # tokens in a block, for there is no end to the data
    sample_length = 24  # tokens of a sample
    topics = ()  # that it can be steered to
    between = "\n"  # samples
    detected = ("state", "bigram")  # what codes are compared with neurons on
    n_states: int = option(100, "states of the machine", least=2, below=10_001)
    n_edges: int = option(10, "successors of a state, all equally probable", least=1)
    base: int = option(10, "base in which a state is written, 2 to 36", least=2, below=37)
    seed: int = option(0, "seed of the machine's edges", flag=False)
    successors: np.ndarray | None = option(
        None, "the edges (N, n_edges), different in each row; none: drawn", flag=False
    )

    def __post_init__(self):
        check_options(self)
        self.digits = len(np.base_repr(self.n_states - 1, self.base))
        self.powers = self.base ** np.arange(self.digits)[::-1]  # what each digit counts
        self.group = self.digits
        self.least_block = 2 * self.digits
        self.bos = self.base
        self.vocab_size = self.base + 1
        self.vocabulary = [*DIGITS[: self.base], "BOS"]
        if self.successors is None:
            every = np.tile(np.arange(self.n_states), (self.n_states, 1))
            shuffled = np.random.default_rng(self.seed).permuted(every, axis=1)
            self.successors = shuffled[:, : self.n_edges]
        edges = self.successors = np.sort(self.successors, axis=-1)
        fits = edges.shape == (self.n_states, self.n_edges) and edges.dtype.kind in "iu"
        if not fits or (np.diff(edges, prepend=-1, append=self.n_states) <= 0).any():
            wanted = f"{self.n_edges} different successors"
            raise ValueError(f"a machine needs {wanted} for each of its {self.n_states} states")
        self.transition_matrix = np.zeros((self.n_states, self.n_states))
        np.put_along_axis(self.transition_matrix, edges, 1 / self.n_edges, axis=1)

    def __str__(self):
        return f"TokFSM: {self.n_states} states, {self.n_edges} edges each"

    # -- states and tokens

    def encode(self, states):
        """States (...) as digits (..., digits), the highest first."""
        return np.asarray(states)[..., None] // self.powers % self.base

    def decode(self, tokens):
        """Digits (..., T) as states (..., T // digits); -1 where they are none.

        They are none where BOS is among them, or where they say N or more. Digits are a list, an
        array or a tensor; states an array.
        """
        tokens = torch.as_tensor(tokens).cpu().numpy()
        n = tokens.shape[-1] // self.digits
        digits = tokens[..., : n * self.digits].reshape(*tokens.shape[:-1], n, self.digits)
        states = digits @ self.powers
        valid = (digits < self.base).all(-1) & (states < self.n_states)
        return np.where(valid, states, -1)

    def allowed(self, states):
        """Which transitions of states (..., n) the machine allows: bool (..., n - 1)."""
        before = states[..., :-1]
        after = states[..., 1:]
        known = (before >= 0) & (after >= 0)
        return known & (self.transition_matrix[before, after] > 0)

    def sequences(self, rng, n, length):
        """n sequences of `length` tokens, BOS included: int64 (n, length). The first state is any.

        rng is a NumPy generator.
        """
        n_states = -(-(length - 1) // self.digits)  # the last may be cut off
        states = [rng.integers(self.n_states, size=n)]
        choices = rng.integers(self.n_edges, size=(n, n_states))
        for choice in choices.T[1:]:
            states.append(self.successors[states[-1], choice])
        digits = self.encode(np.stack(states, axis=1)).reshape(n, -1)
        return np.insert(digits, 0, self.bos, axis=1)[:, :length]

    held_out = sequences  # what a model is evaluated on: as endless as what it is trained on

    def runs(self, states):
        """The prompts BOS s for states (n): a tensor of tokens (n, 1 + digits)."""
        return torch.from_numpy(np.insert(self.encode(states), 0, self.bos, axis=1))

    # -- for people

    def name(self, state):
        """A state for people: its digits, such as "07"; "??" for a -1 of decode."""
        if state < 0:
            return "?" * self.digits
        return "".join(DIGITS[digit] for digit in self.encode(state))

    def show(self, tokens):
        """A sequence (T,) from BOS on, as text: its states, an x before one that may not follow."""
        states = self.decode(tokens[1:])
        arrows = ["", *np.where(self.allowed(states), " -> ", " -x ")]
        text = "".join(arrow + self.name(state) for arrow, state in zip(arrows, states))
        rest = tokens[1 + len(states) * self.digits :]
        if len(rest):
            text += " .. " + "".join(self.vocabulary[token] for token in rest)
        return text

    def prompt(self, text):
        """BOS and the states that a text names, such as "38" or "38 07": a tensor of tokens (1, T).

        ValueError for what is no list of states.
        """
        tokens = [
            self.vocabulary.index(digit) if digit in self.vocabulary else self.bos
            for digit in "".join(text.lower().split())
        ]
        if len(tokens) % self.digits or -1 in self.decode(tokens):
            they_are = f"{self.name(0)} to {self.name(self.n_states - 1)}"
            raise ValueError(f"prompt {text!r} is not a list of states: they are {they_are}")
        return torch.tensor([[self.bos, *tokens]])

    def texts(self, tokens):
        """The text of each token of tokens (n, T), with a space before each state: n lists of T."""
        texts = np.array(self.vocabulary, dtype=object)[tokens]
        texts[:, 1 :: self.digits] = " " + texts[:, 1 :: self.digits]
        return texts.tolist()

    # -- ground truth

    def labelled(self, rng, n, length):
        """Sequences (n, length), and what is known of each position: {kind: (labels, names)}.

        Labels (n, length) say which of the names it is, -1 for none. The kinds:
        state    at its last digit
        trigram  a state and the first digit of the next one, at that digit
        bigram   the last two digits, wherever they stand
        digit    the last
        digit before    the one before that, and which digit of its state the last is
        """
        tokens = self.held_out(rng, n, length)
        state, bigram, trigram, earlier = np.full((4, n, length), -1)
        state[:, self.digits :: self.digits] = self.decode(tokens[:, 1:])
        digit = np.where(tokens < self.base, tokens, -1)
        bigram[:, 2:] = digit[:, 1:-1] * self.base + digit[:, 2:]
        before = state[:, :-1]
        trigram[:, 1:] = np.where(before >= 0, before * self.base + digit[:, 1:], -1)
        place = np.arange(1, length - 1) % self.digits
        earlier[:, 2:] = digit[:, 1:-1] * self.digits + place
        digits = self.vocabulary[: self.base]
        places = range(1, self.digits + 1)
        states = [self.name(s) for s in range(self.n_states)]
        return tokens, {
            "state": (state, states),
            "trigram": (trigram, [f"{s} {d}" for s in states for d in digits]),
            "bigram": (bigram, [x + y for x in digits for y in digits]),
            "digit": (digit, digits),
            "digit before": (earlier, [f"{x} at place {i}" for x in digits for i in places]),
        }

    def prefixes(self):
        """Every state as a prompt, and each with every first digit that may follow it.

        Two tensors of tokens: (N, 1 + digits) and (n, 2 + digits).
        """
        states = self.runs(range(self.n_states))
        before = states.repeat_interleave(self.n_edges, dim=0)
        after = self.runs(self.successors.ravel())
        with_digit = torch.cat((before, after[:, 1:2]), dim=1)
        return states, with_digit.unique(dim=0)

    def loss_floor(self, length):
        """The entropy of the source, in nats a token, over the `length` tokens that follow BOS.

        No model's expected loss is lower. Exact: the first state, the distribution over states as
        it changes from step to step, and a state cut off by the end are all counted as they are.
        """
        before = np.ones(1)  # the distribution of the state before; the first has only one
        next_state = np.full((1, self.n_states), 1 / self.n_states)  # that of the next, after each
        total = 0.0
        for left in range(length, 0, -self.digits):
            n_alike = self.base ** max(0, self.digits - left)  # states that start alike: cut off
            starts = np.arange(0, self.n_states, n_alike)
            p = np.add.reduceat(next_state, starts, axis=1)
            entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
            total += before @ entropy
            before = before @ next_state
            next_state = self.transition_matrix
        return float(total / length)

    def measures(self, tokens, loss):
        """What a loss on sequences (n, T) is held against."""
        return {"loss_floor": self.loss_floor(tokens.shape[1] - 1)}

    # -- files

    def __eq__(self, other):
        return isinstance(other, FSM) and self.to_json() == other.to_json()

    def sizes(self):
        """What the configuration of a model has to be for these data."""
        return {"vocab_size": self.vocab_size}

    def files(self):
        """What a run's folder keeps of the data, by file."""
        return {self.file: json.dumps(self.to_json())}

    def settle(self, folder):
        """Finds what else there is in a run's folder: nothing."""

    def to_json(self):
        """All that makes the machine, as from_json reads it."""
        return {**asdict(self), "successors": self.successors.tolist()}

    @classmethod
    def from_json(cls, data, folder=None):
        """The machine that to_json described; its edges are the saved ones, whatever NumPy draws.

        ValueError for what describes none.
        """
        return cls(**{**data, "successors": np.asarray(data["successors"])})
