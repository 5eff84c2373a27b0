"""Checkpoints that are not as they should be: each family ends in one line that names file, key, expected and found."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel

from benchmarks import hostile_checkpoints
from benchmarks.decode_speed import as_transformers
from conftest import GOLDEN
from janus.dola import checkpoint_files
from janus.dola.checkpoint_files import CheckpointError
from janus.dola.loading import load_pretrained_model
from janus.dola.text_encoder import find_text_encoder, load_text_encoder
from janus.models import MultiModalityCausalLM


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the golden checkpoint, to be changed."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def transformers_golden(golden, tmp_path_factory) -> Path:
    """The golden checkpoint in transformers' format, in shards."""
    directory = tmp_path_factory.mktemp("transformers")
    as_transformers(golden.model, golden.processor).save_pretrained(directory, max_shard_size="2MB")
    shutil.copy(GOLDEN / "tokenizer.json", directory)
    image_processor = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    settings = {"num_image_tokens": 16, "image_processor": image_processor}
    (directory / "processor_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def siglip(golden, tmp_path_factory) -> Path:
    """A SigLIP of random weights."""
    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 362}
    text = {"vocab_size": 384, "max_position_embeddings": 8, "projection_size": 32}
    config = SiglipConfig(text_config=width | ids | text, vision_config=width | {"image_size": 16, "patch_size": 8})
    directory = tmp_path_factory.mktemp("siglip")
    SiglipModel(config).save_pretrained(directory)
    golden.processor.tokenizer.save_pretrained(directory)
    return directory


def edit(path: Path, changes: dict[str, Any]) -> None:
    """Set values of a JSON file by their dotted keys; ... drops one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is ...:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def refusal(load: Callable[[Path], Any], directory: Path) -> str:
    """The one line that loading ends in."""
    with pytest.raises(CheckpointError) as error:
        load(directory)
    message = str(error.value)
    assert message.startswith(str(directory)) and "\n" not in message
    return message


def load(directory: Path):
    return load_pretrained_model(directory, "float32", "cpu")


# --- config.json and the other settings ------------------------------------------------------------------------------

WRONG = [
    ("config.json", "vision_config.params", None, "an object, found null"),
    ("config.json", "aligner_config.params", [2], "an object, found a list of 1"),
    ("config.json", "gen_vision_config", "VQ-16", 'an object, found "VQ-16"'),
    ("config.json", "language_config", None, "an object, found null"),
    ("config.json", "language_config.hidden_size", "64", 'a whole number in 1..65536, found "64"'),
    ("config.json", "language_config.hidden_size", 64.0, "a whole number in 1..65536, found 64.0"),
    ("config.json", "language_config.hidden_size", True, "a whole number in 1..65536, found true"),
    ("config.json", "language_config.vocab_size", 0, "a whole number in 1..4194304, found 0"),
    ("config.json", "language_config.num_hidden_layers", -6, "a whole number in 1..256, found -6"),
    ("config.json", "language_config.num_hidden_layers", 10**9, "a whole number in 1..256, found 1000000000"),
    ("config.json", "language_config.num_attention_heads", 5, "a divisor of hidden_size, found 5"),
    ("config.json", "language_config.num_key_value_heads", 3, "a divisor of heads, found 3"),
    ("config.json", "language_config.head_dim", 7, "an even number (left out: hidden_size per head), found 7"),
    ("config.json", "language_config.rms_norm_eps", -1e-6, "a number in 1e-12..0.1, found -1e-06"),
    ("config.json", "language_config.hidden_act", "sotfmax", '"silu" or "gelu" or "gelu_pytorch_tanh" or "relu"'),
    ("config.json", "language_config.model_type", "gpt2", '"llama", found "gpt2"'),
    ("config.json", "language_config.rope_scaling.rope_type", "spiral", '"default" or "linear" or "dynamic"'),
    ("config.json", "language_config.rope_scaling.factor", 0, "a number in 1..10000, found 0"),
    ("config.json", "language_config.pad_token_id", 384, "less than vocab_size, found 384"),
    ("config.json", "vision_config.params.heads", 5, "a divisor of width, found 5"),
    ("config.json", "vision_config.params.image_size", 8, "at least 16, found 8"),
    ("config.json", "vision_config.params.select_layer", -2, "-1, found -2"),
    ("config.json", "vision_config.params.mlp_ratio", [4], "a number in 0.01..100, found a list of 1"),
    ("config.json", "aligner_config.params.input_dim", 33, "vision_config.params.width, which is 32, found 33"),
    ("config.json", "aligner_config.params.projector_type", "identity", '"mlp_gelu", found "identity"'),
    ("config.json", "gen_vision_config.params.ch", 48, "a multiple of 32 in 32..4096, found 48"),
    ("config.json", "gen_vision_config.params.ch_mult", [1, 0], "a list of 1 to 12 values, each a whole number in"),
    ("config.json", "gen_head_config.params.image_token_size", 129, "gen_vision_config.params.image_token_size, which"),
    ("preprocessor_config.json", "image_size", ..., "a whole number in 1..4096, found nothing"),
    ("preprocessor_config.json", "image_size", 0, "a whole number in 1..4096, found 0"),
    ("preprocessor_config.json", "image_mean", ..., "a list of 3 values, each a number in -1..2, found nothing"),
    ("preprocessor_config.json", "image_std", [0.5, 0, 0.5], "a list of 3 values"),
    ("preprocessor_config.json", "min_size", 65, "at most image_size, 64, found 65"),
    ("preprocessor_config.json", "background_color", [127, 127, 256], "a list of 3 values, each a whole number"),
    ("preprocessor_config.json", "do_normalize", False, "true, found false"),
    ("preprocessor_config.json", "rescale_factor", 1, "a number in"),
    ("preprocessor_config.json", "size", {"height": 64, "width": 32}, "its height, 64, found 32"),
    ("processor_config.json", "num_image_tokens", -1, "a whole number in 1..1048576, found -1"),
    ("processor_config.json", "sft_format", "llama2", '"deepseek", found "llama2"'),
    ("processor_config.json", "add_special_token", "no", 'false, found "no"'),
    ("processor_config.json", "add_special_token", True, "false, found true"),
    ("generation_config.json", "guidance_scale", -0.5, "a number in 0..10000, found -0.5"),
    ("generation_config.json", "guidance_scale", "5", 'a number in 0..10000, found "5"'),
    ("generation_config.json", "temperature", 0, "a number in 0.0001..10000, found 0"),
    ("generation_config.json", "eos_token_id", [1, "2"], "a whole number in 0..4194303 or a list of 1 to 64 values"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "key", "value", "rest"), WRONG)
def test_a_value_out_of_place_is_named_with_file_and_key(checkpoint, file, key, value, rest):
    (checkpoint / "generation_config.json").write_text("{}")
    edit(checkpoint / file, {key: value})
    message = refusal(load, checkpoint)
    assert message.startswith(f"{checkpoint / file}: {key}") and f"expected {rest}" in message


WRONG_IN_TRANSFORMERS = [
    ("config.json", "text_config", None, "an object, found null"),
    ("config.json", "text_config.vocab_size", -1, "a whole number in 1..4194304, found -1"),
    ("config.json", "vision_config.num_hidden_layers", "4", 'a whole number in 1..256, found "4"'),
    ("config.json", "vision_config.projection_dim", 63, "text_config.hidden_size, which is 64, found 63"),
    ("config.json", "vision_config.use_qk_norm", True, "false, found true"),
    ("config.json", "vq_config.base_channels", 0, "a multiple of 32 in 32..4096, found 0"),
    ("config.json", "vq_config.double_latent", True, "false, found true"),
    ("config.json", "vq_config.projection_dim", 32, "text_config.hidden_size, which is 64, found 32"),
    ("processor_config.json", "image_processor.size.height", ..., "a whole number in 1..4096, found nothing"),
    ("processor_config.json", "image_processor.image_std", None, "a list of 3 values"),
]


@pytest.mark.parametrize(("file", "key", "value", "rest"), WRONG_IN_TRANSFORMERS)
def test_in_transformers_format_a_value_is_named_as_its_file_names_it(
    transformers_golden, tmp_path, file, key, value, rest
):
    directory = Path(shutil.copytree(transformers_golden, tmp_path / "checkpoint"))
    edit(directory / file, {key: value})
    message = refusal(load, directory)
    assert message.startswith(f"{directory / file}: {key}") and f"expected {rest}" in message


@pytest.mark.parametrize(("file", "key", "value", "message"), [
    ("preprocessor_config.json", "image_size", 48, "image_size of the image processor: expected the tower's 64"),
    ("processor_config.json", "num_image_tokens", 17, "num_image_tokens: expected the tower's 16"),
    ("config.json", "language_config.vocab_size", 300, "last token of tokenizer.json: expected below vocab_size 300"),
])  # fmt: skip
def test_files_that_do_not_fit_each_other_are_refused(checkpoint, file, key, value, message):
    edit(checkpoint / file, {key: value})
    assert message in refusal(load, checkpoint)


def test_a_missing_preprocessor_config_is_no_384_pixels(checkpoint):
    (checkpoint / "preprocessor_config.json").unlink()
    assert refusal(load, checkpoint) == f"{checkpoint / 'preprocessor_config.json'}: file not found"


def test_keys_that_mean_nothing_to_the_model_do_no_harm(golden, checkpoint):
    edit(checkpoint / "config.json", {"language_config.to_dict": 3, "language_config.return_dict": False, "forward": 1})
    edit(checkpoint / "config.json", {"num_labels": -1, "torch_dtype": "float7", "vision_config.params.note": None})
    _, _, model = load(checkpoint)
    ids = torch.tensor([golden.facts["input_ids"][0]])
    assert torch.equal(model.language_model(input_ids=ids).logits, golden.model.language_model(input_ids=ids).logits)


def test_a_checkpoint_may_carry_its_own_guidance_and_temperature(checkpoint):
    settings = {"guidance_scale": 0, "temperature": 0.5, "eos_token_id": [1, 2], "_from_model_config": "x"}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    model = load(checkpoint)[2]
    model.save_pretrained(checkpoint)
    for own in (model.generation_config, load(checkpoint)[2].generation_config):
        assert (own.guidance_scale, own.temperature, own.eos_token_id) == (0, 0.5, [1, 2])


# --- no code, no question --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["siglip", "a_type_of_its_own"])
def test_no_code_of_a_checkpoint_runs_and_none_is_asked_for(checkpoint, siglip, monkeypatch, capfd, model_type):
    shutil.copytree(siglip, checkpoint / "siglip")
    edit(checkpoint / "siglip" / "config.json", {"model_type": model_type})
    for directory in (checkpoint, checkpoint / "siglip"):
        hostile_checkpoints.add_code(directory)
        assert "auto_map" in json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    load(checkpoint)
    if model_type == "siglip":
        find_text_encoder(str(checkpoint), None)
    else:
        message = refusal(lambda p: find_text_encoder(str(checkpoint), None), checkpoint / "siglip")
        assert 'model_type: expected "siglip", found "a_type_of_its_own"' in message
    assert not list(checkpoint.rglob("mark")) and "trust_remote_code" not in "".join(capfd.readouterr())


# --- weights ---------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


def to_bin(directory: Path, change: Callable[[dict], Any] = lambda weights: weights) -> Path:
    """The weights, changed, as pytorch_model.bin in the place of model.safetensors."""
    torch.save(change(load_file(directory / "model.safetensors")), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory / "pytorch_model.bin"


def change_weights(directory: Path, **changes: Any) -> None:
    """Replace tensors by name, with __ for the dots; None removes all that begin so."""
    weights: dict[str, Any] = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            weights = {stored: weights[stored] for stored in weights if not stored.startswith(name)}
        else:
            weights[name] = tensor(weights[name]) if callable(tensor) else tensor
    save_file(weights, directory / "model.safetensors")


def at_one_place(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.clone().index_fill_(0, torch.tensor([tensor.shape[0] - 1]), value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shards(directory: Path, *names: str) -> None:
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def twice(directory: Path) -> None:
    shards(directory, "a.safetensors", "b.safetensors")
    shutil.copy(directory / "a.safetensors", directory / "b.safetensors")


def compressed(directory: Path) -> None:
    path = to_bin(directory)
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)


def swapped_storages(directory: Path) -> None:
    """Two tensors of one shape change places in the list of a .bin, which torch.load does not see."""
    path = to_bin(directory)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        entry = next(entry for entry in file.infolist() if entry.filename.endswith("data.pkl"))
    name = content.index(b"gen_aligner.layers.0.bias", entry.header_offset)
    key = content.index(b"X\x01\x00\x00\x00", content.index(b"FloatStorage", entry.header_offset)) + 5
    assert key < name + 2000
    content[key] ^= 1
    path.write_bytes(content)


def only_a_pipe(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")


BIAS = "gen_aligner.layers.0.bias"
BAD = {
    "no config": (lambda p: (p / "config.json").unlink(), ["config.json: file not found"]),
    "config not json": (lambda p: (p / "config.json").write_text("{"), ["config.json: not JSON"]),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), ["config.json: expected a JSON object"]),
    "foreign model": (
        lambda p: edit(p / "config.json", {"model_type": "bert"}),
        ["config.json", "'bert'", "multi_modality"],
    ),
    "unknown tower": (
        lambda p: edit(p / "config.json", {"vision_config": {"params": {"model_name": "siglip_huge"}}}),
        ["config.json", "siglip_huge", "width", "patch_size"],
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["no model.safetensors or pytorch_model.bin"]),
    "a pipe for weights": (only_a_pipe, ["no model.safetensors or pytorch_model.bin"]),
    "missing shard": (lambda p: shards(p, "a.safetensors", "b.safetensors"), ["b.safetensors: missing shard", "index"]),
    "shard elsewhere": (
        lambda p: shards(p, "../checkpoint/a.safetensors"),
        ["model.safetensors.index.json: weight_map.tensor0: expected the name of a file beside this one, found"],
    ),
    "shard by its path": (lambda p: shards(p, str(p / "a.safetensors")), ["the name of a file beside this one"]),
    "shard a number": (lambda p: shards(p, 3), ["the name of a file beside this one, found 3"]),  # type: ignore
    "no shards": (lambda p: shards(p), ["model.safetensors.index.json: weight_map: expected an object"]),
    "a shard twice": (twice, ["b.safetensors", "stored a second time"]),
    "truncated file": (lambda p: cut(p / "model.safetensors"), ["model.safetensors: truncated"]),
    "truncated bin": (lambda p: cut(to_bin(p)), ["pytorch_model.bin: truncated"]),
    "pickle that is not tensors": (
        lambda p: to_bin(p).write_bytes(pickle.dumps({"weight": Bomb()})),
        ["pytorch_model.bin", "not a file of plain tensors"],
    ),
    "compressed bin": (compressed, ["pytorch_model.bin", "compressed"]),
    "damaged bin": (swapped_storages, ["pytorch_model.bin", "data.pkl"]),
    "a bin of a list": (lambda p: to_bin(p, list), ["a dict of tensors, found list"]),
    "a bin with a number": (lambda p: to_bin(p, lambda w: w | {BIAS: 3.0}), ["found float", BIAS]),
    "a bin with a sparse tensor": (
        lambda p: to_bin(p, lambda w: w | {BIAS: w[BIAS].to_sparse()}),
        [BIAS, "torch.sparse_coo"],
    ),
    "a tensor expanded to terabytes": (
        lambda p: to_bin(p, lambda w: w | {"gen_embed.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}),
        ["gen_embed.weight has shape [1048576, 1048576], the config asks for [128, 8]"],
    ),
    "not a number": (lambda p: change_weights(p, **{BIAS: at_one_place(float("nan"))}), [BIAS, "NaN or infinity"]),
    "infinity": (lambda p: change_weights(p, **{BIAS: at_one_place(-float("inf"))}), [BIAS, "NaN or infinity"]),
    "too large": (
        lambda p: change_weights(p, **{BIAS: lambda w: at_one_place(1e300)(w.double())}),
        [BIAS, "numbers too large for torch.float32"],
    ),
    "whole numbers": (lambda p: change_weights(p, **{BIAS: lambda w: w.long()}), [BIAS, "torch.int64"]),
    "missing weights": (
        lambda p: change_weights(p, gen_head__=None),
        ["4 missing weights", "gen_head.proj_out.weight", "..."],
    ),
    "unexpected weights": (
        lambda p: change_weights(p, language_model__lora_A=torch.zeros(1)),
        ["1 unexpected weights", "language_model.lora_A"],
    ),
    "wrong shape": (
        lambda p: edit(p / "config.json", {"gen_head_config.params.image_token_embed": 63}),
        ["model.safetensors", "gen_head", "the config asks for"],
    ),
    "rows that no third of fits": (
        lambda p: change_weights(p, vision_model__vision_tower__blocks__0__attn__qkv__bias=torch.zeros(97)),
        ["blocks.0.attn.qkv.bias has shape [97], the config asks for [96]"],
    ),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), ["tokenizer.json: file not found"]),
    "not a tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), ["tokenizer.json: not a tokenizer"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_end_in_one_line_that_names_file_and_cause(checkpoint, monkeypatch, case):
    spoil, expected = BAD[case]
    monkeypatch.chdir(checkpoint)
    spoil(checkpoint)
    message = refusal(load, checkpoint)
    for part in expected:
        assert part in message
    assert not Path("exploded").exists()


def test_a_weight_that_float16_cannot_hold_is_refused_and_float32_takes_it(checkpoint):
    change_weights(checkpoint, **{BIAS: at_one_place(1e5)})
    assert "numbers too large for torch.float16" in refusal(
        lambda p: load_pretrained_model(p, "float16", "cpu"), checkpoint
    )
    load(checkpoint)


def test_pages_beyond_an_expanded_tensors_storage_are_left_alone(checkpoint):
    to_bin(
        checkpoint, lambda w: w | {"gen_vision_model.quantize.codebook_used": torch.zeros(1).expand(1 << 20, 1 << 20)}
    )
    load(checkpoint)


def test_a_config_of_terabytes_allocates_nothing(checkpoint, monkeypatch):
    width = 1 << 16
    edit(checkpoint / "config.json", {
        "language_config.hidden_size": width, "language_config.vocab_size": 1 << 22,
        "language_config.intermediate_size": 1 << 20, "aligner_config.params.n_embed": width,
        "gen_aligner_config.params.n_embed": width, "gen_head_config.params.n_embed": width,
    })  # fmt: skip
    taken, empty = [], torch.empty

    def counting(*size, **how):
        made = empty(*size, **how)
        taken.append(0 if made.is_meta else made.numel())
        return made

    monkeypatch.setattr(checkpoint_files.torch, "empty", counting)
    assert "the config asks for" in refusal(lambda p: MultiModalityCausalLM.from_pretrained(p), checkpoint)
    assert sum(taken) < 10_000_000  # the first weights whose sizes are still the file's


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_said_in_one_line(checkpoint, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint_files.torch, "empty", full)
    assert "not enough memory" in refusal(lambda p: MultiModalityCausalLM.from_pretrained(p), checkpoint)


def test_other_errors_of_ours_are_not_taken_for_the_checkpoints(checkpoint, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files.torch, "empty", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(checkpoint)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def edit_tokenizer(directory: Path, change: Callable[[dict], Any]) -> None:
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def drop_the_longest_token(content: dict) -> None:
    content["model"]["vocab"].pop(max(content["model"]["vocab"], key=len))


def test_a_panic_of_the_tokenizers_library_is_one_line_and_nothing_else(checkpoint, capfd):
    edit_tokenizer(checkpoint, drop_the_longest_token)
    assert "tokenizer.json: not a tokenizer (PanicException" in refusal(load, checkpoint)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(vocab=None), "not a tokenizer"),
        (lambda c: c.update(pre_tokenizer={"type": "Nonsense"}), "not a tokenizer"),
        (lambda c: c.update(added_tokens=c["added_tokens"][:3]), "special tokens are missing: <image_placeholder>"),
        (lambda c: c["added_tokens"].pop(2), "special tokens are missing: <｜▁pad▁｜>"),
        (lambda c: c["added_tokens"][0].update(id=-1), "not a tokenizer"),
        (lambda c: c.update(normalizer={"type": "Replace", "pattern": {"String": "<image"}, "content": ""}), None),
    ],
)
def test_a_broken_tokenizer_is_refused(checkpoint, change, message):
    edit_tokenizer(checkpoint, change)
    if message is None:  # special tokens are cut out before the normaliser
        load(checkpoint)
    else:
        assert message in refusal(load, checkpoint)


# --- the text encoder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("config.json", "model_type", ..., 'model_type: expected "siglip", found nothing'),
        ("config.json", "text_config", None, "text_config: expected an object, found null"),
        ("config.json", "text_config.num_attention_heads", 3, "num_attention_heads: expected a divisor of 32, found 3"),
        ("config.json", "text_config.vocab_size", 10**13, "text_config.vocab_size: expected a whole number in"),
        ("config.json", "text_config.vocab_size", 300, "its last token is"),
        ("config.json", "vision_config.patch_size", 17, "patch_size: expected at most image_size 16, found 17"),
        ("config.json", "text_config.max_position_embeddings", 9, "position_embedding.weight has shape [8, 32]"),
        ("tokenizer_config.json", "pad_token", ..., "pad_token: expected a token, found nothing"),
        ("tokenizer_config.json", "pad_token", "<none>", "does not hold the pad_token of tokenizer_config.json"),
        ("tokenizer_config.json", "padding_side", "up", 'padding_side: expected "left" or "right", found "up"'),
        ("tokenizer_config.json", "tokenizer_class", "SiglipTokenizer", "spiece.model: not a tokenizer"),
    ],
)
def test_a_text_encoder_out_of_order_is_refused_by_name(siglip, tmp_path, file, key, value, message):
    directory = Path(shutil.copytree(siglip, tmp_path / "siglip"))
    edit(directory / file, {key: value})
    assert message in refusal(load_text_encoder, directory)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: change_weights(p, logit_scale=torch.tensor([float("nan")])), "logit_scale holds NaN"),
        (compressed, "compressed"),
        (lambda p: change_weights(p, text_model=None), "missing weights (text_model."),
        (lambda p: (p / "tokenizer_config.json").unlink(), "tokenizer_config.json: file not found"),
        (lambda p: edit_tokenizer(p, drop_the_longest_token), "PanicException"),
    ],
)
def test_a_text_encoders_files_are_read_as_carefully(siglip, tmp_path, spoil, message):
    directory = Path(shutil.copytree(siglip, tmp_path / "siglip"))
    spoil(directory)
    assert message in refusal(load_text_encoder, directory)


@torch.no_grad()
def test_a_text_encoder_is_the_one_that_transformers_loads(siglip):
    model, tokenizer = load_text_encoder(siglip)
    theirs: Any = SiglipModel.from_pretrained(siglip, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))
    ids = tokenizer(["a dog"], padding="max_length", max_length=8, return_tensors="pt")["input_ids"]
    assert torch.equal(model.text_model(ids).pooler_output, theirs.text_model(ids).pooler_output)


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a case is a forked process")
def test_generated_breakages_all_end_well(tmp_path):
    subjects = hostile_checkpoints.make_subjects(tmp_path)
    for number in range(25):
        _, what, outcome, terminal = hostile_checkpoints.run_case(subjects, 1, number, tmp_path)
        assert outcome in ("works", "one line"), f"{what}: {terminal}"
