"""That nothing mixes devices, and that a training step waits for no GPU, on a machine without one.

A tensor on the pretended GPU is one on the CPU with a label. To mix it with others is an error, as
on a real one.
"""

import numpy as np
import pytest
import torch
from conftest import TINY, make_model
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from minicode import block, force, load_run, record
from minicode import train as training
from minicode.runtime.runs import TrainConfig
from minicode.runtime.session import make_optimizer
from minicode.study import detectors as measures
from minicode.study import machine
from minicode.train import train_step
from minicode.train_fsm import main as train_fsm

GPU = torch.device("cuda", 0)
MOVES = ("to", "copy_", "__getitem__", "__setitem__", "__set__")  # take tensors of two devices
READS = ("item", "tolist", "nonzero", "cpu", "__bool__", "__int__", "__float__", "equal")
WAITS = (*READS, "multinomial")


class OnGPU(torch.Tensor):
    def __reduce_ex__(self, protocol):  # saved as a plain tensor
        with torch._C.DisableTorchFunction():
            return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.on_gpu = on_gpu(device)


def on_gpu(value):
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


class PretendedGPU(TorchFunctionMode):
    may_wait = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        leaves = tree_leaves((args, kwargs))
        tensors = [value for value in leaves if isinstance(value, torch.Tensor)]
        here = any(isinstance(tensor, OnGPU) for tensor in tensors)
        if func == torch.Tensor.device.__get__:
            return GPU if here else func(*args)
        if name == "_parse_to":  # asked by Module.to
            return func(*args, **kwargs)
        if name == "_has_compatible_shallow_copy_type":
            return False
        there = self.goes_to_gpu(name, leaves, here)
        self.check(name, tensors, here, there, kwargs)
        args, kwargs = tree_map(lambda value: "cpu" if on_gpu(value) else value, (args, kwargs))
        kind = OnGPU if there else torch.Tensor

        def label(value):
            if isinstance(value, torch.Tensor) and isinstance(value, OnGPU) != there:
                return value.as_subclass(kind)
            return value

        with torch._C.DisableTorchFunction():
            return tree_map(label, func(*args, **kwargs))

    def goes_to_gpu(self, name, leaves, here):
        """Whether what a function returns is on the GPU."""
        if name == "cpu":
            return False
        named = any(isinstance(value, torch.device) for value in leaves)
        if name == "to":
            named = named or any(isinstance(value, str) for value in leaves)
        if named or not here:
            return any(on_gpu(value) for value in leaves)
        return True

    def check(self, name, tensors, here, there, kwargs):
        """RuntimeError for what mixes devices, or waits when it may not."""
        on_cpu = [tensor for tensor in tensors if tensor.dim() and not isinstance(tensor, OnGPU)]
        mixed = on_cpu and name not in MOVES
        if here and (mixed or name in ("numpy", "__array__")):
            raise RuntimeError(f"{name}: tensors on the GPU and on the CPU")
        generator = kwargs.get("generator")
        if generator is not None and generator.on_gpu != there:
            raise RuntimeError(f"{name}: a generator of another device")
        moved = name == "to" and tensors and here != there and not kwargs.get("non_blocking")
        if not self.may_wait and (moved or (here and name in WAITS)):
            raise RuntimeError(f"{name} waits for the GPU")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with PretendedGPU() as mode:
        yield mode


def test_the_pretended_gpu_is_as_strict_as_one(gpu):
    x = torch.ones(3, device=GPU)
    assert (x + 1).device == GPU
    assert x.cpu().device.type == "cpu"
    assert (x * torch.tensor(2.0)).device == GPU
    generator = torch.Generator()
    mixed = (
        lambda: x + torch.ones(3),
        lambda: torch.cat((x, x.cpu())),
        x.numpy,
        lambda: torch.multinomial(x, 1, generator=generator),
    )
    for mistake in mixed:
        with pytest.raises(RuntimeError, match="GPU|device"):
            mistake()
    gpu.may_wait = False
    waiting = (
        lambda: bool(x[0]),
        lambda: torch.ones(3).to(GPU),
        lambda: x.to("cpu"),
        x.sum().item,
    )
    for mistake in waiting:
        with pytest.raises(RuntimeError, match="waits"):
            mistake()


@pytest.mark.parametrize(
    "flags",
    ["", "--n-layer 1 --k 2 --codebooks head,attn,mlp_mid,mlp,block"],
)
def test_a_run_mixes_no_devices(gpu, tmp_path, flags, monkeypatch):
    monkeypatch.setattr(training, "n_evaluated", lambda data, at_the_end: 32)
    short = "--device cuda --batch-size 256 --steps 12 --revive-after 0"
    command = ["--out", str(tmp_path), *TINY, *short.split(), *flags.split()]
    assert train_fsm(command) == 0
    (tmp_path / "summary.json").unlink()
    assert train_fsm([*command, "--resume"]) == 0
    assert load_run(tmp_path).model.device.type == "cpu"
    assert load_run(tmp_path, GPU).model.device == GPU


def test_a_training_step_waits_for_nothing(gpu, fsm, monkeypatch):
    # The real one sees through the label.
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: None)
    for k in (1, 2):
        model = make_model(k=k).to(GPU).train()
        config = TrainConfig(**vars(model.config))
        optimizer = make_optimizer(model, config)
        gpu.may_wait = False
        assert train_step(model, model, optimizer, config, 0, fsm).device == GPU
        gpu.may_wait = True


def test_interventions_and_measures_mix_no_devices(gpu, tiny_run, monkeypatch):
    monkeypatch.setattr(machine, "N_SEEDS", 2)
    monkeypatch.setattr(measures, "N_SEQUENCES", 64)
    run = load_run(tiny_run, GPU)
    generator = torch.Generator(GPU)
    prompt = run.fsm.prompt("11").to(GPU)
    forced = force(run.model, ["mlp.1.3@-1", "head.0.1.2"])
    with forced, block(run.model, "mlp.0.1"), record(run.model) as codes:
        tokens = run.model.generate(prompt, 6, top_k=3, generator=generator)
    assert tokens.device == GPU
    assert codes["mlp.0"].device == GPU
    tokens, kinds = measures.held_out(run)
    recording = measures.record_codes(run.model, tokens)
    measures.codes_against_neurons(run, recording, [kinds["state"]], n_positions=512)
    measures.forced_distributions(recording, np.flatnonzero(recording.count)[:3])
    assert len(measures.purity(run.model, run.fsm.prefixes()[0])) == 2
    assert "mean_difference" in machine.control_study(run, n_pairs=4)
