"""Members while they train: K places of one program, and what the host knows of each."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import adapters as methods
from lora_jax import data, sharding
from lora_jax.adapters import member as padding
from lora_jax.models.common import Model
from lora_jax.report import scores
from lora_jax.sweep import program
from lora_jax.sweep.groups import Group, Values, init_key, rates
from lora_jax.sweep.prepare import Member
from lora_jax.train import calibration
from lora_jax.train.evaluate import mean_loss
from lora_jax.train.monitor import LossMonitor
from lora_jax.train.reference import Reference, with_reference


@dataclass
class Place:
    """A member in training.

    step: steps done
    rates: its learning rates by step
    values: its arrays, as NumPy's
    """

    member: Member
    loader: Any
    values: Values
    rates: np.ndarray
    step: int = 0
    monitor: LossMonitor = field(default_factory=LossMonitor)
    loss: float | None = None  # of the last step

    def record(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, besides arrays."""
        return {
            "trial": self.member.number,
            "step": self.step,
            "loss": self.loss,
            "monitor": dataclasses.asdict(self.monitor),
        }


class Places:
    """The K places of a group, with the arrays of all of them.

    model: with the weights of the base
    base: digest of these
    """

    def __init__(self, group: Group, model: Model, mesh: Mesh, count: int, base: str, display: Any):
        self.group, self.model, self.mesh, self.base = group, model, mesh, base
        self.display = display
        self.taken: list[Place | None] = [None] * count
        self.adapters, self.opt_state = self._zeros()
        placement = jax.tree.map(lambda x: x.sharding, (self.adapters, self.opt_state))
        self._step = program.make_step(model, group, count, placement)
        self._put = program.make_put(placement)
        self._eval = program.make_eval(model, group)
        self._eval_pairs = program.make_eval_pairs(model, group)
        self._stacked: Values | None = None  # on the device, but for what changes every step
        self._row = NamedSharding(mesh, P(None, *sharding.BATCH))

    @property
    def free(self) -> list[int]:
        return [k for k, place in enumerate(self.taken) if place is None]

    @property
    def active(self) -> list[tuple[int, Place]]:
        return [(k, place) for k, place in enumerate(self.taken) if place is not None]

    @property
    def programs(self) -> int:
        """Number of compiled train steps."""
        return self._step._cache_size()

    def _zeros(self) -> tuple[Any, Any]:
        """Return empty places: adapters split like their base, and the optimizer's state."""
        count, joint, model = len(self.taken), self.group.joint, self.model
        specs = sharding.adapter_specs(joint.shapes, model.params, model.rules, self.mesh)
        shapes = jax.tree.leaves(joint.shapes)
        leaves, structure = jax.tree.flatten(specs, is_leaf=lambda x: isinstance(x, P))
        arrays = [
            jax.device_put(
                np.zeros((count, *one.shape), np.float32), NamedSharding(self.mesh, P(None, *spec))
            )
            for one, spec in zip(shapes, leaves, strict=True)
        ]
        adapters = jax.tree.unflatten(structure, arrays)
        values = self.group.values(self.group.members[0])
        with jax.set_mesh(self.mesh):
            state = program.init_state(values, self.group, adapters)
        whole = NamedSharding(self.mesh, P())
        counts = functools.partial(jax.device_put, device=whole)
        return adapters, jax.tree.map(
            lambda x: x if x.ndim else counts(np.zeros(count, x.dtype)), state
        )

    def open(self, member: Member) -> Place:
        """Return a member before its first step, without a place."""
        loader = member.loader
        if self.reference is not None:
            loader = with_reference(loader, self.reference, self.base, self.display)
        return Place(member, loader, self.group.values(member), rates(member.config.train))

    @functools.cached_property
    def reference(self) -> Reference | None:
        """The reference of an objective that compares with one: the base, for all members."""
        config = self.group.config
        return Reference(config, self.model, self.mesh) if config.train.needs_reference else None

    def enter(self, place: int, member: Member) -> None:
        """Give a free place to a member, with fresh adapters and optimizer state."""
        config, material = member.config, member.material
        calibrate = calibration.make_calibrate(
            config, self.model, material.train, material.encoder, self.mesh
        )
        with jax.set_mesh(self.mesh):
            own: Any = member.session.loaded
            if own is None:
                key, params = init_key(config), self.model.params
                own = methods.init(key, params, member.trainable, calibrate)[1]
            padded = padding.pad(own, self.group.joint)
            fresh = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), self.opt_state)
            state = (self.adapters, self.opt_state)
            self.adapters, self.opt_state = self._put(state, place, (padded, fresh))
        self.taken[place] = self.open(member)
        self._stacked = None

    def leave(self, place: int) -> None:
        """Free a place."""
        self.taken[place] = None
        self._stacked = None

    def step(self) -> dict[int, dict[str, float]]:
        """Take one step of every member. Return its metrics by place."""
        active = self.active
        batches = {k: place.loader.batch(place.step) for k, place in active}
        any_batch = next(iter(batches.values()))
        rows = [batches.get(k, any_batch) for k in range(len(self.taken))]
        batch = {
            name: jax.device_put(np.stack([one[name] for one in rows]), self._row)
            for name in any_batch
        }
        with jax.set_mesh(self.mesh):
            self.adapters, self.opt_state, measured = self._step(
                self._values(), self.adapters, self.opt_state, self.model.params, batch
            )
        found = {name: np.asarray(value) for name, value in measured.items()}
        for _, place in active:
            place.step += 1
        return {k: {name: float(x[k]) for name, x in found.items()} for k, _ in active}

    def _values(self) -> Values:
        """Return the arrays of all places for their next step."""
        some = self.active[0][1].values
        if (stacked := self._stacked) is None:
            every = [some if one is None else one.values for one in self.taken]
            stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *every)
            self._stacked = stacked
        rate = [0.0 if one is None else one.rates[one.step] for one in self.taken]
        step = [1 if one is None else one.step + 1 for one in self.taken]
        return dataclasses.replace(
            stacked,
            optimizer=dataclasses.replace(stacked.optimizer, rate=np.asarray(rate, np.float32)),
            step=np.asarray(step, np.int32),
            moves=np.asarray([one is not None for one in self.taken]),
        )

    def adapters_of(self, place: int) -> dict:
        """Return the adapters of a place in the shapes of its member."""
        own = self.taken[place]
        assert own is not None
        return padding.cut(program.take_place(self.adapters, place), own.member.trainable)

    def evaluate(self, place: int, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return the held-out losses of a place by their names in metrics.jsonl."""
        own = self.taken[place]
        assert own is not None
        member, found = own.member, {}
        with jax.set_mesh(self.mesh):
            adapters = program.take_place(self.adapters, place)
            for name, held_out in member.material.held_out.items():
                batches = list(_eval_batches(member, name, held_out))
                if name == "task" and member.config.train.compares_answers:
                    measured = self._compare(own, adapters, batches)
                    found["task_loss"] = measured.pop("loss")
                    found |= {f"task_{key}": value for key, value in measured.items()}
                    continue
                settings = own.values.adapter
                found[f"{name}_loss"] = mean_loss(
                    lambda adapters, params, batch, s=settings: self._eval(
                        adapters, s, params, batch
                    ),
                    *(adapters, self.model.params, batches, self.mesh),
                    check=check,
                )
        return found

    def _compare(self, own: Place, adapters: Any, batches: list) -> dict[str, float]:
        """Return the means of the objective's metrics over answers to compare."""
        totals: dict[str, float] = {}
        weights = 0.0
        for batch in batches:
            placed = sharding.place_batch(batch, self.mesh)
            if self.reference is not None:
                placed = self.reference.attach(placed)
            sums, weight = self._eval_pairs(adapters, own.values, self.model.params, placed)
            weights += float(weight)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return {name: total / weights for name, total in totals.items()}

    def restore(
        self, records: list[Mapping[str, Any] | None], members: Mapping[int, Member]
    ) -> None:
        """Take up the members of a checkpoint, whose arrays are in place already."""
        for k, record in enumerate(records):
            if record is None:
                continue
            place = self.open(members[record["trial"]])
            place.step, place.loss = record["step"], record["loss"]
            place.monitor = LossMonitor(**record["monitor"])
            self.taken[k] = place


def _eval_batches(member: Member, name: str, held_out: Any) -> list[dict[str, np.ndarray]]:
    """Return the batches of a held-out set, as those of an evaluation in a run."""
    config = member.config
    measured = scores.spread(held_out.examples, config.eval.loss_examples)
    measured = data.with_places(measured, member.material.encoder.places)
    room = max([config.data.max_length, *(len(one.tokens) for one in measured)])
    shares = config.data.share_prompts is True and name == "task"
    return list(data.eval_batches(measured, config.eval.batch_size, room, shares))
