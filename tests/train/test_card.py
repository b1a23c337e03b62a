"""Exports that others can use: permissions, the base's name, a model card that the hub can read."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lora_jax import demo, models
from lora_jax.cli import main, train_main
from lora_jax.errors import UserError
from lora_jax.formats import card, hub
from lora_jax.formats.directories import new_directory

SYSTEM = 'Say it in "German", with ``` and a | and $HOME.'


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A run that writes all there is to write, under a umask that shuts others out."""
    output = tmp_path_factory.mktemp("card") / "out"
    command = ["--config", str(files / "run.yaml"), f"output_dir={output}", "export.merged=true"]
    command += [
        "data.max_length=128",
        f"data.eval={files / 'rows.jsonl'}",
        f"data.system_prompt={json.dumps(SYSTEM)}",
    ]
    before = os.umask(0o027)
    try:
        assert train_main(command) == 0
    finally:
        os.umask(before)
    return output


def modes(directory):
    """Permissions of everything below a directory and of itself, by kind."""
    found = {"file": set(), "directory": set()}
    for path in (directory, *directory.rglob("*")):
        kind = "directory" if path.is_dir() else "file"
        found[kind].add(stat.S_IMODE(path.stat().st_mode))
    return found


def test_everything_of_a_run_has_the_permissions_of_the_umask(run):
    assert modes(run) == {"file": {0o640}, "directory": {0o750}}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_exports_have_the_permissions_of_the_umask(run, tmp_path, umask):
    before = os.umask(umask)
    try:
        command = ["export", "--run", str(run), "--format", "peft", "--output"]
        assert main([*command, str(tmp_path / "adapter")]) == 0
        with new_directory(tmp_path / "new") as directory:
            (directory / "below").mkdir()
            (directory / "below" / "private").touch(0o600)
    finally:
        os.umask(before)
    expected = {"file": {0o666 & ~umask}, "directory": {0o777 & ~umask}}
    assert modes(tmp_path / "adapter") == modes(tmp_path / "new") == expected
    assert not list(tmp_path.glob(".*"))


def read_card(directory):
    found = ModelCard.load(directory / "README.md")
    return found.data.to_dict(), found.text


def test_the_card_of_an_adapter(run, files):
    fields, text = read_card(run / "adapter")
    assert fields == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora_jax"],  # the base is a directory, which the hub would refuse
    }
    summary = json.loads((run / "summary.json").read_text())["task"]
    loss = f"| {summary['loss_before']:.4g} | {summary['loss_after']:.4g} |"
    assert f"| held-out data: loss (nats per token) {loss}" in text
    assert "| held-out data: exact match | 0 | " in text
    for row in ("data.train | rows.jsonl", "adapter.rank | 4", "train.steps | 2", "seed | 0"):
        assert f"| {row} |" in text
    assert "PeftModel.from_pretrained(base" in text and "AutoModelForCausalLM" in text
    assert "lora-jax generate --model path/to/model --adapter" in text
    assert "--max-lora-rank 8 " in text
    assert f"--system-prompt '{SYSTEM}'" in text and "````bash" in text
    assert "| lora_jax | " in text and "| jax | " in text
    for file in (run / "adapter" / "README.md", run / "merged" / "README.md"):
        assert str(files) not in file.read_text() and str(Path.home()) + "/" not in file.read_text()
    blocks = re.findall(r"^```python\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    compile(blocks[0], "card", "exec")


def test_the_card_of_a_merged_model(run):
    fields, text = read_card(run / "merged")
    assert fields["library_name"] == "transformers" and "lora" not in fields["tags"]
    assert "AutoModelForCausalLM.from_pretrained(" in text and "PeftModel" not in text


def test_an_export_has_the_card_of_the_run(run, tmp_path):
    command = ["export", "--run", str(run), "--format"]
    for kind, name in (("peft", "adapter"), ("hf", "merged")):
        assert main([*command, kind, "--output", str(tmp_path / name)]) == 0
        for file in ("README.md", "adapter_config.json", "lora_jax.json"):
            if (run / name / file).is_file():
                assert (tmp_path / name / file).read_bytes() == (run / name / file).read_bytes()


def test_the_base_is_named_so_that_others_find_it(run, files, tmp_path, capsys):
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(files / "model")
    stored = json.loads((adapter / "lora_jax.json").read_text())
    assert stored["base_model"] == str(files / "model")
    # The digests, not the name, say whether a run may go on from it.
    command = ["--config", str(files / "run.yaml"), f"adapter.path={adapter}"]
    assert train_main([*command, f"output_dir={tmp_path / 'more'}", "train.steps=1"]) == 0
    stored["fingerprint"]["base"] = "sha256:" + "0" * 64
    (adapter / "lora_jax.json").write_text(json.dumps(stored))
    assert train_main([*command, f"output_dir={tmp_path / 'other'}"]) == 2
    assert "base: the base model's weights are not those" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "name", "license"),
    [
        ("demo:smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("demo:gemma3-270m", "google/gemma-3-270m", "gemma"),
        ("demo:all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
        ("org/name", "org/name", None),
    ],
)
def test_names_on_the_hub(spec, name, license, tmp_path):
    assert hub.public_name(spec) == name
    text = card.adapter_card(card.Base(spec), "CAUSAL_LM", 16, [], {})
    (tmp_path / "README.md").write_text(text)
    fields, body = read_card(tmp_path)
    assert fields["base_model"] == name and fields.get("license") == license
    assert f"base_model:adapter:{name}" in fields["tags"]
    assert f'from_pretrained("{name}")' in body and f"vllm serve {name} " in body
    assert f"generate --model {spec} " in body
    assert ("dequantised" in body) == (spec in ("demo:smollm2-135m-instruct", "demo:gemma3-270m"))


def test_every_demo_model_has_a_name_on_the_hub():
    models = {"smollm2-135m-instruct", "gemma3-270m", "all-minilm-l6-v2"}
    names = {name for package in demo.PACKAGES for name in package.names}
    assert {name for name in names if demo.origin(name)} == models
    assert demo.origin("usaddress") is None and demo.origin("nothing") is None


def test_local_models_are_named_by_their_absolute_path(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    assert hub.public_name("model") == str(files / "model")
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert hub.public_name("org/name") == str(tmp_path / "org" / "name")
    assert card.Base("org/name").hub_name is None
    with pytest.raises(UserError, match="does not exist"):
        hub.public_name("./nothing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# x\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("---\nlicense: [mit, bsd]\n---\n", {}),
        ("---\n: : {\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("# no front matter\n---\nlicense: mit\n---\n", {}),
        ("\udcff", {}),
    ],
)
def test_the_licence_is_that_of_the_base(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text, errors="surrogateescape")
    assert card.Base("org/name", tmp_path).licence() == expected
    assert card.Base("org/name", tmp_path / "none").licence() == {}


@pytest.mark.parametrize(
    ("rank", "problems", "expected"),
    [
        (1, [], "--max-lora-rank 8 "),
        (320, [], "--max-lora-rank 320 "),
        (513, [], "vLLM does not load it as it is: rank 513 is above 512"),
        (8, ["no DoRA"], "vLLM does not load it as it is: no DoRA"),
    ],
)
def test_vllm(rank, problems, expected):
    assert expected in card.adapter_card(card.Base("org/name"), "CAUSAL_LM", rank, problems, {})


def test_a_classifier_is_loaded_as_one():
    text = card.adapter_card(card.Base("org/name"), "SEQ_CLS", 8, [], {})
    assert "AutoModelForSequenceClassification" in text and "text-classification" in text
    assert "generate" not in text and "vllm" not in text


def test_models_that_read_images_are_loaded_as_such():
    model = models.describe({"model_type": "qwen3_vl"})
    for text in (
        card.adapter_card(card.Base("org/name"), card.task_of(model), 8, [], {}),
        card.model_card(card.Base("org/name"), card.task_of(model), {}),
    ):
        assert "AutoModelForImageTextToText" in text and "image-text-to-text" in text


def test_cells_hold_their_text():
    rows = card.table(["a"], [["x|y\nz"], [0.123456], ["w" * 1000]]).splitlines()
    assert rows[2:4] == ["| x\\|y z |", "| 0.1235 |"] and len(rows[4]) < 400
    assert card.table(["a"], []) == ""
