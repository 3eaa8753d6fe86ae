"""A model against the machine that it was trained on: accuracies, and control by its codes."""

from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from minicode.control import chosen, force
from minicode.model import choose, evaluating
from minicode.study.detectors import N_SEEDS, STUDENTS_T


def transition_accuracy(fsm, model, generator=None, n=100):
    """Of n sequences sampled from BOS alone, the share of transitions that the machine allows."""
    start = torch.full((n, 1), fsm.bos, device=model.device)
    tokens = model.generate(start, model.config.block_size, generator=generator)
    return float(fsm.allowed(fsm.decode(tokens[:, 1:].cpu())).mean())


def next_state_probabilities(fsm, model):
    """Probability of each next state after the prompt BOS s, for every state s: (N, N)."""
    n_heads = -(-fsm.n_states // fsm.base)  # a head is all digits of the next state but the last
    heads, tables = torch.from_numpy(fsm.encode(np.arange(n_heads))[:, 1:]), []  # (P, digits - 1)
    for runs in fsm.runs(np.arange(fsm.n_states)).split(max(1, 2000 // n_heads)):
        tokens = torch.cat((runs.repeat_interleave(n_heads, 0), heads.repeat(len(runs), 1)), dim=1)
        with evaluating(model):
            logits, _ = model(tokens.to(model.device))
        log_p = logits[:, -fsm.digits :].double().log_softmax(-1).cpu()
        head = log_p[:, :-1].gather(-1, tokens[:, 1 + fsm.digits :, None]).sum(1)  # (S * P, 1)
        tables.append(
            (head + log_p[:, -1, : fsm.base]).exp().view(len(runs), -1)[:, : fsm.n_states]
        )
    return torch.cat(tables).numpy()


def first_transition_accuracy(fsm, model):
    """For every state as the prompt: the overlap of the n_edges most probable next states with the true ones."""
    best = np.argsort(-next_state_probabilities(fsm, model), axis=1, kind="stable")[
        :, : fsm.n_edges
    ]
    return float((np.take_along_axis(fsm.transition_matrix, best, axis=1) > 0).mean())


def accuracies(fsm, model, seed):
    """What only the machine can tell of a model, for the training loop."""
    generator = torch.Generator(model.device).manual_seed(seed)
    return {
        "transition_accuracy": transition_accuracy(fsm, model, generator),
        "first_transition_accuracy": first_transition_accuracy(fsm, model),
    }


def steer(fsm, model, tokens, b, intervene, generator=None, temperature=1.0, top_k=None):
    """Continues runs (n, T) by one state each, as if they were in the states b (n).

    intervene(tokens, b_run) is asked before each digit what to do at the run's last position to make it go on as
    b_run does, which is BOS b and the digits sampled since; it returns a function that makes a context manager,
    such as partial(force, model, codes, position). The interventions of earlier digits stay in place.
    Returns tokens (n, T + digits), and for each digit the logits (n, vocab_size) of the runs and of b's own.
    """
    tokens, b_run = tokens.to(model.device), fsm.runs(b).to(model.device)
    edits, logits = [], []
    for _ in range(fsm.digits):
        edits.append(intervene(tokens, b_run))
        with evaluating(model):
            own = model(b_run)[0][:, -1].float()
            with ExitStack() as stack:
                for edit in edits:
                    stack.enter_context(edit())
                steered = model(tokens)[0][:, -1].float()
        logits.append((steered, own))
        new = choose(steered, temperature, top_k, generator)
        tokens, b_run = torch.cat((tokens, new), dim=1), torch.cat((b_run, new), dim=1)
    return tokens, logits


def random_codes(model, generator, codes):
    """Random codes in the place of those in a dict {"mlp.1": ids, ...}."""
    codebooks = model.codebooks()
    drawn = {}
    for site, ids in codes.items():
        n_codes = codebooks[site].n_codes
        drawn[site] = torch.randint(n_codes, ids.shape, generator=generator, device=ids.device)
    return drawn


def copy_codes(model, sites, change=lambda codes: codes):
    """An `intervene` for steer: forces at `sites` what b's run chooses there, or what `change` makes of it."""

    def intervene(tokens, b_run):
        codes = {site: ids for site, ids in chosen(model, b_run).items() if site in sites}
        return partial(force, model, change(codes), tokens.shape[1] - 1)

    return intervene


def control(fsm, model, tokens, b, intervene, generator=None):
    """How far runs (n, T), steered by one state, go on as runs in the states b (n) do.

    control: the share of next states that are successors of b; chance is n_edges / n_states. jsd, kl: divergence, in
    nats, of the distributions of the next digit from those of b's own run, averaged over the digits of the state.
    """
    figures = np.zeros(3)
    for part in torch.arange(len(b)).split(4096):
        after, logits = steer(fsm, model, tokens[part], b[part], intervene, generator)
        state = fsm.decode(after[:, -fsm.digits :].cpu())[:, 0]
        figures[0] += ((state >= 0) & (fsm.transition_matrix[b[part], state] > 0)).sum()
        for p, own in (pair.softmax(-1) for pair in map(torch.stack, logits)):
            figures[1] += jsd(p, own).sum().item() / fsm.digits
            figures[2] += kl(own, p).sum().item() / fsm.digits
    return dict(zip(("control", "jsd", "kl"), (figures / len(b)).tolist()))


def pairs(fsm, most=10_000):
    """All pairs of different states a, b, or so many of them, drawn at random: two arrays."""
    every = np.flatnonzero(~np.eye(fsm.n_states, dtype=bool))
    every = np.random.default_rng(0).permutation(every)[:most] if len(every) > most else every
    return every // fsm.n_states, every % fsm.n_states


def kl(p, q):
    """Kullback-Leibler divergence of q from p, in nats: distributions (..., n), giving (...)."""
    return torch.special.xlogy(p, p / q.clamp_min(1e-30)).sum(-1)


def jsd(p, q):
    """Jensen-Shannon divergence of distributions (..., n), in nats: 0 for equal, ln 2 for disjoint ones."""
    middle = (p + q) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


def shift(module, delta, position):
    """Within the block, delta (B, n) is added to a module's output (B, T, n) at one position."""
    return module.register_forward_hook(
        lambda m, args, out: out.index_add(
            1, torch.tensor([position], device=out.device), delta.unsqueeze(1)
        )
    )


def add_mean_difference(fsm, model, layer, rng):
    """An `intervene` for FSM.steer: adds, after a layer, the difference of the mean activations in b and in a."""
    contexts = fsm.runs(rng.integers(fsm.n_states, size=8))

    def means(tails):  # (n, t) tokens that end a run -> (n, n_embd)
        tails, which = tails.cpu().unique(dim=0, return_inverse=True)
        outputs = []
        with (
            evaluating(model),
            model.h[layer].register_forward_hook(lambda m, args, out: outputs.append(out[:, -1])),
        ):
            model(
                torch.cat(
                    (contexts.repeat(len(tails), 1), tails.repeat_interleave(len(contexts), 0)), 1
                ).to(model.device)
            )
        return outputs[0].view(len(tails), len(contexts), -1).mean(1)[which]

    def intervene(tokens, b_run):
        tail = b_run.shape[1] - 1
        return partial(
            shift,
            model.h[layer],
            means(b_run[:, 1:]) - means(tokens[:, -tail:]),
            tokens.shape[1] - 1,
        )

    return intervene


def control_study(run, n_pairs=400):
    """Control by site and at every site, beside the controls that it must beat: the measures `control` of design.md.

    first: at the first state of a run; inside: at the end of a random number of states. Means, and half the width of the
    95 % confidence interval, over N_SEEDS samples of n_pairs pairs of states.
    """
    fsm, model = run.fsm, run.model
    sites = run.sites()
    generator, rng = torch.Generator(model.device).manual_seed(0), np.random.default_rng(0)

    everywhere, other = copy_codes(model, sites), int(rng.integers(1, fsm.n_states))

    def wrong(tokens, b_run):
        """What a run in another state than b chooses, always the same other one."""
        state = fsm.decode(b_run[:, 1 : 1 + fsm.digits].cpu())[:, 0]
        run = fsm.runs((state + other) % fsm.n_states).to(b_run.device)
        return everywhere(tokens, torch.cat((run, b_run[:, 1 + fsm.digits :]), dim=1))

    def shuffled(codes):
        """At each site the codes of another pair's b."""
        return {
            s: ids[torch.randperm(len(ids), generator=generator, device=ids.device)]
            for s, ids in codes.items()
        }

    mlps = [site for site in sites if site.startswith("mlp.")]
    ways = {
        "none": [],
        **{site: [site] for site in sites},
        **({"all_mlp": mlps} if mlps else {}),
        "all": sites,
    }
    ways = {name: (model, copy_codes(model, some)) for name, some in ways.items()}
    ways["random_code"] = (
        model,
        copy_codes(model, sites, partial(random_codes, model, generator)),
    )
    ways |= {
        "wrong_state": (model, wrong),
        "shuffled": (model, copy_codes(model, sites, shuffled)),
    }
    dense = (
        run.dense if run.config.block_size >= 3 * fsm.digits else None
    )  # there must be room for a context
    if dense:
        ways |= {
            f"mean_difference.{i}": (dense, add_mean_difference(fsm, dense, i, rng))
            for i in range(len(dense.h))
        }
    result = {name: {"first": [], "inside": []} for name in ways}
    for _ in tqdm(range(N_SEEDS), desc="control", leave=False, disable=None):
        b = (
            rng.integers(1, fsm.n_states, size=n_pairs)
            + (a := rng.integers(fsm.n_states, size=n_pairs))
        ) % fsm.n_states
        most = (
            run.config.block_size - fsm.digits
        ) // fsm.digits  # states that a run may have before the next
        n = int(rng.integers(most // 4, most)) + 1
        inside = fsm.sequences(rng, n_pairs, 1 + n * fsm.digits)
        b_inside = (
            fsm.decode(inside[:, 1:])[:, -1] + rng.integers(1, fsm.n_states, size=n_pairs)
        ) % fsm.n_states
        for name, (which, intervene) in ways.items():
            result[name]["first"].append(control(fsm, which, fsm.runs(a), b, intervene, generator))
            result[name]["inside"].append(
                control(fsm, which, torch.from_numpy(inside), b_inside, intervene, generator)
            )
    result = {
        name: {where: interval(rows) for where, rows in way.items()} for name, way in result.items()
    }
    for way in result.values():
        for where, row in way.items():
            free = result["none"][where]["jsd"]
            row["normalised_jsd"] = row["jsd"] / free if free else None
    if dense:
        shifts = [{**result.pop(f"mean_difference.{i}"), "layer": i} for i in range(len(dense.h))]
        result["mean_difference"] = max(shifts, key=lambda way: way["first"]["control"])
    return result


def interval(rows):
    """{"control", ...: the mean over rows, "control_ci", ...: half the width of its 95 % confidence interval}."""
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    cis = {
        f"{name}_ci": float(STUDENTS_T * v.std(ddof=1) / len(v) ** 0.5)
        for name, v in values.items()
    }
    return {**{name: float(v.mean()) for name, v in values.items()}, **cis}
