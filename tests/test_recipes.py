"""The recipes in configs/: what they train on can be fetched, and each passes a dry run."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax import demo
from lora_jax.cli import main, train_main

from .train.test_classify import write_encoder
from .train.tiny import write_model

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
E2E_LINES = {
    "name : Aromi | family friendly : no||Aromi isn 't family - friendly , it 's £ 20 .": (
        "Aromi isn 't family-friendly, it's £20."
    ),
    "name : Aromi | area : riverside||Families do n't go there !": "Families don't go there!",
}
MESSAGES = [
    {
        "userInput": {"text": "6 a.m."},
        "context": {"requestedSlots": ["time"]},
        "labels": [{"slot": "time", "valueSpan": {"endIndex": 6}}],
    },
    {
        "userInput": {"text": "A table for 4 on Sunday"},
        "context": {},
        "labels": [
            {"slot": "people", "valueSpan": {"startIndex": 12, "endIndex": 13}},
            {"slot": "date", "valueSpan": {"startIndex": 17, "endIndex": 23}},
        ],
    },
    {"userInput": {"text": "Thanks"}},
]
TASKS = [
    {"instruction": "Add.", "instances": [{"input": "1 and 1", "output": "two, which is 2 " * 3}]},
    {"instruction": "Name a city.", "instances": [{"input": "", "output": "Oslo"}]},
]


@pytest.fixture
def script(tmp_path):
    """`configs/fetch.py`, and an address with small files in the place of those of GitHub."""
    names = runpy.run_path(str(CONFIGS / "fetch.py"))
    texts = {"e2e": "\n".join(E2E_LINES) + "\n", "restaurant8k": json.dumps(MESSAGES)}
    texts["usaddress-kl"] = "\n".join(map(json.dumps, TASKS)) + "\n"
    counts = {"e2e": len(E2E_LINES), "restaurant8k": len(MESSAGES), "usaddress-kl": 1}
    for recipe, files in names["FILES"].items():
        for name, (place, _) in files.items():
            source = tmp_path / "source" / place
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(texts[recipe], encoding="utf-8")
            files[name] = (place, counts[recipe])
    return names, f"{(tmp_path / 'source').as_uri()}/"


def test_fetched_files_become_rows(script, tmp_path):
    names, base = script
    for recipe in names["FILES"]:
        names["fetch"](recipe, tmp_path / "data", base)
    rows = [json.loads(x) for x in (tmp_path / "data/e2e_test.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == list(E2E_LINES.values())
    assert rows[0]["prompt"] == "name : Aromi | family friendly : no"
    lines = (tmp_path / "data/restaurant8k_train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "6 a.m.", "context": ["time"], "completion": '{"time": "6 a.m."}'},
        {
            "prompt": "A table for 4 on Sunday",
            "context": [],
            "completion": '{"people": "4", "date": "Sunday"}',
        },
        {"prompt": "Thanks", "context": [], "completion": "{}"},
    ]
    lines = [(tmp_path / f"data/general_{name}.jsonl").read_text() for name in ("replay", "test")]
    assert [json.loads(line) for line in lines] == [
        {"prompt": "Name a city.", "completion": "Oslo"},
        {"prompt": "Add.\n\n1 and 1", "completion": "two, which is 2 " * 3},
    ]


def test_a_source_that_is_missing_or_has_changed_ends_in_one_line(script, tmp_path):
    names, base = script
    name, (place, _) = next(iter(names["FILES"]["e2e"].items()))
    names["FILES"]["e2e"][name] = (place, 5)
    with pytest.raises(SystemExit, match="has 2 rows, not 5: it has changed"):
        names["fetch"]("e2e", tmp_path / "data", base)
    with pytest.raises(SystemExit, match=r"cannot fetch file:.*put the rows .* by hand"):
        names["fetch"]("restaurant8k", tmp_path / "data", f"{base}none/")
    assert not (tmp_path / "data").exists()


def make_pairs():
    """Run what the recipe of preferences says to run before it, with a base that learns nothing."""
    recipe, tiny = str(CONFIGS / "usaddress.yaml"), ("model=tiny", "data.regression=null")
    fast = ("train.steps=1", "train.warmup_steps=0", "eval.before=false", "eval.max_new_tokens=8")
    assert train_main(["--config", recipe, *tiny, *fast, "eval.generate=false"]) == 0
    adapter = ("--adapter", "runs/usaddress/adapter", "--predictions", "runs/answers.jsonl")
    run = ("--config", "runs/usaddress/config.yaml", "data.eval=demo:usaddress")
    assert main(["eval", *run, *adapter, *tiny, *fast, "eval.generate=true"]) == 0
    command = [sys.executable, str(CONFIGS / "pairs.py"), "runs/answers.jsonl", "runs/pairs.jsonl"]
    subprocess.run(command, check=True)
    lines = Path("runs/answers.jsonl").read_text().splitlines()
    answered = [line for line in map(json.loads, lines) if line["answer"].strip()]
    pairs = list(map(json.loads, Path("runs/pairs.jsonl").read_text().splitlines()))
    assert pairs == [
        {"prompt": x["prompt"], "chosen": x["references"][0], "rejected": x["answer"]}
        for x in answered
    ]


def test_pairs_are_wrong_answers_of_an_adapter(tmp_path, monkeypatch):
    names = runpy.run_path(str(CONFIGS / "pairs.py"))
    pairs, main_of_pairs = names["pairs"], names["main"]
    line = {"adapter": "a", "prompt": "p", "references": ["r", "s"], "answer": "t"}
    lines = [line | {"exact_match": 0.0}, line | {"exact_match": 1.0}]
    lines += [
        line | {"exact_match": 0.0, **other} for other in ({"adapter": "base"}, {"answer": " "})
    ]
    assert list(pairs(lines)) == [{"prompt": "p", "chosen": "r", "rejected": "t"}]
    source, target = tmp_path / "answers.jsonl", tmp_path / "pairs.jsonl"
    monkeypatch.setattr(sys, "argv", ["pairs.py", str(source), str(target)])
    for row, text in (
        (lines[1], "has no wrong answer of an adapter"),
        ({"step": 3, "exact_match": 0.0}, "lines without `adapter` or `exact_match`"),
    ):
        source.write_text(json.dumps(row) + "\n")
        with pytest.raises(SystemExit, match=text):
            main_of_pairs()
    assert not target.exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_a_dry_run(recipe, script, tmp_path, monkeypatch, capsys):
    """The base is a tiny one of the same kind, and the demo's rows are two of the same form."""
    names, base = script
    monkeypatch.chdir(tmp_path)
    is_classifier = recipe == "names"
    form = ("text", "label") if is_classifier else ("prompt", "completion")
    rows = [dict(zip(form, pair, strict=True)) for pair in (("the cat", "a"), ("oslo", "b"))]
    Path("demo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(demo, "path", lambda name: tmp_path / "demo.jsonl")
    monkeypatch.setattr(demo, "is_cached", lambda name: True)
    (write_encoder if is_classifier else write_model)(tmp_path / "tiny")
    command = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--dry-run", "model=tiny"]
    if recipe == "usaddress-dpo":
        assert train_main(command) == 2
        assert "runs/usaddress/adapter" in capsys.readouterr().err
        make_pairs()
    if recipe in names["FILES"]:
        assert train_main(command) == 2
        missing = re.search(r"data file data/(\S+) does not exist", capsys.readouterr().err)
        assert missing is not None and missing[1] in names["FILES"][recipe]
        names["fetch"](recipe, Path("data"), base)
    assert train_main(command) == 0
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed
    assert "data.train" in printed and "rows read" in printed


def test_recipes_name_nothing_outside_of_the_repository():
    for recipe in RECIPES:
        assert "../" not in (CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8")
