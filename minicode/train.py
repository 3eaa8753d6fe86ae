"""One training loop, and the folder of files that it leaves.

A run trains the dense model for `dense_share` of its steps, starts the codebooks from its activations, and
goes on with the codebooks in place. Batch and random numbers of a step follow from (seed, step) alone, so
that resuming needs no random state, and a resumed run ends as the unbroken one, to the last bit.
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minicode import extension, parallel
from minicode.codebook import perplexity
from minicode.control import record
from minicode.fsm import FSM
from minicode.model import GPT, evaluating
from minicode.run import (
    Parser, TrainConfig, add_flags, check_run, check_tensors, given, load_run, make_run, read_metrics, read_tensors, reading,
    write, write_tensors,
)  # fmt: skip
from minicode.text import Text


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith(("cpu", "cuda")):
        raise ValueError(f"device must be cpu, cuda or auto, not {name!r}")
    if name == "cuda":  # of several processes, torchrun gives each its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used here: {str(error).split(chr(10))[0]}") from None


def make_optimizer(model, config):
    """AdamW, with weight decay on matrices, but on no bias, gain or code."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in learnt if p.dim() == 2], [p for p in learnt if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def learning_rate(config, step):
    """Two phases, dense and with codebooks, each a cosine from its peak to a tenth of it; the first warms up."""
    start, end, peak = 0, config.dense_steps, config.lr
    if step >= end:
        start, end = end, config.steps
        peak *= config.codebook_lr if start else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * (step - start) / (end - start)))
    return peak * (0.1 + 0.9 * cosine) * min(1, (step + 1) / min(100, config.steps))


def batch(config, data, device, *key):
    """Inputs and targets (B, T) of a step."""
    rng = np.random.default_rng((config.seed, *key))
    tokens = torch.from_numpy(data.sequences(rng, config.batch_size, config.block_size + 1)).to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


def start_codebooks(model, config, data, generator):
    """Starts each codebook by k-means on what reaches it: in order, so that later ones see quantised inputs."""
    for codebook in tqdm(model.codebooks().values(), desc="k-means", leave=False, disable=None):
        n_inputs, inputs = 32 * max(codebook.n_codes, 1024), []
        hook = codebook.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
        with evaluating(model), hook:
            while sum(map(len, inputs)) < n_inputs:
                model(batch(config, data, model.device, 1, len(inputs))[0])
        codebook.enabled = True
        codebook.start(torch.cat(inputs)[:n_inputs], generator=generator)


def revival_is_due(config, done):
    """Codes die as those of one thing merge into one. Revived at once they would split it again; so late."""
    first = config.dense_steps + config.revive_after * (config.steps - config.dense_steps)
    return config.revive_every > 0 and done % config.revive_every == 0 and first <= done < config.steps


def evaluation_is_due(config, done):
    return done % config.eval_every == 0 or done in (config.dense_steps, config.steps)


def train_step(model, forward, optimizer, config, step, data):
    """One step of the optimizer and of the codebooks; returns the loss of this process, a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.zero_grad()
    codebooks = {codebook: () for codebook in model.codebooks().values() if codebook.enabled}  # and their inputs
    x, y = (parallel.my_rows(tokens).chunk(config.accumulate) for tokens in batch(config, data, model.device, 0, step))
    losses = []
    for part_x, part_y in zip(x, y):
        with parallel.keep_gradients(forward, wanted=len(losses) + 1 < len(x)):
            with torch.autocast(part_x.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                _, loss = forward(part_x, part_y)
            pull = sum(config.autoencoding * c.autoencoding + config.commitment * c.commitment for c in codebooks)
            ((loss + pull) / len(x)).backward()
        losses.append(loss.detach())
        codebooks = {codebook: inputs + codebook.inputs for codebook, inputs in codebooks.items()}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for codebook, inputs in codebooks.items():
        codebook.inputs = inputs
        codebook.update()
    return sum(losses) / len(x)


def evaluate(model, data, seed, n):
    """The measures of a model on n fresh sequences, by the names of design.md: a dict, ready for JSON."""
    tokens = data.held_out(np.random.default_rng((seed, 2)), n, model.config.block_size + 1)
    loss = accuracy = 0.0
    counts = {name: torch.zeros_like(c.usage) for name, c in model.codebooks().items() if c.enabled}
    for part in torch.from_numpy(tokens).to(model.device).split(64):
        with evaluating(model), record(model) as codes:
            logits, part_loss = model(part[:, :-1], part[:, 1:])
        loss += part_loss.item() * len(part) / n
        accuracy += (logits.argmax(-1) == part[:, 1:]).float().mean().item() * len(part) / n
        for name, ids in codes.items():
            ids = ids.movedim(2, 0).flatten(1)  # (G, B * T * k)
            counts[name].scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))
    result = {"loss": loss, "accuracy": accuracy, **data.measures(model, seed, tokens, loss)}
    if counts:
        dead = {name: (count == 0).float() for name, count in counts.items()}
        result["dead_code_fraction"] = torch.cat([d.flatten() for d in dead.values()]).mean().item()
        result["sites"] = {name: {"dead_code_fraction": d.mean().item(), "perplexity": perplexity(counts[name]).mean().item()}
                           for name, d in dead.items()}  # fmt: skip
    return result


@contextmanager
def stop_signals():
    """Within the block, Ctrl-C and SIGTERM only put themselves on the list that is yielded."""
    stop, numbers = [], (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(number, lambda number, frame: stop.append(number)) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, old):
            signal.signal(number, handler)


@dataclass
class Session:
    """A training under way: what the loop works on, and where it stands."""

    config: TrainConfig
    data: FSM | Text
    folder: Path
    model: GPT
    optimizer: torch.optim.Optimizer
    metrics: list  # a dict of figures for each evaluation so far
    step: int = 0
    seconds: float = 0.0


def open_session(config, data, folder, resume=False, overwrite=False):
    """Everything that can fail by a user's mistake, before the first step: ValueError, and no file is touched."""
    if not data.least_block <= config.block_size <= data.most_block:
        valid = f"least {data.least_block}" if config.block_size < data.least_block else f"most {data.most_block}"
        raise ValueError(f"block_size ({config.block_size}) must be at {valid} here")
    if config.batch_size % (n_parts := parallel.ranks() * config.accumulate):
        raise ValueError(f"batch_size ({config.batch_size}) must be a multiple of {n_parts} (processes x accumulate)")
    with parallel.together():
        check_run(folder, config, data, resume, overwrite)
        if parallel.rank() == 0:
            extension.load()  # what it has to say, or to build, comes before the first step
        torch.manual_seed(config.seed)
        device = pick_device(config.device)
        try:
            model = GPT(config).to(device)
        except RuntimeError as error:
            raise ValueError(f"there is no room for this model: {error}") from None
        model.use_codebooks(config.dense_steps == 0)
        session = Session(config, data, folder, model, make_optimizer(model, config), [])
        if resume and (folder / "train_state.pt").is_file():
            load_checkpoint(session)
    parallel.first(make_run, folder, config, data, resume)
    data.settle(folder)
    return session


def load_checkpoint(session):
    """Puts a session where its folder's checkpoint was taken; ValueError if that is damaged, or another run's."""
    path, model, config = session.folder / "train_state.pt", session.model, session.config
    state = read_tensors(path)
    with reading(path, "is not a checkpoint of this run"):
        check_tensors(state["model"], model.state_dict())
        parameters, moments = dict(enumerate(p for group in session.optimizer.param_groups for p in group["params"])), {}
        for i, found in state["optimizer"].items():
            check_tensors(found, {"step": torch.tensor(0.0), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]})
            moments[i] = {name: tensor.clone() for name, tensor in found.items()}  # off the disk
        session.step, session.seconds = int(state["step"]), float(state["seconds"])
        if not 0 < session.step <= config.steps or not 0 <= session.seconds < math.inf:
            raise ValueError(f"step {session.step}, after {session.seconds} seconds")
        model.load_state_dict(state["model"])
        session.optimizer.load_state_dict({**session.optimizer.state_dict(), "state": moments})
    session.metrics = lines = read_metrics(session.folder, session.step)
    due = [n for n in range(1, session.step + 1) if evaluation_is_due(config, n)]
    if [line["step"] for line in lines] != due or not all({"loss", "accuracy"} <= line.keys() for line in lines):
        raise ValueError(f"{session.folder / 'metrics.jsonl'} is damaged: its lines are not those of {session.step} steps")


def train(session):
    """Trains to the end and returns the summary (rank 0); or None, with a checkpoint, when a signal stops it.

    Raises FloatingPointError when the loss is no number any more, OSError on a full disk; the last checkpoint stays.
    """
    config, data, model = session.config, session.data, session.model
    fast = torch.compile(model) if config.compile else model
    waiting = config.decay is None and not all(codebook.enabled for codebook in model.codebooks().values())
    forward = parallel.wrap(fast, unused=waiting)
    began = time.monotonic() - session.seconds
    model.train()
    quiet = parallel.rank() > 0 or None
    with stop_signals() as stop, tqdm(total=config.steps, initial=session.step, unit="step", disable=quiet) as bar:
        for step in range(session.step, config.steps):
            generator = torch.Generator(model.device).manual_seed((config.seed * 1_000_003 + step) % 2**63)
            if step == config.dense_steps and step > 0:
                parallel.first(write_tensors, session.folder / "dense.pt", model.state_dict())  # before codebooks change it
                start_codebooks(model, config, data, generator)
                forward = parallel.wrap(fast, unused=False)
            loss = train_step(model, forward, session.optimizer, config, step, data)
            loss, stopped = parallel.agree(loss, bool(stop))
            done = step + 1
            revival, checkpoint = revival_is_due(config, done), done % config.checkpoint_every == 0 or done == config.steps or stopped
            to_keep = checkpoint or evaluation_is_due(config, done)
            if (done % 10 == 0 or revival or to_keep) and not loss.isfinite():  # not at each step: to look is to wait for the GPU
                raise FloatingPointError(f"the loss is {loss.item()} at step {done}: try a lower --lr than {config.lr}")
            if revival:
                for codebook in model.codebooks().values():
                    codebook.revive(session.optimizer, generator=generator)
            session.step, session.seconds = done, time.monotonic() - began
            if to_keep:
                parallel.first(keep, session, checkpoint)
            bar.update()
            if stopped and done < config.steps:
                return None
            if bar.n % 10 == 0 and not bar.disable:
                last = f"  (at {describe(session.metrics[-1])})" if session.metrics else ""
                bar.set_postfix_str(f"loss {loss.item():.3f}{last}")
    return parallel.first(summarise, session) or {}


def keep(session, checkpoint):
    """Evaluates, if it is time to, and saves what there is so far, but no weights that are no numbers."""
    config, done = session.config, session.step
    if not all(parameter.isfinite().all() for parameter in session.model.parameters()):
        raise FloatingPointError(f"the weights are no numbers after step {done}: try a lower --lr than {config.lr}")
    if evaluation_is_due(config, done):
        figures = evaluate(session.model, session.data, config.seed, n=256 if done < config.steps else 1024)
        session.metrics.append({"step": done, "tokens": done * config.batch_size * config.block_size, **figures})
        write(session.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in session.metrics))
        tqdm.write(describe(session.metrics[-1]))
        sys.stdout.flush()  # for a log, which has no bar
    if checkpoint:  # is train_state.pt alone, so that it can't be half old and half new; model.pt is there to be read
        weights, moments = session.model.state_dict(), session.optimizer.state_dict()["state"]
        write_tensors(session.folder / "model.pt", weights)  # first: a kill in between is made up for by resuming
        state = {"step": done, "seconds": session.seconds, "model": weights, "optimizer": moments}
        write_tensors(session.folder / "train_state.pt", state)


def describe(line):
    """A line of metrics for people."""
    codes = f"live codes {1 - line['dead_code_fraction']:.0%}" if "dead_code_fraction" in line else "dense"
    name = "transition_accuracy" if "transition_accuracy" in line else "accuracy"
    return f"step {line['step']:5}  loss {line['loss']:.4f}  {name.replace('_', ' ')} {line[name]:.3f}  {codes}"


def summarise(session):
    """Writes summary.json: the final figures, and those of the dense model before the codebooks came in."""
    dense = [line for line in session.metrics if "dead_code_fraction" not in line and session.config.sites()]
    summary = {**session.metrics[-1], "seconds": round(session.seconds, 1), "dense": dense[-1] if dense else None}
    write(session.folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def table(summary, others, names):
    """A run's figures of these names for people, beside those of its dense model and of others, {title: figures}."""
    dense, width = summary["dense"], max(map(len, names)) + 1
    columns = {"this run": summary, **({f"dense, step {dense['step']}": dense} if dense else {}), **others}
    lines = [" " * width + "".join(f"   {title}" for title in columns)]
    for name in names:
        cells = (f"{row[name]:.4f}" if name in row else "-" for row in columns.values())
        lines.append(f"{name:{width}}" + "".join(f"{cell:>{len(title) + 3}}" for title, cell in zip(columns, cells)))
    return "\n".join(lines)


def report(run, compared):
    """What people are told at the end: the table of figures, and a sample."""
    data, summary, generator = run.data, run.summary, torch.Generator().manual_seed(run.config.seed)
    demonstration = " --force-code" if run.fsm else ""
    tokens = run.model.generate(data.prompt(""), min(data.sample_length, run.config.block_size), generator=generator)
    return (
        f"{compared}\n{summary['tokens'] / 1e6:.1f} M tokens in {summary['seconds']:.0f} s\n"
        f"a sample: {data.show(tokens[0].numpy())}\nnext:     python -m minicode.sample --run {run.folder}{demonstration}"
    )


def command(argv, name, about, kind, presets, out, compare):
    """A training command, from its flags to its exit status; compare(summary) is the table at its end."""
    parser = Parser(name, about)
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder of the run (default: {out})")
    paper = "; paper: its method and size" if "paper" in presets else ""
    parser.add_argument("--preset", choices=presets, default="default", help=f"settings to start from (default: ours){paper}")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the run in --out")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add_flags(parser, kind)
    add_flags(parser, TrainConfig, presets["default"])
    with parser.user_errors():
        parallel.join()
        args = parser.parse_args(argv)
        data = kind(**given(args, kind))
        settings = {**presets["default"], **presets[args.preset], **given(args, TrainConfig)}
        config = TrainConfig(**settings, vocab_size=data.vocab_size)
        session = open_session(config, data, args.out, args.resume, args.overwrite)
    first = parallel.rank() == 0
    if first:
        print(f"{data}; codebooks at {', '.join(config.sites()) or 'no site'}", flush=True)
    try:
        summary = train(session)
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    parallel.leave()
    if first and summary is None:
        print("\nstopped; the same command, with --resume and not --overwrite, continues it", file=sys.stderr)
    elif first:
        run = load_run(args.out)
        print(report(run, compare(run.summary)))
    return 130 if summary is None else 0
