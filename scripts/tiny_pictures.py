"""The pictures of the tiny world: emoji on white, and handwritten digits, all 64 pixels high."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from tiny_world import load_things

NUM_SINGLE, NUM_STRIPS = 10, 40  # pictures for each digit; pictures of two or three digits
SIDE = 64
ATTRIBUTION = """# Pictures

- Things (`fox.png`, …): graphics of Twemoji, © Twitter, Inc and other contributors, licensed under CC-BY 4.0
  (https://creativecommons.org/licenses/by/4.0/), taken from the npm package `emoji-datasource-twitter` 16.0.0
  (folder `img/twitter/64`; https://github.com/iamcal/emoji-data). Changes: drawn over white, stored without
  transparency, renamed.
- Handwritten numbers (`number_471_03.png`: the digits 4, 7, 1): from the data set "Optical Recognition of Handwritten
  Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC-BY 4.0, as shipped with scikit-learn
  (`load_digits`). Changes: enlarged from 8 by 8 to 64 by 64 pixels, dark on white, some put side by side.
"""


def make_pictures(package: Path, folder: Path, seed: int = 0) -> None:
    """Write all pictures and their attribution into `folder`.

    Args:
        package: the unpacked npm package `emoji-datasource-twitter` (holds `emoji.json` and `img/twitter/64`).

    Raises:
        ValueError: the package is not there.
    """
    if not (package / "emoji.json").exists():
        raise ValueError(
            f"emoji={str(package)!r} holds no emoji.json; give the unpacked npm package emoji-datasource-twitter"
        )
    folder.mkdir(parents=True, exist_ok=True)
    images = {e["short_name"]: e["image"] for e in json.loads((package / "emoji.json").read_text())}
    for thing in load_things():
        drawn = Image.open(package / "img" / "twitter" / "64" / images[thing.emoji]).convert("RGBA")
        page = Image.new("RGBA", drawn.size, "white")
        page.alpha_composite(drawn)
        page.convert("RGB").save(folder / thing.file, optimize=True)
    make_numbers(folder, seed)
    (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION)


def make_numbers(folder: Path, seed: int) -> None:
    """Single digits and strips of two or three, from scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    data, rng = load_digits(), Random(seed)
    by_digit = [rng.sample(list(np.flatnonzero(data.target == d)), NUM_SINGLE + 30) for d in range(10)]

    def draw(index: int) -> np.ndarray:
        ink = Image.fromarray(np.uint8(np.clip(data.images[index] * 16, 0, 255)))
        return 255 - np.asarray(ink.resize((SIDE, SIDE), Image.Resampling.BICUBIC))

    for digit in range(10):
        for i in range(NUM_SINGLE):
            Image.fromarray(draw(by_digit[digit][i])).save(folder / f"number_{digit}_{i:02d}.png", optimize=True)
    for i in range(NUM_STRIPS):
        # No leading zero: a strip is read as a number.
        digits = [rng.randint(1, 9), *(rng.randint(0, 9) for _ in range(1 + i % 2))]
        strip = np.concatenate([draw(by_digit[d][NUM_SINGLE + rng.randrange(30)]) for d in digits], axis=1)
        Image.fromarray(strip).save(folder / f"number_{''.join(map(str, digits))}_{i:02d}.png", optimize=True)
