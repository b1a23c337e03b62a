"""Data sets of a run as examples, and the choice of held-out examples."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from lora_jax import data
from lora_jax.data.rows import JudgedRow, PairRow
from lora_jax.errors import UserError


@dataclass(frozen=True)
class DataSet:
    """Rows as they were read (none if the examples are from the cache), and their examples."""

    rows: list[data.AnyRow]
    examples: list[data.Example]
    system_prompt: str | None = None


def digest(sets: Iterable[DataSet]) -> str:
    """Digest of the examples of some sets, in their order."""
    total = hashlib.sha256()
    for one in sets:
        total.update(f"{len(one.examples)} examples".encode())
        for example in one.examples:
            total.update(len(example.tokens).to_bytes(8, "little"))
            total.update(example.tokens.data)
            total.update(example.loss_weights.data)
            if example.second_start is not None:
                total.update(repr((example.second_start, example.roles)).encode())
    return total.hexdigest()


@dataclass(frozen=True)
class TrainData:
    """Training data of a run: sets by source, each with its weight, or a source to stream. `replay`
    is the name of the set of general text among them.
    """

    sets: Mapping[str, DataSet]
    weights: Mapping[str, float]
    stream: str | None = None
    replay: str | None = None

    def digest(self) -> str:
        """Digest of all examples and weights, wherever their files are. For a stream, digest of
        its files, or the name of a data set of the hub.
        """
        if self.stream is not None:
            files = data.source_files(self.stream)
            return data.digest_files(files) if files else self.stream
        names = sorted(self.sets)
        shares = repr([float(self.weights[name]) for name in names] if len(names) > 1 else [])
        return hashlib.sha256(
            (shares + digest(self.sets[name] for name in names)).encode()
        ).hexdigest()


def rows_of(examples: Sequence[data.Example], rows: Sequence[data.AnyRow]) -> list[data.AnyRow]:
    """Return the rows of one source that became these examples; of answers to compare, those with
    a right answer, as conversations.
    """
    kept = {example.where for example in examples}
    found = [row for row in rows if row.where in kept]
    if len({row.where for row in found}) < len(kept):
        raise RuntimeError(f"examples without their rows, such as {examples[0].where}")
    answers = [row.answer if isinstance(row, PairRow | JudgedRow) else row for row in found]
    return [row for row in answers if row is not None]


def hold_out(
    sets: Mapping[str, DataSet],
    read_rows: Callable[[str], Sequence[data.AnyRow]],
    size: float,
    seed: int,
    system_prompt: str | None,
) -> tuple[dict[str, DataSet], DataSet]:
    """Take `size` of the examples (below 1: a share of them) out of the sets.

    Examples with the same prompt stay together, whatever sources they are in, so that no held-out
    prompt was trained on. Every source gives its share, as far as that allows, and the choice
    depends on the seed alone. `read_rows` gives the rows of a source.

    Raises:
        UserError: nothing would be left on one of the two sides.
    """
    left, examples, rows = {}, [], []
    total = sum(len(one.examples) for one in sets.values())
    held_out: dict[bytes, bool] = {}  # by prompt, of the sources so far
    wanted = 0.0  # of the sources so far: what one gives too much, the next gives less
    for source, one in sets.items():
        wanted += len(one.examples) * (size if size < 1 else size / total)
        groups: dict[bytes, list[int]] = {}
        for index, example in enumerate(one.examples):
            groups.setdefault(_question(example), []).append(index)
        chosen = {i for key, group in groups.items() if held_out.get(key) for i in group}
        members = [group for key, group in groups.items() if key not in held_out]
        for place in data.order(len(members), seed, 0):
            if len(examples) + len(chosen) >= round(wanted):
                break
            chosen.update(members[place])
        held_out |= {key: group[0] in chosen for key, group in groups.items()}
        held = [one.examples[i] for i in sorted(chosen)]
        examples += held
        kept = [e for i, e in enumerate(one.examples) if i not in chosen]
        if not kept:
            raise UserError(
                f"data.eval_size={size:g} leaves nothing of {source} to train on: it has "
                f"{len(one.examples)} examples"
            )
        left[source] = DataSet([], kept, one.system_prompt)
        rows += rows_of(held, read_rows(source))
    if not examples:
        raise UserError(f"data.eval_size={size:g} of {total} examples holds none out")
    return left, DataSet(rows, examples, system_prompt)


def _question(example: data.Example) -> bytes:
    """Return what must not be on both sides: the prompt, or all of a text, which has none."""
    return data.prompt_key(example) if data.has_prompt(example) else example.tokens.tobytes()


def without_overlap(
    examples: list[data.Example], train: TrainData, drop: bool, console: Console
) -> list[data.Example]:
    """With `drop`, return the held-out examples that are not in the training data too. Otherwise
    all are kept, and the run warns of them.
    """
    if not drop:
        return examples
    seen = {e.tokens.tobytes() for one in train.sets.values() for e in one.examples}
    apart = [example for example in examples if example.tokens.tobytes() not in seen]
    both = len(examples) - len(apart)
    if both and not apart:
        raise UserError(
            f"all {both} rows of data.eval are in data.train too: data.drop_overlap=true leaves "
            "nothing to measure"
        )
    if both:
        console.print(f"data.eval: {both} rows left out, as they are in data.train too")
    return apart
