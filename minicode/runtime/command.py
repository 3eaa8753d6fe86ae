"""A training command, from its flags to the table at its end."""

import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from minicode.runtime import processes
from minicode.runtime.files import owned
from minicode.runtime.options import Parser, add_flags, given
from minicode.runtime.runs import TrainConfig, load_run
from minicode.runtime.session import check_sizes, open_session
from minicode.runtime.streams import handled, outlive
from minicode.train import train


def table(summary, others, names):
    """A run's figures of these names beside those of its dense model and of {title: figures}."""
    columns = {"this run": summary}
    dense = summary["dense"]
    if dense:
        columns[f"dense, step {dense['step']}"] = dense
    columns |= others
    lines = ["   ".join([f"{'':25}", *columns])]
    for name in names:
        line = f"{name:25}"
        for title, figures in columns.items():
            cell = "-"
            if name in figures:
                figure = figures[name]
                cell = f"{figure:.4f}" if abs(figure) < 1e9 else f"{figure:.3g}"
            line += f"   {cell:>{len(title)}}"
        lines.append(line)
    return "\n".join(lines)


def report(run, compared):
    """What people are told at the end: the table of figures, and a sample."""
    length = min(run.data.sample_length, run.config.block_size)
    generator = torch.Generator().manual_seed(run.config.seed)
    tokens = run.model.generate(run.data.prompt(""), length, generator=generator)
    demonstration = " --force-code" if run.fsm and run.config.sites() else ""
    return (
        f"{compared}\n"
        f"{run.summary['tokens'] / 1e6:.1f} M tokens in {run.summary['seconds']:.0f} s\n"
        f"a sample: {run.data.show(tokens[0].numpy())}\n"
        f"next:     python -m minicode.sample --run {run.folder}{demonstration}"
    )


def flags(name, about, kind, presets, out):
    """The parser of a training command."""
    parser = Parser(name, about)
    parser.add_argument(
        "--out", type=Path, default=Path(out), help=f"folder of the run (default: {out})"
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the run in --out")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument(
        "--preset",
        choices=presets,
        default="default",
        help="settings to start from (default: %(default)s)",
    )
    add_flags(parser.add_argument_group("the data"), kind, {})
    add_flags(parser, TrainConfig, presets["default"])
    return parser


def configure(args, data, presets):
    """The configuration that flags and data ask for. ValueError where they don't go together."""
    preset = "pretrained" if data.model and args.preset == "default" else args.preset
    settings = presets["default"] | presets[preset] | given(args, TrainConfig)
    sizes = data.sizes()
    if data.model:
        for name in (*sizes, "vocab"):
            if name in args:
                raise ValueError(f"{name} doesn't go with a pretrained model, which has its own")
        if Path(data.model).resolve() in (args.out.resolve(), *args.out.resolve().parents):
            raise ValueError(f"--out {args.out} is in the folder of the model itself")
    config = TrainConfig(**settings | sizes)
    check_sizes(config, data)
    return config


def command(argv, name, about, kind, presets, out, compare):
    """Runs a training command; returns its exit status. compare(run): the table at its end."""
    parser = flags(name, about, kind, presets, out)
    with outlive(), ExitStack() as held:
        with parser.user_errors():
            processes.join()
            args = parser.parse_args(argv)
            data = kind(**given(args, kind))
            config = configure(args, data, presets)
            processes.first(held.enter_context, owned(args.out))
            session = open_session(config, data, args.out, args.resume, args.overwrite)
        with parser.user_errors(status=1):
            return run_to_the_end(session, compare)


def run_to_the_end(session, compare):
    """Trains, and says how it went; returns the command's exit status."""
    first = processes.rank() == 0
    if first:
        sites = ", ".join(session.config.sites())
        print(f"{session.data}; codebooks at {sites or 'no site'}", flush=True)
    summary = train(session)
    processes.leave()
    if summary is None:
        goes_on = "the same command, with --resume and not --overwrite, continues it"
        if first:
            print(f"\nstopped; {goes_on}", file=sys.stderr)
        return 130
    if first:
        run = load_run(session.folder)
        try:
            with handled(signal.default_int_handler, "SIGINT"):
                print(report(run, compare(run)))
        except KeyboardInterrupt:
            print("\nstopped: --resume makes the table", file=sys.stderr)
            return 130
    return 0
