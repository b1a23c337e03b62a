"""Adapters that vLLM cannot serve, as of vLLM 0.32."""

import math
from collections.abc import Iterator

from lora_jax.config import AdapterConfig
from lora_jax.formats.peft_forms import adapted_modules, is_parameter
from lora_jax.targets import HEAD, Trainable

MOST_RANK = 512  # the largest value of --max-lora-rank
_NO_LORA = ("bert", "gpt2")
_EMBEDDING, _HEAD = "embed_tokens", HEAD[0]
# Families whose embedding or head takes adapters in vLLM. It refuses the files of others.
_FAMILIES_WITH = {
    _EMBEDDING: (
        *("granite", "llama", "mixtral", "phi3", "qwen3", "qwen3_moe"),
        *("exaone4", "nemotron", "ministral", "olmo2", "olmo3", "seed_oss"),
        *("arcee", "cohere", "phi", "smollm3", "starcoder2"),
    ),
    _HEAD: (
        *("granite", "llama", "mixtral", "phi3", "qwen3", "qwen3_moe"),
        *("exaone4", "nemotron"),
    ),
}
_MERGE = "export a merged model with --format hf"


def serving_problems(found: Trainable, model_type: str | None = None) -> list[str]:
    """List why vLLM cannot load the PEFT directory of these adapters, or would compute something
    else, each with a remedy; and what its base needs. Empty if it serves them as they are.
    `model_type` is that of config.json; without it, what depends on the family is not listed.
    """
    config, problems = found.config, unservable(found, model_type)
    power = 0.5 if config.use_rslora else 1.0
    usual = config.alpha / config.rank**power
    if config.init == "loftq":
        problems.append(
            "init=loftq made up for the error of the quantised base: load the model quantised as "
            "base_dtype said (nf4: bitsandbytes' 4 bits with double quantisation); over the "
            "model's own weights the adapter is off by that error"
        )
    if any(
        rank > config.rank or not math.isclose(alpha / rank**power, usual)
        for rank, alpha in adapted_modules(found).values()
    ):
        problems.append(
            "SGLang, and vLLM before 0.32, do not read rank_pattern and alpha_pattern and would "
            "scale wrongly; export with --profile vllm, which folds them in"
        )
    return problems


def beyond_pairs(config: AdapterConfig) -> list[str]:
    """List the settings by which an adapter trains more than pairs of low-rank matrices."""
    given = {
        "use_dora": config.use_dora,
        "bias": None if config.bias == "none" else config.bias,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
    }
    return [f"{name}={value!r}" for name, value in given.items() if value]


def file_rank(found: Trainable) -> int:
    """Return the largest rank of the PEFT file, which --max-lora-rank must cover: inits that change
    the base double it, and parts of one matrix add up.
    """
    growth = 2 if found.config.changes_base else 1
    most = {name: min(target.shape) for target in found.targets for name in target.names}
    return max(
        (
            min(growth * rank, most.get(name, growth * rank))
            for name, (rank, _) in adapted_modules(found).items()
        ),
        default=0,
    )


def unservable(found: Trainable, model_type: str | None = None) -> list[str]:
    """List why vLLM cannot load these adapters in any form; `model_type` as in
    `serving_problems`.
    """
    config = found.config
    if config.trains_virtual_tokens:
        return [f"vLLM has no virtual tokens (method={config.method}); transformers and PEFT do"]
    if not config.trains_lora:
        return [f"vLLM cannot load adapters of method={config.method}; {_MERGE}"]
    problems = [
        f"vLLM cannot load adapters with {setting}; {_MERGE}" for setting in beyond_pairs(config)
    ]
    if any(target.experts is not None for target in found.targets):
        problems.append(
            f"vLLM cannot load adapters of experts (target_modules={config.target_modules!r}): for "
            f"these models it reads one for every single expert, and PEFT's files hold stacks; "
            f"{_MERGE}"
        )
    if (rank := file_rank(found)) > MOST_RANK:
        problems.append(
            f"the rank in the file is {rank}, and vLLM takes up to {MOST_RANK}; {_MERGE}"
        )
    return problems + list(_family_problems(found, model_type))


def _family_problems(found: Trainable, model_type: str | None) -> Iterator[str]:
    """Yield what vLLM lacks for a family."""
    if model_type in _NO_LORA:
        yield f"vLLM has no adapters for model_type={model_type}; {_MERGE}"
        return
    asked = f"target_modules={found.config.target_modules!r}"
    routers = any(target.experts is None and is_parameter(target) for target in found.targets)
    if routers and model_type == "mixtral":
        yield (
            f"vLLM would ignore adapters of routers of model_type=mixtral ({asked}), which have "
            f"another path there; {_MERGE}"
        )
    modules = {name.rpartition(".")[2] for target in found.targets for name in target.names}
    if found.config.ensure_weight_tying and _EMBEDDING in modules:
        modules.add(_HEAD)
    for module, families in _FAMILIES_WITH.items():
        if module in modules and model_type is not None and model_type not in families:
            yield (
                f"vLLM has no adapters of {module} for model_type={model_type} ({asked}); {_MERGE}"
            )
