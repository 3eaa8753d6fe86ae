"""A codebook: hidden states in, the sum of their k most similar codes out.

a    activation, shape (d,)          s_i  similarity of a and code i
E    codes, shape (C, d)             S    the k codes with the highest s_i
q    sum of E_i for i in S           out  q + (a - a.detach()): q forward, and a's gradient backward
"""

import torch
import torch.nn.functional as F
from torch import nn

from minicode.runtime import processes
from minicode.topk import topk_codes


class Codebook(nn.Module):
    """Replaces activations (..., groups * dim) by sums of codes; one codebook of n_codes codes for each group.

    q = sum of E_i for the k most similar codes i (paper, section 2.1; its released code divides by k, we sum, as
    the paper does). With groups=H each head's slice has a codebook of its own; all of them are one (G, C, d)
    tensor, searched in one call. Search, sums and losses are in float32 under autocast.

    similarity    "cosine" as in the paper, "distance" (nearest code) or "dot"
    decay         None: codes learn by gradient, of the language-model loss through q and of `autoencoding`; a
                  number: `update()` makes them moving averages, with this decay, of what is assigned to them
    layer_norm    activations are first brought to mean 0 and variance 1, as in the paper's released code
    After a forward pass:
    ids           (..., G, k), best first
    autoencoding  in training, mean |q - stop_gradient(a)|² per element (section 2.2): pulls codes to activations
    commitment    in training, mean |a - stop_gradient(q)|² per element: pulls activations to their codes
    The training loop adds these two to its loss; nothing is added to a gradient behind its back.
    """

    def __init__(
        self, n_codes, dim, k=1, groups=1, similarity="cosine", decay=None, layer_norm=False
    ):
        super().__init__()
        if not 1 <= k <= n_codes:
            raise ValueError(f"k must be from 1 to the {n_codes} codes of the codebook, not {k}")
        self.n_codes, self.dim, self.k, self.groups = n_codes, dim, k, groups
        self.similarity, self.decay, self.layer_norm = similarity, decay, layer_norm
        self.enabled = True
        self.control = None  # minicode.control puts itself here, to force and block codes
        self.ids = self.autoencoding = self.commitment = None
        self.inputs = ()  # of the last batch, in parts (N, G, d): what revive() draws from
        self.codes = nn.Parameter(torch.randn(groups, n_codes, dim), requires_grad=decay is None)
        self.register_buffer(
            "usage", torch.zeros(groups, n_codes)
        )  # choices since the last revival
        # Since the last update(): how often each code was chosen, and the sum of what it was chosen for.
        self.register_buffer("new_count", torch.zeros(groups, n_codes), persistent=False)
        self.register_buffer("new_sum", torch.zeros(groups, n_codes, dim), persistent=False)
        if decay is not None:  # moving average of each code's share of the choices
            self.register_buffer("share", torch.full((groups, n_codes), 1 / n_codes))

    def forward(self, x):
        if not self.enabled:
            return x
        with torch.autocast(x.device.type, enabled=False):
            a = self.activations(x)  # (..., G, d)
            search = self.control or self.search
            self.ids = search(a.detach())  # (..., G, k)
            q, rows = self.sum_codes(self.ids)  # (..., G, d)
            if self.training:
                self.autoencoding = F.mse_loss(q, a.detach())
                self.commitment = F.mse_loss(a, q.detach())
                self._count(rows, a.detach(), q.detach())
            return self.pass_on(a, q).flatten(-2).to(x.dtype)

    def activations(self, x):
        """What is searched for: x (..., groups * dim) as (..., G, d)."""
        a = x.float().unflatten(-1, (self.groups, self.dim))
        return F.layer_norm(a, (self.dim,)) if self.layer_norm else a

    def pass_on(self, a, q):
        """The straight-through estimator: q going forward, a's gradient coming back."""
        return q + (a - a.detach())

    def search(self, a, extra=0):
        """Ids (..., G, k + extra) of the codes most similar to a (..., G, d), best first."""
        return topk_codes(a, self.codes.detach(), self.k + extra, self.similarity)[1]

    def sum_codes(self, ids):
        """q (..., G, d) for ids (..., G, k), and the ids as rows of the (G * C, d) table."""
        rows = ids + self.n_codes * torch.arange(self.groups, device=ids.device).unsqueeze(-1)
        q = F.embedding_bag(rows.flatten(0, -2), self.codes.view(-1, self.dim), mode="sum")
        return q.view(*ids.shape[:-1], self.dim), rows

    @torch.no_grad()
    def _count(self, rows, a, q):
        """Adds a batch, or a part of one, to the sums that update() uses."""
        self.inputs = (a.reshape(-1, self.groups, self.dim),)
        self.new_count.view(-1).index_add_(
            0, rows.flatten(), torch.ones(rows.numel(), device=rows.device)
        )
        if self.decay is not None:
            # A code's target is what the other k - 1 chosen codes leave over of a: E_i + (a - q).
            target = a.unsqueeze(-2)  # (..., G, 1, d)
            if self.k > 1:
                target = target - q.unsqueeze(-2) + self.codes.view(-1, self.dim)[rows]
            self.new_sum.view(-1, self.dim).index_add_(
                0, rows.flatten(), target.reshape(-1, self.dim).to(self.new_sum.dtype)
            )

    @torch.no_grad()
    def update(self):
        """After each optimizer step: adds up the usage and moves the codes to their new averages."""
        processes.add_up(self.new_count)
        self.usage += self.new_count
        if self.decay is not None:
            processes.add_up(self.new_sum)
            total = self.new_count.sum(-1, keepdim=True).clamp_min(1)  # (G, 1)
            self.share.lerp_(self.new_count / total, 1 - self.decay)
            # As sum / count of two moving averages, but with one of them: a code that nothing chose stays.
            gap = self.new_sum - self.new_count.unsqueeze(-1) * self.codes
            weight = (1 - self.decay) / (total * self.share.clamp_min(1e-9))
            self.codes += weight.unsqueeze(-1) * gap
            self.new_sum.zero_()
        self.new_count.zero_()

    @torch.no_grad()
    def revive(self, optimizer=None, threshold=0.05, generator=None):
        """Moves dead codes onto inputs of the last training batch that are far from every code.

        Dead is a code chosen less than `threshold` times as often as the mean code since the last call. Inputs are
        drawn as `start` draws its seeds, but by the fourth power of the distance: from things that share a code, not
        from the scatter of one. The optimizer's moments of a revived code are set to zero. Returns how many were dead.
        """
        dead = self.usage < threshold * self.usage.mean(-1, keepdim=True)  # (G, C)
        self.usage.zero_()
        if not self.inputs or not dead.any():
            return 0
        a = processes.all_rows(torch.cat(self.inputs)).transpose(0, 1)  # (G, N, d)
        n_seeds = min(int(dead.sum(-1).max()), a.shape[1])
        seeds = self._seeds(a, n_seeds, self._nearest(a)[1], generator, power=2) / self.k
        rank = (dead.cumsum(-1) - 1).clamp(
            0, seeds.shape[1] - 1
        )  # the first dead code gets the first seed
        self.codes.copy_(torch.where(dead.unsqueeze(-1), _take(seeds, rank), self.codes))
        if self.decay is not None:
            self.share[dead] = 1 / self.n_codes
        for moment in (optimizer.state.get(self.codes, {}) if optimizer else {}).values():
            if moment.shape == self.codes.shape:
                moment[dead] = 0
        processes.take_from_first(self)
        return int(dead.sum())

    @torch.no_grad()
    def start(self, inputs, rounds=10, generator=None):
        """Sets the codes by k-means on recorded inputs (N, groups * dim).

        For k > 1 they are a k-th of the clusters' means, and then refined, since sums of means are blurred.
        """
        a = self.activations(inputs).transpose(0, 1).contiguous()  # (G, N, d)
        if a.shape[1] < self.n_codes:
            raise ValueError(
                f"{self.n_codes} codes need as many inputs to start from, not {a.shape[1]}"
            )
        self.codes.copy_(self._seeds(a, self.n_codes, None, generator))
        for _ in range(rounds):
            count, total = self._assign(a)
            self.codes.copy_(torch.where(count > 0, total / count.clamp_min(1), self.codes))
        if self.decay is not None:
            self.share.copy_(self._assign(a)[0].squeeze(-1) / a.shape[1])
        self.codes /= self.k
        for _ in range(2 * rounds if self.k > 1 else 0):
            self._refine(a.transpose(0, 1))
        self.usage.zero_()
        processes.take_from_first(self)

    def _refine(self, a):
        """Moves each code by a k-th of what the sums that it is part of lack on average of a (N, G, d).

        All k codes of a sum move, so a k-th is as far as they can go without making the sums worse.
        """
        ids = self.search(a)  # (N, G, k)
        q, rows = self.sum_codes(ids)
        lack = (a - q).flatten(0, 1)  # (N * G, d)
        count, total = (
            torch.zeros_like(self.usage).view(-1),
            torch.zeros_like(self.codes).view(-1, self.dim),
        )
        for choice in rows.flatten(0, 1).T:  # k of (N * G)
            count.index_add_(0, choice, torch.ones_like(choice, dtype=count.dtype))
            total.index_add_(0, choice, lack)
        self.codes += (total / count.clamp_min(1).unsqueeze(-1) / self.k).view_as(self.codes)

    def _assign(self, a):
        """How many of a (G, N, d) are nearest to each code, and their sum: (G, C, 1), (G, C, d)."""
        ids, _ = self._nearest(a)
        count = torch.zeros_like(self.usage).scatter_add_(
            1, ids, torch.ones_like(ids, dtype=torch.float32)
        )
        total = torch.zeros_like(self.codes).scatter_add_(1, ids.unsqueeze(-1).expand_as(a), a)
        return count.unsqueeze(-1), total

    def _nearest(self, a, codes=None):
        """For each of a (G, N, d): the id of the nearest code and the squared distance to it, (G, N)."""
        codes = self.codes.detach() if codes is None else codes
        ids = topk_codes(a.transpose(0, 1), codes, 1, "distance")[1].squeeze(-1).T
        return ids, (a - _take(codes, ids)).square().sum(-1)

    def _seeds(self, a, n, nearest, generator, power=1):
        """n of a (G, N, d) that are far from each other, and from codes at the squared distance `nearest` (G, N).

        In 16 lots, each drawn in proportion to (the power of) the squared distance to what is there already
        (k-means||, Bahmani et al. 2012), so that rare clusters get codes too, and no cluster gets many.
        """
        seeds = []
        for lot in torch.arange(n).tensor_split(min(16, n)):
            weights = (
                torch.ones(a.shape[:2], device=a.device)
                if nearest is None
                else nearest**power + 1e-12
            )
            seeds.append(_take(a, torch.multinomial(weights, len(lot), generator=generator)))
            distance = self._nearest(a, seeds[-1])[1]
            nearest = distance if nearest is None else torch.minimum(nearest, distance)
        return torch.cat(seeds, dim=1)

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
