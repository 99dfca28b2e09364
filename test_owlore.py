"""What this project promises, as tests: model.py, data.py, owlore.py, train.py, and what bad input leads to.

    pytest -q test_owlore.py

Tests that read the data in ../shared, or need an optional package, skip where it is absent.
"""

import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import model as model_module
import owlore
import train
from data import InputError, build_dataset, encode_turn, fit, load_records, load_tokenizer, parse_record, split_records
from model import (
    KVCache,
    ModelConfig,
    Transformer,
    generate,
    load_model,
    read_safetensors,
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

SHARED = Path(__file__).parent.parent / "shared"
STORIES = SHARED / "checkpoints" / "stories260K"
TINY = Path(__file__).parent / "tiny"
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


def random_tokens(*shape: int, vocab: int = 101, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# model.py


def reference_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """The architecture written out for one sequence [T]: complex rotations, one head at a time, an explicit mask."""
    c, w = model.config, {name: p.double() for name, p in model.state_dict().items()}
    T = len(tokens)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    frequencies = []
    for i in range(c.head_dim // 2):
        f = c.rope_theta ** (-2 * i / c.head_dim)
        if c.use_scaled_rope:  # as Meta states it, in wavelengths
            wavelength = 2 * math.pi / f
            low, high = (
                c.rope_original_length / c.rope_low_freq_factor,
                c.rope_original_length / c.rope_high_freq_factor,
            )
            if wavelength > low:
                f = f / c.rope_scaling_factor
            elif wavelength > high:
                smooth = (c.rope_original_length / wavelength - c.rope_low_freq_factor) / (
                    c.rope_high_freq_factor - c.rope_low_freq_factor
                )
                f = (1 - smooth) * f / c.rope_scaling_factor + smooth * f
        frequencies.append(f)
    angles = torch.arange(T).double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)  # [T, head_dim / 2]

    x = w["tok_embeddings.weight"][tokens]
    for n in range(c.n_layers):
        at = f"layers.{n}."
        y = norm(x, w[at + "attention_norm.weight"])
        q, k, v = (y @ w[f"{at}attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        heads = []
        for h in range(c.n_heads):
            g = h // (c.n_heads // c.n_kv_heads)
            qh, kh, vh = (t[:, i * c.head_dim : (i + 1) * c.head_dim] for t, i in ((q, h), (k, g), (v, g)))
            qh, kh = (
                torch.view_as_real(torch.view_as_complex(t.reshape(T, -1, 2)) * turn).flatten(1) for t in (qh, kh)
            )
            scores = qh @ kh.T / math.sqrt(c.head_dim)
            for i in range(T):
                for j in range(T):
                    if j > i or (c.sliding_window and i - j >= c.sliding_window):
                        scores[i, j] = -math.inf
            heads.append(scores.softmax(-1) @ vh)
        x = x + torch.cat(heads, 1) @ w[at + "attention.wo.weight"].T
        y = norm(x, w[at + "ffn_norm.weight"])
        gate, up = y @ w[at + "feed_forward.w1.weight"].T, y @ w[at + "feed_forward.w3.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[at + "feed_forward.w2.weight"].T
    head = w["tok_embeddings.weight"] if c.tie_word_embeddings else w["output.weight"]
    return norm(x, w["norm.weight"]) @ head.T


@pytest.mark.parametrize("family", CONFIGS)
def test_forward_equals_the_architecture_written_out(family):
    model, tokens = build(family), random_tokens(40)
    logits = model(tokens[None])[0]
    # fp32 against fp64: a few dozen roundings of 6e-8 on logits of the order of 3
    torch.testing.assert_close(logits.double(), reference_logits(model, tokens), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("pieces", [[1] * 20, [13, 1, 6], [20]])
def test_cached_forward_equals_uncached(family, pieces):
    model, tokens = build(family), random_tokens(2, 20)
    cache = KVCache(20)
    cached = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(cached, model(tokens), atol=1e-5, rtol=0)  # other matmul shapes: fp32 rounding


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_greedy_generation_takes_the_likeliest_token_each_time(family):
    model, tokens = build(family), random_tokens(2, 5)
    out = generate(model, tokens, 12)
    expected = tokens
    for _ in range(12):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(1, keepdim=True)], 1)
    assert out.tolist() == expected.tolist()
    assert generate(model, tokens[0], 12).tolist() == expected[0].tolist()


def test_sampled_generation_follows_the_nucleus():
    model = build()
    logits = model(random_tokens(1, 4))[0, -1]
    probabilities, order = (logits / 0.7).softmax(0).sort(descending=True)
    nucleus = order[: int((probabilities.cumsum(0) < 0.5).sum()) + 1].tolist()
    torch.manual_seed(0)
    drawn = generate(model, random_tokens(1, 4).expand(500, -1), 1, temperature=0.7, top_p=0.5)[:, -1]
    assert set(drawn.tolist()) == set(nucleus)


def test_generation_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="context"):
        generate(build(), random_tokens(1, 100), 29)


@pytest.mark.parametrize("chunk", [101, 700, 10**6])
def test_chunked_loss_equals_cross_entropy(monkeypatch, chunk):
    monkeypatch.setattr(model_module, "CHUNK", chunk)
    model, tokens, targets = build(), random_tokens(3, 17), random_tokens(3, 17, seed=2)
    targets[:, :5] = -100
    loss = model(tokens, targets)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    plain.backward()
    torch.testing.assert_close(loss, plain, atol=1e-6, rtol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-6, rtol=1e-5)


def test_loss_without_any_target_is_zero():
    model = build()
    loss = model(random_tokens(1, 5), torch.full((1, 5), -100))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_recomputed_blocks_give_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = build()
        model.checkpoint_blocks = checkpointing
        model(random_tokens(2, 9), random_tokens(2, 9, seed=2)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("checkpointing", (False, True))
def test_compiled_frozen_blocks_give_the_same_gradients(checkpointing, monkeypatch):
    # Inductor, torch's own code generator, would need a C++ compiler: what is tested here is the graph it would get.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    plain, compiled = build(), build()
    compiled.compile_frozen_blocks()
    for active, length in ((0, 9), (2, 9), (1, 7), (1, 12)):
        losses = []
        for model in (plain, compiled):
            model.checkpoint_blocks = checkpointing
            model.zero_grad()
            for n, layer in enumerate(model.layers):
                layer.requires_grad_(n == active)
            loss = model(random_tokens(2, length), random_tokens(2, length, seed=2))
            loss.backward()
            losses.append(loss.item())
        # the same operations, though fused products may round differently
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        for p, q in zip(plain.parameters(), compiled.parameters()):
            assert (p.grad is None) == (q.grad is None) == (not p.requires_grad)
            if p.requires_grad:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_and_hf_saves_load_bit_for_bit(family, dtype, tmp_path):
    model, tokens = build(family).to(dtype), random_tokens(2, 30)
    for layout in ("meta", "hf"):
        save_model(model, tmp_path / layout, layout)
        loaded = load_model(tmp_path / layout, dtype=dtype)
        assert loaded.config == model.config or layout == "hf"
        assert torch.equal(loaded(tokens), model(tokens))
        assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("rows", [False, True], ids=["llama2-columns", "llama3-rows"])
def test_sharded_meta_checkpoint_equals_the_whole(rows, tmp_path):
    model = build(vocab_size=102)
    save_model(model, tmp_path, "meta")
    whole = torch.load(tmp_path / "consolidated.00.pth")
    params = json.loads((tmp_path / "params.json").read_text()) | {"vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(params))
    for shard in range(2):
        part = {"rope.freqs": torch.ones(8)}
        for name, tensor in whole.items():
            if name.endswith("norm.weight"):
                part[name] = tensor
            elif name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok") and not rows):
                part[name] = tensor.chunk(2, 1)[shard].clone()
            else:
                part[name] = tensor.chunk(2, 0)[shard].clone()
        torch.save(part, tmp_path / f"consolidated.{shard:02}.pth")
    loaded = load_model(tmp_path)
    assert loaded.config.vocab_size == 102
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in whole.items())


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The format written out: length, header, bytes."""
    header, blob = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + blob)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_hf_checkpoint_equals_the_whole(kind, tmp_path):
    model = build("llama3.1")
    save_model(model, tmp_path, "hf")
    tensors = read_safetensors(tmp_path / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for n, part in enumerate((names[:7], names[7:])):
        stored = {name: tensors[name].clone() for name in part}
        file = f"model-0000{n}-of-2.safetensors" if kind == "safetensors" else f"pytorch_model-{n}.bin"
        write_safetensors(tmp_path / file, stored) if kind == "safetensors" else torch.save(stored, tmp_path / file)
        weight_map |= {name: file for name in part}
    (tmp_path / "model.safetensors").unlink()
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(load_model(tmp_path)(random_tokens(1, 9)), model(random_tokens(1, 9)))


def test_mistral_raw_safetensors_layout_loads(tmp_path):
    model = build("mistral")
    save_model(model, tmp_path, "meta")
    write_safetensors(tmp_path / "consolidated.safetensors", torch.load(tmp_path / "consolidated.00.pth"))
    (tmp_path / "consolidated.00.pth").unlink()
    assert torch.equal(load_model(tmp_path)(random_tokens(1, 9)), model(random_tokens(1, 9)))


@pytest.mark.parametrize("version", [4, 5])
def test_config_json_is_read_in_both_spellings(version, tmp_path):
    model = build("llama3.2")
    save_model(model, tmp_path, "hf")
    config = json.loads((tmp_path / "config.json").read_text())
    drop = ("rope_parameters", "dtype") if version == 4 else ("rope_theta", "rope_scaling", "torch_dtype")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    assert torch.equal(load_model(tmp_path)(random_tokens(1, 40)), model(random_tokens(1, 40)))


@pytest.mark.parametrize("family", ["llama2", "llama3.1", "llama3.2", "mistral"])
def test_transformers_computes_the_same_logits_from_our_save(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = build(family), random_tokens(2, 40)
    save_model(model, tmp_path, "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=2e-5, rtol=0)


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


@needs_shared
def test_stories260k_tells_its_story(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model.py", "--ckpt", str(STORIES), "--max-new-tokens", "60", "--device", "cpu"])
    model_module.main()
    expected = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert capsys.readouterr().out.strip().startswith(expected)


# data.py


@needs_shared
@pytest.mark.parametrize("name, size, bos, eos", [("llama2", 32000, 1, 2), ("mistral", 32000, 1, 2), ("llama3", 128256, 128000, 128001)])  # fmt: skip
def test_real_tokenizers_round_trip(name, size, bos, eos):
    if name == "llama3":
        pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer(SHARED / "tokenizers" / name)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (size, bos, eos)
    text = "Grüße, 世界!\n\tdef f(x): return x**2  # 1234567 🙂"
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids[0] == bos and ids[-1] == eos and tokenizer.decode(ids) == text
    assert tokenizer.encode(text, bos=False) == ids[1:-1]
    assert tokenizer.encode("<|begin_of_text|></s>", bos=False)[0] != bos  # marks written out are text


@needs_shared
def test_known_token_ids():
    """Ids as published: LLaMA-2's of 'Hello world', LLaMA-3's of 'Hello world!'."""
    assert load_tokenizer(SHARED / "tokenizers/llama2").encode("Hello world") == [1, 15043, 3186]
    pytest.importorskip("tiktoken")
    assert load_tokenizer(SHARED / "tokenizers/llama3").encode("Hello world!", bos=False) == [9906, 1917, 0]


@needs_shared
@pytest.mark.parametrize(
    "path", ["tokenizers/llama2", "tokenizers/mistral", "tokenizers/llama3", "checkpoints/stories260K", None]
)
def test_a_long_text_is_tokenised_in_pieces_as_in_one(path, monkeypatch):
    if path == "tokenizers/llama3":
        pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer(SHARED / path if path else TINY)
    monkeypatch.setattr(data, "PIECE", 50)
    texts = [
        (SHARED / "data" / name).read_text()[:60000]
        for name in ("wikitext2_valid.txt", "tinyshakespeare.txt", "c4_demo.jsonl")
    ]
    texts += ["a\n\n \n b  c\t\n\td.\n\n\ne f\r\ng 12345 h\n 67890.\n" * 50, "word " * 400, "x", ""]
    for text in texts:
        assert data.encode_long(tokenizer, text).tolist() == tokenizer.encode(text, bos=False)


def test_tokens_are_kept_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "KEPT_FROM", 10)
    tokenizer = load_tokenizer(TINY)
    records = [parse_record({"prompt": f"{n} and", "choices": [" one", " two"], "answer": 0}) for n in range(9)]
    records.append(parse_record({"text": "some text " * 9}))
    built = build_dataset(records, tokenizer, 12)

    def same(a, b):
        return (
            np.array_equal(a.ids, b.ids)
            and np.array_equal(a.rows, b.rows)
            and (a.truncated, a.records) == (b.truncated, b.records)
        )

    assert same(data.load_dataset(records, tokenizer, 12), built)
    with monkeypatch.context() as patch:
        patch.setattr(data, "build_dataset", None)  # not called again
        kept = data.load_dataset(records, tokenizer, 12)
        assert same(kept, built) and isinstance(kept.ids, np.memmap)
    assert not same(data.load_dataset(records, tokenizer, 11), built)
    assert not same(data.load_dataset(records[1:], tokenizer, 12), built)
    for file in (tmp_path / "cache").rglob("*.np?"):
        file.write_bytes(file.read_bytes()[:-8])  # damaged: made anew
        assert same(data.load_dataset(records, tokenizer, 12), built)
    monkeypatch.setenv("XDG_CACHE_HOME", str(TINY / "params.json"))  # not a folder: done without
    assert same(data.load_dataset(records, tokenizer, 12), built)


@pytest.mark.parametrize("source", ["tiny", "tokenizers/llama2", "tokenizers/llama3"])
def test_a_hf_folder_says_what_its_tokenizer_is(source, tmp_path):
    """As transformers and lm-eval need it: without, they take LLaMA's tokenizer for another one."""
    if source != "tiny" and not SHARED.is_dir():
        pytest.skip("needs the data in ../shared")
    if source == "tokenizers/llama3":
        pytest.importorskip("tiktoken")
    folder = TINY if source == "tiny" else SHARED / source
    save_model(build(), tmp_path / "hf", "hf")
    data.copy_tokenizer(folder, tmp_path / "hf")
    tokenizer, config = load_tokenizer(tmp_path / "hf"), json.loads((tmp_path / "hf/config.json").read_text())
    settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    bos = "<|begin_of_text|>" if "llama3" in source else "<s>"
    assert settings["bos_token"] == bos and settings["tokenizer_class"].startswith(("Llama", "PreTrained"))
    config["eos_token_id"] = [7, 8]  # what a source says of itself is kept
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    save_model(build(), tmp_path / "again", "hf")
    data.copy_tokenizer(tmp_path / "hf", tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == [7, 8]


@needs_shared
def test_llama3_tokenizer_survives_a_million_letters():
    pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer(SHARED / "tokenizers/llama3")
    for text in ("a" * 1_000_000, " " * 1_000_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


ARC = {
    "instruction": "Choose: which is hot?\n\nAnswer1: ice Answer2: fire\n\nAnswer format: answer1/answer2",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


def test_record_types():
    alpaca = parse_record({"instruction": "Say hi", "input": "to Bo", "output": "hi Bo"})
    assert alpaca.turns[0][0].endswith("### Instruction:\nSay hi\n\n### Input:\nto Bo\n\n### Response:\n")
    assert alpaca.turns[0][1] == "hi Bo" and not alpaca.choices
    arc = parse_record(ARC)
    assert arc.choices == ["the correct answer is answer1", "the correct answer is answer2"] and arc.answer == 1
    assert parse_record({"prompt": "a", "completion": "b"}).turns == [("a", "b")]
    assert parse_record({"input": "a", "output": "b"}).turns == [("a", "b")]
    for answer in (1, "c"):
        record = parse_record({"prompt": "a", "choices": ["b", "c"], "answer": answer})
        assert record.turns == [("a", "c")] and record.choices == ["b", "c"] and record.answer == 1
    chat = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao")]
    turns = parse_record({"messages": [{"role": r, "content": c} for r, c in chat]}).turns
    assert (
        [completion for _, completion in turns] == ["hello", "ciao"]
        and "be kind" in turns[0][0]
        and "bye" in turns[1][0]
    )
    assert parse_record({"text": "abc"}).plain


def test_data_files_of_every_kind(tmp_path):
    rows = [ARC, {"prompt": "a", "completion": "b"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "typed.json").write_text(
        json.dumps({"type": "text2text", "instances": [{"input": "a", "output": "b"}] * 2})
    )
    (tmp_path / "plain.txt").write_text("hello\nworld")
    assert load_records(tmp_path / "list.json") == load_records(tmp_path / "lines.jsonl")
    assert load_records(tmp_path / "typed.json")[1].turns == [("a", "b")]
    assert load_records(tmp_path / "plain.txt")[0].turns == [("", "hello\nworld")]


@needs_shared
@pytest.mark.parametrize("file, choices", [("arc_easy_train.json", 3), ("boolq_test.json", 2)])
def test_real_multiple_choice_data(file, choices):
    for raw, record in zip(json.loads((SHARED / "data" / file).read_text()), load_records(SHARED / "data" / file)):
        assert len(record.choices) >= choices and record.choices[record.answer] == raw["output"]


class Letters:
    """A tokenizer of single characters, with pairs 'ab' merged."""

    vocab_size, bos_id, eos_id = 300, 1, 2

    def encode(self, text, bos=True, eos=False):
        ids = [ord(c) for c in text.replace("ab", chr(200))]
        return [1] * bos + ids + [2] * eos

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > 2).replace(chr(200), "ab")


def test_loss_is_on_completions_and_their_end_only():
    dataset = build_dataset([parse_record({"prompt": "xyz", "completion": "uv"})], Letters(), seq_len=20)
    tokens, targets = dataset.batch(np.array([0]))
    assert tokens[0].tolist() == [1, *map(ord, "xyzuv")]
    assert targets[0].tolist() == [-100, -100, -100, ord("u"), ord("v"), 2]


def test_a_token_across_the_border_belongs_to_the_completion():
    assert encode_turn(Letters(), "xa", "by", bos=True, eos=False) == [~1, ~ord("x"), 200, ord("y")]


def test_a_second_turn_is_context_again():
    messages = [
        {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "A"), ("user", "r"), ("assistant", "B"))
    ]
    dataset = build_dataset([parse_record({"messages": messages})], Letters(), seq_len=500)
    _, targets = dataset.batch(np.array([0]))
    assert targets[targets != -100].tolist() == [ord("A"), 2, ord("B"), 2]


@given(st.integers(0, 30), st.integers(1, 30), st.integers(2, 40))
def test_long_rows_lose_the_prompts_left(prompt, completion, length):
    row = [~1] + [~i for i in range(100, 100 + prompt)] + list(range(200, 200 + completion))
    short = fit(row, length)
    assert len(short) == min(len(row), length) and short[0] == ~1
    kept = [i for i in short[1:] if i >= 0]
    assert kept == list(range(200, 200 + min(completion, length - 1)))
    assert [~i for i in short[1:] if i < 0] == list(range(100, 100 + prompt))[prompt - (len(short) - 1 - len(kept)) :]


@given(st.text(alphabet="xyz\n", min_size=3, max_size=200), st.integers(1, 50))
def test_plain_text_rows_predict_each_token_once(text, seq_len):
    dataset = build_dataset([data.Record([("", text)], plain=True)], Letters(), seq_len)
    predicted = [t for n in range(len(dataset.rows)) for t in dataset.batch(np.array([n]))[1][0].tolist()]
    assert predicted == [ord(c) for c in text]


def test_split_keeps_every_record_once():
    records = [data.Record([("", str(n))]) for n in range(100)]
    kept, held = split_records(records, 0.05, 500, seed=0)
    assert len(held) == 5 and sorted(r.turns[0][1] for r in kept + held) == sorted(str(n) for n in range(100))


# owlore.py: scores


def brute_force_outliers(layers, inputs, threshold):
    """The definition, all at once: inputs maps each linear to its [tokens, in_features] over all batches."""
    shares = []
    for layer in layers:
        A = torch.cat([(m.weight.abs() * inputs[m].pow(2).sum(0).sqrt()).flatten() for m in layer.modules() if isinstance(m, nn.Linear)])  # fmt: skip
        shares.append((A > threshold * A.mean()).float().mean())
    return torch.stack(shares)


@pytest.mark.parametrize("threshold", [1.5, 3.0])
def test_outlier_distribution_equals_brute_force(threshold):
    torch.manual_seed(0)
    sequential = nn.Sequential(
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 8)), nn.Tanh(), nn.Linear(8, 8)
    )
    for model, layers, batches in (
        (build(), build().layers, [random_tokens(2, 11), random_tokens(3, 7, seed=3)]),
        (sequential, [sequential[0], sequential[2]], [torch.randn(5, 8), torch.randn(2, 3, 8)]),
    ):
        if isinstance(model, Transformer):
            layers = model.layers
        inputs = {m: [] for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)}
        hooks = [
            m.register_forward_pre_hook(lambda m, x, inputs=inputs: inputs[m].append(x[0].flatten(0, -2)))
            for m in inputs
        ]
        model.eval()
        for batch in batches:
            model(batch)
        for hook in hooks:
            hook.remove()
        model.train()
        expected = brute_force_outliers(layers, {m: torch.cat(x) for m, x in inputs.items()}, threshold)
        got = outlier_distribution(model, layers, batches, threshold)
        assert torch.equal(got, expected) and got.min() >= 0 and got.max() > 0
        assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_outlier_distribution_needs_batches_and_linears():
    with pytest.raises(ValueError, match="batch"):
        outlier_distribution(nn.Sequential(nn.Linear(2, 2)), [nn.Linear(2, 2)], [])
    with pytest.raises(ValueError, match="Linear"):
        outlier_distribution(nn.Sequential(nn.ReLU()), [nn.ReLU()], [torch.ones(1, 2)])


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


@given(st.lists(st.integers(0, 5), min_size=3, max_size=30).filter(lambda x: len(set(x)) > 1), st.randoms())
def test_rank_correlation_equals_spearmans(values, random):
    others = random.sample(values, len(values))
    # mean ranks by counting sort, correlated by numpy
    ranks = [[np.mean([i for i, v in enumerate(sorted(x)) if v == y]) for y in x] for x in (values, others)]
    assert owlore.rank_correlation(torch.tensor(values), torch.tensor(others)) == pytest.approx(
        np.corrcoef(ranks)[0, 1], abs=1e-5
    )


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
    for bad in (torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.nan]), torch.ones(2, 2)):
        with pytest.raises(ValueError):
            sampling_probabilities(bad)
    with pytest.raises(ValueError, match="mode"):
        sampling_probabilities(D, "random")


# owlore.py: sampling


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
        assert abs(count / 600 - share) < 0.1


def test_only_drawn_layers_require_gradients():
    layers = blocks(6)
    sampler = LayerSampler(layers, torch.ones(6) / 6, active=2)
    for layer in layers:
        layer.weight.grad = torch.ones(2, 2)
    drawn = sampler.resample()
    for n, layer in enumerate(layers):
        assert all(p.requires_grad == (n in drawn) for p in layer.parameters())
        assert (layer.weight.grad is not None) == (n in drawn)


def test_sampler_state_continues_the_same_draws():
    a, b = LayerSampler(blocks(9), torch.ones(9), 3, seed=1), LayerSampler(blocks(9), torch.ones(9), 3, seed=2)
    a.resample()
    b.load_state_dict(a.state_dict())
    assert b.drawn == a.drawn and [p.requires_grad for m in b.layers for p in m.parameters()] == [
        p.requires_grad for m in a.layers for p in m.parameters()
    ]
    assert [a.resample() for _ in range(20)] == [b.resample() for _ in range(20)]


@pytest.mark.parametrize("active", [0, 4])
def test_sampler_refuses_an_impossible_number_of_layers(active):
    with pytest.raises(ValueError, match="active"):
        LayerSampler(blocks(3), torch.ones(3) / 3, active)


# owlore.py: projection


def random_gradients(*shape: int, steps: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def test_without_rank_it_is_adamw():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (6,), ())]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    a, b = ProjectedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(200):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)])
def test_full_rank_is_adam_in_the_rotated_basis(shape):
    W = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    start, gradients = W.detach().clone(), random_gradients(*shape, steps=30)
    optimizer = ProjectedAdam(
        [{"params": [W], "rank": min(shape), "update_gap": 1000, "scale": 1.0}], lr=0.01, svd="exact"
    )
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


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("shape", [(12, 6), (6, 12)])
def test_a_new_basis_rotates_the_first_moment_or_leaves_it(shape, rotate):
    """At full rank nothing is projected away: rotated, the moment is that of Adam in the matrix's own coordinates."""
    tall, W = shape[0] > shape[1], nn.Parameter(torch.zeros(shape))
    optimizer = ProjectedAdam([{"params": [W], "rank": 6, "update_gap": 1}], lr=0.01, rotate=rotate)
    own, low = torch.zeros(shape), 0.0
    for G in torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)):
        W.grad = G.clone()
        optimizer.step()
        P, m = optimizer.state[W]["basis"], optimizer.state[W]["exp_avg"]
        own = 0.9 * own + 0.1 * G
        low = 0.9 * low + 0.1 * (G @ P if tall else P.T @ G)
        if rotate:
            torch.testing.assert_close(m @ P.T if tall else P @ m, own, atol=1e-6, rtol=0)  # fp32 of values near 1
        else:
            torch.testing.assert_close(m, low, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_low_rank_updates_stay_in_the_span_of_their_basis(shape, svd):
    W = nn.Parameter(torch.zeros(shape))
    optimizer = ProjectedAdam([{"params": [W], "rank": 2, "update_gap": 4}], lr=0.1, svd=svd)
    for step, G in enumerate(random_gradients(*shape, steps=12)):
        before = W.detach().clone()
        W.grad = G.clone()
        optimizer.step()
        P = optimizer.state[W]["basis"]
        if step % 4 == 0:  # the basis is this gradient's two leading directions
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            leading = Vh[:2].T if shape[0] >= shape[1] else U[:, :2]
            torch.testing.assert_close(P @ P.T, leading @ leading.T, atol=1e-5, rtol=0)
        delta = W.detach() - before
        outside = delta - (delta @ P @ P.T if shape[0] >= shape[1] else P @ P.T @ delta)
        assert delta.abs().max() > 0.01 and outside.abs().max() < 1e-6


def test_scale_and_weight_decay_enter_as_stated():
    W0, G = torch.randn(6, 4), torch.randn(6, 4)
    results = []
    for scale, decay in ((1.0, 0.0), (0.25, 0.0), (1.0, 0.5)):
        W = nn.Parameter(W0.clone())
        optimizer = ProjectedAdam([{"params": [W], "rank": 2, "scale": scale}], lr=0.1, weight_decay=decay, svd="exact")
        W.grad = G.clone()
        optimizer.step()
        results.append(W.detach() - W0)
    torch.testing.assert_close(results[1], 0.25 * results[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(results[2], results[0] - 0.05 * W0, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(300, 120), (120, 300)])
def test_randomized_basis_captures_what_the_exact_one_does(shape):
    generator = torch.Generator().manual_seed(0)
    decay = torch.exp(-torch.arange(120) / 20)  # a decaying spectrum, as gradients have
    G = torch.randn(300, 120, generator=generator) * decay @ torch.randn(120, 120, generator=generator)
    G = G if shape[0] > shape[1] else G.T

    def energy(P):
        torch.testing.assert_close(P.T @ P, torch.eye(24), atol=1e-5, rtol=0)
        return ((G @ P) if shape[0] > shape[1] else (P.T @ G)).square().sum()

    torch.manual_seed(0)
    assert energy(projection_basis(G, 24)) >= 0.998 * energy(projection_basis(G, 24, "exact"))


@pytest.mark.parametrize(
    "kind", ["zero", "one direction", "few directions", "tiny", "huge", "one entry", "equal columns"]
)
def test_randomized_basis_of_degenerate_gradients_is_orthonormal_and_captures_them(kind):
    torch.manual_seed(0)
    G = {
        "zero": torch.zeros(300, 200),
        "one direction": torch.randn(300, 1) @ torch.randn(1, 200),
        "few directions": torch.randn(300, 5) @ torch.randn(5, 200),
        "tiny": 1e-14 * torch.randn(300, 5) @ torch.randn(5, 200),
        "huge": 1e12 * torch.randn(300, 5) @ torch.randn(5, 200),
        "one entry": torch.zeros(300, 200).index_put((torch.tensor(3), torch.tensor(7)), torch.tensor(1.0)),
        "equal columns": torch.randn(300, 1).expand(300, 200),
    }[kind]
    for gradient in (G, G.T.contiguous(), G.bfloat16()):
        P = projection_basis(gradient, 8)
        assert P.shape == (200, 8)
        torch.testing.assert_close(P.T @ P, torch.eye(8), rtol=0, atol=1e-4)
        tall = (gradient if gradient.shape[0] == 300 else gradient.T).float()
        # fp32 products of directions with up to 300 terms; bf16 rounding leaves its own noise beside the few directions
        assert (tall - tall @ P @ P.T).norm() <= (1e-2 if gradient.dtype == torch.bfloat16 else 1e-4) * tall.norm()


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_products_are_projected_without_the_gradient_as_with_it(shape):
    """model.Linear hands ProjectedAdam its two factors; a plain nn.Linear the gradient."""
    torch.manual_seed(0)
    ours, plain = model_module.Linear(shape[1], shape[0]), nn.Linear(shape[1], shape[0], bias=False)
    plain.load_state_dict(ours.state_dict())
    optimizers = [
        ProjectedAdam([{"params": m.parameters(), "rank": 3, "update_gap": 4}], lr=0.05, svd="exact")
        for m in (ours, plain)
    ]
    for step in range(10):
        for _ in range(2):  # micro-batches
            x = torch.randn(7, shape[1])
            for linear in (ours, plain):
                linear(x).square().sum().backward()
                assert linear.weight.grad is None
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-4, atol=1e-5, msg=str(step))


def test_gradients_are_projected_and_freed_in_the_backward_pass():
    linear = nn.Linear(6, 9)
    optimizer = ProjectedAdam([{"params": [linear.weight], "rank": 2}, {"params": [linear.bias]}], lr=0.1)
    linear(torch.randn(4, 6)).square().sum().backward()
    assert linear.weight.grad is None and linear.bias.grad is not None
    assert optimizer.state[linear.weight]["gradient"].shape == (9, 2)
    before = linear.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(linear.weight, before) and "gradient" not in optimizer.state[linear.weight]


def test_micro_batches_add_up_to_the_large_batch():
    x, y = torch.randn(8, 6), torch.randn(8, 9)
    weights = []
    for parts in (1, 4):
        torch.manual_seed(0)
        linear = nn.Linear(6, 9)
        optimizer = ProjectedAdam([{"params": [linear.weight], "rank": 2, "update_gap": 100}, {"params": [linear.bias]}], lr=0.1, svd="exact")  # fmt: skip
        (linear(x) - y).square().mean().backward()  # one step on the whole batch fixes the basis for both
        optimizer.step()
        for _ in range(5):
            optimizer.zero_grad()
            for part, target in zip(x.chunk(parts), y.chunk(parts)):
                ((linear(part) - target).square().mean() / parts).backward()
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
        weights.append(linear.weight.detach())
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_zero_grad_forgets_accumulated_gradients():
    W = nn.Parameter(torch.randn(5, 3))
    optimizer = ProjectedAdam([{"params": [W], "rank": 2}], lr=0.1)
    (W * 2).sum().backward()
    optimizer.zero_grad()
    before = W.detach().clone()
    optimizer.step()
    assert torch.equal(W, before)


def test_clipping_scales_what_step_will_use():
    linear = nn.Linear(6, 9)
    optimizer = ProjectedAdam([{"params": [linear.weight], "rank": 2}, {"params": [linear.bias]}], lr=0.1)
    linear(torch.randn(4, 6)).square().sum().backward()
    low_rank, plain = optimizer.state[linear.weight]["gradient"], linear.bias.grad
    expected = torch.cat([low_rank.flatten(), plain]).norm()
    assert optimizer.clip_grad_norm_(0.5).item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.cat([low_rank.flatten(), plain]).norm().item() == pytest.approx(0.5, rel=1e-4)


def state_bytes(optimizer: ProjectedAdam) -> int:
    return sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))


def test_frozen_layers_hold_no_state_and_no_gradient():
    torch.manual_seed(0)
    model = build(n_layers=6)
    args = train.argparse.Namespace(method="owlore", embeddings="full", rank=4, update_gap=10, scale=1.0, lr=1e-3, weight_decay=0.0, svd="exact", published=False)  # fmt: skip
    optimizer, sampler = train.build_optimizer(model, args), LayerSampler(model.layers, torch.ones(6) / 6, 2)
    # per linear m x n of an active layer: basis, two moments; per norm and for embedding, head and final norm: two moments
    r = 4
    layer = sum(
        4 * (r * min(p.shape) + 2 * r * max(p.shape)) if p.dim() == 2 else 8 * p.numel()
        for p in model.layers[0].parameters()
    )
    always = 8 * (model.tok_embeddings.weight.numel() + model.output.weight.numel() + model.norm.weight.numel())
    seen = set()
    for _ in range(12):
        drawn = sampler.resample()
        seen |= set(drawn)
        optimizer.zero_grad()
        model(random_tokens(2, 9), random_tokens(2, 9, seed=2)).backward()
        optimizer.step()
        assert state_bytes(optimizer) == 2 * layer + always
        assert all(p.grad is None for n in range(6) if n not in drawn for p in model.layers[n].parameters())
    assert len(seen) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trips_bit_for_bit(dtype):
    def run(steps, restored=None):
        torch.manual_seed(0)
        W, b = nn.Parameter(torch.randn(8, 5).to(dtype)), nn.Parameter(torch.randn(5).to(dtype))
        optimizer = ProjectedAdam([{"params": [W], "rank": 2, "update_gap": 3}, {"params": [b]}], lr=0.05, svd="exact")
        start = 0
        if restored:
            state, start, rng = restored
            W.data, b.data = (p.clone() for p in state[0])
            optimizer.load_state_dict(state[1])
            torch.set_rng_state(rng)
        gradients = random_gradients(8, 5, steps=10)
        for n in range(start, steps):
            W.grad, b.grad = gradients[n].to(dtype), gradients[n][0].to(dtype)
            optimizer.step()
        return W, b, optimizer

    W, b, optimizer = run(4)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    rng = torch.get_rng_state()
    resumed = run(10, restored=(((W, b), saved), 4, rng))
    straight = run(10)
    assert torch.equal(resumed[0], straight[0]) and torch.equal(resumed[1], straight[1])
    for p, q in zip((resumed[0], resumed[1]), (straight[0], straight[1])):
        for key, value in straight[2].state[q].items():
            got = resumed[2].state[p][key]
            assert (
                torch.equal(got, value) and got.dtype == value.dtype
                if isinstance(value, torch.Tensor)
                else got == value
            )


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_found_inf_changes_nothing(rank, dtype):
    W = nn.Parameter(torch.randn(6, 4).to(dtype))
    optimizer = ProjectedAdam([{"params": [W], "rank": rank}], lr=0.1, weight_decay=0.5)
    for bad in (False, True, False):
        weight = W.detach().clone()
        moments = {k: v.clone() for k, v in optimizer.state[W].items() if "exp" in k}
        (W * (math.nan if bad else torch.randn(6, 4))).sum().backward()
        optimizer.found_inf = ~torch.isfinite(optimizer.clip_grad_norm_(1.0))
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(W, weight) == bad and torch.isfinite(W).all()
        assert not bad or all(torch.equal(optimizer.state[W][key], moments[key]) for key in moments)


def test_a_discarded_optimizer_lets_go_of_the_gradients():
    W = nn.Parameter(torch.randn(5, 3))
    optimizer = ProjectedAdam([{"params": [W], "rank": 2}], lr=0.1)
    del optimizer
    W.sum().backward()
    assert torch.equal(W.grad, torch.ones(5, 3))


def test_stochastic_rounding_keeps_the_mean():
    x = torch.tensor([1.0 + 2**-10, -3.1, 1e-30, 0.0, 2.0]).repeat(20000, 1)
    rounded = stochastic_round(x.clone())
    assert rounded.dtype == torch.bfloat16
    below_above = torch.stack([rounded.float().amin(0), rounded.float().amax(0)])
    spacing = below_above[1] - below_above[0]
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


def test_optimizer_refuses_what_it_cannot_do():
    W, b = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
    for group, options in (
        ({"params": [W], "rank": 0}, {}),
        ({"params": [b], "rank": 2}, {}),
        ({"params": [W], "rank": 2, "update_gap": 0}, {}),
        ({"params": [W]}, {"svd": "fast"}),
        ({"params": [W]}, {"betas": (1.0, 0.9)}),
    ):
        with pytest.raises(ValueError):
            ProjectedAdam([group], lr=0.1, **options)


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


def run_cli(monkeypatch, capsys, main, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, argv)])
    code = 0
    try:
        data.run_command(main)
    except SystemExit as error:
        code = error.code
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint folder of a small random model, with tiny/'s tokenizer."""
    path = tmp_path / "ckpt"
    vocab = load_tokenizer(TINY).vocab_size
    save_model(build(vocab_size=vocab, max_seq_len=256), path, "meta")
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


def read_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "n_layers, dim, flags, active, rank",
    [
        (32, 4096, "", 5, 256),
        (40, 5120, "", 7, 320),
        (32, 4096, "--published", 5, 256),
        (8, 128, "", 4, 32),
        (8, 128, "--published", 2, 8),
        (3, 64, "", 3, 32),
        (32, 4096, "--method lisa", 2, 256),
        (8, 128, "--method lisa", 1, 32),
        (8, 128, "--method lora", 8, 8),
        (32, 4096, "--method lora --rank 64", 32, 64),
    ],
)
def test_defaults_are_published_at_7b_and_have_a_least_size(n_layers, dim, flags, active, rank):
    args = train.flag_parser().parse_args(flags.split())
    train.fit_to_size(args, model_module.ModelConfig(dim=dim, n_layers=n_layers, n_heads=8, vocab_size=32))
    assert (args.active, args.rank) == (active, rank)


def test_a_run_trains_saves_and_loads_again(monkeypatch, capsys, checkpoint, jsonl, tmp_path):
    out = tmp_path / "run"
    flags = (
        "--ckpt",
        checkpoint,
        "--data",
        jsonl,
        "--device",
        "cpu",
        "--steps",
        12,
        "--batch-size",
        4,
        "--interval",
        3,
        "--active",
        1,
    )
    code, text, _ = run_cli(monkeypatch, capsys, train.main, *flags, "--out", out)
    assert code == 0 and "before" in text and "after" in text
    rows = read_metrics(out)
    steps, evaluations = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13)) and [r["step"] for r in evaluations] == [0, 3, 6, 9, 12]
    assert all(len(r["active"]) == 1 for r in steps)
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    tuned, source = load_model(out / "model"), load_model(checkpoint)
    # saved layers are changed exactly where they were drawn
    drawn = {layer for r in steps for layer in r["active"]}
    for n in range(3):
        changed = not torch.equal(tuned.layers[n].attention.wq.weight, source.layers[n].attention.wq.weight)
        assert changed == (n in drawn)
    code, text, _ = run_cli(monkeypatch, capsys, model_module.main, "--ckpt", out / "model", "--max-new-tokens", 5)
    assert code == 0


@pytest.mark.parametrize("method", train.METHODS)
@pytest.mark.parametrize("embeddings", ["full", "projected", "frozen"])
def test_every_method_runs_and_trains_what_it_should(
    monkeypatch, capsys, checkpoint, jsonl, tmp_path, method, embeddings
):
    flags = ("--ckpt", checkpoint, "--data", jsonl, "--device", "cpu", "--steps", 4, "--batch-size", 4)
    flags += ("--method", method, "--embeddings", embeddings, "--out", tmp_path / "run")
    flags += ("--active", 1, "--interval", 2) if method in ("owlore", "lisa") else ()
    code, _, error = run_cli(monkeypatch, capsys, train.main, *flags)
    assert code == 0, error
    tuned, source = load_model(tmp_path / "run/model"), load_model(checkpoint)
    drawn = {layer for r in read_metrics(tmp_path / "run") if "loss" in r for layer in r["active"]}
    assert (len(drawn) == 3) == (method in ("galore", "lora", "full")) or method in ("owlore", "lisa")
    for (name, p), q in zip(tuned.named_parameters(), source.parameters()):
        if "norm" in name and method == "lora":
            trained = False
        else:
            trained = (
                int(name.split(".")[1]) in drawn
                if name.startswith("layers.")
                else "norm" in name or embeddings != "frozen"
            )
        assert torch.equal(p, q) != trained, name


def test_compiling_changes_no_result(monkeypatch, capsys, checkpoint, jsonl, tmp_path):
    compile_blocks = functools.partial(torch.compile, backend="aot_eager")  # without a C++ compiler
    monkeypatch.setattr(torch, "compile", compile_blocks)
    losses = []
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        flags = ("--ckpt", checkpoint, "--data", jsonl, "--device", "cpu", "--steps", 6, "--interval", 2, *more)
        code, _, error = run_cli(monkeypatch, capsys, train.main, *flags, "--out", tmp_path / name)
        assert code == 0, error
        losses.append([row.get("loss", row.get("val_loss")) for row in read_metrics(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # rounding, carried on through six steps


def test_rank_zero_is_owlore_without_projection(monkeypatch, capsys, checkpoint, jsonl, tmp_path):
    flags = ("--ckpt", checkpoint, "--data", jsonl, "--device", "cpu", "--steps", 4, "--active", 1, "--interval", 2)
    lisa = ("--method", "lisa", "--sampling", "outlier")
    for out, method in (("a", ("--rank", 0)), ("b", lisa)):
        assert run_cli(monkeypatch, capsys, train.main, *flags, "--out", tmp_path / out, *method)[0] == 0
    a, b = (load_model(tmp_path / out / "model").state_dict() for out in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_lora_trains_low_rank_additions_and_saves_plain_weights(tmp_path):
    model, tokens = build("mistral"), random_tokens(2, 20)
    plain = build("mistral")(tokens)
    model_module.add_lora(model, rank=3, alpha=6.0)
    assert torch.equal(model(tokens), plain)  # B = 0
    for module in model.modules():
        if isinstance(module, model_module.LoRALinear):
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


def test_eval_only_prints_what_a_run_evaluates_and_writes_nothing(monkeypatch, capsys, checkpoint, jsonl, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = ("--ckpt", checkpoint, "--data", jsonl, "--device", "cpu")
    flags += ("--val-data", jsonl)
    run_cli(monkeypatch, capsys, train.main, *flags, "--out", tmp_path / "run", "--steps", 1)
    before = read_metrics(tmp_path / "run")[0]
    files = sorted(tmp_path.iterdir())
    code, text, error = run_cli(monkeypatch, capsys, train.main, *flags, "--eval-only")
    assert code == 0 and f"{before['val_loss']:.4f}" in text and f"{before['val_accuracy']:.1%}" in text, error
    code, text, error = run_cli(
        monkeypatch, capsys, train.main, "--ckpt", checkpoint, "--val-data", jsonl, "--device", "cpu", "--eval-only"
    )
    assert code == 0 and "accuracy" in text, error
    assert sorted(tmp_path.iterdir()) == files


def test_curves_are_drawn(monkeypatch, capsys, checkpoint, jsonl, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ("--ckpt", checkpoint, "--data", jsonl, "--device", "cpu", "--steps", 4, "--batch-size", 4)
    for name in "ab":
        run_cli(monkeypatch, capsys, train.main, *flags, "--out", tmp_path / name)
    code, _, error = run_cli(monkeypatch, capsys, train.main, "--plot", tmp_path / "a", tmp_path / "b")
    assert code == 0 and (tmp_path / "a/curves.png").read_bytes()[1:4] == b"PNG", error
    code, _, error = run_cli(monkeypatch, capsys, train.main, "--plot", tmp_path / "c")
    assert code == 2 and "c/metrics.jsonl" in error


def cli_process(argv: list[str], output: Path, largest_file: int | None) -> None:
    """What a separate process does to run train.py, with what it prints in a file."""
    sys.stdout = sys.stderr = open(output, "w", buffering=1)
    os.dup2(sys.stdout.fileno(), 2)
    if largest_file:  # a write beyond it fails as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    data.run_command(train.main)


SERVER = multiprocessing.get_context("forkserver")  # forks processes that have imported torch, but not yet used it
SERVER.set_forkserver_preload([__name__])


def start_cli(
    *argv, largest_file: int | None = None, when: Callable = lambda: False, number: int = signal.SIGKILL
) -> tuple[int, str]:
    """Run train.py in a process of its own and send it a signal `when` that is true. Returns its exit code, negative where
    the signal ended it, and what it printed."""
    with tempfile.NamedTemporaryFile() as output:
        process = SERVER.Process(target=cli_process, args=([str(a) for a in argv], Path(output.name), largest_file))
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
    assert torch.equal(states[0]["rng"], states[1]["rng"])
    if states[0]["sampler"]:
        assert torch.equal(states[0]["sampler"]["generator"], states[1]["sampler"]["generator"])
    drop = ("tokens_per_second", "memory")
    logs = [[{k: v for k, v in r.items() if k not in drop} for r in read_metrics(out)] for out in (a, b)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("method", train.METHODS)
def test_resuming_continues_bit_for_bit(method, checkpoint, jsonl, tmp_path):
    flags = ("--ckpt", checkpoint, "--data", jsonl, "--device", "cpu", "--steps", 14, "--batch-size", 8)
    flags += ("--active", 1, "--interval", 3) if method in ("owlore", "lisa") else ()
    # in bf16 stochastic rounding draws random numbers; an epoch is 8 steps
    flags += ("--method", method, "--dtype", "bf16", "--micro-batch-size", 3, "--update-gap", 2, "--save-every", 5)
    assert start_cli(*flags, "--out", tmp_path / "a")[0] == 0

    assert start_cli(*flags, "--out", tmp_path / "b", when=reached(tmp_path / "b", 7))[0] == -signal.SIGKILL
    code, output = start_cli("--resume", "--out", tmp_path / "b")
    assert code == 0, output
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_killed_at_twenty_random_moments_a_run_ends_as_if_never_interrupted(checkpoint, jsonl, tmp_path):
    flags = (
        "--ckpt",
        checkpoint,
        "--data",
        jsonl,
        "--device",
        "cpu",
        "--steps",
        250,
        "--batch-size",
        4,
        "--save-every",
        4,
    )
    flags += ("--dtype", "bf16", "--eval-every", 60, "--active", 1)
    began = time.time()
    assert start_cli(*flags, "--out", tmp_path / "a")[0] == 0
    took = time.time() - began
    random = np.random.default_rng(0)
    kills = 0
    for _ in range(200):
        moment = time.time() + (random.uniform(0, 0.15 * took) if kills < 20 else 600)
        code, output = start_cli(
            *flags, "--resume", "--out", tmp_path / "b", when=lambda moment=moment: time.time() > moment
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL, output
        kills += 1
        if (tmp_path / "b/model").exists():  # what there is at any moment is whole
            load_model(tmp_path / "b/model")
    assert kills >= 20
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, checkpoint, jsonl, tmp_path):
    flags = ("--ckpt", checkpoint, "--data", jsonl, "--device", "cpu", "--steps", 60, "--batch-size", 4)
    assert start_cli(*flags, "--out", tmp_path / "a")[0] == 0

    code, output = start_cli(*flags, "--out", tmp_path / "b", when=reached(tmp_path / "b", 5), number=number)
    assert code == 128 + number and f"python train.py --resume --out {tmp_path / 'b'}" in output
    assert start_cli("--resume", "--out", tmp_path / "b")[0] == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_failed_save_keeps_the_last_checkpoint_and_the_run(checkpoint, jsonl, tmp_path):
    flags = (
        "--ckpt",
        checkpoint,
        "--data",
        jsonl,
        "--device",
        "cpu",
        "--batch-size",
        4,
        "--save-every",
        4,
        "--steps",
        14,
    )
    assert start_cli(*flags, "--out", tmp_path / "a")[0] == 0

    start_cli(*flags, "--out", tmp_path / "b", when=reached(tmp_path / "b", 6))
    kept = snapshot(tmp_path / "b" / "checkpoints")
    code, output = start_cli("--resume", "--out", tmp_path / "b", largest_file=100_000)  # as if the disk were full
    assert code == 2 and "Traceback" not in output
    assert "step 8 could not be saved" in output and "step 12 could not" in output and "step 14 could not" in output
    assert snapshot(tmp_path / "b" / "checkpoints") == kept
    assert start_cli("--resume", "--out", tmp_path / "b")[0] == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_only_the_newest_checkpoints_are_kept(checkpoint, jsonl, tmp_path):
    flags = (
        "--ckpt",
        checkpoint,
        "--data",
        jsonl,
        "--device",
        "cpu",
        "--batch-size",
        4,
        "--save-every",
        2,
        "--steps",
        9,
    )
    assert start_cli(*flags, "--out", tmp_path / "run", "--keep", 2)[0] == 0
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == ["step-0000008", "step-0000009"]
    assert (tmp_path / "run/model").resolve() == tmp_path / "run/checkpoints/step-0000009/model"


def test_what_a_killed_save_left_does_not_count_as_a_checkpoint(checkpoint, tmp_path):
    out, model = tmp_path / "run", load_model(checkpoint)
    for name in ("step-0000010.tmp", "step-0000025"):  # half written; whole, but never linked
        (out / "checkpoints" / name / "state").mkdir(parents=True)
    for step in (10, 20, 23):
        train.save_checkpoint(out, 1, model, checkpoint, {"step": step})
        assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{step:07}"]
        assert train.load_state(out)["step"] == step
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(InputError, match="gone"):
        train.load_state(out)


def test_two_runs_do_not_share_a_folder(checkpoint, jsonl, tmp_path):
    flags = ("--ckpt", checkpoint, "--data", jsonl, "--device", "cpu", "--batch-size", 4, "--steps", 5)
    assert start_cli(*flags, "--out", tmp_path / "run")[0] == 0
    lock = train.open_run(tmp_path / "run")
    code, output = start_cli("--resume", "--out", tmp_path / "run")
    assert code == 2 and "another run" in output
    lock.close()


def test_contradicting_flags_and_changed_data_are_refused_on_resume(checkpoint, jsonl, tmp_path):
    flags = ("--ckpt", checkpoint, "--data", jsonl, "--device", "cpu", "--batch-size", 4, "--steps", 5)
    assert start_cli(*flags, "--out", tmp_path / "run")[0] == 0
    assert start_cli(*flags, "--resume", "--out", tmp_path / "run")[0] == 0  # the same flags again are fine
    code, output = start_cli("--resume", "--out", tmp_path / "run", "--lr", 1)
    assert code == 2 and "--lr 1.0" in output
    jsonl.write_text(jsonl.read_text().replace("and", "or"))
    code, output = start_cli("--resume", "--out", tmp_path / "run")
    assert code == 2 and "--data" in output
    assert start_cli("--resume", "--out", tmp_path / "none")[0] == 2


def test_steps_that_are_not_finite_are_skipped_and_end_the_run_when_many(
    monkeypatch, capsys, checkpoint, jsonl, tmp_path
):
    flags = (
        "--ckpt",
        checkpoint,
        "--data",
        jsonl,
        "--device",
        "cpu",
        "--batch-size",
        4,
        "--steps",
        30,
        "--save-every",
        5,
        "--update-gap",
        1,
        "--active",
        1,
    )
    forward, calls = Transformer.forward, []

    def poisoned(self, tokens, targets=None, cache=None):
        loss = forward(self, tokens, targets, cache)
        calls.append(self.training and targets is not None)
        return loss * math.nan if self.training and (sum(calls) in bad or sum(calls) > 20 and -1 in bad) else loss

    monkeypatch.setattr(Transformer, "forward", poisoned)
    bad = {3, 7}
    code, text, output = run_cli(monkeypatch, capsys, train.main, *flags, "--out", tmp_path / "few")
    # in each of the two steps the layer's seven matrices wanted a new basis, and kept the last
    assert "14 new projections failed" in text
    rows = [r for r in read_metrics(tmp_path / "few") if "loss" in r]
    assert code == 0 and rows[-1]["skipped"] == 2 and "2 steps skipped" in output
    assert all(torch.isfinite(p).all() for p in load_model(tmp_path / "few/model").parameters())
    bad = {-1}
    calls.clear()
    code, _, output = run_cli(monkeypatch, capsys, train.main, *flags, "--out", tmp_path / "many")
    assert code == 2 and "10 steps in a row" in output
    assert (tmp_path / "many/model").resolve().parent.name == "step-0000020"


def test_running_out_of_memory_says_what_would_help(monkeypatch, capsys, checkpoint, jsonl, tmp_path):
    def too_much(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train, "accumulate_gradients", too_much)
    flags = ("--ckpt", checkpoint, "--data", jsonl, "--device", "cpu", "--out", tmp_path / "run")
    code, _, output = run_cli(monkeypatch, capsys, train.main, *flags)
    assert code == 2 and "--micro-batch-size 8 would save" in output


def mutations(raw: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Cut, overwrite, repeat, insert: damaged copies of a file."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        damaged = bytearray(raw)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(0, max(1, len(damaged))))
            kind = random.integers(0, 5)
            if kind == 0:
                del damaged[at:]
            elif kind == 1:
                damaged[at : at + 1] = bytes(random.integers(0, 256, 1, dtype=np.uint8))
            elif kind == 2:
                damaged[at:at] = damaged[at : at + int(random.integers(1, 40))]
            elif kind == 3:
                damaged[at:at] = random.choice(
                    [b"9" * 30, b"-", b"null", b"[", b"\xff\xfe", b"1e999", b'"', b"../../x"]
                )
            else:
                del damaged[at : at + int(random.integers(1, 20))]
        yield bytes(damaged)


@pytest.mark.parametrize(
    "file", ["params.json", "config.json", "model.safetensors", "consolidated.00.pth", "tokenizer.model"]
)
def test_damaged_checkpoint_files_load_or_are_refused_in_one_line(file, checkpoint, capfd):
    if file in ("config.json", "model.safetensors"):
        to_hf(checkpoint)
    raw = (checkpoint / file).read_bytes()
    header = struct.unpack("<Q", raw[:8])[0] + 8 if file == "model.safetensors" else len(raw)
    refused = 0
    for head in mutations(raw[:header], 400, seed=0):
        (checkpoint / file).write_bytes(head + raw[header:])
        try:
            load_tokenizer(checkpoint) if file == "tokenizer.model" else load_model(checkpoint)
        except InputError as error:
            assert "\n" not in str(error).strip()
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.txt"])
def test_damaged_data_files_load_or_are_refused_in_one_line(name, jsonl, tmp_path):
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()][::7]
    text = json.dumps(rows) if name == "data.json" else "\n".join(map(json.dumps, rows))
    refused = 0
    for damaged in mutations(text.encode(), 400, seed=1):
        (tmp_path / name).write_bytes(damaged)
        try:
            assert load_records(tmp_path / name)
        except InputError as error:
            assert "\n" not in str(error).strip()
            refused += 1
    assert refused > (5 if name == "data.txt" else 100)


def test_micro_batches_do_not_change_a_run(monkeypatch, capsys, checkpoint, jsonl, tmp_path):
    """SGD-like check of the loop's weighting: rows of different lengths, so a mean of means would differ."""
    flags = (
        "--ckpt",
        checkpoint,
        "--data",
        jsonl,
        "--device",
        "cpu",
        "--steps",
        3,
        "--batch-size",
        8,
        "--method",
        "full",
    )
    losses = []
    for size in (8, 3):
        out = tmp_path / str(size)
        assert run_cli(monkeypatch, capsys, train.main, *flags, "--out", out, "--micro-batch-size", size)[0] == 0
        losses.append([(r["loss"], r["grad_norm"]) for r in read_metrics(out) if "loss" in r])
    np.testing.assert_allclose(*losses, rtol=1e-3)  # Adam's first steps amplify fp32 noise in tiny gradients


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
        right += int(np.argmax(scores)) == record.answer
        by_length += int(np.argmax(np.array(scores) / [2, 1, 3])) == record.answer
    rows = [data.Record([(r.turns[0][0], choice)]) for r in records for choice in r.choices]
    choices = build_dataset(rows, tokenizer, 50, eos=False)
    assert 0 < right < 12
    assert train.choice_accuracy(model, records, choices, 5, "cpu") == (right / 12, by_length / 12)


def test_outlier_chart_command(monkeypatch, capsys, checkpoint, jsonl):
    code, text, error = run_cli(
        monkeypatch, capsys, owlore.main, "--ckpt", checkpoint, "--data", jsonl, "--device", "cpu"
    )
    lines = text.splitlines()
    assert code == 0 and len(lines) == 6 and "Hill alpha" in lines[1], error
    shares, p = (torch.tensor([float(line.split()[n]) for line in lines[2:5]]) for n in (1, 3))
    linears = [
        [m.weight for m in layer.modules() if isinstance(m, nn.Linear)] for layer in load_model(checkpoint).layers
    ]
    alphas = torch.tensor([np.mean([hill_alpha(weight) for weight in layer]) for layer in linears])
    assert p.sum() == pytest.approx(1, abs=1e-3)
    assert f"{owlore.rank_correlation(shares, alphas):+.2f}" in lines[5]
    bars = [line.count("█") for line in lines[2:5]]
    assert bars[int(p.argmax())] == max(bars) == 30
    pytest.importorskip("matplotlib")
    flags = ("--ckpt", checkpoint, "--data", jsonl, "--device", "cpu", "--plot", checkpoint / "layers.png")
    assert run_cli(monkeypatch, capsys, owlore.main, *flags)[0] == 0
    assert (checkpoint / "layers.png").read_bytes()[1:4] == b"PNG"


def test_embedded_default_learns(monkeypatch, capsys, tmp_path):
    flags = ("--out", tmp_path / "run", "--device", "cpu", "--steps", 90, "--eval-every", 90)  # half
    assert run_cli(monkeypatch, capsys, train.main, *flags)[0] == 0
    before, after = (r for r in read_metrics(tmp_path / "run") if "val_loss" in r)
    assert after["val_loss"] < before["val_loss"] / 10
    assert before["val_accuracy"] < 0.35 and after["val_accuracy"] > 0.45  # 120 questions with four answers each


def test_embedded_default_repeats_bit_for_bit(monkeypatch, capsys, tmp_path):
    (tmp_path / "val.json").write_text(json.dumps(json.loads((TINY / "val.json").read_text())[:8]))
    for name in "ab":
        flags = ("--out", tmp_path / name, "--val-data", tmp_path / "val.json", "--device", "cpu", "--steps", 9)
        assert run_cli(monkeypatch, capsys, train.main, *flags, "--interval", 4)[0] == 0
    a, b = (load_model(tmp_path / name / "model").state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_metrics(tmp_path / "a")[-1]["val_loss"] == read_metrics(tmp_path / "b")[-1]["val_loss"]


def test_bf16_weights_end_where_fp32_ones_do(monkeypatch, capsys, tmp_path):
    """At this learning rate most updates are below bf16's resolution: rounding to nearest loses them, and 20 % of the loss."""
    records = json.loads((TINY / "val.json").read_text())[:40]
    (tmp_path / "val.json").write_text(json.dumps([{**record, "answer": ""} for record in records]))  # no accuracy

    def final_loss(name: str, dtype: str) -> float:
        flags = ("--ckpt", TINY, "--data", TINY / "train.json", "--val-data", tmp_path / "val.json", "--device", "cpu")
        flags += ("--steps", 24, "--interval", 8, "--batch-size", 8, "--eval-every", 24, "--lr", 3e-4, "--dtype", dtype)
        assert run_cli(monkeypatch, capsys, train.main, *flags, "--out", tmp_path / name)[0] == 0
        return read_metrics(tmp_path / name)[-1]["val_loss"]

    fp32, bf16 = final_loss("fp32", "fp32"), final_loss("bf16", "bf16")
    monkeypatch.setattr(owlore, "stochastic_round", lambda x: x.to(torch.bfloat16))
    nearest = final_loss("nearest", "bf16")
    assert abs(bf16 / fp32 - 1) < 0.01 and abs(nearest / fp32 - 1) > 0.1


def test_embedded_files_stay_small():
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) < 8 * 2**20


# Bad input: one line on stderr that names the file or flag, exit code 2, and nothing touched


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch code-was-run",)


def to_hf(path: Path) -> None:
    model = load_model(path)
    for name in ("params.json", "consolidated.00.pth"):
        (path / name).unlink()
    save_model(model, path, "hf")


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change) -> None:
    state = torch.load(path / "consolidated.00.pth")
    change(state)
    torch.save(state, path / "consolidated.00.pth")


def edit_header(path: Path, change) -> None:
    to_hf(path)
    raw = (path / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header)
    head = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + size :])


def truncate(path: Path, share: float) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


def cut_safetensors(path: Path, share: float) -> None:
    to_hf(path)
    truncate(path / "model.safetensors", share)


def keep_half(path: Path) -> None:
    """The first of two tensor-parallel shards, alone."""
    columns = ("wo.weight", "w2.weight", "tok_embeddings.weight")
    halves = lambda s: {n: t.chunk(2, int(n.endswith(columns)))[0].clone() for n, t in s.items() if "norm" not in n}  # noqa: E731
    edit_tensors(path, lambda s: s.update(halves(s)))


def gap_in_shards(path: Path) -> None:
    (path / "consolidated.00.pth").rename(path / "consolidated.01.pth")


def index_elsewhere(path: Path) -> None:
    to_hf(path)
    (path / "model.safetensors").rename(path.parent / "elsewhere.safetensors")
    weight_map = {"lm_head.weight": "../elsewhere.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shard_of_index_missing(path: Path) -> None:
    to_hf(path)
    (path / "model.safetensors").rename(path / "model-1-of-2.safetensors")
    weight_map = {"lm_head.weight": "model-2-of-2.safetensors", "model.norm.weight": "model-1-of-2.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


BAD_CHECKPOINTS = {
    "empty": (lambda p: [f.unlink() for f in p.iterdir()], "params.json"),
    "without tokenizer": (lambda p: (p / "tokenizer.model").unlink(), "tokenizer.model"),
    "damaged tokenizer": (lambda p: truncate(p / "tokenizer.model", 0.5), "tokenizer"),
    "without weights": (lambda p: (p / "consolidated.00.pth").unlink(), "consolidated"),
    "first shard missing": (gap_in_shards, "consolidated.00.pth"),
    "last shard missing": (keep_half, "shard"),
    "shard of an index missing": (shard_of_index_missing, "model-2-of-2.safetensors"),
    "index outside the folder": (index_elsewhere, "own folder"),
    "truncated pth": (lambda p: truncate(p / "consolidated.00.pth", 0.7), "consolidated.00.pth"),
    "pth that runs code": (lambda p: edit_tensors(p, lambda s: s.update(x=RunsCode())), "code"),
    "not a state dict": (lambda p: torch.save([1, 2], p / "consolidated.00.pth"), "state dict"),
    "truncated safetensors": (lambda p: cut_safetensors(p, 0.9), "model.safetensors"),
    "safetensors header cut": (lambda p: cut_safetensors(p, 1e-3), "model.safetensors"),
    "tampered offsets": (lambda p: edit_header(p, lambda h: h["lm_head.weight"].update(data_offsets=[0, 10**12])), "lm_head"),
    "tampered shape": (lambda p: edit_header(p, lambda h: h["lm_head.weight"].update(shape=[1, 7])), "lm_head"),
    "negative shape": (lambda p: edit_header(p, lambda h: h["lm_head.weight"].update(shape=[-1, -7])), "lm_head"),
    "tensor of the wrong shape": (
        lambda p: edit_tensors(p, lambda s: s.update({"layers.1.attention.wk.weight": torch.ones(3, 64)})),
        "layers.1.attention.wk.weight",
    ),
    "tensor missing": (lambda p: edit_tensors(p, lambda s: s.pop("layers.1.ffn_norm.weight")), "layers.1.ffn_norm.weight"),
    "bias": (lambda p: edit_tensors(p, lambda s: s.update({"layers.0.attention.wq.bias": torch.ones(64)})), "wq.bias"),
    "quantized": (lambda p: edit_tensors(p, lambda s: s.update({"norm.weight": torch.ones(64).char()})), "norm.weight"),
    "params malformed": (lambda p: (p / "params.json").write_text('{"dim":\n 64,,}'), "line 2"),
    "params a list": (lambda p: (p / "params.json").write_text("[]"), "params.json"),
    "params impossible": (lambda p: edit_json(p / "params.json", n_heads=7), "n_heads"),
    "params negative": (lambda p: edit_json(p / "params.json", dim=-64), "dim"),
    "params not a number": (lambda p: edit_json(p / "params.json", dim="wide"), "dim"),
    "too many layers": (lambda p: edit_json(p / "params.json", n_layers=10**9), "layers"),
    "unknown setting": (lambda p: edit_json(p / "params.json", moe={"num_experts": 8}), "moe"),
    "other architecture": (lambda p: (to_hf(p), edit_json(p / "config.json", model_type="gpt2")), "gpt2"),
    "other rope": (
        lambda p: (to_hf(p), edit_json(p / "config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})),
        "yarn",
    ),
    "attention bias": (lambda p: (to_hf(p), edit_json(p / "config.json", attention_bias=True)), "attention_bias"),
    "another model's tokenizer": (lambda p: edit_vocabulary(p, 50), "tokenizer"),
}  # fmt: skip


def edit_vocabulary(path: Path, size: int) -> None:
    edit_json(path / "params.json", vocab_size=size)
    edit_tensors(path, lambda s: s.update({n: s[n][:size].clone() for n in ("tok_embeddings.weight", "output.weight")}))


def assert_refused(result: tuple[int, str, str], names: str) -> None:
    code, _, error = result
    lines = [line for line in error.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1, error
    assert names in lines[0] and "Traceback" not in error


def snapshot(folder: Path) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_refused(case, monkeypatch, capsys, checkpoint, jsonl, tmp_path):
    monkeypatch.chdir(tmp_path)
    damage, names = BAD_CHECKPOINTS[case]
    damage(checkpoint)
    before = snapshot(tmp_path)
    result = run_cli(monkeypatch, capsys, train.main, "--ckpt", checkpoint, "--data", jsonl, "--out", tmp_path / "run")
    assert_refused(result, names)
    assert snapshot(tmp_path) == before and not (tmp_path / "code-was-run").exists()


BAD_DATA = {
    "empty.txt": (b"", "empty"),
    "blank.json": (b" \n ", "empty"),
    "latin.txt": ("Grüße".encode("latin-1") * 100, "UTF-8"),
    "lines.jsonl": (b'{"text": "a"}\n{"text": "b"}\n{"text": oops}\n', "line 3"),
    "list.json": (b'[\n{"text": "a"},\n{"text": "b"\n]', "line 4"),
    "unknown.jsonl": (b'{"text": "a"}\n{"question": "b"}\n', "line 2"),
    "numbers.json": (b"[1, 2]", "record 1"),
    "types.json": (b'[{"text": "a"}, {"text": 3}]', "record 2"),
    "none.json": (b"[]", "no records"),
    "typed.json": (b'{"type": "images", "instances": []}', "type"),
    "choices.jsonl": (b'{"prompt": "a", "choices": ["b", "c"], "answer": 7}\n', "answer"),
    "chat.jsonl": (b'{"messages": [{"role": "user", "content": "hi"}]}\n', "assistant"),
    "short.txt": (b"a", "short"),
    "single.jsonl": (b'{"prompt": "a", "completion": "b"}\n', "one record"),
    "deep.json": (b"[" * 100000, "line 1"),
    "half.jsonl": (b'{"prompt": "a", "completion": "b"}\n{"text": "half a pair: \\ud800"}\n', "line 2"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused(name, monkeypatch, capsys, checkpoint, tmp_path):
    content, names = BAD_DATA[name]
    (tmp_path / name).write_bytes(content)
    result = run_cli(
        monkeypatch, capsys, train.main, "--ckpt", checkpoint, "--data", tmp_path / name, "--out", tmp_path / "run"
    )
    assert_refused(result, names)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--ckpt", "nowhere"], "nowhere"),
        (["--data", "nothing.txt"], "nothing.txt"),
        (["--active", "4"], "--active"),
        (["--active", "0"], "--active"),
        (["--method", "lisa", "--published"], "--published"),
        (["--rank", "-1"], "--rank"),
        (["--method", "lora", "--rank", "0"], "--rank"),
        (["--rank", "many"], "--rank"),
        (["--seq-len", "257"], "--seq-len"),
        (["--device", "cuda:77"], "--device"),
        (["--device", "abacus"], "--device"),
        (["--method", "magic"], "--method"),
        (["--method", "galore", "--active", "2"], "--active"),
        (["--method", "full", "--interval", "2"], "--interval"),
        (["--method", "full", "--compile"], "--compile"),
        (["--lr", "nan"], "--lr"),
        (["--batch-size", "0"], "--batch-size"),
        (["--sped", "1"], "--sped"),
    ],
    ids=" ".join,
)
def test_bad_flags_are_refused(flags, names, monkeypatch, capsys, checkpoint, jsonl, tmp_path):
    monkeypatch.chdir(tmp_path)
    base = {"--ckpt": checkpoint, "--data": jsonl, "--out": tmp_path / "run"}
    base |= dict(zip(flags[::2], flags[1::2])) if len(flags) % 2 == 0 else {}
    argv = [word for pair in base.items() for word in pair] + (flags if len(flags) % 2 else [])
    before = snapshot(tmp_path)
    assert_refused(run_cli(monkeypatch, capsys, train.main, *argv), names)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("main", [train.main, owlore.main, model_module.main], ids=lambda main: main.__module__)
def test_help_is_shown(main, monkeypatch, capsys):
    code, text, _ = run_cli(monkeypatch, capsys, main, "--help")
    assert code == 0 and "--ckpt" in text


def test_an_existing_run_is_not_overwritten(monkeypatch, capsys, checkpoint, jsonl, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    result = run_cli(monkeypatch, capsys, train.main, "--ckpt", checkpoint, "--data", jsonl, "--out", tmp_path / "run")
    assert_refused(result, "--out")
    assert snapshot(tmp_path / "run") == {tmp_path / "run" / "notes.txt": b"mine"}


def test_saving_over_another_checkpoint_is_refused(checkpoint):
    before = snapshot(checkpoint)
    with pytest.raises(InputError, match="another checkpoint"):
        save_model(load_model(checkpoint), checkpoint, "hf")
    assert snapshot(checkpoint) == before


def test_long_records_are_cut_counted_and_reported(monkeypatch, capsys, checkpoint, tmp_path):
    rows = [{"prompt": "word " * 300, "completion": " end"}] * 3 + [{"prompt": "a", "completion": " b"}] * 30
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = (
        "--ckpt",
        checkpoint,
        "--data",
        tmp_path / "long.jsonl",
        "--val-data",
        tmp_path / "long.jsonl",
        "--steps",
        1,
    )
    code, text, error = run_cli(monkeypatch, capsys, train.main, *flags, "--seq-len", 64, "--out", tmp_path / "run")
    assert code == 0 and "3 of 33 records" in text and "--seq-len 64" in text, error


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.sampled_from(["instruction", "input", "output", "answer", "prompt", "choices", "messages", "role", "content", "text", "completion"]), c)))  # fmt: skip
def test_any_json_is_a_record_or_refused(value):
    try:
        record = parse_record(value)
    except ValueError:
        return
    assert all(isinstance(text, str) for turn in record.turns for text in turn)
