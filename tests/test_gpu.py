"""A user's path on a GPU, at sizes that take no time. Without one, all of this is skipped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_model, make_tokens, read_metrics
from test_topk import same_but_for_rounding

from minicode import block, force, load_run, record, topk_codes
from minicode.interpret import main as interpret
from minicode.runtime import extension
from minicode.runtime.runs import TrainConfig
from minicode.runtime.session import make_optimizer
from minicode.sample import main as sample
from minicode.train import train_step
from minicode.train_fsm import main as train_fsm
from minicode.train_text import main as train_text

DEVICE = "cuda"
FLAGS = [*TINY[:-1], DEVICE]  # TINY ends in --device cpu
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def train(folder, *flags):
    assert train_fsm(["--out", str(folder), *FLAGS, *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def gpu_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("gpu") / "fsm")


def test_a_run_is_the_same_on_the_cpu(gpu_run):
    here = load_run(gpu_run)
    there = load_run(gpu_run, DEVICE)
    assert there.model.device.type == DEVICE and here.model.device.type == "cpu"
    tokens = make_tokens(here.fsm, n=64, length=12)
    with record(here.model) as codes, torch.no_grad():
        logits, _ = here.model(tokens)
    with record(there.model) as same, torch.no_grad():
        others, _ = there.model(tokens.to(DEVICE))
    assert same.keys() == codes.keys()
    for site, ids in codes.items():  # but for codes that are as near as rounding
        assert (same[site].cpu() == ids).float().mean() > 0.99, site
    assert ((others.cpu() - logits).abs() < 1e-3).float().mean() > 0.98


def test_forcing_and_generating_on_the_gpu(gpu_run):
    model = load_run(gpu_run, DEVICE).model
    fsm = load_run(gpu_run).fsm
    prompt = fsm.prompt("11").to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    prompts = prompt.repeat(3, 1)
    forced = force(model, ["mlp.1.3@-1", "head.0.1.2"])
    with forced, block(model, "mlp.0.1"), record(model) as codes:
        tokens = model.generate(prompts, 6, temperature=0)
        slowly = model.generate(prompts, 6, temperature=0, use_cache=False)
    assert torch.equal(tokens, slowly)
    assert (codes["mlp.1"][:, 2, 0] == 3).all()
    assert (codes["head.0"][:, :, 1] == 2).all()
    assert not (codes["mlp.0"] == 1).any()
    assert model.generate(prompt, 6, top_k=2, generator=generator).device.type == DEVICE


def test_a_killed_run_resumes_on_either_device(gpu_run, tmp_path):
    code = f"""
import os, signal
from minicode import train
real = train.train_step
def dies(model, forward, optimizer, config, step, data):
    if step == 45:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, forward, optimizer, config, step, data)
train.train_step = dies
from minicode.train_fsm import main
main(["--out", {str(tmp_path / "run")!r}, *{FLAGS!r}])
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    assert process.returncode == -signal.SIGKILL
    before = read_metrics(tmp_path / "run")
    for name, device in (("here", DEVICE), ("there", "cpu")):
        folder = shutil.copytree(tmp_path / "run", tmp_path / name)
        train(folder, "--resume", "--device", device)
        after = read_metrics(folder)
        assert [line["step"] for line in after] == [30, 60] and after[:1] == before
        assert after[1]["loss"] == pytest.approx(load_run(gpu_run).summary["loss"], abs=0.1)


@pytest.mark.parametrize(
    "flags",
    ["--dtype bfloat16", "--compile", "--dtype bfloat16 --compile", "--k 2"],
)
def test_ways_of_training(flags, gpu_run, tmp_path):
    lines = read_metrics(train(tmp_path / "run", *flags.split()))
    plain = read_metrics(gpu_run)
    assert lines[0]["loss"] == pytest.approx(plain[0]["loss"], abs=0.05)
    assert lines[1]["loss"] == pytest.approx(plain[1]["loss"], abs=0.2)


def test_a_training_step_does_not_wait_for_the_gpu(fsm):
    if not extension.load(DEVICE)[0]:
        pytest.skip(f"no extension here: {extension.load(DEVICE)[1]}")
    model = make_model("head,mlp", k=1).to(DEVICE).train()
    config = TrainConfig(**vars(model.config), batch_size=64)
    optimizer = make_optimizer(model, config)
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first ones set up
        try:
            loss = train_step(model, model, optimizer, config, step, fsm)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_commands_on_a_run_from_a_gpu(gpu_run, tmp_path, capsys):
    folder = shutil.copytree(gpu_run, tmp_path / "run")
    capsys.readouterr()
    sample(["--run", str(folder), "--force-code", "--json"])
    assert {"control_before", "control_after"} <= json.loads(capsys.readouterr().out).keys()
    interpret(["--run", str(folder), "--json"])
    assert {"detectors", "control"} <= json.loads(capsys.readouterr().out).keys()


def test_text(tmp_path, capsys):
    folder = str(tmp_path / "text")
    size = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 24 --n-codes-head 32 --k 2"
    steps = "--steps 20 --eval-every 20 --batch-size 8"
    flags = [*size.split(), *steps.split(), "--device", DEVICE]
    assert train_text(["--out", folder, *flags]) == 0
    capsys.readouterr()
    prompt = ["--prompt", "Once upon a time", "--max-new-tokens", "5"]
    sample(["--run", folder, *prompt, "--json"])
    assert len(json.loads(capsys.readouterr().out)["samples"]) == 5


WORKER = """
import sys
import torch.distributed as dist
from minicode import train_fsm
from minicode.runtime import processes
class Several(int):
    __gt__, __eq__ = (lambda *_: True), (lambda *_: False)
leave, ranks = processes.leave, processes.ranks
processes.leave = lambda: (print(dist.get_backend_config()), leave())
processes.ranks = lambda: Several(ranks())  # so that a group of one does all that a larger one does
sys.exit(train_fsm.main())
"""


@pytest.mark.parametrize("n", [1, 2])
def test_torchrun_with_nccl(n, gpu_run, tmp_path):
    if n > torch.cuda.device_count():
        pytest.skip(f"there are no {n} GPUs here")
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--local-addr=127.0.0.1", f"--nproc_per_node={n}", str(tmp_path / "worker.py")]
    command = [*start, "--out", str(tmp_path / "run"), *FLAGS]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("cuda:nccl") == n
    assert result.stdout.count("step    60 ") == 1
    loss = load_run(gpu_run).summary["loss"]
    assert load_run(tmp_path / "run").summary["loss"] == pytest.approx(loss, abs=0.1)


@pytest.mark.parametrize(
    "n_groups, n_rows, dim, n_codes, k",
    [(1, 65_536, 64, 10_000, 1), (4, 16_384, 32, 8192, 1), (1, 65_536, 100, 8192, 8)],
)
@pytest.mark.parametrize("backend", ["extension", "pytorch"])
def test_large_searches_are_right_and_never_store_the_scores(
    backend, n_groups, n_rows, dim, n_codes, k, monkeypatch
):
    if backend == "pytorch":
        monkeypatch.setattr(extension, "load", lambda device: (False, "PyTorch is tested"))
    elif not extension.load(DEVICE)[0]:
        pytest.skip(f"no extension here: {extension.load(DEVICE)[1]}")
    torch.manual_seed(0)
    x = torch.randn(n_rows, n_groups, dim).to(DEVICE)
    codes = torch.randn(n_groups, n_codes, dim).to(DEVICE)
    topk_codes(x[:600], codes, k)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores, ids = topk_codes(x, codes, k)
    assert torch.cuda.max_memory_allocated() - before < 4 * n_groups * n_rows * n_codes / 5
    x, scores, ids = (tensor[:: n_rows // 100].transpose(0, 1) for tensor in (x, scores, ids))
    same_but_for_rounding(x, codes, k, "cosine", scores, ids)
