"""What the codes of a model stand for, and what they do: measures against ground truth, each beside a fair control.

`record_codes` runs a model over tokens; `detect` takes codes as detectors of labels, and `codes_against_neurons` compares
them with neurons; `control_study` forces codes, and what could pass for them; `agreement` compares two runs.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from tqdm import tqdm

from minicode.control import Code, chosen, force, record
from minicode.model import evaluating


@dataclass
class Recording:
    """The codes of a run on tokens (n, T). A column is one codebook and one of its k choices."""

    model: object
    tokens: np.ndarray  # (n, T)
    codes: np.ndarray  # (n, T, columns): ids, as they are stored
    columns: list  # (site, group), one for each column of codes

    def __post_init__(self):
        self.names, starts = [], {}  # a code's number is its place among those of all codebooks
        for site, group in dict.fromkeys(self.columns):
            starts[site, group] = len(self.names)
            self.names += [
                Code(site, group, i) for i in range(self.model.codebooks()[site].n_codes)
            ]
        first = np.array([starts[column] for column in self.columns], dtype=np.int32)
        self.fired = self.codes.reshape(-1, len(first)) + first  # (n * T, columns): numbers
        self.count = np.bincount(self.fired.ravel(), minlength=len(self.names))
        by_code = np.argsort(self.fired, axis=None, kind="stable") // len(first)
        self.where = np.split(
            by_code, np.cumsum(self.count)[:-1]
        )  # of each code, the positions at which it fires

    def places(self, number, most):
        """Up to `most` positions at which a code fires, evenly spread over the recording."""
        at = self.where[number]
        return at[np.linspace(0, len(at) - 1, min(most, len(at))).astype(int)]


def record_codes(model, tokens):
    """Runs the model over tokens (n, T)."""
    codebooks = {site: c for site, c in model.codebooks().items() if c.enabled}
    columns = [
        (site, group)
        for site, c in codebooks.items()
        for group in range(c.groups)
        for _ in range(c.k)
    ]
    kind = np.int16 if max(c.n_codes for c in codebooks.values()) < 2**15 else np.int32
    codes = np.empty((*tokens.shape, len(columns)), kind)
    for rows in np.array_split(np.arange(len(tokens)), -(-len(tokens) // 64)):
        with evaluating(model), record(model) as ids:
            model(torch.from_numpy(tokens[rows]).to(model.device))
        codes[rows] = torch.cat([i.flatten(2) for i in ids.values()], dim=-1).cpu().numpy()
    return Recording(model, tokens, codes, columns)


# -- what a code stands for


@dataclass
class Detectors:
    """Codes as detectors of labels: precision, recall and F1, (codes, labels) each."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    total: np.ndarray  # (labels): positions that have the label


def detect(recording, labels, names):
    """How well each code detects each label: labels (n, T), -1 for none (paper, section 4.2)."""
    flat, n_labels = labels.ravel(), len(names)
    known = flat >= 0
    pairs = recording.fired[known].astype(np.int64) * n_labels + flat[known, None]
    both = np.bincount(pairs.ravel(), minlength=len(recording.names) * n_labels).reshape(
        len(recording.names), n_labels
    )
    total = np.bincount(flat[known], minlength=n_labels)
    precision, recall = both / np.maximum(recording.count, 1)[:, None], both / np.maximum(total, 1)
    return Detectors(
        precision, recall, 2 * both / np.maximum(recording.count[:, None] + total, 1), total
    )


def best_labels(recording, kinds):
    """What each code stands for: (kind, name, precision, recall, F1) of its best label of kinds {kind: (labels, names)}; or None."""
    best = [None] * len(recording.names)
    for kind, (labels, names) in kinds.items():
        found = detect(recording, labels, names)
        for code, label in enumerate(found.f1.argmax(1)) if names else ():
            if found.f1[code, label] > (best[code][-1] if best[code] else 0):
                row = (
                    found.precision[code, label],
                    found.recall[code, label],
                    found.f1[code, label],
                )
                best[code] = (kind, names[label], *map(float, row))
    return best


def matches(texts, pattern):
    """Labels (n, T): 0 at each token in which a match of the pattern, or of its first bracket, ends; -1 elsewhere.

    texts[i][t] is the text of a token.
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
    """By layer: the share of the codes in use at the end of these prompts (n, T) that fire on one of them only.

    Of the MLPs' codes, and over all states as prompts (bigrams) or states and a digit (trigrams): the measure of the
    tutorial of the paper's code.
    """
    shares = []
    for site, ids in chosen(model, prompts).items():
        if site.startswith("mlp."):
            count = np.bincount(ids.flatten().cpu().numpy())
            shares.append(float((count == 1).sum() / (count > 0).sum()))
    return shares


def inputs(model, modules, tokens):
    """What reaches each of these modules when the model runs over tokens (n, T): [(n, T, d), ...]."""
    seen = []
    with ExitStack() as stack, evaluating(model):
        for module in modules:
            keep = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            stack.enter_context(keep)
        model(tokens.to(model.device))
    return seen


def neurons(model, tokens):
    """Activations (N, units): of the MLPs' hidden layers, and of what reaches the codebooks."""
    hidden = [block.mlp.mlp_mid_codebook for block in model.h]
    modules = dict.fromkeys([*model.codebooks().values(), *hidden])  # each once
    parts = []
    for part in torch.from_numpy(tokens).split(64):
        parts.append(torch.cat(inputs(model, modules, part), dim=-1).flatten(0, 1))
    return torch.cat(parts)


def best_neurons(values, labels, wanted):
    """For each (label, recall) wanted: the highest precision of one unit of values (N, units), above or below the
    threshold at which it has that recall."""
    best = torch.zeros(len(wanted))
    for part in torch.cat((values, -values), dim=1).split(256, dim=1):
        ordered = part.T.contiguous().sort(dim=1).values  # (units, N)
        for i, (label, recall) in enumerate(wanted):
            there = part[labels == label].T.contiguous()  # (units, P)
            n_found = max(1, math.ceil(recall * there.shape[1] - 1e-9))
            threshold = there.kthvalue(there.shape[1] - n_found + 1, dim=1, keepdim=True).values
            n_fired = ordered.shape[1] - torch.searchsorted(ordered, threshold)
            best[i] = max(best[i], ((there >= threshold).sum(1, keepdim=True) / n_fired).max())
    return best.numpy()


def codes_against_neurons(run, recording, kinds, n_positions=2**15):
    """The measures `detectors` of design.md, and a point (neuron's, code's precision) for each label."""
    model = run.dense or run.model
    rows = max(1, n_positions // recording.tokens.shape[1])
    values, points = neurons(model, recording.tokens[:rows]), []
    for labels, names in kinds:
        flat = labels[:rows].ravel()
        found = detect(recording, labels, names)
        best = [
            (label, found.f1[:, label].argmax()) for label in np.unique(flat[flat >= 0])
        ]  # label and code
        best = [(label, code) for label, code in best if found.f1[code, label] > 0]
        precision = best_neurons(
            values,
            torch.from_numpy(flat),
            [(label, found.recall[code, label]) for label, code in best],
        )
        points += [
            (float(p), float(found.precision[code, label]), names[label])
            for p, (label, code) in zip(precision, best)
        ]
    neuron, code = np.array(
        [point[:2] for point in points] or [[0.0, 0.0]]
    ).T  # none: no label occurs, or no code fires on one
    wins = float((code > neuron).mean())
    return {
        "code_precision": float(code.mean()),
        "neuron_precision": float(neuron.mean()),
        "code_wins": wins,
        "points": points,
    }


# -- what a code does


def forced_distributions(recording, numbers, n_contexts=16):
    """{number: next-token distribution} with each of these codes forced at the end of a context, averaged over contexts;
    and the distribution when nothing is forced, averaged over the same.

    The contexts are the starts of other sequences, cut at a position at which the code fires somewhere.
    """
    model, length = recording.model, recording.tokens.shape[1]
    contexts = torch.from_numpy(recording.tokens[:n_contexts]).to(model.device)
    places = {number: recording.where[number] % length for number in numbers}
    ends = {number: at[at >= 3].min(initial=length - 1) for number, at in places.items()}

    def after(last):
        with evaluating(model):
            return (
                model(contexts[:, : last + 1])[0][:, -1].float().softmax(-1).mean(0).cpu().numpy()
            )

    free, result = cache(after), {}
    for number, last in tqdm(ends.items(), desc="forcing codes", leave=False, disable=None):
        with force(model, str(recording.names[number]), last):
            result[number] = after(last)
    return result, np.mean([free(last) for last in ends.values()], axis=0)


# -- the seed question


def agreement(one, other, generator):
    """Do the codes of two runs agree? For each code of one, the highest intersection over union of the positions on which
    it fires with those of a code of the other: the mean over codes; and by chance, with the other's positions shuffled."""

    places = [at for at in one.where if len(at)]

    def mean_best(fired):
        both = (np.bincount(fired[at].ravel(), minlength=len(other.names)) for at in places)
        return float(
            np.mean([(b / (len(at) + other.count - b)).max() for b, at in zip(both, places)])
        )

    return {
        "mean_iou": mean_best(other.fired),
        "chance": mean_best(generator.permutation(other.fired)),
    }
