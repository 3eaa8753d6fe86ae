"""What codes stand for, measured against ground truth and beside neurons; and what they do.

`record_codes` runs a model over tokens. `detect` takes codes as detectors of labels, which
`codes_against_neurons` compares with neurons. `forced_distributions` says what codes make the model
predict, `agreement` compares two runs.
"""

import math
from collections import namedtuple
from contextlib import ExitStack
from functools import cache

import numpy as np
import torch

from minicode.codebook import codebooks, perplexity
from minicode.control import force, record
from minicode.model import evaluating
from minicode.notation import codes_of
from minicode.runtime.progress import bar

N_SEQUENCES = 512  # that codes are recorded on
MOST_CHOICES = 1 << 26  # of codes, in all of them: large models get fewer sequences
MOST_VALUES = 1 << 28  # of neurons


class Fired:
    """Which of n features fire where, from fired (N, columns): at each position their numbers.

    A number of n is none at all. count (n): how often each fires; where: for each, the positions.
    """

    def __init__(self, fired, n):
        self.fired = fired
        self.count = np.bincount(fired.ravel(), minlength=n + 1)[:n]
        self.where = self.split(self.order() // fired.shape[1])

    def order(self):
        """The places of `fired`, feature by feature."""
        return np.argsort(self.fired, axis=None, kind="stable")

    def split(self, values):
        """Values in that order as a list, an array for each feature."""
        return np.split(values, np.cumsum(self.count))[:-1]


class Recording(Fired):
    """The codes (n, T, columns) of a model on tokens (n, T), both NumPy arrays.

    columns   (site, group) of each codebook in use, as many times as it makes choices
    names     the codes of all these codebooks; a code's number is its place among them

    A position that passes through its site untouched has no code there.
    """

    def __init__(self, model, tokens, codes):
        self.model = model
        self.tokens = tokens
        self.codes = codes
        self.columns = []
        self.names = []
        first = []  # for each column, the number of its code 0
        for site, codebook in codebooks(self.model).items():
            if codebook.enabled:
                for group in range(codebook.groups):
                    self.columns += [(site, group)] * codebook.k
                    first += [len(self.names) + group * codebook.n_codes] * codebook.k
                self.names += codes_of(site, codebook)
        n_codes = len(self.names)
        codes = codes.reshape(-1, len(first))
        super().__init__(np.where(codes < 0, n_codes, codes + first), n_codes)

    def counts(self):
        """By site, how often each code fires: {"mlp.1": (G, C), ...}."""
        books = codebooks(self.model)
        sizes = [codebook.usage.numel() for codebook in books.values()]
        parts = torch.from_numpy(self.count).split(sizes)
        return {site: part.view_as(books[site].usage) for site, part in zip(books, parts)}


def spread(places, most):
    """Up to `most` of some places, evenly spread over them."""
    return places[np.linspace(0, len(places) - 1, min(most, len(places))).astype(int)]


def held_out(run):
    """Tokens (n, T) of a run's data that it was not trained on, and their labels."""
    rng = np.random.default_rng((run.config.seed, 3))
    return run.data.labelled(rng, n_recorded(run), run.config.block_size)


def n_recorded(run):
    """On how many sequences the codes of a run are recorded."""
    books = codebooks(run.model).values()
    choices = run.config.block_size * sum(book.groups * book.k for book in books)
    return min(N_SEQUENCES, max(16, MOST_CHOICES // choices))


def record_codes(model, tokens):
    """A Recording of the model on tokens (n, T), a NumPy array."""
    codes = []
    for part in torch.from_numpy(tokens).split(16):
        with evaluating(model), record(model) as ids:
            model(part.to(model.device))
        joined = torch.cat([i.flatten(2) for i in ids.values()], dim=-1)
        codes.append(joined.int().cpu())
    return Recording(model, tokens, torch.cat(codes).numpy())


def chosen(model, tokens):
    """What every codebook chooses at the end of tokens (B, T): {"mlp.1": ids (B, G, k), ...}."""
    with evaluating(model), record(model) as codes:
        model(tokens.to(model.device))
    return {site: ids[:, -1] for site, ids in codes.items()}


def usage(counts):
    """By site, from how often each code was chosen (G, C): how many are in use, and how evenly."""
    sites = {}
    for site, count in counts.items():
        sites[site] = {
            "dead_code_fraction": (count == 0).float().mean().item(),
            "perplexity": perplexity(count).mean().item(),
            "codes": count.numel(),
        }
    return sites


# -- what a code stands for


Detectors = namedtuple("Detectors", "precision recall f1 total")


def detect_one(recording, there):
    """How well each code detects where it is true, bool (n, T) (paper, section 4.2): Detectors.

    Precision, recall and F1, (codes) each; and at how many positions it is true.
    """
    fires = recording.count
    total = there.sum()
    fired = recording.fired[there.ravel()].ravel()
    both = np.bincount(fired, minlength=len(fires) + 1)[:-1]
    precision = both / np.maximum(fires, 1)
    recall = both / max(total, 1)
    f1 = 2 * both / np.maximum(fires + total, 1)
    return Detectors(precision, recall, f1, total)


def detect(recording, labels, names):
    """The same for each label: labels (n, T), -1 for none. Tables are (codes, labels)."""
    each = [detect_one(recording, labels == label) for label in range(len(names))]
    return Detectors(*(np.stack(columns, axis=-1) for columns in zip(*each)))


def best_labels(recording, kinds):
    """What each code stands for: its best label of kinds {kind: (labels, names)}, or None.

    A label is (kind, name, precision, recall, F1), and the best is that of the highest F1.
    """
    best = [None] * len(recording.names)
    highest = np.zeros(len(best))
    for kind, (labels, names) in kinds.items():
        for label, name in enumerate(names):
            found = detect_one(recording, labels == label)
            for code in np.flatnonzero(found.f1 > highest):
                measures = [table[code].item() for table in found[:3]]
                best[code] = (kind, name, *measures)
            highest = np.maximum(highest, found.f1)
    return best


def by_merit(recording, labels):
    """The numbers of all codes: those of the highest F1 first; of equals, which fire the most."""
    f1 = [round(label[-1], 2) if label else 0 for label in labels]
    return np.lexsort((-recording.count, -np.array(f1)))


def matches(texts, pattern):
    """Labels (n, T): 0 at each token in which a match of the pattern ends, -1 elsewhere.

    Of a pattern with brackets, a match of the first. texts[i][t] is the text of a token.
    """
    labels = np.full((len(texts), len(texts[0])), -1)
    for row, pieces in zip(labels, texts):
        ends = np.cumsum([len(piece) for piece in pieces])
        for match in pattern.finditer("".join(pieces)):
            start, end = match.span(min(1, pattern.groups))
            if end > max(start, 0):
                row[np.searchsorted(ends, end)] = 0
    return labels


def purity(model, prompts):
    """By layer: of the MLP's codes in use at the end of prompts (n, T), the share used by one only.

    Over all states as prompts (bigrams), or states and a digit (trigrams), it is the measure of the
    tutorial of the paper's code.
    """
    shares = []
    for site, ids in chosen(model, prompts).items():
        if site.startswith("mlp."):
            count = ids.unique(return_counts=True)[1]
            shares.append((count == 1).double().mean().item())
    return shares


def inputs(model, modules, tokens):
    """What reaches these modules, side by side, as the model runs over tokens: (n, T, units)."""
    seen = []
    with ExitStack() as stack, evaluating(model):
        for module in modules:
            hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            stack.enter_context(hook)
        model(tokens.to(model.device))
    return torch.cat(seen, dim=-1)


def neurons(model, tokens):
    """Activations (N, units): of the MLPs' hidden layers, and of what reaches the codebooks."""
    modules = {*codebooks(model).values(), *model.hidden()}  # each once
    parts = [inputs(model, modules, part) for part in torch.from_numpy(tokens).split(16)]
    return torch.cat(parts).flatten(0, 1)


def best_neurons(values, labels, wanted):
    """The highest precision of one unit of values (N, units), for each (label, recall) wanted.

    A unit detects a label above or below the threshold at which it has that recall.
    """
    best = torch.zeros(len(wanted))
    for part in torch.cat((values.T, -values.T)).split(256):  # (units, N)
        ordered = part.sort(dim=1).values
        for i, (label, recall) in enumerate(wanted):
            there = part[:, labels == label]  # (units, P)
            n_found = max(1, math.ceil(recall * there.shape[1] - 1e-9))
            threshold = there.kthvalue(there.shape[1] - n_found + 1, dim=1, keepdim=True).values
            n_fired = ordered.shape[1] - torch.searchsorted(ordered, threshold)  # (units, 1)
            n_right = (there >= threshold).sum(1, keepdim=True)
            best[i] = max(best[i], (n_right / n_fired).max())
    return best.tolist()


def codes_against_neurons(run, recording, kinds, n_positions=2**15):
    """How precise each label's best code is, and the best neuron of as much recall.

    kinds are (labels, names); neurons are those of the dense model, if there is one, on so many of
    the positions. {"code_precision", "neuron_precision": means over labels; "code_wins": the share
    of labels; "points": [(neuron's precision, code's, name), ...]}.
    """
    length = recording.tokens.shape[1]
    dense = run.dense or run.model
    units = neurons(dense, recording.tokens[:1]).shape[1]
    rows = max(1, min(n_positions, MOST_VALUES // units) // length)
    values = neurons(dense, recording.tokens[:rows])
    points = []
    for labels, names in kinds:
        flat = labels[:rows].ravel()
        wanted = []  # each label that a code detects there, and the recall of the best code
        codes = []  # its precision, and the label's name
        for label, name in enumerate(names):
            found = detect_one(recording, labels == label)
            best = found.f1.argmax()
            recall = found.recall[best].item()
            if recall and label in flat:
                wanted.append((label, recall))
                codes.append((found.precision[best].item(), name))
        neurons_found = best_neurons(values, torch.from_numpy(flat), wanted)
        points += [(neuron, *code) for neuron, code in zip(neurons_found, codes)]
    # No point: no label occurs, or no code fires on one.
    neuron, code = np.array([point[:2] for point in points] or [(0.0, 0.0)]).T
    return {
        "code_precision": float(code.mean()),
        "neuron_precision": float(neuron.mean()),
        "code_wins": float((code > neuron).mean()),
        "points": points,
    }


# -- what a code does


def forced_distributions(recording, numbers, n_contexts=16):
    """What comes next when codes are forced, one at a time, at the end of a context.

    {number: probabilities (vocab_size)}, averaged over contexts; and {number: those when nothing is
    forced}, over the same. The contexts are the starts of other sequences, cut at a position at
    which the code fires somewhere.
    """
    model = recording.model
    length = recording.tokens.shape[1]
    contexts = torch.from_numpy(recording.tokens[:n_contexts]).to(model.device)

    def after(last):
        with evaluating(model):
            logits, _ = model(contexts[:, : last + 1])
        return logits[:, -1].float().softmax(-1).mean(0).cpu().numpy()

    left_alone = cache(after)
    free = {}
    forced = {}
    for number in bar(numbers, desc="forcing codes"):
        at = recording.where[number] % length
        last = at[at >= 3].min(initial=length - 1)
        free[number] = left_alone(last)
        with force(model, str(recording.names[number]), last):
            forced[number] = after(last)
    return forced, free


# -- the seed question


def overlap(at, fired, count):
    """Intersection over union of some positions with those at which each code fires: (codes)."""
    both = np.bincount(fired[at].ravel(), minlength=len(count) + 1)[:-1]
    return both / (len(at) + count - both)


def agreement(one, other, generator):
    """Do the codes of two runs agree? Of two recordings of the same tokens.

    For each code of one, the highest intersection over union of the positions at which it fires
    with those of a code of the other: the mean over codes, and weighted by how often they fire; and
    the same by chance, with the other's positions shuffled.
    """
    alive = np.flatnonzero(one.count)

    def best(fired):
        return np.array([overlap(one.where[code], fired, other.count).max() for code in alive])

    found = best(other.fired)
    chance = best(generator.permutation(other.fired))
    weights = one.count[alive]
    return {
        "mean_iou": float(found.mean()),
        "chance": float(chance.mean()),
        "weighted_iou": float(np.average(found, weights=weights)),
        "weighted_chance": float(np.average(chance, weights=weights)),
    }


def agreement_on(one, other, labels, names):
    """The same of the codes that detect a label best, one of each run: the mean over labels."""
    best = [detect(recording, labels, names).f1.argmax(0) for recording in (one, other)]
    shares = []
    for label in np.unique(labels[labels >= 0]):
        shared = overlap(one.where[best[0][label]], other.fired, other.count)
        shares.append(shared[best[1][label]])
    return float(np.mean(shares))
