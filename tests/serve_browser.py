"""Drive `accelerated.serve` in a real browser: upload, click, slide, watch the points turn, on a wide screen and on a telephone.

Not collected by pytest: it needs Chromium with its driver, and `pip install selenium`. From the checkout,

    python -m tests.serve_browser --weights FILE --picture FILE [--shots FOLDER]

starts the server, checks what it sees with assertions, and saves a picture of either page as serve.png and serve-phone.png.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains

SIZES = {"serve": (1280, 1000, False), "serve-phone": (390, 844, True)}


def start(size: tuple[int, int, bool]) -> webdriver.Chrome:
    width, height, phone = size
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Named, so that Selenium does not look for one on the internet.
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return driver


def wait(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come in {seconds:g} seconds")


class Page:
    """One browser window on the page."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url
        driver.get(url)
        wait(lambda: self.find("#dpt-file input[type=file]"), "the page")

    def find(self, selector: str) -> Any:
        return next(iter(self.driver.find_elements("css selector", selector)), None)

    def text(self, selector: str) -> str:
        part = self.find(selector)
        return part.text if part else ""

    def seen(self, selector: str) -> np.ndarray:
        """What an element looks like now, (H, W, 3)."""
        part = self.find(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", part)
        time.sleep(0.2)
        return np.asarray(Image.open(io.BytesIO(part.screenshot_as_png)).convert("RGB")).astype(int)

    def open(self, picture: Path) -> None:
        self.find("#dpt-file input[type=file]").send_keys(str(picture.resolve()))

    def click_share(self, selector: str, across: float, down: float) -> None:
        """Click at a share of an element's width and height."""
        part = self.find(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", part)
        x, y = round((across - 0.5) * part.size["width"]), round((down - 0.5) * part.size["height"])
        ActionChains(self.driver).move_to_element_with_offset(part, x, y).click().perform()

    def whole(self, path: Path) -> None:
        width, height = self.driver.execute_script("scrollTo(0, 0); return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        arguments = {"captureBeyondViewport": True, "clip": clip}
        shot = base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", arguments)["data"])
        picture = Image.open(io.BytesIO(shot)).convert("RGB")
        if width > 1000:
            picture.thumbnail((1000, picture.height), Image.Resampling.LANCZOS)
        colors = picture.quantize(256, Image.Quantize.MEDIANCUT)
        picture.quantize(palette=colors, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)  # small, for the docs

    def fetched_elsewhere(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith((self.url, "data:", "blob:"))]


def check(page: Page, picture: Path, shot: Path) -> None:
    driver = page.driver
    assert "Drop a photograph" in page.text("#dpt-status"), "the empty page says what to do"

    not_one = shot.with_suffix(".txt")
    not_one.write_text("no picture")
    page.open(not_one)
    wait(lambda: "not an image of a known format" in page.text("#dpt-status"), "the sentence for what is no picture")
    not_one.unlink()
    page.find("#dpt-file button[aria-label='Clear']").click()
    wait(lambda: "Drop a photograph" in page.text("#dpt-status"), "the empty page")

    page.open(picture)
    wait(lambda: "readout token" in page.text("#dpt-attention-words"), "the attention of the readout token")
    wait(lambda: page.find("#dpt-cloud canvas").size["height"] > 100, "the points")
    wide = driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0, f"the page is {wide} pixels wider than the screen"

    # A click at a known place of the picture is the pixel there, up to the pixels of the screen.
    width, height = Image.open(picture).size
    for across, down in ((0.25, 0.75), (0.9, 0.1)):
        before = page.text("#dpt-attention-words")
        page.click_share("#dpt-attention img", across, down)
        wait(lambda old=before: page.text("#dpt-attention-words") != old, "the attention of the click")
        x, y = map(int, re.search(r"pixel \((\d+), (\d+)\)", page.text("#dpt-attention-words")).groups())
        assert abs(x - across * width) < 0.02 * width and abs(y - down * height) < 0.02 * height, (x, y)
    page.find("#dpt-readout").click()
    wait(lambda: "readout token" in page.text("#dpt-attention-words"), "the readout token again")
    page.click_share("#dpt-attention img", 0.4, 0.55)
    wait(lambda: "pixel" in page.text("#dpt-attention-words"), "the attention of the click")

    # The line between picture and depth follows the pointer.
    before = page.seen("#dpt-compare")
    part = page.find("#dpt-compare")
    chain = ActionChains(driver).move_to_element(part).click_and_hold()
    chain.move_by_offset(-part.size["width"] // 4, 0).release().perform()
    assert (np.abs(page.seen("#dpt-compare") - before).max(-1) > 30).mean() > 0.1, "the slider did not move"

    # The points turn by themselves; a drag stops them where it leaves them.
    first = page.seen("#dpt-cloud canvas")
    time.sleep(1.5)
    assert (np.abs(page.seen("#dpt-cloud canvas") - first).max(-1) > 30).mean() > 0.05, "the points stand still"
    canvas = page.find("#dpt-cloud canvas")
    ActionChains(driver).double_click(canvas).perform()  # back to where the camera stood
    ActionChains(driver).move_to_element(canvas).click_and_hold().move_by_offset(20, 8).release().perform()
    held = page.seen("#dpt-cloud canvas")
    time.sleep(1)
    np.testing.assert_array_equal(page.seen("#dpt-cloud canvas"), held)
    page.whole(shot)
    held = page.seen("#dpt-cloud canvas")

    # A wider field of view makes another cloud.
    slider = page.find("#dpt-fov input[type=range]")
    driver.execute_script("arguments[0].value = 110; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))", slider)
    wait(lambda: (page.seen("#dpt-cloud canvas") != held).any(), "the cloud of a wider field of view")

    assert not page.fetched_elsewhere(), page.fetched_elsewhere()
    refused = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not refused, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--picture", required=True, type=Path)
    parser.add_argument("--shots", default=Path("docs/images"), type=Path)
    options = parser.parse_args()
    command = [sys.executable, "-m", "accelerated.serve", "--weights", options.weights, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[0]
            for name, size in SIZES.items():
                driver = start(size)
                try:
                    check(Page(driver, url), options.picture, options.shots / f"{name}.png")
                finally:
                    driver.quit()
                print(f"{name}: {size[0]} pixels wide, all as it should be")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
