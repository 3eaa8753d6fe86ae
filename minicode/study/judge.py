"""A method's row in the tables of minicode.compare, which says what each figure is."""

from functools import partial

import numpy as np
import torch

from minicode.study import detectors
from minicode.study.detectors import agreement, inputs
from minicode.study.features import (
    Features,
    activations,
    as_it_is,
    best_features,
    control_of,
    losses,
    sites,
    unexplained,
)
from minicode.study.machine import add_mean_difference, control, draw_pairs

LABELS = ("state", "trigram")  # what features are to detect
N_PAIRS = 1000  # of states, by which control is measured
COLUMNS = (  # of the tables
    ("error", "loss", "loss_one", "loss_zero", "recovered", "chosen", "dead", "seconds"),
    ("state_precision", "state_recall", "state_at_95"),
    ("trigram_precision", "trigram_recall", "trigram_at_95"),
    ("control_first", "control_inside", "mean_iou", "chance"),
)
DETECTION = ("precision", "recall", "at_95")


def held_out(twin, lot=3):
    """Tokens (n, T), the same for all seeds, and what is known of each: kinds."""
    rng = np.random.default_rng((0, lot))
    tokens, kinds = twin.data.labelled(rng, detectors.N_SEQUENCES, twin.config.block_size)
    found = {kind: (kinds[kind][0].ravel(), len(kinds[kind][1])) for kind in LABELS}
    return torch.from_numpy(tokens), found


def judge(model, twin, choose, other=None):
    """The figures of a model with features at its sites; other: the Features of seed 0."""
    tokens, kinds = held_out(twin)
    features = Features(model, tokens, choose)
    pairs = [*zip(features.where, features.strength)]

    def best(kind):
        return best_features(pairs, *kinds[kind])

    figures = {
        "error": unexplained(model, tokens[:64], choose),
        **losses(model, twin.model, tokens),
        **features.figures(),
        **detection(kinds, best),
        **steering(twin, partial(control_of, twin.fsm, model, choose)),
    }
    if choose is not as_it_is:
        del figures["loss_one"]  # these networks have never done without the other sites' codes
    if other:
        figures |= agreement(features, other, np.random.default_rng(0))
    return figures


def detection(kinds, best):
    """best(kind): as best_features gives it. The means over labels, and the share at 0.95."""
    figures = {}
    for kind, (labels, _) in kinds.items():
        there = np.unique(labels[labels >= 0])
        precision, recall, _, both = best(kind)[:, there]
        means = precision.mean(), recall.mean(), (both >= 0.95).mean()
        for name, mean in zip(DETECTION, means):
            figures[f"{kind}_{name}"] = mean
    return figures


def steering(twin, control_of):
    """Control at the first state and inside: control_of(tokens, b, generator)."""
    drawn = draw_pairs(twin, N_PAIRS, np.random.default_rng(0))
    figures = {}
    for where, (tokens, b) in drawn.items():
        generator = torch.Generator().manual_seed(0)
        figures[f"control_{where}"] = control_of(tokens, b, generator)
    return figures


def neurons(twin):
    """The neurons of the MLPs and the dimensions of the sites, each above or below a threshold."""
    tokens, kinds = held_out(twin)
    modules = [*sites(twin.model).values(), *twin.model.hidden()]
    parts = [inputs(twin.model, modules, part) for part in tokens.split(16)]
    values = torch.cat(parts).flatten(0, 1).T.numpy()  # (units, N)
    everywhere = np.arange(values.shape[1])

    def best(kind):
        pairs = ((everywhere, sign * unit) for unit in values for sign in (1, -1))
        return best_features(pairs, *kinds[kind])

    return {
        **losses(twin.model, twin.model, tokens),
        **detection(kinds, best),
        **steering(twin, partial(control_of, twin.fsm, twin.model, as_it_is)),
    }


def mean_differences(twin):
    """Of each label a direction: the mean of a site's activations where it is, less that of all."""
    others, known = held_out(twin, lot=4)
    before = activations(twin.model, others)
    tokens, kinds = held_out(twin)
    after = activations(twin.model, tokens)
    everywhere = np.arange(tokens.numel())

    def scores(kind):
        """(sites, labels, N)."""
        labels, n_labels = known[kind]
        one_hot = np.eye(n_labels + 1, dtype=np.float32)[labels]  # -1 is the last
        for site, a in before.items():
            a = a.flatten(0, 1).numpy()
            total = np.maximum(one_hot.sum(0), 1)
            means = one_hot.T @ a / total[:, None] - a.mean(0)
            yield means[:-1] @ after[site].flatten(0, 1).numpy().T

    def best(kind):
        labels, n_labels = kinds[kind]
        columns = []
        of_sites = [*scores(kind)]
        for label in range(n_labels):
            pairs = [(everywhere, table[label]) for table in of_sites]
            columns.append(best_features(pairs, np.where(labels == label, 0, -1), 1))
        return np.concatenate(columns, axis=1)

    def shifted(tokens, b, generator):
        """Added to the residual stream after the layer at which it does most."""
        found = []
        for layer in range(twin.config.n_layer):
            shift = add_mean_difference(twin.fsm, twin.model, layer, np.random.default_rng(0))
            found.append(control(twin.fsm, twin.model, tokens, b, shift, generator)["control"])
        return max(found)

    return {**detection(kinds, best), **steering(twin, shifted)}
