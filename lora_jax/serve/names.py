"""Names of models in requests: the base, an adapter, or a weighted sum of adapters."""

import re

from lora_jax.config import quoted
from lora_jax.errors import UserError

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TERM = re.compile(rf"\s*([^*+\s]+)\s*(?:\*\s*({_NUMBER})\s*)?")
_LONGEST = 4096


def parse_model(model: str, base: str) -> dict[str, float]:
    """Return the weights of adapters by name; none for the base.

    Raises:
        UserError: a sum that cannot be read.

    Example:
        >>> from lora_jax.serve.names import parse_model
        >>> parse_model("org/base", "org/base"), parse_model("org/base:a", "org/base")
        ({}, {'a': 1.0})
        >>> parse_model("a*0.7+b*-0.3", "org/base")
        {'a': 0.7, 'b': -0.3}
    """
    if model == base:
        return {}
    own = model.removeprefix(f"{base}:")
    if "*" not in own and "+" not in own:
        return {own: 1.0}
    terms: dict[str, float] = {}
    position = 0
    while len(own) <= _LONGEST:
        found = _TERM.match(own, position)
        if found is None:
            break
        name, weight = found.groups()
        terms[name] = terms.get(name, 0.0) + float(weight or 1)
        position = found.end()
        if position == len(own):
            return terms
        if own[position] != "+":
            break
        position += 1
    raise UserError(
        f"model={quoted(model)} is no weighted sum of adapters; write it as a*0.7+b*-0.3"
    )
