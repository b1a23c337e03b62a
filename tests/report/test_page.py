"""Report pages, opened in a headless Chromium."""

import json
import re

import pytest
from selenium.webdriver.support.ui import WebDriverWait

from lora_jax.cli import main
from lora_jax.report.page import make_page, series, write_page

from ..serve.browser import Page, chromium
from . import made

LARGEST = 3_000_000  # bytes of a page
CHARTS = "return document.querySelectorAll('.chart svg').length"
WIDE = """return [...document.querySelectorAll("body *")].filter((one) =>
    one.getClientRects().length && !one.closest(".table")
    && one.getBoundingClientRect().right > innerWidth + 1
).map((one) => one.outerHTML.slice(0, 80))"""
RESOURCES = "return performance.getEntriesByType('resource').map((one) => one.name)"
SEEN = {
    "run": ("Result", "Curves", "Answers before and after", "Norms of the update", "Merge")
    + ("Memory and time", "Data", "Config"),
    "sweep": ("Result", "Settings and loss", "Task and forgetting", "All settings", "Curves")
    + ("Trials", "Config"),
    "eval": ("Scores", "Task and forgetting", "Answers"),
    "plan": ("Does it fit", "Memory from shapes", "Memory from the compiler", "Speed")
    + ("Members of a sweep", "Other settings"),
}
NUMBER = {"run": 7, "sweep": 6, "eval": 1, "plan": 2}  # charts


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind, by the command."""
    pytest.importorskip("altair")
    directory = tmp_path_factory.mktemp("pages")
    scores, answers = made.write_eval(directory / "eval")
    commands = {
        "run": [made.write_run(directory / "run")],
        "sweep": [made.write_sweep(directory / "sweep")],
        "eval": [scores, "--predictions", answers],
        "plan": [made.write_plan(directory / "plan.json")],
    }
    for name, words in commands.items():
        output = directory / f"{name}.html"
        assert main(["report", *map(str, words), "--output", str(output)]) == 0
    return {name: directory / f"{name}.html" for name in commands}


def show(driver, file, width=1200, scheme="light"):
    """Open a page with room for all of its charts, and wait for these."""
    size = {"width": width, "height": 9000, "deviceScaleFactor": 1, "mobile": width < 500}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page = Page(driver, file.as_uri())
    page.open()
    drawn = WebDriverWait(driver, 120, poll_frequency=0.2)
    drawn.until(lambda _: driver.execute_script(CHARTS) == len(page.all(".chart")))
    return page


@pytest.mark.parametrize("name", list(SEEN))
def test_a_page_opens_without_errors_and_requests(driver, pages, name):
    assert pages[name].stat().st_size < LARGEST
    page = show(driver, pages[name])
    assert tuple(page.texts("h2")) == SEEN[name]
    assert driver.execute_script(CHARTS) == NUMBER[name]
    assert page.all(".chart.failed") == [] and page.severe() == []
    assert driver.execute_script(RESOURCES) == []
    assert driver.execute_script("return window.hacked ?? null") is None
    # an address in the page is the name of a format or a text in Vega, never loaded
    head = pages[name].read_text().partition("<script>")[0]
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", head.replace("<img src=x", ""))


@pytest.mark.parametrize("name", list(SEEN))
def test_a_page_in_the_dark_and_on_a_phone(driver, pages, name):
    page = show(driver, pages[name], width=390, scheme="dark")
    assert driver.execute_script(WIDE) == [] and page.severe() == []
    colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    assert driver.execute_script(colours) == ["rgb(230, 232, 232)", "rgb(21, 24, 26)"]
    text = driver.execute_script(
        "return document.querySelector('.chart svg text')?.getAttribute('fill')"
    )
    assert text in ("#a0a8ad", "#e6e8e8")


def test_the_page_of_a_run_has_its_figures(driver, pages):
    page = show(driver, pages["run"])
    rows = page.texts("#result tbody tr")
    assert rows[:2] == [
        "held-out task: loss (nats per token) 3.05 1.48 -1.5700",
        "held-out task: bits per byte 1.4667 0.7117 -0.7550",
    ]
    assert page.texts("#result .warning") == [made.WARNING]
    # texts of others stay text
    first = page.one("#answers-before-and-after .sample pre")
    assert first.get_property("textContent") == f"{made.HOSTILE} address 0"
    assert page.all("main img, main script") == []
    assert page.texts(".sample .wrong") and page.texts(".sample .right")
    cells = driver.execute_script(
        "return document.querySelectorAll('#norms-of-the-update .mark-rect.role-mark path').length"
    )
    assert cells == 7 * 30
    assert "lora-jax train --config" in page.one("#config .code").text
    assert "4,884,480 of 139,399,488 parameters" in page.one("#memory-and-time").text


def test_the_table_of_a_sweep_sorts(driver, pages):
    page = show(driver, pages["sweep"])
    heads = page.texts("#trials th")
    assert heads[:3] == ["trial", "adapter.rank", "train.learning_rate"]
    losses = page.texts("#trials td:nth-child(5)")
    known = [float(text) for text in losses if text != "–"]
    assert known[:28] == sorted(known[:28]) and len(losses) == 30
    page.all("#trials th button")[1].click()
    assert page.texts("#trials td:nth-child(2)") == ["1"] * 10 + ["4"] * 10 + ["16"] * 10
    page.all("#trials th button")[1].click()
    assert page.texts("#trials td:nth-child(2)")[0] == "16"
    assert page.all("#trials th")[1].get_attribute("aria-sort") == "descending"
    assert len(page.all("#trials td.best")) == 1
    assert page.severe() == []


def test_long_curves_are_thinned():
    curve = [(step, float(step % 7)) for step in range(1, 10_001)]
    found = series.thin(curve)
    assert len(found) == series.MOST and found[-1]["step"] == 10_000
    assert all(one["low"] <= one["value"] <= one["high"] for one in found)
    assert sum(one["value"] for one in found) / len(found) == pytest.approx(3, abs=0.01)
    assert series.thin(curve[:5]) == [{"step": s, "value": x} for s, x in curve[:5]]


def test_a_run_that_is_not_over(driver, tmp_path):
    run = made.write_run(tmp_path / "run", steps=30)
    for name in ("summary.json", "norms.jsonl", "predictions.jsonl"):
        (run / name).unlink()
    write_page(run, tmp_path / "page.html")
    page = show(driver, tmp_path / "page.html")
    assert page.texts(".warning") == ["The run is not over: step 30 of 30."]
    assert page.severe() == []


def test_a_run_resumed_after_its_last_step(tmp_path):
    """A single logged step makes no small chart, and no step no speed."""
    run = made.write_run(tmp_path / "run", steps=1)
    summary = json.loads((run / "summary.json").read_text()) | {"tokens_per_second": 0.0}
    (run / "summary.json").write_text(json.dumps(summary))
    parts = {section.title: section.parts for section in make_page(run).sections}
    assert not [
        part for part in parts["Curves"] if part.small and "metric" not in part.caption.lower()
    ]
    assert "speed" not in dict(parts["Memory and time"][0].shown)


MISTAKES = [
    (["missing"], "does not exist; give a directory of a run or a sweep"),
    (["empty"], "has no sweep.json and none of config.yaml, metrics.jsonl, summary.json"),
    (["other.json"], "is no file of `lora-jax eval --output` or `lora-jax plan --config C --json`"),
    (["broken.json"], "invalid JSON"),
    (["scores.json", "--predictions", "none.jsonl"], "--predictions none.jsonl does not exist"),
    (["empty", "--predictions", "other.json"], "goes with the file of an eval"),
    (["scores.json", "--predictions", "other.json"], "has no answers of `lora-jax eval"),
    (["scores.json", "--output", "empty"], "is a directory; give a file in it"),
    (["scores.json", "--output", "no/page.html"], "its directory is missing or not writable"),
    (["scores.json", "--output", "scores.json"], "is the page itself"),
    (["sweep"], "has no list of trials; is it the file of `lora-jax sweep`?"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes(words, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("altair")
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "sweep"):
        (tmp_path / name).mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text('{"trials": [{}]}')
    (tmp_path / "other.json").write_text('{"a": 1}\n')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "scores.json").write_text(json.dumps([{"adapter": "base", "task_loss": 1.0}]))
    assert main(["report", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lora_jax.report.page._PACKAGES", ("altair_that_is_absent",))
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 2
    assert "pip install 'lora_jax[report]'" in capsys.readouterr().err
