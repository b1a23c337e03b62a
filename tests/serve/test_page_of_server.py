"""The page of the real server in a browser: adapters and a sum of them, side by side."""

import json

import pytest

from .browser import Page, chromium
from .live import BASE, live, options_of, write_files


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    files = write_files(tmp_path_factory.mktemp("files"))
    with live(options_of(*files)) as served:
        with chromium(tmp_path_factory.mktemp("profile")) as driver:
            found = Page(driver, f"{served.url}/")
            found.served = served
            yield found


def test_three_columns_have_the_servers_answers(page):
    page.open("column=&column=a1&column=a1*0.7%2Ba2*0.3&user=hello&max_tokens=12")
    page.listed()
    page.one("#send").click()
    page.until(lambda: len(page.finish()) == 3 and {*page.finish()} <= {"stop", "length"})
    shown = page.texts(".answer .text")
    assert len(shown) == 3
    for model, text in zip((BASE, "a1", "a1*0.7+a2*0.3"), shown, strict=True):
        answer = page.served.ok(
            "/v1/chat/completions",
            model=model,
            messages=[{"role": "user", "content": "hello"}],
            temperature=0,
            max_tokens=12,
        )
        expected = answer["choices"][0]["message"]["content"]
        assert "".join(text.split()) == "".join(expected.split()), model
    assert not page.severe()


def test_headers_of_the_page(page):
    response = page.served.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "frame-ancestors" in response.headers["content-security-policy"]
    assert json.dumps(BASE) not in response.text
