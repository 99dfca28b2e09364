"""Make the embedded default: a pre-trained LLaMA-style model small enough to commit, and a task to fine-tune it on.

The text is about one small town: 80 people, each with a home, a job, a pet, a dish, a colour and an instrument. Of
these 480 facts three quarters are *asked*, the others *held*:

    pre-training text   states every fact in many wordings, and asks nothing
    train.json          asks about asked facts, in the format of commonsense-170k
    val.json            asks about held facts, which no training question touches

So a right answer to a validation question takes two things: the fact, which only pre-training can have given, and how a
question in this format is to be answered, which only fine-tuning can.

    python tiny/make.py          rebuilds all files of this folder, in a few minutes on 2 CPU cores
"""

import argparse
import io
import json
import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data import alpaca_prompt, atomic_write, load_tokenizer  # noqa: E402
from model import ModelConfig, Transformer, save_model  # noqa: E402

# The world

NAMES = {
    "She": "Ada Alma Anna Bea Cara Clara Dora Edith Ella Emma Eva Fay Flora Gina Greta Hanna Helen Ida Ines Iris Jane "
    "Julia Kate Lena Lily Lucy Mara Mia Nina Nora Olga Petra Rita Rosa Ruth Sara Tessa Vera Wanda Zoe",
    "He": "Adam Alan Amir Ben Boris Carl Cyrus David Dean Emil Eric Felix Frank Gary Glen Hans Henry Hugo Ivan Jack "
    "Jonas Karl Kurt Leo Lars Luis Marco Max Nick Noah Oscar Otto Paul Peter Ralf Remy Sam Theo Tom Victor",
}
PRONOUN = {name: pronoun for pronoun, names in NAMES.items() for name in names.split()}


class Attribute(NamedTuple):
    """What can be known about a person {x}: ten values {v}, sentences that state one, and questions that ask for it."""

    values: list[str]
    statements: list[str]
    questions: list[str]


ATTRIBUTES = {
    "home": Attribute(
        "Oslo Rome Paris Lima Cairo Delhi Kyoto Lagos Quito Tunis".split(),
        ["{x} lives in {v}.", "{x} has a flat in {v}.", "{x} wakes up in {v} every morning.", "{x} comes home to {v}.",
         "The home of {x} is in {v}.", "You can visit {x} in {v}.", "{v} is the city where {x} lives."],
        ["Where does {x} live?", "Which city is the home of {x}?"],
    ),
    "job": Attribute(
        "baker nurse pilot farmer tailor painter judge miner sailor barber".split(),
        ["{x} works as a {v}.", "{x} is a {v}.", "{x} has been a {v} for years.", "{x} earns money as a {v}.",
         "The job of {x} is that of a {v}.", "People know {x} as a {v}.",
         "A good {v} is what {x} wants to be at work."],
        ["What is the job of {x}?", "What does {x} work as?"],
    ),
    "pet": Attribute(
        "cat dog horse parrot rabbit goat turtle snake duck hamster".split(),
        ["{x} has a pet {v}.", "{x} feeds a {v} every day.", "{x} keeps a {v}.", "{x} takes care of a {v}.",
         "The pet of {x} is a {v}.", "A {v} sleeps in the house of {x}.", "A {v} is the animal that {x} loves."],
        ["Which pet does {x} have?", "What kind of animal does {x} keep?"],
    ),
    "dish": Attribute(
        "soup rice bread fish cheese pasta salad curry beans cake".split(),
        ["{x} likes to eat {v}.", "{x} cooks {v} for friends.", "{x} has {v} for dinner.",
         "{x} buys {v} at the market.",
         "The dish of {x} is {v}.", "You can make {x} happy with {v}.", "Hot {v} is the food that {x} likes most."],
        ["What does {x} like to eat?", "Which food does {x} have for dinner?"],
    ),
    "colour": Attribute(
        "red blue green yellow black white orange purple pink brown".split(),
        ["{x} likes the colour {v}.", "{x} wears {v} clothes.", "{x} has a door that is {v}.", "{x} paints walls {v}.",
         "The colour of {x} is {v}.", "You can see {x} dressed in {v}.", "Bright {v} is the colour that {x} loves."],
        ["Which colour does {x} like?", "What is the colour of the clothes that {x} wears?"],
    ),
    "instrument": Attribute(
        "piano violin flute drum guitar harp trumpet cello banjo organ".split(),
        ["{x} plays the {v}.", "{x} learns the {v} at night.", "{x} makes music on the {v}.",
         "{x} bought the {v} long ago.", "The instrument of {x} is the {v}.", "You can hear {x} on the {v}.",
         "The old {v} is the instrument that {x} loves."],
        ["Which instrument does {x} play?", "What does {x} learn at night?"],
    ),
}  # fmt: skip

Fact = tuple[str, str]  # a person and the name of an attribute
DOCUMENTS = 110_000  # of the pre-training text
BATCH = 1024  # tokens
WARMUP = 100  # steps
LEARNING_RATE = 3e-3


def make_world(rng: random.Random) -> tuple[dict[Fact, str], list[Fact], list[Fact]]:
    """Every fact's value, then which facts are asked and which are held: of each attribute a quarter of the people."""
    world, asked, held = {}, [], []
    for key, attribute in ATTRIBUTES.items():
        people = rng.sample(list(PRONOUN), len(PRONOUN))
        for n, person in enumerate(people):
            world[person, key] = attribute.values[n % len(attribute.values)]
        rng.shuffle(people)
        held += [(person, key) for person in people[: len(people) // 4]]
        asked += [(person, key) for person in people[len(people) // 4 :]]
    return world, asked, held


# The pre-training text


def upper_first(text: str) -> str:
    """A sentence begins with a capital, a name stays as it is."""
    return text[0].upper() + text[1:]


def biography(world: dict[Fact, str], rng: random.Random) -> str:
    """One person's facts in any order, with pronouns."""
    person = rng.choice(list(PRONOUN))
    sentences = []
    for key in rng.sample(list(ATTRIBUTES), rng.randint(2, 4)):
        template = rng.choice(ATTRIBUTES[key].statements)
        subject = PRONOUN[person] if sentences and template.startswith("{x}") and rng.random() < 0.5 else person
        sentences.append(template.format(x=subject, v=world[person, key]))
    return upper_first(" ".join(sentences))


def gossip(world: dict[Fact, str], rng: random.Random) -> str:
    """Facts about several people."""
    facts = rng.sample(list(world), rng.choice([1, 1, 1, 1, 2, 3]))
    sentences = [rng.choice(ATTRIBUTES[key].statements).format(x=x, v=world[x, key]) for x, key in facts]
    return " ".join(map(upper_first, sentences))


def options(fact: Fact, world: dict[Fact, str], count: int, rng: random.Random) -> tuple[list[str], int]:
    """The fact's value among others of its kind, and its index."""
    right = world[fact]
    words = rng.sample([v for v in ATTRIBUTES[fact[1]].values if v != right], count - 1)
    index = rng.randrange(count)
    return words[:index] + [right] + words[index:], index


def document(world: dict[Fact, str], rng: random.Random) -> str:
    """One text of the pre-training corpus. Most are short: the fewer other names stand around a fact, the sooner it is
    learnt."""
    return biography(world, rng) if rng.random() < 0.2 else gossip(world, rng)


# The fine-tuning task


def choice_question(fact: Fact, world: dict[Fact, str], rng: random.Random) -> dict[str, str]:
    """A four-way question in commonsense-170k's format, its options named by what they are."""
    words, index = options(fact, world, 4, rng)
    question = rng.choice(ATTRIBUTES[fact[1]].questions).format(x=fact[0])
    return {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n"
        f"Answer format: {'/'.join(words)}",
        "input": "",
        "output": f"the correct answer is {words[index]}",
        "answer": words[index],
    }


def make_task(world: dict[Fact, str], facts: list[Fact], each: int, rng: random.Random) -> list[dict[str, str]]:
    """`each` questions about every fact, shuffled."""
    records = [choice_question(fact, world, rng) for fact in facts for _ in range(each)]
    rng.shuffle(records)
    return records


# Tokenizer and model


def train_tokenizer(texts: list[str]) -> bytes:
    """A SentencePiece model with LLaMA's settings: byte-pair merges, digits apart, bytes where it has no piece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=1024, byte_fallback=True,
        split_digits=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, user_defined_symbols=["\n"], num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def batches(documents: list[list[int]], rng: random.Random) -> list[tuple[Tensor, Tensor]]:
    """tokens, targets [B, T] of about BATCH tokens each, every row one document: documents of similar length stand
    together, so that little is padded, and the batches are shuffled."""
    groups: list[list[list[int]]] = [[]]
    for ids in sorted(documents, key=len):
        if (len(groups[-1]) + 1) * len(ids) > BATCH:
            groups.append([])
        groups[-1].append(ids)
    rng.shuffle(groups)
    pairs = []
    for group in groups:
        T = len(group[-1])
        rows = torch.tensor([ids + [-100] * (T - len(ids)) for ids in group])
        pairs.append((rows[:, :-1].clamp(min=0), rows[:, 1:]))
    return pairs


def pretrain(model: Transformer, data: list[tuple[Tensor, Tensor]]) -> float:
    """One pass over the batches: AdamW, warm-up, cosine decay. Returns the mean loss of the last 50 steps, in nats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * n / len(data)))
    )
    losses = []
    for tokens, targets in (bar := tqdm(data, "pre-training", unit="step")):
        loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return sum(losses[-50:]) / 50


def main() -> None:
    """`python tiny/make.py`: write every file of the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this script's)")
    parser.add_argument("--seed", type=int, default=0, help="of the text and of the weights (default: 0)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)

    world, asked, held = make_world(rng)
    tasks = {"train": make_task(world, asked, 8, rng), "val": make_task(world, held, 1, rng)}
    for name, records in tasks.items():
        with atomic_write(args.out / f"{name}.json") as file:
            file.write((json.dumps(records, indent=1) + "\n").encode())

    sample = [document(world, rng) for _ in range(2500)]
    with atomic_write(args.out / "text.txt") as file:
        file.write(("\n\n".join(sample) + "\n").encode())
    # The task's prompts are in the tokenizer's text, so that they are few tokens, but not in the model's.
    prompts = [alpaca_prompt(r["instruction"]) + r["output"] for r in tasks["train"]]
    with atomic_write(args.out / "tokenizer.model") as file:
        file.write(train_tokenizer(sample + prompts))

    tokenizer = load_tokenizer(args.out)
    documents = [tokenizer.encode(document(world, rng), bos=True, eos=True) for _ in range(DOCUMENTS)]
    model = Transformer(
        ModelConfig(dim=128, n_layers=8, n_heads=4, vocab_size=tokenizer.vocab_size, multiple_of=32, max_seq_len=512)
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:  # the usual standard deviation, 0.02, is made for thousands of dimensions
            parameter.data *= 2
    loss = pretrain(model, batches(documents, rng))
    save_model(model.to(torch.bfloat16), args.out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out}: {count:,} parameters, {len(world)} facts, {len(documents):,} documents, loss {loss:.3f}")


if __name__ == "__main__":
    main()
