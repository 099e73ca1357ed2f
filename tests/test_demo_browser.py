"""The app in a real browser: headless Chromium, driven by Playwright, as a visitor would use it."""

import gc
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs Playwright: pip install playwright"
)
pytest.importorskip("gradio", reason="the app needs Gradio: pip install visionfuse[demo]")

from visionfuse.demos import Settings, build, launch, recipes  # noqa: E402
from visionfuse.demos.jobs import Jobs  # noqa: E402

expect = sync_api.expect
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"
)
SHIPPED = Settings.of().models
WAIT = 120_000  # ms, for a busy machine
expect.set_options(timeout=WAIT)
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

# What a screen reader has no name for, among all that can be used.
NAMELESS = """() => [...document.querySelectorAll(
    'button, a[href], input, select, textarea, [role=slider], [role=tab], [role=textbox]')]
  .filter(e => e.getClientRects().length)
  .filter(e => ![e, ...e.querySelectorAll('*')].some(x =>
    ['aria-label', 'title', 'alt', 'aria-labelledby'].some(a => (x.getAttribute(a) || '').trim()))
    && !(e.innerText || '').trim() && ![...(e.labels || [])].some(l => l.innerText.trim()))
  .map(e => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def address():
    settings = Settings.of()
    limit = Image.MAX_IMAGE_PIXELS
    app = build(settings)
    yield launch(app, settings, prevent_thread_lock=True)
    app.close(verbose=False)
    Image.MAX_IMAGE_PIXELS = limit


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Opens the page for another visitor; fails where it asked another machine, or its script failed."""
    contexts, outside, errors = [], [], []

    def opened(**options):
        context = chromium.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(WAIT)
        page = context.new_page()
        page.on("request", lambda r: outside.append(r.url) if _is_outside(r.url, address) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        expect(page.locator("#image-run")).to_be_visible()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not outside
    assert not errors


def _is_outside(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:", address.replace("http", "ws", 1)))


def small(page, *, side=128, steps=3) -> None:
    for label, value in (("Size in pixels", side), ("Steps", steps)):
        box = page.get_by_label(f"number input for {label}")
        box.fill(str(value))
        box.press("Tab")


def bring(page, file) -> None:
    """Uploads a recipe as a visitor does."""
    with page.expect_file_chooser() as chooser:
        page.locator("#image-upload").click()
    chooser.value.set_files(file)


def generated(page) -> str:
    """What the page says once both pictures are there."""
    expect(page.locator("#image-status")).to_contain_text("visionfuse took")
    return page.locator("#image-status").inner_text()


def test_generate_and_compare_by_keyboard(visit):
    page = visit()
    small(page)
    prompt = page.get_by_label("What to draw")
    prompt.fill("two small red circles on a white background")
    page.locator("#image-run").focus()
    page.keyboard.press("Enter")
    said = generated(page)
    assert re.search(r"PSNR [\d.]+ dB", said)
    assert "2 of 3 steps" in said
    pictures = page.locator("#image-slider img")
    expect(pictures.first).to_be_visible()
    assert pictures.count() == 2
    expect(page.locator("#image-difference img")).to_be_visible()
    # The divider moves without a mouse.
    before = pictures.last.get_attribute("style")
    page.get_by_label("the model alone", exact=True).focus()
    page.keyboard.press("Space")
    page.wait_for_function(
        "before => [...document.querySelectorAll('#image-slider img')].at(-1).getAttribute('style') !== before",
        arg=before,
    )  # fmt: skip


def test_the_recipe_follows_the_form_and_runs(visit):
    page = visit()
    small(page, steps=2)
    expect(page.get_by_label("number input for Density")).to_be_visible()
    page.get_by_label("Recipe", exact=True).click()
    page.get_by_role("option", name="auto").click()
    expect(page.get_by_label("number input for Density")).to_be_hidden()
    page.get_by_text("Recipe as JSON").click()
    expect(page.locator("#image-recipe")).to_contain_text('"dense"')
    page.locator("#image-run").click()
    assert "equal, bit by bit" in generated(page)


def test_a_broken_recipe_is_told_and_forgotten(visit, tmp_path):
    page = visit()
    small(page, steps=1)
    page.get_by_text("Recipe as JSON").click()
    file = tmp_path / "broken.json"
    file.write_text('{"version": 2, "plan": {"kind": "neighborhood", "density": 70}}')
    bring(page, file)
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text("density must lie in")
    expect(page.locator("#image-recipe")).to_contain_text("0.4")  # the old one is still there
    page.get_by_test_id("toast-close").click()
    mine = json.loads(recipes.written("gna", density=0.25, dense_start=0)) | {
        "note": "brought by hand"
    }
    file.write_text(json.dumps(mine))
    bring(page, file)
    expect(page.locator("#image-recipe")).to_contain_text("brought by hand")
    page.locator("#image-run").click()
    assert "1 of 1 steps" in generated(page)


def test_a_recipe_is_taken_home(visit):
    """Copied and downloaded, it is the one that runs."""
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_text("Recipe as JSON").click()
    code = page.locator("#image-recipe")
    expect(code).to_contain_text('"density": 0.4')
    code.get_by_label("Copy").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    with page.expect_download() as download:
        code.get_by_label("Download").click()
    downloaded = json.loads(Path(download.value.path()).read_text())
    assert (
        downloaded == json.loads(copied) == json.loads(recipes.written("gna", **recipes.CONTROLS))
    )


def test_cancel(visit):
    page = visit()
    small(page, side=384, steps=30)
    page.locator("#image-run").click()
    expect(page.locator("#image-slider")).to_contain_text("of 30")  # progress
    page.locator("#image-cancel").click()
    expect(page.locator("#image-status")).to_contain_text("Cancelled")
    small(page, steps=1)
    page.locator("#image-run").click()
    generated(page)


def test_who_leaves_keeps_nobody_waiting(visit):
    """The run of a closed page ends before its next step: long before its 60 steps are done."""
    page = visit()
    small(page, side=512, steps=30)
    page.locator("#image-run").click()
    expect(page.locator("#image-slider")).to_contain_text("of 30")
    (running,) = {one for one in gc.get_objects() if type(one) is Jobs and one.busy}
    page.close()
    start = time.monotonic()
    while running.busy and time.monotonic() < start + 60:
        time.sleep(0.2)
    assert not running.busy


def test_two_visitors_at_once(visit):
    pages = [visit(), visit()]
    for page, prompt in zip(pages, ("a red circle", "a blue star"), strict=True):
        small(page)
        page.get_by_label("What to draw").fill(prompt)
        page.locator("#image-run").click()
    for page in pages:
        generated(page)
    first, second = (page.locator("#image-slider img").first.get_attribute("src") for page in pages)
    assert first != second


def test_explore(visit):
    page = visit()
    page.get_by_role("tab", name="Explorer").click()
    status = page.locator("#explorer-status")
    expect(status).to_contain_text("sees 576 of 4,096 tokens")
    page.locator("#explorer-window textarea, #explorer-window input").first.fill("16x16")
    page.keyboard.press("Enter")
    expect(status).to_contain_text("sees 256 of 4,096 tokens")
    before = page.get_by_label("Token: row").input_value()
    picture = page.locator("#explorer-token img")
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] / 2, "y": box["height"] * 0.1})
    expect(status).not_to_contain_text(f"Token ({before},")
    page.locator("#explorer-grid textarea, #explorer-grid input").first.fill("8x8")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("toast-body").first).to_contain_text("does not fit")
    page.get_by_label("Start from a preset").click()
    page.get_by_role("option", name="Wan 480p").click()
    expect(status).to_contain_text("(21, 30, 52)")


def test_classify(visit):
    page = visit()
    page.get_by_role("tab", name="Classification").click()
    expect(page.locator("#classify-curve-text")).to_contain_text("began as identity")
    page.locator("#classify-draw").click()
    expect(page.locator("#classify-picture img")).to_be_visible()
    page.locator("#classify-run").click()
    expect(page.locator("#classify-status")).to_contain_text("ms")
    expect(page.locator("#classify-curves img")).to_be_visible()
    page.get_by_label("Rational activation").click()
    page.get_by_role("option", name="blocks.2.mlp.act2").click()
    expect(page.locator("#classify-curve-text")).to_contain_text("began as silu")


def test_a_phone_sees_the_result_that_it_asked_for(visit):
    page = visit(**PHONE)
    small(page, steps=1)
    page.locator("#image-run").tap()
    generated(page)
    expect(page.locator("#image-status")).to_be_in_viewport(ratio=1)
    expect(page.locator("#image-run")).to_be_in_viewport()


@pytest.mark.skipif("video" not in SHIPPED, reason="assets/wan-micro is not here")
def test_video(visit):
    page = visit()
    page.get_by_role("tab", name="Video").click()
    for label, value in (("Size in pixels", 64), ("Frames", 5), ("Steps", 2)):
        box = page.get_by_label(f"number input for {label}").locator("visible=true")
        box.fill(str(value))
        box.press("Tab")
    page.locator("#video-run").click()
    expect(page.locator("#video-status")).to_contain_text("visionfuse took")
    for name in ("stock", "fused"):
        expect(page.locator(f"#video-{name} video")).to_be_visible()
    expect(page.locator("#video-figures")).to_contain_text("5 frames of 64x64")


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desk", "phone"])
def test_everything_is_in_reach_and_has_a_name(visit, options):
    page = visit(**options)
    assert page.evaluate("document.documentElement.lang")
    assert "visionfuse" in page.title()
    for tab in page.get_by_role("tab").all_inner_texts():
        page.get_by_role("tab", name=tab).click()
        if tab == "Explorer":
            expect(page.locator("#explorer-token img")).to_be_visible()
            table = page.locator("#explorer-speeds table").bounding_box()
            assert table["x"] + table["width"] <= page.viewport_size["width"], "a table is cut off"
        wide, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= window, f"{tab} scrolls sideways"
        assert page.evaluate(NAMELESS) == []
    live = page.locator("[role=status][aria-live=polite]")
    assert live.count() >= 3


@pytest.mark.slow
def test_pictures_of_the_app_are_taken(tmp_path):
    """`make pictures`, for README: every tab, and a phone."""
    script = Path(__file__).with_name("pictures.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, "--side", "128"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in ("picture", "classification", "explorer", "phone"):
        assert Image.open(tmp_path / f"app_{name}.png").width in (390, 1240)
