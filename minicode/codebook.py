"""A codebook: hidden states in, the sum of k of its codes out.

a    activation, shape (d,)          s_i  similarity of a and code i
E    codes, shape (C, d)             S    k codes: the best for a, then for what is left, and so on
q    sum of E_i for i in S           out  q + (a - a.detach()): q forward, a's gradient backward
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from minicode.runtime import processes
from minicode.runtime.arguments import SELECTIONS, check_one_of
from minicode.topk import rows_of, topk_codes

# What a codebook keeps of its last pass, and who takes part in it; a copy of it begins with these.
OF_A_PASS = {
    "control": None,  # minicode.control puts itself here, to force and block codes
    "listeners": (),  # and here what is called after each pass, to record it
    "ids": None,
    "autoencoding": None,
    "commitment": None,
    "inputs": None,  # (N, G, d) of the last training batch: what revive() draws from
}


class Positions:
    """Where the inputs of a pass stand in their sequences: one object for all codebooks of a model.

    number   (B or 1, T): of each input, from 0 at its sequence's first token; -1 for padding
    prompt   (B or 1, 1): how many tokens the prompt has, which is the last pass without a cache
    past     whether this pass goes on where the one before it ended
    skip     bool (B, T): inputs that pass through untouched and uncounted; None: there are none

    A model that sets nothing has none: control then counts a codebook's inputs as they come.
    """

    number = None
    prompt = None
    past = False
    skip = None

    def advance(self, number, past, skip=None):
        """Called by the model before each pass."""
        self.number = number
        self.past = past
        self.skip = skip
        if not past:
            self.prompt = number.amax(-1, keepdim=True) + 1

    def kept(self, x):
        """bool: which of inputs x (..., d) don't pass through; None: all of them."""
        return None if self.skip is None else ~self.skip.to(x.device).view(x.shape[:-1])


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

    relative      errors are divided by the variance of a: for models whose layers' scales differ

    After a forward pass:
    ids           (..., G, k), in the order of choice: the strongest first; -1 where inputs passed
                  through untouched (Positions.skip)
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
        relative=False,
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
        self.relative = relative
        self.enabled = True
        self.name = None  # such as "mlp.1", where the model gives it one
        self.positions = Positions()  # one object for all codebooks of a model, if it sets them
        vars(self).update(OF_A_PASS)
        self.codes = nn.Parameter(torch.randn(groups, n_codes, dim))
        # How often each code was chosen in training, by all processes, since the last revival.
        self.register_buffer("usage", torch.zeros(groups, n_codes))

    def __getstate__(self):
        """What a copy gets, here or in another process: nothing of the last pass."""
        return {**self.__dict__, **OF_A_PASS}

    def forward(self, x):
        if not self.enabled:
            return x
        kept = self.positions.kept(x)
        if kept is None:
            out = self.replace(x)
        else:
            out = x.clone()
            out[kept] = self.replace(x[kept])
            ids = self.ids.new_full((*kept.shape, self.groups, self.k), -1)
            ids[kept] = self.ids
            self.ids = ids
        for listen in self.listeners:
            listen(self)
        return out

    def replace(self, x):
        """The sums of codes in the place of x (..., groups * dim)."""
        with torch.autocast(x.device.type, enabled=False):
            a = self.activations(x)  # (..., G, d)
            if self.control is None:
                self.ids = self.search(a.detach())  # (..., G, k)
            else:
                self.ids = self.control(self, a.detach())
            q = self.sum_codes(self.ids)  # (..., G, d)
            if self.training:
                self.learn(a, q)
            return self.pass_on(a, q).flatten(-2).to(x.dtype)

    def learn(self, a, q):
        """What training needs of a pass: the two errors, how often each code was chosen."""
        scale = a.detach().flatten(0, -3).var(0).mean().clamp_min(1e-12) if self.relative else 1
        self.autoencoding = F.mse_loss(q, a.detach()) / scale
        self.commitment = F.mse_loss(a, q.detach()) / scale
        self.inputs = a.detach().reshape(-1, self.groups, self.dim)
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            # Not when a checkpoint of the activations is run again, within the backward pass.
            self.usage += processes.add_up(self.count(self.ids))

    def activations(self, x):
        """What is searched for: x (..., groups * dim) as (..., G, d)."""
        width = self.groups * self.dim
        if x.shape[-1:] != (width,):
            raise ValueError(f"a codebook's inputs must be (..., {width}), not {tuple(x.shape)}")
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
        """How often ids (..., G, k) name each code: (G, C); -1 names none."""
        rows = self._rows(ids.clamp_min(0)).flatten()
        count = torch.zeros_like(self.usage)
        count.view(-1).index_add_(0, rows, (ids >= 0).flatten().to(count.dtype))
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
        """Sets the codes by k-means on recorded inputs (..., groups * dim).

        For k > 1 they are a k-th of the clusters' means to begin with, and then fitted to the
        inputs: sums of means are blurred. ValueError where there are fewer inputs than codes.
        """
        inputs = self.activations(inputs).flatten(0, -3)  # (N, G, d)
        if len(inputs) < self.n_codes:
            needed = f"{self.n_codes} codes need as many inputs to start from"
            raise ValueError(f"{needed}, not {len(inputs)}")
        a = inputs.transpose(0, 1).contiguous()  # (G, N, d)
        self.codes.copy_(self._seeds(a, self.n_codes, generator))
        for _ in range(rounds):
            ids, _ = self._nearest(a, self.codes)  # (G, N)
            ids = ids.T.unsqueeze(-1)  # (N, G, 1)
            count = self.count(ids).unsqueeze(-1)  # (G, C, 1)
            total = self._gather(self._bags(ids), inputs)
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
        bags = self._bags(ids)
        lack = self._gather(bags, a - self.sum_codes(ids))  # (G, C, d)
        towards = lack
        for _ in range(5):
            pull = self._gather(bags, self._sum(towards, ids)) + towards
            error = lack.square().sum(1, keepdim=True)  # (G, 1, d): each dimension goes its own way
            length = error / (towards * pull).sum(1, keepdim=True).clamp_min(1e-30)
            self.codes += length * towards
            lack = lack - length * pull
            turn = lack.square().sum(1, keepdim=True) / error.clamp_min(1e-30)
            towards = lack + turn * towards

    def _bags(self, ids):
        """For `_gather`: the places of ids (N, G, k), code by code, and where each code begins."""
        rows = self._rows(ids).flatten()
        places = rows.argsort(stable=True) // ids.shape[-1]
        count = rows.bincount(minlength=self.groups * self.n_codes)
        return places, count.cumsum(0) - count

    def _gather(self, bags, values):
        """By code, the sum of values (N, G, d) at its places: (G, C, d)."""
        places, begin = bags
        total = F.embedding_bag(places, values.flatten(0, 1), begin, mode="sum")
        return total.view(self.codes.shape)

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


def codebooks(model):
    """The codebooks of any module by name, in the order of its modules: {"mlp.1": Codebook, ...}.

    The names are the model's own, as GPT and `attach` give them, or else paths: "layers.0.book".
    """
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Codebook):
            path = path.replace("_orig_mod.", "") or "codebook"  # torch.compile puts it in
            name = path if module.name in (None, *found) else module.name
            found[name] = module
    return found


def use_codebooks(model, on):
    """Switches a model's codebooks on or off, in place; without them it is the dense model."""
    for codebook in codebooks(model).values():
        codebook.enabled = on


def perplexity(counts):
    """exp(entropy) of how often codes (..., C) were chosen: as many in even use, (...)."""
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share).sum(-1).exp()
