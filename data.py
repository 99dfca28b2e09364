"""Text in, token ids out: tokenizers, the record formats of `--data`, and batches.

A dataset is one flat array of token ids and, for each row, where it begins and ends in it. A token that is context only
(a prompt, on which there is no loss) is stored as its bitwise complement, ~id, which is negative: one array holds both
the tokens and the mask.

    plain text      cut into rows of seq_len targets          every token is trained on
    records         one row each, prompt and completion       the completion and its end-of-text token are trained on
"""

import argparse
import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor
from tqdm import tqdm

TINY = Path(__file__).parent / "tiny"  # the embedded default: a small checkpoint with its data


class InputError(ValueError):
    """Something a user can mend: the message is one line that names the file or flag, what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """A bad flag is an InputError like any other, without the usage text around it."""

    def error(self, message: str) -> None:
        """Raises InputError."""
        raise InputError(f"{message}; see --help")


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line main; an InputError becomes one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator:
    """Open a binary file for writing that takes its place only when it is whole and on disk; until then, and if
    anything fails, what was there before stays."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Have the names in a folder on disk, as fsync has a file's content."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_text(path: Path) -> str:
    """A text file, whole. Raises InputError where it is missing, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"{path}: empty")
    return text


def read_json(path: Path) -> object:
    """A JSON file. Raises InputError, with the line, where it is malformed."""
    return parse_json(read_text(path), path, 1)


def parse_json(text: str, path: Path, line: int) -> object:
    """Parse JSON that begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {line + error.lineno - 1}: malformed JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: line {line}: JSON that cannot be read: {error}") from None


# Tokenizers


class SentencePieceTokenizer:
    """LLaMA-1/2, Mistral. `bos_id`, `eos_id`: ids, or -1 where the tokenizer has none."""

    def __init__(self, path: Path):
        self.model = sentencepiece.SentencePieceProcessor()
        self.model.LoadFromSerializedProto(path.read_bytes())
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.vocab_size, self.bos_id, self.eos_id = self.model.vocab_size(), self.model.bos_id(), self.model.eos_id()
        marks = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.model.unk_id()}
        self.hf_settings = {f"{mark}_token": self.model.id_to_piece(id) for mark, id in marks.items() if id >= 0}
        self.hf_settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of a text, between the marks asked for, of which the tokenizer may have none."""
        marks = [self.bos_id] * (bos and self.bos_id >= 0), [self.eos_id] * (eos and self.eos_id >= 0)
        return marks[0] + self.model.encode(text) + marks[1]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts, without marks, on all cores."""
        return self.model.encode(texts)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; BOS and EOS have none."""
        return self.model.decode([int(i) for i in ids])


class TiktokenTokenizer:
    """LLaMA-3: byte-pair ranks, then 256 special tokens. Marks written out in a text are text, never special tokens."""

    # How text is split before merging (GPT-4's pattern, as LLaMA-3 uses it)
    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    SPECIAL = {"begin_of_text": 0, "end_of_text": 1, "start_header_id": 6, "end_header_id": 7, "eot_id": 9}

    def __init__(self, path: Path):
        try:
            import tiktoken
        except ImportError:
            raise InputError(f"{path}: LLaMA-3's tokenizer needs one more package: pip install tiktoken") from None
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        ranks = {}
        for number, line in enumerate(path.read_bytes().splitlines()):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
            if int(rank) != number or len(ranks) != number + 1:
                raise ValueError(f"line {number + 1} does not hold rank {number}")
        special = {f"<|{name}|>": len(ranks) + offset for name, offset in self.SPECIAL.items()}
        self.model = tiktoken.Encoding(path.name, pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.ranks, self.vocab_size = len(ranks), len(ranks) + 256
        self.bos_id, self.eos_id = special["<|begin_of_text|>"], special["<|end_of_text|>"]
        marks = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        self.hf_settings = marks | {"tokenizer_class": "PreTrainedTokenizerFast"}

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of a text, between the marks asked for."""
        # A run of a million letters or blanks would exhaust tiktoken's stack; Meta cuts such runs at 25,000, too.
        pieces = re.findall(r"(?s)\s{1,25000}|\S{1,25000}", text) if re.search(r"\s{25001}|\S{25001}", text) else [text]
        return [self.bos_id] * bos + [i for p in pieces for i in self.model.encode_ordinary(p)] + [self.eos_id] * eos

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts, without marks, on all cores."""
        return self.model.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; special tokens have none."""
        return self.model.decode([int(i) for i in ids if i < self.ranks])


Tokenizer = SentencePieceTokenizer | TiktokenTokenizer
TOKENIZER_NAMES = ("tokenizer.model", "original/tokenizer.model", "tokenizer.model.v3")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or in a file: SentencePiece, or LLaMA-3's tiktoken ranks.

    Has `.encode(text, bos=True, eos=False) -> list[int]`, `.decode(ids) -> str`, `.vocab_size`, `.bos_id`, `.eos_id`.
    Raises InputError where there is none or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in TOKENIZER_NAMES if (path / name).is_file()]
        if not found:
            raise InputError(f"{path}: no tokenizer.model in this folder; copy the model's own one there")
        path = found[0]
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    with open(path, "rb") as file:
        tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(1000))
    try:
        return TiktokenTokenizer(path) if tiktoken else SentencePieceTokenizer(path)
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError, binascii.Error) as error:
        raise InputError(f"{path}: damaged tokenizer ({str(error)[:100]}); fetch it again") from None


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy every tokenizer file, and the settings that Hugging Face keeps beside them, to another checkpoint folder.
    One of Hugging Face's layout gets what its tools need to know of the tokenizer where the source does not say it."""
    source, target = Path(source), Path(target)
    for name in (*TOKENIZER_NAMES, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                 "added_tokens.json", "chat_template.jinja", "generation_config.json"):  # fmt: skip
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target / name) as file:
                file.write((source / name).read_bytes())
    if not (target / "config.json").is_file():
        return
    tokenizer, known = load_tokenizer(source), source / "config.json"
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    ids = {key: value for key, value in ids.items() if value >= 0}
    if known.is_file():
        ids |= {key: value for key, value in read_json(known).items() if key in (*ids, "pad_token_id")}
    with atomic_write(target / "config.json") as file:
        file.write(json.dumps(read_json(target / "config.json") | ids, indent=2).encode())
    if not (target / "tokenizer_config.json").is_file() and not (target / "tokenizer.json").is_file():
        with atomic_write(target / "tokenizer_config.json") as file:
            file.write(json.dumps(tokenizer.hf_settings, indent=2).encode())


# Records


@dataclass
class Record:
    """One example: alternating prompts and completions, or plain text (no prompt). `choices`, where the record names
    them, are the possible completions of its prompt, and `answer` is the index of the right one."""

    turns: list[tuple[str, str]]
    choices: list[str] = field(default_factory=list)
    answer: int = 0
    plain: bool = False


# The prompt of Alpaca (Taori et al., 2023), with which commonsense-170k is trained and evaluated
PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n{}\n\n", "### Input:\n{}\n\n", "### Response:\n"


KNOWN = "instruction + output, prompt + completion, prompt + choices + answer, messages, input + output, text"


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The text that the response to an instruction continues."""
    if not context:
        return PREAMBLE.format("") + INSTRUCTION.format(instruction) + RESPONSE
    paired = ", paired with an input that provides further context"
    return PREAMBLE.format(paired) + INSTRUCTION.format(instruction) + INPUT.format(context) + RESPONSE


def parse_record(record: object) -> Record:
    """Tell a record's type by its keys. Raises ValueError, saying why, where it is of none of the known types."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, this is {json.dumps(record)[:40]}")
    json.dumps(record, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair

    def text(key: str, default: str | None = None) -> str:
        """A field that must hold text; `default` stands in where it is absent."""
        value = record.get(key, default)
        if not isinstance(value, str):
            raise ValueError(f"{key!r} must be a text, this is {json.dumps(value)[:40]}")
        return value

    keys = record.keys()
    if {"instruction", "output"} <= keys:  # Alpaca, commonsense-170k
        instruction, output = text("instruction"), text("output")
        parsed = Record([(alpaca_prompt(instruction, text("input", "")), output)])
        options = re.search(r"Answer format: *(\S+)\s*$", instruction)
        if "answer" in keys and options and output.endswith(text("answer")):
            names = options[1].split("/")
            if text("answer") in names:
                parsed.choices = [output.removesuffix(text("answer")) + name for name in names]
                parsed.answer = names.index(text("answer"))
        return parsed
    if {"prompt", "choices", "answer"} <= keys:
        choices, answer = record["choices"], record["answer"]
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise ValueError("'choices' must be a list of at least two texts")
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError("'answer' must be one of 'choices', or its index from 0")
        return Record([(text("prompt"), choices[answer])], choices, answer)
    if {"prompt", "completion"} <= keys:
        return Record([(text("prompt"), text("completion"))])
    if "messages" in keys:
        return Record(parse_messages(record["messages"]))
    if {"input", "output"} <= keys:  # text2text
        return Record([(text("input"), text("output"))])
    if "text" in keys:
        return Record([("", text("text"))], plain=True)
    raise ValueError(f"unknown record with keys {', '.join(sorted(keys))[:80] or '(none)'}; known: {KNOWN}")


def parse_messages(messages: object) -> list[tuple[str, str]]:
    """Turns of a conversation: what comes before an assistant's message is its prompt, in Alpaca's headings."""
    turns, prompt = [], ""
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError('\'messages\' must be a list of {"role", "content"} with texts')
        role, content = message.get("role"), message["content"]
        if role == "assistant":
            turns.append((prompt + RESPONSE, content))
            prompt = ""
        elif role in ("system", "user"):
            prompt += content + "\n\n" if role == "system" else INSTRUCTION.format(content)
        else:
            raise ValueError(f"role {json.dumps(role)[:40]} is not system, user or assistant")
    if not turns:
        raise ValueError("'messages' has no assistant message to train on")
    return turns


def load_records(path: str | Path) -> list[Record]:
    """Read a file of any of the formats: `.txt`, a JSON list, {"type", "instances"}, or JSON lines.

    Raises InputError, with the line or the record's number, for what cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a folder; --data takes a file")
    text = read_text(path)
    if path.suffix == ".txt":
        return [Record([("", text)], plain=True)]
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if whole is None and path.suffix != ".json":
        lines = enumerate(text.split("\n"), 1)  # JSON may hold the other characters that splitlines cuts at
        numbered = [(f"line {n}", parse_json(line, path, n)) for n, line in lines if line.strip()]
    else:
        whole = parse_json(text, path, 1) if whole is None else whole
        if isinstance(whole, dict) and "instances" in whole:
            if whole.get("type") not in ("text_only", "text2text") or not isinstance(whole["instances"], list):
                raise InputError(f'{path}: "type" must be text_only or text2text, and "instances" a list')
            whole = whole["instances"]
        numbered = [(f"record {n}", r) for n, r in enumerate(whole if isinstance(whole, list) else [whole], 1)]
    records = []
    for where, record in numbered:
        try:
            records.append(parse_record(record))
        except ValueError as error:
            raise InputError(f"{path}: {where}: {error}") from None
    if not records:
        raise InputError(f"{path}: holds no records")
    return records


# Tokens


def encode_turn(tokenizer: Tokenizer, prompt: str, completion: str, bos: bool, eos: bool) -> list[int]:
    """Ids of prompt + completion as one text, those of the prompt complemented.

    The two are tokenised together, as at inference a model's own tokens would follow the prompt's; a token that spans
    the border belongs to the completion.
    """
    ids = tokenizer.encode(prompt + completion, bos, eos)
    context = tokenizer.encode(prompt, bos) if prompt else ids[:bos]
    border = next((i for i, (a, b) in enumerate(zip(context, ids)) if a != b), len(context))
    return [~i for i in ids[:border]] + ids[border:]


PIECE = 4096  # characters, about, of a long text that are tokenised together
# Where no token spans: behind a line's end, before the blank between two words.
CUT = re.compile(r"\n(?=[^\S\r\n]*\S)|(?<=\w)(?= \w)")


def encode_long(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of a text as `tokenizer.encode` gives them, without marks: int32 [tokens]. SentencePiece takes time that
    grows with the square of a text's length, and Python ids are ten times as large as these: it is done in pieces."""
    starts = [0]
    for cut in CUT.finditer(text):
        if cut.end() - starts[-1] >= PIECE:
            starts.append(cut.end())
    pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]
    # A SentencePiece text begins with a blank of its own; behind a newline, whose ids are then left out, it does not.
    newline = tokenizer.encode("\n", bos=False)
    parts = [np.array(tokenizer.encode(pieces[0], bos=False), dtype=np.int32)]
    for n in tqdm(range(1, len(pieces), 256), "tokenising a long text", leave=False, disable=None):
        for ids in tokenizer.encode_batch(["\n" + piece for piece in pieces[n : n + 256]]):
            if ids[: len(newline)] != newline:  # a vocabulary that merges across lines
                return np.array(tokenizer.encode(text, bos=False), dtype=np.int32)
            parts.append(np.array(ids[len(newline) :], dtype=np.int32))
    return np.concatenate(parts)


def fit(ids: list[int], length: int) -> list[int]:
    """Shorten a row to `length` tokens: from the prompt's left, keeping BOS; where a completion alone is too long, its
    end."""
    excess = len(ids) - length
    if excess <= 0:
        return ids
    prompt = next((n for n, i in enumerate(ids) if i >= 0), len(ids))
    cut = min(excess, max(prompt - 1, 0))
    return (ids[:1] + ids[1 + cut :])[:length]


@dataclass
class Dataset:
    """Rows of token ids. ids: int32 [tokens], context complemented; rows: int64 [N, 2], begin and end of each in ids.
    `records`, as many as there are multiple-choice ones, are what accuracy is measured on. `truncated` counts rows cut
    to the sequence length."""

    ids: np.ndarray
    rows: np.ndarray
    records: list[Record]
    truncated: int = 0

    def batch(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """tokens, targets: int64 [B, T] of the rows `index`, padded to the longest; targets are the tokens one ahead,
        -100 where there is no loss."""
        rows = [self.ids[begin:end].astype(np.int64) for begin, end in self.rows[index]]
        T = max(len(row) for row in rows) - 1
        tokens, targets = torch.zeros(len(rows), T, dtype=torch.int64), torch.full((len(rows), T), -100)
        for n, row in enumerate(rows):
            tokens[n, : len(row) - 1] = torch.from_numpy(np.where(row < 0, ~row, row)[:-1])
            targets[n, : len(row) - 1] = torch.from_numpy(np.where(row < 0, -100, row)[1:])
        return tokens, targets

    def predicts(self) -> bool:
        """Whether any row has a target."""
        return any((self.ids[begin + 1 : end] >= 0).any() for begin, end in self.rows)

    def sample(self, count: int, seed: int) -> list[Tensor]:
        """The tokens of at most `count` rows drawn at random, each int64 [1, T]: calibration text."""
        order = np.random.default_rng(seed).permutation(len(self.rows))[:count]
        return [self.batch(order[n : n + 1])[0] for n in range(len(order))]


def build_dataset(records: list[Record], tokenizer: Tokenizer, seq_len: int, eos: bool = True) -> Dataset:
    """Tokenise records into rows of at most seq_len + 1 tokens, that is seq_len predictions. eos: end completions with
    the end-of-text token. Raises InputError where nothing is left to predict."""
    ids: list[np.ndarray] = []
    rows, truncated, position = [], 0, 0
    stream: list[np.ndarray] = []
    for record in tqdm(records, "tokenising", leave=False, disable=None):
        if record.plain:
            bos, end = tokenizer.bos_id >= 0, len(records) > 1 and tokenizer.eos_id >= 0
            marks = np.array([[tokenizer.bos_id], [tokenizer.eos_id]], dtype=np.int32)
            stream += [~marks[0, :bos], encode_long(tokenizer, record.turns[0][1]), marks[1, :end]]
            continue
        row = []
        for prompt, completion in record.turns:
            row += encode_turn(tokenizer, prompt, completion, bos=not row, eos=eos)
        truncated += len(row) > seq_len + 1
        row = fit(row, seq_len + 1)
        ids.append(np.array(row, dtype=np.int32))
        rows.append((position, position + len(row)))
        position += len(row)
    length = sum(map(len, stream))
    # Texts follow one another; a row begins with the last token of the one before, so that each token is predicted
    # once.
    rows += [(position + n, position + min(n + seq_len + 1, length)) for n in range(0, length - 1, seq_len)]
    if not rows:
        raise InputError("--data: too short: not two tokens of text in a row")
    return Dataset(np.concatenate(ids + stream), np.array(rows), [r for r in records if r.choices], truncated)


KEPT_FROM = 2**20  # characters; less is tokenised again as fast as read


def load_dataset(records: list[Record], tokenizer: Tokenizer, seq_len: int) -> Dataset:
    """`build_dataset`, kept on disk and memory-mapped from there when the same text is asked for again. The files are
    in ~/.cache/owlore (or $XDG_CACHE_HOME/owlore), named by what they were made of; they may be deleted at any time."""
    if sum(len(text) for record in records for turn in record.turns for text in turn) < KEPT_FROM:
        return build_dataset(records, tokenizer, seq_len)
    key = hashlib.sha256(f"1 {tokenizer.digest} {seq_len}".encode())
    for record in records:
        key.update(repr((record.turns, record.plain)).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "owlore" / key.hexdigest()[:32]
    try:
        ids, rest = np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "rest.npz")
        if zlib.crc32(ids) == rest["crc"]:
            return Dataset(ids, rest["rows"], [r for r in records if r.choices], int(rest["truncated"]))
    except Exception:  # numpy has no one error for a file that is damaged or missing: it is made again
        pass
    dataset = build_dataset(records, tokenizer, seq_len)
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        np.save(beside / "ids.npy", dataset.ids)
        np.savez(beside / "rest.npz", rows=dataset.rows, truncated=dataset.truncated, crc=zlib.crc32(dataset.ids))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(beside, folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        print(f"{folder}: tokens could not be kept there ({error.strerror}); the next run will tokenise again")
    return dataset


def split_records(records: list[Record], share: float, most: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Hold a share of the records, `most` of them at most, out for validation: of one plain text its end, of several
    records a random draw. Raises InputError where there is too little to split."""
    if len(records) == 1 and records[0].plain:
        text = records[0].turns[0][1]
        end = int(len(text) * (1 - share))
        cut = text.rfind("\n", 0, end) + 1 or end
        if not text[:cut].strip() or not text[cut:].strip():
            raise InputError("--data: the text is too short to hold a part out for validation; give --val-data")
        return [Record([("", text[:cut])], plain=True)], [Record([("", text[cut:])], plain=True)]
    held = min(max(1, round(len(records) * share)), most)
    if held >= len(records):
        raise InputError("--data: one record cannot be split for validation; add records or give --val-data")
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[i] for i in sorted(order[held:])], [records[i] for i in sorted(order[:held])]
