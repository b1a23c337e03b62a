"""Model cards: the README.md of an exported directory, as the Hugging Face hub reads it.

YAML between two lines of dashes has base, library and licence for the hub; the text below is for
people. Local paths are left out: files and directories are named without their parents.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_jax import demo
from lora_jax.config import read_text
from lora_jax.errors import UserError
from lora_jax.formats.hub import is_hub_name, public_name
from lora_jax.models import Model

_HERE = "path/to/this/directory"
# The tag on the hub and the class in transformers of each kind of model, by PEFT's name of it. PEFT
# has no name for models that read images.
_IMAGES = "IMAGE_TEXT_TO_TEXT"
_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    _IMAGES: "image-text-to-text",
}
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    _IMAGES: "AutoModelForImageTextToText",
}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that --max-lora-rank takes
_LONG = 300  # characters of a cell


@dataclass(frozen=True)
class Base:
    """The base model of an export: `spec` as given by the user, and the directory of its files."""

    spec: str
    directory: Path | None = None

    @property
    def hub_name(self) -> str | None:
        """The name on the hub, if it has one."""
        if self.spec.startswith("demo:") or is_hub_name(self.spec):
            name = public_name(self.spec)
            return name if is_hub_name(name) else None
        return None

    @property
    def shown(self) -> str:
        return self.hub_name or Path(self.spec).name

    @property
    def origin(self) -> demo.Origin | None:
        spec = self.spec
        return demo.origin(spec.removeprefix("demo:")) if spec.startswith("demo:") else None

    def licence(self) -> dict[str, str]:
        """Return the licence fields of the base's own card; for a demo, its licence."""
        if self.origin:
            return {"license": self.origin.license}
        file = self.directory and self.directory / "README.md"
        if file is None or not file.is_file():
            return {}
        try:
            found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", read_text(file), re.DOTALL)
            content = yaml.safe_load(found[1]) if found else None
        except (UserError, yaml.YAMLError):
            return {}
        names = ("license", "license_name", "license_link")
        fields = content if isinstance(content, dict) else {}
        return {name: fields[name] for name in names if isinstance(fields.get(name), str)}

    def note(self) -> str:
        """Return a sentence if the weights differ from those on the hub; else empty."""
        form = self.origin.form if self.origin else ""
        if form:
            return (
                f"It was trained over the dequantised weights of {form} ({self.spec} of lora_jax), "
                f"which differ from those of {self.hub_name} by the error of that quantisation."
            )
        if self.spec.endswith(".gguf"):
            return f"It was trained over the weights of {self.shown}, dequantised."
        return ""


def task_of(model: Model) -> str:
    """Return the kind of a model, as the functions below take it."""
    if model.labels:
        return "SEQ_CLS"
    return _IMAGES if model.names.carried else "CAUSAL_LM"


def adapter_card(
    base: Base,
    task_type: str,
    rank: int,
    problems: Sequence[str],
    sections: Mapping[str, str],
    system_prompt: str | None = None,
) -> str:
    """Return the card of a PEFT directory.

    Args:
        base: the base model.
        task_type: `task_of` the model.
        rank: the largest rank of the file, for vLLM's --max-lora-rank.
        problems: reasons why vLLM does not load the adapter.
        sections: Markdown by heading, after the section on use.
        system_prompt: the system prompt that the adapter was trained with.
    """
    name = base.hub_name
    tags = [*([f"base_model:adapter:{name}"] if name else []), "lora", "lora_jax"]
    fields = {
        **({"base_model": name} if name else {}),
        "library_name": "peft",
        **base.licence(),
        "pipeline_tag": _TASKS[task_type],
        "tags": tags,
    }
    title = f"Adapter of {base.shown}"
    intro = f"A PEFT adapter of {_link(base)}, trained with lora_jax. {base.note()}".strip()
    return _render(
        fields,
        title,
        intro,
        {"Use": _load_adapter(base, task_type, rank, problems, system_prompt)} | dict(sections),
    )


def model_card(base: Base, task_type: str, sections: Mapping[str, str]) -> str:
    """Return the card of a Hugging Face directory with an adapter merged in."""
    name = base.hub_name
    fields = {
        **({"base_model": name} if name else {}),
        "library_name": "transformers",
        **base.licence(),
        "pipeline_tag": _TASKS[task_type],
        "tags": [*([f"base_model:finetune:{name}"] if name else []), "lora_jax"],
    }
    auto = _CLASSES[task_type]
    use = (
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("{_HERE}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{_HERE}")'
    )
    title = f"Fine-tuned {base.shown}"
    intro = f"{_link(base)}, fine-tuned with lora_jax. {base.note()}".strip()
    return _render(fields, title, intro, {"Use": fenced("python", use)} | dict(sections))


def _render(fields: Mapping[str, Any], title: str, intro: str, sections: Mapping[str, str]) -> str:
    front = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=1000)
    parts = [f"---\n{front}---\n", f"# {title}\n", f"{intro}\n"]
    parts += [f"## {heading}\n\n{text}\n" for heading, text in sections.items() if text]
    return "\n".join(parts)


def _link(base: Base) -> str:
    name = base.hub_name
    return f"[{name}](https://huggingface.co/{name})" if name else f"`{base.shown}`"


def _load_adapter(
    base: Base, task_type: str, rank: int, problems: Sequence[str], system_prompt: str | None
) -> str:
    named, auto = base.hub_name or f"path/to/{base.shown}", _CLASSES[task_type]
    python = (
        "from peft import PeftModel\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'base = {auto}.from_pretrained("{named}")\n'
        f'model = PeftModel.from_pretrained(base, "{_HERE}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{_HERE}")'
    )
    parts = ["With PEFT:", fenced("python", python)]
    if task_type == "SEQ_CLS":
        return "\n\n".join(parts)
    model = base.spec if base.spec.startswith("demo:") else named
    command = f"lora-jax generate --model {shlex.quote(model)} --adapter {_HERE} \\\n    "
    if system_prompt is not None:
        command += f"--system-prompt {shlex.quote(system_prompt)} "
    parts += ["With lora_jax:", fenced("bash", command + '--prompt "..."')]
    limit = next((size for size in _VLLM_RANKS if size >= rank), None)
    if problems or limit is None:
        reasons = problems or [f"rank {rank} is above {_VLLM_RANKS[-1]}"]
        parts.append("vLLM does not load it as it is: " + "; ".join(reasons))
    else:
        serve = f"vllm serve {shlex.quote(named)} --enable-lora --max-lora-rank {limit} \\\n"
        parts += ["With vLLM:", fenced("bash", serve + f"    --lora-modules mine={_HERE}")]
    return "\n\n".join(parts)


def fenced(language: str, text: str) -> str:
    """Return a fenced block of code; the text may contain backticks."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table, or an empty text if there are no rows."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) if rows else ""


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"
