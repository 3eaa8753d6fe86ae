"""The search, the layer and the training step, timed side by side."""

import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from minicode import topk
from minicode.codebook import Codebook
from minicode.fsm import FSM
from minicode.model import GPT, evaluating
from minicode.runtime import extension
from minicode.runtime.runs import TrainConfig, load_run
from minicode.runtime.session import make_optimizer
from minicode.train import train_step


def timed(methods, rounds=7):
    """{name: {"ms", "lowest", "highest"}} of functions that are run in turn, after one round to warm up."""
    times, wait = (
        {name: [] for name in methods},
        torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None,
    )
    for _ in range(rounds + 1):
        for name, method in methods.items():
            wait()
            start = time.perf_counter()
            method()
            wait()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"ms": median(t[1:]), "lowest": min(t[1:]), "highest": max(t[1:])}
        for name, t in times.items()
    }


def extra_memory(method, on_gpu=False):
    """The most memory, in MB, that a call takes beyond what there was before; None where the system does not tell."""

    def status(field):
        return (
            next(
                int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)
            )
            / 1024
        )

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before, _ = torch.cuda.memory_allocated(), method()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    method()
    return max(0.0, status("VmHWM") - before)


def searches(x, codes, k, similarity):
    """The ways of searching that there are here, by name, as functions: x (G, N, d), codes (G, C, d)."""
    scale, offset = topk.scale_and_offset(codes, similarity)
    table = (codes * scale.mT).contiguous()
    methods = {
        "matmul + topk": lambda: torch.baddbmm(offset, x, table.mT).topk(k),
        "PyTorch, chunks": lambda: topk.search_in_chunks(x, codes, k, similarity, topk.in_pytorch),
    }
    if x.device.type in extension.load()[0] and not (x.is_cuda and k > 32):
        methods["float32"] = lambda: topk.native(x, codes, k, similarity, coarse=False)
        methods["coarse + float32"] = lambda: topk.native(x, codes, k, similarity)
    if x.is_cuda:
        return {**methods, "matmul alone": lambda: x @ table.mT}
    try:
        import faiss
    except ImportError:
        return methods
    kind = faiss.IndexFlatL2 if similarity == "distance" else faiss.IndexFlatIP
    indexes = [kind(table.shape[2]) for _ in table]
    for index, rows in zip(indexes, table.numpy()):
        index.add(rows)
    queries = [np.ascontiguousarray(rows) for rows in x.numpy()]
    return {
        **methods,
        "faiss": lambda: [index.search(rows, k) for index, rows in zip(indexes, queries)],
    }


def bench_search(x, codes, k, similarity, what):
    """One table of searches, all of them checked to give the same ids."""
    methods, flop = searches(x, codes, k, similarity), 2 * x.numel() * codes.shape[1]
    exact = methods["PyTorch, chunks"]()[1]
    results = timed(methods, 7 if flop > 1e8 and not x.is_cuda else 101)
    for name, result in results.items():
        result["gflops"] = flop / result["ms"] / 1e6
        result["times_as_fast"] = results["matmul + topk"]["ms"] / result["ms"]
        result["extra_mb"] = extra_memory(methods[name], x.is_cuda)
        if isinstance(found := methods[name](), tuple):  # of scores and ids, both tensors
            result["different_ids"] = (found[1] != exact).sum().item()
    shape = dict(zip(("groups", "N", "d", "C", "k"), (*x.shape, codes.shape[1], k)))
    return {"codes": what, **shape, "methods": results}


def bench_sweep(device, n=4096, d=64, n_codes=4096):
    """The search for larger and larger N, C, d and k: time beside that of the first row, and the same per N * C * d."""
    shapes = [(n, n_codes, d, 1), *((m * n, n_codes, d, 1) for m in (2, 4)), *((n, m * n_codes, d, 1) for m in (2, 4)),
              *((n, n_codes, m * d, 1) for m in (2, 4)), *((n, n_codes, d, k) for k in (4, 16, 64))]  # fmt: skip
    searches = {}
    for shape in shapes:
        x, codes, k = (
            torch.randn(shape[0], shape[2]).to(device),
            torch.randn(shape[1], shape[2]).to(device),
            shape[3],
        )
        searches[shape] = lambda x=x, codes=codes, k=k: topk.topk_codes(x, codes, k)
    times, rows = timed(searches), []
    for shape, t in times.items():
        ratio, work = (
            t["ms"] / times[shapes[0]]["ms"],
            shape[0] * shape[1] * shape[2] / (n * n_codes * d),
        )
        rows.append(
            {
                **dict(zip(("N", "C", "d", "k"), shape)),
                **t,
                "times_first": ratio,
                "per_ncd": ratio / work,
            }
        )
    return rows


def trained(folder, device="cpu"):
    """Cases for bench_search from a run: what reaches the codebooks of its last layer."""
    run, inputs = load_run(folder, device), {}
    for name, codebook in run.model.codebooks().items():
        codebook.register_forward_pre_hook(
            lambda c, args, name=name: inputs.update({name: c.activations(args[0]).flatten(0, -3)})
        )
    with evaluating(run.model):
        run.model(
            torch.from_numpy(
                run.fsm.sequences(np.random.default_rng(0), 64, run.config.block_size)
            ).to(device)
        )
    for name, c in list(run.model.codebooks().items())[-2:]:
        yield (
            inputs[name].transpose(0, 1).contiguous(),
            c.codes.detach(),
            c.k,
            c.similarity,
            f"of {folder}: {name}",
        )


def bench_layer(device, dim, n_codes, groups):
    """Codebook, forward and backward of 64 x 128 activations, beside the same with matmul + topk."""
    codebook = Codebook(n_codes, dim, 1, groups).to(device)
    x = torch.randn(64, 128, groups * dim).to(device).requires_grad_()

    def plain():
        a = x.view(-1, groups, dim).transpose(0, 1)  # (G, N, d)
        ids = (a.detach() @ F.normalize(codebook.codes.detach(), dim=-1).mT).topk(1).indices
        q = codebook.codes.gather(1, ids.expand(-1, -1, dim))
        ((q + (a - a.detach())).sum() + F.mse_loss(q, a.detach())).backward()

    methods = {
        "matmul + topk": plain,
        "Codebook": lambda: (codebook(x).sum() + codebook.autoencoding).backward(),
    }
    return {"d": dim, "C": n_codes, "groups": groups, "methods": timed(methods)}


def bench_steps(device):
    """A training step of the default preset: dense, and with codebooks searched by PyTorch and by the extension."""
    steps, fsm, found, none = {}, FSM(), extension.load(), ((), "")
    cases = {
        "dense": ("none", none),
        "codebooks, PyTorch": ("head,mlp", none),
        "codebooks, extension": ("head,mlp", found),
    }
    for name, (sites, load) in cases.items():
        config = TrainConfig(codebooks=sites)
        model = GPT(config).to(device)
        step = partial(
            train_step, model, model, make_optimizer(model, config), config, config.steps - 1, fsm
        )
        steps[name] = mock.patch.object(extension, "load", lambda load=load: load)(step)
    times = timed(steps, 21)
    return {name: {**t, "times_dense": t["ms"] / times["dense"]["ms"]} for name, t in times.items()}
