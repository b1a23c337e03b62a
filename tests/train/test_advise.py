"""Advice on three models and data sets against the formulas of its sources, and what a sweep takes.

With one token per byte, an answer of c bytes has c + 1 supervised tokens.
"""

import json
import math
import re

import pytest
from rich.console import Console

from lora_jax import config as configs
from lora_jax.audit import advise as advising
from lora_jax.audit import rules
from lora_jax.audit.advice_text import advice_text, as_json, space_text
from lora_jax.cli import advise as command
from lora_jax.cli import main
from lora_jax.config import AdapterConfig, document
from lora_jax.models import describe
from lora_jax.sweep.schedule import list_trials
from lora_jax.sweep.space import load_space, parse_space
from lora_jax.targets import find_trainable

from .test_preference_runs import JUDGED, PAIRS
from .tiny import SUMS, TINY, write_rows, write_tokenizer

# config.json of models
SMOLLM2 = TINY | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
LLAMA_8B = TINY | {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 272,
    "n_positions": 256,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
}
ROOM = "data.max_length=224"  # of two answers
LONG = [{"prompt": f"n {i}", "completion": "x" * 999} for i in range(3000)]


@pytest.fixture
def make(tmp_path):
    """The config of a run over a model without weights, and rows."""

    def run(model, rows, *overrides):
        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(model))
        write_tokenizer(directory)
        content = {
            "model": str(directory),
            "data": {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "max_length": 64},
            "train": {"epochs": 1, "batch_size": 2},
        }
        return configs.parse(content, overrides)

    return run


@pytest.fixture
def advise(make):
    """Advice on a model and rows under some overrides."""
    quiet = Console(quiet=True)
    return lambda *given: advising.advise(make(*given), quiet)


def found(advice):
    return {line.setting: line for line in advice.lines}


def values(advice):
    return {line.setting: line.advice for line in advice.lines}


def trials(advice, *checks):
    space = parse_space(document.read(space_text(advice, checks), "space"))
    return list_trials(space, advice.config)


# Sources


@pytest.mark.parametrize(
    ("model_type", "hidden", "expected"),
    [
        ("llama", 4096, 5e-5 * 10 * (2000 / 4096) ** 0.781),
        ("llama", 2000, 5e-4),
        ("qwen3", 2560, 5e-5 * 10 * (2000 / 2560) ** 0.0775),
    ],
)
def test_rates_are_those_of_tinkers_rule(model_type, hidden, expected):
    (power,) = rules.powers(model_type)
    assert math.isclose(rules.full_rate(hidden, power) * 10, expected)
    given = rules.rate(model_type, hidden, steps=100)
    assert math.isclose(given.value, expected, rel_tol=0.05)  # two digits
    short = rules.rate(model_type, hidden, steps=99)
    assert math.isclose(short.value, 1.5 * expected, rel_tol=0.05)  # 15 in place of 10


# hidden size and best rate of tinker-cookbook's sweeps, models that configs name
BEST = {
    "llama": {2048: 1e-3, 3072: 1e-3, 4096: 3e-4, 8192: 3e-4},
    "qwen3": {2560: 1e-3, 4096: 1e-3, 5120: 3e-4},
    "qwen3_moe": {2048: 1e-3, 4096: 3e-4},
}


@pytest.mark.parametrize("model_type", BEST)
def test_ranges_hold_the_best_rates_of_tinkers_sweeps(model_type):
    for hidden, best in BEST[model_type].items():
        given = rules.rate(model_type, hidden, steps=780)
        assert given.holds(best), (hidden, given)
        assert any(0.5 < rate / best < 2 for rate in rules.rates_to_try(given))


def test_a_family_that_was_not_fitted_may_lie_outside():
    given = rules.rate("gpt_oss", 2880, steps=780)  # best at 1e-4, as docs/sweeps.md says
    low, high = (5e-4 * (2000 / 2880) ** power for power in (0.781, 0.0775))
    assert given == rules.Estimate(*map(rules.rounded, ((low * high) ** 0.5, low / 3, 3 * high)))
    assert not given.holds(1e-4)


def test_the_range_of_an_encoder_holds_the_rates_of_the_lora_paper():
    given = rules.rate("roberta", 768, steps=10_000)
    assert given.holds(4e-4) and given.holds(5e-4)


def test_defaults_are_those_of_trl():
    from trl import DPOConfig, KTOConfig, ModelConfig, SFTConfig

    default = lambda kind, name: kind.__dataclass_fields__[name].default  # noqa: E731
    for objective, kind in {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig}.items():
        assert default(kind, "learning_rate") == rules.TRL_RATES[objective]
    assert default(ModelConfig, "lora_r") == rules.TRL_RANK
    assert default(ModelConfig, "lora_alpha") == rules.ALPHA
    assert default(DPOConfig, "beta") == default(KTOConfig, "beta") == 0.1
    assert rules.preference_factor("simpo") == rules.preference_factor("dpo")
    assert math.isclose(rules.preference_factor("dpo"), 1 / 20)


def test_rslora_and_lora_have_one_scale_at_the_rank_of_the_alpha():
    for rank in (4, 16, 64):
        assert math.isclose(rules.rslora_alpha(32, rank) / math.sqrt(rank), 32 / rank)


# Three models and data sets


def test_a_tiny_model_and_few_rows(advise):
    advice = advise(TINY, SUMS)
    facts = advice.facts
    tokens = sum(len(row["completion"]) + 1 for row in SUMS)
    # q, k, v, o; gate, up, down of two layers
    per_rank = 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48))
    assert (facts.per_rank, facts.largest_rank, facts.hidden_size) == (per_rank, 16, 32)
    assert (facts.examples, facts.tokens, facts.seen) == (23, tokens, tokens)
    line = found(advice)["train.learning_rate"]
    rate = 5e-5 * 15 * (2000 / 32) ** 0.781
    assert line.advice == float(f"{rate:.1e}") and "extrapolated" in line.reason
    assert line.range == f"{rules.numeral(rate / 5)} to {rules.numeral(rate * 5)}"
    assert "short run" in line.reason
    assert line.fits == (rate / 5 <= 1e-3)
    assert values(advice)["adapter.rank"] == 16 and found(advice)["adapter.rank"].range == "1 to 16"
    assert values(advice)["train.batch_size"] == 1  # fewer than 100 rows
    assert found(advice)["adapter.alpha"].verdict == "in range"  # 16, and 32 is advised


def test_the_demo_model_and_its_steps(advise):
    rows = [{"prompt": f"n {i}", "completion": "x" * 20} for i in range(1288)]
    settings = ("data.packing=false", "train.epochs=null", "train.steps=400", "train.batch_size=2")
    advice = advise(SMOLLM2, rows, *settings)
    assert advice.facts.parameters == 134_515_008
    assert advice.facts.per_rank * 16 == 4_884_480  # of PEFT
    assert advice.facts.tokens == 1288 * 21 and advice.facts.seen == 800 * 21
    rate = 5e-5 * 10 * (2000 / 576) ** 0.781
    assert values(advice)["train.learning_rate"] == float(f"{rate:.1e}") == 1.3e-3
    assert values(advice)["train.batch_size"] == 8  # 800 rows, and 100 steps
    assert found(advice)["train.batch_size"].range == "1 to 32"
    assert advice.held == {"train.steps": 100}
    assert values(advice)["adapter.rank"] == 16 and found(advice)["adapter.rank"].range == "1 to 64"
    targets = found(advice)["adapter.target_modules"].axis["targets"]
    attention = 30 * (2 * (576 + 576) + 2 * (576 + 192))
    assert targets[1] == {
        "adapter.target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "adapter.rank": round(16 * 305_280 / attention),
    }


def test_a_large_model_and_many_tokens(advise):
    settings = ("data.max_length=1100", "data.packing=false", "adapter.target_modules=[q_proj]")
    advice = advise(LLAMA_8B, LONG, *settings, "adapter.use_rslora=true")
    assert advice.facts.parameters == 8_030_261_248
    assert advice.facts.per_rank * 16 == 41_943_040  # of PEFT
    assert advice.facts.seen == 3_000_000
    assert rules.least_rank(3_000_000, 2_621_440) == 2
    assert found(advice)["adapter.rank"].range == "2 to 64"
    assert values(advice)["train.learning_rate"] == 2.9e-4
    assert found(advice)["train.learning_rate"].range == "9.5e-5 to 8.6e-4"
    assert values(advice)["train.batch_size"] == 16  # 3,000 rows
    verdicts = {line.setting: line.verdict for line in advice.lines}
    assert verdicts["adapter.target_modules"] == verdicts["adapter.use_rslora"] == "outside"
    assert rules.rank(500_000_000, 2_621_440, 1024) == rules.Estimate(256, 256, 1024)
    assert rules.rank(10**10, 2_621_440, 1024) == rules.Estimate(1024, 1024, 1024)


@pytest.mark.parametrize("objective", ["sft", "ipo"])
def test_the_rows_decide_on_the_objective(advise, objective):
    advice = advise(TINY, PAIRS, ROOM, f"train.objective={objective}")
    line = found(advice)["train.objective"]
    assert line.advice == ("dpo" if objective == "sft" else "ipo")
    assert line.verdict == ("outside" if objective == "sft" else "same")
    rate = 5e-5 * 15 * (2000 / 32) ** 0.781 / 20
    assert values(advice)["train.learning_rate"] == float(f"{rate:.1e}")
    assert line.axis == {"objective.beta": [0.033, 0.1, 0.3]}
    assert {one.config.train.objective for one in trials(advice)} == {line.advice}


def test_answers_with_labels_and_rows_with_one_answer(advise):
    assert values(advise(TINY, JUDGED, ROOM, "train.objective=kto"))["train.objective"] == "kto"
    marked = [row | {"label": bool(row["label"])} for row in JUDGED]
    assert values(advise(TINY, marked, ROOM))["train.objective"] == "kto"
    line = found(advise(TINY, SUMS, "train.objective=dpo"))["train.objective"]
    assert (line.advice, line.verdict) == ("sft", "outside")


def test_a_stream_counts_every_token(advise):
    settings = ("data.streaming=true", "train.epochs=null", "train.steps=50")
    facts = advise(TINY, SUMS, *settings, "data.stream_rows=10").facts
    assert facts.streamed and facts.examples == 10 and facts.seen > facts.tokens


def test_an_adapter_that_is_trained_further_keeps_its_form(advise):
    advice = advise(TINY, SUMS, "adapter.path=adapter")
    assert list(advice.checks) == ["rate", "plus", "batch"]
    assert "adapter.rank" not in trials(advice)[0].settings
    assert "keeps its rank" in advice_text(advice)


# Spaces


@pytest.mark.parametrize("model", [TINY, GPT2, BERT], ids=lambda one: one["model_type"])
def test_every_check_is_a_space_of_trials_that_run(advise, model):
    rows = SUMS
    if model is BERT:
        rows = [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(40)]
    advice = advise(model, rows, "adapter.lora_plus_ratio=4", "adapter.alpha=16")
    params = describe(model).params
    for name in advice.checks:
        made = trials(advice, name)
        assert len(made) > 1
        counts = set()
        for trial in made:
            adapter = trial.config.adapter
            assert adapter.alpha == 32 or name in ("alpha", "rslora")
            assert adapter.lora_plus_ratio == 1 or name == "plus"
            counts.add(find_trainable(params, adapter).parameters)
        if name == "targets":
            assert len(made) == 3 and max(counts) < 1.3 * min(counts)
        assert all(
            f"--check {other}" in space_text(advice, [name])
            for other in advice.checks
            if other != name
        )
    assert len(trials(advice)) == 5 * len(advice.checks["rank"]["adapter.rank"])
    assert len(trials(advice, "batch", "rate")) == 5 * len(advice.checks["batch"]["batch"])


def test_targets_are_compared_at_equal_parameters():
    params = describe(SMOLLM2).params
    whole = find_trainable(params, AdapterConfig(rank=16)).parameters
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    of_attention = find_trainable(params, AdapterConfig(rank=1, target_modules=attention))
    rank = rules.equal_rank(16, whole // 16, of_attention.parameters)
    same = find_trainable(params, AdapterConfig(rank=rank, target_modules=attention))
    assert abs(same.parameters / whole - 1) < 0.02


# The command


@pytest.fixture
def config_file(make, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(configs.dump(make(TINY, SUMS)))
    return file


def test_text_json_and_space(config_file, tmp_path, capsys):
    space = tmp_path / "space.yaml"
    given = ["advise", "--config", str(config_file)]
    assert main([*given, "--space", str(space), "--check", "rank"]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("adapter.alpha"))
    assert row.split() == ["adapter.alpha", "16", "32", "16", "to", "64", "in", "range"]
    for name in (rules.REGRET, rules.RULE, rules.SWEEPS, rules.TRL, rules.LORA_PLUS, rules.RSLORA):
        assert f"\n{name}: {rules.SOURCES[name]}\n" in shown
    assert f"wrote {space}" in shown
    assert max(map(len, shown.splitlines()[1:-1])) <= 110
    assert load_space(space).points == 2
    assert main([*given, "--check", "rank", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["space"] == space.read_text()


def test_lines_have_a_reason_a_source_and_a_check(advise):
    advice = advise(TINY, PAIRS, ROOM, "train.objective=dpo")
    content = json.loads(json.dumps(as_json(advice, space_text(advice))))
    assert [line["name"] for line in content["advice"]] == list(command.CHECKS)
    for line in content["advice"]:
        assert line["reason"] and line["axis"] and {*line["sources"]} <= {*content["sources"]}
        assert line["sources"] and line["verdict"] in ("same", "in range", "outside")
    assert content["facts"]["per_rank"] == sum(
        content["facts"][f"per_rank_{name}"] for name in ("attention", "mlp")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["adapter.method=prompt"], "adapter.method=prompt: the advice is for method=lora"),
        (["adapter.method=full"], "docs/methods.md has the rates of other methods"),
        (["--check", "objective"], "--check objective: this config leaves nothing to check there"),
        (
            ["--check", "rank", "--check", "targets"],
            "--check rank and --check targets both vary adapter.rank",
        ),
        (["data.train=null"], "data.train is not set"),
        (["data.train=missing.jsonl"], "missing.jsonl"),
        (["--space", "{directory}"], "is a directory; give a file in it"),
        (["--space", "{directory}/run.yaml"], "run.yaml exists; choose another file, or delete it"),
        (["--space", "{directory}/none/space.yaml"], "No such file or directory"),
    ],
)
def test_mistakes(config_file, tmp_path, capsys, options, message):
    options = [one.replace("{directory}", str(tmp_path)) for one in options]
    assert main(["advise", "--config", str(config_file), *options]) == 2
    error = capsys.readouterr().err
    assert re.search(r"^error: ", error, re.MULTILINE) and message in error
    assert "Traceback" not in error
