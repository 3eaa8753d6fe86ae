"""Solutions of nine exercises. Look here last; the tenth has none yet."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minicode import block, record
from minicode.notation import Code


def nearest(a, E):
    return (a @ E.T - E.square().sum(1) / 2).argmax(1)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, q):
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


def perplexity(ids, n_codes):
    p = torch.bincount(ids.flatten(), minlength=n_codes) / ids.numel()
    return torch.special.entr(p).sum().exp().item()


def loss_floor(n_states, n_edges, digits, n):
    return (math.log(n_states) + (n - 1) * math.log(n_edges)) / (n * digits)


def lloyd(a, E):
    ids = nearest(a, E)
    count = torch.bincount(ids, minlength=len(E)).unsqueeze(1)  # (C, 1)
    total = torch.zeros_like(E).index_add_(0, ids, a)
    return torch.where(count > 0, total / count.clamp_min(1), E)


def precision_recall(fsm, tokens, ids, code, state):
    fires = (ids == code).any(-1)  # (n, T)
    states = torch.from_numpy(fsm.decode(tokens[:, 1:]))
    there = torch.zeros_like(fires)
    there[:, fsm.digits :: fsm.digits] = states == state  # where a state has been read
    both = (fires & there).sum().item()
    precision = both / max(fires.sum().item(), 1)
    recall = both / max(there.sum().item(), 1)
    return precision, recall


def effect(model, tokens, code):
    where = Code.parse(code, model)
    with torch.no_grad():
        with record(model) as codes:
            log_p = model(tokens)[0].log_softmax(-1)  # (B, T, vocab_size)
        with block(model, code):
            log_without = model(tokens)[0].log_softmax(-1)
    fires = (codes[where.site][:, :, where.group or 0] == where.id).any(-1)  # (B, T)
    kl = (log_p.exp() * (log_p - log_without)).sum(-1)  # (B, T)
    return kl[fires].mean().item() if fires.any() else 0.0


def residual(a, E, k):
    left = a
    ids = []
    for _ in range(k):
        best = nearest(left, E)
        left = left - E[best]
        ids.append(best)
    return torch.stack(ids, dim=1)


class TopK(nn.Module):
    def __init__(self, n_codes, dim, k=1):
        super().__init__()
        self.k = k
        codes = F.normalize(torch.randn(n_codes, dim), dim=-1)
        self.codes = nn.Parameter(codes.unsqueeze(0))
        self.encoder = nn.Parameter(codes.clone())  # tied at the start: W = E, of length 1
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        scores, ids = ((x - self.bias) @ self.encoder.T).topk(self.k, dim=-1)  # (..., k)
        z = scores.relu().unsqueeze(-1)
        q = self.bias + (z * self.codes[0, ids]).sum(-2)  # (..., d)
        self.ids = ids.unsqueeze(-2)  # (..., 1, k)
        self.autoencoding = F.mse_loss(q, x.detach())
        return q
