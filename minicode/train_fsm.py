"""python -m minicode.train_fsm: trains a transformer with codebooks on TokFSM, and shows how far it got."""

import sys
from pathlib import Path

import torch

from minicode.fsm import FSM
from minicode.run import Parser, TrainConfig, add_flags, given, load_run
from minicode.train import open_session, train

# The default is our recipe. README.md, "What differs from the paper", has what each departure gains, and the command.
PRESETS = {
    "default": {},
    "paper": dict(
        n_layer=4, n_embd=128, n_head=4, block_size=128, n_codes=1000, n_codes_head=1000, similarity="cosine", decay=None,
        dense_share=0.0, codebook_lr=1.0, commitment=0.0, revive_every=50, revive_after=0.0, lr=1e-3, batch_size=64, steps=20_000,
    ),
}  # fmt: skip
RELEASED = {  # at its best, from its authors' run
    "loss": 1.2691, "accuracy": 0.4525, "transition_accuracy": 0.6365, "first_transition_accuracy": 0.88, "dead_code_fraction": 0.93,
}  # fmt: skip


def main(argv=None):
    parser = Parser(prog="python -m minicode.train_fsm", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/fsm"), help="folder of the run (default: runs/fsm)")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="paper: its method and size (default: ours)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the run in --out")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add_flags(parser, FSM)
    add_flags(parser, TrainConfig)
    args = parser.parse_args(argv)
    with parser.user_errors():
        fsm = FSM(**given(args, FSM))
        config = TrainConfig(**{**PRESETS[args.preset], **given(args, TrainConfig), "vocab_size": fsm.vocab_size})
        session = open_session(config, fsm, args.out, args.resume, args.overwrite)
    print(f"TokFSM: {fsm.n_states} states, {fsm.n_edges} edges each; codebooks at {', '.join(config.sites()) or 'no site'}")
    try:
        summary = train(session)
    except FloatingPointError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    if summary is None:
        print("\nstopped; the same command, with --resume and not --overwrite, continues it", file=sys.stderr)
        return 130
    print(table(summary))
    model, generator = load_run(args.out).model, torch.Generator().manual_seed(config.seed)
    tokens = model.generate(torch.tensor([[fsm.bos]]), min(12 * fsm.digits, config.block_size), generator=generator)
    print(f"a sample: {fsm.show(tokens[0].numpy())}\nnext:     python -m minicode.sample --run {args.out} --force-code")
    return 0


def table(summary):
    """The run beside its dense model, the loss floor and the released model."""
    columns = {"this run": summary, "loss floor": {"loss": summary["loss_floor"]}, "released, 2.6 B tokens": RELEASED}
    if summary["dense"]:
        columns[f"dense, step {summary['dense']['step']}"] = summary["dense"]
    lines = [" " * 26 + "".join(f"{title:>{len(title) + 3}}" for title in columns)]
    for name in RELEASED:
        cells = (f"{row[name]:.4f}" if name in row else "-" for row in columns.values())
        lines.append(f"{name:26}" + "".join(f"{cell:>{len(title) + 3}}" for title, cell in zip(columns, cells)))
    return "\n".join([*lines, f"{summary['tokens'] / 1e6:.1f} M tokens in {summary['seconds']:.0f} s"])


if __name__ == "__main__":
    sys.exit(main())
