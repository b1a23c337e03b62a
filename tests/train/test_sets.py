"""The data of a run: out of the cache or not, held out, mixed, streamed; and what is said of it."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from lora_jax import data, formats
from lora_jax.cli import main, train_main
from lora_jax.data import sets
from lora_jax.errors import UserError
from lora_jax.formats.fingerprint import tokenizer_digest
from lora_jax.report.journal import read_lines
from lora_jax.train import warn

from .tiny import make_config, write_rows, write_tokenizer


def rows(count, word="question", answer="answer"):
    return [{"prompt": f"{word} {i}", "completion": f"{answer} {i}"} for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return formats.load_tokenizer(directory)


@pytest.fixture
def read(tmp_path, tokenizer, monkeypatch):
    """`read(*overrides)`: training data, held-out sets, what was printed, and whether a source was
    tokenised anew, by an encoder with a cache of this test's own.
    """
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    built = []
    encode_rows = data.encode_rows

    def count(*args, **options):
        built.append(len(args[0]))
        return encode_rows(*args, **options)

    monkeypatch.setattr(data, "encode_rows", count)

    def call(*overrides, tokenizer=tokenizer):
        built.clear()
        console = Console(file=io.StringIO(), width=300, highlight=False, soft_wrap=True)
        config = make_config("data.max_length=64", *overrides)
        encoder = sets.Encoder(config, tokenizer, tokenizer_digest(tokenizer), console)
        train, held_out = sets.read_sets(config, encoder)
        printed = console.file.getvalue().splitlines()
        return SimpleNamespace(
            config=config,
            encoder=encoder,
            train=train,
            held_out=held_out,
            printed=printed,
            built=list(built),
        )

    return call


def texts(tokenizer, examples):
    return [tokenizer.decode(example.tokens) for example in examples]


def equal(some, others):
    return len(some) == len(others) and all(
        np.array_equal(x.tokens, y.tokens)
        and np.array_equal(x.loss_weights, y.loss_weights)
        and x.where == y.where
        for x, y in zip(some, others, strict=True)
    )


# The cache


def test_the_second_time_examples_and_counts_come_out_of_the_cache(read, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", rows(5))
    one = read(f"data.train={source}")
    two = read(f"data.train={source}")
    off = read(f"data.train={source}", "data.cache=false")
    assert (one.built, two.built, off.built) == ([5], [], [5])
    assert one.printed == two.printed == off.printed
    assert re.fullmatch(
        rf"data\.train {source}: 5 examples; \d+ tokens, \d+% supervised", one.printed[0]
    )
    for again in (two, off):
        assert equal(one.train.sets[str(source)].examples, again.train.sets[str(source)].examples)
    assert one.train.digest() == two.train.digest() == off.train.digest()


@pytest.mark.parametrize(
    "change",
    ["tokenizer", "template", "row", "data.max_length=36", "data.system_prompt=Hi"]
    + ["data.too_long=drop", "data.prompt={prompt}!", "data.on_bad_row=drop"],
)
def test_whatever_decides_an_example_is_another_entry(read, tmp_path, change):
    source = write_rows(tmp_path / "rows.jsonl", rows(3))
    before = read(f"data.train={source}")
    overrides, options = [f"data.train={source}"], {}
    if change == "tokenizer":
        # Another id for a letter: its template and its special tokens are the same.
        write_tokenizer(tmp_path / "other")
        file = tmp_path / "other" / "tokenizer.json"
        content = json.loads(file.read_text())
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        file.write_text(json.dumps(content))
        options["tokenizer"] = formats.load_tokenizer(tmp_path / "other")
    elif change == "template":
        template = tmp_path / "template.jinja"
        template.write_text(
            "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
        )
        overrides.append(f"data.chat_template={template}")
    elif change == "row":
        write_rows(source, [*rows(2), {"prompt": "question 2", "completion": "another"}])
    else:
        overrides.append(change)
        if change.startswith("data.prompt"):
            overrides.append("data.completion={completion}")
    after = read(*overrides, **options)
    assert after.built == [3]
    if change not in ("data.too_long=drop", "data.on_bad_row=drop"):
        assert after.train.digest() != before.train.digest()
    assert read(*overrides, **options).built == []
    if change != "row":
        assert read(f"data.train={source}").built == []


def test_a_damaged_entry_is_built_again_and_told(read, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", rows(3))
    before = read(f"data.train={source}")
    (entry,) = (tmp_path / "cache" / "examples").iterdir()
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(bytes(content))
    after = read(f"data.train={source}")
    assert after.built == [3] and after.train.digest() == before.train.digest()
    assert after.printed[1:] == before.printed
    assert (
        after.printed[0].startswith("note: the tokenised cache") and str(entry) in after.printed[0]
    )
    assert "is damaged and not used" in after.printed[0]
    assert read(f"data.train={source}").printed == before.printed


def test_rows_of_held_out_sets_are_there_whether_cached_or_not(read, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", rows(3))
    for _ in range(2):
        found = read(f"data.train={source}", f"data.eval={source}", "data.system_prompt=Hi")
        task = found.held_out["task"]
        assert [row.messages[-1]["content"] for row in task.rows] == [
            "answer 0",
            "answer 1",
            "answer 2",
        ]
        assert task.system_prompt == "Hi"


def test_general_text_gets_no_system_prompt(read, tmp_path, tokenizer):
    source = write_rows(tmp_path / "rows.jsonl", rows(3))
    found = read(
        *(f"data.train={source}", f"data.eval={source}", f"data.regression={source}"),
        "data.system_prompt=Behave",
    )
    seen = {name: "Behave" in texts(tokenizer, s.examples)[0] for name, s in found.held_out.items()}
    assert seen == {"task": True, "regression": False}
    assert found.held_out["regression"].system_prompt is None


def test_columns_are_those_of_the_task_alone(read, tmp_path):
    task = write_rows(tmp_path / "task.jsonl", [{"q": f"{i}", "a": "yes"} for i in range(3)])
    general = write_rows(tmp_path / "general.jsonl", [{"text": "some text"}])
    columns = ("data.prompt={q}", "data.completion={a}")
    found = read(f"data.train={task}", f"data.regression={general}", *columns)
    (row,) = found.held_out["regression"].rows
    assert isinstance(row, data.TextRow) and row.text == "some text"


# Held out of the training data


def sides(found):
    kept = [e for one in found.train.sets.values() for e in one.examples]
    return kept, found.held_out["task"].examples


@pytest.mark.parametrize(("size", "expected"), [(0.25, 5), (0.1, 2), (7, 7), (1, 1), (19, 19)])
def test_a_share_or_a_number_is_held_out(read, tmp_path, tokenizer, size, expected):
    source = write_rows(tmp_path / "rows.jsonl", rows(20))
    found = read(f"data.train={source}", f"data.eval_size={size}")
    kept, held = sides(found)
    assert (len(held), len(kept)) == (expected, 20 - expected)
    assert f"held out of data.train: {expected} examples" in found.printed
    whole = read(f"data.train={source}").train.sets[str(source)].examples
    assert sorted(texts(tokenizer, kept + held)) == sorted(texts(tokenizer, whole))
    task = found.held_out["task"]
    assert [row.where for row in task.rows] == [example.where for example in held]
    for row, text in zip(task.rows, texts(tokenizer, held), strict=True):
        assert row.messages[-1]["content"] in text


def test_what_is_held_out_depends_on_the_seed_alone(read, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", rows(20))
    options = (f"data.train={source}", "data.eval_size=5")
    first = read(*options)
    again = read(*options, "train.batch_size=3", "data.shuffle=false")  # this one from the cache
    other = read(*options, "seed=1")
    assert equal(sides(first)[1], sides(again)[1]) and equal(sides(first)[0], sides(again)[0])
    assert {e.where for e in sides(first)[1]} != {e.where for e in sides(other)[1]}


def test_the_same_prompt_is_never_on_both_sides(read, tmp_path):
    """Every prompt stands three times, with other answers, all over two files."""
    content = [row for i in range(3) for row in rows(12, answer=f"answer {i}")]
    for name, part in (("a", content[:14]), ("b", content[14:])):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", part)
    sources = json.dumps({str(tmp_path / name / "rows.jsonl"): 1 for name in "ab"})
    for seed in range(4):
        found = read(f"data.train={sources}", "data.eval_size=0.3", f"seed={seed}")
        kept, held = ({data.prompt_key(e) for e in side} for side in sides(found))
        assert not kept & held
        assert len(kept | held) == 12 and len(sides(found)[0] + sides(found)[1]) == 36
        assert 9 <= len(sides(found)[1]) <= 14  # 11, give or take a prompt
        for example, row in zip(sides(found)[1], found.held_out["task"].rows, strict=True):
            assert example.where == row.where


def test_texts_have_no_prompt_that_could_be_the_same(read, tmp_path):
    """All begin with one token, and only equal ones belong together."""
    lines = [{"text": f"same start {i % 8}"} for i in range(16)]
    source = write_rows(tmp_path / "rows.jsonl", lines)
    found = read(f"data.train={source}", "data.eval_size=4")
    kept, held = ({e.tokens.tobytes() for e in side} for side in sides(found))
    assert (len(kept), len(held)) == (6, 2) and not kept & held


def test_every_source_gives_its_share_and_the_sum_is_exact(read, tmp_path):
    """The files have the same name: rows are not taken for those of the other file."""
    counts = {"a": 10, "b": 20, "c": 3}
    for name, count in counts.items():
        (tmp_path / name).mkdir()
        write_rows(
            tmp_path / name / "rows.jsonl", rows(count, f"question {name}", f"answer {name}")
        )
    paths = {name: str(tmp_path / name / "rows.jsonl") for name in counts}
    sources = json.dumps(dict.fromkeys(paths.values(), 1))
    for size, total in ((11, 11), (0.1, 3), (7, 7)):
        found = read(f"data.train={sources}", f"data.eval_size={size}")
        task = found.held_out["task"]
        assert len(task.examples) == len(task.rows) == total
        given = {
            name: counts[name] - len(found.train.sets[path].examples)
            for name, path in paths.items()
        }
        share = total / sum(counts.values())
        assert all(abs(given[name] - share * count) <= 1 for name, count in counts.items()), given
        answers = [row.messages[-1]["content"].split()[1] for row in task.rows]
        assert {name: answers.count(name) for name in counts} == given


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (4, "data.eval_size=4 leaves nothing of .*rows.jsonl to train on: it has 4 examples"),
        (9, "data.eval_size=9 leaves nothing of"),
        (0.01, "data.eval_size=0.01 of 4 examples holds none out"),
    ],
)
def test_both_sides_need_an_example(read, tmp_path, size, told):
    source = write_rows(tmp_path / "rows.jsonl", rows(4))
    with pytest.raises(UserError, match=told):
        read(f"data.train={source}", f"data.eval_size={size}")


# Rows that stand on both sides


def test_overlap_is_kept_or_dropped(read, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", rows(6))
    # Two of the three rows are trained on; the last has a known prompt and another answer.
    other = {"prompt": "question 2", "completion": "another"}
    held = write_rows(tmp_path / "eval.jsonl", [*rows(2), other])
    options = (f"data.train={train}", f"data.eval={held}")
    told = read(*options)
    assert len(told.held_out["task"].examples) == len(told.held_out["task"].rows) == 3
    (warning,) = warn._of_overlap(told.train, told.held_out)
    assert warning.startswith("2 of 3 rows of data.eval are in data.train too")
    dropped = read(*options, "data.drop_overlap=true")
    assert list(warn._of_overlap(dropped.train, dropped.held_out)) == []
    assert [row.messages[-1]["content"] for row in dropped.held_out["task"].rows] == ["another"]
    assert len(dropped.held_out["task"].examples) == 1
    assert dropped.printed[-1] == "data.eval: 2 rows left out, as they are in data.train too"
    assert dropped.train.digest() == told.train.digest()


def test_nothing_left_after_the_overlap_is_an_error_and_none_is_silent(read, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", rows(3))
    other = write_rows(tmp_path / "other.jsonl", rows(3, "what"))
    options = (f"data.train={source}", "data.drop_overlap=true")
    with pytest.raises(UserError, match="all 3 rows of data.eval are in data.train too"):
        read(*options, f"data.eval={source}")
    found = read(*options, f"data.eval={other}", f"data.regression={source}")
    assert [len(s.examples) for s in found.held_out.values()] == [3, 3]  # general text is not asked
    assert len(found.printed) == 3


def test_held_out_sets_alone_are_those_of_the_run(read, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", rows(9))
    held = write_rows(tmp_path / "eval.jsonl", [*rows(2), *rows(2, "what")])
    for options in (
        (f"data.train={train}", "data.eval_size=3"),
        (f"data.train={train}", f"data.eval={held}", "data.drop_overlap=true"),
        (f"data.train={train}", f"data.eval={held}"),
    ):
        found = read(*options)
        alone = sets.read_held_out(found.config, found.encoder)
        assert equal(alone["task"].examples, found.held_out["task"].examples)
        assert alone["task"].rows == found.held_out["task"].rows
    found = read(f"data.train={train}")
    with pytest.raises(UserError, match="set data.eval, data.regression or both"):
        sets.read_held_out(found.config, found.encoder)


def test_the_digest_of_the_data_sees_examples_weights_and_sources(read, tmp_path):
    one, two = (write_rows(tmp_path / f"{i}.jsonl", rows(3, str(i))) for i in range(2))
    variants = [
        f"data.train={one}",
        f"data.train={two}",
        f"data.train={{{one}: 1, {two}: 1}}",
        f"data.train={{{one}: 1, {two}: 2}}",
    ]
    assert len({read(variant).train.digest() for variant in variants}) == 4
    turned = f"data.train={{{two}: 1, {one}: 1}}"
    assert read(turned).train.digest() == read(variants[2]).train.digest()


# Whole runs


def run(files, output, capsys, *overrides):
    """Return what a run of two steps printed, and its directory."""
    capsys.readouterr()
    settings = ("eval.generate=false", "export.peft=false", *overrides)
    command = ["--config", str(files / "run.yaml"), f"output_dir={output}", *settings]
    assert train_main(command) == 0
    return capsys.readouterr().err


def said_of_data(printed):
    return [line for line in printed.splitlines() if "data." in line or "% of the rows" in line]


@pytest.fixture
def mixed(tmp_path):
    """Two sources of the same name, one of them with two rows that are none."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = write_rows(tmp_path / "a" / "rows.jsonl", [*rows(20), {"prompt": "no answer"}])
    two = write_rows(tmp_path / "b" / "rows.jsonl", rows(10, "what"))
    with two.open("a") as file:
        file.write("no json\n")
    return one, two


def test_a_run_on_a_mixture_says_the_same_out_of_the_cache(files, mixed, tmp_path, capsys):
    one, two = mixed
    settings = (f"data.train={{{one}: 3, {two}: 1}}", "data.eval_size=6", "data.packing=false")
    command = ["--config", str(files / "run.yaml"), f"output_dir={tmp_path / 'refused'}"]
    assert train_main([*command, *settings]) == 2
    message = capsys.readouterr().err
    assert "rows.jsonl:21: " in message and not (tmp_path / "refused" / "config.yaml").exists()
    settings = (*settings, "data.on_bad_row=drop", "train.steps=2")
    first = said_of_data(run(files, tmp_path / "one", capsys, *settings))
    second = said_of_data(run(files, tmp_path / "two", capsys, *settings))
    assert first == second
    for source, count, share in ((one, 20, "75.0%"), (two, 10, "25.0%")):
        told = next(line for line in first if line.startswith(f"data.train {source}: "))
        assert f"{count} examples" in told and told.endswith("; 1 bad rows dropped")
        assert any(line.startswith(f"{source}: {share} of the rows") for line in first)
    assert "held out of data.train: 6 examples" in first
    losses = [
        [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("one", "two")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_stream_of_a_table_with_named_columns(files, tmp_path, capsys):
    lines = ["question,answer", *(f"how much is {i},{i}!" for i in range(20)), "no answer"]
    source = tmp_path / "table.csv"
    source.write_text("\n".join(lines) + "\n")
    settings = (
        *(f"data.train={source}", "data.prompt=Q: {question}", "data.completion={answer}"),
        *("data.streaming=true", "data.stream_rows=7", "data.packing=false", "train.steps=6"),
    )
    command = ["--config", str(files / "run.yaml"), f"output_dir={tmp_path / 'refused'}"]
    assert train_main([*command, *settings]) == 2  # met in the third block
    assert "table.csv:22: " in capsys.readouterr().err
    printed = run(files, tmp_path / "out", capsys, *settings, "data.on_bad_row=drop")
    assert f"6 steps of 4 rows x 64 tokens, streamed from {source}" in printed
    told = [line for line in printed.splitlines() if line.startswith("records from ")]
    assert len(told) == 1 and told[0].startswith("records from table.csv:16 on: 6 examples; ")
    assert told[0].endswith("; 1 bad rows dropped")
    # Five steps go through the 20 rows once, and the sixth is of the second time.
    found = read_lines(tmp_path / "out" / "metrics.jsonl")
    answers = [len(f"{i}!") + 1 for i in range(20)]  # a token a byte, and the end of the turn
    assert sum(line["supervised_tokens"] for line in found[:5]) == sum(answers)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_tokens_that_the_model_does_not_have_are_named(files, tmp_path, capsys, command):
    rows = [{"input_ids": [5, 271]}, {"input_ids": [5, 272, 6]}, {"input_ids": [300, 5]}]
    source = write_rows(tmp_path / "tokens.jsonl", rows)
    settings = [f"data.eval={source}", f"output_dir={tmp_path / 'out'}"]
    capsys.readouterr()
    assert main([command, "--config", str(files / "run.yaml"), *settings]) == 2
    message = capsys.readouterr().err
    model = files / "model"
    for line in (
        f"tokens.jsonl:2: token 272, and the vocab_size of {model} is 272: model and tokenizer",
        f"tokens.jsonl:3: token 300, and the vocab_size of {model} is 272: model and tokenizer",
    ):
        assert line in message
    assert "tokens.jsonl:1" not in message and "loading" not in message


# Keys of rows


def test_unknown_keys_are_told_once_for_all_rows(read, tmp_path):
    mixed = [row | {"id": i, "persona": "p", **({"mood": "m"} if i == 2 else {})} for i, row in
             enumerate(rows(3))]  # fmt: skip
    source = write_rows(
        tmp_path / "rows.jsonl", [*mixed, *rows(1), {"prompt": 3, "completion": ""}]
    )
    for more in ([], ["data.streaming=true"]):
        with pytest.raises(UserError) as caught:
            found = read(f"data.train={source}", *more)
            found.encoder.block(list(data.records(source)))
        told, other = str(caught.value).splitlines()
        assert told.startswith("rows.jsonl:1 and 2 more rows: unknown keys: 'persona', 'mood'.")
        assert "data.ignore_columns" in told and "'id'" not in told
        assert other == "rows.jsonl:5: 'prompt' is a number, not a string"
    dropped = read(f"data.train={source}", "data.on_bad_row=drop")
    assert dropped.printed[-1].endswith("; 4 bad rows dropped")
    ignored = read(
        f"data.train={source}", "data.on_bad_row=drop", "data.ignore_columns=[persona,mood]"
    )
    assert ignored.printed[-1].endswith("; 1 bad rows dropped") and ignored.built == [4]
    named = read(
        *(f"data.train={source}", "data.prompt={prompt}", "data.completion={completion}"),
        "data.on_bad_row=drop",
    )
    assert "5 examples" in named.printed[-1]


def test_malformed_calls_are_bad_rows(read, tmp_path):
    ask = {"role": "user", "content": "q"}
    bad = [
        {"messages": [ask, {"role": "assistant", "content": "a", "tool_calls": calls}]}
        for calls in ("[]", ["f"], [None], {"name": "f"}, [{"function": None}], [{"name": 1}])
    ]
    source = write_rows(tmp_path / "rows.jsonl", [*rows(2), *bad])
    assert (
        read(f"data.train={source}", "data.on_bad_row=drop")
        .printed[-1]
        .endswith("; 6 bad rows dropped")
    )
    with pytest.raises(UserError) as caught:
        read(f"data.train={source}")
    assert len(str(caught.value).splitlines()) == 5 and "and 1 more row:" in str(caught.value)


def test_tables_may_have_dates(read, tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    when = datetime.datetime(2024, 5, 6, 7, 8, 9)
    turns = [{"role": "user", "content": "q", "sent": when}, {"role": "assistant", "content": "a"}]
    table = pyarrow.Table.from_pylist([{"messages": turns, "seen": when, "day": when.date()}])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert "1 examples" in read(f"data.train={tmp_path / 't.parquet'}").printed[-1]


def test_arguments_of_the_template_and_columns_decide_an_example(read, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", rows(3))
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] ~ (mode or '') ~ m['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant' ~ (mode or '') }}{% endif %}"
    )
    base = (f"data.train={source}", f"data.regression={source}", f"data.chat_template={template}")
    before = read(*base)
    after = read(*base, "data.chat_template_kwargs={mode: fast}")
    assert after.built == [3] and before.train.digest() != after.train.digest()
    for sets_of in (after.train.sets[str(source)], after.held_out["regression"]):
        assert "userfastquestion 0" in texts(after.encoder.tokenizer, sets_of.examples)[0]
    assert read(*base, "data.chat_template_kwargs.mode=fast").built == []
    assert read(*base, "data.ignore_columns=[x]").built == [3]
    with pytest.raises(UserError, match="data.chat_template_kwargs names 'moed'"):
        read(*base, "data.chat_template_kwargs={moed: fast}")


def test_packed_tokens_train_as_their_sequences_apart(files, tmp_path, capsys):
    rng = np.random.default_rng(0)
    apart, packed = [], []
    for lengths in ((7, 5, 9), (12, 3), (4, 8, 6)):
        ids = rng.integers(3, 250, sum(lengths)).tolist()
        labels = [token if i % 3 else -100 for i, token in enumerate(ids)]
        packed.append({"input_ids": ids, "labels": labels, "seq_lengths": list(lengths)})
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            piece = slice(int(end) - length, int(end))
            apart.append({"input_ids": ids[piece], "labels": labels[piece]})
    losses = []
    for name, lines in (("packed", packed), ("apart", apart)):
        source = write_rows(tmp_path / f"{name}.jsonl", lines)
        settings = (f"data.train={source}", f"data.eval={source}", "train.steps=2")
        printed = run(files, tmp_path / name, capsys, *settings)
        assert ("3 packed rows taken apart" in printed) == (name == "packed")
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        steps = read_lines(tmp_path / name / "metrics.jsonl")
        losses.append([*(line["loss"] for line in steps), summary["task"]["loss_before"]])
    assert losses[0] == losses[1] and len(losses[0]) == 3
