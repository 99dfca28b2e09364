"""OWL (arXiv 2310.05175), the pruning method that OwLore's score comes from, as a check of that score.

If layers with more outliers matter more, it must cost less to prune them less. Wanda (arXiv 2306.11695) sets to 0, in
each output row of a linear, the share of weights whose scores are lowest,

    A_ij = |W_ij| * ||X_j||_2             X_j: input feature j over all calibration tokens

and that share S_l, the same for all linears of layer l, is one of

    uniform     S_l = S
    OWL         S_l = S - lambda * (D_l - mean(D)) / max|D - mean(D)|        D from `outlier_distribution`
    reversed    OWL with -D for D: a control, which must do worse if it is D that helps

OWL's falls linearly with D_l, has the mean S and stays in [S - lambda, S + lambda], as the paper says. (Its published
code stretches D to 2 * lambda from end to end and then shifts its mean to S, which can leave that interval.) All layers
have equally many weights, so all three prune equally many. Wanda's code goes from layer to layer and takes each X from
the pruned ones before it; here one pass of the dense model gives every X.

    python bench/owl.py --ckpt tiny --data tiny/text.txt --rows 512     (its rows are short)
    python bench/owl.py --ckpt ../shared/checkpoints/stories260K --data ../shared/data/c4_demo.jsonl --out bench/results/owl.md
"""

import argparse
import datetime
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402, I001
from data import Dataset, InputError, Record, atomic_write, command, load_records  # noqa: E402
from data import load_tokenizer, split_records  # noqa: E402, I001
from model import Transformer, load_model  # noqa: E402
from owlore import default_threshold, find_linears, outlier_distribution  # noqa: E402

HELD_OUT = 0.1  # share of --data that perplexity is measured on; calibration needs but a few rows of the rest


def load_texts(path: str) -> list[Record]:
    """The records of a file. A plain text falls into its paragraphs, each a row that begins with BOS (and is cut at
    --seq-len): a model that has only seen short texts, as the one in tiny/, cannot go on from the middle of one."""
    records = load_records(path)
    if len(records) > 1 or not records[0].plain:
        return records
    return [Record([("", text)]) for text in re.split(r"\n\s*\n", records[0].turns[0][1]) if text.strip()]


@torch.no_grad()
def feature_norms(model: Transformer, batches: Sequence[Tensor]) -> dict[nn.Linear, Tensor]:
    """||X_j||_2, fp32 [in_features], of each linear in the layers. batches: tokens, int [B, T], without padding."""
    squares = {linear: torch.zeros(linear.in_features) for layer in model.layers for linear in find_linears(layer)}

    def add_squares(linear: nn.Linear, inputs: tuple) -> None:
        squares[linear] += inputs[0].flatten(0, -2).square().sum(0)  # [tokens, in_features] -> [in_features]

    hooks = [linear.register_forward_pre_hook(add_squares) for linear in squares]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {linear: total.sqrt() for linear, total in squares.items()}


def layer_ratios(outliers: Tensor, sparsity: float, lam: float) -> Tensor:
    """OWL's sparsity S_l of each layer, [L], from the outlier distribution D, [L]; uniform where all D_l are equal."""
    distance = outliers.double() - outliers.double().mean()
    return sparsity - lam * distance / distance.abs().max().clamp(min=1e-12)


@torch.no_grad()
def prune(model: Transformer, dense: dict[nn.Linear, Tensor], norms: dict[nn.Linear, Tensor], ratios: Tensor) -> None:
    """Wanda: every linear gets its dense weights, [out, in], the layer's share of them, ratios [L], set to 0."""
    for layer, ratio in zip(model.layers, ratios.tolist()):
        for linear in find_linears(layer):
            W = dense[linear]
            # A share of a short row is no whole number of weights: rows differ by one, so that the matrix has it.
            counts = (torch.arange(len(W) + 1, dtype=torch.float64) * ratio * W.shape[1]).round().diff()  # [out]
            scores = W.abs() * norms[linear]
            rank = scores.argsort(dim=1, stable=True).argsort(dim=1)  # [out, in], 0 for the lowest of its row
            linear.weight.copy_(W.masked_fill(rank < counts[:, None], 0))


def perplexity(model: Transformer, val: Dataset) -> float:
    """e to the mean loss per token."""
    args = argparse.Namespace(micro_batch_size=16, seq_len=512, device="cpu")
    loss, count = sum(row for (row,) in train.row_losses(model, [[row] for row in val], args))
    return math.exp(loss / count)


@torch.no_grad()
def measure(args: argparse.Namespace) -> tuple[float, Tensor, Tensor]:
    """Perplexity of the dense model; perplexities of the pruned ones, [seeds, sparsities, 3] for uniform, OWL, reversed;
    and D, [seeds, L]."""
    model, tokenizer = load_model(args.ckpt), load_tokenizer(args.ckpt)
    config = model.config
    args.threshold = default_threshold(config.dim) if args.threshold is None else args.threshold
    args.seq_len = min(512, config.max_seq_len) if args.seq_len is None else args.seq_len
    if args.seq_len > config.max_seq_len:
        raise InputError(f"--seq-len {args.seq_len}: the model's context is {config.max_seq_len}; use that or less")
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{args.ckpt}: its tokenizer has {tokenizer.vocab_size} tokens, its model {config.vocab_size}")
    if args.val_data:
        texts, held_out = load_texts(args.data), load_texts(args.val_data)
    else:
        texts, held_out = split_records(load_texts(args.data), HELD_OUT, train.HELD_OUT_RECORDS, seed=0)
    data, val = (Dataset(records, tokenizer, args.seq_len) for records in (texts, held_out))

    calibrations = []
    for seed in tqdm(args.seeds, "calibrating", leave=False, disable=None):
        rows = data.sample(args.rows, seed)
        outliers = outlier_distribution(model, model.layers, rows, args.threshold)
        calibrations.append((outliers, feature_norms(model, rows)))
    dense = {linear: linear.weight.detach().clone() for layer in model.layers for linear in find_linears(layer)}
    dense_perplexity = perplexity(model, val)
    perplexities = torch.zeros(len(args.seeds), len(args.sparsity), 3)
    bar = tqdm(total=perplexities.numel(), desc="pruning", leave=False, disable=None)
    for n, (D, norms) in enumerate(calibrations):
        for i, sparsity in enumerate(args.sparsity):
            for j, (outliers, lam) in enumerate(((D, 0.0), (D, args.lam), (-D, args.lam))):
                prune(model, dense, norms, layer_ratios(outliers, sparsity, lam))
                perplexities[n, i, j] = perplexity(model, val)
                bar.update()
    return dense_perplexity, perplexities, torch.stack([D for D, _ in calibrations])


def describe(args: argparse.Namespace, dense: float, perplexities: Tensor, outliers: Tensor) -> str:
    """A checkpoint's section of the results, in Markdown, from what `measure` returns."""

    def cell(values: Tensor, sign: str = "") -> str:  # mean and standard deviation over seeds
        return f"{values.mean():{sign}.3f} ± {values.std():.3f}"

    rows = []
    for sparsity, (uniform, owl, reverse) in zip(args.sparsity, perplexities.permute(1, 2, 0)):  # [seeds] each
        lower = f"{(owl < uniform).sum()} of {len(owl)}"
        rows.append([f"{sparsity:g}", cell(uniform), cell(owl), cell(reverse), cell(owl - uniform, "+"), lower])
    S = args.sparsity[len(args.sparsity) // 2]
    ratios = torch.stack([layer_ratios(D, S, args.lam) for D in outliers])  # [seeds, L]
    layers = [[str(n), cell(100 * D), cell(ratio)] for n, (D, ratio) in enumerate(zip(outliers.T, ratios.T))]
    perplexity_rows, layer_rows = ("\n".join(f"| {' | '.join(row)} |" for row in table) for table in (rows, layers))
    seeds = ", ".join(map(str, args.seeds))
    held_out = f"`{args.val_data}`" if args.val_data else f"{HELD_OUT:.0%} of it, held out"
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"""## {args.ckpt}

`python {shlex.join(sys.argv)}`, {datetime.date.today()},
{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}.
Calibrated on {args.rows} rows of at most {args.seq_len} tokens of `{args.data}`, seeds {seeds};
perplexity on {held_out}. lambda {args.lam:g}, threshold {args.threshold:g}. Perplexity before pruning: {dense:.3f}.

| S | uniform | OWL | reversed | OWL - uniform | seeds where OWL is lower |
|---|---|---|---|---|---|
{perplexity_rows}

| layer | D_l in % | OWL's S_l at S = {S:g} |
|---|---|---|
{layer_rows}
"""


TITLE = """# Pruning at OWL's layerwise ratios, and at uniform ones

Perplexity on held-out text, lower is better, after Wanda's pruning at the mean sparsity S. `reversed`, where layers
with more outliers are pruned more, is a control. Mean ± standard deviation over draws of the calibration rows (seeds).

stories260K was trained on TinyStories, which `../shared` does not hold. It is measured on C4, on which Wanda and OWL
calibrate: other text than the model's own, but of the plain texts there the one it predicts best.

"""


def write_section(out: Path, section: str) -> None:
    """Put a checkpoint's section into the results, in the place of the one it had. Raises InputError if that fails."""
    try:
        title, *sections = re.split(r"(?m)^(?=## )", out.read_text() if out.exists() else TITLE)
        heading = section.split("\n")[0]
        kept = [old.strip() + "\n" for old in sections if old.split("\n")[0] != heading]
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as file:
            file.write((title + "\n".join(sorted([*kept, section]))).encode())
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; choose another file") from None


def main() -> None:
    """Read the command line, and prune at every sparsity with every seed's calibration rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint folder, Meta's or Hugging Face's layout")
    add("--data", required=True, help="calibration text: .txt, .json or .jsonl")
    add("--val-data", help=f"held-out text (default: {HELD_OUT:g} of --data, held out)")
    add("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7], help="S (default: %(default)s)")
    add("--lam", type=float, default=0.08, help="lambda, the farthest a layer is from S (default: %(default)s)")
    add(
        "--threshold",
        type=train.at_least(1e-12, float),
        help="of outliers (default: 13 at 4096 dimensions, less for smaller models)",
    )
    add("--seq-len", type=train.at_least(1), help="tokens in a row (default: 512, or the context if shorter)")
    add("--rows", type=train.at_least(1), default=128, help="calibration rows (default: %(default)s, as Wanda's)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration rows (default: %(default)s)")
    add("--out", type=Path, help="results file, where this checkpoint's section is replaced (default: only print)")
    args = parser.parse_args()
    command(parser, lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure, print the section and write it."""
    for sparsity in args.sparsity:
        if not 0 <= sparsity - args.lam <= sparsity + args.lam <= 1:
            raise InputError(f"--lam {args.lam:g}: negative, or takes --sparsity {sparsity:g} out of 0 to 1")
    if len(set(args.seeds)) < max(2, len(args.seeds)):
        raise InputError("--seeds: give at least two, all different: their spread is the measure of any difference")
    section = describe(args, *measure(args))
    print(section)
    if args.out:
        write_section(args.out, section)


if __name__ == "__main__":
    main()
