import json
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import BatchFeature


class VLMImageProcessor:
    """Answers with a BatchFeature, by name."""

    def __init__(self, image_size: int, min_size: int = 14, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, **_):
        self.image_size, self.min_size = image_size, min_size
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.background_color = tuple(int(mean * 255) for mean in image_mean)

    @classmethod
    def from_pretrained(cls, path) -> "VLMImageProcessor":
        return cls(**json.loads((Path(path) / "preprocessor_config.json").read_text(encoding="utf-8")))

    @property
    def default_shape(self) -> list[int]:
        return [3, self.image_size, self.image_size]

    def __call__(self, images, return_tensors: str = "pt", **_) -> BatchFeature:
        return BatchFeature({"pixel_values": [self.prepare(image) for image in images]}, tensor_type=return_tensors)

    def prepare(self, image: Image.Image) -> np.ndarray:
        size = [max(int(side / max(image.size) * self.image_size), self.min_size) for side in image.size]
        square = Image.new("RGB", (self.image_size, self.image_size), self.background_color)
        left, top = ((self.image_size - side) // 2 for side in size)
        square.paste(image.resize((size[0], size[1]), Image.Resampling.BICUBIC), (left, top))
        pixels = (np.asarray(square, dtype=np.float32) / 255 - self.image_mean) / self.image_std
        return pixels.transpose(2, 0, 1).astype(np.float32)
