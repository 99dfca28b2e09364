"""Draw the curves of runs over each other, and below them which layers each trained when.

pip install matplotlib
python bench/plot.py runs/tiny runs/other --out curves.png
"""

import argparse
import json
import sys
from pathlib import Path

try:
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen
except ImportError:
    sys.exit("plot.py: this draws with one more package: pip install matplotlib")


def main() -> None:
    """Read the metrics of each run folder, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of train.py")
    parser.add_argument("--out", type=Path, help="picture to write (default: curves.png in the first run)")
    args = parser.parse_args()
    try:
        logs = {run: list(map(json.loads, open(run / "metrics.jsonl"))) for run in args.runs}
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: {error}")

    accuracy = any("val_accuracy" in row for rows in logs.values() for row in rows)
    sampled = {run: [(row["step"], n) for row in rows for n in row.get("active", [])] for run, rows in logs.items()}
    last = {run: max((layer for _, layer in points), default=0) for run, points in sampled.items()}
    for run, rows in logs.items():  # a run that trains all layers all the time has nothing to show
        if len(sampled[run]) == (last[run] + 1) * sum("active" in row for row in rows):
            del sampled[run]
    figure = Figure(figsize=(9, 4 + 2 * accuracy + 1.6 * len(sampled)), layout="constrained")
    ratios = [3] * (1 + accuracy) + [1] * len(sampled)
    curves, *panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    drawn = [(curves, "loss", ":"), (curves, "val_loss", "-o")]
    drawn += [(panels.pop(0), "val_accuracy", "-o")] if accuracy else []
    for n, (run, rows) in enumerate(logs.items()):
        for axis, key, style in drawn:
            points = [(row["step"], row[key]) for row in rows if key in row]
            label = run.name if key == "val_loss" else None
            axis.plot(*zip(*points) if points else ([], []), style, color=f"C{n}", ms=3, lw=1, label=label)
        if run in sampled:
            panel = panels[list(sampled).index(run)]
            panel.scatter(*zip(*sampled[run]), s=4, marker="s", linewidths=0, color=f"C{n}")
            panel.set(ylabel=f"layer\n({run.name})", ylim=(-0.5, max(last.values()) + 0.5))
    curves.set(ylabel="loss (dotted: training)")
    curves.legend()
    if accuracy:
        drawn[-1][0].set(ylabel="accuracy", ylim=(0, 1))
    figure.axes[-1].set(xlabel="step")
    figure.savefig(args.out or args.runs[0] / "curves.png", dpi=120)
    print(f"saved: {args.out or args.runs[0] / 'curves.png'}")


if __name__ == "__main__":
    main()
