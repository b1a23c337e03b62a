"""`lora-jax combine` on files: PEFT loads what it writes, and mistakes leave nothing behind."""

import copy
import json
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_jax import AdapterConfig, formats
from lora_jax.cli import main
from lora_jax.formats import fingerprint

from .families import random_model
from .formats.test_matrices import BERT
from .formats.test_peft import (
    IGNORED,
    QV,
    TIED,
    UNTIED,
    make_tokens,
    random_adapters,
    torch_logits,
)
from .train.tiny import write_tokenizer

BIASED = UNTIED | dict(attention_bias=True, mlp_bias=True)
EXACT = 1e-6
WEIGHTS = (0.7, -1.3)


@pytest.fixture
def make(tiny_llama, tmp_path):
    """`make(base, fields, ...)`: a model directory, its torch model, and an adapter directory for
    each of `fields`.
    """

    def run(base, *fields, seed=0, prints=True):
        directory, oracle = tiny_llama(seed, **base)
        write_tokenizer(directory)
        model = formats.load(directory)
        paths = []
        for i, own in enumerate(fields):
            config = AdapterConfig(**dict(rank=4, alpha=6.0) | own)
            stored = {"base": fingerprint.base_digest(directory), "tokenizer": "t", "template": "c"}
            paths.append(tmp_path / f"adapter{i}")
            formats.write_adapter(
                paths[-1],
                random_adapters(model.params, config, 10 * seed + i),
                model.params,
                config,
                base_model=str(directory),
                source=directory,
                extra={"fingerprint": stored} if prints else None,
            )
        return directory, oracle, paths

    return run


@pytest.fixture
def run(capsys):
    """`run(arguments)` of combine that must go well; returns what it printed."""

    def call(*arguments):
        capsys.readouterr()
        status = main(["combine", *map(str, arguments)])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return call


@pytest.fixture
def refused(capsys, tmp_path):
    """The same that must fail and write nothing; returns its message."""

    def call(*arguments):
        capsys.readouterr()
        before = sorted(tmp_path.iterdir())
        assert main(["combine", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err and printed.out == ""
        assert sorted(tmp_path.iterdir()) == before
        return printed.err

    return call


def weighted(paths, weights=WEIGHTS):
    return [x for p, w in zip(paths, weights, strict=True) for x in ("--adapter", f"{p}={w}")]


def loaded(oracle, directory):
    return peft.PeftModel.from_pretrained(copy.deepcopy(oracle), directory)


def updates(oracle, directory):
    """The dense update of every module that has an adapter, as PEFT has it, in float64."""
    found = {}
    for name, module in loaded(oracle, directory).double().named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and module.active_adapters[0] in (
            *module.lora_A,
            *module.lora_embedding_A,
        ):
            found[name] = module.get_delta_weight("default").detach().numpy()
    return found


def differences(oracle, directory):
    """What every parameter of the merged model has over the base."""
    merged = loaded(oracle, directory).merge_and_unload().state_dict()
    base = oracle.state_dict()
    return {name: (merged[name].double() - base[name].double()).numpy() for name in base}


def check_sum(found, each, weights=WEIGHTS, tolerance=EXACT):
    names = set().union(*each)
    assert set(found) == names
    for name in names:
        expected = sum(w * own[name] for w, own in zip(weights, each, strict=True) if name in own)
        size = np.linalg.norm(expected)
        assert np.linalg.norm(found[name] - expected) <= tolerance * size, name


PAIRS = {
    "ranks, scales, patterns, layers": (
        UNTIED,
        dict(use_rslora=True, rank=3, rank_pattern={"q_proj": 5}, alpha_pattern={"up_proj": 2.0}),
        dict(target_modules=QV, layers_to_transform=[1]),
    ),
    "embeddings and head": (
        UNTIED,
        dict(target_modules=["embed_tokens", "q_proj"]),
        dict(target_modules=["lm_head", "embed_tokens"], rank=2),
    ),
    "tied as one, and apart": (
        TIED,
        dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        dict(target_modules=["lm_head", "q_proj"], ensure_weight_tying=False),
    ),
}


@IGNORED
@pytest.mark.parametrize(("base", "one", "other"), PAIRS.values(), ids=PAIRS)
def test_a_sum_loads_in_peft_as_the_sum(make, run, tmp_path, base, one, other):
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "adapter0", ignore_errors=True)
        shutil.rmtree(tmp_path / "adapter1", ignore_errors=True)
        directory, oracle, paths = make(base, one, other, seed=seed)
        output = tmp_path / f"sum{seed}"
        printed = run("--model", directory, *weighted(paths), "--output", output)
        assert str(output) in printed and " parameters, rank " in printed
        check_sum(updates(oracle, output), [updates(oracle, path) for path in paths])


WHOLE = {
    "biases and saved modules": (
        BIASED,
        dict(bias="all", modules_to_save=["model.norm"], target_modules=QV),
        dict(bias="lora_only", modules_to_save=["layers.1.mlp"], target_modules=["q_proj"]),
    ),
    "tokens": (
        UNTIED,
        dict(target_modules=QV, trainable_token_indices=[5, 3, 90]),
        dict(target_modules=QV, trainable_token_indices=[3, 8]),
    ),
}


@pytest.mark.parametrize(("base", "one", "other"), WHOLE.values(), ids=WHOLE)
def test_what_trains_whole_is_in_the_sum(make, run, tmp_path, base, one, other):
    directory, oracle, paths = make(base, one, other)
    run("--model", directory, *weighted(paths), "--output", tmp_path / "sum")
    each = [differences(oracle, path) for path in paths]
    found = differences(oracle, tmp_path / "sum")
    for name, own in found.items():
        expected = sum(w * x[name] for w, x in zip(WEIGHTS, each, strict=True))
        # Both are differences of float32 weights.
        np.testing.assert_allclose(own, expected, atol=2e-6, err_msg=name)


def test_a_sum_says_what_it_was_made_of(make, run, tmp_path):
    directory, _, paths = make(UNTIED, dict(target_modules=QV), dict(rank=2))
    for output in ("first", "second"):
        run("--model", directory, *weighted(paths), "--output", tmp_path / output)
    content = json.loads((tmp_path / "first" / "lora_jax.json").read_text())
    digest = fingerprint.base_digest(directory)
    assert content["fingerprint"] == {"base": digest, "tokenizer": "t", "template": "c"}
    assert content["combined"]["method"] == "sum"
    assert content["combined"]["adapters"] == [
        {"path": str(path), "weight": weight} for path, weight in zip(paths, WEIGHTS, strict=True)
    ]
    assert (tmp_path / "first" / "tokenizer.json").is_file()
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
    formats.read_adapter(tmp_path / "first", formats.describe(directory).params)


def test_one_adapter_shrinks_by_a_rank(make, run, tmp_path):
    directory, oracle, paths = make(UNTIED, dict(rank=6, use_rslora=True))
    common = ("--model", directory, "--adapter", paths[0], "--rank", 2)
    report = json.loads(run(*common, "--output", tmp_path / "small", "--json"))
    original, small = updates(oracle, paths[0]), updates(oracle, tmp_path / "small")
    tails, sizes = {}, {}
    for name, update in original.items():
        values = np.linalg.svd(update, compute_uv=False)
        tails[name], sizes[name] = np.square(values[2:]).sum(), np.square(values).sum()
        lost = np.linalg.norm(small[name] - update)
        assert lost == pytest.approx(np.sqrt(tails[name]), rel=1e-5)
    total = np.sqrt(sum(tails.values()) / sum(sizes.values()))
    assert report["error"] == pytest.approx(total, rel=1e-6)
    ratios = {name: np.sqrt(tails[name] / sizes[name]) for name in tails}
    worst = max(ratios, key=lambda name: ratios[name])
    assert worst.endswith(report["worst_module"])
    assert report["worst_error"] == pytest.approx(ratios[worst], rel=1e-6)
    assert (report["method"], report["ranks"]) == ("svd", [2, 2])
    printed = run(*common, "--output", tmp_path / "again")
    assert f"{total:.2e} over all modules" in printed and report["worst_module"] in printed


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_sparse_methods_load_in_peft(make, run, tmp_path, method):
    directory, oracle, paths = make(
        UNTIED, dict(target_modules=QV), dict(target_modules=QV, rank=2)
    )
    arguments = ("--method", method, "--density", 0.5, "--seed", 3, "--json")
    outputs = ("--output", tmp_path / "made")
    report = json.loads(run("--model", directory, *weighted(paths), *arguments, *outputs))
    assert report["ranks"] == [6, 6] and 0.05 < report["error"] < 1
    assert report.get("seed") == (None if method == "ties" else 3)
    if method == "ties":
        found, each = updates(oracle, tmp_path / "made"), [updates(oracle, p) for p in paths]
        for name, update in found.items():
            trimmed = [
                w * np.where(abs(x) >= np.sort(abs(x), axis=None)[-int(x.size / 2)], x, 0)
                for w, x in zip(WEIGHTS, (own[name] for own in each), strict=True)
            ]
            sign = np.where(sum(trimmed) >= 0, 1, -1)
            agree = np.stack([np.sign(x) == sign for x in trimmed])
            mean = np.where(agree, trimmed, 0).sum(0) / np.maximum(agree.sum(0), 1)
            left, values, right = np.linalg.svd(mean)
            expected = (left[:, :6] * values[:6]) @ right[:6]
            assert np.linalg.norm(update - expected) < 1e-5 * np.linalg.norm(expected)


def test_dora_by_svd_is_near_its_merged_weights(make, run, tmp_path):
    fields = dict(target_modules=QV, use_dora=True)
    directory, oracle, paths = make(UNTIED, fields, dict(target_modules=QV))
    arguments = ("--method", "svd", "--rank", 36, "--output", tmp_path / "made")
    run("--model", directory, *weighted(paths), *arguments)
    each = [differences(oracle, path) for path in paths]
    for name, found in differences(oracle, tmp_path / "made").items():
        expected = sum(w * x[name] for w, x in zip(WEIGHTS, each, strict=True))
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=name)


# From a fine-tuned model


def fine_tune(directory, target, rank=3, norms=True, seed=0, also=()):
    """A copy of a model whose linears moved by products of this rank, and its norms too."""
    shutil.copytree(directory, target)
    tensors, rng = load_file(target / "model.safetensors"), np.random.default_rng(seed)
    for name, weight in tensors.items():
        linear = "_proj.weight" in name or name in also
        if linear and weight.ndim == 2:
            rows, columns = weight.shape
            thin = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
            tensors[name] = weight + (0.1 * thin).astype(np.float32)
        elif norms and (name.endswith("norm.weight") or name.endswith(".bias")):
            moved = 0.1 * rng.standard_normal(weight.shape)
            tensors[name] = weight + moved.astype(np.float32)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return tensors


def check_extracted(oracle, output, tensors, tolerance=1e-5):
    merged = loaded(oracle, output).merge_and_unload().state_dict()
    for name, expected in tensors.items():
        np.testing.assert_allclose(merged[name].numpy(), expected, atol=tolerance, err_msg=name)


def test_a_lora_is_extracted_from_a_fine_tuned_model(make, run, refused, tmp_path):
    directory, oracle, _ = make(BIASED)
    tensors = fine_tune(directory, tmp_path / "tuned")
    common = ("--model", directory, "--finetuned", tmp_path / "tuned", "--rank", 3)
    message = refused(*common, "--output", tmp_path / "made")
    assert "model.norm.scale: 36 numbers of 1 modules, by " in message
    assert "model.layers.input_layernorm.scale: 72 numbers of 2 modules" in message
    assert "model.layers.mlp.up_proj.bias" in message
    assert "uncovered=save" in message and "uncovered=drop" in message
    report = json.loads(
        run(*common, "--uncovered", "save", "--output", tmp_path / "saved", "--json")
    )
    assert report["error"] < 1e-5 and report["ranks"] == [3, 3]
    check_extracted(oracle, tmp_path / "saved", tensors)
    run(*common, "--uncovered", "drop", "--output", tmp_path / "dropped")
    names = load_file(tmp_path / "dropped" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in names)
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


@IGNORED
def test_embeddings_are_stored_whole_or_take_an_adapter(make, run, refused, tmp_path, error):
    directory, oracle, _ = make(TIED)
    embedding = "model.embed_tokens.weight"
    tensors = fine_tune(directory, tmp_path / "tuned", norms=False, also=[embedding])
    common = ("--model", directory, "--finetuned", tmp_path / "tuned", "--rank", 3)
    message = refused(*common, "--output", tmp_path / "made")
    assert "model.embed_tokens.embedding: 3,492 numbers of 1 modules" in message
    run(*common, "--uncovered", "save", "--output", tmp_path / "saved")
    check_extracted(oracle, tmp_path / "saved", tensors)
    targets = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj"]
    run(
        *common,
        *("--output", tmp_path / "adapted", "--target-modules", *targets, "down_proj"),
    )
    tuned, tokens = copy.deepcopy(oracle), make_tokens(0)
    tuned.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()}, strict=False)
    found = torch_logits(loaded(oracle, tmp_path / "adapted"), tokens)
    assert error(found, torch_logits(tuned, tokens)) < 1e-5
    assert error(found, torch_logits(oracle, tokens)) > 1e-2


def test_the_error_of_an_extraction_is_the_tail_of_the_spectrum(make, run, tmp_path):
    directory, oracle, _ = make(UNTIED)
    tensors = fine_tune(directory, tmp_path / "tuned", norms=False)
    arguments = ("--finetuned", tmp_path / "tuned", "--rank", 1, "--json")
    report = json.loads(run("--model", directory, *arguments, "--output", tmp_path / "made"))
    base = load_file(directory / "model.safetensors")
    values = [
        np.linalg.svd(tensors[name] - base[name].astype(np.float64), compute_uv=False)
        for name in base
        if "_proj" in name
    ]
    tail, size = (
        sum(np.square(v).sum() for v in part) for part in ([v[1:] for v in values], values)
    )
    assert report["error"] == pytest.approx(np.sqrt(tail / size), rel=1e-5)
    found = updates(oracle, tmp_path / "made")
    lost = sum(
        np.square(update - (tensors[f"{short}.weight"] - base[f"{short}.weight"])).sum()
        for update, short in ((u, n.removeprefix("base_model.model.")) for n, u in found.items())
    )
    assert lost == pytest.approx(tail, rel=1e-5)


def test_only_what_moved_takes_an_adapter(make, run, refused, tmp_path):
    directory, _, _ = make(UNTIED)
    shutil.copytree(directory, tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    common = ("--model", directory, "--finetuned", tmp_path / "tuned", "--rank", 2)
    assert "the same weights" in refused(*common, "--output", tmp_path / "made")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name] + 0.1
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    run(*common, "--output", tmp_path / "made")
    content = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert content["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    message = refused(*common, "--output", tmp_path / "other", "--target-modules", "v_proj")
    assert "none of these weights differ" in message
    message = refused(*common, "--output", tmp_path / "other", "--target-modules", "vproj")
    assert "Did you mean 'v_proj'?" in message
    common = (*common[:-1], 60)
    message = refused(*common, "--output", tmp_path / "other")
    assert "rank=60 is larger than any module can use: the most is 36" in message


def test_another_model_is_no_fine_tuned_form(make, refused, tiny_llama, tmp_path):
    directory, _, _ = make(UNTIED)
    other, _ = tiny_llama(**UNTIED | dict(intermediate_size=80))
    arguments = ("--finetuned", other, "--rank", 2, "--output", tmp_path / "made")
    message = refused("--model", directory, *arguments)
    assert "is no fine-tuned form of" in message and "expected (2, 36, 72)" in message


# Mistakes


def test_adapters_of_other_bases_are_refused(make, refused, run, tiny_llama, tmp_path):
    directory, _, paths = make(UNTIED, dict(target_modules=QV), dict(rank=2))
    other, _ = tiny_llama(5, **UNTIED)
    arguments = (*weighted(paths), "--output", tmp_path / "made")
    message = refused("--model", other, *arguments)
    assert message.count("base: the base model's weights are not those that") == 2
    assert str(paths[0]) in message and str(paths[1]) in message
    run("--model", other, *arguments, "--allow-change", "base")
    stored = paths[1] / "lora_jax.json"
    content = json.loads(stored.read_text())
    content["fingerprint"]["template"] = "another"
    stored.write_text(json.dumps(content))
    arguments = (*weighted(paths), "--output", tmp_path / "again")
    message = refused("--model", directory, *arguments)
    assert "template: the chat template is not the one" in message
    run("--model", directory, *arguments, "--allow-change", "template")


def test_adapters_of_other_shapes_are_refused(make, refused, tiny_llama, tmp_path):
    directory, _, paths = make(UNTIED, {}, dict(rank=2), prints=False)
    other, _ = tiny_llama(**UNTIED | dict(intermediate_size=80))
    message = refused("--model", other, *weighted(paths), "--output", tmp_path / "made")
    assert "adapter0" in message and "adapter1" in message and "expected (4, 80)" in message


def test_prompts_are_no_updates_of_weights(make, refused, tmp_path):
    soft = dict(method="prompt", num_virtual_tokens=3)
    directory, _, paths = make(UNTIED, soft, dict(rank=2))
    message = refused("--model", directory, *weighted(paths), "--output", tmp_path / "made")
    assert "adapter0: method=prompt has no updates of weights" in message


def test_mistakes_on_the_command_line(make, refused, tmp_path):
    directory, _, paths = make(UNTIED, dict(target_modules=QV), dict(rank=2, use_dora=True))
    model, output = ("--model", directory), ("--output", tmp_path / "made")
    one = ("--adapter", paths[0])
    for arguments, expected in (
        ((*model, *one, "--output", directory), "already exists and is not empty"),
        (("--model", "no/such/model", *one, *output), "'no/such/model'"),
        ((*model, "--adapter", "missing=2", *output), "adapter 'missing' does not exist"),
        ((*model, "--adapter", directory, *output), "it has no adapter_config.json"),
        ((*model, *one, "--rank", 20, *output), "rank=20 is larger than any module can use"),
        ((*model, *one, "--method", "ties", *output), "method=ties needs a density"),
        ((*model, *weighted(paths), *output), "adapter1 is a DoRA adapter"),
        ((*model, *one, "--uncovered", "drop", *output), "--uncovered goes with --finetuned only"),
        ((*model, *one, "--target-modules", "x", *output), "--target-modules goes with"),
        ((*model, "--finetuned", directory, *output), "--finetuned needs --rank"),
        (
            (*model, "--finetuned", directory, "--rank", 2, "--density", 0.5, *output),
            "--density goes with --adapter only",
        ),
    ):
        assert expected in refused(*arguments)


def test_weights_and_names_with_an_equals_sign(make, run, tmp_path, capsys):
    directory, _, paths = make(UNTIED, dict(target_modules=QV))
    odd = paths[0].rename(tmp_path / "lr=3")
    for text, weight in ((odd, 1.0), (f"{odd}=-2", -2.0)):
        output = tmp_path / f"made{weight}"
        arguments = ("--adapter", text, "--output", output, "--json")
        report = json.loads(run("--model", directory, *arguments))
        assert report["adapters"] == [{"path": str(odd), "weight": weight}]
    with pytest.raises(SystemExit):
        main(["combine", "--model", "m", "--adapter", f"{tmp_path}/x=heavy", "--output", "o"])
    assert "'heavy' is no number" in capsys.readouterr().err


def test_a_head_that_the_base_lacks_needs_weights_of_one_in_all(tmp_path, run, refused):
    """A classifier's head is new in every adapter: there is no difference to a common one."""
    model = random_model("bert", **BERT)
    directory = tmp_path / "model"
    formats.write_model(directory, model, model.params, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("classifier.")}
    save_file(kept, directory / "model.safetensors")
    config = AdapterConfig(rank=2, target_modules=["query"], modules_to_save=["classifier"])
    paths = [tmp_path / "a", tmp_path / "b"]
    for seed, path in enumerate(paths):
        adapters = random_adapters(model.params, config, seed)
        formats.write_adapter(
            path, adapters, model.params, config, base_model="base", task_type="SEQ_CLS"
        )
    arguments = ("--model", directory, "--output", tmp_path / "made")
    assert "has no classifier." in refused(*arguments, *weighted(paths))
    run(*arguments, *weighted(paths, (0.25, 0.75)))
    made, one, other = (
        load_file(path / "adapter_model.safetensors")["base_model.model.classifier.weight"]
        for path in (tmp_path / "made", *paths)
    )
    np.testing.assert_allclose(made, 0.25 * one + 0.75 * other, atol=1e-7)
    content = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert content["task_type"] == "SEQ_CLS"


def test_the_work_is_done_in_float64(make, run, tmp_path):
    """Sums of updates that nearly cancel are as exact as the factors that hold them."""
    directory, oracle, paths = make(UNTIED, dict(target_modules=QV), dict(target_modules=QV))
    shutil.rmtree(paths[1])
    shutil.copytree(paths[0], paths[1])
    run("--model", directory, *weighted(paths, (1.0, -1.0)), "--output", tmp_path / "zero")
    assert all(
        torch.tensor(x).abs().max() < 1e-7 for x in updates(oracle, tmp_path / "zero").values()
    )


def test_arguments_of_the_chat_template_and_ends_of_answers_go_along(make, run, tmp_path, capsys):
    base, _, adapters = make(TIED, {}, {})
    kwargs, other = {"enable_thinking": False}, {"enable_thinking": True}

    def record(directory, arguments, system="Be brief."):
        file = directory / "lora_jax.json"
        content = json.loads(file.read_text())
        prompt = {"chat_template_kwargs": arguments, "system_prompt": system}
        file.write_text(json.dumps(content | prompt))

    for adapter in adapters:
        record(adapter, kwargs)
    both = ["--model", base, "--adapter", adapters[0], "--adapter", adapters[1], "--output"]
    run(*both, tmp_path / "both")
    assert formats.read_template_kwargs(tmp_path / "both") == kwargs
    assert formats.read_system_prompt(tmp_path / "both") == "Be brief."
    record(adapters[1], other, "Be long.")
    assert main(["combine", *map(str, both), str(tmp_path / "no")]) == 2
    told = capsys.readouterr().err
    assert str(kwargs) in told and str(other) in told and "'template' in allow_change" in told
    assert not (tmp_path / "no").exists()
    run(*both, tmp_path / "first", "--allow-change", "template")
    assert formats.read_template_kwargs(tmp_path / "first") == kwargs
    assert formats.read_system_prompt(tmp_path / "first") is None
    tuned = shutil.copytree(base, tmp_path / "tuned")
    (tuned / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    weights = load_file(tuned / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: weights[name] + 0.1}, tuned / "model.safetensors")
    run("--model", base, "--finetuned", tuned, "--rank", 2, "--output", tmp_path / "extracted")
    assert formats.read_stops(tmp_path / "extracted") == [0, 2]
