"""Adapters in the slots of a bank: rows of a batch against every adapter merged and run alone, in
every family and for every method; writes of slots, and what is refused.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compiler

from lora_jax import AdapterConfig, UserError, lora, slots, tree
from lora_jax import bank as banks
from lora_jax.adapters.combine import Part, combine
from lora_jax.generate.form import separate
from lora_jax.quantize import SCHEMES, quantize
from lora_jax.weights import LoraBank, embed, expert_linear, linear, materialize, unembed

from . import methods
from .families import FAMILIES, in_turns, random_model
from .methods import ROWS, stirred, tiny_model

CLOSE = 1e-5  # the sums of a bank are in another order
ATTENTION = r".*\.(self_attn|attn)\..*"
# A row of a batch takes a slot of this order, from 1 on; 0 is the base.
ADAPTERS = {
    "rank 2": {"rank": 2, "alpha": 5.0},
    "rsLoRA": {"rank": 5, "use_rslora": True},
    "DoRA": {"rank": 3, "use_dora": True},
    "attention, one layer": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "PiSSA": {"rank": 4, "init": "pissa"},
}
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERYTHING += ["embed_tokens", "lm_head"]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def wide(x):
    return np.asarray(x, np.float64)


def make_tokens(seed, rows, time=7):
    return np.random.default_rng(seed).integers(0, 97, (rows, time)).astype(np.int32)


def adapt(params, fields, seed=0):
    """A config, the base of adapters of it, and adapters that change the model."""
    config = AdapterConfig(**{"rank": 4, "alpha": 6.0} | fields)
    base, fresh = lora.init(jax.random.key(seed), params, config)
    return config, base, stirred(base, fresh, config, seed)


def merged(base, adapters, config):
    return lora.merge(lora.bind(base, adapters, config))


def both_programs(model):
    """The forward of plain parameters, and of a bank whose choice is an argument."""

    def banked(bank, params, tokens, ids, weights=None):
        return model.apply(bank.bind(params, ids, weights), tokens)

    # The code of users: where a bank adds nothing, the other has a different rounding of mixtral.
    options = dict.fromkeys(methods.QUICK, True)
    return (jax.jit(f, compiler_options=options) for f in (model.apply, banked))


# One leaf, against the matrices that its slots stand for.

SLOTS, RANK, IN, OUT, EXPERTS = 4, 3, 7, 5, 6
IDS = jnp.array([[1, 0], [0, 0], [2, 3], [3, 3], [0, 2]])
WEIGHTS = jnp.array([[1.0, 1.0], [1.0, 0.5], [0.7, -0.3], [0.5, 2.0], [1.0, 0.0]])


def leaf(base, lead=(), ids=IDS, weights=WEIGHTS, gain=None):
    size_in, size_out = base.shape[-2:]
    empty = jnp.arange(SLOTS)[:, None, None] > 0
    a, b = normal(1, *lead, SLOTS, RANK, size_in), normal(2, *lead, SLOTS, RANK, size_out)
    return LoraBank(base, a * empty, b * empty, gain, ids, weights)


def dense(w, row, base=None):
    """The matrix of a row; `base` replaces that of the leaf."""
    total = wide(w.base if base is None else base)
    for slot, weight in zip(w.slot_ids[row], w.slot_weights[row], strict=True):
        a, b = w.a[..., int(slot), :, :], w.b[..., int(slot), :, :]
        total = total + float(weight) * wide(a).swapaxes(-1, -2) @ wide(b)
    return total


def use(monkeypatch, name):
    monkeypatch.setattr(slots, "gathers", lambda *_: name == "gather")


@pytest.mark.parametrize("name", ["gather", "grouped"])
def test_every_row_has_its_own_matrix(error, monkeypatch, name):
    use(monkeypatch, name)
    w = leaf(normal(0, IN, OUT))
    for x in (normal(3, 5, 4, IN), normal(4, 5, IN), normal(5, 5, 2, 3, IN)):
        expected = np.stack([wide(x[row]) @ dense(w, row) for row in range(5)])
        assert error(linear(x, w), expected) < 1e-5
        assert linear(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16
        plain = linear(x, w.base)
        for row, is_base in enumerate([False, True, False, False, True]):
            same = np.asarray(linear(x, w)[row]).tobytes() == np.asarray(plain[row]).tobytes()
            assert same == is_base


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bank_over_a_quantised_base(error, scheme):
    base = quantize(normal(0, 64, 8), scheme)
    w, x = leaf(base), normal(3, 5, 4, 64)
    expected = np.stack([wide(x[row]) @ dense(w, row, materialize(base)) for row in range(5)])
    assert error(linear(x, w), expected) < 1e-5


@pytest.mark.parametrize("name", ["gather", "grouped"])
def test_rows_of_experts_have_their_own_matrix(error, monkeypatch, name):
    """Tokens are sorted by expert, and keep the slots of the row that they come from."""
    use(monkeypatch, name)
    w = leaf(normal(0, EXPERTS, IN, OUT), (EXPERTS,))
    chosen = np.random.default_rng(0).integers(0, EXPERTS - 1, 5 * 8)  # 8 entries in each row
    order = np.argsort(chosen, kind="stable")
    x, sizes = normal(3, 40, IN), np.bincount(chosen, minlength=EXPERTS)
    y = expert_linear(x[order], w, jnp.asarray(sizes), jnp.asarray(order))
    expected = [wide(x[i]) @ dense(w, i // 8)[chosen[i]] for i in order]
    assert error(y, np.stack(expected)) < 1e-5
    plain = expert_linear(x[order], w.base, jnp.asarray(sizes))
    same = [
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(y, plain, strict=True)
    ]
    assert same == [i // 8 in (1, 4) for i in order]


def test_gather_and_grouped_are_equal(error):
    w, x = leaf(normal(0, IN, OUT)), normal(3, 5, 4, IN)
    parts = x, w.factors, w.choice
    assert error(slots.gather(*parts), slots.grouped(*parts)) <= 1e-6
    w, sizes = leaf(normal(0, EXPERTS, IN, OUT), (EXPERTS,)), jnp.array([3, 0, 9, 40, 7, 1])
    parts = normal(3, 60, IN), w.factors, w.choice.take(jnp.arange(60) % 5), sizes
    assert error(slots.gather_experts(*parts), slots.grouped_experts(*parts)) <= 1e-6
    assert slots.gathers(1, 1, 1, 9) and not slots.gathers(8, 1, 1, 9)
    assert slots.gathers(8, 64, 1, 9) and slots.gathers(8, 1, 1, 33)


def test_lookups_and_logits(error):
    table, ids = normal(0, IN, OUT), np.random.default_rng(1).integers(0, IN, (5, 3))
    w = leaf(table)
    expected = np.stack([dense(w, row)[ids[row]] for row in range(5)])
    assert error(embed(jnp.asarray(ids), w), expected) < 1e-6
    head = dataclasses.replace(leaf(table.T), base=table)  # factors of (d, vocab)
    x = normal(3, 5, 4, OUT)
    expected = np.stack([wide(x[row]) @ dense(head, row, table.T) for row in range(5)])
    assert error(unembed(x, head), expected) < 1e-5
    assert embed(jnp.asarray(ids), leaf(table.astype(jnp.bfloat16))).dtype == jnp.float32


@pytest.mark.parametrize("name", ["gather", "grouped"])
def test_overflow_in_one_row_stays_in_it(monkeypatch, name):
    use(monkeypatch, name)
    w = leaf(normal(0, IN, OUT))
    huge = dataclasses.replace(w, a=w.a.at[3].mul(1e38), b=w.b.at[3].mul(10))
    found, expected = (linear(10 * jnp.ones((5, 1, IN)), x) for x in (huge, w))
    finite = np.isfinite(found).all(axis=(1, 2))
    assert finite.tolist() == [True, True, False, False, True]
    np.testing.assert_array_equal(found[finite], expected[finite])


def test_a_gain_is_that_of_the_row(error):
    gain = jnp.where(jnp.arange(SLOTS)[:, None, None] > 1, 1 + normal(4, SLOTS, 1, OUT), 1.0)
    ids, ones = jnp.array([[1, 0], [2, 0], [0, 3], [0, 0], [2, 0]]), jnp.ones((5, 2))
    w, x = leaf(normal(0, IN, OUT), ids=ids, weights=ones, gain=gain), normal(3, 5, 4, IN)
    own = wide(gain)[[1, 2, 3, 0, 2]]
    expected = np.stack([wide(x[row]) @ dense(w, row) * own[row] for row in range(5)])
    assert error(linear(x, w), expected) < 1e-5


def test_a_leaf_that_is_no_single_matrix_says_so():
    w = leaf(normal(0, IN, OUT))
    assert (w.shape, w.ndim, w.dtype) == ((IN, OUT), 2, jnp.float32)
    with pytest.raises(UserError, match="a matrix for every slot.*lora.bind"):
        materialize(w)
    for x in (normal(3, 4, IN), normal(3, IN)):
        with pytest.raises(UserError, match="bound to 5 rows, and the input has shape"):
            linear(x, w)


# Models.

FORMS = {"stacked": dict, "separate": separate}
# A linear with an output per head needs as many heads as the largest rank.
HEADS = {"qwen3_5_text": {"linear_num_value_heads": 8}}
LEFT_OUT = {"qwen3_next": {"exclude_modules": ["shared_expert_gate"]}}  # PiSSA needs more outputs


@pytest.mark.long_table(5)
@pytest.mark.parametrize(("family", "form"), in_turns(FAMILIES, FORMS))
def test_rows_of_a_batch_are_those_of_adapters_alone(error, family, form):
    fields, form = FAMILIES[family].fields | HEADS.get(family, {}), FORMS[form]
    model = random_model(family, 1, **fields)
    params = form(model.params)
    bank = lora.bank(params, slots=len(ADAPTERS) + 1, rank=8, use_dora=True)
    trees = [params]
    for slot, own in enumerate(ADAPTERS.values(), start=1):
        config, base, adapters = adapt(model.params, own | LEFT_OUT.get(family, {}), slot)
        bank = bank.put(slot, adapters, config)
        trees.append(form(merged(base, adapters, config)))
    ids = np.array([3, 0, 1, 5, 2, 4, 1])
    tokens = make_tokens(2, len(ids))
    plain, banked = both_programs(model)
    logits, base = banked(bank, params, tokens, ids), plain(params, tokens)
    for row, slot in enumerate(ids):
        alone = plain(trees[slot], tokens)[row]
        assert error(logits[row], alone) <= CLOSE
        assert slot == 0 or error(base[row], alone) > 1e-2
    assert np.asarray(logits[1]).tobytes() == np.asarray(base[1]).tobytes()
    assert banked._cache_size() == 1


@pytest.mark.long_table(2)
@pytest.mark.parametrize("name", ["gather", "grouped"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_ranks_of_2_to_64(error, monkeypatch, family, name):
    use(monkeypatch, name)
    sizes = {"hidden_size": 66, "intermediate_size": 70, "num_key_value_heads": 6, "head_dim": 12}
    sizes |= {"moe_intermediate_size": 65} if family == "qwen3_moe" else {}
    model = random_model(family, 0, **FAMILIES[family].fields | sizes)
    bank = lora.bank(model.params, slots=7, rank=64, use_dora=True)
    plain, banked = both_programs(model)
    tokens, trees = make_tokens(0, 7, 5), [model.params]
    for slot, rank in enumerate((2, 7, 16, 33, 64, 64), start=1):
        fields = {"rank": rank, "use_rslora": slot % 2 == 1, "use_dora": slot == 6}
        config, base, adapters = adapt(model.params, fields, slot)
        bank = bank.put(slot, adapters, config)
        trees.append(merged(base, adapters, config))
    logits = banked(bank, model.params, tokens, np.arange(7))
    for row, params in enumerate(trees):
        assert error(logits[row], plain(params, tokens)[row]) <= CLOSE


def is_low_rank(config):
    """A slot can hold it: no weight trains in full, and the base is the one it was."""
    if config.use_dora and config.ensure_weight_tying:
        return False
    whole = config.bias != "none" or config.modules_to_save or config.trainable_token_indices
    return config.trains_lora and not whole and config.init != "loftq"


GROUPS = sorted({(r.tied, r.bias, str(r.scheme)) for r in ROWS.values() if is_low_rank(r.config)})


@pytest.mark.long_table(2)
@pytest.mark.parametrize(("tied", "bias", "scheme"), GROUPS)
def test_every_method_has_a_slot(error, tied, bias, scheme):
    """A base and all its adapters, in one bank and one batch."""
    rows = [
        row
        for row in ROWS.values()
        if (row.tied, row.bias, str(row.scheme)) == (tied, bias, scheme)
        and is_low_rank(row.config)
        and not row.config.needs_data
    ]
    if not rows:  # all of the group look at data first
        rows = [ROWS["rsLoRA"]]
    rows = [dataclasses.replace(row, tied=tied, bias=bias) for row in rows]
    model = tiny_model(rows[0].hf_config, 0, rows[0].scheme)
    bank = lora.bank(model.params, len(rows) + 1, 8, EVERYTHING, use_dora=True)
    plain, banked = both_programs(model)
    tokens = make_tokens(3, len(rows) + 1)
    expected = [plain(model.params, tokens)[0]]
    for slot, row in enumerate(rows, start=1):
        base, fresh = methods.start(row, model, slot)
        adapters = stirred(base, fresh, row.config, slot)
        bank = bank.put(slot, adapters, row.config)
        expected.append(plain(merged(base, adapters, row.config), tokens)[slot])
    logits = banked(bank, model.params, tokens, np.arange(len(rows) + 1))
    assert np.asarray(logits[0]).tobytes() == np.asarray(expected[0]).tobytes()
    for slot, (found, alone) in enumerate(zip(logits, expected, strict=True)):
        assert error(found, alone) <= CLOSE, rows[slot - 1]


def test_parts_of_a_fused_projection_share_its_ranks(error):
    model = random_model("phi3", 0, **FAMILIES["phi3"].fields)
    plain, banked = both_programs(model)
    bank = lora.bank(model.params, 4, 4, ["qkv_proj", "gate_up_proj"], use_dora=True)
    tokens, expected = make_tokens(0, 4), []
    fields = [
        {"target_modules": ["qkv_proj.q", "qkv_proj.v", "gate_up_proj.up"], "use_dora": True},
        {"target_modules": ["qkv_proj.q", "qkv_proj.k", "qkv_proj.v"]},
        {"target_modules": ["qkv_proj"], "rank": 12},
    ]
    for slot, own in enumerate(fields, start=1):
        config, base, adapters = adapt(model.params, own, slot)
        bank = bank.put(slot, adapters, config)
        expected.append(plain(merged(base, adapters, config), tokens)[slot])
    logits = banked(bank, model.params, tokens, np.arange(4))
    assert max(map(error, logits[1:], expected)) <= CLOSE


def test_weighted_sums_are_those_of_combine_and_of_merged_weights(error):
    model = random_model("llama", 0, **FAMILIES["llama"].fields)
    made = [adapt(model.params, fields, i) for i, fields in enumerate(({}, {"use_rslora": True}))]
    bank = lora.bank(model.params, 3, 4)
    for slot, (config, _, adapters) in enumerate(made, start=1):
        bank = bank.put(slot, adapters, config)
    plain, banked = both_programs(model)
    tokens = make_tokens(0, 3)
    shares = np.array([[0.7, -0.3], [1.0, 1.0], [0.0, 0.0]])
    logits = banked(bank, model.params, tokens, np.array([[1, 2], [2, 1], [1, 2]]), shares)
    parts = [
        Part(adapters, config, weight)
        for (config, _, adapters), weight in zip(made, shares[0], strict=True)
    ]
    sums = combine(model.params, parts)
    alone = plain(merged(model.params, sums.adapters, sums.config), tokens)[0]
    assert error(logits[0], alone) <= CLOSE
    changes = [
        jax.tree.map(jnp.subtract, merged(model.params, adapters, config), model.params)
        for config, _, adapters in made
    ]
    added = jax.tree.map(lambda base, a, b: base + a + b, model.params, *changes)
    assert error(logits[1], plain(added, tokens)[1]) <= CLOSE
    base = plain(model.params, tokens)[2]
    assert np.asarray(logits[2]).tobytes() == np.asarray(base).tobytes()


# Writes.


@pytest.fixture(scope="module")
def tied():
    return random_model("qwen2", 0, **FAMILIES["qwen2"].fields)


def test_one_program_writes_every_slot_and_adapter(tied):
    bank = lora.bank(tied.params, 4, 8, use_dora=True)
    banks._write.clear_cache()
    for slot, fields in enumerate((*ADAPTERS.values(), {"rank": 7}), start=1):
        config, _, adapters = adapt(tied.params, fields, slot)
        old, bank = bank, bank.put(1 + slot % 3, adapters, config)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.factors))
    bank = bank.put([3, 1], lora.stack([adapters, adapters]), config).clear(2)
    assert banks._write._cache_size() == 1
    # Nor do adapters of a new rank compile anything else.
    fields = {"rank": 3, "init": "pissa", "freeze_a": True}
    config, _, adapters = adapt(tied.params, fields)
    stacked, compiled = lora.stack([adapters, adapters]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "backend_compile_and_load", lambda *a, **k: compiled.append(a))
        bank.put(2, adapters, config).put([1, 3], stacked, config)
    assert not compiled


def test_a_slot_keeps_nothing_of_the_adapters_before(tied):
    first, second = ({"use_dora": True}, {"rank": 2, "target_modules": ATTENTION})
    (config, _, adapters), (other, _, others) = (adapt(tied.params, x, 1) for x in (first, second))

    def make():
        return lora.bank(tied.params, 3, 4, use_dora=True)

    written = make().put(2, adapters, config).put(1, adapters, config).put(2, others, other)
    fresh = make().put(1, adapters, config).put(2, others, other)
    jax.tree.map(np.testing.assert_array_equal, written, fresh)
    jax.tree.map(np.testing.assert_array_equal, written.clear(2).clear(1), make())
    assert fresh.nbytes > 0 and (fresh.slots, fresh.rank) == (3, 4)


def test_stacked_adapters_go_into_several_slots(tied):
    config, _, first = adapt(tied.params, {}, 1)
    _, _, second = adapt(tied.params, {}, 2)
    stacked = lora.stack([first, second])
    jax.tree.map(np.testing.assert_array_equal, lora.unstack(stacked), [first, second])
    at_once = lora.bank(tied.params, 4, 4).put([3, 1], stacked, config)
    one_by_one = lora.bank(tied.params, 4, 4).put(1, second, config).put(3, first, config)
    jax.tree.map(np.testing.assert_array_equal, at_once, one_by_one)


# What is refused.

REFUSED = {
    "rank": ({"rank": 9}, r"has rank 9, and the bank has rank 4; create it with rank=9"),
    "pissa": ({"init": "pissa"}, r"has rank 8 \(twice that of training, by init=pissa\)"),
    "target": (
        {"target_modules": ["o_proj"]},
        "no slots for model.layers.self_attn.o_proj; it has",
    ),
    "DoRA": ({"use_dora": True}, r"lora\.bank\(\.\.\., use_dora=True\)"),
    "bias": ({"bias": "all"}, "bias='all' trains values of the base"),
    "whole": ({"modules_to_save": ["model.norm"]}, "modules_to_save=.* trains values of the base"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices trains values"),
    "loftq": ({"init": "loftq", "loftq_iter": 2}, "loftq_iter=2 changes the base"),
}


@pytest.fixture
def small():
    """A model with biases, and a bank of its queries and values."""
    model = tiny_model(ROWS["bias all"].hf_config)
    return model.params, lora.bank(model.params, 3, 4, ["q_proj", "v_proj"])


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_adapters_without_a_place_are_refused_by_name(small, fields, message):
    params, bank = small
    config = AdapterConfig(**{"rank": 4, "target_modules": ["q_proj"]} | fields)
    shapes = lora.shapes(params, config)
    adapters = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    with pytest.raises(UserError, match=message):
        bank.put(1, adapters, config)


@pytest.mark.parametrize("name", ["VeRA", "full", "prompt", "prefix"])
def test_other_methods_are_refused_by_name(small, name):
    config = (ROWS | methods.VIRTUAL)[name].config
    with pytest.raises(UserError, match=f"^method={config.method}: "):
        small[1].put(1, {"prompt_embeddings": np.zeros((3, 36))}, config)


def test_a_gain_of_both_uses_of_an_embedding_is_refused():
    row = ROWS["embedding, DoRA, tied"]
    model = tiny_model(row.hf_config)
    base, adapters = methods.start(row, model, 0)
    with pytest.raises(UserError, match="use_dora=true and ensure_weight_tying=true"):
        lora.bank(base, 2, 4, EVERYTHING, use_dora=True).put(1, adapters, row.config)


def test_all_problems_come_together(small):
    params, bank = small
    config, _, adapters = adapt(params, {"rank": 6, "target_modules": ["q_proj", "up_proj"]})
    leaf = tree.flatten(adapters)[("model", "layers", "mlp", "up_proj", "lora_b")]
    broken = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan) if x is leaf else x, adapters)
    with pytest.raises(UserError) as caught:
        bank.put(0, broken, config)
    for text in ("slot 0 is the base", "no slots for model.layers.mlp.up_proj", "rank 6, and"):
        assert text in str(caught.value)
    assert "not finite (NaN or infinity) in: model.layers.mlp.up_proj.lora_b" in str(caught.value)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(bank.factors))


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        (0, "slot 0 is the base"),
        (3, "slot 3 does not exist; the slots of adapters are 1 to 2"),
        (-1, "slot -1 does not exist"),
        (1.0, "slot=1.0 is no integer"),
        ("1", "slot='1' is no integer"),
        (True, "slot=True is no integer"),
    ],
)
def test_slots_that_do_not_exist(small, slot, message):
    params, bank = small
    config, _, adapters = adapt(params, {"target_modules": ["q_proj"]})
    for call in (lambda: bank.put(slot, adapters, config), lambda: bank.clear(slot)):
        with pytest.raises(UserError, match=message):
            call()


def test_adapters_that_do_not_fit(small):
    params, bank = small
    config, _, adapters = adapt(params, {"target_modules": ["q_proj"]})
    wrong = {
        "these adapters do not fit": (1, adapters, dataclasses.replace(config, rank=3)),
        "names a slot twice": ([1, 1], lora.stack([adapters, adapters]), config),
        "1 slot and 2 stacked adapters": ([1], lora.stack([adapters, adapters]), config),
        "at least one slot|0 slots": ([], lora.stack([adapters]), config),
        "the config is a dict": (1, adapters, {}),
        "got an AdapterConfig in place of adapters": (1, config, adapters),
    }
    for message, arguments in wrong.items():
        with pytest.raises(UserError, match=message):
            bank.put(*arguments)
    with pytest.raises(UserError, match="there are no adapters"):
        lora.stack([])
    with pytest.raises(UserError, match="adapters 1 differ from the first"):
        lora.stack([adapters, adapt(params, {"rank": 2, "target_modules": ["q_proj"]})[2]])
    with pytest.raises(UserError, match="one leading axis"):
        lora.unstack({"a": {"lora_a": np.zeros((2, 1)), "lora_b": np.zeros((3, 1))}})


CHOICES = [
    (([0, 3],), r"slot_ids has \[3\]; the bank has slots 0 \(the base\) to 2"),
    (([0, -1],), r"slot_ids has \[-1\]"),
    (([0.0],), "slot_ids must be integers, not float64"),
    ((1,), r"slot_ids has shape \(\)"),
    (([1, 2], [1.0]), r"slot_weights has shape \(1,\), and slot_ids \(2,\)"),
    (([1], [np.nan]), "slot_weights must be finite"),
]


@pytest.mark.parametrize(("arguments", "message"), CHOICES, ids=str)
def test_choices_that_do_not_exist(small, arguments, message):
    params, bank = small
    with pytest.raises(UserError, match=message):
        bank.bind(params, *arguments)


def test_parameters_of_another_model(small, tied):
    with pytest.raises(UserError, match="not the parameters of the bank"):
        small[1].bind(tied.params, [1])
    with pytest.raises(UserError, match="bind takes params and slot_ids"):
        small[1].bind([1], small[0])
    with pytest.raises(UserError, match="parameters are separate, and those of the bank stacked"):
        small[1].bind(separate(small[0]), [1])


def test_a_gain_takes_no_weight_and_no_other_slot(tied):
    config, _, adapters = adapt(tied.params, {"use_dora": True})
    bank = lora.bank(tied.params, 3, 4, use_dora=True).put(1, adapters, config)
    for ids, weights in (([[1, 2]], [[1, 1]]), ([[1]], [[0.5]]), ([1], [0.5]), ([[1, 1]], None)):
        with pytest.raises(UserError, match="row 0 has slots .* a DoRA adapter among them"):
            bank.bind(tied.params, ids, weights)
    bank.bind(tied.params, [[1, 0], [2, 2], [1, 2]], [[1, 1], [0.3, 0.4], [0, 3.0]])


def test_a_choice_may_be_traced_or_any_list(small):
    params, bank = small
    module = ("model", "layers", "self_attn", "q_proj", "kernel")

    def ids_of(ids):
        return tree.flatten(bank.bind(params, ids))[module].slot_ids

    expected = np.broadcast_to([[1], [0]], (3, 2, 1))
    for ids in ([1, 0], (1, 0), np.array([1, 0]), jnp.array([[1], [0]], jnp.int8)):
        np.testing.assert_array_equal(ids_of(ids), expected)
        np.testing.assert_array_equal(jax.jit(ids_of)(ids), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": 1}, "slots=1 must be an integer of at least 2"),
        ({"rank": 0}, "rank=0 must be an integer of at least 1"),
        ({"rank": 1.5}, "rank=1.5 must be an integer"),
        ({"modules": ["p_proj"]}, "p_proj"),
    ],
    ids=str,
)
def test_banks_that_cannot_be(small, fields, message):
    with pytest.raises(UserError, match=message):
        lora.bank(small[0], **{"slots": 3, "rank": 4} | fields)
    with pytest.raises(UserError, match="bank takes params, slots and rank"):
        lora.bank(AdapterConfig(), 2, 4)


def test_a_layer_of_a_stack_is_one_leaf_or_many(tied):
    together, apart = lora.bank(tied.params, 3, 4), lora.bank(separate(tied.params), 3, 4)
    assert together.nbytes == apart.nbytes
    kernel = apart.bind(separate(tied.params), [0, 1])["model"]["layers"]["mlp"]["up_proj"][
        "kernel"
    ]
    assert [type(layer) for layer in kernel.layers] == [LoraBank] * 3
