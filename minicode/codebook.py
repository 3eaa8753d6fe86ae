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
from minicode.runtime.arguments import check_choice, check_inputs, whole
from minicode.start import CodesFromData
from minicode.topk import topk_codes


def of_a_pass():
    """What a codebook keeps of its last pass, and who takes part in it; a copy begins with these.

    The terms of the loss are zero then: numbers on a CPU, which torch adds to tensors anywhere.
    """
    return {
        "control": None,  # minicode.control puts itself here, to force and block codes
        "listeners": [],  # and here what is called after each pass, to record it
        "ids": None,
        "autoencoding": torch.zeros((), device="cpu"),
        "commitment": torch.zeros((), device="cpu"),
        "inputs": None,  # (N, G, d) of the last training batch: what revive() draws from
    }


class Positions:
    """Where the inputs of a pass stand in their sequences: one object for all codebooks of a model.

    number   (B or 1, T): of each input, from 0 at its sequence's first token; -1 for padding
    prompt   (B or 1, 1): how many tokens there were after the last pass of more than one
    past     how many positions were there before this pass, in a cache
    skip     bool (B, T): inputs that pass through untouched and uncounted; None: there are none

    A model that sets nothing has none: control then counts a codebook's inputs as they come.
    """

    number = None
    prompt = None
    past = 0
    skip = None
    first = 0  # by minicode.hooks: so many tokens at the start of each row go by untouched
    with_gradients = False

    def advance(self, number, past, skip=None):
        """Called by the model before each pass."""
        self.number = number
        self.past = past
        self.skip = skip
        self.with_gradients = torch.is_grad_enabled()
        # Of one new token behind a cache the prompt is that of the pass before.
        if number.shape[1] > 1 or not past or self.prompt is None:
            self.prompt = number.amax(-1, keepdim=True) + 1

    def kept(self, x):
        """bool: which of inputs x (..., d) don't pass through; None: all of them."""
        return None if self.skip is None else ~self.skip.to(x.device).view(x.shape[:-1])


class Codebook(CodesFromData, nn.Module):
    """Replaces activations (..., groups * dim) by sums of codes, of n_codes for each group.

    q = sum of E_i for the k chosen codes i (paper, section 2.1; its released code divides by k, we
    sum, as the paper does). With groups=H each head's slice has a codebook of its own; all of them
    are one (G, C, d) tensor, searched in one call. All is in float32 under autocast.

    similarity    "distance" (the nearest code), "dot" or, as in the paper, "cosine"
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
    The training loop adds these two to its loss: zero in evaluation, while switched off, of an
    empty batch and before the first pass. Codes learn by gradient: that of `autoencoding`, and that
    of the task's loss, through q (or by `refit`). Of random ones most die: `start` and `revive`.
    ValueError names the argument that is out of range.
    """

    def __init__(
        self,
        n_codes,
        dim,
        k=1,
        groups=1,
        similarity="distance",
        layer_norm=False,
        selection="pursuit",
        relative=False,
    ):
        super().__init__()
        self.n_codes = whole("n_codes", n_codes)
        self.dim = whole("dim", dim)
        self.k = whole("k", k)
        self.groups = whole("groups", groups)
        check_choice(n_codes, k, similarity, selection)
        self.similarity = similarity
        self.layer_norm = layer_norm
        self.selection = selection
        self.relative = relative
        self.enabled = True
        self.name = None  # such as "mlp.1", where the model gives it one
        self.positions = Positions()  # one object for all codebooks of a model, if it sets them
        vars(self).update(of_a_pass())
        # In float32 even where torch's default is half: see _apply.
        self.codes = nn.Parameter(torch.randn(groups, n_codes, dim, dtype=torch.float32))
        # How often each code was chosen in training, by all processes, since the last revival.
        self.register_buffer("usage", torch.zeros(groups, n_codes, dtype=torch.float32))

    def __getstate__(self):
        """What a copy gets, here or in another process: nothing of the last pass."""
        return {**self.__dict__, **of_a_pass()}

    def forward(self, x):
        if not self.enabled:
            self.learn_nothing()
            return x
        kept = self.positions.kept(x)
        out = self.replace(x) if kept is None else self.replace_kept(x, kept)
        for listen in self.listeners:
            listen(self)
        return out

    @torch.compiler.disable  # how many inputs are kept depends on the data
    def replace_kept(self, x, kept):
        """The same where kept (...) is true; x itself elsewhere, and ids of -1."""
        out = x.index_put((kept,), self.replace(x[kept]))
        nothing = self.ids.new_full((*kept.shape, self.groups, self.k), -1)
        self.ids = nothing.index_put((kept,), self.ids)
        return out

    def replace(self, x):
        """The sums of codes in the place of x (..., groups * dim)."""
        with torch.autocast(x.device.type, enabled=False):
            a = self.activations(x)  # (..., G, d)
            choose = self.control or Codebook.search
            self.ids = choose(self, a.detach())  # (..., G, k)
            q = self.sum_codes(self.ids)  # (..., G, d)
            if self.training:
                self.learn(a, q)
            else:
                self.learn_nothing()
            return self.pass_on(a, q).flatten(-2).to(x.dtype)

    def learn(self, a, q):
        """What training needs of a pass: the two errors, how often each code was chosen."""
        if self.positions.with_gradients and not torch.is_grad_enabled():
            raise ValueError("checkpoint activations with use_reentrant=False: codes learn nothing")
        if a.numel():
            scale = self.scale(a.detach()) if self.relative else 1
            self.autoencoding = F.mse_loss(q, a.detach()) / scale
            self.commitment = F.mse_loss(a, q.detach()) / scale
            self.inputs = a.detach().reshape(-1, self.groups, self.dim)
        else:  # which has no mean
            self.learn_nothing()
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            # Not when a checkpoint of the activations is run again, within the backward pass.
            self.usage += processes.add_up(self.count(self.ids))

    def learn_nothing(self):
        """No term of the loss is left of a pass before."""
        self.autoencoding = self.codes.new_zeros(())
        self.commitment = self.codes.new_zeros(())

    def scale(self, a):
        """The variance of activations a (..., G, d); of a single one, its mean square."""
        rows = a.reshape(-1, *a.shape[-2:])
        spread = rows.var(0, correction=0) if len(rows) > 1 else rows.square()
        return spread.mean().clamp_min(1e-12)

    def activations(self, x):
        """What is searched for: x (..., groups * dim) as (..., G, d)."""
        check_inputs(x, self.groups * self.dim)
        a = x.float().unflatten(-1, (self.groups, self.dim))
        return F.layer_norm(a, (self.dim,)) if self.layer_norm else a

    def search(self, a, blocked=None):
        """Ids (..., G, k) of the codes chosen for a (..., G, d), in the order of choice.

        blocked: bool (..., G, C), the codes that must not be chosen, if any.
        """
        return topk_codes(a, self.codes, self.k, self.similarity, self.selection, blocked)[1]

    def sum_codes(self, ids, codes=None):
        """q (..., G, d) for ids (..., G, k): sums of its codes, or of others in their place."""
        table = self.codes if codes is None else codes
        rows = self._rows(ids).flatten(0, -2)
        q = SumOfRows.apply(table.view(-1, self.dim), rows)
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

    def _apply(self, fn, recurse=True):
        """Goes where the model goes, but not to half precision, in which counts end at 256."""

        def keep(tensor):
            moved = fn(tensor)
            half = moved.element_size() < 4
            return tensor.to(moved.device) if half else moved

        return super()._apply(keep, recurse)

    def get_extra_state(self):
        """So that a saved model knows whether its codebooks were on."""
        return torch.tensor(self.enabled)

    def set_extra_state(self, state):
        self.enabled = bool(state)


class SumOfRows(torch.autograd.Function):
    """Sums of rows of a table (n, d), by their numbers (m, k): (m, d).

    As embedding_bag does it, whose gradient takes two to eight times as long: it sorts the numbers.
    """

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(table, rows):
        return F.embedding_bag(rows, table, mode="sum")

    @staticmethod
    def setup_context(ctx, inputs, output):
        table, rows = inputs
        ctx.save_for_backward(rows)
        ctx.shape = table.shape

    @staticmethod
    def backward(ctx, gradient):
        (rows,) = ctx.saved_tensors
        of_table = gradient.new_zeros(ctx.shape)
        for chosen in rows.unbind(-1):
            of_table.index_add_(0, chosen, gradient)
        return of_table, None


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
