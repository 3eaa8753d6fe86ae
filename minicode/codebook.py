"""A codebook: hidden states in, the sum of their k most similar codes out.

    a    activation, shape (d,)          s_i  similarity of a and code i
    E    codes, shape (C, d)             S    the k codes with the highest s_i
    q    sum of E_i for i in S           out  q + (a - a.detach()): q forward, and a's gradient backward
"""

import torch
import torch.nn.functional as F
from torch import nn

from minicode.topk import topk_codes


class Codebook(nn.Module):
    """Replaces activations (..., groups * dim) by sums of codes; one codebook of n_codes codes for each group.

    q = sum of E_i for the k most similar codes i (paper, section 2.1; its released code divides by k, we
    sum, as the paper does). With groups=1 the codebook sees the whole activation; with groups=H each head's
    slice has a codebook of its own. All of them are one (G, C, d) tensor, searched in one call.

    similarity  "cosine" as in the paper, "distance" (nearest code) or "dot"
    decay       None: codes learn by gradient, from the language-model loss through q and from
                `autoencoding`. A number: each code is the moving average, with this decay a step, of the
                activations assigned to it; `update()` moves it, no gradient does.

    After a forward pass the module holds
    ids           (..., G, k), best first
    autoencoding  mean |q - stop_gradient(a)|² per element (section 2.2), in training mode: pulls codes to data
    commitment    mean |a - stop_gradient(q)|² per element, in training mode: pulls activations to their codes
    Nothing is added to a gradient behind your back: the training loop adds these terms to its loss.

    Search, sums and losses are in float32 under autocast.
    """

    def __init__(self, n_codes, dim, k=1, groups=1, similarity="cosine", decay=None):
        super().__init__()
        if not 1 <= k <= n_codes:
            raise ValueError(f"k must be from 1 to the {n_codes} codes of the codebook, not {k}")
        self.n_codes, self.dim, self.k, self.groups = n_codes, dim, k, groups
        self.similarity, self.decay = similarity, decay
        self.enabled = True
        self.control = None  # minicode.control puts itself here, to force and block codes
        self.ids = self.inputs = self.autoencoding = self.commitment = None
        self.codes = nn.Parameter(torch.randn(groups, n_codes, dim), requires_grad=decay is None)
        self.register_buffer("usage", torch.zeros(groups, n_codes))  # choices since the last revival
        # Since the last update(): how often each code was chosen, and the sum of what it was chosen for.
        self.register_buffer("new_count", torch.zeros(groups, n_codes), persistent=False)
        self.register_buffer("new_sum", torch.zeros(groups, n_codes, dim), persistent=False)
        if decay is not None:  # moving averages of the same two; codes = average_sum / average_count
            self.register_buffer("average_count", torch.ones(groups, n_codes))
            self.register_buffer("average_sum", self.codes.detach().clone())

    def forward(self, x):
        if not self.enabled:
            return x
        with torch.autocast(x.device.type, enabled=False):
            a = x.float().unflatten(-1, (self.groups, self.dim))  # (..., G, d)
            search = self.control or self.search
            self.ids = search(a.detach())  # (..., G, k)
            q = self.sum_codes(self.ids)  # (..., G, d)
            if self.training:
                self.autoencoding = F.mse_loss(q, a.detach())
                self.commitment = F.mse_loss(a, q.detach())
                self._count(a.detach(), q.detach())
            out = q + (a - a.detach())  # the straight-through estimator
            return out.flatten(-2).to(x.dtype)

    def search(self, a, extra=0):
        """Ids (..., G, k + extra) of the codes most similar to a (..., G, d), best first."""
        return topk_codes(a, self.codes.detach(), self.k + extra, self.similarity)[1]

    def sum_codes(self, ids):
        """q (..., G, d) for ids (..., G, k)."""
        rows = self._flat(ids).reshape(-1, ids.shape[-1])
        q = F.embedding_bag(rows, self.codes.view(-1, self.dim), mode="sum")
        return q.view(*ids.shape[:-1], self.dim)

    def _flat(self, ids):
        """Ids (..., G, k) as rows of the (G * C, d) table."""
        return ids + torch.arange(self.groups, device=ids.device).unsqueeze(-1) * self.n_codes

    @torch.no_grad()
    def _count(self, a, q):
        """Adds a batch to the sums that update() and revive() use."""
        self.inputs = a.reshape(-1, self.groups, self.dim)  # (N, G, d)
        rows = self._flat(self.ids).reshape(-1)
        self.new_count.view(-1).index_add_(0, rows, torch.ones_like(rows, dtype=torch.float32))
        if self.decay is not None:
            # A code's target is what the other k - 1 chosen codes leave over of a: E_i + (a - q).
            target = a.unsqueeze(-2)  # (..., G, 1, d)
            if self.k > 1:
                target = target - q.unsqueeze(-2) + self.codes.view(-1, self.dim)[self._flat(self.ids)]
            self.new_sum.view(-1, self.dim).index_add_(0, rows, target.reshape(-1, self.dim))

    @torch.no_grad()
    def update(self):
        """After each optimizer step: adds up the usage and moves the codes to their new averages."""
        self.usage += self.new_count
        if self.decay is not None:
            total = self.new_count.sum(-1, keepdim=True).clamp_min(1)  # (G, 1)
            self.average_count.lerp_(self.new_count / total, 1 - self.decay)
            self.average_sum.lerp_(self.new_sum / total.unsqueeze(-1), 1 - self.decay)
            self._set_to_mean(self.average_count, self.average_sum)
            self.new_sum.zero_()
        self.new_count.zero_()

    def _set_to_mean(self, count, total):
        """Codes become total / count; a code that (almost) nothing chose stays where it is."""
        count = count.unsqueeze(-1)
        self.codes.copy_(torch.where(count > 1e-9, total / count.clamp_min(1e-9), self.codes))

    @torch.no_grad()
    def revive(self, optimizer=None, threshold=0.05, generator=None):
        """Moves dead codes onto inputs of the last training batch that are far from every code.

        Dead is a code chosen less than `threshold` times as often as the mean code since the last call.
        Inputs are drawn in proportion to their squared distance to the nearest code, as k-means++ draws
        its seeds. A revived code's moments in the optimizer are set to zero, as is its history.
        Returns the number of codes revived.
        """
        dead = self.usage < threshold * self.usage.mean(-1, keepdim=True)  # (G, C)
        self.usage.zero_()
        if self.inputs is None or not dead.any():
            return 0
        a = self.inputs.transpose(0, 1)  # (G, N, d)
        picks = self._draw(self._nearest(a)[1], min(self.n_codes, a.shape[1]), generator)
        rank = (dead.cumsum(-1) - 1).clamp(0, picks.shape[1] - 1)  # the first dead code gets the first pick
        self.codes.copy_(torch.where(dead.unsqueeze(-1), _take(a, picks.gather(1, rank)), self.codes))
        if self.decay is not None:
            self.average_count[dead] = 1 / self.n_codes
            self.average_sum[dead] = self.codes[dead] / self.n_codes
        for moment in (optimizer.state.get(self.codes, {}) if optimizer else {}).values():
            if moment.shape == self.codes.shape:
                moment[dead] = 0
        return int(dead.sum())

    @torch.no_grad()
    def start(self, inputs, rounds=10, generator=None):
        """Sets the codes by k-means on recorded inputs (N, groups * dim).

        The seeds are drawn in 16 lots, each in proportion to the squared distance to the nearest seed so
        far (k-means||, Bahmani et al. 2012), so that rare clusters get codes too; then `rounds` of Lloyd.
        """
        a = inputs.float().view(-1, self.groups, self.dim).transpose(0, 1).contiguous()  # (G, N, d)
        if a.shape[1] < self.n_codes:
            raise ValueError(f"{self.n_codes} codes need as many inputs to start from, not {a.shape[1]}")
        done, nearest = 0, torch.ones(a.shape[:2], device=a.device)
        for lot in torch.arange(self.n_codes).tensor_split(min(16, self.n_codes)):
            seeds = _take(a, self._draw(nearest, len(lot), generator))
            distance = self._nearest(a, seeds)[1]
            nearest = torch.minimum(nearest, distance) if done else distance
            self.codes[:, done : done + len(lot)] = seeds
            done += len(lot)
        for _ in range(rounds):
            count, total = self._assign(a)
            self._set_to_mean(count, total)
        if self.decay is not None:
            count, _ = self._assign(a)
            self.average_count.copy_(count / a.shape[1])
            self.average_sum.copy_(self.codes * self.average_count.unsqueeze(-1))
        self.usage.zero_()

    def _assign(self, a):
        """How many of a (G, N, d) are nearest to each code, and their sum: (G, C), (G, C, d)."""
        ids, _ = self._nearest(a)
        count = torch.zeros_like(self.usage).scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))
        total = torch.zeros_like(self.codes).scatter_add_(1, ids.unsqueeze(-1).expand_as(a), a)
        return count, total

    def _nearest(self, a, codes=None):
        """For each of a (G, N, d): the id of the nearest code and the squared distance to it, (G, N)."""
        codes = self.codes.detach() if codes is None else codes
        ids = topk_codes(a.transpose(0, 1), codes, 1, "distance")[1].squeeze(-1).T
        return ids, (a - _take(codes, ids)).square().sum(-1)

    @staticmethod
    def _draw(weights, n, generator):
        """n different columns of (G, N), drawn in proportion to their weights."""
        return torch.multinomial(weights + 1e-12, n, generator=generator)

    def get_extra_state(self):
        """So that a saved model knows whether its codebooks were on."""
        return torch.tensor(self.enabled)

    def set_extra_state(self, state):
        self.enabled = bool(state)


def perplexity(counts):
    """exp(entropy) of how often the codes (..., C) were chosen: as many codes in even use, (...)."""
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share).sum(-1).exp()


def _take(table, ids):
    """Rows (G, n, d) of table (G, C, d), by ids (G, n)."""
    return table.gather(1, ids.unsqueeze(-1).expand(-1, -1, table.shape[-1]))
