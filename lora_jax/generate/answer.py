"""A model with its adapter, tokenizer and chat template, loaded from files to answer prompts."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import jax.numpy as jnp

from lora_jax import adapters as methods
from lora_jax import data, formats, hosts
from lora_jax.config import Config, expand, is_directory, shown
from lora_jax.errors import UserError
from lora_jax.formats import fingerprint
from lora_jax.generate import (
    Sampling,
    beyond_positions,
    check_prompts,
    check_room,
    make_generate,
    make_stream,
)
from lora_jax.models.common import Model
from lora_jax.session import Session, open_session


@dataclass(frozen=True)
class Reader:
    """A model without its weights: encodes conversations and decodes answers."""

    model: Model  # shapes in place of weights
    source: Path
    stops: frozenset[int]
    rendering: data.Rendering
    adapter: tuple[Any, Any] | None  # adapters, config
    max_new_tokens: int

    def encode(self, messages: Sequence[Mapping[str, Any]], where: str = "--prompt") -> list[int]:
        """Return the tokens of a conversation up to the start of its next answer.

        Raises:
            UserError: as `encode_row`.
        """
        turns = (*map(dict, messages), {"role": "assistant", "content": ""})
        return self.encode_row(data.Row(turns, where))

    def encode_row(self, row: data.Row) -> list[int]:
        """Return the tokens of a row before its last assistant turn.

        Raises:
            UserError: a conversation that the template refuses; tokens outside of the vocabulary;
                no room for an answer. The message begins with the line of the row.
        """
        tokens = data.encode_prompt(row, self.rendering).tolist()
        try:
            check_prompts(self.model, [tokens])
            check_room(self.model, [tokens], self.max_new_tokens, self.prefix)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        return tokens

    @property
    def tokenizer(self) -> Any:
        return self.rendering.tokenizer

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    @cached_property
    def prefix(self) -> Any:
        return None if self.adapter is None else methods.prefix(*self.adapter)

    def note_positions(self, longest: int) -> None:
        """Print a note once if answers may exceed the positions that the model was made for."""
        text = beyond_positions(self.model, longest, self.max_new_tokens, self.prefix)
        if text is not None:
            hosts.note(text)


@dataclass(frozen=True)
class Writer:
    """A loaded model that answers prompts given as tokens."""

    reader: Reader
    bound: Any
    generate: Callable[..., list[list[int]]]
    stream: Callable[..., Iterator[int]]
    sampling: Sampling

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `generate` and `stream` that all prompts share."""
        return {
            "max_new_tokens": self.reader.max_new_tokens,
            "stop_tokens": self.reader.stops,
            "prefix": self.reader.prefix,
            "sampling": self.sampling,
        }


def open_reader(
    spec: str,
    *,
    adapter: str | None = None,
    max_new_tokens: int = 200,
    allow_change: Collection[str] = (),
    ignore: Collection[str] = (),
    **rendering: Unpack[data.RenderingOptions],
) -> Reader:
    """Read everything except the weights.

    ignore: fields of config.json known not to matter
    rendering: fields of `data.Rendering`; its `chat_template_kwargs` take precedence over those
        that the adapter was trained with

    Raises:
        UserError: the model or adapter cannot be found or do not fit, or the model classifies;
            base, tokenizer or template are not those that the adapter was trained with (unless
            named in `allow_change`).
    """
    session = open_session(Config(model=spec, ignore_config_fields=list(ignore)))
    source, described, found, home = session.source, session.model, None, session.source
    for text in described.notes:
        hosts.note(text)
    if described.labels:
        raise UserError(
            f"model={spec!r} is a classifier and writes no text; `lora-jax eval` scores its labels"
        )
    if adapter is not None:
        found, directory = _read_adapter(adapter, described)
        home = directory if (directory / "tokenizer_config.json").is_file() else source
    session = _with_texts(session, home, rendering.get("chat_template"))
    tokenizer = session.tokenizer
    arguments = dict(rendering.get("chat_template_kwargs") or {})
    chat_template, known = rendering.get("chat_template"), formats.stop_tokens(source)
    if adapter is not None:
        directory = expand(adapter)
        _ = session.template  # refuses a damaged one
        if stored := formats.read_fingerprint(directory):
            fingerprint.check(stored, session.fingerprint, adapter, allow_change)
        arguments = formats.read_template_kwargs(directory) | arguments
        trained = formats.read_system_prompt(directory)
        if trained is not None and rendering.get("system_prompt") is None:
            hosts.note(
                f"{adapter} was trained with data.system_prompt={shown(repr(trained))}; "
                "--system-prompt gives it to prompts that have no system turn"
            )
        known += formats.read_stops(directory)
    return Reader(
        model=described,
        source=source,
        stops=data.stop_tokens(tokenizer, chat_template, known, arguments),
        rendering=data.Rendering(tokenizer, **{**rendering, "chat_template_kwargs": arguments}),
        adapter=found,
        max_new_tokens=max_new_tokens,
    )


def _read_adapter(adapter: str, model: Model) -> tuple[tuple[Any, Any], Path]:
    """Return the adapters with their config, and the directory that they were read from."""
    directory = expand(adapter, "adapter")
    if not is_directory(directory, f"adapter={adapter!r}"):
        raise UserError(
            f"adapter={shown(repr(adapter))} does not exist, or is not a directory; give a PEFT "
            "adapter directory, such as OUTPUT_DIR/adapter"
        )
    return formats.read_adapter(directory, model.params, model), directory


def _with_texts(session: Session, home: Path, chat_template: str | None) -> Session:
    """Return the session with the tokenizer in `home`, and with another chat template, if given."""
    settings = dataclasses.replace(session.config.data, chat_template=chat_template)
    config = dataclasses.replace(session.config, data=settings)
    return dataclasses.replace(session, config=config, tokenizer_source=home)


def open_writer(
    reader: Reader,
    sampling: Sampling,
    *,
    compute_dtype: str = "float32",
    base_dtype: str | None = None,
    ignore: Collection[str] = (),
) -> Writer:
    """Load the weights.

    Raises:
        UserError: weights that cannot be read, or are not finite.
    """
    model = formats.load(reader.source, dtype=base_dtype, ignore=ignore)
    bound = model.params if reader.adapter is None else methods.bind(model.params, *reader.adapter)
    dtype = jnp.dtype(compute_dtype)
    return Writer(reader, bound, make_generate(model, dtype), make_stream(model, dtype), sampling)


def answer(
    spec: str,
    prompts: Sequence[str],
    *,
    sampling: Sampling | None = None,
    compute_dtype: str = "float32",
    base_dtype: str | None = None,
    ignore: Collection[str] = (),
    **options: Any,
) -> list[str]:
    """Return one answer per prompt, each prompt a user turn of its own conversation; `options` are
    those of `open_reader`.

    Raises:
        UserError: as `open_reader`, `Reader.encode_row` and `open_writer`.
    """
    reader = open_reader(spec, ignore=ignore, **options)
    tokens = [reader.encode([{"role": "user", "content": prompt}]) for prompt in prompts]
    reader.note_positions(max(map(len, tokens), default=0))
    own = {"compute_dtype": compute_dtype, "base_dtype": base_dtype, "ignore": ignore}
    writer = open_writer(reader, sampling or Sampling(), **own)
    answers = writer.generate(writer.bound, tokens, **writer.options)
    return [reader.decode(one) for one in answers]
