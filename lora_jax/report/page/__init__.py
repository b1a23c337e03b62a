"""Report pages: a run, a sweep, an eval or a plan as one HTML file that asks for nothing else.

    write_page(Path("runs/quickstart"), Path("quickstart.html"))

`run`, `sweep`, `evaluation` and `plan` turn files into sections, `charts` has their Vega-Lite
charts. The page allows no request and no script but its own two: Vega, and page.js.
"""

import base64
import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.cache import write_atomic
from lora_jax.errors import UserError
from lora_jax.report.page.parts import Chart, Page

_PACKAGES = ("altair", "vl_convert")
_HERE = Path(__file__).parent
_RUN = ("config.yaml", "metrics.jsonl", "summary.json")


def check_packages() -> None:
    """Raise if a package that pages need is not installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"a report page needs {' and '.join(missing)}: pip install 'lora_jax[report]'"
        )


def write_page(path: Path, output: Path, predictions: Path | None = None) -> None:
    """Write the page of a run or a sweep (its directory), an eval or a plan (its JSON file).
    `predictions` are the answers of an eval.

    Raises:
        UserError: a package is missing; files that are none of these, or cannot be read or written.
    """
    check_packages()
    text = render(make_page(path, predictions))
    try:
        write_atomic(output, text.encode("utf-8", "replace"), partial=f".{output.name}")
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from error


def make_page(path: Path, predictions: Path | None = None) -> Page:
    """Return the page of a run, a sweep, an eval or a plan.

    Raises:
        UserError: as `write_page`.
    """
    from lora_jax.report.page import evaluation, files, plan, run, sweep

    if predictions is not None and (path.is_dir() or not predictions.is_file()):
        why = "goes with the file of an eval" if path.is_dir() else "does not exist"
        raise UserError(f"--predictions {predictions} {why}")
    if (path / "sweep.json").is_file():
        return sweep.make(path)
    if path.is_dir():
        if any((path / name).is_file() for name in _RUN):
            return run.make(path)
        raise UserError(f"{path} has no sweep.json and none of {', '.join(_RUN)}: nothing to show")
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a directory of a run or a sweep")
    content = files.read_json(path)
    if isinstance(content, list) and content and all(map(_is_row, content)):
        return evaluation.make(path, content, predictions)
    if isinstance(content, dict) and isinstance(content.get("estimate"), dict):
        return plan.make(path, content)
    raise UserError(
        f"{path} is no file of `lora-jax eval --output` or `lora-jax plan --config C --json`"
    )


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and "adapter" in row


def render(page: Page) -> str:
    """Return a page as HTML."""
    import jinja2

    charts: list[Mapping[str, Any]] = []
    for section in page.sections:
        charts += [part.spec for part in section.parts if isinstance(part, Chart)]
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    scripts = [vega(), script] if charts else [script]
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(_HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        page=page,
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        charts=_for_script(charts),
        scripts=scripts,
        digests=[_digest(script) for script in scripts],
    )


def _for_script(content: Any) -> str:
    """Return JSON that cannot end the element that holds it."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _digest(script: str) -> str:
    """Return the source that allows a script in a content security policy."""
    found = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(found).decode()}'"


@functools.cache
def vega() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script, from files of the package vl-convert."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    known = vl_convert.get_vegalite_versions()
    bundle: Any = vl_convert.javascript_bundle  # its types know no default of the first parameter
    script = bundle(vl_version=version if version in known else None)
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
