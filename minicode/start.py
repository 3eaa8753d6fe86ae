"""Where codes come from: `start` by k-means and least squares; `revive` for those that died.

A part of `Codebook`, whose other part, what a codebook does in the network, is codebook.py.
"""

import torch
import torch.nn.functional as F

from minicode.runtime import processes
from minicode.topk import rows_of, topk_codes


class CodesFromData:
    """What a Codebook does before training, and now and then in it."""

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

        n_seeds = min(int(dead.sum(-1).max()), len(a))
        seeds = self._seeds(a - others, n_seeds, generator, error, power=2)
        rank = (dead.cumsum(-1) - 1).clamp(0, n_seeds - 1)  # the first dead code: the first seed
        self.codes.copy_(torch.where(dead.unsqueeze(-1), rows_of(seeds, rank), self.codes))
        for moment in optimizer.state.get(self.codes, {}).values():
            if moment.shape == self.codes.shape:
                moment[dead] = 0
        processes.take_from_first(self)
        return int(dead.sum())

    @torch.no_grad()
    def start(self, inputs, rounds=10, generator=None):
        """Sets the codes by k-means on recorded inputs (..., groups * dim).

        For k > 1 they are a k-th of the clusters' means to begin with, and then fitted to the
        inputs: sums of means are blurred. ValueError where there are fewer inputs than codes, or an
        input is no number.
        """
        inputs = self.activations(inputs).reshape(-1, self.groups, self.dim)  # (N, G, d)
        if len(inputs) < self.n_codes:
            needed = f"{self.n_codes} codes need as many inputs to start from"
            raise ValueError(f"{needed}, not {len(inputs)}")
        self.codes.copy_(self._seeds(inputs, self.n_codes, generator))
        for _ in range(rounds):
            self._move_to_means(inputs)
        self.codes /= self.k
        for _ in range(rounds if self.k > 1 else 0):
            found = [self.search(part) for part in self._parts(inputs)]
            self._fit(inputs, torch.cat(found))
        self.usage.zero_()
        processes.take_from_first(self)

    @torch.no_grad()
    def merge(self, near=0.25):
        """At the end of training, for k = 1: near-copies of a code become copies of it.

        Two codes that share what they stand for both have half of its recall. A code becomes a copy
        of the one nearest to it, if that was chosen more often, and so on from that one, if all is
        nearer than a quarter of what such distances are (the median of those above 0). Of copies
        the search takes one: the lowest id.
        """
        if self.k > 1:
            return
        for codes, usage in zip(self.codes, self.usage):
            used = usage.nonzero().flatten()
            if len(used) < 2:
                continue
            own = codes[used]
            own = own - own.mean(0)
            here = torch.arange(len(used), device=used.device)
            _, ids = topk_codes(own, own, 2, "distance")  # itself, and the nearest
            nearest = torch.where(ids[:, 0] == here, ids[:, 1], ids[:, 0])
            distance = (own - own[nearest]).norm(dim=-1)
            apart = distance[distance > 0]
            limit = near * apart.median()  # NaN if there are none
            close = distance < limit
            rank = usage[used].argsort(descending=True, stable=True).argsort()
            target = torch.where(close & (rank[nearest] < rank), nearest, here)
            while (target != target[target]).any():
                target = target[target]
            far = (own - own[target]).norm(dim=-1) >= limit
            target = torch.where(far, here, target)
            codes[used] = codes[used[target]]
        processes.take_from_first(self)

    @torch.no_grad()
    def refit(self, hold):
        """Moves the codes by least squares on the last training batch, after the optimizer's step.

        In the place of the gradient of `autoencoding` and of the task's loss, for activations that
        move faster than codes follow by gradient (of a pretrained model): online dictionary
        learning (Mairal et al. 2009). Each code is held where it was as by so many activations.
        """
        ids = self.ids.flatten(0, -3)  # (N, G, k)
        ids = ids[ids[:, 0, 0] >= 0]  # less those of inputs that passed through
        self._fit(processes.all_rows(self.inputs), processes.all_rows(ids), hold)
        processes.take_from_first(self)

    def _move_to_means(self, a):
        """A round of k-means on a (N, G, d): each code moves to the mean of what it is nearest to.

        A code that is nearest to nothing stays where it is.
        """
        ids = self._nearest(a, self.codes)
        total = self._adder(ids)(a)
        count = self.count(ids).unsqueeze(-1)  # (G, C, 1)
        means = total / count.clamp_min(1)
        self.codes.copy_(torch.where(count > 0, means, self.codes))

    def _fit(self, a, ids, hold=1):
        """Moves the codes towards those that rebuild a (N, G, d) best, by these ids (N, G, k).

        Least squares: with S (N, C) how often each code is chosen, (SᵀS + hold) move = Sᵀ(a - SE),
        a group at a time; by five steps of conjugate gradients, for which SᵀS need not be stored.
        """
        add_up = self._adder(ids)
        lack = add_up(a - self.sum_codes(ids))  # (G, C, d)
        towards = lack
        for _ in range(5):
            pull = add_up(self.sum_codes(ids, towards)) + hold * towards
            error = lack.square().sum(1, keepdim=True)  # (G, 1, d): each dimension goes its own way
            length = error / (towards * pull).sum(1, keepdim=True).clamp_min(1e-30)
            self.codes += length * towards
            lack = lack - length * pull
            turn = lack.square().sum(1, keepdim=True) / error.clamp_min(1e-30)
            towards = lack + turn * towards

    def _parts(self, a):
        """a (N, G, d) by rows that are searched in a second or so; between them a stop is heard."""
        rows = max(1, (1 << 35) // self.codes.numel())
        for part in a.split(rows):
            processes.check_stop(a.device)
            yield part

    def _adder(self, ids):
        """A function that adds up values (N, G, d) by the codes that ids (N, G, k) name: (G, C, d).

        It is the transpose of `sum_codes`.
        """
        rows = self._rows(ids).flatten()
        places = rows.argsort(stable=True) // ids.shape[-1]  # code by code
        count = rows.bincount(minlength=self.groups * self.n_codes)
        begin = count.cumsum(0) - count

        def add_up(values):
            total = F.embedding_bag(places, values.flatten(0, 1), begin, mode="sum")
            return total.view(self.codes.shape)

        return add_up

    def _nearest(self, a, codes):
        """For each of a (N, G, d) the id of the nearest of codes (G, C, d): (N, G, 1)."""
        found = [topk_codes(part, codes, 1, "distance")[1] for part in self._parts(a)]
        return torch.cat(found)

    def _seeds(self, a, n, generator, nearest=None, power=1):
        """n of a (N, G, d), far from each other and from what is at distances `nearest` (G, N).

        In 16 lots, each drawn in proportion to the squared distance, to that power, from what was
        drawn before (k-means||, Bahmani et al. 2012): rare clusters get codes, and none gets many.
        """
        if not (a.abs() < 1e10).all():  # so that squares, and what is made of them, are numbers
            raise ValueError("codes come from inputs that are numbers below 1e10, and some are not")
        rows = a.transpose(0, 1).contiguous()  # (G, N, d)
        seeds = []
        for lot in torch.arange(n).tensor_split(min(16, n)):
            weights = torch.ones_like(rows[..., 0])
            if nearest is not None:
                weights = (nearest**power + 1e-12).clamp_max(1e30)
            drawn = rows_of(rows, torch.multinomial(weights, len(lot), generator=generator))
            ids = self._nearest(a, drawn).squeeze(-1).T
            distance = (rows - rows_of(drawn, ids)).square().sum(-1)
            nearest = distance if nearest is None else torch.minimum(nearest, distance)
            seeds.append(drawn)
        return torch.cat(seeds, dim=1)
