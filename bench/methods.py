"""Which method, and which of its settings, is best: runs of train.py on one checkpoint, data and token budget.

    methods     full fine-tuning, GaLore, LoRA, LISA and OwLore, also at equal active layers and at equal memory
    sampling    OwLore with each way to draw layers, and with a floor under the probabilities
    budget      few layers at a high rank or many at a low one, within the memory of LoRA, of LISA and as published
    default     train.py's default beside 20 of 32 layers that are drawn, and beside the other methods
    unseen      what ended best, and its rivals, on validation data on which nothing was chosen
    longer      what ended best, and LoRA, in runs of three times as many steps
    draws       20 of 32 layers drawn in turns, uniformly, and with the moments of resting layers kept
    residual    20 of 32 layers with and without what the projection leaves out of the gradient
    projection  all layers at a low rank: warm-up, another beta2, other gaps and scales, and the rest of the gradient
    moments     what becomes of Adam's moments when the basis changes: kept, reset, or the first one rotated into it
    layers      active layers x rank, at equal tokens, equal time and equal memory, also as a picture
    recipe      the published recipe, with one setting changed at a time
    embeddings  embedding and head frozen; projected or in full, at a tenth of the rate or at the rate
    packing     one record a row, or as many as fit, at equal tokens

Every row of a table has its own learning rate: the best on seed 0 out of --lrs, a grid that is extended as long as the
best is at its end, and of any others at which there is a finished run. All seeds then run at that one. A finished run
is kept in bench/results/methods-runs.jsonl, with the commit it was made by, under its flags and a checksum of
checkpoint and data: a study that was interrupted goes on where it was, and --finished writes the tables of those that
are there already, and names what they lack. (Some at scale 0.5, by 745c8cd and 59a2716, were made as twice the residual
at half the rate: without weight decay that is the same.) --jobs runs several at once, as fill a GPU (with
OMP_NUM_THREADS=1, and CUDA's MPS if it is there).

    python bench/methods.py methods sampling --ckpt tiny --data tiny/train.json --val-data tiny/val.json --seq-len 72
"""

import argparse
import bisect
import contextlib
import datetime
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from memory import measure, parse_shape  # noqa: E402

import owlore  # noqa: E402
import train  # noqa: E402
from data import InputError, atomic_write, command  # noqa: E402
from owlore import LayerSampler, ProjectedAdam, is_tall, project, sampling_probabilities  # noqa: E402

RESULTS = ROOT / "bench" / "results"
CACHE = RESULTS / "methods-runs.jsonl"
MIB = 2**20

# What a run may do otherwise than train.py


class KeepMoments(ProjectedAdam):
    """As in the published code: the moments stay, though the first one's coordinates are those of the basis before."""

    def _project(self, group: dict, p: Tensor, G: Tensor, *args) -> Tensor:
        before = self.state[p].get("exp_avg")
        R = super()._project(group, p, G, *args)
        if before is not None and "exp_avg" in self.state[p]:
            self.state[p]["exp_avg"] = before
        return R


class ResetMoments(ProjectedAdam):
    """Both moments begin anew, and with them the steps that Adam's bias correction counts."""

    def _project(self, group: dict, p: Tensor, G: Tensor, *args) -> Tensor:
        due = self._basis_is_due(group, p)
        R = super()._project(group, p, G, *args)
        for key in ("exp_avg", "exp_avg_sq", "step") if due else ():
            self.state[p].pop(key, None)
        return R


class Fira(ProjectedAdam):
    """The residual as Fira has it (arXiv 2410.01623), with |N| of the same step: whole gradients wait until then."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"in_backward": False})

    def _update(self, group: dict, p: Tensor, g: Tensor, seed: tuple) -> None:
        super()._update(group, p, g, seed)
        state = self.state[p]
        if group["rank"] is None or "exp_avg" not in state:
            return
        (beta1, beta2), t, P, tall = group["betas"], state["step"], state["basis"], is_tall(p)
        R = project(g, P)
        N = state["exp_avg"] / (1 - beta1**t)
        N /= (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
        gain = N.norm(dim=int(tall), keepdim=True) / R.norm(dim=int(tall), keepdim=True).clamp(min=1e-30)
        outside = gain * (g - (R @ P.T if tall else P @ R))
        norm = outside.norm()
        state["outside"] = torch.minimum(norm, owlore.MAX_GROWTH * state.get("outside", norm))
        p.add_(outside * (state["outside"] / norm.clamp(min=1e-30)), alpha=-group["lr"])


class Warmup(ProjectedAdam):
    """The learning rate rises linearly in the first six steps; before the backward pass, as that adds a residual."""

    taken = 0

    def zero_grad(self, *args) -> None:
        self.taken += 1
        for group in self.param_groups:
            group["lr"] *= min(1, self.taken / 6)  # train.py sets it anew for each step
        super().zero_grad(*args)


class FiraWarmup(Warmup, Fira):
    """Both."""


class Parked(ProjectedAdam):
    """A resting layer's moments, with the basis they belong to, wait for its next turn, as in host memory."""

    def _drop_frozen(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if not p.requires_grad):
            p.grad = None


class Turns(LayerSampler):
    """Draws the layers that are furthest behind their share, p_l * active of every draw, so no layer waits long. Those
    of a high p are drawn more often than by independent draws, which make shares more equal."""

    def resample(self) -> list[int]:
        share = (self.active * self.probabilities / self.probabilities.sum()).clamp(max=1)
        first = torch.rand(len(share), generator=self.generator, dtype=torch.float64)
        owed = getattr(self, "owed", first) + share
        self.owed = owed.index_add(0, owed.topk(self.active).indices, -torch.ones_like(owed[: self.active]))
        self.activate(sorted(owed.topk(self.active).indices.tolist()))
        return self.drawn


def random_basis(gradient: Tensor, rank: int, svd: str) -> Tensor:
    """Random directions, not the gradient's leading ones: what LoRA's A has at first (Flora, arXiv 2402.03293)."""
    generator = torch.Generator(gradient.device).manual_seed(abs(hash(gradient.sum().item())))
    return torch.linalg.qr(torch.randn(min(gradient.shape), rank, device=gradient.device, generator=generator)).Q


SLOW = {"norms_lr_ratio": 0.1}
RESIDUAL = {"residual": True} | SLOW
SLOW_EMBEDDINGS = {"embeddings": "projected", "embeddings_lr_ratio": 0.1}
HALF = {"residual": True, "scale": 0.5, "norms_lr_ratio": 0.05}  # as by default with more than 5 of 32 layers

FLOOR = 0.5  # of the uniform probability: no layer's falls below


def floored(outliers: Tensor, mode: str) -> Tensor:
    """The mode's probabilities, mixed with uniform ones."""
    return (1 - FLOOR) * sampling_probabilities(outliers, mode) + FLOOR / len(outliers)


CHANGES = {
    "": contextlib.nullcontext(),
    "keep": patch.object(train, "ProjectedAdam", KeepMoments),
    "reset": patch.object(train, "ProjectedAdam", ResetMoments),
    "fira": patch.object(train, "ProjectedAdam", Fira),
    "warmup": patch.object(train, "ProjectedAdam", Warmup),
    "fira, warmup": patch.object(train, "ProjectedAdam", FiraWarmup),
    "growth": patch.object(owlore, "MAX_GROWTH", 1e9),
    "parked": patch.object(train, "ProjectedAdam", Parked),
    "turns": patch.object(train, "LayerSampler", Turns),
    "beta2": patch.object(train, "ProjectedAdam", partial(ProjectedAdam, betas=(0.9, 0.95))),
    "random": patch.object(owlore, "projection_basis", random_basis),
    "floor": patch.object(train, "sampling_probabilities", floored),
}

# Runs


def complete(args: argparse.Namespace, flags: dict) -> dict:
    """OwLore's and GaLore's flags with the published numbers in place of those left out, but at least 4 layers and rank
    32: what a study says of them does not change with train.py's defaults."""
    if flags["method"] == "galore":
        return {"rank": max(32, args.config.dim // 16), "update_gap": 100, "embeddings": "full"} | flags
    if flags["method"] != "owlore":
        return flags
    active, rank = math.ceil(args.config.n_layers * 5 / 32), args.config.dim // 16
    known = {"sampling": "outlier", "active": min(max(4, active), args.config.n_layers), "interval": 50}
    known |= {"rank": max(32, rank), "update_gap": 100, "embeddings": "full"}
    known |= {"residual": False, "scale": 1.0, "norms_lr_ratio": 1.0} | flags
    return known if known["embeddings"] == "frozen" else {"embeddings_lr_ratio": 1.0} | known


class Unfinished(Exception):
    """A run that is wanted of the finished ones, and not among them."""


def checksum(args: argparse.Namespace) -> int:
    """Of the checkpoint and the data; not of config.json, which may say the same in other words."""
    files = sorted(path for path in Path(args.ckpt).iterdir() if path.is_file() and path.name != "config.json")
    files += [Path(path) for path in (args.data, args.val_data) if path]
    total = 0
    try:
        for path in files:
            total = zlib.crc32(path.read_bytes(), total)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    return total


@lru_cache(1)
def cache_of_size(size: int) -> dict[str, dict]:
    """The cache's values, while the file is that large: it only grows."""
    entries = map(json.loads, CACHE.read_text().splitlines() if size else [])
    return {json.dumps(entry["key"], sort_keys=True): entry["value"] for entry in entries}


def known() -> dict[str, dict]:
    """The cache's values. The file is read again when it has grown: several studies may run at once."""
    return cache_of_size(CACHE.stat().st_size if CACHE.exists() else 0)


def whole_key(args: argparse.Namespace, key: dict) -> dict:
    return {"ckpt": args.name, "data": Path(args.data).name, "files": args.files, **key}


def cached(args: argparse.Namespace, key: dict, compute: Callable[[], dict], finished: bool = False) -> dict:
    """The cache's value of a key, computed and added where there is none. Raises Unfinished instead if only finished
    ones are wanted."""
    key = whole_key(args, key)
    if (name := json.dumps(key, sort_keys=True)) in known():
        return known()[name]
    if finished:
        raise Unfinished
    value = compute()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    entry = {"key": key, "value": value, "date": str(datetime.date.today()), "commit": commit}
    with open(CACHE, "a") as file:
        file.write(json.dumps(entry) + "\n")
    return value


def command_line(args: argparse.Namespace, flags: dict) -> list[str]:
    """train.py's arguments: the flags, and those that all runs share."""
    names = ("ckpt", "data", "val_data", "steps", "epochs", "batch_size", "seq_len")
    shared = {name: getattr(args, name) for name in names}
    flags = {"device": args.device, "dtype": args.dtype, **shared, **flags}
    flags["eval_every"] = flags["steps"] or 2**31 - 1  # an evaluation on the way would only cost time
    given = {flag: value for flag, value in flags.items() if value is not None}
    pairs = [(f"--{flag.replace('_', '-')}", value) for flag, value in given.items()]
    words = []
    for flag, value in pairs:
        words += [flag if value is True else flag.replace("--", "--no-") if value is False else f"{flag}={value}"]
    return words


def fill(args: argparse.Namespace, flags: dict) -> argparse.Namespace:
    """All flags of a run, train.py's defaults among them."""
    filled = train.flag_parser().parse_args(command_line(args, {**flags, "out": "-"}))
    return train.decide_settings(filled, args.config)


def run_key(args: argparse.Namespace, flags: dict, change: str) -> dict:
    """What the cache knows a run by."""
    shared = {"steps": args.steps, "epochs": args.epochs, "batch_size": args.batch_size, "seq_len": args.seq_len}
    where = {"device": args.device, "dtype": args.dtype} if other_than_cpu(args) else {}
    return {"flags": shared | where | complete(args, flags), "change": change}


def cached_rates(args: argparse.Namespace, flags: dict, change: str) -> set[float]:
    """The learning rates at which these runs are in the cache."""
    wanted = whole_key(args, run_key(args, flags, change))
    runs = (key for key in map(json.loads, known()) if "flags" in key)
    return {key["flags"]["lr"] for key in runs if key | {"flags": key["flags"] | {"lr": None}} == wanted}


def run(args: argparse.Namespace, flags: dict, change: str = "") -> dict:
    """One run of train.py. Returns the validation "loss" and "accuracy" (None without choices), each before and after
    it, the "seconds" of its training steps, and the "machine". The loss of a run that diverged is infinite."""

    def compute() -> dict:
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(tempfile.TemporaryDirectory())
            argv = ["train.py", *command_line(args, {**flags, "out": out})]
            stack.enter_context(patch.object(sys, "argv", argv))
            stack.enter_context(CHANGES[change])
            stack.enter_context(patch.object(train, "save_checkpoint", lambda *args: None))  # only losses are looked at
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            errors = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            diverged = False
            torch.backends.cuda.matmul.allow_tf32 = True
            try:
                train.main()
            except SystemExit:
                message = errors.getvalue().splitlines()[-1]
                if "diverged" not in message:
                    raise InputError(message) from None
                diverged = True
            rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        before, after = rows[0], rows[-1]
        return {
            "loss": [before["val_loss"], math.inf if diverged or math.isnan(after["val_loss"]) else after["val_loss"]],
            "accuracy": [before.get("val_accuracy"), after.get("val_accuracy")],
            "seconds": sum(row["seconds"] for row in rows if "loss" in row),
            "machine": machine(args),
        }

    flags = complete(args, flags)
    try:
        result = cached(args, run_key(args, flags, change), compute, args.finished)
    except Unfinished:
        if args.wanted is not None:
            args.wanted.append((flags, change))
        raise
    args.machines.add(result.get("machine") or machine(args))  # the first runs did not say
    loss, seconds = result["loss"][1], result["seconds"]
    print(f"    lr {flags['lr']:g}, seed {flags['seed']}: loss {loss:.4f}, {seconds:.1f} s", flush=True)
    return result


def memory(args: argparse.Namespace, flags: dict) -> dict:
    """Bytes of a training step as bench/memory.py counts them: optimizer "state" and, "predicted", the peak. Blocks are
    recomputed, as on a card that is too small for their activations."""
    flags = complete(args, flags)
    filled = argparse.Namespace(**vars(fill(args, flags)) | {"recompute": True, "micro_batch_size": args.batch_size})
    shape = {"batch_size": args.batch_size, "seq_len": args.seq_len} | (
        {} if args.dtype == "fp32" else {"dtype": args.dtype}
    )
    return cached(args, {"memory": shape | flags}, lambda: measure(args.config, filled))


def other_than_cpu(args: argparse.Namespace) -> str:
    """What the results' file is called besides: nothing of runs on the CPU, in fp32."""
    return "" if (args.device, args.dtype) == ("cpu", "fp32") else f"-{args.device}-{args.dtype}"


class Row(NamedTuple):
    """What a table says of some flags: a run for each seed, at the best of the learning rates tried."""

    name: str
    flags: dict
    tried: list[float]
    runs: list[dict]
    memory: dict

    def values(self, key: str, when: int = 1) -> Tensor:
        """The runs' "loss" or "accuracy" before (0) or after (1) them, or their "seconds": fp64 [seeds]."""
        values = [run[key] if key == "seconds" else run[key][when] for run in self.runs]
        return torch.tensor(values, dtype=torch.float64)


def run_seeds(args: argparse.Namespace, flags: dict, change: str = "", first: int = 0) -> list[dict]:
    """A run for each seed; with --finished for those that are, up to the first that is not, beyond --seeds too."""
    runs, tables = [], args.finished and args.wanted is None
    for seed in range(first, 100 if tables else first + args.seeds):
        try:
            runs.append(run(args, {**flags, "seed": seed}, change))
        except Unfinished:
            if tables:  # rows are compared seed by seed
                break
    return runs


def search(args: argparse.Namespace, name: str, flags: dict, change: str = "", like: Row | None = None) -> Row | None:
    """Find the best learning rate on seed 0, among those of --lrs, what extends them while the best is at their end, and
    any others in the cache, or take that of the row `like`; and run all seeds at it. With --finished a row may lack
    rates, seeds or all of its runs (None), and is then added to those that args.missing names."""
    print(name, flush=True)
    grid, losses = [like.flags["lr"]] if like else sorted(args.lrs), {}
    if flags["method"] == "full" and not like:  # every weight moves: its best rate is lower than the others'
        grid.insert(0, float(f"{grid[0] * grid[0] / grid[1]:.2g}"))
    others = set() if like else cached_rates(args, flags | {"lr": None, "seed": 0}, change)
    while True:
        for lr in sorted(others.union(grid)):
            with contextlib.suppress(Unfinished):
                if lr not in losses:
                    losses[lr] = run(args, {**flags, "lr": lr, "seed": 0}, change)["loss"][1]
        best = min(losses, key=losses.get, default=None)
        lacking, tried = not losses.keys() >= set(grid), sorted(losses)
        if like or lacking or best not in (tried[0], tried[-1]):
            break
        beside = tried[1] if best == tried[0] else tried[-2]
        grid = sorted([*grid, float(f"{best * best / beside:.2g}")])
    tuned = {**flags, "lr": best}
    runs = run_seeds(args, tuned, change) if losses and (args.wanted is None or not lacking) else []
    if lacking or len(runs) < args.seeds:
        args.missing.append(name)
    return Row(name, tuned, sorted(losses), runs, memory(args, flags)) if runs else None


# Tables


def spread(values: Tensor, seeds: int, form: str = ".4f") -> str:
    """Mean and standard deviation over the seeds, and how many there are if some are missing, or if there are more."""
    deviation = f" ± {values.std():{form.lstrip('+')}}" if len(values) > 1 else ""
    count = f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else f" ({len(values)} seeds)"
    return f"{values.mean():{form}}{deviation}{count if len(values) != seeds else ''}"


def cells(args: argparse.Namespace, row: Row, reference: Row) -> dict[str, str]:
    """A row, by column. The reference's losses are what its own are compared with, seed by seed."""
    filled, method = fill(args, complete(args, row.flags)), train.METHODS[row.flags["method"]]
    low_rank = filled.rank and (method.projection or filled.method == "lora")
    both = min(len(row.runs), len(reference.runs))
    difference = row.values("loss")[:both] - reference.values("loss")[:both]
    row = row._replace(runs=row.runs[: args.seeds])  # what is not a difference is compared by eye: over the same seeds
    return {
        "": row.name,
        "active": f"{filled.active} of {args.config.n_layers}" if method.sampling else "all",
        "interval": str(filled.interval) if method.sampling else "",
        "rank": str(filled.rank) if low_rank else "",
        "lr (tried)": f"{filled.lr:g} (of {len(row.tried)}, {row.tried[0]:g} to {row.tried[-1]:g})",
        "loss": spread(row.values("loss"), args.seeds),
        f"minus that of {reference.name}": "" if row.name == reference.name else spread(difference, args.seeds, "+.4f"),
        "accuracy, %": ""
        if row.runs[0]["accuracy"][1] is None
        else spread(100 * row.values("accuracy"), args.seeds, ".1f"),
        "peak, MiB": f"{row.memory['predicted'] / MIB:.2f}",
        "optimizer state, MiB": f"{row.memory['state'] / MIB:.2f}",
        "time, s": f"{row.values('seconds').min():.1f}",
    }


def table(rows: list[dict[str, str]]) -> str:
    """Rows by column as Markdown, without the columns that are empty."""
    columns = [column for column in rows[-1] if any(row.get(column) for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare(args: argparse.Namespace, rows: list[Row], name: str) -> str:
    """A table of rows, compared with the one of that name, below the model as it was."""
    rows = [row for row in rows if row]
    if not rows:
        return "Nothing is finished."
    reference = next((row for row in rows if row.name == name), rows[0])
    run = reference.runs[0]
    before = {"": "before fine-tuning", "loss": f"{run['loss'][0]:.4f}"}
    if run["accuracy"][0] is not None:
        before["accuracy, %"] = f"{100 * run['accuracy'][0]:.1f}"
    lacking = f"\n\nNot finished: {'; '.join(args.missing)}." if args.missing else ""
    return table([before, *(cells(args, row, reference) for row in rows)]) + lacking


# Studies: each returns its section's text


def published(args: argparse.Namespace) -> dict:
    """OwLore's published recipe at the checkpoint's size, whatever train.py's defaults are. It keeps the moments."""
    active, rank = math.ceil(args.config.n_layers * 5 / 32), max(1, args.config.dim // 16)
    return {"method": "owlore", "sampling": "outlier", "active": active, "interval": 50, "rank": rank,
            "update_gap": 100, "embeddings": "full"}  # fmt: skip


def redrawn(args: argparse.Namespace, draws: int) -> dict:
    """The interval at which a run of OwLore draws its layers so often: the published one hardly does in a short run."""
    return {"interval": max(1, args.steps // draws)} if args.steps else {}


def methods(args: argparse.Namespace) -> str:
    """The methods against each other, embedding and head frozen in all of them as they are in LoRA."""
    frozen = {"embeddings": "frozen"}
    owlore = {"method": "owlore", **frozen, **redrawn(args, 10)}
    lora, lisa = {"method": "lora"}, {"method": "lisa", **frozen}
    flags = {"lora": lora, "lisa": lisa}
    limits = {name: memory(args, row)["predicted"] for name, row in flags.items()}
    numbers = range(1, args.config.n_layers + 1)
    peaks = {n: memory(args, owlore | {"active": n})["predicted"] for n in numbers}
    for name, limit in limits.items():
        if fitting := [n for n in numbers if peaks[n] <= limit]:
            flags[f"owlore, {name}'s memory"] = owlore | {"active": max(fitting)}
    flags["full"] = {"method": "full", **frozen}
    flags["owlore"] = owlore
    flags["galore"] = {"method": "galore", **frozen}
    flags["lora, rank 64"] = {"method": "lora", "rank": 64}
    flags["owlore without projection"] = owlore | {"rank": 0}
    rows = [search(args, name, row) for name, row in flags.items()]
    rows.append(search(args, "owlore, published recipe", published(args), "keep"))
    listed = ", ".join(f"{n}: {peak / MIB:.2f}" for n, peak in peaks.items())
    return f"""Embedding and head are frozen but in the published recipe, and OwLore draws its layers ten times in a run.
Peak in MiB: {", ".join(f"{name} {limit / MIB:.2f}" for name, limit in limits.items())}; OwLore, by active layers:
{listed}.

{compare(args, rows, "owlore")}"""


def sampling(args: argparse.Namespace) -> str:
    """OwLore with each way to draw layers, at its active layers and at twice as many. They learn at the rate that is best
    for outlier."""
    base = {"method": "owlore", "embeddings": "frozen", **redrawn(args, 20)}
    few, tables = complete(args, base)["active"], []
    for active in (few, min(2 * few, args.config.n_layers)):
        flags = base | {"active": active}
        rows = [search(args, "outlier", flags)]
        for mode in ("uniform", "reverse", "increasing", "decreasing") if rows[0] else ():
            rows.append(search(args, mode, flags | {"sampling": mode}, like=rows[0]))
        if rows[0]:
            rows.append(search(args, "outlier, floored", flags, "floor", like=rows[0]))
        tables.append(compare(args, rows, "outlier"))
    return f"""OwLore with embedding and head frozen; its layers are drawn 20 times in a run. All rows of a table learn at
the rate that is best for outlier. Floored: no probability is below {FLOOR:g} / L.

{tables[0]}

{tables[1]}"""


def largest(args: argparse.Namespace, ways: list[dict], limit: int) -> dict | None:
    """The last of some flags, each of which takes more memory than those before, whose training step fits a limit."""
    fitting = bisect.bisect_right(ways, limit, key=lambda way: memory(args, way)["predicted"])
    return ways[fitting - 1] if fitting else None


def budget(args: argparse.Namespace) -> str:
    """Few layers at a high rank or many at a low one: as many as fit the memory of LoRA, of LISA, and as published,
    where also all layers at the highest rank that fits are tried; and what train.py does."""
    L, most = args.config.n_layers, args.config.dim // 16
    ranks = [4 * most, *(max(1, most // n) for n in (1, 2, 4))]
    base = {"method": "owlore", "embeddings": "frozen", **redrawn(args, 10)}
    rivals = {"lora": {"method": "lora"}, "published": base, "lisa": {"method": "lisa", "embeddings": "frozen"}}
    flags = {}
    for name, rival in rivals.items():
        limit, owner = memory(args, rival)["predicted"], name if rival is base else f"{name}'s"
        flags |= {} if rival is base else {name: rival}
        grids = [[(n, rank) for n in range(1, L + 1)] for rank in ranks]
        grids += [[(L, rank) for rank in range(1, most + 1)]] if rival is base else []
        for ways in grids:
            way = largest(args, [base | {"active": active, "rank": rank} for active, rank in ways], limit)
            if way and way not in flags.values():
                drawn = "owlore" if way["active"] < L else "galore"
                flags[f"{drawn}, rank {way['rank']}, {owner} memory"] = way
    wide = {
        "lora": [rivals["lora"] | {"rank": rank} for rank in range(1, args.config.dim)],
        "all layers, residual": [many_layers(args, L) | HALF | {"rank": rank} for rank in range(1, most + 1)],
    }
    for name, ways in wide.items():
        if way := largest(args, ways, memory(args, rivals["lisa"])["predicted"]):
            flags[f"{name}, lisa's memory"] = way
    flags["owlore, residual, scale 1, 20 of 32 layers"] = many_layers(args) | RESIDUAL | SLOW_EMBEDDINGS
    flags["all layers, residual, scale 1"] = many_layers(args, L) | RESIDUAL
    flags["all layers, residual"] = many_layers(args, L) | HALF
    flags["all layers, residual, train.py's default"] = by_default(args)
    flags["full"] = {"method": "full", "embeddings": "frozen"}
    rows = [search(args, name, row) for name, row in flags.items()]
    return f"""Embedding and head are frozen, but in train.py's default and with 20 of 32 layers and the residual projected, at a
tenth of the rate. OwLore draws its layers ten times in a run; one that comes back has new bases. What trains all layers
draws none, and keeps the bases of its first step; without a residual it is GaLore. As published are 5 of 32 layers at
rank dim / 16. Residual: what the projection leaves out is followed, too, what is projected has scale 0.5, and norms
learn at a twentieth of the rate (with scale 1 a tenth).

{compare(args, rows, "lora")}"""


def many_layers(args: argparse.Namespace, active: int | None = None) -> dict:
    """OwLore with that many layers, by default 20 of 32, at a low rank, embedding and head frozen, layers drawn ten times
    in a run."""
    low = {"rank": max(1, args.config.dim // 64), "active": active or math.ceil(args.config.n_layers * 20 / 32)}
    return {"method": "owlore", "embeddings": "frozen", **low, **redrawn(args, 10)}


def by_default(args: argparse.Namespace) -> dict:
    """All layers, as train.py trains them."""
    known = vars(fill(args, {"method": "owlore"}))
    names = "rank", "residual", "scale", "norms_lr_ratio", "embeddings", "embeddings_lr_ratio"
    return many_layers(args, args.config.n_layers) | {name: known[name] for name in names}


def default(args: argparse.Namespace) -> str:
    """train.py's default beside 20 of 32 layers that are drawn, and beside the other methods."""
    frozen = {"embeddings": "frozen"}
    flags = {
        "train.py's default": by_default(args),
        "its embedding and head frozen, rank dim / 64": many_layers(args, args.config.n_layers) | HALF,
        "20 of 32 layers": many_layers(args) | HALF | SLOW_EMBEDDINGS,
        "20 of 32 layers, scale 1": many_layers(args) | RESIDUAL | SLOW_EMBEDDINGS,
        "lora": {"method": "lora"},
        "lisa": {"method": "lisa"} | frozen,
        "full": {"method": "full"} | frozen,
    }
    rows = [search(args, name, row) for name, row in flags.items()]
    lora, more = next((row for row in rows if row and row.name == "lora"), None), ""
    if lora and args.steps:
        longer = {"method": "lora", "steps": args.steps * 3 // 2}
        rows.append(search(args, f"lora, {longer['steps']} steps", longer, like=lora))
        if rows[-1]:
            more = f"""
LoRA makes no gradients of weights: its {longer["steps"]} steps are the arithmetic of the default's {args.steps}, if activations are kept."""
    return f"""All layers by default, what a projection leaves out followed. 20 of 32 layers are drawn ten times in a run; with
scale 1 norms learn at a tenth of the rate, else at a twentieth. LISA's embedding and head, and full fine-tuning's, are
frozen.{more}

{compare(args, rows, "train.py's default")}"""


FRESH = 5  # the first seed that no setting was chosen by


def unseen(args: argparse.Namespace) -> str:
    """What ended best, and its rivals, on validation data on which nothing was chosen: --data NAME-unseen has the training
    data of NAME, whose finished runs say which learning rates are best."""
    paths = {key: Path(str(getattr(args, key))) for key in ("data", "val_data")}
    if not all("-unseen" in path.name for path in paths.values()):
        raise InputError("unseen: call --data and --val-data NAME-unseen, beside NAME, as bench/tasks.py does")
    names = {key: str(path.with_name(path.name.replace("-unseen", ""))) for key, path in paths.items()}
    others = {"finished": True, "wanted": None, "missing": [], "machines": set()}
    seen = argparse.Namespace(**vars(args) | names | others)
    seen.files, frozen = checksum(seen), {"embeddings": "frozen"}
    flags = {
        "lora": {"method": "lora"},
        "lisa": {"method": "lisa"} | frozen,
        "owlore": {"method": "owlore"} | frozen | redrawn(args, 10),
        "all layers, residual": many_layers(args, args.config.n_layers) | HALF,
        "all layers, residual, train.py's default": by_default(args),
        "full": {"method": "full"} | frozen,
    }
    flags["owlore"] |= {key: published(args)[key] for key in ("sampling", "active", "rank", "update_gap")}
    rows = []
    for name, row in ((name, search(seen, name, row)) for name, row in flags.items()):
        runs = run_seeds(args, row.flags, first=FRESH) if row else []
        args.missing += [name] * (len(runs) < args.seeds)
        rows += [row._replace(runs=runs)] if runs else []
    return f"""Trained on the data of {Path(seen.data).stem}, with other seeds, and validated on other data: neither settings nor learning rates
were chosen by either. OwLore draws the paper's 5 of 32 layers, ten times in a run.

{compare(args, rows, "lora")}"""


def longer(args: argparse.Namespace) -> str:
    """What ended best, and LoRA, in runs of three times as many steps."""
    steps, rows = 3 * args.steps, []
    both = {"lora": {"method": "lora"}, "all layers, residual": many_layers(args, args.config.n_layers) | HALF}
    for name, flags in both.items():
        if short := search(args, name, flags):
            rows.append(search(args, f"{name}, {steps} steps", flags | {"steps": steps}, like=short))
    return f"""Embedding and head are frozen. Both learn at the rate that was best for them in {args.steps} steps.

{compare(args, rows, f"lora, {steps} steps")}"""


def draws(args: argparse.Namespace) -> str:
    """Independent draws, or each layer in its turn; moments dropped, or kept."""
    base = many_layers(args)
    rows = [search(args, "independent", base)]
    ways = {
        "in turns": ({}, "turns"),
        "uniform": ({"sampling": "uniform"}, ""),
        "basis and moments kept": ({}, "parked"),
    }
    for times in (60, 30, 20, 5, 2) if args.steps else ():
        ways[f"drawn {times} times"] = redrawn(args, times), ""
    ways["drawn 60 times, kept"] = redrawn(args, 60), "parked"
    for name, (flags, change) in ways.items() if rows[0] else ():
        rows.append(search(args, name, base | flags, change, like=rows[0]))
    return f"""Embedding and head are frozen, and layers drawn ten times in a run but where it is said. Independent: as train.py
does. In turns: those that are furthest behind their share p_l * active, which draws likely layers still more often. Kept: what a layer had
when it was active last, not counted as memory here. All rows learn at the rate that is best for the first.

{compare(args, rows, "independent")}"""


def residual(args: argparse.Namespace) -> str:
    """20 of 32 layers, with and without what the projection leaves out of the gradient."""
    base = many_layers(args) | SLOW_EMBEDDINGS
    rows = [search(args, "without", base), search(args, "with", base | HALF)]
    rows.append(search(args, "with, scale 1", base | RESIDUAL))
    return f"""OwLore has 20 of 32 layers active at rank dim / 64, draws them ten times in a run, and projects embedding and head,
at a tenth of the rate. With: what is projected has scale 0.5, and norms learn at a twentieth of the rate (with scale 1
at a tenth).

{compare(args, rows, "without")}"""


def projection(args: argparse.Namespace) -> str:
    """All layers at a low rank, with one thing changed at a time."""
    base = many_layers(args, args.config.n_layers)
    rows = [search(args, "all layers", base)]
    slow, double, fast = (float(f"{times * rows[0].flags['lr'] if rows[0] else 1:.2g}") for times in (0.3, 2, 3))
    ways = {"warm-up": ({}, "warmup"), "norms slower": (SLOW, ""), "norms frozen": ({"norms_lr_ratio": 0.0}, ""),
            "beta2 0.95": ({}, "beta2"), "new bases every 10 steps": ({"update_gap": 10}, ""),
            "scale 3, norms slower": ({"scale": 3.0, "lr": slow}, ""), "scale 6": ({"scale": 6.0, "lr": slow}, ""),
            "random bases": ({}, "random"), "random bases, three times the rate": ({"lr": fast}, "random"),
            "residual, norms slower": (RESIDUAL, ""),
            "residual, scale 0.5, norms still slower": (HALF, ""),
            "residual, scale 0.5, norms still slower, twice the rate": (HALF | {"lr": double}, ""),
            "residual, scale 0.5, norms still slower, new bases every 20 steps": (HALF | {"update_gap": 20}, ""),
            "residual, scale 0.25, norms slowest": (HALF | {"scale": 0.25, "norms_lr_ratio": 0.025}, ""),
            "residual free to grow, norms slower": (RESIDUAL, "growth")}  # fmt: skip
    for name, (flags, change) in ways.items() if rows[0] else ():
        like = rows[0]._replace(flags=rows[0].flags | {"lr": flags.pop("lr", rows[0].flags["lr"])})
        rows.append(search(args, name, base | flags, change, like=like))
    rows.append(search(args, "norms slower, warm-up", base | SLOW, "warmup"))
    rows.append(search(args, "Fira's residual", base, "fira"))
    rows.append(search(args, "Fira's residual, norms slower, warm-up", base | SLOW, "fira, warmup"))
    return f"""All layers are active at rank dim / 64, embedding and head frozen; this is GaLore. Warm-up: the rate rises in the
first six steps. Norms slower: at a tenth of the rate, or at 0.3 of it with scale 3; still slower and slowest: a
twentieth and a fortieth. Residual: that of owlore.py, which has no scale, and Adam's gain of the step before; Fira's has
that of the step itself, for which whole gradients must wait. Free to grow: by more than 1 % a step. The first and the
last three rows have their own best rate, the others that of the first, or {slow:g} where the scale makes up for it.

{compare(args, rows, "all layers")}"""


def moments(args: argparse.Namespace) -> str:
    """What becomes of Adam's moments when the basis changes."""
    gap, interval = max(1, args.steps // 18), max(1, args.steps // 3)
    tables = []
    for method, drawn in (("galore", {}), ("owlore", {"interval": interval})):
        flags = {"method": method, "update_gap": gap, **drawn}
        rows = [search(args, f"{method}, {change or 'rotate'}", flags, change) for change in ("", "keep", "reset")]
        tables.append(compare(args, rows, f"{method}, rotate"))
    return f"""A new basis every {gap} steps of a matrix, {(args.steps - 1) // gap} times in a run of GaLore. OwLore
redraws its layers every {interval} steps, and one that was not active before begins without moments. Rotate: the first
moment is turned into the new basis, the second stays (owlore.py as it is); keep: both stay (the published code); reset:
both begin anew.

{tables[0]}

{tables[1]}"""


def recipe(args: argparse.Namespace) -> str:
    """The published recipe, with one setting changed at a time."""
    base, L = published(args), args.config.n_layers
    changes = {"interval": (3, 10, 25), "active": (min(2 * base["active"], L), L), "rank": (4 * base["rank"], 0),
               "update_gap": (10,), "embeddings": ("projected", "frozen")}  # fmt: skip
    rows = [search(args, "published", base, "keep")]
    for flag, values in changes.items():
        rows += [search(args, f"{flag} {value}", base | {flag: value}, "keep") for value in dict.fromkeys(values)]
    listed = ", ".join(f"{flag} {value}" for flag, value in base.items() if flag != "method")
    return f"""OwLore's published recipe ({listed}),
and with one setting of it changed at a time; rank 0 is no projection.

{compare(args, rows, "published")}"""


def layers(args: argparse.Namespace) -> str:
    """Active layers x rank. At equal time a run has as many steps as it makes in the published recipe's seconds."""
    base, L = published(args), args.config.n_layers

    def cell(active: int, rank: int) -> Row:
        name = f"active {active}, {f'rank {rank}' if rank else 'no projection'}"
        return search(args, name, base | {"active": active, "rank": rank}, "keep")

    reference = cell(base["active"], base["rank"])
    if not reference:
        return "Nothing is finished."
    budget = reference.values("seconds")[: args.seeds].mean().item()
    rows, timed, lines = [], [], []
    for rank in (base["rank"], 4 * base["rank"], 0):
        for active in sorted({*(2**n for n in range(L.bit_length()) if 2**n < L), base["active"], L}):
            row = cell(active, rank)
            steps = max(1, round(args.steps * budget / row.values("seconds")[: args.seeds].mean().item()))
            again = row._replace(runs=run_seeds(args, row.flags | {"steps": steps}, "keep"))
            then = {"steps in equal time": str(steps), "loss then": spread(again.values("loss"), args.seeds)}
            rows, timed, lines = [*rows, row], [*timed, again], [*lines, cells(args, row, reference) | then]

    limit = memory(args, {"method": "lisa"})["predicted"]
    within = [row for row in rows if row.memory["predicted"] <= limit]
    choices = {"equal tokens": rows, "equal time": timed, f"equal tokens, within LISA's {limit / MIB:.2f} MiB": within}
    best = {where: min(group, key=lambda row: row.values("loss").mean()) for where, group in choices.items() if group}
    listed = "\n".join(
        f"- at {where}: {row.name}, {spread(row.values('loss'), args.seeds)}" for where, row in best.items()
    )
    return f"""OwLore's published recipe, which is {reference.name}, with other numbers of active layers and ranks.
Equal time is its {budget:.1f} s: each row runs again, with as many steps as it makes in them.

{table(lines)}

The lowest mean losses (the least of {len(rows)} is in part luck; compare it with the spread):

{listed}{chart(args, rows, timed)}"""


def pyplot() -> ModuleType | None:
    """matplotlib's, if it is there, for pictures in files."""
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: pip install matplotlib")
        return None
    return plt


def chart(args: argparse.Namespace, rows: list[Row], timed: list[Row]) -> str:
    """Draw the layers study, a line for each rank. Returns the picture's place in the text: none without matplotlib."""
    if not (plt := pyplot()):
        return ""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for rank in dict.fromkeys(row.flags["rank"] for row in rows):
        group, again = ([row for row in some if row.flags["rank"] == rank] for some in (rows, timed))
        label = f"rank {rank}" if rank else "no projection"
        active = [row.flags["active"] for row in group]
        peaks = [row.memory["predicted"] / MIB for row in group]
        for axis, x, y in zip(axes, (active, active, peaks), (group, again, group)):
            losses = [row.values("loss") for row in y]
            axis.errorbar(
                x,
                [seeds.mean() for seeds in losses],
                [seeds.std() for seeds in losses],
                marker="o",
                capsize=3,
                label=label,
            )
        for row, n, peak in zip(group, active, peaks):
            axes[2].annotate(str(n), (peak, row.values("loss").mean()), (4, 4), textcoords="offset points")
    ticks = sorted({row.flags["active"] for row in rows})
    axes[0].set(title="equal tokens", xlabel="active layers", xticks=ticks, ylabel="validation loss")
    axes[1].set(title="equal time", xlabel="active layers", xticks=ticks)
    axes[2].set(title="equal tokens (at the points: active layers)", xlabel="peak memory, MiB")
    axes[0].legend()
    file = RESULTS / f"methods-{args.name}{other_than_cpu(args)}-layers.png"
    figure.savefig(file, dpi=120)
    return f"\n\n![final loss over active layers, for each rank]({file.name})"


def embeddings(args: argparse.Namespace) -> str:
    """How embedding and head are trained."""
    ways = {
        "frozen": {"embeddings": "frozen"},
        "projected, at a tenth of the rate": {"embeddings": "projected", "embeddings_lr_ratio": 0.1},
        "projected, at the rate": {"embeddings": "projected"},
        "full, at a tenth of the rate": {"embeddings": "full", "embeddings_lr_ratio": 0.1},
        "full, at the rate": {"embeddings": "full"},
    }
    rows, owlore_flags = [], many_layers(args)
    for method in ("owlore", "lisa", "full", "galore"):
        for way, flags in ways.items():
            base = owlore_flags if method == "owlore" else {"method": method}
            rows.append(search(args, f"{method}, {way}", base | flags))
    return f"""OwLore has 20 of 32 layers active at rank dim / 64, and draws them ten times in a run.

{compare(args, rows, "owlore, frozen")}"""


def packing(args: argparse.Namespace) -> str:
    """One record a row, or as many as fit."""
    rows = []
    for method in ("owlore", "full"):
        rows.append(search(args, method, {"method": method}))
        rows.append(search(args, f"{method}, packed", {"method": method, "pack": True}))
    return f"""Equal tokens: packed, a step has more of them and a run fewer steps. OwLore redraws its layers every 50.

{compare(args, rows, "owlore")}"""


STUDIES = {
    study.__name__: study
    for study in (
        methods,
        sampling,
        budget,
        default,
        unseen,
        longer,
        draws,
        residual,
        projection,
        moments,
        layers,
        recipe,
        embeddings,
        packing,
    )
}

# The results file

ALL_TASKS, KEPT = "budget, all tasks", ("", "active", "rank", "optimizer state, MiB")
TITLE = """# Methods and settings compared on {}

Runs of train.py. Loss and accuracy are those on validation data after the run: mean ± standard deviation over seeds,
which change the order of the data, the layers drawn and LoRA's first A. Differences are taken seed by seed, over all
seeds that both rows have ("5 seeds": more than the rest of the table). One within its ± shows nothing; at 95 %
confidence (a paired t-test) it must be 2.5 times its ± with three seeds, 1.25 times with five. Where seeds were added
because three had left a difference open, that is milder than it says. The error of the validation data, the same for
all, is not in them. A row's learning rate is the best one on seed 0 and on the same validation data, of as many as the
column says: not as many for all. Memory is the peak of a training step with full rows, every tensor counted by
bench/memory.py, blocks recomputed (the runs, which have memory enough, do not); in models as small as this most of it
is activations. Time is the least that a run's training steps took (with a ±: the mean), without scoring, evaluating and
saving; other work may have run beside it.

"""


def machine(args: argparse.Namespace) -> str:
    """What runs are made by."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    gpu = f"{torch.cuda.get_device_name()}, " if args.device != "cpu" else ""
    return (
        f"{gpu}{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def provenance(args: argparse.Namespace, first: int) -> str:
    """How a section was made."""
    words = [os.path.relpath(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    lrs = ", ".join(f"{lr:g}" for lr in sorted(args.lrs))
    tf32 = ", matrix products in TF32" if args.device != "cpu" and args.dtype == "fp32" else ""
    return f"""`python bench/methods.py {shlex.join(words)}`, {datetime.date.today()},
{"; ".join(sorted(args.machines))}.
{args.config.n_layers} layers of {args.config.dim} dimensions, {args.dtype}{tf32}; {args.steps or args.epochs} \
{"steps" if args.steps else "epoch(s)"} of {args.batch_size} rows a step of at most {args.seq_len} tokens; seeds {first} to {first + args.seeds - 1}; learning rates {lrs}, what extends them, and others tried."""


def overview(name: str, sections: dict[str, str]) -> dict[str, str]:
    """A section with the losses of the budget study on all its tasks side by side, from the tables of its sections."""
    tasks = {}
    for heading, text in sections.items():
        lines = [line for line in text.splitlines() if line.startswith("|")]
        if heading.startswith("budget, ") and "minus that of lora" in "".join(lines):
            columns, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
            tasks[heading.split(", ")[1]] = {row[0]: dict(zip(columns, row)) for row in rows}
    if len(tasks) < 2:
        return {}
    lines, order = [], []
    for rows in tasks.values():
        for before, row in zip([None, *rows], rows):  # a row that only some tasks have stands where it does there
            if row not in order:
                order.insert(order.index(before) + 1 if before else 0, row)
    for row in order:
        cells = {task: rows.get(row, {}) for task, rows in tasks.items()}
        losses = {task: cell.get("minus that of lora") or cell.get("loss", "") for task, cell in cells.items()}
        kept = {key: dict.fromkeys(cell[key] for cell in cells.values() if cell) for key in KEPT}
        lines.append({key: " or ".join(values) for key, values in kept.items()} | losses)
    text = f"""Losses: those of the model before and of lora, and of the others their difference from lora's, seed by seed.

{table(lines)}{losses_over_memory(name, tasks)}"""
    return {ALL_TASKS: text}


def losses_over_memory(name: str, tasks: dict[str, dict[str, dict[str, str]]]) -> str:
    """Draw the losses of the tasks' rows over the optimizer's state. Returns the picture's place in the text."""
    if not (plt := pyplot()):
        return ""
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.3 * len(tasks) + 2, 4), sharex=True, layout="constrained")
    groups = {}  # label: task, state, loss, its spread and the active layers of each row
    for task, rows in tasks.items():
        for row, cell in rows.items():
            if state := cell["optimizer state, MiB"]:
                loss, _, spread = cell["loss"].partition(" ± ")
                label = f"owlore, rank {cell['rank']:>2}" if row.startswith("owlore, rank") else row
                label = "galore" if row.startswith("galore") else label
                numbers = float(state), float(loss.split()[0]), float(spread.split()[0] if spread else 0)
                groups.setdefault(label, []).append((task, *numbers, cell["active"].split()[0]))
    for n, (label, points) in enumerate(sorted(groups.items())):
        for axis, task in zip(axes, tasks):
            here = sorted(point[1:] for point in points if point[0] == task) or [(math.nan, math.nan, 0, "")]
            states, losses, spreads, active = zip(*here)
            axis.errorbar(states, losses, spreads, marker="o", capsize=3, label=label, color=plt.cm.tab20(n))
            for text, *place in zip(active, states, losses):
                axis.annotate(text, place, (4, 4), textcoords="offset points", fontsize=8, annotation_clip=True)
    for axis, task in zip(axes, tasks):
        axis.set(title=task, xlabel="optimizer state, MiB (at the points: active layers)", xscale="log")
        axis.margins(x=0.1)
    axes[0].set(ylabel="validation loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    file = RESULTS / f"methods-{name}.png"
    figure.savefig(file, dpi=100)
    plt.close(figure)
    return f"\n\n![losses over the optimizer's state]({file.name})"


def write_section(args: argparse.Namespace, study: str, text: str) -> None:
    """Put a study's section into the checkpoint's results, in the place of the one it had."""
    name, data = args.name + other_than_cpu(args), Path(args.data)
    out = RESULTS / f"methods-{name}.md"
    first = FRESH if study == "unseen" else 0
    heading = study if data.parent == Path(args.ckpt) else f"{study}, {data.stem}"
    found = re.split(r"(?m)^## (.*)$", out.read_text() if out.exists() else "")[1:]
    sections = dict(zip(found[::2], found[1::2])) | {heading: f"{provenance(args, first)}\n\n{text}"}
    sections = overview(name, sections) | {heading: text for heading, text in sections.items() if heading != ALL_TASKS}
    order = sorted(sections, key=lambda heading: list(STUDIES).index(heading.split(",")[0]))
    parts = [f"## {heading}\n\n{sections[heading].strip()}\n" for heading in order]
    with atomic_write(out) as file:
        file.write((TITLE.format(name) + "\n".join(parts)).encode())
    print(f"\n{text}\n\nsaved: {os.path.relpath(out)}\n", flush=True)


def main() -> None:
    """Read the command line, and run the studies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("studies", nargs="+", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    add("--ckpt", required=True, help="checkpoint folder, Meta's or Hugging Face's layout")
    add("--data", required=True, help="training data: .txt, .json or .jsonl")
    add("--val-data", help="validation data (default: a part of --data, held out as train.py does)")
    add("--steps", type=train.at_least(1), default=90, help="optimizer steps of a run (default: %(default)s)")
    add("--epochs", type=train.at_least(1), help="passes through the data, instead of --steps")
    add("--finished", action="store_true", help="run nothing: write the tables of the runs that are finished")
    add("--jobs", type=train.at_least(1), default=1, help="runs at a time (default: %(default)s)")
    add("--device", default="cpu", help="default: %(default)s")
    add("--dtype", choices=("bf16", "fp32"), default="fp32", help="default: %(default)s")
    add("--batch-size", type=train.at_least(1), default=16, help="rows in a step (default: %(default)s)")
    add("--seq-len", type=train.at_least(1), default=256, help="tokens in a row (default: %(default)s)")
    add("--seeds", type=train.at_least(2), default=3, help="runs of each row (default: %(default)s)")
    add(
        "--lrs",
        type=train.at_least(1e-12, float),
        nargs="+",
        default=[1e-3, 3e-3, 1e-2],
        help="the grid at first (default: %(default)s)",
    )
    args = parser.parse_args()
    command(parser, lambda: run_studies(args))


def run_together(args: argparse.Namespace) -> None:
    """Run what the studies lack, --jobs at a time, the first one's first. They are asked again whenever a run has ended:
    what they want next hangs on that."""
    jobs, running = {}, set()
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool, tqdm(desc="runs") as bar:
        while True:
            looking = argparse.Namespace(**vars(args) | {"finished": True, "wanted": [], "missing": []})
            with contextlib.redirect_stdout(io.StringIO()):
                for study in args.studies:
                    STUDIES[study](looking)
            for wanted in looking.wanted:
                if (name := json.dumps(wanted, sort_keys=True)) not in jobs and len(running) < args.jobs:
                    jobs[name] = pool.submit(run, args, *wanted)
                    running.add(jobs[name])
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for job in ended:
                job.result()
                bar.update()


def run_studies(args: argparse.Namespace) -> None:
    """Run the studies, and write each one's section as soon as it is finished."""
    if len(set(args.lrs)) < max(2, len(args.lrs)):
        raise InputError("--lrs: give at least two, all different")
    if args.epochs and (counting := {"longer", "moments", "layers"} & set(args.studies)):
        raise InputError(f"--epochs: {', '.join(sorted(counting))} count in steps; give --steps")
    args.config, args.steps = parse_shape(args.ckpt), None if args.epochs else args.steps
    args.name, args.files = Path(args.ckpt).resolve().name, checksum(args)
    RESULTS.mkdir(exist_ok=True)
    args.missing, args.wanted, args.machines = [], None, set()
    if args.jobs > 1 and not args.finished:
        run_together(args)
    for study in args.studies:
        args.missing, args.machines = [], set()
        write_section(args, study, STUDIES[study](args))


if __name__ == "__main__":
    main()
