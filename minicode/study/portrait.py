"""What the page shows of a code: where it fires and where not, what it does, which are near it."""

from collections import defaultdict
from functools import cache

import numpy as np
import torch.nn.functional as F

from minicode.codebook import codebooks
from minicode.runtime.progress import bar
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
    near = by_cosine(recording, shown)

    @cache
    def places_of(kind, name):
        of_kind, names = kinds[kind]
        alike = [label for label, other in enumerate(names) if other == name]
        return np.flatnonzero(np.isin(of_kind, alike))

    rows = []
    for place, number in enumerate(bar(shown.tolist(), desc="codes for the page")):
        where = recording.where[number]
        row = [str(recording.names[number]), len(where)]
        row += examples(labels[number], where, places_of)
        row.append(lifted(forced[number], free[number]) if number in forced else [])
        if len(where):
            shares = overlap(where, recording.fired, recording.count)[shown]
            row += [near[number], nearest(place, shares)]
        else:
            row += [[], []]
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


def by_cosine(recording, shown):
    """Of each living code of `shown`, by its number: those near it in its codebook."""
    together = defaultdict(list)  # places in shown, by codebook
    for place, number in enumerate(shown):
        code = recording.names[number]
        if recording.count[number]:
            together[code.site, code.group].append(place)
    near = {}
    for (site, group), places in together.items():
        ids = [recording.names[number].id for number in shown[places]]
        codes = codebooks(recording.model)[site].codes.detach()[group or 0, ids]
        unit = F.normalize(codes.float(), dim=-1).cpu()
        for place, own in zip(places, unit):
            cosine = np.full(len(shown), -1.0)
            cosine[places] = unit @ own
            near[shown[place]] = nearest(place, cosine)
    return near


def nearest(place, values):
    """The highest values above 0, but for that of one place: [[place, value], ...]."""
    values[place] = -1
    best = np.argsort(-values, kind="stable")[:N_NEAR]
    return [[int(i), digits(values[i])] for i in best if values[i] > 0]
