"""What this project promises, as tests: model.py, data.py, owlore.py, train.py, and what bad input leads to.

    pytest -q -n 2 test_owlore.py           (two at a time, by pytest-xdist; without -n one after another)

Tests that read the data in ../shared, or need an optional package, skip if it is absent.
"""

import contextlib
import copy
import fcntl
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import model as model_module
import owlore
import train
from data import Dataset, InputError, Record, build_validation, encode_turn, fit, load_records
from data import load_tokenizer, parse_record
from model import (
    ChunkedCrossEntropy,
    LoRALinear,
    ModelConfig,
    SwiGLU,
    Transformer,
    add_lora,
    generate,
    load_model,
    read_checkpoint,
    read_weights,
    save_model,
)
from owlore import (
    LayerSampler,
    ProjectedAdam,
    hill_alpha,
    outlier_distribution,
    projection_basis,
    sampling_probabilities,
    stochastic_round,
)

torch.set_num_threads(1)  # on tensors this small a second thread only costs
settings.register_profile("untimed", deadline=None)  # a busy machine is no defect
settings.load_profile("untimed")

SHARED = Path(__file__).parent.parent / "shared"
STORIES = SHARED / "checkpoints" / "stories260K"
TINY = data.TINY
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data in ../shared")

CONFIGS = {
    "llama1": dict(norm_eps=1e-6),
    "llama2": dict(),
    "llama3": dict(n_kv_heads=2, rope_theta=500000.0, ffn_dim_multiplier=1.3, multiple_of=32),
    "llama3.1": dict(n_kv_heads=2, rope_theta=500000.0, use_scaled_rope=True, rope_original_length=32),
    "llama3.2": dict(n_kv_heads=1, use_scaled_rope=True, rope_scaling_factor=32.0, rope_original_length=32, tie_word_embeddings=True),
    "mistral": dict(n_kv_heads=2, hidden_dim=96, head_dim=24, sliding_window=7),
}  # fmt: skip


def build(family: str = "llama3", **changes) -> Transformer:
    """A small random model, its weights large enough that every part of it shows in the logits."""
    torch.manual_seed(0)
    shape = dict(dim=64, n_layers=3, n_heads=4, vocab_size=101, multiple_of=16, max_seq_len=128)
    model = Transformer(ModelConfig(**shape | CONFIGS[family] | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@contextlib.contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def random_tokens(*shape: int, vocab: int = 101, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def cli(line: str, main: Callable = train.main) -> tuple[int, str, str]:
    """Run a command in this process: exit code, stdout and stderr. line: its flags, on the CPU if it does not say."""
    argv = [f"{main.__module__}.py", *shlex.split(line)]
    argv += [] if "--device" in line or "--help" in line else ["--device", "cpu"]
    out, error, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", argv)
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
    return code, out.getvalue(), error.getvalue()


def train_run(line: str) -> list[dict]:
    """Run train.py, which must succeed. Returns its metrics."""
    code, _, error = cli(line)
    assert code == 0, error
    return read_metrics(Path(shlex.split(line)[shlex.split(line).index("--out") + 1]))


def read_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint folder of a small random model, with tiny/'s tokenizer."""
    path = tmp_path / "ckpt"
    save_model(build(vocab_size=load_tokenizer(TINY).vocab_size, max_seq_len=256), path, "meta")
    data.copy_tokenizer(TINY, path)
    return path


@pytest.fixture
def jsonl(tmp_path):
    """A few records of several types."""
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{n} and {n} is", "completion": f" {2 * n}"} for n in range(30)]
    rows += [{"prompt": f"Is {n} even?", "choices": [" yes", " no"], "answer": n % 2} for n in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def base(checkpoint, jsonl):
    """The flags that most runs share."""
    return f"--ckpt {checkpoint} --data {jsonl} --batch-size 4"


def snapshot(folder: Path) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_refused(result: tuple[int, str, str], names: str) -> None:
    code, _, error = result
    lines = [line for line in error.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1, error
    assert names in lines[0] and "Traceback" not in error


# model.py


def reference_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """The architecture written out for one sequence [T] in fp64: one head at a time, complex turns, explicit mask."""
    c, w = model.config, {name.removesuffix(".weight"): p.double() for name, p in model.state_dict().items()}

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    frequencies = [c.rope_theta ** (-2 * i / c.head_dim) for i in range(c.head_dim // 2)]
    if c.use_scaled_rope:  # as Meta states it, in wavelengths
        for i, f in enumerate(frequencies):
            wavelength, low, high = 2 * math.pi / f, c.rope_low_freq_factor, c.rope_high_freq_factor
            smooth = (c.rope_original_length / wavelength - low) / (high - low)
            if wavelength > c.rope_original_length / low:
                frequencies[i] = f / c.rope_scaling_factor
            elif wavelength > c.rope_original_length / high:
                frequencies[i] = (1 - smooth) * f / c.rope_scaling_factor + smooth * f
    t = torch.arange(len(tokens)).double()
    turn = torch.exp(1j * t[:, None] * torch.tensor(frequencies, dtype=torch.float64))  # [T, head_dim / 2]
    distance = t[:, None] - t
    unseen = (distance < 0) | (distance >= (c.sliding_window or math.inf))

    def heads(y, weight, turned):
        parts = (y @ weight.T).split(c.head_dim, dim=1)
        rotate = lambda p: torch.view_as_real(torch.view_as_complex(p.reshape(len(p), -1, 2)) * turn).flatten(1)  # noqa: E731
        return [rotate(p) if turned else p for p in parts]

    x = w["tok_embeddings"][tokens]
    for n in range(c.n_layers):
        layer = {name.removeprefix(f"layers.{n}."): p for name, p in w.items()}
        y = norm(x, layer["attention_norm"])
        q, k, v = (heads(y, layer[f"attention.{name}"], name != "wv") for name in ("wq", "wk", "wv"))
        out = []
        for h in range(c.n_heads):
            g = h // (c.n_heads // c.n_kv_heads)
            out.append((q[h] @ k[g].T / math.sqrt(c.head_dim)).masked_fill(unseen, -math.inf).softmax(-1) @ v[g])
        x = x + torch.cat(out, 1) @ layer["attention.wo"].T
        y = norm(x, layer["ffn_norm"])
        gate, up = y @ layer["feed_forward.w1"].T, y @ layer["feed_forward.w3"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["feed_forward.w2"].T
    return norm(x, w["norm"]) @ w["tok_embeddings" if c.tie_word_embeddings else "output"].T


@pytest.mark.parametrize("family", CONFIGS)
def test_forward_equals_the_architecture_written_out(family):
    model, tokens = build(family), random_tokens(40)
    # fp32 against fp64: a few dozen roundings of 6e-8 on logits of the order of 3
    torch.testing.assert_close(model(tokens[None])[0].double(), reference_logits(model, tokens), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("pieces", [[1] * 20, [13, 1, 6], [20]])
def test_cached_forward_equals_uncached(family, pieces):
    model, tokens, cache = build(family), random_tokens(2, 20), {}
    hidden = torch.cat([model.hidden(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)
    # other matmul shapes: fp32 rounding
    torch.testing.assert_close(model.output(hidden), model(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_greedy_generation_takes_the_likeliest_token_each_time(family):
    model, tokens = build(family), random_tokens(2, 5)
    expected = tokens
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(1, keepdim=True)], 1)
    assert generate(model, tokens, 12).tolist() == expected.tolist()
    assert generate(model, tokens[0], 12).tolist() == expected[0].tolist()


def test_sampled_generation_follows_the_nucleus():
    model, tokens = build(), random_tokens(1, 4)
    probabilities, order = (model(tokens)[0, -1] / 0.7).softmax(0).sort(descending=True)
    nucleus = order[: int((probabilities.cumsum(0) < 0.5).sum()) + 1].tolist()
    torch.manual_seed(0)
    drawn = generate(model, tokens.expand(500, -1), 1, temperature=0.7, top_p=0.5)[:, -1]
    assert set(drawn.tolist()) == set(nucleus)


@pytest.mark.parametrize("prompt, new", [(100, 29), (0, 5)])
def test_generation_of_nothing_or_beyond_the_context_is_refused(prompt, new):
    with pytest.raises(ValueError, match="context"):
        generate(build(), random_tokens(1, prompt), new)


@pytest.mark.parametrize("chunk", [101, 700, 10**6])
def test_chunked_loss_equals_cross_entropy(monkeypatch, chunk):
    monkeypatch.setattr(model_module, "CHUNK", chunk)
    model, tokens, targets = build(), random_tokens(3, 17), random_tokens(3, 17, seed=2)
    targets[:, :5] = -100
    losses = model(tokens, targets), F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    for ours, plain in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses)):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunks", [1, 128, 256])
def test_bf16_loss_has_the_gradients_of_fp64_however_many_its_chunks(monkeypatch, chunks):
    V, N = 300, 4 * chunks
    monkeypatch.setattr(model_module, "CHUNK", 4 * V)
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, 64).bfloat16(), (0.02 * torch.randn(V, 64)).bfloat16()
    targets = torch.randint(V, (N,))
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        chunked = dtype == torch.bfloat16
        (ChunkedCrossEntropy.apply(h, w, targets)[0] if chunked else F.cross_entropy(h @ w.T, targets)).backward()
        grads.append((h.grad.double(), w.grad.double()))
    for ours, exact in zip(*grads):
        # Rounding to bf16, 8 significant bits, changes a number by 2^-8 of it at most and by 2^-9.3 in the root mean
        # square, and here it happens twice: to the gradient of the logits, and to the result. (That of the logits
        # themselves counts for less, as they are small.) A sum of 128 chunks in bf16 was off by 1.5 %.
        assert (ours - exact).norm() < 2**-8 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_makes_no_gradient_that_nobody_needs(dtype, monkeypatch):
    monkeypatch.setattr(model_module, "CHUNK", 700)
    model, tokens = build().to(dtype), random_tokens(1, 50)
    model.output.requires_grad_(False)

    def head_products(hidden: torch.Tensor) -> float:
        monkeypatch.setattr(model, "hidden", lambda tokens, cache: hidden)
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens)
        return counter.get_total_flops() / (2 * 50 * 101 * 64)

    hidden = model.hidden(tokens)
    assert head_products(hidden.detach()) == 1  # the logits
    assert head_products(hidden) == 2  # and the gradient of what they are made of
    model.output.requires_grad_(True)
    with torch.no_grad():
        assert head_products(hidden.detach()) == 1


def test_loss_without_any_target_is_zero():
    model = build()
    loss = model(random_tokens(1, 5), torch.full((1, 5), -100))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_swiglu_has_the_gradients_of_autograd():
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    outs = SwiGLU.apply(gate * 1, up * 1), F.silu(gate) * up  # times 1, as the gradients are written over its inputs
    ours, plain = (torch.autograd.grad(out.square().sum(), (gate, up)) for out in outs)
    torch.testing.assert_close((outs[0], *ours), (outs[1], *plain))


def test_a_second_derivative_is_refused_where_there_is_none():
    """torch's once_differentiable is silent if the gradient that comes in is a constant, as that of a sum is."""
    x, targets, linear = torch.randn(5, 8, requires_grad=True), torch.arange(5), owlore.Linear(8, 8)
    owlore.take_factors(linear, ProjectedAdam([{"params": linear.parameters(), "rank": 2}], lr=0.1))
    parts = {
        "SwiGLU": lambda: SwiGLU.apply(x * 1, x * 2),
        "ChunkedCrossEntropy": lambda: ChunkedCrossEntropy.apply(x, torch.eye(8), targets)[0],
        "WeightGradient": lambda: linear(x),
    }
    for name, part in parts.items():
        (once,) = torch.autograd.grad(part().sum(), x)
        assert once.isfinite().all()
        with pytest.raises(RuntimeError, match=f"{name}.* no second derivative"):
            torch.autograd.grad(part().sum(), x, create_graph=True)


def test_recomputed_blocks_give_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = build()
        model.checkpoint_blocks = checkpointing
        model(random_tokens(2, 9), random_tokens(2, 9, seed=2)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_lora_trains_low_rank_additions_and_saves_plain_weights(tmp_path):
    model, tokens = build("mistral"), random_tokens(2, 20)
    plain = model(tokens)
    add_lora(model, rank=3, alpha=6.0)
    assert torch.equal(model(tokens), plain)  # B = 0
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.B, std=0.1)
    linear, x = model.layers[1].feed_forward.w2, torch.randn(5, 96)
    torch.testing.assert_close(linear(x), x @ (linear.weight + 6.0 / 3 * linear.B @ linear.A).T)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.endswith((".A", ".B"))} and len(trained) == 3 * 7 * 2
    for layout in ("meta", "hf"):
        save_model(model, tmp_path / layout, layout)
        merged = load_model(tmp_path / layout)
        assert not any(name.endswith((".A", ".B")) for name, _ in merged.named_parameters())
        torch.testing.assert_close(merged(tokens), model(tokens), rtol=1e-4, atol=1e-5)


# model.py: checkpoints


def assert_same_model(path: Path, model: Transformer) -> None:
    """A checkpoint loads as the model, bit for bit."""
    loaded, dtype = load_model(path, dtype=model.norm.weight.dtype), model.norm.weight.dtype
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(p.dtype == dtype and torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters()))
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == model.config.tie_word_embeddings
    assert torch.equal(loaded(random_tokens(2, 40)), model(random_tokens(2, 40)))


@pytest.mark.parametrize("layout", ["meta", "hf"])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_load_bit_for_bit(family, dtype, layout, tmp_path):
    model = build(family).to(dtype)
    save_model(model, tmp_path, layout)
    assert_same_model(tmp_path, model)
    config, pieces = read_checkpoint(tmp_path)
    assert config == model.config if layout == "meta" else config.max_seq_len == 128
    assert [list(p.shape) for (p,) in pieces.values()] == [list(p.shape) for p in model.parameters()]


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The format written out: length, header, bytes."""
    header, blob = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + blob)


def edit_json(path: Path, *dropped: str, **changes) -> None:
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in dropped}))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("rows", [False, True], ids=["llama2-columns", "llama3-rows"])
def test_sharded_meta_checkpoint_equals_the_whole(rows, suffix, tmp_path):
    model = build(vocab_size=102)
    save_model(model, tmp_path, "meta")
    edit_json(tmp_path / "params.json", vocab_size=-1)
    whole = torch.load(tmp_path / "consolidated.00.pth")
    (tmp_path / "consolidated.00.pth").unlink()
    for shard in range(2):
        part = {"rope.freqs": torch.ones(8)}
        for name, tensor in whole.items():
            columns = name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok") and not rows)
            part[name] = tensor if "norm" in name else tensor.chunk(2, int(columns))[shard].clone()
        file = tmp_path / f"consolidated.{shard:02}.{suffix}"
        write_safetensors(file, part) if suffix == "safetensors" else torch.save(part, file)
    assert_same_model(tmp_path, model)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin of an old torch"])
def test_sharded_hf_checkpoint_equals_the_whole(kind, tmp_path):
    model = build("llama3.1")
    save_model(model, tmp_path, "hf")
    tensors = {name: tensor.clone() for name, tensor in read_weights(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weight_map = {name: f"part-{n % 2}.{kind.split()[0]}" for n, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        if kind == "safetensors":
            write_safetensors(tmp_path / file, part)
        else:
            torch.save(part, tmp_path / file, _use_new_zipfile_serialization=kind == "bin")
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": weight_map}))
    assert_same_model(tmp_path, model)


def test_mistral_raw_safetensors_layout_loads(tmp_path):
    model = build("mistral")
    save_model(model, tmp_path, "meta")
    write_safetensors(tmp_path / "consolidated.safetensors", torch.load(tmp_path / "consolidated.00.pth"))
    (tmp_path / "consolidated.00.pth").unlink()
    assert_same_model(tmp_path, model)


def test_raw_llama3_2_is_stretched_by_32_though_its_params_do_not_say(tmp_path):
    """meta-llama/llama-models: `use_scaled_rope` alone; Hugging Face's 1B and 3B say 32, and its 3.1 says 8."""
    for factor, written in ((32.0, False), (8.0, True)):
        model = build("llama3.2", rope_scaling_factor=factor)
        save_model(model, tmp_path, "meta")
        assert ("rope_scaling_factor" in data.read_json(tmp_path / "params.json")) == written
        assert_same_model(tmp_path, model)
    save_model(build("llama3.1"), tmp_path, "meta")
    edit_json(tmp_path / "params.json", "rope_scaling_factor")
    assert read_checkpoint(tmp_path)[0].rope_scaling_factor == 8


def test_settings_of_a_raw_folder_that_say_nothing_or_the_context(tmp_path):
    model = build("mistral", rope_theta=1e4)
    save_model(model, tmp_path, "meta")
    edit_json(tmp_path / "params.json", "max_seq_len", moe=None, rope_theta=None, max_position_embeddings=128)
    assert_same_model(tmp_path, model)
    assert read_checkpoint(tmp_path)[0].max_seq_len == 128


def test_a_head_that_was_trained_apart_is_kept_though_the_config_says_tied(tmp_path):
    model = build("llama3")
    save_model(model, tmp_path, "hf")
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    assert_same_model(tmp_path, model)


def test_an_index_that_was_left_beside_the_whole_file_is_not_read(tmp_path):
    save_model(build(), tmp_path, "hf")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert_same_model(tmp_path, build())


@pytest.mark.parametrize(
    "dropped",
    [("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")],
    ids=["transformers4", "transformers5"],
)
def test_config_json_is_read_in_both_spellings(dropped, tmp_path):
    model = build("llama3.2", rope_theta=5e5)
    save_model(model, tmp_path, "hf")
    edit_json(tmp_path / "config.json", *dropped)
    assert_same_model(tmp_path, model)


@pytest.mark.parametrize("family", ["llama2", "llama3.1", "llama3.2", "mistral", "heads that do not divide the width"])
def test_transformers_computes_the_same_logits_from_our_save(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = dict(dim=36, n_heads=8, head_dim=6) if "heads" in family else {}
    model, tokens = build("llama2" if shape else family, **shape), random_tokens(2, 40)
    save_model(model, tmp_path, "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=2e-5, rtol=0)


def test_linear_rope_is_computed_as_in_transformers_and_saved_so_that_it_is(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = build("llama2"), random_tokens(2, 40)
    save_model(model, tmp_path, "hf")
    edit_json(tmp_path / "config.json", "rope_parameters", rope_scaling={"type": "linear", "factor": 4.0})
    ours = load_model(tmp_path)
    save_model(ours, tmp_path / "again", "hf")
    with torch.no_grad():
        assert not torch.allclose(ours(tokens), model(tokens), atol=1e-3)
        for folder in (tmp_path, tmp_path / "again"):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=2e-5, rtol=0)


def test_no_weight_is_rounded_where_dtypes_are_mixed(checkpoint):
    edit_tensors(checkpoint, tok_embeddings__weight=torch.randn(load_tokenizer(TINY).vocab_size, 64).bfloat16())
    assert load_model(checkpoint, dtype=None).output.weight.dtype == torch.float32


@pytest.mark.parametrize("said", [{}, {"sliding_window": None}, {"sliding_window": 9}])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_a_config_leaves_out_is_as_in_transformers(family, said, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 16, "vocab_size": 9}
    sizes["intermediate_size"] = 8
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | sizes | said))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = ModelConfig(**model_module.read_hf_config(tmp_path / "config.json"))
    window = theirs.sliding_window if family == "mistral" else None
    assert (ours.sliding_window, ours.norm_eps) == (window, theirs.rms_norm_eps)
    assert (ours.n_kv_heads, ours.max_seq_len) == (theirs.num_key_value_heads, theirs.max_position_embeddings)


@pytest.mark.parametrize(
    "params, hidden, context",
    [
        (dict(dim=4096, n_layers=32, n_heads=32, multiple_of=256, norm_eps=1e-6), 11008, 2048),  # LLaMA-7B
        (dict(dim=4096, n_layers=32, n_heads=32, multiple_of=256, norm_eps=1e-5), 11008, 4096),  # LLaMA-2-7B
        (dict(dim=8192, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3), 28672, 4096),  # LLaMA-2-70B
        (dict(n_kv_heads=8, multiple_of=1024, ffn_dim_multiplier=1.3, rope_theta=500000.0), 14336, 8192),  # LLaMA-3-8B
        (dict(dim=2048, n_kv_heads=8, multiple_of=256, ffn_dim_multiplier=1.5, rope_theta=5e5, use_scaled_rope=True), 8192, 131072),
        (dict(n_kv_heads=8, hidden_dim=14336, head_dim=128, sliding_window=4096), 14336, 32768),  # Mistral-7B-v0.1
        (dict(n_kv_heads=8, hidden_dim=14336, head_dim=128, rope_theta=1e6), 14336, 32768),  # Mistral-7B-v0.3
        (dict(rope_theta=1e6, vocab_size=32016), 11008, 16384),  # CodeLlama-7B
    ],
)  # fmt: skip
def test_published_params_give_the_published_shapes(params, hidden, context):
    config = ModelConfig(**params)
    assert (config.hidden_dim, config.max_seq_len) == (hidden, context)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "wide", [1], True, None])
@pytest.mark.parametrize("field", ["dim", "n_layers", "norm_eps", "rope_theta"])
def test_config_refuses_what_is_not_a_positive_number(field, value):
    with pytest.raises(ValueError, match=f"^{field} is .*$"):
        ModelConfig(**{field: value})


def test_config_takes_a_rotary_base_beyond_an_integer():
    assert ModelConfig(rope_theta=3580165449).rope_theta == 3580165449  # of a LLaMA-3 for a million tokens
    assert model_module.rotary(ModelConfig(rope_theta=10**25), torch.arange(3)).isfinite().all()


@pytest.mark.parametrize(
    "field, value", dict(dim=64.0, n_layers=2**31, use_scaled_rope=1, n_heads=7, n_kv_heads=3, head_dim=3).items()
)
def test_config_refuses_what_does_not_fit(field, value):
    with pytest.raises(ValueError, match=field):
        ModelConfig(**{field: value})


@needs_shared
def test_stories260k_tells_its_story():
    code, text, _ = cli(f"--ckpt {STORIES} --max-new-tokens 60", model_module.main)
    expected = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert code == 0 and text.strip().startswith(expected)


@pytest.mark.parametrize("flag", ["--ckpt nowhere", "--top-p 0", "--top-p 1.1", "--max-new-tokens 0", "--sped 1"])
def test_bad_flags_of_the_command_are_refused_in_one_line(flag):
    code, text, error = cli(f"--ckpt . {flag}", model_module.main)
    assert code == 2 and text == "" and error.count("\n") == 1
    assert ("nowhere" if "ckpt" in flag else flag.split()[0]) in error


# model.py: bad checkpoints lead to one line that names the file or what is wrong with it, and nothing is touched


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch code-was-run",)


def to_hf(path: Path, **changes) -> Path:
    """Turn a checkpoint folder into Hugging Face's layout, with changes to its config.json."""
    model = load_model(path)
    for name in ("params.json", "consolidated.00.pth"):
        (path / name).unlink()
    save_model(model, path, "hf")
    edit_json(path / "config.json", **changes)
    return path


def edit_tensors(path: Path, *dropped: str, **changes) -> None:
    """Change tensors in a .pth; a name's dots are spelled __."""
    state = torch.load(path / "consolidated.00.pth") | {name.replace("__", "."): t for name, t in changes.items()}
    torch.save({name: t for name, t in state.items() if name not in dropped}, path / "consolidated.00.pth")


def edit_header(path: Path, **changes) -> None:
    raw = (to_hf(path) / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header["lm_head.weight"] |= changes
    head = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + size :])


def truncate(file: Path, share: float) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])


def keep_half(path: Path) -> None:
    """The first of two tensor-parallel shards, alone."""
    columns, state = ("wo.weight", "w2.weight", "tok_embeddings.weight"), torch.load(path / "consolidated.00.pth")
    halves = {n: t if "norm" in n else t.chunk(2, int(n.endswith(columns)))[0].clone() for n, t in state.items()}
    torch.save(halves, path / "consolidated.00.pth")


def gap_in_shards(path: Path) -> None:
    (path / "consolidated.00.pth").rename(path / "consolidated.01.pth")


def write_index(path: Path, *files: str) -> None:
    """Move the weights to the first of these files, and write an index that names them all."""
    (to_hf(path) / "model.safetensors").rename(path / files[0])
    weight_map = {f"tensor {n}": file for n, file in enumerate(files)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


BAD_CHECKPOINTS = {
    "empty": (lambda p: [f.unlink() for f in p.iterdir()], "params.json"),
    "no folder": (lambda p: p.rename(p.parent / "elsewhere"), "no such folder"),
    "without weights": (lambda p: (p / "consolidated.00.pth").unlink(), "consolidated"),
    "first shard missing": (gap_in_shards, "consolidated.00.pth"),
    "last shard missing": (keep_half, "shard"),
    "hf without weights": (lambda p: (to_hf(p) / "model.safetensors").unlink(), "model.safetensors"),
    "shard of an index missing": (lambda p: write_index(p, "1.safetensors", "2.safetensors"), "2.safetensors"),
    "index outside the folder": (lambda p: write_index(p, "../elsewhere.safetensors"), "ckpt/elsewhere"),
    "truncated pth": (lambda p: truncate(p / "consolidated.00.pth", 0.7), "consolidated.00.pth"),
    "pth that runs code": (lambda p: edit_tensors(p, x=RunsCode()), "UnpicklingError"),
    "not a state dict": (lambda p: torch.save([1, 2], p / "consolidated.00.pth"), "state dict"),
    "truncated safetensors": (lambda p: truncate(to_hf(p) / "model.safetensors", 0.9), "model.safetensors"),
    "safetensors header cut": (lambda p: truncate(to_hf(p) / "model.safetensors", 1e-3), "model.safetensors"),
    "tampered offsets": (lambda p: edit_header(p, data_offsets=[0, 10**12]), "lm_head"),
    "negative offsets": (lambda p: edit_header(p, data_offsets=[-4, 0], shape=[1]), "lm_head"),
    "tampered shape": (lambda p: edit_header(p, shape=[1, 7]), "lm_head"),
    "negative shape": (lambda p: edit_header(p, shape=[-101, -64]), "lm_head"),
    "quantized safetensors": (lambda p: edit_header(p, dtype="I8"), "lm_head"),
    "tensor of the wrong shape": (lambda p: edit_tensors(p, output__weight=torch.ones(3, 64)), "output.weight"),
    "tensor that would broadcast": (lambda p: edit_tensors(p, output__weight=torch.ones(101, 1)), "output.weight"),
    "head missing": (lambda p: edit_tensors(p, "output.weight"), "output.weight"),
    "tensor missing": (lambda p: edit_tensors(p, "layers.1.ffn_norm.weight"), "layers.1.ffn_norm.weight"),
    "bias": (lambda p: edit_tensors(p, layers__0__attention__wq__bias=torch.ones(64)), "wq.bias"),
    "quantized": (lambda p: edit_tensors(p, norm__weight=torch.ones(64).char()), "norm.weight"),
    "params malformed": (lambda p: (p / "params.json").write_text('{"dim":\n 64,,}'), "line 2"),
    "params a list": (lambda p: (p / "params.json").write_text("[]"), "params.json"),
    "params impossible": (lambda p: edit_json(p / "params.json", n_heads=7), "n_heads"),
    "params negative": (lambda p: edit_json(p / "params.json", dim=-64), "dim"),
    "params not a number": (lambda p: edit_json(p / "params.json", dim="wide"), "dim"),
    "params beyond an integer": (lambda p: edit_json(p / "params.json", dim=2**31 - 2, head_dim=2**30), "overflow"),
    "a larger vocabulary": (lambda p: edit_json(p / "params.json", vocab_size=2**31 - 1), "tok_embeddings.weight"),
    "too many layers": (lambda p: edit_json(p / "params.json", n_layers=10**9), "layers"),
    "unknown setting": (lambda p: edit_json(p / "params.json", moe={"num_experts": 8}), "moe"),
    "other architecture": (lambda p: to_hf(p, model_type="gpt2"), "gpt2"),
    "other rope": (lambda p: to_hf(p, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "yarn"),
    "rope of another type": (lambda p: to_hf(p, rope_parameters=["llama3"]), "rope_type"),
    "two thetas": (lambda p: to_hf(p, rope_theta=7e5), "rope"),
    "two ropes": (lambda p: to_hf(p, rope_scaling={"type": "linear", "factor": 4.0}), "rope"),
    "attention bias": (lambda p: to_hf(p, attention_bias=True), "attention_bias"),
    "attention that looks ahead": (lambda p: to_hf(p, is_causal=False), "is_causal"),
    "attention by layer": (lambda p: to_hf(p, model_type="mistral", layer_types=["full_attention"]), "layer_types"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_refused(case, monkeypatch, checkpoint, tmp_path):
    monkeypatch.chdir(tmp_path)
    damage, names = BAD_CHECKPOINTS[case]
    damage(checkpoint)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=names) as refusal:
        load_model(checkpoint)
    assert len(str(refusal.value).strip().splitlines()) == 1
    assert snapshot(tmp_path) == before and not (tmp_path / "code-was-run").exists()
    if case.startswith(("params", "unknown", "other", "too many", "attention")):
        with pytest.raises(InputError, match=names):  # train.py learns from it how large a model is
            read_checkpoint(checkpoint)


def test_saving_over_another_checkpoint_is_refused(checkpoint):
    before = snapshot(checkpoint)
    with pytest.raises(InputError, match="another checkpoint"):
        save_model(load_model(checkpoint), checkpoint, "hf")
    assert snapshot(checkpoint) == before


def test_a_device_that_is_not_there_is_refused(checkpoint):
    for device in ("cuda:77", "abacus", "hpu"):
        with pytest.raises(InputError, match=device):
            load_model(checkpoint, device)


def mutations(raw: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Damaged copies of a file: bytes cut, overwritten, repeated and inserted, the end lost."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        damaged = bytearray(raw)
        for _ in range(random.integers(1, 4)):
            at, length = int(random.integers(0, max(1, len(damaged)))), int(random.integers(1, 40))
            inserted = random.choice([b"9" * 30, b"-", b"null", b"[", b"\xff\xfe", b"1e999", b'"', b"../../x"])
            change = int(random.integers(0, 5))
            damaged[at : [len(damaged), at + 1, at, at, at + length][change]] = [
                b"",
                random.bytes(1),
                damaged[at : at + length],
                inserted,
                b"",
            ][change]
        yield bytes(damaged)


@pytest.mark.parametrize("file", ["params.json", "config.json", "model.safetensors", "consolidated.00.pth"])
def test_damaged_checkpoint_files_load_or_are_refused_in_one_line(file, checkpoint):
    if file in ("config.json", "model.safetensors"):
        to_hf(checkpoint)
    raw = (checkpoint / file).read_bytes()
    header = struct.unpack("<Q", raw[:8])[0] + 8 if file == "model.safetensors" else len(raw)
    refused = 0
    for head in mutations(raw[:header], 200, seed=0):
        (checkpoint / file).write_bytes(head + raw[header:])
        try:
            load_model(checkpoint)
        except InputError as error:
            assert "\n" not in str(error).strip()
            refused += 1
    assert refused > 50


# data.py

TOKENIZERS = {name: SHARED / "tokenizers" / name for name in ("llama2", "mistral", "llama3")}
TOKENIZERS |= {"stories260K": SHARED / "checkpoints" / "stories260K", "tiny": data.TINY}


def tokenizer_folder(name: str) -> Path:
    """Skips the test if the tokenizer, or a package that it needs, is absent."""
    if not TOKENIZERS[name].is_dir():
        pytest.skip("needs the data in ../shared")
    if name == "llama3":
        pytest.importorskip("tiktoken")
    return TOKENIZERS[name]


class Letters:
    """A tokenizer of single characters, with pairs 'ab' merged."""

    vocab_size, bos_id, eos_id = 300, 1, 2

    def encode(self, text, bos=True, eos=False):
        return [1] * bos + [ord(c) for c in text.replace("ab", chr(200))] + [2] * eos


# Tokenizers


@pytest.mark.parametrize(
    "name, size, bos, eos",
    [("llama2", 32000, 1, 2), ("mistral", 32000, 1, 2), ("llama3", 128256, 128000, 128001)],
)
def test_real_tokenizers_round_trip(name, size, bos, eos):
    tokenizer = load_tokenizer(tokenizer_folder(name))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (size, bos, eos)
    text = "Grüße, 世界!\n\tdef f(x): return x**2  # 1234567 🙂"
    ids = tokenizer.encode(text, eos=True)
    assert ids == [bos, *tokenizer.encode(text, bos=False), eos] and tokenizer.decode(ids) == text
    assert tokenizer.encode("<|begin_of_text|></s>", bos=False)[0] != bos  # marks written out are text
    for long in ("a" * 1_000_000, " " * 1_000_000) if name == "llama3" else ():  # do not exhaust the stack
        assert tokenizer.decode(tokenizer.encode(long)) == long


@pytest.mark.parametrize("name, text, ids", [("llama2", "Hello world", [15043, 3186]), ("llama3", "Hello world!", [9906, 1917, 0])])  # fmt: skip
def test_known_token_ids(name, text, ids):
    assert load_tokenizer(tokenizer_folder(name)).encode(text, bos=False) == ids


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "original/tokenizer.model"])
def test_a_tokenizer_is_found_under_its_names(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes((data.TINY / "tokenizer.model").read_bytes())
    assert load_tokenizer(tmp_path).encode("one") == load_tokenizer(data.TINY / "tokenizer.model").encode("one")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_long_text_is_tokenised_by_lines_as_in_one(name):
    tokenizer = load_tokenizer(tokenizer_folder(name))

    def check(text):
        assert data.encode_long(tokenizer, text).tolist() == tokenizer.encode(text, bos=False)

    for file in ("wikitext2_valid.txt", "tinyshakespeare.txt", "c4_demo.jsonl") if SHARED.is_dir() else ():
        check((SHARED / "data" / file).read_text()[:60000])
    settings(max_examples=300)(given(st.text(alphabet="a1. é\n\n\r\t\x0b\x1c\u2028")))(check)()
    text = "a\n\n \n b  c\t\n\td.\n\n\ne f\r\ng 12345 h\n 67890.\n" * 50
    check(text)
    encode, lengths = tokenizer.encode, []
    tokenizer.encode = lambda text, bos: lengths.append(len(text)) or encode(text, bos)
    data.encode_long(tokenizer, text)
    assert max(lengths) < 25  # nothing here merges across lines


def test_only_a_vocabulary_that_merges_across_lines_needs_the_whole_text_at_once():
    class Merging(Letters):
        longest = 0

        def encode(self, text, bos=True, eos=False):
            self.longest = max(self.longest, len(text))
            return super().encode(text.replace("\nx", "ab"), bos, eos)

    tokenizer, text = Merging(), " = a line that begins with a blank = \n \n" * 1000
    assert len(data.encode_long(tokenizer, text)) == len(text) and tokenizer.longest < 50
    assert data.encode_long(tokenizer, "y\nx\nz").tolist() == [ord("y"), 200, ord("\n"), ord("z")]


@pytest.mark.parametrize("name", ["tiny", "llama2", "llama3"])
def test_a_hf_folder_says_what_its_tokenizer_is(name, tmp_path):
    """As transformers and lm-eval need it: without, they take LLaMA's tokenizer for another one."""
    hf, again, meta = tmp_path / "hf", tmp_path / "again", tmp_path / "meta"
    for folder in (hf, again, meta):
        folder.mkdir()
    for folder in (hf, again):
        (folder / "config.json").write_text('{"dim": 64}')
    data.copy_tokenizer(tokenizer_folder(name), hf)
    tokenizer, told = load_tokenizer(hf), data.read_json(hf / "tokenizer_config.json")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    assert data.read_json(hf / "config.json") == {"dim": 64} | ids
    llama2 = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "legacy": True}
    llama2 |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llama3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "add_bos_token": True}
    names = told.pop("additional_special_tokens", [])
    assert len(set(names)) == 256 * (name == "llama3") and (not names or names.index("<|eot_id|>") == 9)
    assert told == (llama3 | {"tokenizer_class": "PreTrainedTokenizerFast"} if name == "llama3" else llama2)
    (hf / "config.json").write_text('{"eos_token_id": [7, 8], "pad_token_id": 9, "dim": 32}')
    (hf / "tokenizer_config.json").write_text('{"its": "own"}')
    data.copy_tokenizer(hf, again)  # what a source says of itself is kept
    assert data.read_json(again / "config.json") == {"dim": 64, **ids, "eos_token_id": [7, 8], "pad_token_id": 9}
    assert data.read_json(again / "tokenizer_config.json") == {"its": "own"}
    (hf / "config.json").write_text('{"model_type": "mistral"}')  # transformers reads its tokenizers in another way
    data.copy_tokenizer(hf, again)
    assert data.read_json(again / "config.json")["architectures"] == ["MistralForCausalLM"]
    data.copy_tokenizer(data.TINY, meta)
    assert [path.name for path in meta.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize("name", ["tiny", "llama2", "mistral"])
def test_transformers_reads_our_sentencepiece_tokenizers_as_they_are(name, tmp_path):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    pytest.importorskip("google.protobuf", reason="transformers needs it to read SentencePiece's files")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    data.copy_tokenizer(tokenizer_folder(name), tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        "x  = 1",
        "a  b",
        "    indented",
        " lead",
        "a\tb   c    d",
        "\n\n a\n  b",
        "caf\u00e9 \u6f22 \U0001f642",
        "  ",
        "",
    ]
    texts += [record["instruction"] for record in json.loads((TINY / "val.json").read_text())]
    for text in texts:
        assert theirs(text).input_ids == ours.encode(text)


def test_a_tokenizer_under_another_name_is_saved_under_the_one_that_tools_know(tmp_path):
    source, hf = tmp_path / "source", tmp_path / "hf"
    source.mkdir()
    hf.mkdir()
    shutil.copy(TINY / "tokenizer.model", source / "tokenizer.model.v3")  # as Mistral's own downloads have it
    (hf / "config.json").write_text("{}")
    data.copy_tokenizer(source, hf)
    assert (hf / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()


def test_ids_beyond_the_tokenizers_vocabulary_have_no_text():
    """As a model may make them: its embedding is often larger."""
    tokenizer = load_tokenizer(TINY)
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.vocab_size, 10**6]) == "a b"


# Records

ARC = {
    "instruction": "Choose: which is hot?\n\nAnswer1: ice Answer2: fire\n\nAnswer format: answer1/answer2",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}
CHOICES = {"prompt": "a", "choices": ["b", "c"]}
CHAT = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao")]
CHAT = {"messages": [{"role": role, "content": content} for role, content in CHAT]}


@pytest.mark.parametrize(
    "raw, record",
    [
        ({"prompt": "a", "completion": "b"}, Record([("a", "b")])),
        ({"input": "a", "output": "b"}, Record([("a", "b")])),
        (CHOICES | {"answer": 1}, Record([("a", "c")], ["b", "c"])),
        (CHOICES | {"answer": "c"}, Record([("a", "c")], ["b", "c"])),
        ({"text": "abc"}, Record([("", "abc")], plain=True)),
        ({"question": "a", "answer": "b"}, Record([(data.alpaca_prompt("a"), "b")])),
        (
            {"question": "a", "choices": ["b", "c"], "answer": 1},
            Record([(data.alpaca_prompt("a"), "c")], ["b", "c"]),
        ),
        ({"instruction": "a", "input": None, "output": "b"}, Record([(data.alpaca_prompt("a"), "b")])),
        ({"prompt": "a", "completion": "b", "system": "c"}, Record([("c\n\na", "b")])),
        (CHOICES | {"answer": 1, "system": "d"}, Record([("d\n\na", "c")], ["b", "c"])),
        ({"question": "a", "answer": "b", "system": "c"}, Record([("c\n\n" + data.alpaca_prompt("a"), "b")])),
    ],
)
def test_record_types(raw, record):
    assert parse_record(raw) == record


@pytest.mark.parametrize(
    "record, unread",
    [
        ({"prompt": "a", "completion": "b", "context": "c"}, "context"),
        ({"question": "a", "passage": "a hill", "answer": "c"}, "passage"),
        ({"question": "a", "options": ["b", "c"], "answer": "A"}, "options"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]], "context": "a man"}, "context, history"),
        ({"prompt": "a", "completion": "b", "history": [], "context": "", "options": None}, ""),
        ({"conversations": CHAT["messages"], "tools": "[]"}, ""),
        ({"text": "all of it", "context": "c"}, ""),
        ({"text": "a film", "label": 0, "summary": None}, "label"),
        ({"prompt": "a", "completion": "b", "label": False}, "label"),  # one that is not to be learnt, in KTO
        ({"instruction": "Translate", "question": "Hi", "answer": "Salut"}, "instruction"),
        ({"question": " hi\n", **CHAT}, ""),  # it is there, as the first message
        ({"question": "2 + 2?", "A": "3", "B": "4", "answer": "B"}, "A"),
        ({"question": "2 + 2?", "A": "3", "choices": ["3", "4"], "answer": 1}, ""),
        ({"text": "hello", "conversation": "c1"}, ""),
    ],
)
def test_fields_that_are_not_read_are_told(record, unread, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(record)] * 2))
    with warnings.catch_warnings(record=True) as told:
        assert len(load_records(tmp_path / "a.jsonl")) == 2
    assert [re.findall("not read: (.*);", str(warning.message)) for warning in told] == [[unread]] * bool(unread)


def test_sharegpt_conversations_are_those_of_messages():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT["messages"]]
    assert parse_record({"conversations": turns}) == parse_record(CHAT)


def test_a_message_of_weight_0_is_context_alone(tmp_path):
    question, again = ({"role": "user", "content": text} for text in ("2 + 2?", "Sure?"))
    wrong, right = ({"role": "assistant", "content": text, "weight": n} for n, text in enumerate(("5", "4")))
    row, both = (Dataset([parse_record({"messages": [question, a, again, right]})], Letters(), 999)[0]
                 for a in (wrong, wrong | {"weight": 1}))  # fmt: skip
    assert [~i if i < 0 else i for i in row] == [~i if i < 0 else i for i in both]  # the same text
    letters = [[chr(i) for i in ids if i > 2] for ids in (row, both)]  # those that are learnt, but for EOS
    assert letters == [["4"], ["5", "4"]]
    for first, learnt in (([], ["4"]), ([{"role": "system", "content": "Add 2 + 2."}], ["5", "4"])):
        record = parse_record({"messages": [*first, wrong | {"weight": 1}, again, right]})  # without a question
        assert [text for n, (_, text) in enumerate(record.turns) if n not in record.context] == learnt
    (tmp_path / "a.json").write_text(json.dumps([{"messages": [question, wrong, again, right | {"content": " "}]}]))
    with pytest.raises(InputError, match="with anything to learn"):  # what is left to learn is
        load_records(tmp_path / "a.json")


def test_alpaca_arc_and_chat_records():
    alpaca = parse_record({"instruction": "Say hi", "input": "to Bo", "output": "hi Bo"})
    assert alpaca.turns[0][0].endswith(
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi\n\n### Input:\nto Bo\n\n### Response:\n"
    )
    assert alpaca.turns[0][1] == "hi Bo" and not alpaca.choices
    arc = parse_record(ARC)
    assert (
        arc.choices == ["the correct answer is answer1", "the correct answer is answer2"]
        and arc.turns[0][1] == arc.choices[1]
    )
    assert "### Input" not in arc.turns[0][0] and arc.turns[0][1] == ARC["output"]
    (first, hello), (second, ciao) = parse_record(CHAT).turns
    assert (first, hello) == ("be kind\n\n### Instruction:\nhi\n\n### Response:\n", "hello")
    assert (second, ciao) == ("### Instruction:\nbye\n\n### Response:\n", "ciao")
    apart = parse_record({"conversations": CHAT["messages"][1:], "system": "be kind"})
    assert apart == parse_record(CHAT)
    assert parse_record({"instruction": "a", "output": "b", "system": "c"}).turns[0][0].startswith("c\n\nBelow")
    assert not parse_record(ARC | {"instruction": "Answer format: answer2"}).choices  # nothing to choose from


@pytest.mark.parametrize(
    "raw, names",
    [
        ([1], "unknown"),
        ({"question": "b"}, "question"),
        ({"text": 3}, "3"),
        ({"instruction": "a", "output": None, "text": "b"}, "null"),
        ({"instruction": "a", "input": 1, "output": "b"}, "1"),
        ({"instruction": "a", "input": 0, "output": "b"}, "0"),
        ({"prompt": "a", "completion": "half a pair: \ud800"}, "surrogates"),
        (CHOICES | {"answer": 2}, "answer"),
        (CHOICES | {"answer": True}, "answer"),
        (CHOICES | {"answer": "d"}, "answer"),
        (CHOICES | {"choices": ["b"], "answer": 0}, "choices"),
        (CHOICES | {"choices": ["b", ""], "answer": 0}, "choices"),
        (CHOICES | {"choices": "bc", "answer": 0}, "choices"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "tool.* role"),
        ({"messages": {"role": "user"}, "text": "a"}, "role"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "tool calls"),
        ({"instruction": "a", "response": "b"}, "with instruction, response; known"),
    ],
)
def test_what_is_no_record_is_refused(raw, names):
    with pytest.raises(ValueError, match=names):
        parse_record(raw)


JSON_KEYS = (
    "system instruction input output answer prompt choices messages role content text completion question".split()
)
JSON_KEYS += ["conversations", "from", "value"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(JSON_KEYS), inner),
    max_leaves=20,
)


@settings(max_examples=60)
@given(JSON)
def test_any_json_is_a_record_or_refused(value):
    try:
        record = parse_record(value)
    except ValueError:
        return
    assert all(isinstance(text, str) for turn in record.turns for text in turn)


def test_data_files_of_every_kind(tmp_path):
    rows = [ARC, {"prompt": "a", "completion": "b\u2028c"}]
    records = [parse_record(row) for row in rows]
    for name, text, expected in [
        ("list.json", json.dumps(rows), records),
        ("list.jsonl", json.dumps(rows, indent=1), records),
        ("lines.jsonl", "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", records),
        ("one.jsonl", json.dumps(ARC), records[:1]),
        ("typed.json", json.dumps({"type": "text2text", "instances": rows}), records),
        ("typed.jsonl", json.dumps({"type": "text_only", "instances": rows}, indent=1), records),
        ("plain.txt", "hello\nworld", [Record([("", "hello\nworld")], plain=True)]),
        ("PLAIN.TXT", "hello\r\nworld", [Record([("", "hello\nworld")], plain=True)]),
    ]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_records(tmp_path / name) == expected


def test_validation_records_that_are_trained_on_are_told(base, jsonl, tmp_path):
    jsonl.write_text(2 * (jsonl.read_text() + "\n"))
    for flags, told in (("", "6 of 6"), (f"--val-data {jsonl}", "120 of 120")):
        with pytest.warns(UserWarning, match=f"{told} validation records are trained on as well"):
            assert cli(f"{base} {flags} --steps 1 --out {tmp_path / told[:2].strip()}")[0] == 0


@needs_shared
@pytest.mark.parametrize("file, choices", [("arc_easy_train.json", 3), ("boolq_test.json", 2)])
def test_real_multiple_choice_data(file, choices):
    for raw, record in zip(json.loads((SHARED / "data" / file).read_text()), load_records(SHARED / "data" / file)):
        assert len(record.choices) >= choices and record.turns[0][1] == raw["output"] in record.choices


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.txt", "tokenizer.model", "ranks"])
def test_damaged_files_load_or_are_refused_in_one_line(name, tmp_path):
    rows = [{"prompt": f"{n} and {n} is", "completion": f" {2 * n}"} for n in range(5)]
    rows += [{"prompt": f"Is {n} even?", "choices": [" yes", " no"], "answer": n % 2} for n in range(4)]
    raw, load = "\n".join(map(json.dumps, rows)).encode(), load_records
    if name == "data.json":
        raw = json.dumps(rows).encode()
    elif name == "tokenizer.model":
        raw, load = (data.TINY / name).read_bytes(), load_tokenizer
    elif name == "ranks":
        pytest.importorskip("tiktoken")
        raw, load = b"".join(data.base64.b64encode(bytes([n])) + b" %d\n" % n for n in range(256)), load_tokenizer
    refused = 0
    for damaged in mutations(raw, 400, seed=1):
        (tmp_path / name).write_bytes(damaged)
        try:
            assert load(tmp_path / name)
        except InputError as error:
            assert "\n" not in str(error) and name in str(error)
            refused += 1
    assert refused > (5 if name == "data.txt" else 100)


def test_split_keeps_every_record_once():
    records = [Record([("", str(n))]) for n in range(100)]
    for share, most, count in ((0.05, 500, 5), (0.5, 3, 3), (0.001, 500, 1)):
        kept, held = data.split_records(records, share, most, seed=0)
        assert len(held) == count and sorted(kept + held, key=records.index) == records
    kept, held = data.split_records([Record([("", "one\ntwo\nthree")], plain=True)], 0.3, 500, seed=0)
    assert [r.turns[0][1] for r in kept + held] == ["one\ntwo\n", "three"] and kept[0].plain and held[0].plain
    kept, _ = data.split_records([Record([("", "Title\n" + "word " * 999)], plain=True)], 0.05, 500, seed=0)
    assert len(kept[0].turns[0][1]) == int(0.95 * (6 + 5 * 999))  # not at a line break that is far from there


def test_a_failed_write_leaves_what_was_there(tmp_path):
    with data.atomic_write(tmp_path / "file") as file:
        file.write(b"old")
    with pytest.raises(OSError), data.atomic_write(tmp_path / "file") as file:
        file.write(b"new")
        raise OSError
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


@pytest.fixture
def tokenizer_json(tmp_path):
    """A folder with a tokenizer.json alone: a byte-level BPE of a few hundred tokens, digits one by one."""
    tokenizers = pytest.importorskip("tokenizers")
    Digits, ByteLevel = tokenizers.pre_tokenizers.Digits, tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(split)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    flags = dict(initial_alphabet=ByteLevel.alphabet(), special_tokens=["<|start|>", "<|end|>", "<|pad|>"])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False, **flags)
    tokenizer.train_from_iterator((TINY / "text.txt").read_text().splitlines(), trainer)
    tokenizer.enable_truncation(5)  # what it was last used with: not a part of how it encodes
    tokenizer.enable_padding(length=9)
    path = tmp_path / "json"
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": {"__type": "AddedToken", "content": "<|start|>"}, "eos_token": "<|end|>"}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=80))
def test_tokenizer_json_alone_is_read(tokenizer_json, text):
    tokenizer = load_tokenizer(tokenizer_json)
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.decode(ids) == text  # of single bytes and merges of them, so nothing is lost
    assert tokenizer.encode(text, eos=True) == [0, *ids, 1] and (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode([0, *ids, 1]) == text and tokenizer.vocab_size == 400 and max(ids, default=0) < 400
    assert data.encode_long(tokenizer, text).tolist() == ids


@pytest.mark.parametrize("told, eos", [("<|eot_id|>", 9), ({"content": "<|eot_id|>"}, 9), (None, 1), ("</s>", 1)])
def test_llama3_ends_in_the_token_that_its_folder_names(told, eos, tmp_path):
    """As a chat model's answers do, of which Meta's own file does not know."""
    (tmp_path / "original").mkdir()
    shutil.copy(tokenizer_folder("llama3") / "tokenizer.model", tmp_path / "original")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": told}))
    assert load_tokenizer(tmp_path).encode("", eos=True) == [128000, 128000 + eos]


def test_tokenizer_json_encodes_as_transformers_does(tokenizer_json):
    reference = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tokenizer_json)
    tokenizer, random = load_tokenizer(tokenizer_json), np.random.default_rng(0)
    pieces = "the~ a~7~42~\n~\n\n~  ~\t~é~e\u0301~日本~🙂~<|end|>~<|~'s~\u200b~½".split("~")
    texts = ["".join(random.choice(pieces, n % 30)) for n in range(3000)]
    for text in texts + (TINY / "text.txt").read_text().splitlines()[:500]:
        assert tokenizer.encode(text, bos=False) == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "settings_, config, ids",
    [
        ({"bos_token": None, "eos_token": "<|end|>"}, {"bos_token_id": 0, "eos_token_id": 2}, (-1, 1)),
        ({}, {"bos_token_id": 0, "eos_token_id": [2, 1]}, (0, 2)),
        ({"bos_token": ""}, {"bos_token_id": 0, "eos_token_id": 1}, (-1, 1)),
        (None, {"eos_token_id": None}, (-1, -1)),
        (None, None, (-1, -1)),
    ],
)
def test_bos_and_eos_stand_beside_tokenizer_json(tokenizer_json, settings_, config, ids):
    for name, content in (("tokenizer_config.json", settings_), ("config.json", config)):
        (tokenizer_json / name).unlink(missing_ok=True)
        if content is not None:
            (tokenizer_json / name).write_text(json.dumps({"_": 0} | content))
    tokenizer = load_tokenizer(tokenizer_json)
    assert (tokenizer.bos_id, tokenizer.eos_id) == ids
    bos, eos = ([i] * (i >= 0) for i in ids)
    assert tokenizer.encode("a", eos=True) == [*bos, *tokenizer.encode("a", bos=False), *eos]


def test_bos_and_eos_may_stand_in_special_tokens_map_and_are_not_doubled(tokenizer_json):
    (tokenizer_json / "config.json").write_text('{"bos_token_id": 2, "eos_token_id": 2}')
    (tokenizer_json / "tokenizer_config.json").unlink(missing_ok=True)
    known = {"bos_token": "<|end|>", "eos_token": {"content": "<|end|>"}}
    (tokenizer_json / "special_tokens_map.json").write_text(json.dumps(known))
    tokenizer = load_tokenizer(tokenizer_json)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 1)
    within, spelt = tokenizer.encode("ab", bos=False), "<|end|>ab<|end|>"
    assert tokenizer.encode(spelt, eos=True) == tokenizer.encode("ab", eos=True) == [1, *within, 1]
    plain = [Record([("", text)], plain=True) for text in (spelt, "ab")]
    assert Dataset(plain, tokenizer, 99).ids.tolist() == [~1, *within, 1] * 2


def test_a_tokenizer_json_that_cannot_be_read_is_told_in_one_line(tokenizer_json, monkeypatch):
    (tokenizer_json / "tokenizer_config.json").write_text('{"bos_token": "<|nowhere|>"}')
    with pytest.raises(InputError, match="bos_token is not one of its tokens"):
        load_tokenizer(tokenizer_json)
    (tokenizer_json / "tokenizer_config.json").unlink()
    for id in (5000, True, 1.5):
        (tokenizer_json / "config.json").write_text(json.dumps({"eos_token_id": id}))
        with pytest.raises(InputError, match="eos_token is not one of its tokens"):
            load_tokenizer(tokenizer_json)
    with pytest.raises(InputError, match="tokenizer.model: missing"):
        load_tokenizer(tokenizer_json.parent)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="pip install tokenizers"):
        load_tokenizer(tokenizer_json)
    monkeypatch.undo()
    (tokenizer_json / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        load_tokenizer(tokenizer_json)
    shutil.copy(TINY / "tokenizer.model", tokenizer_json)  # which comes first
    assert load_tokenizer(tokenizer_json).vocab_size == load_tokenizer(TINY).vocab_size


def test_a_run_on_a_folder_with_tokenizer_json_alone_hands_it_on(tokenizer_json, jsonl, tmp_path):
    save_model(build(vocab_size=400, max_seq_len=256), tokenizer_json, "hf")
    train_run(f"--ckpt {tokenizer_json} --data {jsonl} --batch-size 4 --steps 2 --out {tmp_path / 'run'}")
    saved = tmp_path / "run" / "model"
    assert (saved / "tokenizer.json").read_bytes() == (tokenizer_json / "tokenizer.json").read_bytes()
    config = json.loads((saved / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert load_tokenizer(saved).encode("12 and", eos=True)[-1] == 1


# Rows and batches


def targets_of(records: list[dict], seq_len: int) -> list[list[int]]:
    """What each row is trained on."""
    dataset = Dataset([parse_record(record) for record in records], Letters(), seq_len)
    return [dataset.batch([n])[1].tolist() for n in range(len(dataset.rows))]


def test_loss_is_on_completions_and_their_end_only():
    rows = [{"prompt": "xyz", "completion": "uv"}, {"prompt": "", "completion": "u"}]
    dataset = Dataset([parse_record(row) for row in rows], Letters(), seq_len=20)
    tokens, targets, layout = dataset.batch([0, 1])
    assert tokens.tolist() == [1, ord("u"), 1, *map(ord, "xyzuv")] and layout.shapes == [(1, 2), (1, 6)]
    assert targets.tolist() == [ord("u"), 2, ord("u"), ord("v"), 2] and layout.predicting.tolist() == [0, 1, 5, 6, 7]
    assert layout.positions.tolist() == [0, 1, 0, 1, 2, 3, 4, 5] and layout.places is None
    assert (dataset.prompts_cut, dataset.completions_cut) == (0, 0) and not dataset.records


def test_a_token_across_the_border_belongs_to_the_completion():
    assert encode_turn(Letters(), "xa", "by", bos=True, eos=False) == [~1, ~ord("x"), 200, ord("y")]


def test_a_second_turn_is_context_again():
    assert targets_of([CHAT], 500) == [[*map(ord, "hello"), 2, *map(ord, "ciao"), 2]]
    dataset = Dataset([parse_record(CHAT)], Letters(), 500)
    assert dataset.ids.tolist().count(~1) == 1 and dataset.ids.min() >= ~ord("z")


def test_cut_rows_are_counted_by_what_was_cut():
    records = [("uvwxyz", "u"), ("xyz", "u"), ("a", "b"), ("", "uvwxyz"), ("wxyz", "uvwxyz")]
    records = [parse_record({"prompt": prompt, "completion": completion}) for prompt, completion in records]
    dataset = Dataset(records, Letters(), seq_len=5)  # the first and the last lose some prompt, the last two the end
    assert [len(row) for row in dataset] == [6, 6, 3, 6, 6]
    assert (dataset.prompts_cut, dataset.completions_cut) == (2, 2)
    with pytest.raises(InputError, match="short"):
        Dataset([Record([("", "")], plain=True)], Letters(), 5)


@given(st.integers(0, 30), st.integers(1, 30), st.integers(2, 30))
def test_long_rows_lose_the_prompts_left_down_to_half_a_row_and_then_their_end(prompt, answer, length):
    context, told = list(range(-prompt - 1, -1)), list(range(answer))
    row = fit([~1, *context, *told], length).tolist()
    kept = sum(i < 0 for i in row) - 1
    learnt = len(row) - 1 - kept
    assert row == [~1, *context[prompt - kept :], *told[:learnt]] and len(row) == min(length, 1 + prompt + answer)
    assert learnt == answer or learnt and kept == min(prompt, (length - 1) // 2)
    assert kept == prompt or kept >= (length - 1) // 2


@pytest.mark.parametrize("blank", ["", " \n"])
def test_records_with_an_empty_completion_are_counted_and_left_out(blank, checkpoint, tmp_path):
    empty = [
        {"prompt": "a", "completion": blank},
        {"text": blank},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": blank}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "what was asked is missing"}]},
        {"conversation": []},
    ]
    rows, file = [{"prompt": "a", "completion": " b"}] * 3 + empty, tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="6 of 9 records have nothing to learn"):
        assert load_records(file) == [Record([("a", " b")])] * 3
    file.write_text("\n".join(map(json.dumps, empty)))
    assert_refused(cli(f"--ckpt {checkpoint} --data {file} --out {tmp_path / 'run'}"), "with anything to learn")


def test_data_without_a_token_to_learn_is_refused():
    class Bare(Letters):
        def encode(self, text, bos=True, eos=False):
            return super().encode(text, bos=False, eos=False)

    with pytest.raises(InputError, match="no row has a token to learn"):
        Dataset([parse_record({"prompt": "", "completion": "a"})] * 3, Bare(), 9)
    assert len(Dataset([parse_record({"prompt": "", "completion": "xy"})], Bare(), 9).rows) == 1


@given(st.lists(st.text(alphabet="xyz\n", min_size=2), min_size=1, max_size=3), st.integers(1, 50))
def test_plain_text_rows_predict_each_token_once(texts, seq_len):
    """Texts follow one another, each with its end-of-text token if there are several."""
    rows = targets_of([{"text": text} for text in texts] + [{"prompt": "x", "completion": "y"}], seq_len)
    assert sum(rows[1:], []) == [i for text in texts for i in [*map(ord, text), 2]]
    rows = targets_of([{"text": texts[0]}], seq_len)
    assert sum(rows, []) == [*map(ord, texts[0])] and all(len(row) == seq_len for row in rows[:-1])


def test_samples_are_rows_drawn_by_seed():
    dataset = Dataset([Record([("", "abcdefgh" * 40)], plain=True)], Letters(), seq_len=7)
    rows = [[dataset.batch([n])[0].tolist()] for n in range(len(dataset.rows))]
    first, again, other = ([tokens.tolist() for tokens in dataset.sample(5, seed)] for seed in (0, 0, 1))
    assert first == again != other and len(first) == 5 and all(tokens in rows for tokens in first)
    assert len(dataset.sample(1000, 0)) == len(rows)


id_rows = st.lists(st.integers(-9, 8), min_size=2, max_size=9)  # negative: context


@settings(max_examples=300)
@given(st.lists(st.tuples(id_rows, st.lists(id_rows, max_size=3)), min_size=1, max_size=4), st.sampled_from([None, 4]))
def test_each_target_is_predicted_from_what_stands_before_it_in_its_row_and_nothing_else(examples, window):
    """Whatever rows have in common: what a predicting token sees, in the order of positions, is the row up to there."""
    examples = [[np.array(beginning + end) for end in (ends or [[]])] for beginning, ends in examples]
    tokens, targets, layout, counts = data.lay_out(examples)
    size = sum(B * T for B, T in layout.shapes)
    places = torch.arange(size) if layout.places is None else layout.places
    readers = torch.arange(len(tokens)) if layout.predicting is None else layout.predicting
    sees, begin = torch.zeros(size, size).bool(), 0  # of all places, over the groups
    for (B, T), mask in zip(layout.shapes, layout.masks(window)):
        mask = torch.ones(T, T).tril().bool() if mask is None else mask
        for row in mask.expand(B, 1, T, T)[:, 0]:
            sees[begin : begin + T, begin : begin + T] = row
            begin += T
    assert layout.unpad(layout.pad(tokens)).tolist() == tokens.tolist()
    found, parts = [], iter(torch.stack([readers, targets], 1).split(counts))
    tokens, positions, places, sees = (x.tolist() for x in (tokens, layout.positions, places, sees))  # quicker to walk
    for rows in examples:
        common = next(parts)
        for _, part in zip(rows, parts):
            for reader, target in torch.cat([common, part]).tolist():
                seen = [n for n, place in enumerate(places) if sees[places[reader]][place]]
                seen.sort(key=positions.__getitem__)
                assert [positions[n] for n in seen] == list(range(positions[reader] + 1))[-len(seen) :]
                found.append([*(tokens[n] for n in seen), target])
    expected = []
    for row in itertools.chain(*examples):
        plain = np.where(row < 0, ~row, row).tolist()
        expected += [plain[max(0, n - (window or n)) : n + 1] for n in range(1, len(row)) if row[n] >= 0]
    assert sorted(found) == sorted(expected)
    assert len(tokens) <= sum(len(row) - 1 for row in itertools.chain(*examples))


def test_choices_of_one_token_need_no_mask():
    rows = [np.array([~1, 5, choice]) for choice in (6, 7, 8)]
    tokens, targets, layout, counts = data.lay_out([rows])
    assert (tokens.tolist(), targets.tolist(), counts) == ([1, 5], [5, 6, 7, 8], [1, 1, 1, 1])
    assert layout.predicting.tolist() == [0, 1, 1, 1] and layout.masks(None) == [None]


def test_packed_rows_hold_each_row_once_and_no_more_than_fit():
    rows = [{"prompt": "p" * (n % 23), "completion": "c" * (1 + n % 5)} for n in range(80)]
    dataset = Dataset([parse_record(row) for row in rows], Letters(), seq_len=30)
    groups = dataset.packed(30, seed=1)
    lengths = [sum(len(dataset[n]) - 1 for n in group) for group in groups]
    assert sorted(sum(groups, [])) == list(range(80)) and max(lengths) <= 30 and len(groups) < 60
    assert groups == dataset.packed(30, seed=1) != dataset.packed(30, seed=2)
    following = [lengths[n] + len(dataset[groups[n + 1][0]]) - 1 for n in range(len(groups) - 1)]
    assert min(following) > 30  # a row ends only where the next record does not fit


# owlore.py: scores


class Keyword(nn.Module):
    """A block that calls its linear by keyword, as some models of transformers do."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(input=x)


def brute_force_outliers(layers: list[list[nn.Linear]], run: Callable, threshold: float) -> torch.Tensor:
    """The definition, all inputs and scores at once. run: the forward passes."""
    inputs = {linear: [] for layer in layers for linear in layer}

    def keep(linear, args, kwargs):
        inputs[linear].append((args or tuple(kwargs.values()))[0].flatten(0, -2))

    hooks = [linear.register_forward_pre_hook(keep, with_kwargs=True) for linear in inputs]
    run()
    for hook in hooks:
        hook.remove()
    shares = []
    for layer in layers:
        A = torch.cat([(m.weight.abs() * torch.cat(inputs[m]).pow(2).sum(0).sqrt()).flatten() for m in layer])
        shares.append((A > threshold * A.mean()).float().mean())
    return torch.stack(shares)


def linears_of(layers) -> list[list[nn.Linear]]:
    return [[m for m in layer.modules() if isinstance(m, nn.Linear)] for layer in layers]


@pytest.mark.parametrize("threshold", [1.5, 3.0])
@pytest.mark.parametrize("kind", ["llama", "sequential", "dict", "keyword"])
def test_outlier_distribution_equals_brute_force(kind, threshold):
    torch.manual_seed(0)
    model, batches = build(), [random_tokens(2, 11), random_tokens(3, 7, seed=3)]
    layers = model.layers
    if kind in ("sequential", "keyword"):
        first = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 8))
        model = nn.Sequential(first, nn.Tanh(), Keyword(nn.Linear(8, 8)) if kind == "keyword" else nn.Linear(8, 8))
        layers, batches = [model[0], model[2]], [torch.randn(5, 8), torch.randn(2, 3, 8)]
    if kind == "dict":
        batches = [{"tokens": batch} for batch in batches]

    def run():
        model.eval()
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)

    expected = brute_force_outliers(linears_of(layers), run, threshold)
    model.train()
    got = outlier_distribution(model, layers, batches, threshold)
    assert torch.equal(got, expected) and got.min() >= 0 and got.max() > 0
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_a_linear_that_occurs_twice_is_scored_once():
    """Under two names in one layer, and in another layer, too."""
    torch.manual_seed(0)
    shared, a, b, x = *(nn.Linear(16, 16) for _ in range(3)), torch.randn(9, 16)
    layers = [nn.Sequential(shared, a, shared), nn.Sequential(shared, b)]
    expected = brute_force_outliers([[shared, a], [shared, b]], lambda: nn.Sequential(*layers)(x), 1.5)
    assert torch.equal(outlier_distribution(nn.Sequential(*layers), layers, [x], 1.5), expected)


def test_scores_of_bf16_weights_are_computed_in_fp32():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64).bfloat16(), torch.randn(3000, 64).bfloat16()
    A = linear.weight.float().abs() * x.float().square().sum(0).sqrt()
    for threshold in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        expected = (A > threshold * A.mean()).float().mean()
        assert outlier_distribution(linear, [linear], [x], threshold) == expected


def test_an_adapter_of_peft_does_not_change_the_scores():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    batches = [{"input_ids": random_tokens(2, 9, vocab=50), "attention_mask": torch.ones(2, 9)}]
    expected = outlier_distribution(model, model.model.layers, batches, 2.0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(outlier_distribution(adapted, model.model.layers, batches, 2.0), expected)
    again = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapted = peft.get_peft_model(adapted, again)  # an adapter of an adapter
    assert torch.equal(outlier_distribution(adapted, model.model.layers, batches, 2.0), expected)
    assert expected.min() > 0


def test_an_expert_that_gets_no_token_is_not_scored():
    torch.manual_seed(0)
    expert, idle, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(5, 8)

    class Routed(nn.Module):
        def forward(self, x):
            return expert(x), idle(x[:0])

    expected = outlier_distribution(expert, [expert], [x], 1.5)
    assert expected > 0 and torch.equal(
        outlier_distribution(Routed(), [nn.ModuleList([expert, idle])], [x], 1.5), expected
    )


def test_the_default_threshold_follows_the_width_and_no_outliers_are_told():
    narrow = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for model, threshold in ((narrow, 3.0), (nn.Sequential(nn.Linear(2048, 8), nn.Linear(8, 8)), 13 / math.sqrt(2))):
        x = torch.randn(9, model[0].in_features)
        model[0].weight.data[0, 0] = 9.0
        assert torch.equal(outlier_distribution(model, model, [x], threshold), outlier_distribution(model, model, [x]))
    assert owlore.default_threshold(4096) == owlore.default_threshold(8192) == 13
    narrow = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="smaller threshold.* 3 suits a width of 64"):
        assert outlier_distribution(narrow, narrow, [torch.randn(9, 64)], threshold=13.0).tolist() == [0, 0]


def test_outlier_distribution_needs_batches_and_float_linears():
    linear = nn.Linear(2, 2)
    quantized, scaled = nn.Linear(2, 2), nn.Linear(2, 2)
    quantized.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    scaled.weight = nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn), requires_grad=False)
    unused, x = nn.MultiheadAttention(2, 1).out_proj, torch.ones(1, 2)
    cases = [([linear], [], "batches"), ([nn.ReLU()], [x], "Linear"), ([quantized], [x], "quantized")]
    cases.append(([scaled], [x], "quantized"))
    for layers, batches, match in [*cases, ([linear], [x / 0], "not finite")]:
        with pytest.raises(ValueError, match=match):
            outlier_distribution(nn.Sequential(*layers), layers, batches)
    with pytest.raises(ValueError, match="layers"):
        outlier_distribution(linear, [], [x])
    with pytest.raises(ValueError, match="layer 1"):  # one that does not run has no scores
        outlier_distribution(linear, [linear, unused], [x])


@pytest.mark.parametrize("shape", [(40, 40), (30, 60), (61, 20)])
def test_hill_alpha_equals_the_formula(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    e = np.sort(np.linalg.svd(W.double().numpy(), compute_uv=False) ** 2)
    n, k = len(e), len(e) // 2
    expected = 1 + k / sum(math.log(e[n - i] / e[n - k - 1]) for i in range(1, k + 1))  # e_{n-i+1} is e[n - i] from 0
    assert hill_alpha(W) == pytest.approx(expected, rel=1e-4)  # fp32 SVD


def test_hill_alpha_recovers_a_power_law():
    """A spectrum with density ~ e^-2.5 has alpha 2.5; the estimate from its n/2 largest should be near."""
    e = (1 - (np.arange(400) + 0.5) / 400) ** (-1 / 1.5)
    assert hill_alpha(torch.diag(torch.tensor(e).sqrt())) == pytest.approx(2.5, abs=0.05)


@pytest.mark.parametrize("rank, alpha", [(0, 1.0), (1, 1.0), (20, 1.0), (21, None)])
def test_hill_alpha_is_1_if_the_lower_half_of_the_spectrum_is_zero(rank, alpha):
    torch.manual_seed(0)
    W = torch.randn(40, rank) @ torch.randn(rank, 60)  # zero but for fp32's rounding
    assert hill_alpha(W) == alpha if alpha else 1 < hill_alpha(W) < 2
    with pytest.raises(ValueError, match="2 x 2"):
        hill_alpha(torch.ones(1, 5))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            hill_alpha(torch.full((3, 3), bad))
    assert hill_alpha(torch.eye(4)) == math.inf  # a flat spectrum: ln 1 in all terms


# owlore.py: sampling


@needs_shared
def test_sampling_probabilities_of_llama2_7b():
    D = torch.tensor(np.loadtxt(SHARED / "facts/llama2_7b_outlier_percent_tau13.txt"))
    p = sampling_probabilities(D)
    assert torch.allclose(p, D / D.sum()) and p.argmax() == 1
    assert torch.allclose(sampling_probabilities(D / 100), p)  # the unit does not matter


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.sampled_from(["outlier", "uniform", "reverse", "increasing", "decreasing"]))  # fmt: skip
def test_probabilities_are_a_distribution_in_every_mode(outliers, mode):
    p = sampling_probabilities(torch.tensor(outliers, dtype=torch.float64), mode)
    assert p.shape == (len(outliers),) and (p >= 0).all() and p.sum().item() == pytest.approx(1)


def test_probability_modes():
    D = torch.tensor([1.0, 3.0, 0.0, 4.0])
    assert sampling_probabilities(D).tolist() == [0.125, 0.375, 0, 0.5]
    assert sampling_probabilities(D, "uniform").tolist() == [0.25] * 4
    assert sampling_probabilities(D, "reverse").tolist() == [0.375, 0.125, 0.5, 0]
    assert sampling_probabilities(D, "increasing").tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert sampling_probabilities(D, "decreasing").tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert sampling_probabilities(torch.zeros(4)).tolist() == [0.25] * 4
    assert sampling_probabilities(torch.tensor([6e4, 6e4, 0], dtype=torch.float16)).tolist() == [0.5, 0.5, 0]
    assert sampling_probabilities([1, 3]).tolist() == [0.25, 0.75]
    for bad in ([1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [2e38, 2e38], torch.ones(2, 2)):
        with pytest.raises(ValueError):
            sampling_probabilities(bad)
    with pytest.raises(ValueError, match="mode"):
        sampling_probabilities(D, "random")


def blocks(count: int) -> list[nn.Module]:
    return [nn.Linear(2, 2) for _ in range(count)]


def test_draws_follow_sampling_without_replacement():
    p, active, draws = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]), 2, 20000
    sampler = LayerSampler(blocks(5), p, active)
    counts = {pair: 0 for pair in itertools.combinations(range(5), 2)}
    for _ in range(draws):
        counts[tuple(sampler.resample())] += 1
    for (i, j), count in counts.items():
        # either first, then the other from what is left
        expected = (p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])).item()
        assert abs(count / draws - expected) < 4.5 * math.sqrt(expected * (1 - expected) / draws)  # 4.5 sigma


@pytest.mark.parametrize("probabilities", [[0.0] * 4, [0, 0, 1, 0], [0.5, 0, 0.5, 0]])
def test_zero_probabilities_do_not_break_the_draw(probabilities):
    sampler = LayerSampler(blocks(4), torch.tensor(probabilities), active=2)
    seen = [0] * 4
    for _ in range(600):
        drawn = sampler.resample()
        assert len(drawn) == 2 and drawn == sorted(set(drawn))
        for layer in drawn:
            seen[layer] += 1
    positive = sum(p > 0 for p in probabilities)
    for count, p in zip(seen, probabilities):
        share = 1 if p > 0 else (2 - positive) / (4 - positive)  # positive ones first, the rest uniformly
        assert count == 600 if p > 0 else abs(count / 600 - share) < 0.1


def test_only_drawn_layers_require_gradients():
    layers = blocks(6)
    sampler = LayerSampler(layers, torch.ones(6) / 6, active=2)
    for layer in layers:
        layer.weight.grad = torch.ones(2, 2)
    drawn = sampler.resample()
    for n, layer in enumerate(layers):
        assert all(p.requires_grad == (n in drawn) for p in layer.parameters())
        assert (layer.weight.grad is not None) == (n in drawn)


def test_the_sampler_leaves_alone_what_the_user_froze():
    layers = blocks(3)
    layers[0].bias.requires_grad_(False)
    sampler = LayerSampler(layers, torch.ones(3), active=3)
    sampler.resample()
    assert layers[0].weight.requires_grad and not layers[0].bias.requires_grad and layers[1].bias.requires_grad
    layers[1].requires_grad_(False)
    with pytest.raises(ValueError, match="layer 1 is frozen"):
        LayerSampler(layers, torch.ones(3), active=3)


def test_layers_that_share_a_weight_are_trained_if_one_is_drawn():
    layers = blocks(2)
    layers[1].weight = layers[0].weight
    sampler = LayerSampler(layers, torch.tensor([1.0, 0.0]), active=1)
    assert sampler.resample() == [0] and layers[1].weight.requires_grad and not layers[1].bias.requires_grad


def test_the_sampler_finds_parameters_that_were_replaced_and_refuses_new_ones():
    layers = blocks(3)
    sampler = LayerSampler(layers, torch.tensor([0.0, 1.0, 0.0]), active=1)
    for layer in layers:  # as FSDP's fully_shard does
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert sampler.resample() == [1] and [layer.weight.requires_grad for layer in layers] == [False, True, False]
    layers[2].adapter = nn.Linear(2, 2)  # as peft does
    with pytest.raises(RuntimeError, match="other parameters"):
        sampler.resample()


def test_layers_that_were_unfrozen_between_two_draws_are_told():
    layers, p = blocks(4), torch.ones(4).double()
    sampler = LayerSampler(layers, p, active=2)
    p.zero_()  # the caller's own
    with no_warning():
        sampler.resample()
        sampler.resample()
        nn.ModuleList(layers).requires_grad_(True)  # as when peft's disable_adapter() ends
        sampler.activate(sampler.drawn)
        sampler.resample()
    nn.ModuleList(layers).requires_grad_(True)
    with pytest.warns(UserWarning, match="not drawn require gradients"):
        sampler.resample()
    assert len(sampler.drawn) == sum(layer.weight.requires_grad for layer in layers) == 2
    assert sampler.probabilities.tolist() == [1] * 4


def test_sampler_state_continues_the_same_draws():
    a, b = LayerSampler(blocks(9), torch.arange(9) + 1, 3, seed=1), LayerSampler(blocks(9), torch.ones(9), 3, seed=2)
    a.resample()
    b.load_state_dict(pickle.loads(pickle.dumps(a.state_dict())))
    trained = [[p.requires_grad for m in s.layers for p in m.parameters()] for s in (a, b)]
    assert b.drawn == a.drawn and trained[0] == trained[1]
    b.load_state_dict(LayerSampler(blocks(9), torch.ones(9), 3).state_dict())  # taken before anything was frozen
    assert all(p.requires_grad for m in b.layers for p in m.parameters()) and not b.drawn
    b.load_state_dict(a.state_dict())  # with the probabilities: scored again after training they would be others
    assert [a.resample() for _ in range(20)] == [b.resample() for _ in range(20)]
    b.load_state_dict({key: value for key, value in a.state_dict().items() if key != "probabilities"})  # an older one
    assert a.resample() == b.resample()
    fewer, older = LayerSampler(blocks(4), torch.ones(4), 3), a.state_dict()
    del older["probabilities"]
    for sampler, state in ((fewer, a.state_dict()), (a, fewer.state_dict()), (fewer, older | {"drawn": [0, 1, 8]})):
        with pytest.raises(ValueError, match="other than these"):
            sampler.load_state_dict(state)
    assert len(a.probabilities) == 9 and len(fewer.probabilities) == 4


@pytest.mark.parametrize(
    "active, probabilities", [(0, [1] * 3), (4, [1] * 3), (2, [1] * 4), (2, [1, -1, 1]), (2, [1, math.nan, 1])]
)
def test_sampler_refuses_what_cannot_be_drawn(active, probabilities):
    with pytest.raises(ValueError, match="active|probabilities"):
        LayerSampler(blocks(3), torch.tensor(probabilities), active)


# owlore.py: projected Adam, as an ordinary optimizer


def random_gradients(*shape: int, steps: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def test_without_rank_it_is_adamw():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (6,), ())]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    a, b = ProjectedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for n in range(200):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        if n == 100:  # its state can be taken over, too
            a = ProjectedAdam(ours, lr=1, in_backward=True)
            a.load_state_dict(b.state_dict())
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def reference_steps(
    W: torch.Tensor, gradients: list, rank: int, update_gap: int, lr: float, scale: float, decay: float, residual: bool
):
    """The paper's algorithm for one matrix, in fp64 and written out; the first moment follows the basis. residual: with
    Fira's term: its gain has |N| of the step before, its rows are no longer than Adam's, and it grows by 1 % a step,
    from a tenth of |N| at least."""
    W, tall = W.double(), W.shape[0] >= W.shape[1]
    M, V, limit, lengths = 0, 0, math.inf, math.sqrt(min(rank, *W.shape))
    along = 1 if tall else 0
    for t, G in enumerate(map(torch.Tensor.double, gradients)):
        if t % update_gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            new = Vh[:rank].T if tall else U[:, :rank]
            M = (M @ P.T @ new if tall else new.T @ P @ M) if t else 0  # noqa: F821 (P is that of before)
            P = new
        R = G @ P if tall else P.T @ G
        if residual:
            S = G - (R @ P.T if tall else P @ R)
            longer = S.norm(dim=along, keepdim=True) * lengths / R.norm(dim=along, keepdim=True)
            S = S / S.norm(dim=along, keepdim=True) * longer.clamp(max=math.sqrt(min(W.shape)))
            norm = min(S.norm(), 1.01 * limit)
            W = W - lr * S * norm / S.norm()
            limit = max(norm, 0.1 * (torch.zeros(R.norm(dim=along, keepdim=True).shape) + lengths).norm())
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        N = (M / (1 - 0.9 ** (t + 1))) / ((V / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        lengths = N.norm(dim=along, keepdim=True)
        W = W - lr * decay * W - lr * scale * (N @ P.T if tall else P @ N)
    return W


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)])
@pytest.mark.parametrize("rank, update_gap, scale, decay", [(2, 100, 1.0, 0.0), (3, 4, 0.25, 0.1), (9, 7, 1.0, 0.5)])
@pytest.mark.parametrize("residual", [False, True])
def test_projected_steps_equal_the_algorithm_written_out(shape, rank, update_gap, scale, decay, residual):
    W = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    start, gradients = W.detach().clone(), random_gradients(*shape, steps=20)
    group = {"params": [W], "rank": rank, "update_gap": update_gap, "scale": scale, "residual": residual}
    optimizer = ProjectedAdam([group], lr=0.01, weight_decay=decay, svd="exact")
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
        assert torch.equal(W.grad, G)  # as with any optimizer
    expected = reference_steps(start, gradients, rank, update_gap, 0.01, scale, decay, residual)
    # fp32; a direction's sign is the SVD's choice, and the second moment does not see it
    torch.testing.assert_close(W.detach().double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)])
def test_full_rank_is_adam_in_the_rotated_basis(shape):
    W = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    start, gradients = W.detach().clone(), random_gradients(*shape, steps=30)
    optimizer = ProjectedAdam([{"params": [W], "rank": min(shape), "update_gap": 1000}], lr=0.01, svd="exact")
    U, _, Vh = torch.linalg.svd(gradients[0], full_matrices=False)
    tall = shape[0] >= shape[1]
    P = Vh.T if tall else U
    rotated = nn.Parameter(start @ P if tall else P.T @ start)
    adam = torch.optim.Adam([rotated], lr=0.01)
    for G in gradients:
        W.grad, rotated.grad = G.clone(), G @ P if tall else P.T @ G
        optimizer.step()
        adam.step()
    torch.testing.assert_close(W.detach(), (rotated @ P.T if tall else P @ rotated).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_one_bad_gradient_does_not_cost_the_basis(bad, in_backward, residual):
    """It is due until one is had; steps that changed nothing do not count for Adam's bias correction."""
    torch.manual_seed(0)
    W, clean = (nn.Parameter(torch.ones(30, 20)) for _ in "ab")
    G = torch.randn(30, 20)
    for p in (W, clean):
        group = {"params": [p], "rank": 4, "update_gap": 3, "residual": residual}
        optimizer = ProjectedAdam([group], lr=0.1, svd="exact", in_backward=in_backward)
        for n in range(8):
            for poisoned in (True, False) if p is W and n in (0, 3, 6) else (False,):  # the steps that renew it
                optimizer.zero_grad()
                (p * (bad * G if poisoned else (n + 1) * G.roll(n))).sum().backward()
                if poisoned:
                    before = p.detach().clone()
                    assert not in_backward or not optimizer.clip_grad_norm_(1.0).isfinite()
                optimizer.step()
                assert not poisoned or torch.equal(p, before)
    assert torch.equal(W, clean) and W.isfinite().all() and not torch.equal(W, torch.ones(30, 20))


def noise_for(x: torch.Tensor) -> torch.Tensor:
    return torch.randint(1 << 16, x.shape, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stochastic_rounding_keeps_what_is_not_finite(dtype):
    """nan with any bits: 0x7fffffff is what CUDA makes."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int32)
    x = bits.view(torch.float32).repeat(1000, 1)
    rounded = stochastic_round(x, noise_for(x))
    assert rounded[:, :4].isnan().all() and (rounded[:, 4] == math.inf).all() and (rounded[:, 5] == -math.inf).all()
    W = nn.Parameter(torch.ones(4, dtype=dtype))
    W.grad = torch.full_like(W, math.nan)
    ProjectedAdam([W], lr=0.1).step()
    assert W.isnan().all()  # as with AdamW: a bad step that nobody stopped is seen


def test_stochastic_rounding_keeps_the_mean():
    x = torch.tensor([1.0 + 2**-10, -3.1, 1e-30, 0.0, 2.0]).repeat(20000, 1)
    rounded = stochastic_round(x.clone(), noise_for(x))
    assert rounded.dtype == torch.bfloat16
    spacing = rounded.float().amax(0) - rounded.float().amin(0)
    assert spacing[3] == 0 and spacing[4] == 0  # what bf16 holds stays
    error = (rounded.double().mean(0) - x[0].double()).abs()
    assert (error <= 4.5 * spacing.double() / 2 / math.sqrt(20000)).all()  # a coin's standard deviation is at most 1/2


def test_updates_below_bf16_resolution_are_not_lost():
    """lr 1e-5 on weights of 1 is far below bf16's spacing there, 2^-7; in 500 steps it must move them by 5e-3 on average."""
    W = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    nearest = torch.ones(2000, dtype=torch.bfloat16)
    optimizer = ProjectedAdam([W], lr=1e-5)
    torch.manual_seed(0)
    for _ in range(500):
        W.grad = torch.ones_like(W)
        optimizer.step()
        nearest -= 1e-5
    assert (nearest == 1).all()
    # below 1 the spacing is 2^-8: of 2000 weights a standard deviation of about sqrt(5e-3 * 2^-8 / 2000) = 1e-4
    assert (1 - W.detach().float().mean()).item() == pytest.approx(5e-3, abs=5e-4)
    assert optimizer.state[W]["exp_avg_sq"].dtype == torch.float32


class TF32(TorchDispatchMode):
    """Matrix products as a GPU's tensor cores do them if told to: of inputs rounded to 10 bits of mantissa."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            args = tuple((x.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for x in args)
        return func(*args, **(kwargs or {}))


GRADIENTS = {
    "zero": lambda m, n: torch.zeros(m, n),
    "one token": lambda m, n: torch.randn(m, 1) @ torch.randn(1, n),
    "few tokens": lambda m, n: torch.randn(m, 5) @ torch.randn(5, n),
    "tiny": lambda m, n: 1e-30 * torch.randn(m, 5) @ torch.randn(5, n),
    "huge": lambda m, n: 1e30 * torch.randn(m, 5) @ torch.randn(5, n),
    "one entry": lambda m, n: torch.zeros(m, n).index_put((torch.tensor(3), torch.tensor(7)), torch.tensor(1.0)),
    "one huge entry": lambda m, n: 1e30 * GRADIENTS["one entry"](m, n),
    "one tiny entry": lambda m, n: 1e-30 * GRADIENTS["one entry"](m, n),
    "equal columns": lambda m, n: torch.randn(m, 1).expand(m, n),
    "power law": lambda m, n: torch.randn(m, n) / torch.arange(1, n + 1) @ torch.randn(n, n),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("tf32", [False, True])
def test_randomized_basis_is_orthonormal_and_captures_what_the_exact_one_does(kind, tf32):
    torch.manual_seed(0)
    G = GRADIENTS[kind](400, 300)
    for gradient in (G, G.T.contiguous(), G.bfloat16()):
        with TF32() if tf32 else contextlib.nullcontext():
            P = projection_basis(gradient, 8)
        assert P.shape == (300, 8) and P.dtype == torch.float32
        assert P.is_contiguous()  # NCCL broadcasts nothing else
        torch.testing.assert_close(P.T @ P, torch.eye(8), rtol=0, atol=1e-5)
        tall = (gradient if gradient.shape[0] == 400 else gradient.T).double()
        best = torch.linalg.svdvals(tall)[:8].square().sum()
        # fp32 products of 400 terms; TF32 has 2^-11 a product, whose square is lost of the energy, times a few
        assert (tall @ P.double()).square().sum() >= (1 - (1e-4 if tf32 else 1e-5)) * best


def test_randomized_basis_whatever_the_default_dtype():
    G = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    expected = projection_basis(G, 5)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(projection_basis(G, 5), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_randomized_basis_keeps_998_of_1000_parts_of_a_slowly_falling_spectrum():
    torch.manual_seed(0)
    G = torch.randn(1376, 512) / torch.arange(1, 513) ** 0.7 @ torch.randn(512, 512)  # 4096 x 11008 at rank 256, / 8
    shares = [(G @ projection_basis(G, 32)).square().sum() / torch.linalg.svdvals(G)[:32].square().sum() for _ in "123"]
    assert min(shares) >= 0.998


def test_a_basis_does_not_depend_on_what_was_drawn_before():
    """Resumed runs and all processes of a distributed one must find the same."""
    G, bases = random_gradients(600, 500, steps=1)[0], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        bases.append(projection_basis(G, 16))
    assert torch.equal(*bases)


def test_exact_basis_is_the_svds():
    G = random_gradients(30, 12, steps=1)[0]
    for gradient in (G, G.T):
        leading = torch.linalg.svd(G).Vh[:4].T
        P = projection_basis(gradient, 4, "exact")
        torch.testing.assert_close(P @ P.T, leading @ leading.T, atol=1e-5, rtol=0)
    assert projection_basis(G, 99).shape == (12, 12)
    with pytest.raises(torch.linalg.LinAlgError):
        projection_basis(G / 0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_backward", [False, True])
def test_state_dict_round_trips_bit_for_bit(dtype, in_backward):
    def run(steps, restored=None):
        torch.manual_seed(0)
        W, b = nn.Parameter(torch.randn(8, 5).to(dtype)), nn.Parameter(torch.randn(5).to(dtype))
        groups = [{"params": [W], "rank": 2, "update_gap": 3}, {"params": [b]}]
        optimizer = ProjectedAdam(groups, lr=0.05, svd="exact", in_backward=in_backward)
        start = 0
        if restored:
            state, start, rng = restored
            W.data, b.data = (p.clone() for p in state[0])
            optimizer.load_state_dict(state[1])
            torch.set_rng_state(rng)
        for G in random_gradients(8, 5, steps=10)[start:steps]:
            optimizer.zero_grad()
            ((W * G).sum() + (b * G[0]).sum()).backward()
            optimizer.step()
        return W, b, optimizer

    W, b, optimizer = run(4)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    rng = torch.get_rng_state()
    resumed = run(10, restored=(((W, b), saved), 4, rng))
    straight = run(10)
    for p, q in zip(resumed[:2], straight[:2]):
        assert torch.equal(p, q)
        for key, value in straight[2].state[q].items():
            got = resumed[2].state[p][key]
            assert torch.equal(got, value) and got.dtype == value.dtype if torch.is_tensor(value) else got == value


def test_a_loaded_state_is_a_copy_and_matrices_have_their_own_noise():
    twins = [nn.Parameter(torch.ones(50, 40, dtype=torch.bfloat16)) for _ in "ab"]
    a, b = (ProjectedAdam(twins, lr=1e-4) for _ in "ab")
    for p in twins:
        p.grad = torch.ones_like(p)
    a.step()
    assert not torch.equal(*twins)
    b.load_state_dict(a.state_dict())
    before = a.state[twins[0]]["exp_avg"].clone()
    b.step()
    assert torch.equal(a.state[twins[0]]["exp_avg"], before)


def state_bytes(optimizer: ProjectedAdam) -> int:
    return sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("forget", ["optimizer", "model"])
def test_frozen_layers_hold_no_state_and_no_gradient(forget):
    torch.manual_seed(0)
    model = build(n_layers=6)
    args = settings_of("--method", "owlore", "--rank", 4, "--update-gap", 10, "--active", 2, "--embeddings", "full")
    optimizer, sampler = train.build_optimizer(model, args), LayerSampler(model.layers, torch.ones(6) / 6, 2)
    # per linear m x n of an active layer: basis, two moments, lengths of the rows of N, norm of the residual; per norm
    # and for embedding, head and final norm: two moments
    layer = sum(
        4 * (4 * min(p.shape) + 2 * 4 * max(p.shape) + max(p.shape) + 1) if p.dim() == 2 else 8 * p.numel()
        for p in model.layers[0].parameters()
    )
    always = 8 * (model.tok_embeddings.weight.numel() + model.output.weight.numel() + model.norm.weight.numel())
    seen = set()
    for _ in range(12):
        drawn = sampler.resample()
        seen |= set(drawn)
        (optimizer if forget == "optimizer" else model).zero_grad()
        model(random_tokens(2, 9), random_tokens(2, 9, seed=2)).backward()
        optimizer.step()
        assert state_bytes(optimizer) == 2 * layer + always
        assert all(p.grad is None for n in range(6) if n not in drawn for p in model.layers[n].parameters())
    assert len(seen) > 2


def test_optimizer_refuses_what_it_cannot_do():
    W, b = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
    for group, options in (
        ({"params": [W], "rank": 0}, {}),
        ({"params": [W], "residual": True}, {}),
        ({"params": [b], "rank": 2}, {}),
        ({"params": [W], "rank": 2, "update_gap": 0}, {}),
        ({"params": [W], "rank": 2.0}, {}),
        ({"params": [W]}, {"svd": "fast"}),
        ({"params": [W]}, {"betas": (1.0, 0.9)}),
        ({"params": [W], "lr": -0.1}, {}),
        ({"params": [W], "rank": 2, "scale": math.nan}, {}),
        ({"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))]}, {}),
        ({"params": [W], "maximize": True}, {}),
        ({"params": [W], "weight_decay": 0.1, "decoupled_weight_decay": False}, {}),  # torch.optim.Adam's
        ({"params": [W], "rank": 2, "update_proj_gap": 200}, {}),
        ({"params": [], "rank": 2}, {}),
    ):
        with pytest.raises(ValueError):
            ProjectedAdam([group], lr=0.1, **options)


# owlore.py: in other people's loops. Each habit works as with torch.optim.AdamW, in both modes, or raises at once.


def small_net(
    in_backward: bool = False, dtype=torch.float32, svd: str = "exact", residual: bool = False
) -> tuple[nn.Module, ProjectedAdam]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 90), nn.Tanh(), nn.Linear(90, 80)).to(dtype)
    matrices = [p for p in net.parameters() if p.dim() == 2]
    groups = [
        {"params": matrices, "rank": 3, "update_gap": 4, "residual": residual},
        {"params": [p for p in net.parameters() if p.dim() == 1]},
    ]
    return net, ProjectedAdam(groups, lr=0.02, svd=svd, in_backward=in_backward)


X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(5)), torch.ones(16, 80)


def loss_of(net: nn.Module, part: slice = slice(None)) -> torch.Tensor:
    dtype = next(net.parameters()).dtype
    return (net(X[part].to(dtype)) - Y[part]).square().mean() * len(X[part]) / 16


def train_net(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10) -> list[torch.Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    return weights_of(net)


def weights_of(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Ten steps of 0.02 on weights of up to 1, whose fp32 gradients differ in the last bits: a difference of 1e-5 is one
    of 5e-5 in a single step's direction."""
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("second", ["plain", "in_backward", "adamw"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_second_optimizer_trains_or_raises_while_the_first_is_referenced(in_backward, second):
    expected = train_net(*small_net()) if second != "adamw" else None
    net, first = small_net(in_backward)
    other = torch.optim.AdamW(net.parameters(), lr=0.02)
    if second != "adamw":
        other = ProjectedAdam([dict(group) for group in first.param_groups], 0.02, svd="exact", in_backward=second == "in_backward")  # fmt: skip
    if in_backward:
        with pytest.raises(RuntimeError, match="in_backward"):
            train_net(net, other, steps=1)
        first.in_backward = False  # gives the gradients back, as the message says
        net.zero_grad()
    weights = train_net(net, other)
    assert expected is None or all(map(torch.equal, weights, expected))
    if second == "adamw":
        same, _ = small_net()
        assert all(map(torch.equal, weights, train_net(same, torch.optim.AdamW(same.parameters(), lr=0.02))))


def test_a_discarded_optimizer_lets_go_of_the_gradients():
    net, optimizer = small_net(in_backward=True)
    del optimizer
    loss_of(net).backward()
    assert all(type(p.grad) is torch.Tensor for p in net.parameters())


def test_clipping_by_torch_scales_every_gradient():
    net, optimizer = small_net()
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(net).backward()
        plain = torch.cat([p.grad.flatten() for p in net.parameters()])
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        assert norm.item() == pytest.approx(plain.norm().item(), rel=1e-6)
        assert torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item() == pytest.approx(0.1, rel=1e-3)
        optimizer.step()
    own, optimizer = small_net()
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(own).backward()
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
    assert_close(weights_of(own), weights_of(net))
    net, optimizer = small_net(in_backward=True)
    loss_of(net).backward()
    with pytest.raises(RuntimeError, match="optimizer.clip_grad_norm_"):
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)


@pytest.mark.parametrize("in_backward", [False, True])
def test_what_is_frozen_or_empty_takes_no_part(in_backward):
    """A gradient that was there before its parameter was frozen is not clipped with the others, as `step` ignores it."""
    net, optimizer = small_net(in_backward)
    loss_of(net).backward()
    net[0].requires_grad_(False)
    kept = [net[2].weight.grad.R if in_backward else net[2].weight.grad, net[2].bias.grad]
    expected = torch.cat([g.flatten() for g in kept]).norm().item()
    assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(expected, rel=1e-6)
    empty = nn.Parameter(torch.ones(0, 3))
    optimizer = ProjectedAdam([{"params": [empty], "rank": 2}], lr=0.1, in_backward=in_backward)
    empty.sum().backward()
    optimizer.step()


def test_clipping_in_the_backward_mode_scales_what_step_will_use():
    net, optimizer = small_net(in_backward=True)
    loss_of(net).backward()
    used = [p.grad.R if p.dim() == 2 else p.grad for p in net.parameters()]
    before = torch.cat([g.flatten() for g in used]).norm().item()
    assert [tuple(g.shape) for g in used] == [(90, 3), (90,), (3, 90), (80,)]
    assert optimizer.clip_grad_norm_(0.1).item() == pytest.approx(before, rel=1e-6)
    assert torch.cat([g.flatten() for g in used]).norm().item() == pytest.approx(0.1, rel=1e-3)
    assert ProjectedAdam(nn.Linear(2, 2).parameters(), 0.1).clip_grad_norm_(1.0).item() == 0


def test_grad_scaler_unscales_and_skips():
    expected = train_net(*small_net())
    net, optimizer = small_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for poisoned in (True, *[False] * 5, True, *[False] * 5):
        optimizer.zero_grad()
        (scaler.scale(loss_of(net)) * (math.inf if poisoned else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_close(weights_of(net), expected)
    net, optimizer = small_net(in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net)).backward()
    with pytest.raises(RuntimeError, match="in_backward"):
        scaler.step(optimizer)


@pytest.mark.parametrize("in_backward, residual", [(False, False), (True, False), (True, True)])
def test_a_compiled_model_trains_alike(in_backward, residual):
    """Compiled as a whole, with layers that are frozen in turn; dynamo runs torch's own kernels here, so bit for bit."""

    def train_compiled(how: Callable) -> list[torch.Tensor]:
        net, optimizer = small_net(in_backward, residual=residual)
        sampler = LayerSampler([net[0], net[2]], torch.ones(2), 1)
        run = how(net)
        for _ in range(6):
            sampler.resample()
            optimizer.zero_grad()
            loss_of(run).backward()
            optimizer.step()
        return weights_of(net)

    plain, compiled = (
        train_compiled(lambda net: net),
        train_compiled(lambda net: torch.compile(net, backend="aot_eager")),
    )
    assert all(map(torch.equal, plain, compiled))


@pytest.mark.parametrize("in_backward", [False, True])
def test_model_zero_grad_forgets_a_skipped_step(in_backward):
    expected = train_net(*small_net(in_backward))
    net, optimizer = small_net(in_backward)
    for n in range(10):
        if n % 3 == 0:
            (1000 * loss_of(net)).backward()
            net.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        net.zero_grad()
    assert_close(weights_of(net), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_copies_of_model_and_optimizer_train_on_alike(in_backward, how):
    net, optimizer = small_net(in_backward)
    train_net(net, optimizer, 3)
    if how == "deepcopy":
        copies = copy.deepcopy((net, optimizer))
        assert copy.deepcopy(net)[0].weight.grad is None  # a model alone can be copied, too
    elif how == "pickle":
        copies = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        torch.save((net, optimizer), buffer := io.BytesIO())
        torch.save(net, io.BytesIO())
        buffer.seek(0)
        copies = torch.load(buffer, weights_only=False)
    start = weights_of(net)
    theirs, ours = train_net(*copies), train_net(net, optimizer)
    assert all(map(torch.equal, theirs, ours)) and not any(map(torch.equal, ours, start))


def test_a_copied_transformer_trains_for_its_own_optimizer():
    """Its Linear modules hand their factors to an optimizer; a copy's have none until it is given one."""
    model = build()
    optimizer = train.build_optimizer(model, settings_of("--method", "galore"))
    twin = copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    for _ in range(2):
        optimizer.zero_grad()
        model(random_tokens(2, 9), random_tokens(2, 9, seed=2)).backward()
        optimizer.step()
    twin(random_tokens(2, 9), random_tokens(2, 9, seed=2)).backward()
    assert all(type(p.grad) is torch.Tensor for p in twin.parameters())


@pytest.mark.parametrize("in_backward", [False, True])
def test_param_groups_can_be_edited(in_backward):
    net, optimizer = small_net(in_backward)
    train_net(net, optimizer, 3)
    before = weights_of(net)
    optimizer.param_groups[0].update(lr=0.0, update_gap=1, scale=0.5)
    train_net(net, optimizer, 1)
    assert [torch.equal(p, q) for p, q in zip(net.parameters(), before)] == [True, False, True, False]
    optimizer.param_groups[0].update(lr=0.02, rank=2)  # takes effect at once, with moments of its own
    train_net(net, optimizer, 1)
    assert [optimizer.state[p]["basis"].shape[1] for p in net.parameters() if p.dim() == 2] == [2, 2]
    assert [optimizer.state[p]["step"] for p in net.parameters()] == [1, 5, 1, 5]
    for name in ("rank", "update_gap"):
        good = optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = 0
        with pytest.raises(ValueError, match="at least 1"):
            train_net(net, optimizer, 1)
        net.zero_grad()
        optimizer.param_groups[0][name] = good
    optimizer.param_groups[0]["rank"] = None  # AdamW from here
    weights = train_net(net, optimizer, 5)
    assert all(p.isfinite().all() for p in weights) and "basis" not in optimizer.state[net[0].weight]
    del optimizer.param_groups[0]
    train_net(net, optimizer, 1)
    assert torch.equal(net[0].weight, weights[0]) and not torch.equal(net[0].bias, weights[1])


def test_a_group_edited_to_a_rank_begins_anew_even_if_its_next_gradient_is_zero():
    torch.manual_seed(0)
    W, (first, last) = nn.Parameter(torch.randn(6, 4)), torch.randn(2, 6, 4)
    optimizer = ProjectedAdam([W], lr=0.1)
    for rank, gradient in ((None, first), (2, torch.zeros(6, 4)), (2, last)):
        before = W.detach().clone()
        W.grad, optimizer.param_groups[0]["rank"] = gradient, rank
        optimizer.step()
    fresh = nn.Parameter(before)
    fresh.grad = last
    ProjectedAdam([{"params": [fresh], "rank": 2}], lr=0.1).step()
    assert torch.equal(W, fresh)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("moved", [1.0, 0.0])
def test_an_lr_set_after_the_backward_pass_is_refused_if_a_residual_was_added(moved, residual, in_backward):
    net, optimizer = small_net(in_backward, residual=residual)
    train_net(net, optimizer, 4)  # a new basis is due next, which a zero gradient puts off
    optimizer.zero_grad()
    (moved * loss_of(net)).backward()
    optimizer.clip_grad_norm_(1.0)
    before = weights_of(net)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor([0.01]).double()  # numbers in any form
    if in_backward and residual and moved:
        with pytest.raises(RuntimeError, match=r"at lr 0\.02, which is 0\.00999\d* now"):
            optimizer.step()
        assert all(map(torch.equal, weights_of(net), before))
        assert [optimizer.state[p]["step"] for p in net.parameters()] == [4] * 4
    else:
        optimizer.step()
        assert moved == 0 or not any(map(torch.equal, weights_of(net), before))


@pytest.mark.parametrize("residual", [False, True])
def test_a_gradient_in_another_basis_than_the_state_that_was_loaded_is_refused(residual):
    net, optimizer = small_net(in_backward=True, residual=residual)
    train_net(net, optimizer, 3)
    snapshot = copy.deepcopy(optimizer.state_dict())
    train_net(net, optimizer, 2)  # the second with a new basis
    same = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    loss_of(net).backward()
    optimizer.load_state_dict(snapshot)
    with pytest.raises(RuntimeError, match="state has changed since the backward pass"):
        optimizer.step()
    optimizer.load_state_dict(same)  # has the basis of the gradient
    optimizer.step()
    optimizer.zero_grad()
    optimizer.micro_batches = 2
    if not residual:  # for which the first micro-batch's gradient would wait
        loss_of(net).backward()
        optimizer.load_state_dict(snapshot)
        with pytest.raises(RuntimeError, match="state has changed since the backward pass"):
            loss_of(net).backward()


def test_a_constructor_that_refuses_leaves_no_hooks():
    net, _ = small_net()
    with pytest.raises(ValueError, match="only matrices"):
        ProjectedAdam([{"params": [p], "rank": 3} for p in net.parameters()], lr=0.1, in_backward=True)
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


def test_a_frozen_matrix_of_integers_takes_no_part():
    for in_backward in (False, True):
        quantized = nn.Parameter(torch.ones(6, 4, dtype=torch.int8), requires_grad=False)
        W = nn.Parameter(torch.ones(6, 4))
        optimizer = ProjectedAdam([{"params": [quantized, W], "rank": 2}], lr=0.1, in_backward=in_backward)
        (W * torch.arange(24.0).view(6, 4)).sum().backward()
        optimizer.step()
        assert quantized.eq(1).all() and not W.eq(1).all() and quantized not in optimizer.state


@pytest.mark.skipif(not hasattr(torch.ones(1), "grad_dtype"), reason="this torch has gradients of the weight's dtype")
def test_gradients_may_have_another_dtype_than_the_weight():
    updates = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        W = nn.Parameter(torch.randn(6, 4).bfloat16())
        W.grad_dtype = torch.float32
        optimizer = ProjectedAdam([{"params": [W], "rank": 2}], lr=0.1, in_backward=in_backward)
        for G in torch.randn(3, 6, 4):
            optimizer.zero_grad()
            (W * G).sum().backward()
            optimizer.step()
        updates.append(W.detach())
    assert torch.equal(*updates)


@pytest.mark.parametrize("residual", [False, True])
def test_a_compiled_linear_hands_over_no_factors(residual):
    """Else a changing optimizer would be part of what is compiled, which then is compiled anew at each step."""
    weights = []
    for how in ({}, {"backend": "aot_eager", "fullgraph": True}):
        torch.manual_seed(0)
        torch.compiler.reset()
        net = nn.Sequential(owlore.Linear(6, 12), nn.Tanh(), owlore.Linear(12, 8))
        groups = [{"params": [*net.parameters()], "rank": 3, "residual": residual}]
        optimizer = ProjectedAdam(groups, lr=0.02, in_backward=True)
        owlore.take_factors(net, optimizer)
        run = torch.compile(net, **how) if how else net
        for _ in range(12):
            optimizer.zero_grad()
            run(X).square().sum().backward()
            optimizer.step()
        weights.append(weights_of(net))
    assert_close(*weights)


def test_loading_a_state_again_and_again_hooks_no_parameter_twice():
    net, optimizer = small_net(in_backward=True)
    for _ in range(5):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [len(p._post_accumulate_grad_hooks or ()) for p in net.parameters()] == [1, 0, 1, 0]


def test_a_state_that_does_not_fit_the_groups_is_refused():
    net, projected = small_net()
    matrices, biases = (group["params"] for group in projected.param_groups)
    plain = ProjectedAdam([{"params": matrices}, {"params": biases}], lr=0.02)
    adamw = torch.optim.AdamW([{"params": matrices}, {"params": biases}], lr=0.02)
    for optimizer in (projected, plain, adamw):
        train_net(net, optimizer, 1)
    for here, there in ((projected, plain), (projected, adamw), (plain, projected)):
        with pytest.raises(ValueError, match="rank"):
            here.load_state_dict(there.state_dict())

    saved = plain.state_dict()
    saved["state"][0]["exp_avg"] = torch.ones(3)
    with pytest.raises(ValueError, match="neither all of"):
        plain.load_state_dict(saved)
    adam = torch.optim.Adam(matrices, lr=0.02)
    train_net(net, adam, 1)
    saved = adam.state_dict()
    saved["param_groups"][0]["decoupled_weight_decay"] = False  # older torch does not say it
    loaded = ProjectedAdam(matrices, lr=0.02)
    loaded.load_state_dict(copy.deepcopy(saved))
    loaded.param_groups[0]["weight_decay"] = 0.1  # which here is decoupled
    ProjectedAdam(matrices, lr=0.02).load_state_dict(loaded.state_dict())
    saved["param_groups"][0]["weight_decay"] = 0.1  # in the gradient
    with pytest.raises(ValueError, match="weight decay"):
        ProjectedAdam(matrices, lr=0.02).load_state_dict(saved)
    sgd = torch.optim.SGD(matrices, lr=0.02, momentum=0.9)
    train_net(net, sgd, 1)
    with pytest.raises(ValueError, match="momentum_buffer"):
        ProjectedAdam(matrices, lr=0.02).load_state_dict(sgd.state_dict())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("in_backward", [False, True])
def test_torchs_state_dict_helpers(in_backward, flatten, residual):
    """What torch.distributed.checkpoint goes by names, as accelerate does under FSDP2."""
    helpers = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    net, optimizer = small_net(in_backward, residual=residual)
    train_net(net, optimizer, 5)
    options = helpers.StateDictOptions(flatten_optimizer_state_dict=flatten)
    optimizer.zero_grad()
    saved = copy.deepcopy(helpers.get_optimizer_state_dict(net, optimizer, options=options))
    other, other_optimizer = small_net(in_backward, residual=residual)
    other.load_state_dict(net.state_dict())
    helpers.set_optimizer_state_dict(other, other_optimizer, saved, options=options)
    train_net(net, optimizer, 5)
    train_net(other, other_optimizer, 5)
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), other.parameters()))


def test_hooks_of_loading_see_the_state():
    net, optimizer = small_net(dtype=torch.bfloat16)
    train_net(net, optimizer, 1)
    seen = []

    def double(_, state_dict):
        state = {n: s | {"exp_avg": 2 * s["exp_avg"]} for n, s in state_dict["state"].items()}
        return state_dict | {"state": state}

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.append(len(optimizer.state)))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert seen == [4] and all(
        torch.equal(new["exp_avg"], 2 * old["exp_avg"])
        for new, old in zip(optimizer.state_dict()["state"].values(), saved["state"].values())
    )


@pytest.mark.parametrize("in_backward, dtype", [(False, torch.float32), (False, torch.bfloat16), (True, torch.float32)])
def test_distributed_data_parallel(in_backward, dtype):
    """Two processes, each with half of the batch, train what one does with all of it; in the backward mode it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [SERVER.Process(target=ddp_process, args=(rank, folder, in_backward, dtype)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
        results = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    if in_backward:
        assert all("in_backward=False" in message for message in results)
    else:
        assert all(map(torch.equal, *results))
        if dtype == torch.float32:
            assert_close(results[0], train_net(*small_net(svd="randomized")))


def ddp_process(rank: int, folder: str, in_backward: bool, dtype: torch.dtype) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net, optimizer = small_net(in_backward, dtype, "randomized")
    torch.manual_seed(rank)  # each process may draw what it likes
    wrapped = nn.parallel.DistributedDataParallel(net)
    half, result = slice(8 * rank, 8 * rank + 8), None
    try:
        for _ in range(10):
            optimizer.zero_grad()
            (2 * loss_of(wrapped, half)).backward()  # DDP takes the mean over processes
            optimizer.step()
        result = weights_of(net)
    except RuntimeError as error:
        result = str(error)
    torch.save(result, Path(folder) / f"{rank}.pt")
    os._exit(0)


def test_accelerate_clips_and_steps():
    accelerate = pytest.importorskip("accelerate")
    net, optimizer = small_net()
    accelerator = accelerate.Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(net, optimizer)
    for _ in range(10):
        wrapped.zero_grad()
        accelerator.backward(loss_of(model))
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        wrapped.step()
    same, optimizer = small_net()
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(same).backward()
        torch.nn.utils.clip_grad_norm_(same.parameters(), 0.1)
        optimizer.step()
    assert_close(weights_of(net), weights_of(same))
    net, optimizer = small_net(in_backward=True)
    model, wrapped = accelerator.prepare(net, optimizer)
    accelerator.backward(loss_of(model))
    with pytest.raises(RuntimeError, match="clip_grad_norm_"):
        accelerator.clip_grad_norm_(model.parameters(), 0.1)


def test_a_trainer_run_resumes_with_the_same_draws(tmp_path):
    """bench/transformers_example.py's callback, interrupted and resumed."""
    pytest.importorskip("accelerate"), pytest.importorskip("transformers")
    sys.path.insert(0, str(Path(owlore.__file__).parent / "bench"))
    import transformers_example as example

    straight, draws = example.train_with_trainer(tmp_path / "a", steps=8, interval=2)
    example.train_with_trainer(tmp_path / "b", steps=8, interval=2, stop_at=5)
    resumed, last_draws = example.train_with_trainer(tmp_path / "b", steps=8, interval=2, resume=True)
    assert len(draws) == 4 and last_draws == draws[3:]
    assert all(map(torch.equal, weights_of(straight), weights_of(resumed)))


@pytest.mark.parametrize("in_backward", [False, True])
def test_autocast_does_not_reach_the_optimizers_arithmetic(in_backward):
    expected = train_net(*small_net(in_backward))
    net, optimizer = small_net(in_backward)
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_of(net)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_backward):  # gradients are then autograd's, in bf16
            loss.backward()
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
    assert all(v.dtype == torch.float32 for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert in_backward or all(map(torch.equal, weights_of(net), expected))


def test_float64_and_autocast_and_sparse_gradients():
    net, optimizer = small_net(dtype=torch.float64)
    loss_of(net).backward()
    optimizer.clip_grad_norm_(1e9)
    optimizer.step()
    assert_close([p.float() for p in weights_of(net)], train_net(*small_net(), steps=1))
    linear, x = owlore.Linear(6, 9), X
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear(x).square().sum()
    loss.backward()
    expected = 2 * (x @ linear.weight.T).T @ x
    assert linear.weight.grad.dtype == torch.float32
    assert (linear.weight.grad - expected).norm() < 2**-7 * expected.norm()  # bf16 rounds each of two products to 2^-8
    half = nn.Parameter(torch.ones(100, dtype=torch.float16))  # the norm must not overflow where no gradient does
    half.grad = torch.full_like(half, 60000)
    assert ProjectedAdam([half], lr=0.1).clip_grad_norm_(1.0).item() == pytest.approx(600000, rel=1e-3)
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        ProjectedAdam(embedding.parameters(), lr=0.1).step()


def test_rounding_does_not_repeat_itself_when_a_layer_is_drawn_again():
    """Frozen layers lose their state, and with it the number of their steps; the noise must be new all the same."""
    p = nn.Parameter(torch.ones(50, 100, dtype=torch.bfloat16))
    optimizer = ProjectedAdam([p], lr=1e-5)
    for step in range(500):
        if step % 10 == 0:
            p.requires_grad_(False)
            optimizer.zero_grad()
            p.requires_grad_(True)
        p.grad = -torch.ones_like(p)
        optimizer.step()
    moved = p.detach().float() - 1
    # 500 independent chances of 1e-5 / 2^-7 to move up by 2^-7: a mean of 5e-3, a binomial's standard deviation
    assert moved.mean().item() == pytest.approx(5e-3, rel=0.1)
    assert moved.std().item() == pytest.approx(2**-7 * math.sqrt(500 * 1e-5 / 2**-7), rel=0.1)


def test_a_basis_is_not_made_of_a_zero_gradient():
    p, G = nn.Parameter(torch.randn(64, 64)), torch.randn(64, 4) @ torch.randn(4, 64)
    optimizer = ProjectedAdam([{"params": [p], "rank": 4}], lr=0.01)
    for gradient in (torch.zeros_like(G), G):
        p.grad = gradient
        optimizer.step()
    P = optimizer.state[p]["basis"]
    torch.testing.assert_close((G @ P).norm(), G.norm())


# owlore.py: projecting in the backward pass


def test_gradients_are_projected_and_freed_in_the_backward_pass():
    net, optimizer = small_net(in_backward=True)
    loss_of(net).backward()
    for p, shape in ((net[0].weight, (90, 3)), (net[2].weight, (3, 90))):
        assert isinstance(p.grad, owlore.ProjectedGradient) and p.grad.R.shape == shape
    assert all(map(torch.equal, train_net(*small_net()), train_net(*small_net(in_backward=True))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_is_added_in_the_backward_pass_as_in_step(dtype):
    nets = [small_net(in_backward, dtype, residual=True) for in_backward in (False, True)]
    alike = [train_net(*net) for net in nets]
    assert all(map(torch.equal, *alike)) and not torch.equal(alike[0][0], train_net(*small_net(dtype=dtype))[0])
    for net, optimizer in nets:
        optimizer.zero_grad()
        loss_of(net).backward()
    assert torch.equal(nets[0][0][0].weight, alike[0][0]) and not torch.equal(nets[1][0][0].weight, alike[0][0])


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_a_residual_moves_nothing_inside_the_basis(shape):
    W = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    optimizer = ProjectedAdam([{"params": [W], "rank": 2, "residual": True}], lr=0.1, in_backward=True)
    for G in random_gradients(*shape, steps=3):
        optimizer.zero_grad()
        before = W.detach().clone()
        (W * G).sum().backward()  # and no step
        P, moved = optimizer.state[W]["basis"], W.detach() - before
        assert moved.norm() > 0.01
        torch.testing.assert_close(owlore.project(moved, P), torch.zeros_like(owlore.project(G, P)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_residual_comes_back_after_a_gradient_without_one(tokens):
    """One that is zero, or of a rank that the projection holds, leaves nothing outside; the next ones are ordinary."""
    shape, moved = (30, 20), []
    for first in (tokens, None):
        W = nn.Parameter(torch.zeros(shape))
        optimizer = ProjectedAdam([{"params": [W], "rank": 2, "residual": True}], lr=0.1, svd="exact")
        gradients = random_gradients(*shape, steps=8)
        if first is not None:
            gradients[2 - 2 * tokens] = gradients[0][:, :1] @ gradients[1][:1] * tokens
        for G in gradients:
            W.grad, before = G.clone(), W.detach().clone()
            optimizer.step()
        R = owlore.project(W.detach() - before, P := optimizer.state[W]["basis"])
        moved.append((W.detach() - before - R @ P.T).norm())
    assert moved[0] > 0.04 * moved[1]  # it is taken up at a tenth of N, where it is at two or three times N


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_have_a_residual(dtype):
    W, G = nn.Parameter(torch.zeros(12, 5, dtype=dtype)), random_gradients(12, 5, steps=1)[0]
    optimizer = ProjectedAdam([{"params": [W], "rank": 2, "residual": True}], lr=0.01, svd="exact")
    W.grad = G.to(dtype)
    optimizer.step()
    expected = reference_steps(torch.zeros(12, 5), [W.grad], 2, 1, 0.01, 1.0, 0.0, True)
    torch.testing.assert_close(W.detach().double(), expected, atol=2e-5, rtol=0)  # fp16 near 0.03 has steps of 1.5e-5


@pytest.mark.parametrize("how", ["from the start", "by another optimizer", "edited"])
def test_no_weight_moves_before_the_gradient_of_its_input_is_made(how):
    torch.manual_seed(0)
    net, x = nn.Sequential(owlore.Linear(20, 30), owlore.Linear(30, 20)), torch.randn(8, 20, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    group = {"params": list(net.parameters()), "rank": 2, "residual": how == "from the start"}
    optimizers = [ProjectedAdam([dict(group)], lr=0.5, in_backward=True)]
    owlore.take_factors(net, optimizers[0])
    if how == "by another optimizer":
        optimizers[0].in_backward = False
        optimizers.append(ProjectedAdam([group | {"residual": True}], lr=0.5, in_backward=True))
        owlore.take_factors(net, optimizers[1])
    optimizers[-1].param_groups[0]["residual"] = True
    before = weights_of(net)
    y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)  # which skips autograd's check for changes
    y.square().sum().backward()
    assert torch.equal(x.grad, expected) and not torch.equal(net[0].weight, before[0])


@pytest.mark.parametrize("kind", ["linear", "factors", "residual"])
@pytest.mark.parametrize("parts", [2, 16])
def test_micro_batches_give_the_weights_of_the_whole_batch(kind, parts):
    """Refreshes included: the basis is the step's, not the first micro-batch's. Same bits but for sums in another order."""
    results = []
    for n in (1, parts):
        torch.manual_seed(0)
        linear = nn.Linear if kind == "linear" else lambda a, b: owlore.Linear(a, b)
        net = nn.Sequential(linear(6, 90), nn.Tanh(), linear(90, 80))
        low_rank = {"rank": 3, "update_gap": 4, "residual": kind == "residual"}
        groups = [{"params": [p for p in net.parameters() if p.dim() == d], **settings} for d, settings in ((2, low_rank), (1, {}))]  # fmt: skip
        optimizer = ProjectedAdam([g for g in groups if g["params"]], lr=0.02, in_backward=True)
        owlore.take_factors(net, optimizer)
        optimizer.micro_batches = n
        for _ in range(12):
            optimizer.zero_grad()
            for part in range(n):
                loss_of(net, slice(16 * part // n, 16 * (part + 1) // n)).backward()
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
        results.append(weights_of(net))
    assert_close(*results)


def test_a_gradient_that_somebody_takes_away_in_the_backward_pass_is_left_alone():
    linear = nn.Linear(6, 4, bias=False)
    before = linear.weight.detach().clone()
    linear.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # as LOMO does
    optimizer = ProjectedAdam([{"params": linear.parameters(), "rank": 2}], lr=0.1, in_backward=True)
    linear(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    assert linear.weight.grad is None and torch.equal(linear.weight, before)


def test_more_backward_passes_than_announced_are_refused():
    net, optimizer = small_net(in_backward=True)
    loss_of(net).backward()
    with pytest.raises(RuntimeError, match="micro_batches"):
        loss_of(net).backward()
    net, optimizer = small_net(in_backward=True)
    optimizer.micro_batches = 2  # the second pass would be left out of the basis
    loss_of(net).backward()
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="before the last"):
        loss_of(net).backward()
    net, optimizer = small_net(in_backward=True)
    optimizer.micro_batches = 5  # fewer are fine, as at an epoch's end
    loss_of(net).backward()
    optimizer.step()
    assert_close(weights_of(net), train_net(*small_net(), steps=1))


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_factors_are_projected_as_the_gradient_is(shape):
    torch.manual_seed(0)
    ours, plain = owlore.Linear(shape[1], shape[0]), nn.Linear(shape[1], shape[0], bias=False)
    plain.load_state_dict(ours.state_dict())
    settings = dict(lr=0.05, svd="exact", in_backward=True)
    optimizers = [ProjectedAdam([{"params": m.parameters(), "rank": 3, "update_gap": 4}], **settings) for m in (ours, plain)]  # fmt: skip
    owlore.take_factors(ours, optimizers[0])
    made = []
    ours.weight.register_hook(lambda G: made.append(G is not None))
    for _ in range(10):
        x = torch.randn(7, shape[1])
        for linear, optimizer in zip((ours, plain), optimizers):
            optimizer.zero_grad()
            linear(x).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-4, atol=1e-5)
    assert [n for n, G in enumerate(made) if G] == [0, 4, 8]  # for new bases; between them there was no gradient


def test_a_weight_that_is_drawn_at_random_is_drawn_once_in_a_forward_pass():
    class Half(nn.Module):
        def forward(self, W):
            return F.dropout(W)

    linear, x = owlore.Linear(9, 8), torch.randn(5, 9)
    parametrize.register_parametrization(linear, "weight", Half())
    owlore.take_factors(linear, ProjectedAdam([{"params": linear.parameters(), "rank": 2}], lr=0.1))
    torch.manual_seed(1)
    y = linear(x)
    torch.manual_seed(1)
    W = 2 * torch.where(F.dropout(torch.ones(8, 9)) == 0, 0.0, linear.parametrizations.weight.original)
    torch.testing.assert_close(y, x @ W.T)
    y.sum().backward()
    assert torch.equal(linear.parametrizations.weight.original.grad == 0, W == 0) and (W == 0).any()


def test_what_hands_over_factors_may_be_changed_in_place():
    torch.manual_seed(0)
    net, x = nn.Sequential(owlore.Linear(6, 8), nn.ReLU(inplace=True), owlore.Linear(8, 6)), torch.randn(5, 6)
    plain = copy.deepcopy(net)
    for model, taken in ((net, True), (plain, False)):
        optimizer = ProjectedAdam([{"params": model.parameters(), "rank": 2}], lr=0.1, in_backward=True)
        owlore.take_factors(model, optimizer) if taken else None
        for _ in range(3):
            optimizer.zero_grad()
            y = model(x)
            y += 1
            y.square().sum().backward()
            optimizer.step()
    assert_close(weights_of(net), weights_of(plain))


def test_gradients_that_nobody_adds_to_the_parameter_are_left_alone():
    linear, x = owlore.Linear(8, 6), torch.randn(5, 8, requires_grad=True)
    optimizer = ProjectedAdam([{"params": linear.parameters(), "rank": 2}], lr=0.1, in_backward=True)
    owlore.take_factors(linear, optimizer)
    linear(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for wanted in (x, linear.weight):
        (ours,) = torch.autograd.grad(linear(x).square().sum(), wanted)
        (plain,) = torch.autograd.grad(F.linear(x, linear.weight).square().sum(), wanted)
        torch.testing.assert_close(ours, plain)
    linear.weight.grad = torch.ones(6, 8)  # set by hand: it is added to, as by any backward pass
    linear(x).square().sum().backward()
    (plain,) = torch.autograd.grad(F.linear(x, linear.weight).square().sum(), linear.weight)
    P = optimizer.state[linear.weight]["basis"]
    torch.testing.assert_close(linear.weight.grad.R, P.T @ (plain + 1))
    optimizer.zero_grad()
    linear(x).square().sum().backward(inputs=[x])
    assert linear.weight.grad is None
    linear(x).square().sum().backward()
    assert isinstance(linear.weight.grad, owlore.ProjectedGradient)


def test_owlore_alone_trains_a_plain_sequential(tmp_path):
    shutil.copy(Path(owlore.__file__), tmp_path)
    (tmp_path / "use.py").write_text("""
import sys
import torch
from owlore import LayerSampler, ProjectedAdam, outlier_distribution, sampling_probabilities

torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()) for _ in range(4)))
x = torch.randn(64, 16)
target = torch.tanh(x @ torch.randn(16, 16))
sampler = LayerSampler(model, sampling_probabilities(outlier_distribution(model, model, [x], threshold=3.0)), active=2)
groups = [[p for p in model.parameters() if p.dim() == n] for n in (2, 1)]
optimizer = ProjectedAdam([{"params": groups[0], "rank": 4, "update_gap": 20}, {"params": groups[1]}], lr=1e-2)
losses = []
for step in range(120):
    if step % 20 == 0:
        sampler.resample()
    loss = (model(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
assert not sys.modules.keys() & {"model", "data", "train", "sentencepiece"}
""")
    subprocess.run([sys.executable, "use.py"], cwd=tmp_path, check=True, timeout=60)


# train.py


def settings_of(*flags) -> train.argparse.Namespace:
    """The settings of a run on `build()`."""
    args = train.flag_parser().parse_args(["--data", "x", "--device", "cpu", *map(str, flags)])
    return train.decide_settings(args, build().config)


@pytest.mark.parametrize(
    "flags, idle",
    [
        ("--method full --scale 2 --update-gap 9", "scale update-gap"),
        ("--method full --embeddings projected --scale 2", ""),
        ("--method lora --rank 4 --svd exact", "svd"),
        ("--method lisa --rank 4 --threshold 5", "rank"),
        ("--method galore --threshold 5", "threshold"),
        ("--rank 0 --active 1 --scale 1", "scale"),
        ("--threshold 5", "threshold"),
        ("--threshold 5 --active 1 --rank 4 --scale 1 --update-gap 9 --svd exact", ""),
    ],
)
def test_flags_without_effect_are_named(flags, idle, recwarn):
    settings_of(*flags.split())
    assert {str(warning.message).split()[0] for warning in recwarn} == {f"--{flag}" for flag in idle.split()}


@pytest.mark.parametrize(
    "n_layers, dim, flags, active, rank, embeddings, ratio",
    [
        (32, 4096, "", 32, 40, "projected", 0.1),
        (32, 4096, "--active 5", 5, 256, "full", 1),
        (32, 4096, "--active 6", 6, 213, "projected", 0.1),
        (32, 4096, "--active 2", 2, 256, "full", 1),
        (32, 4096, "--embeddings full", 32, 40, "full", 0.1),
        (32, 4096, "--embeddings-lr-ratio 1 --active 20", 20, 64, "projected", 1),
        (32, 4096, "--rank 0", 5, 0, "full", 1),
        (32, 4096, "--rank 0 --active 20", 20, 0, "full", 1),
        (32, 4096, "--rank 16 --active 9", 9, 16, "projected", 0.1),
        (30, 576, "", 30, 8, "projected", 0.1),
        (30, 576, "--active 19", 19, 9, "projected", 0.1),
        (30, 576, "--active 5", 5, 36, "full", 1),
        (40, 5120, "--active 7", 7, 320, "full", 1),
        (8, 128, "", 8, 8, "projected", 0.1),
        (1, 64, "", 1, 8, "full", 1),
        (32, 4096, "--method lisa", 2, 256, "full", 1),
        (8, 128, "--method lisa", 1, 8, "full", 1),
        (32, 4096, "--method galore", None, 256, "full", 1),
        (32, 4096, "--method galore --embeddings projected", None, 256, "projected", 1),
        (8, 128, "--method lora", None, 8, "frozen", 1),
        (32, 4096, "--method lora --rank 64", None, 64, "frozen", 1),
    ],
)
def test_defaults_follow_the_model_and_are_the_papers_with_its_active_layers(
    n_layers, dim, flags, active, rank, embeddings, ratio
):
    args = train.flag_parser().parse_args([*flags.split(), "--data", "x"])
    args = train.decide_settings(args, ModelConfig(dim=dim, n_layers=n_layers, n_heads=8, vocab_size=32))
    assert (args.active, args.rank, args.embeddings, args.embeddings_lr_ratio) == (active, rank, embeddings, ratio)
    ours = ratio < 1 or "ratio" in flags  # else as published
    assert (args.residual, args.scale, args.norms_lr_ratio) == ((True, 0.5, 0.05) if ours else (False, 1, 1))
    if dim == 4096:
        assert (args.lr, args.threshold, args.seq_len, args.batch_size, args.update_gap) == (3e-4, 13, 512, 16, 100)
        assert args.interval == {"owlore": 50, "lisa": 3}.get(args.method)


def test_a_run_trains_saves_and_loads_again(base, checkpoint, tmp_path):
    code, text, _ = cli(f"{base} --steps 12 --interval 3 --active 1 --out {tmp_path / 'run'}")
    assert code == 0 and "before" in text and "after" in text and "█" in text.split("before")[0]
    rows = read_metrics(tmp_path / "run")
    steps, evaluations = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13)) and [r["step"] for r in evaluations] == [0, 3, 6, 9, 12]
    assert all(len(r["active"]) == 1 for r in steps)
    peak = 3e-4 * (4096 / 64) ** 0.75
    assert [r["lr"] for r in steps] == pytest.approx([peak * (1 - n / 12) for n in range(12)])  # linear to zero
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    tuned, source = load_model(tmp_path / "run/model"), load_model(checkpoint)
    drawn = {layer for r in steps for layer in r["active"]}
    for n in range(3):  # saved layers are changed exactly where they were drawn
        changed = not torch.equal(tuned.layers[n].attention.wq.weight, source.layers[n].attention.wq.weight)
        assert changed == (n in drawn)
    assert cli(f"--ckpt {tmp_path / 'run/model'} --max-new-tokens 5", model_module.main)[0] == 0


def test_with_all_layers_active_none_is_scored_or_drawn(base, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "score_layers", None)
    code, text, error = cli(f"{base} --steps 3 --save-every 2 --out {tmp_path / 'run'}")
    assert code == 0 and "all 3 layers are trained, and none drawn" in text, error
    assert cli(f"--resume --steps 4 --out {tmp_path / 'run'}")[0] == 0
    steps = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(steps) == 4 and all(row["active"] == [0, 1, 2] for row in steps)


@pytest.mark.parametrize("method", train.METHODS)
@pytest.mark.parametrize("embeddings", ["full", "projected", "frozen"])
def test_every_method_trains_what_it_should(base, checkpoint, tmp_path, method, embeddings):
    sampled = "--active 1 --interval 2" if method in ("owlore", "lisa") else ""
    out = tmp_path / "run"
    rows = train_run(f"{base} --steps 4 --method {method} --embeddings {embeddings} {sampled} --out {out}")
    tuned, source = load_model(out / "model"), load_model(checkpoint)
    drawn = {layer for r in rows if "loss" in r for layer in r["active"]}
    assert (len(drawn) == 3) == (method in ("galore", "lora", "full")) or sampled
    for (name, p), q in zip(tuned.named_parameters(), source.parameters()):
        if "norm" in name and method == "lora":
            trained = False
        elif name.startswith("layers."):
            trained = int(name.split(".")[1]) in drawn
        else:
            trained = "norm" in name or embeddings != "frozen"
        assert torch.equal(p, q) != trained, name


@pytest.mark.parametrize("method", [*train.METHODS, "owlore --rank 0", "owlore --embeddings full --no-residual"])
def test_micro_batches_do_not_change_a_run(method, base, tmp_path):
    """Through draws and new bases; rows differ in length, so a mean of means would differ. The rank is one at which the
    gradients' directions are well above fp32's rounding: Adam makes whole steps of what is below it."""
    sampled = "--active 2 --interval 3" if method.startswith(("owlore", "lisa")) else ""
    low_rank = "--rank 4" if "--rank" not in method else ""
    runs = []
    for size in (8, 3):
        line = f"{base} --steps 7 --batch-size 8 --update-gap 3 --eval-every 7 {low_rank} --method {method} {sampled}"
        rows = train_run(f"{line} --lr 3e-3 --micro-batch-size {size} --out {tmp_path / str(size)}")
        runs.append((load_model(tmp_path / str(size) / "model").state_dict(), [r["loss"] for r in rows if "loss" in r]))
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-5)
    for name, weight in runs[0][0].items():
        assert (weight - runs[1][0][name]).norm() < 1e-4 * weight.norm(), name


def test_epochs_hold_every_row_once_in_an_order_of_their_own(checkpoint, jsonl):
    dataset = Dataset(load_records(jsonl), load_tokenizer(checkpoint), 256)
    args = settings_of("--batch-size", 8, "--micro-batch-size", 3)
    rows = []
    for step in range(16):  # 60 rows are 8 steps
        for tokens, _, layout, _ in train.step_batches(dataset, args, step)[0]:
            begins = (layout.positions == 0).nonzero().flatten().tolist()
            rows += [tokens[begin:end].tolist() for begin, end in zip(begins, [*begins[1:], None])]
    assert len(rows) == 120 and rows[:60] != rows[60:] and sorted(rows[:60]) == sorted(rows[60:])


PROJECTED = ["owlore --rank 8", "owlore --embeddings full --rank 8", "galore --rank 8"]


@pytest.mark.parametrize("method", [*PROJECTED, "lisa", "lora --rank 4", "full"])
@pytest.mark.parametrize("family", ["llama1", "llama3.2", "mistral"])  # plain; tied, grouped heads; sliding window
@pytest.mark.parametrize("recompute", [False, True])
def test_rows_laid_end_to_end_give_the_losses_and_gradients_of_each_alone(method, family, recompute):
    """Also of packed rows, for those are no more than rows laid end to end."""
    limit = 24
    lengths = [limit, 3, 9, 17, 2, limit, 11]
    rows = [{"prompt": "p" * (n // 2 - 1), "completion": "cdefghijklmnopqrstuvwxyz"[: n - n // 2]} for n in lengths]
    dataset = Dataset([parse_record(row) for row in rows], Letters(), limit)
    assert sorted(len(row) - 1 for row in dataset) == sorted(lengths)
    model = build(family, vocab_size=300)
    model.checkpoint_blocks = recompute
    args = settings_of("--method", *method.split(), "--batch-size", len(rows))
    if args.method == "lora":
        add_lora(model, args.rank, args.lora_alpha)
        for name, p in model.named_parameters():
            torch.nn.init.normal_(p, std=0.1) if name.endswith(".B") else None
    optimizer = train.build_optimizer(model, args)
    if args.sampling:
        LayerSampler(model.layers, torch.ones(3), 2).resample()
    optimizer.micro_batches = 100  # the sums of projected gradients wait, whole, for the last
    results = []
    for batches in ([range(7)], [[n] for n in range(7)]):
        optimizer.zero_grad()
        batches = [dataset.batch(batch) for batch in batches]
        total = sum(len(targets) for _, targets, _ in batches)
        loss = sum(model(*batch) * (len(batch[1]) / total) for batch in batches)
        loss.backward()
        grads = {n: p.grad.G if isinstance(p.grad, owlore.ProjectedGradient) else p.grad
                 for n, p in model.named_parameters() if p.grad is not None}  # fmt: skip
        results.append((loss.detach(), grads))
    (loss, grads), (expected, wanted) = results
    # The same sums in another order, in fp32: 6e-8 a rounding, some dozens of them
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert grads.keys() == wanted.keys() and len(grads) > 5
    for name, grad in grads.items():
        assert (grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_a_packed_run_counts_rows_of_several_records_and_tokens_of_text(base, checkpoint, jsonl, tmp_path):
    code, text, error = cli(f"{base} --val-data {jsonl} --pack --seq-len 64 --out {tmp_path / 'run'}")
    assert code == 0, error
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    dataset = Dataset(load_records(jsonl), load_tokenizer(checkpoint), 64)
    groups = dataset.packed(64, 0)
    assert f"60 records in {len(groups)} rows, {len(rows)} steps" in text and len(rows) == math.ceil(len(groups) / 4)
    read = sum(row["tokens_per_second"] * row["seconds"] for row in rows)
    assert read == pytest.approx(sum(len(row) - 1 for row in dataset), abs=0.01)


def test_rank_zero_is_owlore_without_projection(base, tmp_path):
    for out, method in (("a", "--rank 0"), ("b", "--method lisa --sampling outlier")):
        train_run(f"{base} --steps 4 --active 1 --interval 2 {method} --out {tmp_path / out}")
    a, b = (load_model(tmp_path / out / "model").state_dict() for out in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_eval_only_prints_what_a_run_evaluates_and_writes_nothing(base, checkpoint, jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = train_run(f"{base} --val-data {jsonl} --out run --steps 1")[0]
    files = sorted(tmp_path.iterdir())
    for line in (f"{base} --val-data {jsonl}", f"--ckpt {checkpoint} --val-data {jsonl}"):
        code, text, error = cli(f"{line} --eval-only")
        assert code == 0 and f"{before['val_loss']:.4f}" in text and f"{before['val_accuracy']:.1%}" in text, error
    assert_refused(cli(f"--ckpt {checkpoint} --data {jsonl} --eval-only"), "--val-data")  # 5 % of it would be evaluated
    assert sorted(tmp_path.iterdir()) == files


def test_choice_accuracy_counts_the_likeliest_completion():
    model, tokenizer = build(vocab_size=300), Letters()
    records = [parse_record({"prompt": f"p{n}", "choices": ["xy", "z", "uvw"], "answer": n % 3}) for n in range(12)]
    right, by_length = 0, 0
    for record in records:
        scores = []
        for choice in record.choices:
            context, ids = tokenizer.encode(record.turns[0][0]), tokenizer.encode(record.turns[0][0] + choice)
            logp = model(torch.tensor([ids]))[0].log_softmax(-1)
            scores.append(sum(logp[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        right += record.choices[np.argmax(scores)] == record.turns[0][1]
        by_length += record.choices[np.argmax(np.array(scores) / [2, 1, 3])] == record.turns[0][1]
    args = settings_of("--micro-batch-size", 5)
    result = train.evaluate(model, build_validation(records, tokenizer, 50), args)
    assert 0 < right < 12
    assert (result["val_accuracy"], result["val_accuracy_norm"]) == (right / 12, by_length / 12)
    # Of two choices with the same text either is right.
    records = [parse_record({"prompt": "p", "choices": ["xy", "xy"], "answer": n}) for n in range(2)]
    assert train.evaluate(model, build_validation(records, tokenizer, 50), args)["val_accuracy"] == 1


def test_outlier_chart_command(checkpoint, jsonl):
    code, text, error = cli(f"--ckpt {checkpoint} --data {jsonl}", train.show_layers)
    lines = text.splitlines()
    assert code == 0 and len(lines) == 4 and "Hill alpha" in lines[0], error
    model = load_model(checkpoint)
    rows = Dataset(load_records(jsonl), load_tokenizer(checkpoint), 256).sample(train.CALIBRATION_ROWS, 0)
    D = outlier_distribution(model, model.layers, rows)
    alphas = [np.mean([hill_alpha(linear.weight) for linear in layer]) for layer in linears_of(model.layers)]
    for n, line in enumerate(lines[1:]):
        numbers = [100 * D[n].item(), alphas[n], sampling_probabilities(D)[n].item()]
        assert line.split()[:4] == [str(n), *(f"{number:.4f}" for number in numbers)]
        assert line.count("█") == round(30 * (D[n] / D.max()).item())


def test_the_embedded_example_learns(tmp_path):
    """In a sixth of its steps, and so at a larger rate."""
    rows = train_run(f"--steps 30 --lr 2e-2 --eval-every 30 --out {tmp_path / 'run'}")
    before, after = (r for r in rows if "val_loss" in r)
    assert after["val_loss"] < before["val_loss"] / 10
    assert before["val_accuracy"] < 0.35 and after["val_accuracy"] > 0.55  # 120 questions with four answers each


def test_the_embedded_example_draws_layers_and_trains_its_embeddings_at_the_whole_rate():
    """Its format is new to its model."""
    config = read_checkpoint(TINY)[0]
    for flags, ratio in (("", 1), (f"--data {TINY / 'train.json'}", 0.1), ("--embeddings-lr-ratio 0.5", 0.5)):
        args = train.decide_settings(train.flag_parser().parse_args(flags.split()), config)
        assert args.embeddings == "projected" and args.embeddings_lr_ratio == ratio
        assert args.active == (8 if "--data" in flags else 5)  # it shows how layers are drawn


@pytest.mark.parametrize("what", ["--embeddings full --embeddings", "--embeddings projected --embeddings", "--norms"])
def test_embeddings_and_norms_learn_at_rates_of_their_own(what, base, checkpoint, tmp_path):
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    # In two groups, bases are found with other random numbers than in one.
    rounding = 1e-6 if "projected" in what else 0
    moves = []
    for ratio in (1, 0.25):
        train_run(f"{base} --steps 1 {what}-lr-ratio {ratio} --out {tmp_path / str(ratio)}")
        tuned, source = load_model(tmp_path / str(ratio) / "model"), load_model(checkpoint)
        moves.append({name: p - source.get_parameter(name) for name, p in tuned.named_parameters()})
    for name, move in moves[0].items():
        if move.dim() == 1 if what == "--norms" else name in ("tok_embeddings.weight", "output.weight"):
            assert move.abs().max() > 1e-3 or "layers" in name  # some are not drawn
            steps = 1.2e-7  # of fp32 near 1
            torch.testing.assert_close(moves[1][name], 0.25 * move, rtol=0, atol=steps)
        else:
            torch.testing.assert_close(moves[1][name], move, rtol=0, atol=rounding)


def test_bf16_weights_end_where_fp32_ones_do(tmp_path, monkeypatch):
    """At this learning rate most updates are below bf16's resolution: rounding to nearest loses them, and 7 % of the loss."""
    for name in ("train", "val"):
        records = json.loads((TINY / f"{name}.json").read_text())[:8]
        few = json.dumps([{**record, "answer": ""} for record in records])  # no accuracy
        (tmp_path / f"{name}.json").write_text(few)

    def final_loss(name: str, dtype: str) -> float:
        line = f"--ckpt {TINY} --data {tmp_path}/train.json --val-data {tmp_path}/val.json --out {tmp_path / name}"
        flags = "--steps 8 --batch-size 1 --seq-len 48 --eval-every 8 --lr 3e-4 --no-residual"
        return train_run(f"{line} {flags} --dtype {dtype}")[-1]["val_loss"]

    fp32, bf16 = final_loss("fp32", "fp32"), final_loss("bf16", "bf16")
    monkeypatch.setattr(owlore, "stochastic_round", lambda x, noise: x.to(torch.bfloat16))
    nearest = final_loss("nearest", "bf16")
    assert abs(bf16 / fp32 - 1) < 0.005 and abs(nearest / fp32 - 1) > 0.05


def test_embedded_files_stay_small():
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) < 8 * 2**20


# train.py: interrupted, resumed, and out of the ordinary


def cli_process(argv: list[str], output: Path, largest_file: int | None) -> None:
    """What a separate process does to run train.py, with what it prints in a file."""
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    os.dup2(sys.stdout.fileno(), 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which the fork server has ignored, under nohup
    if largest_file:  # a write beyond it fails as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv, "--device", "cpu"]
    train.main()


SERVER = multiprocessing.get_context("forkserver")  # forks processes that have imported torch, but not yet used it
SERVER.set_forkserver_preload([__name__, "torch._dynamo"])


@pytest.fixture
def hangups():
    """SIGHUP as it is by default: under nohup it is ignored, and so it would be by the processes that a test starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def start_cli(
    line: str, largest_file: int | None = None, when: Callable = lambda: False, number: int = signal.SIGKILL
) -> tuple[int, str]:
    """Run train.py in a process of its own and send it a signal `when` that is true. Returns its exit code, negative if
    the signal ended it, and what it printed."""
    with tempfile.NamedTemporaryFile() as output:
        process = SERVER.Process(target=cli_process, args=(shlex.split(line), Path(output.name), largest_file))
        process.start()
        began, sent = time.monotonic(), False
        while process.is_alive():
            assert time.monotonic() < began + 60, "the run hangs: " + Path(output.name).read_text()
            if not sent and when():
                os.kill(process.pid, number)
                sent = True
            process.join(0.002)
        return process.exitcode, Path(output.name).read_text()


def reached(out: Path, step: int) -> Callable[[], bool]:
    """Whether a run has logged a step."""
    path = out / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step}, "loss"' in path.read_text()


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit the same weights, optimizer state, sampler and metrics, times aside."""
    weights = [load_model(out / "model", dtype=torch.bfloat16).state_dict() for out in (a, b)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [torch.load(out / "state" / "state.pt", weights_only=True) for out in (a, b)]
    for index, entry in states[0]["optimizer"]["state"].items():
        for key, value in entry.items():
            other = states[1]["optimizer"]["state"][index][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert states[0]["optimizer"]["state"].keys() == states[1]["optimizer"]["state"].keys()
    if states[0]["sampler"]:
        assert torch.equal(states[0]["sampler"]["generator"], states[1]["sampler"]["generator"])
    drop = ("tokens_per_second", "seconds", "memory")
    logs = [[{k: v for k, v in r.items() if k not in drop} for r in read_metrics(out)] for out in (a, b)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "method",
    [
        *train.METHODS,
        "owlore --residual --embeddings projected --embeddings-lr-ratio 0.1",
        "lora --embeddings projected",
    ],
)
def test_resuming_continues_bit_for_bit(method, base, tmp_path):
    # in bf16 stochastic rounding draws random numbers; an epoch is 8 steps
    line = f"{base} --batch-size 8 --steps 10 --method {method} --dtype bf16 --micro-batch-size 3 --update-gap 2 --save-every 4"
    line += " --active 1 --interval 3" if method.startswith(("owlore", "lisa")) else ""
    out = tmp_path / "b"
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(start_cli, f"{line} --out {tmp_path / 'a'}")
        assert start_cli(f"{line} --out {out}", when=reached(out, 5))[0] == -signal.SIGKILL
        code, output = start_cli(f"--resume --out {out}")
    assert code == 0, output
    assert whole.result()[0] == 0
    assert_same_run(tmp_path / "a", out)


def test_killed_at_twenty_random_moments_a_run_ends_as_if_never_interrupted(base, tmp_path):
    """Steps are given, what is done then is not; some kills come while a run starts, as it has logged the step before."""
    line = f"{base} --steps 50 --save-every 4 --dtype bf16 --eval-every 25 --active 1 --interval 7"
    assert start_cli(f"{line} --out {tmp_path / 'a'}")[0] == 0
    random, out = np.random.default_rng(0), tmp_path / "b"
    for step in sorted(random.integers(1, 46, 20)):
        step_done, pause = reached(out, step), random.uniform(0, 0.02)
        code, output = start_cli(f"{line} --resume --out {out}", when=lambda: step_done() and not time.sleep(pause))
        assert code == -signal.SIGKILL, output
        if (out / "model").exists():  # what there is at any moment is whole
            load_model(out / "model")
    assert start_cli(f"{line} --resume --out {out}")[0] == 0
    assert_same_run(tmp_path / "a", out)


def test_a_signal_saves_and_says_how_to_go_on(base, tmp_path):
    assert start_cli(f"{base} --steps 15 --out {tmp_path / 'a'}")[0] == 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        out = tmp_path / str(number)
        code, output = start_cli(f"{base} --steps 15 --out {out}", when=reached(out, 5), number=number)
        assert code == 128 + number and f"python train.py --resume --out {out}" in output
        assert start_cli(f"--resume --out {out}")[0] == 0
        assert_same_run(tmp_path / "a", out)


def test_a_failed_save_ends_the_run_and_keeps_the_last_checkpoint(base, tmp_path):
    line, out = f"{base} --save-every 4 --steps 14", tmp_path / "b"
    assert start_cli(f"{line} --out {tmp_path / 'a'}")[0] == 0
    start_cli(f"{line} --out {out}", when=reached(out, 6))
    kept = snapshot(out / "checkpoints")
    code, output = start_cli(f"--resume --out {out}", largest_file=100_000)  # as if the disk were full
    assert code == 2 and "Traceback" not in output
    assert re.search(
        r"step 8 could not be saved .* takes [\d.]+ MiB, [\d.]+ GiB are free; step-0000004 is kept", output
    )
    assert snapshot(out / "checkpoints") == kept
    assert start_cli(f"--resume --out {out}")[0] == 0
    assert_same_run(tmp_path / "a", out)


@pytest.mark.parametrize("method", [*train.METHODS, "owlore --embeddings full"])
def test_a_checkpoint_that_will_not_fit_the_disk_is_refused_before_training(method, base, tmp_path, monkeypatch):
    line, free, usage = f"{base} --steps 3 --method {method} --out", 10**9, shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free))
    train_run(f"{line} {tmp_path / 'a'}")
    size = sum(map(len, snapshot(tmp_path / "a/checkpoints").values())) - (TINY / "tokenizer.model").stat().st_size
    free = int(3.1 * size)  # two are kept while a third one is written
    train_run(f"{line} {tmp_path / 'b'}")
    free = int(2.8 * size)
    code, _, error = cli(f"{line} {tmp_path / 'c'}")
    needed, left = re.search(r"take ([\d.]+) MiB there, ([\d.]+) MiB are free", error).groups()
    assert code == 2 and not (tmp_path / "c").exists()
    assert float(left) == round(free / 2**20, 2) and 3 * size / 2**20 == pytest.approx(float(needed), rel=0.05)
    train_run(f"{line} {tmp_path / 'c'} --save-every 3")  # one at the end
    train_run(f"{line} {tmp_path / 'd'} --save-every 2 --keep 9")  # no more than two


def test_runs_are_saved_by_time(base, tmp_path, monkeypatch):
    train_run(f"{base} --steps 6 --out {tmp_path / 'a'} --keep 9")
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "SAVE_SHARE", math.inf)
    train_run(f"{base} --steps 6 --out {tmp_path / 'b'} --keep 9")
    assert [len(list((tmp_path / run / "checkpoints").iterdir())) for run in "ab"] == [1, 6]


@pytest.mark.parametrize("how", ["flipped", "truncated", "gone"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_taken(how, base, tmp_path):
    train_run(f"{base} --steps 6 --save-every 2 --dtype bf16 --active 1 --interval 3 --out {tmp_path / 'a'}")
    for file in ("model/consolidated.00.pth", "model/tokenizer.model", "state/state.pt", "checksums.json"):
        out = tmp_path / Path(file).name
        shutil.copytree(tmp_path / "a", out, symlinks=True)
        path = out / "checkpoints/step-0000006" / file
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 3] ^= 64
        path.unlink()
        if how != "gone":
            path.write_bytes(raw if how == "flipped" else raw[: len(raw) // 2])
        code, text, error = cli(f"--resume --out {out}")
        assert code == 0 and f"{path.parent}" in text and ": damaged" in text, error
        assert_same_run(tmp_path / "a", out)
        assert (out / "checkpoints/step-0000006.damaged/model/params.json").exists()  # nothing is thrown away
    for path in out.glob("checkpoints/*/state/state.pt"):
        truncate(path, 0.5)
    assert_refused(cli(f"--resume --out {out}"), "every checkpoint is damaged")


def test_checkpoints_of_the_release_before_have_no_checksums_and_are_taken(base, tmp_path):
    train_run(f"{base} --steps 4 --save-every 2 --out {tmp_path / 'run'}")
    for path in tmp_path.glob("run/checkpoints/*/checksums.json"):
        path.unlink()
    assert cli(f"--resume --out {tmp_path / 'run'} --steps 6")[0] == 0


def test_lora_goes_on_only_from_the_weights_it_began_with(base, checkpoint, tmp_path):
    """Which it reads again from --ckpt, as it saves merged ones; they may have moved."""
    out, moved = tmp_path / "run", tmp_path / "moved"
    line = f"{base} --method lora --embeddings full --lr 0.01"
    train_run(f"{line} --steps 6 --out {tmp_path / 'a'}")
    train_run(f"{line} --steps 6 --save-every 3 --keep 9 --out {out}")
    shutil.rmtree(out / "checkpoints/step-0000006")
    checkpoint.rename(moved)
    assert_refused(cli(f"--resume --out {out}"), f"{checkpoint}: no such folder")
    save_model(build(vocab_size=load_tokenizer(TINY).vocab_size, max_seq_len=256, n_layers=3), checkpoint, "meta")
    edit_tensors(checkpoint, norm__weight=torch.full((64,), 2.0))
    data.copy_tokenizer(TINY, checkpoint)
    assert_refused(cli(f"--resume --out {out}"), "not the weights that this run began with")
    train_run(f"--resume --out {out} --ckpt {moved}")
    assert_same_run(tmp_path / "a", out)


def test_a_first_loss_that_is_not_finite_does_not_hide_a_divergence(base, tmp_path, monkeypatch):
    step, losses = train.training_step, iter([math.inf])
    monkeypatch.setattr(train, "training_step", lambda *args: (next(losses, None) or step(*args)[0], 1.0))
    flags = f"--method full --lr 30 --steps 24 --out {tmp_path / 'run'}"
    code, _, error = cli(f"{base} {flags}")
    assert code == 2 and "diverged: the loss is" in error


def test_a_run_needs_its_checkpoints_folder_no_more_once_it_has_begun(checkpoint, jsonl, tmp_path):
    out = tmp_path / "run"
    line = f"--ckpt {to_hf(checkpoint)} --data {jsonl} --batch-size 4 --steps 12 --save-every 6 --out {out}"
    evaluate = train.evaluate

    def evaluate_and_empty(*args):
        for path in checkpoint.iterdir():
            path.unlink()
        return evaluate(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate_and_empty)
        train_run(line)
    assert load_tokenizer(out / "model").encode("a b") == load_tokenizer(TINY).encode("a b")
    train_run(f"--resume --out {out} --steps 14")


def test_a_folder_without_links_is_told_before_a_run_begins(base, tmp_path, monkeypatch):
    def symlink_to(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    assert_refused(cli(f"{base} --steps 1 --out {tmp_path / 'run'}"), "no link can be made")
    monkeypatch.undo()
    train_run(f"{base} --steps 1 --out {tmp_path / 'run'}")


def test_a_line_that_was_half_written_is_taken_back(tmp_path):
    room = 60

    class Full(io.FileIO):
        def write(self, line):
            return super().write(line[: max(0, room - self.tell())])

    with Full(tmp_path / "metrics.jsonl", "a") as metrics:
        for step in range(5):
            room += 100 * (step == 4)
            train.log(metrics, step=step, loss=1.0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 4]


def test_any_flipped_byte_of_a_checkpoint_is_noticed(base, tmp_path):
    train_run(f"{base} --steps 1 --out {tmp_path / 'run'}")
    folder, random = tmp_path / "run/checkpoints/step-0000001", np.random.default_rng(0)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert train.damage(folder) is None and len(files) == 5
    for path in files * 10:
        raw = path.read_bytes()
        changed = bytearray(raw)
        changed[random.integers(len(raw))] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        assert train.damage(folder)
        path.write_bytes(raw)


def test_a_finished_run_can_be_extended(base, tmp_path):
    out = tmp_path / "run"
    train_run(f"{base} --steps 5 --out {out}")
    assert_refused(cli(f"--resume --out {out} --steps 4"), "--steps")
    code, text, error = cli(f"--resume --out {out} --steps 9")
    assert code == 0 and "9 steps instead of 5" in text and "learning rate" in text, error
    rows = [row for row in read_metrics(out) if "lr" in row]
    assert [row["step"] for row in rows] == list(range(1, 10))
    lr = rows[0]["lr"]
    assert [row["lr"] for row in rows] == pytest.approx(
        [lr * (1 - n / 5) for n in range(5)] + [lr * (1 - n / 9) for n in range(5, 9)]
    )
    code, text, _ = cli(f"--resume --out {out}")  # it is a run of 9 steps from now on
    assert code == 0 and "9 steps," in text and "instead" not in text
    code, text, error = cli(f"--resume --out {out} --epochs 2")  # of 57 rows each, 4 a step
    assert code == 0 and "30 steps instead of 9" in text and read_metrics(out)[-1]["step"] == 30, error


@pytest.mark.parametrize("method", ["owlore", "full", "lora"])
def test_a_run_of_before_a_flag_was_added_has_its_default(method, base, tmp_path):
    new = "--no-residual --scale 1 --embeddings-lr-ratio 1 --norms-lr-ratio 1"
    line = f"{base} --steps 12 --method {method} " + new * (method == "owlore")
    train_run(f"{line} --out {tmp_path / 'a'}")
    out = tmp_path / "b"
    assert start_cli(f"{line} --save-every 3 --out {out}", when=reached(out, 4))[0] == -signal.SIGKILL
    saved = json.loads((out / "args.json").read_text())
    flags = "embeddings_lr_ratio norms_lr_ratio residual pack offload keep threshold scale save_every"
    for name in flags.split():
        del saved[name]
    (out / "args.json").write_text(json.dumps(saved | {"lora_alpha": 2.0 * saved["rank"]}))  # as it was saved once
    for path in out.glob("checkpoints/*/state/state.pt"):
        state = torch.load(path, weights_only=True)
        for group in state["optimizer"]["param_groups"]:
            del group["lr_ratio"]
        torch.save(state, path)
        (path.parent.parent / "checksums.json").unlink()
    assert_refused(cli(f"--resume --out {out} --embeddings-lr-ratio 0.5"), "--embeddings-lr-ratio 0.5: the run")
    code, _, error = cli(f"--resume --out {out}")
    assert code == 0, error
    assert_same_run(tmp_path / "a", out)


def test_two_runs_that_begin_at_once_get_two_folders(checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = [train.argparse.Namespace(ckpt=str(checkpoint), out=None, resume=False) for _ in range(3)]
    locks = [train.claim(each) for each in args[:2]]
    with train.run_folder(args[0], locks[0], {}) as (first, _), train.run_folder(args[1], locks[1], {}) as (second, _):
        assert (str(first), str(second)) == ("runs/ckpt", "runs/ckpt-2") == (args[0].out, args[1].out)
    for name in ("args.json", "metrics.jsonl"):  # killed before it began
        (second / name).unlink()
    with train.run_folder(args[2], train.claim(args[2]), {}) as (third, _):
        assert third == second


@pytest.mark.parametrize("flags", ["--scale 1e9", "--method full --lr 1e6", "--scale 1e9 --dtype bf16"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_diverges_is_an_error_however_short_it_is(flags, steps, base, tmp_path):
    code, _, error = cli(f"{base} --steps {steps} --out {tmp_path / 'run'} {flags}")
    assert code == 2 and "diverged" in error and "nothing had been saved" in error and "Traceback" not in error
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100, 1000])
def test_health_is_judged_on_rows_from_all_over_the_data(count, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(train, "row_losses", lambda _, rows, __: seen.extend(rows) or [torch.ones(1, 2)] * len(rows))
    validation = SimpleNamespace(examples=[[n, "a choice"] for n in range(count)])
    train.require_health(build(), validation, 1.0, 0, SimpleNamespace(lr=1.0), tmp_path)
    rows = [row for (row,) in seen]
    assert min(count, 16) <= len(rows) <= 32 and rows[0] == 0
    assert len(set(np.diff(rows).tolist())) <= 1 and count - rows[-1] <= count / 16 + 1


def test_a_loss_far_above_the_one_before_training_ends_the_run(base, monkeypatch, tmp_path):
    forward = Transformer.forward

    def worse(self, tokens, targets=None, *args, **kwargs):
        metrics = tmp_path / "run/metrics.jsonl"
        steps = metrics.read_text().count("lr") if metrics.exists() else 0
        return forward(self, tokens, targets, *args, **kwargs) + (self.training and steps >= 7) * 9.0

    monkeypatch.setattr(Transformer, "forward", worse)
    code, _, error = cli(f"{base} --steps 60 --save-every 5 --out {tmp_path / 'run'}")
    assert code == 2 and "diverged" in error and "step-0000005 is kept" in error
    assert read_metrics(tmp_path / "run")[-1]["step"] == 17


def test_signals_are_noted_once_and_end_the_process_then_but_nohup_is_heard(hangups, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with train.note_signals() as noted:
        for number in (signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert noted[0] == signal.SIGHUP and codes == [128 + signal.SIGINT]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with train.note_signals() as noted:
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert not noted


def command_line(line: str, **kwargs) -> subprocess.Popen:
    """`python train.py` as a user starts it."""
    argv = [sys.executable, train.__file__, *shlex.split(line), "--device", "cpu"]
    return subprocess.Popen(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs)


def test_a_closed_terminal_saves_the_run(hangups, base, tmp_path):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    out = tmp_path / "run"
    process = command_line(
        f"{base} --steps 100000 --out {out}", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    step_3, began = reached(out, 3), time.monotonic()
    while not step_3():
        assert time.monotonic() < began + 60
        if select.select([ours], [], [], 0.1)[0]:
            os.read(ours, 10**5)
    os.close(ours)
    process.send_signal(signal.SIGHUP)  # what the shell of that terminal does
    assert process.wait(60) == 128 + signal.SIGHUP and (out / "model").exists()


def test_ctrl_c_saves_a_run_whose_output_nobody_reads_any_more(base, tmp_path):
    """As in `python train.py | tee log`, where Ctrl-C ends both."""
    out = tmp_path / "run"
    process = command_line(f"{base} --steps 100000 --out {out}", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    step_3, began = reached(out, 3), time.monotonic()
    while not step_3():
        assert time.monotonic() < began + 60
        os.read(process.stdout.fileno(), 10**5)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT and (out / "model").exists()


def test_a_hard_last_batch_is_not_called_divergence(checkpoint, tmp_path):
    easy, odd = {"prompt": "one and one is", "completion": " two"}, {"prompt": "x", "completion": "qzjxv" * 20}
    rows = [easy] * 40
    rows.insert(int(np.random.default_rng([0, 0]).permutation(41)[-1]), odd)  # which is read last
    for name, records in (("data", rows), ("val", [easy])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    files = f"--data {tmp_path / 'data.jsonl'} --val-data {tmp_path / 'val.jsonl'}"
    metrics = train_run(f"--ckpt {checkpoint} {files} --batch-size 1 --lr 0.03 --method full --out {tmp_path / 'run'}")
    losses = [row["loss"] for row in metrics if "lr" in row]
    assert losses[-1] > train.far_above(max(metrics[0]["val_loss"], losses[0]), load_tokenizer(TINY).vocab_size)
    assert losses[-2] < 0.1


@pytest.mark.parametrize("part", ["libtorch_cpu", "tokenizer.model"])
def test_ctrl_c_before_the_first_step_ends_in_a_line(part, base, tmp_path):
    """While torch is imported, and while the model is loaded."""
    process = command_line(
        f"{base} --out {tmp_path / 'run'}", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    began, files = time.monotonic(), Path(f"/proc/{process.pid}")
    while part == "libtorch_cpu" and part not in (files / "maps").read_text():
        assert time.monotonic() < began + 60
    while part == "tokenizer.model" and "layer" not in process.stdout.readline():  # the chart comes before the folder
        assert time.monotonic() < began + 60
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in output and "stopped" in output


# Several processes, and weights in host memory


def joined_process(line: str, rank: int, count: int, port: int, output: Path) -> None:
    """cli_process as torchrun would start it."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    cli_process(shlex.split(line), output, None)


def start_joined(
    line: str, count: int, when: Callable = lambda: False, number: int = signal.SIGKILL, victims: slice = slice(None)
) -> tuple[list[int], str]:
    """Run train.py in several processes that share the work, and send some of them a signal when `when` is true; then
    end those that are left a second after the first has failed, as torchrun does. Returns exit codes and what was
    printed by all."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        outputs = [Path(folder) / str(rank) for rank in range(count)]
        arguments = [(line, rank, count, port, output) for rank, output in enumerate(outputs)]
        processes = [SERVER.Process(target=joined_process, args=a) for a in arguments]
        for process in processes:
            process.start()
        began, sent = time.monotonic(), False
        while any(process.is_alive() for process in processes):
            text = "".join(output.read_text() for output in outputs if output.exists())
            assert time.monotonic() < began + 60, f"the run hangs: {text}"
            if not sent and when():
                sent = True
                for process in processes[victims]:
                    os.kill(process.pid, number)
            if any(process.exitcode for process in processes):
                time.sleep(1)
                for process in processes:
                    process.terminate()
            processes[0].join(0.01)
        text = "".join(output.read_text() for output in outputs if output.exists())
        return [process.exitcode for process in processes], text


def assert_like_runs(a: Path, b: Path) -> None:
    """The same losses and weights, but for the order of sums."""
    rows = [[row["loss"] for row in read_metrics(out) if "loss" in row] for out in (a, b)]
    np.testing.assert_allclose(*rows, rtol=1e-5)
    weights = [load_model(out / "model").state_dict() for out in (a, b)]
    for name, weight in weights[0].items():
        assert (weight - weights[1][name]).norm() < 1e-4 * weight.norm(), name


def shared_line(base: str, method: str) -> str:
    """Flags of a run of 8 steps through draws and new bases, the epoch's last of them with fewer rows."""
    sampled = "--active 2 --interval 3" if method.startswith(("owlore", "lisa")) else ""
    low_rank = "--rank 4" if "--rank" not in method else ""
    rest = "--steps 8 --batch-size 11 --micro-batch-size 3 --update-gap 3 --eval-every 8 --lr 3e-3"
    return f"{base} {rest} {low_rank} --method {method} {sampled}"


@pytest.mark.parametrize("method", [*train.METHODS, "owlore --embeddings full --no-residual"])
def test_two_or_three_processes_train_what_one_does(method, base, tmp_path):
    line = shared_line(base, method)
    train_run(f"{line} --out {tmp_path / '1'}")
    for count in (2, 3) if method in ("owlore", "full") else (2,):
        codes, text = start_joined(f"{line} --out {tmp_path / str(count)}", count)
        assert codes == [0] * count, text
        assert text.count("saved:") == 1  # one of them talks
        assert_like_runs(tmp_path / "1", tmp_path / str(count))


@pytest.mark.parametrize(
    "method",
    ["owlore --embeddings full --no-residual", "lisa", "lora", "full", "owlore --micro-batch-size 11"],
)
def test_weights_in_host_memory_change_nothing(method, base, tmp_path):
    """(Gradients of several micro-batches that FSDP reduces are added up before, not after, they are projected.)"""
    line = f"{shared_line(base, method)} --dtype bf16 --out"
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(start_cli, (f"{line} {tmp_path / 'a'}", f"{line} {tmp_path / 'b'} --offload")))
    assert [code for code, _ in results] == [0, 0], results
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("family", ["llama3.2", "mistral"])  # tied embeddings; a sliding window
def test_two_processes_share_other_families_and_both_layouts(family, jsonl, tmp_path):
    path = tmp_path / "hf"
    save_model(build(family, vocab_size=load_tokenizer(TINY).vocab_size, max_seq_len=256), path, "hf")
    data.copy_tokenizer(TINY, path)
    line = shared_line(f"--ckpt {path} --data {jsonl}", "owlore")
    train_run(f"{line} --out {tmp_path / '1'}")
    codes, text = start_joined(f"{line} --out {tmp_path / '2'}", 2)
    assert codes == [0, 0], text
    assert_like_runs(tmp_path / "1", tmp_path / "2")


def test_a_run_that_was_killed_goes_on_with_as_many_processes_or_others(base, tmp_path):
    line = f"{shared_line(base, 'owlore')} --save-every 2"
    codes, text = start_joined(f"{line} --out {tmp_path / 'a'}", 2)
    assert codes == [0, 0], text
    codes, text = start_joined(f"{line} --out {tmp_path / 'b'}", 2, when=reached(tmp_path / "b", 5))
    assert codes == [-signal.SIGKILL] * 2, text
    for count, same in ((2, assert_same_run), (1, assert_like_runs)):
        out = tmp_path / str(count)
        shutil.copytree(tmp_path / "b", out, symlinks=True)
        codes, text = start_joined(f"--resume --out {out}", count)
        assert codes == [0] * count, text
        same(tmp_path / "a", out)


def test_a_signal_to_all_processes_saves_once(base, tmp_path):
    line, out = f"{base} --steps 60", tmp_path / "b"
    codes, text = start_joined(f"{line} --out {out}", 2, when=reached(out, 5), number=signal.SIGINT)
    assert codes == [130, 130] and text.count(f"python train.py --resume --out {out}") == 1, text
    assert 5 <= train.load_state(out)["step"] < 60


def test_a_process_that_dies_ends_the_run_with_a_line(base, tmp_path):
    codes, text = start_joined(
        f"{base} --steps 500 --out {tmp_path / 'a'}", 2, reached(tmp_path / "a", 3), victims=slice(1, 2)
    )
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
    assert "Traceback" not in text and "another process" in text, text


LLAMA3_8B = dict(vocab_size=128256, n_kv_heads=8, hidden_dim=14336, rope_theta=500000.0)
LLAMA2_70B = dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672)


@pytest.mark.parametrize(
    "shape, room, flags, expected",
    [
        ({}, 80, "", (False, False, 16)),
        ({}, 24, "", (False, True, 16)),
        ({}, 17, "", (False, True, 8)),
        ({}, 17, "--embeddings frozen", (False, True, 8)),
        ({}, 17, "--embeddings full", (False, True, 2)),
        ({}, 16.8, "--embeddings full --batch-size 11", (False, True, 1)),  # 11, 6, 3, 2, 1
        ({}, 12, "", (True, True, 16)),
        ({}, 80, "--offload --micro-batch-size 4", (True, False, 4)),
        (LLAMA3_8B, 24, "", (False, True, 16)),
        (LLAMA3_8B, 24, "--embeddings full", (True, True, 16)),
        (LLAMA2_70B, 22, "", (True, True, 8)),
    ],
)
def test_what_fits_is_decided_in_an_order(shape, room, flags, expected, monkeypatch, capsys):
    """Activations are kept, blocks recomputed, rows halved, weights left in host memory: whatever comes first and fits."""
    config = ModelConfig(**shape)
    monkeypatch.setattr(train, "read_checkpoint", lambda path: (config, {}))
    monkeypatch.setattr(train, "require_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room * 2**30, room * 2**30))
    monkeypatch.setattr(train, "available_memory", lambda: 2**40)
    args = train.flag_parser().parse_args(shlex.split(f"--data - --out - --device cuda {flags}"))
    fitted = train.fit(train.decide_settings(args, config))
    assert (fitted.offload, fitted.recompute, fitted.micro_batch_size) == expected
    needed, free = (
        float(n) for n in re.search(r"takes ([\d.]+) GiB of ([\d.]+) GiB", capsys.readouterr().out).groups()
    )
    assert needed < free == room


def test_what_cannot_fit_says_what_needs_less(monkeypatch):
    monkeypatch.setattr(train, "read_checkpoint", lambda path: (ModelConfig(), {}))
    monkeypatch.setattr(train, "require_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    args = train.flag_parser().parse_args(shlex.split("--data - --out - --device cuda --method full"))
    with pytest.raises(InputError, match="--embeddings projected or frozen"):
        train.fit(train.decide_settings(args, ModelConfig()))


def test_a_containers_own_memory_limit_counts(tmp_path):
    """As Linux writes it (cgroup v2): of what is used, copies of files give way."""
    free = train.available_memory(tmp_path)
    assert free > 2**20
    files = {"max": "3000", "current": "2500", "stat": "anon 1300\nactive_file 400\ninactive_file 800"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert train.available_memory(tmp_path) == 3000 - 1300
    (tmp_path / "memory.max").write_text("max\n")  # no limit
    assert train.available_memory(tmp_path) == pytest.approx(free, rel=0.2)


@pytest.mark.parametrize(
    "shape, room, flags, needed, expected",
    [
        (LLAMA2_70B, 24, "--no-residual --batch-size 4", 143.51, "a smaller --active, or another --method or model"),
        (LLAMA2_70B, 24, "--batch-size 4", 286.01, "--no-residual"),  # the gradients of all blocks, too
        (LLAMA2_70B, 24, "--no-residual --micro-batch-size 4", 271.99, "--batch-size 4"),  # those of the first step
        (LLAMA2_70B, 24, "--micro-batch-size 4", 286.99, "--no-residual"),
        (LLAMA2_70B, 24, "--active 13 --micro-batch-size 4 --embeddings frozen", 164.22, "--batch-size 4"),
        (LLAMA2_70B, 24, "--method lora", 152.99, "another --method or model"),
        ({}, 15, "", 12.55, "--batch-size 4"),
        ({}, 16, "--batch-size 4", 0, ""),
    ],
)
def test_what_host_memory_cannot_hold_is_refused_with_what_needs_less(
    shape, room, flags, needed, expected, monkeypatch
):
    """Gradients of several micro-batches wait there for new bases, and those of weights that are there for a residual."""
    config = ModelConfig(**shape)
    monkeypatch.setattr(train, "require_device", lambda device: None)
    monkeypatch.setattr(train, "read_checkpoint", lambda path: (config, {}))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room * 2**30, room * 2**30))
    args = train.flag_parser().parse_args(shlex.split(f"--data - --out - --device cuda {flags}"))
    args = train.decide_settings(args, config)
    monkeypatch.setattr(train, "available_memory", lambda: (needed + 0.01) * 2**30)
    assert train.fit(args).offload == (shape == LLAMA2_70B)
    monkeypatch.setattr(train, "available_memory", lambda: max(needed - 0.01, 0) * 2**30)
    if not needed:
        assert train.fit(args)
        return
    with pytest.raises(InputError, match=f"{needed:.2f} GiB of host memory") as error:
        train.fit(args)
    advice = re.search(r"free; (.*) needs less", str(error.value))[1]
    assert advice == expected
    if expected.startswith("--"):  # what is advised is enough
        args = train.flag_parser().parse_args(shlex.split(f"--data - --out - --device cuda {flags} {advice}"))
        train.fit(train.decide_settings(args, config))


def sharded_process(rank: int, folder: str) -> None:
    """One of three processes with somebody's own FSDP loop, and one without: whether the weights that they train are
    equal, and whether each process can load its optimizer's own state_dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (3,))
    torch.manual_seed(0)
    # A tall weight, a wide one, and one of which a process has no rows; all gradients are of rank 2
    first = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5), nn.Linear(5, 2))
    x, as_one, same = torch.randn(4, 7), [], []
    for in_backward in (False, True):
        trained = []
        for model in (copy.deepcopy(first), fully_shard(copy.deepcopy(first), mesh=mesh)):
            kinds = [[p for p in model.parameters() if p.dim() == dim] for dim in (2, 1)]
            groups = [{"params": kinds[0], "rank": 1, "update_gap": 2, "residual": True}, {"params": kinds[1]}]
            optimizer = ProjectedAdam(groups, lr=1e-2, in_backward=in_backward)
            for _ in range(3):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
            trained.append([owlore.whole(p.detach()) for p in model.parameters()])
        as_one += [torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(*trained)]
        whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))["state"]
        shapes = {name: state["exp_avg"].shape for name, state in whole.items() if name.endswith("bias")}
        same.append(shapes == {f"{n}.bias": m.bias.shape for n, m in enumerate(first)})
        other = ProjectedAdam(groups, lr=1e-2)
        other.load_state_dict(optimizer.state_dict())
        same += [
            torch.equal(owlore.own(v), owlore.own(other.state[p][k]))
            for p, s in optimizer.state.items()
            for k, v in s.items()
            if k != "step"
        ]
    refused = []
    for placement in (Shard(1), Replicate()):
        weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [placement]))
        try:
            ProjectedAdam([weight], lr=1e-2)
        except ValueError as error:
            refused.append("by rows" in str(error))
    torch.save((as_one, same, refused), Path(folder) / f"{rank}.pt")
    os._exit(0)


def test_anybodys_sharded_weights_are_trained_like_whole_ones_and_other_shardings_are_refused(tmp_path):
    processes = [SERVER.Process(target=sharded_process, args=(rank, str(tmp_path))) for rank in range(3)]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        process.join(60)
        as_one, same, refused = torch.load(tmp_path / f"{rank}.pt")
        assert as_one == [True] * 12 and len(same) == 44 and all(same) and refused == [True, True]


def test_more_processes_than_rows_are_refused(base, tmp_path):
    codes, text = start_joined(f"{base} --batch-size 2 --out {tmp_path / 'a'}", 3)
    assert codes[0] == 2 and text.count("fewer rows than the 3 processes") == 1 and "Traceback" not in text


def test_only_the_newest_checkpoints_are_kept(base, tmp_path):
    train_run(f"{base} --save-every 2 --steps 9 --out {tmp_path / 'run'} --keep 2")
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step-0000008", "step-0000009"]
    assert (tmp_path / "run/model").resolve() == tmp_path / "run/checkpoints/step-0000009/model"


def test_what_a_killed_save_left_does_not_count_as_a_checkpoint(checkpoint, tmp_path):
    out, model, files = tmp_path / "run", load_model(checkpoint), data.tokenizer_files(checkpoint)
    for name in ("step-0000010.tmp", "step-0000025"):  # half written; whole, but never linked
        (out / "checkpoints" / name / "state").mkdir(parents=True)
    for step in (10, 20, 23):
        train.save_checkpoint(out, settings_of("--keep", 1, "--ckpt", checkpoint), model, files, {"step": step})
        assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{step:07}"]
        assert train.load_state(out)["step"] == step
    (out / "checkpoints/step-0000023-copy-1").mkdir()  # the user's
    train.save_checkpoint(out, settings_of("--keep", 1, "--ckpt", checkpoint), model, files, {"step": 30})
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-0000030", "step-0000023-copy-1"}
    assert train.load_state(out)["step"] == 30
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(InputError, match="gone"):
        train.load_state(out)


@pytest.mark.parametrize(
    "flags, expected",
    [([], (1, 3)), (["--epochs", "1"], (1, None)), (["--epochs", "2"], (2, None)), (["--steps", "9"], (1, 9))],
)
def test_a_resumed_run_is_as_long_as_was_asked_last(flags, expected, checkpoint, tmp_path, monkeypatch):
    begun = settings_of("--steps", 3, "--ckpt", str(checkpoint))
    (tmp_path / "args.json").write_text(json.dumps(vars(begun) | {"resume": False}))
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(tmp_path), *flags])
    args = train.read_settings(train.flag_parser())
    assert (args.epochs, args.steps) == expected


def test_a_run_that_was_copied_with_its_links_followed_is_refused_in_one_line(base, tmp_path):
    train_run(f"{base} --steps 2 --save-every 1 --out {tmp_path / 'a'}")
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # as scp -r and cp -L do
    line = f"--resume --out {tmp_path / 'b'} --steps 3"
    assert_refused(cli(line), "a folder where a run has a link")
    for name in ("latest", "model", "state"):
        shutil.rmtree(tmp_path / "b" / name)
    code, _, error = cli(line)
    assert code == 0, error


def test_out_is_refused_before_what_takes_long(base, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    monkeypatch.setattr(train, "score_layers", None)
    monkeypatch.setattr(train, "evaluate", None)
    for name, problem in (("file", "is a file"), ("link", "link to nothing"), ("full", "holds files already")):
        assert_refused(cli(f"{base} --steps 1 --out {tmp_path / name}"), problem)
    assert_refused(cli("--resume"), "give by --out the folder")


def test_two_runs_do_not_share_a_folder(base, tmp_path):
    out = tmp_path / "run"
    train_run(f"{base} --steps 2 --out {out}")
    args = train.argparse.Namespace(**json.loads((out / "args.json").read_text()) | {"resume": True})
    with train.claim(args):
        code, output = start_cli(f"--resume --out {out}")
        assert code == 2 and "another run" in output


def test_what_is_not_trained_by_may_change_on_resume(base, checkpoint, jsonl, tmp_path):
    """Checkpoint and data may have moved, and less memory be there."""
    out = tmp_path / "run"
    train_run(f"{base} --steps 4 --save-every 2 --out {out}")
    for path in (checkpoint, jsonl):
        path.rename(tmp_path / f"moved-{path.name}")
    moved = f"--data {tmp_path / f'moved-{jsonl.name}'}"
    code, _, error = cli(f"--resume --out {out} --steps 6 {moved} --micro-batch-size 2 --eval-every 1")
    assert code == 0, error
    assert [row["step"] for row in read_metrics(out) if "lr" in row] == [1, 2, 3, 4, 5, 6]


def test_other_validation_data_on_resume_is_measured_anew(base, checkpoint, jsonl, tmp_path):
    """A loss that is far above what was measured on the old data is not taken for one of a run that diverged."""
    out, other = tmp_path / "run", tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a", "completion": " \u65e5\u672c"}')
    train_run(f"{base} --steps 4 --val-data {jsonl} --out {out}")
    (path,) = out.glob("checkpoints/*/state/state.pt")
    torch.save(torch.load(path) | {"limit": 0.1}, path)
    (path.parent.parent / "checksums.json").write_text(json.dumps(train.checksums(path.parent.parent)))
    code, _, error = cli(f"--resume --out {out} --steps 8")
    assert code == 2 and "diverged" in error
    code, text, error = cli(f"--resume --out {out} --steps 8 --val-data {other}")
    assert code == 0 and "step 4: validation loss" in text and "before" not in text, error
    rows = read_metrics(out)
    begun = [row for row in rows if row["step"] == 4 and "val_loss" in row]
    assert len(begun) == 2 and begun[1]["val_loss"] != begun[0]["val_loss"]
    code, text, _ = cli(f"--ckpt {out / 'model'} --val-data {other} --eval-only")
    assert code == 0 and f"{rows[-1]['val_loss']:.4f}" in text


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux shows what is mapped")
@pytest.mark.parametrize("flags", ["--active 1", "--method lora"])
def test_a_checkpoint_that_was_removed_gives_back_its_room(flags, base, tmp_path, monkeypatch):
    """What a run was resumed from is not mapped any more when it is gone."""
    out, maps, save = tmp_path / "run", [], train.save_checkpoint
    train_run(f"{base} --steps 2 {flags} --keep 1 --out {out}")

    def save_and_look(*args):
        save(*args)
        maps.append(Path("/proc/self/maps").read_text())

    monkeypatch.setattr(train, "save_checkpoint", save_and_look)
    train_run(f"--resume --out {out} --steps 4")
    assert len(maps) == 1 and str(out) not in maps[0]


def test_a_run_leaves_alone_what_is_not_its_own(base, tmp_path):
    out = tmp_path / "run"
    train_run(f"{base} --steps 2 --out {out}")
    shutil.copytree(out / "checkpoints/step-0000002", out / "checkpoints/best")
    (out / "checkpoints/.DS_Store").write_text("")
    half = out / "checkpoints/step-0000003.tmp"
    half.mkdir()
    train_run(f"--resume --out {out} --steps 9 --save-every 1 --keep 1")
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {"step-0000009", "best", ".DS_Store"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes").write_text("mine")
    assert_refused(cli(f"{base} --resume --out {tmp_path / 'other'}"), "holds files")


def test_contradicting_flags_and_changed_data_are_refused_on_resume(base, jsonl, tmp_path):
    out = tmp_path / "run"
    train_run(f"{base} --steps 5 --out {out}")
    assert cli(f"{base} --steps 5 --resume --out {out}")[0] == 0  # the same flags again are fine
    assert_refused(cli(f"--resume --out {out} --lr 1"), "--lr 1.0")
    assert_refused(cli(f"--resume --out {out} --ckpt {tmp_path / 'elsewhere'}"), "--ckpt")
    assert_refused(cli(f"--resume --out {out} --eval-only"), "--eval-only")
    saved = json.loads((out / "args.json").read_text())
    for damaged in ([1], {"ckpt": 1}, saved | {"no_flag": 1}):
        (out / "args.json").write_text(json.dumps(damaged))
        assert_refused(cli(f"--resume --out {out}"), "args.json")
    (out / "args.json").write_text(json.dumps(saved))
    jsonl.write_text(jsonl.read_text().replace("and", "or"))
    assert_refused(cli(f"--resume --out {out}"), "--data")
    assert_refused(cli(f"--resume --out {tmp_path / 'none'}"), "--resume")


def test_steps_that_are_not_finite_are_skipped_and_end_the_run_when_many(monkeypatch, base, tmp_path):
    forward, calls = Transformer.forward, []

    def poisoned(self, tokens, targets=None, *args, **kwargs):
        loss = forward(self, tokens, targets, *args, **kwargs)
        calls.append(self.training and targets is not None)
        return loss * math.nan if self.training and (sum(calls) in bad or sum(calls) > 24 and -1 in bad) else loss

    monkeypatch.setattr(Transformer, "forward", poisoned)
    line = f"{base} --steps 30 --save-every 5 --update-gap 1 --active 1 --out"
    bad = {1, 3, 7}
    code, text, output = cli(f"{line} {tmp_path / 'few'}")
    rows = [r for r in read_metrics(tmp_path / "few") if "loss" in r]
    assert code == 0 and rows[-1]["skipped"] == 3 and "3 skipped" in output
    assert all(torch.isfinite(p).all() for p in load_model(tmp_path / "few/model").parameters())
    bad = {-1}
    calls.clear()
    code, _, output = cli(f"{line} {tmp_path / 'many'}")
    assert code == 2 and "diverged" in output and "step-0000020 is kept" in output
    assert (tmp_path / "many/model").resolve().parent.name == "step-0000020"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_running_out_of_memory_says_what_would_help(error, monkeypatch, base, tmp_path):
    def too_much(*_):
        raise error

    monkeypatch.setattr(train, "training_step", too_much)
    code, _, output = cli(f"{base} --out {tmp_path / 'run'}")
    assert code == 2 and "--micro-batch-size" in output and "Traceback" not in output


def test_long_records_are_cut_counted_and_reported(checkpoint, tmp_path):
    rows = [{"prompt": "word " * 300, "completion": " end"}] * 3 + [{"prompt": "a", "completion": " b"}] * 30
    rows += [{"prompt": "", "completion": "word " * 300}] * 2
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    line = f"--ckpt {checkpoint} --data {file} --val-data {file} --steps 1 --seq-len 64 --out {tmp_path / 'run'}"
    code, text, error = cli(line)
    assert code == 0 and "of 35 records 3 had their prompt cut" in text and "2 their completion" in text, error


# Bad input: one line on stderr that names the file or flag, exit code 2, and nothing touched


def small_vocabulary(path: Path) -> None:
    edit_json(path / "params.json", vocab_size=50)
    names, state = ("tok_embeddings.weight", "output.weight"), torch.load(path / "consolidated.00.pth")
    edit_tensors(path, **{name.replace(".", "__"): state[name][:50].clone() for name in names})


def test_another_end_of_text_in_config_json_is_told(checkpoint):
    args, file = SimpleNamespace(device="cpu", dtype=None), checkpoint / "config.json"
    with no_warning():
        for ends in ([77, 2], 2, None):
            file.write_text(json.dumps({"eos_token_id": ends}))
            model_module.load(checkpoint, args)
    file.write_text('{"eos_token_id": 77}')
    with pytest.warns(UserWarning, match="in token 2 .* config.json says 77"):
        model_module.load(checkpoint, args)
    file.unlink()
    file = checkpoint / "tokenizer_config.json"
    for same in ({"eos_token": "</s>"}, {"eos_token": {"content": "</s>"}}, {"eos_token": None}, {}):
        file.write_text(json.dumps(same))
        with no_warning():
            model_module.load(checkpoint, args)
    file.write_text('{"eos_token": {"content": "<|im_end|>"}}')
    with pytest.warns(UserWarning, match=r"in token 2 .* tokenizer_config.json says <\|im_end\|>"):
        model_module.load(checkpoint, args)


@pytest.mark.parametrize("name, mark", [("tiny", "</s>"), ("llama3", "<|eot_id|>")])
def test_special_tokens_that_are_spelt_out_are_told(name, mark):
    tokenizer = load_tokenizer(tokenizer_folder(name))
    records = [data.Record([("a", "b"), ("c", f"d{mark}")]), data.Record([("", "e")], plain=True)]
    with pytest.warns(UserWarning, match=f"1 records spell out a special token, as {re.escape(mark)}"):
        data.Dataset(records, tokenizer, 16)
    records[1] = data.Record([("", "<b> x[0] <|im_start|> [INST]")], plain=True)  # none of its
    with no_warning():
        data.Dataset(records[1:], tokenizer, 16)


BAD_FOLDERS = {
    "without tokenizer": (lambda p: (p / "tokenizer.model").unlink(), "tokenizer.model"),
    "damaged tokenizer": (lambda p: truncate(p / "tokenizer.model", 0.5), "tokenizer"),
    "another model's tokenizer": (small_vocabulary, "tokenizer"),
    **{case: BAD_CHECKPOINTS[case] for case in ("empty", "truncated pth", "pth that runs code", "other architecture")},
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_train_refuses_a_bad_checkpoint(case, base, monkeypatch, checkpoint, tmp_path):
    monkeypatch.chdir(tmp_path)
    damage, names = BAD_FOLDERS[case]
    damage(checkpoint)
    before = snapshot(tmp_path)
    assert_refused(cli(f"{base} --out {tmp_path / 'run'}"), names)
    assert snapshot(tmp_path) == before and not (tmp_path / "code-was-run").exists()


@pytest.mark.parametrize("name, content, names", [
    ("empty.txt", b"", "empty"),
    ("blank.json", b" \n ", "empty"),
    ("latin.txt", "Grüße".encode("latin-1") * 100, "UTF-8"),
    ("lines.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": oops}\n', "line 3"),
    ("list.json", b'[\n{"text": "a"},\n{"text": "b"\n]', "line 4"),
    ("unknown.jsonl", b'{"text": "a"}\n{"question": "b"}\n', "line 2"),
    ("table.csv", b"a,b\n1,2\n", "CSV"),
    ("table.parquet", b"PAR1", "Parquet"),
    ("weights.pth", b"PK", "weights"),
    ("blank.jsonl", b'{"prompt": "a", "completion": ""}\n', "with anything to learn"),
    ("numbers.json", b"[1, 2]", "record 1"),
    ("types.json", b'[{"text": "a"}, {"text": 3}]', "record 2"),
    ("none.json", b"[]", "no records"),
    ("typed.json", b'{"type": "images", "instances": []}', "type"),
    ("choices.jsonl", b'{"prompt": "a", "choices": ["b", "c"], "answer": 7}\n', "answer"),
    ("chat.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}\n', "anything to learn"),
    ("short.txt", b"a", "short"),
    ("single.jsonl", b'{"prompt": "a", "completion": "b"}\n', "one record"),
    ("deep.json", b"[" * 100000, "line 1"),
    ("half.jsonl", b'{"prompt": "a", "completion": "b"}\n{"text": "half a pair: \\ud800"}\n', "line 2"),
])  # fmt: skip
def test_bad_data_is_refused(name, content, names, checkpoint, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert_refused(cli(f"--ckpt {checkpoint} --data {tmp_path / name} --out {tmp_path / 'run'}"), names)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [
    "--ckpt nowhere", "--data nothing.txt", "--active 4", "--active 0", "--rank -1", "--rank 0 --method lora", "--rank many",
    "--seq-len 257", "--device cuda:77", "--device abacus", "--method magic", "--active 2 --method galore",
    "--interval 2 --method full", "--lora-alpha 2 --method owlore", "--embeddings frozen --embeddings-lr-ratio 1",
    "--norms-lr-ratio 1 --method lora", "--residual --method lisa", "--residual --rank 0", "--sampling uniform", "--interval 3",
    "--lr nan", "--lr inf", "--lr 0", "--threshold -1",
    "--batch-size 0", "--scale nan", "--weight-decay -1", "--sped 1", "--seed -1", "--lr 1e300",
    "--seed 100000000000000000000", "--rank 65 --method lora", "--micro-batch-size 5",
])  # fmt: skip
def test_bad_flags_are_refused(flags, base, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    flag, value, *_ = flags.split()
    assert_refused(cli(f"{base} --out {tmp_path / 'run'} {flags}"), value if flag in ("--ckpt", "--data") else flag)
    assert snapshot(tmp_path) == before


COMMANDS = {"train": train.main, "owlore": train.show_layers, "model": model_module.main}


@pytest.mark.parametrize("name", COMMANDS)
def test_numbers_out_of_range_are_refused_in_every_command(name, checkpoint, jsonl, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = re.findall(r"(--[\w-]+) [A-Z_]{2,}\b", cli("--help", COMMANDS[name])[1])
    words = {"--ckpt", "--data", "--val-data", "--out", "--prompt", "--device", "--export"}
    assert len(numbers := set(flags) - words) == {"train": 21, "owlore": 1, "model": 4}[name]
    line = f"--ckpt {checkpoint}" + f" --data {jsonl}" * (name != "model")
    for flag in sorted(numbers):
        for value in ("nan", "inf", "-1", "1" + "0" * 20, "many", "9999" if flag == "--threshold" else "-0.5"):
            assert_refused(cli(f"{line} {flag}={value}", COMMANDS[name]), flag)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file, kind", [("a.pth", "weights"), ("a.parquet", "Parquet"), ("notes.txt", "a file")])
def test_a_file_that_is_no_checkpoint_is_named_for_what_it_is(name, file, kind, tmp_path):
    (tmp_path / file).write_text("x")
    assert_refused(cli(f"--ckpt {tmp_path / file}" + " --data x" * (name == "train"), COMMANDS[name]), kind)


def test_evaluating_asks_for_validation_data(checkpoint):
    assert_refused(cli(f"--ckpt {checkpoint} --eval-only"), "--val-data")


def test_the_progress_line_fits_80_columns(base, monkeypatch, tmp_path):
    for name, value in (("COLUMNS", "80"), ("LINES", "25")):
        monkeypatch.setenv(name, value)
    _, text, error = cli(f"{base} --steps 4 --active 2 --out {tmp_path / 'run'}")
    lines = [line for line in re.split(r"[\r\n]", error) if "tok/s" in line]
    assert lines and max(map(len, lines)) < 80
    assert re.search(r"loss \d+\.\d{3} lr \d\.\de-0\d [\d,]+ tok/s layers \d,\d .* 4/4 ", lines[-1])
    row = {"loss": 13.604, "lr": 3e-4, "tokens_per_second": 123456, "skipped": 10}
    for active, layers in (
        ([3, 14, 17, 20, 31], "layers 3,14,17,20,31"),
        (range(24), "24 of 32 layers"),
        (range(32), "all layers"),
    ):
        words = train.progress(row | {"active": list(active)}, 32)
        assert layers in words and len(words) < 70


def test_a_high_loss_before_training_is_explained(base, monkeypatch, tmp_path, capsys):
    ways = {
        "--embeddings frozen": "--embeddings projected --embeddings-lr-ratio 1",
        "--embeddings full": "--embeddings-lr-ratio 1",
        "--rank 0 --embeddings frozen": "--embeddings full",
        "--method lora": "--embeddings projected",
        "--embeddings-lr-ratio 1": "",
        "--method galore": "",
    }
    for flags, says in ways.items():
        for loss, high in ((6.3, True), (6.2, False)):  # a uniform guess: ln 512 = 6.24
            train.comment(loss, 512, settings_of(*flags.split()))
            text = capsys.readouterr().out
            assert ("uniform guess" in text) == high
            assert (re.findall(r"better with (.*) \(", text) == [says]) == bool(high and says)
        settings_of(*flags.split(), *says.split())  # is not refused
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": math.nan})
    assert_refused(cli(f"{base} --steps 1 --out {tmp_path / 'b'}"), "its loss is")


def test_sizes_are_told_in_units_that_show_them():
    assert [train.in_words(n) for n in (2**20, 2**30 // 50, 3 * 2**30)] == ["1.00 MiB", "0.02 GiB", "3.00 GiB"]


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_export_is_a_copy_in_hugging_faces_layout(layout, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = build(vocab_size=load_tokenizer(TINY).vocab_size).bfloat16()
    save_model(model, source, layout)
    data.copy_tokenizer(TINY, source)
    code, text, error = cli(f"--ckpt {source} --export {out}", model_module.main)
    assert code == 0 and str(out) in text and (out / "config.json").exists(), error
    assert_same_model(out, model)
    assert load_tokenizer(out).encode("a b") == load_tokenizer(TINY).encode("a b")
    before = snapshot(out)
    (source / "tokenizer.model").unlink()
    assert_refused(cli(f"--ckpt {source} --export {tmp_path / 'new'}", model_module.main), "tokenizer.json")
    assert not (tmp_path / "new").exists()
    assert_refused(cli(f"--ckpt {TINY} --export ''", model_module.main), "name a folder")
    assert_refused(cli(f"--ckpt {TINY} --export {out}", model_module.main), "holds a checkpoint")
    assert snapshot(out) == before


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_continuation_stops_where_hugging_faces_settings_say(file, tmp_path):
    """As a chat model may end in one of several tokens."""
    model, tokenizer = build(vocab_size=load_tokenizer(TINY).vocab_size, max_seq_len=256), load_tokenizer(TINY)
    save_model(model, tmp_path, "hf")
    data.copy_tokenizer(TINY, tmp_path)
    line = f"--ckpt {tmp_path} --prompt hi --max-new-tokens 8"
    ids = torch.tensor(tokenizer.encode("hi"))
    new = generate(model, ids, 8)[len(ids) :].tolist()
    assert cli(line, model_module.main)[1].strip() == tokenizer.decode([*ids, *new]).strip()
    (tmp_path / file).write_text(json.dumps(data.read_json(tmp_path / "config.json") | {"eos_token_id": [2, new[3]]}))
    first = new.index(new[3])
    assert cli(line, model_module.main)[1].strip() == tokenizer.decode([*ids, *new[:first]]).strip()


def test_a_prompt_that_is_not_utf8_is_refused_in_one_line(checkpoint):
    assert_refused(cli(f"--ckpt {checkpoint} --prompt caf\udce9", model_module.main), "--prompt")


def test_weights_that_are_not_finite_are_told(checkpoint, jsonl):
    edit_tensors(checkpoint, norm__weight=torch.full((64,), math.nan))
    assert_refused(cli(f"--ckpt {checkpoint} --val-data {jsonl} --eval-only"), "its loss is nan")
    for flags in ("", "--temperature 1"):
        assert_refused(cli(f"--ckpt {checkpoint} --prompt hi {flags}", model_module.main), "not finite")


@pytest.mark.parametrize("command", ["model.py --prompt \u00e9 --max-new-tokens 1", "owlore.py --data {data}"])
def test_a_terminal_that_knows_only_ascii_is_enough(command, checkpoint, jsonl):
    command = [sys.executable, *command.format(data=jsonl).split(), "--ckpt", checkpoint, "--device", "cpu"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, cwd=TINY.parent)
    assert done.returncode == 0 and b"\\" in done.stdout, done.stderr


def test_a_tokenizer_without_bos_needs_a_prompt(checkpoint, monkeypatch):
    monkeypatch.setattr(data.SentencePieceTokenizer, "bos_id", property(lambda _: -1, lambda *_: None), raising=False)
    assert_refused(cli(f"--ckpt {checkpoint}", model_module.main), "--prompt")


def test_a_prompt_can_be_an_instruction(checkpoint):
    _, text, _ = cli(f"--ckpt {checkpoint} --prompt 'add two' --instruct --max-new-tokens 1", model_module.main)
    assert text.startswith(data.alpaca_prompt("add two"))


@pytest.mark.parametrize("package", ["matplotlib", "tokenizers", "tiktoken"])
def test_what_does_not_need_an_optional_package_works_without_it(package, base, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    assert len(train_run(f"{base} --steps 1 --out {tmp_path / 'run'}")) == 3
    plot = [
        sys.executable,
        "-c",
        "import sys; sys.modules['matplotlib'] = None; sys.argv = sys.argv[1:]; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')",
    ]
    if package == "matplotlib":
        script = Path(__file__).parent / "bench/plot.py"
        done = subprocess.run([*plot, script, tmp_path / "run"], capture_output=True, text=True)
        assert done.returncode and "pip install matplotlib" in done.stderr and "Traceback" not in done.stderr
    else:
        name = {"tokenizers": "tokenizer.json", "tiktoken": "ranks"}[package]
        (tmp_path / name).write_bytes(b"{}" if package == "tokenizers" else b"IQ== 0\n")
        with pytest.raises(InputError, match=f"pip install {package}"):
            load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_shown(name):
    code, text, _ = cli("--help", COMMANDS[name])
    assert code == 0 and "--ckpt" in text


@pytest.mark.parametrize("method", train.METHODS)
def test_the_memory_benchmark_counts_the_state_of_every_method(method, monkeypatch):
    """bench/memory.py, beside the optimizer's state written out: two moments in fp32, of R and with P if projected."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    import memory

    monkeypatch.setattr(memory, "DRAWS", 1)
    config = ModelConfig(dim=64, n_layers=2, n_heads=4, vocab_size=100)
    flags = f"--ckpt - --data - --method {method} --rank 8 --batch-size 2 --seq-len 8 --device cpu"
    if train.METHODS[method].sampling:
        flags += " --active 1 --residual --embeddings full" if method == "owlore" else " --active 1 --embeddings full"
    args = train.decide_settings(train.flag_parser().parse_args(flags.split()), config)
    args.recompute, args.micro_batch_size = True, 1
    counted = memory.measure(config, args)
    shapes = [(64, 64)] * 4 + [(config.hidden_dim, 64)] * 3
    ends, norms = 8 * (2 * 100 * 64 + 64), 8 * 2 * 64
    layer = {
        "full": sum(8 * m * n for m, n in shapes) + norms,
        "galore": sum(4 * 8 * (2 * max(m, n) + min(m, n)) for m, n in shapes) + norms,
        "lora": sum(8 * 8 * (m + n) for m, n in shapes),
    }
    lengths = sum(4 * (max(shape) + 1) for shape in shapes)  # of the rows of N, and the residual's norm
    layer |= {"lisa": layer["full"], "owlore": layer["galore"] + lengths}
    trained = 1 if train.METHODS[method].sampling else 2
    assert counted["state"] == trained * layer[method] + ends * (method != "lora")
    assert counted["predicted"] > counted["weights"] + counted["state"]


@pytest.mark.parametrize("flags", ["", "--method full"])
def test_host_memory_is_estimated_as_it_is_counted(flags, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "bench")
    import memory

    monkeypatch.setattr(memory, "DRAWS", 1)
    config = ModelConfig(dim=64, n_layers=2, n_heads=4, vocab_size=128)  # powers of two, which pinning leaves alone
    shape = "--batch-size 4 --micro-batch-size 1 --seq-len 8 --offload --embeddings full"
    args = memory.settings([*shape.split(), *flags.split()], config)
    result = memory.measure(config, args)
    assert result["pinned"] == pytest.approx(result["host"], rel=0.02)


def test_a_folder_that_cannot_be_made_is_named(base, tmp_path):
    (tmp_path / "file").write_text("")
    for out, names in ((tmp_path / ("x" * 300), "too long"), (tmp_path / "file/run", "file/run")):
        assert_refused(cli(f"{base} --out {out} --steps 1"), names)


def test_an_existing_run_is_not_overwritten(base, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert_refused(cli(f"{base} --out {tmp_path / 'run'}"), "--out")
    assert snapshot(tmp_path / "run") == {tmp_path / "run" / "notes.txt": b"mine"}
