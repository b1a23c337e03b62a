"""Files that changed after a run are found by every command that reads them: base and adapter."""

import json
import shutil
from concurrent.futures import Future

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from lora_jax import hosts, session
from lora_jax.cli import main, train_main
from lora_jax.errors import UserError
from lora_jax.formats import digests, fingerprint

from .tiny import write_model, write_rows

LARGE = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with `model`, `rows.jsonl`, `run.yaml` and `run`, the output of two steps."""
    home = tmp_path_factory.mktemp("damage")
    model = write_model(home / "model", intermediate_size=1024)
    rows = str(write_rows(home / "rows.jsonl"))
    settings = {
        "model": str(model),
        "data": {"train": rows, "eval": rows, "max_length": 64},
        "adapter": {"rank": 4},
        "train": {"steps": 2, "batch_size": 4, "remat": "none"},
        "eval": {"batch_size": 4, "generate": False},
    }
    (home / "run.yaml").write_text(yaml.safe_dump(settings))
    assert train(home, home / "run") == 0
    return home


def train(home, output, *overrides):
    config = ["--config", str(home / "run.yaml"), f"output_dir={output}"]
    return train_main([*config, *overrides])


def resume(home, target, adapter, allowed=()):
    if not target.exists():
        shutil.copytree(home / "run", target)
    changes = ",".join(["train.steps", *allowed])
    return train(home, target, "resume=true", "train.steps=3", f"allow_change=[{changes}]")


def go_on(home, target, adapter, allowed=(), *more):
    changes = f"allow_change=[{','.join(allowed)}]"
    return train(home, target, f"adapter.path={adapter}", changes, *more)


def go_on_quantized(home, target, adapter, allowed=()):
    return go_on(home, target, adapter, allowed, "base_dtype=nf4")


def allow(allowed):
    return [word for name in allowed for word in ("--allow-change", name)]


def export(kind):
    def call(home, target, adapter, allowed=()):
        options = ["--run", str(home / "run"), "--format", kind, "--output", str(target)]
        return main(["export", *options, *allow(allowed)])

    return call


def evaluate(home, target, adapter, allowed=()):
    options = ["--config", str(home / "run.yaml"), "--adapter", str(adapter)]
    return main(["eval", *options, *allow(allowed)])


def generate(home, target, adapter, allowed=()):
    options = ["--model", str(home / "model"), "--adapter", str(adapter), "--prompt", "one"]
    return main(["generate", *options, "--max-new-tokens", "2", *allow(allowed)])


def combine(home, target, adapter, allowed=()):
    options = ["--model", str(home / "model"), "--adapter", f"{adapter}=0.5"]
    return main(["combine", *options, "--output", str(target), *allow(allowed)])


READ_BASE = {  # commands that load the weights of the base
    "resume": resume,
    "adapter.path": go_on,
    "adapter.path, quantised": go_on_quantized,
    "export hf": export("hf"),
    "eval": evaluate,
    "generate": generate,
}
COMPARE_BASE = READ_BASE | {"export peft": export("peft"), "combine": combine}
READ_ADAPTER = {
    name: COMPARE_BASE[name] for name in ("adapter.path", "eval", "generate", "combine")
}


@pytest.fixture
def base(home):
    """The file of the base's weights, which the test may damage."""
    file = home / "model" / "model.safetensors"
    content = file.read_bytes()
    yield file
    file.write_bytes(content)


def flip_exponents(file, count=40):
    """Flip the exponents of some weights, between those that evenly spread samples would see."""
    tensors = load_file(file)
    bits = tensors[LARGE].view(np.uint32).reshape(-1)
    starts = np.linspace(0, bits.nbytes - 256, 64)[:count].astype(int)
    bits[(starts + 1024) // 4] ^= 1 << 25
    save_file(tensors, file)


@pytest.mark.parametrize("command", COMPARE_BASE)
def test_a_damaged_base_is_refused_before_it_is_loaded(home, base, tmp_path, capsys, command):
    flip_exponents(base)
    capsys.readouterr()
    assert COMPARE_BASE[command](home, tmp_path / "out", home / "run" / "adapter") == 2
    printed = capsys.readouterr()
    assert "error: base: the base model's weights are not those that" in printed.err
    assert "list 'base' in allow_change" in printed.err and "loading" not in printed.out


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("command", READ_BASE)
def test_weights_that_are_not_finite_are_refused(home, base, tmp_path, capsys, command, value):
    tensors = load_file(base)
    tensors[LARGE][700, 5] = value
    save_file(tensors, base)
    capsys.readouterr()
    assert READ_BASE[command](home, tmp_path / "out", home / "run" / "adapter", ["base"]) == 2
    message = capsys.readouterr().err
    assert f"weights are infinite or not a number in:\n  {LARGE}" in message


@pytest.fixture
def adapter(home, tmp_path):
    """A copy of the adapter's directory, which the test may damage."""
    return shutil.copytree(home / "run" / "adapter", tmp_path / "adapter")


@pytest.mark.parametrize("command", READ_ADAPTER)
def test_a_damaged_adapter_is_refused(home, adapter, tmp_path, capsys, command):
    file = adapter / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert READ_ADAPTER[command](home, tmp_path / "out", adapter) == 2
    assert f"{file} is damaged, or was changed after it was exported" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter").exists()


def test_an_exported_adapter_carries_its_digest(home, tmp_path):
    assert export("peft")(home, tmp_path / "again", None) == 0
    for directory in (home / "run" / "adapter", tmp_path / "again"):
        about = json.loads((directory / "lora_jax.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
        assert about["digest"] == digests.of_arrays(tensors)
        assert about["fingerprint"]["base"] == fingerprint.base_digest(home / "model")


def test_a_second_start_reads_no_weights_for_the_digest(home, tmp_path, monkeypatch):
    read, original = [], digests._read_span
    monkeypatch.setattr(digests, "_TICK", 0)
    monkeypatch.setattr(
        digests, "_read_span", lambda span, *rest: read.append(span) or original(span, *rest)
    )
    assert generate(home, None, home / "run" / "adapter") == 0
    read.clear()
    for command in (evaluate, combine):
        assert command(home, tmp_path / "out", home / "run" / "adapter") == 0
    assert not read


def test_the_digest_of_an_earlier_version_is_not_compared(home, adapter, edit_json, capsys, caplog):
    about = json.loads((adapter / "lora_jax.json").read_text())
    old = about["fingerprint"] | {"base": "b" * 64}
    edit_json(adapter / "lora_jax.json", fingerprint=old)
    assert generate(home, None, adapter) == 0
    assert f"{adapter} has a digest of its base by another version" in caplog.text
    edit_json(adapter / "lora_jax.json", fingerprint=old | {"template": "c" * 64})
    capsys.readouterr()
    assert generate(home, None, adapter) == 2
    assert "error: template: the chat template is not the one" in capsys.readouterr().err


def test_hosts_with_other_weights_are_refused(monkeypatch):
    future = Future()
    future.set_result("sha256:1")
    assert session.settle_base(future) == "sha256:1"
    monkeypatch.setattr(hosts, "from_main", lambda make: "sha256:2")
    with pytest.raises(UserError, match="host 0 has other weights of the base than host 0"):
        session.settle_base(future)


def test_trained_tokens_over_a_head_that_config_json_ties(home, base, tmp_path, capsys):
    """The embedding and the head are two weights here, and in PEFT one."""
    tensors = load_file(base)
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, base)
    tokens = ["adapter.trainable_token_indices=[3]", "adapter.target_modules=[q_proj]"]
    capsys.readouterr()
    assert train(home, tmp_path / "no", *tokens, "--dry-run") == 2
    text = capsys.readouterr().err
    assert "error: export.peft: trainable_token_indices=[3]: " in text
    assert "config.json ties the output head" in text
    options = ("export.peft=false", "export.merged=true", "--dry-run")
    assert train(home, tmp_path / "yes", *tokens, *options) == 0

    run = shutil.copytree(home / "run", tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["adapter"]["trainable_token_indices"] = [3]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    export_command = ["export", "--run", str(run), "--format", "peft", "--allow-change", "base"]
    assert main([*export_command, "--output", str(tmp_path / "adapter")]) == 2
    assert "error: trainable_token_indices=[3]: " in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()
