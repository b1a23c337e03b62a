"""A headless Chromium, and an app that it can open: `serving` runs any ASGI app on a free port."""

import os
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless",
    "--no-sandbox",  # Chromium has no sandbox for root, as which containers run
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--lang=en",
)


def programs():
    """The paths of Chromium and its driver. Without them a test is skipped, in CI it fails."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser and driver:
        return browser, driver
    absent = " and ".join(
        name for name, path in (("chromium", browser), ("chromedriver", driver)) if not path
    )
    text = f"{absent} not found: apt-get install chromium chromium-driver"
    return pytest.fail(text) if os.environ.get("CI") else pytest.skip(text)


@contextmanager
def chromium(profile):
    """A driver of a browser whose profile is the new directory `profile`."""
    browser, driver = programs()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


@contextmanager
def serving(app):
    """The address of an ASGI app that runs in a thread."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


class Page:
    """A user of the page: sees it, types and waits."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def open(self, fragment=""):
        """Load the page anew, with the comparison of a link."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(f"{self.address}#{fragment}")

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return [one.text for one in self.all(selector)]

    def until(self, condition):
        """Wait for what must become true."""
        WebDriverWait(self.driver, 30, poll_frequency=0.05).until(lambda driver: condition())

    def listed(self):
        """Wait until the list of models has been read."""
        self.until(lambda: "adapters" in self.one("#server").text)

    def send(self, prompt):
        box = self.one("#messages textarea, #prompt")
        box.clear()
        box.send_keys(prompt)
        box.send_keys(Keys.CONTROL, Keys.ENTER)

    def finished(self, *reasons):
        """Wait until the columns have ended for these reasons."""
        self.until(lambda: self.finish() == list(reasons))

    def finish(self):
        return self.texts(".numbers div:nth-child(4) dd")

    def severe(self):
        """Errors in the browser's console."""
        return [one for one in self.driver.get_log("browser") if one["level"] == "SEVERE"]
