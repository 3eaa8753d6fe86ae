"""The demonstration: a run in one state is made to act as if in another."""

from functools import partial

import numpy as np
import torch

from minicode.control import Code, chosen
from minicode.study.machine import control as measure_control
from minicode.study.machine import copy_codes, pairs, random_codes, steer, transition_accuracy


def demonstrate(run, args):
    """Forces the codes of a state b in a run that is in a state a: what comes next follows b."""
    if not run.fsm:
        raise ValueError(
            "a bare --force-code is the demonstration on TokFSM; on text: --force-code topic:NAME, or word:WORD"
        )
    fsm, model, rng = run.fsm, run.model, np.random.default_rng(args.seed)
    sites = run.sites()
    prompt = fsm.prompt((args.prompt or "").strip() or fsm.name(rng.integers(fsm.n_states)))
    n_new = max(
        fsm.digits,
        args.max_new_tokens or min(6 * fsm.digits, run.config.block_size + 1 - prompt.shape[1]),
    )
    a = fsm.decode(prompt[0, 1:].numpy())[-1]
    shared = (fsm.transition_matrix[a] > 0) @ (
        fsm.transition_matrix > 0
    ).T  # successors in common with a
    b = rng.choice(np.flatnonzero(shared == shared.min()))

    generator = torch.Generator().manual_seed(args.seed)
    many = prompt.repeat(args.num_samples, 1)
    free = model.generate(many, n_new, args.temperature, args.top_k, generator)
    everywhere, target = copy_codes(model, sites), np.full(len(many), b)
    steered, _ = steer(
        fsm, model, many, target, everywhere, generator, args.temperature, args.top_k
    )
    steered = model.generate(steered, n_new - fsm.digits, args.temperature, args.top_k, generator)
    own = chosen(model, fsm.runs([b])).items()  # what a run in b chooses at its last digit
    forced = [
        Code(site, group, int(i), prompt.shape[1] - 1)
        for site, ids in own
        for group, row in enumerate(ids[0])
        for i in row
    ]
    every_a, every_b = pairs(fsm)
    mlps = [site for site in sites if site.startswith("mlp.")]

    def control(intervene):
        return measure_control(
            fsm, model, fsm.runs(every_a), every_b, intervene, generator.manual_seed(args.seed)
        )["control"]

    return {
        "prompt": fsm.name(a),
        "state": fsm.name(b),
        "samples": [fsm.show(row) for row in steered.numpy()],
        "samples_free": [fsm.show(row) for row in free.numpy()],
        "forced": list(map(str, forced)),
        "control_before": control(copy_codes(model, [])),
        "control_after": control(everywhere),
        "control_mlp": control(copy_codes(model, mlps)) if mlps else None,
        "control_random_codes": control(
            copy_codes(model, sites, partial(random_codes, model, generator))
        ),
        "transition_accuracy": transition_accuracy(fsm, model, generator),
    }


def describe(fsm, result):
    """The demonstration for people."""
    a, b = result["prompt"], result["state"]
    n_pairs, chance = len(pairs(fsm)[0]), fsm.n_edges / fsm.n_states
    mlps = (
        "" if result["control_mlp"] is None else f"  {result['control_mlp']:.3f}  the MLPs alone\n"
    )
    width = max(map(len, result["samples_free"])) + 3
    rows = [
        f"{free:{width}}{forced}" for free, forced in zip(result["samples_free"], result["samples"])
    ]
    successors = " ".join(fsm.name(s) for s in fsm.successors[int(b, fsm.base)])
    table = "\n".join([f"{'left alone':{width}}codes of {b} forced", *rows])
    return f"""\
A run is in state {a}. It is made to act as if in state {b}, whose successors are
  {successors}
by forcing the codes of {b} where {a} was read (and then those of {b} and the digit sampled):
  {" ".join(result["forced"])}

{table}

Share of next states that are successors of b, over {n_pairs:,} pairs of states a, b:
  {result["control_before"]:.3f}  nothing forced (chance: {chance:.2f})
  {result["control_after"]:.3f}  every site forced
{mlps}  {result["control_random_codes"]:.3f}  random codes at every site
  {result["transition_accuracy"]:.3f}  transition accuracy of the model left alone, about the most there is to reach"""
