import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..utils.conversation import get_conv_template
from .image_processing_vlm import VLMImageProcessor

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


class DictOutput:
    def keys(self):
        return self.__dict__.keys()

    def __getitem__(self, name):
        return self.__dict__[name]


@dataclass
class VLChatProcessorOutput(DictOutput):
    sft_format: str
    input_ids: Tensor
    pixel_values: Tensor
    num_image_tokens: Tensor


@dataclass
class BatchedVLChatProcessorOutput(DictOutput):
    sft_format: list[str]
    input_ids: Tensor
    pixel_values: Tensor
    attention_mask: Tensor
    images_seq_mask: Tensor
    images_emb_mask: Tensor

    def to(self, device, dtype=torch.bfloat16):
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device, dtype if name == "pixel_values" else value.dtype))
        return self


class VLChatProcessor:
    system_prompt = (
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    )
    image_tag, image_start_tag, image_end_tag = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"

    def __init__(self, image_processor, tokenizer, num_image_tokens: int, sft_format: str):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.num_image_tokens, self.sft_format = num_image_tokens, sft_format
        tags = (self.image_tag, self.image_start_tag, self.image_end_tag, "<｜▁pad▁｜>")
        self.image_id, self.image_start_id, self.image_end_id, self.pad_id = (tokenizer.vocab[tag] for tag in tags)

    @classmethod
    def from_pretrained(cls, path) -> "VLChatProcessor":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(Path(path) / "tokenizer.json"), bos_token=BOS, eos_token=EOS
        )
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.vocab[BOS])]
        )
        settings = json.loads((Path(path) / "processor_config.json").read_text(encoding="utf-8"))
        image_processor = VLMImageProcessor.from_pretrained(path)
        return cls(image_processor, tokenizer, settings["num_image_tokens"], settings["sft_format"])

    def apply_sft_template_for_multi_turn_prompts(self, conversations, sft_format="deepseek", system_prompt="") -> str:
        conversation = get_conv_template(sft_format)
        conversation.set_system_message(system_prompt)
        for turn in conversations:
            conversation.append_message(turn["role"], turn["content"].strip())
        return conversation.get_prompt().strip()

    def process_one(self, prompt=None, conversations=None, images=None, **_) -> VLChatProcessorOutput:
        assert prompt is None or conversations is None
        if prompt is None:
            prompt = self.apply_sft_template_for_multi_turn_prompts(
                conversations, sft_format=self.sft_format, system_prompt=self.system_prompt
            )
        shown = [self.image_start_id, *[self.image_id] * self.num_image_tokens, self.image_end_id]
        ids = [i for token in self.tokenizer.encode(prompt) for i in (shown if token == self.image_id else [token])]
        counts = torch.tensor([self.num_image_tokens] * prompt.count(self.image_tag))
        pixels = self.image_processor(images, return_tensors="pt").pixel_values
        return VLChatProcessorOutput(prompt, torch.tensor(ids), pixels, counts)

    def __call__(self, *, prompt=None, conversations=None, images=None, force_batchify=True, **_):
        prepared = self.process_one(prompt=prompt, conversations=conversations, images=images)
        return self.batchify([prepared]) if force_batchify else prepared

    def batchify(self, prepare_list: list[VLChatProcessorOutput]) -> BatchedVLChatProcessorOutput:
        """Takes what `process_one` gives; a batch holds at least one image, black where there is none."""
        rows, length = len(prepare_list), max(len(prepared.input_ids) for prepared in prepare_list)
        most_images = max(1, *(len(prepared.num_image_tokens) for prepared in prepare_list))
        batch = BatchedVLChatProcessorOutput(
            sft_format=[prepared.sft_format for prepared in prepare_list],
            input_ids=torch.full((rows, length), self.pad_id),
            pixel_values=torch.zeros(rows, most_images, *self.image_processor.default_shape),
            attention_mask=torch.zeros((rows, length), dtype=torch.long),
            images_seq_mask=torch.zeros((rows, length), dtype=torch.bool),
            images_emb_mask=torch.zeros((rows, most_images, self.num_image_tokens), dtype=torch.bool),
        )
        for row, prepared in enumerate(prepare_list):
            start, images = length - len(prepared.input_ids), len(prepared.num_image_tokens)
            batch.input_ids[row, start:] = prepared.input_ids
            batch.attention_mask[row, start:] = 1
            batch.images_seq_mask[row, start:] = prepared.input_ids == self.image_id
            if images:
                batch.pixel_values[row, :images] = prepared.pixel_values
                batch.images_emb_mask[row, :images] = True
        return batch
