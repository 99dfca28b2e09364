"""Fine-tune a LLaMA-style checkpoint by OwLore, or by one of the methods it is compared with: one loop serves all.

                     gradients as they are      gradients projected
    all layers       full                       galore
    sampled layers   lisa, owlore --rank 0      owlore

LoRA, the fifth, freezes the model and trains low-rank additions to its linears instead.

Weights and activations are bf16 on a GPU (fp32 on a CPU); loss, moments and updates are fp32.

    python train.py                                             the embedded example, two minutes on a CPU
    python train.py --ckpt llama2-7b --data commonsense_170k.json --out runs/commonsense
"""

import argparse
import fcntl
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import (
    TINY,
    Dataset,
    InputError,
    Parser,
    Record,
    Tokenizer,
    atomic_write,
    build_dataset,
    copy_tokenizer,
    load_dataset,
    load_records,
    load_tokenizer,
    parse_json,
    read_json,
    read_text,
    run_command,
    split_records,
    sync_folder,
)  # fmt: skip
from model import ModelConfig, Transformer, add_lora, checkpoint_layout, load_model, save_model
from owlore import (
    CALIBRATION_ROWS,
    LayerSampler,
    ProjectedAdam,
    default_threshold,
    layer_chart,
    outlier_distribution,
    picture,
    sampling_probabilities,
)  # fmt: skip


class Method(NamedTuple):
    """A point of the 2 x 2, and the published number of active layers (of 32) and of steps between two draws."""

    sampling: str | None  # how layers are drawn; None: all are trained
    projection: bool
    active: int = 32
    interval: int = 50


METHODS = {
    "owlore": Method("outlier", True, active=5, interval=50),
    "lisa": Method("uniform", False, active=2, interval=3),
    "galore": Method(None, True),
    "lora": Method(None, False),
    "full": Method(None, False),
}
# The least that owlore trains in a small model, where the paper's shares of a 7B come last of all methods (README.md).
MIN_ACTIVE, MIN_RANK = 4, 32
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
BAD_STEPS = 10  # in a row, whose loss or gradients are not finite, end the run
HELD_OUT, HELD_OUT_RECORDS = 0.05, 500  # share of --data, and at most so many records, kept for validation


def flag_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", default=str(TINY), help="checkpoint folder, Meta's or Hugging Face's layout (default: tiny/)")
    add("--data", help="training data: .txt, .json or .jsonl (default with the default --ckpt: tiny/train.json)")
    add("--val-data", help=f"validation data (default: {HELD_OUT:.0%}% of --data, held out; for tiny/ its val.json)")
    add("--out", help="run folder (default: the first free of runs/NAME, runs/NAME-2, ...)")
    add("--method", choices=METHODS, default="owlore", help="default: %(default)s")
    add("--sampling", choices=("outlier", "uniform", "reverse", "increasing", "decreasing"), help="how layers are drawn (default: owlore outlier, lisa uniform)")  # fmt: skip
    add("--active", type=int, help="layers trained at a time (default: 5 of every 32, at least 4; lisa 2 of every 32)")
    add("--interval", type=int, help="optimizer steps between two draws (default: 50, lisa 3)")
    add("--rank", type=int, help="of the projection (default: dim / 16, which is 256 for a 7B, at least 32), 0 for owlore without projection; of lora's additions (default: dim / 128, at least 8)")  # fmt: skip
    add("--published", action="store_true", help="the paper's recipe in a small model, too: no least --active and --rank; moments kept as they are when the projection changes")  # fmt: skip
    add("--lora-alpha", type=float, help="lora's additions count alpha / rank (default: twice the rank)")
    add("--update-gap", type=int, default=100, help="steps of a matrix between two projections (default: %(default)s)")
    add("--scale", type=float, default=1.0, help="of the projected update (default: %(default)s)")
    add("--svd", choices=("randomized", "exact"), default="randomized", help="default: %(default)s")
    add("--threshold", type=float, help="outliers are this many times above the mean (default: 13 at 4096 dimensions, less for smaller models)")  # fmt: skip
    add("--embeddings", choices=("full", "projected", "frozen"), help="training of embedding and output head (default: full, lora frozen)")  # fmt: skip
    add("--lr", type=float, help="peak learning rate (default: 3e-4 * (4096 / dim)^0.75, which is 3e-4 for a 7B)")
    add("--weight-decay", type=float, default=0.0, help="default: %(default)s")
    add("--max-grad-norm", type=float, default=1.0, help="clip gradients to this norm (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="rows in an optimizer step (default: %(default)s)")
    add("--micro-batch-size", type=int, help="rows at once in forward and backward (default: --batch-size)")
    add("--seq-len", type=int, help="tokens in a row (default: 512, or the model's context where that is shorter)")
    add("--epochs", type=int, default=1, help="default: %(default)s")
    add("--steps", type=int, help="optimizer steps; overrides --epochs")
    add("--eval-every", type=int, help="steps between evaluations (default: a quarter of the run)")
    add("--save-every", type=int, help="steps between checkpoints (default: only at the end)")
    add("--keep", type=int, default=1, help="checkpoints to keep (default: %(default)s, the newest)")
    add("--dtype", choices=("bf16", "fp32"), help="of weights and activations (default: bf16 on cuda, fp32 elsewhere)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--compile", action="store_true", default=None, help="torch.compile frozen blocks: slow at first, faster later")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--eval-only", action="store_true", help="evaluate --ckpt on the validation data, and end")
    add("--plot", nargs="+", metavar="RUN", help="draw the curves of these run folders over each other, into curves.png in the first of them or the file --out")  # fmt: skip
    add("--resume", action="store_true", help="continue the run in --out, with its flags")
    return parser


def parse_args() -> tuple[argparse.Namespace, dict]:
    """All flags with their defaults, and those given on the command line alone."""
    parser = flag_parser()
    args = parser.parse_args()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args())
    for flag in given.keys() & {"ckpt", "data", "val_data"}:
        given[flag] = os.path.abspath(given[flag])  # so that a run can be resumed from anywhere
        setattr(args, flag, given[flag])
    return args, given


def fill_defaults(args: argparse.Namespace) -> None:
    """Defaults that depend on other flags alone. Raises InputError for flags out of range."""
    tiny = Path(args.ckpt) == TINY
    if args.data is None:
        if not tiny and not (args.eval_only and args.val_data):
            raise InputError("--data: give the file to train on")
        args.data = str(TINY / "train.json") if tiny else None
        args.val_data = args.val_data or str(TINY / "val.json")
    if args.out is None:
        name, number = Path("runs") / (Path(args.ckpt).resolve().name), 1
        args.out = str(name)
        while Path(args.out).exists():
            number += 1
            args.out = f"{name}-{number}"
    method = METHODS[args.method]
    for flag in ("sampling", "active", "interval", "compile"):
        if getattr(args, flag) is not None and not method.sampling:
            raise InputError(f"--{flag}: --method {args.method} trains all layers; leave it out, or use owlore or lisa")
    if args.published and args.method not in ("owlore", "galore"):
        raise InputError(f"--published: --method {args.method} projects nothing; leave it out")
    if args.lora_alpha is not None and args.method != "lora":
        raise InputError(f"--lora-alpha: --method {args.method} has no use for it; leave it out")
    args.sampling = args.sampling or method.sampling
    args.interval = method.interval if args.interval is None else args.interval
    args.embeddings = args.embeddings or ("frozen" if args.method == "lora" else "full")
    args.micro_batch_size = args.batch_size if args.micro_batch_size is None else args.micro_batch_size
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    if args.rank == 0 and (args.method != "owlore" or args.embeddings == "projected"):
        raise InputError("--rank 0 is owlore without projection; give another rank, or leave it out")
    for flag in ("active", "interval", "update_gap", "batch_size", "micro_batch_size", "seq_len", "epochs", "steps",
                 "eval_every", "save_every", "keep"):  # fmt: skip
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(args, flag)}")
    if args.rank is not None and args.rank < 0:
        raise InputError(f"--rank must be at least 1 (or 0, for owlore without projection), not {args.rank}")
    for flag in ("lr", "threshold", "scale", "max_grad_norm", "lora_alpha"):
        if getattr(args, flag) is not None and not 0 < getattr(args, flag) < math.inf:
            raise InputError(f"--{flag.replace('_', '-')} must be above 0, not {getattr(args, flag)}")
    if not 0 <= args.weight_decay < math.inf:
        raise InputError(f"--weight-decay must not be negative, not {args.weight_decay}")


def fit_to_size(args: argparse.Namespace, config: ModelConfig) -> None:
    """Defaults that follow the model's size: the published ones at 7B."""
    if args.active is None:
        share = math.ceil(METHODS[args.method].active / 32 * config.n_layers)
        least = MIN_ACTIVE if args.method == "owlore" and not args.published else 1
        args.active = min(max(share, least), config.n_layers)
    if args.rank is None and args.method == "lora":
        args.rank = max(8, config.dim // 128)
    elif args.rank is None:
        args.rank = max(config.dim // 16, 1 if args.published else MIN_RANK)
    args.lora_alpha = 2.0 * args.rank if args.lora_alpha is None else args.lora_alpha


def fit_to_model(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> None:
    """Defaults that depend on the model. Raises InputError for flags the model cannot follow."""
    config = model.config
    fit_to_size(args, config)
    args.threshold = default_threshold(config.dim) if args.threshold is None else args.threshold
    args.lr = 3e-4 * (4096 / config.dim) ** 0.75 if args.lr is None else args.lr
    args.seq_len = min(512, config.max_seq_len) if args.seq_len is None else args.seq_len
    if args.active > config.n_layers:
        raise InputError(f"--active {args.active}: the model has {config.n_layers} layers; use that or fewer")
    if args.seq_len > config.max_seq_len:
        raise InputError(f"--seq-len {args.seq_len}: the model's context is {config.max_seq_len}; use that or less")
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{args.ckpt}: {tokenizer.vocab_size} tokens in tokenizer, {config.vocab_size} in model")


def how_trained(name: str, parameter: Tensor, args: argparse.Namespace) -> str:
    """How a parameter is trained while its layer is active: "projected", "plain" or "frozen"."""
    if not name.startswith("layers."):
        if parameter.dim() == 2:  # embedding and head
            return {"full": "plain"}.get(args.embeddings, args.embeddings)
        return "frozen" if args.method == "lora" else "plain"
    if args.method == "lora":
        return "plain" if name.endswith((".A", ".B")) else "frozen"
    return "projected" if METHODS[args.method].projection and args.rank and parameter.dim() == 2 else "plain"


def build_optimizer(model: Transformer, args: argparse.Namespace) -> ProjectedAdam:
    """One group of projected parameters, one of plain ones; the others are frozen."""
    groups = {"plain": {"params": []}, "frozen": {"params": []}}
    groups["projected"] = {"params": [], "rank": args.rank, "update_gap": args.update_gap, "scale": args.scale}
    for name, parameter in model.named_parameters():
        kind = how_trained(name, parameter, args)
        parameter.requires_grad_(kind != "frozen")
        groups[kind]["params"].append(parameter)
    del groups["frozen"]
    used = [group for group in groups.values() if group["params"]]
    return ProjectedAdam(used, args.lr, weight_decay=args.weight_decay, svd=args.svd, rotate=not args.published)


def read_batch(data: Dataset, args: argparse.Namespace, step: int, pin: bool) -> list[tuple[Tensor, Tensor, float]]:
    """The micro-batches of a step: tokens, targets (int [B, T]) and the share of the step's targets that they hold.
    pin: in pinned memory, from which `.to(device)` need not wait."""
    # The order of an epoch is a function of seed and epoch alone, so a resumed run reads what it would have read.
    epoch, position = divmod(step, math.ceil(len(data.rows) / args.batch_size))
    order = np.random.default_rng([args.seed, epoch]).permutation(len(data.rows))
    index = order[position * args.batch_size : (position + 1) * args.batch_size]
    batches = [data.batch(index[n : n + args.micro_batch_size]) for n in range(0, len(index), args.micro_batch_size)]
    counts = [(targets != -100).sum().item() for _, targets in batches]
    if pin:
        batches = [(tokens.pin_memory(), targets.pin_memory()) for tokens, targets in batches]
    return [(tokens, targets, count / max(sum(counts), 1)) for (tokens, targets), count in zip(batches, counts)]


def accumulate_gradients(
    model: Transformer, optimizer: ProjectedAdam, micro_batches: list[tuple], max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """What an optimizer step needs. micro_batches: tokens, targets (int [B, T]) and this part's share of all targets,
    so that the parts add up to the mean over the whole batch. Returns the loss and the gradients' norm before clipping;
    where one of them is not finite, the optimizer's next step will change nothing."""
    optimizer.zero_grad()
    loss = 0.0
    for tokens, targets, share in micro_batches:
        part = model(tokens, targets) * share
        part.backward()  # projects each matrix's gradient as soon as it exists
        loss = loss + part.detach()
    norm = optimizer.clip_grad_norm_(max_grad_norm)
    optimizer.found_inf = ~torch.isfinite(loss + norm)
    return loss, norm


def memory_parts(model: Transformer, args: argparse.Namespace) -> dict[str, int]:
    """Bytes that a training step will take, in parts, with the most costly layers active.

    `activations` are those of the backward pass of the topmost block, the moment when most are alive: what each block
    keeps, with `checkpoint_blocks` its input alone, and what one block needs while it is recomputed. The optimizer step
    comes after they are freed: the peak is the larger of the two moments."""
    config, size = model.config, model.output.weight.element_size()

    def cost(name: str, p: Tensor) -> np.ndarray:
        """Bytes of optimizer state and of gradient."""
        kind, larger = how_trained(name, p, args), max(p.shape)
        if kind == "projected":  # fp32: the basis and two moments; the gradient
            rank = min(args.rank, *p.shape)
            return np.array([4 * rank * (min(p.shape) + 2 * larger), 4 * rank * larger])
        return np.array([8, size]) * p.numel() * (kind == "plain")  # fp32 moments; the gradient as it is

    parameters = list(model.named_parameters())  # a tied matrix is there once
    layer = sum(cost(name, p) for name, p in parameters if name.startswith("layers.0."))
    outer = sum(cost(name, p) for name, p in parameters if not name.startswith("layers."))
    state, gradients = outer + (args.active if args.sampling else config.n_layers) * layer

    tokens = args.micro_batch_size * args.seq_len
    attention = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    # of one block: both norms' inputs and outputs, queries, keys, values and result; gate, up and what they make
    block = tokens * size * (5 * config.dim + attention + 4 * config.hidden_dim)
    kept = tokens * size * config.dim if model.checkpoint_blocks else block
    largest = max(p.numel() for p in model.layers[0].parameters())
    head = 0 if args.embeddings == "frozen" else size * model.output.weight.numel()
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "optimizer state": int(state),
        "gradients": int(gradients),
        "activations": config.n_layers * kept + block + size * largest + head,
    }


def peak(parts: dict[str, int]) -> int:
    """The most bytes alive at once: activations, or gradients, beside weights and optimizer state."""
    return parts["weights"] + parts["optimizer state"] + max(parts["activations"], parts["gradients"])


def ways_to_save(model: Transformer, args: argparse.Namespace) -> str:
    """Which flags would make a training step smaller, and by how much."""
    now, ways = peak(memory_parts(model, args)), []
    changes = {
        "--micro-batch-size": {"micro_batch_size": max(1, args.micro_batch_size // 2)},
        "--seq-len": {"seq_len": max(1, args.seq_len // 2)},
        "--embeddings": {"embeddings": "projected" if args.embeddings == "full" else "frozen"},
        "--method": {"method": "owlore", "sampling": "outlier", "active": math.ceil(model.config.n_layers * 5 / 32)},
        "--active": {"active": max(1, args.active // 2)},
        "--rank": {"rank": max(1, args.rank // 2)},
    }
    if args.method in ("lora", "owlore"):
        del changes["--method"]
    if args.rank == 0:  # projects nothing: `fill_defaults` refuses it with projected embeddings
        changes["--embeddings"] = {"embeddings": "frozen"}
        del changes["--rank"]
    for flag, change in changes.items():
        saved = now - peak(memory_parts(model, argparse.Namespace(**vars(args) | change)))
        if saved > 0:
            ways.append((saved, f"{flag} {next(iter(change.values()))} would save {saved / 2**30:.2f} GiB"))
    return "; ".join(text for _, text in sorted(ways, reverse=True))


# Evaluation


def by_length(dataset: Dataset, batch_size: int) -> list[np.ndarray]:
    """Rows in batches of similar length, so that little is padded."""
    order = np.argsort(dataset.rows[:, 1] - dataset.rows[:, 0], kind="stable")
    return [order[n : n + batch_size] for n in range(0, len(order), batch_size)]


@torch.no_grad()
def validation_loss(model: Transformer, dataset: Dataset, batch_size: int, device: str) -> float:
    """Mean loss per target token, in nats, of a model in eval mode."""
    total, count = 0.0, 0
    for index in tqdm(by_length(dataset, batch_size), "validation loss", leave=False, disable=None):
        tokens, targets = dataset.batch(index)
        n = (targets != -100).sum().item()
        total += model(tokens.to(device), targets.to(device)).item() * n
        count += n
    return total / max(count, 1)


@torch.no_grad()
def choice_accuracy(
    model: Transformer, records: list[Record], choices: Dataset, batch_size: int, device: str
) -> tuple[float, float]:
    """Share of multiple-choice records whose right completion is the likeliest, by the sum of its tokens'
    log-likelihoods, and by that sum over its length in characters (as lm-eval's acc and acc_norm). The model is in eval
    mode.

    choices: one row for each choice of each record, in order."""
    scores = np.zeros(len(choices.rows))
    for index in tqdm(by_length(choices, batch_size), "accuracy", leave=False, disable=None):
        tokens, targets = (t.to(device) for t in choices.batch(index))
        kept = targets != -100
        logits = model.output(model.hidden(tokens)[kept]).float()  # [completion tokens, V]
        losses = torch.zeros(kept.shape, device=device)
        losses[kept] = F.cross_entropy(logits, targets[kept], reduction="none")
        scores[index] = -losses.sum(1).cpu().numpy()
    right, start = np.zeros(2), 0
    for record in records:
        score = scores[start : start + len(record.choices)]
        start += len(record.choices)
        right += [np.argmax(s) == record.answer for s in (score, score / [len(choice) for choice in record.choices])]
    return tuple((right / len(records)).tolist())


class Validation(NamedTuple):
    """What a model is evaluated on."""

    dataset: Dataset
    choice_records: list[Record]  # those of it with choices
    choices: Dataset | None  # one row for each choice of each of them, in order


def build_validation(records: list[Record], tokenizer: Tokenizer, seq_len: int) -> Validation:
    """Tokenise validation records, and the choices of those that have some."""
    choice_records = [record for record in records if record.choices]
    rows = [Record([(r.turns[0][0], choice)]) for r in choice_records for choice in r.choices]
    choices = build_dataset(rows, tokenizer, seq_len, eos=False) if rows else None
    return Validation(build_dataset(records, tokenizer, seq_len), choice_records, choices)


def evaluate(model: Transformer, validation: Validation, args: argparse.Namespace) -> dict[str, float]:
    """`val_loss`, and where there are choices `val_accuracy` and `val_accuracy_norm`. Leaves the model in train
    mode."""
    model.eval()
    rest = args.micro_batch_size, args.device
    result = {"val_loss": validation_loss(model, validation.dataset, *rest)}
    if validation.choices:
        accuracies = choice_accuracy(model, validation.choice_records, validation.choices, *rest)
        result["val_accuracy"], result["val_accuracy_norm"] = accuracies
    model.train()
    return result


def describe(result: dict) -> str:
    """An evaluation in words."""
    text = f"validation loss {result['val_loss']:.4f}"
    if "val_accuracy" in result:
        text += f", accuracy {result['val_accuracy']:.1%} (by length {result['val_accuracy_norm']:.1%})"
    return text


# The run folder
#
#     args.json                       the flags, written first
#     metrics.jsonl                   one JSON object per logged step
#     checkpoints/step-N/model        the weights, an ordinary checkpoint folder
#     checkpoints/step-N/state        what --resume needs beside them
#     model, state                    links to those of the newest checkpoint


def open_run(out: Path) -> IO:
    """Make the folder and lock it for this process. Raises InputError where that fails or another run holds it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--out {out}: another run is writing there; choose another folder, or wait") from None
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; choose another folder") from None
    return lock


def refuse_files(out: Path) -> None:
    """Raise InputError where a folder holds anything but what a run killed before it began would leave."""
    if out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - {".lock", "args.json.tmp"}):
        raise InputError(f"--out {out}: holds files already; choose another folder, or --resume its run")


def begin_run(out: Path, args: argparse.Namespace) -> IO:
    """Make and lock the folder of a new run, and write its flags. Returns the lock. Raises InputError as `open_run` and
    `refuse_files` do."""
    lock = open_run(out)
    refuse_files(out)  # of a run that began and ended while this one was loading
    with atomic_write(out / "args.json") as file:
        file.write(json.dumps(vars(args), indent=1).encode())
    return lock


def saved_flags(out: Path) -> dict:
    """The flags of the run in a folder. Raises InputError where they are damaged."""
    flags = read_json(out / "args.json")
    if not isinstance(flags, dict) or set(flags) != {action.dest for action in flag_parser()._actions} - {"help"}:
        raise InputError(f"{out / 'args.json'}: damaged; the checkpoints beside it are still usable")
    return flags


def load_state(out: Path) -> dict | None:
    """What the newest checkpoint left beside its weights; None before the first. Raises InputError where it is
    damaged."""
    path = out / "state" / "state.pt"
    if not path.is_file():
        if (out / "state").is_symlink():
            raise InputError(f"{out / 'state'}: points to a checkpoint that is gone; choose another --out")
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no one error for a damaged file
        raise InputError(f"{path}: damaged ({type(error).__name__}); the model beside it is still usable") from None


def save_checkpoint(out: Path, keep: int, model: Transformer, source: Path, state: dict) -> None:
    """Write checkpoints/step-N beside the others, complete and synced, before anything points to it; then link `state`
    and `model` to it, and remove all but the `keep` newest. Raises OSError or RuntimeError where writing fails; what
    was there before is then still there."""
    source = out / "model" if (out / "model").exists() else source  # of a resumed run: its first source may be gone
    folder = out / "checkpoints" / f"step-{state['step']:07}"
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        (beside / "state").mkdir(parents=True)
        save_model(model, beside / "model", checkpoint_layout(source))
        copy_tokenizer(source, beside / "model")
        with atomic_write(beside / "state" / "state.pt") as file:
            torch.save(state, file)
        shutil.rmtree(folder, ignore_errors=True)  # of a run killed before it was linked
        sync_folder(beside)
        os.rename(beside, folder)
        sync_folder(out / "checkpoints")
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for name in ("state", "model"):  # `state` decides where --resume goes on, and its folder has the model to it
        link = out / f"{name}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.relative_to(out) / name)
        os.replace(link, out / name)
    sync_folder(out)
    # What a killed run left may be half written, or newer than where --resume went on from: it does not count.
    folders = set((out / "checkpoints").iterdir())
    for old in folders - set(sorted(f for f in folders if f.suffix != ".tmp" and f <= folder)[-keep:]):
        shutil.rmtree(old)


def adapters(model: Transformer) -> dict[str, Tensor]:
    """LoRA's additions, which the saved weights hold merged."""
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith((".A", ".B"))}


class Metrics:
    """`metrics.jsonl`. On resume, what was logged after the checkpoint's step is dropped."""

    def __init__(self, path: Path, step: int):
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # cut short when the run was killed
                break
        with atomic_write(path) as file:
            file.writelines(f"{line}\n".encode() for line in kept)
        self.file = open(path, "a", buffering=1)

    def log(self, **values) -> None:
        """Append one object. A full disk costs the log, not the run."""
        try:
            self.file.write(json.dumps(values) + "\n")
        except OSError as error:
            tqdm.write(f"metrics.jsonl: {error.strerror}; step {values['step']} is not logged")


def peak_memory(device: str) -> int:
    """Peak bytes so far: of tensors on a GPU, of the whole process elsewhere."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plot_runs(runs: list[Path], out: Path | None) -> None:
    """Draw losses and accuracy of runs over each other, and below them which layers each trained when."""
    logs = {}
    for run in runs:
        lines = read_text(run / "metrics.jsonl").splitlines()
        logs[run] = [parse_json(line, run / "metrics.jsonl", n) for n, line in enumerate(lines, 1)]
    curves = (0, "loss", ":"), (0, "val_loss", "-o"), (1, "val_accuracy", "-o")
    with picture(out or runs[0] / "curves.png", "--out", 2 + len(runs), height=6 + 1.6 * len(runs)) as axes:
        for n, (run, rows) in enumerate(logs.items()):
            for axis, key, style in curves:
                points = [(row["step"], row[key]) for row in rows if key in row]
                label = None if key == "loss" else run.name
                axes[axis].plot(*zip(*points) if points else ([], []), style, color=f"C{n}", ms=3, lw=1, label=label)
            trained = [(row["step"], layer) for row in rows for layer in row.get("active", [])]
            axes[2 + n].scatter(*zip(*trained) if trained else ([], []), s=4, marker="s", linewidths=0)
            axes[2 + n].set(ylabel=f"layer\n({run.name})")
        axes[0].set(ylabel="loss (dotted: training)")
        axes[0].legend()
        axes[1].set(ylabel="accuracy", ylim=(0, 1))
        axes[-1].set(xlabel="step")


# The run


def resolve_run(args: argparse.Namespace, given: dict) -> tuple[argparse.Namespace, IO | None]:
    """The run's flags, those that depend on the model excepted, and the lock of its folder where it is one to continue:
    it has the flags that it began with. given: the flags of the command line alone. Raises InputError where they
    disagree."""
    if args.resume and args.out is None:
        raise InputError("--resume: name the run's folder with --out")
    if args.resume and (Path(args.out) / "args.json").exists():
        out = Path(args.out)
        lock, flags = open_run(out), saved_flags(out)
        for flag, value in given.items():
            if flag not in ("resume", "out") and value != flags[flag]:
                name = flag.replace("_", "-")
                raise InputError(f"--{name} {value}: the run in {out} has {flags[flag]}; leave the flag out")
        return argparse.Namespace(**flags | {"out": args.out}), lock
    if args.resume and not given.keys() & {"ckpt", "data"}:
        raise InputError(f"--resume: no run to continue in --out {args.out}; name its folder")
    fill_defaults(args)  # with --resume: killed before it began, so it begins
    if not args.eval_only:
        refuse_files(Path(args.out))
    return args, None


def catch_signals() -> list[int]:
    """From now on the first SIGINT or SIGTERM is only noted, in the list returned; a second one ends the process."""
    caught: list[int] = []

    def on_signal(number: int, _) -> None:
        """The handler of both."""
        if caught:
            os._exit(128 + number)
        caught.append(number)
        tqdm.write("stopping after this step, to save; once more to stop at once")

    for number in STOP_SIGNALS:
        signal.signal(number, on_signal)
    return caught


def fit_to_device(model: Transformer, args: argparse.Namespace) -> None:
    """Have blocks recomputed, at a quarter of the time, only where their activations would not fit on a GPU
    otherwise."""
    if args.device.startswith("cuda"):
        room = torch.cuda.get_device_properties(args.device).total_memory - 2 * 2**30
        model.checkpoint_blocks = peak(memory_parts(model, args)) > room


def load_all_records(args: argparse.Namespace) -> tuple[list[Record], list[Record]]:
    """Records to train on (none with --eval-only) and to validate on."""
    if args.val_data:
        return [] if args.eval_only else load_records(args.data), load_records(args.val_data)
    return split_records(load_records(args.data), HELD_OUT, HELD_OUT_RECORDS, args.seed)


def score_layers(model: Transformer, data: Dataset, args: argparse.Namespace) -> Tensor:
    """D_l, fp32 [L], on rows of the training data."""
    rows = tqdm(data.sample(CALIBRATION_ROWS, args.seed), "scoring outliers", leave=False, disable=None)
    return outlier_distribution(model, model.layers, (row.to(args.device) for row in rows), args.threshold)


def random_state(device: str) -> dict[str, Tensor]:
    """Of torch's generators."""
    state = {"rng": torch.get_rng_state()}
    return state | {"cuda_rng": torch.cuda.get_rng_state(device)} if device.startswith("cuda") else state


def restore(
    state: dict, model: Transformer, optimizer: ProjectedAdam, sampler: LayerSampler | None, device: str
) -> None:
    """Put everything but the weights, which were loaded with the model, into the state of a checkpoint."""
    optimizer.load_state_dict(state["optimizer"])
    model.load_state_dict(state["adapters"], strict=False)
    if sampler:
        sampler.load_state_dict(state["sampler"])
    torch.set_rng_state(state["rng"])
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def print_sizes(model: Transformer, args: argparse.Namespace, out: Path) -> None:
    """What a run will take of memory and disk."""
    parts = memory_parts(model, args)
    saved = parts["weights"] + parts["optimizer state"]
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    print(f"memory: about {peak(parts) / 2**30:.2f} GiB at its peak, of {listed}")
    print(f"disk: about {saved / 2**30:.2f} GiB for a checkpoint, {args.keep + 1} of them while saving; "
          f"{shutil.disk_usage(out).free / 2**30:.1f} GiB are free")  # fmt: skip


def run(args: argparse.Namespace, given: dict) -> None:
    """The whole run: load, score, sample, train, evaluate, save, report. given: the flags of the command line alone."""
    args, lock = resolve_run(args, given)
    out, resumed = Path(args.out), lock is not None
    state = load_state(out) if resumed else None
    # A checkpoint's state and model are in one folder, whatever the links said when the run was killed. What lora saved
    # is merged: it goes on from the weights it began with.
    source = (out / "state").resolve().parent / "model" if state and args.method != "lora" else Path(args.ckpt)
    device = args.device
    on_cuda = device.startswith("cuda")

    checkpoint_layout(source)
    tokenizer = load_tokenizer(source)
    train_records, val_records = load_all_records(args)
    torch.manual_seed(args.seed)
    model = load_model(source, device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    fit_to_model(args, model, tokenizer)
    if args.method == "lora":
        add_lora(model, args.rank, args.lora_alpha)
    fit_to_device(model, args)
    validation = build_validation(val_records, tokenizer, args.seq_len)
    if args.eval_only:
        result = describe(evaluate(model, validation, args))
        print(f"{args.ckpt} on {args.val_data or 'the held-out part of ' + args.data}: {result}")
        return

    data = load_dataset(train_records, tokenizer, args.seq_len)
    for name, dataset in ((args.data, data), (args.val_data or "held-out part", validation.dataset)):
        if dataset.truncated:
            share = f"{dataset.truncated} of {len(dataset.rows)} records"
            print(f"{name}: {share} are longer than --seq-len {args.seq_len}: their prompts were cut from the left")
    if not data.predicts():
        raise InputError(f"{args.data}: nothing to learn: every completion is empty")
    fingerprint = zlib.crc32(data.ids)
    if state and fingerprint != state["data"]:
        raise InputError(f"--data {args.data}: is not what the run in {out} was reading; put the file of then back")
    steps = args.steps or args.epochs * math.ceil(len(data.rows) / args.batch_size)
    eval_every = args.eval_every or math.ceil(steps / 4)

    sampler, outliers = None, None
    if args.sampling:
        # 1. Score
        outliers = state["outliers"] if state else score_layers(model, data, args)
        # 2. Sample
        probabilities = sampling_probabilities(outliers, args.sampling)
        sampler = LayerSampler(model.layers, probabilities, args.active, args.seed)
        if args.compile:  # now that scoring, which looks into the blocks, is done
            torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is, with a warning
            model.compile_frozen_blocks()
    # 3. Project
    optimizer = build_optimizer(model, args)

    step, skipped, bad, saved = 0, 0, 0, None
    if state:
        step, skipped, saved = state["step"], state["skipped"], state["step"]
        restore(state, model, optimizer, sampler, device)
    if not resumed:
        lock = begin_run(out, args)  # noqa: F841 (held until the process ends)
    metrics = Metrics(out / "metrics.jsonl", step if state else -1)

    def save() -> str | None:
        """Save a checkpoint, unless this step has one; what went wrong, if it failed."""
        nonlocal saved
        if saved == step:
            return None
        now = {"step": step, "skipped": skipped, "before": before, "after": after, "outliers": outliers,
               "data": fingerprint, "adapters": adapters(model), "optimizer": optimizer.state_dict(),
               "sampler": sampler and sampler.state_dict(), **random_state(device)}  # fmt: skip
        try:
            save_checkpoint(out, args.keep, model, source, now)
        except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
            return f"--out {out}: step {step} could not be saved ({error}); the checkpoint before it is kept"
        saved = step
        return None

    print_sizes(model, args, out)
    where = f"{steps} steps on {device} in {args.dtype}"
    print(f"{args.method}: {args.ckpt} on {args.data} ({len(data.rows)} rows), {where}")
    if state:
        before, after = state["before"], state["after"]
    else:
        before = after = evaluate(model, validation, args)
        metrics.log(step=0, **before)

    signals = catch_signals()
    reader = ThreadPoolExecutor(1)
    batches = reader.submit(read_batch, data, args, step, on_cuda)
    bar = tqdm(total=steps, initial=step, desc="training", dynamic_ncols=True)
    while step < steps and not signals:
        began = time.perf_counter()
        if sampler and step % args.interval == 0:
            sampler.resample()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / steps)  # linear to zero
        micro_batches = [
            (tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True), share)
            for tokens, targets, share in batches.result()
        ]
        batches = reader.submit(read_batch, data, args, step + 1, on_cuda)  # while this step computes
        try:
            loss, norm = accumulate_gradients(model, optimizer, micro_batches, args.max_grad_norm)
            optimizer.step()
        except torch.OutOfMemoryError:
            problem = f"--device {device}: out of memory in step {step + 1}"
            raise InputError(f"{problem}; {ways_to_save(model, args)}") from None
        # But for a refresh's SVD, a step's only wait for the device.
        loss, norm = torch.stack([loss, norm.to(loss)]).tolist()
        good = math.isfinite(loss + norm)
        step += 1
        skipped, bad = skipped + (not good), 0 if good else bad + 1
        row = {
            "step": step,
            "loss": loss,
            "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "active": sampler.drawn if sampler else list(range(len(model.layers))),
            "tokens_per_second": sum(tokens.numel() for tokens, *_ in micro_batches) / (time.perf_counter() - began),
            "memory": peak_memory(device),
            "skipped": skipped,
        }
        metrics.log(**row)
        bar.set_postfix_str(
            f"loss {row['loss']:.3f}, lr {row['lr']:.1e}, {row['tokens_per_second']:,.0f} tok/s"
            + (f", layers {','.join(map(str, sampler.drawn))}" if sampler else ", all layers")
            + (f", {skipped} steps skipped" if skipped else "")
        )
        bar.update()
        if bad == BAD_STEPS:
            raise InputError(f"--lr {args.lr}: {bad} steps in a row had a loss or gradients that are not finite; "
                             f"try a smaller one. What was saved up to step {step - bad} is kept in {out}")  # fmt: skip
        if step % eval_every == 0 or step == steps:
            after = evaluate(model, validation, args)
            metrics.log(step=step, **after)
            tqdm.write(f"step {step}: " + describe(after))
        if args.save_every and step % args.save_every == 0 and step < steps and not bad and (problem := save()):
            tqdm.write(problem)
    bar.close()
    if (step == steps or signals) and (problem := save()):
        raise InputError(f"{problem}; free space, then: python train.py --resume --out {out}")
    if signals and step < steps:
        print(f"stopped at step {step} of {steps}; to go on: python train.py --resume --out {out}")
        sys.exit(128 + signals[0])

    if sampler:
        print(f"\nShare of outliers (above {args.threshold:g} times the mean) and sampling probability by layer:")
        columns = {"outliers %": (100 * outliers).tolist(), "p": probabilities.tolist()}
        print(layer_chart(columns, outliers.tolist()))
    if failed := int(optimizer.failed_refreshes):
        print(f"{failed} new projections failed (a gradient not finite, or its SVD); those before them were kept")
    print(f"\nbefore: {describe(before)}\nafter:  {describe(after)}\nsaved:  {out / 'model'}")


def main() -> None:
    """`python train.py`."""
    args, given = parse_args()
    if args.plot:
        return plot_runs([Path(folder) for folder in args.plot], args.out and Path(args.out))
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        run(args, given)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_command(main)
