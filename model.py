"""The LLaMA family in plain PyTorch, from raw checkpoint weights and back.

One model serves LLaMA-1/2/3/3.1/3.2, CodeLlama, TinyLlama and Mistral-7B. Each of its blocks computes

    x = x + attention(rms_norm(x))         rotary positions, grouped-query heads, causal
    x = x + w2(silu(w1(y)) * w3(y))        y = rms_norm(x), SwiGLU (arXiv 2002.05202)

Parameters carry the names of Meta's raw checkpoints, and rotary pairs are Meta's interleaved ones. Checkpoints of both
layouts, Meta's and Hugging Face's, are read and written. Top to bottom: architecture, loss, generation, checkpoints.

    python model.py --ckpt DIR --prompt "Once upon a time"
"""

import argparse
import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import FOREIGN, InputError, Layout, Tokenizer, alpaca_prompt, at_least, atomic_write, command, copy_tokenizer
from data import load_tokenizer, named_eos, read_json
from owlore import Linear, once_differentiable, own, own_rows, whole


@dataclass
class ModelConfig:
    """Shape of a model, in the words of Meta's `params.json`. Raises ValueError for a shape that cannot be built."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads (no grouping)
    vocab_size: int = 32000
    multiple_of: int = 256  # hidden_dim is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False  # LLaMA-3.1's stretching of the slow rotary frequencies, with the four numbers below
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    hidden_dim: int | None = None  # given by Mistral; else computed
    head_dim: int | None = None  # given by Mistral; else dim / n_heads
    sliding_window: int | None = None  # Mistral 0.1: a token sees this many tokens, itself included
    max_seq_len: int | None = None  # the context; None: what the family was trained with
    tie_word_embeddings: bool = False  # the output head is the embedding matrix

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            # JSON writes 10000 for 10000.0, so a float may be an int; and to Python true and false are ints as well.
            good = isinstance(value, field.type | int) and isinstance(value, bool) == (field.type is bool)
            most = 1e30 if field.type is float else 2**31  # rope_theta is 3.6e9 in a LLaMA-3 for a million tokens
            if not good or not (value is None or isinstance(value, bool) or 0 < value < most):
                raise ValueError(f"{field.name} is {value!r}, which is not a positive number, or true or false")
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.dim / self.n_heads
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:  # queries share keys evenly; rotary turns pairs
            heads = f"n_heads {self.n_heads}, n_kv_heads {self.n_kv_heads}, head_dim {self.head_dim:g}"
            raise ValueError(f"{heads}: n_heads must be a multiple of n_kv_heads, head_dim even")
        self.head_dim = int(self.head_dim)
        self.hidden_dim = self.hidden_dim or self.swiglu_hidden_dim()
        self.max_seq_len = self.max_seq_len or self.family_context()
        if self.dim * max(self.n_heads * self.head_dim, self.hidden_dim, self.vocab_size) > 2**48:
            raise ValueError("its matrices would overflow any memory")

    def swiglu_hidden_dim(self) -> int:
        """Meta's rule: 2/3 of 4 dim, so that three matrices cost what two of 4 dim would, rounded up."""
        hidden = int((self.ffn_dim_multiplier or 1) * int(2 * 4 * self.dim / 3))
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    def family_context(self) -> int:
        """Context length in tokens, which `params.json` leaves out: guessed from what differs between the families."""
        if self.use_scaled_rope:
            return 131072  # LLaMA-3.1, 3.2
        if self.rope_theta >= 1e6:
            return 32768 if self.hidden_dim != self.swiglu_hidden_dim() else 16384  # Mistral 0.2+, CodeLlama
        if self.sliding_window:
            return 32768  # Mistral 0.1
        if self.rope_theta >= 5e5:
            return 8192  # LLaMA-3
        return 4096 if self.norm_eps >= 1e-5 else 2048  # LLaMA-2, LLaMA-1


def rotary(config: ModelConfig, positions: Tensor) -> Tensor:
    """e^(i angle) of the rotary angles (RoFormer, arXiv 2104.09864): pair i at position t turns by t * theta^(-2i/d).
    positions: [T]. Returns complex64 [T, head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    frequencies = 1.0 / float(config.rope_theta) ** exponents
    if config.use_scaled_rope:
        # LLaMA-3.1: waves that turn fewer than `low` times within the original length are stretched by the factor,
        # those that turn more than `high` times stay, and the ones between are interpolated.
        turns = config.rope_original_length * frequencies / (2 * math.pi)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / config.rope_scaling_factor
    angles = torch.outer(positions.float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs, each read as a complex number. x: [N, heads, head_dim]; rotation: [N, head_dim / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    """x * weight / sqrt(mean(x^2) + eps) (arXiv 1910.07467), computed in fp32 whatever the dtype of x."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim] -> [..., dim]."""
        if x.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm_backward"):  # one kernel, from torch 2.9 on
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # Elsewhere F.rms_norm keeps fp32 copies of x for the backward pass: 0.38 GiB of a 7B's step at 16 x 512.
        sum_of_squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()  # [..., 1]
        return (x * (sum_of_squares / x.shape[-1] + self.eps).rsqrt()).type_as(x) * self.weight


class Attention(nn.Module):
    """Causal self-attention in which n_heads queries share n_kv_heads keys and values (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(self, x: Tensor, rotation: Tensor, layout: Layout, masks: list, cache: dict | None = None) -> Tensor:
        """x: [N, dim] -> [N, dim]. masks: of each group of rows, bool [..., T, keys]; None: plain causal attention."""
        q = rotate(self.wq(x).view(-1, self.n_heads, self.head_dim), rotation)
        k = rotate(self.wk(x).view(-1, self.n_kv_heads, self.head_dim), rotation)
        v = self.wv(x).view(-1, self.n_kv_heads, self.head_dim)
        groups, grouped = [], self.n_heads != self.n_kv_heads
        for *qkv, mask in zip(layout.pad(q), layout.pad(k), layout.pad(v), masks):
            q, k, v = (t.transpose(1, 2) for t in qkv)  # [B, heads, T, head_dim]
            if cache is not None:
                if self in cache:
                    k, v = (torch.cat(pair, dim=2) for pair in zip(cache[self], (k, v)))
                cache[self] = k, v
            # A single query sees every key. For more, torch's causal mask is right only with as many keys as queries.
            causal = mask is None and q.shape[2] > 1
            if grouped and mask is not None:  # no fast kernel on GPUs takes both
                k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped and mask is None)
            groups.append(y.transpose(1, 2))  # [B, T, heads, head_dim]
        return self.wo(layout.unpad(groups).flatten(1))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up that keeps only gate and up, the widest activations there are, and makes gradients in place."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: [..., hidden_dim] -> [..., hidden_dim]."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """dgate = grad * up * silu'(gate) is written over up, and dup = grad * silu(gate) over gate."""
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward.grad_input(up.mul_(grad), gate, grad_input=up)
        return grad_gate, F.silu(gate, inplace=True).mul_(grad)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim)
        self.w2 = Linear(config.hidden_dim, config.dim)
        self.w3 = Linear(config.dim, config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(SwiGLU.apply(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """One transformer layer: the unit that OwLore scores, samples and freezes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config)
        self.ffn_norm = RMSNorm(config)

    def forward(self, x: Tensor, rotation: Tensor, layout: Layout, masks: list, cache: dict | None = None) -> Tensor:
        """x: [N, dim] -> [N, dim]."""
        x = x + self.attention(self.attention_norm(x), rotation, layout, masks, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """A LLaMA-style decoder. Freshly built it is randomly initialised; `load_model` fills it from a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.layout = "meta"  # of the checkpoint that it was loaded from
        self.checkpoint_blocks = False  # recompute each block's activations in the backward pass, do not store them
        # nn.Embedding(V, dim) draws numbers, which for a model without memory ("meta") has torch import its compiler.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config)
        self.output = Linear(config.dim, config.vocab_size)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not parameter.is_meta:
                # GPT-2's initialisation: what writes into the residual stream starts smaller, by depth
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)
        if config.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def hidden(self, tokens: Tensor, layout: Layout | None = None, cache: dict | None = None) -> Tensor:
        """What the output head reads: [K, dim] of the tokens int [N] that have a target in their layout, or [B, T, dim]
        of all tokens int [B, T] of full rows.

        cache: empty at first, then what the tokens before these left in it: of each attention module keys and values,
        [B, n_kv_heads, start, head_dim]."""
        start = next(iter(cache.values()))[0].shape[2] if cache else 0
        shape, masks = tokens.shape, [None]
        if layout is None:
            positions = torch.arange(start, start + shape[1], device=tokens.device)
            layout = Layout([tuple(shape)], positions.repeat(shape[0]))
        if start == 0:
            masks = layout.masks(self.config.sliding_window)
        elif shape[1] > 1 or self.config.sliding_window:
            distance = positions[:, None] - torch.arange(start + shape[1], device=tokens.device)  # [T, start + T]
            masks = [(distance >= 0) & (distance < (self.config.sliding_window or math.inf))]
        rotation = rotary(self.config, layout.positions)  # [N, head_dim / 2]
        x = self.tok_embeddings(tokens.flatten())  # [N, dim]
        for layer in self.layers:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, layout, masks, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rotation, layout, masks, cache)
        if layout.predicting is not None:
            x = x.index_select(0, layout.predicting)  # [K, dim]
        return self.norm(x).unflatten(0, shape) if tokens.dim() == 2 else self.norm(x)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, layout: Layout | None = None, reduction: str = "mean"
    ) -> Tensor:
        """tokens: int [B, T] -> logits [B, T, vocab_size]; with targets: int [B, T], the mean loss (a scalar, fp32, in
        nats) over the targets that are not -100, without ever holding all logits. With a layout: tokens [N], laid end
        to end, and targets [K]. reduction: "none" for the loss of each target, [K], without gradients."""
        hidden = self.hidden(tokens, layout)
        if targets is None:
            return self.output(hidden)
        if layout is None:
            kept = targets != -100
            hidden, targets = hidden[kept], targets[kept]
        # Under no_grad, too, a Function believes that a parameter needs a gradient, and would compute it.
        head = self.output.weight if torch.is_grad_enabled() else self.output.weight.detach()
        mean, losses = ChunkedCrossEntropy.apply(hidden, head, targets)
        return losses if reduction == "none" else mean


class LoRALinear(nn.Module):
    """y = x W^T + (alpha / rank) x A^T B^T: a frozen W with a trained low-rank addition (LoRA, arXiv 2106.09685).
    A: [rank, in], B: [out, rank], which is zero at first."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.scale = linear.weight, alpha / rank
        self.A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.B = nn.Parameter(linear.weight.new_empty(linear.out_features, rank))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw A, and set B to zero."""
        if not self.A.is_meta:
            A = nn.init.kaiming_uniform_(torch.empty(self.A.shape), a=math.sqrt(5))  # alike on all devices
            own(self.A).copy_(own_rows(A, self.A))
            own(self.B).zero_()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).add_(F.linear(F.linear(x, self.A), self.B), alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + (alpha / rank) B A, [out, in], in W's dtype: the plain weight that computes the same."""
        weight, A, B = (whole(p) for p in (self.weight, self.A, self.B))
        return torch.addmm(weight.float(), B.float(), A.float(), alpha=self.scale).to(weight.dtype)


def add_lora(model: Transformer, rank: int, alpha: float) -> None:
    """Freeze the model and give every linear of its blocks a LoRA addition, which is trained instead."""
    model.requires_grad_(False)
    for layer in model.layers:
        for part in (layer.attention, layer.feed_forward):
            for name, linear in list(part.named_children()):
                setattr(part, name, LoRALinear(linear, rank, alpha))


# Loss

CHUNK = 2**24  # logits computed at once: 64 MiB in fp32


def logits_gradient(logits: Tensor, log_z: Tensor, targets: Tensor, count: int) -> Tensor:
    """(softmax(logits) - onehot(targets)) / count, written over the logits of some tokens for some of the vocabulary.

    logits: fp32 [n, v]; log_z: [n, 1], log(sum(exp)) over the whole vocabulary; targets: int [n, 1], counted from the
    first of the v words, so that those outside 0 ... v - 1 belong to other words."""
    softmax = logits.sub_(log_z).exp_()
    inside = (targets >= 0) & (targets < logits.shape[1])
    softmax.scatter_add_(1, targets.clamp(0, logits.shape[1] - 1), -inside.float())
    return softmax.div_(count)


class ChunkedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy((hidden @ weight.T).float(), targets), with no more than CHUNK logits at a time; 0 of no tokens.
    Beside the mean it returns the loss of each token, [K], without gradients.

    A chunk's gradient is ready as soon as its logits are, so the forward pass computes it while it has them, and the
    backward pass only scales it. This saves 2.0 GiB of a 7B's step at 16 x 512 beside F.cross_entropy of all logits."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden: [K, dim]; weight: [V, dim]; targets: int [K] -> mean loss, a scalar, and each token's, [K], fp32."""
        K, V, targets = len(hidden), len(weight), targets[:, None]
        losses, log_z = (hidden.new_empty(shape, dtype=torch.float32) for shape in (K, (K, 1)))
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        # In bf16 a sum over many chunks of tokens would be a percent or two off, as each addition rounds. So there the
        # weight's gradient is one product over all tokens, for a few words at a time, from logits computed once more.
        rows, words = max(1, CHUNK // V), max(1, CHUNK // max(1, K))
        by_words = grad_weight is not None and K > rows and weight.dtype != torch.float32
        for n in range(0, K, rows):
            h, t = hidden[n : n + rows], targets[n : n + rows]
            logits = (h @ weight.T).float()  # [rows, V]
            z = log_z[n : n + rows] = logits.logsumexp(1, keepdim=True)
            losses[n : n + rows] = (z - logits.gather(1, t)).squeeze(1)
            if any(ctx.needs_input_grad):
                grad = logits_gradient(logits, z, t, K).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[n : n + rows])
            if grad_weight is not None and not by_words:
                grad_weight.addmm_(grad.T, h)
        for v in range(0, V if by_words else 0, words):
            logits = (hidden @ weight[v : v + words].T).float()  # [K, words]
            grad = logits_gradient(logits, log_z, targets - v, K).to(weight.dtype)
            torch.mm(grad.T, hidden, out=grad_weight[v : v + words])
        ctx.grads = grad_hidden, grad_weight
        ctx.mark_non_differentiable(losses)
        return losses.sum() / max(K, 1), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Scale what the forward pass computed, in place, so this runs once."""
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(grad_mean) for grad in grads), None


# Generation


def stream(model: Transformer, tokens: Tensor, max_new_tokens: int, temperature: float, top_p: float) -> Iterator:
    """`generate`, one step at a time: yields int [B], max_new_tokens times. tokens: int [B, T]. Raises ValueError if
    there are no tokens, or more in all than the model's context."""
    total, context = tokens.shape[1] + max_new_tokens, model.config.max_seq_len
    if tokens.shape[1] < 1 or total > context:
        raise ValueError(f"the prompt is empty, or with it {total} tokens exceed the context of {context}")
    cache = {}
    for _ in range(max_new_tokens):
        with torch.no_grad():  # entered at each step: a generator must not leave it set for its caller
            logits = model.output(model.hidden(tokens, cache=cache)[:, -1]).float()  # [B, V]
            if temperature < 1e-6:
                tokens = logits.argmax(1, keepdim=True)
            else:
                probabilities, order = (logits / temperature).softmax(1).sort(1, descending=True)
                # Nucleus sampling: the smallest set of likeliest tokens whose probabilities sum to top_p
                probabilities[probabilities.cumsum(1) - probabilities > top_p] = 0
                tokens = order.gather(1, torch.multinomial(probabilities, 1))
        yield tokens.squeeze(1)


def generate(
    model: Transformer, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
) -> Tensor:
    """Continue `tokens` (int [B, T] or [T]) with a KV cache; returns prompt and continuation, [B, T + max_new_tokens]
    (or [T + max_new_tokens]). temperature 0 takes the likeliest token; else one is drawn from the most likely ones
    that make up `top_p` of the probability. Raises ValueError if the model's context is too short."""
    tokens = torch.as_tensor(tokens, device=model.output.weight.device)
    batch = torch.atleast_2d(tokens)
    new = [step[:, None] for step in stream(model, batch, max_new_tokens, temperature, top_p)]
    return torch.cat([batch, *new], dim=1).view(*tokens.shape[:-1], -1)


# Reading checkpoints

# Meta's names -> Hugging Face's: modules, settings, and settings that config.json keeps under rope_scaling
HF_NAMES = {
    "tok_embeddings": "embed_tokens", "norm": "norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
HF_KEYS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "vocab_size": "vocab_size",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings", "sliding_window": "sliding_window",
    "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip
ROPE_KEYS = {
    "rope_scaling_factor": "factor", "rope_original_length": "original_max_position_embeddings",
    "rope_low_freq_factor": "low_freq_factor", "rope_high_freq_factor": "high_freq_factor",
}  # fmt: skip
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of safetensors
FLAG_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of --dtype


def to_hf_name(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`; KeyError for an unknown name."""
    block, module = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups("")
    return f"{'' if module == 'output' else 'model.'}{block}{HF_NAMES[module]}.weight"


def permute_rotary(weight: Tensor, head_dim: int, to_hf: bool) -> Tensor:
    """Reorder the rows of wq or wk, [heads * head_dim, dim]: within a head Meta keeps a rotary pair in neighbouring
    rows (a0 b0 a1 b1 ...), Hugging Face in two halves (a0 a1 ... b0 b1 ...)."""
    pairs = (-1, head_dim // 2, 2) if to_hf else (-1, 2, head_dim // 2)
    return weight.unflatten(0, pairs).transpose(1, 2).flatten(0, 2)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Map a file of weights: safetensors (8 bytes little-endian header length, JSON header, raw bytes), or a state dict
    in `.pth` or `.bin`, of which only tensors are unpickled: code in it is never run. Raises InputError if it is not
    whole, or holds anything but plain float tensors."""
    tensors, name = {}, "the header"
    try:
        if path.suffix != ".safetensors":
            new = zipfile.is_zipfile(path)  # else of a torch before 1.6, and not to be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=new)
            for name, t in tensors.items():
                dense = t.layout == torch.strided and t.device.type == "cpu"
                if not isinstance(name, str) or not dense or not t.is_floating_point():
                    raise TypeError
            return tensors
        data = np.memmap(path, mode="c")
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not 0 <= begin < end <= len(data) - start or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError
            flat = torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=start + begin)
            tensors[name] = flat.view(shape)
        return tensors
    except FileNotFoundError:
        raise InputError(f"{path}: this part of the checkpoint is missing; fetch it again") from None
    except Exception as error:  # whatever the damage leads to
        what = f"{type(error).__name__} at {str(name)[:80]!r}: damaged, quantized, or with code in it (not run)"
        raise InputError(f"{path}: not a state dict of float tensors ({what}); fetch the original") from None


def read_hf_config(file: Path) -> dict:
    """The fields of ModelConfig that a `config.json` gives; what it leaves out is as in transformers' LlamaConfig
    or MistralConfig. Raises InputError for other models than LLaMA's and Mistral's."""
    config = read_json(file)
    # transformers 4 spells these at the top level, transformers 5 inside rope_parameters
    given = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    given = [{"rope_type": rope.get("type", "default")} | rope if isinstance(rope, dict) else {"rope_type": rope}
             for rope in given or [{}]]  # fmt: skip
    rope = given[0]
    said = given[-1] | {key: config[key] for key in ("rope_theta", "original_max_position_embeddings") if key in config}
    defaults = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"}
    supported = {"model_type": ("llama", "mistral"), "hidden_act": ("silu",)}
    supported["rope_type"] = ("default", "llama3", "linear")
    supported |= dict.fromkeys(("attention_bias", "mlp_bias", "quantization_config"), (None, False))
    supported["is_causal"] = (None, True)
    if config.get("model_type") == "mistral":
        defaults |= {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
        supported["layer_types"] = (None,)  # with these it is a Ministral
    config = defaults | config | rope
    for key, values in supported.items():
        if config.get(key) not in values:
            only = " or ".join(map(str, values))
            raise InputError(f"{file}: {key} {config.get(key)!r:.60} is not supported, only {only}")
    if any(rope.get(key, value) != value for key, value in said.items() if key != "type"):
        raise InputError(f"{file}: what it says of rope in several places is not the same; remove what is wrong")
    if config["model_type"] == "llama":
        config.pop("sliding_window", None)
    params = {field: config[key] for field, key in HF_KEYS.items() if key in config}
    if config["rope_type"] == "llama3":
        params |= {"use_scaled_rope": True} | {field: rope.get(key) for field, key in ROPE_KEYS.items()}
    if config["rope_type"] == "linear":  # all frequencies are stretched: none turns so often that it stays
        params |= {"use_scaled_rope": True, "rope_scaling_factor": rope.get("factor")}
        params |= {"rope_low_freq_factor": 1e9, "rope_high_freq_factor": 2e9}
    return params


# Of each layout the settings, and the kinds of weight files, of which the first that is there counts
CHECKPOINT_FILES = {
    "meta": ("params.json",
             "consolidated.*.pth", "consolidated.pth", "consolidated.*.safetensors", "consolidated.safetensors"),
    "hf": ("config.json",
           "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
}  # fmt: skip


def find_checkpoint(path: Path) -> tuple[str, Path, list[Path]]:
    """Which layout a checkpoint folder has, "meta" or "hf", and the files that its settings and its weights are in, or
    should be. Raises InputError if it is no such folder."""
    if not path.is_dir():
        what = FOREIGN.get(path.suffix.lower(), "a file") if path.exists() else "no such folder"
        raise InputError(f"{path}: {what}; --ckpt takes the folder of a checkpoint")
    for layout, (settings, *kinds) in CHECKPOINT_FILES.items():
        for kind in kinds:
            found = (path / settings).is_file() and list(path.glob(kind))
            if found and kind.endswith(".json"):
                weight_map = read_json(found[0]).get("weight_map")
                parts = weight_map.values() if isinstance(weight_map, dict) else found  # which is refused as weights
                return layout, path / settings, sorted({path / Path(str(part)).name for part in parts})  # none outside
            if found:
                return layout, path / settings, [path / kind.replace("*", f"{n:02}") for n in range(len(found))]
    problem = "neither params.json and consolidated.00.pth (Meta's layout) nor config.json and model.safetensors"
    raise InputError(f"{path}: {problem} (Hugging Face's), or parts of these, are in it")


def read_checkpoint(path: str | Path) -> tuple[ModelConfig, dict[str, list[Tensor]]]:
    """A checkpoint folder's config and, under the names in its files, each parameter's memory-mapped pieces: the shards
    of a tensor-parallel model, else one. No weights are read, except to see whether a tied matrix is there twice.
    Raises InputError for files that are missing or damaged, and for other models."""
    layout, file, parts = find_checkpoint(Path(path))
    params = read_json(file) if layout == "meta" else read_hf_config(file)
    pieces: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, tensor in read_weights(part).items():
            if not name.endswith(("rope.freqs", "rotary_emb.inv_freq")):  # which the config gives already
                pieces.setdefault(name, []).append(tensor)
    if layout == "meta":
        unused = "max_batch_size", "dropout", "model_type"  # settings of training, which do not change the model
        params = {name: value for name, value in params.items() if value is not None and name not in unused}
        if "max_position_embeddings" in params:  # as some of Mistral's say
            params["max_seq_len"] = params.pop("max_position_embeddings")
        embedding, output = (pieces.get(name, []) for name in ("tok_embeddings.weight", "output.weight"))
        if params.get("vocab_size", -1) == -1:
            params["vocab_size"] = sum(len(shard) for shard in output if shard.dim())
        if output and all(map(torch.equal, embedding, output)):  # LLaMA-3.2 is tied; its raw file holds it twice
            params["tie_word_embeddings"] = True
            if params.get("use_scaled_rope"):  # by 32, where LLaMA-3.1 has 8, which its params.json does not say
                params.setdefault("rope_scaling_factor", 32.0)
    else:
        embedding, output = (pieces.get(name, []) for name in ("model.embed_tokens.weight", "lm_head.weight"))
        if params.get("tie_word_embeddings") and output and not all(map(torch.equal, embedding, output)):
            params["tie_word_embeddings"] = False  # they were trained apart since
    try:
        config = ModelConfig(**params)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: not the settings of a LLaMA or Mistral model: {error}") from None
    if config.tie_word_embeddings:
        pieces.pop("output.weight" if layout == "meta" else "lm_head.weight", None)
    if not any(f"layers.{config.n_layers - 1}." in name for name in pieces):
        raise InputError(f"{file}: says {config.n_layers} layers, which the weight files do not hold")
    return config, pieces


def require_device(device: str) -> None:
    """Raise InputError if there is none of that name."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):  # torch without CUDA asserts, others miss a package
        raise InputError(f"--device {device}: there is no such device here; try --device cpu") from None


def load_model(
    path: str | Path, device: str = "cpu", dtype: torch.dtype | None = torch.float32, distribute: Callable | None = None
) -> Transformer:
    """Load a checkpoint folder of either layout. dtype: None: the widest in the files. distribute: takes the model while it
    has no memory, has FSDP shard it, and returns the device of the shards, to which each process then copies its own
    rows. Raises InputError, in one line, for whatever is wrong with the folder."""
    require_device(device)
    path = Path(path)
    layout, (config, pieces) = find_checkpoint(path)[0], read_checkpoint(path)
    with torch.device("meta"):  # shapes without memory
        widest = max((t.dtype for parts in pieces.values() for t in parts), key=lambda dtype: dtype.itemsize)
        model = Transformer(config).to(dtype or widest)
    model.layout = layout
    in_files = {name: to_hf_name(name) if layout == "hf" else name for name, _ in model.named_parameters()}
    for name in sorted(pieces.keys() ^ in_files.values()):
        what = "unexpected: not a LLaMA or Mistral checkpoint" if name in pieces else "missing"
        raise InputError(f"{path}: tensor {name[:80]!r} is {what}")
    if distribute:
        model.to_empty(device=distribute(model))
    for name, stored in tqdm(in_files.items(), f"loading {path.name}", leave=False, disable=None):
        shards, parameter = pieces.pop(stored), model.get_parameter(name).detach()
        cut = len(shards) > 1 and parameter.dim() == 2  # into tensor-parallel shards; norms are whole in each of them
        dim = int(shards[0].shape[-1:] != parameter.shape[-1:])  # by rows, or by columns
        expected = [size / len(shards) if cut and n == dim else size for n, size in enumerate(parameter.shape)]
        if any(list(shard.shape) != expected for shard in shards):
            what = f"{name} of shape {list(shards[0].shape)} in {len(shards)} file(s) is not {list(parameter.shape)}"
            raise InputError(f"{path}: {what}: a shard is missing, or config and weights do not belong together")
        weight = torch.cat(shards, dim) if cut else shards[0]
        if layout == "hf" and name.endswith(("wq.weight", "wk.weight")):
            weight = permute_rotary(weight, config.head_dim, to_hf=False)
        if not distribute:
            parameter = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)  # empty_like imports sympy
            model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(parameter)
        own(parameter).copy_(own_rows(weight, parameter))
    if config.tie_word_embeddings and not distribute:
        model.output.weight = model.tok_embeddings.weight
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.reset()
    return model


def config_ends(path: str | Path, kind: str = "") -> list[int]:
    """The ids that end a text, as Hugging Face's `config.json` (or `generation_config.json`) says, if it does."""
    file = Path(path) / f"{kind}config.json"
    ends = read_json(file).get("eos_token_id") if file.is_file() else None
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def load(path: str | Path, args: argparse.Namespace, distribute=None) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a checkpoint folder, on args.device and in args.dtype, None being the device's own."""
    find_checkpoint(Path(path))  # which says what is wrong with the folder, before the tokenizer is missed
    tokenizer, dtype = load_tokenizer(path), args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    model = load_model(path, args.device, FLAG_DTYPES[dtype], distribute)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(f"{path}: {tokenizer.vocab_size} tokens in tokenizer, {model.config.vocab_size} in model: take out "
                         "of it what was added, as a padding token, or copy the model's own there")  # fmt: skip
    ends, token, said = config_ends(path), named_eos(Path(path)), ""
    if tokenizer.hf_config and token not in (None, tokenizer.hf_config.get("eos_token")):
        said = f"tokenizer_config.json says {token}"
    if ends and tokenizer.eos_id not in ends:
        said = f"config.json says {', '.join(map(str, ends))}"
    if said:
        warnings.warn(f"{path}: records will end in token {tokenizer.eos_id} (-1: none), as its tokenizer says; {said}: correct "
                      "the wrong one; tokens that were added are in tokenizer.json alone, which is read if there is no "
                      "tokenizer.model", stacklevel=2)  # fmt: skip
    return model, tokenizer


# Writing checkpoints


def saved_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight, one at a time, with LoRA's additions merged into it. A tied one comes once. Where
    weights are sharded all processes must walk through this together."""
    adapted = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, parameter in model.named_parameters():
        if name.endswith(".weight"):
            yield name, adapted[name].merged() if name in adapted else whole(parameter.detach())


def meta_config(config: ModelConfig) -> dict:
    """`params.json`, without what can be told from the rest: Meta's own code refuses settings it does not know."""
    told = asdict(ModelConfig()) | {
        "hidden_dim": config.swiglu_hidden_dim(), "head_dim": config.dim / config.n_heads, "n_kv_heads": config.n_heads,
        "max_seq_len": config.family_context(), "tie_word_embeddings": config.tie_word_embeddings,  # by the weights
        "rope_scaling_factor": 32.0 if config.tie_word_embeddings and config.use_scaled_rope else 8.0,
    }  # fmt: skip
    always = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps")
    return {key: value for key, value in asdict(config).items() if key in always or value != told[key]}


def hf_config(model: Transformer) -> dict:
    """`config.json` in both spellings at once: transformers 4 reads the top level, transformers 5 `rope_parameters`."""
    config, rope = model.config, {"rope_type": "default"}
    if config.use_scaled_rope:
        rope = {"rope_type": "llama3"} | {key: getattr(config, field) for field, key in ROPE_KEYS.items()}
    dtype = str(model.output.weight.dtype).removeprefix("torch.")
    # LLaMA has no window there, and its heads must divide the width.
    family = "mistral" if config.sliding_window or config.dim % config.n_heads else "llama"
    return {key: getattr(config, field) for field, key in HF_KEYS.items()} | {
        "architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family, "hidden_act": "silu",
        "rope_scaling": rope if config.use_scaled_rope else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta}, "torch_dtype": dtype, "dtype": dtype,
    }  # fmt: skip


def write_safetensors(model: Transformer, values: Iterator[tuple[str, Tensor]], file: BinaryIO) -> None:
    """Write the weights under Hugging Face's names; `read_weights` says how such a file is laid out."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    for name, p in model.named_parameters():
        if name.endswith(".weight"):
            begin, end = end, end + p.numel() * p.element_size()
            header[to_hf_name(name)] = {"dtype": dtypes[p.dtype], "shape": list(p.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for name, weight in tqdm(values, "saving", len(header) - 1, leave=False, disable=None):
        if name.endswith(("wq.weight", "wk.weight")):
            weight = permute_rotary(weight, model.config.head_dim, to_hf=True)
        file.write(weight.contiguous().cpu().view(torch.uint8).numpy())


def save_model(model: Transformer, path: str | Path, layout: str = "meta", write: bool = True) -> None:
    """Write the weights, in the dtype they have, as a checkpoint folder: `layout` "meta" or "hf". LoRA's additions are
    merged into them. The folder is made if it is missing; a file is replaced only once its successor is whole. Where
    weights are sharded, all processes call this, and one writes.

    Raises InputError if the folder already holds weights that this layout's file would not replace, OSError or
    RuntimeError (torch.save's) if writing fails, and KeyError for another layout."""
    path, config, values = Path(path), model.config, saved_weights(model)
    files = {"meta": ("consolidated.00.pth", "params.json"), "hf": ("model.safetensors", "config.json")}[layout]
    try:
        if not write:
            return
        for pattern in ("*.safetensors", "*.pth", "*.bin", "*.index.json", "params.json", "config.json"):
            for other in path.glob(pattern):
                if other.name not in files:
                    raise InputError(f"{other}: belongs to another checkpoint; save to another folder")
        path.mkdir(parents=True, exist_ok=True)
        with atomic_write(path / files[0]) as file:
            if layout == "hf":
                write_safetensors(model, values, file)
            else:
                state = {name: weight.cpu() for name, weight in values}
                if config.tie_word_embeddings:  # Meta's code wants the head all the same; it is stored once
                    state["output.weight"] = state["tok_embeddings.weight"]
                torch.save(state, file)
        with atomic_write(path / files[1]) as file:
            file.write(json.dumps(hf_config(model) if layout == "hf" else meta_config(config), indent=2).encode())
    finally:
        for _, value in values:  # the other processes wait for this one to take its part, and it for them
            value[:1].cpu()


def main() -> None:
    """`python model.py --ckpt DIR --prompt TEXT`: print the prompt and stream its continuation; or --export it."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=main.__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint folder, Meta's or Hugging Face's layout")
    add("--prompt", default="", help="text to continue (default: begin from the BOS token alone)")
    add("--instruct", action="store_true", help="put the prompt into the template of instruction records")
    add("--max-new-tokens", type=at_least(1), default=200, help="default: %(default)s")
    add("--temperature", type=at_least(0, float), default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=at_least(1e-12, float, 1), default=1.0, help="nucleus sampling (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", choices=FLAG_DTYPES, help="default: bf16 on cuda, fp32 elsewhere; of an export, as it is stored")
    add("--seed", type=at_least(0), default=0, help="default: %(default)s")
    add("--export", metavar="DIR", help="save the checkpoint in Hugging Face's layout, its tokenizer included, and end")
    command(parser, lambda: export_or_continue(parser.parse_args()))


def export_or_continue(args: argparse.Namespace) -> None:
    """Save the checkpoint in Hugging Face's layout, or print the prompt and stream what the model says next."""
    if args.export == "":
        raise InputError("--export: name a folder")
    if args.export:
        if any(Path(args.export).glob("*.safetensors")):
            raise InputError(f"--export {args.export}: holds a checkpoint already; choose another folder")
        load_tokenizer(args.ckpt), config_ends(args.ckpt)  # which say what is wrong, before anything is written
        save_model(load_model(args.ckpt, dtype=FLAG_DTYPES.get(args.dtype)), args.export, "hf")
        copy_tokenizer(args.ckpt, args.export)
        return print(f"saved: {args.export}")
    if args.prompt.encode(errors="ignore").decode() != args.prompt:
        raise InputError("--prompt: not UTF-8 text")
    model, tokenizer = load(args.ckpt, args)
    torch.manual_seed(args.seed)
    ids = tokenizer.encode(alpaca_prompt(args.prompt) if args.instruct else args.prompt, bos=True)
    if not ids:
        raise InputError("--prompt: give one, as this tokenizer has no BOS token to begin with")
    tokens = torch.tensor([ids], device=args.device)
    with torch.no_grad():
        finite = model(tokens[:, -1:]).isfinite().all()
    if not finite:
        raise InputError(f"{args.ckpt}: what the model computes is not finite: damaged weights, or not for its dtype")
    room = model.config.max_seq_len - len(ids)
    if room < 1:
        raise InputError(f"--prompt: {len(ids)} tokens leave no room in the context of {model.config.max_seq_len}")
    ends = [tokenizer.eos_id, *config_ends(args.ckpt), *config_ends(args.ckpt, "generation_")]
    shown = tokenizer.decode(ids)
    print(shown, end="", flush=True)
    for token in stream(model, tokens, min(args.max_new_tokens, room), args.temperature, args.top_p):
        if token.item() in ends:
            break
        ids.append(token.item())
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else the rest of a multi-byte character is still to come
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


if __name__ == "__main__":
    main()
