"""That nothing mixes devices, and that a training step waits for no GPU, on a machine without one.

A tensor on the pretended GPU is one on the CPU with a label. To mix it with others is an error, as on a real one.
"""

import numpy as np
import pytest
import torch
from conftest import TINY, make_model
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from minicode import block, force, load_run, record
from minicode.language import topics
from minicode.runtime.runs import TrainConfig
from minicode.study import detectors as measures
from minicode.study import machine
from minicode.train import make_optimizer, train_step
from minicode.train_fsm import main as train_fsm

GPU = torch.device("cuda", 0)
MOVES = ("to", "copy_", "__getitem__", "__setitem__", "__set__")  # take tensors of two devices
WAITS = (
    "item",
    "tolist",
    "nonzero",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "multinomial",
    "equal",
)


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
        name, leaves, kwargs = (
            getattr(func, "__name__", ""),
            tree_leaves((args, kwargs)),
            kwargs or {},
        )
        tensors = [value for value in leaves if isinstance(value, torch.Tensor)]
        here = any(isinstance(tensor, OnGPU) for tensor in tensors)
        if func == torch.Tensor.device.__get__:
            return GPU if here else func(*args)
        if name in ("_parse_to", "_has_compatible_shallow_copy_type"):  # asked by Module.to
            return name == "_parse_to" and func(*args, **kwargs)
        named = [
            value
            for value in leaves
            if isinstance(value, torch.device) or isinstance(value, str) and name == "to"
        ]
        there = any(map(on_gpu, leaves)) if named or not here else name != "cpu"
        plain = [tensor for tensor in tensors if tensor.dim() and not isinstance(tensor, OnGPU)]
        if here and (plain and name not in MOVES or name in ("numpy", "__array__")):
            raise RuntimeError(f"{name}: tensors on the GPU and on the CPU")
        if kwargs.get("generator") is not None and kwargs["generator"].on_gpu != there:
            raise RuntimeError(f"{name}: a generator of another device")
        moved = name == "to" and tensors and here != there and not kwargs.get("non_blocking")
        if not self.may_wait and (here and name in WAITS or moved):
            raise RuntimeError(f"{name} waits for the GPU")
        args, kwargs = tree_map(lambda value: "cpu" if on_gpu(value) else value, (args, kwargs))
        kind = OnGPU if there else torch.Tensor
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
            return tree_map(
                lambda t: (
                    t.as_subclass(kind)
                    if isinstance(t, torch.Tensor) and isinstance(t, OnGPU) != there
                    else t
                ),
                out,
            )


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with PretendedGPU() as mode:
        yield mode


def test_the_pretended_gpu_is_as_strict_as_one(gpu):
    x = torch.ones(3, device=GPU)
    assert (
        (x + 1).device == GPU
        and x.cpu().device.type == "cpu"
        and (x * torch.tensor(2.0)).device == GPU
    )
    generator = torch.Generator()
    for mistake in (
        lambda: x + torch.ones(3),
        lambda: torch.cat((x, x.cpu())),
        x.numpy,
        lambda: torch.multinomial(x, 1, generator=generator),
    ):
        with pytest.raises(RuntimeError, match="GPU|device"):
            mistake()
    gpu.may_wait = False
    for mistake in (
        lambda: bool(x[0]),
        lambda: torch.ones(3).to(GPU),
        lambda: x.to("cpu"),
        x.sum().item,
    ):
        with pytest.raises(RuntimeError, match="waits"):
            mistake()


@pytest.mark.parametrize(
    "flags",
    ["", "--n-layer 1 --k 2 --decay 0.9 --accumulate 2 --codebooks head,attn,mlp_mid,mlp,block"],
)
def test_a_run_mixes_no_devices(gpu, tmp_path, flags):
    flags = [
        *TINY,
        "--device",
        "cuda",
        "--batch-size",
        "256",
        "--steps",
        "12",
        "--revive-after",
        "0",
        *flags.split(),
    ]
    assert train_fsm(["--out", str(tmp_path), *flags]) == 0
    (tmp_path / "summary.json").unlink()
    assert train_fsm(["--out", str(tmp_path), *flags, "--resume"]) == 0
    assert (
        load_run(tmp_path).model.device.type == "cpu"
        and load_run(tmp_path, GPU).model.device == GPU
    )


def test_a_training_step_waits_for_nothing(gpu, fsm, monkeypatch):
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *args: None
    )  # it sees through the label
    for more in (dict(), dict(k=2, decay=0.9)):
        model = make_model(**more).to(GPU).train()
        config = TrainConfig(**vars(model.config), accumulate=2)
        optimizer = make_optimizer(model, config)
        gpu.may_wait = False
        assert train_step(model, model, optimizer, config, 0, fsm).device == GPU
        gpu.may_wait = True


def test_interventions_and_measures_mix_no_devices(gpu, tiny_run, monkeypatch):
    monkeypatch.setattr(machine, "N_SEEDS", 2)
    monkeypatch.setattr(topics, "N_SEQUENCES", 64)
    run = load_run(tiny_run, GPU)
    generator, prompt = torch.Generator(GPU), run.fsm.prompt("11").to(GPU)
    with (
        force(run.model, ["mlp.1.3@-1", "head.0.1.2"]),
        block(run.model, "mlp.0.1"),
        record(run.model) as codes,
    ):
        assert (
            run.model.generate(prompt, 6, top_k=3, generator=generator).device
            == codes["mlp.0"].device
            == GPU
        )
    tokens, kinds = topics.held_out(run)
    recording = measures.record_codes(run.model, tokens)
    measures.codes_against_neurons(run, recording, [kinds["state"]], n_positions=512)
    measures.forced_distributions(recording, np.flatnonzero(recording.count)[:3])
    assert len(measures.purity(run.model, run.fsm.prefixes()[0])) == 2
    assert "mean_difference" in machine.control_study(run, n_pairs=4)
