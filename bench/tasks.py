"""Make the three tasks of the study on SmolLM2 from public data, as files that train.py reads.

shakespeare  the first 600,000 characters of tinyshakespeare.txt to train, the last 14,000 to validate
alpaca       the first 899 and the last 100 records of alpaca_en_demo.json
arc          all of arc_easy_train.json, and the first 100 records of arc_easy_test.json

python bench/tasks.py ../shared/data runs/tasks
"""

import json
import sys
from pathlib import Path


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
    tasks = {"alpaca": alpaca[:899], "alpaca-val": alpaca[899:], "arc": arc, "arc-val": test[:100]}
    for name, records in tasks.items():
        (target / f"{name}.json").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
