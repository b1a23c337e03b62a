"""Settings at random: YAML texts and overrides, right, wrong and hostile.

for text, overrides in cases(seed=0, count=2000): ...
"""

import random
from collections.abc import Iterator

from lora_jax import config as configs

KEYS = list(configs.all_keys(configs.Config, ""))
SECTIONS = sorted({key.partition(".")[0] for key in KEYS if "." in key})
UNKNOWN = (
    *("r", "lora_alpha", "epochs", "lr", "bf16", "per_device_train_batch_size", "ünïcode", "a.b"),
    *("train.seed", "eval.every", "0", "true", "null", "~", "''", "'a b'", "<<", "x" * 400, "🦙"),
    *("? [a, b]", "? {a: b}", "!!str k", "*x", "&x k", "? ", "1.5", "2026-11-26", "[a]", "{a: b}"),
)
VALUES = (
    *("0", "1", "-1", "2", "3", "1.5", "1e-3", "1E400", "-0.0", ".inf", "-.inf", ".nan", "nan"),
    *("inf", "infGB", "1_000", "010", "0x10", "0o7", "1:30", "9" * 50, "9" * 5000, "10**21"),
    *("true", "false", "yes", "no", "on", "off", "y", "n", "null", "~", "", "Null", "TRUE"),
    *("text", "''", '""', "'null'", "'true'", "auto", "none", "all-linear", "a,b", "5GB", "-1GB"),
    *("0GB", "nanMB", "1e30TB", "???", "${a}", "${oc.env:HOME}", "${", "\\${x}", "{{ x }}"),
    *("2026-11-26", "2026-13-45", "2026-11-26T10:00:00Z", "0000-00-00", "2026-02-30"),
    *("[]", "{}", "[a]", "[a, a]", "[1, 2]", "[true, no]", "[[a]]", "[null]", "[{a: b}]", "[a"),
    *("{a: 1}", "{a: b}", "{a: [1]}", "{a: {b: {c: d}}}", "{1: 2}", "{[a]: b}", "{a: 1, a: 2}"),
    *("{a", "a: b: c", "- a", "q_proj", "[q_proj]", "{q_proj: 4}", "{q_proj: 1.5}", "{q_proj: x}"),
    *("!!python/object:os.system x", "!!python/object/apply:os.getpid []", "!!binary x", "!x y"),
    *("!!timestamp x", "!!timestamp 2026-13-45", "!!int x", "!!float x", "!!bool x", "!!null x"),
    *("!!set {a, b}", "!!omap [a: b]", "!!pairs [a: b]", "!!str 5", "!!seq x", "!!map [a]"),
    *('"\\ud800"', '"\\0"', '"\\x07"', '"\\uFFFE"', "'unclosed", '"\\q"', "%x", "@x", "`x", "|x"),
    *("&a [*a]", "&a {b: *a}", "*missing", "&a x", "[" * 40 + "]" * 40, "[" * 3000, "{a: " * 60),
    *("x" * 300, "a/" * 3000, "/", "..", "/dev/null", "gs://b/p", "s3://b/p", "file:///x", "~"),
    *("(a+)+$", "(", "[z-a]", "*", "\\", "a\tb", "# x", "x # y", "- ", "--- a", "...", "你好", "é"),
    *("> folded", "|+", "? a", ": b", "a: b", "=", "<<: x", "[*x]", "0 0", "1 000", "١٢", "½"),
    *("linear", "cosine", "constant", "lora", "full", "prompt", "prefix", "dora", "nf4", "int8"),
    *("exact_match", "bleu", "tensorboard", "wandb", "[tensorboard, x]", "float32", "bfloat16"),
)
DOCUMENTS = (
    *("", "\n", "# only a comment\n", "---\n", "...\n", "--- \n--- \n", "a: 1\n---\nb: 2\n", "[]"),
    *("- a\n", "text", "5", "null", "~", "''", "{", "}", "]", "\t", "\ta: 1", "a:\n\t- b"),
    *("%YAML 1.3\n---\nmodel: m", "%TAG ! x\n---\n", "!!python/object:os.system {}", "!!map {}"),
    *("!!set {a}", "&a {b: *a}", "&a [*a]", "? {a: b}\n: c\n", "? [a]\n: c\n", "<<: {model: m}\n"),
    *("<<: [{model: m}, {seed: 1}]\n", "<<: 5\n", "model: m\n<<: *x\n", "model: m\nmodel: n\n"),
    "\n".join(
        ["a: &a [x, x, x, x, x, x, x, x, x]"]
        + [
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ]
    ),
    "a: &a {x: 1}\nb: &b {<<: *a, y: *a}\nc: {<<: [*a, *b], z: *b}\n",
    "data: {labels: [" + "a, " * 60_000 + "]}\n",
    "".join(f"k{i}: v\n" for i in range(3000)),
    "train: " + "{a: " * 300 + "}" * 300,
    "model: " + "m" * 2_100_000,
    "model: m\ntrain: {steps: 3}\ntrain: {steps: 4}\n",
    "model: m\ntrain:\ndata:\neval:\n",
    "\ufeffmodel: m\n",
    "model: m\x07\n",
    "model: m\x00\n",
    "model: m\u2028seed: 1\n",
    "model: m\r\nseed: 1\r\n",
)


def cases(seed: int, count: int) -> Iterator[tuple[str, list[str]]]:
    """Yield `count` pairs of a YAML text and a list of overrides."""
    chance = random.Random(seed)
    for document in DOCUMENTS[:count]:
        yield document, []
    for _ in range(count - len(DOCUMENTS)):
        text = _document(chance)
        if chance.random() < 0.2:
            text = _damaged(text, chance)
        overrides = [_override(chance) for _ in range(chance.choice((0, 0, 0, 1, 1, 2, 4)))]
        yield text, overrides


def _document(chance: random.Random) -> str:
    """Return a mapping of some settings, most of them known."""
    sections: dict[str, list[str]] = {"": ["model: tiny"]}
    for _ in range(chance.choice((0, 1, 1, 2, 3, 6))):
        key = chance.choice(KEYS) if chance.random() < 0.85 else chance.choice(UNKNOWN)
        section, _, name = key.rpartition(".")
        if chance.random() < 0.1:
            section = chance.choice(SECTIONS)
        sections.setdefault(section, []).append(f"{name}: {chance.choice(VALUES)}")
    lines = []
    for section, entries in sections.items():
        if not section:
            lines += entries
        elif chance.random() < 0.5:
            lines += [f"{section}:", *(f"  {entry}" for entry in entries)]
        else:
            lines.append(f"{section}: {{{', '.join(entries)}}}")
    if chance.random() < 0.05:
        lines.append(f"{chance.choice(SECTIONS)}: {chance.choice(VALUES)}")
    return "\n".join(lines) + "\n"


def _damaged(text: str, chance: random.Random) -> str:
    """Return the text with some characters replaced, left out, repeated or added."""
    letters = list(text)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(letters) + 1)
        added = chance.choice("\t\n\r :{}[],&*#?|-<>=!%@`'\"\\\x00\x1b\u2028é🦙~.0")
        letters[place : place + chance.choice((0, 1, 5))] = added * chance.choice((0, 1, 1, 40))
    return "".join(letters)


def _override(chance: random.Random) -> str:
    key = chance.choice(KEYS) if chance.random() < 0.8 else chance.choice((*UNKNOWN, *SECTIONS))
    if chance.random() < 0.1:
        key += chance.choice((".x", ".", ".a.b.c", "..", ".0", " ", ".🦙"))
    if chance.random() < 0.05:
        key = chance.choice(("", "=", ".", "a.b.c.d", ".train.steps", "train", "train..steps"))
    joint = "=" if chance.random() < 0.95 else chance.choice(("", "==", " = ", ":"))
    value = chance.choice(VALUES)
    if chance.random() < 0.05:
        value = chance.choice(("\udcff", "\x00", "a\nb", "{\n", "\ud800\udc00", "\x1b[31m"))
    return f"{key}{joint}{value}"
