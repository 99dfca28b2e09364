"""Make the tasks of the study on SmolLM2 from public data, as files that train.py reads: three on which settings were
compared and chosen, and two on which none was.

shakespeare   the first 600,000 characters of tinyshakespeare.txt to train, the last 14,000 to validate
alpaca-short  of the first 899 and of the last 100 records of alpaca_en_demo.json those of at most 850 bytes, of which
              all but 8 fit 256 tokens
arc           all of arc_easy_train.json, and the first 100 records of arc_easy_test.json

wikitext      the first 600,000 characters of wikitext2_valid.txt to train, the last 14,000 to validate
boolq         all but the last 100 records of boolq_test.json to train, and those (questions without a passage)

arc-unseen    all of arc_easy_train.json to train, and to validate what nothing was chosen on: of the next 500 records of
              arc_easy_test.json those whose question is not among them
shakespeare-unseen  likewise the same 600,000 characters, and to validate the 28,000 before the last 14,000

python bench/tasks.py ../shared/data runs/tasks

The tables named alpaca are of all 899 and 100 records, from when data.py left no prompt in a row that the answer alone
filled. At 256 tokens those were 232 and 24, by

python -c "import data; tokenizer, records = data.load_tokenizer('runs/smollm2'), data.load_records('alpaca_en_demo.json')
full = [len(tokenizer.encode(r.turns[0][1], bos=False, eos=True)) >= 256 for r in records]
print(sum(full[:899]), sum(full[899:]))"
"""

import json
import re
import sys
from pathlib import Path


def by_text(record: dict) -> dict:
    """A multiple-choice record whose answers are texts, of one whose answers are answer1, answer2, ..."""
    question, answers = re.fullmatch(
        r"(?s).*?question: (.*?)\n\n(Answer1: .*)\n\nAnswer format: .*", record["instruction"]
    ).groups()
    choices = re.split(r" ?Answer\d: ", answers)[1:]
    return {"question": question, "choices": choices, "answer": int(record["answer"].removeprefix("answer")) - 1}


def is_short(record: dict) -> bool:
    """Whether a record of Alpaca's is to fit a row of 256 tokens."""
    return len("".join(record[key] for key in ("instruction", "input", "output")).encode()) <= 850


def main() -> None:
    """Write NAME and NAME-val into the folder named second, from the files in the one named first."""
    source, target = map(Path, sys.argv[1:])
    target.mkdir(parents=True, exist_ok=True)
    for name, file in {"shakespeare": "tinyshakespeare.txt", "wikitext": "wikitext2_valid.txt"}.items():
        text = (source / file).read_text()
        (target / f"{name}.txt").write_text(text[:600_000])
        (target / f"{name}-val.txt").write_text(text[-14_000:])
        if name == "shakespeare":
            (target / "shakespeare-unseen.txt").write_text(text[:600_000])
            (target / "shakespeare-unseen-val.txt").write_text(text[-42_000:-14_000])
    alpaca, arc, test, boolq = (
        json.loads((source / f"{name}.json").read_text())
        for name in ("alpaca_en_demo", "arc_easy_train", "arc_easy_test", "boolq_test")
    )
    arc, test = [by_text(record) for record in arc], [by_text(record) for record in test[:600]]
    known = {record["question"] for record in arc}
    tasks = {
        "alpaca-short": filter(is_short, alpaca[:899]),
        "alpaca-short-val": filter(is_short, alpaca[899:]),
        "arc": arc,
        "arc-val": test[:100],
        "arc-unseen": arc,
        "arc-unseen-val": [record for record in test[100:] if record["question"] not in known],
        "boolq": boolq[:-100],
        "boolq-val": boolq[-100:],
    }
    for name, records in tasks.items():
        (target / f"{name}.json").write_text(json.dumps(list(records), indent=1))


if __name__ == "__main__":
    main()
