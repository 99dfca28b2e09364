"""What the outliers of a checkpoint's layers look like: on several texts, at several thresholds, beside heavy tails.

For each calibration text and threshold it computes D_l, the layers' outlier distribution, and how it correlates over the
layers (Spearman's rank correlation) with PL_Alpha_Hill, which the paper reads outliers through: more outliers, a heavier
tail, a smaller alpha, so a correlation below 0 is what it says. The picture shows D_l and alpha over depth.

    python bench/layers.py --ckpt runs/smollm2 --data ../shared/data/c4_demo.jsonl ../shared/data/wikitext2_valid.txt
"""

import argparse
import datetime
import os
import platform
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import Dataset, InputError, atomic_write, command, load_records, load_tokenizer  # noqa: E402
from model import load_model  # noqa: E402
from owlore import default_threshold, find_linears, hill_alpha, outlier_distribution, sampling_probabilities  # noqa: E402


def ranks(x: Tensor) -> Tensor:
    """Of each element among all, 0 for the least; no two of these are equal."""
    return x.argsort().argsort().double()


def correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two [L]."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def draw(curves: dict[str, Tensor], alphas: Tensor, file: Path) -> None:
    """D_l of each text, and alpha, over the layers."""
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("matplotlib is missing: pip install matplotlib") from None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
    for name, D in curves.items():
        left.plot(100 * D, marker=".", label=name)
    left.set(xlabel="layer", ylabel="outliers, %", ylim=(0, None))
    left.legend()
    right.plot(alphas, marker=".", color="black")
    right.set(xlabel="layer", ylabel="PL_Alpha_Hill (smaller: heavier tail)")
    figure.savefig(file, dpi=120)


def measure(args: argparse.Namespace) -> None:
    """Compute, print and write the table and the picture."""
    model, tokenizer = load_model(args.ckpt), load_tokenizer(args.ckpt)
    suits = default_threshold(model.config.dim)
    thresholds = args.thresholds or [round(share * suits, 3) for share in (0.7, 1, 1.4)]
    layers = tqdm([find_linears(layer) for layer in model.layers], "Hill alpha", leave=False, disable=None)
    alphas = torch.tensor([sum(hill_alpha(m.weight) for m in layer) / len(layer) for layer in layers])
    rows, curves, tables = [], {}, []
    for path in args.data:
        dataset = Dataset(load_records(path), tokenizer, args.seq_len)
        batches = dataset.sample(train.CALIBRATION_ROWS, 0)
        for threshold in thresholds:
            D = outlier_distribution(model, model.layers, batches, threshold)
            rows.append((Path(path).name, threshold, D))
            if threshold == thresholds[len(thresholds) // 2]:
                curves[Path(path).name] = D
    for name, threshold, D in rows:
        alike = [f"{correlation(D, other):+.2f}" for _, other_threshold, other in rows if other_threshold == threshold]
        most = D.argsort(descending=True)[:5].tolist()
        cells = [name, f"{threshold:g}", f"{100 * D.min():.2f} to {100 * D.max():.2f}", str(most).strip("[]"),
                 f"{correlation(D, alphas):+.2f}", ", ".join(alike)]  # fmt: skip
        tables.append(f"| {' | '.join(cells)} |")
    p = {name: sampling_probabilities(D) for name, D in curves.items()}
    by_layer = [
        f"| {n} | {' | '.join(f'{100 * D[n]:.3f}' for D in curves.values())} | {alphas[n]:.3f} | "
        f"{' | '.join(f'{x[n]:.4f}' for x in p.values())} |"
        for n in range(len(alphas))
    ]
    name = Path(args.ckpt).resolve().name
    text = f"""# Outliers of the layers of {name}

`python bench/layers.py {shlex.join(sys.argv[1:])}`, {datetime.date.today()},
{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}.
{train.CALIBRATION_ROWS} rows of at most {args.seq_len} tokens of each text; {suits:g} is the default threshold at this width.

| text | threshold | outliers, % | layers with the most | correlation with alpha | with {", ".join(Path(path).name for path in args.data)} |
|---|---|---|---|---|---|
{chr(10).join(tables)}

At the middle threshold:

| layer | {" | ".join(f"outliers %, {name}" for name in curves)} | alpha | {" | ".join(f"p, {name}" for name in curves)} |
|{"---|" * (2 + 2 * len(curves))}
{chr(10).join(by_layer)}

![outliers and alpha over the layers](layers-{name}.png)
"""
    print(text)
    results = ROOT / "bench" / "results"
    draw(curves, alphas, results / f"layers-{name}.png")
    with atomic_write(results / f"layers-{name}.md") as file:
        file.write(text.encode())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("--ckpt", required=True, help="checkpoint folder, Meta's or Hugging Face's layout")
    parser.add_argument("--data", required=True, nargs="+", help="calibration texts")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", help="default: 0.7, 1 and 1.4 times what suits the width"
    )
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a row (default: %(default)s)")
    args = parser.parse_args()
    command(parser, lambda: measure(args))


if __name__ == "__main__":
    main()
