"""The LLaMA family in plain PyTorch, from raw checkpoint weights and back.

One model serves LLaMA-1/2/3/3.1/3.2, CodeLlama, TinyLlama and Mistral-7B. Each of its blocks computes

    x = x + attention(rms_norm(x))         rotary positions, grouped-query heads, causal
    x = x + w2(silu(w1(y)) * w3(y))        y = rms_norm(x), SwiGLU (arXiv 2002.05202)

Parameters carry the names of Meta's raw checkpoints, rotary pairs are Meta's interleaved ones, and both Meta's and
Hugging Face's checkpoint layouts are read and written here. Top to bottom: configuration, layers, loss, model,
generation, reading checkpoints, writing them.

    python model.py --ckpt DIR --prompt "Once upon a time"
"""

import ctypes
import functools
import json
import math
import mmap
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import InputError, Parser, atomic_write, load_tokenizer, read_json, run_command

CHUNK = 2**24  # elements handled at once where all would take too much memory: 64 MiB in fp32


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
            value, kind = getattr(self, field.name), str(field.type)
            if value is None and "None" in kind:
                continue
            if "bool" in kind:
                good = isinstance(value, bool)
            elif "int" in kind:
                good = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
            else:
                good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30
            if not good:
                raise ValueError(f"{field.name} is {value!r}, which is not a positive number, or true or false")
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        self.head_dim = self.head_dim or self.dim // self.n_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings turn pairs")
        self.hidden_dim = self.hidden_dim or self.swiglu_hidden_dim()
        self.max_seq_len = self.max_seq_len or self.family_context()

    def swiglu_hidden_dim(self) -> int:
        """Meta's rule: 2/3 of 4 dim, so that three matrices cost what two of 4 dim would, rounded up."""
        hidden = int(2 * 4 * self.dim / 3)
        hidden = int((self.ffn_dim_multiplier or 1) * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    def family_context(self) -> int:
        """Context length in tokens, which `params.json` leaves out: told from what sets the families apart."""
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

    positions: [T]. Returns complex64 [T, head_dim / 2].
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
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
    """Turn neighbouring pairs (Meta's interleaved layout), each a complex number. x: [B, T, heads, head_dim]; rotation:
    complex [T, head_dim / 2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).type_as(x)


FUSED_RMS_NORM = hasattr(torch.ops.aten, "_fused_rms_norm_backward")  # torch has one kernel for it on GPUs from 2.9


class LeanRMSNorm(torch.autograd.Function):
    """F.rms_norm that keeps x and one number a row for the backward pass, where torch's plain-operation version, the
    one it has for CPUs and had for GPUs before 2.9, keeps two fp32 copies of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: [..., dim] -> [..., dim], y = x * r * weight with r = 1 / sqrt(mean(x^2) + eps)."""
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # sqrt(sum(x^2)), [..., 1]
        r = r.square().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """With u = x * r: dx = r * (g - u * mean(g * u)), g = grad * weight; dweight = sum(grad * u)."""
        x, weight, r = ctx.saved_tensors
        u = x * r  # fp32, as r is
        grad_weight = (grad * u).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = grad.float() * weight
        mean = torch.linalg.vecdot(g, u).unsqueeze(-1).div_(x.shape[-1])
        return g.sub_(u.mul_(mean)).mul_(r).to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """x * weight / sqrt(mean(x^2) + eps) (arXiv 1910.07467), computed in fp32 whatever the dtype of x."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim] -> [..., dim]."""
        if x.is_cuda and FUSED_RMS_NORM:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return LeanRMSNorm.apply(x, self.weight, self.eps)


class WeightGradient(torch.autograd.Function):
    """The identity on y = x W^T; its backward pass gives W its gradient, or what projects it the factors of that."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """y: [..., out], x: [..., in], weight: [out, in] -> y."""
        ctx.save_for_backward(x)
        ctx.weight = weight
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        """dW = grad^T x, [out, in]."""
        (x,) = ctx.saved_tensors
        dY, X = grad.flatten(0, -2), x.flatten(0, -2)
        project_product = getattr(ctx.weight, "project_product", None)  # owlore.ProjectedAdam's
        if project_product is not None and project_product(ctx.weight, dY, X):
            return grad, None, None
        return grad, None, dY.T @ X


class Linear(nn.Linear):
    """y = x W^T whose backward pass first makes the weight's gradient, lets go of x, and only then makes the gradient
    of x. What projects the weight's gradient and frees it, as `ProjectedAdam` does, has done so by then: autograd's own
    would hold x and both gradients at once."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        if not self.weight.requires_grad:
            return F.linear(x, self.weight)
        return WeightGradient.apply(F.linear(x, self.weight.detach()), x, self.weight)


class LoRALinear(Linear):
    """y = x W^T + (alpha / rank) x A^T B^T: a frozen W with a trained low-rank addition (LoRA, arXiv 2106.09685).
    A: [rank, in], B: [out, rank], which is zero at first."""

    def __init__(self, linear: Linear, rank: int, alpha: float):
        nn.Module.__init__(self)  # not Linear's, which would make another weight
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.weight, self.scale = linear.weight, alpha / rank
        self.A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight).add_(F.linear(F.linear(x, self.A), self.B), alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + (alpha / rank) B A, [out, in], in W's dtype: the plain weight that computes the same."""
        return torch.addmm(self.weight.float(), self.B.float(), self.A.float(), alpha=self.scale).to(self.weight.dtype)


class KVCache:
    """Keys and values of every token seen so far, per attention module: each [B, n_kv_heads, capacity, head_dim]."""

    def __init__(self, capacity: int):
        self.capacity, self.length, self.store = capacity, 0, {}

    def append(self, attention: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [B, n_kv_heads, T, head_dim] behind what is stored; returns all of both up to here."""
        if attention not in self.store:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.store[attention] = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.shape[2]
        for stored, new in zip(self.store[attention], (k, v)):
            stored[:, :, self.length : end] = new
        return tuple(stored[:, :, :end] for stored in self.store[attention])


class Attention(nn.Module):
    """Causal self-attention with grouped-query heads (arXiv 2305.13245): n_heads queries share n_kv_heads keys and
    values."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """x: [B, T, dim] -> [B, T, dim]. mask: bool [T, keys], or None for plain causal attention."""
        B, T, _ = x.shape
        q = rotate(self.wq(x).view(B, T, self.n_heads, self.head_dim), rotation).transpose(1, 2)
        k = rotate(self.wk(x).view(B, T, self.n_kv_heads, self.head_dim), rotation).transpose(1, 2)
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self, k, v)
        # torch's causal mask needs as many keys as queries. A single query on a cache sees every key: it needs none.
        causal, grouped = mask is None and (cache is None or T > 1), self.n_heads != self.n_kv_heads
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # y: [B, n_heads, T, head_dim]


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping gate and up only: autograd's own would keep silu(gate) as well. These are the widest
    activations of the model."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: [..., hidden_dim] -> [..., hidden_dim]."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """dgate = grad * up * silu'(gate), dup = grad * silu(gate), written over up and gate, which nothing else needs:
        with them go the two largest tensors of the backward pass. (A second backward pass would be refused by
        autograd.)"""
        gate, up = ctx.saved_tensors
        rows = max(1, CHUNK // gate.shape[-1])
        for g, u, d in zip(*(t.flatten(0, -2).split(rows) for t in (gate, up, grad))):
            grad_up = F.silu(g).mul_(d)
            u.mul_(d)
            torch.ops.aten.silu_backward.grad_input(u, g, grad_input=u)
            g.copy_(grad_up)
        return up, gate


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim)
        self.w2 = Linear(config.hidden_dim, config.dim)
        self.w3 = Linear(config.dim, config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, dim] -> [B, T, dim]."""
        return self.w2(SwiGLU.apply(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """One transformer layer: the unit that OwLore scores, samples and freezes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config)
        self.ffn_norm = RMSNorm(config)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """x: [B, T, dim] -> [B, T, dim]."""
        x = x + self.attention(self.attention_norm(x), rotation, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class ChunkedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=-100), a few rows of logits at a time.

    All logits of a 7B at 16 x 512 tokens would be 1 GB in fp32, their gradient as much again. The gradient of a chunk,
    softmax(logits) - onehot(target), is ready as soon as its logits are, so the forward pass computes it while it has
    them, and the backward pass only scales it.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden: [N, dim]; weight: [V, dim]; targets: int [N] -> mean loss, a scalar in fp32."""
        rows = max(1, CHUNK // weight.shape[0])
        count = (targets != -100).sum().clamp(min=1)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for h, t, start in zip(hidden.split(rows), targets.split(rows), range(0, len(hidden), rows)):
            logits = (h @ weight.T).float()  # [rows, V]
            kept = (t != -100).unsqueeze(1)
            at_target = t.clamp(min=0).unsqueeze(1)
            log_z = logits.logsumexp(1, keepdim=True)
            loss += ((log_z - logits.gather(1, at_target)) * kept).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            softmax = logits.sub_(log_z).exp_()
            softmax.scatter_add_(1, at_target, softmax.new_full((), -1.0).expand(at_target.shape))
            grad = softmax.mul_(kept / count).to(weight.dtype)  # d loss / d logits
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, h)
        ctx.grads = grad_hidden, grad_weight
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Scale what the forward pass computed. A second backward pass through the same loss is not possible."""
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(grad_loss) for grad in grads), None


class Transformer(nn.Module):
    """A LLaMA-style decoder. Freshly built it is randomly initialised; `load_model` fills it from a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False  # recompute each block's activations in the backward pass, do not store them
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config)
        self.output = Linear(config.dim, config.vocab_size)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # GPT-2's initialisation: what writes into the residual stream starts smaller, by depth
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)
        if config.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def compile_frozen_blocks(self) -> None:
        """From now on run blocks by a compiled `Block.forward`, one for all, while they are frozen. An active one runs
        as it is written: in its backward pass the optimizer takes the gradients, which a compiled one has no place
        for."""
        compiled = torch.compile(Block.forward)

        def forward(block: Block, *inputs) -> Tensor:
            frozen = not any(parameter.requires_grad for parameter in block.parameters())
            return (compiled if frozen else Block.forward)(block, *inputs)

        for block in self.layers:
            block.forward = functools.partial(forward, block)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens: int [B, T] -> what the output head reads: [B, T, dim]. A cache holds the tokens that came before."""
        T, start = tokens.shape[1], cache.length if cache else 0
        positions = torch.arange(start, start + T, device=tokens.device)
        rotation = rotary(self.config, positions)
        window = self.config.sliding_window or start + T
        mask = None
        if start + T > window or (start > 0 and T > 1):
            keys = torch.arange(start + T, device=tokens.device)
            distance = positions[:, None] - keys[None, :]
            mask = (distance >= 0) & (distance < window)  # [T, start + T]
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rotation, mask, cache)
        if cache:
            cache.length += T
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens: int [B, T] -> logits [B, T, vocab_size]; with targets: int [B, T], the mean loss (a scalar, fp32, in
        nats) over the targets that are not -100, without ever holding all logits."""
        hidden = self.hidden(tokens, cache)
        if targets is None:
            return self.output(hidden)
        head = self.output.weight if torch.is_grad_enabled() else self.output.weight.detach()
        return ChunkedCrossEntropy.apply(hidden.flatten(0, 1), head, targets.flatten())


def add_lora(model: Transformer, rank: int, alpha: float) -> None:
    """Freeze the model and give every linear of its blocks a LoRA addition, which is trained instead."""
    model.requires_grad_(False)
    for layer in model.layers:
        for part in (layer.attention, layer.feed_forward):
            for name, linear in list(part.named_children()):
                setattr(part, name, LoRALinear(linear, rank, alpha))


def stream(model: Transformer, tokens: Tensor, max_new_tokens: int, temperature: float, top_p: float) -> Iterator:
    """`generate`, one step at a time: yields int [B], max_new_tokens times. Raises ValueError for tokens without any,
    or more in all than the model's context."""
    if tokens.shape[1] < 1:
        raise ValueError("generation needs at least one token to begin with: the BOS token, say")
    if tokens.shape[1] + max_new_tokens > model.config.max_seq_len:
        raise ValueError(f"{tokens.shape[1]} + {max_new_tokens} tokens exceed the context, {model.config.max_seq_len}")
    cache = KVCache(tokens.shape[1] + max_new_tokens)
    for _ in range(max_new_tokens):
        with torch.no_grad():  # entered at each step: a generator must not leave it set for its caller
            logits = model.output(model.hidden(tokens, cache)[:, -1]).float()  # [B, V]
            if temperature == 0:
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
    that make up `top_p` of the probability. Raises ValueError where the model's context is too short."""
    tokens = torch.as_tensor(tokens, device=model.output.weight.device)
    batch = tokens if tokens.dim() == 2 else tokens[None]
    new = [step[:, None] for step in stream(model, batch, max_new_tokens, temperature, top_p)]
    return torch.cat([batch, *new], dim=1).view(*tokens.shape[:-1], -1)


# Reading checkpoints: a `read_*` function gives the config and, for each parameter, the memory-mapped pieces that make
# it up. `load_model` checks every name and shape before it allocates anything, then copies piece by piece.

BLOCK_NAMES = {  # Meta's name -> Hugging Face's
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
ROPE_KEYS = {  # ModelConfig's field -> its key in Hugging Face's rope_scaling
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def to_hf_name(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`; KeyError for an unknown name."""
    block = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if block:
        return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.weight"
    return f"{OUTER_NAMES[name.removesuffix('.weight')]}.weight"


def permute_rotary(weight: Tensor, head_dim: int, to_hf: bool) -> Tensor:
    """Reorder the rows of wq or wk, [heads * head_dim, dim]: within a head Meta keeps a rotary pair in neighbouring
    rows (a0 b0 a1 b1 ...), Hugging Face in two halves (a0 a1 ... b0 b1 ...)."""
    pairs = (-1, head_dim // 2, 2) if to_hf else (-1, 2, head_dim // 2)
    return weight.unflatten(0, pairs).transpose(1, 2).flatten(0, 2)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file: 8 bytes little-endian header length, JSON header, raw bytes. No data is read here.

    Raises InputError where the header and the file's size do not agree.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise InputError(f"{path}: header of {start - 8} bytes in a file of {size}: truncated; fetch it again")
        try:
            header = json.loads(file.read(start - 8))
            header = {name: entry for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, AttributeError, RecursionError):
            raise InputError(f"{path}: its header is not a safetensors file's JSON; fetch it again") from None
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            whole = all(type(n) is int for n in (*shape, begin, end)) and all(n > 0 for n in shape)
            if not whole or not 0 <= begin <= end <= size - start or end - begin != count * dtype.itemsize:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            what = f"{name[:80]!r} is not a float tensor within its {size} bytes"
            raise InputError(f"{path}: {what}: truncated, altered or quantized; fetch the original") from None
        tensors[name] = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + begin).view(tuple(shape))
    return tensors


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Map a `.pth` or `.bin` state dict. Only tensors are unpickled: code in the file is refused, never run."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: damaged, truncated or saved by torch < 1.6; fetch it again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path}: holds more than tensors (it may run code when loaded); refused") from None
    except Exception as error:  # torch.load has no one error for a damaged file
        raise InputError(f"{path}: damaged or truncated ({type(error).__name__}); fetch it again") from None
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) and isinstance(n, str) for n, t in state.items()):
        raise InputError(f"{path}: not a state dict of tensors")
    for name, tensor in state.items():
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_contiguous()
        if not dense or not tensor.is_floating_point():
            raise InputError(f"{path}: {name[:80]!r} is not a plain float tensor; quantized weights are not supported")
    return state


def read_config(path: Path) -> dict:
    """A JSON file that must hold an object."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a JSON object; fetch it again")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read one weight file of either kind. Raises InputError where it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"{path}: this part of the checkpoint is missing; fetch it again")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def read_meta(path: Path) -> tuple[dict, dict[str, list[Tensor]]]:
    """Meta's raw layout: `params.json` and `consolidated.*`. Returns the config's fields and each
    parameter's shards. Raises InputError for files that are missing or damaged."""
    params = read_config(path / "params.json")
    files = sorted(path.glob("consolidated*.pth")) or sorted(path.glob("consolidated*.safetensors"))
    if not files:
        raise InputError(f"{path}: has params.json but no consolidated.*.pth or consolidated.safetensors")
    for number, file in enumerate(files):
        if file.stem not in ("consolidated", f"consolidated.{number:02}"):
            raise InputError(f"{path}: shard consolidated.{number:02}{file.suffix} is missing; fetch it again")
    pieces: dict[str, list[Tensor]] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            pieces.setdefault(name, []).append(tensor)
    pieces.pop("rope.freqs", None)
    if params.get("vocab_size", -1) == -1 and "output.weight" in pieces:
        params["vocab_size"] = sum(shard.shape[0] for shard in pieces["output.weight"] if shard.dim())
    # Training code leaves its own settings in params.json; only these are known not to change the model.
    for name in ("max_batch_size", "dropout", "model_type"):
        params.pop(name, None)
    # LLaMA-3.2 is tied, and its raw file holds the matrix twice.
    embedding, output = (pieces.get(name, []) for name in ("tok_embeddings.weight", "output.weight"))
    if not output or (len(embedding) == len(output) == 1 and torch.equal(embedding[0], output[0])):
        pieces.pop("output.weight", None)
        params["tie_word_embeddings"] = True
    return params, pieces


def read_hf(path: Path) -> tuple[dict, dict[str, list[Tensor]]]:
    """Hugging Face's layout: `config.json` and `model*.safetensors` or `pytorch_model*.bin`. Returns the config's
    fields under Meta's names and each parameter's one piece, rows of q and k in Hugging Face's order still. Raises
    InputError for files that are missing or damaged, and for other models than LLaMA's and Mistral's."""
    config = read_config(path / "config.json")

    def need(condition: object, what: str) -> None:
        if not condition:
            raise InputError(f"{path / 'config.json'}: {what} is not supported: only LLaMA and Mistral models are")

    architecture = config.get("model_type")
    need(architecture in ("llama", "mistral"), f"model_type {architecture!r}")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        need(not config.get(key), key)
    need(config.get("hidden_act", "silu") == "silu", f"hidden_act {config.get('hidden_act')!r}")
    # transformers 4 spells these at the top level, transformers 5 inside rope_parameters
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    need(isinstance(rope, dict), "this rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(kind in ("default", "llama3"), f"rope_scaling of type {kind!r}")
    params = {
        "dim": config.get("hidden_size"),
        "n_layers": config.get("num_hidden_layers"),
        "n_heads": config.get("num_attention_heads"),
        "n_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "hidden_dim": config.get("intermediate_size"),
        "vocab_size": config.get("vocab_size"),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "max_seq_len": config.get("max_position_embeddings", 2048),
        "sliding_window": config.get("sliding_window") if architecture == "mistral" else None,
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }
    if kind == "llama3":
        params["use_scaled_rope"] = True
        for field, key in ROPE_KEYS.items():
            params[field] = rope.get(key)

    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / index).is_file():
            weight_map = read_config(path / index).get("weight_map")
            names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {""}
            if not all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
                raise InputError(f"{path / index}: its weight_map names what is not a file of its own folder; refused")
            files = [path / name for name in sorted(names)]
            break
    else:
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()][:1]
    if not files:
        raise InputError(f"{path}: has config.json but no model.safetensors, pytorch_model.bin or index of either")
    pieces = {}
    to_meta = {hf: meta for meta, hf in (BLOCK_NAMES | OUTER_NAMES).items()}
    for file in files:
        for name, tensor in read_tensors(file).items():
            match = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.+)\.weight", name)
            if name.endswith("rotary_emb.inv_freq"):
                continue  # older versions stored what the config already says
            if not match or match[2] not in to_meta:
                raise InputError(f"{file}: tensor {name[:80]!r} is unexpected: not a LLaMA or Mistral checkpoint")
            pieces[f"{match[1] or ''}{to_meta[match[2]]}.weight"] = [tensor]
    if params["tie_word_embeddings"] is True:
        pieces.pop("output.weight", None)
    return params, pieces


def checkpoint_layout(path: str | Path) -> str:
    """Returns "meta" or "hf". Raises InputError where the folder holds neither."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; --ckpt takes the folder of a checkpoint")
    if (path / "params.json").is_file() and any(path.glob("consolidated*")):
        return "meta"
    if (path / "config.json").is_file():
        return "hf"
    if (path / "params.json").is_file():
        return "meta"
    raise InputError(f"{path}: neither params.json (Meta's layout) nor config.json (Hugging Face's) is in this folder")


def shard_dimension(name: str, shards: list[Tensor], config: ModelConfig) -> int | None:
    """The dimension along which a parameter's tensor-parallel shards are joined; None: every shard has all of it."""
    if name.endswith("norm.weight"):
        return None
    if name.startswith("tok_embeddings"):  # LLaMA-1/2 split the columns, LLaMA-3 the rows
        return 0 if shards[0].shape[-1] == config.dim else 1
    return 1 if name.endswith(("wo.weight", "w2.weight")) else 0


def drop_pages(tensor: Tensor) -> None:
    """Give back the memory-mapped pages behind a tensor that has been copied, so that the file does not count as a
    second copy of the model in this process. A hint: pages that are needed again are read again."""
    if sys.platform == "linux":
        page, begin = mmap.PAGESIZE, tensor.data_ptr()
        first, last = -(-begin // page) * page, (begin + tensor.nbytes) // page * page
        if last > first:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def load_model(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """Load a checkpoint folder of either layout. Raises InputError, in one line, for whatever is wrong with it."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        raise InputError(f"--device {device}: there is no such device here; try --device cpu") from None
    path = Path(path)
    layout = checkpoint_layout(path)
    params, pieces = read_meta(path) if layout == "meta" else read_hf(path)
    file = path / ("params.json" if layout == "meta" else "config.json")
    unknown = set(params) - {field.name for field in fields(ModelConfig)}
    if unknown:
        raise InputError(f"{file}: {min(unknown)!r} is not a setting of the LLaMA and Mistral models supported here")
    if params.get("n_layers") != len({name.split(".")[1] for name in pieces if name.startswith("layers.")}):
        raise InputError(f"{file}: says {params.get('n_layers')} layers, which is not what the weight files hold")
    try:
        config = ModelConfig(**params)
        with torch.device("meta"):
            model = Transformer(config)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise InputError(f"{file}: {str(error).splitlines()[0]}") from None

    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ pieces.keys()):
        what = "missing" if name in parameters else "unexpected: not a LLaMA or Mistral checkpoint"
        raise InputError(f"{path}: tensor {name[:80]!r} is {what}")
    for name, parameter in parameters.items():
        asked, shapes = list(parameter.shape), [list(shard.shape) for shard in pieces[name]]
        joined = [shape[:] for shape in shapes]
        if all(len(shape) == 2 for shape in shapes) and (d := shard_dimension(name, pieces[name], config)) is not None:
            for shape in joined:
                shape[d] = sum(other[d] for other in shapes)
        if any(shape != asked for shape in joined):
            has = f"{name} has shape {joined[0]}, but {file.name} asks for {asked}"
            raise InputError(f"{path}: {has}; a shard is missing, or the files do not belong together")

    model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        model.output.weight = model.tok_embeddings.weight
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in tqdm(parameters.items(), f"loading {path.name}", leave=False, disable=None):
            dimension, start = shard_dimension(name, pieces[name], config), 0
            for shard in pieces.pop(name):
                if layout == "hf" and name.endswith(("wq.weight", "wk.weight")):
                    parameter.copy_(permute_rotary(shard, config.head_dim, to_hf=False))
                elif dimension is None:
                    parameter.copy_(shard)
                else:
                    parameter.narrow(dimension, start, shard.shape[dimension]).copy_(shard)
                    start += shard.shape[dimension]
                drop_pages(shard)
    return model


# Writing checkpoints


def saved_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight, one at a time, with LoRA's additions merged into it. A tied one comes once."""
    adapted = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, parameter in model.named_parameters():
        if name.endswith(".weight"):
            yield name, adapted[name].merged() if name in adapted else parameter.detach()


def save_meta(model: Transformer, path: Path) -> None:
    """Meta's layout: `consolidated.00.pth` and `params.json`."""
    config = model.config
    inferred = {
        "hidden_dim": config.swiglu_hidden_dim(),
        "head_dim": config.dim // config.n_heads,
        "n_kv_heads": config.n_heads,
        "max_seq_len": config.family_context(),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    # Meta's own code refuses settings it does not know, so only what differs from its defaults is written.
    always = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps")
    defaults = asdict(ModelConfig())
    params = {k: v for k, v in asdict(config).items() if k in always or v != inferred.get(k, defaults[k])}
    with atomic_write(path / "consolidated.00.pth") as file:
        state = {name: weight.cpu() for name, weight in saved_weights(model)}
        if config.tie_word_embeddings:  # Meta's code wants the head all the same; as one tensor it is stored once
            state["output.weight"] = state["tok_embeddings.weight"]
        torch.save(state, file)
    with atomic_write(path / "params.json") as file:
        file.write(json.dumps(params, indent=2).encode())


def hf_config(model: Transformer) -> dict:
    """`config.json` in both spellings at once: transformers 4 reads the top level, transformers 5 `rope_parameters`."""
    config = model.config
    rope = {"rope_type": "llama3" if config.use_scaled_rope else "default"}
    if config.use_scaled_rope:
        rope |= {key: getattr(config, field) for field, key in ROPE_KEYS.items()}
    dtype = str(model.output.weight.dtype).removeprefix("torch.")
    mistral = config.sliding_window is not None
    return {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.use_scaled_rope else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
    } | ({"sliding_window": config.sliding_window} if mistral else {})


def save_hf(model: Transformer, path: Path) -> None:
    """Hugging Face's layout: `model.safetensors` (`read_safetensors` says how it is laid out) and `config.json`."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    weights = {name: p for name, p in model.named_parameters() if name.endswith(".weight")}
    for name, weight in weights.items():
        offsets = [end, end := end + weight.nbytes]
        header[to_hf_name(name)] = {"dtype": names[weight.dtype], "shape": list(weight.shape), "data_offsets": offsets}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with atomic_write(path / "model.safetensors") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        bar = tqdm(saved_weights(model), f"saving {path.name}", len(weights), leave=False, disable=None)
        for name, weight in bar:
            if name.endswith(("wq.weight", "wk.weight")):
                weight = permute_rotary(weight, model.config.head_dim, to_hf=True)
            file.write(weight.contiguous().cpu().view(torch.uint8).numpy())
    with atomic_write(path / "config.json") as file:
        file.write(json.dumps(hf_config(model), indent=2).encode())


def save_model(model: Transformer, path: str | Path, layout: str = "meta") -> None:
    """Write the weights, in the dtype they have, as a checkpoint folder: `layout` "meta" or "hf". LoRA's additions are
    merged into them. The folder is made where it is missing; a file is replaced only once its successor is whole.
    Tokenizer files are `data.copy_tokenizer`'s.

    Raises InputError where the folder already holds weights that this layout's file would not replace, OSError or
    RuntimeError (torch.save's) where writing fails, and KeyError for another layout.
    """
    path = Path(path)
    own = {"meta": {"consolidated.00.pth", "params.json"}, "hf": {"model.safetensors", "config.json"}}[layout]
    for pattern in ("*.safetensors", "*.pth", "*.bin", "*.index.json", "params.json", "config.json"):
        for other in path.glob(pattern):
            if other.name not in own:
                raise InputError(f"{other}: belongs to another checkpoint; save to another folder")
    path.mkdir(parents=True, exist_ok=True)
    if layout == "meta":
        save_meta(model, path)
    else:
        save_hf(model, path)


def main() -> None:
    """`python model.py --ckpt DIR --prompt TEXT`: print the prompt and stream its continuation."""
    parser = Parser(description="Continue a prompt with a LLaMA-style checkpoint.")
    parser.add_argument("--ckpt", required=True, help="checkpoint folder, Meta's or Hugging Face's layout")
    parser.add_argument("--prompt", default="", help="text to continue (default: begin from the BOS token alone)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on cuda, fp32 elsewhere")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or args.temperature < 0 or not 0 < args.top_p <= 1:
        raise InputError("--max-new-tokens must be at least 1, --temperature at least 0, --top-p above 0 and at most 1")
    bf16 = args.dtype == "bf16" or (args.dtype is None and args.device.startswith("cuda"))
    tokenizer = load_tokenizer(args.ckpt)
    model = load_model(args.ckpt, args.device, torch.bfloat16 if bf16 else torch.float32).eval()
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(f"{args.ckpt}: {tokenizer.vocab_size} tokens in tokenizer, {model.config.vocab_size} in model")
    torch.manual_seed(args.seed)
    ids = tokenizer.encode(args.prompt, bos=True)
    room = model.config.max_seq_len - len(ids)
    if room < 1:
        raise InputError(f"--prompt: {len(ids)} tokens leave no room in the context of {model.config.max_seq_len}")
    shown = tokenizer.decode(ids)
    print(shown, end="", flush=True)
    tokens = torch.tensor([ids], device=args.device)
    for token in stream(model, tokens, min(args.max_new_tokens, room), args.temperature, args.top_p):
        if token.item() == tokenizer.eos_id:
            break
        ids.append(token.item())
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else the rest of a multi-byte character is still to come
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


if __name__ == "__main__":
    run_command(main)
