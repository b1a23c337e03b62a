"""The command: worked figures, topologies, search and advice; nothing here is compiled."""

import importlib.metadata
import importlib.util
import itertools
import json
import math
from types import SimpleNamespace

import pytest

from lora_jax import config as configs
from lora_jax import sharding
from lora_jax.cli import main
from lora_jax.errors import UserError
from lora_jax.plan import analytic, compiled, roofline
from lora_jax.plan.chips import CHIPS, parse_topology
from lora_jax.plan.program import build, open_shapes, stored_dtype

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # the command sets it; here it is put back


@pytest.fixture
def llama(tmp_path):
    """`llama(**fields)`: a YAML file of a run of Llama 3.1 8B, or of a model that differs."""

    def make(**fields):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | fields))
        file = tmp_path / "run.yaml"
        text = f"model: {tmp_path}\nadapter: {{rank: 16}}\ndata: {{max_length: 2048}}\n"
        file.write_text(text + "train: {batch_size: 8, compute_dtype: bfloat16}\n")
        return file

    return make


def run(capsys, *arguments):
    status = main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def plan_json(capsys, *arguments):
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_worked_figures():
    found = analytic.worked(70e9)
    assert (found.weights, found.full, found.full_masters) == (140e9, 840e9, 1120e9)
    found = analytic.worked(65e9)
    assert (found.full, found.weights, found.four_bits) == (780e9, 130e9, 32.5e9)
    assert round(found.nf4 / 1e9, 1) == 33.5
    assert round(analytic.NF4_BITS, 3) == 4.127


def test_worked_figures_from_the_command_line(capsys):
    _, text, _ = run(capsys, "--parameters", "70e9")
    assert [line.split()[0] for line in text.splitlines()[1:]] == [
        *("140.0", "35.0", "36.1", "840.0", "1,120.0"),
    ]
    _, text, _ = run(capsys, "--parameters", "65e9")
    numbers = [line.split()[0] for line in text.splitlines()[1:]]
    assert numbers[:4] == ["130.0", "32.5", "33.5", "780.0"]
    assert plan_json(capsys, "--parameters", "70e9")["full"] == 840e9


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "either --config FILE or --parameters N"),
        (("--parameters", "-1"), "must be a number above 0"),
        (("--parameters", "nan"), "must be a number above 0"),
    ],
)
def test_what_is_asked_for_must_be_clear(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and message in err


def test_8b_on_four_v5p_chips(capsys, llama):
    found = plan_json(
        capsys,
        "--config",
        llama(),
        "--topology",
        "v5p:2x2x1",
        "--no-compile",
        "mesh.fsdp=-1",
        "mesh.data=1",
    )
    weights, norms = 8_030_261_248, 65 * 4096
    assert found["estimate"]["base"] == (weights - norms) * 2 // 4 + norms * 2
    counts = found["estimate"]["optimizer"] - 2 * found["estimate"]["adapters"]
    assert 0 < counts < 100  # a few steps counted
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert found["full_fine_tuning"]["arguments"] > 2 * found["estimate"]["arguments"]
    assert found["fits"] and found["hbm"] == CHIPS["v5p"].hbm
    assert 0 < found["roofline"]["mfu"] < 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--topology", "v5q:2x2"), "Did you mean 'v5e:2x2'?"),
        (("--topology", "v5e:3x1"), "v5e: 1x1, 2x2, 2x4"),
        (("--topology", "v5p:2x2"), "v5p: 1x1x1, 2x2x1"),
        (("--topology", "v5e:2x2", "mesh.fsdp=3"), "does not fit 4 devices"),
        (("--topology", "v5e:4x4"), "cannot be split over 16 devices"),
        (("--topology", "v5e:2x2", "--devices", "4"), "leave --devices out"),
        (("--devices", "0"), "must be at least 1"),
        (("--devices", "6", "mesh.fsdp=4"), "does not fit 6 devices"),
    ],
)
def test_mistakes(capsys, llama, arguments, message):
    status, out, err = run(capsys, "--config", llama(), "--no-compile", *arguments)
    assert (status, out) == (2, "") and message in err


def test_topologies():
    assert parse_topology("v5p:2x2x4").devices == 16
    assert parse_topology("7x:2x2x1").devices == 8  # two devices on every chip
    assert parse_topology("v5p:8x12x16").devices == 1536
    assert parse_topology("v5e:1x1").options == {"chips_per_host_bounds": (1, 1, 1)}
    assert parse_topology("v4:2x2x2").options == {"chip_config_name": "megacore"}


def test_a_mesh_that_splits_heads_is_said(capsys, llama):
    config = llama(num_key_value_heads=1, vocab_size=50257)
    arguments = (
        "--config",
        config,
        "--devices",
        "4",
        "--no-compile",
        "mesh.tensor=4",
        "mesh.data=1",
    )
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "1 key and value heads cannot be split over mesh.tensor=4; they are replicated" in out
    assert "does not divide 50257" in out
    assert plan_json(capsys, *arguments[:-2])["notes"] == []


def test_a_dtype_that_cannot_be_known(capsys, llama):
    status, _, err = run(capsys, "--config", llama(torch_dtype="fp8"), "--no-compile")
    assert status == 2 and "set base_dtype" in err
    status, _, _ = run(
        capsys, "--config", llama(torch_dtype="fp8"), "--no-compile", "base_dtype=nf4"
    )
    assert status == 2  # what is not quantised has that dtype too


def test_the_dtype_of_a_model_that_reads_images_is_that_of_its_text(tmp_path):
    text = {name: value for name, value in LLAMA_8B.items() if "_type" not in name}
    text["dtype"] = text.pop("torch_dtype")
    content = {"model_type": "qwen3_vl", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "run.yaml").write_text(f"model: {tmp_path}\n")
    assert stored_dtype(*open_shapes(configs.load(tmp_path / "run.yaml"))) == "bfloat16"


def total_of(file, overrides, devices):
    config, model = open_shapes(configs.load(file, overrides))
    program = build(config, model, sharding.abstract_mesh(config.mesh, devices))
    return analytic.estimate(program).total


def test_what_would_fit_is_said(capsys, llama):
    given = ["mesh.fsdp=4", "mesh.data=1", "train.batch_size=64", "train.remat=none"]
    arguments = ("--config", llama(), "--topology", "v5e:2x2", "--no-compile", *given)
    found = plan_json(capsys, *arguments)
    assert not found["fits"]
    *single, joined = found["remedies"]
    now = found["estimate"]["total"]
    assert all(found["hbm"] < one["total"] < now for one in single)
    assert any(one["overrides"] == ["base_dtype=nf4"] for one in single)
    assert joined["total"] <= found["hbm"]
    for one in (single[0], joined):
        assert total_of(llama(), [*given, *one["overrides"]], 4) == one["total"]
    _, text, _ = run(capsys, *arguments)
    assert f"{' '.join(joined['overrides'])}  (fits)" in text


def test_search_is_the_best_of_all(capsys, llama):
    given = ["train.batch_size=4", "data.max_length=4096", "mesh.data=1", "mesh.fsdp=4"]
    arguments = ["--config", llama(), "--topology", "v5e:2x2", "--no-compile", "--search", *given]
    found = plan_json(capsys, *arguments)
    rows = found["search"]
    assert rows and all(one["total"] <= found["hbm"] for one in rows)
    chip, every, too_large = CHIPS["v5e"], [], 0
    for fsdp, tensor in ((4, 1), (2, 2), (1, 4), (2, 1), (1, 2), (1, 1)):
        for micro, remat in itertools.product((1, 2, None), ("none", "dots", "full")):
            if (micro or 4) % (4 // tensor):
                continue
            mesh = ["mesh.data=-1", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"]
            train = [f"train.micro_batch_size={micro or 'null'}", f"train.remat={remat}"]
            config, model = open_shapes(configs.load(llama(), [*given, *mesh, *train]))
            program = build(config, model, sharding.abstract_mesh(config.mesh, 4))
            one = analytic.estimate(program)
            every.append((roofline.find_bounds(program, chip, one).seconds, one.total))
            too_large += one.total > chip.hbm
    fitting = sorted((round(seconds, 4), total) for seconds, total in every if total <= chip.hbm)
    assert too_large and len(fitting) > 1
    assert [(round(one["seconds"], 4), one["total"]) for one in rows] == fitting[: len(rows)]
    assert total_of(llama(), [*given, *rows[0]["overrides"]], 4) == rows[0]["total"]
    _, text, _ = run(capsys, *arguments)
    assert " ".join(rows[0]["overrides"]) in text


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["mesh.data=1", "mesh.fsdp=8"], "does not fit 4 devices"),
        (["train.batch_size=2", "mesh.data=1", "mesh.fsdp=4"], "2 rows cannot be split over 4"),
    ],
    ids=["mesh", "batch"],
)
def test_a_search_of_a_mesh_that_does_not_fit(capsys, llama, given, problem):
    arguments = ["--config", llama(), "--topology", "v5e:2x2", "--no-compile", *given]
    status, _, errors = run(capsys, *arguments)
    assert status == 2 and problem in errors
    found = plan_json(capsys, *arguments, "--search")
    note, best = found["notes"][0], found["search"][0]
    assert problem in note and "best settings instead: mesh.data=" in note
    assert math.prod(found["mesh"].values()) == 4
    assert best["overrides"] == [] and found["estimate"]["total"] == best["total"]


def test_operations_against_the_compiler(llama):
    """One layer and one chunk, so that no loop hides anything; what is no product is left out."""
    small = dict(hidden_size=256, intermediate_size=640, num_attention_heads=8, vocab_size=1024)
    file = llama(**small, num_hidden_layers=1, torch_dtype="float32")
    common = ["train.remat=none", "data.max_length=256", "train.batch_size=2"]
    common += ["train.compute_dtype=float32"]
    for change in ("rank=64", "method=full", "modules_to_save=[lm_head]"):
        config, model = open_shapes(configs.load(file, [*common, f"adapter.{change}"]))
        program = build(config, model, sharding.make_mesh(config.mesh))
        real = program.lower().cost_analysis()["flops"]
        assert 0.97 < roofline.count(program).model_flops / real < 1


def test_a_shortfall_is_read_from_what_the_compiler_says():
    alone = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (86.50G) exceeds available HBM (15.75G)."
    )
    found = compiled.read_shortfall(alone, unread=5)
    assert found is not None
    assert (found.needed, found.available) == (int(86.5 * 2**30) + 5, int(15.75 * 2**30))
    used = "x\nXLA:TPU compile error: Used 512.00M of 1.00K hbm. Exceeded hbm capacity by 511M.\ny"
    found = compiled.read_shortfall(used, unread=0)
    assert found is not None
    assert (found.needed, found.available, found.missing) == (2**29, 1024, 2**29 - 1024)
    assert found.message.startswith("XLA:TPU")
    assert compiled.read_shortfall("INTERNAL: something else", 5) is None


def test_libtpu_missing_or_of_another_jax(monkeypatch, llama, capsys):
    wanted = compiled.wanted_libtpu()
    assert wanted is not None and wanted.startswith("==0.0.")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ("--config", llama(), "--topology", "v5e:2x2")
    status, out, err = run(capsys, *arguments)
    assert status == 2 and f"pip install 'libtpu{wanted}'" in err
    assert "from shapes alone" in out  # what shapes tell is printed before

    library = llama().parent / "libtpu.so"
    library.touch()
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: SimpleNamespace(origin=str(library.with_name("x.py"))),
    )
    versions = {"libtpu": "0.0.1.1"}
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: versions.get(name) or real(name)
    )
    with pytest.raises(UserError, match="libtpu 0.0.1.1 does not fit jax") as raised:
        compiled.find_libtpu()
    assert f"libtpu{wanted}" in str(raised.value)
    versions["libtpu"] = wanted.removeprefix("==").replace("*", "7")
    assert compiled.find_libtpu() == library


def test_a_failing_compiler_is_not_taken_for_a_fit(monkeypatch, llama):
    monkeypatch.setattr(compiled.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with status 1"):
        compiled.compile_for(configs.load(llama()), 2)
