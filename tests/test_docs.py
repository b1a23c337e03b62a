"""The documentation names what exists: settings, commands, options, headings."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from lora_jax import cli
from lora_jax import config as configs
from lora_jax.config import elsewhere, reference

ROOT = Path(__file__).parents[1]
# Their code is arguments of functions.
PYTHON = {"any-flax-model.md", "several-adapters.md", "your-own-loop.md"}
PAGES = sorted({file.name for file in (ROOT / "docs").glob("*.md")} - PYTHON)
SETTINGS = reference.describe_config()
KEYS = {key for key, *_ in SETTINGS}
SECTIONS = {f.name for f in dataclasses.fields(configs.Config)} - KEYS


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def options():
    """First arguments of all calls of `add_argument`."""
    trees = [ast.parse(file.read_text()) for file in Path(cli.__file__).parent.glob("*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if hasattr(node, "func")]
    named = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    return {call.args[0].value for call in named}


def unknown_names(text, section=""):
    """Settings and commands in inline code that do not exist.

    `section.name` is a setting, and so is the name before `=` or `: `; `*.py` and `*.gguf` are
    files. On a page about a section its settings have no prefix.
    """
    wrong = []
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
        words = shlex.split(code) if code.startswith(("lora-jax", "python train.py")) else []
        if words[:1] == ["lora-jax"] and len(words) > 1:
            wrong += [code] * (words[1] not in cli.COMMANDS)
        wrong += [code for w in words if w.startswith("--") and w not in options()]
        for word in words[2:] or [code]:
            name = re.match(r"([a-z_0-9]+(?:\.[a-z_0-9]+)*)(=|: |$)", word)
            if (
                name
                and not word.endswith((".py", ".gguf"))
                and not {name[1], section + name[1]} & KEYS
            ):
                first = name[1].partition(".")
                wrong += [code] * (first[0] in SECTIONS and bool(first[1]) or bool(name[2]))
    return wrong


def test_configuration_page_is_up_to_date():
    written = reference.to_markdown(SETTINGS) + "\n"
    command = "python -m lora_jax.config.reference > docs/configuration.md"
    assert page("configuration.md") == written, f"docs/configuration.md is old: {command}"


def test_every_setting_is_described_once_with_a_comment():
    assert [key for key, *_ in SETTINGS] == list(configs.all_keys(configs.Config, ""))
    assert not [key for key, _, _, comment in SETTINGS if not comment.strip()]
    by_key = {key: rest for key, *rest in SETTINGS}
    comment = "r: inner size of the update a @ b (PEFT: r); 256 by default with method=vera"
    assert by_key["adapter.rank"] == ["int", "8", comment]
    assert by_key["train.grad_clip"][:2] == ["float | None", "1.0"]


def test_defaults_read_back_as_they_are_written():
    plain = configs.parse({"model": "demo:x"})
    # All but `model`, which has no usable default.
    overrides = [f"{key}={default}" for key, _, default, _ in SETTINGS if key != "model"]
    assert configs.parse({"model": "demo:x"}, overrides) == plain
    assert configs.parse({"model": "demo:x", "train": {"steps": 7}}, overrides) == plain


def test_every_page_is_linked_from_another():
    pages = {file.name: page(file.name) for file in (ROOT / "docs").glob("*.md")}
    texts = pages | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    for name in pages:
        others = [text for other, text in texts.items() if other != name]
        assert any(re.search(rf"\]\((docs/)?{name}[#)]", text) for text in others), name


@pytest.mark.parametrize("name", PAGES)
def test_named_settings_and_commands_exist(name):
    assert not unknown_names(page(name), "adapter." if name == "methods.md" else "")


@pytest.mark.parametrize(
    "code, known",
    [
        ("`train.remat`, `train.remat=full`, `resume: true`, `train.py`, `rank`, `a.jsonl`", True),
        ("`train.rematt`", False),
        ("`reusme: true`", False),
        ("`rank=8`", False),
        ("`adapter.lora_alpha=3`", False),
        ("`lora-jax generate --prompt hi`", True),
        ("`lora-jax generat --prompt hi`", False),
        ("`lora-jax generate --promt hi`", False),
        ("`python train.py --config a.yaml adapter.rnak=3`", False),
    ],
)
def test_unknown_names_are_found(code, known):
    assert (not unknown_names(code)) == known


def test_the_table_of_keys_from_elsewhere_is_that_of_the_errors():
    assert f"\n\n{elsewhere.to_markdown()}\n\n" in page("troubleshooting.md")
    known = [key for row in elsewhere.TABLE for key in row.keys]
    assert len(known) == len(set(known)) and not KEYS & set(known)
    for row in elsewhere.TABLE:
        assert {setting.partition("=")[0] for setting in row.here} <= KEYS
        assert row.here or row.remark


def test_yaml_examples_are_configs():
    examples = re.findall(r"```yaml\n(.*?)```", page("troubleshooting.md") + page("data.md"), re.S)
    assert len(examples) > 2
    for example in examples:
        configs.parse(yaml.safe_load(example), ["model=demo:x"])


def test_contents_link_to_the_headings_in_their_order():
    text = page("troubleshooting.md")
    headings = re.findall(r"^## (.+)$", text, re.M)
    anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
    contents = re.findall(r"^- \[(.+)\]\(#(.+)\)$", text, re.M)
    assert contents == list(zip(headings, anchors, strict=True)) and len(set(anchors)) > 15
    assert set(re.findall(r"\]\(#(.+?)\)", text)) <= set(anchors)
    for target in re.findall(r"\]\(([^#)]+)\)", text):
        assert (ROOT / "docs" / target).exists()


def test_links_of_the_readme_lead_to_pages_and_headings():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text)
    assert len(links) > 20
    for file, anchor in links:
        target = ROOT / (file or "README.md")
        assert target.exists(), file
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{file}#{anchor}"


def test_the_api_pages_name_what_exists_and_describes_itself():
    pages = "".join(file.read_text() for file in (ROOT / "docs" / "api").glob("*.md"))
    names = re.findall(r"^\.\. (?:auto|py:)\w+:: lora_jax\.([\w.]+)", pages, re.M)
    assert len(names) > 50 and len(names) == len(set(names))
    for name in names:
        found, *rest = importlib.import_module("lora_jax"), *name.split(".")
        for depth, part in enumerate(rest, start=1):
            if not hasattr(found, part):
                importlib.import_module(".".join(("lora_jax", *rest[:depth])))
            found = getattr(found, part)
        assert found.__doc__, f"{name} has no docstring"


def test_the_result_of_the_quickstart_is_the_same_everywhere():
    """Pages and picture repeat the figures of one run, which are in docs/images/quickstart.json."""
    found = json.loads((ROOT / "docs/images/quickstart.json").read_text())
    task, general = found["task"], found["regression"]
    rows = {
        "held-out task: loss (nats per token)": (task["loss_before"], task["loss_after"]),
        "held-out task: exact match": (task["exact_match_before"], task["exact_match_after"]),
        "regression set: loss (nats per token)": (general["loss_before"], general["loss_after"]),
    }
    for text in (page("quickstart.md"), (ROOT / "README.md").read_text(encoding="utf-8")):
        lines = [re.sub(r" +", " ", line) for line in text.splitlines()]
        for label, (before, after) in rows.items():
            assert f"│ {label} │ {before:.4f} │ {after:.4f} │" in lines
        assert f"trained {found['trainable_parameters']:,} of " in text
    cells = f"| {task['loss_after']:.4f} | {task['exact_match_after']:.2f} |"
    assert cells in page("measured.md") and len(found["loss"]) == found["steps"]


def test_every_page_is_in_a_table_of_contents_of_the_site():
    trees = re.findall(r"```\{toctree\}\n(.*?)```", page("index.md") + page("scale.md"), re.S)
    listed = {line for tree in trees for line in tree.splitlines() if line and line[0] != ":"}
    pages = {file.stem for file in (ROOT / "docs").glob("*.md")} - {"index"}
    books = {f"notebooks/{file.stem}" for file in (ROOT / "notebooks").glob("*.ipynb")}
    assert listed == pages | books | {"api/index"}


def test_tables_of_runs_are_those_of_their_summaries(monkeypatch, tmp_path):
    """`python docs/tables.py --write` changes nothing, and stores the summary of a run."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tables", tables)
    spec.loader.exec_module(tables)
    for table in tables.TABLES:
        text = (ROOT / table.page).read_text(encoding="utf-8")
        assert tables.replaced(text, table) == text, "run python docs/tables.py --write"
    run = tmp_path / "quickstart"
    run.mkdir()
    summary = dict(tables.load("quickstart"))
    lines = [json.dumps({"step": i, "loss": loss}) for i, loss in enumerate(summary.pop("loss"))]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    summary["task"]["loss_after"], summary["checkpoint_bytes"] = 0.5, 53_900_000
    (run / "summary.json").write_text(json.dumps(summary | {"seconds": 3.0}))
    monkeypatch.setattr(tables, "STORED", tmp_path)
    tables.store(run)
    stored = tables.load("quickstart")
    assert stored == summary | {"loss": [json.loads(line)["loss"] for line in lines]}
    shown = tables.console_lines(stored)
    assert "2.0302 │ 0.5000" in shown[1] and shown[-1].endswith("checkpoint 53.90 MB")
