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
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from lora_jax import data, hosts
from lora_jax.cache import cache_directory, write_entry
from lora_jax.config import AdapterConfig, Config
from lora_jax.report.scores import Answer
from lora_jax.train import checkpoint
from lora_jax.train.evaluate import Evaluator, Scores

_PACKAGE = Path(__file__).parent.parent
_PACKAGES = ("lora_jax", "jax", "jaxlib", "flax", "transformers", "tokenizers", "jinja2")
# Settings of data that locate or arrange rows; the rows themselves are in the key.
_ARRANGING = (
    *("train", "eval", "eval_size", "regression", "drop_overlap", "packing", "shuffle", "cache"),
    *("streaming", "stream_rows", "on_bad_row", "chat_template"),
)
# Settings of eval that neither losses nor answers depend on.
_REPORTING = ("before", "cache", "metrics", "samples", "generate_every")
# Settings of adapters without effect on the scores of fresh plain LoRA.
_SIZES = (
    *("rank", "alpha", "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern"),
    *("alpha_pattern", "dropout", "use_rslora", "freeze_a", "lora_plus_ratio"),
)


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
        file = cache_directory() / "scores" / f"{_digest(key)}.json"
        content = hosts.from_main(lambda: _read(file, key, say))
        if content is not None:
            say("base: scores of an earlier run; eval.cache=false measures them again")
            evaluator.took.update(content["took"])
            answers = [_to_answer(fields) for fields in content["answers"]]
            return evaluator.with_metrics(content["losses"], answers)
        found = evaluator.score(adapters)
    if hosts.is_main() and all(map(math.isfinite, found.losses.values())):
        answers = [dataclasses.asdict(answer) for answer in found.answers]
        content = {"losses": dict(found.losses), "answers": answers, "took": evaluator.took}
        _write(file, {"key": key, **content}, say)
    return found


def _key(evaluator: Evaluator, adapters: Any, fingerprint: Mapping[str, str]) -> dict[str, Any]:
    config, model, mesh = evaluator.config, evaluator.model, evaluator.mesh
    held_out = evaluator.held_out
    settings, train = dataclasses.asdict(config), config.train
    device = mesh.devices.flat[0]
    return {
        "fingerprint": {name: fingerprint[name] for name in ("base", "tokenizer", "template")},
        "config.json": _digest(model.hf_config),
        "stop_tokens": sorted(evaluator.reader.stop_tokens),
        "rows": {
            name: [one.system_prompt, _digest([repr(row) for row in one.rows]), len(one.examples)]
            for name, one in held_out.items()
        },
        "examples": {name: _digest_examples(one.examples) for name, one in held_out.items()},
        "data": {name: x for name, x in settings["data"].items() if name not in _ARRANGING},
        "eval": {name: x for name, x in settings["eval"].items() if name not in _REPORTING},
        "base_dtype": config.base_dtype,
        "train": [train.compute_dtype, train.attention, train.loss_chunk],
        "adapter": _describe(config, adapters),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "code": data.digest_files(sorted(_PACKAGE.rglob("*.py"))),
        "devices": [
            *(device.device_kind, device.client.platform_version, platform.machine()),
            *(dict(mesh.shape), jax.process_count(), os.environ.get("XLA_FLAGS", "")),
            str(jax.config.values["jax_default_matmul_precision"]),
        ],
    }


def _describe(config: Config, adapters: Any) -> Any:
    """Return settings and weights of adapters that may change the scores, None for others."""
    fresh = {name: getattr(AdapterConfig(), name) for name in _SIZES}
    starts = ("default", "gaussian")  # B is zero
    start = "default" if config.adapter.init in starts else config.adapter.init
    if dataclasses.replace(config.adapter, **fresh, init=start) == AdapterConfig():
        return None
    return [dataclasses.asdict(config.adapter), checkpoint.digest_leaves(adapters)]


def _digest_examples(examples: list[data.Example]) -> str:
    total = hashlib.sha256()
    for one in examples:
        for part in (one.where.encode(), one.tokens.tobytes(), one.loss_weights.tobytes()):
            total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


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
        content = json.loads(text) if checksum == _digest(text) else {}
        if content["key"] != _digest(key):
            raise ValueError("of another key")
        for fields in content["answers"]:
            _to_answer(fields)
        return {name: content[name] for name in ("losses", "answers", "took")}
    except (ValueError, LookupError, TypeError, RecursionError):
        say(f"note: the cached scores {file} are damaged and not used")
        return None


def _to_answer(fields: Mapping[str, Any]) -> Answer:
    return Answer(**{**fields, "references": tuple(fields["references"])})


def _write(file: Path, content: Mapping[str, Any], say: Callable[[str], None]) -> None:
    text = json.dumps({**content, "key": _digest(content["key"])})
    try:
        write_entry(file, f"{_digest(text)}\n{text}".encode())
    except OSError as error:
        say(f"note: the scores cannot be stored in {file.parent}: {error.strerror or error}")
