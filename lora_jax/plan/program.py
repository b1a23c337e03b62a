"""The train step of a config as shapes, each with its place on a mesh: no weights and no data.

model   = open_shapes(config)            # config.json alone
program = build(config, model, mesh)     # a mesh of devices, or an abstract one
program.compile()                        # of devices that need not be here
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import adapters as methods
from lora_jax import objectives, sharding, tree
from lora_jax.config import Config
from lora_jax.errors import UserError
from lora_jax.models.common import Model
from lora_jax.models.quantization import config_dtype
from lora_jax.quantize import SCHEMES, quantize_tree
from lora_jax.session import continue_adapter, open_session
from lora_jax.targets import Trainable, find_trainable
from lora_jax.train.optimizer import make_optimizer
from lora_jax.train.setup import check_training
from lora_jax.train.step import make_train_step

_FLOATS = ("float32", "bfloat16", "float16")
_METRICS = ("loss", "grad_norm", "supervised_tokens")


@dataclass(frozen=True)
class Program:
    """A train step and what goes into it: trees of `jax.ShapeDtypeStruct` with shardings."""

    config: Config
    model: Model  # its params are those of `base`
    mesh: Mesh | AbstractMesh
    base: Any
    adapters: Any
    optimizer: Any
    batch: dict[str, Any]
    key: Any

    @cached_property
    def trainable(self) -> Trainable:
        """Everything that the step trains of the base."""
        return find_trainable(self.model.params, self.config.adapter)

    @property
    def needs_key(self) -> bool:
        """Return True if the step reads its key; otherwise the compiler drops that argument."""
        return self.config.adapter.dropout > 0

    @property
    def unread(self) -> list:
        """Frozen weights that are fully replaced by trained copies: the compiler drops them from
        the arguments.
        """
        leaves = tree.flatten(self.base)
        whole = {part.path for part in self.trainable.whole if all(part.chosen)} & leaves.keys()
        return [leaves[path] for path in whole if isinstance(leaves[path], jax.ShapeDtypeStruct)]

    @property
    def metrics_bytes(self) -> int:
        """Bytes of the metrics that a step returns."""
        return 4 * (len(_METRICS) + len(objectives.metric_names(self.config)))

    def lower(self) -> Any:
        """Trace the step for the devices of the mesh, which must not be abstract."""
        placement = jax.tree.map(lambda leaf: leaf.sharding, (self.adapters, self.optimizer))
        optimizer = make_optimizer(self.config.train, self.config.adapter)
        step = make_train_step(self.model, self.config, optimizer, placement)
        assert isinstance(self.mesh, Mesh)
        with jax.set_mesh(self.mesh):
            return step.lower(self.adapters, self.optimizer, self.base, self.batch, self.key)


def open_shapes(config: Config) -> tuple[Config, Model]:
    """Return the settled config, and its model as shapes in the dtypes that a run would hold.

    Raises:
        UserError: as a run would, of model and adapters.
    """
    session = continue_adapter(open_session(config, weights=False))
    check_training(session)
    return session.config, stored(session.config, session.model)


def stored_dtype(config: Config, model: Model) -> str:
    """Return the dtype of weights that are not quantised: `base_dtype`, or that of config.json.

    Raises:
        UserError: config.json names another dtype than float32, bfloat16 or float16.
    """
    if config.base_dtype in _FLOATS:
        return str(config.base_dtype)
    name = config_dtype(model.hf_config)
    if name not in _FLOATS:
        raise UserError(
            f"{model.directory / 'config.json'}: dtype={name!r} is none of {', '.join(_FLOATS)}; "
            "set base_dtype"
        )
    return name


def stored(config: Config, model: Model) -> Model:
    """Return `model` with shapes in the dtype that weights are stored in before quantisation."""
    dtype = np.dtype(stored_dtype(config, model))
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.float32 if _is_fresh(path, model) else dtype)
        for path, leaf in tree.flatten(model.params).items()
    }
    return model.replace(params=tree.unflatten(leaves))


def _is_fresh(path: tree.Path, model: Model) -> bool:
    """Return True if a weight belongs to a head that starts at random."""
    return any(tree.dotted(path).startswith(f"{head}.") for head in model.fresh)


def build(config: Config, model: Model, mesh: Mesh | AbstractMesh) -> Program:
    """The step of `config` on `mesh`; `model` is that of `open_shapes`.

    Raises:
        UserError: a batch that the mesh does not divide; parameters that no rule covers.
    """
    micro = config.train.micro_batch_size
    sharding.check_batch(
        micro or config.train.batch_size, mesh, f"train.{'micro_' if micro else ''}batch_size"
    )
    sharding.check_length(config.data.max_length, mesh, "data.max_length")
    whole, full = model.params, config.adapter.trains_everything
    params = whole
    if config.base_dtype in SCHEMES:
        params = jax.eval_shape(lambda tree: quantize_tree(tree, str(config.base_dtype)), whole)
    of_init = whole if config.adapter.needs_float_base else params
    adapters = methods.shapes(of_init, config.adapter)
    adapter_specs = sharding.adapter_specs(adapters, params, model.rules, mesh)
    state = jax.eval_shape(make_optimizer(config.train, config.adapter).init, adapters)
    specs = tree.flatten(sharding.param_specs(params, model.rules, mesh))
    if full:
        base = jax.eval_shape(
            lambda: methods.init(jax.random.key(0), _zeros(whole), config.adapter)[0]
        )
    else:
        base = tree.unflatten(
            {
                path: jax.tree.map(lambda part, s=specs[path]: _place(part, s, mesh), leaf)
                for path, leaf in tree.flatten(params).items()
            }
        )
    host = config.train.optimizer_memory == "host"
    rows = (config.train.batch_size, config.data.max_length)
    names = ["tokens", "segment_ids", "positions"] + (["token_types"] if model.labels else [])
    names += ["seen_until"] if config.data.share_prompts is True else []
    batch = {name: jax.ShapeDtypeStruct(rows, np.int32) for name in names}
    if config.train.compares_answers:
        batch |= {n: jax.ShapeDtypeStruct(rows, np.int32) for n in ("pair_ids", "roles")}
    if config.train.needs_reference:
        batch["reference_log_probs"] = jax.ShapeDtypeStruct(rows, np.float32)
    batch["loss_weights"] = jax.ShapeDtypeStruct(rows, np.float32)
    return Program(
        config=config,
        model=model.replace(params=base),
        mesh=mesh,
        base=base,
        adapters=jax.tree.map(lambda leaf, spec: _place(leaf, spec, mesh), adapters, adapter_specs),
        optimizer=_place_state(state, tree.flatten(adapter_specs), mesh, host),
        batch={name: _place(leaf, sharding.BATCH, mesh) for name, leaf in batch.items()},
        key=_place(jax.eval_shape(lambda: jax.random.key(0)), P(), mesh),
    )


def _zeros(shapes: Mapping) -> Any:
    return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)


def _place(leaf: Any, spec: P, mesh: Mesh | AbstractMesh, memory: str | None = None) -> Any:
    place = NamedSharding(mesh, sharding._fit(spec, leaf.shape, mesh), memory_kind=memory)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _place_state(state: Any, specs: Mapping[tree.Path, P], mesh: Any, host: bool) -> Any:
    """Shard moments like their adapters, whose paths theirs end with; counts are replicated."""

    def place(keys: tuple[Any, ...], leaf: Any) -> Any:
        names = tuple(str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey))
        own = next((specs[names[i:]] for i in range(len(names)) if names[i:] in specs), P())
        return _place(leaf, own, mesh, "pinned_host" if host and leaf.ndim else None)

    return jax.tree_util.tree_map_with_path(place, state)


def device_numbers(leaf: Any) -> int:
    """Return the number of elements of a sharded leaf on each device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def device_bytes(shapes: Any) -> int:
    """Return the bytes of a tree of sharded shapes in the memory of each device."""
    return _bytes(shapes, on_host=False)


def host_bytes(shapes: Any) -> int:
    """Return the bytes of a tree of sharded shapes in host memory, for each device."""
    return _bytes(shapes, on_host=True)


def _bytes(shapes: Any, on_host: bool) -> int:
    return sum(
        device_numbers(leaf) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
        if (leaf.sharding.memory_kind == "pinned_host") == on_host
    )
