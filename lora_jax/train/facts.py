"""Facts of a run that its exports state next to the weights."""

from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import version

from lora_jax.config import Config
from lora_jax.data import resolve_template
from lora_jax.report import card


@dataclass(frozen=True)
class Facts:
    """Facts of a run that an export states.

    stops: tokens that end an answer
    results: scores for the model card
    """

    stops: Collection[int] = ()
    results: card.Results | None = None


NO_FACTS = Facts()


def own_template(config: Config) -> str | None:
    """Return the chat template that the run used in place of the tokenizer's, or None."""
    chosen = config.data.chat_template
    return None if chosen in (None, "none") else resolve_template(None, chosen)


def versions() -> dict[str, str]:
    """Versions of the packages that affect numerical results."""
    return {name: version(name) for name in ("lora_jax", "jax", "flax", "optax")}
