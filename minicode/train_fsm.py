"""python -m minicode.train_fsm: trains a transformer with codebooks on TokFSM, and shows how far it got."""

import argparse
import sys
from pathlib import Path

import torch

from minicode.fsm import FSM
from minicode.train import TrainConfig, add_flags, given, load_run, open_session, train, user_errors

# The default is our recipe: each field of GPTConfig and TrainConfig that is not the paper's says so there.
PRESETS = {
    "default": {},
    "paper": dict(
        n_layer=4, n_embd=128, n_head=4, block_size=128, n_codes=1000, n_codes_head=1000, similarity="cosine",
        decay=None, dense_share=0.0, codebook_lr=1.0, commitment=0.0, revive_every=0, lr=1e-3, batch_size=64,
        steps=20_000,
    ),
}  # fmt: skip
RELEASED = dict(loss=1.2691, accuracy=0.4525, transition_accuracy=0.6365, first_transition_accuracy=0.88,
                dead_code_fraction=0.93)  # fmt: skip
COLUMNS = ("loss", "accuracy", "transition_accuracy", "first_transition_accuracy", "dead_code_fraction")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m minicode.train_fsm", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/fsm"), help="folder of the run (default: runs/fsm)")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="paper: its method and size (default: ours)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add_flags(parser, FSM)
    add_flags(parser, TrainConfig)
    args = parser.parse_args(argv)
    with user_errors(parser):
        fsm = FSM(**given(args, FSM))
        config = TrainConfig(**{**PRESETS[args.preset], **given(args, TrainConfig), "vocab_size": fsm.vocab_size})
        session = open_session(config, fsm, args.out, args.resume, args.overwrite)
    print(f"TokFSM: {fsm.n_states} states, {fsm.n_edges} edges each; codebooks at {', '.join(config.sites()) or 'no site'}")
    summary = train(session)
    if summary is None:
        print("\nstopped; the same command with --resume continues it", file=sys.stderr)
        return 130
    print(table(summary))
    model, generator = load_run(args.out).model, torch.Generator().manual_seed(config.seed)
    tokens = model.generate(torch.tensor([[fsm.bos]]), min(12 * fsm.digits, config.block_size), generator=generator)
    print(f"a sample: {fsm.show(tokens[0].numpy())}\nnext:     python -m minicode.sample --run {args.out} --force-code")
    return 0


def table(summary):
    """The run beside the loss floor, its dense model and the released one."""
    rows = [("this run", summary)]
    if summary["dense"]:
        rows.append((f"its dense model, step {summary['dense']['step']}", summary["dense"]))
    rows.append(("loss floor", {"loss": summary["loss_floor"]}))
    rows.append(("released model, 2.6 B tokens", RELEASED))
    lines = [f"{'':30}" + "".join(f"{name.replace('_accuracy', '').replace('_code_fraction', ''):>18}" for name in COLUMNS)]
    for title, row in rows:
        cells = [f"{row[name]:18.4f}" if name in row else f"{'-':>18}" for name in COLUMNS]
        lines.append(f"{title:30}" + "".join(cells))
    lines.append(f"{summary['tokens'] / 1e6:.1f} M tokens in {summary['seconds']:.0f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
