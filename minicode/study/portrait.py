"""What the page shows of a code: where it fires and where not, what it does, which are near it."""

from functools import cache

import numpy as np
import torch.nn.functional as F
from tqdm import tqdm

from minicode.codebook import codebooks
from minicode.study.detectors import forced_distributions, overlap, spread
from minicode.study.lookup import two_lines

MOST_WORK = 2e12  # parameters times positions, for forcing codes one at a time
N_PLACES = 20  # at which a code fires
N_COUNTER = 5  # at which its label is and it does not fire; and as many the other way round
N_NEXT = 8  # tokens that it makes more probable
N_NEAR = 5  # codes near it
LIFTED = 1.01  # times as probable, at least
HARDLY = 1e-3  # is added to probabilities, so that no token leads that hardly ever comes


def portraits(recording, kinds, labels, ranked):
    """What the page gets of the codes `ranked`, the best first; as a list in the order of codes.

    Each is [name, count, label in two lines or None, precision, recall, places, misses,
    false_alarms, next, near, together]:

    places          in all tokens, at which it fires
    misses          at which its label is and it does not fire; false_alarms: the other way round
    next            [[token, its probability when the code is forced and when not, lift], ...]
    near, together  [[code, how near], ...], by the cosine, and by the overlap of where they fire;
                    a code is its place in this list
    """
    living = ranked[recording.count[ranked] > 0]
    size = sum(weight.numel() for weight in recording.model.parameters())
    affordable = int(MOST_WORK / size / recording.tokens.shape[1])
    forced, free = forced_distributions(recording, living[:affordable])
    shown = np.sort(ranked)
    near = Neighbours(recording, shown)

    @cache
    def places_of(kind, name):
        of_kind, names = kinds[kind]
        alike = [label for label, other in enumerate(names) if other == name]
        return np.flatnonzero(np.isin(of_kind, alike))

    rows = []
    for number in tqdm(shown.tolist(), desc="codes for the page", leave=False, disable=None):
        where = recording.where[number]
        row = [str(recording.names[number]), len(where)]
        row += examples(labels[number], where, places_of)
        row.append(lifted(forced[number], free[number]) if number in forced else [])
        row += [near.by_cosine(number), near.by_overlap(number)] if len(where) else [[], []]
        rows.append(row)
    return rows


def examples(label, where, places_of):
    """Of a code that fires at `where`, what stands between its count and `next` in its row.

    places_of(kind, name) are the places of a label.
    """
    places = spread(where, N_PLACES).tolist()
    if not label:
        return [None, None, None, places, [], []]
    kind, name, precision, recall, _ = label
    there = places_of(kind, name)
    misses = spread(np.setdiff1d(there, where), N_COUNTER).tolist()
    false_alarms = spread(np.setdiff1d(where, there), N_COUNTER).tolist()
    return [two_lines(kind, name), precision, recall, places, misses, false_alarms]


def lifted(p, free):
    """The tokens that p makes the most times as probable: [[token, p, free, lift], ...]."""
    lift = (p + HARDLY) / (free + HARDLY)
    tokens = [token for token in np.argsort(-lift)[:N_NEXT] if lift[token] >= LIFTED]
    rows = [(int(token), p[token], free[token], lift[token]) for token in tokens]
    return [[token, *map(digits, values)] for token, *values in rows]


def digits(value):
    """A number with four digits that count."""
    return float(f"{value:.4g}")


class Neighbours:
    """Of codes `shown` of a recording those near to one: [[place in shown, how near], ...]."""

    def __init__(self, recording, shown):
        self.recording = recording
        self.shown = shown
        self.alive = recording.count[shown] > 0
        self.books = codebooks(recording.model)
        self.directions = cache(self.directions)

    def directions(self, site, group):
        """The codes of a codebook with a length of 1 (C, d); and for each shown, its row or -1."""
        codes = F.normalize(self.books[site].codes.detach()[group or 0].float(), dim=-1)
        rows = []
        for number, alive in zip(self.shown, self.alive):
            code = self.recording.names[number]
            same = alive and (code.site, code.group) == (site, group)
            rows.append(code.id if same else -1)
        return codes.cpu(), np.array(rows)

    def by_cosine(self, number):
        code = self.recording.names[number]
        codes, rows = self.directions(code.site, code.group)
        cosine = (codes @ codes[code.id]).numpy()
        return self.nearest(number, np.where(rows < 0, -1, cosine[rows]))

    def by_overlap(self, number):
        recording = self.recording
        shares = overlap(recording.where[number], recording.fired, recording.count)
        return self.nearest(number, shares[self.shown])

    def nearest(self, number, values):
        values = np.where(self.shown == number, -1, values)
        best = np.argsort(-values, kind="stable")[:N_NEAR]
        return [[int(i), digits(values[i])] for i in best if values[i] > 0]
