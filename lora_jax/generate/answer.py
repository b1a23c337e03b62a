"""A model with its adapter, tokenizer and chat template, loaded from files to answer prompts."""

import dataclasses
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
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
    Engine,
    Request,
    Sampling,
    beyond_positions,
    check_prompts,
    check_room,
    for_decoding,
)
from lora_jax.generate.text import TextStream, check_stop_strings
from lora_jax.models.common import Model
from lora_jax.nn.virtual import placeholders
from lora_jax.session import Session, open_session

ROWS = 16  # prompts that are answered at once, unless named


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

    @cached_property
    def prefix(self) -> Any:
        return None if self.adapter is None else methods.prefix(*self.adapter)

    def note_positions(self, longest: int) -> None:
        """Print a note once if answers may exceed the positions that the model was made for."""
        text = beyond_positions(self.model, longest, self.max_new_tokens, self.prefix)
        if text is not None:
            hosts.note(text)


@dataclass(frozen=True)
class Written:
    """A finished answer. `finish_reason` is stop or length; a stop token is not counted."""

    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Writer:
    """A loaded model that answers prompts given as tokens."""

    reader: Reader
    model: Model  # its parameters are bound
    sampling: Sampling
    dtype: Any = jnp.float32
    stop: Sequence[str] = ()  # strings that end an answer

    def open_engine(self, rows: int, longest: int) -> Engine:
        """Return an engine for prompts of up to `longest` tokens."""
        prefix, most = self.reader.prefix, self.reader.max_new_tokens
        room = placeholders(prefix) + longest + most
        engine = Engine(self.model, rows=rows, max_length=room, dtype=self.dtype)
        engine.use(self.model.params, prefix)
        return engine

    def request(self, prompt: Sequence[int], number: int) -> Request:
        """Return the request for an answer. Draws depend on the seed and the `number` only."""
        most, stops = self.reader.max_new_tokens, self.reader.stops
        return Request(prompt, most, stops, self.sampling, number=number)

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        rows: int,
        count: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[tuple[int, Written]]:
        """Yield the number of a prompt and its answer, as the answers end. `rows` are generated at
        once; `count` is called with the number of new tokens.
        """
        if not prompts:
            return
        engine = self.open_engine(min(rows, len(prompts)), max(map(len, prompts)))
        running = {
            engine.submit(self.request(prompt, number)): (number, self._text())
            for number, prompt in enumerate(prompts)
        }
        for event in engine.run():
            number, text = running[event.id]
            text.add(event.tokens)
            count(len(event.tokens))
            if text.stopped_by is not None:
                engine.cancel(event.id)
            elif event.finish_reason is None:
                continue
            text.end()
            reason = "stop" if text.stopped_by is not None else event.finish_reason
            yield number, Written(text.text, text.tokens, str(reason))

    def stream(
        self, engine: Engine, prompt: Sequence[int], number: int
    ) -> Generator[str, None, None]:
        """Yield an answer piece by piece. It is cancelled when the generator is closed."""
        text = self._text()
        id = engine.submit(self.request(prompt, number))
        try:
            for event in engine.run():
                yield text.add(event.tokens)
                if text.stopped_by is not None:
                    break
            yield text.end()
        finally:
            engine.cancel(id)

    def _text(self) -> TextStream:
        return TextStream(self.reader.tokenizer, stop=self.stop)


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
    stop: str | Sequence[str] = (),
    compute_dtype: str = "float32",
    base_dtype: str | None = None,
    ignore: Collection[str] = (),
) -> Writer:
    """Load the weights.

    Raises:
        UserError: weights that cannot be read, or are not finite; as `check_stop_strings`.
    """
    stop = check_stop_strings(stop)
    model = formats.load(reader.source, dtype=base_dtype, ignore=ignore)
    if reader.adapter is not None:
        model = model.replace(params=methods.bind(model.params, *reader.adapter))
    return Writer(
        reader, for_decoding(model, donate=True), sampling, jnp.dtype(compute_dtype), stop
    )


def answer(
    spec: str,
    prompts: Sequence[str],
    *,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    compute_dtype: str = "float32",
    base_dtype: str | None = None,
    ignore: Collection[str] = (),
    **options: Any,
) -> list[str]:
    """Return one answer per prompt, each prompt a user turn of its own conversation; `stop` are
    strings that end an answer, and `options` are those of `open_reader`.

    Raises:
        UserError: as `open_reader`, `Reader.encode_row` and `open_writer`.
    """
    check_stop_strings(stop)
    reader = open_reader(spec, ignore=ignore, **options)
    tokens = [reader.encode([{"role": "user", "content": prompt}]) for prompt in prompts]
    reader.note_positions(max(map(len, tokens), default=0))
    own = {"compute_dtype": compute_dtype, "base_dtype": base_dtype, "ignore": ignore}
    writer = open_writer(reader, sampling or Sampling(), stop=stop, **own)
    found = dict(writer.answers(tokens, ROWS))
    return [found[number].text for number in range(len(tokens))]
