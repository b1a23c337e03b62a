"""Sizes and docstrings of the package, as CONTRIBUTING.md asks for them."""

import ast
import re
from pathlib import Path

import pytest

import lora_jax

ROOT = Path(lora_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 7
# A docstring begins with a verb or the thing that it is about.
BEGINNINGS = {"Of", "What", "Whether", "Where", "How", "Why", "Which", "As"}
KNOW_METHODS = ("config", "targets", "adapters")  # parts that may ask for a method by its name

Function = ast.FunctionDef | ast.AsyncFunctionDef


def nodes(kinds):
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, kinds):
                yield f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", node


def parameters(function):
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_files_have_one_subject():
    assert not [file for file in FILES if len(file.read_text().splitlines()) > LINES]


@pytest.mark.parametrize(
    ("measure", "most"),
    [
        (lambda node: node.end_lineno - node.lineno + 1, FUNCTION_LINES),
        (lambda node: len(parameters(node)), PARAMETERS),
    ],
    ids=["lines", "parameters"],
)
def test_functions_are_small(measure, most):
    large = [f"{where} {node.name}" for where, node in nodes(Function) if measure(node) > most]
    assert not large


def test_docstrings_begin_with_a_verb_or_the_thing():
    kinds = (ast.Module, ast.ClassDef, *Function.__args__)
    texts = ((where, ast.get_docstring(node)) for where, node in nodes(kinds))
    wrong = [where for where, text in texts if text and re.findall(r"\w+", text)[0] in BEGINNINGS]
    assert not wrong


def test_methods_say_what_they_can_do():
    """Others ask the properties of `AdapterConfig` and never compare the names of methods."""
    compared = re.compile(r"adapter\.method\s*(==|!=|in\b)|\bin VIRTUAL_TOKEN_METHODS")
    others = [file for file in FILES if file.relative_to(ROOT).parts[0] not in KNOW_METHODS]
    assert not [file for file in others if compared.search(file.read_text())]
