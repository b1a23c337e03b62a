"""Distance of a combination of adapters from the weighted sum of their updates, here and in PEFT's
`add_weighted_adapter`; prints one JSON line.

    python benchmarks/combine.py
    python benchmarks/combine.py --rank 16 --weights 0.7 0.3 --seed 1

Random LoRAs (both factors normal, alpha 2 r) on all linears of a tiny Llama. Each distance is
|made - sum| / |sum| over all modules, where `made` is the update that PEFT applies: that of its own
combination, or that of the directory written by `lora-jax combine`. `svd` has PEFT's default rank,
the largest of the adapters, in both; `rank` is the rank of each result.
"""

import argparse
import copy
import json
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_jax.combine import Formula, combine_directories

SIZE = dict(
    vocab_size=97,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
)


def make_adapter(base: torch.nn.Module, rank: int, seed: int, target: Path) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(target)


def updates(model: torch.nn.Module, name: str) -> dict[str, np.ndarray]:
    """Return the dense updates that PEFT applies, by module."""
    return {
        path: module.get_delta_weight(name).detach().double().numpy()
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    lost = sum(np.square(found[path] - x).sum() for path, x in expected.items())
    return float(np.sqrt(lost / sum(np.square(x).sum() for x in expected.values())))


def largest_rank(model: torch.nn.Module, name: str) -> int:
    layers = (m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    return max(len(layer.lora_A[name].weight) for layer in layers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=8, help="of every adapter (default: 8)")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.7, -0.4, 0.5])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(options.seed)
    base = LlamaForCausalLM(LlamaConfig(**SIZE))
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        base.save_pretrained(home / "base")
        weighted = [(str(home / f"a{i}"), weight) for i, weight in enumerate(options.weights)]
        for i, (path, _) in enumerate(weighted):
            make_adapter(base, options.rank, 100 * options.seed + i, Path(path))
        names = [f"a{i}" for i in range(len(weighted))]
        model = peft.PeftModel.from_pretrained(base, home / "a0", adapter_name="a0")
        for name in names[1:]:
            model.load_adapter(home / name, adapter_name=name)
        each = [updates(model, name) for name in names]
        total = {
            path: sum(w * own[path] for w, own in zip(options.weights, each, strict=True))
            for path in each[0]
        }
        report = {}
        for kind in ("linear", "svd", "cat"):
            model.add_weighted_adapter(names, options.weights, f"peft_{kind}", kind)
        for kind, rank in (("sum", None), ("svd", options.rank)):
            output = home / f"ours_{kind}"
            combine_directories(str(home / "base"), weighted, output, Formula(kind, rank))
            model.load_adapter(output, adapter_name=f"ours_{kind}")
        for name in ("peft_linear", "peft_svd", "peft_cat", "ours_svd", "ours_sum"):
            report[name] = {
                "distance": distance(updates(model, name), total),
                "rank": largest_rank(model, name),
            }
    print(json.dumps({**vars(options), **report}))


if __name__ == "__main__":
    main()
