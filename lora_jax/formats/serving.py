"""Adapters that vLLM cannot serve."""

import math

from lora_jax.config import AdapterConfig
from lora_jax.formats.peft_forms import adapted_modules
from lora_jax.targets import Trainable


def serving_problems(found: Trainable) -> list[str]:
    """List why vLLM cannot load the PEFT directory of these adapters, or would compute something
    else, each with a remedy; and what its base needs. Empty if it serves them as they are.
    """
    config, problems = found.config, unservable(found)
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
            "vLLM does not read rank_pattern and alpha_pattern and would scale wrongly; export "
            "with --profile vllm, which folds them in"
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


def unservable(found: Trainable) -> list[str]:
    """List why vLLM cannot load these adapters in any form."""
    config = found.config
    if config.trains_virtual_tokens:
        return [f"vLLM has no virtual tokens (method={config.method}); transformers and PEFT do"]
    if not config.trains_lora:
        return [
            f"vLLM cannot load adapters of method={config.method}; export a merged model with "
            "--format hf"
        ]
    problems = [
        f"vLLM cannot load adapters with {setting}; export a merged model with --format hf"
        for setting in beyond_pairs(config)
    ]
    if any(target.experts is not None for target in found.targets):
        problems.append(
            f"vLLM cannot load adapters of experts (target_modules={config.target_modules!r}): for "
            "these models it reads one for every single expert, and PEFT's files hold stacks; "
            "export a merged model with --format hf"
        )
    return problems
