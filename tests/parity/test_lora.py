"""LoRA and rsLoRA against PEFT: its files in, our files out, logits, gradients, training curves,
A's distribution.
"""

import copy
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import scipy.stats
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lora_jax import AdapterConfig, Config, formats, lora
from lora_jax.config import TrainConfig
from lora_jax.targets import find_targets
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.step import batch_sums, make_train_step
from lora_jax.tree import unflatten

from ..engines import complete

TOLERANCE = 1e-5
SEEDS = (0, 1)
UNTIED = dict(tie_word_embeddings=False)
TIED = dict(tie_word_embeddings=True)

# name -> (base, fields of AdapterConfig); PEFT takes the same fields, but for the names of rank and
# alpha.
TARGETING = {
    "names": (UNTIED, dict(rank=4, alpha=6.0, target_modules=["q_proj", "v_proj"])),
    "names, rsLoRA, tied": (
        TIED,
        dict(rank=4, alpha=6.0, target_modules=["q_proj", "down_proj"], use_rslora=True),
    ),
    "full paths": (
        TIED,
        dict(
            rank=3,
            alpha=8.0,
            target_modules=["model.layers.1.self_attn.k_proj", "layers.0.mlp.up_proj"],
        ),
    ),
    "regex": (
        UNTIED,
        dict(
            rank=3, alpha=8.0, target_modules=r"model\.layers\.\d+\.(self_attn\.[ko]|mlp\.up)_proj"
        ),
    ),
    "all-linear": (UNTIED, dict(rank=4, alpha=2.0, target_modules="all-linear")),
    "all-linear, tied, rsLoRA": (
        TIED,
        dict(rank=4, alpha=2.0, target_modules="all-linear", use_rslora=True),
    ),
    "exclude names": (
        UNTIED,
        dict(
            rank=2,
            alpha=5.0,
            target_modules=["k_proj", "o_proj"],
            exclude_modules=["0.self_attn.k_proj"],
        ),
    ),
    "exclude regex": (
        TIED,
        dict(rank=2, alpha=5.0, target_modules="all-linear", exclude_modules=r".*\.1\.mlp\..*"),
    ),
    "one layer": (
        UNTIED,
        dict(rank=3, alpha=4.0, target_modules=["gate_proj", "q_proj"], layers_to_transform=1),
    ),
    "layers": (
        TIED,
        dict(rank=3, alpha=4.0, target_modules=["gate_proj", "q_proj"], layers_to_transform=[0, 2]),
    ),
    "rank_pattern": (
        UNTIED,
        dict(
            rank=4,
            alpha=6.0,
            target_modules=["q_proj", "v_proj", "up_proj"],
            rank_pattern={r"layers\.[01]\.self_attn\.q_proj": 2, "q_proj": 7, "up_proj": 1},
        ),
    ),
    "alpha_pattern": (
        UNTIED,
        dict(
            rank=4,
            alpha=6.0,
            target_modules=["q_proj", "v_proj"],
            alpha_pattern={r"1\.self_attn\.(q|v)_proj": 20.0, "v_proj": 2.5},
        ),
    ),
    "both patterns, rsLoRA, tied": (
        TIED,
        dict(
            rank=3,
            alpha=6.0,
            target_modules=["q_proj", "v_proj", "o_proj"],
            use_rslora=True,
            rank_pattern={"model.layers.2.self_attn.q_proj": 6, "o_proj": 1},
            alpha_pattern={"q_proj": 9.0},
        ),
    ),
    "head": (UNTIED, dict(rank=4, alpha=6.0, target_modules=["lm_head", "v_proj"])),
    "head and one layer": (
        UNTIED,
        dict(rank=4, alpha=6.0, target_modules=["lm_head", "v_proj"], layers_to_transform=[1]),
    ),
}
CASES = pytest.mark.parametrize(("base", "fields"), TARGETING.values(), ids=TARGETING)
# Forms that PEFT's constructor refuses; what they select can be written for it all the same.
OURS_ONLY = {
    "all-linear in layers": (
        UNTIED,
        dict(rank=2, alpha=4.0, target_modules="all-linear", layers_to_transform=[1, 2]),
    ),
    "regex in a layer": (
        TIED,
        dict(rank=2, alpha=4.0, target_modules=r".*\.(q|up)_proj", layers_to_transform=0),
    ),
}


def to_peft(fields) -> peft.LoraConfig:
    names = {"rank": "r", "alpha": "lora_alpha"}
    given = {names.get(name, name): value for name, value in fields.items()}
    return peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **given)


def adapter_parameters(peft_model) -> dict[str, torch.nn.Parameter]:
    """PEFT's adapter matrices by their names in its files."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in peft_model.named_parameters()
        if "lora_" in name
    }


def random_peft_model(oracle, fields, seed):
    peft_model = peft.get_peft_model(copy.deepcopy(oracle), to_peft(fields))
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in adapter_parameters(peft_model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return peft_model


def by_name(adapters, targets) -> dict[str, np.ndarray]:
    """Our tree in PEFT's names and layout, padding cut off."""
    found = {}
    for target in targets:
        module = adapters
        for key in target.path:
            module = module[key]
        for i, (name, rank) in enumerate(zip(target.names, target.ranks, strict=True)):
            if rank:
                a, b = (np.asarray(module[part]) for part in ("lora_a", "lora_b"))
                a, b = (a[i], b[i]) if target.stacked else (a, b)
                found[f"base_model.model.{name}.lora_A.weight"] = a[:, :rank].T
                found[f"base_model.model.{name}.lora_B.weight"] = b[:rank].T
    return found


def random_adapters(params, config, seed) -> dict:
    """Adapters with A and B random where they are real, and zero in the padding."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for target in find_targets(params, config):
        lead = (len(target.ranks),) if target.stacked else ()
        mask = target.rank_mask()
        a = 0.1 * rng.standard_normal((*lead, target.shape[0], target.rank))
        b = 0.1 * rng.standard_normal((*lead, target.rank, target.shape[1]))
        leaves[(*target.path, "lora_a")] = jnp.asarray(a * mask, jnp.float32)
        leaves[(*target.path, "lora_b")] = jnp.asarray(b * np.swapaxes(mask, -1, -2), jnp.float32)
    return unflatten(leaves)


def make_batch(seed, rows=4, time=15) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Tokens of which a part is supervised, for us and for transformers."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 97, (rows, time), dtype=np.int32)
    supervised = rng.random((rows, time)) < 0.6
    supervised[0, :12] = False  # rows with unequal counts: a mean of means would differ
    ours = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(time, dtype=np.int32), tokens.shape).copy(),
        "loss_weights": supervised.astype(np.float32),
    }
    labels = np.where(supervised, tokens, -100)
    return ours, {
        "input_ids": torch.tensor(tokens).long(),
        "labels": torch.tensor(labels).long(),
    }


def torch_logits(module, tokens) -> np.ndarray:
    with torch.no_grad():
        return module(torch.tensor(np.asarray(tokens)).long(), use_cache=False).logits.numpy()


@pytest.mark.long_table(5)
@CASES
def test_files_of_peft_give_its_logits_losses_and_gradients(
    tiny_llama, tmp_path, error, base, fields
):
    compiled = None
    for seed in SEEDS:
        directory, oracle = tiny_llama(seed, num_hidden_layers=3, **base)
        peft_model = random_peft_model(oracle, fields, seed)
        peft_model.save_pretrained(tmp_path / f"adapter{seed}", save_embedding_layers=False)
        model = formats.load(directory)
        adapters, config = formats.read_adapter(tmp_path / f"adapter{seed}", model.params)
        targets = find_targets(model.params, config)
        parameters = adapter_parameters(peft_model)
        ours = by_name(adapters, targets)
        assert set(ours) == set(parameters)
        assert sum(target.parameters for target in targets) == sum(
            parameter.numel() for parameter in parameters.values()
        )

        def losses(adapters, params, batch, model=model, config=config):
            bound = lora.bind(params, adapters, config)
            total, weight = batch_sums(model, bound, batch, Config(adapter=config), "full")
            return total / weight, model.apply(bound, batch["tokens"])

        compiled = compiled or jax.jit(jax.value_and_grad(losses, has_aux=True))
        batch, inputs = make_batch(seed)
        (loss, logits), gradients = compiled(adapters, model.params, batch)
        output = peft_model(**inputs)
        output.loss.backward()
        expected = output.logits.detach().numpy()
        assert error(logits, expected) < TOLERANCE
        assert error(expected, torch_logits(oracle, batch["tokens"])) > 1e-2
        assert error(loss, output.loss.item()) < TOLERANCE
        for name, gradient in by_name(gradients, targets).items():
            assert np.abs(gradient).max() > 1e-4, name
            assert error(gradient, parameters[name].grad.numpy()) < TOLERANCE, name


@pytest.mark.parametrize(
    ("name", "micro_batch_size"),
    [
        ("names", None),
        ("names", 2),
        ("all-linear, tied, rsLoRA", None),
        ("both patterns, rsLoRA, tied", None),
        ("head", None),
    ],
)
def test_five_steps_of_adamw(tiny_llama, tmp_path, error, name, micro_batch_size):
    base, fields = TARGETING[name]
    train = TrainConfig(
        steps=5,
        batch_size=4,
        micro_batch_size=micro_batch_size,
        learning_rate=2e-3,
        schedule="constant",
        weight_decay=0.1,
        beta1=0.8,
        beta2=0.95,
        epsilon=1e-6,
        grad_clip=0.2,
    )
    step = None
    for seed in SEEDS:
        directory, oracle = tiny_llama(seed, num_hidden_layers=3, **base)
        peft_model = random_peft_model(oracle, fields, seed)
        peft_model.save_pretrained(tmp_path / f"adapter{seed}", save_embedding_layers=False)
        model = formats.load(directory)
        adapters, config = formats.read_adapter(tmp_path / f"adapter{seed}", model.params)
        targets = find_targets(model.params, config)
        optimizer = make_optimizer(train)
        step = step or make_train_step(model, Config(adapter=config, train=train), optimizer)
        opt_state = optimizer.init(adapters)
        parameters = adapter_parameters(peft_model)
        start = {name: value.detach().numpy().copy() for name, value in parameters.items()}
        adamw = torch.optim.AdamW(
            parameters.values(), lr=2e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1
        )
        losses = []
        for number in range(5):
            batch, inputs = make_batch(10 * seed + number)
            adapters, opt_state, metrics = step(
                adapters, opt_state, model.params, batch, jax.random.key(number)
            )
            adamw.zero_grad()
            loss = peft_model(**inputs).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.2)
            adamw.step()
            assert norm > 0.4, "the clip must bind"
            assert error(metrics["grad_norm"], norm.item()) < TOLERANCE
            assert error(metrics["loss"], loss.item()) < TOLERANCE
            losses.append(loss.item())
        for name, value in by_name(adapters, targets).items():
            expected = parameters[name].detach().numpy()
            assert error(value, expected) < TOLERANCE, name
            assert np.abs(expected - start[name]).max() > 2e-3, name


def test_a_is_distributed_as_in_peft_and_nothing_changes_at_first(tiny_llama):
    """Every A times sqrt(in), pooled: uniform on (-1, 1) here and there."""
    directory, oracle = tiny_llama(num_hidden_layers=4)
    model = formats.load(directory)
    fields = dict(rank=16, alpha=32.0, target_modules="all-linear")
    tokens = make_batch(0)[0]["tokens"]
    apply = jax.jit(model.apply)
    for seed in SEEDS:
        torch.manual_seed(seed)
        theirs = adapter_parameters(peft.get_peft_model(copy.deepcopy(oracle), to_peft(fields)))
        config = AdapterConfig(**fields)
        params, adapters = lora.init(jax.random.key(seed), model.params, config)
        assert params is model.params
        ours = by_name(adapters, find_targets(params, config))
        assert set(ours) == set(theirs)
        pools = []
        for source in (ours, {name: value.detach().numpy() for name, value in theirs.items()}):
            scaled = {name: value * value.shape[1] ** 0.5 for name, value in source.items()}
            for name, value in scaled.items():
                if "lora_A" in name:
                    assert np.abs(value).max() <= 1 + 1e-6
                    assert np.abs(value).max() > 0.98
                else:
                    assert not value.any()
            pools.append(np.concatenate([x.ravel() for n, x in scaled.items() if "lora_A" in n]))
        assert scipy.stats.ks_2samp(*pools).pvalue > 0.01
        assert scipy.stats.kstest(pools[0], scipy.stats.uniform(-1, 2).cdf).pvalue > 0.01
        assert len(np.unique(pools[0])) > 0.99 * len(pools[0])  # no slice repeats another's draw
        np.testing.assert_array_equal(
            apply(lora.bind(params, adapters, config), tokens), apply(params, tokens)
        )


@pytest.mark.parametrize(
    ("base", "fields"), (TARGETING | OURS_ONLY).values(), ids=TARGETING | OURS_ONLY
)
def test_written_adapters_load_in_peft(tiny_llama, tmp_path, error, base, fields):
    apply = None
    for seed in SEEDS:
        directory, oracle = tiny_llama(seed, num_hidden_layers=3, **base)
        model = formats.load(directory)
        config = AdapterConfig(**fields)
        adapters = random_adapters(model.params, config, seed)
        target = tmp_path / f"written{seed}"
        formats.write_adapter(
            target, adapters, model.params, config, base_model="org/base", source=directory
        )
        apply = apply or jax.jit(
            lambda params, adapters, tokens, model=model, config=config: model.apply(
                lora.bind(params, adapters, config), tokens
            )
        )
        tokens = make_batch(seed)[0]["tokens"]
        expected = torch_logits(oracle, tokens)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), target)
        logits = apply(model.params, adapters, tokens)
        assert error(logits, torch_logits(loaded, tokens)) < TOLERANCE
        assert error(logits, expected) > 1e-2
        file = load_file(target / "adapter_model.safetensors")
        ours = by_name(adapters, find_targets(model.params, config))
        assert {name: value.shape for name, value in file.items()} == {
            name: value.shape for name, value in ours.items()
        }
        again, read = formats.read_adapter(target, model.params)
        assert jax.tree.structure(again) == jax.tree.structure(adapters)
        jax.tree.map(np.testing.assert_array_equal, again, adapters)
        assert (read.rank, read.alpha) == (config.rank, config.alpha)


WRITE_IN_A_PROCESS = """
import sys
import jax, numpy as np
from pathlib import Path
from lora_jax import AdapterConfig, formats, lora
model = formats.describe(Path(sys.argv[1]))
config = AdapterConfig(rank=4, target_modules=["v_proj", "q_proj", "up_proj", "lm_head"],
                       rank_pattern={"q_proj": 2, "v_proj": 3},
                       alpha_pattern={"up_proj": 3.5, "lm_head": 1.0})
adapters = lora.init(jax.random.key(3), model.params, config)[1]
formats.write_adapter(Path(sys.argv[2]), adapters, model.params, config, base_model="org/base",
                      source=Path(sys.argv[1]), extra={"b": 1, "a": {"d": 2, "c": 3}})
"""


def test_two_exports_are_equal_byte_for_byte(tiny_llama, tmp_path):
    directory, _ = tiny_llama()
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE_IN_A_PROCESS, str(directory), str(tmp_path / hash_seed)],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
        )
        for hash_seed in ("1", "2")
    ]
    assert [run.wait() for run in runs] == [0, 0]
    files = [
        {file.name: file.read_bytes() for file in (tmp_path / hash_seed).iterdir()}
        for hash_seed in ("1", "2")
    ]
    assert files[0] == files[1]
    assert set(files[0]) == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "lora_jax.json",
        "tokenizer.json",
    }  # fmt: skip
    written = json.loads(files[0]["adapter_config.json"])
    assert written["target_modules"] == ["lm_head", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize("name", ["all-linear", "both patterns, rsLoRA, tied", "head"])
def test_live_peft_and_merged_agree(tiny_llama, tmp_path, error, name):
    """Logits and greedy tokens of the bound model, of its PEFT export and of its merged export."""
    base, fields = TARGETING[name]
    directory, oracle = tiny_llama(num_hidden_layers=3, **base)
    model = formats.load(directory)
    config = AdapterConfig(**fields)
    adapters = random_adapters(model.params, config, 5)
    bound = lora.bind(model.params, adapters, config)
    merged = lora.merge(bound)
    formats.write_adapter(tmp_path / "adapter", adapters, model.params, config, base_model="base")
    formats.write_model(tmp_path / "merged", model, merged, directory)
    in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(oracle), tmp_path / "adapter")
    in_transformers, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = make_batch(0)[0]["tokens"]
    apply = jax.jit(model.apply)
    live = apply(bound, tokens)
    assert error(live, torch_logits(oracle, tokens)) > 1e-2
    assert error(live, torch_logits(in_peft, tokens)) < TOLERANCE
    assert error(live, torch_logits(in_transformers, tokens)) < TOLERANCE
    assert error(apply(merged, tokens), live) < TOLERANCE

    prompts = [tokens[0, :9].tolist(), tokens[1, :9].tolist()]
    answers = [complete(model, prompts, 10, params=params) for params in (bound, merged)]
    inputs = torch.tensor(prompts)
    for module in (in_peft, in_transformers, oracle):
        output = module.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(output[:, 9:].tolist())
    *adapted, unadapted = answers
    assert all(found == adapted[0] for found in adapted)
    assert unadapted != adapted[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_a_fresh_adapter_gives_the_base_back_bit_for_bit(tiny_llama, tmp_path, dtype):
    directory, _ = tiny_llama(dtype=dtype)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, value in tensors.items():
        if value.ndim == 2:
            value[0, ::2] = -0.0
            assert np.signbit(value[0, 0]), name
    save_file(tensors, file, metadata={"format": "pt"})
    model = formats.load(directory)
    config = AdapterConfig(target_modules="all-linear", rank_pattern={"q_proj": 2})
    params, adapters = lora.init(jax.random.key(0), model.params, config)
    merged = lora.merge(lora.bind(params, adapters, config))
    formats.write_model(tmp_path / "merged", model, merged, directory)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(written) == set(tensors)
    for name, value in tensors.items():
        assert written[name].dtype == value.dtype
        assert written[name].tobytes() == value.tobytes(), name


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
V1 = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def test_the_frozen_weight_that_peft_saves_beside_an_adapted_head_is_left_out(tiny_llama, tmp_path):
    directory, oracle = tiny_llama(**UNTIED)
    fields = dict(rank=3, alpha=8.0, target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        random_peft_model(oracle, fields, 0).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in tensors
    adapters, _ = formats.read_adapter(tmp_path / "adapter", formats.describe(directory).params)
    expected = tensors["base_model.model.lm_head.lora_A.weight"].T
    np.testing.assert_array_equal(adapters["lm_head"]["lora_a"], expected)
