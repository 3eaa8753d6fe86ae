"""Every idea that we tried on TokFSM: flags, or a few lines that replace a method of Codebook."""

import torch
import torch.nn.functional as F


def cut_off(self, a, q):
    """pass_on without the straight-through estimator.

    What lies below a codebook learns from the commitment alone.
    """
    return q


def rotation(self, a, q):
    """pass_on by the rotation trick (Fifty et al. 2024).

    The gradient is that of the rotation and scaling that take a to q.
    """
    with torch.no_grad():
        a_unit = F.normalize(a, dim=-1)
        q_unit = F.normalize(q, dim=-1)
        between = F.normalize(a_unit + q_unit, dim=-1)
        scale = q.norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True).clamp_min(1e-6)

    def along(unit):
        return (unit * a).sum(-1, keepdim=True)

    out = scale * (a - 2 * between * along(between) + 2 * q_unit * along(a_unit))
    return q + (out - out.detach())


@torch.no_grad()
def start_at_random(self, inputs, generator=None):
    """start without k-means: codes are inputs, drawn at random."""
    order = torch.randperm(len(inputs), generator=generator, device=inputs.device)
    chosen = self.activations(inputs[order[: self.n_codes]])  # (C, G, d)
    self.codes.copy_(chosen.transpose(0, 1) / self.k)


IDEAS = {  # the flags of each
    "the default": "",
    "similarity cosine": "--similarity cosine",
    "no dense phase": "--dense-share 0",
    "the paper's method": "--preset paper --n-layer 2 --n-embd 64 --batch-size 16 --lr 4e-3",
    "random inputs, not k-means": "",
    "no straight-through": "",
    "rotation trick": "",
    "LayerNorm in front": "--layer-norm",
    "no commitment": "--commitment 0",
    "no revival": "--revive-every 0",
    "revival from the start": "--revive-after 0",
    "full rate with codebooks": "--codebook-lr 1",
    "half the learning rate": "--lr 2e-3",
    "twice the learning rate": "--lr 8e-3",
}
REPLACED = {  # the methods of Codebook that an idea replaces
    "random inputs, not k-means": {"start": start_at_random},
    "no straight-through": {"pass_on": cut_off},
    "rotation trick": {"pass_on": rotation},
}
