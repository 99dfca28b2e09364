"""Disturb short runs at random moments, resume them, and count what is lost.

Each run of train.py, on a small model in a folder of its own, is disturbed three times: killed (SIGKILL), ended by SIGTERM,
SIGHUP or Ctrl-C at a random moment from its start on, stopped by a full disk, or left alone while a byte of its newest
checkpoint is flipped or a file of it is truncated. After each disturbance it is resumed. At its end its weights are
compared, bit for bit, with those of a run of the same settings that nobody disturbed.

    python bench/soak.py --runs 100

Counted are runs lost (that could not be resumed to their end), runs whose weights differ, and tracebacks. The disk is full
where a file cannot grow beyond a limit (RLIMIT_FSIZE), which fails as a full disk does, in the middle of a file.
"""

import argparse
import collections
import datetime
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import TINY, atomic_write, copy_tokenizer, load_tokenizer  # noqa: E402
from model import ModelConfig, Transformer, load_model, save_model  # noqa: E402

RESULT = ROOT / "bench" / "results" / "soak.md"
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP, "Ctrl-C": signal.SIGINT}
DISTURBANCES = [*SIGNALS, "full disk", "flipped byte", "truncated file"]
METHODS = {
    "owlore": "--method owlore --active 1 --interval 5 --update-gap 4",
    "galore": "--method galore --update-gap 4",
    "lisa": "--method lisa --active 1",
    "lora": "--method lora --rank 4",
    "full": "--method full",
}
RUN = "--steps 40 --save-every 7 --keep 3 --batch-size 4 --micro-batch-size 3 --seq-len 64 --dtype bf16 --device cpu"


def start(arguments: str, largest_file: int | None = None) -> subprocess.Popen:
    """Start train.py; no file that it writes can become larger than that, if given."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell switches off in the background
        if largest_file:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=prepare,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def disturb(kind: str, arguments: str, out: Path, seconds: float, rng: random.Random) -> str:
    """Resume a run, which takes so many seconds if nobody disturbs it, and disturb it. Returns what it printed."""
    size = max((path.stat().st_size for path in out.glob("checkpoints/*/*/*")), default=0)
    process = start(arguments, rng.randrange(size // 50, size) if kind == "full disk" and size else None)
    if kind in SIGNALS:
        time.sleep(rng.uniform(0.1, seconds))  # before that Python itself is starting
        process.send_signal(SIGNALS[kind])
    elif kind != "full disk":  # a machine that died after it had saved, and wrote something else than it was told
        time.sleep(rng.uniform(seconds / 2, seconds))
        process.kill()
    output = process.communicate()[0]
    folders = sorted(out.glob("checkpoints/step-*[0-9]"))
    if kind in ("flipped byte", "truncated file") and len(folders) > 1:  # of a single one there is none before
        file = rng.choice([path for path in folders[-1].rglob("*") if path.is_file()])
        raw = bytearray(file.read_bytes())
        place = rng.randrange(len(raw))
        if kind == "flipped byte":
            raw[place] ^= 1 << rng.randrange(8)
        file.write_bytes(raw if kind == "flipped byte" else raw[:place])
    return output


def soak(count: int, seed: int, folder: Path) -> tuple[collections.Counter, collections.Counter]:
    """Runs, disturbed and resumed. Returns how often each disturbance was, and each outcome."""
    torch.manual_seed(0)
    shape = dict(dim=64, n_layers=3, n_heads=4, vocab_size=load_tokenizer(TINY).vocab_size, max_seq_len=64)
    save_model(Transformer(ModelConfig(**shape)), folder / "model")
    copy_tokenizer(TINY, folder / "model")
    base = f"--ckpt {folder / 'model'} --data {TINY / 'val.json'} {RUN}"
    undisturbed, seconds, done, outcomes = {}, 0.0, collections.Counter(), collections.Counter()
    for method, flags in METHODS.items():
        began = time.monotonic()
        output = start(f"{base} {flags} --out {folder / method}").communicate()[0]
        seconds = time.monotonic() - began
        if not (folder / method / "model").exists():
            sys.exit(f"soak.py: an undisturbed run failed:\n{output}")
        undisturbed[method] = load_model(folder / method / "model").state_dict()
    rng = random.Random(seed)
    for n in tqdm(range(count), "soaking"):
        method = list(METHODS)[n % len(METHODS)]
        out, outputs = folder / f"run-{n}", []
        arguments = f"{base} {METHODS[method]} --resume --out {out}"
        for kind in rng.choices(DISTURBANCES, k=3):
            outputs.append(disturb(kind, arguments, out, seconds, rng))
            done[kind] += 1
        process = start(arguments)
        outputs.append(process.communicate()[0])
        lost = process.returncode != 0
        weights = {} if lost else load_model(out / "model").state_dict()
        differs = not lost and any(not torch.equal(w, weights[name]) for name, w in undisturbed[method].items())
        traceback = any("Traceback" in output for output in outputs)
        fell_back = any("damaged" in output for output in outputs)
        outcomes += collections.Counter(
            {"lost": lost, "differing": differs, "tracebacks": traceback, "fell back": fell_back}
        )
        if lost or differs or traceback:
            tqdm.write(
                f"run {n} ({method}): lost {lost}, differs {differs}, traceback {traceback}\n" + "\n".join(outputs)
            )
    return done, outcomes


def main() -> None:
    """Soak, and write bench/results/soak.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done, outcomes = soak(args.runs, args.seed, Path(folder))
    rows = "\n".join(f"| {kind} | {done[kind]} |" for kind in DISTURBANCES)
    text = f"""# Runs disturbed at random moments, and resumed

`python bench/soak.py --runs {args.runs} --seed {args.seed}`, {datetime.date.today()}, {platform.machine()}, \
{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}. {args.runs} runs of
`train.py {RUN}`, a fifth of them with each method, each disturbed three times and then resumed to its end.

| disturbance | times |
|---|---|
{rows}

| outcome | runs of {args.runs} |
|---|---|
| lost | {outcomes["lost"]} |
| with other weights than the undisturbed run | {outcomes["differing"]} |
| with a traceback | {outcomes["tracebacks"]} |
| went on from an earlier checkpoint, as the newest was damaged | {outcomes["fell back"]} |
"""
    with atomic_write(RESULT) as file:
        file.write(text.encode())
    print(text)


if __name__ == "__main__":
    main()
