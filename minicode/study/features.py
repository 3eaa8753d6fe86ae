"""Codes beside other features: what can be measured of any modules at the sites of a model.

A module at a site gives q for an activation a, and afterwards tells which features it chose: ids
(B, T, G, K) and, if they have any, strengths of the same shape. A model of codebooks goes on with
q; one that is only read goes on with a.
"""

from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch

from minicode.model import evaluating
from minicode.study import machine
from minicode.study.detectors import Fired


def sites(model):
    """The modules at the default sites, identities in a dense model: {"head.0": module, ...}."""
    found = {}
    for layer, block in enumerate(model.h):
        found[f"head.{layer}"] = block.attn.head_codebook
        found[f"mlp.{layer}"] = block.mlp.mlp_codebook
    return found


def put(model, modules):
    """Puts others there."""
    for layer, block in enumerate(model.h):
        block.attn.head_codebook = modules[f"head.{layer}"]
        block.mlp.mlp_codebook = modules[f"mlp.{layer}"]


@contextmanager
def passing_on(model, choose):
    """Within the block the sites pass on what choose(name, a, q) says."""

    def hook(name, module, arguments, q):
        return choose(name, arguments[0], q)

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, module in sites(model).items():
            stack.enter_context(module.register_forward_hook(partial(hook, name)))
        yield


def as_it_is(name, a, q):
    return a


def replaced(name, a, q):
    return q


# -- how well q stands for a


def activations(model, tokens):
    """What comes to each site of a model that is read: {name: (B, T, d)}."""
    seen = {}

    def listen(name, a, q):
        seen[name] = a
        return a

    with passing_on(model, listen):
        model(tokens)
    return seen


def unexplained(model, tokens, choose):
    """sum |a - q|² / sum |a - mean(a)|², the mean over sites."""
    shares = []

    def listen(name, a, q):
        spread = (a - a.mean((0, 1))).square().sum()
        shares.append(((a - q).square().sum() / spread).item())
        return choose(name, a, q)

    with passing_on(model, listen):
        model(tokens)
    return float(np.mean(shares))


def losses(model, twin, tokens):
    """Cross-entropy on tokens (n, T): replaced at every site, or at one; by zero; of the twin."""

    def loss(choose, model=model):
        with passing_on(model, choose):
            parts = [model(part[:, :-1], part[:, 1:])[1] for part in tokens.split(16)]
        return torch.stack(parts).mean().item()

    def only(chosen):
        return lambda name, a, q: q if name == chosen else a

    zero = loss(lambda name, a, q: torch.zeros_like(q))
    dense = loss(as_it_is, twin)
    every = loss(replaced)
    return {
        "loss": every,
        "loss_one": float(np.mean([loss(only(name)) for name in sites(model)])),
        "loss_zero": zero,
        "recovered": (zero - every) / (zero - dense),
    }


# -- what the features stand for


class Features(Fired):
    """Which features fire on tokens (n, T); strength: for each, how strongly where it fires.

    A feature whose strength can be negative counts as two, one for each end.
    """

    def __init__(self, model, tokens, choose):
        modules = sites(model)
        first = {}  # the number of each site's features of id 0, (G, 1)
        n = 0
        for name, module in modules.items():
            first[name] = n + 2 * module.n_codes * torch.arange(module.groups).unsqueeze(-1)
            n += 2 * module.groups * module.n_codes
        fired = []
        strengths = []

        def listen(name, a, q):
            module = modules[name]
            strength = getattr(module, "strengths", torch.ones(module.ids.shape))
            number = first[name] + 2 * module.ids + (strength < 0)
            number[strength == 0] = n
            fired.append(number.flatten(2))
            strengths.append(strength.abs().flatten(2))
            return choose(name, a, q)

        def joined(parts):
            """What was heard of each part of the tokens at each site, as (n * T, columns)."""
            rows = [
                torch.cat(parts[i : i + len(first)], -1) for i in range(0, len(parts), len(first))
            ]
            return torch.cat(rows).flatten(0, 1).numpy()

        with passing_on(model, listen):
            for part in tokens.split(16):
                model(part)
        super().__init__(joined(fired), n)
        self.strength = self.split(joined(strengths).ravel()[self.order()])

    def figures(self):
        """Features a token, and the share that never fires."""
        alive = self.count.reshape(-1, 2).any(1)
        return {"chosen": self.count.sum() / len(self.fired), "dead": 1 - alive.mean()}


def best_features(pairs, labels, n_labels):
    """How well the best feature detects each label, from that strength on that suits it best.

    pairs: of each feature, the positions at which it fires, and how strongly; labels (N,), -1 for
    none. Returns (4, n_labels): precision, recall and F1 where F1 is highest; and how high both
    precision and recall can be.
    """
    total = np.bincount(labels[labels >= 0], minlength=n_labels)
    best = np.zeros((4, n_labels))
    for at, strength in pairs:
        order = np.argsort(-strength, kind="stable")
        weaker = -strength[order]
        n_fired = np.searchsorted(weaker, weaker, side="right")  # at the threshold of each
        own = labels[at[order]]
        known = own >= 0
        key = np.sort(own[known] * (len(at) + 1) + n_fired[known])
        label, n_fired = np.divmod(key, len(at) + 1)
        first = np.searchsorted(label, label)
        n_right = np.searchsorted(key, key, side="right") - first
        precision = n_right / n_fired
        recall = n_right / total[label]
        f1 = 2 * n_right / (n_fired + total[label])
        rising = np.argsort(f1, kind="stable")
        last = dict(zip(label[rising], rising))  # of each label the entry of the highest F1
        for i, entry in last.items():
            if f1[entry] > best[2, i]:
                best[:3, i] = precision[entry], recall[entry], f1[entry]
        np.maximum.at(best[3], label, np.minimum(precision, recall))
    return best


# -- what they do


def control_of(fsm, model, choose, tokens, b, generator):
    """machine.control, as at the runs' last position all sites pass on what they have in b's run.

    Of codebooks that is what forcing all of its codes does.
    """
    seen = {}

    def listen(name, a, q):
        seen[name] = q[:, -1]
        return choose(name, a, q)

    def intervene(tokens, b_run):
        model(b_run)
        own = dict(seen)

        def instead(name, a, passed):
            passed = passed.clone()
            passed[:, tokens.shape[1] - 1] = own[name]
            return passed

        return partial(passing_on, model, instead)

    with passing_on(model, listen):
        return machine.control(fsm, model, tokens, b, intervene, generator)["control"]
