"""python -m minicode.bench: the search, and the training step around it, timed side by side in one run.

The methods of a table are run in turn, round after round; shown are the median, the lowest and the highest time. The
peak is this machine's own: what torch reaches on one large square matmul, on a GPU without TF32.
"""

import json
from functools import partial
from pathlib import Path

import torch

from minicode.runtime import extension
from minicode.runtime.options import Parser
from minicode.runtime.session import pick_device
from minicode.study.timing import (
    bench_layer,
    bench_search,
    bench_steps,
    bench_sweep,
    timed,
    trained,
)

SHAPES = [  # groups, N, d, C, k
    (1, 8192, 128, 10_000, 1), (1, 8192, 128, 10_000, 8), (4, 8192, 32, 2048, 1), (1, 4096, 768, 10_000, 100),
    (1, 1, 128, 10_000, 8),
]  # fmt: skip
ON_GPU = [(1, 65_536, 128, 10_000, 1)]  # what fills one


def main(argv=None):
    parser = Parser("bench", __doc__)
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, or auto: cuda where there is one (default: auto)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    with parser.user_errors():
        device = pick_device(args.device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    on_gpu = device.type == "cuda"
    square = torch.randn(2 * (8192 if on_gpu else 3072,)).to(device)
    squares = {
        "peak_gflops": square,
        **({"peak_bfloat16_gflops": square.bfloat16()} if on_gpu else {}),
    }
    times = timed({name: partial(torch.matmul, a, a) for name, a in squares.items()})
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads",
        "extension": extension.load()[1],
    }
    result |= {name: 2 * len(square) ** 3 / t["lowest"] / 1e6 for name, t in times.items()}
    shapes = ON_GPU * on_gpu + SHAPES
    cases = [
        (torch.randn(g, n, d).to(device), torch.randn(g, c, d).to(device), k, "cosine", "random")
        for g, n, d, c, k in shapes
    ]
    if Path("runs/fsm/summary.json").exists():
        cases += trained("runs/fsm", device)
    result["search"] = [bench_search(*case) for case in cases]
    result["sweep"] = bench_sweep(device)
    result["codebook"] = [bench_layer(device, 128, 10_000, 1), bench_layer(device, 32, 2048, 4)]
    result["training_step"] = bench_steps(device)
    print(json.dumps(result) if args.json else describe(result))


def describe(result):
    def line(name, m, more):
        return f"  {name:25}{m['ms']:9.2f} ms ({m['lowest']:.2f} to {m['highest']:.2f})  {more}"

    half = (
        f", bfloat16 {result['peak_bfloat16_gflops']:.0f}"
        if "peak_bfloat16_gflops" in result
        else ""
    )
    lines = [f"{result['device']}, peak in GFLOP/s: float32 {result['peak_gflops']:.0f}{half}"]
    for row in result["search"]:
        lines.append(
            f"\n{row['groups']} x ({row['N']}, {row['d']}) against {row['C']} codes ({row['codes']}), k = {row['k']}"
        )
        for name, m in row["methods"].items():
            memory = "" if m["extra_mb"] is None else f", {m['extra_mb']:.0f} MB more"
            rate = f"{m['gflops']:.0f} GFLOP/s ({m['gflops'] / result['peak_gflops']:.0%} of peak)"
            lines.append(line(name, m, f"{m['times_as_fast']:.2f} x, {rate}{memory}"))
    lines.append("\nthe search, for larger N, C, d and k: beside the first row, and per N * C * d")
    for row in result["sweep"]:
        name = f"{row['N']} x {row['d']}, {row['C']}, k = {row['k']}"
        lines.append(
            line(name, row, f"{row['times_first']:.2f} x, per N * C * d {row['per_ncd']:.2f}")
        )
    for row in result["codebook"]:
        lines.append(
            f"\nCodebook layer, forward + backward, 64 x 128 x {row['groups']} x {row['d']}, {row['C']} codes"
        )
        lines += [
            line(name, m, f"{row['methods']['matmul + topk']['ms'] / m['ms']:.2f} x")
            for name, m in row["methods"].items()
        ]
    steps = [
        line(name, m, f"{m['times_dense']:.2f} of dense")
        for name, m in result["training_step"].items()
    ]
    return "\n".join([*lines, "\ntraining step of the default preset", *steps])


if __name__ == "__main__":
    main()
