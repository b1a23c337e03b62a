"""YAML and overrides by the types of their settings: slips, keys from elsewhere, hostile texts."""

import dataclasses

import pytest

from lora_jax import AdapterConfig
from lora_jax.config import Config, dump, find_unused, load, parse
from lora_jax.errors import UserError


@pytest.fixture
def read(tmp_path):
    """Load a YAML text, with overrides; a model is named."""

    def run(text, *overrides):
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return load(file, ["model=m", *overrides])

    return run


@pytest.fixture
def refused(read):
    def run(text, *overrides):
        with pytest.raises(UserError) as raised:
            read(text, *overrides)
        message = str(raised.value)
        assert len(message) < 4000 and "Traceback" not in message
        return message

    return run


# One value where a list is meant


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("train.report_to", "tensorboard", ["tensorboard"]),
        ("eval.metrics", "exact_match", ["exact_match"]),
        ("adapter.modules_to_save", "lm_head", ["lm_head"]),
        ("adapter.trainable_token_indices", "5", [5]),
        ("data.ignore_columns", "id", ["id"]),
        ("data.text", "premise", ["premise"]),
        ("allow_change", "base", ["base"]),
        ("ignore_config_fields", "logit_scale", ["logit_scale"]),
        ("adapter.target_modules", "q_proj", "q_proj"),  # a regex as well: it stays text
        ("adapter.layers_to_transform", "1", 1),
    ],
)
def test_one_value_is_a_list_of_one(read, key, text, expected):
    section, _, name = key.rpartition(".")
    by_file = read(f"{section}: {{{name}: {text}}}\n" if section else f"{name}: {text}\n")
    by_override = read("", f"{key}={text}")
    for config in (by_file, by_override):
        node = getattr(config, section) if section else config
        assert getattr(node, name) == expected


def test_text_is_not_read_as_something_else(read):
    """YAML 1.1 would make booleans, octal numbers and sexagesimal ones of them."""
    data = read("data: {labels: [yes, no, on], label: no, prompt: 010, eval: 1:30}\n").data
    assert (data.labels, data.label, data.prompt) == (["yes", "no", "on"], "no", "010")
    assert data.eval == "1:30"
    kwargs = read("data: {chat_template_kwargs: {a: no, b: 'no', c: 1e-3, d: [1, {e: ~}]}}\n").data
    assert kwargs.chat_template_kwargs == {"a": False, "b": "no", "c": 1e-3, "d": [1, {"e": None}]}


def test_merge_keys_and_anchors(read):
    text = "adapter: &a {rank: 4}\ndata: {chat_template_kwargs: {<<: *a, x: 1}}\n"
    assert read(text).data.chat_template_kwargs == {"rank": 4, "x": 1}


# Keys that are known from elsewhere


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("r", "'adapter.rank'"),
        ("adapter.r", "'adapter.rank'"),
        ("adapter.lora_alpha", "'adapter.alpha'"),
        ("lora_dropout", "'adapter.dropout'"),
        ("epochs", "'train.epochs'"),
        ("train.num_train_epochs", "'train.epochs'"),
        ("lr", "'train.learning_rate'"),
        ("train.lr", "'train.learning_rate'"),
        ("gradient_accumulation_steps", "'train.batch_size' or 'train.micro_batch_size'"),
        ("train.bf16", "'train.compute_dtype=bfloat16'"),
        ("fp16", "'train.compute_dtype=bfloat16'"),
        ("train.seed", "'seed'"),
        ("eval.every", "'train.eval_every'"),
        ("eval.eval_steps", "'train.eval_every'"),
        ("save_steps", "'train.save_every'"),
        ("logging_steps", "'train.log_every'"),
        ("per_device_train_batch_size", "'train.micro_batch_size' or 'train.batch_size'"),
        ("micro_batch_size", "'train.micro_batch_size'"),
        ("max_seq_length", "'data.max_length'"),
        ("sequence_len", "'data.max_length'"),
        ("train.max_steps", "'train.steps'"),
        ("warmup_ratio", "'train.warmup_steps'"),
        ("optim", "Leave 'optim' out: the optimizer is AdamW"),
        ("lr_scheduler_type", "'train.schedule'"),
        ("load_in_4bit", "'base_dtype=nf4'"),
        ("gradient_checkpointing", "'train.remat'"),
        ("dataset_name", "'data.train'"),
        ("datasets", "'data.train'"),
        ("model_name_or_path", "'model'"),
        ("train.output_dir", "'output_dir'"),
        ("adapter.task_type", "Leave 'task_type' out"),
        ("packing", "'data.packing'"),
        ("train.packing", "'data.packing'"),
        ("lora_target_modules", "'adapter.target_modules'"),
        ("weight_decay", "'train.weight_decay'"),
        ("batch_size", "'train.batch_size' or 'eval.batch_size'"),
        ("train.steps", "Write it as train: {steps: ..}"),  # a key with a dot, in a file
        ("train.learning_rat", "'learning_rate'"),
        ("learning_rat", "'train.learning_rate'"),
        ("eval.learning_rat", "'train.learning_rate'"),
    ],
)
def test_keys_from_elsewhere(refused, key, expected):
    section, _, name = key.rpartition(".")
    if key == "train.steps":
        message = refused("train.steps: 1\n")
    else:
        message = refused(f"{section}:\n  {name}: 1\n" if section else f"{name}: 1\n")
        assert expected in refused("", f"{key}=1")
    assert expected in message and f"unknown key {key!r}" in message
    assert (
        message.startswith("/")
        and f"run.yaml:{1 + bool(section) * (key != 'train.steps')}: " in message
    )


def test_adapter_is_a_section(refused):
    assert "adapter='qlora' must be a mapping of settings" in refused("adapter: qlora\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(r=4), "AdapterConfig has no r; it has: method, rank, alpha"),
        (dict(r=4), "Did you mean 'adapter.rank'?"),
        (dict(lora_alpha=4), "Did you mean 'adapter.alpha'?"),
        (dict(rnak=4), "Did you mean 'rank'?"),
    ],
)
def test_arguments_in_python_that_do_not_exist(arguments, expected):
    for kind in (UserError, TypeError):
        with pytest.raises(kind) as raised:
            AdapterConfig(**arguments)
        assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(rank=0), "rank=0 must be at least 1"),
        (dict(rank=-1), "rank=-1 must be at least 1"),
        (dict(rank=2.5), "rank=2.5 is not a whole number"),
        (dict(rank="8"), "rank='8' is not a whole number"),
        (dict(rank=True), "rank=true is not a whole number"),
        (dict(rank=float("inf")), "rank=inf is not a whole number"),
        (dict(rank=10**21), "must be at most 1,000,000"),
        (dict(rank=10**5000), "rank=a number of thousands of digits must be at most"),
        (dict(alpha=10**400), "must be at most 1,000,000"),
        (dict(alpha=float("nan")), "alpha=nan must be above 0"),
        (dict(alpha=float("inf")), "alpha=inf must be at most"),
        (dict(rank_pattern=["q_proj"]), "is not a mapping of names to whole numbers"),
        (dict(rank_pattern={"q_proj": 0}), "rank_pattern['q_proj']=0 must be at least 1"),
        (dict(modules_to_save="lm_head"), "modules_to_save='lm_head' is not a list of names"),
        (dict(dropout=float("nan")), "dropout=nan must be"),
        (dict(method="dora"), "method='dora' is not one of"),
        (dict(target_modules=5), "target_modules=5 is not text or a list of names"),
    ],
)
def test_values_in_python_fail_at_once(arguments, expected):
    with pytest.raises(UserError) as raised:
        AdapterConfig(**arguments)
    assert expected in str(raised.value)
    with pytest.raises(UserError):
        dataclasses.replace(AdapterConfig(), **arguments)


# Texts that are no settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "adapter:\n  rank_pattern: [q_proj]\n",
            "run.yaml:2: adapter.rank_pattern=['q_proj'] is not",
        ),
        ("data:\n  labels: {}\n", "run.yaml:2: data.labels={} is not a list of names"),
        ("train:\n  steps: 2026-13-45\n", "run.yaml:2: train.steps='2026-13-45' is not a whole"),
        ("seed: !!python/object:os.system x\n", "line 1, column 7: the tag !!python/object:os"),
        ("seed: !!binary x\n", "the tag !!binary is not supported"),
        ("seed: !!timestamp x\n", "run.yaml:1: seed='x' is not a whole number"),
        ("seed: !!int x\n", "run.yaml:1: seed='x' is not a whole number"),
        ("data: !!set {a, b}\n", "the tag !!set is not supported"),
        ("!!omap [a: b]\n", "the tag !!omap is not supported"),
        ("a: " + "[" * 500 + "]" * 500, "nested deeper than 32"),
        ("a: " + "{b: " * 500 + "}" * 500, "nested deeper than 32"),
        ("a: " + "[" * 100_000, "nested deeper than 32"),
        ("a: &a [*a]\n", "nested deeper than 32"),
        ("? [a, b]\n: c\n", "a key must be a name, not a list or a mapping"),
        ("{a: b}: c\n", "a key must be a name, not a list or a mapping"),
        ("5: a\n~: b\n", "run.yaml:1: unknown key '5'"),
        ('model: "\\ud800"\n', "line 1, column 8: text with half of a surrogate pair"),
        ('model: "a\\0b"\n', "text with a null character"),
        ("model: m\x07\n", "not valid YAML"),
        ("seed: 1\nseed: 1\n", "line 2, column 1: the key 'seed' appears twice"),
        ("seed: 1\n---\nseed: 2\n", "expected a single document"),
        ("\tseed: 1\n", "is not valid YAML: line 1, column 1"),
        ("<<: 5\n", "<< takes a mapping"),
        ("seed: *missing\n", "undefined alias"),
        ("train:\n", "run.yaml:1: train=null must be a mapping of settings; leave it out"),
        ("train:\n  steps: ???\n", "train.steps='???' is not a whole number"),
        ("train: {steps: 010}\n", "train.steps='010' is not a whole number"),
        ("train: {steps: '${oc.env:HOME}'}\n", "train.steps='${oc.env:HOME}' is not a whole"),
        ("train: {steps: " + "9" * 5000 + "}\n", "is a number of 5000 characters"),
        ("train: {steps: 1000000000000000000000}\n", "must be at most 1000000000"),
        ("eval: {metrics: ~}\n", "eval.metrics=null is not a list of names; [] is none"),
        ("output_dir: " + "x" * 300 + "\n", "run.yaml:1: output_dir='xxx"),
        ("\n".join(f"key{i}: 1" for i in range(500)), "... and 490 more"),
        ("x" * 2_000_001, "2,000,001 characters are too many for settings"),
    ],
)
def test_hostile_texts(refused, text, expected):
    assert expected in refused(text)


def test_aliases_that_blow_up(refused):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    assert "more than 50,000 values" in refused("\n".join(lines))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("=b", "is not of the form key.sub=value"),
        ("a=", "override 'a=': unknown key 'a'"),
        ("a.b.c.d=1", "override 'a.b.c.d=1': unknown key 'a'"),
        ("train.steps.x=1", "has no 'x'"),
        ("train..steps=1", "unknown key 'train.'"),
        ("data.train={a:", "override 'data.train={a:' is not valid YAML"),
        ("ünïcode=1", "unknown key 'ünïcode'"),
        ("train.steps=\udcff", "is not UTF-8"),
        ("model=a\0b", "has a null character"),
        ("train=5", "train=5 must be a mapping of settings"),
        ("train.steps=!!python/object:os.system x", "the tag !!python/object:os.system"),
        ("data.eval" + "x" * 5000 + "=1", "unknown key 'data.evalxxx"),
    ],
)
def test_hostile_overrides(refused, override, expected):
    assert expected in refused("", override)


def test_sections_and_items_in_overrides(read):
    assert read("train: {steps: 3, log_every: 2}\n", "train={steps: 5}").train.steps == 5
    names = read("", "adapter.rank_pattern.model.layers.0.self_attn.q_proj=2").adapter
    assert names.rank_pattern == {"model.layers.0.self_attn.q_proj": 2}
    nested = read("", "data.chat_template_kwargs.a.b=no").data.chat_template_kwargs
    assert nested == {"a": {"b": False}}


# Values that mean nothing


FLOATS = [
    *("train.learning_rate", "train.weight_decay", "train.epsilon", "train.grad_clip"),
    *("train.beta1", "train.beta2", "train.final_rate", "train.divergence", "train.epochs"),
    *("train.router_aux_loss_coef", "train.label_smoothing"),
    *("export.min_merge_cosine", "export.max_merge_kl"),
    *("data.eval_size", "adapter.alpha", "adapter.dropout", "adapter.eva_rho"),
    "adapter.lora_plus_ratio",
]


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", "-.inf", "1e999"])
def test_numbers_that_are_not_finite(refused, value):
    message = refused("", *(f"{key}={value}" for key in FLOATS))
    for key in FLOATS:
        assert f"{key}=" in message


def test_every_integer_has_a_bound(refused):
    kinds = {
        f"{section.name}.{f.name}"
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(section.type)
        for f in dataclasses.fields(section.type)
        if f.type in (int, int | None)
    } | {"seed"}
    for key in sorted(kinds):
        method = ["adapter.method=prompt"] if "virtual" in key else []
        assert f"{key}=" in refused("", f"{key}={10**20}", *method)
        assert f"{key}=" in refused("", f"{key}=-2", *method)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], None),
        (["train.final_rate=0.1"], None),
        (
            ["train.schedule=constant", "train.final_rate=0.1"],
            "train.final_rate=0.1 has no effect: train.schedule=constant does not decay",
        ),
        (["eval.max_new_tokens=9"], "eval.max_new_tokens=9 has no effect: neither data.eval nor"),
        (["eval.batch_size=2"], "eval.batch_size=2 has no effect: none of data.eval"),
        (["data.regression=r", "eval.batch_size=2"], None),
        (
            ["data.eval=e", "eval.generate=false", "eval.samples=1", "eval.generate_batch_size=2"],
            "eval.samples=1, eval.generate_batch_size=2 have no effect: eval.generate=false",
        ),
        (["data.stream_rows=5"], "data.stream_rows=5 has no effect: data.streaming=false"),
        (["export.dtype=float16"], "export.dtype='float16' has no effect: export.merged=false"),
        (["export.dtype=float16", "export.merged=true"], None),
        (["export.dtype=float16", "adapter.method=full"], None),
        (["data.train=a", "data.drop_overlap=true"], "data.drop_overlap=True has no effect"),
        (["allow_change=base"], "allow_change=['base'] has no effect"),
        (["allow_change=base", "resume=auto"], None),
        (["data.chat_template=none", "data.chat_template_kwargs={a: 1}"], "is plain text"),
    ],
)
def test_settings_without_effect(overrides, expected):
    found = list(find_unused(parse({"model": "m"}, overrides)))
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def test_settled_epochs_are_left_to_follow(read):
    config = read("", "train.epochs=2")
    settled = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7))
    assert read(dump(settled)) == config
