"""A codebook: hidden states in, the sum of k of its codes out.

a    activation, shape (d,)          s_i  similarity of a and code i
E    codes, shape (C, d)             S    k codes: the best for a, then for what is left, and so on
q    sum of E_i for i in S           out  q + (a - a.detach()): q forward, a's gradient backward
"""

import torch
import torch.nn.functional as F
from torch import nn

from minicode.runtime import processes
from minicode.runtime.arguments import SELECTIONS, check_one_of
from minicode.topk import rows_of, topk_codes


class Codebook(nn.Module):
    """Replaces activations (..., groups * dim) by sums of codes, of n_codes for each group.

    q = sum of E_i for the k chosen codes i (paper, section 2.1; its released code divides by k, we
    sum, as the paper does). With groups=H each head's slice has a codebook of its own; all of them
    are one (G, C, d) tensor, searched in one call. All is in float32 under autocast.

    similarity    "cosine" as in the paper, "distance" (nearest code) or "dot"
    selection     "pursuit": the code most similar to a, then the one most similar to what is left,
                  and so on; or, as in the paper, "nearest": the k most similar to a, which are
                  near-copies of each other, and their sum blurred. The same for k = 1
    layer_norm    activations are first brought to mean 0 and variance 1, as in the released code

    After a forward pass:
    ids           (..., G, k), in the order of choice: the strongest first
    autoencoding  in training, mean |q - stop_gradient(a)|² an element (section 2.2): moves codes
    commitment    in training, mean |a - stop_gradient(q)|² an element: moves activations
    The training loop adds these two to its loss. Codes learn by gradient: that of `autoencoding`,
    and that of the task's loss, through q.
    """

    def __init__(
        self,
        n_codes,
        dim,
        k=1,
        groups=1,
        similarity="cosine",
        layer_norm=False,
        selection="pursuit",
    ):
        super().__init__()
        if not 1 <= k <= n_codes:
            raise ValueError(f"k must be from 1 to the {n_codes} codes of the codebook, not {k}")
        check_one_of("selection", selection, SELECTIONS)
        self.n_codes = n_codes
        self.dim = dim
        self.k = k
        self.groups = groups
        self.similarity = similarity
        self.layer_norm = layer_norm
        self.selection = selection
        self.enabled = True
        self.control = None  # minicode.control puts itself here, to force and block codes
        self.ids = None
        self.autoencoding = None
        self.commitment = None
        self.inputs = None  # (N, G, d) of the last training batch: what revive() draws from
        self.codes = nn.Parameter(torch.randn(groups, n_codes, dim))
        # How often each code was chosen in training, by all processes, since the last revival.
        self.register_buffer("usage", torch.zeros(groups, n_codes))

    def forward(self, x):
        if not self.enabled:
            return x
        with torch.autocast(x.device.type, enabled=False):
            a = self.activations(x)  # (..., G, d)
            choose = self.control or self.search
            self.ids = choose(a.detach())  # (..., G, k)
            q = self.sum_codes(self.ids)  # (..., G, d)
            if self.training:
                self.autoencoding = F.mse_loss(q, a.detach())
                self.commitment = F.mse_loss(a, q.detach())
                self.inputs = a.detach().reshape(-1, self.groups, self.dim)
                self.usage += processes.add_up(self.count(self.ids))
            return self.pass_on(a, q).flatten(-2).to(x.dtype)

    def activations(self, x):
        """What is searched for: x (..., groups * dim) as (..., G, d)."""
        a = x.float().unflatten(-1, (self.groups, self.dim))
        return F.layer_norm(a, (self.dim,)) if self.layer_norm else a

    def search(self, a, blocked=None):
        """Ids (..., G, k) of the codes chosen for a (..., G, d), in the order of choice.

        blocked: bool (..., G, C), the codes that must not be chosen, if any.
        """
        return topk_codes(a, self.codes, self.k, self.similarity, self.selection, blocked)[1]

    def sum_codes(self, ids):
        """q (..., G, d) for ids (..., G, k)."""
        return self._sum(self.codes, ids)

    def _sum(self, table, ids):
        """Sums of rows of table (G, C, d), by ids (..., G, k): (..., G, d)."""
        rows = self._rows(ids).flatten(0, -2)
        q = F.embedding_bag(rows, table.view(-1, self.dim), mode="sum")
        return q.view(*ids.shape[:-1], self.dim)

    def pass_on(self, a, q):
        """The straight-through estimator: q going forward, a's gradient coming back."""
        return q + (a - a.detach())

    def _rows(self, ids):
        """Ids (..., G, k) as rows of the (G * C, d) table of all groups' codes."""
        first = self.n_codes * torch.arange(self.groups, device=ids.device)
        return ids + first.unsqueeze(-1)

    def count(self, ids):
        """How often ids (..., G, k) name each code: (G, C)."""
        rows = self._rows(ids).flatten()
        count = torch.zeros_like(self.usage)
        count.view(-1).index_add_(0, rows, torch.ones_like(rows, dtype=count.dtype))
        return count

    # -- before training, and in it

    @torch.no_grad()
    def revive(self, optimizer, generator=None):
        """Moves dead codes onto what is left over of inputs of the last training batch.

        Dead is a code chosen less than a twentieth as often as the mean code since the last call.
        What is left over for a last code, after the others (for k = 1, the input itself), is drawn
        as `start` draws its seeds, but by the fourth power of the error, not the second: so a dead
        code goes to something that has no code of its own yet, rather than to the fringe of
        something that has one. The optimizer's moments of a revived code are set to zero. Returns
        how many were dead.
        """
        dead = self.usage < 0.05 * self.usage.mean(-1, keepdim=True)  # (G, C)
        self.usage.zero_()
        if self.inputs is None or not dead.any():
            return 0
        a = processes.all_rows(self.inputs)  # (N, G, d)
        ids = self.search(a)
        error = (a - self.sum_codes(ids)).transpose(0, 1).square().sum(-1)  # (G, N)
        others = self.sum_codes(ids[..., :-1]) if self.k > 1 else 0
        left = (a - others).transpose(0, 1)  # (G, N, d)
        n_seeds = min(int(dead.sum(-1).max()), len(a))
        seeds = self._seeds(left, n_seeds, generator, error, power=2)
        rank = (dead.cumsum(-1) - 1).clamp(0, n_seeds - 1)  # the first dead code: the first seed
        self.codes.copy_(torch.where(dead.unsqueeze(-1), rows_of(seeds, rank), self.codes))
        for moment in optimizer.state[self.codes].values():
            if moment.shape == self.codes.shape:
                moment[dead] = 0
        processes.take_from_first(self)
        return int(dead.sum())

    @torch.no_grad()
    def start(self, inputs, rounds=10, generator=None):
        """Sets the codes by k-means on recorded inputs (N, groups * dim).

        For k > 1 they are a k-th of the clusters' means to begin with, and then fitted to the
        inputs: sums of means are blurred. ValueError where there are fewer inputs than codes.
        """
        if len(inputs) < self.n_codes:
            needed = f"{self.n_codes} codes need as many inputs to start from"
            raise ValueError(f"{needed}, not {len(inputs)}")
        inputs = self.activations(inputs)  # (N, G, d)
        a = inputs.transpose(0, 1).contiguous()  # (G, N, d)
        self.codes.copy_(self._seeds(a, self.n_codes, generator))
        for _ in range(rounds):
            ids, _ = self._nearest(a, self.codes)  # (G, N)
            ids = ids.T.unsqueeze(-1)  # (N, G, 1)
            count = self.count(ids).unsqueeze(-1)  # (G, C, 1)
            total = self._gather(ids, inputs)
            self.codes.copy_(torch.where(count > 0, total / count.clamp_min(1), self.codes))
        self.codes /= self.k
        for _ in range(rounds if self.k > 1 else 0):
            self._fit(inputs)
        self.usage.zero_()
        processes.take_from_first(self)

    def _fit(self, a):
        """Moves the codes towards those that rebuild a (N, G, d) best, chosen as they are now.

        Least squares: with S (N, C) how often each code is chosen, (SᵀS + 1) move = Sᵀ(a - SE), a
        group at a time; by five steps of conjugate gradients, for which SᵀS need not be stored.
        """
        ids = self.search(a)  # (N, G, k)
        lack = self._gather(ids, a - self.sum_codes(ids))  # (G, C, d)
        towards = lack
        for _ in range(5):
            pull = self._gather(ids, self._sum(towards, ids)) + towards
            error = lack.square().sum(1, keepdim=True)  # (G, 1, d): each dimension goes its own way
            length = error / (towards * pull).sum(1, keepdim=True).clamp_min(1e-30)
            self.codes += length * towards
            lack = lack - length * pull
            turn = lack.square().sum(1, keepdim=True) / error.clamp_min(1e-30)
            towards = lack + turn * towards

    def _gather(self, ids, values):
        """By code, the sum of values (N, G, d) where ids (N, G, k) name it: (G, C, d)."""
        total = torch.zeros_like(self.codes, dtype=values.dtype)
        for rows in self._rows(ids).flatten(0, 1).T:  # k of (N * G)
            total.view(-1, self.dim).index_add_(0, rows, values.flatten(0, 1))
        return total

    def _nearest(self, a, codes):
        """For each of a (G, N, d): the nearest code's id, its squared distance; both (G, N)."""
        ids = topk_codes(a.transpose(0, 1), codes, 1, "distance")[1].squeeze(-1).T
        return ids, (a - rows_of(codes, ids)).square().sum(-1)

    def _seeds(self, a, n, generator, nearest=None, power=1):
        """n of a (G, N, d), far from each other and from what is at distances `nearest` (G, N).

        In 16 lots, each drawn in proportion to the squared distance, to that power, from what was
        drawn before (k-means||, Bahmani et al. 2012): rare clusters get codes, and none gets many.
        """
        seeds = []
        for lot in torch.arange(n).tensor_split(min(16, n)):
            weights = torch.ones_like(a[..., 0]) if nearest is None else nearest**power + 1e-12
            drawn = rows_of(a, torch.multinomial(weights, len(lot), generator=generator))
            _, distance = self._nearest(a, drawn)
            nearest = distance if nearest is None else torch.minimum(nearest, distance)
            seeds.append(drawn)
        return torch.cat(seeds, dim=1)

    def get_extra_state(self):
        """So that a saved model knows whether its codebooks were on."""
        return torch.tensor(self.enabled)

    def set_extra_state(self, state):
        self.enabled = bool(state)


def perplexity(counts):
    """exp(entropy) of how often codes (..., C) were chosen: as many in even use, (...)."""
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share).sum(-1).exp()
