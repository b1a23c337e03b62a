"""The page at `/`, driven in a headless Chromium over a server whose answers are known."""

import json
import shlex
from urllib.parse import quote

import pytest
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.common.keys import Keys

from .browser import Page, chromium, programs, serving
from .stub import BASE, HOSTILE, KEY, Stub


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def served():
    stub = Stub()
    with serving(stub.app) as address:
        yield stub, address


@pytest.fixture
def stub(served):
    served[0].forget()
    return served[0]


@pytest.fixture
def page(driver, served, stub):
    driver.set_window_size(1400, 900)
    return Page(driver, served[1])


def columns(*names, **fields):
    """The part of a link that names columns and other settings."""
    parts = [("column", name) for name in names] + list(fields.items())
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in parts)


def test_models_are_listed_and_filtered(page):
    page.open()
    page.listed()
    assert page.one("#server").text == "tiny · 3,004 adapters · context of 2,048 tokens"
    # the base, and an adapter that is on the device
    assert page.texts(".column h3") == ["tiny base", "beta"]
    assert page.texts(".column .term .facts") == ["rank 8 · device · pinned"]
    picker = page.one(".column .picker input")
    picker.click()
    assert len(page.all(".column .option")) == 50
    assert page.one(".list .more").text == "2,954 more: type a part of the name"
    picker.send_keys("12 STY")
    names = page.texts(".option .term-name")
    assert "style-0012" in names and "style-1200" in names and all("12" in name for name in names)
    picker.send_keys(Keys.ARROW_DOWN, Keys.ENTER)
    assert page.texts(".column h3") == [names[1], "beta"]
    picker.send_keys("no such name")
    assert page.texts(".option") == []
    assert page.one(".list .more").text == "No adapter has such a name."
    assert page.severe() == []


def test_two_columns_are_streamed(page, stub):
    page.open(columns("", "alpha", temperature="0.5", seed="3"))
    page.listed()
    page.one("#system").send_keys("Be brief.")
    page.send("Grüße 🎈 \\n <b>you</b>")
    page.finished("stop", "stop")
    assert page.texts(".text") == [f"{name}: Grüße 🎈 \\n <b>you</b>" for name in (BASE, "alpha")]
    assert page.texts(".numbers div:nth-child(2) dd") == ["5", "5"]
    assert [path for path, _ in stub.requests] == ["/v1/chat/completions"] * 2
    bodies = sorted((body for _, body in stub.requests), key=lambda body: body["model"])
    assert [body.pop("model") for body in bodies] == ["alpha", BASE]
    assert bodies[0] == bodies[1]
    assert bodies[0] == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Grüße 🎈 \\n <b>you</b>"},
        ],
        "temperature": 0.5,
        "top_p": 1,
        "max_tokens": 256,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.until(lambda: page.one("#status").text == "Done.")
    assert page.severe() == []


def test_times_are_measured_from_the_first_text(page, driver):
    page.open(columns("alpha", user="one two three four"))
    page.listed()
    # a clock that goes on by 100 ms whenever it is read
    driver.execute_script("let time = 0; performance.now = () => time += 100")
    page.one("#send").click()
    page.finished("stop")
    assert page.texts(".numbers dd") == ["100 ms", "5", "10.0", "stop"]


def test_completions_and_messages_that_are_continued(page, stub):
    page.open(columns("alpha", mode="completion", prompt="Once upon", max_tokens=""))
    page.listed()
    page.one("#send").click()
    page.finished("stop")
    path, body = stub.requests.pop()
    assert path == "/v1/completions"
    assert body == {
        "model": "alpha",
        "prompt": "Once upon",
        "temperature": 0,
        "top_p": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.open(columns("alpha", user="A list:", assistant="1."))
    page.listed()
    assert page.one("#continues").is_displayed()
    page.one("#send").click()
    page.finished("stop")
    path, body = stub.requests.pop()
    assert [one["role"] for one in body["messages"]] == ["user", "assistant"]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


def test_weights_change_the_name_that_is_sent(page, stub):
    page.open(columns("alpha+beta", user="hello"))
    page.listed()
    assert page.texts(".model") == ["alpha*1+beta*1"]
    first, second = page.all("input[type=range]")
    assert [(one.get_attribute("min"), one.get_attribute("max")) for one in (first, second)] == [
        ("-2", "2")
    ] * 2
    first.send_keys(*[Keys.ARROW_LEFT] * 6)
    number = page.all(".weight input[type=number]")[1]
    number.send_keys(Keys.CONTROL, "a", Keys.NULL, "-0.333")
    assert page.texts(".model") == ["alpha*0.7+beta*-0.333"]
    assert page.all(".weight input[type=number]")[0].get_attribute("value") == "0.7"
    page.one("#send").click()
    page.finished("stop")
    assert [body["model"] for _, body in stub.requests] == ["alpha*0.7+beta*-0.333"]
    number.send_keys(Keys.CONTROL, "a", Keys.NULL, "9", Keys.TAB)
    assert number.get_attribute("value") == "2"
    assert page.texts(".model") == ["alpha*0.7+beta*2"]
    assert page.texts(".stale") == ["This is the answer of alpha*0.7+beta*-0.333"]
    number.send_keys(Keys.CONTROL, "a", Keys.NULL, "0")
    assert page.texts(".model") == ["alpha*0.7"]
    page.one(".term .cross").click()
    page.one(".term .cross").click()
    assert page.texts(".model") == [BASE]


def test_columns_are_added_up_to_the_streams_of_a_browser(page):
    page.open(columns("alpha"))
    page.listed()
    add = page.one("#add-column")
    while add.is_enabled():
        add.click()
    assert len(page.all(".column")) == 6
    page.all(".column .title .cross")[0].click()
    assert page.texts(".model") == [BASE] * 5
    assert add.is_enabled()


def test_stop_ends_the_requests(page, stub):
    page.open(columns("", "alpha"))
    page.listed()
    page.send("endless")
    page.until(lambda: all(text.count("word") > 2 for text in page.texts(".text")))
    page.all(".links button")[0].click()
    page.finished("stopped", "writing")
    page.until(lambda: stub.left == 1)
    page.one("#stop").click()
    page.finished("stopped", "stopped")
    page.until(lambda: stub.left == 2)
    assert [text.split(" word")[0] for text in page.texts(".text")] == [f"{BASE}:", "alpha:"]
    assert not page.one("#stop").is_enabled()
    assert page.texts(".problem") == ["", ""]


GONE = "There is no such model.\nNo model is named 'gone'.\nx-request-id req-1"
BUSY = "The server is busy. Try again in 7 s.\n64 requests are waiting.\nx-request-id req-1"
BROKEN = "The answer broke off.\nThe engine failed."
CUT = "The answer broke off.\nThe server closed the stream before its end."


@pytest.mark.parametrize(
    ("prompt", "model", "text", "problem"),
    [
        ("hello", "gone", "", GONE),
        ("busy", "alpha", "", BUSY),
        ("breaks", "alpha", "alpha:", BROKEN),
        ("cut", "alpha", "alpha:", CUT),
    ],
    ids=["404", "429", "error", "cut"],
)
def test_errors_are_shown_in_their_column(page, prompt, model, text, problem):
    page.open(columns(model, "beta", user=prompt))
    page.listed()
    page.all(".links button")[0].click()
    page.finished("error", "–")
    assert page.texts(".problem") == [problem, ""]
    assert page.texts(".text") == [text, ""]
    assert page.one("#status").text == "Done; 1 of 2 columns failed."


def test_an_error_goes_with_the_next_answer(page):
    page.open(columns("alpha", user="busy"))
    page.listed()
    page.one("#send").click()
    page.finished("error")
    page.send("hello")
    page.finished("stop")
    assert page.texts(".problem") == [""]
    assert page.texts(".text") == ["alpha: hello"]


def test_a_server_that_is_gone_is_an_error(driver):
    with serving(Stub().app) as address:
        page = Page(driver, address)
        page.open(columns("alpha", user="hello"))
        page.listed()
    page.one("#send").click()
    page.finished("error")
    assert page.one(".problem").text.startswith("The server cannot be reached.")
    page.until(lambda: page.one("#server").text.startswith("The list of models cannot be read."))


def test_a_key_is_asked_for_sent_and_kept_in_memory(page, stub, driver):
    stub.forget(key=KEY)
    page.open(columns("alpha", user="hello"))
    page.until(lambda: "asks for an API key" in page.one("#server").text)
    page.one("#send").click()
    page.finished("error")
    assert page.one(".problem").text.startswith("The server asks for an API key.")
    assert driver.switch_to.active_element == page.one("#key")
    assert stub.keys == [None] * len(stub.keys)
    page.one("#key").send_keys(KEY, Keys.ENTER)
    page.listed()
    page.one("#key").send_keys(Keys.CONTROL, Keys.ENTER)
    page.finished("stop")
    assert stub.keys[-1] == f"Bearer {KEY}"
    kept = driver.execute_script(
        "return [location.href, document.cookie, JSON.stringify(localStorage),"
        " JSON.stringify(sessionStorage)].join()"
    )
    assert KEY not in kept and "alpha" in kept
    driver.refresh()
    page.until(lambda: "asks for an API key" in page.one("#server").text)


def test_text_of_others_stays_text(page, driver):
    """Neither an adapter's name nor an answer nor a link becomes a part of the page."""
    page.open(columns(HOSTILE, "", system=HOSTILE))
    page.listed()
    page.all(".picker input")[1].send_keys("onerror")
    assert page.texts(".option .term-name") == [HOSTILE]
    page.send(f"{HOSTILE}<script>window.hacked=1</script>")
    page.finished("stop", "stop")
    assert page.texts(".text")[0] == f"{HOSTILE}: {HOSTILE}<script>window.hacked=1</script>"
    assert page.all("main img, main script, .text *") == []
    assert driver.execute_script("return window.hacked") is None
    assert page.severe() == []
    with pytest.raises(JavascriptException, match="TrustedHTML"):
        driver.execute_script("document.body.innerHTML = '<p>'")
    page.severe()
    driver.execute_script("fetch('http://localhost:9/').catch(() => 0)")
    page.until(lambda: any("connect-src" in one["message"] for one in page.severe()))


def test_a_link_repeats_a_comparison(page, driver):
    page.open(columns("alpha*0.7+beta*0.3", "gamma", temperature="0.9", user="two\nlines & more"))
    page.listed()
    page.one("#system").send_keys("Be + brief.")
    page.all(".picker input")[1].send_keys("style-0007", Keys.ENTER)
    page.until(lambda: "style-0007" in driver.current_url)
    link = driver.current_url
    page.open(link.partition("#")[2])
    page.listed()
    assert page.texts(".model") == ["alpha*0.7+beta*0.3", "gamma*1+style-0007*1"]
    values = {one: page.one(one).get_attribute("value") for one in ("#system", "#temperature")}
    assert values == {"#system": "Be + brief.", "#temperature": "0.9"}
    assert page.one("#messages textarea").get_attribute("value") == "two\nlines & more"
    assert driver.current_url == link


def test_curl_sends_the_same_request(page, stub, driver):
    page.open(columns("alpha", user="it's 'quoted' \\ & $HOME"))
    page.listed()
    page.one("#key-part summary").click()
    page.one("#key").send_keys(KEY)
    driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    page.all(".links button")[2].click()
    page.until(lambda: page.one("#status").text == "Copied: a curl command.")
    copied = driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert KEY not in copied
    words = shlex.split(copied.replace("\\\n", ""))
    page.one("#send").click()
    page.finished("stop")
    ((path, body),) = stub.requests
    assert words[:3] == ["curl", "-N", page.address.rstrip("/") + path]
    assert json.loads(words[-1]) == body
    assert "Authorization: Bearer $API_KEY" in words


@pytest.mark.parametrize("width", [360, 390, 768, 1400])
def test_nothing_is_wider_than_the_screen(page, driver, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open(columns("", "alpha*0.7+" + "b" * 128 + "*0.3", user="x" * 300))
        page.listed()
        page.one("#send").click()
        page.finished("stop", "error")
        scrolled = """return [window.innerWidth, ...["html", "body", "#ask", "#columns"].filter(
            (one) => (one = document.querySelector(one), one.scrollWidth > one.clientWidth)
        )]"""
        assert driver.execute_script(scrolled) == [width]
        outside = """return [...document.querySelectorAll("body *")].filter((one) =>
            one.getClientRects().length && one.getBoundingClientRect().right > innerWidth
        ).map((one) => one.outerHTML.slice(0, 80))"""
        assert driver.execute_script(outside) == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name(page, driver):
    page.open(columns("alpha+beta", user="a", assistant="b"))
    page.listed()
    page.one("#key-part summary").click()
    named = [
        (one.tag_name, one.accessible_name)
        for one in page.all("button, input, select, textarea")
        if one.is_displayed() and one.tag_name
    ]
    assert len(named) > 20
    assert [tag for tag, name in named if not name.strip()] == []
    assert page.one("#status").get_attribute("aria-live") == "polite"


def test_without_a_browser_the_test_is_skipped_and_ci_fails(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="chromium and chromedriver not found"):
        programs()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install"):
        programs()
