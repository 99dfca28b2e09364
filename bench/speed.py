"""How fast training is: against the published recipe built from transformers and galore-torch, and against the machine.

    data       the same with the records of a file, the peer's rows padded: tokens of text per second
    steps      both sides hold the same weights and take turns in one process: tokens per second between refreshes and
               their ratio, the share of the machine's matmul rate that is reached, and what a draw of new layers costs
    refresh    projection_basis, randomized beside the exact SVD: its time, and the energy that it captures; and two ways
               to make it faster that it does not use, a warm start and batches
    tokenise   100 MB of text: time and memory
    scale      one and two processes, and weights in host memory: tokens per second
    growth     tokens per second and peak memory over width, depth, length and rank, and what they are spent on

The peer is `LlamaForCausalLM` with gradient checkpointing, its layers sampled by toggling `requires_grad`, and
`GaLoreAdamW` on the matrices of the layers. Weights are random: speed does not depend on them. Only `data` and
`steps` need bench/requirements.txt.

    python bench/speed.py steps                                                       two CPU cores, minutes
    python bench/speed.py steps --model llama2-7b --batch-size 16 --seq-len 512 --alone         a GPU with 24 GB
    python bench/speed.py data --model runs/smollm2 --data ../shared/data/alpaca_en_demo.json --batch-size 16 --seq-len 512
    python bench/speed.py refresh
    python bench/speed.py tokenise --model ../shared/tokenizers/llama2
    python bench/speed.py growth
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from memory import GIB, MODELS, ROOT, LiveStorages, parse_shape, settings  # noqa: E402  (makes the project importable)

import train  # noqa: E402
from data import (  # noqa: E402
    TINY,
    Dataset,
    InputError,
    Layout,
    Record,
    Tokenizer,
    atomic_write,
    build_validation,
    command,
    load_records,
    load_tokenizer,
)
from model import ModelConfig, Transformer, hf_config, load_model, permute_rotary, to_hf_name  # noqa: E402
from owlore import LayerSampler, ProjectedAdam, projection_basis  # noqa: E402

SHAPES = MODELS | {"small": ModelConfig(dim=512, n_layers=8, n_heads=8, vocab_size=4096, multiple_of=32)}
INTERVAL = 50  # the recipe's steps between two draws
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of a loss: bf16 has 8 bits, and the two round differently


def clock(device: str) -> float:
    """Seconds, once the device has done all it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(run: Callable[[], object], device: str) -> float:
    """How long a call takes."""
    began = clock(device)
    run()
    return clock(device) - began


def spread(values: list[float], digits: str) -> str:
    """The median, and the least and the most."""
    return f"{median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP per second of the fastest of a few large square matmuls: what the machine, as it is now, can give."""
    rates = []
    for n in (4096, 8192, 16384) if device.startswith("cuda") else (1024, 2048, 3072):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        out = a @ b
        rates += [2 * n**3 / seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(5)]
    return max(rates)


def needed_flops(config: ModelConfig, tokens: int, active: int, rank: int, residual: bool) -> int:
    """FLOP of a step's matrix products with nothing recomputed and no more than the method asks for: through all layers
    forward and backward, for embeddings are trained, and the projected gradients R = dY^T (X P) of the active ones; with
    a residual G, R = G P and R P^T. Attention, a percent or two of a 7B, is left out."""
    query, key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = [(config.dim, query)] * 2 + [(config.dim, key)] * 2 + [(config.dim, config.hidden_dim)] * 3
    block, head = sum(m * n for m, n in shapes), config.dim * config.vocab_size
    projected = tokens * block + 2 * rank * block if residual else tokens * rank * sum(m + n for m, n in shapes)
    return 2 * (tokens * (2 * (config.n_layers * block + head) + head) + active * projected)


def executed_flops(run: Callable[[], object]) -> int:
    """FLOP of all matrix products but attention's that a call executes, the recomputed ones too."""
    aten = torch.ops.aten

    def addmm_(_, a: torch.Size, b: torch.Size, **kwargs) -> int:  # not one that the counter knows
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={aten.addmm_: addmm_}) as counter:
        run()
    return sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (aten.mm, aten.addmm, aten.addmm_, aten.bmm))


def build_ours(config: ModelConfig, args: argparse.Namespace) -> tuple[Transformer, ProjectedAdam, LayerSampler]:
    """This project's model with random weights, its optimizer, and a uniform sampler that has drawn. Embedding and head
    are trained in full, as the peer's are."""
    torch.manual_seed(args.seed)
    torch.set_default_dtype(args.dtype)
    with torch.device(args.device):
        model = Transformer(config)
    torch.set_default_dtype(torch.float32)
    model.checkpoint_blocks = not args.keep_activations
    flags = ["--active", str(args.active), "--rank", str(args.rank), "--device", args.device, "--embeddings", "full"]
    flags += ["--residual" if args.residual else "--no-residual"]
    sampler = LayerSampler(model.layers, torch.ones(config.n_layers), args.active, args.seed)
    optimizer = train.build_optimizer(model, settings(flags, config))
    sampler.resample()
    return model, optimizer, sampler


def build_peer(model: Transformer, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The published recipe, with the weights of `model` and the same draw. Raises InputError for a missing package."""
    try:
        from galore_torch import GaLoreAdamW
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise InputError(f"{args.what}: {error.name} is missing: pip install -r bench/requirements.txt") from None
    config = AutoConfig.for_model(**hf_config(model))
    with torch.device(args.device):
        peer = AutoModelForCausalLM.from_config(config, dtype=args.dtype, attn_implementation="sdpa")
    weights = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("wq.weight", "wk.weight")):
            weight = permute_rotary(weight, model.config.head_dim, to_hf=True)
        weights[to_hf_name(name)] = weight
    peer.load_state_dict(weights)
    peer.train()  # blocks are recomputed in this mode only
    peer.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    LayerSampler(peer.model.layers, torch.ones(model.config.n_layers), args.active, args.seed).resample()
    projected = [w for w in peer.model.layers.parameters() if w.dim() == 2]
    plain = [w for name, w in peer.named_parameters() if ".layers." not in name or w.dim() == 1]
    low_rank = dict(rank=args.rank, update_proj_gap=100, scale=1.0, proj_type="std")
    groups = [{"params": plain}, {"params": projected, **low_rank}]
    return peer, GaLoreAdamW(groups, lr=3e-4, no_deprecation_warning=True)


def check(losses: list[float], args: argparse.Namespace) -> None:
    """Raise InputError if the losses of a batch, here and in the peer, are not those of one model."""
    if not max(losses) - min(losses) <= TOLERANCE[args.dtype] * losses[0]:
        raise InputError(f"the losses, {losses[0]:.6f} here and {losses[1]:.6f} in the peer, differ: not one model")


def steps(args: argparse.Namespace) -> list[str]:
    """Training steps of this project and of the peer, in alternation."""
    config, device = args.config, args.device
    model, optimizer, sampler = build_ours(config, args)
    peer, peer_optimizer = (None, None) if args.alone else build_peer(model, args)
    tokens = torch.randint(config.vocab_size, (args.batch_size, args.seq_len), device=device)
    # The peer shifts its labels itself, and the last token of a row has none.
    positions = torch.arange(args.seq_len, device=device).repeat(args.batch_size)
    predicting = (positions < args.seq_len - 1).nonzero().flatten()
    batch = tokens.flatten(), tokens[:, 1:].flatten(), Layout([tuple(tokens.shape)], positions, None, predicting)

    def ours() -> None:
        train.training_step(model, optimizer, [(*batch, 1.0)], 1.0)

    def peer_gradients() -> None:
        peer_optimizer.zero_grad()
        peer(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(peer.parameters(), 1.0)

    def theirs() -> None:
        peer_gradients()
        peer_optimizer.step()

    sides = [ours] if args.alone else [ours, theirs]
    with torch.no_grad():
        losses = [model(*batch).item()]
        losses += [] if args.alone else [peer(input_ids=tokens, labels=tokens, use_cache=False).loss.item()]
    check(losses, args)
    rate = matmul_rate(args.dtype, device)
    ours()
    if not args.alone:
        peer_gradients()  # no step: on a large model its SVDs, which the first one needs, take minutes
    drawn = sampler.drawn
    sampler.activate([])
    optimizer.zero_grad()  # drops the state of all layers: all are new to the next step, as they are to the peer's
    sampler.activate(drawn)
    first = [seconds(run, device) for run in sides]
    times = [[] for _ in sides]  # seconds per step of each side, by round
    for number in tqdm(range(args.rounds), "rounds", leave=False, disable=None):
        for side, run in sorted(enumerate(sides), reverse=number % 2):
            run()  # warm again, after the other side's turn
            times[side].append(seconds(lambda: [run() for _ in range(args.steps)], device) / args.steps)

    shape = config, tokens.numel(), len(drawn), args.rank
    needed = [needed_flops(*shape, residual) for residual in (args.residual, False)]  # the peer follows none
    executed = [executed_flops(run) for run in sides]
    step = [median(side) for side in times]
    extra = [max(0.0, a - b) for a, b in zip(first, step)]
    rows = {
        "tokens per second between refreshes": [spread([tokens.numel() / t for t in side], ",.0f") for side in times],
        "seconds per step between refreshes": [spread(side, ".3g") for side in times],
        "share of the matmul rate, products that the method needs": [
            f"{n / t / rate:.1%}" for n, t in zip(needed, step)
        ],
        "share of the matmul rate, all products executed": [f"{n / t / rate:.1%}" for n, t in zip(executed, step)],
        f"seconds to refresh {len(drawn)} new layers": [f"{t:.3g}" for t in extra],
        f"share of a run, all layers new every {INTERVAL} steps": [
            f"{e / (INTERVAL * t + e):.1%}" for e, t in zip(extra, step)
        ],
    }
    recomputed = f"blocks {'not ' * args.keep_activations}recomputed" + (
        "" if args.alone else " here, and always by the peer"
    )
    ratio = [
        f"**Ratio of the median tokens per second: {step[-1] / step[0]:.2f}**; in a round "
        f"{spread([b / a for a, b in zip(times[0], times[-1])], '.2f')}.",
        "",
    ]
    return [
        f"{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters, {args.batch_size} x "
        f"{args.seq_len} tokens, {str(args.dtype)[6:]}, {len(drawn)} of {config.n_layers} layers active, rank "
        f"{args.rank}{' and a residual here' * args.residual}, {recomputed}, {args.rounds} rounds of {args.steps} steps. Square matmuls reach "
        f"{rate / 1e12:.3g} TFLOP/s. Loss of the first batch: {' and '.join(f'{loss:.5f}' for loss in losses)}.",
        "",
        *(ratio if len(sides) > 1 else []),
        f"| median (least to most) | this project |{' transformers + galore-torch |' * (len(sides) - 1)}",
        f"|{'---|' * (len(sides) + 1)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
    ]


def collate(rows: list[np.ndarray], device: str) -> dict[str, Tensor]:
    """The peer's batch of some rows, padded to the longest as transformers' collators do: ids, mask and labels."""
    whole = [torch.from_numpy(row.astype(np.int64)) for row in rows]
    labels = nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=-100)
    labels = torch.where(labels < 0, -100, labels)
    ids = nn.utils.rnn.pad_sequence([torch.where(row < 0, ~row, row) for row in whole], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "labels": labels.to(device)}


def real_data(args: argparse.Namespace) -> list[str]:
    """Steps on the records of a file. The peer pads a batch to its longest row; its batches are random, or rows of like
    length as transformers' group_by_length puts them together. Then an evaluation of the multiple-choice ones."""
    model, optimizer, _ = build_ours(args.config, args)
    peer, peer_optimizer = build_peer(model, args)
    from transformers.trainer_pt_utils import get_length_grouped_indices

    records, tokenizer = load_records(args.data), load_tokenizer(args.model)
    dataset = Dataset(records, tokenizer, args.seq_len)
    lengths, size = [len(row) for row in dataset], args.batch_size
    generator, random = torch.Generator().manual_seed(args.seed), np.random.default_rng(args.seed)
    grouped = get_length_grouped_indices(lengths, size, generator=generator)
    orders = {"random": random.permutation(len(lengths)), "by length": np.array(grouped)}
    # Whole batches only. Of those by length a random few stand for all, as a batch of long rows would not.
    count = args.rounds * args.steps
    starts = random.permutation(len(lengths) // size)[:count] * size
    batches = {name: [order[n : n + size] for n in starts] for name, order in orders.items()}

    def ours(index: np.ndarray) -> None:
        train.training_step(model, optimizer, [(*(t.to(args.device) for t in dataset.batch(index)), 1.0)], 1.0)

    def theirs(index: np.ndarray) -> None:
        peer_optimizer.zero_grad()
        peer(**collate([dataset[n] for n in index], args.device), use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        peer_optimizer.step()

    losses = []
    with torch.no_grad():
        for index in batches["random"][:3]:
            inputs = collate([dataset[n] for n in index], args.device)
            pair = [model(*(t.to(args.device) for t in dataset.batch(index))), peer(**inputs, use_cache=False).loss]
            losses.append([loss.item() for loss in pair])
            check(losses[-1], args)
    sides = {"this project": (ours, "random"), "the peer, random batches": (theirs, "random"),
             "the peer, sorted by length": (theirs, "by length")}  # fmt: skip
    for run, order in list(sides.values())[:2]:
        run(batches[order][0])  # warm, with first bases
    times, tokens, computed = ({name: [] for name in sides} for _ in range(3))
    for n in tqdm(range(count), "steps", leave=False, disable=None):
        for name, (run, order) in sorted(sides.items(), reverse=n % 2):
            index = batches[order][n % len(batches[order])]
            times[name].append(seconds(lambda: run(index), args.device))
            read = [lengths[i] for i in index]
            tokens[name].append(sum(read))
            computed[name].append(sum(read) if run is ours else size * max(read))
    rates = {name: sum(tokens[name]) / sum(times[name]) for name in sides}
    table = [f"| {name} | {rates[name]:,.0f} | {rates['this project'] / rates[name]:.2f} | "
             f"{sum(tokens[name]) / sum(computed[name]):.1%} |" for name in sides]  # fmt: skip
    lines = [
        f"{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters, random weights; "
        f"`{args.data}`, {len(dataset.rows)} records of at most {args.seq_len} tokens; {size} records a step, {count} steps "
        f"of each side in alternation; {str(args.dtype)[6:]}, {args.active} of {args.config.n_layers} layers active, rank "
        f"{args.rank}, blocks recomputed {'by the peer alone' if args.keep_activations else 'on both sides'}. Losses of the "
        f"first batches: {', '.join(f'{a:.5f} and {b:.5f}' for a, b in losses)}.",
        "",
        "| | tokens of text per second | this project's, times it | computed tokens that are text |",
        "|---|---|---|---|",
        *table,
    ]
    chosen = [record for record in records if record.choices][: 4 * size]
    return lines + (["", evaluation(model, chosen, tokenizer, args)] if chosen else [])


def evaluation(model: Transformer, records: list[Record], tokenizer: Tokenizer, args: argparse.Namespace) -> str:
    """Multiple choice, a prompt read once for its choices and once for each."""
    run = argparse.Namespace(micro_batch_size=args.batch_size, seq_len=args.seq_len, device=args.device)
    examples = build_validation(records, tokenizer, args.seq_len).examples
    alone = [[row] for rows in examples for row in rows]
    losses = {}

    def evaluate(name: str, rows: list) -> None:
        losses[name] = np.concatenate(train.row_losses(model, rows, run))[:, 0]

    shared, each = (
        seconds(lambda: evaluate(name, rows), args.device) for name, rows in (("shared", examples), ("alone", alone))
    )
    gap = np.abs(losses["shared"] - losses["alone"]).max()
    return (
        f"Evaluating {len(records)} of the records, with {len(alone) - len(records)} choices, takes {shared:.1f} s; each row "
        f"by itself, also without padding, {each:.1f} s, {each / shared:.2f} x. Losses differ by {gap:.1e} nats at most."
    )


def power_law(rows: int, columns: int, exponent: float) -> Tensor:
    """A random matrix whose singular values fall about as i^-exponent: fp32 [rows, columns]."""
    k = min(rows, columns)
    return (torch.randn(rows, k) / rows**0.5 * torch.arange(1, k + 1) ** -exponent) @ torch.randn(k, columns)


def text_gradient(model: Transformer, weight: Tensor) -> Tensor:
    """The gradient of one weight on 4096 tokens of the embedded text."""
    dataset = Dataset(load_records(TINY / "text.txt"), load_tokenizer(TINY), seq_len=256)
    model.requires_grad_(False)
    weight.requires_grad_()
    model(*dataset.batch(range(16))).backward()
    return weight.grad


def block_gradient(rows: int, columns: int) -> Tensor:
    """Of w1 in a model of one block as wide, with random weights: fp32 [rows, columns]."""
    dim, hidden_dim = sorted((rows, columns))
    model = Transformer(ModelConfig(dim=dim, n_layers=1, n_heads=1, hidden_dim=hidden_dim, vocab_size=1024))
    G = text_gradient(model, model.layers[0].feed_forward.w1.weight)
    return G if G.shape == (rows, columns) else G.T


def energy(G: Tensor, P: Tensor) -> float:
    """||G P||^2, or ||P^T G||^2 where P is on the left."""
    return (G.float() @ P if G.shape[1] == P.shape[0] else P.T @ G.float()).square().sum().item()


def refresh(args: argparse.Namespace) -> list[str]:
    """Time and energy of the randomized basis beside the exact one."""
    device, table = args.device, []
    matrices = {
        "singular values fall as 1 / i": lambda: power_law(*args.shape, 1.0),
        "singular values fall as 1 / sqrt(i)": lambda: power_law(*args.shape, 0.5),
        "gradient of w1, random weights, real text": lambda: block_gradient(*args.shape),
        "Gaussian noise, the worst case": lambda: torch.randn(args.shape),
    }
    for name, make in tqdm(matrices.items(), "matrices", leave=False, disable=None):
        G, bases = make().to(device, args.dtype), {}

        def find(svd: str) -> None:
            bases[svd] = projection_basis(G, args.rank, svd)

        find("randomized")  # warm
        times = [seconds(lambda: find("randomized"), device) for _ in range(args.rounds)]
        exact = seconds(lambda: find("exact"), device)
        share = energy(G, bases["randomized"]) / energy(G, bases["exact"])
        cells = [name, spread(times, ".3g"), f"{exact:.3g}", f"{exact / median(times):.1f}", f"{share:.5f}"]
        table.append(f"| {' | '.join(cells)} |")
    model = load_model(TINY)
    rank, shares = model.config.dim // 16, []
    for weight in [w for w in model.layers.parameters() if w.dim() == 2]:
        G = text_gradient(model, weight)
        shares.append(energy(G, projection_basis(G, rank)) / energy(G, projection_basis(G, rank, "exact")))
    return [
        f"A gradient of {args.shape[0]} x {args.shape[1]}, rank {args.rank}, {str(args.dtype)[6:]}: the basis of its "
        f"projection, randomized (median of {args.rounds} runs, least to most) and by the exact SVD (one run).",
        "",
        "| matrix | randomized, s | exact, s | times faster | energy, of the exact basis' |",
        "|---|---|---|---|---|",
        *table,
        "",
        f"The {len(shares)} gradients of the embedded model, which is trained, at rank {rank}: energy "
        f"{spread(shares, '.5f')}.",
        "",
        *warm_start(args),
        "",
        *batched(args),
    ]


def warm_basis(G: Tensor, P: Tensor) -> Tensor:
    """One subspace iteration from the basis before, on the right: an orthonormal basis of G^T G P."""
    return torch.linalg.qr(G.T @ (G @ P)).Q


def warm_start(args: argparse.Namespace) -> list[str]:
    """What the basis before is worth as the beginning of the next, when training has gone on for some steps."""
    rank, table = load_model(TINY).config.dim // 16, []
    for gap in tqdm((10, 50, 100), "gaps", leave=False, disable=None):
        model = load_model(TINY)
        dataset = Dataset(load_records(TINY / "text.txt"), load_tokenizer(TINY), seq_len=256)
        optimizer = ProjectedAdam([{"params": list(model.parameters())}], lr=1e-3)
        weights = [w for w in model.layers.parameters() if w.dim() == 2 and w.shape[0] >= w.shape[1]]

        def gradients(step: int) -> list[Tensor]:
            optimizer.zero_grad()
            model(*dataset.batch(np.arange(4 * step, 4 * step + 4) % len(dataset.rows))).backward()
            return [w.grad.clone() for w in weights]

        bases = [projection_basis(G, rank, "exact") for G in gradients(0)]
        for step in range(gap):
            gradients(step)
            optimizer.step()
        shares = {"no refresh": [], "warm start": [], "randomized, from nothing": []}
        for G, P in zip(gradients(gap), bases):
            best = energy(G, projection_basis(G, rank, "exact"))
            for name, basis in zip(shares, (P, warm_basis(G, P), projection_basis(G, rank))):
                shares[name].append(energy(G, basis) / best)
        table.append(f"| {' | '.join([str(gap), *(spread(share, '.4f') for share in shares.values())])} |")
    G, P = torch.randn(args.shape, device=args.device), torch.randn(min(args.shape), args.rank, device=args.device)
    G = G if args.shape[0] >= args.shape[1] else G.T
    warm = [seconds(lambda: warm_basis(G, P), args.device) for _ in range(args.rounds)]
    return [
        f"Warm start: one subspace iteration from the basis of some steps before. On {args.shape[0]} x {args.shape[1]} it "
        f"takes {spread(warm, '.3g')} s. The embedded model's gradients (4 rows of text) after as many steps of training, "
        f"rank {rank}, energy of the exact basis':",
        "",
        f"| steps | {' | '.join(shares)} |",
        "|---|---|---|---|",
        *table,
    ]


def batched(args: argparse.Namespace) -> list[str]:
    """The products that a refresh consists of, for four matrices of one shape together and one by one."""
    G = torch.randn(4, *sorted(args.shape, reverse=True), device=args.device, dtype=args.dtype)
    X = torch.randn(4, min(args.shape), args.rank // 4, device=args.device, dtype=args.dtype)
    runs = {"together": lambda: G.mT @ (G @ X), "one by one": lambda: [g.T @ (g @ x) for g, x in zip(G, X)]}
    times = {name: [seconds(run, args.device) for _ in range(args.rounds)] for name, run in runs.items()}
    listed = ", ".join(f"{name} {spread(values, '.3g')} s" for name, values in times.items())
    return [
        f"Batches: the product G^T G X of four such matrices, {args.rank // 4} columns: {listed}. Together they would need "
        f"all four gradients at once, {G.nbytes / 2**20:,.0f} MiB, which are otherwise freed one after the other."
    ]


def tokenise(args: argparse.Namespace) -> list[str]:
    """A long text."""
    sample = load_records(TINY / "text.txt")[0].turns[0][1]
    text = (sample * (args.megabytes * 10**6 // len(sample.encode()) + 1))[: args.megabytes * 10**6]
    records, tokenizer = [Record([("", text)], plain=True)], load_tokenizer(args.model)
    before, datasets = train.peak_memory("cpu"), []
    time = seconds(lambda: datasets.append(Dataset(records, tokenizer, args.seq_len)), "cpu")
    return [
        f"{args.megabytes} MB of plain text (that of tiny/, over and over) by the tokenizer of {args.model} "
        f"({tokenizer.vocab_size:,} tokens): {len(datasets[0].ids):,} tokens in {time:.1f} s, "
        f"{args.megabytes / time:.1f} MB/s, on one of {os.cpu_count()} cores. Beside the text and what was there before, "
        f"memory rose by {(train.peak_memory('cpu') - before) / 2**20:,.0f} MiB."
    ]


def scale(args: argparse.Namespace) -> list[str]:
    """train.py on one and on two processes, each with one thread, the weights whole, shared and in host memory."""
    model, flags = args.model if args.model not in SHAPES else str(TINY), ["--steps", str(10 * args.steps)]
    flags += ["--eval-every", "1000", "--batch-size", "16", "--device", "cpu"]
    flags += ["--ckpt", model] + (["--data", args.data] if args.data else [])
    ways = {"one": [], "one, weights in host memory": ["--offload"], "two": []}
    environment, table = os.environ | {"OMP_NUM_THREADS": "1"}, []
    for name, extra in tqdm(ways.items(), "ways", leave=False, disable=None):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if name == "two" else []
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *launcher, str(ROOT / "train.py"), *flags, *extra, "--out", f"{folder}/run"]
            subprocess.run(command, env=environment, check=True, capture_output=True)
            rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        rates = [row["tokens_per_second"] for row in rows if "loss" in row][3:]
        losses = [row["loss"] for row in rows if "loss" in row]
        table.append(f"| {name} | {spread(rates, ',.0f')} | {losses[0]:.5f} | {losses[-1]:.5f} |")
    return [
        f"{Path(model).name}, 16 rows a step, {10 * args.steps} steps of train.py, one thread in each process.",
        "",
        "| processes | tokens per second | first loss | last loss |",
        "|---|---|---|---|",
        *table,
    ]


# The base has the second value of each; the others are taken one at a time.
GROWTH = {"width": (128, 256, 512), "depth": (2, 4, 8), "length": (128, 256, 512), "rank": (8, 16, 32)}


def growth(args: argparse.Namespace) -> list[str]:
    """This project's own steps, over shapes that differ from a base in one number."""
    base = {name: values[1] for name, values in GROWTH.items()}
    shapes = [base] + [base | {name: value} for name, values in GROWTH.items() for value in (values[0], values[2])]
    rate, table = matmul_rate(args.dtype, args.device), []
    for shape in tqdm(shapes, "shapes", leave=False, disable=None):
        dim, length = shape["width"], shape["length"]
        config = ModelConfig(dim=dim, n_layers=shape["depth"], n_heads=dim // 64, vocab_size=4096, multiple_of=32)
        run = argparse.Namespace(**vars(args) | {"rank": shape["rank"], "active": -(-5 * config.n_layers // 32)})
        tokens = torch.randint(config.vocab_size, (args.batch_size, length), device=args.device)
        with LiveStorages() as live:
            model, optimizer, sampler = build_ours(config, run)

            def gradients() -> None:
                optimizer.zero_grad()
                model(tokens, tokens).backward()

            for _ in range(2):  # draws, two steps each: the second has the moments that the first one made
                sampler.resample()
                for _ in range(2):
                    gradients()
                    optimizer.step()
        passes, updates = [], []
        for _ in range(args.rounds + 1):
            passes.append(seconds(gradients, args.device))
            updates.append(seconds(optimizer.step, args.device))
        passes, update = median(passes[1:]), median(updates[1:])
        matmuls = executed_flops(gradients) / rate
        weights = sum(p.nbytes for p in model.parameters())
        state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        cells = [*map(str, shape.values()), f"{tokens.numel() / (passes + update):,.0f}"]
        cells += [f"{part / (passes + update):.0%}" for part in (matmuls, passes - matmuls, update)]
        cells += [f"{live.peak / 2**20:,.0f}"]
        cells += [f"{part / live.peak:.0%}" for part in (weights, state, live.peak - weights - state)]
        table.append(f"| {' | '.join(cells)} |")
    return [
        f"Batch {args.batch_size}, vocabulary {config.vocab_size}, 5 of every 32 layers active, {str(args.dtype)[6:]}, "
        f"blocks {'not ' * args.keep_activations}recomputed, {args.rounds} steps between refreshes. Time goes into "
        f"matmuls (at the {rate / 1e9:,.0f} GFLOP/s of large square ones), what else forward and backward do, and the "
        "optimizer's step. Memory is the peak of all tensors over two draws: weights, optimizer state, and the rest, "
        "which is activations and gradients.",
        "",
        f"| {' | '.join(GROWTH)} | tokens/s | matmuls | other | optimizer | peak, MiB | weights | state | rest |",
        "|" + "---|" * 12,
        *table,
    ]


def machine(device: str) -> str:
    """Processor and versions."""
    names = ["CPU"]
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        names = [f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"]
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or names
    parts = [names[0], f"{torch.get_num_threads()} threads", f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "galore-torch"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            pass
    return ", ".join(parts)


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    positive = train.at_least(1)
    add = parser.add_argument
    add("what", choices=("data", "scale", "steps", "refresh", "tokenise", "growth"))
    add(
        "--model",
        default="small",
        help=f"for steps: {', '.join(SHAPES)} or a checkpoint (default: %(default)s); for tokenise a checkpoint or tokenizer",
    )
    add("--data", help="for data: the file")
    add("--batch-size", type=positive, default=4, help="default: %(default)s")
    add("--seq-len", type=positive, default=256, help="for steps and tokenise (default: %(default)s)")
    add("--megabytes", type=positive, default=100, help="for tokenise (default: %(default)s)")
    add("--active", type=positive, help="for steps: layers trained at a time (default: 5 of every 32)")
    add("--rank", type=positive, help="default: dim / 16; for refresh 256")
    add(
        "--residual",
        action="store_true",
        help="for steps: follow what the projection leaves out, too, as train.py does",
    )
    add("--shape", type=int, nargs=2, default=(4096, 11008), help="for refresh (default: 4096 11008)")
    add("--keep-activations", action="store_true", help="recompute no blocks here, as train.py where memory allows it")
    add("--alone", action="store_true", help="for steps: without the peer, whose SVDs take minutes on a large model")
    add("--rounds", type=positive, default=5, help="times that everything is measured (default: %(default)s)")
    add("--steps", type=positive, default=3, help="for steps: of either side in a round (default: %(default)s)")
    add("--dtype", choices=("bf16", "fp32"), help="default: bf16 on cuda, fp32 elsewhere")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--out", help="file for the table (default: bench/results/speed-WHAT-DEVICE.md)")
    args = parser.parse_args()
    command(parser, lambda: measure(args))


def measure(args: argparse.Namespace) -> None:
    """Measure, print the table and write it."""
    cuda = args.device.startswith("cuda")
    args.dtype = torch.bfloat16 if args.dtype == "bf16" or (args.dtype is None and cuda) else torch.float32
    if args.what == "tokenise":  # SHAPES have no tokenizer
        args.model = str(TINY) if args.model in SHAPES else args.model
    args.config = SHAPES.get(args.model) or (SHAPES["small"] if args.what == "tokenise" else parse_shape(args.model))
    args.active = args.active or -(-5 * args.config.n_layers // 32)
    args.rank = args.rank or (256 if args.what == "refresh" else args.config.dim // 16)
    torch.manual_seed(args.seed)
    benches = {
        "data": real_data,
        "scale": scale,
        "steps": steps,
        "refresh": refresh,
        "tokenise": tokenise,
        "growth": growth,
    }
    lines = benches[args.what](args)
    command = f"python bench/speed.py {' '.join(sys.argv[1:])}"
    lines = [f"# Speed: {args.what}", "", f"`{command}`, {datetime.date.today()}, {machine(args.device)}.", "", *lines]
    print("\n".join(lines))
    what = f"data-{Path(args.data).stem}" if args.what == "data" else args.what
    name = f"speed-{what}-{'cuda' if cuda else 'cpu'}.md"
    out = Path(args.out) if args.out else ROOT / "bench" / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
