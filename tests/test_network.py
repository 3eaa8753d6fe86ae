"""The network in the page: in a real browser it does what PyTorch does, and can be touched."""

import json
import re
from contextlib import ExitStack

import numpy as np
import torch
from conftest import make_model

from minicode import block, force, load_run, record, start_codebooks
from minicode.codebook import codebooks
from minicode.model import evaluating
from minicode.study.page import weights

N_PROMPTS = 50
STORIES = {"vocab_size": 300, "codebooks": "head", "k": 8, "n_codes_head": 48}
EVERY_SITE = {"k": 2, "groups_mlp": 2, "similarity": "cosine", "selection": "nearest"}
RUN = """
    const found = [];
    for (const { network: data, runs } of %s) {
      const network = new Network({ ...data, numbers: fromBase64(data.numbers) });
      found.push(runs.map(({ tokens, edits }) => {
        const past = network.past();
        const logits = tokens.map((id) => [...network.logits(network.read(past, id, edits))]);
        return { logits, codes: past.codes };
      }));
    }
    return found;"""
LITTLE = {  # a page needs no more than this
    "title": "run", "about": "", "measures": [], "figures": [], "vocab": [], "group": 0,
    "length": 0, "tokens": [], "codes": [], "left_out": 0, "fits": 0.5, "machine": None,
    "steered": [], "states": [], "network": None, "prompt": "",
}  # fmt: skip


def make_started(**settings):
    """A model whose codes stand where its activations are."""
    model = make_model(**settings)
    rng = np.random.default_rng(0)
    start_codebooks(model, torch.from_numpy(rng.integers(model.config.vocab_size, size=(64, 12))))
    return model


MODELS = {
    "TokFSM": lambda run: run.model,
    "stories": lambda run: make_started(**STORIES),
    "every site": lambda run: make_started(**EVERY_SITE),
    "norms": lambda run: make_started(k=3, similarity="dot", layer_norm=True),
}


def edit(code, kind="force", first=0, last=10**6):
    """A code such as head.0.3.12 for the network in the page."""
    *site, number = code.split(".")
    group = site.pop() if len(site) > 2 else "0"
    place = {"site": ".".join(site), "group": int(group), "id": int(number)}
    return {"kind": kind, **place, "first": first, "last": last}


def in_torch(model, tokens, edits=()):
    """Logits (T, V), ids (T, G, k) by site, and what reaches each codebook (T, G, d)."""
    seen = {}
    with ExitStack() as stack:
        for site, book in codebooks(model).items():
            seen[site] = []
            hook = book.register_forward_pre_hook(lambda book, args, at=seen[site]: at.append(args))
            stack.callback(hook.remove)
        for act, codes, position in edits:
            stack.enter_context(act(model, codes, position))
        codes = stack.enter_context(record(model))
        stack.enter_context(evaluating(model))
        logits = model(torch.tensor([tokens]))[0][0]
    arrived = {}
    for site, book in codebooks(model).items():
        arrived[site] = book.activations(seen[site][0][0][0])
    return logits.numpy(), {site: ids[0].tolist() for site, ids in codes.items()}, arrived


def tie(book, group, a, ours, theirs):
    """Two choices for a (d) part: by how much their scores differ there, and how far the codes are.

    Both as a share of what the first is.
    """
    codes = book.codes[group].double()
    slot = next(i for i, (one, other) in enumerate(zip(ours, theirs)) if one != other)
    left = a.double()
    if book.selection == "pursuit":
        left = left - codes[ours[:slot]].sum(0)
    pair = codes[[ours[slot], theirs[slot]]]
    scores = pair @ left
    if book.similarity == "cosine":
        scores = scores / pair.norm(dim=1)
    if book.similarity == "distance":
        scores = scores - pair.square().sum(1) / 2
    return scores.diff().abs() / (1 + scores[0].abs()), pair.diff(dim=0).norm() / pair[0].norm()


def check(model, found, logits, codes, arrived):
    """Both do the same, but where two codes score alike; returns up to where that is known."""
    books = codebooks(model)
    n = len(logits)
    for position in range(n):
        for site, ids in codes.items():
            for group, theirs in enumerate(ids[position]):
                ours = found["codes"][site][position][group]
                if ours != theirs:
                    a = arrived[site][position, group]
                    scores, distance = tie(books[site], group, a, ours, theirs)
                    assert scores < 1e-6, (site, position)
                    if distance > 1e-6:  # else training has made them one
                        return position
        np.testing.assert_allclose(found["logits"][position], logits[position], atol=1e-3)
    return n


def prompts(model):
    rng = np.random.default_rng(1)
    for i in range(N_PROMPTS):
        yield rng.integers(model.config.vocab_size, size=1 + i % 12).tolist()


def named(ids_by_site, position):
    """The first chosen code of each codebook at a position, by name."""
    for site, ids in ids_by_site.items():
        for group, some in enumerate(ids[position]):
            yield f"{site}.{group}.{some[0]}" if len(ids[position]) > 1 else f"{site}.{some[0]}"


def left_alone(model):
    for tokens in prompts(model):
        yield tokens, [], ()


def forced_and_blocked(model):
    """Every other code forced at a position, and what was chosen there blocked everywhere."""
    for number, tokens in enumerate([*prompts(model)][3:30]):
        at = number % len(tokens)
        blocked = [*named(in_torch(model, tokens)[1], at)][::2]
        forced = [re.sub(r"\d+$", str(number % 7), code) for code in blocked]
        blocked = [code for code in blocked if code not in forced]
        there = [edit(code, "force", at, at) for code in forced]
        edits = there + [edit(code, "block") for code in blocked]
        yield tokens, edits, [(force, forced, at), (block, blocked, None)]


def state_put_in(model):
    """All codes that the network has after the prompt before, forced in the middle."""
    there = [0]
    for tokens in [*prompts(model)][2:20]:
        state = {site: ids[-1] for site, ids in in_torch(model, there)[1].items()}
        at = len(tokens) // 2
        edits = []
        for site, ids in state.items():
            for group, some in enumerate(ids):
                edits += [edit(f"{site}.{group}.{number}", "force", at, at) for number in some]
        ids = {site: torch.tensor(some) for site, some in state.items()}
        yield tokens, edits, [(force, ids, at)]
        there = tokens


def changed(model):
    yield from forced_and_blocked(model)
    yield from state_put_in(model)


def test_the_network_in_the_page_is_that_of_pytorch(browse, tiny_run):
    models = [make(load_run(tiny_run)) for make in MODELS.values()]
    asked = [[*left_alone(model), *changed(model)] for model in models]
    cases = []
    for model, some in zip(models, asked):
        runs = [{"tokens": tokens, "edits": edits} for tokens, edits, _ in some]
        cases.append({"network": weights(model), "runs": runs})
    found = browse(LITTLE, RUN % json.dumps(cases))
    for name, model, some, results in zip(MODELS, models, asked, found):
        n_known = 0
        for (tokens, _, in_python), result in zip(some, results):
            n_known += check(model, result, *in_torch(model, tokens, in_python))
        assert n_known >= 0.95 * sum(len(tokens) for tokens, *_ in some), name
