"""Two images of the same prompt and seed: how far apart they are, and one picture that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

AMPLIFY = 4  # the third panel shows |a - b| times this
MIN_PANEL = 384  # pixels


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the wall time in seconds.

    `call` must return on the host (a PIL image does), so that no work is left on the device.
    """
    start = perf_counter()
    result = call()
    return result, perf_counter() - start


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Of two 8-bit images.

    psnr: decibels, infinite for equal images. ssim: 1 for equal images (Wang et al. 2004, Gaussian window
    of sigma 1.5). mean, largest: of |a - b|, in levels of 0 to 255.
    """

    psnr: float
    ssim: float
    mean: float
    largest: int

    @property
    def psnr_text(self) -> str:
        return f"{self.psnr:.1f} dB" if self.largest else "infinite (equal images)"


def difference(a: Image.Image, b: Image.Image) -> Difference:
    """Raises ValueError for images of different sizes."""
    if a.size != b.size:
        raise ValueError(f"Images of different sizes cannot be compared: {a.size} and {b.size}.")
    levels = [np.asarray(image.convert("RGB")) for image in (a, b)]
    x, y = (image.astype(np.float32) for image in levels)
    error = np.abs(x - y)
    return Difference(
        psnr=psnr(*levels),
        ssim=_ssim(x, y),
        mean=float(error.mean()),
        largest=int(error.max()),
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two uint8 arrays of one shape, in decibels; infinite for equal ones."""
    mse = float(np.square(np.subtract(a, b, dtype=np.int16), dtype=np.int32).mean())
    return 10 * float(np.log10(255**2 / mse)) if mse else float("inf")


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    def blur(image):
        return cv2.GaussianBlur(image, (11, 11), 1.5)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(score.mean())


def amplified_difference(a: Image.Image, b: Image.Image, factor: int = AMPLIFY) -> Image.Image:
    x, y = (np.asarray(image.convert("RGB"), np.int16) for image in (a, b))
    return Image.fromarray((np.abs(x - y) * factor).clip(0, 255).astype(np.uint8))


def side_by_side(panels: list[tuple[str, str, Image.Image]], footer: str) -> Image.Image:
    """Panels (title, line below it, image) of one size in a row, each with its caption, and a footer.

    Small images are enlarged, so that the captions fit.
    """
    enlarge = -(-MIN_PANEL // panels[0][2].width)
    width, height = (side * enlarge for side in panels[0][2].size)
    gap, scale = 12, width / 512
    title = ImageFont.load_default(round(24 * scale))
    text = ImageFont.load_default(round(17 * scale))
    head, foot = round(70 * scale), round(40 * scale)
    sheet = Image.new(
        "RGB", (len(panels) * (width + gap) + gap, head + height + foot), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for i, (name, line, image) in enumerate(panels):
        x = gap + i * (width + gap)
        draw.text((x, round(8 * scale)), _fit(name, title, width), font=title, fill=(20, 20, 20))
        draw.text((x, round(40 * scale)), _fit(line, text, width), font=text, fill=(90, 90, 90))
        panel = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(panel, (x, head))
        draw.rectangle((x - 1, head - 1, x + width, head + height), outline=(200, 200, 200))
    draw.text((gap, head + height + round(9 * scale)), _fit(footer, text, sheet.width - 2 * gap),
              font=text, fill=(90, 90, 90))  # fmt: skip
    return sheet


def _fit(line: str, font, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + " ...") > width:
        line = line[:-1]
    return line + " ..."


def save_metrics(path: Path, change: Difference, **facts) -> None:
    """JSON beside a picture. An infinite PSNR (equal images) becomes null, as JSON has no infinity."""
    values = {k: v if v != float("inf") else None for k, v in asdict(change).items()}
    path.write_text(json.dumps(facts | {"difference": values}, indent=2) + "\n", encoding="utf-8")
