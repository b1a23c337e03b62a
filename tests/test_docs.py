"""The documentation names what exists: settings, commands, options, headings."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from lora_jax import cli
from lora_jax import config as configs
from lora_jax.config import elsewhere, reference

ROOT = Path(__file__).parents[1]
PAGES = ("configuration.md", "combine.md", "data.md", "pods.md", "troubleshooting.md")
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


def unknown_names(text):
    """Settings and commands in inline code that do not exist.

    `section.name` is a setting, and so is the name before `=` or `: `; `*.py` is a file.
    """
    wrong = []
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
        words = shlex.split(code) if code.startswith(("lora-jax", "python train.py")) else []
        if words[:1] == ["lora-jax"] and len(words) > 1:
            wrong += [code] * (words[1] not in cli.COMMANDS)
        wrong += [code for w in words if w.startswith("--") and w not in options()]
        for word in words[2:] or [code]:
            name = re.match(r"([a-z_0-9]+(?:\.[a-z_0-9]+)*)(=|: |$)", word)
            if name and not word.endswith(".py") and name[1] not in KEYS:
                section = name[1].partition(".")
                wrong += [code] * (section[0] in SECTIONS and bool(section[1]) or bool(name[2]))
    return wrong


def test_configuration_page_is_up_to_date():
    written = reference.to_markdown(SETTINGS) + "\n"
    command = "python -m lora_jax.config.reference > docs/configuration.md"
    assert page("configuration.md") == written, f"docs/configuration.md is old: {command}"


def test_every_setting_is_described_once_with_a_comment():
    assert [key for key, *_ in SETTINGS] == list(configs.all_keys(configs.Config, ""))
    assert not [key for key, _, _, comment in SETTINGS if not comment.strip()]
    by_key = {key: rest for key, *rest in SETTINGS}
    assert by_key["adapter.rank"] == ["int", "8", "r: inner size of the update a @ b (PEFT: r)"]
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
    assert not unknown_names(page(name))


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
