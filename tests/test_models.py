import copy
import json
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
from transformers.models.janus.modeling_janus import JanusVQVAEAttnBlock

from conftest import GOLDEN
from generation_inference import format_image_prompt, generate, pack_prompts, tokens_to_images
from janus.dola import checkpoint_files
from janus.dola.checkpoint_files import CheckpointError
from janus.dola.loading import load_pretrained_model
from janus.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor
from tolerance import assert_close, terms_of


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the golden checkpoint, to be changed."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "checkpoint"))


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
    terms = terms_of(golden.model.language_model, golden.model.gen_head)
    assert_close(
        torch.stack([h[:, -1] for h in out.hidden_states]), golden.tensors["gen0.step0.hidden_last_pos"], terms
    )
    assert_close(golden.model.gen_head(out.last_hidden_state[:, -1]), golden.tensors["gen0.step0.gen_logits"], terms)


@torch.no_grad()
def test_understanding_inputs_and_greedy_answer_are_the_references(golden):
    batch = golden.processor(prompt=golden.facts["und.sft"], images=[Image.open(GOLDEN / "sample.png")])
    assert torch.equal(batch.input_ids, golden.tensors["und.input_ids"])
    assert_close(batch.pixel_values, golden.tensors["und.pixel_values"], terms=1)
    embeds = golden.model.prepare_inputs_embeds(**vars(batch))
    assert_close(embeds, golden.tensors["und.inputs_embeds"], terms_of(golden.model.vision_model, golden.model.aligner))
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
    assert_close(features, golden.tensors[f"vit.layer{layer}.normed"], terms_of(tower))
    assert_close(tower.forward_head(features), golden.tensors[f"vit.layer{layer}.pooled"], terms_of(tower))


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
    assert_close(grid.flatten(2).transpose(1, 2), by_index[0], terms_of(tower))
    with pytest.raises(ValueError, match=r"0\.\.3"):
        tower.get_intermediate_layers(pixels, n=[4])


@torch.no_grad()
def test_vq_codes_are_the_references_and_decode(golden):
    quantised, _, (_, _, codes) = golden.model.gen_vision_model.encode(golden.tensors["vq.input"])
    assert torch.equal(codes, golden.tensors["vq.codes"])
    assert quantised.shape == (2, 8, 4, 4)
    assert golden.model.gen_vision_model.decode_code(codes, shape=[2, 8, 4, 4]).shape == (2, 3, 64, 64)


@torch.no_grad()
def test_a_bfloat16_model_finds_the_codes_that_float32_finds():
    narrow = MultiModalityCausalLM.from_pretrained(GOLDEN, dtype=torch.bfloat16).gen_vision_model
    wide = copy.deepcopy(narrow).float()
    z = torch.randn(4, 8, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    directions = torch.nn.functional.normalize(z.double(), dim=1)
    entries = torch.nn.functional.normalize(narrow.quantize.embedding.weight.double(), dim=1)
    expected = torch.einsum("bchw,nc->bhwn", directions, entries).argmax(-1)
    assert torch.equal(narrow.nearest_codes(z), expected) and torch.equal(wide.nearest_codes(z.float()), expected)


@torch.no_grad()
def test_the_vq_attention_survives_float16_where_its_scores_do_not(golden):
    block = copy.deepcopy(golden.model.gen_vision_model.decoder.mid.attn_1)
    x = torch.randn(1, block.in_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = JanusVQVAEAttnBlock(block.in_channels)
    plain.load_state_dict(block.state_dict())
    assert_close(block(x), plain(x), terms_of(block))
    for projection in (block.q, block.k):
        projection.weight.fill_(4.0)
        projection.bias.fill_(60.0)
    plain.load_state_dict(block.state_dict())
    assert not plain.half()(x.half()).isfinite().all()  # 60 * 60 * 32 channels is more than float16 holds
    expected = copy.deepcopy(block).float()(x)
    finer = torch.finfo(torch.float16).eps / torch.finfo(torch.float32).eps
    assert_close(block.half()(x.half()), expected, terms_of(block), size=finer * float(expected.abs().max()))


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
    width = config["language_config"]["hidden_size"]
    config["vision_config"]["params"] |= {"layers": 2, "width": 40, "patch_size": 8}
    config["aligner_config"]["params"] |= {"input_dim": 40, "n_embed": width, "depth": 3}
    config["gen_aligner_config"]["params"] |= {"n_embed": width}
    config["gen_head_config"]["params"] |= {"n_embed": width, "image_token_embed": 56}
    config["gen_vision_config"]["params"] |= {"ch_mult": [1, 2, 2], "num_res_blocks": 2}
    return MultiModalityConfig.from_dict(config)


def test_a_model_of_other_sizes_survives_saving_and_loading(tmp_path):
    torch.manual_seed(0)
    model = MultiModalityCausalLM(other_config())
    model.save_pretrained(tmp_path)
    loaded = MultiModalityCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 384, (2, 7))
    logits = model.language_model(input_ids=ids).logits
    assert_close(loaded.language_model(input_ids=ids).logits, logits, terms_of(model.language_model))
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
    terms = terms_of(ours)
    assert_close(ours.language_model(input_ids=ids).logits, theirs(input_ids=ids).logits, terms)
    hidden = theirs.model.language_model(input_ids=ids).last_hidden_state
    codes_of = ours.gen_head(ours.language_model.model(input_ids=ids).last_hidden_state)
    assert_close(codes_of, theirs.model.generation_head(hidden), terms)
    pixels, codes = torch.randn(2, 3, 64, 64), torch.randint(0, 128, (2, 16))
    features = theirs.model.get_image_features(pixels).pooler_output
    assert_close(ours.aligner(ours.vision_model(pixels)), features, terms)
    assert_close(ours.prepare_gen_img_embeds(codes), theirs.prepare_embeddings_for_image_generation(codes), terms)
    assert_close(ours.gen_vision_model.decode_code(codes, [2, 8, 4, 4]), theirs.model.vqmodel.decode(codes), terms)
    tower = ours.vision_model.vision_tower
    with pytest.raises(ValueError, match="pooling head"):
        tower.forward_head(torch.randn(1, 16, 32))
    ours.save_pretrained(tmp_path / "original")
    again = MultiModalityCausalLM.from_pretrained(tmp_path / "original")
    assert_close(again.language_model(input_ids=ids).logits, ours.language_model(input_ids=ids).logits, terms)


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
    assert_close(batch.pixel_values, golden.tensors["und.pixel_values"], terms=1)


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
        terms = terms_of(golden.model.vision_model, golden.model.aligner)
        expected = golden.model.prepare_inputs_embeds(**vars(alone))[0]
        assert_close(embeds[i][batch.attention_mask[i].bool()], expected, terms)


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
    model = MultiModalityCausalLM(config).to(getattr(torch, stored))
    model.save_pretrained(tmp_path)
    if suffix == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    del model
    command = [sys.executable, "-c", MEASURE, str(GOLDEN), str(tmp_path), target]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert ratio < 1.2


# --- arguments -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("load", [MultiModalityCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_an_attention_asked_for_is_the_one_that_every_part_uses(golden, load):
    model: Any = load(GOLDEN, attn_implementation="eager")
    parts: Any = (model, model.language_model, model.vision_model.vision_tower)
    assert {part.config._attn_implementation for part in parts} == {"eager"}
    assert golden.model.language_model.config._attn_implementation == "sdpa"
    ids, pixels = torch.tensor([golden.facts["input_ids"][0]]), golden.tensors["und.pixel_values"][0]
    for eager, sdpa, given in (
        (model.language_model, golden.model.language_model, {"input_ids": ids}),
        (model.vision_model, golden.model.vision_model, {"pixel_values": pixels}),
    ):
        got, expected = eager(**given), sdpa(**given)
        got, expected = (getattr(x, "logits", x) for x in (got, expected))
        assert_close(got, expected, terms_of(sdpa))


def test_a_language_config_may_name_the_attention_as_the_original_demo_does():
    language_config = AutoConfig.from_pretrained(GOLDEN).language_config
    language_config._attn_implementation = "eager"
    model: Any = AutoModelForCausalLM.from_pretrained(GOLDEN, language_config=language_config, trust_remote_code=True)
    assert model.language_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu"), {"": torch.device("cpu")}])
def test_a_device_map_of_one_device_is_that_device(device_map):
    assert MultiModalityCausalLM.from_pretrained(GOLDEN, device_map=device_map).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantization_config": {"load_in_8bit": True}}, TypeError, "does not support quantization_config"),
        ({"subfolder": "a", "bananas": 3}, TypeError, "MultiModalityCausalLM.from_pretrained .* subfolder, bananas"),
        ({"device_map": "auto"}, ValueError, "must name one device, as 'cuda' or 'cuda:0', got 'auto'"),
        ({"device_map": {"vision_model": "cpu", "language_model": 0}}, ValueError, "must name one device"),
        ({"device_map": "cpu", "device": "cpu"}, ValueError, "give one of them"),
        ({"attn_implementation": "flash_attention_2"}, ValueError, "'sdpa' or 'eager', got 'flash_attention_2'"),
        ({"dtype": "float7"}, ValueError, "dtype must be float32, .* got 'float7'"),
        ({"dtype": torch.int8}, ValueError, "dtype must be float32, .* got torch.int8"),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        MultiModalityCausalLM.from_pretrained(GOLDEN, **arguments)


def test_a_processor_refuses_by_name_what_it_cannot_honour():
    with pytest.raises(TypeError, match=r"VLChatProcessor\.from_pretrained does not support image_size"):
        VLChatProcessor.from_pretrained(GOLDEN, image_size=96)


@pytest.mark.parametrize("cls", [MultiModalityCausalLM, VLChatProcessor])
def test_a_revision_reaches_the_hub(cls, monkeypatch):
    asked = {}
    monkeypatch.setattr(checkpoint_files, "snapshot_download", lambda *_, **how: asked.update(how) or str(GOLDEN))
    cls.from_pretrained("an-org/a-model", revision="v1", token=None, trust_remote_code=True)
    assert asked.pop("allow_patterns") and asked == {"revision": "v1"}


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
