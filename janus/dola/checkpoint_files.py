"""The files of a checkpoint: found, checked, and read into a model tensor by tensor. Nothing in them is ever run."""

import ctypes
import os
import re
import sys
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from janus.dola.files import read_json_file
from janus.dola.memory import is_out_of_memory
from janus.dola.schema import REQUIRED, Field, Rule, complete


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message is one line that names the file and the cause."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever a library raises over a broken file as a CheckpointError of one line that begins with `what`.

    The libraries share no base class; a panic of those written in Rust is not even an Exception.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        cause = f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0]:.200}"
        raise CheckpointError(f"{what} ({'not enough memory' if is_out_of_memory(error) else cause})") from error


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint. Raises CheckpointError."""
    try:
        content = read_json_file(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_settings(path: Path, table: Mapping[str, Rule]) -> dict[str, Any]:
    """The keys of a JSON file that `table` names, checked and completed. Raises CheckpointError."""
    content = read_json(path)
    try:
        return complete(content, table)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


@contextmanager
def _without_panic_notes() -> Iterator[None]:
    """Keep off the terminal what a library in Rust prints of its own before its panic becomes an exception."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def read_tokenizer(path: Path, **options: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a `tokenizer.json`, as the file says and with nothing from the files beside it.

    Raises CheckpointError.
    """
    read_json(path)
    with refusing(f"{path}: not a tokenizer"), _without_panic_notes():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False, **options)
        tokenizer.encode("A dog\n\n2 é 画")  # some break only here
        return tokenizer


# --- directories and weight files ------------------------------------------------------------------------------------

HUB_KEYWORDS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
WITHOUT_EFFECT = ("trust_remote_code", "_from_auto", "low_cpu_mem_usage", "use_fast")
"""What users and transformers' Auto classes pass to every `from_pretrained`, and what changes nothing here."""


def hub_keywords(caller: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a `from_pretrained`'s further keywords that choose a snapshot. Raises TypeError for all others."""
    given = {key: value for key, value in keywords.items() if value not in (None, {}) and key not in WITHOUT_EFFECT}
    if unknown := [key for key in given if key not in HUB_KEYWORDS]:
        raise TypeError(f"{caller}.from_pretrained does not support {', '.join(unknown)}")
    return given


def resolve_directory(path_or_hub_id: str | os.PathLike, **hub: Any) -> Path:
    """A local directory as it is, a hub id as the directory of its downloaded snapshot. Raises CheckpointError."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: expected a checkpoint directory, found a file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path_or_hub_id)):
        raise CheckpointError(f"{path}: no such directory")
    try:
        patterns = ["*.json", "*.safetensors", "*.bin", "spiece.model"]
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=patterns, **hub))
    except Exception as error:  # the hub client raises many kinds: bad id, not found, gated, offline
        cause = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path_or_hub_id}: no such directory, and not available from the hub ({cause})"
        ) from None


def _names_a_file(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value and "\\" not in value


SHARD = Field("the name of a file beside this one", _names_a_file, REQUIRED)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, whole or sharded, safetensors first. Raises CheckpointError."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return [directory / name]
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise CheckpointError(f"{index}: weight_map: expected an object that names shards")
            try:
                complete(names, dict.fromkeys(names, SHARD), "weight_map")
            except ValueError as error:
                raise CheckpointError(f"{index}: {error}") from None
            shards = [directory / shard for shard in sorted(set(names.values()))]
            if missing := [shard for shard in shards if not shard.is_file()]:
                raise CheckpointError(f"{missing[0]}: missing shard, named in {index.name}")
            return shards
    raise CheckpointError(f"{directory}: no model.safetensors or pytorch_model.bin, whole or sharded")


def _open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt", backend="pread")
    except TypeError:  # safetensors before 0.8 maps the file
        return safe_open(path, framework="pt")


def _drop_pages(tensor: Tensor) -> None:
    """Give a memory-mapped tensor's pages back to the system once it is copied, so that they do not pile up.

    Those of its storage: a tensor may be expanded to any size, and what lies beyond the storage is not the file's.
    """
    if sys.platform == "linux":
        page, storage = os.sysconf("SC_PAGESIZE"), tensor.untyped_storage()
        start = -(-storage.data_ptr() // page) * page
        length = (storage.data_ptr() + storage.nbytes() - start) // page * page
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), 4)  # 4: MADV_DONTNEED


def return_freed_memory() -> None:
    """Give back to the system what glibc keeps of freed memory, in pieces between what is in use."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _is_zip(path: Path) -> bool:
    """Whether this is torch.save's zip format, which can be mapped, rather than its older one.

    Raises what torch.load would not see: tensors compressed anew, and a damaged list of them.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("compressed anew, where torch.save stores tensors as they are")
            if entry.filename.endswith("data.pkl"):
                file.read(entry)  # checks its sum
    return True


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one weight file, one at a time, so that the file is never in memory as a whole.

    Of those that are not `wanted`, what comes is without memory, and of no shape.
    Raises CheckpointError for a file that holds anything but tensors of floating-point numbers.
    """
    with refusing(f"{path}: truncated, or not a file of plain tensors"):
        if path.suffix == ".safetensors":
            with _open_safetensors(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, _plain(name, file.get_tensor(name)) if wanted(name) else NOT_READ
        else:
            mapped = _is_zip(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an unusual pickle protocol
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            if not isinstance(tensors, dict):
                raise ValueError(f"expected a dict of tensors, found {type(tensors).__name__}")
            for name, tensor in tensors.items():
                yield name, _plain(name, tensor) if wanted(name) else NOT_READ
                if mapped:
                    _drop_pages(tensor)


NOT_READ = torch.empty(0, device="meta")


def _plain(name: Any, tensor: Any) -> Tensor:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise ValueError(f"expected a dict of tensors, found {type(tensor).__name__} under {name!r:.60}")
    if not tensor.is_floating_point() and name.rpartition(".")[2] not in BUFFERS:
        raise ValueError(f"{name} holds {tensor.dtype}, not floating-point numbers")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{name} is a {tensor.layout} tensor on {tensor.device}")
    return tensor


# --- files -> model --------------------------------------------------------------------------------------------------

BUFFERS = ("position_ids", "codebook_used", "inv_freq")
"""Last names of what some files hold beside the weights: tables computed from the config, and a usage counter."""


@dataclass(frozen=True)
class WeightRule:
    """`stored` is a name prefix in the files, `own` the same in the model; `#` stands for a block number.

    `stored_thirds` and `own_thirds` say which thirds of the rows a fused tensor contributes or receives;
    `leading_axis` marks a stored tensor with an extra first axis of length 1.
    """

    stored: str
    own: str
    stored_thirds: tuple[int, int] = (0, 3)
    own_thirds: tuple[int, int] = (0, 3)
    leading_axis: bool = False

    def stored_shape(self, own: Sequence[int]) -> list[int]:
        """The shape of the stored tensor that fills a parameter of shape `own`."""
        (a, b), (c, d) = self.own_thirds, self.stored_thirds
        fused = [own[0] * (b - a) // (d - c), *own[1:]] if own else []
        return [1, *fused] if self.leading_axis else fused


AS_IS = WeightRule("", "")


def translate(name: str, prefix: str, replacement: str) -> str | None:
    """`name` with `prefix` replaced, block numbers carried over; None where it does not start with the prefix."""
    match = re.match(re.escape(prefix).replace(r"\#", r"(\d+)"), name)
    if match is None:
        return None
    for number in match.groups():
        replacement = replacement.replace("#", number, 1)
    return replacement + name[match.end() :]


def rows(tensor: Tensor, thirds: tuple[int, int]) -> Tensor:
    """The given thirds of a tensor's rows."""
    if thirds == (0, 3):
        return tensor
    size = tensor.shape[0] // 3
    return tensor[thirds[0] * size : thirds[1] * size]


def _is_finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()  # NaN and infinity reach one of them, at the cost of reading, without a copy
    return bool(torch.isfinite(low) & torch.isfinite(high))


@torch.no_grad()
def load_weights(
    model: nn.Module,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rules: Collection[WeightRule] = (),
    tied: Mapping[str, str] | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
    convert: Callable[[str], None] = lambda name: None,
) -> None:
    """Fill a model built on the meta device, each parameter getting its memory once the file has shown its shape.

    Peak memory is the target's plus one tensor; dtype defaults to that of the first file. `rules` translate names,
    `tied` names parameters that, where not stored, are the copy of another. Of all that must be in the files only the
    parameters `wanted` are read; `convert` is called with the name of each once it is whole. Raises CheckpointError
    for weights that are missing, unexpected, stored twice, of another shape, not finite, or more than memory holds.
    """
    files = weight_files(directory)
    dtype = dtype or next((t.dtype for _, t in read_tensors(files[0]) if t.is_floating_point()), torch.float32)
    own: dict[str, torch.Size] = {
        f"{prefix}.{key}".lstrip("."): parameter.shape
        for prefix, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }

    def place(name: str, tensor: Tensor) -> None:
        prefix, _, key = name.rpartition(".")
        model.get_submodule(prefix)._parameters[key] = nn.Parameter(tensor)

    filled: dict[str, set[tuple[int, int]]] = defaultdict(set)

    def thirds(name: str) -> int:
        return sum(b - a for a, b in filled[name])

    def targets_of(name: str) -> list[tuple[str, WeightRule]]:
        targets = [(translate(name, rule.stored, rule.own), rule) for rule in rules]
        return [(target, rule) for target, rule in targets if target in own] or [(name, AS_IS)]

    unexpected = []
    for file in files:
        for name, stored in read_tensors(file, lambda name: any(wanted(target) for target, _ in targets_of(name))):
            targets = targets_of(name)
            if targets[0][0] not in own:
                if name.rpartition(".")[2] not in BUFFERS:
                    unexpected.append(name)
                continue
            for target, rule in targets:
                if rule.own_thirds in filled[target]:
                    raise CheckpointError(f"{file}: {name} is stored a second time")
                filled[target].add(rule.own_thirds)
                if not wanted(target):
                    continue
                if list(stored.shape) != (expected := rule.stored_shape(own[target])):
                    raise CheckpointError(
                        f"{file}: {name} has shape {list(stored.shape)}, the config asks for {expected}"
                    )
                with refusing(f"{file}: {name} cannot be loaded on {device} as {dtype}"):
                    if model.get_parameter(target).is_meta:
                        place(target, torch.empty(own[target], dtype=dtype, device=device))
                    part = rows(model.get_parameter(target), rule.own_thirds)
                    part.copy_(rows(stored[0] if rule.leading_axis else stored, rule.stored_thirds))
                    finite = _is_finite(part)
                if not finite:
                    what = "numbers too large for" if stored.isfinite().all() else "NaN or infinity, in"
                    raise CheckpointError(f"{file}: {name} holds {what} {dtype}")
                if thirds(target) == 3:
                    convert(target)
    for name, source in (tied or {}).items():
        if not filled[name] and filled[source]:
            place(name, model.get_parameter(source).clone())
            filled[name] = {(0, 3)}
    missing = [name for name in own if thirds(name) != 3]
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = ", ..." if len(names) > 3 else ""
            raise CheckpointError(f"{directory}: {len(names)} {kind} weights ({', '.join(names[:3])}{more})")
    if any(table.is_meta for table in model.buffers()):
        with refusing(f"{directory}: tables of positions that cannot be built on {device}"):
            restore_tables(model, device)


def restore_tables(model: nn.Module, device: torch.device | str) -> None:
    """Build anew what a model from the meta device has besides parameters: the tables of its positions."""
    for parent in list(model.modules()):
        if (positions := parent._buffers.get("position_ids")) is not None:
            parent._buffers["position_ids"] = torch.arange(positions.shape[-1], device=device)[None]
        for name, module in parent.named_children():
            if "inv_freq" in module._buffers:
                rotary: Any = type(module)
                setattr(parent, name, rotary(config=module.config).to(device))
