"""Peak memory of a training step, for any model shape and method, without a GPU and without weights.

The project's own model, sampler, optimizer and `train.training_step` run on fake tensors (shapes without data, torch's
FakeTensorMode) while a dispatch mode follows which storages are alive: what is counted is every byte of every tensor on
the device. Beside it stands train.py's own estimate, by which it decides what fits. On a CUDA GPU the same step then
runs for real, with random weights, and torch.cuda.max_memory_allocated stands beside the prediction.

With --offload or --processes FSDP2 runs too, on torch's fake process group: what lies in host memory is counted apart,
and what a process sends in a step.

    python bench/memory.py --model llama2-7b --batch-size 1 --seq-len 1024 --embeddings projected
    python bench/memory.py --model llama2-70b --offload
    python bench/memory.py --model llama2-7b --processes 4 --method full
    python bench/memory.py --table          # all of bench/results/memory.md
"""

import argparse
import datetime
import math
import platform
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import owlore  # noqa: E402
import train  # noqa: E402
from data import Layout, atomic_write  # noqa: E402
from model import ModelConfig, Transformer, add_lora, read_checkpoint  # noqa: E402
from owlore import LayerSampler, ProjectedGradient  # noqa: E402

MODELS = {
    "llama2-7b": ModelConfig(),
    "llama2-13b": ModelConfig(dim=5120, n_layers=40, n_heads=40),
    "llama2-70b": ModelConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672),
    "llama3-8b": ModelConfig(vocab_size=128256, n_kv_heads=8, hidden_dim=14336, rope_theta=500000.0),
    "mistral-7b": ModelConfig(n_kv_heads=8, hidden_dim=14336, head_dim=128, rope_theta=1e6, vocab_size=32768),
}
GIB = 2**30
DRAWS = 3  # layers are redrawn so many times, two steps each: the second has the moments that the first one made


class LiveStorages(TorchDispatchMode):
    """Follows the storages of all tensors that operations return, from first sight until they are freed.

    live, peak: bytes now, and the most there have been. host, host_peak: the same of what would be in host memory. sent:
    bytes that this process has sent to others."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.host, self.host_peak, self.sent, self.known = 0, 0, 0, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and count the storages it made. A tensor without data whose value is asked for is a 1."""
        if ProjectedGradient in types:  # adding to one is many operations, each to be seen here
            with self:
                args[0].add_gradient(args[1])
            return args[0]
        try:
            out = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return 1.0
        if func.namespace == "c10d":
            self.sent += sent_bytes(func, args)
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.count(getattr(tensor, "_local_tensor", tensor))  # a DTensor has no memory of its own
        return out

    def count(self, tensor: torch.Tensor) -> None:
        """Add a tensor's storage, unless it is known, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def freed(_):
            _, size, on_host = self.known.pop(key)
            self.live, self.host = self.live - size * (not on_host), self.host - size * on_host

        self.known[key] = weakref.ref(storage, freed), size, False
        self.live += size
        self.peak = max(self.peak, self.live)

    def resized(self, tensor: torch.Tensor) -> None:
        """Count a storage anew that FSDP has let go of, or taken again."""
        key, size = id(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
        if key in self.known and not self.known[key][2]:
            self.live += size - self.known[key][1]
            self.known[key] = self.known[key][0], size, False
            self.peak = max(self.peak, self.live)

    def to_host(self, tensor: torch.Tensor) -> None:
        """Count a tensor no longer on the device. A fake one does not go where it is sent."""
        key = id(tensor.untyped_storage())
        reference, size, on_host = self.known[key]
        if not on_host:
            self.live, self.host, self.known[key] = self.live - size, self.host + size, (reference, size, True)
            self.host_peak = max(self.host_peak, self.host)


def sent_bytes(func: torch._ops.OpOverload, args: tuple) -> int:
    """What a process sends in a collective, if all pass the parts on in a ring."""
    total = sum(tensor.nbytes for tensor in tree_iter(args[0]) if isinstance(tensor, torch.Tensor))
    share = (dist.get_world_size() - 1) / dist.get_world_size()
    if "reduce_scatter" in func.__name__:
        total = sum(tensor.nbytes for tensor in tree_iter(args[1]) if isinstance(tensor, torch.Tensor))
    return int(total * share * (2 if "allreduce" in func.__name__ else 1))


def draw_layers(config: ModelConfig, args: argparse.Namespace) -> list[list[int]]:
    """The layers of DRAWS draws, uniform ones: random numbers are real, so they are drawn outside the fake tensors."""
    uniform = torch.ones(config.n_layers) / config.n_layers
    sampler = LayerSampler([torch.nn.Linear(1, 1)] * config.n_layers, uniform, args.active)
    return [sampler.resample() for _ in range(DRAWS)]


def build(config: ModelConfig, args: argparse.Namespace) -> tuple[Transformer, str]:
    """A model without memory, shared out if that was asked for, and the device that its weights belong on."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
        if dist.is_initialized():
            return model, train.shard(model, args)
        if args.method == "lora":
            add_lora(model, args.rank, args.lora_alpha)
    return model, args.device


def run_steps(
    model: Transformer, where: str, args: argparse.Namespace, live: LiveStorages | None
) -> tuple[int, int, int]:
    """Two training steps with each draw's layers, with random weights and tokens. Returns the bytes of the weights and of
    the optimizer's state at the end, and those sent in the last step."""
    config = model.config
    sampled = train.METHODS[args.method].sampling  # else all layers are trained, or none but lora's additions
    draws = args.draws if sampled else [None]
    model.to_empty(device=where)
    for p in model.parameters():
        weight = owlore.own(p.detach())
        weight.normal_(0, 0.02) if p.dim() == 2 else weight.fill_(1.0)
        if live and args.offload:
            live.to_host(owlore.own(p))
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: live.to_host(owlore.own(p.grad)))
    if live:  # what comes before is not the step's
        live.peak = live.live
    shape = args.micro_batch_size, args.seq_len
    # Tokens that are all alike, or norms near zero, would leave most matrices without a gradient, hence without state.
    tokens = torch.arange(math.prod(shape), device=args.device) % config.vocab_size
    positions = torch.arange(args.seq_len, device=args.device).repeat(args.micro_batch_size)
    batch = tokens, tokens, Layout([shape], positions)  # full rows, all predicted
    model.checkpoint_blocks = args.recompute
    sampler = LayerSampler(model.layers, torch.ones(config.n_layers), args.active) if sampled else None
    optimizer = train.build_optimizer(model, args)
    # More than three micro-batches take no more memory, only more of this benchmark's time.
    micro_batches = min(3, -(-args.batch_size // (args.micro_batch_size * train.processes())))
    for drawn in draws:
        if sampler:
            sampler.activate(drawn)
        for _ in range(2):
            sent = live.sent if live else 0
            train.training_step(model, optimizer, [(*batch, 1 / micro_batches)] * micro_batches, 1.0)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    return sum(owlore.own(p).nbytes for p in model.parameters()), state, live.sent - sent if live else 0


def measure(config: ModelConfig, args: argparse.Namespace, processes: int = 1) -> dict[str, int | None]:
    """Bytes of a configuration in one of its processes: weights, optimizer state, the peak on the device as train.py
    estimates it, as it is counted and, on a CUDA GPU, measured, with what PyTorch had reserved for it; what is in host
    memory, and sent in a step."""
    args = argparse.Namespace(
        **vars(args) | {"draws": draw_layers(config, args) if args.sampling else [], "device": "cpu"}
    )
    live, add_gradient, moments = LiveStorages(), ProjectedGradient.add_gradient, owlore.moments

    def add(gradient: ProjectedGradient, *args, **kwargs) -> None:
        add_gradient(gradient, *args, **kwargs)
        if gradient.G is not None:  # it waits in host memory
            live.to_host(gradient.G)

    def make_moments(state: dict, g: torch.Tensor) -> tuple:
        made = moments(state, g)
        if args.offload and "basis" not in state and made[2] == 1:  # they are where the weights are
            live.to_host(owlore.own(made[0])), live.to_host(owlore.own(made[1]))
        return made

    def then_resized(function: Callable) -> Callable:
        return lambda tensor, *size: (function(tensor, *size), live.resized(tensor))

    if args.offload or processes > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    model, where = build(config, args)
    estimated, pinned = train.step_memory(model, args), train.host_memory(model, args)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        live,
        patch.object(ProjectedGradient, "add_gradient", add),
        patch.object(owlore, "moments", make_moments),
        patch.object(owlore, "CHUNK", owlore.CHUNK_ON_GPU),
        patch.object(_fsdp_param, "free_storage", then_resized(_fsdp_param.free_storage)),
        patch.object(_fsdp_param, "alloc_storage", then_resized(_fsdp_param.alloc_storage)),
    ):
        weights, state, sent = run_steps(model, where, args, live)
    del model
    measured = reserved = None
    if dist.is_initialized():
        dist.destroy_process_group()
    if torch.cuda.is_available() and processes == 1:
        args.device = "cuda"
        if args.offload:
            train.join_processes(args)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run_steps(*build(config, args), args, None)
        measured, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        if args.offload:
            dist.destroy_process_group()
    return {"weights": weights, "state": state, "estimated": estimated, "predicted": live.peak, "measured": measured,
            "reserved": reserved, "host": live.host_peak, "pinned": pinned, "sent": sent}  # fmt: skip


def parse_shape(name: str) -> ModelConfig:
    """A known model's shape, or that of a checkpoint folder (its weights are not read)."""
    return MODELS[name] if name in MODELS else read_checkpoint(name)[0]


CARD = {"weights": "weights", "state": "optimizer state", "estimated": "peak, estimated", "predicted": "peak, counted"}
CARD |= {"measured": "peak, measured on the GPU", "reserved": "reserved for it"} if torch.cuda.is_available() else {}
HOST = {"estimated": "peak, estimated", "predicted": "peak, counted", "pinned": "host memory, estimated"}
HOST |= {"host": "host memory, counted"}
SHARED = {
    "weights": "its weights",
    "estimated": "peak, estimated",
    "predicted": "peak, counted",
    "sent": "sent in a step",
}


def header(columns: dict[str, str]) -> str:
    """The first two lines of a table in Markdown."""
    names = ["model", "method", "active x rank", "embeddings", "batch x length", *columns.values(), "█ = 2 GiB"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def describe(name: str, args: argparse.Namespace, result: dict, columns: dict[str, str]) -> str:
    """A row of a table."""
    rows = f"{args.batch_size}" + f", {args.micro_batch_size} at once," * (args.micro_batch_size < args.batch_size)
    shape = f"{rows} x {args.seq_len}" + ", kept" * (not args.recompute)
    low_rank = args.rank and (args.method == "lora" or train.METHODS[args.method].projection)
    trained = f"{args.active or 'all'}" + f" x {args.rank}" * bool(low_rank) + " + residual" * bool(args.residual)
    cells = [name, args.method, trained, args.embeddings, shape, *(f"{result[key] / GIB:.2f}" for key in columns)]
    return f"| {' | '.join(cells)} | {'█' * round((result['measured'] or result['predicted']) / GIB / 2)} |"


PCIE, RATES = 25e9, (35e12, 80e12)  # bytes and bf16 FLOP per second, about half of what is printed on 24 GB cards

# Flags of the rows of each table; "kept" stands for activations that are not recomputed
EMBEDDINGS = ("full", "projected", "frozen")
BASELINES = ("lisa --embeddings full", "galore --embeddings full", "lora", "full --embeddings full")
ONE = [
    *(f"llama2-7b 1x1024 --embeddings {how}" for how in EMBEDDINGS),
    *(f"llama2-7b 16x512 --embeddings {how}" for how in EMBEDDINGS),
    *(f"llama2-7b {shape} --active 5 --embeddings {how}" for shape in ("1x1024", "16x512") for how in EMBEDDINGS),
    "llama2-7b 16x512 --embeddings frozen --micro-batch-size 4",
    *(f"llama2-7b 1x1024 --method {method}" for method in BASELINES),
    *(f"llama2-7b 16x512 --method {method}" for method in BASELINES),
    *(f"llama3-8b 1x1024 --embeddings {how}" for how in EMBEDDINGS),
    *(f"llama3-8b 1x1024 --method {method}" for method in BASELINES),
    *(f"llama3-8b 16x512 --method {method}" for method in ("owlore", "lora")),
    *(f"mistral-7b 1x1024 --embeddings {how}" for how in EMBEDDINGS),
    *(f"llama2-7b 2x1024 kept --embeddings {how}" for how in EMBEDDINGS),
    *(f"llama2-7b 2x1024 kept --method {method}" for method in BASELINES),
    "llama3-8b 1x1024 kept --embeddings frozen",
    "llama2-7b 16x512 kept --embeddings frozen --micro-batch-size 1",
]
OFFLOADED = [
    f"{model} {shape} --offload --micro-batch-size 1 --embeddings full"
    for model in ("llama2-7b", "llama3-8b", "llama2-13b", "llama2-70b")
    for shape in ("1x1024", "16x512")
]
OFFLOADED += [f"{OFFLOADED[-1]} --active 13"]
JOINED = {
    4: [
        f"llama2-7b 16x512 --micro-batch-size 4 --embeddings full --method {method}"
        for method in ("owlore", "owlore --active 5", "lisa", "galore", "full")
    ],
    8: [
        "llama2-70b 16x512 --micro-batch-size 1 --embeddings full --active 13",
        "llama2-70b 16x512 --micro-batch-size 1 --method lora",
    ],
}


def settings(flags: list[str], config: ModelConfig, recompute: bool = True) -> argparse.Namespace:
    """train.py's settings, in bf16."""
    args = train.flag_parser().parse_args(["--data", "-", "--out", "-", "--dtype", "bf16", *flags])
    args = train.decide_settings(args, config)
    args.recompute, args.micro_batch_size = recompute, args.micro_batch_size or args.batch_size
    return args


def table(rows: list[str], columns: dict[str, str], processes: int = 1) -> tuple[str, list[float]]:
    """A table of some rows, and by how much train.py's estimate of each is off."""
    lines, apart = [header(columns)], []
    print(lines[0], flush=True)
    for row in rows:
        name, shape, *flags = row.split()
        batch, length = shape.split("x")
        kept = flags[:1] == ["kept"]
        args = settings(["--batch-size", batch, "--seq-len", length, *flags[kept:]], MODELS[name], not kept)
        result = measure(MODELS[name], args, processes)
        lines.append(describe(name, args, result, columns))
        apart.append(result["estimated"] / result["predicted"] - 1)
        print(lines[-1], flush=True)
    return "\n".join(lines), apart


def main() -> None:
    """Print one configuration's memory, or write the whole table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS,
        epilog="All flags of train.py are understood too, --micro-batch-size and --method for example.",
    )  # fmt: skip
    parser.add_argument("--model", default="llama2-7b", help=f"{', '.join(MODELS)} or a checkpoint folder (default: %(default)s)")  # fmt: skip
    parser.add_argument("--keep-activations", action="store_true", help="recompute no blocks")
    parser.add_argument("--processes", type=int, default=1, help="that share the weights (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="write bench/results/memory.md")
    args, flags = parser.parse_known_args()
    if not args.table:
        config = parse_shape(args.model)
        run = settings(["--batch-size", "1", "--seq-len", "1024", *flags], config, not args.keep_activations)
        columns = CARD | (HOST if run.offload else {}) | (SHARED if args.processes > 1 else {})
        print(header(columns), describe(args.model, run, measure(config, run, args.processes), columns), sep="\n")
        return
    one, apart = table(ONE, CARD)
    offloaded, _ = table(OFFLOADED, HOST)
    joined = {count: table(rows, SHARED, count)[0] for count, rows in JOINED.items()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: nothing was measured on one"
    text = f"""# Peak memory of training steps, in GiB

`python bench/memory.py --table`, {datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()},
{gpu}. Active layers and rank are train.py's defaults, and the paper's 5 x 256; bf16 weights, fp32 optimizer state, blocks
recomputed unless "kept" says that they are not; the peak over {DRAWS} draws of layers, two steps each. Rows are full. GiB =
2^30 bytes.

## One card

What train.py estimates differs from what is counted by {min(apart):+.1%} to {max(apart):+.1%}.

{one}

For comparison: the paper (arXiv 2405.18380) reports 21 GB for OwLore on LLaMA-2-7B.

## One card, weights in host memory

The peak is that of the device, one row at once. Host memory has the weights, gradients and moments of embedding, head
and norms, and the gradients that wait for new bases, or in each step with a residual. What is counted is a lower
bound: on the CPU, where this runs, FSDP brings in no block ahead of its use, and bringing one to the device makes no
copy. The estimate has both. What FSDP moves is pinned, which torch rounds up to powers of two: the estimate of host
memory has that, too.
With several micro-batches the sums grow with the active layers, whatever their rank.

Each pass brings in every weight, 2 bytes; of every token it is multiplied with, forward, recomputing and backward take 6
to 8 FLOP per weight. So the copies hide behind the arithmetic from this many tokens at once on, at {PCIE / 1e9:.0f} GB/s (PCIe 4,
16 lanes): {", ".join(f"{4 / PCIE * rate / 8:,.0f} to {4 / PCIE * rate / 6:,.0f} on a card that reaches {rate / 1e12:.0f} TFLOP/s" for rate in RATES)}.

{offloaded}

## Several cards

What one of them holds, and sends in a step if parts are passed on in a ring; the second step after a draw, without new
bases. Those of full fine-tuning are FSDP2's as everybody uses it. DistributedDataParallel would send {2 * 3 / 4 * 12.55:.1f} GiB of
gradients of the 7B, and hold all of the weights.

{"".join(f"{count} processes, each with {16 // count} rows of the step:{chr(10) * 2}{text}{chr(10) * 2}" for count, text in joined.items())}"""
    (ROOT / "bench" / "results").mkdir(exist_ok=True)
    with atomic_write(ROOT / "bench" / "results" / "memory.md") as file:
        file.write(text.encode())


if __name__ == "__main__":
    main()
