"""One training loop, and the folder of files that it leaves.

A run trains the dense model for `dense_share` of its steps, starts the codebooks from its activations, and
goes on with the codebooks in place. Batch and random numbers of a step follow from (seed, step) alone, so
that resuming needs no random state, and a resumed run ends as the unbroken one, to the last bit.
"""

import json
import math
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from minicode.codebook import perplexity
from minicode.control import record
from minicode.fsm import FSM
from minicode.model import evaluating
from minicode.runtime import processes
from minicode.runtime.files import write, write_tensors
from minicode.runtime.session import describe, stop_signals, summarise
from minicode.study.machine import accuracies


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
    tokens = torch.from_numpy(data.sequences(rng, config.batch_size, config.block_size + 1)).to(
        device, non_blocking=True
    )
    return tokens[:, :-1], tokens[:, 1:]


def start_codebooks(model, config, data, generator):
    """Starts each codebook by k-means on what reaches it: in order, so that later ones see quantised inputs."""
    for codebook in tqdm(model.codebooks().values(), desc="k-means", leave=False, disable=None):
        n_inputs, inputs = 32 * max(codebook.n_codes, 1024), []
        hook = codebook.register_forward_pre_hook(
            lambda module, args: inputs.append(args[0].flatten(0, -2))
        )
        with evaluating(model), hook:
            while sum(map(len, inputs)) < n_inputs:
                model(batch(config, data, model.device, 1, len(inputs))[0])
        codebook.enabled = True
        codebook.start(torch.cat(inputs)[:n_inputs], generator=generator)


def train_step(model, forward, optimizer, config, step, data):
    """One step of the optimizer and of the codebooks; returns the loss of this process, a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.zero_grad()
    x, y = batch(config, data, model.device, 0, step)
    x = processes.my_rows(x)
    y = processes.my_rows(y)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        _, loss = forward(x, y)
    total = loss
    for codebook in model.codebooks().values():
        if codebook.enabled:
            total = total + config.autoencoding * codebook.autoencoding
            total = total + config.commitment * codebook.commitment
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


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
    result = {"loss": loss, "accuracy": accuracy, **data.measures(tokens, loss)}
    if isinstance(data, FSM):
        result |= accuracies(data, model, seed)
    if counts:
        dead = {name: (count == 0).float() for name, count in counts.items()}
        result["dead_code_fraction"] = torch.cat([d.flatten() for d in dead.values()]).mean().item()
        result["sites"] = {name: {"dead_code_fraction": d.mean().item(), "perplexity": perplexity(counts[name]).mean().item()}
                           for name, d in dead.items()}  # fmt: skip
    return result


def train(session):
    """Trains to the end and returns the summary (rank 0); or None, with a checkpoint, when a signal stops it.

    Raises FloatingPointError when the loss is no number any more, OSError on a full disk; the last checkpoint stays.
    """
    config, data, model = session.config, session.data, session.model
    fast = torch.compile(model) if config.compile else model
    waiting = not all(codebook.enabled for codebook in model.codebooks().values())
    forward = processes.wrap(fast, unused=waiting)
    began = time.monotonic() - session.seconds
    model.train()
    quiet = processes.rank() > 0 or None
    with (
        stop_signals() as stop,
        tqdm(total=config.steps, initial=session.step, unit="step", disable=quiet) as bar,
    ):
        for step in range(session.step, config.steps):
            generator = torch.Generator(model.device).manual_seed(
                (config.seed * 1_000_003 + step) % 2**63
            )
            if step == config.dense_steps and step > 0:
                processes.first(
                    write_tensors, session.folder / "dense.pt", model.state_dict()
                )  # before codebooks change it
                start_codebooks(model, config, data, generator)
                forward = processes.wrap(fast, unused=False)
            loss = train_step(model, forward, session.optimizer, config, step, data)
            loss, stopped = processes.agree(loss, bool(stop))
            done = step + 1
            revival, checkpoint = (
                config.revival_is_due(done),
                done % config.checkpoint_every == 0 or done == config.steps or stopped,
            )
            to_keep = checkpoint or config.evaluation_is_due(done)
            if (
                done % 10 == 0 or revival or to_keep
            ) and not loss.isfinite():  # not at each step: to look is to wait for the GPU
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {done}: try a lower --lr than {config.lr}"
                )
            if revival:
                for codebook in model.codebooks().values():
                    codebook.revive(session.optimizer, generator=generator)
            session.step, session.seconds = done, time.monotonic() - began
            if to_keep:
                processes.first(keep, session, checkpoint)
            bar.update()
            if stopped and done < config.steps:
                return None
            if bar.n % 10 == 0 and not bar.disable:
                last = f"  (at {describe(session.metrics[-1])})" if session.metrics else ""
                bar.set_postfix_str(f"loss {loss.item():.3f}{last}")
    return processes.first(summarise, session) or {}


def keep(session, checkpoint):
    """Evaluates, if it is time to, and saves what there is so far, but no weights that are no numbers."""
    config, done = session.config, session.step
    if not all(parameter.isfinite().all() for parameter in session.model.parameters()):
        raise FloatingPointError(
            f"the weights are no numbers after step {done}: try a lower --lr than {config.lr}"
        )
    if config.evaluation_is_due(done):
        figures = evaluate(
            session.model, session.data, config.seed, n=256 if done < config.steps else 1024
        )
        session.metrics.append(
            {"step": done, "tokens": done * config.batch_size * config.block_size, **figures}
        )
        write(
            session.folder / "metrics.jsonl",
            "".join(json.dumps(line) + "\n" for line in session.metrics),
        )
        tqdm.write(describe(session.metrics[-1]))
        sys.stdout.flush()  # for a log, which has no bar
    if checkpoint:  # is train_state.pt alone, so that it can't be half old and half new; model.pt is there to be read
        weights, moments = session.model.state_dict(), session.optimizer.state_dict()["state"]
        write_tensors(
            session.folder / "model.pt", weights
        )  # first: a kill in between is made up for by resuming
        state = {"step": done, "seconds": session.seconds, "model": weights, "optimizer": moments}
        write_tensors(session.folder / "train_state.pt", state)
