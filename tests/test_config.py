"""One YAML file, one dataclass: what is read as what, and how mistakes are told."""

import dataclasses

import pytest

from lora_jax import config as configs
from lora_jax.config import Config, UserError, dump, load, parse

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
        ({}, ["train.steps=ten"], ["train.steps", "ten"]),
        ({}, ["train.steps=1.5"], ["train.steps", "1.5"]),
        ({}, ["train.steps=null"], ["train.steps"]),
        ({}, ["train.schedule=null"], ["train.schedule"]),
        ({}, ["train.steps=[1"], ["'train.steps=[1'", "cannot be read"]),
        ({"train": {"steps": "${x}"}}, [], ["steps"]),
        ({"train": {"steps": "???"}}, [], ["'???' is reserved"]),
        ({"train": 5}, [], ["train=5 must be a mapping of settings"]),
        ({"train": None}, [], ["train=None must be a mapping of settings"]),
        ({"train": {"steps": [1]}}, [], ["train.steps"]),
        ({}, ["train.schedule=linaer"], ["constant, linear, cosine", "Did you mean 'linear'?"]),
        ({}, ["train.steps=0"], ["train.steps=0 must be at least 1"]),
        ({}, ["train.learning_rate=-1"], ["train.learning_rate=-1.0 must be above 0"]),
        ({}, ["train.learning_rate=nan"], ["train.learning_rate=nan must be above 0"]),
        ({}, ["adapter.dropout=1"], ["adapter.dropout=1.0"]),
        ({}, ["train.batch_size=6", "train.micro_batch_size=4"], ["not a multiple"]),
        ({}, ["mesh.data=-1", "mesh.fsdp=-1"], ["one of them may be -1"]),
        ({}, ["mesh.tensor=0"], ["mesh="]),
        ({}, ["adapter.rank_pattern={q_proj: 0}"], ["rank_pattern['q_proj']=0"]),
        ({"model": ""}, [], ["model is not set"]),
    ],
)
def test_mistakes_are_named(content, overrides, expected):
    with pytest.raises(UserError) as raised:
        parse({"model": "m"} | content, overrides)
    assert all(text in str(raised.value) for text in expected), str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3


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
        (b"- a\n- b\n", "must hold a mapping of settings, not list"),
        (b"just text", "must hold a mapping of settings, not str"),
        (b"a: [1", "is not valid YAML"),
        (b"a: \xff\xfe", "is not valid YAML"),
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

    monkeypatch.setattr(configs.Path, "read_text", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load(file)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: a\nseed: 1\nseed: 2\n")
    with pytest.raises(UserError, match=r"'seed' stands there twice(?s:.*)line 3"):
        load(file)
