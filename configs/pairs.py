"""Make pairs to learn from, of the wrong answers that a tuned model gives to its own prompts.

    python configs/pairs.py answers.jsonl pairs.jsonl

`answers.jsonl` is what `lora-jax eval --predictions` wrote. Every wrong answer becomes a row
{"prompt", "chosen", "rejected"}: the reference against the answer.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


def pairs(lines: Iterable[dict]) -> Iterator[dict]:
    """Yield a pair for each wrong answer of an adapter; those of the base are left out."""
    for line in lines:
        if line["adapter"] != "base" and not line["exact_match"] and line["answer"].strip():
            yield {
                "prompt": line["prompt"],
                "chosen": line["references"][0],
                "rejected": line["answer"],
            }


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = map(Path, sys.argv[1:])
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    if not all({"adapter", "exact_match"} <= line.keys() for line in lines):
        sys.exit(
            f"{source} has lines without `adapter` or `exact_match`: write it with "
            "`lora-jax eval --predictions` and the metric exact_match"
        )
    rows = list(pairs(lines))
    if not rows:
        sys.exit(f"{source} has no wrong answer of an adapter")
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} pairs of {len(lines)} answers: {target}")


if __name__ == "__main__":
    main()
