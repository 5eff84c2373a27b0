"""Image(s) and a question to an answer with Janus: the reference path, the same with DoLa, and with the vision prior.

Everything here works on any object with the attribute names of a Janus model, the original code's included.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from generation_inference import chat_roles
from janus.dola.cli import JANUS_TINY, CommandParser, add_model_arguments, parse_layers, positive, run_command
from janus.dola.files import RunLog, load_image, read_json_file
from janus.dola.fusion import VisionPriorLogitsProcessor, first_token_ids, vision_prior
from janus.dola.logits_processor import DoLaLogitsProcessor
from janus.dola.rerank import build_text_bank, find_text_encoder, own_tau, rerank_with_dola_static_siglip, vision_layer
from janus.dola.switches import DoLaSwitches

Images = str | os.PathLike | Image.Image | Sequence[str | os.PathLike | Image.Image]


# --- steps -----------------------------------------------------------------------------------------------------------


def prepare_question(mmgpt, vl_chat_processor, images: Images, question: str):
    """The chat that shows the images (paths or PIL; none for a question on text) and asks, as a batch of one.

    Raises ValueError, naming the file, for an image that is not one.
    """
    images = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else images
    user, assistant = chat_roles(vl_chat_processor.tokenizer)
    content = "<image_placeholder>\n" * len(images) + question
    batch = vl_chat_processor(
        conversations=[{"role": user, "content": content}, {"role": assistant, "content": ""}],
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
):
    """The reference call of transformers' `generate` on a prepared question: greedy, at most 512 tokens.

    `generate_kwargs` overrides what it is called with. Returns the text, or with `return_tokens` (text, tokens `[T]`
    int64).
    """
    tokenizer = vl_chat_processor.tokenizer
    if batch.pixel_values.shape[1]:
        inputs_embeds = mmgpt.prepare_inputs_embeds(**vars(batch))
    else:
        inputs_embeds = mmgpt.language_model.get_input_embeddings()(batch.input_ids)
    reference = {
        "inputs_embeds": inputs_embeds,
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


# --- ways to answer --------------------------------------------------------------------------------------------------


def answer(mmgpt, vl_chat_processor, images: Images, question: str, *, return_tokens: bool = False, **generate_kwargs):
    """The reference path: the greedy answer to a question on image(s), as a string.

    `generate_kwargs` (`max_new_tokens`, `do_sample`, `num_beams`, ...) go to transformers' `generate`; with
    `return_tokens` the result is (text, tokens `[T]` int64). Raises ValueError, naming the file, for an image that is
    not one.
    """
    batch = prepare_question(mmgpt, vl_chat_processor, images, question)
    return decode_answer(mmgpt, vl_chat_processor, batch, (), return_tokens, **generate_kwargs)


def answer_with_dola_static(
    mmgpt,
    vl_chat_processor,
    images: Images,
    question: str,
    *,
    layer: int | None = None,
    layer_ratio: float = 0.8,
    alpha: float = 0.1,
    use_dola: bool = True,
    return_tokens: bool = False,
    **generate_kwargs,
):
    """`answer` with the last layer contrasted with a fixed earlier one at every step, read through lm_head.

    `layer` is in 1..N (N, like `use_dola=False`, is `answer` itself); without it, `layer_ratio` of the depth. Raises
    ValueError for a layer, ratio or alpha outside its range.
    """
    batch = prepare_question(mmgpt, vl_chat_processor, images, question)
    with DoLaLogitsProcessor(
        mmgpt.language_model, layer=layer, layer_ratio=layer_ratio, alpha=alpha, use_dola=use_dola
    ) as dola:
        return decode_answer(mmgpt, vl_chat_processor, batch, [dola], return_tokens, **generate_kwargs)


def answer_with_dola(
    mmgpt,
    vl_chat_processor,
    images: Images,
    question: str,
    *,
    candidate_layers: Sequence[int] = (22, 24, 26, 28),
    alpha: float = 0.1,
    use_dola: bool = True,
    return_tokens: bool = False,
    **generate_kwargs,
):
    """The early-exit form: every step contrasts with the candidate that differs most from the last layer.

    Candidates outside 1..N-1 are dropped; raises ValueError where none is left, or for an alpha outside [0, 1].
    """
    batch = prepare_question(mmgpt, vl_chat_processor, images, question)
    with DoLaLogitsProcessor(
        mmgpt.language_model, candidate_layers=candidate_layers, alpha=alpha, use_dola=use_dola
    ) as dola:
        return decode_answer(mmgpt, vl_chat_processor, batch, [dola], return_tokens, **generate_kwargs)


def answer_with_switches(
    mmgpt,
    vl_chat_processor,
    images: Images,
    question: str,
    switches: DoLaSwitches,
    *,
    candidates: Sequence[str] = (),
    text_bank: Tensor | None = None,
    tau: float = 1.0,
    miss: float | None = None,
    return_tokens: bool = False,
    **generate_kwargs,
):
    """Both towers, as the switches say: rerank the candidates, map them to words, DoLa on lm_head, fusion.

    candidates, text_bank: the texts and their embeddings `[C, width]` (`build_text_bank`); without any, there is no
    fusion. tau: the tower's temperature. miss: see `vision_prior`. Several images speak with their mean p_hat. Where
    the language side's DoLa is off, fusion keeps to the plausible tokens by alpha_L all the same. Raises ValueError
    as the parts do. Source: plan 6, section 3.
    """
    batch = prepare_question(mmgpt, vl_chat_processor, images, question)
    llm = mmgpt.language_model
    with DoLaLogitsProcessor(
        llm, layer=switches.fixed_layer_llm, alpha=switches.alpha_L, use_dola=switches.use_dola_lm_static
    ) as dola:
        processors: list[LogitsProcessor] = [dola]
        if candidates and switches.lambda_mm > 0:
            if text_bank is None or not batch.pixel_values.shape[1]:
                raise ValueError("candidates need an image to be ranked on and a text_bank of their embeddings")
            tower = mmgpt.vision_model.vision_tower
            layer = vision_layer(tower, switches)
            p_hat = rerank_with_dola_static_siglip(
                tower, batch.pixel_values[0], text_bank, layer, switches.alpha_V, tau
            )
            words = [first_token_ids(vl_chat_processor.tokenizer, candidate) for candidate in candidates]
            r_V = vision_prior(p_hat.mean(0), words, llm.lm_head.weight.shape[0], switches.mm_topk_for_T, miss)
            alpha = 0.0 if dola.layers else switches.alpha_L
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
            if not (folder / image).is_file():
                raise ValueError(f"{where}: {folder / image}: file not found")
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
    dola = parser.add_argument_group("DoLa")
    add = dola.add_mutually_exclusive_group().add_argument
    add("--layer", type=int, help="fixed contrast layer of the language model, 1..N; N is no contrast (default: none)")
    add("--layer_ratio", type=float, help="fixed contrast layer by depth, 0..1 (default: none)")
    add("--candidate_layers", type=parse_layers, help="early exit among these, as 22,24,26,28 (default: none)")
    add("--config", metavar="FILE", help="switches as JSON: DoLa in both towers, and fusion (default: none)")
    add("--no_dola", action="store_true", help="the reference path (the default)")
    dola.add_argument("--alpha", type=float, help="plausibility threshold with a layer, 0..1 (default: 0.1)")
    add = parser.add_argument_group("with --config").add_argument
    add("--domain", help="a domain of the file (default: the file's own switches)")
    add("--candidates", nargs="+", metavar="TEXT", help="what the images may show (default: no fusion)")
    add("--text_encoder", help="SiglipModel that embeds them: directory or hub id (default: siglip/ in --model)")
    add("--tau", type=float, help="the tower's temperature, above 0 (default: the text encoder's exp(-logit_scale))")
    return parser


def way_to_answer(parser: CommandParser, args: argparse.Namespace) -> partial:
    """The function that the options name, and what it is called with. Options that need another end the command."""
    if args.image and args.questions:
        parser.error("--image goes with --question; the entries of --questions name their own")
    for option in ("domain", "candidates", "text_encoder", "tau"):
        if getattr(args, option) is not None and args.config is None:
            parser.error(f"--{option} needs --config")
    with_layers = (args.candidate_layers, args.layer, args.layer_ratio) != (None, None, None)
    if args.alpha is not None and not with_layers:
        parser.error("--alpha needs --layer, --layer_ratio or --candidate_layers")
    dola = {"alpha": 0.1 if args.alpha is None else args.alpha, "max_new_tokens": args.max_new_tokens}
    if args.candidate_layers is not None:
        return partial(answer_with_dola, candidate_layers=args.candidate_layers, **dola)
    if with_layers:
        ratio = 0.8 if args.layer_ratio is None else args.layer_ratio
        return partial(answer_with_dola_static, layer=args.layer, layer_ratio=ratio, **dola)
    if args.config:
        switches = DoLaSwitches.from_json(args.config, args.domain)
        return partial(answer_with_switches, switches=switches, max_new_tokens=args.max_new_tokens)
    return partial(answer, max_new_tokens=args.max_new_tokens)


def main() -> None:
    from janus.dola.loading import load_pretrained_model  # here, so that the rest runs beside the original code too

    parser = build_parser()
    args = parser.parse_args()
    way = way_to_answer(parser, args)
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
        tau = own_tau(siglip) if args.tau is None else args.tau
        for texts in lists:
            bank = build_text_bank(siglip, tokenizer, texts)
            vision[texts] = {"candidates": texts, "text_bank": bank, "tau": tau}

    def ask(question: Question) -> str:
        images = [question.folder / image for image in question.images]
        return way(model, processor, images, question.text, **vision.get(question.candidates, {})).removeprefix(" ")

    if args.question:
        print(ask(questions[0]))
        return
    weight = model.get_input_embeddings().weight
    settings = {
        "model": JANUS_TINY.name if args.model == str(JANUS_TINY) else args.model,
        "way": way.func.__name__,
        **{name: asdict(value) if isinstance(value, DoLaSwitches) else value for name, value in way.keywords.items()},
        "tau": tau,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
    }
    log = RunLog(Path(args.outdir) / "answers.jsonl", settings, args.overwrite)
    for i, question in enumerate(questions):
        if i in log.entries and question.record != {key: log.entries[i][0].get(key) for key in question.record}:
            raise ValueError(
                f"{log.path} answers another list (question {i} is {log.entries[i][0]['question']!r}): "
                "choose another directory, or pass --overwrite"
            )
    todo = [i for i in range(len(questions)) if i not in log.entries]
    for i in tqdm(todo, total=len(questions), initial=len(questions) - len(todo), unit="question"):
        try:
            text = ask(questions[i])
        except ValueError as error:
            raise ValueError(f"{args.questions}: entry {i}: {error}") from None
        expected = questions[i].expected
        right = {} if expected is None else {"right": is_right(text, expected)}
        log.add(i, [questions[i].record | {"answer": text} | right])
    rights = [log.entries[i][0]["right"] for i, question in enumerate(questions) if question.expected is not None]
    print(f"{len(todo)} questions answered ({len(questions) - len(todo)} were done already): {log.path}")
    if rights:
        print(f"accuracy {sum(rights) / len(rights):.3f} ({sum(rights)} of {len(rights)})")


if __name__ == "__main__":
    run_command(main)
