"""`lora-jax generate`: prompts from everywhere, answers to everywhere, and a conversation."""

import dataclasses
import io
import json
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from lora_jax.cli import main
from lora_jax.errors import UserError
from lora_jax.generate import Sampling, chat, prompts
from lora_jax.generate.answer import open_reader, open_writer

TURN = [{"role": "user", "content": "one"}]
WORDS = ["one", "two", "three", "four", "five plus six"]


@pytest.fixture
def command(files):
    return ["generate", "--model", str(files / "model"), "--max-new-tokens", "5"]


@pytest.fixture(scope="module")
def writer(files):
    return open_writer(open_reader(str(files / "model"), max_new_tokens=5), Sampling())


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def answers(command, capsys):
    """The answers to `WORDS` as `--prompt` gives them."""
    capsys.readouterr()
    assert main([*command, *(word for text in WORDS for word in ("--prompt", text))]) == 0
    printed = capsys.readouterr()
    heads = [line for line in printed.err.splitlines() if line.startswith("> ")]
    assert heads == [f"> {text}" for text in WORDS]
    assert "(cut off: --max-new-tokens 5)" in printed.err
    return printed.out.removesuffix("\n").split("\n\n")


def test_prompts_and_answers_in_files(command, answers, tmp_path, capsys, monkeypatch):
    text = tmp_path / "prompts.txt"
    text.write_text("\n".join([*WORDS[:2], "", *WORDS[2:]]) + "\r\n")
    rows = tmp_path / "rows.jsonl"
    forms = [
        {"prompt": "one", "id": 7},
        {"prompt": "two", "completion": "zwei"},
        {"messages": [{"role": "user", "content": "three"}]},
        {"messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": "4"}]},
        {"instruction": "five plus six"},
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in forms))
    output = tmp_path / "answers.jsonl"
    assert main([*command, "--prompts", str(text), "--output", str(output)]) == 0
    assert f"5 of 5 answers are in {output}" in capsys.readouterr().err
    found = lines(output.read_text())
    assert [line["prompt"] for line in found] == WORDS
    assert [line["answer"] for line in found] == answers
    assert all(set(line) == {"prompt", "answer", "finish_reason", "tokens"} for line in found)
    reasons = [line["finish_reason"] for line in found]
    assert reasons == ["length" if line["tokens"] == 5 else "stop" for line in found]

    assert main([*command, "--prompts", str(rows), "--batch-size", "2"]) == 0
    found = lines(capsys.readouterr().out)
    assert [line["answer"] for line in found] == answers
    assert found[0]["id"] == 7 and found[0]["prompt"] == "one"
    assert found[2]["prompt"] == found[2]["prompt"] == [{"role": "user", "content": "three"}]

    for piped in (text.read_text(), rows.read_text()):
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
        assert main([*command, "--prompts", "-"]) == 0
        assert [line["answer"] for line in lines(capsys.readouterr().out)] == answers


def test_draws_repeat_and_do_not_depend_on_the_batch(command, tmp_path, capsys):
    text = tmp_path / "prompts.txt"
    text.write_text("\n".join(WORDS))
    drawn = [*command, "--prompts", str(text), "--temperature", "1.5", "--top-p", "0.9"]
    drawn += ["--top-k", "50", "--seed"]
    found = []
    for options in (["1", "--batch-size", "2"], ["1", "--batch-size", "4"], ["2"]):
        capsys.readouterr()
        assert main([*drawn, *options]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


def test_stop_strings_end_answers(command, answers, capsys):
    whole = answers[0]
    stop = whole[2:4]
    expected = whole.partition(stop)[0]
    assert stop and expected
    words = ["--prompts", "-", "--stop", stop, "--stop", "never in an answer"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("one\n"))
        assert main([*command, *words]) == 0
    [line] = lines(capsys.readouterr().out)
    assert line["answer"] == expected and line["finish_reason"] == "stop" and line["tokens"] <= 5
    assert main([*command, "--prompt", "one", "--stop", ""]) == 2
    assert "stop strings must be non-empty strings, not ''" in capsys.readouterr().err


def test_penalties_and_min_p_change_answers(command, answers, capsys):
    """`min_p` of 1 keeps the most likely token alone."""
    drawn = ["--prompt", "one", "--temperature", "1.5"]
    found = []
    for options in (["--min-p", "1"], ["--repetition-penalty", "9"]):
        assert main([*command, *drawn, *options]) == 0
        found.append(capsys.readouterr().out.removesuffix("\n"))
    assert found[0] == answers[0] != found[1]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: invalid JSON"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n\n[1]\n',
            "p.jsonl:3: a prompt must be an object, not a list",
        ),
        ("p.jsonl", '{"prompt": 3}\n', "p.jsonl:1: 'prompt' is a number"),
        ("p.jsonl", '{"question": "a"}\n', "--prompt-format '{question}'; its keys: 'question'"),
        ("p.jsonl", '"a"\n', "p.jsonl:1: a prompt must be an object, not a string"),
        ("p.jsonl", '{"text": "a"}\n', "p.jsonl:1: a text has no answer"),
        ("p.jsonl", '{"messages": []}\n', "p.jsonl:1: "),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n', "begins with its"),
        ("p.txt", "\n \n", "p.txt has no prompt"),
        ("p.csv", "a,b\n", "p.csv:1: the file holds no rows"),
        ("p.csv", "a,b\n1,2\n", "p.csv:2: a prompt needs 'prompt', 'messages'"),
        ("p.csv", "prompt,b\n1\n", "p.csv:2: 1 fields, and the header has 2"),
        ("none.txt", None, "none.txt cannot be read: No such file"),
    ],
)
def test_prompts_that_are_none(command, tmp_path, capsys, name, content, expected):
    file, output = tmp_path / name, tmp_path / "out.jsonl"
    if content is not None:
        file.write_text(content)
    assert main([*command, "--prompts", str(file), "--output", str(output)]) == 2
    assert expected in capsys.readouterr().err and not output.exists()


def test_prompts_from_columns(command, answers, tmp_path, capsys):
    table, rows = tmp_path / "asked.csv", tmp_path / "asked.jsonl"
    halves = [text.partition(" ")[::2] for text in WORDS]
    table.write_text("first,rest,id\n" + "".join(f"{a},{b},{a}\n" for a, b in halves))
    rows.write_text("".join(json.dumps({"question": text}) + "\n" for text in WORDS))
    plain = tmp_path / "plain.csv"
    plain.write_text("\n".join(["prompt", *WORDS]))
    for file, prompt_format in ((rows, "{question}"), (table, "{first} {rest}"), (plain, None)):
        added = [] if prompt_format is None else ["--prompt-format", prompt_format]
        assert main([*command, "--prompts", str(file), *added]) == 0
        found = lines(capsys.readouterr().out)
        assert [line["prompt"].rstrip() for line in found] == WORDS
        if file != table:  # which has a space after the short ones
            assert [line["answer"] for line in found] == answers
    text = tmp_path / "p.txt"
    text.write_text("a\n")
    cases = {
        (str(rows), "{qestion}"): "--prompt-format names {qestion}; the columns are: 'question'",
        (str(rows), "{a.b}"): "--prompt-format='{a.b}' has '{a.b}', which is not a {column}",
        (str(text), "{a}"): "--prompt-format is for columns, and",
    }
    for (file, prompt_format), expected in cases.items():
        assert main([*command, "--prompts", file, "--prompt-format", prompt_format]) == 2
        assert expected in capsys.readouterr().err
    assert main([*command, "--prompt", "a", "--prompt-format", "{a}"]) == 2
    assert "--prompt-format is for the columns of --prompts" in capsys.readouterr().err


def test_only_the_first_problems_are_shown(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("[]\n" * 3 + "".join(f'{{"key{n}": "x"}}\n' for n in range(29)))
    with pytest.raises(UserError) as raised:
        prompts.read_prompts(str(file))
    lines = str(raised.value).splitlines()
    assert lines[0].endswith(":1 and 2 more rows: a prompt must be an object, not a list")
    assert len(lines) == 11 and lines[10] == "... and 20 more problems"


def test_an_output_is_never_overwritten(command, tmp_path, capsys):
    (tmp_path / "there.jsonl").write_text("kept")
    cases = {
        tmp_path / "answers.csv": "lines of JSON are written; name it .jsonl",
        tmp_path / "there.jsonl": "already exists; remove it, or name another",
        tmp_path / "none" / "x.jsonl": "its directory is missing or not writable",
    }
    for output, expected in cases.items():
        assert main([*command, "--prompt", "one", "--output", str(output)]) == 2
        assert expected in capsys.readouterr().err
    assert (tmp_path / "there.jsonl").read_text() == "kept"
    assert main([*command, "--chat", "--output", str(tmp_path / "x")]) == 2
    assert "--output does not go with --chat" in capsys.readouterr().err


def test_a_job_that_ends_early_keeps_whole_lines(command, tmp_path, capsys, monkeypatch):
    text, output = tmp_path / "p.txt", tmp_path / "out.jsonl"
    text.write_text("\n".join(WORDS))
    finish = prompts.finish

    def fail(prompt, written):
        if prompt.given == "four":
            raise KeyboardInterrupt
        return finish(prompt, written)

    monkeypatch.setattr(prompts, "finish", fail)
    assert main([*command, "--prompts", str(text), "--output", str(output)]) == 130
    assert [line["prompt"] for line in lines(output.read_text())] == WORDS[:3]
    assert f"3 of 5 answers are in {output}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--prompt", "a", "--chat"], "not allowed with argument"),
        (["--prompt", "a", "--prompts", "x"], "not allowed with argument"),
        ([], "one of the arguments --prompt --prompts --chat is required"),
        (["--prompt", "a", "--top-p", "0"], "--top-p: 0.0 must be above 0 and at most 1"),
        (["--prompt", "a", "--top-p", "1.1"], "--top-p: 1.1 must be above 0"),
        (["--prompt", "a", "--top-k", "0"], "--top-k: 0 must be at least 1"),
        (["--prompt", "a", "--min-p", "1.5"], "--min-p: 1.5 must be from 0 to 1"),
        (["--prompt", "a", "--repetition-penalty", "0"], "-penalty: 0.0 must be above 0"),
    ],
)
def test_options(command, options, expected, capsys):
    with pytest.raises(SystemExit):
        main([*command, *options])
    assert expected in capsys.readouterr().err


def test_texts_beyond_the_positions_are_noted_once(command, caplog, capsys):
    with caplog.at_level(logging.WARNING, "lora_jax"):
        assert main([*command, "--prompt", "one", "--prompt", "two"]) == 0
        assert "max_position_embeddings" not in caplog.text
        long = [*command[:-1], "250"]
        # Answers end long before: nothing is computed beyond them.
        assert main([*long, "--prompt", "x" * 30, "--prompt", "two"]) == 0
    assert caplog.text.count("max_position_embeddings=256 that the model was made for") == 1
    assert "and max_new_tokens=250 go beyond" in caplog.text


def test_a_prompt_without_room_is_named_by_its_line(files, tmp_path, monkeypatch):
    file = tmp_path / "p.txt"
    file.write_text("a\n" + "b" * 60 + "\n")
    reader = open_reader(str(files / "model"), max_new_tokens=50)
    monkeypatch.setattr(type(reader.model), "learned_positions", property(lambda self: 128))
    with pytest.raises(UserError) as raised:
        prompts.encode(prompts.read_prompts(str(file)), reader)
    assert f"{file}:2: a prompt of" in str(raised.value) and f"{file}:1" not in str(raised.value)
    assert "more than the 128 positions" in str(raised.value)


# A conversation


def long_answers(writer):
    """The writer with answers of 40 tokens."""
    reader = dataclasses.replace(writer.reader, max_new_tokens=40, stops=frozenset())
    return dataclasses.replace(writer, reader=reader)


def talk(writer, text):
    out = io.StringIO()
    chat.run(writer, io.StringIO(text), out)
    return out.getvalue()


def test_a_conversation_over_a_pipe(writer, capsys):
    def ask(*turns):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        tokens = writer.reader.encode(messages)
        [(_, found)] = writer.answers([tokens], 1)
        return found.text

    first = ask("one")
    second = ask("one", first, "two")
    assert talk(writer, "one\n\ntwo\n") == f"{first}\n{second}\n"
    assert talk(writer, "one\n/reset\none\n/quit\ntwo\n") == f"{first}\n{first}\n"
    assert "this is a new conversation" in capsys.readouterr().err
    assert (
        talk(writer, "/nothing\n") == "" and "/nothing is not a command" in capsys.readouterr().err
    )


def test_an_answer_that_is_ended_stays_as_far_as_it_came(writer, capsys, monkeypatch):
    patient = long_answers(writer)
    [(_, whole)] = patient.answers([writer.reader.encode(TURN)], 1)
    assert whole.tokens == 40 and whole.finish_reason == "length"
    talked = chat.Chat(patient)
    pieces = talked.say("one")
    begun = next(pieces)
    pieces.close()
    assert begun and whole.text.startswith(begun) and begun != whole.text
    assert talked._messages == [*TURN, {"role": "assistant", "content": begun}]
    assert not talked._engine.busy
    talked.reset()
    assert "".join(talked.say("one")) == whole.text

    def interrupt(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(type(writer), "stream", property(lambda self: interrupt), raising=False)
    assert talk(writer, "one\n") == "\n" and "(ended)" in capsys.readouterr().err


@pytest.fixture
def takes_ctrl_c():
    """Ctrl-C as on a terminal; a process in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_an_answer_between_two_steps(writer, capsys, takes_ctrl_c):
    class Pressed(io.StringIO):
        def write(self, text):
            if text and not self.getvalue():
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    out, patient = Pressed(), long_answers(writer)
    chat.run(patient, io.StringIO("one\n/reset\none\n"), out)
    [(_, whole)] = patient.answers([writer.reader.encode(TURN)], 1)
    begun, _, rest = out.getvalue().partition("\n" + whole.text)
    assert rest == "\n" and begun != whole.text and whole.text.startswith(begun)
    assert "(ended)" in capsys.readouterr().err


def test_a_conversation_takes_a_larger_engine_when_it_needs_one(writer, monkeypatch):
    monkeypatch.setattr(chat, "_ROOM", 64)
    talked = chat.Chat(writer)
    first = "".join(talked.say("one"))
    small = talked._engine
    assert small.max_length == 64 and "".join(talked.say("x" * 30)) and talked._engine is not small
    assert talked._engine.max_length == 128
    assert talked._messages[1]["content"] == first


def test_a_turn_that_cannot_be_answered_is_left_out(writer, capsys, monkeypatch):
    def refuse(*_):
        raise UserError("too long")

    with monkeypatch.context() as patch:
        patch.setattr(type(writer.reader), "encode", refuse)
        assert talk(writer, "one\n") == ""
    assert "error: too long\n/reset starts a new conversation" in capsys.readouterr().err


def test_a_conversation_on_a_terminal(files):
    """Through a pseudo-terminal: a prompt, an answer, Ctrl-C at the prompt, Ctrl-D."""
    leader, follower = pty.openpty()
    # Without a controlling terminal of its own, or where the tests ignore it, the process would not
    # take Ctrl-C.
    start = (
        "import fcntl, runpy, signal, termios\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "runpy.run_module('lora_jax', run_name='__main__')"
    )
    command = [sys.executable, "-c", start, "generate", "--chat", "--max-new-tokens", "3"]
    process = subprocess.Popen(
        [*command, "--model", str(files / "model")],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "dumb", "GLIBC_TUNABLES": ""},
        start_new_session=True,
    )
    os.close(follower)
    seen = ""

    def wait_for(count, key=b""):
        """Wait for a prompt. The key may come just before the terminal waits for one: it is pressed
        again.
        """
        nonlocal seen
        until = time.monotonic() + 120
        while seen.count("> ") < count and time.monotonic() < until:
            if select.select([leader], [], [], 1.5)[0]:
                seen += os.read(leader, 4096).decode(errors="replace")
            elif key:
                os.write(leader, key)
        assert seen.count("> ") >= count, seen

    wait_for(1)
    for count in (2, 3, 4):  # also after the second that tells repetitions of one Ctrl-C
        wait_for(count, b"\x03")
    os.write(leader, b"one\n")
    wait_for(5)
    os.write(leader, b"\x04")
    assert process.wait(60) == 0
    os.close(leader)
    assert seen.count(chat.HELP) == 4
