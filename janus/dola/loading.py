"""Loading a checkpoint, and the device and dtype it goes to."""

import os

import torch
from transformers import PreTrainedTokenizerFast

from janus.models import MultiModalityCausalLM, VLChatProcessor
from janus.models.checkpoint import resolve_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises ValueError for an unknown or absent device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown (expected auto, cpu, cuda or cuda:N)") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} asked for, but this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on CUDA and float32 elsewhere. Raises ValueError for an unknown name."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown (expected auto, {', '.join(DTYPES)})")
    return DTYPES[name]


def load_pretrained_model(
    path_or_hub_id: str | os.PathLike,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
) -> tuple[PreTrainedTokenizerFast, VLChatProcessor, MultiModalityCausalLM]:
    """Load a Janus checkpoint of either format, straight into its dtype and device: (tokenizer, processor, model).

    Peak host memory is that of the target plus one tensor. Raises CheckpointError, one line with file and cause, and
    ValueError for an unknown dtype or an absent device.
    """
    device = resolve_device(str(device))
    dtype = dtype if isinstance(dtype, torch.dtype) else resolve_dtype(dtype, device)
    directory = resolve_directory(path_or_hub_id)
    processor = VLChatProcessor.from_pretrained(directory)
    model = MultiModalityCausalLM.from_pretrained(directory, dtype=dtype, device=device)
    return processor.tokenizer, processor, model
