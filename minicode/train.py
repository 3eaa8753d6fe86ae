"""One training loop, and the folder of files that it leaves.

A run trains the dense model for `dense_share` of its steps, starts the codebooks from its activations, and
goes on with the codebooks in place. Batch and random numbers of a step follow from (seed, step) alone, so
that resuming needs no random state, and a resumed run ends as the unbroken one, to the last bit.
"""

import argparse
import io
import json
import math
import os
import signal
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minicode.codebook import perplexity
from minicode.control import record
from minicode.fsm import FSM
from minicode.model import GPT, GPTConfig, evaluating, option

VERSION = 1  # of the files in a run's folder
FILES = ("config.json", "fsm.json", "model.pt", "train_state.pt", "metrics.jsonl", "summary.json")


@dataclass
class TrainConfig(GPTConfig):
    seed: int = option(0, "seed of everything but the machine: weights, batches, k-means")
    steps: int = option(4000, "training steps")
    batch_size: int = option(16, "sequences in a batch")
    lr: float = option(4e-3, "peak learning rate; warm-up, then a cosine to a tenth of it")
    dense_share: float = option(0.5, "share of the steps trained dense, before codebooks start by k-means; 0: random codes")
    codebook_lr: float = option(0.2, "learning rate with codebooks started, as a share of lr")
    autoencoding: float = option(1.0, "weight of |q - stop_gradient(a)|^2, which moves codes that learn by gradient")
    commitment: float = option(1.0, "weight of |a - stop_gradient(q)|^2, which keeps activations near their codes")
    revive_every: int = option(200, "steps between revivals of dead codes; 0: never")
    device: str = option("auto", "cpu, cuda, mps or auto")
    dtype: str = option("float32", "float32, or bfloat16 (autocast; the search stays in float32)")
    compile: bool = option(False, "compile the model with torch.compile")
    eval_every: int = option(400, "steps between evaluations")
    checkpoint_every: int = option(1000, "steps between checkpoints")

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "batch_size", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dense_share < 1:
            raise ValueError(f"dense_share must be at least 0 and less than 1, not {self.dense_share}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype}")

    @property
    def dense_steps(self):
        """Steps before the codebooks come in: all of them for a model without."""
        return int(self.dense_share * self.steps) if self.sites() else self.steps


# -- command line: a dataclass's fields are the flags


def add_flags(parser, cls):
    for f in fields(cls):
        if f.metadata.get("flag", True):
            flag, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default})"
            if f.type is bool:
                parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            else:
                kind = number if f.type == float | None else f.type
                parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text, metavar=kind.__name__)


def number(text):
    return None if text == "none" else float(text)


def given(args, cls):
    """The fields of cls that the command line names."""
    return {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}


@contextmanager
def user_errors(parser):
    """A user's mistake ends the command with one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


# -- files


def write(path, content):
    """Writes text or bytes so that the file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, data):
    write(path, json.dumps(data, indent=1) + "\n")


def write_tensors(path, data):
    buffer = io.BytesIO()
    torch.save(data, buffer)
    write(path, buffer.getvalue())


def read_tensors(path, device):
    """A file of tensors; one that is damaged, or that would run code, is a ValueError."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever the zip reader and the unpickler raise
        raise ValueError(f"{path} is damaged, or no file of tensors, and was not loaded ({type(error).__name__})") from None


def read_json(path, build):
    """build(data) of a JSON file; anything wrong with it is a ValueError that names the file."""
    try:
        return build(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def config_from_json(data):
    data = dict(data)
    if data.pop("version") != VERSION:
        raise ValueError(f"it was written by another version of minicode; this one reads version {VERSION}")
    types = {f.name: f.type for f in fields(TrainConfig)}
    if data.keys() != types.keys():
        raise ValueError(f"unknown or missing: {', '.join(sorted(data.keys() ^ types.keys()))}")
    for name, value in data.items():
        if not isinstance(value, types[name]) or (isinstance(value, bool) and types[name] is not bool):
            raise ValueError(f"{name} is {value!r}")
    return TrainConfig(**data)


def open_run(folder, config, data, resume=False, overwrite=False):
    """Makes the folder of a new run, or checks that it holds this one; an existing run is never lost by accident."""
    exists = (folder / "config.json").exists()
    if resume:
        if not exists:
            raise ValueError(f"there is no run in {folder} to resume")
        saved = read_json(folder / "config.json", config_from_json)
        differ = [
            name for name, value in asdict(config).items()
            if value != getattr(saved, name) and name not in ("device", "compile")
        ]
        if differ or read_json(folder / "fsm.json", FSM.from_json) != data:
            raise ValueError(f"the run in {folder} has other settings than these: {', '.join(differ) or 'its machine'}")
        return
    if exists and not overwrite:
        raise ValueError(f"{folder} holds a run already: --resume continues it, --overwrite replaces it")
    if folder.exists() and not exists and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and not a run")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "fsm.json", data.to_json())
    write_json(folder / "config.json", {"version": VERSION, **asdict(config)})


@dataclass
class Run:
    """A run as read back from its folder."""

    folder: Path
    config: TrainConfig
    model: GPT
    fsm: FSM
    summary: dict  # the final figures; empty while the run is unfinished


def load_run(folder, device="cpu"):
    """The run in a folder, with its model in evaluation mode. Nothing in the files is executed.

    Raises ValueError, in one line, if there is none or a file of it is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"there is no run in {folder}: python -m minicode.train_fsm --out {folder} makes one")
    config = read_json(folder / "config.json", config_from_json)
    fsm = read_json(folder / "fsm.json", FSM.from_json)
    model = GPT(config).to(device)
    state = read_tensors(folder / "model.pt", device)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / 'model.pt'} does not hold the model of config.json: {reason}") from None
    done = (folder / "summary.json").exists()
    return Run(folder, config, model.eval(), fsm, read_json(folder / "summary.json", dict) if done else {})


def read_metrics(folder, up_to=math.inf):
    """The lines of metrics.jsonl, one an evaluation, up to a step; half a line at the end does not count."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    metrics = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in metrics if line["step"] <= up_to]


# -- training


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used here: {str(error).split(chr(10))[0]}") from None
    return torch.device(name)


def make_optimizer(model, config):
    """AdamW, with weight decay on matrices, but on no bias, gain or code."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learnt if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in learnt if p.dim() != 2], "weight_decay": 0.0},
    ]
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
    tokens = torch.from_numpy(data.sequences(rng, config.batch_size, config.block_size + 1)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def start_codebooks(model, config, data, generator):
    """Starts each codebook by k-means on what reaches it: in order, so that later ones see quantised inputs."""
    for codebook in tqdm(model.codebooks().values(), desc="k-means", leave=False, disable=None):
        n_inputs, inputs = 32 * max(codebook.n_codes, 1024), []
        hook = codebook.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
        with evaluating(model):
            while sum(map(len, inputs)) < n_inputs:
                model(batch(config, data, model.device, 1, len(inputs))[0])
        hook.remove()
        codebook.enabled = True
        codebook.start(torch.cat(inputs)[:n_inputs], generator=generator)


def train_step(model, forward, optimizer, config, step, data):
    """One step of the optimizer and of the codebooks; returns the loss, a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    x, y = batch(config, data, model.device, 0, step)
    half = torch.autocast(x.device.type, torch.bfloat16) if config.dtype == "bfloat16" else nullcontext()
    with half:
        _, loss = forward(x, y)
    codebooks = [codebook for codebook in model.codebooks().values() if codebook.enabled]
    pull = sum(config.autoencoding * c.autoencoding + config.commitment * c.commitment for c in codebooks)
    optimizer.zero_grad()
    (loss + pull).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for codebook in codebooks:
        codebook.update()
    return loss.detach()


def evaluate(model, data, seed, n=256):
    """The measures of a model on n fresh sequences, by the names of design.md: a dict, ready for JSON."""
    tokens = data.sequences(np.random.default_rng((seed, 2)), n, model.config.block_size + 1)
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
    result = {"loss": loss, "accuracy": accuracy, **data.measures(model, seed)}
    if counts:
        dead = {name: (count == 0).float().mean().item() for name, count in counts.items()}
        result["dead_code_fraction"] = sum((c == 0).sum().item() for c in counts.values()) / sum(
            c.numel() for c in counts.values()
        )
        result["sites"] = {
            name: {"dead_code_fraction": dead[name], "perplexity": perplexity(count).mean().item()}
            for name, count in counts.items()
        }
    return result


@contextmanager
def stop_signals():
    """Within the block, Ctrl-C and SIGTERM set the event that is yielded; a second Ctrl-C interrupts."""
    stop = threading.Event()

    def handle(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@dataclass
class Session:
    """A training under way: what the loop works on, and where it stands."""

    config: TrainConfig
    data: FSM
    folder: Path
    model: GPT
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0


def open_session(config, data, folder, resume=False, overwrite=False):
    """Everything that can fail by a user's mistake, before the first step: ValueError, and no file is touched."""
    torch.manual_seed(config.seed)
    model = GPT(config).to(pick_device(config.device))
    model.use_codebooks(config.dense_steps == 0)
    session = Session(config, data, folder, model, make_optimizer(model, config))
    open_run(folder, config, data, resume, overwrite)
    path = folder / "train_state.pt"
    if resume and path.exists():
        state = read_tensors(path, model.device)
        try:
            model.load_state_dict(state["model"])
            session.optimizer.load_state_dict(state["optimizer"])
            session.step, session.seconds = state["step"], state["seconds"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a checkpoint of this run: {str(error)[:200]}") from None
    return session


def train(session):
    """Trains to the end and returns the summary; or None, with a checkpoint, when a signal stops it."""
    config, data, folder, model = session.config, session.data, session.folder, session.model
    forward = torch.compile(model) if config.compile else model
    metrics = read_metrics(folder, session.step)
    began = time.monotonic() - session.seconds
    model.train()
    with stop_signals() as stop, tqdm(total=config.steps, initial=session.step, unit="step", disable=None) as bar:
        for step in range(session.step, config.steps):
            generator = torch.Generator(model.device).manual_seed(config.seed * 1_000_003 + step)
            if step == config.dense_steps and step > 0:
                start_codebooks(model, config, data, generator)
            loss = train_step(model, forward, session.optimizer, config, step, data)
            done, left = step + 1, config.steps - step - 1
            if step >= config.dense_steps and left >= 100 and config.revive_every and done % config.revive_every == 0:
                for codebook in model.codebooks().values():
                    codebook.revive(session.optimizer, generator=generator)
            if done % config.eval_every == 0 or done == config.dense_steps or left == 0:
                figures = evaluate(model, data, config.seed)
                metrics.append({"step": done, "tokens": done * config.batch_size * config.block_size, **figures})
                write_metrics(folder, metrics)
                tqdm.write(describe(metrics[-1], config))
            session.step, session.seconds = done, time.monotonic() - began
            if done % config.checkpoint_every == 0 or left == 0 or stop.is_set():
                save(session)
            bar.update()
            if stop.is_set() and left:
                return None
            if bar.n % 10 == 0 and not bar.disable:
                bar.set_postfix_str(f"loss {loss.item():.3f}  {describe(metrics[-1]) if metrics else ''}")
    return summarise(session, metrics)


def save(session):
    """The checkpoint is train_state.pt alone, so it can't be half old and half new; model.pt is there to be read."""
    weights = session.model.state_dict()
    state = {"step": session.step, "seconds": session.seconds, "model": weights}
    write_tensors(session.folder / "train_state.pt", {**state, "optimizer": session.optimizer.state_dict()})
    write_tensors(session.folder / "model.pt", weights)


def write_metrics(folder, metrics):
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))


def describe(line, config=None):
    """One line of metrics for people; shorter for the progress bar."""
    parts = [f"step {line['step']:>5}/{config.steps}", f"loss {line['loss']:.4f}"] if config else []
    parts.append(f"transitions {line['transition_accuracy']:.3f}")
    if "dead_code_fraction" in line:
        parts.append(f"live codes {1 - line['dead_code_fraction']:.0%}")
    elif config and config.sites():
        parts.append("(dense: codebooks come in later)")
    return "  ".join(parts)


def summarise(session, metrics):
    """Writes summary.json: the final figures, and those of the dense model before the codebooks came in."""
    dense = [line for line in metrics if "dead_code_fraction" not in line and session.config.sites()]
    summary = {
        **metrics[-1],
        "loss_floor": session.data.loss_floor(session.config.block_size),
        "seconds": round(session.seconds, 1),
        "dense": dense[-1] if dense else None,
    }
    write_json(session.folder / "summary.json", summary)
    return summary
