"""Make the three tasks of the study on SmolLM2 from public data, as files that train.py reads.

shakespeare  the first 600,000 characters of tinyshakespeare.txt to train, the last 14,000 to validate
alpaca       the first 899 and the last 100 records of alpaca_en_demo.json
arc          all of arc_easy_train.json, and the first 100 records of arc_easy_test.json

python bench/tasks.py ../shared/data runs/tasks
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


def main() -> None:
    """Write NAME and NAME-val into the folder named second, from the files in the one named first."""
    source, target = map(Path, sys.argv[1:])
    target.mkdir(parents=True, exist_ok=True)
    text = (source / "tinyshakespeare.txt").read_text()
    alpaca, arc, test = (
        json.loads((source / f"{name}.json").read_text())
        for name in ("alpaca_en_demo", "arc_easy_train", "arc_easy_test")
    )
    (target / "shakespeare.txt").write_text(text[:600_000])
    (target / "shakespeare-val.txt").write_text(text[-14_000:])
    tasks = {
        "alpaca": alpaca[:899],
        "alpaca-val": alpaca[899:],
        "arc": map(by_text, arc),
        "arc-val": map(by_text, test[:100]),
    }
    for name, records in tasks.items():
        (target / f"{name}.json").write_text(json.dumps(list(records), indent=1))


if __name__ == "__main__":
    main()
