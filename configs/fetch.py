"""Fetch the data of three recipes from their public sources, as rows that the configs read.

    python configs/fetch.py e2e             # data/e2e_valid.jsonl, data/e2e_test.jsonl
    python configs/fetch.py restaurant8k    # data/restaurant8k_train.jsonl, .._test.jsonl
    python configs/fetch.py usaddress-kl    # data/general_replay.jsonl, data/general_test.jsonl

E2E NLG is the copy in the repository of the LoRA paper (CC BY-SA 4.0): a meaning representation
and a sentence in each line, as separate words, which are joined again. restaurant8k is PolyAI's
(CC BY 4.0): messages with the spans of their slots, which become JSON. General questions are the
seed tasks of Self-Instruct (Apache-2.0), of which 64 are for tests.
"""

import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

GITHUB = "https://raw.githubusercontent.com/"
E2E = "microsoft/LoRA/main/examples/NLG/data/e2e/"
RESTAURANT = "PolyAI-LDN/task-specific-datasets/master/span_extraction/restaurant8k/"
SEED_TASKS = "yizhongw/self-instruct/main/data/seed_tasks.jsonl"
# By recipe: the file to write, the file to fetch, and how many rows it must have.
FILES = {
    "e2e": {
        "e2e_valid.jsonl": (f"{E2E}valid.txt", 4672),
        "e2e_test.jsonl": (f"{E2E}test.txt", 4693),
    },
    "restaurant8k": {
        "restaurant8k_train.jsonl": (f"{RESTAURANT}train_0.json", 8198),
        "restaurant8k_test.jsonl": (f"{RESTAURANT}test.json", 3731),
    },
    "usaddress-kl": {
        "general_replay.jsonl": (SEED_TASKS, 111),
        "general_test.jsonl": (SEED_TASKS, 64),
    },
}


def join_words(text: str) -> str:
    """Join punctuation, hyphens, 's and n't to the words that they belong to."""
    text = re.sub(r" ([.,!?;:]|'s\b|n't\b)", r"\1", text)
    return text.replace(" - ", "-").replace("£ ", "£").strip()


def e2e_rows(text: str) -> Iterator[dict]:
    for line in text.splitlines():
        prompt, _, completion = line.partition("||")
        yield {"prompt": prompt.strip(), "completion": join_words(completion)}


def restaurant8k_rows(text: str) -> Iterator[dict]:
    for message in json.loads(text):
        prompt, slots = message["userInput"]["text"], {}
        for label in message.get("labels", ()):
            span = label["valueSpan"]
            slots[label["slot"]] = prompt[span.get("startIndex", 0) : span["endIndex"]]
        yield {
            "prompt": prompt,
            "context": message.get("context", {}).get("requestedSlots", []),
            "completion": json.dumps(slots, ensure_ascii=False),
        }


def general_rows(text: str, count: int = 64, longer_than: int = 40) -> tuple[list, list]:
    """Return the rows for training, and the first `count` of those with longer answers."""
    rows = []
    for task in map(json.loads, text.splitlines()):
        (one,) = task["instances"]
        parts = [task["instruction"], one["input"]]
        prompt = "\n\n".join(part for part in parts if part)
        rows.append({"prompt": prompt, "completion": one["output"]})
    test = [row for row in rows if len(row["completion"]) > longer_than][:count]
    return [row for row in rows if row not in test], test


READERS = {
    "e2e_valid.jsonl": e2e_rows,
    "e2e_test.jsonl": e2e_rows,
    "restaurant8k_train.jsonl": restaurant8k_rows,
    "restaurant8k_test.jsonl": restaurant8k_rows,
    "general_replay.jsonl": lambda text: general_rows(text)[0],
    "general_test.jsonl": lambda text: general_rows(text)[1],
}


def fetch(recipe: str, directory: Path, base: str = GITHUB) -> None:
    """Write the files of a recipe. Ends with a message if one cannot be fetched or differs."""
    for name, (place, count) in FILES[recipe].items():
        try:
            with urllib.request.urlopen(base + place, timeout=60) as answer:
                text = answer.read().decode("utf-8")
        except OSError as error:
            reason = getattr(error, "reason", error)
            sys.exit(
                f"error: cannot fetch {base}{place}: {reason}. Without a network, put the rows "
                f'{{"prompt": .., "completion": ..}} into {directory / name} by hand'
            )
        rows = [json.dumps(row, ensure_ascii=False) for row in READERS[name](text)]
        if len(rows) != count:
            sys.exit(f"error: {base}{place} has {len(rows):,} rows, not {count:,}: it has changed")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{directory / name}: {count:,} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in FILES:
        sys.exit(f"usage: python configs/fetch.py {{{','.join(FILES)}}}")
    fetch(sys.argv[1], Path("data"))
