from .image_processing_vlm import VLMImageProcessor
from .modeling_vlm import MultiModalityCausalLM
from .processing_vlm import VLChatProcessor

__all__ = ["MultiModalityCausalLM", "VLChatProcessor", "VLMImageProcessor"]
