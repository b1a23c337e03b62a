"""Settings of the adapter, and the values that no model can take."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lora_jax.config.elsewhere import find_hint
from lora_jax.config.types import describe, fits, show
from lora_jax.errors import UnknownArgument, nearest, raise_all

VIRTUAL_TOKEN_METHODS = ("prompt", "prefix")  # methods that train virtual tokens
DATA_INITS = ("eva", "lora_ga")  # look at data
CHOICES = {
    "method": ("lora", "prompt", "prefix", "full"),
    "init": ("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "lora_ga"),
    "bias": ("none", "lora_only", "all"),
    "prompt_init": ("vocab", "text", "random"),
}
_MOST = 10**6  # rank, scale and counts that are no slip of the hand
# Settings that go with method=lora alone; rank, alpha and the like are read by no other.
_OF_LORA = (
    *("use_rslora", "use_dora", "init", "freeze_a", "lora_plus_ratio", "bias", "dropout"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "target_modules"),
    *("exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern"),
    *("calibration_batches", "eva_rho", "loftq_iter"),
)
_OF_VIRTUAL = ("num_virtual_tokens", "prompt_init", "prompt_text", "prefix_gate")


@dataclass(frozen=True)
class AdapterConfig:
    method: str = "lora"  # lora | prompt | prefix | full: every weight, the baseline
    rank: int = 8  # r: inner size of the update a @ b (PEFT: r)
    alpha: float = 16.0  # the update is scaled by alpha / rank (PEFT: lora_alpha)
    target_modules: str | list[str] = "all-linear"  # all-linear | names | regex for whole paths
    exclude_modules: str | list[str] | None = None  # as target_modules; wins over it
    layers_to_transform: int | list[int] | None = None  # one index or several; null: all
    rank_pattern: dict[str, int] = field(default_factory=dict)  # name or regex -> rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # name or regex -> alpha
    dropout: float = 0.0  # on the input of lora_a, in training only (PEFT: lora_dropout)
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead (arXiv 2312.03732)
    use_dora: bool = False  # train the size of every column on its own (arXiv 2402.09353)
    init: str = "default"  # default | gaussian | orthogonal | pissa | olora | loftq | eva | lora_ga
    calibration_batches: int = 1  # batches of data.train that init=eva and lora_ga look at
    eva_rho: float = 1.0  # eva: a rank grows up to so many times; others shrink (PEFT's is 2)
    loftq_iter: int = 1  # loftq: how often quantisation and factors are fitted to each other
    freeze_a: bool = False  # train lora_b alone (LoRA-FA, arXiv 2308.03303)
    lora_plus_ratio: float = 1.0  # rate of lora_b over that of lora_a (LoRA+, arXiv 2402.12354)
    bias: str = "none"  # none | lora_only | all: biases that train, of adapted modules or of all
    modules_to_save: list[str] | None = None  # modules that train whole, named as target_modules
    trainable_token_indices: list[int] | None = None  # tokens whose embeddings train
    ensure_weight_tying: bool | None = None  # tied models: embedding and head stay one or part
    path: str | None = None  # a PEFT adapter directory to continue from; its settings apply
    num_virtual_tokens: int | None = None  # prompt, prefix; null: 20, or as many as prompt_text has
    prompt_init: str = "vocab"  # vocab | text | random: what virtual tokens start as
    prompt_text: str | None = None  # for prompt_init=text; cut or repeated to num_virtual_tokens
    prefix_gate: bool = False  # weigh the prefix of a layer, from zero on (arXiv 2303.16199)

    @property
    def trains_everything(self) -> bool:
        """Every weight trains, and no adapter is written."""
        return self.method == "full"

    @property
    def trains_virtual_tokens(self) -> bool:
        """Virtual tokens train, which the forward takes as an argument; no weight changes."""
        return self.method in VIRTUAL_TOKEN_METHODS

    @property
    def trains_prompt(self) -> bool:
        """The virtual tokens are part of the input, and take positions of it."""
        return self.method == "prompt"

    @property
    def trains_prefix(self) -> bool:
        """The virtual tokens are keys and values of every layer, and take no positions."""
        return self.method == "prefix"

    @property
    def is_mergeable(self) -> bool:
        """The trained model can be written as plain weights."""
        return not self.trains_virtual_tokens

    @property
    def needs_data(self) -> bool:
        """The init looks at batches of data."""
        return self.init in DATA_INITS

    @property
    def changes_base(self) -> bool:
        """The init takes its part out of the base; loftq does from its second round on."""
        if self.init == "loftq":
            return self.loftq_iter > 1
        return self.init in ("pissa", "olora", "lora_ga")

    @property
    def needs_float_base(self) -> bool:
        """The init reads the weights before they are quantised."""
        return self.init == "loftq" or self.changes_base

    def __new__(cls, *_: Any, **given: Any):
        names = [f.name for f in dataclasses.fields(cls)]
        if unknown := [name for name in given if name not in names]:
            hints = "".join(find_hint(name) or nearest(name, names) for name in unknown)
            raise UnknownArgument(
                f"AdapterConfig has no {', '.join(unknown)}; it has: {', '.join(names)}.{hints}"
            )
        return super().__new__(cls)

    def __post_init__(self):
        raise_all(adapter_problems(self))


def adapter_problems(adapter: AdapterConfig) -> list[str]:
    """Return the values that no model can take."""
    wrong = [
        f"{f.name}={show(getattr(adapter, f.name))} is not {describe(f.type)}"
        for f in dataclasses.fields(AdapterConfig)
        if not fits(getattr(adapter, f.name), f.type)
    ]
    if wrong:
        return wrong
    ranks = {"rank": adapter.rank}
    ranks |= {f"rank_pattern[{name!r}]": rank for name, rank in adapter.rank_pattern.items()}
    alphas = {"alpha": adapter.alpha}
    alphas |= {f"alpha_pattern[{name!r}]": alpha for name, alpha in adapter.alpha_pattern.items()}
    problems = []
    for name, rank in ranks.items():
        if not 1 <= rank <= _MOST:
            bound = f"at most {_MOST:,}" if rank > _MOST else "at least 1"
            problems.append(f"{name}={show(rank)} must be {bound}")
    for name, alpha in alphas.items():
        if not 0 < alpha <= _MOST:
            bound = f"at most {_MOST:,}" if alpha > _MOST else "above 0"
            problems.append(f"{name}={show(alpha)} must be {bound}")
    if not 0 <= adapter.dropout < 1:
        problems.append(f"dropout={adapter.dropout} must be at least 0 and below 1")
    if not 0 < adapter.lora_plus_ratio <= _MOST:
        problems.append(f"lora_plus_ratio={adapter.lora_plus_ratio} must be above 0")
    for name, choices in CHOICES.items():
        value = getattr(adapter, name)
        if value not in choices:
            hint = nearest(str(value), choices)
            problems.append(f"{name}={value!r} is not one of: {', '.join(choices)}.{hint}")
    for name, most in (("calibration_batches", _MOST), ("eva_rho", 1000), ("loftq_iter", 1000)):
        value = getattr(adapter, name)
        if not 1 <= value <= most:
            bound = f"at most {most:,}" if value > most else "at least 1"
            problems.append(f"{name}={show(value)} must be {bound}")
    return problems + list(_method_problems(adapter))


def _method_problems(adapter: AdapterConfig) -> Iterable[str]:
    """Settings of other methods than the one that is chosen."""
    method = adapter.method
    given = {
        f.name: getattr(adapter, f.name)
        for f in dataclasses.fields(AdapterConfig)
        if getattr(adapter, f.name) != _default(f)
    }
    if method == "full":
        for name in (*_OF_LORA, "path", *_OF_VIRTUAL):
            if name in given:
                yield (
                    f"method=full trains every weight, and {name}={given[name]!r} is a setting "
                    "of adapters; leave one out"
                )
        return
    virtual = adapter.trains_virtual_tokens
    for name in _OF_LORA if virtual else _OF_VIRTUAL if method == "lora" else ():
        if name in given:
            other = "lora" if virtual else "prompt or prefix"
            yield (
                f"{name}={given[name]!r} is for method={other}, and this is method={method}; leave "
                "one out"
            )
    if not virtual:
        return
    count = adapter.num_virtual_tokens
    if count is not None and not 1 <= count <= _MOST:
        bound = f"at most {_MOST:,}" if count > _MOST else "at least 1"
        yield f"num_virtual_tokens={show(count)} must be {bound}"
    if (adapter.prompt_init == "text") != bool(adapter.prompt_text):
        yield (
            f"prompt_init={adapter.prompt_init} and prompt_text={adapter.prompt_text!r}: "
            "prompt_init=text and prompt_text need each other"
        )
    if adapter.prefix_gate and method == "prompt":
        yield (
            "prefix_gate=true is for method=prefix: virtual tokens of a prompt are ordinary "
            "tokens of the input, which no gate can weigh"
        )


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
