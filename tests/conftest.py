import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

from janus.dola.loading import load_pretrained_model
from janus.models import MultiModalityCausalLM, VLChatProcessor

GOLDEN = Path(__file__).parent / "goldens" / "janus-upstream-tiny"
DATA = Path(os.environ.get("JANUS_DOLA_DATA", "data"))
"""Where GenEval's and PartiPrompts' prompts and FACTOR's set lie; tests of them skip where they do not."""
torch.set_num_threads(1)  # the models are tiny: a second thread would only wait for the first
settings.register_profile("project", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("project")


class Golden(NamedTuple):
    """The random checkpoint, loaded in float32, and what the reference code computed with it."""

    model: MultiModalityCausalLM
    processor: VLChatProcessor
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


@pytest.fixture(scope="session")
def golden() -> Golden:
    _, processor, model = load_pretrained_model(GOLDEN, "float32", "cpu")
    facts = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    return Golden(model, processor, facts, load_file(GOLDEN / "golden.safetensors"))
