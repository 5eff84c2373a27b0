"""Loading a checkpoint, and the device and dtype it goes to."""

import os
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from janus.models import MultiModalityCausalLM, VLChatProcessor

Loaded = tuple[PreTrainedTokenizerFast, VLChatProcessor, MultiModalityCausalLM]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """ "auto" is CUDA where there is one, under torchrun (LOCAL_RANK) the process's own, else the CPU.

    Raises ValueError for a device that is unknown or absent.
    """
    if name == "auto":
        cuda = f"cuda:{rank}" if (rank := os.environ.get("LOCAL_RANK")) else "cuda"
        name = cuda if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is unknown (expected auto, cpu, cuda, cuda:N or mps)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} asked for, but this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {name!r} asked for, but this machine has no MPS device")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on CUDA, and on MPS where that has it, else float32.

    Raises ValueError for an unknown name, and for bfloat16 on an MPS that lacks it.
    """
    lacks = device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0)
    if name == "auto":
        return torch.bfloat16 if device.type != "cpu" and not lacks else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown (expected auto, {', '.join(DTYPES)})")
    if name == "bfloat16" and lacks:
        raise ValueError("dtype bfloat16 on MPS needs macOS 14 or newer (expected float16 or float32)")
    return DTYPES[name]


def load_pretrained_model(
    path_or_hub_id: str | os.PathLike,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    quantize: str | None = None,
    offload: bool = False,
) -> Loaded:
    """Load a Janus checkpoint into its dtype and device: (tokenizer, processor, model).

    Either format loads straight there: peak host memory is that of the target plus one tensor. `quantize`, "int8" or
    "int4", is of the linear layers in the LLaMA's blocks; with `offload` only that one of tower and VQ tokenizer is in
    memory that was used last, read from the files anew when it is its turn. In a checkout of the original code its own
    classes load what they know, the original format, whole. Raises ValueError for an unknown dtype or quantize, one
    whose library is not installed, an absent device, and a checkpoint that cannot be loaded, in one line with file and
    cause (CheckpointError where there is `janus.models.checkpoint`).
    """
    device = resolve_device(str(device))
    dtype = dtype if isinstance(dtype, torch.dtype) else resolve_dtype(dtype, device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are made on the current device
    if find_spec("janus.models.checkpoint") is None:
        if quantize or offload:
            raise ValueError("quantize and offload are not for the classes of the original code")
        return load_by_original_code(path_or_hub_id, dtype, device)
    from janus.dola.checkpoint_files import resolve_directory

    directory = resolve_directory(path_or_hub_id)
    processor = VLChatProcessor.from_pretrained(directory)
    model = MultiModalityCausalLM.from_pretrained(
        directory, dtype=dtype, device=device, quantize=quantize, offload=offload
    )
    return processor.tokenizer, processor, model


def load_by_original_code(path_or_hub_id: str | os.PathLike, dtype: torch.dtype, device: torch.device) -> Loaded:
    """`load_pretrained_model` by the classes of the original code, attending by sdpa whatever the config asks for.

    Raises ValueError, in one line, for anything that they cannot load.
    """
    try:
        processor = VLChatProcessor.from_pretrained(path_or_hub_id)
        config = AutoConfig.from_pretrained(path_or_hub_id, trust_remote_code=False)
        config.language_config._attn_implementation = "sdpa"  # the published files ask for flash-attn
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path_or_hub_id, config=config, torch_dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        model, loading = loaded
        if loading["missing_keys"]:
            raise ValueError(f"weights are missing: {', '.join(sorted(loading['missing_keys'])[:3])}, ...")
    except Exception as error:  # whatever transformers, its hub client and the original's constructors raise
        cause = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ValueError(f"{path_or_hub_id}: the original code cannot load this checkpoint ({cause})") from None
    with suppress(OSError):  # the published checkpoints have none
        model.generation_config = GenerationConfig.from_pretrained(path_or_hub_id)
    return processor.tokenizer, processor, model.to(device).eval()
