"""The report's page in a real browser: Chromium without a screen, at the width of a phone and of a desktop."""

from __future__ import annotations

import io
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from test_html_report import agreed, bench, data, record, scene

from nnslim.errors import InputError
from nnslim.report.page import render_report
from nnslim.report.page_data import Viewer
from nnslim.report.viewer import find_niivue

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (_BROWSER and _DRIVER), reason="needs Chromium and chromedriver: apt-get install chromium chromium-driver"
)
_FLAGS = """
    --headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader
    --hide-scrollbars --force-device-scale-factor=1
"""
_PATIENCE = 120  # seconds for software rendering on a busy machine


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*_FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = _BROWSER
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(_DRIVER))
    driver.set_script_timeout(_PATIENCE)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page with everything, the viewer too."""
    try:
        script = find_niivue()
    except InputError as error:
        pytest.skip(str(error))
    shown = [scene("first"), scene("second", "Median case", (16, 12, 9))]
    other = replace(record(), agreement=agreed())
    made = data(
        record=replace(record(), agreement=agreed()),
        benchmarks=[bench()],
        others={"a model with a rather long name": other},
        scenes=shown,
        viewer=Viewer(script, {1: "one", 2: "two"}),
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(made), encoding="utf-8")
    return path


def show(browser, page: Path, width: int, **media: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"reduced-motion": "reduce", **media}  # no smooth scrolling, during which clicks miss
    features = [{"name": f"prefers-{key}", "value": value} for key, value in media.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    for kind in ("performance", "browser"):
        browser.get_log(kind)  # what came before does not count
    browser.get(page.as_uri())


def wait_for(browser, script: str) -> None:
    until = time.monotonic() + _PATIENCE
    while not browser.execute_script(f"return {script}"):
        failed = browser.execute_script("return document.getElementById('viewer').dataset.failed")
        assert failed is None and time.monotonic() < until, failed or f"not within {_PATIENCE} s: {script}"
        time.sleep(0.2)


def open_viewer(browser) -> None:
    browser.execute_script("document.getElementById('viewer').scrollIntoView()")
    wait_for(browser, "document.getElementById('viewer').dataset.ready === '0'")


def press(browser, name: str, value: str) -> None:
    browser.execute_script(f"document.querySelector('input[name={name}][value={json.dumps(value)}]').click()")


def picture(browser) -> np.ndarray:
    """What the canvas shows, once it has been painted."""
    from PIL import Image

    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    return np.asarray(Image.open(io.BytesIO(browser.find_element("css selector", "canvas").screenshot_as_png)), int)


def column(browser, table: str, number: int) -> list[str]:
    return browser.execute_script(
        f"return [...document.getElementById('{table}').tBodies[0].rows].filter((row) => !row.hidden)"
        f".map((row) => row.cells[{number}].textContent)"
    )


@pytest.mark.parametrize("width", [400, 1400])
def test_page_fits_the_width_and_asks_for_nothing(browser, page, width):
    show(browser, page, width)
    open_viewer(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    cut = browser.execute_script(
        "const wide = [...document.querySelectorAll('main *')].filter((one) => "
        "one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.scroll, pre'));"
        "return wide.map((one) => one.tagName + ' ' + one.textContent.slice(0, 40))"
    )
    assert cut == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in addresses
    outside = [url for url in addresses if url != page.as_uri() and urlparse(url).scheme not in ("data", "blob")]
    assert [url for url in outside if not url.startswith(("chrome:", "about:"))] == []  # the browser's own start page
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []


def test_table_is_sorted_by_click_and_by_key(browser, page):
    show(browser, page, 1400)
    button = browser.execute_script("return document.querySelectorAll('#layer-table thead button')[6]")  # MACs after
    button.click()
    assert column(browser, "layer-table", 6) == ["0.900", "0.100", "0.000"]
    button.send_keys("\n")
    assert column(browser, "layer-table", 6) == ["0.000", "0.100", "0.900"]
    head = browser.execute_script("return document.querySelectorAll('#layer-table th')[6].getAttribute('aria-sort')")
    assert head == "ascending"
    for _ in range(2):  # what has no error comes last, in both directions
        browser.execute_script("document.querySelectorAll('#layer-table thead button')[9].click()")
        assert column(browser, "layer-table", 9) == ["0.1234", "–", "–"]
    browser.execute_script("document.querySelectorAll('#layer-table thead button')[0].click()")
    assert column(browser, "layer-table", 0) == ["body.conv", "spare", "stem.conv"]


def test_table_is_filtered(browser, page):
    show(browser, page, 1400)
    search = browser.find_element("css selector", "[data-filters=layer-table] input")
    search.send_keys("NOT reached")
    assert column(browser, "layer-table", 0) == ["spare"]
    told = "return document.querySelector('[data-filters=layer-table] output').textContent"
    assert browser.execute_script(told) == "1 of 3 shown"
    search.clear()
    search.send_keys("conv")
    choice = browser.find_element("css selector", "[data-filters=layer-table] select")
    choice.send_keys("tucker")
    assert column(browser, "layer-table", 0) == ["body.conv"]


def test_viewer_shows_each_map_slice_and_case(browser, page):
    show(browser, page, 1400)
    open_viewer(browser)
    seen = {}
    for name in ("dense", "slim", "label", "differences", ""):
        press(browser, "map", name)
        seen[name] = picture(browser)
    assert np.array_equal(seen["dense"], seen["label"])  # the label is the dense map here
    for one, other in (("dense", "slim"), ("dense", ""), ("slim", ""), ("differences", ""), ("differences", "slim")):
        assert (seen[one] != seen[other]).any(), (one, other)
    grey = np.ptp(seen[""].astype(int)[..., :3], axis=2)
    coloured = np.ptp(seen["dense"].astype(int)[..., :3], axis=2)
    assert (coloured > 40).sum() > (grey > 40).sum()  # the crosshair alone has colour without a map
    told = "return document.querySelector('[data-say]').textContent"
    assert "voxel 4, 4, 4" in browser.execute_script(told)
    assert "dense: one; slim: two; label: one" in browser.execute_script(told)
    press(browser, "map", "slim")
    before = picture(browser)
    slider = browser.find_element("css selector", "input[data-axis='2']")
    slider.send_keys("\ue014" * 3)  # arrow right
    assert "voxel 4, 4, 7" in browser.execute_script(told)
    assert "dense: background; slim: background" in browser.execute_script(told)
    assert (picture(browser) != before).any()
    press(browser, "case", "1")
    wait_for(browser, "document.getElementById('viewer').dataset.ready === '1'")
    limits = "return [...document.querySelectorAll('input[data-axis]')].map((one) => one.max)"
    assert browser.execute_script(limits) == ["15", "11", "8"]
    legend = "return [...document.querySelectorAll('[data-legend] li')].map((one) => one.textContent)"
    assert browser.execute_script(legend) == ["one", "two"]
    press(browser, "map", "differences")
    assert browser.execute_script(legend) == ["dense only", "slim only", "another class"]


def test_page_follows_the_colour_scheme(browser, page):
    shades = []
    for scheme in ("light", "dark"):
        show(browser, page, 1400, **{"color-scheme": scheme})
        colours = browser.execute_script(
            "const style = getComputedStyle(document.querySelector('section p'));"
            "return [style.color, getComputedStyle(document.querySelector('section')).backgroundColor]"
        )
        ink, paper = (np.mean([int(part) for part in colour[4:-1].split(",")]) for colour in colours)
        shades.append((ink, paper))
    assert shades[0][1] - shades[0][0] > 150 and shades[1][0] - shades[1][1] > 150


def test_page_prints_without_controls(browser, page):
    show(browser, page, 1400)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = browser.execute_script(
        "return ['nav', '.controls', '#viewer', '#layer-table', '.planes img']"
        ".map((one) => document.querySelector(one).checkVisibility())"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == [False, False, False, True, True]
