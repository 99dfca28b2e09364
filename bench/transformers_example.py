"""`owlore.py` alone, with a model of transformers: what the README shows, run.

pip install transformers
python bench/transformers_example.py                        a small Llama with random weights learns to count
python bench/transformers_example.py --model FOLDER         a Llama, Mistral or Qwen folder of transformers' own
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from owlore import LayerSampler, ProjectedAdam, outlier_distribution, sampling_probabilities  # noqa: E402

STEPS, INTERVAL = 150, 25
SMALL = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4)


def counting(count: int) -> list[torch.Tensor]:
    """Batches of token ids, int [8, 32]: every row counts up from a number of its own, in steps of its own."""
    start, step = torch.randint(64, (count, 8, 1)), torch.randint(1, 8, (count, 8, 1))
    return list((start + step * torch.arange(32)) % 64)


def main() -> None:
    """Train and print the loss before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model (default: a small one with random weights)")
    args = parser.parse_args()
    torch.manual_seed(0)
    load, source = AutoModelForCausalLM.from_pretrained, args.model
    model = load(source) if source else AutoModelForCausalLM.from_config(SMALL)

    layers = model.model.layers
    outliers = outlier_distribution(model, layers, counting(4), threshold=3.0)
    sampler = LayerSampler(layers, sampling_probabilities(outliers), active=2)
    matrices = [w for w in layers.parameters() if w.dim() == 2]
    others = [w for w in model.parameters() if all(w is not m for m in matrices)]
    optimizer = ProjectedAdam([{"params": matrices, "rank": 16, "update_gap": 50}, {"params": others}], lr=3e-3)

    losses = []
    for step, tokens in enumerate(tqdm(counting(STEPS), "training")):
        if step % INTERVAL == 0:
            sampler.resample()
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    held = sum(t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    trained = sum(p.numel() for p in model.parameters())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {held:,} numbers of optimizer state for {trained:,} parameters")


if __name__ == "__main__":
    main()
