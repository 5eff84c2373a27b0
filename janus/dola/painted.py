"""A finished painting run, read back from its directory, whoever wrote that."""

from pathlib import Path
from typing import Any

from janus.dola.files import RunLog, read_json_file
from janus.dola.painting import PaintingRun, is_run_file, variant_folders
from janus.dola.prompt_files import Prompt
from janus.dola.schema import REQUIRED, Nullable, complete, flag, mismatch, number, one_of, several, text, whole
from janus.dola.shards import open_patiently

LARGEST = 1_000_000
SETTINGS = {
    **dict.fromkeys(("model", "dtype", "device"), text(REQUIRED)),
    "format": one_of("jpg", "png", default=REQUIRED),
    "parallel_size": whole(1, LARGEST, REQUIRED),
    "seed": whole(-(2**200), 2**200, REQUIRED),
    **dict.fromkeys(("trace", "keep_all"), flag(REQUIRED)),
    "scorer": Nullable({"spec": text(REQUIRED), "text_encoder": Nullable(text())}),
}
DECODING = {
    "layers": several(whole(1, LARGEST), 0, LARGEST, REQUIRED),
    "alpha": number(0, 1, REQUIRED),
    "gamma": number(-100, 100, REQUIRED),
    "norm": flag(REQUIRED),
    "temperature": number(0, 1e6, REQUIRED),
    "cfg_weight": number(0, 1e6, REQUIRED),
    "cfg_order": one_of("guide_first", "contrast_first", default=REQUIRED),
}
"""What run.json says of a run, and of each of its variants."""


def read_painted(directory: Path) -> PaintingRun:
    """The run of a directory, which is locked while it is read.

    Raises ValueError where there is none, where somebody changed it, and where prompts are still to be painted.
    """
    path = directory / "run.json"
    run: Any = read_json_file(path)
    try:
        if not isinstance(run, dict) or run.get("log") != "manifest.jsonl" or not {"settings", "inputs"} <= run.keys():
            raise ValueError("describes no painting run")
        settings, prompts = run["settings"], run["inputs"]
        complete(settings, SETTINGS, "settings")
        variants = settings.get("variants")
        if not isinstance(variants, dict) or len(variants) != max(1, len(variant_folders(settings))):
            raise mismatch("settings.variants", "an object of named decodings", variants)
        for name, decoding in variants.items():
            complete(decoding, DECODING, f"settings.variants.{name}")
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts) or not prompts:
            raise mismatch("inputs", "a list of prompts", prompts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def read() -> PaintingRun:
        with RunLog(
            directory / "manifest.jsonl", settings, prompts, folders=variant_folders, is_own=is_run_file
        ) as log:
            per_prompt = len(variants) * settings["parallel_size"]
            fields = [entry.get("fields", {}) for entry in log.entries[::per_prompt]]
            fields += [{}] * (len(prompts) - len(fields))
            return PaintingRun(log, [Prompt(*pair) for pair in zip(prompts, fields, strict=True)])

    painted = open_patiently(read)
    if painted.todo:
        raise ValueError(f"{directory}: {len(painted.todo)} of {len(prompts)} prompts are not painted yet")
    return painted
