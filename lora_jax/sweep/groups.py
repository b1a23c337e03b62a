"""Groups of trials that train as one program, and their members as arrays.

Members of a group may differ in whatever the program takes as data: rank and targets (padding and
zeros), alpha, dropout, the start, AdamW's numbers, the objective's numbers, seed, data and steps.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lora_jax.adapters import member as padding
from lora_jax.config import AdapterConfig, Config, TrainConfig
from lora_jax.sweep.prepare import Member
from lora_jax.targets import Trainable
from lora_jax.train.optimizer import Numbers, make_schedule, numbers_of

# Settings that members of a group may differ in.
_ADAPTER = (
    *("rank", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "dropout", "init"),
    *("target_modules", "exclude_modules", "layers_to_transform", "lora_plus_ratio"),
    *("calibration_batches", "eva_rho", "loftq_iter"),
)
_TRAIN = (
    *("learning_rate", "schedule", "warmup_steps", "final_rate", "weight_decay", "beta1", "beta2"),
    *("epsilon", "grad_clip", "steps", "epochs", "eval_every", "save_every", "log_every"),
    *("save_total_limit", "early_stopping_patience", "load_best_model_at_end", "divergence"),
    *("metric_for_best_model", "report_to"),
)
_NUMBERS = {  # numbers of objectives, which are data where members differ
    "train": ("label_smoothing", "z_loss", "router_aux_loss_coef"),
    "objective": (
        *("beta", "label_smoothing", "sft_weight", "base_kl", "gamma"),
        *("desirable_weight", "undesirable_weight"),
    ),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Values:
    """Arrays in which the members of a program differ, besides adapters and batches.

    objective: numbers of the objective by dotted key
    key: of dropout; every step folds its number in
    step: number of the step, from 1
    moves: False for a place without a member, or with one that has stopped
    """

    adapter: padding.MemberSettings
    optimizer: Numbers
    objective: dict[str, Any]
    key: Any
    step: Any
    moves: Any


@dataclass(frozen=True)
class Group:
    """Trials of one program.

    joint: the trainable tree with room for each of them
    numbers: numbers of the objective that are data
    """

    number: int
    members: tuple[Member, ...]
    joint: Trainable
    numbers: tuple[str, ...]

    @property
    def config(self) -> Config:
        """The config of its first trial, of which the program takes what all share."""
        return self.members[0].config

    def values(self, member: Member) -> Values:
        """Return the arrays of a member before its first step, as NumPy's."""
        config = member.config
        numbers = dataclasses.replace(numbers_of(config.train, config.adapter), rate=0.0)
        return Values(
            adapter=padding.settings_of(member.trainable, self.joint),
            optimizer=jax.tree.map(np.float32, numbers),
            objective={name: np.float32(read_number(config, name)) for name in self.numbers},
            key=np.asarray(jax.random.key_data(dropout_key(config))),
            step=np.int32(0),
            moves=np.bool_(False),
        )

    def describe(self) -> str:
        """Return a line on the trials of the group."""
        numbers = ", ".join(str(one.number) for one in self.members[:8])
        more = f" and {len(self.members) - 8} more" if len(self.members) > 8 else ""
        return f"trials {numbers}{more}"


def init_key(config: Config) -> jax.Array:
    """Return the key of the adapters' start, as in a run."""
    return jax.random.split(jax.random.key(config.seed))[0]


def dropout_key(config: Config) -> jax.Array:
    """Return the key of dropout, as in a run."""
    return jax.random.split(jax.random.key(config.seed))[1]


def rates(config: TrainConfig) -> np.ndarray:
    """Return the learning rate of every step."""
    return np.asarray(jax.vmap(make_schedule(config))(np.arange(config.total_steps)), np.float32)


def read_number(config: Config, name: str) -> Any:
    """Return a number of the objective by its dotted key."""
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def with_numbers(config: Config, numbers: Mapping[str, Any]) -> Config:
    """Return a config with other numbers of the objective, which may be arrays."""
    for section in ("train", "objective"):
        own = {n.partition(".")[2]: x for n, x in numbers.items() if n.startswith(section)}
        replaced = dataclasses.replace(getattr(config, section), **own)
        config = dataclasses.replace(config, **{section: replaced})
    return config


def make_groups(members: Iterable[Member], varied: Sequence[str] = ()) -> list[Group]:
    """Return the groups of some members. `varied` are settings that later members may differ in."""
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(group_key(member), []).append(member)
    return [make_group(i, own, varied) for i, own in enumerate(found.values())]


def make_group(number: int, members: Sequence[Member], varied: Sequence[str] = ()) -> Group:
    """Return the group of members that share a program."""
    joint = padding.join([one.trainable for one in members])
    changing = next(
        (one.config.adapter for one in members if one.config.adapter.changes_base), None
    )
    if changing is not None:  # objectives that compare with the base refuse such an init
        joint = dataclasses.replace(
            joint, config=dataclasses.replace(joint.config, init=changing.init)
        )
    names = [f"{section}.{name}" for section, names in _NUMBERS.items() for name in names]
    first = members[0].config
    differ = [
        name
        for name in names
        if (name in varied and read_number(first, name) is not None)
        or any(read_number(one.config, name) != read_number(first, name) for one in members)
    ]
    return Group(number, tuple(members), joint, tuple(differ))


def group_key(member: Member) -> str:
    """Return what the members of a group have in common."""
    config = member.config
    adapter = _blank(config.adapter, _ADAPTER) if config.adapter.trains_lora else config.adapter
    if not config.adapter.trains_lora:  # shapes of other methods are not padded
        adapter = _blank(adapter, ("dropout",))
    train = _blank(config.train, (*_TRAIN, *_NUMBERS["train"]))
    objective = dataclasses.asdict(config.objective)
    for name in _NUMBERS["objective"]:
        objective[name] = objective[name] is None
    found = member.trainable
    parts = [adapter, train, objective, member.shapes, found.whole, found.rows, found.virtual]
    return repr(parts)


def _blank(settings: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return settings as a dict, without some."""
    found = settings if isinstance(settings, dict) else dataclasses.asdict(settings)
    return {name: value for name, value in found.items() if name not in names}


def reasons(groups: Sequence[Group]) -> str:
    """Return the settings in which the programs of several groups differ."""
    found = []
    for section, kind in (("adapter", AdapterConfig), ("train", TrainConfig)):
        free = _ADAPTER if section == "adapter" else (*_TRAIN, *_NUMBERS["train"])
        for one in dataclasses.fields(kind):
            values = {repr(getattr(getattr(g.config, section), one.name)) for g in groups}
            if len(values) > 1 and one.name not in free:
                found.append(f"{section}.{one.name}")
    if len({repr(group.members[0].shapes) for group in groups}) > 1:
        found.append("the shapes of batches")
    return ", ".join(found) or "what the program computes"
