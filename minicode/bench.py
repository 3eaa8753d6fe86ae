"""python -m minicode.bench: the search, and the training step around it, timed side by side.

The methods of a table are run in turn, round after round; shown are the median, the lowest and the
highest time. The peak on a CPU is what its multiply-add instructions do, all threads, with their
numbers in registers, in float32 and in bytes; where there is no extension, and on a GPU, the
figure is what torch reaches on one large square matmul (without TF32), and is called that.
"""

import json
from functools import partial
from unittest import mock

import torch

from minicode import train_text
from minicode.fsm import FSM
from minicode.language.text import Text
from minicode.model import GPT
from minicode.runtime import extension, native
from minicode.runtime.options import Parser
from minicode.runtime.runs import TrainConfig
from minicode.runtime.session import make_optimizer, pick_device
from minicode.study.timing import bench_pursuit, bench_search, peak_of, timed
from minicode.train import train_step

SHAPES = [  # groups, N, d, C, k
    (1, 8192, 128, 10_000, 1),
    (1, 8192, 128, 10_000, 8),
    (4, 8192, 32, 2048, 1),
    (1, 4096, 768, 10_000, 100),
    (1, 1, 128, 10_000, 8),
    (4, 8192, 16, 16, 1),  # the heads and the MLP of a layer of train_fsm's default
    (1, 8192, 64, 960, 1),
]
PURSUITS = [(1, 8192, 64, 1024, 8), (4, 8192, 32, 512, 8)]
STEP_ROUNDS = 21
STEPS = {"codebooks": {}}  # of train_fsm: what is changed of its default
TEXT_STEPS = {  # of train_text, where k is 8
    "nearest": {"selection": "nearest"},
    "pursuit": {"selection": "pursuit"},
}


def main(argv=None):
    parser = Parser("bench", __doc__)
    where = "cpu, cuda, or auto: cuda where there is one (default: auto)"
    parser.add_argument("--device", default="auto", help=where)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    with parser.user_errors():
        device = pick_device(args.device)
    torch.manual_seed(0)
    result = bench(device)
    print(json.dumps(result) if args.json else describe(result))


def bench(device):
    on_gpu = device.type == "cuda"
    random = partial(random_search, device)
    searches = [bench_search(*random(*shape)) for shape in SHAPES]
    pursuits = [bench_pursuit(*random(*shape)) for shape in PURSUITS]
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads",
        "extension": extension.load(device.type)[1],
        "peak": peak_of(device),
        "search": searches,
        "pursuit": pursuits,
        "training_step": bench_steps(device, FSM(), {}, STEPS),
        "text_step": bench_steps(device, Text(), train_text.PRESETS["default"], TEXT_STEPS),
    }


def random_search(device, n_groups, n_rows, dim, n_codes, k):
    x = torch.randn(n_groups, n_rows, dim).to(device)
    codes = torch.randn(n_groups, n_codes, dim).to(device)
    return x, codes, k


def bench_steps(device, data, preset, cases):
    """Training steps with a preset, {name: time}; cases: {name: what is changed of it}.

    Each case by PyTorch and by the extension; and the dense model.
    """

    def make(changes):
        config = TrainConfig(**{**preset, **changes, "vocab_size": data.vocab_size})
        model = GPT(config).to(device)
        optimizer = make_optimizer(model, config)
        return partial(train_step, model, model, optimizer, config, config.steps - 1, data)

    steps = {"dense": make({"codebooks": "none"})}
    without_extension = mock.patch.object(native, "serves", lambda x, k: False)
    for name, changes in cases.items():
        steps[f"{name}, PyTorch"] = without_extension(make(changes))
        steps[f"{name}, extension"] = make(changes)
    times = timed(steps, STEP_ROUNDS)
    for time in times.values():
        time["times_dense"] = time["ms"] / times["dense"]["ms"]
    return times


def describe(result):
    """The result for people."""
    peak = result["peak"]
    lines = [f"{result['device']}; {peak['what']}: {peak['gflops']:.0f} GFLOP/s"]
    if "gops_in_bytes" in peak:
        lines[0] += f", in bytes {peak['gops_in_bytes']:.0f} GOP/s"
    tables = {title(row): row["methods"] for row in result["search"]}
    tables |= {f"{title(row)}, by pursuit": row["methods"] for row in result["pursuit"]}
    tables["training step of train_fsm's default"] = result["training_step"]
    tables["training step of train_text's default"] = result["text_step"]
    for heading, methods in tables.items():
        lines += ["", heading]
        for name, time in methods.items():
            span = f"({time['lowest']:.2f} to {time['highest']:.2f})"
            lines.append(f"  {name:25}{time['ms']:9.2f} ms {span}  {beside(time, peak)}")
    return "\n".join(lines)


def title(row):
    x = f"{row['groups']} x ({row['N']}, {row['d']})"
    return f"{x} against {row['C']} codes, k = {row['k']}"


def beside(time, peak):
    """What a time is compared with, for people."""
    for name in ("nearest", "dense"):
        if f"times_{name}" in time:
            return f"{time[f'times_{name}']:.2f} of {name}"
    share = time["gflops"] / peak["gflops"]
    return f"{time['times_as_fast']:.2f} x, {time['gflops']:.0f} GFLOP/s ({share:.0%} of it)"


if __name__ == "__main__":
    main()
