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

from minicode.runtime.progress import bar
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
        self.n_codes = n_codes
        self.k = k
        self.groups = groups
        features = F.normalize(torch.randn(groups, n_codes, dim), dim=-1)
        self.decoder = nn.Parameter(features)  # D, (G, C, d)
        self.encoder = nn.Parameter(features.clone())  # W
        self.bias = nn.Parameter(torch.zeros(groups, dim))
        self.register_buffer("threshold", torch.zeros(groups))
        self.register_buffer("idle", torch.zeros(groups, n_codes))

    def forward(self, x):
        a = self.centred(x)
        self.ids = self.search(a)
        self.strengths = self.choose(self.scores(a, self.ids))
        q = self.bias + self.sum_features(self.ids, self.strengths)
        return q.flatten(-2)

    def centred(self, x):
        """x (..., groups * dim) less the bias: (..., G, d)."""
        return x.unflatten(-1, self.bias.shape) - self.bias

    def search(self, a):
        """Ids (..., G, K) of the features that may be chosen for a (..., G, d)."""
        table = self.encoder
        most = self.k
        if self.rule == "abstopk":
            table = torch.cat((table, -table), dim=1)  # with each feature's other end
        elif self.rule == "batchtopk":
            most = min(SPREAD * self.k, self.n_codes)
        _, ids = topk_codes(a, table, most, "dot")
        return ids % self.n_codes

    def scores(self, a, ids):
        """Of features ids (..., G, K) for a (..., G, d)."""
        rows = F.embedding(self.rows(ids), self.encoder.flatten(0, 1))
        return (rows @ a.unsqueeze(-1)).squeeze(-1)

    def choose(self, scores):
        """Strengths (..., G, K), from the scores of what may be chosen."""
        if self.rule == "abstopk":
            return scores
        if self.rule == "topk":
            return scores.relu()
        least = self.threshold
        if self.training:
            least = self.lowest_of_batch(scores.detach())
            self.threshold.lerp_(least, 0.01)
        return scores.where(scores >= least.unsqueeze(-1), 0).relu()

    def lowest_of_batch(self, scores):
        """The lowest score that is chosen of scores (..., G, K), by group: (G,)."""
        every = scores.flatten(0, -3).transpose(0, 1).flatten(1)  # (G, N * K)
        n_chosen = every.shape[1] * self.k // scores.shape[-1]
        return every.topk(n_chosen).values[:, -1]

    def sum_features(self, ids, strengths):
        """z D (..., G, d)."""
        rows = self.rows(ids).flatten(0, -2)
        weights = strengths.flatten(0, -2)
        table = self.decoder.flatten(0, 1)
        q = F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)
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
        fired = self.rows(self.ids)[self.strengths != 0]
        self.idle.view(-1)[fired] = 0
        dead = self.idle > IDLE  # (G, C)
        if dead.any():
            loss = loss + AUXILIARY * self.rest(x, left.detach(), dead)
        return loss

    def rest(self, x, left, dead):
        """The share of what is left (..., G, d) that dead features (G, C) don't explain either."""
        a = self.centred(x)
        most = min(a.shape[-1] // 2, self.n_codes)
        _, ids = topk_codes(a, self.encoder * dead.unsqueeze(-1), most, "dot")
        is_dead = dead.flatten()[self.rows(ids)]
        strengths = self.scores(a, ids).relu() * is_dead
        rest = left - self.sum_features(ids, strengths)
        return rest.square().sum() / left.square().sum()

    @torch.no_grad()
    def start(self, x):
        """Before training: the bias is the mean, features are halfway from some of x to random.

        Of activations alone, sums of two features stay what they are; of random ones more die.
        """
        self.bias.copy_(x.flatten(0, -2).mean(0).view_as(self.bias))
        a = self.centred(x).flatten(0, -3)  # (N, G, d)
        some = a[torch.randint(len(a), (self.n_codes,))]
        self.decoder += F.normalize(some, dim=-1).transpose(0, 1)
        self.decoder.copy_(F.normalize(self.decoder, dim=-1))
        self.encoder.copy_(self.decoder)


def train(autoencoders, batches):
    """Trains them, {site: one}, on batches: functions, each of which gives {site: activations}."""
    parameters = []
    for one in autoencoders.values():
        parameters += one.parameters()
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    (group,) = optimizer.param_groups
    for step, batch in enumerate(bar(batches, desc="autoencoders")):
        group["lr"] = RATE * (1 - step / len(batches))
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
