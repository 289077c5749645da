"""Writes docs/images/chat-light.png and chat-phone-dark.png: the chat page with a real answer.

    python -m experiments.serve --memory-limit 450MB &
    python docs/make_screenshots.py http://127.0.0.1:8000

Needs selenium, chromium and chromedriver. The pictures show what the model said on that day.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

IMAGES = Path(__file__).parent / "images"
QUESTION = "What is a thimble? Name three uses of one, as a list."
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
SIZES = {"chat-light": (1100, 760, 1, "light"), "chat-phone-dark": (390, 800, 2, "dark")}


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, "--no-proxy-server", f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(flag)
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def main(url: str) -> None:
    driver = browser()
    driver.get(url)
    driver.find_element(By.ID, "most").send_keys("90", Keys.TAB)
    driver.find_element(By.ID, "text").send_keys(QUESTION, Keys.ENTER)
    time.sleep(1)
    while not driver.find_element(By.ID, "send").is_displayed():
        time.sleep(1)
    for name, (width, height, scale, theme) in SIZES.items():
        size = dict(width=width, height=height, deviceScaleFactor=scale, mobile=scale > 1)
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_script("theme(arguments[0]); draw(); $('text').blur();", theme)
        time.sleep(0.5)
        driver.save_screenshot(str(IMAGES / f"{name}.png"))
    driver.quit()


if __name__ == "__main__":
    main(sys.argv[1])
