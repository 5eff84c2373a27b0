import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, JanusConfig, JanusForConditionalGeneration
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from conftest import GOLDEN
from generation_inference import format_image_prompt, generate, pack_prompts, tokens_to_images
from janus.dola.loading import load_pretrained_model
from janus.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor
from janus.models.checkpoint import CheckpointError


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the golden checkpoint, to be changed."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "checkpoint"))


def edit_config(checkpoint: Path, **changes) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


# --- against the reference -------------------------------------------------------------------------------------------


def test_prompts_render_and_tokenize_as_in_the_reference(golden):
    for text, rendered, ids in zip(*(golden.facts[k] for k in ("prompts", "sft", "input_ids")), strict=True):
        assert format_image_prompt(golden.processor, text) == rendered
        assert golden.processor.tokenizer.encode(rendered) == ids
    assert golden.processor.pad_id == golden.facts["pad_id"]


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_reference_loop_gives_the_reference_tokens_and_images(golden, tmp_path, monkeypatch, k):
    monkeypatch.chdir(tmp_path)
    how = golden.facts["gen"][k]
    prompt = golden.facts["sft"][how["prompt"]]
    torch.manual_seed(how["seed"])
    tokens = generate(
        golden.model, golden.processor, prompt, how["temperature"], how["parallel_size"], how["cfg_weight"]
    )
    assert torch.equal(tokens, golden.tensors[f"gen{k}.tokens"])
    images = tokens_to_images(golden.model, tokens)
    pixels = np.stack([np.asarray(image) for image in images]).astype(int)
    assert np.abs(pixels - golden.tensors[f"gen{k}.images"].numpy()).max() <= 1
    assert len(list(Path("generated_samples").glob("img_*.jpg"))) == how["parallel_size"]


@torch.no_grad()
def test_hidden_states_and_head_logits_of_the_first_step_are_the_references(golden):
    how = golden.facts["gen"][0]
    ids, _ = pack_prompts(golden.processor, [golden.facts["sft"][how["prompt"]]])
    ids = ids.repeat(how["parallel_size"], 1)
    out = golden.model.language_model.model(input_ids=ids, output_hidden_states=True)
    close(torch.stack([h[:, -1] for h in out.hidden_states]), golden.tensors["gen0.step0.hidden_last_pos"])
    close(golden.model.gen_head(out.last_hidden_state[:, -1]), golden.tensors["gen0.step0.gen_logits"])


@torch.no_grad()
def test_understanding_inputs_and_greedy_answer_are_the_references(golden):
    batch = golden.processor(prompt=golden.facts["und.sft"], images=[Image.open(GOLDEN / "sample.png")])
    assert torch.equal(batch.input_ids, golden.tensors["und.input_ids"])
    close(batch.pixel_values, golden.tensors["und.pixel_values"])
    embeds = golden.model.prepare_inputs_embeds(**vars(batch))
    close(embeds, golden.tensors["und.inputs_embeds"])
    tokens = golden.model.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=batch.attention_mask,
        max_new_tokens=golden.tensors["und.greedy_tokens"].shape[1],
        do_sample=False,
        pad_token_id=golden.processor.tokenizer.eos_token_id,
        eos_token_id=golden.processor.tokenizer.eos_token_id,
    )
    assert torch.equal(tokens, golden.tensors["und.greedy_tokens"])


@torch.no_grad()
@pytest.mark.parametrize("layer", [2, 3, 4])
def test_tower_features_normed_and_pooled_are_the_references(golden, layer):
    tower = golden.model.vision_model.vision_tower
    pixels = golden.tensors["und.pixel_values"][0]
    (features,) = tower.get_intermediate_layers(pixels, n=[layer - 1], norm=True)
    close(features, golden.tensors[f"vit.layer{layer}.normed"])
    close(tower.forward_head(features), golden.tensors[f"vit.layer{layer}.pooled"])


@torch.no_grad()
def test_the_tower_follows_timms_calling_conventions(golden):
    tower = golden.model.vision_model.vision_tower
    pixels = golden.tensors["und.pixel_values"][0]
    last_two = tower.get_intermediate_layers(pixels, n=2, norm=True)
    by_index = tower.get_intermediate_layers(pixels, n=[3, 2], norm=True)
    assert torch.equal(last_two[0], by_index[1]) and torch.equal(last_two[1], by_index[0])
    assert torch.equal(by_index[0], golden.model.vision_model(pixels))
    ((grid, prefix),) = tower.get_intermediate_layers(pixels, reshape=True, return_prefix_tokens=True, norm=True)
    assert grid.shape == (1, 32, 4, 4) and prefix.shape == (1, 0, 32)
    close(grid.flatten(2).transpose(1, 2), by_index[0])
    with pytest.raises(ValueError, match=r"0\.\.3"):
        tower.get_intermediate_layers(pixels, n=[4])


@torch.no_grad()
def test_vq_codes_are_the_references_and_decode(golden):
    quantised, _, (_, _, codes) = golden.model.gen_vision_model.encode(golden.tensors["vq.input"])
    assert torch.equal(codes, golden.tensors["vq.codes"])
    assert quantised.shape == (2, 8, 4, 4)
    assert golden.model.gen_vision_model.decode_code(codes, shape=[2, 8, 4, 4]).shape == (2, 3, 64, 64)


# --- formats ---------------------------------------------------------------------------------------------------------


def test_saving_writes_the_original_names_and_values(golden, tmp_path):
    golden.model.save_pretrained(tmp_path)
    stored, written = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(stored) - set(written) == {"gen_vision_model.quantize.codebook_used"}
    for name, tensor in written.items():
        assert torch.equal(tensor, stored[name]), name


@pytest.mark.parametrize("layout", ["safetensors", "safetensors shards", "bin", "bin shards", "old bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_file_layout_loads_in_either_dtype(golden, checkpoint, layout, dtype):
    weights = {k: v.to(dtype) for k, v in load_file(checkpoint / "model.safetensors").items()}
    (checkpoint / "model.safetensors").unlink()
    names = sorted(weights)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]] if "shards" in layout else [names]
    base, suffix = ("model", "safetensors") if "safetensors" in layout else ("pytorch_model", "bin")
    files = [f"{base}.{suffix}"] if len(parts) == 1 else [f"{base}-0000{i + 1}-of-00002.{suffix}" for i in range(2)]
    for file, part in zip(files, parts, strict=True):
        tensors = {name: weights[name] for name in part}
        if suffix == "safetensors":
            save_file(tensors, checkpoint / file)
        else:
            torch.save(tensors, checkpoint / file, _use_new_zipfile_serialization=layout != "old bin")
    if len(parts) == 2:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (checkpoint / f"{base}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = MultiModalityCausalLM.from_pretrained(checkpoint)
    assert loaded.dtype == dtype
    for (name, got), expected in zip(loaded.state_dict().items(), golden.model.state_dict().values(), strict=True):
        assert torch.equal(got, expected.to(dtype)), name


def other_config(**language) -> MultiModalityConfig:
    """Another depth, width, patch and VQ depth than the goldens'."""
    config = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))
    config["language_config"] |= {"num_hidden_layers": 3, "hidden_size": 48, "num_key_value_heads": 2} | language
    config["vision_config"]["params"] |= {"layers": 2, "width": 40, "patch_size": 8}
    config["aligner_config"]["params"] |= {"input_dim": 40, "n_embed": 48, "depth": 3}
    config["gen_aligner_config"]["params"] |= {"n_embed": 48}
    config["gen_head_config"]["params"] |= {"n_embed": 48, "image_token_embed": 56}
    config["gen_vision_config"]["params"] |= {"ch_mult": [1, 2, 2], "num_res_blocks": 2}
    return MultiModalityConfig.from_dict(config)


def test_a_model_of_other_sizes_survives_saving_and_loading(tmp_path):
    torch.manual_seed(0)
    model = MultiModalityCausalLM(other_config())
    model.save_pretrained(tmp_path)
    loaded = MultiModalityCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 384, (2, 7))
    close(loaded.language_model(input_ids=ids).logits, model.language_model(input_ids=ids).logits)
    for (name, got), expected in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name


def test_published_sizes_stand_where_the_config_names_none():
    config = MultiModalityConfig(vision_config={"params": {"model_name": "siglip_large_patch16_384"}})
    siglip, vq = config.siglip, config.vq
    assert (siglip.hidden_size, siglip.num_hidden_layers, siglip.num_attention_heads) == (1024, 24, 16)
    assert (siglip.patch_size, siglip.image_size, siglip.intermediate_size) == (16, 384, 4096)
    assert (vq.base_channels, vq.num_res_blocks, vq.latent_channels, vq.num_embeddings) == (128, 2, 256, 16384)


def transformers_checkpoint(directory: Path, tie: bool = False) -> JanusForConditionalGeneration:
    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = JanusConfig(
        text_config={"model_type": "llama", **text, "num_key_value_heads": 2, "vocab_size": 384},
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            projection_dim=64,
            num_image_tokens=16,
        ).to_dict(),
        vq_config=JanusVQVAEConfig(
            num_embeddings=128,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 2, 1, 1, 1],
            num_res_blocks=1,
            num_patches=4,
            projection_dim=64,
            image_token_embed_dim=64,
        ).to_dict(),
        image_token_id=5,
        tie_word_embeddings=tie,
    )
    model = JanusForConditionalGeneration(config).eval()
    model.save_pretrained(directory)
    return model


@torch.no_grad()
@pytest.mark.parametrize("tie", [False, True])
def test_a_checkpoint_in_transformers_format_computes_what_transformers_computes(tmp_path, tie):
    theirs: Any = transformers_checkpoint(tmp_path, tie)
    ours = MultiModalityCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(6, 384, (2, 9))
    close(ours.language_model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    hidden = theirs.model.language_model(input_ids=ids).last_hidden_state
    close(
        ours.gen_head(ours.language_model.model(input_ids=ids).last_hidden_state), theirs.model.generation_head(hidden)
    )
    pixels, codes = torch.randn(2, 3, 64, 64), torch.randint(0, 128, (2, 16))
    close(ours.aligner(ours.vision_model(pixels)), theirs.model.get_image_features(pixels).pooler_output)
    close(ours.prepare_gen_img_embeds(codes), theirs.prepare_embeddings_for_image_generation(codes))
    close(ours.gen_vision_model.decode_code(codes, [2, 8, 4, 4]), theirs.model.vqmodel.decode(codes))
    tower = ours.vision_model.vision_tower
    with pytest.raises(ValueError, match="pooling head"):
        tower.forward_head(torch.randn(1, 16, 32))
    ours.save_pretrained(tmp_path / "original")
    again = MultiModalityCausalLM.from_pretrained(tmp_path / "original")
    close(again.language_model(input_ids=ids).logits, ours.language_model(input_ids=ids).logits)


def test_a_processor_in_transformers_format_gives_the_same_ids_and_pixels(golden, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / name, tmp_path)
    nested = {
        "num_image_tokens": 16,
        "image_processor": {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    processor = VLChatProcessor.from_pretrained(tmp_path)
    batch = processor(prompt=golden.facts["und.sft"], images=[Image.open(GOLDEN / "sample.png")])
    assert torch.equal(batch.input_ids, golden.tensors["und.input_ids"])
    close(batch.pixel_values, golden.tensors["und.pixel_values"])


def test_auto_classes_know_the_model_and_the_saved_processor(golden, tmp_path):
    golden.model.save_pretrained(tmp_path)
    golden.processor.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MultiModalityConfig)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(model, MultiModalityCausalLM) and model.dtype == torch.bfloat16
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.encode(golden.facts["sft"][1]) == golden.facts["input_ids"][1]


# --- processor -------------------------------------------------------------------------------------------------------


def test_ids_begin_with_exactly_one_bos_whatever_the_tokenizer_files_say(golden, checkpoint):
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    for add_bos_token in (True, False):
        settings["add_bos_token"] = add_bos_token
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        processor = VLChatProcessor.from_pretrained(checkpoint)
        assert processor.tokenizer.encode(golden.facts["sft"][0]) == golden.facts["input_ids"][0]
        batch = processor.batchify([(golden.facts["sft"][0], []), (golden.facts["sft"][1], [])])
        real = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        assert real == golden.facts["input_ids"][:2]
        assert (batch.input_ids[batch.attention_mask == 0] == golden.facts["pad_id"]).all()


def test_a_batch_is_left_padded_and_each_row_embeds_as_it_does_alone(golden):
    image = Image.open(GOLDEN / "sample.png")
    one, two = golden.facts["und.sft"], golden.facts["und.sft"].replace("What", "<image_placeholder>\nWhat")
    batch = golden.processor.batchify([(one, [image]), (two, [image, image])])
    embeds = golden.model.prepare_inputs_embeds(**vars(batch))
    for i, images in enumerate(([image], [image, image])):
        alone = golden.processor(prompt=(one, two)[i], images=images)
        close(embeds[i][batch.attention_mask[i].bool()], golden.model.prepare_inputs_embeds(**vars(alone))[0])


def test_a_wrong_number_of_images_is_a_value_error(golden):
    with pytest.raises(ValueError, match="1 <image_placeholder> in the prompt for 0 images"):
        golden.processor(prompt=golden.facts["und.sft"], images=[])


def test_roles_are_janus_pros_only_where_the_tokenizer_has_them(golden):
    class OldTokenizer:
        def encode(self, text, add_special_tokens=True):
            return list(text)

    processor = copy.copy(golden.processor)
    processor.tokenizer = OldTokenizer()  # type: ignore[assignment]
    assert format_image_prompt(processor, "a dog") == "User: a dog\n\nAssistant:<begin_of_image>"


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from pathlib import Path
from janus.models import MultiModalityCausalLM
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
MultiModalityCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
before = status("VmRSS")
model = MultiModalityCausalLM.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print((status("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("suffix", "stored", "target"), [
    ("safetensors", "bfloat16", "float32"), ("safetensors", "float32", "bfloat16"), ("bin", "float32", "float32"),
    ("bin", "float32", "bfloat16"),
])  # fmt: skip
def test_loading_needs_at_most_1_2_times_the_target_in_memory(tmp_path, suffix, stored, target):
    config = other_config(hidden_size=640, intermediate_size=1792, num_hidden_layers=8, vocab_size=8000)
    for section, keys in (
        ("aligner_config", ["n_embed"]),
        ("gen_aligner_config", ["n_embed"]),
        ("gen_head_config", ["n_embed"]),
    ):
        getattr(config, section)["params"] |= dict.fromkeys(keys, 640)
    model = MultiModalityCausalLM(config).to(getattr(torch, stored))
    model.save_pretrained(tmp_path)
    if suffix == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    del model
    command = [sys.executable, "-c", MEASURE, str(GOLDEN), str(tmp_path), target]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert ratio < 1.2


# --- bad input -------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


def missing_shard(path):
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def truncated(path):
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def truncated_bin(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    content = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


def bomb(path):
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb()}))


def change_weights(path, remove=(), add=()):
    weights = load_file(path / "model.safetensors")
    weights = {k: v for k, v in weights.items() if not k.startswith(tuple(remove) or "\0")}
    save_file(weights | {name: torch.zeros(1) for name in add}, path / "model.safetensors")


BAD = {
    "no config": (lambda p: (p / "config.json").unlink(), ["config.json: file not found"]),
    "config not json": (lambda p: (p / "config.json").write_text("{"), ["config.json: not readable as JSON"]),
    "foreign model": (lambda p: edit_config(p, model_type="bert"), ["config.json", "'bert'", "multi_modality"]),
    "unknown tower": (
        lambda p: edit_config(p, vision_config={"params": {"model_name": "siglip_huge"}}),
        ["config.json", "siglip_huge", "width", "patch_size"],
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["no model.safetensors or pytorch_model.bin"]),
    "missing shard": (missing_shard, ["model-00001-of-00002.safetensors: missing shard", "index.json"]),
    "truncated file": (truncated, ["model.safetensors: truncated"]),
    "truncated bin": (truncated_bin, ["pytorch_model.bin: truncated"]),
    "pickle that is not tensors": (bomb, ["pytorch_model.bin", "not a file of plain tensors"]),
    "missing weights": (
        lambda p: change_weights(p, remove=["gen_head."]),
        ["4 missing weights", "gen_head.proj_out.weight", "..."],
    ),
    "unexpected weights": (
        lambda p: change_weights(p, add=["language_model.lora_A"]),
        ["1 unexpected weights", "language_model.lora_A"],
    ),
    "wrong shape": (
        lambda p: edit_config(p, gen_head_config={"params": {"n_embed": 64, "image_token_embed": 63}}),
        ["model.safetensors", "gen_head", "the config asks for"],
    ),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), ["tokenizer.json: file not found"]),
    "not a tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), ["tokenizer.json: not a tokenizer"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_end_in_one_line_that_names_file_and_cause(checkpoint, monkeypatch, case):
    spoil, expected = BAD[case]
    monkeypatch.chdir(checkpoint)
    spoil(checkpoint)
    with pytest.raises(CheckpointError) as error:
        load_pretrained_model(checkpoint, "float32", "cpu")
    message = str(error.value)
    assert "\n" not in message
    for part in [str(checkpoint), *expected]:
        assert part in message
    assert not Path("exploded").exists()


@pytest.mark.parametrize("path", ["/no/such/dir", "no-such-org/no-such-model", str(GOLDEN / "config.json")])
def test_a_checkpoint_that_does_not_exist_is_named_in_one_line(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError) as error:
        load_pretrained_model(path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_unknown_dtypes_and_absent_devices_are_value_errors():
    with pytest.raises(ValueError, match="dtype 'float7' is unknown"):
        load_pretrained_model(GOLDEN, "float7")
    with pytest.raises(ValueError, match="device 'tpux' is unknown"):
        load_pretrained_model(GOLDEN, device="tpux")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="0 CUDA devices"):
            load_pretrained_model(GOLDEN, device="cuda")
