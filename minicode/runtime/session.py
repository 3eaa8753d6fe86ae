"""A training under way: its model, its optimizer, and the checkpoint from which it goes on."""

import json
import math
import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from minicode.fsm import FSM
from minicode.language.text import Text
from minicode.model import GPT
from minicode.runtime import extension, processes
from minicode.runtime.files import check_tensors, read_tensors, reading, write
from minicode.runtime.runs import TrainConfig, check_run, make_run, read_metrics


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
        raise ValueError(
            f"device {name!r} can't be used here: {str(error).split(chr(10))[0]}"
        ) from None


def make_optimizer(model, config):
    """AdamW, with weight decay on matrices, but on no bias, gain or code."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in learnt if p.dim() == 2], [p for p in learnt if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


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
        valid = (
            f"least {data.least_block}"
            if config.block_size < data.least_block
            else f"most {data.most_block}"
        )
        raise ValueError(f"block_size ({config.block_size}) must be at {valid} here")
    if config.batch_size % (n_parts := processes.ranks() * config.accumulate):
        raise ValueError(
            f"batch_size ({config.batch_size}) must be a multiple of {n_parts} (processes x accumulate)"
        )
    with processes.together():
        check_run(folder, config, data, resume, overwrite)
        if processes.rank() == 0:
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
    processes.first(make_run, folder, config, data, resume)
    data.settle(folder)
    return session


def load_checkpoint(session):
    """Puts a session where its folder's checkpoint was taken; ValueError if that is damaged, or another run's."""
    path, model, config = session.folder / "train_state.pt", session.model, session.config
    state = read_tensors(path)
    with reading(path, "is not a checkpoint of this run"):
        check_tensors(state["model"], model.state_dict())
        parameters, moments = (
            dict(enumerate(p for group in session.optimizer.param_groups for p in group["params"])),
            {},
        )
        for i, found in state["optimizer"].items():
            check_tensors(
                found,
                {"step": torch.tensor(0.0), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]},
            )
            moments[i] = {name: tensor.clone() for name, tensor in found.items()}  # off the disk
        session.step, session.seconds = int(state["step"]), float(state["seconds"])
        if not 0 < session.step <= config.steps or not 0 <= session.seconds < math.inf:
            raise ValueError(f"step {session.step}, after {session.seconds} seconds")
        model.load_state_dict(state["model"])
        session.optimizer.load_state_dict({**session.optimizer.state_dict(), "state": moments})
    session.metrics = lines = read_metrics(session.folder, session.step)
    due = [n for n in range(1, session.step + 1) if config.evaluation_is_due(n)]
    if [line["step"] for line in lines] != due or not all(
        {"loss", "accuracy"} <= line.keys() for line in lines
    ):
        raise ValueError(
            f"{session.folder / 'metrics.jsonl'} is damaged: its lines are not those of {session.step} steps"
        )


def summarise(session):
    """Writes summary.json: the final figures, and those of the dense model before the codebooks came in."""
    dense = [
        line
        for line in session.metrics
        if "dead_code_fraction" not in line and session.config.sites()
    ]
    summary = {
        **session.metrics[-1],
        "seconds": round(session.seconds, 1),
        "dense": dense[-1] if dense else None,
    }
    write(session.folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def describe(line):
    """A line of metrics for people."""
    codes = (
        f"live codes {1 - line['dead_code_fraction']:.0%}"
        if "dead_code_fraction" in line
        else "dense"
    )
    name = "transition_accuracy" if "transition_accuracy" in line else "accuracy"
    return f"step {line['step']:5}  loss {line['loss']:.4f}  {name.replace('_', ' ')} {line[name]:.3f}  {codes}"
