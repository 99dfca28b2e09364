"""Fine-tune a LLaMA-style checkpoint by OwLore, or by one of the methods it is compared with: one loop serves all.

                     gradients as they are      gradients projected
    all layers       full                       galore, owlore
    sampled layers   lisa, owlore --rank 0      owlore --active 5, as in the paper

LoRA, the fifth method, freezes the model and trains low-rank additions to its linears instead.

Weights and activations are bf16 on a GPU (fp32 on a CPU); loss, moments and updates are fp32.

    python train.py                                             the embedded example, two minutes on a CPU
    python train.py --ckpt llama2-7b --data commonsense_170k.json --out runs/commonsense
"""

import os
import signal

if __name__ == "__main__":  # already here, as importing torch takes its seconds: Ctrl-C ends in a line
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"\nstopped; what was saved is kept\n") and 130))

import argparse
import contextlib
import errno
import fcntl
import io
import itertools
import json
import math
import resource
import shlex
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from functools import partial, partialmethod
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from tqdm import tqdm

import owlore
from data import TINY, Dataset, InputError, at_least, atomic_write, build_validation, command, common_beginning
from data import copy_tokenizer, grouped, lay_out, load_records, read_json, split_records, tokenizer_files
from model import CHUNK, ModelConfig, Transformer, add_lora, load, read_checkpoint, require_device, save_model
from owlore import LayerSampler, ProjectedAdam, outlier_distribution, sampling_probabilities

CALIBRATION_ROWS = 32  # of calibration text: enough that D_l moves by a few percent at most with the rows drawn
CHECKSUMS = "checksums.json"  # of a checkpoint's files
HELD_OUT, HELD_OUT_RECORDS = 0.05, 500  # the share of --data, and at most so many records, that is kept for validation
STEP = "step-" + 7 * "[0-9]"  # what the folders of checkpoints are called; others beside them are the user's
SAVE_SECONDS, SAVE_SHARE = 15 * 60, 0.05  # the least time between two checkpoints; the most of a run that they may take
# What may differ when a run is resumed: nothing here changes a step, but for the rate that follows from their number.
# That --data holds the same tokens its checksum tells; of lora, which reads --ckpt again, also that this is the same.
MAY_CHANGE = "resume out steps epochs save_every keep eval_every micro_batch_size offload device data val_data".split()
LEFT_BEHIND = {".lock", ".link", ".link.tmp", "args.json.tmp"}  # by a run that was killed before it began
MIN_RANK = 8  # the least default of --rank
EMBEDDINGS = "tok_embeddings.weight", "output.weight"  # what --embeddings is about: the embedding and the output head


class Method(NamedTuple):
    """A place in the 2 x 2, the active layers (of 32), and the steps between two draws."""

    sampling: str | None  # how layers are drawn; None: all are trained
    projection: bool
    active: int = 32
    interval: int | None = None


METHODS = {
    "owlore": Method("outlier", True, interval=50),
    "lisa": Method("uniform", False, active=2, interval=3),
    "galore": Method(None, True),
    "lora": Method(None, False),
    "full": Method(None, False),
}


def run(args: argparse.Namespace) -> None:
    """Load, score, sample, train, evaluate, save, report."""
    join_processes(args)
    settings, args = args, fit(args)  # what is saved, and what holds on this machine
    join_processes(args)  # if --offload has just been decided
    lock = claim(args) if args.resume and not rank() else None  # before anything in the folder is read
    state = load_state(Path(args.out)) if args.resume else {}
    base = first_values(args.ckpt) if args.method == "lora" and not args.eval_only else None  # it is read again later
    if base and state and state.get("base", base) != base:
        raise InputError(f"--ckpt {args.ckpt}: not the weights that this run began with; give their folder")
    model, tokenizer, data, validation = load_inputs(args, state)
    if args.eval_only:
        result = require_finite(evaluate(model, validation, args), args.ckpt, args)
        return print(f"{args.ckpt} on {args.val_data}: {describe(result)}")
    steps = planned_steps(data, args, state)
    require_room(model, args, steps, state.get("step", 0))
    lock = lock or (None if rank() else claim(args))  # before what takes long
    sampler = outliers = None
    if args.sampling and args.active < len(model.layers):
        outliers = gather(state.pop("outliers").clone() if state else score_layers(model, data, args))[0]  # 1. score
        p = sampling_probabilities(outliers, args.sampling)  # 2. sample
        sampler = LayerSampler(model.layers, p, args.active, args.seed)
        print(layer_chart({"outliers %": 100 * outliers, "p": p}))
    elif args.sampling:
        print(f"all {args.active} layers are trained, and none drawn; --active draws some at a time, as the paper does")
    optimizer = build_optimizer(model, args)  # 3. project
    if state:
        restore(state, model, optimizer, sampler)
    rows = f"{len(data.rows)} records in " * args.pack + f"{len(data.groups)} rows"
    shared = f", {processes()} processes" * (processes() > 1)
    print(f"{args.method}: {args.ckpt} on {args.data}, {rows}, {steps} steps, {args.device}, {args.dtype}{shared}")

    step, skipped, bad = state.get("step", 0), state.get("skipped", 0), 0
    before, after, limit, measured = map(state.get, ("before", "after", "limit", "measured"))  # measured: at which step
    checksum = zlib.crc32(validation.ids)
    begins = not state or state.get("validation", checksum) != checksum  # or goes on with other --val-data
    if begins:
        before = evaluate(model, validation, args)
        require_finite(before, Path(args.out) / "model" if state else args.ckpt, args)
        after, limit, measured = before, None, step  # after: the latest
    if not state:
        comment(before["val_loss"], model.config.vocab_size, args)
    text = "{desc} {bar} {n_fmt}/{total_fmt} {remaining}"  # what stands last is cut off on a narrow screen
    with (
        run_folder(settings, lock, state) as (out, metrics),
        note_signals() as signals,
        tqdm(total=steps, initial=step, bar_format=text, dynamic_ncols=True) as bar,
    ):
        if begins:
            log(metrics, step=step, **before)
        stopping, save_at = False, time.perf_counter() + SAVE_SECONDS
        while step < steps and not stopping:
            began = time.perf_counter()
            if sampler and step % args.interval == 0:
                sampler.resample()
            lr = args.lr * (1 - step / steps)  # linear to zero
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_ratio", 1)  # runs older than the flag have none
            batches, tokens = step_batches(data, args, step)
            loss, norm = training_step(model, optimizer, batches, args.max_grad_norm)
            step += 1
            finite, seconds = math.isfinite(loss + norm), time.perf_counter() - began
            if not limit:
                limit = far_above(max(before["val_loss"], loss if finite else 0), model.config.vocab_size)
            skipped += not finite
            bad = 0 if finite and loss <= limit else bad + 1
            row = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "skipped": skipped, "seconds": seconds,
                   "active": sampler.drawn if sampler else list(range(len(model.layers))),
                   "memory": peak_memory(args.device), "tokens_per_second": tokens / seconds}  # fmt: skip
            log(metrics, **row)
            bar.set_description_str(progress(row, len(model.layers)), refresh=False)
            bar.update()
            stopping, late = map(any, zip(*gather((signals, time.perf_counter() > save_at))))
            if step == steps or (not stopping and step % (args.eval_every or math.ceil(steps / 4)) == 0):
                after = evaluate(model, validation, args)
                log(metrics, step=step, **after)
                tqdm.write(f"step {step}: " + describe(after))
            due = step % args.save_every == 0 if args.save_every else late
            lost = bad >= min(10, steps / 2)  # so many in a row that are not finite, or far above
            if step == steps or stopping or lost or (due and not bad):
                require_health(model, validation, limit, bad * lost, args, out)
                now = {"step": step, "steps": steps, "skipped": skipped, "limit": limit, "before": before,
                       "after": after, "measured": measured, "outliers": outliers, "logged": metrics.tell(),
                       "base": base, "data": zlib.crc32(data.ids), "validation": checksum,
                       **training_state(model, optimizer, sampler)}  # fmt: skip
                began = time.perf_counter()
                save_checkpoint(out, args, model, tokenizer, now)
                save_at = time.perf_counter() + max(SAVE_SECONDS, (time.perf_counter() - began) / SAVE_SHARE)
    if step < steps:
        print(f"stopped at step {step} of {steps}; to go on: {resume_command(out)}")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])
    first = f"step {measured}" if measured else "before"
    print(f"\n{first}: {describe(before)}\nafter:  {describe(after)}\nsaved:  {out / 'model'}")


def training_step(model: Transformer, optimizer: ProjectedAdam, batches: list, max_norm: float) -> tuple[float, float]:
    """One optimizer step on the micro-batches of `step_batches`, skipped if loss or gradients are not finite (a residual
    has moved the weights by then). Returns the mean loss over all targets, in nats, and the norm of the gradients
    before clipping."""
    optimizer.zero_grad()
    optimizer.micro_batches = len(batches)
    loss = 0.0
    for *batch, share in batches:
        part = model(*batch) * share
        part.backward()  # projects each matrix's gradient as soon as it is there
        loss = loss + part.detach()
    norm = optimizer.clip_grad_norm_(max_norm)
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    loss, norm = torch.stack([loss, norm.to(loss)]).tolist()  # the only wait for the device in a step without new bases
    if math.isfinite(loss + norm):
        optimizer.step()
    return loss, norm


def step_batches(data: Dataset, args: argparse.Namespace, step: int) -> tuple[list[tuple], int]:
    """The micro-batches of a step: tokens, targets and layout, as `lay_out`, and what their mean loss counts; and the
    number of tokens in the step. Of several processes each has its share of the rows."""
    # The order of an epoch is a function of seed and epoch alone, so a resumed run reads what it would have read.
    epoch, position = divmod(step, math.ceil(len(data.groups) / args.batch_size))
    order = np.random.default_rng([args.seed, epoch]).permutation(len(data.groups))
    groups = [data.groups[n] for n in order[position * args.batch_size :][: args.batch_size]]
    rows = [data[n] for group in groups for n in group]
    total = max(sum((row[1:] >= 0).sum() for row in rows), 1)
    here, most = groups[rank() :: processes()], math.ceil(len(groups) / processes())
    batches = []
    for n in range(0, most, args.micro_batch_size):
        part = here[n : n + args.micro_batch_size]
        batch = data.batch(sum(part or groups[:1], []))  # who has no row left takes part, but with what counts nothing
        share = processes() * len(batch[1]) / total if part else 0.0  # FSDP makes gradients the mean over processes
        batches.append((*(t.to(args.device) for t in batch), share))
    return batches, sum(len(row) - 1 for row in rows)


# Who is trained, and how


def how_trained(name: str, parameter: Tensor, args: argparse.Namespace) -> str:
    """How a parameter is trained while its layer is active: "projected", "plain" or "frozen"."""
    if name in EMBEDDINGS:
        return {"full": "plain"}.get(args.embeddings, args.embeddings)
    if args.method == "lora":
        return "plain" if name.endswith((".A", ".B")) else "frozen"
    return "projected" if METHODS[args.method].projection and args.rank and parameter.dim() == 2 else "plain"


def build_optimizer(model: Transformer, args: argparse.Namespace) -> ProjectedAdam:
    """A parameter group for each way in which some are trained, and each rate. What is left is frozen."""
    settings = {"plain": {}, "projected": {"rank": args.rank, "update_gap": args.update_gap, "scale": args.scale}}
    groups = {}
    for name, parameter in model.named_parameters():
        kind = how_trained(name, parameter, args)
        parameter.requires_grad_(kind != "frozen")
        if kind != "frozen":
            embedding = name in EMBEDDINGS
            ratio = args.embeddings_lr_ratio if embedding else args.norms_lr_ratio if parameter.dim() == 1 else 1.0
            residual = args.residual and kind == "projected" and not embedding
            new = {"params": [], "lr_ratio": ratio, "residual": residual, **settings[kind]}
            groups.setdefault((kind, ratio, residual), new)["params"].append(parameter)
    used = [groups[key] for key in sorted(groups)]
    optimizer = ProjectedAdam(used, args.lr, weight_decay=args.weight_decay, svd=args.svd, in_backward=True)
    owlore.take_factors(model, optimizer)
    return optimizer


def parameter_sizes(model: Transformer, args: argparse.Namespace) -> Iterator[tuple[str, bool, int, float, float]]:
    """Of each parameter how it is trained, whether it is a block's, and the bytes of its weight, of its gradient and of
    the optimizer's state; of layers that take turns the mean. The model may be without memory ("meta")."""
    for name, p in model.named_parameters():
        kind, inside, weight = how_trained(name, p, args), name.startswith("layers."), p.numel() * p.element_size()
        gradient, state = (weight, 8 * p.numel()) if kind == "plain" else (0, 0)
        if kind == "projected":  # R; its two moments and the basis, and for the residual the lengths of N's rows
            R, basis = (4 * min(args.rank, *p.shape) * side for side in (max(p.shape), min(p.shape)))
            gradient, state = R, 2 * R + basis + 4 * (max(p.shape) + 1) * (args.residual and inside)
        share = args.active / model.config.n_layers if args.sampling and inside else 1
        yield kind, inside, weight, gradient * share, state * share


def checkpoint_size(model: Transformer, args: argparse.Namespace) -> float:
    """Bytes of a checkpoint: weights, and the optimizer's state; of lora also what it trains, not merged."""
    sizes, lora = parameter_sizes(model, args), args.method == "lora"
    return sum(w * (1 + (lora and kind != "frozen" and not inside)) + state for kind, inside, w, _, state in sizes)


def step_memory(model: Transformer, args: argparse.Namespace) -> int:
    """Bytes of a training step on its device at its peak. On one card without --offload it is within 3 % of what
    bench/memory.py counts, tensor by tensor, at 7B."""
    c, size, tokens = model.config, model.output.weight.element_size(), args.micro_batch_size * args.seq_len
    sharded, parts = args.offload or processes() > 1, math.inf if args.offload else processes()
    held, ends, blocks, whole = 0, 0, 0, 0  # weights with their state; gradients of embedding and head; of blocks
    share = args.active / c.n_layers if args.sampling else 1  # of the layers, that is trained
    for kind, inside, weight, gradient, state in parameter_sizes(model, args):
        if kind == "projected":
            whole = max(whole, weight)  # one gradient is, at a time
            if sharded and inside and args.residual:  # for which they all wait, shared out
                gradient += share * weight / parts
        else:
            gradient, state = gradient / (parts if inside and sharded else 1), state / parts
        held += weight / parts + state
        if sharded:
            # Embedding and head are whole throughout. A block is while it is used, and the next on its way, and a copy;
            # and so is its gradient, with a copy to be reduced.
            held += (5 if kind == "plain" else 3) * weight / c.n_layers if inside else weight
        blocks, ends = blocks + gradient * inside, ends + gradient * (not inside)
    # What a block keeps of each token: its two inputs, queries, keys, values and what attention makes of them, gate and
    # up; if it is trained also the inputs of its linears and of the norms' weights
    frozen = 2 * c.dim + 2 * (c.n_heads + c.n_kv_heads) * c.head_dim + 2 * c.hidden_dim
    trained = frozen + (2 if args.method == "lora" else 4) * c.dim + c.hidden_dim
    kept, working = c.n_layers * (share * trained + (1 - share) * frozen), 2 * c.hidden_dim
    if args.recompute:  # its first input, and all the rest only while its backward pass runs
        kept, working = c.n_layers * c.dim, trained + 2 * c.hidden_dim * (args.method == "lora")
    working += c.hidden_dim * args.residual  # see owlore.Linear
    kept, working, output = (n * tokens * size for n in (kept, working, c.dim))
    more = args.micro_batch_size * processes() < args.batch_size  # micro-batches: the gradients before are there
    head = ends if more else ends / 2  # the embedding's comes last
    return int(held + ends * sharded + max(  # FSDP copies gradients that it reduces
        kept + output + head + 3 * 4 * CHUNK + whole * (args.embeddings == "projected"),  # the loss
        kept + output + head + working,  # the backward pass of the last block
        kept / c.n_layers + output + head + working + blocks * (1 - 1 / c.n_layers),  # of the first one
        output + ends + blocks + whole,  # and of the embedding
    ))  # fmt: skip


def host_memory(model: Transformer, args: argparse.Namespace) -> float:
    """Bytes of host memory that a step takes at most, of all processes of this machine: with --offload the weights, and
    what is not projected; and whole gradients where they wait for the last micro-batch (see owlore.ProjectedGradient),
    or, with --offload and a residual, for `step`. FSDP pins what it moves, and torch rounds that up to a power of two."""
    several, host = args.micro_batch_size * processes() < args.batch_size, 0.0
    for kind, inside, weight, _, state in parameter_sizes(model, args):
        share = args.active / model.config.n_layers if args.sampling and inside else 1
        pinned = processes() * 2 ** math.ceil(math.log2(weight / processes()))
        host += args.offload * pinned
        if kind == "plain":
            host += args.offload * (share * pinned + state)
        elif kind == "projected" and args.residual and inside and (args.offload or processes() > 1):
            host += args.offload * share * pinned  # shared out by FSDP
        elif kind == "projected":
            host += several * processes() * share * weight
    return host * int(os.environ.get("LOCAL_WORLD_SIZE", processes())) / processes()


def fit(args: argparse.Namespace) -> argparse.Namespace:
    """Settings with what the device has room for, in this order: activations kept or recomputed, fewer rows at once,
    weights in host memory. None of it changes what is trained. Raises InputError if nothing fits."""
    if processes() > args.batch_size and not args.eval_only:
        raise InputError(f"--batch-size {args.batch_size}: fewer rows than the {processes()} processes; start fewer")
    require_device(args.device)
    rows = math.ceil(args.batch_size / processes())
    sizes = [args.micro_batch_size or math.ceil(rows / 2**n) for n in range(rows.bit_length() + 1)]
    fitted = argparse.Namespace(**vars(args) | {"recompute": False, "micro_batch_size": sizes[0]})
    if not args.device.startswith("cuda"):
        return fitted
    with torch.device("meta"):
        model = Transformer(read_config(args)).to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
        if args.method == "lora":
            add_lora(model, args.rank, args.lora_alpha)
    room = torch.cuda.mem_get_info(args.device)[0]
    if args.eval_only:
        weights = sum(p.nbytes for p in model.parameters()) / processes()
        fitted.offload = args.offload or any(gather(weights > 0.8 * room))
        return fitted
    ways = [(False, sizes[0]), *((True, size) for size in dict.fromkeys(sizes))]
    for offload, (recompute, at_once) in itertools.product(dict.fromkeys((args.offload, True)), ways):
        fitted.offload, fitted.recompute, fitted.micro_batch_size = offload, recompute, at_once
        needed = 1.05 * step_memory(model, fitted)  # the allocator cannot use all there is
        if min(gather(room > needed)):
            print(f"a step takes {in_words(needed)} of {in_words(room)}: {at_once} of {rows} rows at once, activations "
                  f"{'recomputed' if recompute else 'kept'}, weights {'in host memory' if offload else 'on the device'}")  # fmt: skip
            host, free = host_memory(model, fitted), available_memory()
            if any(gather(host > free)):
                fewer, plain = {"batch_size": at_once * processes()}, {"residual": False}
                savings = {"--no-residual": plain, f"--batch-size {fewer['batch_size']}": fewer}
                savings[" ".join(savings)] = fewer | plain
                less = (flags for flags, change in savings.items()
                        if host_memory(model, argparse.Namespace(**vars(fitted) | change)) <= free)  # fmt: skip
                other = "a smaller --active, or " * bool(args.sampling) + "another --method or model"
                raise InputError(f"out of memory: a step takes {in_words(host)} of host memory, {in_words(free)} are free; "
                                 f"{next(less, other)} needs less")  # fmt: skip
            return fitted
    raise InputError(f"out of memory: a step takes {in_words(needed)} of {in_words(room)}, even with weights in host memory; "
                     "--embeddings projected or frozen, a smaller --rank or --seq-len need less")  # fmt: skip


def score_layers(model: Transformer, data: Dataset, args: argparse.Namespace) -> Tensor:
    """D_l, fp32 [L], on rows of the training data."""
    rows = tqdm(data.sample(CALIBRATION_ROWS, args.seed), "scoring outliers", leave=False, disable=None)
    try:
        D = outlier_distribution(model, model.layers, (row.to(args.device) for row in rows), args.threshold)
    except ValueError as error:
        raise InputError(f"{args.ckpt}: {error}") from None
    if isinstance(model, FSDPModule):
        model.reshard()  # embedding and head, which FSDP keeps whole after a forward pass, for the backward pass to come
    return D


# Evaluation


def evaluate(model: Transformer, validation: Dataset, args: argparse.Namespace) -> dict[str, float]:
    """`val_loss`, the mean loss per target token in nats. If there are choices, also the share of records whose right
    completion is the likeliest, `val_accuracy`, and by its log-likelihood per character, `val_accuracy_norm` (lm-eval's
    acc and acc_norm)."""
    model.eval()
    examples = row_losses(model, validation.examples, args)
    loss, count = sum(rows[0] for rows in examples)
    result = {"val_loss": loss / max(count, 1)}
    if records := validation.records:
        right = np.zeros(2)
        for record, rows in zip(records, (rows[1:] for rows in examples if len(rows) > 1)):
            losses, lengths = [loss for loss, _ in rows], [len(choice) for choice in record.choices]
            right += [record.choices[np.argmin(x)] == record.turns[0][1] for x in (losses, np.divide(losses, lengths))]
        result["val_accuracy"], result["val_accuracy_norm"] = right / len(records)
    model.train()
    return {name: float(value) for name, value in result.items()}


@torch.no_grad()
def row_losses(model: Transformer, examples: list[list[np.ndarray]], args: argparse.Namespace) -> list:
    """The summed loss of each row of each example, in nats, and the number of its targets, [2]. What the rows of an
    example have in common at the beginning is computed once."""
    sizes = [sum(map(len, rows)) - (len(rows) - 1) * common_beginning(rows) for rows in examples]
    most = args.micro_batch_size * args.seq_len  # tokens at once: no more than training has
    by_length = np.argsort(sizes, kind="stable")  # so that attention pads little
    groups = grouped(by_length, lambda group: len(group) * sizes[group[-1]] <= most)
    groups += groups[:1] * (-len(groups) % processes())  # as many for each: all take part in all forward passes
    results = {}
    for group in tqdm(groups[rank() :: processes()], "evaluating", leave=False, disable=None):
        tokens, targets, layout, parts = lay_out([examples[n] for n in group])
        loss = model(tokens.to(args.device), targets.to(args.device), layout.to(args.device), reduction="none")  # [K]
        sums = iter([np.array([part.sum(), len(part)]) for part in loss.cpu().double().split(parts)])
        for n in group:
            common = next(sums)
            results[n] = [common + next(sums) for _ in examples[n]]
    if isinstance(model, FSDPModule):
        model.reshard()  # as in score_layers
    results = {n: result for part in gather(results) for n, result in part.items()}
    return [results[n] for n in range(len(examples))]


# Settings: decided once, from what was typed, the model's config and the device


def flag_parser() -> argparse.ArgumentParser:
    """The command line. A bad flag ends the command with one line, without the usage text around it."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, formatter_class=raw)
    add, path, positive = parser.add_argument, os.path.abspath, at_least(1e-12, float)
    # fmt: off
    add("--ckpt", type=path, default=str(TINY), help="checkpoint folder, Meta's or Hugging Face's layout (default: tiny/)")
    add("--data", type=path, help="training data: .txt, .json or .jsonl (default with the default --ckpt: tiny/train.json)")
    add("--val-data", type=path, help=f"validation data (default: {HELD_OUT:.0%}% of --data, held out; for tiny/ its val.json)")
    add("--out", help="run folder (default: the first free of runs/NAME, runs/NAME-2, ...)")
    add("--method", choices=METHODS, default="owlore", help="default: %(default)s")
    add("--sampling", choices=("outlier", "uniform", "reverse", "increasing", "decreasing"), help="how layers are drawn (default: owlore outlier, lisa uniform)")
    add("--active", type=at_least(1), help="layers trained at a time (default: all; of every 32 layers, rounded up, 20 in the embedded example, 5 with owlore's --rank 0, 2 with lisa; the paper's 5 of 32, or fewer, set the other defaults as in the paper, too)")
    add("--interval", type=at_least(1), help="optimizer steps between two draws (default: 50, lisa 3)")
    add("--rank", type=at_least(0), help=f"of the projection (default: dim / 16; owlore less with more than the paper's 5 of 32 layers active, for the same memory: 40 for a 7B), 0 for owlore without projection; of lora's additions (default: dim / 128); at least {MIN_RANK}")
    add("--lora-alpha", type=positive, help="lora's additions count alpha / rank (default: twice the rank)")
    add("--update-gap", type=at_least(1), help="steps of a matrix between two projections (default: 100)")
    add("--scale", type=positive, help="of the projected update, not of what --residual adds (default: owlore 0.5, others 1, and so owlore with --rank 0 or at most the paper's --active)")
    add("--residual", action=argparse.BooleanOptionalAction, help="also follow what of a gradient the projection leaves out; in several micro-batches whole gradients wait for it in host memory, on several cards each one's rows of them (default: owlore, but not with --rank 0 or at most the paper's --active)")
    add("--svd", choices=("randomized", "exact"), help="default: randomized")
    add("--threshold", type=at_least(1e-12, float, 1000), help="outliers are this many times above the mean (default: 13 at 4096 dimensions, less for smaller models)")
    add("--embeddings", choices=("full", "projected", "frozen"), help="training of embedding and output head (default: owlore projected, lora frozen, others full, and so owlore with --rank 0 or at most the paper's --active)")
    add("--embeddings-lr-ratio", type=positive, help="their learning rate, times --lr (default: owlore 0.1, others 1, and so owlore with --rank 0 or at most the paper's --active, and the embedded example)")
    add("--norms-lr-ratio", type=at_least(0, float), help="that of the norms' weights, times --lr (default: owlore 0.05, others 1, and so owlore with --rank 0 or at most the paper's --active)")
    add("--lr", type=positive, help="peak learning rate, falling linearly to zero (default: 3e-4 * (4096 / dim)^0.75, which is 3e-4 for a 7B)")
    add("--weight-decay", type=at_least(0, float), default=0.0, help="default: %(default)s")
    add("--max-grad-norm", type=positive, default=1.0, help="clip gradients to this norm (default: %(default)s)")
    add("--batch-size", type=at_least(1), default=16, help="rows in an optimizer step (default: %(default)s)")
    add("--micro-batch-size", type=at_least(1), help="rows at once in forward and backward, of each process (default: all that fit)")
    add("--seq-len", type=at_least(1), help="tokens in a row (default: 512, or the model's context if that is shorter)")
    add("--offload", action="store_true", help="keep the weights in host memory, and bring in each block ahead of its use (default: if they do not fit)")
    add("--pack", action="store_true", help="fill each row with as many records as fit, as the published recipe does (default: one a row)")
    add("--epochs", type=at_least(1), default=1, help="default: %(default)s")
    add("--steps", type=at_least(1), help="optimizer steps; overrides --epochs. With --resume either may be another number than before")
    add("--eval-every", type=at_least(1), help="steps between evaluations (default: a quarter of the run)")
    add("--save-every", type=at_least(1), help=f"steps between checkpoints (default: {SAVE_SECONDS // 60} minutes, or more if saving takes long, and at the end)")
    add("--keep", type=at_least(1), default=2, help="checkpoints to keep (default: %(default)s, the newest)")
    add("--dtype", choices=("bf16", "fp32"), help="of weights and activations (default: bf16 on cuda, fp32 elsewhere)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--seed", type=at_least(0), default=0, help="default: %(default)s")
    add("--eval-only", action="store_true", help="evaluate --ckpt on the validation data, and end")
    add("--resume", action="store_true", help="continue the run in --out, with its settings")
    # fmt: on
    return parser


def read_settings(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The settings of a run: flags and defaults that follow the checkpoint's config, or with --resume what the run was
    begun with. Raises InputError if they disagree."""
    args = parser.parse_args()
    if args.resume and args.eval_only:
        raise InputError("--eval-only: evaluates the checkpoint in --ckpt (a run's is RUN/model); leave out --resume")
    file = Path(args.out or "") / "args.json"
    if args.resume and args.out and file.exists():
        older = {"embeddings_lr_ratio": 1.0, "norms_lr_ratio": 1.0, "residual": False, "scale": 1.0}
        saved = older | read_json(file)  # runs that are older than these flags have none
        if not {"ckpt", "data", "lr"} < saved.keys() <= vars(args).keys():
            raise InputError(f"{file}: damaged, or of a newer train.py; the checkpoints beside it are still usable")
        begun_with = argparse.Namespace(**saved | {"resume": True, "out": args.out, "epochs": None, "steps": None})
        args = parser.parse_args(namespace=begun_with)  # which flags that are given override
        for name in saved.keys() - MAY_CHANGE - ({"ckpt"} if saved.get("method") == "lora" else set()):
            if (value := getattr(args, name)) != saved[name]:
                flag = name.replace("_", "-")
                flag = f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag} {value}"
                raise InputError(f"{flag}: the run in {args.out} has {saved[name]}; leave the flag out")
        if not args.epochs:  # given --epochs take the place of the --steps it was begun with
            args.epochs, args.steps = saved.get("epochs", 1), args.steps or saved.get("steps")
    elif args.resume and not (args.out and args.data):  # with both it is one that was killed before it had begun
        raise InputError("--resume: give by --out the folder of a run that has begun, or the flags to begin one with")
    return decide_settings(args, read_config(args))  # also of flags that are younger than the run


def read_config(args: argparse.Namespace) -> ModelConfig:
    """That of --ckpt, or if it has gone since the run began, of what the run has saved."""
    saved = sorted(Path(args.out or "").glob(f"checkpoints/{STEP}/model"), reverse=True) if args.resume else []
    for folder in (args.ckpt, *saved):
        with contextlib.suppress(InputError):
            return read_checkpoint(folder)[0]
    return read_checkpoint(args.ckpt)[0]  # which says what is wrong


def decide_settings(args: argparse.Namespace, config: ModelConfig) -> argparse.Namespace:
    """Give each flag that was left out its value: at 7B the published one, but for layers, rank, scale, residual, and
    how norms, embedding and head learn. Raises InputError for flags that contradict each other or the model."""
    method, lora = METHODS[args.method], args.method == "lora"

    def require(condition: object, message: str) -> None:
        if not condition:
            raise InputError(message)

    given = {name: value for name, value in vars(args).items() if value is not None}
    typed = {} if args.resume else given  # a resumed run is given its own settings again
    for name in ["sampling", "active", "interval"] * (not method.sampling) + ["lora_alpha"] * (not lora):
        require(name not in typed, f"--{name.replace('_', '-')}: --method {args.method} does not use it; leave it out")
    example = Path(args.ckpt) == TINY and args.data is None
    if example:
        args.data, args.val_data = str(TINY / "train.json"), args.val_data or str(TINY / "val.json")
    require(args.val_data or not args.eval_only, "--eval-only: give --val-data, all of which is evaluated")
    require(args.data or args.eval_only, "--data: give the file to train on")
    at_once = args.micro_batch_size or 1
    require(at_once <= args.batch_size, f"--micro-batch-size {at_once}: there are {args.batch_size} rows in a step")

    few, rank = math.ceil(config.n_layers * 5 / 32), config.dim // 16  # the paper's active layers, and their rank
    shown = 20 if example and args.method == "owlore" else method.active  # the example shows how layers are drawn
    active = few if args.rank == 0 else math.ceil(config.n_layers * shown / 32)
    for name in ("sampling", "interval") if active == config.n_layers and not args.active else ():
        require(name not in typed, f"--{name}: all layers are trained, and none drawn; give --active, or leave it out")
    more = args.method == "owlore" and args.rank != 0 and (args.active or active) > few
    if more:  # at a lower rank, in the memory of the paper's
        rank = rank * few // (args.active or active)
    rank = max(MIN_RANK, config.dim // 128 if lora else rank)
    defaults = {
        "sampling": method.sampling,
        "active": method.sampling and active,
        "interval": method.interval,
        "rank": rank,
        "update_gap": 100,
        "svd": "randomized",
        "residual": more,
        "scale": 0.5 if more else 1.0,
        "lora_alpha": 2.0 * (args.rank or rank) if lora else None,
        "threshold": owlore.default_threshold(config.dim),
        "embeddings": "frozen" if lora else "projected" if more else "full",
        "embeddings_lr_ratio": 0.1 if more and not example else 1.0,  # the example's format is new: see `comment`
        "norms_lr_ratio": 0.05 if more else 1.0,
        "lr": 3e-4 * (4096 / config.dim) ** 0.75,
        "seq_len": min(512, config.max_seq_len),
        "dtype": "bf16" if args.device.startswith("cuda") else "fp32",
    }
    args = argparse.Namespace(**vars(args) | defaults | given)

    plain = args.method == "owlore" and args.embeddings != "projected"
    for name, frozen in (("embeddings", args.embeddings == "frozen"), ("norms", lora)):
        require(not frozen or f"{name}_lr_ratio" not in typed, f"--{name}-lr-ratio: {name} are frozen; leave it out")
    require(method.projection and args.rank or not args.residual, "--residual: no layer is projected; leave it out")
    require(args.rank or plain, "--rank 0 is owlore without projection; give another, or leave it out")
    projected = method.projection and args.rank or args.embeddings == "projected"
    idle = [] if projected else ["scale", "update_gap", "svd"] + ["rank"] * bool(args.rank and not lora)
    idle = dict.fromkeys(idle, "nothing is projected")
    if not args.sampling or args.active >= config.n_layers:
        idle["threshold"] = "no layers are drawn"
    for name in (name for name in typed if name in idle):
        warnings.warn(f"--{name.replace('_', '-')} has no effect: {idle[name]}", stacklevel=2)
    limits = {"seq_len": (config.max_seq_len, "context is"), "active": (config.n_layers, "layers are")}
    for name, (most, what) in (limits | {"rank": (config.dim, "width is")} if lora else limits).items():
        flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
        require((getattr(args, name) or 0) <= most, f"{flag}: the model's {what} {most}; use that or less")
    return args


# The run folder
#
#     args.json                 the settings, written first
#     metrics.jsonl             one JSON object per logged step
#     checkpoints/step-N/       model/ (an ordinary checkpoint folder) and state/ (what --resume needs besides)
#     latest                    a link to the newest of them; model and state are links into it


def claim(args: argparse.Namespace) -> IO[str]:
    """Claim a run's folder, --out or the first free of runs/NAME, runs/NAME-2, ..., for as long as the file that is
    returned is open. Raises InputError if --out holds something else, or another run is writing there."""
    for n in itertools.count(1):
        out = Path(args.out or f"runs/{Path(args.ckpt).name}" + f"-{n}" * (n > 1))
        begun = args.resume and (out / "args.json").exists()
        problem = "holds files already, and only --resume goes on with a run"
        if not out.is_dir() and os.path.lexists(out):
            problem = "is a file, or a link to nothing"
        elif begun or not out.is_dir() or {path.name for path in out.iterdir()} <= LEFT_BEHIND:
            out.mkdir(parents=True, exist_ok=True)
            lock = open(out / ".lock", "w")
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for half_written in out.glob("checkpoints/step-*.tmp"):
                    shutil.rmtree(half_written, ignore_errors=True)
                replace_link(out / ".link", ".")  # else it would be missed at the first checkpoint
                (out / ".link").unlink()
                return lock
            problem = "another run is writing there"
        if args.out:
            raise InputError(f"--out {out}: {problem}; choose another folder")


@contextlib.contextmanager
def run_folder(args: argparse.Namespace, lock: IO[str] | None, state: dict) -> Iterator[tuple[Path, IO[bytes]]]:
    """Begin to write a run in its folder, which is claimed already: its settings come first. Yields the folder, and
    metrics.jsonl to append to, without what was logged after the checkpoint that the run goes on from."""
    if rank():
        yield Path(gather(None)[0]), open(os.devnull, "wb")
        return
    with lock:
        out = Path(lock.name).parent
        args.out = str(out)
        with atomic_write(out / "args.json") as file:
            file.write(json.dumps(vars(args), indent=1).encode())
        gather(args.out)
        with open(out / "metrics.jsonl", "ab", buffering=0) as metrics:
            metrics.seek(metrics.truncate(min(metrics.tell(), state.get("logged", 0))))
            yield out, metrics


def log(metrics: IO[bytes], **row) -> None:
    """Append one object. A full disk costs the log, not the run."""
    line, end = json.dumps(row).encode() + b"\n", metrics.tell()
    try:
        if metrics.write(line) < len(line):  # all that there was room for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        metrics.seek(metrics.truncate(end))
        tqdm.write(f"metrics.jsonl: {error.strerror}; step {row['step']} is not logged")


def save_checkpoint(out: Path, args: argparse.Namespace, model: Transformer, tokenizer: dict, state: dict) -> None:
    """Write checkpoints/step-N beside the others, and point `latest` to it once it is complete and on disk; then remove
    all but the --keep newest. Raises InputError if that fails: what was there is kept."""
    if rank():  # it gives its rows to the first process, which writes
        save_model(model, out, write=False)
        if gather(None)[0]:
            sys.exit(2)
        return
    folder = out / "checkpoints" / f"step-{state['step']:07}"
    new, problem = folder.with_suffix(".tmp"), None
    shutil.rmtree(new, ignore_errors=True)
    try:
        save_model(model, new / "model", model.layout)
        (new / "state").mkdir()
        copy_tokenizer(tokenizer, new / "model")
        with atomic_write(new / "state" / "state.pt") as file:
            torch.save(state, file)
        (new / CHECKSUMS).write_text(json.dumps(checksums(new), indent=1))
        sync(new / CHECKSUMS, new / "model", new / "state", new)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it was linked
        os.rename(new, folder)
        link(out, folder)
    except (InputError, OSError, RuntimeError) as error:  # torch.save reports a failed write as a RuntimeError
        shutil.rmtree(new, ignore_errors=True)
        problem = (f"--out {out}: step {state['step']} could not be saved ({error}): it takes "
                   f"{in_words(checkpoint_size(model, args))}, {in_words(shutil.disk_usage(out).free)} are free; "
                   f"{kept(out)}; when that is mended: {resume_command(out)}")  # fmt: skip
    gather(problem)
    if problem:
        raise InputError(problem)
    folders = set((out / "checkpoints").glob(STEP))
    for old in folders - set(sorted(f for f in folders if f <= folder)[-args.keep :]):  # newer ones are not of this run
        shutil.rmtree(old, ignore_errors=True)


def link(out: Path, folder: Path) -> None:
    """Have `latest`, and `model` and `state` with it, point to a checkpoint, on disk too: a machine may die."""
    for name, target in (("latest", folder.relative_to(out)), ("model", "latest/model"), ("state", "latest/state")):
        if (out / name).is_dir() and not (out / name).is_symlink():
            raise InputError(f"{out / name}: a folder where a run has a link, as scp -r and cp -L leave it; remove latest, "
                             f"model and state in {out}: checkpoints/ has all that is in them")  # fmt: skip
        replace_link(out / name, target)
    sync(folder.parent, out)


def replace_link(path: Path, target: str | Path) -> None:
    """Have a link point to the target, in one go. Raises InputError where there are no links."""
    new = path.with_name(path.name + ".tmp")
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        os.replace(new, path)
    except OSError as error:
        raise InputError(f"{path}: no link can be made ({error.strerror}); choose an --out on another disk") from None


def sync(*paths: Path) -> None:
    """Have files' contents, and the names in folders, on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not sync folders
                raise
        finally:
            os.close(descriptor)


def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file of a checkpoint, by its name in it."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS):
        name = str(path.relative_to(folder))
        with open(path, "rb") as file:
            while part := file.read(2**24):
                sums[name] = zlib.crc32(part, sums.get(name, 0))
    return sums


def damage(folder: Path) -> str | None:
    """The first file of a checkpoint that is not what was written; None if all are."""
    try:
        written, there = read_json(folder / CHECKSUMS), checksums(folder)
    except (OSError, InputError):  # if no checkpoint has any, they were written before this project kept them
        return CHECKSUMS if any(folder.parent.glob(f"*/{CHECKSUMS}")) else None
    return next((name for name in written if there.get(name) != written[name]), None)


def resume_command(out: Path) -> str:
    return f"python train.py --resume --out {shlex.quote(str(out))}"


def kept(out: Path) -> str:
    """What is saved of a run, in words."""
    latest = out / "latest"
    return f"{latest.resolve().name} is kept" if latest.exists() else "nothing had been saved before"


def require_room(model: Transformer, args: argparse.Namespace, steps: int, done: int) -> None:
    """Raise InputError if the disk has no room for the checkpoints that a run will have at a time."""
    size, out = checkpoint_size(model, args), Path(args.out or "runs").absolute()
    there, every = len(list(out.glob(f"checkpoints/{STEP}"))), args.save_every or 1
    # One is written before another is removed.
    count = max(1, min(args.keep + 1 - there, math.ceil(steps / every) - done // every))
    free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free
    if count * size > free:
        raise InputError(f"--out {args.out or 'runs'}: {count} checkpoint(s) take {in_words(count * size)} there, "
                         f"{in_words(free)} are free; a smaller --keep, or --save-every {steps} to save at the end only, "
                         "need less")  # fmt: skip


def far_above(loss: float, vocab_size: int) -> float:
    """The loss from which on a run has diverged: 3 nats above the one before training, where the right tokens are 20 times
    less likely, or nearly as bad as a uniform guess, if that comes first."""
    return loss + min(3.0, max(1.0, 0.9 * (math.log(vocab_size) - loss)))


def require_health(
    model: Transformer, validation: Dataset, limit: float, bad: int, args: argparse.Namespace, out: Path
) -> None:
    """Raise InputError if the run has diverged: too many steps in a row were not good (`bad`, else 0), or the weights are
    such that no fp16 could hold them, or that the loss on some validation rows is above the limit or not finite."""
    # At most 32 rows, from all over the data: a file may begin with another kind of records than the rest.
    examples = [rows[:1] for rows in validation.examples[:: math.ceil(len(validation.examples) / 32)]]
    loss, count = sum(rows[0] for rows in row_losses(model, examples, args))
    loss, most = loss / max(count, 1), torch.finfo(torch.float16).max
    largest = [torch.linalg.vector_norm(w, torch.inf) for w in map(owlore.own, model.parameters()) if w.numel()]
    problem = "" if all(gather(all(norm <= most for norm in largest))) else "weights are too large"
    problem = problem or ("" if loss <= limit else f"the loss is {loss:.4g}")
    problem = problem or bad and f"in {bad} steps in a row loss or gradients were not finite, or the loss was far above"
    if problem:
        raise InputError(f"diverged: {problem} (more than {limit:.4g} is far above the loss before training); begin anew "
                         f"with a smaller --lr than {args.lr:.3g}; {kept(out)}")  # fmt: skip


def load_state(out: Path) -> dict:
    """What the newest checkpoint that is as it was written holds besides weights, {} before the first; `latest` points to
    it then. Others are set aside, and told. Raises InputError if none is as it was."""
    folders = sorted((out / "checkpoints").glob(STEP), reverse=True)
    begun, changed = bool(folders) or (out / "latest").is_symlink(), []
    while not rank() and folders and (broken := damage(folders[0])):
        print(f"{folders[0] / broken}: damaged, half written, or changed since it was saved")
        changed.append(folders.pop(0))
    if not rank() and folders:
        link(out, folders[0])
        for folder in changed:  # the next checkpoint of that number must not take its place
            aside = next(p for n in itertools.count() if not (p := folder.with_suffix(f".damaged{n or ''}")).exists())
            folder.rename(aside)
            print(f"going on from {folders[0].name}; what is in {folder.name} is kept as {aside}")
    folder = gather(folders[0] if folders else None)[0]  # nobody reads out/model before it is linked
    if not folder:
        if begun:
            raise InputError(f"{out / 'checkpoints'}: every checkpoint is damaged, changed or gone; put back what was "
                             "changed, or choose another --out")  # fmt: skip
        return {}
    path = folder / "state" / "state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load has no one error for a damaged file
        raise InputError(f"{path}: damaged ({type(error).__name__}); the model beside it is still usable") from None


def planned_steps(data: Dataset, args: argparse.Namespace, state: dict) -> int:
    """The steps of a run. Of a resumed one it says what another number changes; one that is done already is refused."""
    steps = args.steps or args.epochs * math.ceil(len(data.groups) / args.batch_size)
    done, planned = state.get("step", 0), state.get("steps", steps)
    if steps != planned:
        if steps <= done:
            raise InputError(f"--steps, --epochs: {done} steps are done already; {steps} are no more than that")
        now, before = (args.lr * (1 - done / n) for n in (steps, planned))
        print(f"{steps} steps instead of {planned}: from step {done} on the learning rate is that of a run of {steps}, "
              f"{now:.3g} instead of {before:.3g}, and falls to zero at their end")  # fmt: skip
    return steps


def training_state(model: Transformer, optimizer: ProjectedAdam, sampler: LayerSampler | None) -> dict:
    """What `restore` takes, besides the saved weights; in the first process with all rows of what is sharded."""
    named, adapters = dict(model.named_parameters()), {}
    lora = any(name.endswith(".A") for name in named)  # whose saved weights are merged, so it goes on from --ckpt
    for name, p in named.items() if lora else ():
        if p.requires_grad:
            value = owlore.whole(p.detach()).cpu()
            adapters |= {} if rank() else {name: value}
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in state["state"].items():
        p = parameters[index]
        if owlore.is_sharded(p) and "basis" not in moments:
            rows = {key: owlore.whole(value, p) for key, value in moments.items() if isinstance(value, Tensor)}
            state["state"][index] = moments | ({} if rank() else {key: value.cpu() for key, value in rows.items()})
    return {"adapters": adapters, "optimizer": state, "sampler": sampler and sampler.state_dict()}


def restore(state: dict, model: Transformer, optimizer: ProjectedAdam, sampler: LayerSampler | None) -> None:
    """Go on where a checkpoint's state was taken."""
    # Popped: what is mapped keeps its room on the disk when the checkpoint is removed.
    optimizer.load_state_dict(state.pop("optimizer"))
    adapters = state.pop("adapters")
    if adapters and not adapters.keys() >= {name for name, p in model.named_parameters() if p.requires_grad}:
        raise InputError("--resume: this run is of a release that did not save lora's embedding and head; begin anew")
    for name, value in adapters.items():
        p = model.get_parameter(name).detach()
        owlore.own(p).copy_(owlore.own_rows(value, p))
    if sampler:
        sampler.load_state_dict(state.pop("sampler"))


# Around the loop


def load_inputs(args: argparse.Namespace, state: dict) -> tuple[Transformer, dict, Dataset | None, Dataset]:
    """The model, its `tokenizer_files`, and what it is trained on (nothing with --eval-only) and validated on. Raises
    InputError if that is not what a resumed run was reading."""
    if args.val_data:
        records, held_out = [] if args.eval_only else load_records(args.data), load_records(args.val_data)
    else:
        records, held_out = split_records(load_records(args.data), HELD_OUT, HELD_OUT_RECORDS, args.seed)
    known = {tuple(record.turns) for record in held_out}.intersection(tuple(record.turns) for record in records)
    if twice := sum(tuple(record.turns) in known for record in held_out):
        where = "remove doubles from --data" + ", or give --val-data" * (not args.val_data)
        warnings.warn(f"{twice} of {len(held_out)} validation records are trained on as well: {where}", stacklevel=2)
    torch.manual_seed(args.seed)
    sharded, lora = args.offload or processes() > 1, args.method == "lora"
    source = Path(args.out) / "model" if state and not lora else args.ckpt  # see training_state
    model, tokenizer = load(source, args, partial(shard, args=args) if sharded else None)
    if lora and not sharded:
        add_lora(model, args.rank, args.lora_alpha)
    model.checkpoint_blocks = args.recompute
    validation = build_validation(held_out, tokenizer, args.seq_len)
    data = None if args.eval_only else Dataset(records, tokenizer, args.seq_len)
    if data and state and state["data"] != zlib.crc32(data.ids):
        raise InputError("--data: the training records are not those that this run was reading; put the old file back, "
                         "and leave out --val-data if the run began without it")  # fmt: skip
    if args.pack and data:
        data.groups = data.packed(args.seq_len, args.seed)
    for name, dataset in ((args.data, data), (args.val_data or "held-out part", validation)):
        if dataset and (dataset.prompts_cut or dataset.completions_cut):
            print(f"{name}: of {len(dataset.rows)} records {dataset.prompts_cut} had their prompt cut, from the left, and "
                  f"{dataset.completions_cut} their completion, at its end: --seq-len {args.seq_len}")  # fmt: skip
    return model, tokenizer_files(Path(args.out) / "model" if state else args.ckpt), data, validation


def first_values(ckpt: str) -> int:
    """CRC-32 of the first values of each weight of a checkpoint, by which another model is told."""
    pieces = sorted(read_checkpoint(ckpt)[1].items())
    return zlib.crc32(b"".join(t.flatten()[:64].view(torch.uint8).numpy() for _, parts in pieces for t in parts))


def shard(model: Transformer, args: argparse.Namespace) -> str:
    """Have torch's FSDP2 share a model out among the processes, while it has no memory yet. Returns where its shards
    belong: with --offload in host memory, from which each block comes ahead of its use."""
    if args.method == "lora":
        add_lora(model, args.rank, args.lora_alpha)
    cuda = args.device.startswith("cuda")
    mesh = dist.device_mesh.init_device_mesh("cuda" if cuda else "cpu", (processes(),))
    policy = CPUOffloadPolicy(pin_memory=cuda) if args.offload else OffloadPolicy()
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, offload_policy=policy)
    return "cpu" if args.offload else args.device


def join_processes(args: argparse.Namespace) -> None:
    """Join the processes that torchrun has started, the first of which talks. FSDP needs a group for --offload, too."""
    launched, cuda = dist.is_torchelastic_launched(), args.device.startswith("cuda")
    if dist.is_initialized() or not (launched or args.offload):
        return
    if launched and args.device not in ("cuda", "cpu"):
        raise InputError(f"--device {args.device}: each process takes a card of its own; leave the number out")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if launched and cuda else args.device
    require_device(device)
    if cuda:
        torch.cuda.set_device(torch.device(device).index or 0)
    alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    if rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: object) -> list:
    """What each process has, in all of them."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values


def layer_chart(columns: dict[str, Sequence[float]]) -> str:
    """A table with a row per layer: columns of numbers by heading, and a bar for the last of them."""
    *_, last = columns.values()
    rows = [["layer", *columns, ""]]
    for n, row in enumerate(zip(*columns.values())):
        bar = "█" * round(30 * float(row[-1]) / (float(max(last)) or 1))
        rows.append([str(n), *(f"{x:.4f}" for x in row), bar])
    widths = [max(map(len, column)) for column in zip(*rows)][:-1] + [0]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def progress(row: dict, n_layers: int) -> str:
    """A logged step in words, few enough for 80 columns."""
    layers = "layers " + ",".join(map(str, row["active"]))
    if len(layers) > 24:
        layers = "all layers" if len(row["active"]) == n_layers else f"{len(row['active'])} of {n_layers} layers"
    skipped = f" {row['skipped']} skipped" * (row["skipped"] > 0)
    return f"loss {row['loss']:.3f} lr {row['lr']:.1e} {row['tokens_per_second']:,.0f} tok/s {layers}{skipped}"


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that Linux can give to this process. group: where it shows a container's own limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # there is no limit, or an old Linux shows it elsewhere
        used = int((group / "memory.current").read_text())
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(pages["active_file"]) + int(pages["inactive_file"])  # copies of files on disk: they give way
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free


def in_words(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:.2f} MiB"


def require_finite(result: dict, weights: str | Path, args: argparse.Namespace) -> dict:
    if not math.isfinite(loss := result["val_loss"]):
        raise InputError(f"{weights}: its loss is {loss}: damaged weights, or not for {args.dtype}")
    return result


def comment(loss: float, vocab_size: int, args: argparse.Namespace) -> None:
    """Say what a high loss before training comes from."""
    if loss > math.log(vocab_size):
        ways = [f"--embeddings {'projected' if args.rank else 'full'}"] * (args.embeddings == "frozen")
        ways += ["--embeddings-lr-ratio 1"] * (args.embeddings_lr_ratio < 1)
        how = f", and may learn it better with {' '.join(ways)}" if ways else ""
        print(f"before training the loss, {loss:.1f}, is above that of a uniform guess, {math.log(vocab_size):.1f}: the model "
              f"has not met this format yet{how} (for plain text it would mean that the tokenizer is another model's)")  # fmt: skip


def describe(result: dict) -> str:
    """An evaluation in words."""
    text = f"validation loss {result['val_loss']:.4f}"
    if "val_accuracy" in result:
        text += f", accuracy {result['val_accuracy']:.1%} (by length {result['val_accuracy_norm']:.1%})"
    return text


def peak_memory(device: str) -> int:
    """Peak bytes so far: of tensors on a GPU, of the whole process elsewhere."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Output(io.TextIOWrapper):
    """A stream whose reader may go away, as a closed terminal or a `tee` that Ctrl-C ends: a run goes on, or saves."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


@contextlib.contextmanager
def note_signals() -> Iterator[list[int]]:
    """Within this block the first SIGINT, SIGTERM or SIGHUP is only noted, in the list; a second one ends the process."""
    noted: list[int] = []

    def on_signal(number: int, _: object) -> None:
        if noted:
            os._exit(128 + number)
        noted.append(number)
        with contextlib.suppress(OSError):  # the terminal may be closed
            os.write(2, b"\nstopping after this step, to save; once more to stop at once\n")

    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN  # as nohup has it
    numbers = [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * hangs_up
    with contextlib.ExitStack() as stack:  # which restores the handlers there were
        for number in numbers:
            stack.callback(signal.signal, number, signal.signal(number, on_signal))
        yield noted


def show_layers() -> None:
    """`python owlore.py`: chart each layer's outliers, Hill alpha and sampling probability."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=show_layers.__doc__)
    parser.set_defaults(seed=0, dtype=None)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint folder, Meta's or Hugging Face's layout")
    add("--data", default=str(TINY / "train.json"), help="calibration text (default: that of tiny/)")
    add("--threshold", type=at_least(1e-12, float, 1000), help="default: 13 at 4096 dimensions, less for smaller ones")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")

    def show() -> None:
        args = parser.parse_args()
        model, tokenizer = load(args.ckpt, args)
        data = Dataset(load_records(args.data), tokenizer, min(512, model.config.max_seq_len))
        D = score_layers(model, data, args)
        layers = tqdm([owlore.find_linears(layer) for layer in model.layers], "Hill alpha", leave=False, disable=None)
        alphas = [sum(owlore.hill_alpha(linear.weight) for linear in layer) / len(layer) for layer in layers]
        print(layer_chart({"outliers %": 100 * D, "Hill alpha": alphas, "p": sampling_probabilities(D)}))

    command(parser, show)


def main() -> None:
    """`python train.py`."""
    parser = flag_parser()

    def error(message: str) -> None:
        time.sleep(2 * (rank() > 0))  # what all have met the first one says, and torchrun ends the others meanwhile
        argparse.ArgumentParser.error(parser, message)

    parser.error = error
    try:
        command(parser, lambda: run(read_settings(parser)))
        gather(None)  # nobody leaves while another may still want to hear from him
    except RuntimeError as problem:
        if processes() == 1:
            raise
        what = str(problem).splitlines()[0][:100]
        parser.error(f"another process of this run has failed ({what}); what was saved is kept")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    for name in ("stdout", "stderr"):  # None if it is closed
        stream = getattr(sys, name)
        buffer, encoding = (stream.buffer, stream.encoding) if stream else (open(os.devnull, "wb"), "utf-8")
        setattr(sys, name, Output(buffer, encoding, "backslashreplace", line_buffering=True))
    main()
