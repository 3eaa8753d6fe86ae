"""python -m minicode.sample: samples from a run, and steers it by its codes.

--force-code mlp.1.527       the code is active at every generated position
--force-code mlp.1.527@4     at position 4 alone (position 0 is BOS; -1 is the prompt's last)
--block-code mlp.1.527       the code is never chosen there; the next best takes its place
--force-code topic:dragon    the codes of a topic of the stories, or word:king for a word, or
                             words:king,queen/crown,throne for some; chosen by what they do
--force-code                 alone: the demonstration. A run in one state acts as if in another.
"""

import json
import sys
from pathlib import Path

import torch

from minicode.control import GENERATED, block, force
from minicode.language import topics
from minicode.runtime.arguments import check_range
from minicode.runtime.options import Parser
from minicode.runtime.runs import latest_run, load_run
from minicode.study import demonstration

RANGES = {  # least, and what it has to be below
    "num_samples": (1, 10_001),
    "max_new_tokens": (1, 2**63),
    "top_k": (1, 2**63),
    "temperature": (0, 1e38),
    "seed": (0, 2**63),
    "budget": (0, 1e38),
}


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        run = load_run(args.run or latest_run())
        check(args)
        if "" in args.force_code:
            result = demonstration.demonstrate(run, args)
            text = demonstration.describe(run.fsm, result)
        else:
            result = sample(run, args)
            text = describe(run, result)
    if not args.run:
        print(f"of the newest run, {run.folder}:", file=sys.stderr)
    print(json.dumps(result) if args.json else text)


def make_parser():
    parser = Parser("sample", __doc__)
    flag = parser.add_argument
    flag("--run", type=Path, help="folder of the run (default: the newest in runs/)")
    start = "states to start from, as digits: 38, or 38 07; or a text (default: none)"
    flag("--prompt", default="", help=start)
    flag("--num-samples", type=int, default=5, help="(default: 5)")
    length = "tokens to sample (default: 24 digits, 100 tokens of text, or what there is room for)"
    flag("--max-new-tokens", type=int, help=length)
    flag("--temperature", type=float, default=1.0, help="0: the most probable token (default: 1)")
    flag("--top-k", type=int, help="sample from the k most probable tokens only (default: all)")
    flag("--seed", type=int, default=0, help="(default: 0)")
    several = {"action": "append", "default": [], "metavar": "CODE"}
    active = "keep a code active, or those of a topic or of words, as above; may be repeated"
    flag("--force-code", nargs="?", const="", help=active, **several)
    flag("--block-code", help="never choose this code, as above; may be repeated", **several)
    cost = "nats a token that a topic's codes may cost, to the dense model (default: %(default)s)"
    flag("--budget", type=float, default=topics.BUDGET, help=cost)
    flag("--json", action="store_true", help="print the result as JSON")
    return parser


def check(args):
    """ValueError for flags out of range, or that don't go together."""
    for name, limits in RANGES.items():
        value = getattr(args, name)
        if value is not None:
            check_range(name, value, *limits)
    if "" in args.force_code and len(args.force_code + args.block_code) > 1:
        raise ValueError("a bare --force-code is the demonstration, and goes with no other code")


def sample(run, args):
    """Samples, with codes forced and blocked; with topics or words, samples left alone too."""
    named = [text for text in args.force_code if topics.is_topic(text)]
    asked = {text: topics.find_topic(run, text) for text in named}
    codes = topics.codes_of_topics(run, asked.values(), args.budget) if asked else {}
    forced = []
    for text in args.force_code:
        own = codes[asked[text]] if text in asked else [text]
        if not own:
            raise ValueError(f"{text}: no code turns texts towards it at {args.budget:g} nats")
        forced += [code for code in own if code not in forced]
    prompt = run.data.prompt(args.prompt)
    given = len(run.data.show(prompt[0]))  # characters; what they mention does not count
    room = run.config.block_size + 1 - prompt.shape[1]
    n_new = args.max_new_tokens or max(1, min(run.data.sample_length, room))

    def generate(codes, blocked):
        generator = torch.Generator().manual_seed(args.seed)
        tokens = prompt.repeat(args.num_samples, 1)
        with force(run.model, codes, GENERATED), block(run.model, blocked, GENERATED):
            tokens = run.model.generate(tokens, n_new, args.temperature, args.top_k, generator)
        return [run.data.show(row) for row in tokens]

    result = {
        "prompt": args.prompt,
        "samples": generate(forced, args.block_code),
        "forced": forced,
        "blocked": args.block_code,
    }
    if asked:
        result["samples_free"] = generate([], [])
        for when in ("", "_free"):
            new = [text[given:] for text in result["samples" + when]]
            mentions = {name: topic.count(new) for name, topic in asked.items()}
            result["mentions" + when] = mentions
    return result


def describe(run, result):
    """Samples for people; where topics or words were forced, after those left alone."""
    samples = run.data.between.join(result["samples"])
    if "mentions" not in result:
        return samples
    free = run.data.between.join(result["samples_free"])
    names = " ".join(result["mentions"])
    text = f"left alone:\n\n{free}\n\n\n{names} forced:\n\n{samples}\n\n\n"
    text += f"forced: {' '.join(result['forced'])}"
    of = f"of {len(result['samples'])}"
    for name, n_free in result["mentions_free"].items():
        n_forced = result["mentions"][name]
        title = topics.find_topic(run, name).title
        text += f"\nwords about {title}: {n_free} {of} left alone, {n_forced} {of} forced"
    return text


if __name__ == "__main__":
    main()
