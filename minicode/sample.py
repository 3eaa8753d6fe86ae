"""python -m minicode.sample: samples from a run, and steers it by its codes.

--force-code mlp.1.527       the code is active at every generated position
--force-code mlp.1.527@4     at position 4 alone (position 0 is BOS; -1 is the prompt's last)
--block-code mlp.1.527       the code is never chosen there; the next best takes its place
--force-code topic:dragon    all codes that were found for a topic of the stories, or word:king for a word of any text
--force-code                 alone: the demonstration. A run in one state is made to act as if in another.
"""

import json
import sys
from pathlib import Path

import torch

from minicode.control import GENERATED, block, force
from minicode.language.topics import expand
from minicode.runtime.options import Parser
from minicode.runtime.runs import latest_run, load_run
from minicode.study.demonstration import demonstrate, describe


def main(argv=None):
    parser = Parser("sample", __doc__)
    parser.add_argument("--run", type=Path, help="folder of the run (default: the newest in runs/)")
    parser.add_argument(
        "--prompt",
        help="states to start from, as digits: 38, or 38 07; or a text (default: none; the demonstration: any)",
    )
    parser.add_argument("--num-samples", type=int, default=5, help="(default: 5)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="tokens to sample (default: 24 digits, 100 tokens of text, or what the block has room for; the demonstration: 6 states)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="0 takes the most probable token (default: 1)",
    )
    parser.add_argument(
        "--top-k", type=int, help="sample from the k most probable tokens only (default: from all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--force-code", action="append", nargs="?", const="", default=[], metavar="CODE"
    )
    parser.add_argument("--block-code", action="append", default=[], metavar="CODE")
    parser.add_argument(
        "--list-topics",
        action="store_true",
        help="the topics of a run on stories, for --force-code topic:NAME",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    demonstration = "" in args.force_code
    with parser.user_errors():
        run = load_run(args.run or latest_run())
        if args.list_topics:
            print(
                "\n".join(getattr(run.data, "topics", []))
                or f"the run in {run.folder} has no topics"
            )
            return
        if demonstration and (len(args.force_code) > 1 or args.block_code):
            raise ValueError(
                "a bare --force-code is the demonstration, and goes with no other code"
            )
        for name, least in (
            ("num_samples", 1),
            ("temperature", 0),
            ("top_k", 1),
            ("max_new_tokens", 1),
        ):
            if (value := getattr(args, name)) is not None and not value >= least:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {least}, not {value}"
                )
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
    n_new = args.max_new_tokens or max(
        1, min(run.data.sample_length, run.config.block_size + 1 - prompt.shape[1])
    )

    def generate(codes, blocked):
        generator, many = (
            torch.Generator().manual_seed(args.seed),
            prompt.repeat(args.num_samples, 1),
        )
        with force(run.model, codes, GENERATED), block(run.model, blocked, GENERATED):
            tokens = run.model.generate(many, n_new, args.temperature, args.top_k, generator)
        return [run.data.show(row) for row in tokens.numpy()]

    result = {
        "prompt": args.prompt or "",
        "samples": generate(forced, args.block_code),
        "forced": forced,
        "blocked": args.block_code,
    }
    return result if forced == args.force_code else {**result, "samples_free": generate([], [])}


if __name__ == "__main__":
    main()
