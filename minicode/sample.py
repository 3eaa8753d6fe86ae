"""python -m minicode.sample: samples from a run, and steers it by its codes.

    --force-code mlp.1.527       the code is active at every generated position
    --force-code mlp.1.527@4     at position 4 alone (position 0 is BOS; -1 is the prompt's last)
    --block-code mlp.1.527       the code is never chosen there; the next best takes its place
    --force-code topic:dragon    all codes that were found for a topic of the stories, or word:king for a word of any text
    --force-code                 alone: the demonstration. A run in one state is made to act as if in another.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minicode.control import GENERATED, Code, block, chosen, force, random_codes
from minicode.run import Parser, latest_run, load_run
from minicode.topics import expand


def main(argv=None):
    parser = Parser("sample", __doc__)
    parser.add_argument("--run", type=Path, help="folder of the run (default: the newest in runs/)")
    parser.add_argument("--prompt", help="states to start from, as digits: 38, or 38 07; or a text (default: none; the demonstration: any)")
    parser.add_argument("--num-samples", type=int, default=5, help="(default: 5)")
    parser.add_argument("--max-new-tokens", type=int, help="tokens to sample (default: 24 digits, 100 tokens of text, or what the block has room for; the demonstration: 6 states)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (default: 1)")
    parser.add_argument("--top-k", type=int, help="sample from the k most probable tokens only (default: from all)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--force-code", action="append", nargs="?", const="", default=[], metavar="CODE")
    parser.add_argument("--block-code", action="append", default=[], metavar="CODE")
    parser.add_argument("--list-topics", action="store_true", help="the topics of a run on stories, for --force-code topic:NAME")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    demonstration = "" in args.force_code
    with parser.user_errors():
        run = load_run(args.run or latest_run())
        if args.list_topics:
            print("\n".join(getattr(run.data, "topics", [])) or f"the run in {run.folder} has no topics")
            return
        if demonstration and (len(args.force_code) > 1 or args.block_code):
            raise ValueError("a bare --force-code is the demonstration, and goes with no other code")
        for name, least in (("num_samples", 1), ("temperature", 0), ("top_k", 1), ("max_new_tokens", 1)):
            if (value := getattr(args, name)) is not None and not value >= least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        result = demonstrate(run, args) if demonstration else sample(run, args)
    if not args.run:
        print(f"of the newest run, {run.folder}:", file=sys.stderr)
    text = describe(run.fsm, result) if demonstration else run.data.between.join(result["samples"])
    if "samples_free" in result and not demonstration:
        text = f"left alone:\n\n{run.data.between.join(result['samples_free'])}\n\n\n{args.force_code[0]} forced:\n\n{text}"
    print(json.dumps(result) if args.json else text)


def sample(run, args):
    """Samples, with codes forced and blocked."""
    forced = [code for text in args.force_code for code in expand(run, text)]
    prompt = run.data.prompt(args.prompt or "")
    n_new = args.max_new_tokens or max(1, min(run.data.sample_length, run.config.block_size + 1 - prompt.shape[1]))

    def generate(codes, blocked):
        generator, many = torch.Generator().manual_seed(args.seed), prompt.repeat(args.num_samples, 1)
        with force(run.model, codes, GENERATED), block(run.model, blocked, GENERATED):
            tokens = run.model.generate(many, n_new, args.temperature, args.top_k, generator)
        return [run.data.show(row) for row in tokens.numpy()]

    result = {"prompt": args.prompt or "", "samples": generate(forced, args.block_code), "forced": forced, "blocked": args.block_code}
    return result if forced == args.force_code else {**result, "samples_free": generate([], [])}


def demonstrate(run, args):
    """Forces the codes of a state b in a run that is in a state a: what comes next follows b."""
    if not run.fsm:
        raise ValueError("a bare --force-code is the demonstration on TokFSM; on text: --force-code topic:NAME, or word:WORD")
    fsm, model, rng = run.fsm, run.model, np.random.default_rng(args.seed)
    sites = run.sites()
    prompt = fsm.prompt((args.prompt or "").strip() or fsm.name(rng.integers(fsm.n_states)))
    n_new = max(fsm.digits, args.max_new_tokens or min(6 * fsm.digits, run.config.block_size + 1 - prompt.shape[1]))
    a = fsm.decode(prompt[0, 1:].numpy())[-1]
    shared = (fsm.transition_matrix[a] > 0) @ (fsm.transition_matrix > 0).T  # successors in common with a
    b = rng.choice(np.flatnonzero(shared == shared.min()))

    generator = torch.Generator().manual_seed(args.seed)
    many = prompt.repeat(args.num_samples, 1)
    free = model.generate(many, n_new, args.temperature, args.top_k, generator)
    everywhere, target = fsm.copy_codes(model, sites), np.full(len(many), b)
    steered, _ = fsm.steer(model, many, target, everywhere, generator, args.temperature, args.top_k)
    steered = model.generate(steered, n_new - fsm.digits, args.temperature, args.top_k, generator)
    own = chosen(model, fsm.runs([b])).items()  # what a run in b chooses at its last digit
    forced = [Code(site, group, int(i), prompt.shape[1] - 1) for site, ids in own for group, row in enumerate(ids[0]) for i in row]
    every_a, every_b = fsm.pairs()
    mlps = [site for site in sites if site.startswith("mlp.")]

    def control(intervene):
        return fsm.control(model, fsm.runs(every_a), every_b, intervene, generator.manual_seed(args.seed))["control"]

    return {
        "prompt": fsm.name(a),
        "state": fsm.name(b),
        "samples": [fsm.show(row) for row in steered.numpy()],
        "samples_free": [fsm.show(row) for row in free.numpy()],
        "forced": list(map(str, forced)),
        "control_before": control(fsm.copy_codes(model, [])),
        "control_after": control(everywhere),
        "control_mlp": control(fsm.copy_codes(model, mlps)) if mlps else None,
        "control_random_codes": control(fsm.copy_codes(model, sites, partial(random_codes, model, generator))),
        "transition_accuracy": fsm.transition_accuracy(model, generator),
    }


def describe(fsm, result):
    """The demonstration for people."""
    a, b = result["prompt"], result["state"]
    n_pairs, chance = len(fsm.pairs()[0]), fsm.n_edges / fsm.n_states
    mlps = "" if result["control_mlp"] is None else f"  {result['control_mlp']:.3f}  the MLPs alone\n"
    width = max(map(len, result["samples_free"])) + 3
    rows = [f"{free:{width}}{forced}" for free, forced in zip(result["samples_free"], result["samples"])]
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


if __name__ == "__main__":
    main()
