"""Image(s) and a question to an answer with Janus: the reference path, the same with DoLa, and with the vision prior.

Everything here works on any object with the attribute names of a Janus model, the original code's included.
"""

if __name__ == "__main__":
    from janus.dola.interrupt import exit_on_interrupt

    exit_on_interrupt()  # the imports below take seconds

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from dola_runtime import DEFAULT_ALPHA, DEFAULT_LAYER_RATIO, check_alpha, check_gamma
from generation_inference import format_question
from janus.dola.cli import CommandParser, add_dola_arguments, add_model_arguments, positive, run_command, run_settings
from janus.dola.files import RunLog, load_image, read_json_file
from janus.dola.fusion import VisionPriorLogitsProcessor, first_token_ids, vision_prior
from janus.dola.inputs import embed_inputs
from janus.dola.logits_processor import DoLaLogitsProcessor
from janus.dola.rerank import (
    build_text_bank,
    find_text_encoder,
    rerank_with_dola_static_siglip,
    siglip_temperature,
    vision_layer,
)
from janus.dola.switches import DoLaSwitches

Images = str | os.PathLike | Image.Image | Sequence[str | os.PathLike | Image.Image]


# --- steps -----------------------------------------------------------------------------------------------------------


def prepare_question(mmgpt, vl_chat_processor, images: Images, question: str):
    """The chat that shows the images (paths or PIL; none for a question on text) and asks, as a batch of one.

    Raises ValueError, naming the file, for an image that is not one.
    """
    images = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else images
    batch = vl_chat_processor(
        prompt=format_question(vl_chat_processor, question, len(images)),
        images=[image if isinstance(image, Image.Image) else load_image(image) for image in images],
        force_batchify=True,
    )
    weight = mmgpt.language_model.get_input_embeddings().weight
    return batch.to(weight.device, weight.dtype)


@torch.inference_mode()
def decode_answer(
    mmgpt,
    vl_chat_processor,
    batch,
    logits_processor: Sequence[LogitsProcessor] = (),
    return_tokens: bool = False,
    **generate_kwargs,
) -> str | tuple[str, Tensor]:
    """The reference call of transformers' `generate` on a prepared question: greedy, at most 512 tokens.

    `generate_kwargs` overrides what it is called with. Returns the text, or with `return_tokens` (text, tokens `[T]`
    int64).
    """
    tokenizer = vl_chat_processor.tokenizer
    reference = {
        "inputs_embeds": embed_inputs(mmgpt, batch),
        "attention_mask": batch.attention_mask,
        "pad_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "max_new_tokens": 512,
        "do_sample": False,
        "use_cache": True,
        "logits_processor": LogitsProcessorList(logits_processor),
    }
    tokens = mmgpt.language_model.generate(**reference | generate_kwargs)[0]
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return (text, tokens) if return_tokens else text


# --- answers ---------------------------------------------------------------------------------------------------------


@overload
def answer(
    mmgpt, vl_chat_processor, images: Images, question: str, *, return_tokens: Literal[False] = False, **options: Any
) -> str: ...
@overload
def answer(
    mmgpt, vl_chat_processor, images: Images, question: str, *, return_tokens: Literal[True], **options: Any
) -> tuple[str, Tensor]: ...
def answer(
    mmgpt, vl_chat_processor, images: Images, question: str, *, return_tokens: bool = False, **generate_kwargs
) -> str | tuple[str, Tensor]:
    """The reference path: the greedy answer to a question on image(s), as a string.

    `generate_kwargs` (`max_new_tokens`, `do_sample`, `num_beams`, ...) go to transformers' `generate`; with
    `return_tokens` the result is (text, tokens `[T]` int64). Raises ValueError, naming the file, for an image that is
    not one.
    """
    batch = prepare_question(mmgpt, vl_chat_processor, images, question)
    return decode_answer(mmgpt, vl_chat_processor, batch, (), return_tokens, **generate_kwargs)


@overload
def answer_with_dola_static(
    mmgpt, vl_chat_processor, images: Images, question: str, *, return_tokens: Literal[False] = False, **options: Any
) -> str: ...
@overload
def answer_with_dola_static(
    mmgpt, vl_chat_processor, images: Images, question: str, *, return_tokens: Literal[True], **options: Any
) -> tuple[str, Tensor]: ...
def answer_with_dola_static(
    mmgpt,
    vl_chat_processor,
    images: Images,
    question: str,
    *,
    layer: int | None = None,
    layer_ratio: float = DEFAULT_LAYER_RATIO,
    alpha: float = DEFAULT_ALPHA,
    gamma: float = 1.0,
    norm: bool = True,
    use_dola: bool = True,
    return_tokens: bool = False,
    **generate_kwargs,
) -> str | tuple[str, Tensor]:
    """`answer` with the last layer contrasted with a fixed earlier one at every step, read through lm_head.

    `layer` is in 1..N (N, like `use_dola=False`, is `answer` itself); without it, `layer_ratio` of the depth. Raises
    ValueError for a layer, ratio or alpha outside its range.
    """
    batch = prepare_question(mmgpt, vl_chat_processor, images, question)
    with DoLaLogitsProcessor(
        mmgpt.language_model,
        layer=layer,
        layer_ratio=layer_ratio,
        alpha=alpha,
        gamma=gamma,
        norm=norm,
        use_dola=use_dola,
    ) as dola:
        return decode_answer(mmgpt, vl_chat_processor, batch, [dola], return_tokens, **generate_kwargs)


@overload
def answer_with_dola(
    mmgpt, vl_chat_processor, images: Images, question: str, *, return_tokens: Literal[False] = False, **options: Any
) -> str: ...
@overload
def answer_with_dola(
    mmgpt, vl_chat_processor, images: Images, question: str, *, return_tokens: Literal[True], **options: Any
) -> tuple[str, Tensor]: ...
def answer_with_dola(
    mmgpt,
    vl_chat_processor,
    images: Images,
    question: str,
    *,
    candidate_layers: Sequence[int] = (22, 24, 26, 28),
    alpha: float = DEFAULT_ALPHA,
    gamma: float = 1.0,
    norm: bool = True,
    use_dola: bool = True,
    return_tokens: bool = False,
    **generate_kwargs,
) -> str | tuple[str, Tensor]:
    """The early-exit form: every step contrasts with the candidate that differs most from the last layer.

    Candidates outside 1..N-1 are dropped; raises ValueError where none is left, or for an alpha outside [0, 1].
    """
    batch = prepare_question(mmgpt, vl_chat_processor, images, question)
    with DoLaLogitsProcessor(
        mmgpt.language_model,
        candidate_layers=candidate_layers,
        alpha=alpha,
        gamma=gamma,
        norm=norm,
        use_dola=use_dola,
    ) as dola:
        return decode_answer(mmgpt, vl_chat_processor, batch, [dola], return_tokens, **generate_kwargs)


@overload
def answer_with_switches(
    mmgpt,
    vl_chat_processor,
    images: Images,
    question: str,
    switches: DoLaSwitches,
    *,
    return_tokens: Literal[False] = False,
    **options: Any,
) -> str: ...
@overload
def answer_with_switches(
    mmgpt,
    vl_chat_processor,
    images: Images,
    question: str,
    switches: DoLaSwitches,
    *,
    return_tokens: Literal[True],
    **options: Any,
) -> tuple[str, Tensor]: ...
def answer_with_switches(
    mmgpt,
    vl_chat_processor,
    images: Images,
    question: str,
    switches: DoLaSwitches,
    *,
    norm: bool = True,
    candidates: Sequence[str] = (),
    text_bank: Tensor | None = None,
    tau: float = 1.0,
    miss: float | None = None,
    return_tokens: bool = False,
    **generate_kwargs,
) -> str | tuple[str, Tensor]:
    """Both towers, as the switches say: rerank the candidates, map them to words, DoLa on lm_head, fusion.

    candidates, text_bank: the texts and their embeddings `[C, width]` (`build_text_bank`); without any, there is no
    fusion. tau: the tower's temperature. miss: see `vision_prior`. Several images speak with their mean p_hat. Where
    the language side's DoLa is off, fusion keeps to the plausible tokens by alpha_L all the same. Raises ValueError
    as the parts do. Source: plan 6, section 3.
    """
    batch = prepare_question(mmgpt, vl_chat_processor, images, question)
    llm = mmgpt.language_model
    with DoLaLogitsProcessor(
        llm,
        layer=switches.fixed_layer_llm,
        alpha=switches.alpha_L,
        gamma=switches.gamma_L,
        norm=norm,
        use_dola=switches.use_dola_lm_static,
    ) as dola:
        processors: list[LogitsProcessor] = [dola]
        if candidates and switches.lambda_mm > 0:
            if text_bank is None or not batch.images_emb_mask.any():
                raise ValueError("candidates need an image to be ranked on and a text_bank of their embeddings")
            tower = mmgpt.vision_model.vision_tower
            layer = vision_layer(tower, switches)
            p_hat = rerank_with_dola_static_siglip(
                tower, batch.pixel_values[0], text_bank, layer, switches.alpha_V, tau, gamma=switches.gamma_V, norm=norm
            )
            words = [first_token_ids(vl_chat_processor.tokenizer, candidate) for candidate in candidates]
            r_V = vision_prior(p_hat.mean(0), words, llm.lm_head.weight.shape[0], switches.mm_topk_for_T, miss)
            alpha = 0.0 if dola.on else switches.alpha_L
            processors.append(VisionPriorLogitsProcessor(r_V, switches.lambda_mm, alpha))
        return decode_answer(mmgpt, vl_chat_processor, batch, processors, return_tokens, **generate_kwargs)


# --- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One entry of a questions file. `images` are as the file names them, seen from `folder`."""

    folder: Path
    images: tuple[str, ...]
    text: str
    expected: str | None = None
    candidates: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """What the log says of it."""
        record = {"images": list(self.images), "question": self.text, "candidates": list(self.candidates)}
        return record | ({} if self.expected is None else {"expected": self.expected})


def read_questions(path: str | os.PathLike, candidates: Sequence[str] = ()) -> list[Question]:
    """The entries of `[{"image": path, "question": text, "answer": expected, "candidates": [text, ...]}, ...]`.

    Only the question must be there; "image" may be a list, `candidates` stand in where an entry has none. Image paths
    start from the file's folder. Raises ValueError naming the file and the entry.
    """
    content = read_json_file(path)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: expected a list of at least one question")
    folder, questions = Path(path).parent, []
    for i, entry in enumerate(content):
        where = f"{path}: entry {i}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object, found {entry!r}")
        if unknown := sorted(entry.keys() - {"image", "question", "answer", "candidates"}):
            raise ValueError(f"{where}: unknown key {unknown[0]!r} (known: image, question, answer, candidates)")
        images, own = entry.get("image", []), entry.get("candidates", [])
        images = [images] if isinstance(images, str) else images
        for key, value in (("image", images), ("candidates", own)):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{where}: {key!r} must be strings, found {value!r}")
        question, expected = entry.get("question"), entry.get("answer")
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{where}: 'question' must be a text, found {question!r}")
        if not isinstance(expected, (str, type(None))):
            raise ValueError(f"{where}: 'answer' must be a text, found {expected!r}")
        for image in images:
            try:
                load_image(folder / image)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        questions.append(Question(folder, tuple(images), question, expected, tuple(own or candidates)))
    return questions


def is_right(given: str, expected: str) -> bool:
    """Word for word, but for case, space around, and a full stop at the end."""
    given, expected = (text.strip().removesuffix(".").casefold() for text in (given, expected))
    return given == expected


def build_parser() -> CommandParser:
    parser = CommandParser(
        description="Answer questions on images with Janus: the reference path, unless a DoLa option is given."
    )
    group = parser.add_argument_group("question")
    group.add_argument("--image", nargs="+", default=[], metavar="FILE", help="image file(s) (default: none)")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--question", metavar="TEXT", help="what to ask")
    add("--questions", metavar="FILE", help='[{"image", "question", "answer", "candidates"}, ...] as JSON')
    add = parser.add_argument_group("output").add_argument
    add("--outdir", default="outputs/answers", help="where answers.jsonl of --questions goes (default: %(default)s)")
    add("--overwrite", action="store_true", help="start anew where --outdir holds another run (default: refuse)")
    add("--max_new_tokens", type=positive, default=512, help="longest answer (default: %(default)s)")
    add_model_arguments(parser)
    add_dola_arguments(parser, "none, unless --config names one")
    add = parser.add_argument_group("with --config").add_argument
    add("--candidates", nargs="+", metavar="TEXT", help="what the images may show (default: no fusion)")
    add("--text_encoder", help="SiglipModel that embeds them: directory or hub id (default: siglip/ in --model)")
    add("--tau", type=float, help="the tower's temperature, above 0 (default: the text encoder's exp(-logit_scale))")
    return parser


def answer_function(parser: CommandParser, args: argparse.Namespace) -> partial:
    """The function that the options ask for, with their values. Options that need another one end the command."""
    if args.image and args.questions:
        parser.error("--image goes with --question; the entries of --questions name their own")
    for option in ("domain", "candidates", "text_encoder", "tau"):
        if getattr(args, option) is not None and args.config is None:
            parser.error(f"--{option} needs --config")
    if args.config:
        if args.candidate_layers or args.layer_ratio is not None:
            parser.error("--config takes --layer, not --candidate_layers or --layer_ratio")
        given = {"fixed_layer_llm": args.layer, "alpha_L": args.alpha, "gamma_L": args.gamma}
        switches = DoLaSwitches.from_json(args.config, args.domain)
        switches = replace(switches, **{name: value for name, value in given.items() if value is not None})
        return partial(
            answer_with_switches, switches=switches, norm=not args.no_norm, max_new_tokens=args.max_new_tokens
        )
    on = (args.candidate_layers, args.layer, args.layer_ratio, args.gamma) != (None, None, None, None)
    if args.alpha is not None and not on:
        parser.error("--alpha needs --layer, --layer_ratio, --candidate_layers, --gamma or --apc_only")
    if not on:
        return partial(answer, max_new_tokens=args.max_new_tokens)
    dola: dict[str, Any] = {
        "alpha": DEFAULT_ALPHA if args.alpha is None else args.alpha,
        "gamma": 1.0 if args.gamma is None else args.gamma,
        "norm": not args.no_norm,
    }
    check_alpha(dola["alpha"])
    check_gamma(dola["gamma"])
    if args.candidate_layers is not None:
        function, dola["candidate_layers"] = answer_with_dola, args.candidate_layers
    else:
        function, dola["layer"] = answer_with_dola_static, args.layer
        dola["layer_ratio"] = DEFAULT_LAYER_RATIO if args.layer_ratio is None else args.layer_ratio
    return partial(function, **dola, max_new_tokens=args.max_new_tokens)


def main() -> None:
    from janus.dola.loading import load_pretrained_model  # here, so that the rest runs beside the original code too

    parser = build_parser()
    args = parser.parse_args()
    function = answer_function(parser, args)
    if args.questions:
        questions = read_questions(args.questions, args.candidates or ())
    else:
        questions = [Question(Path(), tuple(args.image), args.question, None, tuple(args.candidates or ()))]
    _, processor, model = load_pretrained_model(args.model, args.dtype, args.device)
    lists = {question.candidates for question in questions if question.candidates} if args.config else ()
    vision: dict[tuple[str, ...], dict[str, Any]] = {}
    tau = None
    if lists:
        siglip, tokenizer = find_text_encoder(args.model, args.text_encoder)
        tau = siglip_temperature(siglip) if args.tau is None else args.tau
        for texts in lists:
            bank = build_text_bank(siglip, tokenizer, texts)
            vision[texts] = {"candidates": texts, "text_bank": bank, "tau": tau}

    def ask(question: Question) -> str:
        images = [question.folder / image for image in question.images]
        return function(model, processor, images, question.text, **vision.get(question.candidates, {})).removeprefix(
            " "
        )

    if args.question:
        print(ask(questions[0]))
        return
    decoding = {name: asdict(x) if isinstance(x, DoLaSwitches) else x for name, x in function.keywords.items()}
    settings = run_settings(args, model) | {"tau": tau, **decoding}
    inputs = [question.record for question in questions]
    with RunLog(Path(args.outdir) / "answers.jsonl", settings, inputs, overwrite=args.overwrite) as log:
        todo = range(len(log.entries), len(questions))
        for i in tqdm(todo, total=len(questions), initial=len(questions) - len(todo), unit="question"):
            try:
                text = ask(questions[i])
            except ValueError as error:
                raise ValueError(f"{args.questions}: entry {i}: {error}") from None
            expected = questions[i].expected
            right = {} if expected is None else {"right": is_right(text, expected)}
            log.add(i, [{"index": i} | questions[i].record | {"answer": text} | right])
        rights = [log.entries[i]["right"] for i, question in enumerate(questions) if question.expected is not None]
        print(f"{len(todo)} questions answered ({len(questions) - len(todo)} were done already): {log.path}")
        if rights:
            print(f"accuracy {sum(rights) / len(rights):.3f} ({sum(rights)} of {len(rights)})")


if __name__ == "__main__":
    run_command(main)
