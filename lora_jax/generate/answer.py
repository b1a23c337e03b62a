"""Answers to prompts, from files, for `lora-jax generate`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax import adapters as methods
from lora_jax import data, formats, hosts
from lora_jax.config import UserError, expand, is_directory, shown
from lora_jax.formats import fingerprint
from lora_jax.generate import check_prompts, make_generate


def answer(
    spec: str,
    prompts: Sequence[str],
    *,
    adapter: str | None = None,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    compute_dtype: str = "float32",
    base_dtype: str | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    allow_change: Collection[str] = (),
    ignore: Collection[str] = (),
) -> list[str]:
    """Return one answer per prompt, each prompt a user turn of its own conversation.

    `chat_template_kwargs` go to the chat template, before those that the adapter was trained with.
    `ignore` are fields of config.json known not to matter.

    Raises:
        UserError: the model or adapter cannot be found or do not fit, or the model classifies;
            base, tokenizer or template are not those that the adapter was trained with (unless
            named in `allow_change`); the template refuses the conversation; tokens that the model
            does not have, or weights that are not finite.
    """
    source = formats.resolve(spec)
    described, found, home = formats.describe(source, ignore), None, source
    for text in described.notes:
        hosts.note(text)
    if described.labels:
        raise UserError(
            f"model={spec!r} classifies and writes no text; `lora-jax eval` scores its labels"
        )
    if adapter is not None:
        directory = expand(adapter, "adapter")
        if not is_directory(directory, f"adapter={adapter!r}"):
            raise UserError(
                f"adapter={shown(repr(adapter))} does not exist, or is no directory; give a "
                "PEFT adapter directory, such as OUTPUT_DIR/adapter"
            )
        found = formats.read_adapter(directory, described.params, described)
        home = directory if (directory / "tokenizer_config.json").is_file() else source
    tokenizer = formats.load_tokenizer(home)
    arguments = dict(chat_template_kwargs or {})
    if adapter is not None:
        template = data.template_text(tokenizer, chat_template)
        prints = fingerprint.take(source, tokenizer, template)
        stored = formats.read_fingerprint(expand(adapter))
        fingerprint.check(stored, prints, adapter, allow_change)
        arguments = formats.read_template_kwargs(expand(adapter)) | arguments
    options = {
        "system_prompt": system_prompt,
        "chat_template": chat_template,
        "chat_template_kwargs": arguments,
    }
    rows = [
        data.Row(
            ({"role": "user", "content": prompt}, {"role": "assistant", "content": ""}), "--prompt"
        )
        for prompt in prompts
    ]
    tokens = [data.prompt_tokens(row, tokenizer, **options).tolist() for row in rows]
    check_prompts(described, tokens)
    known = formats.stop_tokens(source)
    known += [] if adapter is None else formats.read_stops(expand(adapter))
    stops = data.stop_tokens(tokenizer, chat_template, known, arguments)
    model = formats.load(source, dtype=base_dtype, ignore=ignore)
    bound, prefix = model.params, None
    if found is not None:
        bound, prefix = methods.bind(bound, *found), methods.prefix(*found)
    generate = make_generate(model, jnp.dtype(compute_dtype))
    answers = generate(
        bound,
        tokens,
        max_new_tokens=max_new_tokens,
        stop_tokens=stops,
        prefix=prefix,
        temperature=temperature,
        seed=seed,
    )
    return tokenizer.batch_decode(answers, skip_special_tokens=True)
