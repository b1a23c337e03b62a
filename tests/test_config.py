"""One YAML file, one dataclass: what is read as what, and how mistakes are told."""

import dataclasses
from pathlib import Path

import pytest

from lora_jax.config import Config, dump, load, parse
from lora_jax.errors import UserError

TEXTS = [
    "Parse: {x} # y",
    "${name}",
    "a ${oc.env:HOME} b",
    r"\${x} \\${y} c:\dir",
    "trailing ${x}\\",
    "[1, 2]",
    "- item",
    "key: value",
    "it's",
    "x = y",
    "10",
    "true",
    "line one\nline two",
    "ünïcode 你好",
    "{{ jinja }}",
]

ANSWERED = ("data.eval=b", "train.eval_every=2")
BEST = "train.load_best_model_at_end=true"


def test_every_field_has_a_default_but_the_model():
    config = parse({"model": "m"})
    assert config == dataclasses.replace(Config(), model="m")


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_as_it_is_from_the_file_from_an_override_and_from_a_dump(tmp_path, text):
    by_file = parse({"model": "m", "data": {"system_prompt": text}})
    by_override = parse({"model": "m"}, [f"data.system_prompt={text}"])
    assert by_file.data.system_prompt == by_override.data.system_prompt == text
    file = tmp_path / "config.yaml"
    file.write_text(dump(by_file), encoding="utf-8")
    assert load(file) == by_file


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=1e-3", 1e-3),
        ("train.learning_rate=1", 1.0),
        ("train.steps=7", 7),
        ("train.grad_clip=null", None),
        ("train.micro_batch_size=null", None),
        ("data.eval=null", None),
        ("data.eval=", None),
        ("data.eval='null'", "null"),
        ('data.system_prompt="Parse: x"', "Parse: x"),
        ("output_dir=10", "10"),
        ("data.packing=false", False),
        ("adapter.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("adapter.target_modules=[q_proj]", ["q_proj"]),
        (r"adapter.target_modules=.*\.q_proj$", r".*\.q_proj$"),
        ("adapter.layers_to_transform=[0, 1]", [0, 1]),
        ("adapter.rank_pattern={q_proj: 4}", {"q_proj": 4}),
        ("adapter.alpha_pattern={q_proj: 1e1}", {"q_proj": 10.0}),
    ],
)
def test_overrides_have_the_type_of_their_field(override, expected):
    value = parse({"model": "m"}, [override])
    for part in override.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


def test_numbers_without_a_point_are_read_as_floats_from_yaml(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: m\ntrain: {learning_rate: 1e-3, epsilon: 1E-9, steps: 3}\n")
    train = load(file).train
    assert (train.learning_rate, train.epsilon, train.steps) == (1e-3, 1e-9, 3)


def test_later_overrides_win():
    assert parse({"model": "m"}, ["train.steps=1", "train.steps=2"]).train.steps == 2


@pytest.mark.parametrize(
    ("content", "overrides", "expected"),
    [
        ({"trian": {}}, [], ["unknown key 'trian'", "Did you mean 'train'?"]),
        ({"train": {"step": 1}}, [], ["unknown key 'train.step'", "Did you mean 'steps'?"]),
        ({"rank": 1}, [], ["unknown key 'rank'", "Did you mean 'adapter.rank'?"]),
        ({}, ["train.stepz=1"], ["'train.stepz'", "Did you mean 'steps'?"]),
        ({}, ["lora.rank=1"], ["unknown key 'lora'"]),
        ({}, ["steps"], ["'steps'", "key.sub=value"]),
        ({}, ["=3"], ["key.sub=value"]),
        ({}, ["train.steps=ten"], ["train.steps='ten' is not a whole number or null"]),
        ({}, ["train.steps=1.5"], ["train.steps", "1.5"]),
        ({}, ["train.schedule=null"], ["train.schedule=null is not text"]),
        ({}, ["train.steps=[1"], ["'train.steps=[1'", "is not valid YAML: line 1, column 3"]),
        ({"train": {"steps": "${x}"}}, [], ["steps"]),
        ({"train": {"steps": "???"}}, [], ["train.steps='???' is not a whole number"]),
        ({"train": 5}, [], ["train=5 must be a mapping of settings"]),
        ({"train": None}, [], ["train=null must be a mapping of settings; leave it out"]),
        ({"train": {"steps": [1]}}, [], ["train.steps"]),
        ({}, ["train.schedule=linaer"], ["constant, linear, cosine", "Did you mean 'linear'?"]),
        ({}, ["train.steps=0"], ["train.steps=0 must be at least 1"]),
        ({}, ["train.learning_rate=-1"], ["train.learning_rate=-1.0 must be above 0"]),
        ({}, ["train.learning_rate=nan"], ["train.learning_rate=nan: nan is not a finite number"]),
        ({}, ["adapter.dropout=1"], ["adapter.dropout=1.0"]),
        ({}, ["train.batch_size=6", "train.micro_batch_size=4"], ["not a multiple"]),
        ({}, ["mesh.data=-1", "mesh.fsdp=-1"], ["one of them may be -1"]),
        ({}, ["mesh.tensor=0"], ["mesh="]),
        ({}, ["adapter.rank_pattern={q_proj: 0}"], ["rank_pattern['q_proj']=0"]),
        ({}, ["resume=maybe"], ["resume='maybe' is not one of: false, true, auto."]),
        ({}, ["resume=1"], ["resume='1' is not one of"]),
        ({}, ["allow_change=[bass]"], ["allow_change: 'bass' is neither", "Did you mean 'base'?"]),
        ({}, ["allow_change=[train.step]"], ["base, tokenizer, template, data", "'train.steps'?"]),
        (
            {},
            ["train.report_to=[tensorbord]"],
            ["'tensorbord' is not one of: tensorboard, wandb, trackio.", "Did you mean"],
        ),
        ({}, ["train.report_to=none"], ["'none' is not one of", "[] reports to none of them"]),
        (
            {"data": {"train": ["a", "b"]}},
            [],
            ["data.train=['a', 'b'] is not text or a mapping of names to numbers or null"],
        ),
        ({}, ["data.train={}"], ["data.train: weights must be numbers above 0"]),
        ({}, ["data.train={a: 1, b: 0}"], ["weights must be numbers above 0, not {'b': 0.0}"]),
        ({}, ["data.train={a: -1}"], ["not {'a': -1.0}"]),
        ({}, ["data.train={a: x}"], ["data.train={'a': 'x'} has a='x', which is not a number"]),
        ({}, ["data.train={a: true}"], ["has a=True, which is not a number"]),
        ({}, ["data.train={a: .inf}"], ["data.train={'a': inf}: inf is not a finite number"]),
        ({}, ["data.train={a: .nan}"], ["data.train={'a': nan}: nan is not a finite number"]),
        ({}, ["data.train={a: null}"], ["has a=null, which is not a number"]),
        ({}, ["data.train=a", "data.eval_size=0"], ["data.eval_size=0.0 must be above 0"]),
        ({}, ["data.train=a", "data.eval_size=nan"], ["data.eval_size=nan: nan is not a finite"]),
        (
            {},
            ["data.train=a", "data.eval_size=2.5"],
            ["data.eval_size=2.5 must be a share below 1 or a whole number"],
        ),
        (
            {},
            ["data.train=a", "data.eval=b", "data.eval_size=2"],
            ["data.eval and data.eval_size are both set"],
        ),
        ({}, ["data.eval_size=2"], ["data.eval_size needs data.train, which is not set"]),
        ({}, ["data.drop_overlap=true"], ["data.drop_overlap needs data.train, which is not set"]),
        (
            {},
            ["data.train={a: 1, b: 1}", "data.streaming=true"],
            ["data.streaming takes one source"],
        ),
        (
            {},
            ["data.train=a", "data.streaming=true", "data.eval_size=2", "data.drop_overlap=true"],
            ["cannot hold rows out of a stream", "data.drop_overlap needs all of data.train"],
        ),
        ({}, ["data.stream_rows=0"], ["data.stream_rows=0 must be at least 1"]),
        ({}, ["data.on_bad_row=skip"], ["data.on_bad_row='skip' is not one of: error, drop."]),
        (
            {},
            ["train.early_stopping_patience=2"],
            ["train.early_stopping_patience needs data.eval (or data.eval_size) and"],
        ),
        (
            {},
            ["train.early_stopping_patience=2", "data.eval=b"],
            ["train.early_stopping_patience needs", "train.eval_every"],
        ),
        (
            {},
            ["train.load_best_model_at_end=true", "train.eval_every=2", "data.regression=b"],
            ["train.load_best_model_at_end needs data.eval"],
        ),
        (
            {},
            [*ANSWERED, "train.metric_for_best_model=exact_match"],
            ["train.metric_for_best_model=exact_match has no effect without"],
        ),
        (
            {},
            [*ANSWERED, BEST, "train.metric_for_best_model=exact_mach"],
            ["'exact_mach' is not measured", "Did you mean 'exact_match'?"],
        ),
        (
            {},
            [*ANSWERED, BEST, "train.metric_for_best_model=task_accuracy"],
            ["'task_accuracy' is not measured; choose task_loss, regression_loss or one of"],
        ),
        (
            {},
            ["train.objective=dpo", "data.eval=b", BEST, "train.metric_for_best_model=task_margin"],
            ["train.load_best_model_at_end needs data.eval (or data.eval_size) and train.eval_"],
        ),
        (
            {},
            [*ANSWERED, BEST, "train.metric_for_best_model=exact_match"],
            ["train.load_best_model_at_end by exact_match needs", "set eval.generate_every=2"],
        ),
        (
            {},
            [*ANSWERED, BEST, "train.metric_for_best_model=exact_match", "eval.generate_every=4"],
            ["needs answers at every evaluation: set eval.generate_every=2"],
        ),
        (
            {},
            [*ANSWERED, BEST, "train.metric_for_best_model=regression_loss"],
            ["train.load_best_model_at_end by regression_loss needs data.regression"],
        ),
        (
            {},
            [*ANSWERED, "eval.generate_every=3"],
            ["eval.generate_every=3 is not a multiple of train.eval_every=2"],
        ),
        (
            {},
            ["data.eval=b", "eval.generate_every=3"],
            ["eval.generate_every=3 is not a multiple of train.eval_every=None"],
        ),
        (
            {},
            [*ANSWERED, "eval.generate_every=2", "eval.generate=false"],
            ["eval.generate_every=2 needs data.eval (or data.eval_size) and eval.generate=true"],
        ),
        ({}, ["eval.generate_every=0"], ["eval.generate_every=0 must be at least 1"]),
        (
            {},
            ["data.eval=b", "train.eval_every=2", "train.early_stopping_patience=0"],
            ["train.early_stopping_patience=0 must be at least 1"],
        ),
        ({}, ["train.divergence=1"], ["train.divergence=1.0 must be above 1; null never stops"]),
        ({}, ["train.divergence=nan"], ["train.divergence=nan: nan is not a finite"]),
        ({}, ["train.eval_every=0"], ["train.eval_every=0 must be at least 1"]),
        ({}, ["train.save_every=0"], ["train.save_every=0 must be at least 1"]),
        ({}, ["train.save_total_limit=0"], ["train.save_total_limit=0 must be at least 1"]),
        ({}, ["train.log_every=0"], ["train.log_every=0 must be at least 1"]),
        ({}, ["eval.generate_examples=0"], ["eval.generate_examples=0 must be at least 1"]),
        ({"model": ""}, [], ["model is not set"]),
    ],
)
def test_mistakes_are_named(content, overrides, expected):
    with pytest.raises(UserError) as raised:
        parse({"model": "m"} | content, overrides)
    assert all(text in str(raised.value) for text in expected), str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["resume=auto"], "resume", "auto"),
        (["resume=true"], "resume", True),
        (["allow_change=[base, train]"], "allow_change", ["base", "train"]),
        (["train.report_to=[wandb, trackio]"], "train.report_to", ["wandb", "trackio"]),
        (["data.train={a.jsonl: 3, org/name: 0.5}"], "data.train", {"a.jsonl": 3, "org/name": 0.5}),
        (["data.train={a: 1}", "data.streaming=true"], "data.streaming", True),
        (["data.train=a", "data.eval_size=0.25"], "data.eval_size", 0.25),
        (["data.train=a", "data.eval_size=30"], "data.eval_size", 30.0),
        (["train.divergence=null"], "train.divergence", None),
        (
            ["data.eval=b", "train.eval_every=2", "train.early_stopping_patience=3"],
            "train.early_stopping_patience",
            3,
        ),
        (
            [*ANSWERED, BEST, "eval.generate_every=2", "train.metric_for_best_model=exact_match"],
            "train.metric_for_best_model",
            "exact_match",
        ),
        ([*ANSWERED, "eval.generate_every=4"], "eval.generate_every", 4),
        (
            ["data.train=a", "data.eval_size=2", "train.eval_every=2"]
            + ["train.load_best_model_at_end=true"],
            "train.load_best_model_at_end",
            True,
        ),
    ],
)
def test_what_is_right_is_taken_and_comes_back_from_a_dump(tmp_path, overrides, key, expected):
    config = parse({"model": "m"}, overrides)
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected
    file = tmp_path / "config.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(file) == config


def test_problems_of_a_kind_are_told_together():
    with pytest.raises(UserError) as raised:
        parse({"trian": 1, "model": "m"}, ["train.stepz=1", "train.steps=x"])
    assert all(text in str(raised.value) for text in ("trian", "stepz", "train.steps"))
    with pytest.raises(UserError) as raised:
        parse({"model": ""}, ["train.steps=0", "train.schedule=none", "adapter.alpha=0"])
    assert len(str(raised.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- a\n- b\n", "must be a mapping of settings, not a list"),
        (b"just text", "must be a mapping of settings, not the value 'just text'"),
        (b"a: [1", "is not valid YAML"),
        (b"a: \xff\xfe", r"config\.yaml cannot be read: the text is not UTF-8"),
        (b"", "model is not set"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, expected):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load(file)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "missing.yaml")


def test_a_config_that_may_not_be_read(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text("model: m")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load(file)


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: a\nseed: 1\nseed: 2\n")
    with pytest.raises(
        UserError,
        match=r"c\.yaml is not valid YAML: line 3, column 1: the key 'seed'",
    ):
        load(file)


def test_an_override_of_a_mapping_takes_its_place():
    content = {"model": "m", "data": {"train": {"a": 0.5, "b": 0.5}}}
    content["adapter"] = {"rank_pattern": {"q_proj": 4}}
    overrides = ["data.train={c.jsonl: 1}", "adapter.rank_pattern={k_proj: 2}"]
    config = parse(content, overrides)
    assert config.data.train == {"c.jsonl": 1}
    assert config.adapter.rank_pattern == {"k_proj": 2}
    assert parse(content, ["adapter.rank_pattern.v_proj=8"]).adapter.rank_pattern == {
        "q_proj": 4,
        "v_proj": 8,
    }
    assert parse(content, ["data.train=d.jsonl"]).data.train == "d.jsonl"
