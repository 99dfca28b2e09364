"""OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection (arXiv 2405.18380). Needs nothing but torch.

Full fine-tuning keeps a gradient and two Adam moments for every weight. OwLore keeps them for some layers at a time,
and in a low-rank space:

    1. score     D_l, the share of outliers among the weights of layer l       outlier_distribution
    2. sample    every so often draw some layers, p_l = D_l / sum(D)          sampling_probabilities, LayerSampler
    3. project   R = G P, Adam on R, W = W - lr scale N P^T                    ProjectedAdam, projection_basis

    D = outlier_distribution(model, layers, calibration_batches)
    sampler = LayerSampler(layers, sampling_probabilities(D), active=5)    # of a 7B's 32
    optimizer = ProjectedAdam([{"params": matrices, "rank": 256, "update_gap": 100}, {"params": others}], lr=3e-4)
    for step, batch in enumerate(batches):
        if step % 50 == 0:
            sampler.resample()      # freezes all layers but the 5 drawn
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

Sampling on or off and projection on or off make full fine-tuning (off, off), GaLore (off, on), LISA (uniform sampling,
off) and OwLore (outlier sampling, on).
"""

import contextlib
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# 1. Score


@torch.no_grad()
def outlier_distribution(
    model: nn.Module, layers: Sequence[nn.Module], batches: Iterable, threshold: float | None = None
) -> Tensor:
    """The share of outliers in each layer, D_l: OWL's layerwise outlier distribution (arXiv 2310.05175).

    model: run once on each of the calibration batches, in eval mode, as `model(batch)`, or `model(**batch)` for a dict.
    layers: its blocks, whose nn.Linear are scored. threshold: a score of more than so many times its layer's mean is an
    outlier; by default `default_threshold` of the first one's width. Returns fp32 [L] on the CPU, fractions in [0, 1].
    What does not run as an nn.Linear is not scored, and all positions count, so give batches without padding. Warns if
    there are no outliers at all. Raises ValueError for a layer without a linear that runs, or without finite scores."""
    linears = [find_linears(layer) for layer in layers]
    dtypes = {linear.weight.dtype for linear in sum(linears, [])}
    # An fp8 weight, of one byte, has a scale beside it that nn.Linear does not know of.
    if not linears or not all(linears) or not all(t.is_floating_point and t.itemsize > 1 for t in dtypes):
        raise ValueError("outlier_distribution needs layers with an nn.Linear each, its weights float, not quantized")
    width = linears[0][0].in_features
    threshold = default_threshold(width) if threshold is None else threshold
    squares: dict[nn.Linear, Tensor] = {}  # ||X_j||_2^2, fp32 [in_features]

    def add_squares(linear: nn.Linear, args: tuple, kwargs: dict) -> None:
        X = (args or tuple(kwargs.values()))[0].reshape(-1, linear.in_features)  # [tokens, in_features]
        if not len(X):  # as of an expert that no token was sent to
            return
        wide = torch.promote_types(X.dtype, torch.float32)  # the norm reads bf16 as fp32, without a copy
        squares[linear] = squares.get(linear, 0) + torch.linalg.vector_norm(X, dim=0, dtype=wide).float().square()

    training = [module for module in model.modules() if module.training]
    hooks = [linear.register_forward_pre_hook(add_squares, with_kwargs=True) for linear in set(sum(linears, []))]
    try:
        model.eval()
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True

    def scores(linear: nn.Linear) -> Tensor:
        norms = squares[linear].sqrt()
        return whole(linear.weight).to(norms.device).abs().float() * norms  # A_ij = |W_ij| ||X_j||_2, [out, in]

    D = []
    for n, layer in enumerate(linears):
        layer = [linear for linear in layer if linear in squares]  # those that took part in the forward pass
        if not layer:
            raise ValueError(f"no nn.Linear of layer {n} has run: give batches, and a model that is not compiled")
        # The scores of a whole layer would not fit beside a 7B, so they are computed twice, one matrix at a time.
        size = sum(linear.weight.numel() for linear in layer)
        mean = sum(scores(linear).sum(dtype=torch.float64) for linear in layer) / size
        if not mean.isfinite():
            raise ValueError(f"layer {n} has weights or inputs that are not finite: it has no scores")
        outliers = sum((scores(linear) > threshold * mean).sum() for linear in layer)
        D.append((outliers / size).float().cpu())  # D_l = #{A_ij > threshold mean(A)} / #{A_ij}
    if not any(D):
        less = f"use a smaller threshold, {default_threshold(width):.2g} suits a width of {width}"
        warnings.warn(f"no score is {threshold:g} times its layer's mean: {less}", stacklevel=3)
    return torch.stack(D)


def find_linears(module: nn.Module) -> list[nn.Linear]:
    """All nn.Linear of a module, each once. What peft puts beside a linear that it wraps is left out."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    if isinstance(module, nn.Linear):
        return [module]
    return list(dict.fromkeys(linear for child in module.children() for linear in find_linears(child)))


def default_threshold(dim: int) -> float:
    """The paper's 13 for a width of 4096 or more, and less below, where scores spread less (the paper: 3 to 7)."""
    return min(13.0, max(3.0, 13 * math.sqrt(dim / 4096)))


@torch.no_grad()
def hill_alpha(weight: Tensor) -> float:
    """PL_Alpha_Hill, the Hill estimate of a power law's exponent in the spectrum of W; smaller is heavier-tailed. By it
    the paper explains outliers; the method does not use it.

        alpha = 1 + k / sum_{i=1..k} ln(e_{n-i+1} / e_{n-k}),   k = n / 2

    weight: W [m, n]. e_1 <= ... <= e_n: the eigenvalues of W^T W, or of W W^T if m < n (the same, without its extra
    zeros). 1 if e_{n-k} is zero to the precision of fp32: no tail is heavier; inf if there is no tail, as of the
    identity. Raises ValueError below 2 x 2, and if W is not finite."""
    if weight.dim() != 2 or min(weight.shape) < 2 or not weight.isfinite().all():
        raise ValueError(f"hill_alpha needs a matrix of at least 2 x 2, all finite, not this {list(weight.shape)}")
    s = torch.linalg.svdvals(weight.float()).double()  # sqrt(e), the largest first
    k = len(s) // 2
    if s[k] <= s[0] * max(weight.shape) * torch.finfo(torch.float32).eps:
        return 1.0
    return 1 + (k / (s[:k] / s[k]).square().log().sum()).item()


# 2. Sample


def sampling_probabilities(outliers: Tensor, mode: str = "outlier") -> Tensor:
    """The probability of each layer to be drawn: [L], sums to 1.

    outliers: D_l, [L], in any unit. mode:
        outlier     p_l = D_l / sum(D); uniform if every D_l is 0 (nothing to prefer)
        uniform     p_l = 1 / L, as in LISA (arXiv 2403.17919)
        reverse     max(p) - p_l, normalised
        increasing  in proportion to 1, 2, ..., L; decreasing: to L, ..., 2, 1
    Raises ValueError for another mode, or outliers that are negative or not finite."""
    D = torch.as_tensor(outliers)
    D = D.to(torch.promote_types(D.dtype, torch.float32))  # sums of fp16 overflow
    if D.dim() != 1 or not len(D) or not (D >= 0).all() or not D.sum().isfinite():
        raise ValueError("outliers must be finite and not negative, one per layer")
    uniform = torch.ones_like(D)
    modes = {"outlier": D, "uniform": uniform, "reverse": D.max() - D}
    modes |= {"increasing": uniform.cumsum(0), "decreasing": uniform.cumsum(0).flip(0)}
    if mode not in modes:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(modes)}")
    weights = modes[mode] if modes[mode].sum() > 0 else uniform
    return weights / weights.sum()


class LayerSampler:
    """Draws the layers to train next, `active` of them without replacement, and freezes the others.

    layers: the model's blocks. probabilities: [L]. Parameters that are frozen when the sampler is made stay so: only
    the others take turns, and a draw unfreezes them even if they were frozen by hand since. A layer of probability 0 is
    drawn only if fewer than `active` have a positive one; the places left are then filled uniformly. Several processes
    that train one model must draw alike: score on the same batches, or send the probabilities of one to the others.
    DistributedDataParallel leaves out what is frozen when it wraps the model, so wrap it before the first draw, and with
    find_unused_parameters=True. Raises ValueError if `active` is not between 1 and L, if there are not L probabilities,
    or if a layer is frozen altogether."""

    def __init__(self, layers: Sequence[nn.Module], probabilities: Tensor, active: int, seed: int = 0):
        self.layers, self.active = layers, active
        self.probabilities = p = torch.as_tensor(probabilities).cpu().to(torch.float64, copy=True)
        # Names, as the parameters themselves may be replaced when the model is wrapped, as by FSDP's fully_shard
        self.trainable = [[name for name, w in layer.named_parameters() if w.requires_grad] for layer in layers]
        if p.shape != (len(layers),) or not ((p >= 0) & (p < math.inf)).all():
            raise ValueError(f"{len(layers)} layers need as many probabilities, finite and none of them negative")
        if not 1 <= active <= len(layers):
            raise ValueError(f"active must be between 1 and the {len(layers)} layers there are, not {active}")
        if not all(self.trainable):
            raise ValueError(f"layer {self.trainable.index([])} is frozen: call requires_grad_(True) on it first")
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: list[int] = []

    def resample(self) -> list[int]:
        """Draw anew. Returns the drawn layers, sorted; only they require gradients now. Warns if others have since the
        last draw."""
        active = {p for index in self.drawn for p in self.layers[index].parameters()}
        if active and any(p.requires_grad for layer in self.layers for p in set(layer.parameters()) - active):
            how = "call sampler.activate(sampler.drawn) after what unfreezes them, as peft's disable_adapter() does"
            warnings.warn(
                f"layers that were not drawn require gradients, and may have been trained: {how}", stacklevel=2
            )
        # Layers of 1e-30 are drawn only for places that those of a real probability leave, and then uniformly.
        p = self.probabilities.clamp(min=1e-30)
        self.activate(sorted(torch.multinomial(p, self.active, generator=self.generator).tolist()))
        return self.drawn

    def activate(self, drawn: Sequence[int]) -> None:
        """Freeze all layers but these. A frozen layer keeps no gradient. Raises RuntimeError if the layers have other
        parameters to train than when the sampler was made."""
        layers = [dict(layer.named_parameters()) for layer in self.layers]
        trainable = [[layer.get(name) for name in names] for layer, names in zip(layers, self.trainable)]
        takes_turns, active = set(sum(trainable, [])), {p for index in drawn for p in trainable[index]}
        requiring = {p for layer in layers for p in layer.values() if p.requires_grad}
        if None in takes_turns or not requiring <= takes_turns:
            raise RuntimeError("layers have other parameters to train now: make the sampler after what changes them")
        self.drawn = drawn
        for p in takes_turns:  # layers may share some
            p.requires_grad_(p in active)
            p.grad = p.grad if p in active else None

    def state_dict(self) -> dict:
        """What it takes to draw the same layers again from here."""
        return {"generator": self.generator.get_state(), "drawn": list(self.drawn), "probabilities": self.probabilities}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken, with the layers that were active then, and its probabilities. Raises
        ValueError for the state of another number of layers."""
        # Older states have none. A copy: what is mapped keeps its file's room on the disk.
        p = state.get("probabilities", self.probabilities).clone().cpu()
        if len(p) != len(self.layers) or any(index >= len(p) for index in state["drawn"]):
            raise ValueError(f"this is the state of a sampler of other than these {len(self.layers)} layers")
        self.probabilities = p
        self.generator.set_state(state["generator"].cpu())
        self.activate(list(state["drawn"]) or range(len(self.layers)))  # before the first draw all were active
        self.drawn = list(state["drawn"])


# 3. Project

# The norm of a residual is at most MAX_GROWTH times the larger of the last one and LEAST |N|, so that it can grow from
# nothing.
MAX_GROWTH, LEAST = 1.01, 0.1


class ProjectedAdam(torch.optim.Optimizer):
    """AdamW whose matrices are updated in a low-rank space (GaLore, arXiv 2403.03507), all of its state in fp32.

    A parameter group with a `rank` is projected. For the gradient G of each of its matrices W [m, n], m >= n:

        P = V_r of G = U S V^T     [n, rank]    renewed every `update_gap` steps of W (default 100)
        R = G P                    [m, rank]
        N = Adam(R)                [m, rank]
        W = (1 - lr weight_decay) W - lr scale N P^T        (`scale` defaults to 1)

    If m < n it is P = U_r [m, rank], R = P^T G [rank, n] and P N. A group without a rank is trained by AdamW. lr,
    betas, eps, weight_decay: as torch.optim.AdamW's, but no decay by default. A weight that is frozen (does not require a
    gradient) takes no part, whatever its p.grad; it loses its state, P too, and begins anew.

    A group with `residual` also follows what of G lies outside of P, without moments (Fira, arXiv 2410.01623): each row
    of it (column if m < n) is scaled as Adam scales that of R,

        S = G - R P^T,  W_i = W_i - lr (|N_i| / |R_i|) S_i        (without `scale`)

    to no more than sqrt(n), the length of Adam's first step for all of G_i (sqrt(m) if m < n). |N_i| is that of the step
    before (sqrt(rank) in the first), so it need not wait for N. From the second step on the norm of it all is at most
    1.01 times the larger of two: what it was in the step before, and a tenth of the |N| used there.

    A matrix whose gradient is zero or not finite when a new P is due stays as it is, and P stays due. Skipping `step`
    changes nothing, except with in_backward: the backward pass has added the residual to W by then, at the lr of that
    moment (`step` raises RuntimeError if lr has changed since), and turned the first moment to a new P.

    bf16 weights are rounded stochastically, by the same noise in all processes: its seed is the group's `steps`, those
    taken so far, and the parameter's number. If you make a new optimizer in the course of a run, begin its groups at that
    count, {"params": ..., "steps": 400}, or the noise repeats.

    It is used like any optimizer: p.grad holds G until `step`. in_backward: project in the backward pass instead, which
    saves the gradients' memory (part 4). svd: "randomized" or "exact". Raises ValueError for settings out of range, and
    for a projected parameter that is not a matrix."""

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        svd: str = "randomized",
        in_backward: bool = False,
    ):
        self.in_backward, self.micro_batches = False, 1  # micro_batches: the backward passes of a step
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, svd=svd)
        super().__init__(params, defaults | dict(rank=None, update_gap=100, scale=1.0, residual=False, steps=0))
        self.in_backward = in_backward  # only now: where a group was refused no parameter is to have a hook
        for group in self.param_groups:
            project_in_backward(group, self)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """Update every parameter that has a gradient. closure: recomputes the loss, which is returned."""
        loss = torch.enable_grad()(closure)() if closure is not None else None
        with without_autocast():
            for index, group, p, g in self._gradients():
                # Seeds count the steps of the whole run: a layer drawn again must not meet its old noise.
                self._update(group, p, g, (group["steps"], index))
        for group in self.param_groups:
            group["steps"] += 1
        return loss

    def _update(self, group: dict, p: Tensor, g: Tensor, seed: tuple) -> None:
        """One step of one parameter. g: its gradient G, or R. seed: of the noise that bf16 weights are rounded with."""
        state = self.state[p]
        if group["rank"] is None:
            if "basis" in state:  # the group was edited: begin anew
                state.clear()
            m, v, t = moments(state, g)
            for p_rows, *rows, noise in row_blocks(p, seed, *map(own, (g, m, v))):
                write_back(p_rows, adam(*rows, t, group), group, noise)
            return
        # R = G P, of a new P if it is due
        R = self._project(group, p, own(g).to(compute_device(p))) if g is p.grad else g  # else it is R already
        if R.dim() == 0:  # no basis could be had: this matrix waits for the next step
            return
        N, P = adam(R, *moments(state, R), group), state["basis"]
        if group["residual"]:
            state["lengths"] = N.norm(dim=int(is_tall(p)), keepdim=True)  # |N_i|
        N = group["scale"] * N
        left, right = (N, P.T) if is_tall(p) else (P, N)
        for p_rows, rows, noise in row_blocks(p, seed, left[rows_of(p)]):
            write_back(p_rows, rows @ right, group, noise)  # W = (1 - lr weight_decay) W - lr N P^T

    def _project(self, group: dict, p: Tensor, G: Tensor, all_rows: Tensor | None = None) -> Tensor:
        """R = G P, after renewing P if it is due. G: the rows of the gradient that this process holds of p, all if p is
        not sharded; all_rows: all of them, if they are there already. A scalar, 0 or nan, stands for no R: G is zero or
        not finite, or its SVD did not converge, and the matrix or the whole step waits."""
        state = self.state[p]
        if self._basis_is_due(group, p):
            all_rows = whole(G, p) if all_rows is None else all_rows
            if not all_rows.any():
                if "basis" not in state:
                    self._make_room(group, p, G)
                return torch.tensor(0.0, device=G.device)
            try:
                P = projection_basis(all_rows, group["rank"], group["svd"])
            except torch.linalg.LinAlgError:
                return torch.tensor(math.nan, device=G.device)
            if is_sharded(p):  # eigenvectors of two machines need not agree
                torch.distributed.broadcast(P, group=p.device_mesh.get_group(), group_src=0)
            if "basis" not in state or state["basis"].shape != P.shape:  # the first one, or of another rank: begin anew
                state.clear()
            elif "exp_avg" in state:  # puts the first moment into the coordinates of the new basis
                turn = state["basis"].T @ P  # [rank, rank]
                state["exp_avg"] = state["exp_avg"] @ turn if is_tall(p) else turn.T @ state["exp_avg"]
            state["basis"] = P
        del all_rows  # if they were gathered from all processes: R and the residual take their room
        R = project(G, state["basis"], p)
        if group["residual"]:
            self._add_residual(group, p, G, R)
        return R

    def _make_room(self, group: dict, p: Tensor, G: Tensor) -> None:
        """State of a matrix before its first step. torch.distributed.checkpoint loads into what is there, and has an
        optimizer make it by a step with zero gradients."""
        state, rank = self.state[p], min(group["rank"], *p.shape)
        state.clear()  # a plain group's, if it was edited
        R = torch.zeros((len(p), rank) if is_tall(p) else (rank, p.shape[1]), dtype=torch.float32, device=G.device)
        moments(state, R)
        state["step"], state["basis"] = 0, R.new_zeros(min(p.shape), rank)  # it is due all the same
        if group["residual"]:  # what `_add_residual` begins with
            state["lengths"] = R.norm(dim=int(is_tall(p)), keepdim=True).fill_(rank**0.5)
            state["residual"] = R.new_full((), math.inf)

    def _add_residual(self, group: dict, p: Tensor, G: Tensor, R: Tensor) -> None:
        """W_i = W_i - lr (|N_i| / |R_i|) S_i, with S = G - R P^T, within limits; nothing if G is not finite. G: as in
        `_project`; R: that of all rows."""
        state, dim = self.state[p], int(is_tall(p))
        wide = torch.promote_types(G.dtype, torch.float32)
        inside = R.norm(dim=dim, keepdim=True).clamp(min=1e-30)  # |R_i|, [m, 1] or [1, n]
        squares = torch.linalg.vector_norm(G, dim=dim, keepdim=True, dtype=wide).float().square()
        total = joined(squares, p).sqrt().clamp(min=1e-30)  # |G_i|
        # P is orthonormal, so |S_i|^2 = |G_i|^2 - |R_i|^2: lengths are known before anything is made.
        outside = total * (1 - (inside / total).square()).clamp(min=0).sqrt()
        lengths = state.get("lengths", torch.full_like(inside, R.shape[dim] ** 0.5))  # |N_i|
        length = (lengths * outside / inside).clamp(max=p.shape[dim] ** 0.5)
        norm = length.norm()
        before, finite = state.get("residual", torch.full_like(norm, math.inf)), norm.isfinite()
        limited = torch.minimum(norm, MAX_GROWTH * before)
        state["residual"] = torch.where(finite, torch.maximum(limited, LEAST * lengths.norm()), before)
        gain = length / outside.clamp(min=1e-30) * (limited / norm.clamp(min=1e-30))
        left, right = (R, state["basis"].T) if is_tall(p) else (state["basis"], R)
        index = next(n for n, q in enumerate(q for group in self.param_groups for q in group["params"]) if q is p)
        seed, here, group = (group["steps"], index, 1), rows_of(p), group | {"weight_decay": 0.0}
        for p_rows, G_rows, lefts, gains, noise in row_blocks(p, seed, G, left[here], gain.expand(len(p), -1)[here]):
            S = G_rows.to(torch.float32, copy=True).addmm_(lefts, right, alpha=-1)
            write_back(p_rows, S.mul_(gains).masked_fill_(~finite, 0.0), group, noise)

    def _basis_is_due(self, group: dict, p: Tensor) -> bool:
        """Whether P must be renewed. A step that changed nothing does not count, so a basis that failed stays due."""
        state, rank = self.state[p], min(group["rank"], *p.shape)
        if rank < 1 or group["update_gap"] < 1:  # the group may have been edited
            raise ValueError("rank and update_gap must be at least 1; a rank of None makes the group plain AdamW")
        known = "basis" in state and state["basis"].shape[1] == rank
        return not known or state.get("step", 0) % group["update_gap"] == 0

    def _gradients(self) -> list[tuple[int, dict, Tensor, Tensor]]:
        """Number, group, parameter and gradient of all that have one: R if the backward pass has projected it."""
        gradients, partial = [], []
        self._drop_frozen()
        parameters = ((group, p) for group in self.param_groups for p in group["params"])
        for index, (group, p) in enumerate(parameters):
            g = p.grad
            if g is None or not p.numel():
                continue
            if self.in_backward and group["rank"] is not None and is_sharded(g):
                # Not made by factors, but by autograd: FSDP has taken the mean over the processes already.
                p.grad = ProjectedGradient(p, self)
                p.grad.G, g = own(g), p.grad
            if isinstance(g, ProjectedGradient):
                if g.optimizer() is self and group["rank"] is not None:
                    g = g.low_rank(group)
                    partial += [p.grad] if p.grad.partial else []
                    if p.grad.lr not in (None, float(group["lr"])):
                        raise RuntimeError(
                            f"the residual was added at lr {p.grad.lr}, which is {float(group['lr'])} now: with "
                            "in_backward set lr before the backward pass"
                        )
            elif g.is_sparse:
                raise RuntimeError("sparse gradients are not supported: use nn.Embedding(sparse=False)")
            gradients.append((index, group, p, g))
        if partial:  # what each process has of R becomes the mean over those that share the weights, in one exchange
            flat = torch.cat([gradient.R.flatten() for gradient in partial])
            mean_over_processes(flat, partial[0].p())
            for gradient, R in zip(partial, flat.split([gradient.R.numel() for gradient in partial])):
                gradient.R.copy_(R.view_as(gradient.R))
                gradient.partial = False
        return gradients

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; with a `rank`, its matrices are projected."""
        super().add_param_group(param_group)
        group = self.param_groups.pop()  # it comes back when all is well
        rank, update_gap, svd = group["rank"], group["update_gap"], group["svd"]
        numbers = {name: group[name] for name in ("lr", "eps", "weight_decay", "scale")}
        if not (all(0 <= x < math.inf for x in numbers.values()) and all(0 <= beta < 1 for beta in group["betas"])):
            raise ValueError(f"one of {numbers}, or of betas {group['betas']}, is out of range")
        if rank is not None and not all(isinstance(n, int) and n >= 1 for n in (rank, update_gap)):
            raise ValueError(f"rank {rank} and update_gap {update_gap} must be integers, at least 1")
        if rank is None and group["residual"]:
            raise ValueError("a residual is what a projection leaves out: give its group a rank")
        if svd not in ("randomized", "exact"):
            raise ValueError(f"svd {svd!r} is not randomized or exact")
        if rank is not None and not group["params"]:
            raise ValueError("a group with a rank has no parameters: no matrices were found for it")
        if "update_proj_gap" in group:
            raise ValueError("GaLore's update_proj_gap is called update_gap here")
        coupled = group["weight_decay"] and group.get("decoupled_weight_decay") is False
        if coupled or group.get("maximize") or group.get("amsgrad"):
            raise ValueError("amsgrad, maximize and Adam's weight decay, which is not AdamW's, are not supported")
        for p in group["params"]:
            if rank is not None and p.dim() != 2:
                raise ValueError(f"only matrices can be projected, not a parameter of shape {list(p.shape)}")
            if is_sharded(p) and not (p.device_mesh.ndim == 1 and p.placements[0].is_shard(0)):
                raise ValueError(f"weights must be sharded by rows over one dimension of processes, not {p.placements}")
            if p.is_complex():
                raise ValueError("complex parameters are not supported: give their real and imaginary parts")
        self.param_groups.append(group)
        project_in_backward(group, self)

    def _drop_frozen(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if not p.requires_grad):
            self.state.pop(p, None)
            p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the state of parameters that are frozen now: these cost no memory."""
        super().zero_grad(set_to_none or self.in_backward)
        self._drop_frozen()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients, R of those projected in the backward pass, to a joint 2-norm of at most max_norm.

        Returns the norm before, fp32, without waiting for the device; R's is smaller than G's. It is not finite if a
        gradient is not: if it is nan all of them become nan; if it is inf what is finite becomes zero, the rest nan, as
        by torch.nn.utils.clip_grad_norm_."""
        gradients = [g for *_, g in self._gradients()]
        norms = []
        for g in gradients:
            wide = torch.promote_types(g.dtype, torch.float32)  # squares of fp16 overflow
            norms.append(torch.linalg.vector_norm(own(g), dtype=wide).float().to(compute_device(g)))
        shards = [n for n, g in enumerate(gradients) if is_sharded(g)]  # each process has a part of these
        if shards:
            squares = torch.stack([norms[n] for n in shards]).square()
            torch.distributed.all_reduce(squares, group=gradients[shards[0]].device_mesh.get_group())
            for n, square in zip(shards, squares):
                norms[n] = square.sqrt()
        norm = torch.stack([norm.to(norms[0].device) for norm in norms]).norm() if norms else torch.tensor(0.0)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in map(own, gradients):
            g.mul_(factor.to(g.device))
        return norm

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a `state_dict()` bit for bit, or for plain groups torch.optim.AdamW's. Raises ValueError if a group
        is projected here and plain there, or the other way round, and for other entries than Adam's."""
        loaded: dict = {}

        def groups_only(_: ProjectedAdam, state_dict: dict) -> dict:  # torch would cast fp32 moments to bf16 weights'
            loaded.update(state_dict)
            for now, was in zip(self.param_groups, loaded["param_groups"]):
                if (now["rank"] is None) != (was.get("rank") is None):
                    raise ValueError(f"a group of rank {now['rank']} cannot load the state of rank {was.get('rank')}")
                coupled = was.get("weight_decay") and was.get("decoupled_weight_decay") is False  # in the gradient
                if coupled or was.get("amsgrad") or was.get("maximize"):
                    raise ValueError("cannot load the state of Adam with weight decay, or with amsgrad or maximize")
            known = {"step", "exp_avg", "exp_avg_sq", "basis", "lengths", "residual"}
            if unknown := set().union(*loaded["state"].values()) - known:
                raise ValueError(f"cannot load the state of an optimizer that keeps {', '.join(sorted(unknown))}")
            return {**loaded, "state": {}}

        def state_too(_: ProjectedAdam) -> None:
            # Numbers, or names if torch.distributed.checkpoint saved them
            ids = (id for group in loaded["param_groups"] for id in group["params"])
            for id, p in zip(ids, [p for group in self.param_groups for p in group["params"]]):
                for key, value in loaded["state"].get(id, {}).items():
                    if key == "step":
                        new = int(value)
                    elif "basis" in loaded["state"][id]:
                        new = value.to(compute_device(p), torch.float32, copy=True)
                    else:
                        new = torch.empty_like(p, dtype=torch.float32)
                        own(new).copy_(own_rows(own(value), p))
                    self.state[p][key] = new

        # Other people's hooks before loading come before ours, and those after it see all of the state.
        before = self.register_load_state_dict_pre_hook(groups_only)
        with before, self.register_load_state_dict_post_hook(state_too, prepend=True):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"in_backward": self.in_backward, "micro_batches": self.micro_batches}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.update({"residual": False} | self.defaults | group)  # torch's AdamW has fewer, as older versions had
            group.pop("decoupled_weight_decay", None)  # of a loaded state; here it always is
            if "in_backward" in state:  # of a copy, whose parameters have no hooks yet; loading a state comes here too
                project_in_backward(group, self)


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """The optimizer's arithmetic is fp32 even if a loop has autocast on."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def is_tall(W: Tensor) -> bool:
    """W [m, n] is tall if m >= n. Then P [n, rank] is on its right, else P [m, rank] is on its left."""
    return W.shape[0] >= W.shape[1]


def project(G: Tensor, P: Tensor, p: Tensor | None = None) -> Tensor:
    """R of a gradient [m, n], fp32 [m, rank] or [rank, n]. Of a sharded p each process gives the rows that it holds."""
    p = G if p is None else p
    if is_tall(p):
        return joined(torch.cat([rows @ P for (rows,) in fp32_rows(G)]), p)
    return joined(sum(P_rows.T @ rows for rows, P_rows in fp32_rows(G, P[rows_of(p)])), p)


def moments(state: dict, g: Tensor) -> tuple[Tensor, Tensor, int]:
    """Adam's two moments for a gradient, zero at first, and the number of this step, from 1."""
    if "exp_avg" not in state:
        state["step"], zeros = 0, torch.zeros_like(g, dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = zeros, zeros.clone()
    state["step"] += 1
    return state["exp_avg"], state["exp_avg_sq"], state["step"]


def adam(g: Tensor, m: Tensor, v: Tensor, t: int, group: dict) -> Tensor:
    """Adam's normalised step N for a gradient g (arXiv 1412.6980, algorithm 1), in fp32. m, v: its moments, updated."""
    beta1, beta2 = group["betas"]
    g = g.float()
    m.lerp_(g, 1 - beta1)  # m = beta1 m + (1 - beta1) g
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # v = beta2 v + (1 - beta2) g^2
    return (m / (1 - beta1**t)).div_((v / (1 - beta2**t)).sqrt_().add_(group["eps"]))


def write_back(p: Tensor, update: Tensor, group: dict, noise: Tensor | None) -> None:
    """p = (1 - lr weight_decay) p - lr update, computed in fp32; update has the shape of p."""
    new, wide = p.to(update.device), torch.promote_types(p.dtype, torch.float32)  # p itself, if it is there already
    lr = float(group["lr"])  # which may be a tensor
    if group["weight_decay"]:
        new = new.to(wide).mul_(1 - lr * group["weight_decay"])
    # A GPU widens bf16 as it reads it, without a copy.
    new = torch.sub(new, update, alpha=lr, out=new if new.dtype == wide else None)
    if new is not p:
        p.copy_(stochastic_round(new, noise) if p.dtype == torch.bfloat16 else new)


def stochastic_round(x: Tensor, noise: Tensor) -> Tensor:
    """Round fp32 to bf16, up or down at random so that the mean is x. An update of less than half the step between two
    bf16 numbers, 1/512 to 1/256 of a weight, then moves it by the right amount on average; nearest would lose it.

    bf16 is the upper half of fp32: noise, int32 and uniform in 0 ... 2^16 - 1, added to the lower half carries into the
    upper one with just the probability wanted. What is not finite stays what it is: the lower half of inf is 0."""
    rounded = (noise + x.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


# Elements handled at once if all of a matrix in fp32 would take too much memory. A GPU needs more of them to be busy:
# with 2^21 a 7B's step waits for kernels to be launched (bench/results/speed-steps-cuda.md).
CHUNK, CHUNK_ON_GPU = 2**21, 2**23  # 8 and 32 MiB


def chunk(device: torch.device) -> int:
    return CHUNK_ON_GPU if device.type == "cuda" else CHUNK


def fp32_rows(G: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk the rows of G in fp32, and tensors of as many rows: a few at a time, if that takes a copy."""
    height = len(G) if G.dtype == torch.float32 else max(1, chunk(G.device) // G.shape[1])
    for rows, *parts in zip(*(x.split(height) for x in (G, *others))):
        yield rows.float(), *parts


def row_blocks(p: Tensor, seed: tuple, *tensors: Tensor) -> Iterator[tuple]:
    """Walk the rows of a weight that this process holds, and tensors of as many rows, a few (views) at a time: with the
    noise for rounding them if p is bf16, else None. It is drawn for blocks of the whole matrix, each from a seed of its
    own, so it is the same however many processes share the rows."""
    rows, *tensors = (torch.atleast_1d(x) for x in (own(p), *tensors))
    first, width = rows_of(p).start, p.shape[1:].numel()
    device = tensors[0].device
    height = max(1, chunk(device) // width)
    random = torch.Generator(device)
    for begin in range(first - first % height, first + len(rows), height):
        ours, noise = slice(max(begin - first, 0), begin - first + height), None
        if p.dtype == torch.bfloat16:
            random.manual_seed(hash((*seed, begin // height)) % 2**32)
            shape = min(height, p.numel() // width - begin), *rows.shape[1:]
            noise = torch.randint(1 << 16, shape, dtype=torch.int32, device=device, generator=random)
            noise = noise[max(first - begin, 0) :][: len(rows[ours])]
        yield *(x[ours] for x in (rows, *tensors)), noise


def projection_basis(gradient: Tensor, rank: int, svd: str = "randomized") -> Tensor:
    """Orthonormal basis of a gradient's leading directions on its smaller side (GaLore, arXiv 2403.03507).

    gradient: G [m, n]. Returns fp32 P of G = U S V^T: V_r [n, rank] if m >= n, U_r [m, rank] if m < n; min(m, n)
    columns if rank is more. svd: "exact", or "randomized": block Krylov iteration (Musco and Musco, arXiv 1504.05477)
    from the same random start each time, so that all processes of a distributed run find the same basis. Raises
    torch.linalg.LinAlgError if G is not finite or a decomposition fails."""
    G = gradient if is_tall(gradient) else gradient.T  # [larger, n]: P spans its rows
    n, width = G.shape[1], max(8, rank // 4)
    # Nine blocks, each a quarter of the rank wide (or 8): together about 2.25 times as wide as P, or more
    k = 9 * width
    low, high = torch.aminmax(gradient)
    size = torch.maximum(-low, high).item() or 1.0  # the largest magnitude in G; inf or nan if not all of it is finite
    # A small one is quick to do exactly, and then the last directions do not hang on the rounding errors of G.
    if svd == "exact" or n <= max(k, 256):
        if not math.isfinite(size):
            raise torch.linalg.LinAlgError("the gradient is not finite")
        return torch.linalg.svd(G.float(), full_matrices=False).Vh[:rank].T.contiguous()

    def half_products(X: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows of G and (G X)^T of them, over size: A = G^T G / size^2 then neither overflows nor vanishes."""
        for (rows,) in fp32_rows(G):
            yield rows, X.T @ rows.T / size  # CPUs are faster at a few rows times a matrix than at its transpose

    # The span of X, A X, A^2 X, ... of a random X holds G's leading directions, and K is an orthonormal basis of it. H
    # and tau are the Householder reflections (in LAPACK's form) that K comes from: it stays orthonormal even if A X
    # brings nothing new, as when G comes from few tokens, and in whatever precision products are set to. AK is A K.
    (H, K, AK), tau = G.new_zeros(3, n, k, dtype=torch.float32), G.new_zeros(k, dtype=torch.float32)
    X = torch.randn(n, width, dtype=torch.float32, device=G.device, generator=torch.Generator(G.device).manual_seed(0))
    for i in range(0, k, width):
        block, upto = slice(i, i + width), slice(0, i + width)
        if i > 0:
            AK[:, i - width : i] = X = sum(GX @ rows for rows, GX in half_products(X)).T / size
            X = torch.ormqr(H[:, :i], tau[:i], X, transpose=True)
        H[i:, block], tau[block] = torch.geqrf(X[i:])
        unit = F.pad(torch.eye(width, dtype=torch.float32, device=G.device), (0, 0, i, n - i - width))
        K[:, block] = X = torch.ormqr(H[:, upto], tau[upto], unit)
    # Of K's directions the best `rank` are the leading eigenvectors of K^T A K, [k, k]. eigh reads the lower triangle,
    # so of the last block's A X no more than X^T A X is needed.
    KAK = K.T @ AK
    KAK[-width:, -width:] = sum(GX @ GX.T for _, GX in half_products(X))
    if not KAK.isfinite().all():
        raise torch.linalg.LinAlgError("the gradient is not finite")
    leading = torch.linalg.eigh(KAK).eigenvectors.flip(1)[:, :rank]
    return torch.ormqr(H, tau, F.pad(leading, (0, 0, 0, n - k))).contiguous()  # K leading


# 4. Project in the backward pass: ProjectedAdam(..., in_backward=True)


class ProjectedGradient(Tensor):
    """What p.grad is in this mode: R of a gradient that was projected and freed as soon as autograd had it. One full
    gradient is alive at a time, while a plain backward pass ends with those of all active layers.

    Autograd adds the gradients of further micro-batches to p.grad: each is projected, and they add up as R. If a basis
    is due, or there is a residual, it takes the whole step's gradient: then the sum of G waits in host memory for the
    last of the optimizer's `micro_batches`. Whatever else takes p.grad for the gradient is told so at once: GradScaler,
    torch's clip_grad_norm_ (the optimizer has its own), DistributedDataParallel, another optimizer."""

    def __new__(cls, p: Tensor, optimizer: ProjectedAdam):
        # p.grad must be a tensor of p's shape. This one has no data: R, far smaller, is an attribute.
        dtype = getattr(p, "grad_dtype", None) or p.dtype  # newer torch lets a gradient have another dtype
        self = Tensor._make_wrapper_subclass(cls, p.shape, dtype=dtype, device=p.device)
        self.p, self.optimizer = weakref.ref(p), weakref.ref(optimizer)
        self.R, self.G, self.passes = None, None, 0  # G: the sum so far, for a basis that is due, or a residual
        self.partial = False  # whether these are of this process's tokens only
        self.lr: float | None = None  # at which a residual was added
        self.basis: Tensor | None = None  # in which R is
        return self

    @torch.no_grad()
    @without_autocast()
    def add_gradient(self, G: Tensor | None = None, R: Tensor | None = None) -> None:
        """Add what a backward pass gave: G, or R if that was computed already."""
        optimizer, p = self.optimizer(), self.p()
        self.passes, self.partial = self.passes + 1, is_sharded(p)
        group = projected_group(p, optimizer)
        if group is None or self.passes > optimizer.micro_batches:
            raise RuntimeError(
                f"{self.passes} backward passes without step and zero_grad: set optimizer.micro_batches to their "
                "number, let no other optimizer train these parameters, do not take_factors of a weight used twice"
            )
        if R is None and (group["residual"] or optimizer._basis_is_due(group, p)):
            if self.R is not None:
                raise RuntimeError("clip_grad_norm_ or step came before the last of the optimizer's micro_batches")
            self.G = G if self.G is None else self.G.to(G.device).add_(G)
            if self.passes < optimizer.micro_batches:
                self.G = self.G.cpu()
            else:
                self.low_rank(group)
        else:
            self.require_basis()
            R = optimizer._project(group, p, G) if R is None else R.float()
            self.R = R if self.R is None else self.R.add_(R)

    @without_autocast()
    def low_rank(self, group: dict) -> Tensor:
        """R of the whole step, or a scalar, as `ProjectedAdam._project`."""
        if self.G is not None:
            p = self.p()
            G, self.G, all_rows = self.G.to(compute_device(p)), None, None
            if self.partial:
                all_rows = mean_over_processes(G, p)
                self.partial, G = False, all_rows[rows_of(p)]
            self.R = self.optimizer()._project(group, p, G, all_rows)
            self.lr = float(group["lr"]) if group["residual"] and self.R.dim() else None
        self.require_basis()
        return self.R

    def require_basis(self) -> None:
        """Raise RuntimeError if R is in another basis than the optimizer's state has now: one may have been loaded."""
        now = self.optimizer().state[self.p()].get("basis")
        if self.basis is not None and now is not self.basis and (now is None or not torch.equal(now, self.basis)):
            raise RuntimeError("the optimizer's state has changed since the backward pass: zero_grad() and another one")
        self.basis = now

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        """What autograd does to p.grad, which is to add to it, and nothing else."""
        if func is torch.ops.aten.add_.Tensor and isinstance(args[0], cls):
            args[0].add_gradient(args[1])
            return args[0]
        raise RuntimeError(
            "this gradient was projected in the backward pass, by ProjectedAdam(in_backward=True): clip it by "
            "optimizer.clip_grad_norm_(max_norm), step with that optimizer only, call its zero_grad() before moving "
            "the model, or set in_backward=False (as transformers' Trainer, which always clips, needs)"
        )

    __torch_function__ = __torch_dispatch__  # also of what never reaches a kernel, as p.grad.shape

    def __repr__(self, **_) -> str:
        return f"ProjectedGradient(R={self.R})"


def projected_group(p: Tensor, optimizer: ProjectedAdam | None) -> dict | None:
    """The parameter group of p if the optimizer projects its gradient in the backward pass."""
    groups = optimizer.param_groups if optimizer is not None and optimizer.in_backward else []
    return next((g for g in groups if g["rank"] is not None and any(p is q for q in g["params"])), None)


def project_in_backward(group: dict, optimizer: ProjectedAdam) -> None:
    """Have the gradients of a group's matrices projected for an optimizer, if it is in this mode."""
    if group["rank"] is None or not optimizer.in_backward:
        return
    reference = weakref.ref(optimizer)  # a parameter must not keep a discarded optimizer, and its state, alive

    @torch.utils.hooks.unserializable_hook
    def hook(p: Tensor) -> None:
        optimizer = reference()
        # A sharded gradient is the mean over all processes, of which each has some rows: it is projected by `step`.
        if p.grad is None or not p.numel() or projected_group(p, optimizer) is None or is_sharded(p.grad):
            return
        if not isinstance(p.grad, ProjectedGradient):
            G, p.grad = p.grad, ProjectedGradient(p, optimizer)
            p.grad.add_gradient(G)
        elif p.grad.optimizer() is not optimizer:
            raise RuntimeError("another ProjectedAdam projects the gradient: set its in_backward to False or delete it")

    for p in (p for p in group["params"] if p.is_floating_point()):  # quantized ones are frozen
        # torch takes a hook only while the parameter requires a gradient; it stays when the parameter is frozen again.
        requires_grad = p.requires_grad
        p.requires_grad_().register_post_accumulate_grad_hook(hook)
        p.requires_grad_(requires_grad)


# 5. Project the factors of a gradient, G = dY^T X


class Linear(nn.Linear):
    """y = x W^T, [..., in_features] -> [..., out_features]. Once it hands over its factors (`take_factors`), its
    backward pass sees to the gradient of W first, lets go of x, and only then makes that of x, where autograd would
    hold x and both gradients at once."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.taker: tuple[weakref.ref, weakref.ref] | None = None  # see take_factors

    def __getstate__(self) -> dict:
        return self.__dict__ | {"taker": None}  # no optimizer has a copy's weight yet

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight  # once, as a parametrization may draw it at random
        if weight.requires_grad and self.taker is not None and not torch.compiler.is_compiling():
            optimizer, p = (reference() for reference in self.taker)
            group = projected_group(p, optimizer)
            if group is None or not group["residual"]:  # which moves W as soon as G is there: x's gradient comes first
                # Autograd runs WeightGradient's backward pass first, then x is free, then that of F.linear for x alone.
                return WeightGradient.apply(F.linear(x, weight.detach()), x, weight, self)
        return F.linear(x, weight)


def once_differentiable(backward: Callable) -> Callable:
    """Have a backward pass say that there is no second derivative. (torch's function of this name does not say so where
    the gradient that comes in needs none itself, as a loss's.)"""

    def checked(ctx, *grads: Tensor) -> tuple:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"{backward.__qualname__} has no second derivative: leave out create_graph")
        return backward(ctx, *grads)

    return checked


class WeightGradient(torch.autograd.Function):
    """The identity on y = x W^T, whose backward pass makes the gradient of W, or has R made from its factors."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, weight: Tensor, module: Linear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.module = weight, module
        return y.detach()  # not y itself, which could then not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        dY, X = (t.reshape(-1, t.shape[-1]).to(grad.dtype) for t in (grad, x))  # [tokens, m], [tokens, n]
        try:  # whether backward() adds to p.grad, as torch.autograd.grad and backward(inputs=...) do not
            adds = torch._C._will_engine_execute_node(ctx.next_functions[2][0])
        except RuntimeError:  # torch.autograd.grad with respect to W itself
            adds = False
        projected = adds and ctx.module.taker is not None and project_factors(ctx.module, ctx.weight, dY, X)
        return grad, None, None if projected else dY.T @ X, None


def take_factors(model: nn.Module, optimizer: ProjectedAdam) -> None:
    """Have every `Linear` of a model hand its factors to an optimizer that projects in the backward pass. From then on
    G is made only for new bases: of the 6 FLOP of a step per weight and token 2 become 2 (rank / m + rank / n), which
    is 29 % less for GaLore at rank 256 in a 7B that keeps its activations. (A weight with a residual needs G in each
    step, and hands over none; nor does a compiled module.) Hooks on a weight then get None, but for new bases."""
    for module in model.modules():
        if isinstance(module, Linear):
            # Under FSDP forward and backward pass see another tensor than this one, which the optimizer has.
            module.taker = weakref.ref(optimizer), weakref.ref(module.weight)


def project_factors(module: Linear, p: Tensor, dY: Tensor, X: Tensor) -> bool:
    """Add R of G = dY^T X to p.grad, at rank / m + rank / n of the cost of making G: R = dY^T (X P) if m >= n, else
    (P^T dY^T) X. False, and nothing done, if no optimizer projects p, or a new basis needs G (which is added here to
    that of a sharded p)."""
    optimizer, taken = (reference() for reference in module.taker)
    p = taken if is_sharded(taken) else p
    group = projected_group(p, optimizer)
    due = group is not None and optimizer._basis_is_due(group, p)
    if group is None or (due and not is_sharded(p)):
        return False
    if p.grad is None:
        p.grad = ProjectedGradient(p, optimizer)
    elif not isinstance(p.grad, ProjectedGradient) or p.grad.optimizer() is not optimizer:
        return False  # somebody set it: autograd adds to that
    if due:
        p.grad.add_gradient(dY.T @ X)
    else:
        P = optimizer.state[p]["basis"].to(X.dtype)
        p.grad.add_gradient(R=dY.T @ (X @ P) if is_tall(p) else (dY @ P).T @ X)
    return True


# 6. Weights that several processes share: FSDP2 (torch.distributed.fsdp.fully_shard)
#
# Each process holds some rows of every weight, a DTensor, and all of the small things: P, R and their moments. It
# projects its gradient, and R is the mean over all processes, as FSDP's own gradients are; only a new basis needs all
# rows. So bases and updates are alike, and each updates its own rows.


def is_sharded(x: Tensor | None) -> bool:
    return hasattr(x, "device_mesh")


def own(x: Tensor) -> Tensor:
    """The rows that this process holds; all of a tensor that is not sharded."""
    return x.to_local() if is_sharded(x) else x


def rows_of(p: Tensor) -> slice:
    """Which rows of a tensor `own` is. The last processes may hold fewer than the others, or none."""
    if not is_sharded(p):
        return slice(0, None)
    first = min(p.device_mesh.get_local_rank() * math.ceil(len(p) / p.device_mesh.size()), len(p))
    return slice(first, first + len(own(p)))


def own_rows(x: Tensor, p: Tensor) -> Tensor:
    """The rows of x that this process holds of p. x has all rows, or just these; ValueError if it has neither."""
    if x.shape == own(p).shape:
        return x
    if x.shape != p.shape:
        raise ValueError(f"{list(x.shape)} is neither all of {list(p.shape)} nor this process's part of it")
    return x[rows_of(p)]


def whole(x: Tensor, like: Tensor | None = None) -> Tensor:
    """All rows of x, of which each process has those that it has of `like` (or of x), on the device that computes."""
    like = x if like is None else like
    if not is_sharded(like) or like.device_mesh.size() == 1:
        return own(x).to(compute_device(like))
    mesh, rows = like.device_mesh, own(x)
    padded = rows.new_zeros(math.ceil(len(like) / mesh.size()), *rows.shape[1:], device=mesh.device_type)
    padded[: len(rows)] = rows
    gathered = padded.new_empty(mesh.size() * len(padded), *rows.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, padded, group=mesh.get_group())
    return gathered[: len(like)]


def joined(x: Tensor, p: Tensor) -> Tensor:
    """R, or squares, of all rows of p, from each process's part: put together if p is tall, else summed, in place."""
    if is_tall(p):
        return whole(x, p)
    if is_sharded(p):
        torch.distributed.all_reduce(x, group=p.device_mesh.get_group())
    return x


def mean_over_processes(x: Tensor, p: Tensor) -> Tensor:
    """x becomes the mean of what the processes that share p have of it."""
    torch.distributed.all_reduce(x, group=p.device_mesh.get_group())
    return x.div_(p.device_mesh.size())


def compute_device(p: Tensor) -> torch.device:
    """Where the arithmetic for p is done. Its shards may lie in host memory."""
    return torch.device(p.device_mesh.device_type) if is_sharded(p) else p.device


if __name__ == "__main__":
    from train import show_layers  # the command needs the files beside this one, the method does not

    show_layers()
