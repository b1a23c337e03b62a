"""A study: the YAML file of its name, and the trials so far in OUTPUT/NAME.json.

title, claim, source, note     texts of the page
config                         settings of a run
variants                       by name, settings by dotted key over these; `rates` of their own
rates                          learning rates of the coarse grid, half a decade apart
seeds                          the first one alone chooses the rate
around                         rates on each side of the best that are measured with every seed
halving                        of the coarse grid, as in a sweep's space
half                           a packaged set: every second row is data.regression
questions                      ask, measure (loss, general, rate), contrast of variants, claim: the
                               range in which the interval should be
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_jax import config as configs
from lora_jax import demo
from lora_jax.cache import write_atomic
from lora_jax.errors import UserError, nearest
from lora_jax.sweep.space import make_trial

HERE = Path(__file__).parent
NAMES = ("rates", "ranks", "targets", "batch", "scale", "forgetting", "methods")
# Nothing but losses is measured, and only a signal saves a checkpoint.
PLAIN = ("eval.before=false", "eval.generate=false", "train.divergence=null")
PLAIN += ("train.save_every=1000000", "train.save_total_limit=1")
SMALL = {"train.steps": 3, "train.warmup_steps": 0}
DECIDES = ("config", "variants", "rates", "seeds", "around", "halving", "half")
COMPLETE, STOPPED, DIVERGED = "complete", "stopped", "diverged"

Trial = Mapping[str, Any]  # variant, rate, seed, status, and losses if it is complete


@dataclass
class Study:
    """A study with its trials.

    content: of its file
    overrides: settings in place of those of `config`
    small: three steps, two rates and two seeds
    results: content of NAME.json
    """

    name: str
    content: Mapping[str, Any]
    output: Path
    overrides: tuple[str, ...] = ()
    small: bool = False
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.output / f"{self.name}.json"

    @property
    def variants(self) -> Mapping[str, Mapping[str, Any]]:
        return self.content["variants"]

    @property
    def seeds(self) -> list[int]:
        return self.content["seeds"][: 2 if self.small else None]

    @property
    def around(self) -> int:
        return self.content["around"]

    @property
    def trials(self) -> list[Trial]:
        return self.results["trials"]

    @property
    def key(self) -> str:
        """Digest of everything that decides the trials; texts and questions may change."""
        decides = [[self.content.get(name) for name in DECIDES], self.overrides, self.small]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def grid(self, variant: str) -> list[float]:
        """Return the rates of the coarse grid."""
        rates = self.variants[variant].get("rates", self.content["rates"])
        return rates[: 2 if self.small else None]

    def rate(self, variant: str, place: int) -> float:
        """Return a rate of the grid, or one beyond its ends, in half decades. Place -1 is below."""
        rates = self.grid(variant)
        end = min(max(place, 0), len(rates) - 1)
        return (
            rates[end] if place == end else float(f"{rates[end] * 10 ** ((place - end) / 2):.1e}")
        )

    def find(self, variant: str, place: int, seed: int) -> Trial | None:
        """Return a trial if it is there."""
        wanted = (variant, self.rate(variant, place), seed)
        return next((one for one in self.trials if point(one) == wanted), None)

    def config(self, variant: str, output: Path) -> configs.Config:
        """Return the config of a variant's trials, but for rate and seed."""
        overrides = [*PLAIN, *self._half(), *self.overrides]
        base = configs.parse(self.content["config"], overrides, f"{self.name}.yaml")
        settings = {k: v for k, v in self.variants[variant].items() if k != "rates"}
        settings |= {"output_dir": str(output), "resume": "auto"} | (SMALL if self.small else {})
        return make_trial(base, 0, settings).config

    def _half(self) -> list[str]:
        """Write every second row of `half`; `data.replay` leaves out those that are measured."""
        if "half" not in self.content:
            return []
        file = (self.output / f"{self.name}-general.jsonl").resolve()
        rows = demo.path(self.content["half"].removeprefix("demo:")).read_text(encoding="utf-8")
        write(file, "".join(rows.splitlines(keepends=True)[::2]))
        return [f"data.regression={file}"]

    def open(self, facts: Mapping[str, Any]) -> None:
        """Read the trials so far, or begin the file with some facts about this process.

        Raises:
            UserError: they are of other settings.
        """
        found = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else None
        if found is not None and found["key"] != self.key:
            raise UserError(
                f"{self.file} exists, with trials of other settings ({found['command']}); give "
                "another --output, or remove the file"
            )
        new = {"study": self.name, "key": self.key, "small": self.small, **facts}
        self.results = found or {**new, "complete": False, "seconds": 0.0, "trials": []}

    def add(self, trials: Iterable[Trial], seconds: float) -> None:
        """Add trials, in place of others at the same points, and write the file."""
        new = {point(one): one for one in trials}
        kept = [one for one in self.trials if point(one) not in new]
        self.results["trials"] = [*kept, *new.values()]
        self.results["seconds"] = round(self.results["seconds"] + seconds, 1)
        self.save()

    def save(self) -> None:
        """Write the file, with a line for each trial."""
        lines = ",\n".join(f"  {json.dumps(one)}" for one in self.trials)
        rest = {name: value for name, value in self.results.items() if name != "trials"}
        head = json.dumps(rest, indent=1).removesuffix("\n}")
        write(self.file, f'{head},\n "trials": [\n{lines}\n ]\n}}\n')


def write(file: Path, text: str) -> None:
    """Write a text file atomically, and make its directory."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.encode(), partial=f".{file.name}")


def point(trial: Trial) -> tuple[str, float, int]:
    """Return what no two trials of a study have in common."""
    return trial["variant"], trial["rate"], trial["seed"]


def load(name: str, output: Path, overrides: Sequence[str] = (), small: bool = False) -> Study:
    """Read the file of a study.

    Raises:
        UserError: there is none of this name.
    """
    if name not in NAMES:
        raise UserError(
            f"there is no study {name!r}; there are: {', '.join(NAMES)}, or all of them with all."
            f"{nearest(name, [*NAMES, 'all'])}"
        )
    content = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    return Study(name, content, output, tuple(overrides), small)
