"""A conversation on a terminal, or over a pipe: a line in, an answer out."""

import contextlib
import signal
import sys
from collections.abc import Generator
from typing import TextIO

from lora_jax.errors import UserError
from lora_jax.generate import Rows
from lora_jax.generate.answer import Writer
from lora_jax.generate.prompts import bucket

HELP = "/reset starts a new conversation; /quit or Ctrl-D ends it; Ctrl-C stops an answer"


class Chat:
    """A conversation with a model: the turns so far."""

    def __init__(self, writer: Writer):
        self._writer = writer
        self._messages: list[dict[str, str]] = []
        self._turn = 0

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
        tokens: list[int] = []
        shown = ""
        self._turn += 1
        stream = self._writer.stream(
            self._writer.bound,
            prompt,
            rows=Rows([self._turn - 1], bucket(len(prompt))),
            **self._writer.options,
        )
        try:
            for token in stream:
                tokens.append(token)
                answer = reader.decode(tokens)
                if not answer.endswith("\ufffd"):  # a character may take several tokens
                    piece, shown = answer[len(shown) :], answer
                    yield piece
            yield reader.decode(tokens)[len(shown) :]
        finally:
            answer = reader.decode(tokens)
            self._messages = [*messages, {"role": "assistant", "content": answer}]


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


def _answer(chat: Chat, line: str, stdout: TextIO) -> None:
    pieces = chat.say(line)
    try:
        for piece in pieces:
            print(piece, end="", flush=True, file=stdout)
        print(flush=True, file=stdout)
    except KeyboardInterrupt:
        pieces.close()
        print(flush=True, file=stdout)
        print("(ended)", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}\n/reset starts a new conversation", file=sys.stderr)
