"""Text in, batches of token ids out.

    a file -> records -> rows of token ids -> batches of tokens and targets

A record has a row of its own, with loss on the completion and the end-of-text token behind it. Plain text is cut into
rows of seq_len + 1 tokens, with loss on all of them. The rows lie in one flat array. A token that is only context, as a
prompt is, is stored as its bitwise complement ~id, which is negative: one array holds the tokens and the loss mask.
"""

import argparse
import base64
import contextlib
import io
import json
import math
import os
import re
import signal
import sys
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import Tensor
from tqdm import tqdm

TINY = Path(__file__).parent / "tiny"  # the embedded default: a small checkpoint with its data


# Records


class Record(NamedTuple):
    """One example: turns of (prompt, completion), or plain text as the completion of an empty prompt. A multiple-choice
    record also has its `choices`, the possible completions, of which that of its turn is right. The turns whose numbers
    are in `context` are not learnt."""

    turns: list[tuple[str, str]]
    choices: Sequence[str] = ()
    plain: bool = False
    context: Sequence[int] = ()


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The prompt of Alpaca (Taori et al., 2023), with which commonsense-170k is trained and evaluated, too."""
    paired = ", paired with an input that provides further context" if context else ""
    context = f"### Input:\n{context}\n\n" if context else ""
    return (f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n")  # fmt: skip


def parse_record(record: object) -> Record:
    """Tell a record's format by its keys. Raises ValueError, which says what is wrong with it."""
    match record:
        case {"instruction": instruction, "output": output}:  # Alpaca and commonsense-170k
            context = "" if record.get("input") is None else record["input"]
            prompt = system_prompt(record) + alpaca_prompt(as_text(instruction), as_text(context))
            output = as_text(output)
            options = re.search(r"Answer format: *(\S+)\s*$", instruction)
            names = [name for name in options[1].split("/") if name] if options else []
            answer = record.get("answer")
            found = answer in names and len(set(names)) > 1 and output.endswith(answer)
            return Record([(prompt, output)], [output.removesuffix(answer) + name for name in names] if found else ())
        case {"prompt": prompt, "choices": choices, "answer": answer}:
            if not isinstance(choices, list) or len(choices) < 2 or not all(map(as_text, choices)):
                raise ValueError("'choices' must be a list of at least two texts, none of them empty")
            answer = choices.index(answer) if answer in choices else answer
            if type(answer) is not int or not 0 <= answer < len(choices):
                raise ValueError("'answer' must be one of 'choices', or its index from 0")
            return Record([(system_prompt(record) + as_text(prompt), choices[answer])], choices)
        case {"prompt": prompt, "completion": completion} | {"input": prompt, "output": completion}:
            return Record([(system_prompt(record) + as_text(prompt), as_text(completion))])
        case {"question": question, "answer": answer}:
            return parse_record(record | {"prompt": alpaca_prompt(as_text(question)), "completion": answer})
        case {"messages": messages} | {"conversations": messages} | {"conversation": list(messages)}:
            return parse_messages(messages, system_prompt(record))
        case {"text": content}:
            return Record([("", as_text(content))], plain=True)
    kind = f"with {', '.join(record)}" if isinstance(record, dict) else json.dumps(record)
    raise ValueError(f"unknown record {kind[:80]}; known: instruction + output, input + output, prompt + "
                     "completion, prompt + choices + answer, question + answer, messages, conversations, text")  # fmt: skip


def system_prompt(record: dict) -> str:
    """What a record tells the model first, if it has a "system" beside its other fields."""
    return as_text(record["system"]) + "\n\n" if record.get("system") else ""


def parse_messages(messages: object, prompt: str = "") -> Record:
    """A conversation: what precedes an assistant's message is its prompt, under Alpaca's headings. prompt: what precedes
    them all. Context alone are messages of `weight` 0 (OpenAI's format), empty ones, and a first one to which there is
    nothing to answer."""
    turns, context = [], []
    for message in messages if isinstance(messages, list) else [messages]:
        match message:
            case {"role": "system", "content": content} | {"from": "system", "value": content}:
                prompt += as_text(content) + "\n\n"
            case {"role": "user", "content": content} | {"from": "human" | "user", "value": content}:
                prompt += f"### Instruction:\n{as_text(content)}\n\n"
            case {"role": "assistant", "content": content} | {"from": "gpt" | "assistant", "value": content}:
                if message.get("tool_calls"):
                    raise ValueError("tool calls are not read: leave out what has any")
                told = message.get("weight") != 0 and as_text(content).strip() and (turns or prompt)
                context += [] if told else [len(turns)]
                turns.append((prompt + "### Response:\n", as_text(content)))
                prompt = ""
            case _:
                known = "role (system, user, assistant) + content, or from (human, gpt) + value"
                raise ValueError(f"message {json.dumps(message)[:60]}: a message has {known}, both texts")
    return Record(turns, context=context)


def as_text(value: object) -> str:
    """The value, if it is text. Raises ValueError if it is not."""
    if not isinstance(value, str):
        raise ValueError(f"{json.dumps(value)[:40]} where there must be a text")
    value.encode()  # fails for half a surrogate pair, which JSON can spell and no tokenizer takes
    return value


# Fields that an answer may depend on. Beside a plain text the last two may be all that is to be learnt.
UNREAD = ("instruction", "input", "question", "context", "passage", "article", "hint", "options", "A", "history", "tools",
          "system_prompt", "label", "summary")  # fmt: skip


def load_records(path: str | Path) -> list[Record]:
    """Read a text file (`.txt`) or JSON: a list of records, {"type", "instances"}, or one record after another. Those
    without anything to learn are left out, with a warning. Raises InputError, with the line or record, or OSError."""
    path = Path(path)
    if path.suffix.lower() == ".txt":
        return [Record([("", read_text(path).replace("\r\n", "\n"))], plain=True)]
    kind, found, records, unread = "line", parse_json(path), [], set()
    match found:
        case [(_, list(values) | {"type": "text_only" | "text2text" | "conversation", "instances": list(values)})]:
            kind, found = "record", enumerate(values, 1)
        case [(_, {"instances": _})]:
            raise InputError(f'{path}: "type" must be text_only, text2text or conversation, and "instances" a list')
    for number, value in found:
        try:
            records.append(parse_record(value))
            given = {key: value.get(key) for key in (UNREAD[-2:] if records[-1].plain else UNREAD)}
            if given := {key: what for key, what in given.items() if what not in (None, "", "[]", [], {})}:
                text = "\n".join((*sum(records[-1].turns, ()), *records[-1].choices))
                unread |= {key for key, what in given.items() if not isinstance(what, str) or what.strip() not in text}
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: {kind} {number}: {error}") from None
    if unread:
        keys = ", ".join(sorted(unread))
        warnings.warn(f"{path}: not read: {keys}; what answers depend on belongs into the prompt", stacklevel=2)
    learnt = ([text for n, (_, text) in enumerate(record.turns) if n not in record.context] for record in records)
    full = [record for record, texts in zip(records, learnt) if any(map(str.strip, texts))]
    if not full:
        raise InputError(f"{path}: holds no records" + " with anything to learn" * bool(records))
    if empty := len(records) - len(full):
        warnings.warn(f"{path}: {empty} of {len(records)} records have nothing to learn: left out", stacklevel=2)
    return full


def split_records(records: list[Record], share: float, most: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Hold out a share of the records for validation, at most `most`: the end of a single plain text, a random draw of
    several records. Returns those to train on, then those held out. Raises InputError if there are too few to split."""
    if len(records) == 1 and records[0].plain:
        content = records[0].turns[0][1]
        least, end = (int(len(content) * (1 - n * share)) for n in (2, 1))
        cut = content.rfind("\n", max(0, least), end) + 1 or end
        parts = [[Record([("", text)], plain=True)] * bool(text.strip()) for text in (content[:cut], content[cut:])]
    else:
        held = min(max(1, round(len(records) * share)), most)
        order = np.random.default_rng(seed).permutation(len(records))
        parts = [[records[i] for i in sorted(part)] for part in (order[held:], order[:held])]
    if not all(parts):
        raise InputError("--data: one record, or a text too short, cannot be split for validation; give --val-data")
    return tuple(parts)


# Tokenizers


class Tokenizer:
    """Text to token ids and back, by the package in `model`. Has `vocab_size`, and `bos_id` and `eos_id`, which are -1
    if there are no such tokens. hf_config: what Hugging Face's tools need to be told, or they take it for another one;
    nothing if it says that itself."""

    hf_config: dict = {}

    def spelt_out(self, text: str) -> str | None:
        """The first special token that a text spells out and that is read as text."""
        pieces = (match[0] for match in re.finditer(r"[<\[][^\s<>\[\]]+[>\]]", text))
        return next(filter(self.is_special, pieces), None)

    def is_special(self, piece: str) -> bool:
        """Whether a piece of text is the name of a token that no text is encoded as."""
        return False

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of a text, between BOS and EOS if asked for. A text that has them itself gets no second ones."""
        ids = self.encode_text(text)
        before = [self.bos_id] * (bos and self.bos_id >= 0 and ids[:1] != [self.bos_id])
        return before + ids + [self.eos_id] * (eos and self.eos_id >= 0 and ids[-1:] != [self.eos_id])

    def encode_text(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids. BOS and EOS are left out, and what a model has beyond the tokenizer's vocabulary."""
        return self.model.decode([int(i) for i in ids if i < self.vocab_size])


class SentencePieceTokenizer(Tokenizer):
    """LLaMA-1/2 and Mistral."""

    def __init__(self, raw: bytes):
        self.model = sentencepiece.SentencePieceProcessor()
        self.model.LoadFromSerializedProto(raw)
        self.vocab_size, self.bos_id, self.eos_id = self.model.vocab_size(), self.model.bos_id(), self.model.eos_id()
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.model.unk_id()}
        # transformers 5 puts together a LlamaTokenizer's merges in another order than SentencePiece.
        self.hf_config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "legacy": True}
        self.hf_config |= {key: self.model.id_to_piece(id) for key, id in ids.items() if id >= 0}

    def is_special(self, piece: str) -> bool:
        return self.model.is_control(self.model.piece_to_id(piece))


class TiktokenTokenizer(Tokenizer):
    """LLaMA-3: byte-pair ranks, then 256 special tokens, the first two of which are BOS and EOS, if it is not told of
    another `eos_token`, as a chat model has."""

    # How text is split before pairs are merged: GPT-4's pattern, as LLaMA-3 uses it
    PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    PATTERN += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    # The names of its special tokens, in order (LLaMA-3.1 calls four of the reserved ones by others)
    NAMES = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(251))]
    NAMES[6:7] = ["<|start_header_id|>", "<|end_header_id|>", NAMES[6], "<|eot_id|>"]
    hf_config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "bos_token": NAMES[0]}
    hf_config |= {"additional_special_tokens": NAMES}

    def __init__(self, raw: bytes, eos_token: str | None):
        import tiktoken

        lines = map(bytes.split, raw.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if list(ranks.values()) != list(range(len(ranks))):
            raise ValueError("its ranks do not count up from 0, each with another token")
        # tiktoken is not told of the special tokens: where a text spells one out, it is text.
        self.model = tiktoken.Encoding("llama3", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={})
        eos_token = eos_token if eos_token in self.NAMES else self.NAMES[1]
        self.bos_id, self.eos_id = len(ranks), len(ranks) + self.NAMES.index(eos_token)
        self.vocab_size, self.hf_config = len(ranks) + 256, self.hf_config | {"eos_token": eos_token}

    def encode_text(self, text: str) -> list[int]:
        # A run of a million blanks would exhaust tiktoken's stack. Meta cuts runs after 25,000 characters, too.
        parts = re.findall(r"(?s).*?(?:\S{25000}|\s{25000})|.+", text)
        return [i for part in parts for i in self.model.encode_ordinary(part)]

    def decode(self, ids: list[int]) -> str:
        return super().decode([i for i in ids if i < self.bos_id])

    def is_special(self, piece: str) -> bool:
        return piece in self.NAMES


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, which says itself how it encodes. BOS and EOS stand beside it, in `tokenizer_config.json` or
    `special_tokens_map.json` as tokens, or else in `config.json` as ids."""

    def __init__(self, raw: bytes, folder: Path):
        import tokenizers

        self.model = tokenizers.Tokenizer.from_buffer(raw)
        self.model.no_truncation()  # what it was last used with may be saved in it
        self.model.no_padding()
        self.vocab_size = max(self.model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        files, ids = [folder / f"{name}.json" for name in ("special_tokens_map", "tokenizer_config", "config")], []
        known, settings, config = (read_json(file) if file.is_file() else {} for file in files)
        for key in ("bos_token", "eos_token"):
            token = (known | settings).get(key, config.get(f"{key}_id"))
            token = token.get("content") if isinstance(token, dict) else token
            token = token[0] if isinstance(token, list) and token else token  # chat models may end in one of several
            id = -1 if token in (None, "") else self.model.token_to_id(token) if isinstance(token, str) else token
            if type(id) is not int or not -1 <= id < self.vocab_size:
                raise ValueError(f"its {key} is not one of its tokens")
            ids.append(id)
        self.bos_id, self.eos_id = ids

    def encode_text(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids


TOKENIZER_FILES = ("tokenizer.model", "original/tokenizer.model", "tokenizer.model.v3", "tokenizer.json")


def named_eos(folder: Path) -> str | None:
    """The token that ends a text, by the name that Hugging Face's `tokenizer_config.json` has for it, if there is one."""
    file = folder / "tokenizer_config.json"
    token = read_json(file).get("eos_token") if file.is_file() else None
    return token.get("content") if isinstance(token, dict) else token


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of a file. Raises InputError if there is none or it is damaged."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next((path / name for name in TOKENIZER_FILES if (path / name).is_file()), path / TOKENIZER_FILES[0])
    try:
        raw = path.read_bytes()
        if path.suffix == ".json":
            return HuggingFaceTokenizer(raw, path.parent)
        ranks = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", raw)
        return TiktokenTokenizer(raw, named_eos(folder)) if ranks else SentencePieceTokenizer(raw)
    except FileNotFoundError:
        raise InputError(f"{path}: missing, and so is tokenizer.json; copy the model's own there") from None
    except ImportError as error:
        raise InputError(f"{path}: this tokenizer needs one more package: pip install {error.name}") from None
    except Exception as error:  # the package tokenizers raises no narrower one
        raise InputError(f"{path}: not a tokenizer ({str(error)[:100]}); copy the model's own there") from None


# Rows of token ids, and batches of rows


def encode_turn(tokenizer: Tokenizer, prompt: str, completion: str, bos: bool, eos: bool) -> list[int]:
    """Ids of prompt + completion, tokenised as one text, those of the prompt complemented. A token across the border
    belongs to the completion."""
    ids, context = tokenizer.encode(prompt + completion, bos, eos), tokenizer.encode(prompt, bos)
    border = len(os.path.commonprefix([context, ids]))
    return [~i for i in ids[:border]] + ids[border:]


def fit(ids: list[int], length: int) -> np.ndarray:
    """Shorten a row to `length` tokens: its prompt, behind BOS, from the left, but not to less than half a row, so that no
    answer is learnt without what was asked, and if that is not enough, from the end."""
    prompt = next((n for n, i in enumerate(ids) if i >= 0), len(ids))
    cut = max(0, min(len(ids) - length, prompt - 1 - (length - 1) // 2))
    return np.array((ids[:1] + ids[1 + cut :])[:length], dtype=np.int32)


def encode_long(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The same ids as `tokenizer.encode(text, bos=False)`, int32 [tokens], but encoded line by line: the time that
    SentencePiece takes grows with the square of a text's length."""
    # Blank lines stay with the line before them, as LLaMA-3 has tokens of several newlines. What a tokenizer.json does
    # with newlines is up to it, and its time does not grow so.
    lines = [text] if isinstance(tokenizer, HuggingFaceTokenizer) else re.split(r"(?<=\n)(?=[^\S\r\n]*\S)", text)
    # SentencePiece puts a blank before each text. After a newline it does not, so we encode one and leave it out.
    newline = tokenizer.encode("\n", bos=False)
    ids = array("i", tokenizer.encode(lines[0], bos=False))
    for line in tqdm(lines[1:], "tokenising lines", leave=False, disable=None):
        line_ids = tokenizer.encode("\n" + line, bos=False)
        if line_ids[: len(newline)] != newline:  # this vocabulary merges across lines
            return np.array(tokenizer.encode(text, bos=False), dtype=np.int32)
        ids.extend(line_ids[len(newline) :])
    return np.array(ids)


def grouped(items: Iterable, fits: Callable[[list], bool]) -> list[list]:
    """The items in their order, put together as long as a group fits. One alone always does."""
    groups = [[]]
    for item in items:
        if groups[-1] and not fits([*groups[-1], item]):
            groups.append([])
        groups[-1].append(item)
    return groups


class Dataset:
    """Rows of token ids, at most seq_len + 1, for seq_len predictions. ids: int32 [tokens], context complemented. rows:
    int64 [N, 2], where each begins and ends. groups: the rows that count as one row of a step, each by itself
    unless they are packed. records: the multiple-choice ones, for accuracy. prompts_cut, completions_cut: of how many
    rows these are not whole, as they are too long. Raises InputError if there is nothing to learn."""

    def __init__(self, records: list[Record], tokenizer: Tokenizer, seq_len: int):
        rows, texts, cut = [], [], np.zeros(2, dtype=int)
        text_bos = ~np.array(tokenizer.encode(""), dtype=np.int32)
        text_eos = np.array(tokenizer.encode("", bos=False, eos=len(records) > 1), dtype=np.int32)
        spelt_out = getattr(tokenizer, "spelt_out", lambda text: None)
        if spelt := list(filter(None, (spelt_out("".join(sum(record.turns, ()))) for record in records))):
            what = f"{len(spelt)} records spell out a special token, as {spelt[0]}, which this tokenizer reads as text"
            how = "leave it out (BOS and EOS are added), or use the model's tokenizer.json alone"
            warnings.warn(f"--data or --val-data: {what}: {how}", stacklevel=2)
        for record in tqdm(records, "tokenising", leave=False, disable=None):
            if record.plain:
                ids = encode_long(tokenizer, record.turns[0][1])  # which may have BOS and EOS itself
                has_bos, has_eos = (ids[:1] == tokenizer.bos_id).sum(), (ids[-1:] == tokenizer.eos_id).sum()
                texts += [text_bos, ids[has_bos:], text_eos[has_eos:]]
                continue
            row = []
            for n, (prompt, completion) in enumerate(record.turns):
                ids = encode_turn(tokenizer, prompt, completion, bos=not row, eos=True)
                row += [min(i, ~i) for i in ids] if n in record.context else ids
            rows.append(fit(row, seq_len + 1))
            told, left = np.array(row) >= 0, rows[-1] >= 0  # completions, as they were and as they are
            cut += (~left).sum() < (~told).sum(), left.sum() < told.sum()
        self.ids, ends = np.concatenate(rows + texts), np.cumsum([0, *map(len, rows)])
        spans, total = list(zip(ends, ends[1:])), len(self.ids)
        # Plain texts follow one another. The last token of a row is the first of the next: each is predicted once.
        spans += [(n, min(n + seq_len + 1, total)) for n in range(ends[-1], total - 1, seq_len)]
        self.rows, self.groups = np.array(spans), [[n] for n in range(len(spans))]
        if not any((row[1:] >= 0).any() for row in self):
            raise InputError("--data or --val-data: too short, or with this tokenizer no row has a token to learn")
        self.records = [record for record in records if record.choices]
        self.prompts_cut, self.completions_cut = cut.tolist()

    def __getitem__(self, n: int) -> np.ndarray:
        """The ids of a row, int32 [tokens]."""
        return self.ids[slice(*self.rows[n])]

    def batch(self, index: Sequence[int]) -> tuple[Tensor, Tensor, "Layout"]:
        """Tokens int64 [N] and targets [K] of the rows `index`, laid end to end, shortest first, and their layout."""
        return lay_out([[row] for row in sorted((self[n] for n in index), key=len)])[:3]

    def packed(self, seq_len: int, seed: int) -> list[list[int]]:
        """All rows in a random order, put together as long as they read no more than seq_len tokens."""
        order = np.random.default_rng(seed).permutation(len(self.rows))
        return grouped(order, lambda group: sum(len(self[n]) - 1 for n in group) <= seq_len)

    def sample(self, count: int, seed: int) -> list[Tensor]:
        """The tokens of at most `count` rows drawn at random, int64 [1, T] each, to calibrate on."""
        order = np.random.default_rng(seed).permutation(len(self.rows))[:count]
        return [self.batch([n])[0][None] for n in order]


def build_validation(records: list[Record], tokenizer: Tokenizer, seq_len: int) -> Dataset:
    """A dataset with `examples` to evaluate on: of each row itself, and behind it one for each choice of its record."""
    dataset = Dataset(records, tokenizer, seq_len)
    dataset.examples = [[row] for row in dataset]
    records = [record for record in records if not record.plain]  # plain text comes last
    for rows, record in zip(dataset.examples, records):
        texts = [encode_turn(tokenizer, record.turns[0][0], choice, bos=True, eos=False) for choice in record.choices]
        rows += [fit(ids, seq_len + 1) for ids in texts]
    return dataset


# Batches without padding


class Layout(NamedTuple):
    """Where the tokens of a batch stand. They lie end to end, row by row, [N], without padding; only attention puts them
    back into rows, [B, T] for each group of rows that are about as long, with padding at the right, where causal
    attention does not look.

    A row may branch: behind a common beginning, branch 0, it has several continuations that do not see each other."""

    shapes: list[tuple[int, int]]  # B, T of each group
    positions: Tensor  # int [N]: of each token in its row, for a branch counted on from where it begins
    places: Tensor | None = None  # int [N]: where in the groups, laid end to end, it stands; None: nothing is padded
    predicting: Tensor | None = None  # int [K]: the tokens that have a target; None: all
    branches: Tensor | None = None  # int [N]; None: no row branches

    def pad(self, x: Tensor) -> list[Tensor]:
        """[N, ...] -> [B, T, ...] of each group, with zeros where there is no token."""
        sizes = [B * T for B, T in self.shapes]
        if self.places is not None:
            x = x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, self.places, x)
        return [part.unflatten(0, shape) for part, shape in zip(x.split(sizes), self.shapes)]

    def unpad(self, groups: list[Tensor]) -> Tensor:
        """[B, T, ...] of each group -> [N, ...]."""
        x = torch.cat([group.flatten(0, 1) for group in groups]) if len(groups) > 1 else groups[0].flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def to(self, device: str) -> "Layout":
        return Layout(*(x.to(device) if isinstance(x, Tensor) else x for x in self))

    def masks(self, window: int | None) -> list[Tensor | None]:
        """What each token of a group may see: bool [B, 1, T, T], None if that is all before it, and itself."""
        masks, window = [], window or math.inf
        branches = torch.zeros_like(self.positions) if self.branches is None else self.branches
        for (_, T), position, branch in zip(self.shapes, self.pad(self.positions), self.pad(branches)):
            seen = None
            if self.branches is not None or T > window:
                near = position[:, :, None] - position[:, None] < window  # [B, T, T]
                joined = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
                seen = (near & joined).tril()[:, None]
            masks.append(seen)
        return masks


def common_beginning(rows: Sequence[np.ndarray]) -> int:
    """How many tokens all rows begin with, but for the last of a row, which is not read."""
    return len(os.path.commonprefix([row[:-1].tolist() for row in rows]))


def lay_out(examples: Sequence[Sequence[np.ndarray]]) -> tuple[Tensor, Tensor, Layout, list[int]]:
    """Lay examples end to end. The rows of one, ids int32 [tokens] with context complemented, share what they have in
    common at the beginning: it is read once, and the rest of each row is a branch. Put like lengths side by side: what
    follows one another is a group as long as that pads little.

    Returns tokens int64 [N], targets int64 [K], their layout, and the number of targets in each example's common
    beginning, and then in the rest of each of its rows, example by example."""
    laid, lengths, n = [], [], 0  # laid: tokens, positions, branches, predicting and targets of each part
    for rows in examples:
        common, begun = common_beginning(rows), n
        parts = [(rows[0][:common], rows[0][1:common])]  # what is read, and what is to be predicted
        parts += [(row[common:-1], row[max(common, 1) :]) for row in rows]
        for branch, (read, told) in enumerate(parts):
            readers = np.arange(n, n + len(read))
            if branch and common:  # it goes on from the last token of the common beginning
                readers = np.append(begun + common - 1, readers)
            tokens, positions = np.where(read < 0, ~read, read), np.arange(len(read)) + common * (branch > 0)
            predicting, targets = readers[: len(told)][told >= 0], told[told >= 0]
            laid.append((tokens, positions, np.full(len(read), branch), predicting, targets))
            n += len(read)
        lengths.append(n - begun)
    counts = [len(targets) for *_, targets in laid]
    joined = (torch.from_numpy(np.concatenate(arrays).astype(np.int64)) for arrays in zip(*laid))
    tokens, positions, branches, predicting, targets = joined
    # The longest at most 1.25 times the shortest: a tenth of attention is padding then
    groups = grouped(lengths, lambda group: max(group) <= 1.25 * min(group))
    shapes = [(len(group), max(*group, 1)) for group in groups]
    begins = np.cumsum([0] + [T for B, T in shapes for _ in range(B)])
    places = torch.cat([torch.arange(begin, begin + length) for begin, length in zip(begins, lengths)])
    places = None if n == begins[-1] else places
    predicting = None if predicting.equal(torch.arange(n)) else predicting
    branches = branches if branches.any() else None
    return tokens, targets, Layout(shapes, positions, places, predicting, branches), counts


# Files


class InputError(ValueError):
    """Something that a user can mend. The message is one line: which file or flag, what is wrong, what to do."""


FOREIGN = {".csv": "a CSV table", ".tsv": "a CSV table", ".parquet": "a Parquet table", ".arrow": "an Arrow table",
           **dict.fromkeys((".gz", ".zip", ".zst", ".xz", ".bz2"), "a compressed file")}  # fmt: skip
FOREIGN |= dict.fromkeys((".pth", ".pt", ".bin", ".safetensors", ".gguf"), "a file of weights")


def read_text(path: Path) -> str:
    """A whole text file. Raises InputError if it is empty or not UTF-8, OSError if it is missing."""
    if path.is_file() and path.suffix.lower() in FOREIGN:
        raise InputError(f"{path}: {FOREIGN[path.suffix.lower()]}; convert it to text (.txt), JSON or JSON lines")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    if not content.strip():
        raise InputError(f"{path}: empty")
    return content


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises InputError, with the line, if it is malformed or something else."""
    values = parse_json(path)
    if len(values) > 1 or not isinstance(values[0][1], dict):
        raise InputError(f"{path}: not a JSON object; fetch it again")
    return values[0][1]


def parse_json(path: Path) -> list[tuple[int, object]]:
    """The values in a file of JSON, one after another, each with the line that it begins on."""
    text, values, line, begin, end = read_text(path), [], 1, 0, 0
    while something := re.compile(r"[^ \t\r\n]").search(text, end):
        line += text.count("\n", begin, something.start())
        begin = something.start()
        try:
            value, end = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            plain = "; if it is plain text, name it .txt" * (path.suffix.lower() not in (".json", ".jsonl"))
            raise InputError(f"{path}: the JSON that begins on line {line} cannot be read: {error}{plain}") from None
        values.append((line, value))
    return values


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator:
    """A binary file that takes the place of `path` once it is whole and on disk, and not at all if anything fails."""
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def tokenizer_files(source: str | Path) -> dict[str, bytes]:
    """What a checkpoint folder knows of its tokenizer: files by name, with the settings that Hugging Face keeps beside it."""
    names = (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "chat_template.jinja", "generation_config.json", "config.json")  # fmt: skip
    return {name: (Path(source) / name).read_bytes() for name in names if (Path(source) / name).is_file()}


def copy_tokenizer(source: str | Path | dict[str, bytes], target: str | Path) -> None:
    """Copy the tokenizer of a checkpoint folder, or its `tokenizer_files`, to another folder. If that one has Hugging
    Face's layout, what its tools need to know and the source does not say is added."""
    files, target = dict(source) if isinstance(source, dict) else tokenizer_files(source), Path(target)
    said, config = json.loads(files.pop("config.json", "{}")), target / "config.json"

    def write(name: str, content: bytes) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target / name) as file:
            file.write(content)

    for name, content in files.items():
        write(name, content)
    if config.is_file():
        tokenizer = load_tokenizer(target)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": -1}
        ids = {key: id for key, id in (ids | said).items() if key in ids and id != -1}  # -1: there is none
        if said.get("model_type") == "mistral":  # whose tokenizers transformers reads in another way than LLaMA's
            ids |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        write("config.json", json.dumps(read_json(config) | ids, indent=2).encode())
        if not files.keys() & {"tokenizer.json", "tokenizer_config.json"}:
            write("tokenizer_config.json", json.dumps(tokenizer.hf_config, indent=2).encode())
        if not files.keys() & {"tokenizer.json", "tokenizer.model"}:  # the only names that its tools know
            write("tokenizer.model", next(files[name] for name in TOKENIZER_FILES if name in files))


def at_least(least: float, kind: type = int, most: float = 2**31 - 1) -> Callable[[str], float]:
    """An argparse type: a number within these bounds, which neither nan nor infinity is."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be at least {least} and at most {most}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when `kind` cannot read the text
    return parse


def command(parser: argparse.ArgumentParser, body: Callable[[], None]) -> None:
    """Run a command. What a user can mend ends it with one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        body()
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, "\nstopped\n")
    except (InputError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:  # a GPU's is a RuntimeError, and so is a CPU's, with these words
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)):
            raise
        parser.error("out of memory: a smaller --micro-batch-size, --seq-len, --active or --rank, or --embeddings projected "
                     "or frozen, needs less")  # fmt: skip
