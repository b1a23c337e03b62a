"""Cache of the scores before the first step, which take minutes and rarely change between runs.

An entry is a file `scores/DIGEST.json` of the cache directory, named by the digest of its key. The
key has everything that the scores depend on: weights, config, tokenizer, chat template, held-out
rows, settings, code, versions and devices. Fresh adapters of plain LoRA change no score and are not
in the key. Settings and weights of other adapters are (an init that changes the base, DoRA, virtual
tokens, trained copies of modules, `adapter.path`). Losses and answers are stored; metrics are
computed from the answers.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_jax import data, hosts
from lora_jax.cache import cache_directory, write_entry
from lora_jax.report.scores import Answer
from lora_jax.train.environment import describe_adapters, digest_content, environment
from lora_jax.train.evaluate import Evaluator
from lora_jax.train.scored import Losses, Scores

# Settings of data that locate or arrange rows; the rows themselves are in the key.
_ARRANGING = (
    *("train", "eval", "eval_size", "regression", "drop_overlap", "packing", "shuffle", "cache"),
    *("streaming", "stream_rows", "on_bad_row", "chat_template"),
)
# Settings of eval that neither losses nor answers depend on.
_REPORTING = ("before", "cache", "metrics", "samples", "generate_every")


def measure(
    evaluator: Evaluator, adapters: Any, fingerprint: Mapping[str, str], say: Callable[[str], None]
) -> Scores:
    """Return the scores of adapters before the first step, from the cache if it has them.

    fingerprint: digests of the base, the tokenizer and the template
    """
    with evaluator.display.about("base"):
        if not evaluator.config.eval.cache:
            return evaluator.score(adapters)
        key = _key(evaluator, adapters, fingerprint)
        file = cache_directory() / "scores" / f"{digest_content(key)}.json"
        content = hosts.from_main(lambda: _read(file, key, say))
        if content is not None:
            say("base: scores of an earlier run; eval.cache=false measures them again")
            evaluator.took.update(content["took"])
            answers = [_to_answer(fields) for fields in content["answers"]]
            return evaluator.with_metrics(Losses(content["losses"], content["pairs"]), answers)
        found = evaluator.score(adapters)
    if hosts.is_main() and all(map(math.isfinite, found.losses.values())):
        answers = [dataclasses.asdict(answer) for answer in found.answers]
        content = {"losses": dict(found.losses), "answers": answers, "took": evaluator.took}
        content["pairs"] = dict(found.pairs)
        _write(file, {"key": key, **content}, say)
    return found


def _key(evaluator: Evaluator, adapters: Any, fingerprint: Mapping[str, str]) -> dict[str, Any]:
    config, model, mesh = evaluator.config, evaluator.model, evaluator.mesh
    held_out = evaluator.held_out
    settings, train = dataclasses.asdict(config), config.train
    return {
        "fingerprint": {name: fingerprint[name] for name in ("base", "tokenizer", "template")},
        "config.json": digest_content(model.hf_config),
        "stop_tokens": sorted(evaluator.reader.stop_tokens),
        "rows": {
            name: [
                one.system_prompt,
                digest_content([repr(row) for row in one.rows]),
                len(one.examples),
            ]
            for name, one in held_out.items()
        },
        "examples": {name: _digest_examples(one.examples) for name, one in held_out.items()},
        "data": {name: x for name, x in settings["data"].items() if name not in _ARRANGING},
        "eval": {name: x for name, x in settings["eval"].items() if name not in _REPORTING},
        "base_dtype": config.base_dtype,
        "objective": [config.train.objective, *_objective(evaluator)],
        "train": [train.compute_dtype, train.attention, train.loss_chunk],
        "adapter": describe_adapters(config.adapter, adapters),
        **environment(mesh),
    }


def _objective(evaluator: Evaluator) -> list[Any]:
    """Return everything that the losses of answers to compare depend on."""
    if not evaluator.config.train.compares_answers:
        return []
    reference = evaluator.reference
    return [dataclasses.asdict(evaluator.config.objective), reference and reference.identity]


def _digest_examples(examples: list[data.Example]) -> str:
    total = hashlib.sha256()
    for one in examples:
        texts = repr((one.second_start, one.roles)).encode()
        for part in (one.where.encode(), texts, one.tokens.tobytes(), one.loss_weights.tobytes()):
            total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def _read(file: Path, key: Mapping[str, Any], say: Callable[[str], None]) -> dict | None:
    """Return the content of an entry; None if it is missing or damaged."""
    try:
        checksum, _, text = file.read_text(encoding="utf-8").partition("\n")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        say(f"note: the cached scores {file} cannot be read: {error}")
        return None
    try:
        content = json.loads(text) if checksum == digest_content(text) else {}
        if content["key"] != digest_content(key):
            raise ValueError("of another key")
        for fields in content["answers"]:
            _to_answer(fields)
        return {name: content[name] for name in ("losses", "pairs", "answers", "took")}
    except (ValueError, LookupError, TypeError, RecursionError):
        say(f"note: the cached scores {file} are damaged and not used")
        return None


def _to_answer(fields: Mapping[str, Any]) -> Answer:
    return Answer(**{**fields, "references": tuple(fields["references"])})


def _write(file: Path, content: Mapping[str, Any], say: Callable[[str], None]) -> None:
    text = json.dumps({**content, "key": digest_content(content["key"])})
    try:
        write_entry(file, f"{digest_content(text)}\n{text}".encode())
    except OSError as error:
        say(f"note: the scores cannot be stored in {file.parent}: {error.strerror or error}")
