"""python -m minicode.bench: the search, and the training step around it, timed side by side in one run.

The methods of a table are run in turn, round after round; shown are the median, the lowest and the highest time. The
peak is this machine's own: what torch reaches on one large square matmul.
"""

import json
import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from minicode import extension, topk
from minicode.codebook import Codebook
from minicode.fsm import FSM
from minicode.model import GPT, evaluating
from minicode.run import Parser, TrainConfig, load_run
from minicode.train import make_optimizer, train_step

SHAPES = [  # groups, N, d, C, k
    (1, 8192, 128, 10_000, 1), (1, 8192, 128, 10_000, 8), (4, 8192, 32, 2048, 1), (1, 4096, 768, 10_000, 100),
    (1, 1, 128, 10_000, 8),
]  # fmt: skip


def timed(methods, rounds=7):
    """{name: {"ms", "lowest", "highest"}} of functions that are run in turn, after one round to warm up."""
    times = {name: [] for name in methods}
    for _ in range(rounds + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: {"ms": median(t[1:]), "lowest": min(t[1:]), "highest": max(t[1:])} for name, t in times.items()}


def extra_memory(method):
    """The most memory, in MB, that a call takes beyond what there was before; None where the system does not tell."""
    def status(field):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    method()
    return max(0.0, status("VmHWM") - before)


def searches(x, codes, k, similarity):
    """The ways of searching that there are here, by name, as functions: x (G, N, d), codes (G, C, d)."""
    scale, offset = topk.scale_and_offset(codes, similarity)
    table, number = (codes * scale.mT).contiguous(), topk.SIMILARITIES.index(similarity)
    methods = {
        "matmul + topk": lambda: torch.baddbmm(offset, x, table.mT).topk(k),
        "PyTorch, chunks": lambda: topk.search_in_chunks(x, codes, k, similarity, topk.in_pytorch),
    }
    if extension.load()[0]:
        methods["float32"] = lambda: torch.ops.minicode_native.topk(x, codes, k, number, False)
        methods["coarse + float32"] = lambda: torch.ops.minicode_native.topk(x, codes, k, number, True)
    try:
        import faiss
    except ImportError:
        return methods
    kind = faiss.IndexFlatL2 if similarity == "distance" else faiss.IndexFlatIP
    indexes = [kind(table.shape[2]) for _ in table]
    for index, rows in zip(indexes, table.numpy()):
        index.add(rows)
    queries = [np.ascontiguousarray(rows) for rows in x.numpy()]
    return {**methods, "faiss": lambda: [index.search(rows, k) for index, rows in zip(indexes, queries)]}


def bench_search(x, codes, k, similarity, what):
    """One table of searches, all of them checked to give the same ids."""
    methods, flop = searches(x, codes, k, similarity), 2 * x.numel() * codes.shape[1]
    exact = methods["PyTorch, chunks"]()[1]
    results = timed(methods, 7 if flop > 1e8 else 101)
    for name, result in results.items():
        result["gflops"] = flop / result["ms"] / 1e6
        result["times_as_fast"] = results["matmul + topk"]["ms"] / result["ms"]
        result["extra_mb"] = extra_memory(methods[name])
        if name != "faiss":
            result["different_ids"] = (methods[name]()[1] != exact).sum().item()
    shape = dict(zip(("groups", "N", "d", "C", "k"), (*x.shape, codes.shape[1], k)))
    return {"codes": what, **shape, "methods": results}


def bench_sweep(n=4096, d=64, n_codes=4096):
    """The search for larger and larger N, C, d and k: time beside that of the first row, and the same per N * C * d."""
    shapes = [(n, n_codes, d, 1), *((m * n, n_codes, d, 1) for m in (2, 4)), *((n, m * n_codes, d, 1) for m in (2, 4)),
              *((n, n_codes, m * d, 1) for m in (2, 4)), *((n, n_codes, d, k) for k in (4, 16, 64))]  # fmt: skip
    searches = {}
    for shape in shapes:
        x, codes, k = torch.randn(shape[0], shape[2]), torch.randn(shape[1], shape[2]), shape[3]
        searches[shape] = lambda x=x, codes=codes, k=k: topk.topk_codes(x, codes, k)
    times, rows = timed(searches), []
    for shape, t in times.items():
        ratio, work = t["ms"] / times[shapes[0]]["ms"], shape[0] * shape[1] * shape[2] / (n * n_codes * d)
        rows.append({**dict(zip(("N", "C", "d", "k"), shape)), **t, "times_first": ratio, "per_ncd": ratio / work})
    return rows


def trained(folder):
    """Cases for bench_search from a run: what reaches the codebooks of its last layer."""
    run, inputs = load_run(folder), {}
    for name, codebook in run.model.codebooks().items():
        codebook.register_forward_pre_hook(lambda c, args, name=name: inputs.update({name: args[0].reshape(-1, c.groups, c.dim)}))
    with evaluating(run.model):
        run.model(torch.from_numpy(run.fsm.sequences(np.random.default_rng(0), 64, run.config.block_size)))
    for name, c in list(run.model.codebooks().items())[-2:]:
        yield inputs[name].transpose(0, 1).contiguous(), c.codes.detach(), c.k, c.similarity, f"of {folder}: {name}"


def bench_layer(dim, n_codes, groups):
    """Codebook, forward and backward of 64 x 128 activations, beside the same with matmul + topk."""
    codebook, x = Codebook(n_codes, dim, 1, groups), torch.randn(64, 128, groups * dim, requires_grad=True)

    def plain():
        a = x.view(-1, groups, dim).transpose(0, 1)  # (G, N, d)
        ids = (a.detach() @ F.normalize(codebook.codes.detach(), dim=-1).mT).topk(1).indices
        q = codebook.codes.gather(1, ids.expand(-1, -1, dim))
        ((q + (a - a.detach())).sum() + F.mse_loss(q, a.detach())).backward()

    methods = {"matmul + topk": plain, "Codebook": lambda: (codebook(x).sum() + codebook.autoencoding).backward()}
    return {"d": dim, "C": n_codes, "groups": groups, "methods": timed(methods)}


def bench_steps():
    """A training step of the default preset: dense, and with codebooks searched by PyTorch and by the extension."""
    steps, fsm, found, none = {}, FSM(), extension.load(), ((), "")
    cases = {"dense": ("none", none), "codebooks, PyTorch": ("head,mlp", none), "codebooks, extension": ("head,mlp", found)}
    for name, (sites, load) in cases.items():
        config = TrainConfig(codebooks=sites)
        model = GPT(config)
        step = partial(train_step, model, model, make_optimizer(model, config), config, config.steps - 1, fsm)
        steps[name] = mock.patch.object(extension, "load", lambda load=load: load)(step)
    times = timed(steps, 21)
    return {name: {**t, "times_dense": t["ms"] / times["dense"]["ms"]} for name, t in times.items()}


def main(argv=None):
    parser = Parser("bench", __doc__)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    square = torch.randn(3072, 3072)
    peak = 2 * 3072**3 / timed({"": lambda: square @ square})[""]["lowest"] / 1e6
    cases = [(torch.randn(g, n, d), torch.randn(g, c, d), k, "cosine", "random") for g, n, d, c, k in SHAPES]
    if Path("runs/fsm/summary.json").exists():
        cases += trained("runs/fsm")
    result = {"threads": torch.get_num_threads(), "extension": extension.load()[1], "peak_gflops": peak}
    result["search"] = [bench_search(*case) for case in cases]
    result["sweep"] = bench_sweep()
    result["codebook"] = [bench_layer(128, 10_000, 1), bench_layer(32, 2048, 4)]
    result["training_step"] = bench_steps()
    print(json.dumps(result) if args.json else describe(result))


def describe(result):
    def line(name, m, more):
        return f"  {name:25}{m['ms']:9.2f} ms ({m['lowest']:.2f} to {m['highest']:.2f})  {more}"

    lines = [f"{result['threads']} threads, float32 peak {result['peak_gflops']:.0f} GFLOP/s"]
    for row in result["search"]:
        lines.append(f"\n{row['groups']} x ({row['N']}, {row['d']}) against {row['C']} codes ({row['codes']}), k = {row['k']}")
        for name, m in row["methods"].items():
            memory = "" if m["extra_mb"] is None else f", {m['extra_mb']:.0f} MB more"
            rate = f"{m['gflops']:.0f} GFLOP/s ({m['gflops'] / result['peak_gflops']:.0%} of peak)"
            lines.append(line(name, m, f"{m['times_as_fast']:.2f} x, {rate}{memory}"))
    lines.append("\nthe search, for larger N, C, d and k: beside the first row, and per N * C * d")
    for row in result["sweep"]:
        name = f"{row['N']} x {row['d']}, {row['C']}, k = {row['k']}"
        lines.append(line(name, row, f"{row['times_first']:.2f} x, per N * C * d {row['per_ncd']:.2f}"))
    for row in result["codebook"]:
        lines.append(f"\nCodebook layer, forward + backward, 64 x 128 x {row['groups']} x {row['d']}, {row['C']} codes")
        lines += [line(name, m, f"{row['methods']['matmul + topk']['ms'] / m['ms']:.2f} x") for name, m in row["methods"].items()]
    steps = [line(name, m, f"{m['times_dense']:.2f} of dense") for name, m in result["training_step"].items()]
    return "\n".join([*lines, "\ntraining step of the default preset", *steps])


if __name__ == "__main__":
    main()
