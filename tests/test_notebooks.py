"""The notebooks run from top to bottom, and the first still computes every figure it is there for.

python tests/test_notebooks.py     # run all and store their outputs anew
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lora_jax import config as configs
from lora_jax.errors import UserError

DIRECTORY = Path(__file__).parents[1] / "notebooks"
LESSON, EXPORT = "01_lora_by_numbers.ipynb", "02_finetune_and_export.ipynb"
ANY_FLAX, MANY = "03_any_flax_model.ipynb", "04_many_adapters.ipynb"
PREFERENCES, POD = "05_preferences.ipynb", "06_laptop_to_pod.ipynb"
ALL = (LESSON, EXPORT, ANY_FLAX, MANY, PREFERENCES, POD)

BLOCK = 4 * (4096 + 4096) + 3 * (4096 + 11008)  # in + out of the seven matrices of a 7B block
SMOLLM2 = 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
LLAMA_1B = 16 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
LLAMA_8B = 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
# Each entry: what must stand in one line of the output. Numbers are counted here by hand.
FIGURES = [
    ("full:", 4096**2, "33.55 MB"),
    *[
        (f"r={rank} ", rank * 8192, f"{rank * 8192 / 4096**2:.4%}".replace("%", " %"))
        for rank in (8, 16, 32, 64)
    ],
    ("r=8 ", "131.1 KB"),
    ("four matrices", 4 * 16 * 8192),
    ("DoRA", 4096, "3.1250%"),
    ("alpha=16 r=8 ", "alpha/r = 2.0"),
    ("alpha=16 r=32", "alpha/r = 0.5"),
    ("alpha=64 r=32", "alpha/r = 2.0"),
    ("q, v:", 2 * 16 * 8192, "all-linear:", 16 * BLOCK, "4.77 times"),
    ("SmolLM2-135M", "r=8 ", 8 * SMOLLM2),
    ("SmolLM2-135M", "r=16 ", 16 * SMOLLM2),
    ("Llama-3.2-1B", 1_235_814_400, "r=1 ", LLAMA_1B),
    ("Llama-3.2-1B", "r=16 ", 16 * LLAMA_1B),
    ("Llama-3.1-8B", 8_030_261_248, "r=16 ", 16 * LLAMA_8B),
    ("Llama-3.1-8B", "q, v", "r=8 ", 32 * 8 * (8192 + 5120)),
    ("SmolLM2-135M r=16 + DoRA", 16 * SMOLLM2 + 30 * (3 * 576 + 2 * 192 + 2 * 1536)),
    *[("GPT-3 175B", f"r={rank} ", 96 * 2 * rank * 2 * 12288) for rank in (1, 4, 8)],
    ("70B, weights ", "140.0 GB"),
    ("70B, weights, gradients, Adam", "840.0 GB"),
    ("70B, the same with float32 masters", "1,120.0 GB"),
    ("65B, weights, gradients, Adam", "780.0 GB"),
    ("65B, frozen", "130.0 GB"),
    ("65B, 4 bits", "32.5 GB"),
    ("4.127 bits", "33.5 GB"),
    ("merged 700 GB", "shared 20.25 GB", "34.6 times"),
    *[
        (f"r={rank} ", "the best possible is", best)
        for rank, best in [(2, "1.9300"), (4, "0.0000")]
    ],
    ("Adam, alpha/r ", "1.000   1.000"),
    ("p=8 ", "at most 0.0e+00"),
    ("p=0.5 ", "at most 0.0e+00"),
]


def execute(name):
    """The notebook with the outputs of a new kernel; raises `CellExecutionError` with the cell."""
    notebook = nbformat.read(DIRECTORY / name, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(DIRECTORY)}},
    )
    client.execute(env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"})
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def printed(cell):
    return "".join(o.text for o in cell.get("outputs", ()) if o.output_type == "stream")


def holds(text, figure):
    """Whether one line of the text has all parts of the figure."""
    parts = [f"{part:,}" if isinstance(part, int) else part for part in figure]
    return any(all(part in line for part in parts) for line in text.splitlines())


@pytest.mark.slow
def test_the_lesson_computes_every_figure():
    notebook = execute(LESSON)
    # In one cell each: a figure that also stands elsewhere would hide that its own cell is gone.
    places = {figure: sum(holds(printed(c), figure) for c in notebook.cells) for figure in FIGURES}
    assert set(places.values()) == {1}, {f: n for f, n in places.items() if n != 1}
    assert len([o for o in outputs(notebook) if "image/png" in o.get("data", {})]) == 3


@pytest.mark.real
def test_finetune_and_export():
    text = "".join(map(printed, execute(EXPORT).cells))  # its cells hold the asserts
    assert "held-out loss" in text and "adapter_model.safetensors" in text


def test_a_flax_model_of_ones_own_learns_by_its_adapter():
    text = "".join(map(printed, execute(ANY_FLAX).cells))
    assert "unchanged at the start: True" in text and "equal but for rounding: True" in text
    right = {what: int(percent) for what, percent in re.findall(r"(.*right.*): (\d+)%", text)}
    assert right.pop("differences right") < 50
    assert len(right) == 4 and min(right.values()) >= 95
    assert float(re.search(r"over materialised: (.*)", text).group(1)) < 0.9


def test_many_adapters_answer_in_one_batch():
    text = "".join(map(printed, execute(MANY).cells))  # its cells hold the asserts
    for line in ("up    m -> n", "down  m -> l", "mno -> pqrstuvw   up", "ons -> ", "jmpsvy"):
        assert line in text
    before, now = re.search(r"programs: (\d+) before, (\d+) now", text).groups()
    assert before == now and int(before) > 5


@pytest.mark.slow
def test_preferences_and_an_objective_of_ones_own():
    text = "".join(map(printed, execute(PREFERENCES).cells))  # its cells hold the asserts
    assert re.search(r"loss +0\.693 at the first step", text)


@pytest.mark.slow
def test_from_laptop_to_pod():
    text = "".join(map(printed, execute(POD).cells))  # its cells hold the asserts
    assert f"{2 * 8_030_261_248 / 2**30:.2f} GiB of base" in text
    assert len(re.findall(r"up_proj \(2, \d+, \d+\)", text)) == 4


@pytest.mark.parametrize("name", ALL)
def test_stored_outputs_are_small_and_of_no_machine(name):
    content = (DIRECTORY / name).read_text(encoding="utf-8")
    notebook = nbformat.reads(content, as_version=4)
    nbformat.validate(notebook)
    assert len(content) < 300_000
    assert {o.output_type for o in outputs(notebook)} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert not [o.text for o in outputs(notebook) if o.get("name") == "stderr"]
    assert not re.search(r"/(home|root|tmp|Users|usr|opt|work|mnt)/|site-packages", content)


def test_the_readme_lists_every_notebook():
    text = (DIRECTORY.parent / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\((notebooks/.*?)\)", text)) == {
        f"notebooks/{file.name}" for file in DIRECTORY.glob("*.ipynb")
    }


def test_the_stored_error_is_what_a_wrong_key_says_now(capsys):
    notebook = nbformat.read(DIRECTORY / EXPORT, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "rnak" in cell.source]
    exec(cell.source, {"configs": configs, "SYSTEM": "", "UserError": UserError})
    assert printed(cell) == capsys.readouterr().out


if __name__ == "__main__":
    for name in ALL:
        nbformat.write(execute(name), DIRECTORY / name)
