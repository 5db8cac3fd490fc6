"""Remakes example.html, the page that README links to, and example.png, its picture.

    pip install -e ".[page]" && python study/example.py

Needs Debian's packages chromium and chromium-driver, too.
"""

import base64
import shutil
import subprocess
import sys
from pathlib import Path

STUDY = Path(__file__).resolve().parent
PAGE, PICTURE = STUDY / "example.html", STUDY / "example.png"
PROMPT, ROSTERS = "def items(self, section=_UNSET, raw=False, vars=None):", 8


def start_browser():
    """Headless Chromium, as a driver of Selenium, which keeps what is written on the console."""
    from selenium import webdriver  # here, because the tests need the names above without it

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # which does not work for root, in containers
    options.add_argument("--disable-dev-shm-usage")  # which is small there
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def photograph(browser) -> bytes:
    """A PNG of the text, and of the way of the token that is chosen when the page opens, without explanations."""
    size = {"width": 1200, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(PAGE.as_uri())
    browser.execute_script("for (const p of document.querySelectorAll('body > p')) p.hidden = true")
    top = browser.find_element("id", "bar").rect["y"]
    stage = browser.find_element("id", "stage").rect
    clip = {"x": 0, "y": top, "width": size["width"], "height": stage["y"] + stage["height"] + 10 - top, "scale": 1}
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    return base64.b64decode(picture["data"])


def main() -> None:
    options = ["--prompt", PROMPT, "--rosters", str(ROSTERS), "--device", "cpu", "--output", str(PAGE)]
    subprocess.run([sys.executable, STUDY / "page.py", *options], check=True)
    browser = start_browser()
    PICTURE.write_bytes(photograph(browser))
    browser.quit()


if __name__ == "__main__":
    main()
