"""Report pages of what the commands write."""

import pytest

from lora_jax.cli import main, train_main
from lora_jax.report.page import make_page, parts

from ..train.conftest import files as files
from ..train.conftest import own_cache as own_cache

SPACE = "space: {adapter.rank: [1, 2], train.learning_rate: [1e-3, 1e-2]}\n"


@pytest.fixture(scope="module")
def written(files, tmp_path_factory):
    """What train, eval, sweep and plan wrote: by name, the arguments of `make_page`."""
    pytest.importorskip("altair")
    at = tmp_path_factory.mktemp("written")
    (at / "space.yaml").write_text(SPACE)
    sets = [f"data.{name}={files / 'rows.jsonl'}" for name in ("eval", "regression")]
    config = ["--config", str(files / "run.yaml"), *sets]
    assert train_main([*config, f"output_dir={at / 'run'}", "export.merged=true"]) == 0
    files_of_eval = ["--output", str(at / "scores.json"), "--predictions", str(at / "a.jsonl")]
    adapter = ["--adapter", str(at / "run" / "adapter")]
    assert main(["eval", *config, *adapter, *files_of_eval]) == 0
    assert (
        main(["sweep", *config, "--space", str(at / "space.yaml"), f"output_dir={at / 's'}"]) == 0
    )
    return {
        "run": (at / "run",),
        "eval": (at / "scores.json", at / "a.jsonl"),
        "sweep": (at / "s",),
    }


def rows_of(page, title):
    """The texts of the first table of a section."""
    section = next(one for one in page.sections if one.title == title)
    table = next(part for part in section.parts if isinstance(part, parts.Table))
    return [[one.text for one in row] for row in table.rows]


def test_a_run(written):
    page = make_page(*written["run"])
    assert [one.title for one in page.sections] == [
        *("Result", "Curves", "Answers before and after", "Norms of the update", "Merge"),
        *("Memory and time", "Data", "Config"),
    ]
    assert [row[0] for row in rows_of(page, "Result")] == [
        "held-out task: loss (nats per token)",
        "held-out task: bits per byte",
        "held-out task: exact match",
        "regression set: loss (nats per token)",
        "regression set: bits per byte",
    ]
    assert [row[1] for row in rows_of(page, "Data")] == ["4", "4", "4"]


def test_an_eval(written):
    page = make_page(*written["eval"])
    assert [one.title for one in page.sections] == ["Scores", "Task and forgetting", "Answers"]
    assert [row[0] for row in rows_of(page, "Scores")][0] == "base"
    samples = page.sections[2].parts[0]
    assert [len(one.answers) for one in samples.samples] == [2, 2, 2, 2]


def test_a_sweep(written):
    page = make_page(*written["sweep"])
    assert [one.title for one in page.sections] == [
        *("Result", "Settings and loss", "Task and forgetting", "All settings", "Curves"),
        *("Trials", "Config"),
    ]
    assert sorted(row[0] for row in rows_of(page, "Trials")) == ["0", "1", "2", "3"]


def test_a_plan(files, tmp_path, capsys):
    pytest.importorskip("altair")
    config = ["--config", str(files / "run.yaml"), "--topology", "v5e:2x2", "mesh.fsdp=4"]
    assert main(["plan", *config, "--no-compile", "--members", "2", "--json"]) == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    page = make_page(tmp_path / "plan.json")
    assert [one.title for one in page.sections] == [
        *("Does it fit", "Memory from shapes", "Speed", "Members of a sweep"),
    ]
