"""Chat templates that loop, grow, reach for what is outside, or are no templates."""

from pathlib import Path
from random import Random
from typing import Any

from lora_jax import data, formats
from lora_jax.data import Row

from ..train.tiny import CHATML, write_tokenizer
from . import watch
from .damage import damage_bytes

TEMPLATES = {
    "plain": CHATML,
    "marked": CHATML.replace(
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
        "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}",
    ),
    "stripping": CHATML.replace("m['content'] +", "m['content'] | trim +"),
    "tools": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    + CHATML.replace(
        "m['content'] + '<|im_end|>\n' }}",
        "m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "{{ '<|im_end|>\n' }}",
    ),
}
HOSTILE_TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 'x' * 10**8 }}",
    "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "{{ 10 ** 10 ** 8 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'x'.center(1000000000) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for m in messages %}{{ m.content }}",
    "{{ raise_exception('no') }}",
    "{{ undefined_thing.x }}",
    "{{ messages[100].content }}",
    "{{ 1 / 0 }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ strftime_now('%Y' * 10**8) }}",
    "{{ (('a' * 30 + '!') | regex_replace('(a+)+$', '')) }}",
    "{{ lipsum(10**7) }}",
    "{{ range(10**10) | list | length }}",
    "{{ messages | map('upper') | list }}",
    "{{ '\\ud800' }}",
    "",
    "\0",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "{" * 5000,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{{ messages | sort(attribute='content') | random }}",
    "{{ [1] * 10**10 }}",
    "{{ dict(a=1).update }}",
    "{% for m in messages %}{% set _ = messages.append(m) %}{% endfor %}",
    "{% for m in messages %}{{ m.update({'content': 'changed'}) }}{{ m.content }}{% endfor %}",
)


def open_cases(sandbox: Path) -> watch.Make:
    """A tokenizer, and a maker of templates for it: hostile ones, and damaged good ones."""
    write_tokenizer(sandbox / "tokenizer")
    tokenizer = formats.load_tokenizer(sandbox / "tokenizer")
    good = (*TEMPLATES.values(), *HOSTILE_TEMPLATES)

    def make(random: Random, place: Path) -> watch.Case:
        source = random.choice(HOSTILE_TEMPLATES) if random.random() < 0.4 else _mixed(random, good)
        file = place / "chat.jinja"
        file.write_bytes(source.encode("utf-8", "surrogatepass"))
        names = ["chat.jinja", "chat template", "rows.jsonl:1"]
        return source[:300], names, lambda: _check(tokenizer, str(file))

    return make


def _mixed(random: Random, good: tuple[str, ...]) -> str:
    """Parts of two templates, with a few characters changed."""
    usual = tuple(TEMPLATES.values())
    one, other = random.choice(random.choice((usual, good))), random.choice(good)
    text = one[: random.randrange(len(one) + 1)] + other[random.randrange(len(other) + 1) :]
    if random.random() < 0.5:
        text = damage_bytes(random, text.encode())[1].decode("utf-8", "replace")
    return text if random.random() < 0.8 else one


def _check(tokenizer: Any, file: str) -> None:
    data.stop_tokens(tokenizer, file)
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    rows = [Row(turns, "rows.jsonl:1"), Row(turns + turns, "rows.jsonl:1")]
    for row in rows:
        data.prompt_tokens(row, tokenizer, chat_template=file)
        data.encode(row, tokenizer, chat_template=file, max_length=10_000)


if __name__ == "__main__":
    watch.main(open_cases)
