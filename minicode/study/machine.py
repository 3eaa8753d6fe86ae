"""A model against the machine that it was trained on: accuracies, and control by its codes.

Control: a run is in state a, and is to go on as if it were in b. Of two digits, with d the first
that is sampled, the codes that are forced, and where, are

    the run             BOS ... a a   d    e       d e: the next state, which should follow b
    forced there                  ^   ^
    those of the run        BOS b b   d            "b's own run", which ends at the same digit

so that the network is told twice where it is: when it chooses d, and when it chooses e.
"""

from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from statistics import fmean, stdev

import numpy as np
import torch

from minicode.codebook import codebooks
from minicode.control import force
from minicode.model import choose, evaluating
from minicode.runtime.progress import bar
from minicode.study.detectors import chosen, inputs

N_SEEDS = 5  # samples by which control is measured,
STUDENTS_T = 2.776  # and the t of so many for a 95 % interval

# -- accuracies


def transition_accuracy(fsm, model, generator=None):
    """Of 100 sequences sampled from BOS alone, the share of transitions that the machine allows."""
    start = fsm.prompt("").repeat(100, 1).to(model.device)
    tokens = model.generate(start, model.config.block_size, generator=generator)
    states = fsm.decode(tokens[:, 1:])
    return float(fsm.allowed(states).mean())


def next_state_probabilities(fsm, model):
    """Probability of each next state after the prompt BOS s, for every state s: (N, N) float64.

    The product of those of its digits: all states that start alike share one run of the model.
    """
    n_heads = -(-fsm.n_states // fsm.base)  # a head is all digits of a state but the last
    state, head = divmod(np.arange(fsm.n_states * n_heads), n_heads)
    # A head is a number of one digit less: its run is BOS, 0, and the head.
    tokens = torch.cat((fsm.runs(state), fsm.runs(head)[:, 2:]), dim=1)
    tables = []
    for part in tokens.split(2000):
        with evaluating(model):
            logits, _ = model(part.to(model.device))
        log_p = logits[:, -fsm.digits :].double().log_softmax(-1).cpu()
        head = part[:, 1 + fsm.digits :, None]  # (n, digits - 1, 1)
        log_head = log_p[:, :-1].gather(-1, head).sum(1)
        tables.append(log_head + log_p[:, -1, : fsm.base])  # (n, base)
    p = torch.cat(tables).exp().view(fsm.n_states, -1)
    return p[:, : fsm.n_states].numpy()


def first_transition_accuracy(fsm, model):
    """Of the n_edges most probable states after each prompt BOS s, the share that may follow s."""
    p = next_state_probabilities(fsm, model)
    best = np.argsort(-p, axis=1, kind="stable")[:, : fsm.n_edges]
    true = np.take_along_axis(fsm.transition_matrix, best, axis=1)
    return float((true > 0).mean())


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

    Returns tokens (n, T + digits); the logits of the digits, (2, digits, n, vocab_size): of the
    runs, and of b's own; and what intervene returned.
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
    return tokens, torch.stack(logits, dim=1), edits


def copy_codes(model, sites, random=None):
    """An `intervene` for steer: forces at `sites` what b's run chooses there.

    Or, where there is a generator `random`, as many random codes of these sites.
    """

    def intervene(tokens, b_run):
        own = chosen(model, b_run)
        codes = {site: own[site] for site in sites}
        if random:
            for site, ids in codes.items():
                ids.random_(codebooks(model)[site].n_codes, generator=random)
        return partial(force, model, codes, tokens.shape[1] - 1)

    return intervene


def wrong_state(fsm, intervene, rng):
    """An `intervene` for steer: what another does for a wrong state, as far from b for every b."""
    offset = rng.integers(1, fsm.n_states)

    def instead(tokens, b_run):
        b = fsm.decode(b_run[:, 1:])[:, 0]
        wrong = b_run.clone()
        wrong[:, : 1 + fsm.digits] = fsm.runs((b + offset) % fsm.n_states)
        return intervene(tokens, wrong)

    return instead


def shift(module, delta, position):
    """Within the block, delta (B, n) is added to a module's output (B, T, n) at one position."""

    def add(module, args, output):
        output[:, position] += delta

    return module.register_forward_hook(add)


def add_mean_difference(fsm, model, layer, rng):
    """An `intervene` for steer: after a layer, adds mean activations in b, less those in a.

    What a residual stream is steered by without codebooks. A mean is taken over 8 contexts: another
    state, and then the last tokens of the run.
    """
    contexts = fsm.runs(rng.integers(fsm.n_states, size=8))
    next_layer = [*model.h, model.ln_f][layer + 1]  # what reaches it is the layer's output

    def means(tails):
        """Mean activation after runs that end in tails (n, t): (n, n_embd)."""
        each_context = contexts.repeat(len(tails), 1)
        each_tail = tails.cpu().repeat_interleave(len(contexts), dim=0)
        tokens = torch.cat((each_context, each_tail), dim=1)
        output = inputs(model, [next_layer], tokens)
        return output[:, -1].unflatten(0, (-1, len(contexts))).mean(1)

    def intervene(tokens, b_run):
        in_b = means(b_run[:, 1:])
        in_a = means(tokens[:, 1 - b_run.shape[1] :])
        return partial(shift, model.h[layer], in_b - in_a, tokens.shape[1] - 1)

    return intervene


def control(fsm, model, tokens, b, intervene, generator=None):
    """How far runs (n, T), steered by one state, go on as runs in the states b (n) do.

    control   the share of next states that are successors of b; chance is n_edges / n_states
    jsd       divergence, in nats, of the distributions of the next digit from those of b's own
              run, averaged over the digits of the state
    """
    n_follow = 0
    divergence = 0.0
    for part in torch.arange(len(b)).split(4096):
        after, logits, _ = steer(fsm, model, tokens[part], b[part], intervene, generator)
        state = fsm.decode(after[:, -fsm.digits :])  # (n, 1)
        n_follow += int(fsm.allowed(np.insert(state, 0, b[part], axis=1)).sum())
        of_runs, own = logits.softmax(-1)  # (digits, n, vocab_size) each
        divergence += jsd(of_runs, own).mean(0).sum().item()
    return {"control": n_follow / len(b), "jsd": divergence / len(b)}


def pairs(fsm):
    """All pairs of different states a, b, or 10,000 of them, always the same: two arrays (n,)."""
    every = np.flatnonzero(~np.eye(fsm.n_states, dtype=bool))
    if len(every) > 10_000:
        every = np.random.default_rng(0).permutation(every)[:10_000]
    return divmod(every, fsm.n_states)


def jsd(p, q):
    """Jensen-Shannon divergence of distributions (..., n), in nats: 0 if equal, at most ln 2."""
    entropy = torch.special.entr
    of_each = (entropy(p) + entropy(q)) / 2
    return (entropy((p + q) / 2) - of_each).sum(-1)


# -- the study of control


def control_study(run, n_pairs=400):
    """Control by site and at every site, beside the controls that it must beat.

    {way: {"first": figures, "inside": figures}}: at the first state of a run, and at the end of a
    random number of states. Figures are those of `control`: means over N_SEEDS samples of n_pairs
    pairs of states, and as "control_ci", ... half the width of their 95 % confidence interval.
    ValueError for a run without codebooks.
    """
    generator = torch.Generator(run.model.device).manual_seed(0)
    rng = np.random.default_rng(0)
    forced = forced_codes(run, generator, rng)
    shifts = {}  # by layer, of the dense model, if there is one and room for a context
    if run.dense and run.config.block_size >= 3 * run.fsm.digits:
        for layer in range(run.config.n_layer):
            shifts[layer] = add_mean_difference(run.fsm, run.dense, layer, rng)
    samples = defaultdict(list)  # figures by way and place
    for _ in bar(range(N_SEEDS), desc="control"):
        drawn = draw_pairs(run, n_pairs, rng)
        for way, intervene in {**forced, **shifts}.items():
            model = run.dense if way in shifts else run.model
            for where, (tokens, b) in drawn.items():
                figures = control(run.fsm, model, tokens, b, intervene, generator)
                samples[way, where].append(figures)
    result = {}
    for (way, where), rows in samples.items():
        result.setdefault(way, {})[where] = interval(rows)
    layers = [result.pop(layer) for layer in shifts]
    if layers:  # of which the best counts
        result["mean_difference"] = max(layers, key=lambda row: row["first"]["control"])
    return result


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
    ways["random_code"] = copy(sites, random=generator)
    ways["wrong_state"] = wrong_state(run.fsm, ways["all"], rng)
    return ways


def draw_pairs(run, n_pairs, rng):
    """Runs, and for each a state that it is not in: {"first": (tokens, b), "inside": (tokens, b)}.

    tokens (n_pairs, T) are BOS and one state, or a random number of states; b (n_pairs).
    """
    fsm = run.fsm
    others = rng.integers(1, fsm.n_states, size=n_pairs)
    a = rng.integers(fsm.n_states, size=n_pairs)
    first = (fsm.runs(a), (a + others) % fsm.n_states)
    most = run.config.block_size // fsm.digits - 1  # states that a run may have before the next
    n = rng.integers(most // 4, most) + 1
    tokens = fsm.sequences(rng, n_pairs, 1 + n * fsm.digits)
    others = rng.integers(1, fsm.n_states, size=n_pairs)
    a = fsm.decode(tokens[:, 1:])[:, -1]
    inside = (torch.from_numpy(tokens), (a + others) % fsm.n_states)
    return {"first": first, "inside": inside}


def interval(rows):
    """Means over rows {"control", ...}; as "control_ci", ... half the width of their intervals."""
    result = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        result[name] = fmean(values)
        result[f"{name}_ci"] = STUDENTS_T * stdev(values) / len(values) ** 0.5
    return result
