"""Pictures of the app for README and the pages, taken in a browser: `python tests/pictures.py assets/images`.

Needs Chromium and Playwright, as tests/test_demo_browser.py does.
"""

from __future__ import annotations

import argparse
import random
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from visionfuse.demos import Settings, build, launch

WIDE = {"viewport": {"width": 1240, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
WAIT = 900_000  # ms, for a busy machine
COLORS = 200


def picture(page: Any, side: int) -> None:
    _set(page, "Size in pixels", side)
    page.locator("#image-run").click()
    expect(page.locator("#image-status")).to_contain_text("visionfuse took")
    expect(page.locator("#image-slider img").last).to_be_visible()


def video(page: Any, side: int) -> None:
    page.get_by_role("tab", name="Video").click()
    for label, value in (("Frames", 9), ("Steps", 8)):  # a minute on a CPU
        _set(page, label, value)
    page.locator("#video-run").click()
    expect(page.locator("#video-status")).to_contain_text("visionfuse took")
    expect(page.locator("#video-fused video")).to_be_visible()


def classification(page: Any, side: int) -> None:
    page.get_by_role("tab", name="Classification").click()
    page.locator("#classify-draw").click()
    expect(page.locator("#classify-picture img")).to_be_visible()
    page.locator("#classify-run").click()
    expect(page.locator("#classify-status")).to_contain_text("ms")
    page.get_by_label("Rational activation").click()
    page.get_by_role("option", name="blocks.1.mlp.act2").click()
    expect(page.locator("#classify-curve-text")).to_contain_text("blocks.1.mlp.act2")


def explorer(page: Any, side: int) -> None:
    page.get_by_role("tab", name="Explorer").click()
    expect(page.locator("#explorer-blocks img")).to_be_visible()
    expect(page.locator("#explorer-speeds table")).to_be_visible()


# What is shown -> the kinds of models it needs.
TABS = {picture: "image", video: "video", classification: "classifier", explorer: ""}


def _set(page: Any, label: str, value: int) -> None:
    box = page.get_by_label(f"number input for {label}").locator("visible=true")
    box.fill(str(value))
    box.press("Tab")


def take(folder: Path, *, side: int = 512) -> list[Path]:
    """app_TAB.png for every tab whose model is here, and app_phone.png. side: pixels of the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(0)  # of the drawn picture
    settings, taken = Settings.of(), []
    app = build(settings)
    address = launch(app, settings, prevent_thread_lock=True)
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for name, options, show in [
                *((f"app_{tab.__name__}", WIDE, tab) for tab in TABS),
                ("app_phone", PHONE, explorer),
            ]:
                if TABS[show] and TABS[show] not in settings.models:
                    continue
                page = browser.new_page(**options)
                page.set_default_timeout(WAIT)
                expect.set_options(timeout=WAIT)
                page.goto(address)
                show(page, side)
                page.wait_for_timeout(1000)  # transitions
                taken.append(_saved(page.screenshot(full_page=True), folder / f"{name}.png"))
                page.close()
            browser.close()
    finally:
        app.close(verbose=False)
    return taken


def _saved(png: bytes, path: Path) -> Path:
    """With few colours: a third of the bytes."""
    image = Image.open(BytesIO(png)).convert("RGB")
    image.quantize(COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=512, help="pixels of the picture")
    args = parser.parse_args()
    for path in take(args.folder, side=args.side):
        print(path)
