"""Settings of the adapter, and checks of them that need no model."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lora_jax.config.elsewhere import find_hint
from lora_jax.config.options import LARGEST_SEED, option, options_of, type_problems
from lora_jax.errors import UnknownArgument, nearest, raise_all

VIRTUAL_TOKEN_METHODS = ("prompt", "prefix")  # methods that train virtual tokens
DATA_INITS = ("eva", "lora_ga")  # look at data
_LORA = ("lora",)
_VERA = ("vera",)
_WEIGHTS = (*_LORA, *_VERA)  # methods that change chosen weights
_ADAPTERS = (*_WEIGHTS, *VIRTUAL_TOKEN_METHODS)
_VERA_RANK = 256  # by default
_MOST = 10**6  # rank, scale and counts that are no slip of the hand


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter: its method, rank, targets and init. docs/methods.md compares the methods."""

    # lora: low-rank updates of weights. vera: vectors that scale shared random matrices, for
    # adapters about ten times smaller. prompt, prefix: train virtual tokens and no weight, for
    # very small adapters. full: train every weight, as the baseline
    method: str = option("lora", choices=(*_LORA, *VIRTUAL_TOKEN_METHODS, "full", *_VERA))
    # r: inner size of the update a @ b (PEFT: r); 256 by default with method=vera
    rank: int = option(8, at_least=1, at_most=_MOST)
    # the update is scaled by alpha / rank (PEFT: lora_alpha)
    alpha: float = option(16.0, above=0, at_most=_MOST)
    # modules that get an adapter: all-linear (all but embeddings and the output head), names of
    # modules, or a regex for whole paths
    target_modules: str | list[str] = option("all-linear", methods=_WEIGHTS)
    # modules that get none, written as target_modules, over which it wins
    exclude_modules: str | list[str] | None = option(None, methods=_WEIGHTS)
    # layers that get adapters: one index or several; null: all
    layers_to_transform: int | list[int] | None = option(None, methods=_WEIGHTS)
    # rank of some modules: {name or regex: rank}
    rank_pattern: dict[str, int] = option({}, methods=_LORA)
    # alpha of some modules: {name or regex: alpha}
    alpha_pattern: dict[str, float] = option({}, methods=_LORA)
    # dropout on the input of lora_a, in training only; try 0.05 to 0.1 where a small data set is
    # overfitted (PEFT: lora_dropout)
    dropout: float = option(0.0, at_least=0, below=1, methods=_WEIGHTS, with_path=True)
    # scale by alpha / sqrt(rank) instead, so that large ranks keep their effect; use it from rank
    # 64 or so (arXiv 2312.03732)
    use_rslora: bool = option(False, methods=_LORA)
    # DoRA: train the norm of every column on its own; may help at low ranks, and makes steps
    # slower (arXiv 2402.09353)
    use_dora: bool = option(False, methods=_LORA)
    # start of lora_a and lora_b. default: as in PEFT. zero_a: lora_a is zero and lora_b random, for
    # runs that must not depend on the order of devices. pissa, olora, lora_ga: from a part of the
    # base, for faster progress. loftq: from the error of a quantised base. eva, lora_ga: look at
    # data first. docs/methods.md
    init: str = option(
        "default",
        choices=(
            *("default", "gaussian", "orthogonal", "zero_a", "pissa", "olora", "loftq", "eva"),
            "lora_ga",
        ),
        methods=_LORA,
    )
    # batches of data.train that init=eva and lora_ga look at; more give a steadier start
    calibration_batches: int = option(
        1, at_least=1, at_most=_MOST, methods=_LORA, inits=DATA_INITS, resumable=True
    )
    # init=eva: a rank may grow to so many times its value while others shrink; 1: none changes
    # (PEFT's default is 2)
    eva_rho: float = option(1.0, at_least=1, at_most=1000, methods=_LORA, inits=("eva",))
    # init=loftq: rounds in which quantisation and factors are fitted to each other; more than 1
    # changes the base, and then only a merged model can be exported
    loftq_iter: int = option(1, at_least=1, at_most=1000, methods=_LORA, inits=("loftq",))
    # train lora_b alone, for a smaller optimizer state (LoRA-FA, arXiv 2308.03303)
    freeze_a: bool = option(False, methods=_LORA, with_path=True)
    # learning rate of lora_b over that of lora_a; the paper uses 16 (LoRA+, arXiv 2402.12354)
    lora_plus_ratio: float = option(1.0, above=0, at_most=_MOST, methods=_LORA, with_path=True)
    # biases that train: none, those of adapted modules (lora_only), or all of the model
    bias: str = option("none", choices=("none", "lora_only", "all"), methods=_WEIGHTS)
    # modules that train in full, named as in target_modules, such as a new classifier head
    modules_to_save: list[str] | None = option(None, methods=_WEIGHTS)
    # IDs of tokens whose embeddings train, such as tokens that are new to the model
    trainable_token_indices: list[int] | None = option(None, methods=_LORA)
    # for models with tied embeddings: true trains embedding and head as one, false makes them two
    # weights; null: an error where it would matter
    ensure_weight_tying: bool | None = option(None, methods=_WEIGHTS)
    # a PEFT adapter directory whose adapter is trained further, with the settings stored there
    path: str | None = option(None, is_path=True, methods=_ADAPTERS, resumable=True, with_path=True)
    # virtual tokens of method=prompt and prefix; null: 20, or as many tokens as prompt_text has
    num_virtual_tokens: int | None = option(
        None, at_least=1, at_most=_MOST, methods=VIRTUAL_TOKEN_METHODS
    )
    # start of virtual tokens: random tokens of the vocabulary (vocab), prompt_text (text), or
    # noise (random), which learns slowly
    prompt_init: str = option(
        "vocab", choices=("vocab", "text", "random"), methods=VIRTUAL_TOKEN_METHODS
    )
    # the text of prompt_init=text; cut or repeated to num_virtual_tokens
    prompt_text: str | None = option(None, methods=VIRTUAL_TOKEN_METHODS)
    # weigh the prefix of each layer by a trained gate that begins at zero, so that training starts
    # from the model as it is (arXiv 2303.16199)
    prefix_gate: bool = option(False, methods=VIRTUAL_TOKEN_METHODS)
    # vera: start of lambda_d; 0.1 or less is best (arXiv 2310.11454)
    d_initial: float = option(0.1, above=0, at_most=_MOST, methods=_VERA)
    # vera: seed of the frozen matrices, as in PEFT
    projection_prng_key: int = option(0, at_least=0, at_most=LARGEST_SEED, methods=_VERA)

    @property
    def trains_everything(self) -> bool:
        """Every weight trains, and no adapter is written."""
        return self.method == "full"

    @property
    def trains_lora(self) -> bool:
        """Updates of low rank train, with `lora_a` and `lora_b` of their own."""
        return self.method == "lora"

    @property
    def trains_vera(self) -> bool:
        """Vectors train that scale shared random matrices."""
        return self.method == "vera"

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
        """The init needs batches of data."""
        return self.init in DATA_INITS

    @property
    def changes_base(self) -> bool:
        """The init subtracts its factors from the base; loftq does from its second round on."""
        if self.init == "loftq":
            return self.loftq_iter > 1
        return self.init in ("pissa", "olora", "lora_ga")

    @property
    def needs_float_base(self) -> bool:
        """The init reads the weights before they are quantised."""
        return self.init == "loftq" or self.changes_base

    def __new__(cls, *positional: Any, **given: Any):
        names = [f.name for f in dataclasses.fields(cls)]
        if unknown := [name for name in given if name not in names]:
            hints = "".join(find_hint(name) or nearest(name, names) for name in unknown)
            raise UnknownArgument(
                f"AdapterConfig has no {', '.join(unknown)}; it has: {', '.join(names)}.{hints}"
            )
        made = super().__new__(cls)
        method = positional[0] if positional else given.get("method")
        if method == "vera" and len(positional) < 2 and "rank" not in given:
            object.__setattr__(made, "_takes_vera_rank", True)
        return made

    def __post_init__(self):
        if self.__dict__.pop("_takes_vera_rank", False):
            object.__setattr__(self, "rank", _VERA_RANK)
        raise_all(adapter_problems(self))


def adapter_problems(adapter: AdapterConfig) -> list[str]:
    """Return the problems that are known without a model, one line each."""
    if wrong := list(type_problems(adapter)):
        return wrong
    problems = []
    for name, rule in _OPTIONS.items():
        problems.append(rule.problem(name, getattr(adapter, name), spec=","))
        for key, value in getattr(adapter, f"{name}_pattern", {}).items():
            problems.append(rule.problem(f"{name}_pattern[{key!r}]", value, spec=","))
    return [*filter(None, problems), *_method_problems(adapter)]


def _method_problems(adapter: AdapterConfig) -> Iterable[str]:
    """Yield the settings of other methods than the one that is chosen."""
    method, default = adapter.method, _plain_fields()
    for name, rule in _OPTIONS.items():
        value = getattr(adapter, name)
        if value == default[name] or not rule.methods or method in rule.methods:
            continue
        if adapter.trains_everything:
            yield (
                f"method=full trains every weight, and {name}={value!r} is a setting of adapters; "
                "leave one out"
            )
        else:
            yield (
                f"{name}={value!r} is for method={' or '.join(rule.methods)}, and this is "
                f"method={method}; leave one out"
            )
    if adapter.init == "zero_a" and adapter.freeze_a:
        yield "init=zero_a and freeze_a=true: lora_a would stay zero and nothing learn; drop one"
    if adapter.trains_vera and adapter.alpha != default["alpha"]:
        yield f"alpha={adapter.alpha!r} is for method=lora, and this is method=vera; leave one out"
    if adapter.trains_vera and adapter.ensure_weight_tying:
        yield (
            "ensure_weight_tying=true is for method=lora: vera adapts the output head and not an "
            "embedding that is tied to it; set it to false"
        )
    if not adapter.trains_virtual_tokens:
        return
    if (adapter.prompt_init == "text") != bool(adapter.prompt_text):
        yield (
            f"prompt_init={adapter.prompt_init} and prompt_text={adapter.prompt_text!r}: "
            "prompt_init=text and prompt_text need each other"
        )
    if adapter.prefix_gate and adapter.trains_prompt:
        yield (
            "prefix_gate=true is for method=prefix: virtual tokens of a prompt are ordinary "
            "tokens of the input, which no gate can weigh"
        )


def _plain_fields() -> dict[str, Any]:
    """Return the defaults by name; `AdapterConfig()` would check itself again."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(AdapterConfig)
    }


_OPTIONS = options_of(AdapterConfig)
