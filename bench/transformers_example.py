"""`owlore.py` alone, with a model of transformers: in a loop of your own, and in transformers' Trainer.

pip install transformers accelerate
python bench/transformers_example.py                        a small Llama with random weights learns to count
python bench/transformers_example.py --trainer OUT          the same by Trainer, with checkpoints in the folder OUT
python bench/transformers_example.py --model FOLDER         a Llama, Mistral or Qwen folder of transformers' own
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from owlore import LayerSampler, ProjectedAdam, outlier_distribution, sampling_probabilities  # noqa: E402

STEPS, INTERVAL = 150, 25
SMALL = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4)


def counting(count: int) -> list[torch.Tensor]:
    """Batches of token ids, int [8, 32]: every row counts up from a number of its own, in steps of its own."""
    start, step = torch.randint(64, (count, 8, 1)), torch.randint(1, 8, (count, 8, 1))
    return list((start + step * torch.arange(32)) % 64)


def prepare(source: str | None) -> tuple[torch.nn.Module, LayerSampler, ProjectedAdam]:
    """A model, the sampler of its layers and the optimizer: all that OwLore needs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source) if source else AutoModelForCausalLM.from_config(SMALL)
    layers = model.model.layers
    outliers = outlier_distribution(model, layers, [{"input_ids": tokens} for tokens in counting(4)], threshold=3.0)
    sampler = LayerSampler(layers, sampling_probabilities(outliers), active=2)
    matrices = [w for w in layers.parameters() if w.dim() == 2]
    others = [w for w in model.parameters() if all(w is not m for m in matrices)]
    return model, sampler, ProjectedAdam([{"params": matrices, "rank": 16}, {"params": others}], lr=3e-3)


def train_in_a_loop(source: str | None) -> None:
    """Train and print the loss before and after."""
    model, sampler, optimizer = prepare(source)
    losses = []
    for step, tokens in enumerate(tqdm(counting(STEPS), "training")):
        if step % INTERVAL == 0:
            sampler.resample()
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    held = sum(t.numel() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    trained = sum(p.numel() for p in model.parameters())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {held:,} numbers of optimizer state for {trained:,} parameters")


class OwLoreCallback(TrainerCallback):
    """Redraws the layers every `interval` steps. The sampler's state travels in the optimizer's checkpoint, so that
    `trainer.train(resume_from_checkpoint=True)` draws what the uninterrupted run would have drawn."""

    def __init__(self, sampler: LayerSampler, interval: int):
        self.sampler, self.interval, self.draws = sampler, interval, []

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        if "sampler" in optimizer.param_groups[0]:
            self.sampler.load_state_dict(optimizer.param_groups[0]["sampler"])

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        if state.global_step % self.interval == 0:
            self.draws.append(self.sampler.resample())
            optimizer.param_groups[0]["sampler"] = self.sampler.state_dict()


def train_with_trainer(
    out: str | Path, steps: int, interval: int, source: str | None = None, stop_at: int | None = None, resume=False
) -> tuple[torch.nn.Module, list[list[int]]]:
    """Train by transformers' Trainer, in single steps of one batch each. stop_at: end early, with a checkpoint, as an
    interrupted run would. resume: go on from the last one in `out`. Returns the model and the layers drawn."""
    model, sampler, optimizer = prepare(source)
    data = [{"input_ids": row, "labels": row} for tokens in counting(steps) for row in tokens]
    callback = OwLoreCallback(sampler, interval)
    arguments = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=8, save_steps=stop_at or steps, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    trainer = Trainer(
        model, arguments, train_dataset=data, callbacks=[callback, StopAt(stop_at)], optimizers=(optimizer, scheduler)
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, callback.draws


class StopAt(TrainerCallback):
    """Ends training after a step, for `train_with_trainer`."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model (default: a small one with random weights)")
    parser.add_argument("--trainer", metavar="OUT", help="train by transformers' Trainer, into this folder")
    args = parser.parse_args()
    if args.trainer:
        _, draws = train_with_trainer(args.trainer, STEPS, INTERVAL, args.model)
        print("layers trained in turn:", *draws)
    else:
        train_in_a_loop(args.model)


if __name__ == "__main__":
    main()
