"""The original's loader takes a path alone and asks for CUDA, so nothing of ours may go through it."""

from PIL import Image


def load_pretrained_model(model_path: str):
    raise RuntimeError(f"the original would load {model_path} in bfloat16 on CUDA")


def load_pil_images(conversations: list[dict]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for turn in conversations for path in turn.get("images", ())]
