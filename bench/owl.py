"""OWL (arXiv 2310.05175), the pruning method that OwLore's score comes from, as a check of that score.

If layers with more outliers matter more, pruning them less must cost less perplexity. Wanda (arXiv 2306.11695) prunes,
in each output row of a linear, the share of weights whose scores are lowest:

    A_ij = |W_ij| * ||X_j||_2             X_j: input feature j over all calibration tokens

and that share, the same for all linears of a layer, is one of

    uniform     S_l = S
    OWL         S_l = S - lambda * (D_l - mean(D)) / max|D - mean(D)|        D from `outlier_distribution`
    reversed    the same with -D for D: a control, which must do worse if it is D that helps

OWL's falls linearly with D_l, has the mean S and stays in [S - lambda, S + lambda], as the paper says; its published
code stretches D to 2 * lambda from end to end and then shifts to the mean, which can leave that interval. All layers hold
equally many weights, so all three prune equally many in all. Wanda's code prunes layer after layer and measures each
X on what the pruned layers before it give; here one pass of the dense model measures every X.

    python bench/owl.py --ckpt ../shared/checkpoints/stories260K --data ../shared/data/c4_demo.jsonl
    python bench/owl.py --ckpt tiny --data tiny/text.txt --rows 512 --out bench/results/owl.md
"""

import argparse
import datetime
import math
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Iterable

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import InputError, Parser, Record, atomic_write, build_dataset, load_records, load_tokenizer, run_command, split_records  # noqa: E402, E501
from model import Transformer, load_model  # noqa: E402
from owlore import CALIBRATION_ROWS, default_threshold, outlier_distribution  # noqa: E402

HELD_OUT = 0.1  # share of --data that perplexity is measured on; calibration needs but a few rows of the rest


def load_texts(path: str) -> list[Record]:
    """The records of a file. A plain text falls into its paragraphs, each a row of its own that begins with BOS: a model
    that has seen nothing but short texts, as the one in tiny/, cannot go on from the middle of another."""
    records = load_records(path)
    if len(records) > 1 or not records[0].plain:
        return records
    return [Record([("", text)]) for text in re.split(r"\n\s*\n", records[0].turns[0][1]) if text.strip()]


def layer_linears(layer: nn.Module) -> list[nn.Linear]:
    """The linears of a layer: q, k, v, o, gate, up, down."""
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def feature_norms(model: Transformer, batches: Iterable[Tensor]) -> dict[nn.Linear, Tensor]:
    """||X_j||_2 of the inputs of every linear in the layers, fp32 [in_features] each. batches: tokens, int [B, T]."""
    squares = {linear: torch.zeros(linear.in_features) for layer in model.layers for linear in layer_linears(layer)}

    def add_squares(linear: nn.Linear, inputs: tuple) -> None:
        squares[linear] += inputs[0].flatten(0, -2).square().sum(0)  # [tokens, in_features] -> [in_features]

    hooks = [linear.register_forward_pre_hook(add_squares) for linear in squares]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {linear: total.sqrt() for linear, total in squares.items()}


def layer_ratios(outliers: Tensor, sparsity: float, lam: float) -> Tensor:
    """OWL's sparsity of each layer, S_l: [L], from the outlier distribution D: [L]. Uniform where all D_l are equal."""
    distance = outliers.double() - outliers.double().mean()
    return sparsity - lam * distance / distance.abs().max().clamp(min=1e-12)


@torch.no_grad()
def prune(model: Transformer, dense: dict[nn.Linear, Tensor], norms: dict[nn.Linear, Tensor], ratios: Tensor) -> None:
    """Wanda: give every linear its dense weights [out, in], those of its layer's share that score lowest set to 0."""
    for layer, ratio in zip(model.layers, ratios.tolist()):
        for linear in layer_linears(layer):
            W = dense[linear]
            # A share of a short row is no whole number of weights: rows differ by one, so that the matrix has it exactly.
            counts = (torch.arange(len(W) + 1, dtype=torch.float64) * ratio * W.shape[1]).round().diff()  # [out]
            scores = W.abs() * norms[linear]
            rank = scores.argsort(dim=1, stable=True).argsort(dim=1)  # [out, in], 0 for the lowest of its row
            linear.weight.copy_(W.masked_fill(rank < counts[:, None], 0))


def measure(args: argparse.Namespace) -> tuple[float, Tensor, Tensor]:
    """Perplexity of the dense model; of the pruned ones, [seeds, sparsities, 3]: uniform, OWL, reversed; and D, [seeds, L]."""
    model, tokenizer = load_model(args.ckpt).eval(), load_tokenizer(args.ckpt)
    config = model.config
    args.threshold = default_threshold(config.dim) if args.threshold is None else args.threshold
    args.seq_len = min(512, config.max_seq_len) if args.seq_len is None else args.seq_len
    if args.seq_len > config.max_seq_len or tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{args.ckpt}: a model of {config.max_seq_len} tokens of context and {config.vocab_size} of vocabulary; "
                         f"--seq-len is {args.seq_len}, its tokenizer has {tokenizer.vocab_size}")  # fmt: skip
    texts, held_out = load_texts(args.data), load_texts(args.val_data) if args.val_data else None
    if held_out is None:
        texts, held_out = split_records(texts, HELD_OUT, train.HELD_OUT_RECORDS, seed=0)
    data, val = (build_dataset(records, tokenizer, args.seq_len) for records in (texts, held_out))
    dense = {linear: linear.weight.detach().clone() for layer in model.layers for linear in layer_linears(layer)}

    def perplexity() -> float:
        return math.exp(train.validation_loss(model, val, 16, "cpu"))

    dense_perplexity = perplexity()
    perplexities, outliers = torch.zeros(len(args.seeds), len(args.sparsity), 3), []
    bar = tqdm(total=perplexities.numel(), desc="pruning", leave=False, disable=None)
    for n, seed in enumerate(args.seeds):
        prune(model, dense, dense, torch.zeros(len(model.layers)))  # none: the dense weights are back
        rows = data.sample(args.rows, seed)
        D, norms = outlier_distribution(model, model.layers, rows, args.threshold), feature_norms(model, rows)
        outliers.append(D)
        for i, sparsity in enumerate(args.sparsity):
            for j, (score, lam) in enumerate(((D, 0.0), (D, args.lam), (-D, args.lam))):
                prune(model, dense, norms, layer_ratios(score, sparsity, lam))
                perplexities[n, i, j] = perplexity()
                bar.update()
    return dense_perplexity, perplexities, torch.stack(outliers)


def mean_spread(values: Tensor, digits: int = 2, sign: str = "") -> str:
    """Mean and standard deviation over seeds. values: [seeds]."""
    return f"{values.mean():{sign}.{digits}f} ± {values.std():.{digits}f}"


def describe(args: argparse.Namespace, dense: float, perplexities: Tensor, outliers: Tensor) -> str:
    """The section of a checkpoint, in Markdown."""
    differences = perplexities[..., 1:] - perplexities[..., :1]  # OWL - uniform, reversed - uniform: [seeds, sparsities, 2]
    rows, verdicts = [], {"lower": [], "higher": [], "lower with some seeds only": []}
    for i, sparsity in enumerate(args.sparsity):
        cells = [mean_spread(column) for column in perplexities[:, i].T]
        cells += [mean_spread(column, sign="+") for column in differences[:, i].T]
        rows.append(f"| {sparsity:g} | {' | '.join(cells)} |")
        lower = differences[:, i, 0] < 0
        verdict = "lower" if lower.all() else "lower with some seeds only" if lower.any() else "higher"
        verdicts[verdict].append(f"{sparsity:g}")
    verdict = "; ".join(f"{name} at S = {', '.join(found)}" for name, found in verdicts.items() if found)
    S = args.sparsity[len(args.sparsity) // 2]
    ratios = torch.stack([layer_ratios(D, S, args.lam) for D in outliers])  # [seeds, L]
    layers = [
        f"| {n} | {mean_spread(100 * D, 3)} | {mean_spread(ratio, 3)} |" for n, (D, ratio) in enumerate(zip(outliers.T, ratios.T))
    ]
    text = args.val_data or f"{HELD_OUT:.0%} of it, held out"
    return f"""## {args.ckpt}

`python {shlex.join(sys.argv)}`, {datetime.date.today()}, {cpu_name()} ({os.cpu_count()} cores), torch {torch.__version__}.
Calibrated on {args.rows} rows of at most {args.seq_len} tokens of {args.data}, drawn with seeds {', '.join(map(str, args.seeds))}; perplexity
on {text}. lambda {args.lam:g}, outliers above {args.threshold:g} times the mean. Dense model: {dense:.2f}.

**OWL's ratios against uniform ones: perplexity {verdict}.**

| S | uniform | OWL | reversed | OWL - uniform | reversed - uniform |
|---|---|---|---|---|---|
{chr(10).join(rows)}

| layer | D_l in % | OWL's ratio at S = {S:g} |
|---|---|---|
{chr(10).join(layers)}
"""


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


TITLE = """# Pruning at OWL's layerwise ratios, and at uniform ones

Perplexity on held-out text (lower is better) after Wanda's pruning; `reversed`, where layers with more outliers are pruned
more, is a control. Mean ± standard deviation over calibration seeds: the held-out text is the same for all of them.

stories260K was trained on TinyStories, which is not at hand. C4, on which Wanda and OWL calibrate, is another kind of text;
of the plain texts in `../shared/data` it is the one that the model predicts best.
"""


def write_section(out: Path, section: str) -> None:
    """Write a checkpoint's section to the results, in the place of the one it had. Raises InputError where that fails."""
    try:
        title, *sections = re.split(r"^(?=## )", out.read_text() if out.exists() else TITLE + "\n", flags=re.MULTILINE)
        heading = section.split("\n")[0]
        kept = [old.strip() + "\n" for old in sections if old.split("\n")[0] != heading]
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as file:
            file.write((title + "\n".join(sorted([*kept, section]))).encode())
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; choose another file") from None


def main() -> None:
    """Prune at every sparsity with every seed's calibration text; print the tables."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint folder, Meta's or Hugging Face's layout")
    add("--data", required=True, help="calibration text: .txt, .json or .jsonl")
    add("--val-data", help=f"held-out text (default: {HELD_OUT:.0%} of --data)".replace("%", "%%"))
    add("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7], help="S, the mean over layers (default: %(default)s)")
    add("--lam", type=float, default=0.08, help="lambda: how far a layer may be from S (default: %(default)s)")
    add("--threshold", type=float, help="of outliers (default: 13 at 4096 dimensions, less for smaller models)")
    add("--seq-len", type=int, help="tokens in a row (default: 512, or the context if shorter)")
    add("--rows", type=int, default=CALIBRATION_ROWS, help="calibration rows (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws its calibration rows (default: %(default)s)")
    add("--out", type=Path, help="results file, whose section on this checkpoint is replaced (default: only print)")
    args = parser.parse_args()
    for flag in ("seq_len", "rows", "threshold"):
        if getattr(args, flag) is not None and not 0 < getattr(args, flag) < math.inf:
            raise InputError(f"--{flag.replace('_', '-')} must be above 0, not {getattr(args, flag)}")
    for sparsity in args.sparsity:
        if not 0 <= sparsity - args.lam <= sparsity + args.lam <= 1:
            raise InputError(f"--lam {args.lam:g}: layers at --sparsity {sparsity:g} would leave 0 to 1; use a smaller one")
    if len(set(args.seeds)) < 2:
        raise InputError("--seeds: give two different ones or more: one has no spread")
    section = describe(args, *measure(args))
    print(section)
    if args.out:
        write_section(args.out, section)


if __name__ == "__main__":
    run_command(main)
