"""Sparse autoencoders: what reads the activations of a network that is left as it is.

a   activation, shape (d,)             s   scores, W (a - b): one for each of C features
D   features, of length 1, (C, d)      z   strengths: the scores of the chosen features, else 0
b   bias, shape (d,)                   q   b + z D

They differ in which features are chosen:

topk       the k of the highest scores, where these are positive (Gao et al. 2024)
abstopk    the k of the largest scores, whatever their sign (Zhu et al. 2025)
batchtopk  for n activations the n k highest scores, so that some get more features than others; and
           when used, those above the threshold that this came to (Bussmann et al. 2024)
"""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from minicode.topk import topk_codes

RATE = 3e-3  # of learning, at first
SPREAD = 4  # batchtopk gives no activation more than so many times k features
IDLE = 100  # training steps without being chosen after which a feature is dead
AUXILIARY = 1 / 32  # weight of the loss that dead features learn by (Gao et al. 2024, appendix A.2)


class SparseAutoencoder(nn.Module):
    """Activations (..., groups * dim) in, their reconstructions out; n_codes features a group.

    After a pass: ids and strengths (..., G, K), the strength 0 where none was chosen.
    """

    def __init__(self, rule, n_codes, dim, k, groups=1):
        super().__init__()
        self.rule = rule
        self.k = k
        self.groups = groups
        self.n_codes = n_codes
        features = F.normalize(torch.randn(groups, n_codes, dim), dim=-1)
        self.decoder = nn.Parameter(features)  # D, (G, C, d)
        self.encoder = nn.Parameter(features.clone())  # W
        self.bias = nn.Parameter(torch.zeros(groups, dim))
        self.register_buffer("threshold", torch.zeros(groups))
        self.register_buffer("idle", torch.zeros(groups, n_codes))

    def forward(self, x):
        a = x.unflatten(-1, self.bias.shape) - self.bias
        self.ids, scores = self.search(a)  # (..., G, K)
        self.strengths = self.choose(scores)
        return (self.bias + self.sum_features(self.ids, self.strengths)).flatten(-2)

    def search(self, a):
        """The features that may be chosen for a (..., G, d): ids and scores (..., G, K)."""
        table = self.encoder
        if self.rule == "abstopk":
            table = torch.cat((table, -table), dim=1)  # the negative ones: a feature's other end
        most = self.k * SPREAD if self.rule == "batchtopk" else self.k
        most = min(most, self.n_codes)
        ids = topk_codes(a, table, most, "dot")[1] % self.n_codes
        return ids, self.scores(a, ids)

    def scores(self, a, ids):
        return (F.embedding(self.rows(ids), self.encoder.flatten(0, 1)) @ a.unsqueeze(-1)).squeeze(
            -1
        )

    def choose(self, scores):
        """Strengths (..., G, K), from the scores of what may be chosen."""
        if self.rule == "abstopk":
            return scores
        least = 0
        if self.rule == "batchtopk":
            if self.training:
                every = scores.detach().flatten(0, -3).transpose(0, 1).flatten(1)  # (G, N * K)
                lowest = every.topk(every.shape[1] * self.k // scores.shape[-1]).values[:, -1]
                self.threshold.lerp_(lowest, 0.01)
            least = (lowest if self.training else self.threshold).unsqueeze(-1)
        return scores.where(scores >= least, 0).relu()

    def sum_features(self, ids, strengths):
        """z D (..., G, d)."""
        rows = self.rows(ids).flatten(0, -2)
        weights = strengths.flatten(0, -2)
        q = F.embedding_bag(
            rows, self.decoder.flatten(0, 1), mode="sum", per_sample_weights=weights
        )
        return q.view(*ids.shape[:-1], -1)

    def rows(self, ids):
        """Ids (..., G, K) as rows of the (G * C, d) table of all groups' features."""
        first = self.n_codes * torch.arange(self.groups)
        return ids + first.unsqueeze(-1)

    def loss(self, x):
        """The share of the variance that is lost; and what dead features could make up for."""
        left = (x - self(x)).unflatten(-1, self.bias.shape)
        spread = (x - x.flatten(0, -2).mean(0)).square().sum()
        loss = left.square().sum() / spread
        self.idle += 1
        self.idle.view(-1)[self.rows(self.ids)[self.strengths != 0]] = 0
        dead = (self.idle > IDLE).unsqueeze(-1)  # (G, C, 1)
        if dead.any():
            a = x.unflatten(-1, self.bias.shape) - self.bias
            ids = topk_codes(a, self.encoder * dead, min(a.shape[-1] // 2, self.n_codes), "dot")[1]
            strengths = self.scores(a, ids).relu() * dead.flatten()[self.rows(ids)]
            left = left.detach()
            rest = (left - self.sum_features(ids, strengths)).square().sum()
            loss = loss + AUXILIARY * rest / left.square().sum()
        return loss

    @torch.no_grad()
    def start(self, x):
        """Before training: the bias is the mean of x, the features the directions of some of it."""
        a = x.unflatten(-1, self.bias.shape).flatten(0, -3)  # (N, G, d)
        self.bias.copy_(a.mean(0))
        some = (a - self.bias)[torch.randint(len(a), (self.n_codes,))]
        self.decoder.copy_(F.normalize(some, dim=-1).transpose(0, 1))
        self.encoder.copy_(self.decoder)


def train(autoencoders, batches):
    """Trains them, {site: one}, on batches: functions, each of which gives {site: activations}."""
    parameters = [p for one in autoencoders.values() for p in one.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    for step, batch in enumerate(tqdm(batches, desc="autoencoders", leave=False, disable=None)):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / len(batches))
        loss = 0
        for site, activations in batch().items():
            if step == 0:
                autoencoders[site].start(activations)
            loss = loss + autoencoders[site].loss(activations)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for one in autoencoders.values():
            one.decoder.data = F.normalize(one.decoder.data, dim=-1)
