"""Every method as a run: what is resumed is what was not interrupted, what is exported is what was
trained.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import config as configs
from lora_jax import formats, lora, tree
from lora_jax.cli import main, train_main
from lora_jax.config import MeshConfig
from lora_jax.errors import UserError
from lora_jax.generate.answer import answer
from lora_jax.report.console import make_console
from lora_jax.sharding import make_mesh
from lora_jax.train import base, checkpoint, export, merged

from .tiny import distance, random_adapters, write_model

STEPS = ("train.steps=6", "train.save_every=3", "train.save_total_limit=null")
METHODS = {
    "dora": "adapter.use_dora=true adapter.use_rslora=true adapter.dropout=0.1",
    "lora-plus": "adapter.lora_plus_ratio=8",
    "frozen a, moments on the host": "adapter.freeze_a=true train.optimizer_memory=host",
    "pissa": "adapter.init=pissa adapter.use_rslora=true",
    "olora and dora": "adapter.init=olora adapter.use_dora=true",
    "nf4": "base_dtype=nf4 adapter.use_dora=true export.quantized_base=dequantized",
    "pissa over nf4": "base_dtype=nf4 adapter.init=pissa export.quantized_base=original",
    "eva, ranks that move": (
        "adapter.init=eva adapter.eva_rho=2 adapter.target_modules=[o_proj,up_proj]"
    ),
    "lora-ga, two batches in halves": (
        "adapter.init=lora_ga adapter.calibration_batches=2 train.micro_batch_size=2 "
        "adapter.target_modules=[o_proj,up_proj]"
    ),
    "loftq": (
        "base_dtype=nf4 adapter.init=loftq export.quantized_base=dequantized "
        "adapter.target_modules=[o_proj,up_proj]"
    ),
    "int8": "base_dtype=int8 export.quantized_base=original adapter.modules_to_save=[norm]",
    "embedding": "adapter.target_modules=[q_proj,embed_tokens]",
    "embedding and head": "adapter.target_modules=[embed_tokens] adapter.ensure_weight_tying=true",
    "head": "adapter.modules_to_save=[lm_head] adapter.ensure_weight_tying=false",
    "tokens": "adapter.trainable_token_indices=[4,9] train.weight_decay=0.1",
    "full": "adapter.method=full train.learning_rate=1e-3",
}


def train(files, output, *settings):
    command = ("--config", str(files / "run.yaml"), f"output_dir={output}", *STEPS, *settings)
    assert train_main([*command, "export.merged=true", "train.learning_rate=1e-2"]) == 0
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def reload(run):
    """The config of a run, its model on the base that it trained on, and its adapters."""
    config = export.load_run(run)
    described = formats.describe(formats.resolve(config.model))
    shapes = lora.shapes(described.params, config.adapter)
    adapters, _, _ = checkpoint.restore(run / "checkpoints", shapes)
    mesh = make_mesh(MeshConfig())
    params = base.reload_base(config, described.directory, described, mesh, adapters)
    return config, described.replace(params=params), adapters


@pytest.mark.long_table(4)
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_resumed_run_is_the_run_and_its_exports_are_its_model(files, tmp_path, settings):
    losses = train(files, tmp_path / "whole", *settings.split())
    assert losses[-1] < losses[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/6")
    (tmp_path / "cut/summary.json").unlink()
    assert train(files, tmp_path / "cut", *settings.split(), "resume=true") == losses
    ends = [checkpoint.read_record(tmp_path / run / "checkpoints") for run in ("whole", "cut")]
    assert ends[0]["step"] == 6 and ends[0]["leaves"] == ends[1]["leaves"]

    config, model, adapters = reload(tmp_path / "whole")
    tokens = np.random.default_rng(0).integers(0, 272, (2, 9))
    live = model.apply(lora.bind(model.params, adapters, config.adapter), tokens)
    merged = formats.load(tmp_path / "whole/merged")
    expected = live
    if config.export.quantized_base == "original":  # another model than the one that was trained
        original = formats.load(config.model)
        params = lora.residual(original.params, adapters, config.adapter)
        expected = original.apply(lora.bind(params, adapters, config.adapter), tokens)
        assert distance(expected, live) > 1e-4
    assert distance(merged.apply(merged.params, tokens), expected) < 1e-5
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    far = summary.get("merged_distance", {"dequantized": 0.0, "original": 1.0})
    assert far["dequantized"] == 0 < far["original"]
    assert ("merged_distance" in summary) == (
        config.base_dtype is not None and config.adapter.init != "loftq"
    )
    adapter = tmp_path / "whole/adapter"
    assert adapter.is_dir() == (config.adapter.method != "full")
    if adapter.is_dir() and not (config.base_dtype and config.adapter.init == "pissa"):
        plain = formats.load(config.model, dtype=config.base_dtype)
        read, settings = formats.read_adapter(adapter, plain.params)
        again = plain.apply(lora.bind(plain.params, read, settings), tokens)
        assert distance(again, live) < 1e-5
        size = sum(x.size for x in jax.tree.leaves(read))
        assert summary["adapter_bytes"] == 4 * size or settings.rank_pattern  # padded here


def test_ranks_that_eva_moved_stand_in_the_config_and_are_found_again(files, tmp_path, refused):
    settings = ("adapter.init=eva", "adapter.eva_rho=2", "adapter.target_modules=[o_proj,up_proj]")
    train(files, tmp_path / "run", *settings)
    given = configs.load(files / "run.yaml").adapter
    resolved = export.load_run(tmp_path / "run").adapter
    ranks = [resolved.rank_pattern.get(name, resolved.rank) for name in resolved.target_modules]
    assert len(set(ranks)) > 1 and max(ranks) <= 2 * given.rank and min(ranks) >= 1
    assert sum(ranks) == 2 * 2 * given.rank
    # What was asked for, and what came of it, both go on; anything else is another run.
    command = [str(tmp_path / "run/config.yaml"), f"output_dir={tmp_path / 'run'}"]
    assert train_main(["--config", *command, "resume=true"]) == 0
    again = ("--config", files / "run.yaml", command[1], *STEPS, *settings, "resume=true")
    found = refused(train_main, *again, "adapter.rank_pattern={q_proj: 2}")
    assert "adapter.rank_pattern" in found


def test_checkpoints_of_an_svd_init_hold_its_start_and_no_more(files, tmp_path):
    train(files, tmp_path / "run", "adapter.init=pissa", "adapter.rank=8")
    _, _, adapters = reload(tmp_path / "run")
    half = tree.nbytes(adapters) / 2
    arrays = checkpoint.read_record(tmp_path / "run/checkpoints")["leaves"].values()
    stored = sum(4 * int(np.prod(leaf["shape"])) for leaf in arrays)
    assert 4 * half <= stored <= 4.1 * half


TIED = {
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "head": dict(target_modules=["lm_head", "q_proj"], ensure_weight_tying=False),
    "both as one": dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "head as one": dict(target_modules=["lm_head"], ensure_weight_tying=True),
    "both apart": dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=False),
    "saved embedding": dict(modules_to_save=["embed_tokens"]),
    "saved head": dict(modules_to_save=["lm_head"], ensure_weight_tying=False),
    "saved as one": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tokens": dict(trainable_token_indices=[3, 200]),
}


# Fields of models of several stacks, of which layer 1 has attention, and a convolution of layer 3.
STACKS = {
    "lfm2": (
        {
            **{"architectures": ["Lfm2ForCausalLM"], "rms_norm_eps": None, "block_multiple_of": 8},
            "layer_types": ["conv", "full_attention", "conv", "conv"],
        },
        "conv.conv",
    ),
    "qwen3_next": (
        {
            **{"architectures": ["Qwen3NextForCausalLM"], "head_dim": 8, "mlp_only_layers": [2]},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 5},
            **{"linear_value_head_dim": 7, "num_experts": 4, "num_experts_per_tok": 2},
            **{"moe_intermediate_size": 12, "shared_expert_intermediate_size": 10},
            "layer_types": ["linear_attention", "full_attention"] + 2 * ["linear_attention"],
        },
        "linear_attn.conv1d",
    ),
}


@pytest.mark.parametrize("family", STACKS)
def test_a_model_of_several_stacks_is_resumed_and_exported(files, tmp_path, family):
    """In 4 bits, with filters of convolutions that train in full."""
    fields, conv = STACKS[family]
    model = write_model(tmp_path / "model", model_type=family, num_hidden_layers=4, **fields)
    settings = [f"model={model}", "base_dtype=nf4", "export.quantized_base=dequantized"]
    settings += [f"adapter.modules_to_save=[{conv}]"]
    losses = train(files, tmp_path / "whole", *settings)
    assert losses[-1] < losses[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/6")
    (tmp_path / "cut/summary.json").unlink()
    assert train(files, tmp_path / "cut", *settings, "resume=true") == losses
    ends = [checkpoint.read_record(tmp_path / run / "checkpoints") for run in ("whole", "cut")]
    assert ends[0]["leaves"] == ends[1]["leaves"]
    config, model, adapters = reload(tmp_path / "whole")
    tokens = np.random.default_rng(0).integers(0, 272, (2, 9))
    live = model.apply(lora.bind(model.params, adapters, config.adapter), tokens)
    merged = formats.load(tmp_path / "whole/merged")
    assert distance(merged.apply(merged.params, tokens), live) < 1e-5
    names = load_file(tmp_path / "whole/adapter/adapter_model.safetensors").keys()
    assert f"base_model.model.model.layers.3.{conv}.weight" in names
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in names


@pytest.mark.parametrize("fields", TIED.values(), ids=TIED)
def test_tied_embeddings_live_merged_and_in_transformers(tmp_path, fields):
    import torch
    import transformers

    directory = write_model(tmp_path / "model", tie_word_embeddings=True, seed=3)
    model = formats.load(directory)
    config = configs.parse({"model": str(directory), "adapter": fields | {"rank": 4}})
    params, adapters = lora.init(jax.random.key(0), model.params, config.adapter)
    adapters = random_adapters(adapters, seed=5)
    merged.export_merged(
        tmp_path / "merged", config, model.replace(params=params), adapters, make_console()
    )
    tokens = np.random.default_rng(1).integers(0, 272, (2, 9))
    live = model.apply(lora.bind(params, adapters, config.adapter), tokens)
    assert distance(live, model.apply(model.params, tokens)) > 0.01
    untied = not fields.get("ensure_weight_tying") and "trainable_token_indices" not in fields
    written = json.loads((tmp_path / "merged/config.json").read_text())
    assert written["tie_word_embeddings"] is not untied
    names = formats.tensors.list_tensors(tmp_path / "merged")
    assert ("lm_head.weight" in names) == untied
    again = formats.load(tmp_path / "merged")
    assert distance(again.apply(again.params, tokens), live) < 1e-5
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = oracle(torch.tensor(tokens)).logits.numpy()
    assert distance(logits, live) < 1e-5


@pytest.fixture
def refused(capsys):
    def run(command, *words):
        assert command([str(word) for word in words]) == 2
        return capsys.readouterr().err

    return run


def test_what_is_refused_before_anything_is_loaded(files, tmp_path, refused):
    def text(*settings):
        config = ("--config", files / "run.yaml", f"output_dir={tmp_path / 'run'}")
        return refused(train_main, *config, *settings)

    assert "quantized_base=dequantized" in text("base_dtype=nf4", "export.merged=true")
    found = text(
        "base_dtype=nf4", "adapter.modules_to_save=[q_proj]", "adapter.target_modules=[k_proj]"
    )
    assert "modules_to_save=['q_proj'] trains the weights" in found and "base_dtype" in found
    found = text(
        *("base_dtype=nf4", "adapter.init=loftq", "adapter.loftq_iter=2"),
        "export.quantized_base=dequantized",
    )
    assert "export.peft: init=loftq and loftq_iter=2" in found and "export.peft=false" in found
    found = text("adapter.init=eva", "data.train=null")
    assert "data.train is not set" in found
    found = text("base_dtype=int8", "adapter.method=full")
    assert "adapter.method=full" in found and "base_dtype=int8" in found
    one = ("adapter.target_modules=[embed_tokens]", "adapter.ensure_weight_tying=true")
    found = text(*one, "adapter.use_dora=true")
    assert "export.peft: use_dora=true and ensure_weight_tying=true" in found
    assert "lm_head, which is model.embed_tokens" in text("adapter.target_modules=[lm_head]")


def test_exports_of_a_finished_run(files, tmp_path, refused):
    run = tmp_path / "run"
    config = ("--config", files / "run.yaml", f"output_dir={run}", *STEPS[:1], "base_dtype=int8")
    assert train_main([str(word) for word in config]) == 0
    command = ("export", "--run", run, "--format", "hf", "--output", tmp_path / "merged")
    assert "Set export.quantized_base=dequantized" in refused(main, *command)
    found = refused(main, *command, "train.steps=3")
    assert "only settings of export can be given here, not train.steps=3" in found
    chosen = ("export.quantized_base=original", "export.dtype=bfloat16")
    assert main([str(word) for word in (*command, *chosen)]) == 0
    tensors = formats.tensors.list_tensors(tmp_path / "merged").values()
    assert {tensor.dtype.name for tensor in tensors} == {"bfloat16"}
    assert not list(tmp_path.glob(".merged*"))

    full = tmp_path / "full"
    settings = (f"output_dir={full}", "adapter.method=full", "train.steps=1")
    assert train_main([str(word) for word in ("--config", files / "run.yaml", *settings)]) == 0
    found = refused(main, "export", "--run", full, "--format", "peft", "--output", tmp_path / "x")
    assert "trained the whole model: it has no adapter" in found


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    directory = write_model(tmp_path / "model")
    model = formats.load(directory)
    config = configs.parse({"model": str(directory), "export": {"dtype": "float16"}})
    params, adapters = lora.init(jax.random.key(0), model.params, config.adapter)
    huge = jax.tree.map(lambda leaf: leaf + 1e3, adapters)
    with pytest.raises(UserError, match="float16 cannot hold"):
        merged.export_merged(
            tmp_path / "merged", config, model.replace(params=params), huge, make_console()
        )
    assert not (tmp_path / "merged").exists()


def test_a_run_goes_on_from_a_file_of_loralib(files, tmp_path, refused):
    rng = np.random.default_rng(0)
    tensors = {}
    for layer, rank in ((0, 4), (1, 5)):
        name = f"model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A"] = rng.standard_normal((rank, 32)).astype(np.float32)
        tensors[f"{name}.lora_B"] = rng.standard_normal((32, rank)).astype(np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    settings = [f"adapter.path={tmp_path / 'lora.safetensors'}", "adapter.alpha=6"]
    command = ["--config", str(files / "run.yaml"), f"output_dir={tmp_path / 'run'}", *settings]
    assert train_main([*command, "train.steps=1", "train.learning_rate=1e-30"]) == 0
    written = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    for name, array in tensors.items():
        assert np.allclose(written[f"base_model.model.{name}.weight"], array)
    peft = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    ranks = {name: peft["rank_pattern"].get(name, peft["r"]) for name in peft["target_modules"]}
    assert 4 in ranks.values() and 5 in (*ranks.values(), *peft["rank_pattern"].values())
    assert peft["lora_alpha"] == 6
    save_file(tensors | {"x.lora_A": np.zeros((2, 32), np.float32)}, tmp_path / "odd.safetensors")
    command = [f"output_dir={tmp_path / 'odd'}", f"adapter.path={tmp_path / 'odd.safetensors'}"]
    assert "x.lora_A" in refused(train_main, "--config", files / "run.yaml", *command)


@pytest.mark.parametrize("base_dtype", ["nf4", "int8", "bfloat16"])
def test_generate_takes_the_base_that_the_adapter_was_trained_on(files, capsys, base_dtype):
    command = ("generate", "--model", str(files / "model"), "--prompt", "one")
    assert main([*command, "--max-new-tokens", "4", "--base-dtype", base_dtype]) == 0
    quantized = answer(str(files / "model"), ["one"], max_new_tokens=4, base_dtype=base_dtype)
    assert capsys.readouterr().out == quantized[0] + "\n"


def test_a_dry_run_counts_what_trains_whole(files, capsys):
    settings = ("adapter.modules_to_save=[norm]", "adapter.trainable_token_indices=[1,2]")
    command = ("--config", str(files / "run.yaml"), f"output_dir={files / 'none'}", "--dry-run")
    assert train_main([*command, *settings, "adapter.target_modules=[q_proj]"]) == 0
    text = capsys.readouterr().out
    rank = configs.load(files / "run.yaml").adapter.rank
    assert f"{2 * rank * 64 + 32 + 2 * 32:,} trainable parameters" in text
    assert "model.norm" in text and "model.embed_tokens" in text
    assert train_main([*command, "adapter.method=full"]) == 0
    assert "24,224 trainable parameters || 0 frozen || 100.0000 %" in capsys.readouterr().out
