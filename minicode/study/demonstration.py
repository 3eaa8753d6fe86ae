"""The demonstration: a run in one state is made to act as if in another."""

import sys

import numpy as np
import torch

from minicode.study import machine
from minicode.study.detectors import record_codes

LEARNT = 0.9  # transition accuracy below which a run has little to show
CONTROLS = {  # and the codes that are forced, as machine.py names them
    "control_before": "none",
    "control_after": "all",
    "control_mlp": "all_mlp",
    "control_random_codes": "random_code",
}


def demonstrate(run, args):
    """Forces the codes of a state b in a run that is in a state a: what comes next follows b."""
    fsm = run.fsm
    if not fsm:
        on_text = "on text: --force-code topic:NAME, or word:WORD"
        raise ValueError(f"a bare --force-code is the demonstration on TokFSM; {on_text}")
    model = run.model
    rng = np.random.default_rng(args.seed)
    prompt = fsm.prompt(args.prompt.strip() or fsm.name(rng.integers(fsm.n_states)))
    length = prompt.shape[1]
    room = run.config.block_size + 1 - length
    n_new = max(fsm.digits, args.max_new_tokens or min(6 * fsm.digits, room))
    a = fsm.decode(prompt[0, 1:])[-1]
    b = far_state(fsm, a, rng)

    generator = torch.Generator().manual_seed(args.seed)
    how = args.temperature, args.top_k
    tokens = prompt.repeat(args.num_samples, 1)
    free = model.generate(tokens, n_new, *how, generator)
    target = np.full(args.num_samples, b)
    everywhere = machine.copy_codes(model, run.sites())
    tokens, *_ = machine.steer(fsm, model, tokens, target, everywhere, generator, *how)
    steered = model.generate(tokens, n_new - fsm.digits, *how, generator)
    own = record_codes(model, fsm.runs([b]).numpy())
    return {
        "prompt": fsm.name(a),
        "state": fsm.name(b),
        "samples": [fsm.show(row) for row in steered],
        "samples_free": [fsm.show(row) for row in free],
        "forced": [f"{own.names[number]}@{length - 1}" for number in own.fired[-1]],
        **controls(run, generator, args.seed),
    }


def note_unlearnt(run):
    """Says of a run that has not learnt its machine that it has little to show."""
    accuracy = run.summary.get("transition_accuracy", 1)
    if accuracy < LEARNT:
        about = f"{run.folder} has not learnt the machine (transition accuracy {accuracy:.2f})"
        print(f"note: {about}: what it shows will not mean much", file=sys.stderr)


def far_state(fsm, a, rng):
    """One of the states that have no successor in common with a, if there are any."""
    follows = fsm.transition_matrix > 0
    shared = follows[a] @ follows.T  # whether a state has
    return rng.choice(np.flatnonzero(shared == shared.min()))


def controls(run, generator, seed):
    """Control over all pairs of states, by what is forced; and how the model does left alone."""
    fsm = run.fsm
    a, b = machine.pairs(fsm)
    ways = machine.forced_codes(run, generator, np.random.default_rng(seed))
    result = {}
    for name, way in CONTROLS.items():
        if way in ways:
            generator.manual_seed(seed)
            figures = machine.control(fsm, run.model, fsm.runs(a), b, ways[way], generator)
            result[name] = figures["control"]
    result["transition_accuracy"] = machine.transition_accuracy(fsm, run.model, generator)
    return result


def describe(fsm, result):
    """The demonstration for people."""
    a = result["prompt"]
    b = result["state"]
    successors = " ".join(fsm.name(state) for state in fsm.successors[int(b, fsm.base)])
    accuracy = result["transition_accuracy"]
    warning = ""
    if accuracy < LEARNT:
        warning = f"\nThis run has not learnt its machine: transition accuracy {accuracy:.3f}.\n"
    width = max(map(len, result["samples_free"])) + 3
    samples = zip(result["samples_free"], result["samples"])
    table = "\n".join(f"{free:{width}}{forced}" for free, forced in samples)
    n_pairs = len(machine.pairs(fsm)[0])
    mlps = ""
    if "control_mlp" in result:
        mlps = f"  {result['control_mlp']:.3f}  the MLPs alone\n"
    return f"""\
A run is in state {a}. It is made to act as if in state {b}, whose successors are
  {successors}
by forcing the codes of {b} where {a} was read (and then those of {b} and the digit sampled):
  {" ".join(result["forced"])}
{warning}
{"left alone":{width}}codes of {b} forced
{table}

Share of next states that are successors of b, over {n_pairs:,} pairs of states a, b:
  {result["control_before"]:.3f}  nothing forced (chance: {fsm.n_edges / fsm.n_states:.2f})
  {result["control_after"]:.3f}  every site forced
{mlps}  {result["control_random_codes"]:.3f}  random codes at every site
  {accuracy:.3f}  transition accuracy of the model left alone, about the most there is to reach"""
