"""A conversation on a terminal, or over a pipe: a line in, an answer out."""

import contextlib
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any, TextIO

from lora_jax.errors import UserError
from lora_jax.generate import Engine
from lora_jax.generate.answer import Writer
from lora_jax.nn.virtual import placeholders

_ROOM = 1024  # tokens of a conversation, at first; a longer one takes twice as many
HELP = "/reset starts a new conversation; /quit or Ctrl-D ends it; Ctrl-C stops an answer"


class Chat:
    """A conversation with a model: the turns so far."""

    def __init__(self, writer: Writer):
        self._writer = writer
        self._messages: list[dict[str, str]] = []
        self._turn = 0
        self._engine: Engine | None = None

    def reset(self) -> None:
        """Forget all turns."""
        self._messages = []

    def say(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to a user turn, piece by piece. Turn and answer are added to the
        conversation, also an interrupted answer; a turn that cannot be answered is not.

        Raises:
            UserError: the template refuses the conversation, or it has become too long.
        """
        reader = self._writer.reader
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt = reader.encode(messages, "the conversation")
        reader.note_positions(len(prompt))
        answer = ""
        self._turn += 1
        engine = self._open_engine(len(prompt))
        try:
            with contextlib.closing(self._writer.stream(engine, prompt, self._turn - 1)) as pieces:
                for piece in pieces:
                    answer += piece
                    yield piece
        except KeyboardInterrupt:
            self._engine = None  # in the middle of a step
            raise
        finally:
            self._messages = [*messages, {"role": "assistant", "content": answer}]

    def _open_engine(self, length: int) -> Engine:
        """Return the engine of the conversation, or a larger one if the prompt needs it."""
        reader = self._writer.reader
        needed = placeholders(reader.prefix) + length + reader.max_new_tokens
        if self._engine is None or self._engine.max_length < needed:
            room = max(_ROOM, 1 << (needed - 1).bit_length())
            self._engine = self._writer.open_engine(1, room - reader.max_new_tokens)
        return self._engine


def run(writer: Writer, stdin: TextIO | None = None, stdout: TextIO | None = None) -> None:
    """Read lines and answer them until /quit or the end of stdin. Ctrl-C stops the current answer,
    never the conversation.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    source: TextIO = sys.stdin if stdin is None else stdin
    target: TextIO = sys.stdout if stdout is None else stdout
    terminal = source.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline as readline  # input() edits lines with it where Python has it
        print(HELP, file=sys.stderr)
    chat = Chat(writer)
    while True:
        try:
            line = input("> ") if terminal else _next_line(source)
        except EOFError:
            break
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)
            continue
        if line.strip() == "/quit":
            break
        if line.strip() == "/reset":
            chat.reset()
            print("this is a new conversation", file=sys.stderr)
        elif line.strip().startswith("/"):
            print(f"{line.strip()} is not a command. {HELP}", file=sys.stderr)
        elif line.strip():
            _answer(chat, line, target)
    if terminal:
        print(file=target)


def _next_line(stdin: TextIO) -> str:
    line = stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


@contextlib.contextmanager
def _between_steps() -> Iterator[Callable[[], None]]:
    """Hold back a first Ctrl-C until the function of the block is called: a step ends as a whole.
    A second one acts at once.
    """
    before, pressed = signal.getsignal(signal.SIGINT), []

    def press(*arguments: Any) -> None:
        if pressed:
            signal.default_int_handler(*arguments)
        pressed.append(True)

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(chat: Chat, line: str, stdout: TextIO) -> None:
    pieces = chat.say(line)
    try:
        with _between_steps() as check:
            for piece in pieces:
                print(piece, end="", flush=True, file=stdout)
                check()
        print(flush=True, file=stdout)
    except KeyboardInterrupt:
        pieces.close()
        print(flush=True, file=stdout)
        print("(ended)", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}\n/reset starts a new conversation", file=sys.stderr)
