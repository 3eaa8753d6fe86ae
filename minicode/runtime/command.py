"""A training command, from its flags to the table at its end."""

import sys
from pathlib import Path

import torch

from minicode.runtime import processes
from minicode.runtime.options import Parser, add_flags, given
from minicode.runtime.runs import TrainConfig, load_run
from minicode.runtime.session import open_session
from minicode.train import train


def table(summary, others, names):
    """A run's figures of these names for people, beside those of its dense model and of others, {title: figures}."""
    dense, width = summary["dense"], max(map(len, names)) + 1
    columns = {
        "this run": summary,
        **({f"dense, step {dense['step']}": dense} if dense else {}),
        **others,
    }
    lines = [" " * width + "".join(f"   {title}" for title in columns)]
    for name in names:
        cells = (f"{row[name]:.4f}" if name in row else "-" for row in columns.values())
        lines.append(
            f"{name:{width}}"
            + "".join(f"{cell:>{len(title) + 3}}" for title, cell in zip(columns, cells))
        )
    return "\n".join(lines)


def report(run, compared):
    """What people are told at the end: the table of figures, and a sample."""
    data, summary, generator = run.data, run.summary, torch.Generator().manual_seed(run.config.seed)
    demonstration = " --force-code" if run.fsm else ""
    tokens = run.model.generate(
        data.prompt(""), min(data.sample_length, run.config.block_size), generator=generator
    )
    return (
        f"{compared}\n{summary['tokens'] / 1e6:.1f} M tokens in {summary['seconds']:.0f} s\n"
        f"a sample: {data.show(tokens[0].numpy())}\nnext:     python -m minicode.sample --run {run.folder}{demonstration}"
    )


def command(argv, name, about, kind, presets, out, compare):
    """A training command, from its flags to its exit status; compare(summary) is the table at its end."""
    parser = Parser(name, about)
    parser.add_argument(
        "--out", type=Path, default=Path(out), help=f"folder of the run (default: {out})"
    )
    paper = "; paper: its method and size" if "paper" in presets else ""
    parser.add_argument(
        "--preset",
        choices=presets,
        default="default",
        help=f"settings to start from (default: ours){paper}",
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the run in --out")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add_flags(parser, kind, {})
    add_flags(parser, TrainConfig, presets["default"])
    with parser.user_errors():
        processes.join()
        args = parser.parse_args(argv)
        data = kind(**given(args, kind))
        settings = {**presets["default"], **presets[args.preset], **given(args, TrainConfig)}
        config = TrainConfig(**settings, vocab_size=data.vocab_size)
        session = open_session(config, data, args.out, args.resume, args.overwrite)
    first = processes.rank() == 0
    if first:
        print(f"{data}; codebooks at {', '.join(config.sites()) or 'no site'}", flush=True)
    try:
        summary = train(session)
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    processes.leave()
    if first and summary is None:
        print(
            "\nstopped; the same command, with --resume and not --overwrite, continues it",
            file=sys.stderr,
        )
    elif first:
        run = load_run(args.out)
        print(report(run, compare(run.summary)))
    return 130 if summary is None else 0
