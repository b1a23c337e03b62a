"""CamemBERT: RoBERTa with another tokenizer, `model_type` camembert."""

from lora_jax.models import roberta
from lora_jax.models.reader import ConfigReader
from lora_jax.models.roberta import NAMES as NAMES
from lora_jax.models.roberta import RULES as RULES
from lora_jax.models.roberta import Model as Model

ARCHITECTURE = "CamembertForSequenceClassification"


def read_config(reader: ConfigReader) -> roberta.Config:
    """Read a `Config` from config.json; defaults are those of transformers."""
    return roberta.read_config(reader, vocab_size=30522)
