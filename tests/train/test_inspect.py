"""Counts of inspect, against values by hand, and its examples as text.

With one token per byte, a row of a prompt of p bytes and an answer of c bytes has 20 + p + c tokens
in the ChatML template, and c + 1 of them are supervised.
"""

import io
import json
import os
import shutil

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lora_jax import config as configs
from lora_jax import data, formats
from lora_jax.audit import preview as reports
from lora_jax.audit.data import Overlap, inspect, plot, print_report, show
from lora_jax.cli import main
from lora_jax.data import sets
from lora_jax.errors import UserError

from .tiny import TINY, write_rows, write_tokenizer

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory without weights, for none of this needs them."""
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(TINY))
    return directory


@pytest.fixture
def tokenizer(model):
    return formats.load_tokenizer(model)


@pytest.fixture
def write(tmp_path):
    """Write rows to a file: (prompt, answer) pairs, or records as they are."""

    def run(name, *rows):
        pairs = [
            {"prompt": row[0], "completion": row[1]} if isinstance(row, tuple) else row
            for row in rows
        ]
        return str(write_rows(tmp_path / name, pairs))

    return run


@pytest.fixture
def look(model):
    """A report on `train` under the overrides given."""

    def run(train, *overrides, examples=3, model=model, **settings):
        content = {
            "model": str(model),
            "data": {"train": train, "max_length": 64, **settings},
            "train": {"steps": 2, "batch_size": 4},
        }
        return inspect(configs.parse(content, overrides), QUIET, examples)

    return run


def printed(report, **options):
    settings = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
    console = Console(file=io.StringIO(), **settings, **options)
    print_report(report, console)
    return console.file.getvalue()


def example(tokens, weights, where="x"):
    return data.Example(np.array(tokens, np.int32), np.array(weights, np.float32), where)


# Numbers


def test_sets_in_numbers(look, write):
    train = write("train.jsonl", ("one", "eins"), ("two", "zwei"), ("three", "drei"), ("4", "vier"))
    held_out = write("eval.jsonl", ("five", "fünf"))
    report = look(train, eval=held_out, regression=write("text.jsonl", {"text": "hello"}))
    assert list(report.sets) == [f"data.train {train}", "data.eval", "data.regression"]
    one, task, text = report.sets.values()
    assert one.lengths.tolist() == [27, 27, 29, 25] and one.supervised.tolist() == [5] * 4
    assert one.share == 20 / 108
    assert (task.lengths.tolist(), task.supervised.tolist()) == ([29], [6])  # ü is two bytes
    assert (text.lengths.tolist(), text.supervised.tolist()) == ([6], [5])  # EOS; not the first
    assert one.quantiles() == {"min": 25, "median": 27, "90 %": 29, "99 %": 29, "max": 29}
    assert one.histogram() == [(25, 25, 1), (26, 26, 0), (27, 27, 2), (28, 28, 0), (29, 29, 1)]
    assert report.records is None and report.warnings == []
    shown = printed(report)
    assert "rows      4 read: 4 examples, 0 bad, 0 too long, 0 left out" in shown
    assert "tokens    108, 20 supervised (18.5%)" in shown
    assert "lengths   min 25, median 27, 90 % 29, 99 % 29, max 29" in shown
    assert (
        f"      27-27     {'█' * 40} 2\n      28-28      0\n      29-29     {'█' * 20} 1" in shown
    )


def test_ranges_of_the_histogram_cover_all_lengths():
    lengths = np.array([1, 13, 14, 100, 100])
    found = reports.Measured(None, lengths, lengths).histogram()
    assert [count for *_, count in found] == [2, 1, 0, 0, 0, 0, 0, 2]
    assert (found[0][:2], found[1][:2], found[-1][:2]) == ((1, 13), (14, 26), (92, 104))


def test_rows_that_are_bad_too_long_or_cut(look, write):
    bad = {"prompt": "no answer"}
    rows = [("a", "b"), bad, ("a", "c" * 60), ("p" * 60, "a"), bad]
    source = write("rows.jsonl", *rows)
    with pytest.raises(UserError, match=r"rows\.jsonl:2 and 1 more row: a row needs"):
        look(source)
    cut = look(source, on_bad_row="drop").sets[f"data.train {source}"]
    assert cut.lengths.tolist() == [22, 64]
    assert cut.supervised.tolist() == [2, 64 - 20]  # 20 tokens stand before the answer
    counts = cut.counts
    assert (counts.bad, counts.truncated, counts.dropped, counts.longest) == (2, 1, 1, 81)
    report = look(source, on_bad_row="drop", too_long="drop")
    counts = report.sets[f"data.train {source}"].counts
    assert (counts.bad, counts.truncated, counts.dropped, counts.longest) == (2, 0, 2, 81)
    text = printed(report)
    assert "5 read: 1 examples, 2 bad, 2 too long, 0 left out" in text
    assert "> 64      2 (0 cut, 2 dropped; the longest has 81 tokens)" in text


def test_the_same_from_the_cache(look, write):
    source = write("cached.jsonl", ("a", "b"), {}, ("a", "c" * 60))
    first, again = (look(source, on_bad_row="drop").sets.popitem()[1] for _ in range(2))
    assert first.counts == again.counts and first.counts.bad == 1
    assert first.lengths.tolist() == again.lengths.tolist()


def test_no_weights_are_fetched_from_the_hub(look, write, model, monkeypatch):
    fetched = []

    def download(repository, allow_patterns, **_):
        fetched.append((repository, [name for name in allow_patterns if "safetensors" in name]))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    look(write("rows.jsonl", ("a", "b")), model="org/name")
    assert fetched == [("org/name", [])]


# What stands twice


def test_overlap_and_repeats(look, write):
    train = write("train.jsonl", ("a", "1"), ("b", "2"), ("a", "1"), ("c", "3"), ("a", "1"))
    held_out = write("eval.jsonl", ("b", "2"), ("c", "4"), ("d", "3"), ("a", "1"))
    report = look(train, eval=held_out, regression=write("other.jsonl", ("z", "1")))
    place = "train.jsonl:{}".format
    assert report.repeats == [(place(3), place(1)), (place(5), place(1))]
    assert report.overlaps == {
        "data.eval": Overlap(
            [("eval.jsonl:1", place(2)), ("eval.jsonl:4", place(1))], [("eval.jsonl:2", place(4))]
        ),
        "data.regression": Overlap([], []),
    }
    text = printed(report)
    assert "examples repeated in data.train: 2\n    train.jsonl:3 = train.jsonl:1\n" in text
    assert "data.eval: examples in data.train too: 2\n" in text
    assert "data.eval: prompts in data.train with another answer: 1\n" in text


def test_plain_texts_have_no_prompt_in_common(look, write):
    texts = write("train.jsonl", {"text": "abc"}, {"text": "abd"})
    report = look(texts, eval=write("eval.jsonl", {"text": "abe"}, {"text": "abd"}))
    assert report.overlaps["data.eval"] == Overlap([("eval.jsonl:2", "train.jsonl:2")], [])


def test_what_is_held_out_is_left_out(look, write):
    train = write("train.jsonl", *((str(n), "x") for n in range(8)))
    kept, task = look(train, eval_size=2).sets.items()
    assert (len(kept[1].lengths), kept[1].left_out) == (6, 2)
    assert (task[0], len(task[1].lengths), task[1].counts) == ("data.eval_size", 2, None)
    assert "rows      2 held out of data.train" in printed(look(train, eval_size=2))
    report = look(train, eval=write("eval.jsonl", ("0", "x"), ("y", "x")), drop_overlap=True)
    assert (len(report.sets["data.eval"].lengths), report.sets["data.eval"].left_out) == (1, 1)
    assert report.overlaps["data.eval"].identical == []


# How rows are filled


def brute(config, model):
    """Supervised tokens of every batch of the run, added up."""
    tokenizer = formats.load_tokenizer(model)
    encoder = sets.Encoder(config, tokenizer, "", QUIET)
    train, _ = sets.read_sets(config, encoder)
    loader = sets.make_loader(config, train, encoder, None, QUIET)
    batches = (loader.batch(step) for step in range(config.train.steps))
    return sum(int((batch["loss_weights"] > 0).sum()) for batch in batches)


def test_packing(look, write):
    rows = ("one", "eins"), ("two", "zwei"), ("three", "drei"), ("4", "vier")
    report = look(write("train.jsonl", *rows))
    (packing,) = report.packing.values()
    assert (packing.share, packing.rows_per_epoch, packing.row_length) == (1, 2, 64)
    assert packing.efficiency == 108 / 128
    assert (packing.epochs, packing.supervised_tokens) == (4, 80)  # 2 steps of 4 rows
    text = printed(report)
    assert "2 steps of 4 rows\n" in text
    assert "2 rows of 64 tokens hold an epoch, 84.4% filled\n" in text
    assert "4.00 epochs, 80 supervised\n  80 supervised tokens in all" in text


@pytest.mark.parametrize("packing", [True, False])
def test_supervised_tokens_are_those_of_the_batches(look, write, model, packing):
    sources = {
        write("a.jsonl", *(("q" * n, "a" * (n + 1)) for n in range(7))): 3.0,
        write("b.jsonl", *(("r" * n, "b" * (2 * n + 1)) for n in range(5))): 1.0,
    }
    for train in (sources, next(iter(sources))):
        report = look(train, "train.steps=3", packing=packing)
        total = sum(one.supervised_tokens for one in report.packing.values())
        assert total == brute(report.config, model)
    mixed = look(sources, "train.steps=3", packing=packing).packing.values()
    assert [one.share for one in mixed] == [0.75, 0.25]
    assert [one.epochs * one.rows_per_epoch for one in mixed] == [9, 3]


# Examples as text


def test_marks_enclose_what_is_supervised(look, write):
    source = write("rows.jsonl", ("one\n[b]", "eins\n:x:"), ("two", "zwei"), ("3", "drei"))
    report = look(source, examples=2)
    text = printed(report)
    assert (
        "rows.jsonl:1: 35 tokens, 9 supervised\n"
        "<|im_start|>user↵\none↵\n[b]<|im_end|>↵\n<|im_start|>assistant↵\n«eins↵\n:x:<|im_end|>»\n"
    ) in text
    assert text.count("«") == text.count("»") == 2 and "rows.jsonl:3" not in text
    assert report.shown[1].pieces[1] == ("zwei<|im_end|>", 1)


def test_every_assistant_turn_is_marked(look, write):
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    row = {"messages": [{"role": role, "content": said} for role, said in turns]}
    text = printed(look(write("rows.jsonl", row)))
    assert text.count("«") == 2 and "«b<|im_end|>»" in text and "«d<|im_end|>»" in text


def test_a_terminal_gets_colours_instead(look, write):
    report = look(write("rows.jsonl", ("one", "eins")))
    text = printed(report, force_terminal=True, color_system="truecolor")
    assert "«" not in text and "\x1b[32meins<|im_end|>\x1b[0m" in text
    assert "\x1b[2m<|im_start|>user" in text
    uncoloured = printed(report, force_terminal=True, color_system="truecolor", no_color=True)
    assert "«" in uncoloured


def test_weights_other_than_one_are_written(look, write, tokenizer):
    ids = tokenizer("abcd", add_special_tokens=False)["input_ids"]
    row = {"input_ids": ids, "loss_weights": [0, 0.5, 1, 2.25]}
    report = look(write("rows.jsonl", row))
    assert report.shown[0].pieces == [("a", 0), ("b", 0.5), ("c", 1), ("d", 2.25)]
    assert "a«b»×0.5«c»«d»×2.25\n" in printed(report)
    colours = printed(report, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;128;160;0mb" in colours and "\x1b[32mc" in colours


def test_controls_in_the_data_do_not_reach_the_terminal(look, write):
    text = printed(look(write("rows.jsonl", ("\x1b[31mred\t", "\a"))))
    assert "␛[31mred␉<|im_end|>" in text and "«␇<|im_end|>»" in text
    assert "\x1b" not in text and "\a" not in text


def test_characters_of_several_tokens(look, write, tokenizer):
    text = printed(look(write("rows.jsonl", ("größer €", "日本 😀"))))
    assert "größer €<|im_end|>" in text and "«日本 😀<|im_end|>»" in text and "\ufffd" not in text
    ids = tokenizer("a€b", add_special_tokens=False)["input_ids"]  # a, three bytes, b
    split = show(example(ids, [0, 0, 1, 1, 0]), tokenizer)
    assert split.pieces == [("a", 0), ("€", 1), ("b", 0)]
    later = show(example(ids, [0, 0, 0.5, 1, 0]), tokenizer)
    assert later.pieces == [("a", 0), ("", 0.5), ("€", 1), ("b", 0)]
    cut = show(example(ids[:3], [0, 1, 1]), tokenizer)
    assert cut.pieces == [("a", 0), ("\ufffd", 1)]  # as the model sees it


def test_spaces_at_the_beginning_of_a_piece_are_kept():
    words = Tokenizer(tokenizer_models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    found = show(example([0, 1, 0], [0, 1, 0]), tokenizer)
    assert found.pieces == [("a", 0), (" b", 1), (" a", 0)]


def test_ids_that_nobody_knows(look, write, tokenizer):
    (a,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    report = look(write("rows.jsonl", {"input_ids": [a, 300, 301, a]}))
    assert report.shown[0].pieces == [("a", 0), ("<300><301>", 1), ("a", 1)]
    (problem,) = [warning for warning in report.warnings if "vocab_size" in warning]
    assert problem.startswith("rows.jsonl:1: token 300, and the vocab_size of ")
    assert " is 272: model and tokenizer (or the row's own input_ids) do not belong" in problem
    assert f"warning: {problem}\n" in printed(report)


# Warnings


def test_warnings(look, write):
    bare = look(write("rows.jsonl", ("a", "b"))).warnings
    assert [text.partition(" is")[0] for text in bare] == [
        "neither data.eval nor data.eval_size",
        "data.regression",
    ]
    held_out = write("held.jsonl", ("q", "r"))
    settings = {"eval": held_out, "regression": held_out}
    # One answer is cut; of the other, 250 tokens stand before two supervised ones.
    cut = look(write("cut.jsonl", ("a", "b" * 60), ("a", "c")), **settings).warnings
    assert len(cut) == 1 and "the last answer of 1 of 2 examples has no stop token" in cut[0]
    little = look(write("little.jsonl", ("a" * 250, "b")), **settings | {"max_length": 300})
    (warning,) = [text for text in little.warnings if "supervised" in text]
    assert "cut" not in warning and "0.74% of the tokens are supervised" in warning


def test_warning_of_prompts_that_split_differently(look, write, model, tmp_path):
    merging = shutil.copytree(model, tmp_path / "merging")
    file = merging / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["ab"] = 259
    content["model"]["merges"] = [["a", "b"]]
    file.write_text(json.dumps(content))
    source = write("rows.jsonl", ("xa", "bx"), ("x", "y"))
    report = look(source, chat_template="none", model=merging)
    (warning,) = [text for text in report.warnings if "split" in text]
    assert warning.startswith(f"data.train {source}: 1 prompts split into other tokens alone")
    assert report.shown[0].pieces == [("xab", 0), ("x<|im_end|>", 1)]


def test_warnings_of_empty_answers_and_of_answers_that_nothing_ends(look, write, tmp_path):
    bare = tmp_path / "bare.jinja"
    bare.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    source = write("rows.jsonl", ("a", ""), ("b", "c"), {"messages": turns})
    report = look(source, chat_template=str(bare))
    counts = report.sets[f"data.train {source}"].counts
    assert (counts.empty_answers, counts.unended_answers) == (1, 1)
    empty, unended = [text for text in report.warnings if " answer" in text]
    assert empty.startswith(f"data.train {source}: 1 examples have an empty answer, and teach to")
    assert unended.startswith(f"data.train {source}: 1 examples have an earlier answer that no end")
    told = sets.describe_counts(counts, 99)
    assert "; 1 with an empty answer, which teach its end alone; 1 with an earlier answer" in told


def test_a_base_model_without_a_template_takes_plain_texts(look, write, tmp_path):
    write_tokenizer(tmp_path / "base", chat_template=None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(TINY))
    source = write("texts.jsonl", {"text": "hello"}, {"text": "x" * 64})
    report = look(source, model=tmp_path / "base")
    assert report.shown[0].pieces == [("h", 0), ("ello<|im_end|>", 1)]
    (warning,) = [text for text in report.warnings if "stop token" in text]
    assert "the last answer of 1 of 2 examples has no stop token" in warning
    with pytest.raises(UserError, match="has no chat template"):
        look(write("rows.jsonl", ("a", "b")), model=tmp_path / "base")


def test_a_template_that_refuses_the_sample_is_a_warning(look, write, tmp_path):
    """It may take the rows, and a plain text asks nothing of it."""
    template = tmp_path / "never.jinja"
    template.write_text("{{ raise_exception('never') }}")
    report = look(write("texts.jsonl", {"text": "hello"}), chat_template=str(template))
    (warning,) = [text for text in report.warnings if "never" in text]
    assert warning.startswith(
        "the tokens that end an answer are not known: a sample conversation: the chat"
    )


# Streams


def test_of_a_stream_only_the_first_records_are_read(look, write):
    rows = [("a", "b"), ("c", "d"), ("c", "d"), {"wrong": 1}]
    source = write("rows.jsonl", *rows)
    with pytest.raises(UserError, match=r"rows\.jsonl:4: a row needs"):
        look(source, streaming=True, stream_rows=4)
    report = look(source, streaming=True, stream_rows=3, eval=write("eval.jsonl", ("a", "b")))
    one = report.sets[f"data.train {source}"]
    assert (report.records, one.counts.examples, one.lengths.tolist()) == (3, 3, [22] * 3)
    assert report.repeats == [("rows.jsonl:3", "rows.jsonl:2")]
    assert report.overlaps["data.eval"].identical == [("eval.jsonl:1", "rows.jsonl:1")]
    (packing,) = report.packing.values()
    assert (packing.rows_per_epoch, packing.row_length, packing.epochs) == (2, 64, 4)
    text = printed(report)
    assert text.startswith("data.train is streamed: this report covers its first 3 rec")
    assert "4.00 times as much as was read" in text and "epoch" not in text


def test_drops_of_a_stream(look, write):
    source = write("rows.jsonl", {"wrong": 1}, ("a", "b"), ("a", "c" * 60))
    settings = {"streaming": True, "on_bad_row": "drop", "too_long": "drop"}
    report = look(source, **settings)
    counts = report.sets[f"data.train {source}"].counts
    assert (report.records, counts.examples, counts.bad, counts.dropped) == (3, 1, 1, 1)
    with pytest.raises(UserError, match=r"none of the first 1 records of .*rows\.jsonl makes an"):
        look(source, stream_rows=1, **settings)


def test_rows_of_a_stream_are_as_long_as_they_may_be(look, write):
    source = write("rows.jsonl", ("a", "b"), ("a", "bcd"))
    settings = {"packing": False, "max_length": 256}
    (whole,) = look(source, **settings).packing.values()
    (streamed,) = look(source, streaming=True, **settings).packing.values()
    assert (whole.row_length, whole.efficiency) == (64, 46 / 128)
    assert (streamed.row_length, streamed.efficiency) == (256, 46 / 512)


# The command


@pytest.fixture
def command(model, write, tmp_path):
    """The arguments of an inspection, whose run would write to tmp_path/out."""
    source = write("rows.jsonl", ("one", "eins"), ("two", "zwei"))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {model}\ndata: {{train: {source}, max_length: 64}}\noutput_dir: {tmp_path}/out\n"
    )
    return ["inspect", "--config", str(file)]


def test_the_command_prints_and_writes_nothing(command, tmp_path, model, capsys):
    before = {*tmp_path.rglob("*"), *model.rglob("*")}
    assert main([*command, "train.steps=7", "--examples", "1"]) == 0
    assert {*tmp_path.rglob("*"), *model.rglob("*")} == before
    out = capsys.readouterr().out
    assert "«eins<|im_end|>»" in out and "zwei" not in out and "7 steps of 8 rows" in out


def test_the_plot_is_the_one_thing_written(command, tmp_path):
    before = set(tmp_path.rglob("*"))
    file = tmp_path / "plots" / "lengths.png"
    assert main([*command, "--plot", str(file)]) == 0
    assert set(tmp_path.rglob("*")) - before == {file.parent, file}
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.train=null"], "data.train is not set"),
        (["data.train=absent.jsonl"], "data file absent.jsonl does not exist"),
        (["model=absent"], "model='absent' does not exist"),
        (["--examples", "-1"], "the number of examples to show must be at least 0, not -1"),
        (["--plot", "lengths.abc"], "--plot lengths.abc cannot be written: Format 'abc'"),
        (["--plot", os.devnull + "/x.png"], "--plot /dev/null/x.png cannot be written"),
    ],
)
def test_mistakes(command, options, message, capsys):
    assert main([*command, *options]) == 2
    printed = capsys.readouterr().err
    assert f"error: {message}" in printed and "Traceback" not in printed


def test_plot_shows_every_set(look, write, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(reports.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    source = write("rows.jsonl", ("one", "eins"), ("two", "zwei"), ("three", "x" * 20))
    plot(look(source, eval=write("eval.jsonl", ("q", "r"))), tmp_path / "x.png")
    left, right = drawn[0].axes
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == [f"data.train {source} (3)", "data.eval (1)"]
    values, edges, _ = right.patches[0].get_data()  # supervised tokens: 5, 5, 21
    assert np.allclose([values[5], values[21], values.sum()], [200 / 3, 100 / 3, 100])
    assert edges[:3].tolist() == [0, 1, 2] and left.get_xlabel() == "tokens per example"
