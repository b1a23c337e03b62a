"""Classifiers, through the same runs: learning, resuming, exports, mistakes."""

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_jax import config as configs
from lora_jax.cli import main, train_main

ANIMALS = ("cat", "dog", "horse", "mouse")
PLACES = ("paris", "rome", "oslo", "lima")
WORDS = (*ANIMALS, *PLACES, "the", "of")


def write_encoder(directory, family="bert", **fields):
    """A tiny encoder with random weights, without a head, and a tokenizer of whole words."""
    classes = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
        "distilbert": (transformers.DistilBertConfig, transformers.DistilBertModel),
        "modernbert": (transformers.ModernBertConfig, transformers.ModernBertModel),
    }
    config_class, model_class = classes[family]
    sizes = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    if family == "distilbert":
        sizes = dict(dim=24, hidden_dim=32, n_layers=2, n_heads=4)
    torch.manual_seed(0)
    config = config_class(**dict(vocab_size=20, max_position_embeddings=32, **sizes) | fields)
    model_class(config).save_pretrained(directory)
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]")
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(file):
    rows = [{"text": f"the {word}", "label": "animal"} for word in ANIMALS]
    rows += [{"text": f"the {word} of {word}", "label": "place"} for word in PLACES]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """encoder, rows.jsonl."""
    directory = tmp_path_factory.mktemp("classify")
    write_encoder(directory / "encoder")
    write_rows(directory / "rows.jsonl")
    return directory


def settings(files, *more):
    config = files / "run.yaml"
    config.write_text(
        f"model: {files / 'encoder'}\n"
        "adapter: {rank: 4, alpha: 8}\n"
        f"data: {{train: {files / 'rows.jsonl'}, eval: {files / 'rows.jsonl'}, max_length: 16}}\n"
        "train: {steps: 30, batch_size: 4, learning_rate: 1.0e-2, save_every: 5}\n"
        "eval: {batch_size: 2}\n"
    )
    return ["--config", str(config), *more]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "out"
    options = settings(files, f"output_dir={output}", "export.merged=true", "train.eval_every=10")
    assert train_main(options) == 0
    return output


def summary(output):
    return json.loads((output / "summary.json").read_text())


def losses(output):
    return [
        json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()
    ]


def test_it_learns_what_the_rows_say(run):
    task = summary(run)["task"]
    assert task["loss_before"] == pytest.approx(np.log(2), abs=0.1)
    assert task["loss_after"] < 0.1 and task["accuracy_after"] == 1.0 and task["examples"] == 8
    resolved = configs.load(run / "config.yaml")
    assert resolved.data.labels == ["animal", "place"]
    assert resolved.adapter.modules_to_save == ["classifier"]
    assert resolved.eval.metrics == ["accuracy"]
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])
    assert sample["answer"] in ("animal", "place")


def test_every_label_is_kept_with_the_probabilities_of_all(files, run):
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 8 + [30] * 8
    _, logits, wanted = texts(files, run / "merged")
    expected = logits.softmax(-1)
    for i, line in enumerate(lines[8:]):
        assert line["where"].endswith(f"rows.jsonl:{i + 1}")
        assert line["references"] == [wanted[i]] and line["accuracy"] == 1.0
        assert list(line["probabilities"]) == ["animal", "place"]
        np.testing.assert_allclose(list(line["probabilities"].values()), expected[i], atol=1e-5)
        assert line["answer"] == max(line["probabilities"], key=line["probabilities"].get)


def texts(directory, path):
    """Logits of the rows by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    with torch.no_grad():
        inputs = [
            tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False) for row in rows
        ]
        found = [model(**one).logits[0] for one in inputs]
    return model, torch.stack(found), [row["label"] for row in rows]


def test_the_merged_model_gives_the_labels_in_transformers(files, run):
    model, logits, wanted = texts(files, run / "merged")
    assert model.config.id2label == {0: "animal", 1: "place"}
    assert [model.config.id2label[int(i)] for i in logits.argmax(-1)] == wanted


def test_the_adapter_gives_them_in_peft(files, run):
    import peft

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        files / "encoder", num_labels=2
    )
    tuned = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    _, merged, _ = texts(files, run / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "adapter")
    rows = [json.loads(line) for line in (files / "rows.jsonl").read_text().splitlines()]
    with torch.no_grad():
        own = [tuned(**tokenizer(row["text"], return_tensors="pt")).logits[0] for row in rows]
    np.testing.assert_allclose(torch.stack(own), merged, atol=1e-5)


def test_a_stopped_run_goes_on_bit_exactly(files, run, tmp_path):
    output = tmp_path / "out"
    first = settings(files, f"output_dir={output}", "train.eval_every=10")
    assert train_main([*first, "train.steps=12", "train.schedule=constant"]) == 0
    whole = tmp_path / "whole"
    assert train_main([*settings(files, f"output_dir={whole}"), "train.schedule=constant"]) == 0
    more = [*first, "train.schedule=constant", "resume=true", "allow_change=[train.steps]"]
    assert train_main(more) == 0
    assert losses(output) == losses(whole)


def test_an_adapter_is_scored_beside_the_base(files, run, tmp_path):
    table = tmp_path / "table.json"
    options = ["--adapter", str(run / "adapter"), "--output", str(table)]
    assert main(["eval", *settings(files), *options]) == 0
    base, tuned = json.loads(table.read_text())
    assert tuned["accuracy"] == 1.0 and base["accuracy"] < 1.0
    assert tuned["task_loss"] == pytest.approx(summary(run)["task"]["loss_after"], rel=1e-5)


def test_a_run_is_exported_afterwards(files, run, tmp_path):
    assert (
        main(["export", "--run", str(run), "--format", "hf", "--output", str(tmp_path / "hf")]) == 0
    )
    np.testing.assert_array_equal(texts(files, tmp_path / "hf")[1], texts(files, run / "merged")[1])


@pytest.mark.slow
def test_roberta_quantised_and_whole(files, tmp_path):
    write_encoder(tmp_path / "encoder", "roberta", type_vocab_size=1)
    for name, options in {
        "nf4": ("base_dtype=nf4", "adapter.use_dora=true"),
        "full": ("adapter.method=full", "train.learning_rate=3e-3"),
    }.items():
        output = tmp_path / name
        more = (f"model={tmp_path / 'encoder'}", f"output_dir={output}", *options)
        assert train_main(settings(files, *more)) == 0
        assert summary(output)["task"]["accuracy_after"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "saved"),
    [
        ("distilbert", ["classifier", "pre_classifier"]),
        ("modernbert", ["classifier", "head"]),  # its layers are a list
    ],
)
def test_runs_of_other_families(files, tmp_path, family, saved):
    """The whole head trains, the run goes on bit for bit, and PEFT reads what it wrote."""
    import peft

    ids = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
    encoder = write_encoder(tmp_path / "encoder", family, **ids if family == "modernbert" else {})
    base = [*settings(files, f"model={encoder}"), "train.schedule=constant", "export.merged=true"]
    output = tmp_path / "out"
    assert train_main([*base, f"output_dir={output}", "train.steps=10"]) == 0
    more = (f"output_dir={output}", "resume=true", "allow_change=[train.steps]")
    assert train_main([*base, *more]) == 0
    assert train_main([*base, f"output_dir={tmp_path / 'whole'}"]) == 0
    assert losses(output) == losses(tmp_path / "whole")
    assert summary(output)["task"]["accuracy_after"] == 1.0
    assert configs.load(output / "config.yaml").adapter.modules_to_save == saved
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    tuned = peft.PeftModel.from_pretrained(model, str(output / "adapter")).eval()
    _, merged, _ = texts(files, output / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(output / "adapter")
    rows = [json.loads(line) for line in (files / "rows.jsonl").read_text().splitlines()]
    with torch.no_grad():
        own = [
            tuned(**tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False))
            for row in rows
        ]
    np.testing.assert_allclose(torch.stack([one.logits[0] for one in own]), merged, atol=1e-5)


def test_inspect_shows_labels(files, capsys):
    assert main(["inspect", *settings(files)]) == 0
    assert "-> animal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("data.regression=x.jsonl",), "data.regression='x.jsonl' is for models that write text"),
        (("train.objective=dpo",), "train.objective=dpo compares answers, and"),
        (("data.system_prompt=x",), "data.system_prompt='x' is for models that write text"),
        (("data.streaming=true",), "list them in data.labels"),
        (("data.labels=[animal]",), "at least two are needed"),
        (("data.labels=[animal,place,place]",), "each once"),
        (("data.labels=[animal,plaice]",), "label 'place' is not one of animal, plaice"),
        (("data.label=kind",), "'kind' is missing or null"),
        (("data.text=[words]",), "'words' is missing or null"),
    ],
)
def test_mistakes(files, tmp_path, capsys, options, message):
    output = tmp_path / "out"
    assert train_main(settings(files, f"output_dir={output}", *options)) == 2
    assert message in capsys.readouterr().err
    assert not output.exists() or not list(output.iterdir())


def test_texts_beyond_the_learned_positions(files, tmp_path, capsys):
    write_encoder(tmp_path / "encoder", max_position_embeddings=5)
    more = (f"model={tmp_path / 'encoder'}", f"output_dir={tmp_path / 'out'}")
    assert train_main(settings(files, *more)) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl:5: 6 tokens" in error and "set data.max_length to 5 or less" in error


def test_it_writes_no_text(files, capsys):
    assert main(["generate", "--model", str(files / "encoder"), "--prompt", "the cat"]) == 2
    assert "is a classifier and writes no text" in capsys.readouterr().err


def test_labels_are_not_for_models_that_write(files, tmp_path, capsys):
    from .tiny import write_model

    write_model(tmp_path / "llama")
    options = settings(files, f"model={tmp_path / 'llama'}", f"output_dir={tmp_path / 'out'}")
    assert train_main([*options, "data.labels=[a,b]"]) == 2
    assert "data.labels=['a', 'b'] is for classifiers" in capsys.readouterr().err
