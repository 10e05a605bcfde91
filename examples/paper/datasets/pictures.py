"""Picture files of every kind as RGB, and small copies of them that are quick to read."""

import io
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from vid_loss.durable import write_whole

_JPEG, _PNG = (".jpg", ".jpeg", ".jpe", ".jfif"), (".png", ".apng")
_OTHERS = (".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
SUFFIXES = frozenset(_JPEG + _PNG + _OTHERS)
# What Pillow decodes by itself: its reader of EPS, for one, would start another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_LONGEST = 4  # sides of a copy as one to this: one of 1 x 100000 would be enlarged to gigabytes
_SAME_TIME = 2.0  # seconds: some file systems keep no more of a file's time


def read_image(path: Path) -> Image.Image:
    """Reads a picture as RGB, upright, as it looks on a white page.

    Grayscale of 8 and 16 bits, palettes and CMYK become RGB; of an animation it is the first
    picture; what is transparent becomes white.

    Raises:
        ValueError: if it cannot be read to its end, has numbers that are no brightness, or is so
            large that Pillow takes it for an attack (179 megapixels).
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    # What a damaged file raises is up to each format.
    except (Exception, Image.DecompressionBombError) as error:
        raise ValueError(
            f"Image {path}: expected one that can be read; got {type(error).__name__}: "
            f"{str(error).rstrip('.')}. Fetch or save it again, or take it out."
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # of which Pillow would cut off all above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, which have no white")
    # Each conversion is a copy, of up to 0.7 GB.
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def copy_small(
    pictures: Mapping[Path, Path], side: int, workers: int, *, show_progress: bool = True
) -> dict[Path, str]:
    """Copies pictures as RGB in PNG, shrunk until their shorter side is as long as wanted.

    Of a picture more than four times as long as wide the middle is kept. A copy that has its
    picture's time is left as it is, so that a second call is quick.

    Args:
        pictures: where each goes.
        side: the shorter side of a copy in pixels; a smaller picture keeps its size.
        workers: how many threads do it.
        show_progress: whether there is a progress bar.

    Returns:
        Why those that cannot be read have no copy.
    """
    waiting = [x for x in pictures.items() if not _is_copy(*x)]
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(total=len(waiting), desc="pictures", leave=False, disable=not show_progress) as bar,
    ):
        # Pictures of half of what Pillow refuses, and damage to what is told beside a picture.
        warnings.simplefilter("ignore")
        reasons = {}
        for (source, _), reason in zip(
            waiting, pool.map(lambda x: _copy(*x, side), waiting), strict=True
        ):
            bar.update()
            if reason is not None:
                reasons[source] = reason
    return reasons


def _is_copy(source: Path, target: Path) -> bool:
    try:
        return abs(target.stat().st_mtime - source.stat().st_mtime) < _SAME_TIME
    except OSError:
        return False


def _copy(source: Path, target: Path, side: int) -> str | None:
    try:
        time = source.stat().st_mtime
        image = _shrunk(read_image(source), side)
    except (OSError, ValueError) as error:
        return str(error)
    file = io.BytesIO()
    image.save(file, "PNG")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, file.getbuffer())
    os.utime(target, (time, time))  # the last, so that it stands for a whole copy
    return None


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    shorter = min(image.size)
    width, height = (min(length, _LONGEST * shorter) for length in image.size)
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    if shorter <= side:
        return image
    size = (round(width * side / shorter), round(height * side / shorter))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
