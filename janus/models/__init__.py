"""The Janus model and processor, known to transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from janus.models.configuration import MultiModalityConfig
from janus.models.modeling import MultiModalityCausalLM
from janus.models.processing import VLChatProcessor, VLMImageProcessor

AutoConfig.register("multi_modality", MultiModalityConfig)
AutoModelForCausalLM.register(MultiModalityConfig, MultiModalityCausalLM)
AutoProcessor.register(MultiModalityConfig, VLChatProcessor)

__all__ = ["MultiModalityCausalLM", "MultiModalityConfig", "VLChatProcessor", "VLMImageProcessor"]
