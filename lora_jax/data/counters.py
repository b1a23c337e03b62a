"""Counters in the syntax tree of a Jinja template, for `lora_jax.data.sandbox`.

    {% for m in messages %}{{ m }}{% endfor %}
    {% for m in messages %}{% do _counted(True) %}{{ m | _written }}{% endfor %}

Filters named by COUNTED, WRITTEN and COMPARED are applied to loops, and to values that a template
concatenates or writes, or compares or hashes.
"""

from typing import Any

from jinja2 import nodes

COUNTED, WRITTEN, COMPARED = "_counted", "_written", "_compared"  # names of filters


def with_counters(node: Any) -> Any:
    """Insert a counter into every loop and around every value that is concatenated or written."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            made = [with_counters(one) if isinstance(one, nodes.Node) else one for one in value]
            setattr(node, field, made)
        elif isinstance(value, nodes.Node):
            setattr(node, field, with_counters(value))
    if isinstance(node, nodes.For):
        step = nodes.ExprStmt(_counted(nodes.Const(True)))
        node.body = [step.set_lineno(node.lineno), *node.body]
        if node.test is not None:
            node.test = nodes.And(_counted(nodes.Const(True)), node.test)
        node.set_lineno(node.lineno)
    if isinstance(node, nodes.Output):
        node.nodes = [
            one if isinstance(one, nodes.TemplateData) else _counted(one, WRITTEN)
            for one in node.nodes
        ]
    if isinstance(node, nodes.Compare):
        node.expr = _compared(node.expr)
    if isinstance(node, nodes.Operand):
        node.expr = _compared(node.expr)
    if isinstance(node, nodes.Getitem):
        node.arg = _compared(node.arg)
    if isinstance(node, nodes.Pair):
        node.key = _compared(node.key)
    if isinstance(node, nodes.Concat):
        node.nodes = [_counted(one, WRITTEN) for one in node.nodes]
        return _counted(node)
    return node


def _compared(node: nodes.Expr) -> Any:
    """Wrap a value that is compared or hashed, unless it is a constant of the template."""
    items = node.items if isinstance(node, nodes.List | nodes.Tuple) else [node]
    if isinstance(node, nodes.Slice) or all(isinstance(one, nodes.Const) for one in items):
        return node
    return _counted(node, COMPARED)


def _counted(node: nodes.Expr, name: str = COUNTED) -> Any:
    made = nodes.Filter(node, name, [], [], None, None)
    return made.set_lineno(getattr(node, "lineno", None) or 1)
