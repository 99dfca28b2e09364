"""Peak memory of a training step, for any model shape and method, without a GPU and without weights.

The project's own model, sampler, optimizer and `train.training_step` run on fake tensors (shapes without data, torch's
FakeTensorMode) while a dispatch mode follows which storages are alive: what is counted is every byte of every tensor.
Beside it stands train.py's own estimate, by which it decides whether blocks are recomputed. On a CUDA GPU the same step then runs for real, with random weights, and torch.cuda.max_memory_allocated stands beside
the prediction.

    python bench/memory.py --model llama2-7b --batch-size 1 --seq-len 1024 --embeddings projected
    python bench/memory.py --table          # all of bench/results/memory.md
"""

import argparse
import datetime
import platform
import sys
import weakref
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import Layout, atomic_write  # noqa: E402
from model import ModelConfig, Transformer, add_lora, read_checkpoint  # noqa: E402
from owlore import LayerSampler, ProjectedGradient  # noqa: E402

MODELS = {
    "llama2-7b": ModelConfig(),
    "llama3-8b": ModelConfig(vocab_size=128256, n_kv_heads=8, hidden_dim=14336, rope_theta=500000.0),
    "mistral-7b": ModelConfig(n_kv_heads=8, hidden_dim=14336, head_dim=128, rope_theta=1e6, vocab_size=32768),
}
GIB = 2**30
DRAWS = 4  # layers are redrawn so many times, two steps each: the second has the moments that the first one made


class LiveStorages(TorchDispatchMode):
    """Follows the storages of all tensors that operations return, from first sight until they are freed.

    live, peak: bytes now, and the most there have been since `peak` was last set."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}

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
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def forget(self, tensor: torch.Tensor) -> None:
        """Count a tensor no longer: on a GPU it would be in host memory."""
        key = id(tensor.untyped_storage())
        self.live -= self.known[key][1]
        self.known[key] = self.known[key][0], 0

    def count(self, storage: torch.UntypedStorage) -> None:
        """Add a storage, unless it is known, until it is freed."""
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def freed(_):
            self.live -= self.known.pop(key)[1]

        self.known[key] = weakref.ref(storage, freed), size
        self.live += size
        self.peak = max(self.peak, self.live)


def draw_layers(config: ModelConfig, args: argparse.Namespace) -> list[list[int]]:
    """The layers of DRAWS draws, uniform ones: random numbers are real, so they are drawn outside the fake tensors."""
    uniform = torch.ones(config.n_layers) / config.n_layers
    sampler = LayerSampler([torch.nn.Linear(1, 1)] * config.n_layers, uniform, args.active)
    return [sampler.resample() for _ in range(DRAWS)]


def run_steps(config: ModelConfig, args: argparse.Namespace, draws: list[list[int]], device: str) -> tuple[int, int]:
    """Two training steps with each draw's layers, with random weights and tokens. Returns the bytes of the weights and of
    the optimizer's state at the end."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    with torch.device(device):
        model = Transformer(config)
        shape = args.micro_batch_size, args.seq_len
        tokens = torch.ones(shape, dtype=torch.int64).flatten()
        layout = Layout([shape], torch.arange(args.seq_len).repeat(args.micro_batch_size))  # full rows, all predicted
    torch.set_default_dtype(torch.float32)
    model.checkpoint_blocks = args.checkpoint_blocks
    if args.method == "lora":
        add_lora(model, args.rank, args.lora_alpha)
    sampled = train.METHODS[args.method].sampling  # else all layers are trained, or none but lora's additions
    sampler = LayerSampler(model.layers, torch.ones(config.n_layers), args.active) if sampled else None
    optimizer = train.build_optimizer(model, args)
    micro_batches = args.batch_size // args.micro_batch_size
    for drawn in draws if sampler else [None]:
        if sampler:
            sampler.activate(drawn)
        for _ in range(2):
            train.training_step(model, optimizer, [(tokens, tokens, layout, 1 / micro_batches)] * micro_batches, 1.0)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    return sum(parameter.nbytes for parameter in model.parameters()), state


def measure(config: ModelConfig, args: argparse.Namespace) -> dict[str, int | None]:
    """Bytes of a configuration: weights, optimizer state, and its peak as train.py estimates it, as it is counted and, on
    a CUDA GPU, measured."""
    draws, add_gradient = draw_layers(config, args), ProjectedGradient.add_gradient

    def add(gradient: ProjectedGradient, *args, **kwargs) -> None:
        add_gradient(gradient, *args, **kwargs)
        if gradient.G is not None:  # it waits in host memory, but a fake tensor does not go where it is sent
            live.forget(gradient.G)

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        LiveStorages() as live,
        patch.object(ProjectedGradient, "add_gradient", add),
    ):
        weights, state = run_steps(config, args, draws, "cpu")
    measured = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run_steps(config, args, draws, "cuda")
        measured = torch.cuda.max_memory_allocated()
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
        if args.method == "lora":
            add_lora(model, args.rank, args.lora_alpha)
    estimated = train.step_memory(model, args, args.checkpoint_blocks)
    return {"weights": weights, "state": state, "estimated": estimated, "predicted": live.peak, "measured": measured}


def parse_shape(name: str) -> ModelConfig:
    """A known model's shape, or that of a checkpoint folder (its weights are not read)."""
    return MODELS[name] if name in MODELS else read_checkpoint(name)[0]


COLUMNS = ["model", "method", "embeddings", "batch x length", "weights", "optimizer state"]
COLUMNS += ["peak, estimated", "peak, counted"]
COLUMNS += ["peak, measured on the GPU"] * torch.cuda.is_available() + ["█ = 2 GiB"]
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def describe(name: str, args: argparse.Namespace, result: dict) -> str:
    """A row of the table."""
    rows = f"{args.batch_size}" + f", {args.micro_batch_size} at once," * (args.micro_batch_size < args.batch_size)
    shape = f"{rows} x {args.seq_len}" + ", kept" * (not args.checkpoint_blocks)
    cells = [name, args.method, args.embeddings, shape]
    cells += [f"{size / GIB:.2f}" for size in result.values() if size is not None]
    return f"| {' | '.join(cells)} | {'█' * round((result['measured'] or result['predicted']) / GIB / 2)} |"


TABLE = [  # model, method, embeddings, batch, length, and rows at once if fewer, all with blocks recomputed
    *(("llama2-7b", "owlore", embeddings, 1, 1024) for embeddings in ("full", "projected", "frozen")),
    *(("llama2-7b", "owlore", embeddings, 16, 512) for embeddings in ("full", "projected", "frozen")),
    ("llama2-7b", "owlore", "frozen", 16, 512, 4),
    *(("llama2-7b", method, None, 1, 1024) for method in ("lisa", "galore", "lora", "full")),
    *(("llama2-7b", method, None, 16, 512) for method in ("lisa", "galore", "lora", "full")),
    *(("llama3-8b", "owlore", embeddings, 1, 1024) for embeddings in ("full", "projected", "frozen")),
    *(("llama3-8b", method, None, 1, 1024) for method in ("lisa", "galore", "lora", "full")),
    *(("mistral-7b", "owlore", embeddings, 1, 1024) for embeddings in ("full", "projected", "frozen")),
]
KEPT = [("llama2-7b", "owlore", embeddings, 2, 1024) for embeddings in ("full", "projected", "frozen")]
KEPT += [("llama2-7b", method, None, 2, 1024) for method in ("lisa", "galore", "lora", "full")]
KEPT += [("llama3-8b", "owlore", "frozen", 1, 1024), ("llama2-7b", "owlore", "frozen", 16, 512, 1)]


def settings(flags: list[str], config: ModelConfig, recompute: bool = True) -> argparse.Namespace:
    """train.py's settings, in bf16."""
    args = train.flag_parser().parse_args(["--data", "-", "--out", "-", "--dtype", "bf16", *flags])
    args.checkpoint_blocks = recompute
    return train.decide_settings(args, config)


def main() -> None:
    """Print one configuration's memory, or write the whole table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS,
        epilog="All flags of train.py are understood too, --micro-batch-size and --method for example.",
    )  # fmt: skip
    parser.add_argument("--model", default="llama2-7b", help=f"{', '.join(MODELS)} or a checkpoint folder (default: %(default)s)")  # fmt: skip
    parser.add_argument("--keep-activations", action="store_true", help="recompute no blocks")
    parser.add_argument("--table", action="store_true", help="write bench/results/memory.md")
    args, flags = parser.parse_known_args()
    print(HEADER, flush=True)
    if not args.table:
        config = parse_shape(args.model)
        run = settings(["--batch-size", "1", "--seq-len", "1024", *flags], config, not args.keep_activations)
        print(describe(args.model, run, measure(config, run)))
        return
    lines, apart = [], []
    for number, (name, method, embeddings, batch, length, *at_once) in enumerate(TABLE + KEPT):
        flags = f"--method {method} --batch-size {batch} --seq-len {length}"
        flags += f" --embeddings {embeddings}" * bool(embeddings) + "".join(f" --micro-batch-size {n}" for n in at_once)
        row = settings(flags.split(), MODELS[name], recompute=number < len(TABLE))
        result = measure(MODELS[name], row)
        apart.append(result["estimated"] / result["predicted"] - 1)
        lines.append(describe(name, row, result))
        print(lines[-1], flush=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: nothing was measured on one"
    text = f"""# Peak memory of training steps, in GiB

`python bench/memory.py --table`, {datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()},
{gpu}. The published recipe: 5 active layers of 32 (LISA 2), rank 256, bf16 weights, fp32 optimizer state, blocks
recomputed unless "kept" says that they are not; the peak over {DRAWS} draws of layers, two steps each. Rows are full. What
train.py estimates differs from what is counted by {min(apart):+.1%} to {max(apart):+.1%}. GiB = 2^30 bytes.

{HEADER}
{chr(10).join(lines)}

For comparison: the paper (arXiv 2405.18380) reports 21 GB for OwLore on LLaMA-2-7B.
"""
    (ROOT / "bench" / "results").mkdir(exist_ok=True)
    with atomic_write(ROOT / "bench" / "results" / "memory.md") as file:
        file.write(text.encode())


if __name__ == "__main__":
    main()
