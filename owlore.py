"""OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection (arXiv 2405.18380). Needs nothing but torch.

Fine-tuning all of a large model needs, beside its weights, their gradients and two Adam moments. OwLore pays for a few
layers at a time, and little for each:

    1. score     D_l: how many outliers layer l has              outlier_distribution
    2. sample    every so often draw a few layers, p_l ~ D_l     sampling_probabilities, LayerSampler
    3. project   each gradient onto its leading directions,      projection_basis, ProjectedAdam
                 and run Adam in that low-rank space

Sampling on or off, projection on or off, gives four methods: full fine-tuning (off, off), GaLore (off, on), LISA
(uniform sampling, off) and OwLore (outlier sampling, on).

    python owlore.py --ckpt DIR --data FILE     shows the layers of a checkpoint
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

# 1. Score

CALIBRATION_ROWS = 32  # of calibration text, enough that D_l moves by a few percent at most with the rows drawn


@torch.no_grad()
def outlier_distribution(
    model: nn.Module, layers: Sequence[nn.Module], batches: Iterable, threshold: float = 13.0
) -> Tensor:
    """Share of outliers in each layer: OWL's layerwise outlier distribution (arXiv 2310.05175), OwLore's D_l.

        A_ij = |W_ij| * ||X_j||_2             X_j: input feature j over all calibration tokens
        D_l  = #{A_ij > threshold * mean(A)} / #{A_ij}        over all nn.Linear of layer l together

    model: run once per batch as `model(batch)`, in eval mode and without gradients. layers: its blocks. batches:
    calibration inputs. threshold: 13 for a 7B, 3 to 7 for smaller models. A batch is the model's only argument.
    Returns fp32 [L], fractions in [0, 1], on the CPU. Raises ValueError for no batches or a layer without nn.Linear.
    """
    linears = [[module for module in layer.modules() if isinstance(module, nn.Linear)] for layer in layers]
    if not linears or not all(linears):
        raise ValueError("outlier_distribution needs layers that each hold at least one nn.Linear")
    squares = {linear: torch.zeros(linear.in_features, device=linear.weight.device) for linear in sum(linears, [])}

    def add_squares(linear: nn.Linear, inputs: tuple) -> None:
        X = inputs[0].flatten(0, -2)  # [tokens, in_features]
        squares[linear] += torch.linalg.vector_norm(X, dim=0, dtype=torch.float32).square()

    training = {module: module.training for module in model.modules()}
    hooks = [linear.register_forward_pre_hook(add_squares) for linear in squares]
    count = 0
    try:
        model.eval()
        for batch in batches:
            model(batch)
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    if count == 0:
        raise ValueError("outlier_distribution needs at least one calibration batch")

    def scores(linear: nn.Linear) -> Tensor:
        return linear.weight.abs().float() * squares[linear].sqrt()  # A, [out_features, in_features]

    shares = []
    for group in linears:
        size = sum(linear.weight.numel() for linear in group)
        # A of a whole layer would not fit beside a 7B: it is computed twice, one matrix at a time.
        mean = sum(scores(linear).sum(dtype=torch.float64) for linear in group) / size
        outliers = sum((scores(linear) > threshold * mean).sum() for linear in group)
        shares.append((outliers / size).float().cpu())
    return torch.stack(shares)


@torch.no_grad()
def hill_alpha(weight: Tensor) -> float:
    """PL_Alpha_Hill, the Hill estimate of a power law's exponent in the spectrum of a matrix; smaller is
    heavier-tailed.

        alpha = 1 + k / sum_{i=1..k} ln(e_{n-i+1} / e_{n-k}),   k = n / 2

    weight: [m, n], its eigenvalues e_1 <= ... <= e_n those of W^T W (of W W^T where that is smaller: the same without
    the zeros). 1 where e_{n-k} is 0: no tail is heavier. Raises ValueError unless both sides are at least 2.
    """
    if weight.dim() != 2 or min(weight.shape) < 2:
        raise ValueError(f"hill_alpha needs a matrix of at least 2 x 2, not {list(weight.shape)}")
    e = torch.linalg.svdvals(weight.float()).square().double().flip(0)  # ascending
    n = len(e)
    k = n // 2
    return 1 + k / (e[n - k :] / e[n - k - 1]).log().sum().item()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rho of two series [L]: the correlation of their ranks, ties sharing their mean rank; nan where one is
    constant."""
    ranks = [(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2 for x in (torch.as_tensor(a), torch.as_tensor(b))]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def default_threshold(dim: int) -> float:
    """Outlier threshold for a model's width: the paper's 13 at 4096 and above, and less below (it names 3 to 7 for
    smaller models, whose scores are spread less)."""
    return min(13.0, max(3.0, 13 * math.sqrt(dim / 4096)))


# 2. Sample


def sampling_probabilities(outliers: Tensor, mode: str = "outlier") -> Tensor:
    """Probability of each layer to be drawn: [L], sums to 1.

    outliers: D_l, [L], in any unit. mode:
        outlier     p_l = D_l / sum(D), and uniform where every D_l is 0 (no outliers, nothing to prefer)
        uniform     p_l = 1 / L, as LISA (arXiv 2403.17919)
        reverse     max(p) - p_l, normalised
        increasing  in proportion to 1, 2, ..., L; decreasing: to L, ..., 2, 1
    Raises ValueError for another mode, or outliers that are negative or not finite.
    """
    D = torch.as_tensor(outliers)
    D = D if D.is_floating_point() else D.float()
    if D.dim() != 1 or not len(D) or not (torch.isfinite(D) & (D >= 0)).all():
        raise ValueError("outliers must be finite and not negative, one per layer")
    uniform, increasing = torch.ones_like(D), torch.arange(1, len(D) + 1).to(D)
    modes = {"outlier": D, "uniform": uniform, "reverse": D.max() - D}
    modes |= {"increasing": increasing, "decreasing": increasing.flip(0)}
    if mode not in modes:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(modes)}")
    weights = modes[mode] if modes[mode].sum() > 0 else uniform
    return weights / weights.sum()


class LayerSampler:
    """Draws the layers to train next, `active` of them without replacement, and freezes all others.

    layers: the model's blocks. probabilities: [L]. A layer of probability 0 is drawn only where fewer than `active`
    layers have a positive one; then the places left are filled uniformly from those of probability 0.
    Raises ValueError where `active` is not between 1 and L, or L probabilities are not given.
    """

    def __init__(self, layers: Sequence[nn.Module], probabilities: Tensor, active: int, seed: int = 0):
        self.layers, self.active = layers, active
        self.probabilities = torch.as_tensor(probabilities).double().cpu()
        if self.probabilities.shape != (len(layers),):
            raise ValueError(f"{len(layers)} layers need as many probabilities, not {list(self.probabilities.shape)}")
        if not 1 <= active <= len(layers):
            raise ValueError(f"active must be between 1 and the {len(layers)} layers there are, not {active}")
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: list[int] = []

    def resample(self) -> list[int]:
        """Draw anew; sets requires_grad on every parameter of every layer. Returns the drawn layers, sorted."""
        zero = (self.probabilities == 0).nonzero().flatten()
        count = min(self.active, len(self.layers) - len(zero))
        drawn = zero[torch.randperm(len(zero), generator=self.generator)[: self.active - count]].tolist()
        if count:
            drawn += torch.multinomial(self.probabilities, count, generator=self.generator).tolist()
        self.activate(sorted(drawn))
        return self.drawn

    def activate(self, drawn: list[int]) -> None:
        """Freeze all layers but these. A frozen layer keeps no gradient."""
        self.drawn = drawn
        for index, layer in enumerate(self.layers):
            for parameter in layer.parameters():
                parameter.requires_grad_(index in drawn)
                if index not in drawn:
                    parameter.grad = None

    def state_dict(self) -> dict:
        """What it takes to draw the same layers again from here."""
        return {"generator": self.generator.get_state(), "drawn": list(self.drawn)}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken, with the layers that were active then."""
        self.generator.set_state(state["generator"])
        self.activate(list(state["drawn"]))


# 3. Project

CHUNK = 2**21  # elements handled at once wherever fp32 copies of a bf16 matrix are needed: 8 MiB
KRYLOV_BLOCKS = 9  # in a randomized SVD, each a quarter of the rank wide: together 2.25 times as wide as P


def row_chunks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Walk tensors of the same number of rows together, a few rows (views) at a time, CHUNK elements of the first."""
    tensors = tuple(torch.atleast_1d(tensor) for tensor in tensors)
    rows = max(1, CHUNK * len(tensors[0]) // max(1, tensors[0].numel()))
    return zip(*(tensor.split(rows) for tensor in tensors))


def projection_basis(gradient: Tensor, rank: int, svd: str = "randomized") -> Tensor:
    """Orthonormal basis of a gradient's leading directions on its smaller side (GaLore, arXiv 2403.03507).

    gradient: G [m, n]. Returns fp32 P: V_r [n, rank] where m >= n, U_r [m, rank] where m < n, of G = U S V^T; min(m, n)
    columns where rank is more. svd: "exact", or "randomized" block Krylov iteration (Musco and Musco, arXiv
    1504.05477), which draws from torch's global generator. Entries of G that are not finite count as 0, which LAPACK
    would stop at. Raises torch.linalg.LinAlgError where a decomposition does not converge all the same.
    """
    G = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.T  # [larger, smaller]: P spans its rows
    smaller = G.shape[1]
    width = max(8, rank // 4)
    if svd == "exact" or KRYLOV_BLOCKS * width >= smaller:
        return torch.linalg.svd(G.float().nan_to_num(0, 0, 0), full_matrices=False).Vh[:rank].T.contiguous()

    def gram(X: Tensor) -> Tensor:
        """G^T G X without an fp32 copy of G. X: [smaller, k]."""
        pieces = [G] if G.dtype == torch.float32 else (rows.float() for (rows,) in row_chunks(G))
        # G^T (G X), transposed: CPUs multiply a few rows by a matrix faster than a matrix by a few columns.
        return sum((X.T @ rows.T @ rows).T for rows in pieces).nan_to_num(0, 0, 0)

    # Block Krylov: K spans X, AX, A^2 X, ... of A = G^T G and a random X, all of which hold leading directions. Keeping
    # them all takes half the products that iterating on the last alone does, for more energy.
    K, AK = torch.zeros(2, smaller, KRYLOV_BLOCKS * width, device=G.device)
    X = torch.randn(smaller, width, device=G.device)
    for n in range(0, KRYLOV_BLOCKS * width, width):
        # Where K holds all of G's directions already, X has nothing new: noise gives it something to make a basis of.
        X = X + 1e-6 * (X.std() + 1e-30) * torch.randn_like(X)
        for _ in range(2):  # once leaves rounding errors along K
            X = orthonormal(X - K[:, :n] @ (K[:, :n].T @ X))
        K[:, n : n + width] = X
        AK[:, n : n + width] = X = gram(X)
    # Of K's directions keep the `rank` best: leading eigenvectors of K^T A K, [KRYLOV_BLOCKS * width] squared.
    leading = torch.linalg.eigh(K.T @ AK).eigenvectors.flip(1)[:, :rank]
    return K @ leading


def orthonormal(X: Tensor) -> Tensor:
    """An orthonormal basis of X's columns, X L^-T with L L^T = X^T X (Cholesky QR): a few small products, where a GPU
    is slow at Householder's QR. It squares X's condition number, for which fp64 has room.

    X: fp32 [n, k], k linearly independent columns. Returns fp32 [n, k]."""
    X = X.double()
    L = torch.linalg.cholesky_ex(X.T @ X).L
    return torch.linalg.solve_triangular(L, X.T, upper=False).T.float()


def stochastic_round(x: Tensor) -> Tensor:
    """Round fp32 to bf16, up or down at random so that the mean is x: an update below bf16's resolution (1 part in 256)
    then moves a weight by the right amount on average, where rounding to nearest would lose it every time.

    bf16 is the upper half of fp32: uniform noise added to the lower half carries into the upper with just the
    probability wanted. Uses torch's global generator. Overwrites x.
    """
    bits = x.view(torch.int32)
    bits += torch.empty_like(bits).random_(0, 1 << 16)
    bits &= -(1 << 16)
    return x.to(torch.bfloat16)


class ProjectedAdam(torch.optim.Optimizer):
    """AdamW whose matrices are updated in a low-rank space (GaLore, arXiv 2403.03507), with the state in fp32.

    A parameter group with a `rank` is projected: for the gradient G [m, n] of each of its matrices,

        R = G P,    P [n, rank]    where m >= n           R = P^T G,  P [m, rank]    where m < n
        N = Adam's normalised step for R:  m_t / (1 - beta1^t) / (sqrt(v_t / (1 - beta2^t)) + eps)
        W = (1 - lr * weight_decay) W - lr * scale * N P^T              ... - lr * scale * P N

    P (`projection_basis`) is computed from the matrix's own gradient, anew every `update_gap` steps of that matrix
    (default 100); `scale` defaults to 1. A group without `rank` is plain AdamW.

    A linear that has the factors of its gradient, G = dY^T X, may offer them to `weight.project_product(weight, dY, X)`
    in place of G: between refreshes G itself is then never made.

    Projection happens in the backward pass: once autograd has a matrix's gradient it is projected, added to what this
    step has accumulated, [m, rank] or [rank, n], and freed. `p.grad` of a projected parameter is therefore None after
    backward(); one set by hand is projected by `step`. A step consumes the accumulated gradients.

    A parameter that no longer requires a gradient loses its state at the next `step` or `zero_grad`: frozen layers cost
    nothing. bf16 weights are written back by `stochastic_round`.

    lr, weight_decay, betas (of both moments) and eps (in the denominator) are those of torch.optim.AdamW, and a group
    may have its own.

    found_inf: None, or a scalar bool tensor on the parameters' device (the name is torch's own): where it is true,
    `step` leaves weights and moments as they are. The device decides, and nothing waits for it; Adam's bias correction
    counts the step nevertheless.

    failed_refreshes: how many new bases were not to be had (see `_refresh`) since this object was made.

    rotate: whether the first moment is turned into the new basis when P changes; it stays as it is in the published
    code.

    svd: "randomized" or "exact". Raises ValueError for settings out of range and for projecting what is not a matrix.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        svd: str = "randomized",
        rotate: bool = True,
    ):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"lr {lr}, betas {betas}, eps {eps} or weight_decay {weight_decay} is out of range")
        if svd not in ("randomized", "exact"):
            raise ValueError(f"svd {svd!r} is not randomized or exact")
        self.failed_refreshes: Tensor | int = 0
        self.found_inf: Tensor | None = None
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, svd=svd, rotate=rotate)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; with a `rank`, its parameters' gradients are projected from now on as soon as they exist."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        if group.get("rank") is None:
            return
        group.setdefault("update_gap", 100)
        group.setdefault("scale", 1.0)
        if group["rank"] < 1 or group["update_gap"] < 1:
            raise ValueError(f"rank {group['rank']} and update_gap {group['update_gap']} must be at least 1")
        optimizer = weakref.ref(self)  # the parameters must not keep a discarded optimizer, and its state, alive

        def project(parameter: Tensor) -> None:
            if optimizer() is not None and parameter.grad is not None:  # None where project_product did the work
                optimizer()._project(parameter, optimizer().param_groups[index])

        def project_product(parameter: Tensor, dY: Tensor, X: Tensor) -> bool:
            if optimizer() is None:
                return False
            return optimizer()._project_product(parameter, optimizer().param_groups[index], dY, X)

        for parameter in group["params"]:
            if parameter.dim() != 2:
                raise ValueError(f"only matrices can be projected, not a parameter of shape {list(parameter.shape)}")
            requires_grad = parameter.requires_grad
            parameter.requires_grad_().register_post_accumulate_grad_hook(project)  # kept while the parameter is frozen
            parameter.requires_grad_(requires_grad)
            parameter.project_product = project_product

    @torch.no_grad()
    def _project_product(self, parameter: Tensor, group: dict, dY: Tensor, X: Tensor) -> bool:
        """`_project` of G = dY^T X (dY: [tokens, m], X: [tokens, n]) without making G, at rank / m + rank / n of the
        cost: R = dY^T (X P) where m >= n, (dY P)^T X where m < n. False, and nothing done, where a new basis needs G
        itself."""
        state = self.state[parameter]
        if "basis" not in state or ("gradient" not in state and state.get("step", 0) % group["update_gap"] == 0):
            return False
        P = state["basis"].to(X.dtype)
        R = dY.T @ (X @ P) if parameter.shape[0] >= parameter.shape[1] else (dY @ P).T @ X
        state["gradient"] = state["gradient"].add_(R) if "gradient" in state else R.float()
        return True

    @torch.no_grad()
    def _project(self, parameter: Tensor, group: dict) -> None:
        """Move parameter.grad, G [m, n], into the low-rank sum of this step's micro-batches, and free it."""
        G, parameter.grad = parameter.grad, None
        state, tall = self.state[parameter], G.shape[0] >= G.shape[1]
        if "gradient" not in state:  # the first micro-batch of a step: P must not change before its last
            if state.get("step", 0) % group["update_gap"] == 0:
                self._refresh(state, G, group)
            P = state["basis"]
            state["gradient"] = P.new_zeros((G.shape[0], P.shape[1]) if tall else (P.shape[1], G.shape[1]))
        P, R = state["basis"], state["gradient"]
        if tall:
            for G_rows, R_rows in row_chunks(G, R):
                R_rows.addmm_(G_rows.float(), P)  # R += G P
        else:
            for G_rows, P_rows in row_chunks(G, P):
                R.addmm_(P_rows.T, G_rows.float())  # R += P^T G

    def _refresh(self, state: dict, G: Tensor, group: dict) -> None:
        """Recompute P from G, and turn the first moment into the new basis (`rotate`). Where G is not finite or its SVD
        fails, the last basis is kept (any will do where there is none) and `failed_refreshes` counts it: a scalar
        tensor, so that nothing waits for the device."""
        tall, rank = G.shape[0] >= G.shape[1], min(group["rank"], *G.shape)
        good = torch.isfinite(torch.linalg.vector_norm(G, dtype=torch.float32))
        last = state["basis"] if "basis" in state else torch.eye(min(G.shape), rank, device=G.device)
        try:
            P = torch.where(good, projection_basis(G, rank, group["svd"]), last)
        except torch.linalg.LinAlgError:
            P, good = last, torch.zeros_like(good)
        self.failed_refreshes = self.failed_refreshes + ~good
        if "exp_avg" in state and group["rotate"]:
            rotation = state["basis"].T @ P  # [rank, rank]: coordinates in the old basis -> in the new one
            m = state["exp_avg"]
            state["exp_avg"] = m @ rotation if tall else rotation.T @ m
        state["basis"] = P

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """Update every parameter that has a gradient. closure: recomputes the loss, which is returned."""
        loss = torch.enable_grad()(closure)() if closure is not None else None
        self._drop_frozen()
        for group, parameter, gradient in self._gradients():
            state = self.state[parameter]
            state.pop("gradient", None)
            if "exp_avg" not in state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(gradient, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(gradient, dtype=torch.float32)
            state["step"] += 1
            rest = state["step"], group, self.found_inf
            if group.get("rank") is None:
                parts = row_chunks(parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
                updates = ((p, adam_step(g.float(), m, v, *rest)) for p, g, m, v in parts)
            else:
                N = adam_step(gradient, state["exp_avg"], state["exp_avg_sq"], *rest).mul_(group["scale"])
                left, right = (N, state["basis"].T) if parameter.shape[0] >= parameter.shape[1] else (state["basis"], N)
                updates = ((p, rows @ right) for p, rows in row_chunks(parameter, left))  # never all of N P^T at once
            for p, update in updates:
                write_back(p, update, group, self.found_inf)
        return loss

    def _gradients(self) -> Iterable[tuple[dict, Tensor, Tensor]]:
        """(group, parameter, gradient as `step` will use it) of every parameter that has one."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if group.get("rank") is not None:
                    if gradient is not None:
                        self._project(parameter, group)
                    gradient = self.state[parameter].get("gradient") if parameter in self.state else None
                if gradient is not None:
                    yield group, parameter, gradient

    def _drop_frozen(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    self.state.pop(parameter, None)
                    parameter.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, the accumulated low-rank ones too, and the state of parameters now frozen."""
        super().zero_grad(set_to_none)
        for state in self.state.values():
            state.pop("gradient", None)
        self._drop_frozen()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients that `step` will use, low-rank and plain, to a joint 2-norm of at most max_norm.

        Returns the norm before, a scalar tensor on the gradients' device (without waiting for it)."""
        gradients = [gradient for _, _, gradient in self._gradients()]
        if not gradients:
            return torch.tensor(0.0)
        norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]).norm()
        for gradient in gradients:
            gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a `state_dict()`, bit for bit."""
        # torch's own would cast fp32 moments to the dtype of bf16 weights: it only gets the groups.
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, state in state_dict["state"].items():
            device = parameters[index].device
            copy = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}
            self.state[parameters[index]] = copy


def unless(skip: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """`new`, but `old` where the scalar `skip` is true."""
    return new if skip is None else torch.where(skip, old, new)


def adam_step(g: Tensor, m: Tensor, v: Tensor, step: int, group: dict, skip: Tensor | None) -> Tensor:
    """Update Adam's moments m, v in place with the gradient g, all fp32 and of one shape (arXiv 1412.6980, algorithm
    1); returns the normalised step, of that shape. step: how many there were with this one. skip: see `unless`."""
    beta1, beta2 = group["betas"]
    m.copy_(unless(skip, m, m.lerp(g, 1 - beta1)))  # m = beta1 m + (1 - beta1) g
    v.copy_(unless(skip, v, (beta2 * v).addcmul_(g, g, value=1 - beta2)))  # v = beta2 v + (1 - beta2) g^2
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    return torch.div(m, denominator, out=denominator).div_(1 - beta1**step)


def write_back(p: Tensor, update: Tensor, group: dict, skip: Tensor | None) -> None:
    """p = (1 - lr * weight_decay) p - lr * update, in fp32, for (some rows of) a parameter of any dtype; update has p's
    shape. skip: see `unless`."""
    old = p if p.dtype == torch.float64 else p.float()
    new = (old * (1 - group["lr"] * group["weight_decay"])).sub_(update, alpha=group["lr"])
    new = unless(skip, old, new)
    p.copy_(stochastic_round(new) if p.dtype == torch.bfloat16 else new)


# Seeing it


def layer_chart(columns: dict[str, Sequence[float]], bars: Sequence[float], width: int = 30) -> str:
    """A table with one row per layer: columns of numbers, by heading, and a bar for each row, the longest `width`
    wide."""
    cells = zip(*([f"{value:.4f}" for value in values] for values in columns.values()))
    rows = [["layer", *columns]] + [[str(n), *row] for n, row in enumerate(cells)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    longest = max(bars) or 1.0
    lines = []
    for row, bar in zip(rows, [0.0, *bars]):
        eighths = round(8 * width * bar / longest)
        block = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
        lines.append("  ".join(cell.rjust(w) for cell, w in zip(row, widths)) + "  " + block)
    return "\n".join(line.rstrip() for line in lines)


@contextlib.contextmanager
def picture(file: str | Path, flag: str, rows: int, height: float) -> Iterator:
    """Draw into `rows` axes over each other, sharing x; the block's end saves them. file is what `flag` was given.
    Raises InputError without matplotlib, or where the file cannot be written."""
    from data import InputError

    try:
        from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    except ImportError:
        raise InputError("--plot: needs one more package: pip install matplotlib") from None
    figure = Figure(figsize=(9, height), layout="constrained")
    yield figure.subplots(rows, 1, sharex=True)
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {file}: cannot write the picture ({error})") from None
    print(f"saved: {file}")


def main() -> None:
    """`python owlore.py --ckpt DIR --data FILE`: chart each layer's outliers, Hill alpha and sampling probability."""
    from tqdm import tqdm

    from data import TINY, Parser, load_dataset, load_records, load_tokenizer  # here: this file can be copied alone
    from model import load_model

    parser = Parser(description="Show each layer's outlier share, Hill alpha and sampling probability.")
    parser.add_argument("--ckpt", required=True, help="checkpoint folder, Meta's or Hugging Face's layout")
    parser.add_argument("--data", default=str(TINY / "train.json"), help="calibration text (default: that of tiny/)")
    parser.add_argument("--threshold", type=float, help="default: 13 at 4096 dimensions, less for smaller models")
    parser.add_argument("--seq-len", type=int, help="tokens in a row (default: 512, or the context if shorter)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="which rows are drawn (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="draw the chart as a picture, too")
    args = parser.parse_args()
    model = load_model(args.ckpt, args.device, torch.bfloat16 if args.device.startswith("cuda") else torch.float32)
    context = model.config.max_seq_len
    seq_len = min(512, context) if args.seq_len is None else args.seq_len
    if not 1 <= seq_len <= context:
        parser.error(f"--seq-len {seq_len} is not between 1 and the model's context of {context}")
    threshold = default_threshold(model.config.dim) if args.threshold is None else args.threshold
    dataset = load_dataset(load_records(args.data), load_tokenizer(args.ckpt), seq_len)
    rows = tqdm(dataset.sample(CALIBRATION_ROWS, args.seed), "scoring outliers", leave=False)
    outliers = outlier_distribution(model, model.layers, (row.to(args.device) for row in rows), threshold)
    weights = [[m.weight for m in layer.modules() if isinstance(m, nn.Linear)] for layer in model.layers]
    bar = tqdm(weights, "Hill alpha", leave=False)
    alphas = [sum(hill_alpha(weight) for weight in layer) / len(layer) for layer in bar]  # mean over a layer's matrices
    p = sampling_probabilities(outliers)
    print(f"{args.ckpt}: outliers above {threshold:g} times the layer's mean, on {args.data}")
    columns = {"outliers %": (100 * outliers).tolist(), "Hill alpha": alphas, "p": p.tolist()}
    print(layer_chart(columns, p.tolist()))
    rho = rank_correlation(outliers, torch.tensor(alphas))
    # The paper reads outliers as a heavy tail, a small alpha: it expects a negative correlation.
    print(f"rank correlation of outliers and Hill alpha: {rho:+.2f} (the paper's reading: negative)")
    if args.plot:
        with picture(args.plot, "--plot", len(columns), height=6) as axes:
            for axis, (name, values) in zip(axes, columns.items()):
                axis.bar(range(len(values)), values)
                axis.set(ylabel=name)
            axes[0].set(title=f"{args.ckpt}: ρ = {rho:+.2f}")
            axes[-1].set(xlabel="layer")


if __name__ == "__main__":
    from data import run_command

    run_command(main)
