"""A model against the machine that it was trained on: accuracies, and control by its codes."""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from minicode.control import chosen, force
from minicode.model import choose, evaluating
from minicode.study.detectors import inputs

N_SEEDS = 5  # samples by which control is measured,
STUDENTS_T = 2.776  # and the t of so many for a 95 % interval

# -- accuracies


def transition_accuracy(fsm, model, generator=None, n=100):
    """Of n sequences sampled from BOS alone, the share of transitions that the machine allows."""
    start = torch.full((n, 1), fsm.bos, device=model.device)
    tokens = model.generate(start, model.config.block_size, generator=generator)
    return float(fsm.allowed(fsm.decode(tokens[:, 1:].cpu())).mean())


def next_state_probabilities(fsm, model):
    """Probability of each next state after the prompt BOS s, for every state s: (N, N)."""
    n_heads = -(-fsm.n_states // fsm.base)  # a head is all digits of a state but the last
    state, head = divmod(np.arange(fsm.n_states * n_heads), n_heads)
    heads = torch.from_numpy(fsm.encode(head)[:, 1:])  # (N * n_heads, digits - 1)
    tokens = torch.cat((fsm.runs(state), heads), dim=1)
    tables = []
    for part in tokens.split(2000):
        with evaluating(model):
            logits, _ = model(part.to(model.device))
        log_p = logits[:, -fsm.digits :].double().log_softmax(-1).cpu()
        log_head = log_p[:, :-1].gather(-1, part[:, 1 + fsm.digits :, None]).sum(1)  # (n, 1)
        tables.append(log_head + log_p[:, -1, : fsm.base])
    p = torch.cat(tables).exp().view(fsm.n_states, -1)
    return p[:, : fsm.n_states].numpy()


def first_transition_accuracy(fsm, model):
    """Of the n_edges most probable states after each prompt BOS s, the share that may follow s."""
    p = next_state_probabilities(fsm, model)
    best = np.argsort(-p, axis=1, kind="stable")[:, : fsm.n_edges]
    return float((np.take_along_axis(fsm.transition_matrix, best, axis=1) > 0).mean())


def accuracies(fsm, model, seed):
    """What only the machine can tell of a model, for the training loop."""
    generator = torch.Generator(model.device).manual_seed(seed)
    return {
        "transition_accuracy": transition_accuracy(fsm, model, generator),
        "first_transition_accuracy": first_transition_accuracy(fsm, model),
    }


# -- control


def steer(fsm, model, tokens, b, intervene, generator=None, temperature=1.0, top_k=None):
    """Continues runs (n, T) by one state each, as if they were in the states b (n).

    intervene(tokens, b_run) is asked before each digit what to do at the run's last position to
    make it go on as b_run does, which is BOS b and the digits sampled since. It returns a function
    that makes a context manager, such as partial(force, model, codes, position). What was done for
    earlier digits stays in place.

    Returns tokens (n, T + digits), and the logits of the digits, (2, digits, n, vocab_size): of
    the runs, and of b's own.
    """
    tokens = tokens.to(model.device)
    b_run = fsm.runs(b).to(model.device)
    edits = []
    logits = []
    for _ in range(fsm.digits):
        edits.append(intervene(tokens, b_run))
        with evaluating(model), ExitStack() as stack:
            own = model(b_run)[0][:, -1].float()
            for edit in edits:
                stack.enter_context(edit())
            steered = model(tokens)[0][:, -1].float()
        logits.append(torch.stack((steered, own)))
        new = choose(steered, temperature, top_k, generator)
        tokens = torch.cat((tokens, new), dim=1)
        b_run = torch.cat((b_run, new), dim=1)
    return tokens, torch.stack(logits, dim=1)


def copy_codes(model, sites, change=lambda site, ids: ids):
    """An `intervene` for steer: forces at `sites` what b's run chooses there.

    Or what `change` makes of it: from a site and its ids (n, G, k) other ids.
    """

    def intervene(tokens, b_run):
        own = chosen(model, b_run)
        codes = {site: change(site, ids) for site, ids in own.items() if site in sites}
        return partial(force, model, codes, tokens.shape[1] - 1)

    return intervene


def random_codes(model, generator, site, ids):
    """A change for copy_codes: as many random codes of the site."""
    n_codes = model.codebooks()[site].n_codes
    return torch.randint(n_codes, ids.shape, generator=generator, device=ids.device)


def shuffled_codes(generator, site, ids):
    """A change for copy_codes: the codes of the b of another run."""
    return ids[torch.randperm(len(ids), generator=generator, device=ids.device)]


def wrong_state(fsm, intervene, rng):
    """An `intervene` for steer: what another does for a wrong state, as far from b for every b."""
    offset = int(rng.integers(1, fsm.n_states))

    def instead(tokens, b_run):
        b = fsm.decode(b_run[:, 1:].cpu())[:, 0]
        wrong = fsm.runs((b + offset) % fsm.n_states).to(b_run.device)
        since = b_run[:, wrong.shape[1] :]
        return intervene(tokens, torch.cat((wrong, since), dim=1))

    return instead


def shift(module, delta, position):
    """Within the block, delta (B, n) is added to a module's output (B, T, n) at one position."""

    def add(module, args, output):
        output[:, position] += delta

    return module.register_forward_hook(add)


def add_mean_difference(fsm, model, layer, rng):
    """An `intervene` for steer: after a layer, adds mean activations in b, less those in a."""
    contexts = fsm.runs(rng.integers(fsm.n_states, size=8))
    next_layer = [*model.h, model.ln_f][layer + 1]

    def means(tails):
        """Mean activation after runs that end in tails (n, t): (n, n_embd)."""
        tails, which = tails.cpu().unique(dim=0, return_inverse=True)
        each_context = contexts.repeat(len(tails), 1)
        each_tail = tails.repeat_interleave(len(contexts), dim=0)
        tokens = torch.cat((each_context, each_tail), dim=1)
        last = inputs(model, [next_layer], tokens)[0][:, -1]
        return last.view(len(tails), len(contexts), -1).mean(1)[which]

    def intervene(tokens, b_run):
        delta = means(b_run[:, 1:]) - means(tokens[:, 1 - b_run.shape[1] :])
        return partial(shift, model.h[layer], delta, tokens.shape[1] - 1)

    return intervene


def control(fsm, model, tokens, b, intervene, generator=None):
    """How far runs (n, T), steered by one state, go on as runs in the states b (n) do.

    control   the share of next states that are successors of b; chance is n_edges / n_states
    jsd, kl   divergence, in nats, of the distributions of the next digit from those of b's own
              run, averaged over the digits of the state
    """
    totals = np.zeros(3)
    for part in torch.arange(len(b)).split(4096):
        after, logits = steer(fsm, model, tokens[part], b[part], intervene, generator)
        state = fsm.decode(after[:, -fsm.digits :].cpu())[:, 0]
        follows = (state >= 0) & (fsm.transition_matrix[b[part], state] > 0)
        p, q = logits.softmax(-1)  # (digits, n, vocab_size) each
        divergence = torch.stack((jsd(p, q), kl(q, p)))  # (2, digits, n)
        totals += [follows.sum(), *divergence.sum(-1).double().mean(-1).tolist()]
    return dict(zip(("control", "jsd", "kl"), (totals / len(b)).tolist()))


def pairs(fsm, most=10_000):
    """All pairs of different states a, b, or so many of them, drawn at random: two arrays."""
    every = np.flatnonzero(~np.eye(fsm.n_states, dtype=bool))
    if len(every) > most:
        every = np.random.default_rng(0).permutation(every)[:most]
    return divmod(every, fsm.n_states)


def kl(p, q):
    """Kullback-Leibler divergence of q from p, in nats: distributions (..., n), giving (...)."""
    return torch.special.xlogy(p, p / q.clamp_min(1e-30)).sum(-1)


def jsd(p, q):
    """Jensen-Shannon divergence of distributions (..., n), in nats: 0 if equal, at most ln 2."""
    middle = (p + q) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


# -- the study of control


def control_study(run, n_pairs=400):
    """Control by site and at every site, beside the controls that it must beat.

    {way: {"first": figures, "inside": figures}}: at the first state of a run, and at the end of a
    random number of states. Figures are those of `control`, and the jsd as a share of that left
    alone: means over N_SEEDS samples of n_pairs pairs of states, and as "control_ci", ... half the
    width of their 95 % confidence interval. ValueError for a run without codebooks.
    """
    generator = torch.Generator(run.model.device).manual_seed(0)
    rng = np.random.default_rng(0)
    forced = forced_codes(run, generator, rng)
    shifts = mean_differences(run, rng)
    samples = defaultdict(lambda: {"first": [], "inside": []})
    for _ in tqdm(range(N_SEEDS), desc="control", leave=False, disable=None):
        drawn = draw_pairs(run, n_pairs, rng)
        for way, intervene in {**forced, **shifts}.items():
            model = run.dense if way in shifts else run.model
            for where, (tokens, b) in drawn.items():
                figures = control(run.fsm, model, tokens, b, intervene, generator)
                samples[way][where].append(figures)
    return summarise(samples, layers=shifts)


def forced_codes(run, generator, rng):
    """{way: intervene}: at which sites codes are forced, and whose."""
    sites = run.sites()
    copy = partial(copy_codes, run.model)
    ways = {"none": copy([])}
    for site in sites:
        ways[site] = copy([site])
    mlps = [site for site in sites if site.startswith("mlp.")]
    if mlps:
        ways["all_mlp"] = copy(mlps)
    ways["all"] = copy(sites)
    ways["random_code"] = copy(sites, partial(random_codes, run.model, generator))
    ways["wrong_state"] = wrong_state(run.fsm, ways["all"], rng)
    ways["shuffled"] = copy(sites, partial(shuffled_codes, generator))
    return ways


def mean_differences(run, rng):
    """{layer: intervene} for the dense model, if there is one and room for a context."""
    if not run.dense or run.config.block_size < 3 * run.fsm.digits:
        return {}
    layers = range(run.config.n_layer)
    return {layer: add_mean_difference(run.fsm, run.dense, layer, rng) for layer in layers}


def draw_pairs(run, n_pairs, rng):
    """{"first": (tokens, b), "inside": (tokens, b)}: runs (n_pairs, T), other states."""
    fsm = run.fsm
    others = rng.integers(1, fsm.n_states, size=n_pairs)
    a = rng.integers(fsm.n_states, size=n_pairs)
    first = (fsm.runs(a), (a + others) % fsm.n_states)
    most = run.config.block_size // fsm.digits - 1  # states that a run may have before the next
    n = int(rng.integers(most // 4, most)) + 1
    tokens = fsm.sequences(rng, n_pairs, 1 + n * fsm.digits)
    others = rng.integers(1, fsm.n_states, size=n_pairs)
    b = (fsm.decode(tokens[:, 1:])[:, -1] + others) % fsm.n_states
    return {"first": first, "inside": (torch.from_numpy(tokens), b)}


def summarise(samples, layers):
    """Means and intervals of samples {way: {where: rows}}; of these layers only the best."""
    result = {}
    for way, rows in samples.items():
        result[way] = {where: interval(rows[where]) for where in rows}
        for where, row in result[way].items():
            free = result["none"][where]["jsd"]
            row["normalised_jsd"] = row["jsd"] / free if free else None
    shifts = [{**result.pop(layer), "layer": layer} for layer in layers]
    if shifts:
        result["mean_difference"] = max(shifts, key=lambda way: way["first"]["control"])
    return result


def interval(rows):
    """Means over rows {"control", ...}; as "control_ci", ... half the width of their intervals."""
    result = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        result[name] = float(values.mean())
        result[f"{name}_ci"] = float(STUDENTS_T * values.std(ddof=1) / len(rows) ** 0.5)
    return result
