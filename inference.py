"""Image(s) and a question to an answer with Janus: the reference path, the same with DoLa, and with the vision prior.

Everything here works on any object with the attribute names of a Janus model, the original code's included.
"""

if __name__ == "__main__":
    from janus.dola.interrupt import exit_on_interrupt

    exit_on_interrupt()  # the imports below take seconds

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from dola_runtime import (
    DEFAULT_ALPHA,
    DEFAULT_LAYER_RATIO,
    check_alpha,
    check_gamma,
    check_layer,
    check_number,
    check_temperature,
)
from generation_inference import format_question
from janus.dola.cli import (
    CommandParser,
    Progress,
    add_dola_arguments,
    add_model_arguments,
    positive,
    run_command,
    run_settings,
)
from janus.dola.files import RunLog, load_image
from janus.dola.fusion import TowerPrior, VisionPriorLogitsProcessor, read_tower
from janus.dola.inputs import pad_together, read_prompts
from janus.dola.logits_processor import DoLaLogitsProcessor, TraceLogitsProcessor
from janus.dola.painting import prompt_seed, write_trace
from janus.dola.question_files import Question, cut_batches, is_right, read_questions
from janus.dola.rerank import (
    build_text_bank,
    find_text_encoder,
    siglip_temperature,
    tower_depth,
    vision_layer,
)
from janus.dola.switches import DoLaSwitches
from janus.dola.variants import LAYER_KEYWORDS, fill_variant, parse_variants

Images = str | os.PathLike | Image.Image | Sequence[str | os.PathLike | Image.Image]
Turns = str | Sequence[str]
"""What is asked, or a chat: the user's first turn, the answer to it, and so on to the user's last."""


class Answer(NamedTuple):
    """`tokens` are `[T]` int64; `trace` holds arrays `[T, ...]` of what `TraceLogitsProcessor` told, if asked."""

    text: str
    tokens: Tensor
    trace: dict[str, np.ndarray]


# --- steps -----------------------------------------------------------------------------------------------------------


def prepare_question(mmgpt, vl_chat_processor, images: Images, question: Turns):
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
def decode_answers(
    mmgpt, vl_chat_processor, prompts, logits_processor: Sequence[LogitsProcessor] = (), **generate_kwargs
) -> list[tuple[str, Tensor]]:
    """The reference call of transformers' `generate` on what `read_prompts` made: greedy, at most 512 tokens.

    `generate_kwargs` overrides what it is called with. Returns each question's (text, tokens `[T]` int64), the first
    where `num_return_sequences` asks for more.
    """
    tokenizer = vl_chat_processor.tokenizer
    reference = {
        **prompts,
        "pad_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "max_new_tokens": 512,
        "do_sample": False,
        "use_cache": True,
        "logits_processor": LogitsProcessorList(logits_processor),
    }
    rows = mmgpt.language_model.generate(**reference | generate_kwargs)
    answers = []
    for tokens in rows[:: len(rows) // len(prompts["attention_mask"])]:
        ends = (tokens == tokenizer.eos_token_id).nonzero()[:1, 0].tolist()
        tokens = tokens[: ends[0] + 1 if ends else None]
        answers.append((tokenizer.decode(tokens.tolist(), skip_special_tokens=True), tokens))
    return answers


# --- answers ---------------------------------------------------------------------------------------------------------


def answer_batch(
    mmgpt,
    vl_chat_processor,
    questions: Sequence[tuple[Images, Turns]],
    *,
    dola: Mapping[str, Any] | None = None,
    prior: TowerPrior | None = None,
    trace: int = 0,
    **generate_kwargs,
) -> list[Answer]:
    """The answers to (images, question) pairs, decoded together; in float32 they are those to each alone.

    dola: keywords of `DoLaLogitsProcessor`; None is the reference path. prior: the vision prior, if any; where the
    language side's DoLa is off, fusion keeps to the plausible tokens by alpha_L all the same. trace: how many of the
    most probable tokens each answer's trace tells of; 0 is none. `generate_kwargs` (`max_new_tokens`, `do_sample`,
    `num_beams`, ...) go to transformers' `generate`. Raises ValueError as the parts do, for an image that is not one
    (naming the file), and for a trace of beams.
    """
    if trace and generate_kwargs.get("num_beams", 1) > 1:
        raise ValueError("a trace follows one sequence: it cannot be of beams")
    prepared = [prepare_question(mmgpt, vl_chat_processor, *asked) for asked in questions]
    copies = max(generate_kwargs.get(name) or 1 for name in ("num_beams", "num_return_sequences"))
    prompts = read_prompts(mmgpt, prepared, vl_chat_processor.pad_id, copies)
    dola = {"use_dola": False} if dola is None else dola
    with DoLaLogitsProcessor(mmgpt.language_model, **dola) as processor:
        processors: list[LogitsProcessor] = [processor]
        if prior is not None and prior.switches.lambda_mm > 0:
            together = pad_together(prepared, vl_chat_processor.pad_id)
            r_V = read_tower(mmgpt, vl_chat_processor, together, prior)
            alpha = 0.0 if processor.on else prior.switches.alpha_L
            processors.append(VisionPriorLogitsProcessor(r_V, prior.switches.lambda_mm, alpha))
        steps = TraceLogitsProcessor(processor, trace) if trace else None
        processors += [steps] if steps else []
        answers = decode_answers(mmgpt, vl_chat_processor, prompts, processors, **generate_kwargs)
    return [
        Answer(text, tokens, steps.trace_of(row, len(tokens)) if steps else {})
        for row, (text, tokens) in enumerate(answers)
    ]


def _answer_one(mmgpt, vl_chat_processor, images: Images, question: Turns, return_tokens: bool, **options) -> Any:
    text, tokens, _ = answer_batch(mmgpt, vl_chat_processor, [(images, question)], **options)[0]
    return (text, tokens) if return_tokens else text


def answer(
    mmgpt, vl_chat_processor, images: Images, question: Turns, *, return_tokens: bool = False, **generate_kwargs
) -> Any:
    """The reference path: the greedy answer to a question on image(s), as a string.

    `generate_kwargs` (`max_new_tokens`, `do_sample`, `num_beams`, ...) go to transformers' `generate`; with
    `return_tokens` the result is (text, tokens `[T]` int64). Raises ValueError, naming the file, for an image that is
    not one.
    """
    return _answer_one(mmgpt, vl_chat_processor, images, question, return_tokens, **generate_kwargs)


def answer_with_dola_static(
    mmgpt,
    vl_chat_processor,
    images: Images,
    question: Turns,
    *,
    layer: int | None = None,
    layer_ratio: float = DEFAULT_LAYER_RATIO,
    alpha: float = DEFAULT_ALPHA,
    gamma: float = 1.0,
    norm: bool = True,
    use_dola: bool = True,
    return_tokens: bool = False,
    **generate_kwargs,
) -> Any:
    """`answer` with the last layer contrasted with a fixed earlier one at every step, read through lm_head.

    `layer` is in 1..N (N, like `use_dola=False`, is `answer` itself); without it, `layer_ratio` of the depth. Raises
    ValueError for a layer, ratio or alpha outside its range.
    """
    dola = {
        "layer": layer,
        "layer_ratio": layer_ratio,
        "alpha": alpha,
        "gamma": gamma,
        "norm": norm,
        "use_dola": use_dola,
    }
    return _answer_one(mmgpt, vl_chat_processor, images, question, return_tokens, dola=dola, **generate_kwargs)


def answer_with_dola(
    mmgpt,
    vl_chat_processor,
    images: Images,
    question: Turns,
    *,
    candidate_layers: Sequence[int] = (22, 24, 26, 28),
    alpha: float = DEFAULT_ALPHA,
    gamma: float = 1.0,
    norm: bool = True,
    use_dola: bool = True,
    return_tokens: bool = False,
    **generate_kwargs,
) -> Any:
    """The early-exit form: every step contrasts with the candidate that differs most from the last layer.

    Candidates outside 1..N-1 are dropped; raises ValueError where none is left, or for an alpha outside [0, 1].
    """
    dola = {
        "candidate_layers": candidate_layers,
        "alpha": alpha,
        "gamma": gamma,
        "norm": norm,
        "use_dola": use_dola,
    }
    return _answer_one(mmgpt, vl_chat_processor, images, question, return_tokens, dola=dola, **generate_kwargs)


def answer_with_switches(
    mmgpt,
    vl_chat_processor,
    images: Images,
    question: Turns,
    switches: DoLaSwitches,
    *,
    norm: bool = True,
    candidates: Sequence[str] = (),
    text_bank: Tensor | None = None,
    tau: float = 1.0,
    miss: float | None = None,
    return_tokens: bool = False,
    **generate_kwargs,
) -> Any:
    """Both towers, as the switches say: rerank the candidates, map them to words, DoLa on lm_head, fusion.

    candidates, text_bank: the texts and their embeddings `[C, width]` (`build_text_bank`); without any, there is no
    fusion. tau: the tower's temperature. miss: see `vision_prior`. Several images speak with their mean p_hat. Raises
    ValueError as the parts do. Source: plan 6, section 3.
    """
    prior = TowerPrior(switches, [candidates], [text_bank], tau, miss, norm) if candidates else None
    dola = dola_keywords(switches) | {"norm": norm}
    return _answer_one(
        mmgpt, vl_chat_processor, images, question, return_tokens, dola=dola, prior=prior, **generate_kwargs
    )


def dola_keywords(switches: DoLaSwitches) -> dict[str, Any]:
    """What the switches say of words, as keywords of `DoLaLogitsProcessor`."""
    return {
        "layer": switches.fixed_layer_llm,
        "alpha": switches.alpha_L,
        "gamma": switches.gamma_L,
        "use_dola": switches.use_dola_lm_static,
    }


# --- the command -----------------------------------------------------------------------------------------------------

MISSES = {"floor": None, "zero": 0.0, "forbid": -math.inf}
TRACED = 5
"""How many of the most probable tokens a trace tells of."""
COMPARE = (
    "several decodings: baseline, apc, dola, or key=value,... of layer, ratio, exit, alpha, gamma, norm, temperature, "
    "as in --compare baseline apc layer=6 exit=2,4,6 (default: one, by the other options)"
)


def build_parser() -> CommandParser:
    parser = CommandParser(
        description="Answer questions on images with Janus: the reference path, unless a DoLa option is given."
    )
    group = parser.add_argument_group("question")
    group.add_argument("--image", nargs="+", default=[], metavar="FILE", help="image file(s) (default: none)")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--question", metavar="TEXT", help="what to ask")
    add("--questions", metavar="FILE", help='[{"image", "question", "answer", "candidates", "domain"}, ...] as JSON')
    add = parser.add_argument_group("output").add_argument
    add("--outdir", default="outputs/answers", help="where answers.jsonl of --questions goes (default: %(default)s)")
    add("--overwrite", action="store_true", help="start anew where --outdir holds another run (default: refuse)")
    add("--max_new_tokens", type=positive, default=512, help="longest answer (default: %(default)s)")
    add("--batch_size", type=positive, default=16, help="questions decoded together (default: %(default)s)")
    add("--stream", action="store_true", help="print the answer to --question as it comes (default: when it is whole)")
    add("--trace", action="store_true", help="also tell what DoLa did at every token (default: no)")
    add("--compare", nargs="+", metavar="SPEC", help=COMPARE)
    add = parser.add_argument_group(
        "decoding, by transformers; sampling where one of the last three is given"
    ).add_argument
    add("--num_beams", type=positive, default=1, help="beams (default: %(default)s)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1, against repeats (default: %(default)s)")
    add("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    add("--temperature", type=float, help="sample at this temperature, above 0 (default: greedy)")
    add("--top_p", type=float, help="sample from the most probable tokens of this mass (default: greedy)")
    add("--top_k", type=positive, help="sample from so many tokens (default: greedy; 50 where one samples)")
    add_model_arguments(parser)
    add_dola_arguments(parser, "none, unless --config names one")
    add = parser.add_argument_group("with --config").add_argument
    add("--candidates", nargs="+", metavar="TEXT", help="what the images may show (default: no fusion)")
    add("--text_encoder", help="SiglipModel that embeds them: directory or hub id (default: siglip/ in --model)")
    add("--tau", type=float, help="the tower's temperature, above 0 (default: the text encoder's exp(-logit_scale))")
    add(
        "--miss",
        choices=MISSES,
        help="the prior of a word that begins no candidate: log(1e-12), 0, -inf (default: floor)",
    )
    return parser


def check_options(parser: CommandParser, args: argparse.Namespace) -> None:
    """Options that do not go together, and numbers out of range, end the command before anything is loaded."""
    if args.image and args.questions:
        parser.error("--image goes with --question; the entries of --questions name their own")
    if args.stream and (args.questions or args.compare or args.num_beams > 1):
        parser.error("--stream goes with --question, and with one decoding, without beams")
    if args.trace and args.num_beams > 1:
        parser.error("--trace follows one sequence: it goes without --num_beams")
    for option in ("domain", "candidates", "text_encoder", "tau", "miss"):
        if getattr(args, option) is not None and args.config is None:
            parser.error(f"--{option} needs --config")
    if args.candidates and args.question and not args.image:
        parser.error("--candidates need an --image to be ranked on")
    contrast = args.config or args.compare or names_contrast(args)
    for option, given in (("alpha", args.alpha is not None), ("no_norm", args.no_norm)):
        if given and not contrast:
            parser.error(f"--{option} needs --layer, --layer_ratio, --candidate_layers, --gamma or --apc_only")
    check_alpha(DEFAULT_ALPHA if args.alpha is None else args.alpha)
    check_gamma(1.0 if args.gamma is None else args.gamma)
    check_temperature(1.0 if args.temperature is None else args.temperature)
    check_number("tau", 1.0 if args.tau is None else args.tau, 1e-6, 1e6)
    check_number("top_p", 1.0 if args.top_p is None else args.top_p, 1e-6, 1.0)
    check_number("repetition_penalty", args.repetition_penalty, 1e-6, 1e6)


def names_contrast(args: argparse.Namespace) -> bool:
    return any(getattr(args, name) is not None for name in (*LAYER_KEYWORDS, "gamma"))


def read_variants(args: argparse.Namespace, switches: DoLaSwitches | None) -> dict[str, dict[str, Any]]:
    """Name -> how to decode: `dola`, keywords of `DoLaLogitsProcessor` or None, and what `generate` is told beside.

    Flags win over the switches. Raises ValueError for a bad spec.
    """
    usual = {"layer": None, "alpha": DEFAULT_ALPHA, "gamma": 1.0, "use_dola": True}
    usual |= {} if switches is None else dola_keywords(switches)
    if args.compare or names_contrast(args):
        usual["use_dola"] = True
    if any(getattr(args, name) is not None for name in LAYER_KEYWORDS):
        del usual["layer"]
    flags = {name: getattr(args, name) for name in (*LAYER_KEYWORDS, "alpha", "gamma")}
    usual |= {name: value for name, value in flags.items() if value is not None} | {"norm": not args.no_norm}
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    generate: dict[str, Any] = {"num_beams": args.num_beams, "repetition_penalty": args.repetition_penalty}
    generate |= {name: value for name, value in sampling.items() if value is not None}

    variants = {}
    for name, spec in parse_variants(
        args.compare or ["dola" if switches or names_contrast(args) else "baseline"]
    ).items():
        if spec.keys() & {"cfg_order", "cfg_weight"}:
            raise ValueError(f"variant {name!r}: answers are not guided")
        told = generate | ({"temperature": spec.pop("temperature")} if "temperature" in spec else {})
        told["do_sample"] = bool(told.keys() & sampling.keys())
        dola = None if spec.get("use_dola") is False else fill_variant(spec, usual)
        if dola:
            check_alpha(dola["alpha"])
            check_gamma(dola["gamma"])
        check_temperature(told.get("temperature", 1.0))
        variants[name] = {"dola": dola, "generate": told}
    return variants


class AnswerStreamer(TextStreamer):
    """Prints an answer as it comes, without the space it may begin with."""

    begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(text if self.begun else text.removeprefix(" "), stream_end)
        self.begun = self.begun or bool(text)


def format_trace(tokenizer, answer: Answer) -> Iterator[str]:
    """A line for each token of an answer: what it is, what DoLa did, and the most probable tokens before and after."""

    def top(name: str, t: int) -> str:
        pairs = zip(answer.trace[f"{name}_tokens"][t].tolist(), answer.trace[name][t].tolist(), strict=True)
        return ", ".join(f"{tokenizer.decode([token])!r} {p:.3f}" for token, p in pairs if p > 0)

    for t, token in enumerate(answer.tokens.tolist()):
        layer = f"layer {answer.trace['layer'][t]:2d}  " if "layer" in answer.trace else ""
        changed = "argmax changed" if answer.trace["argmax_changed"][t] else ""
        yield f"{t:4d}  {tokenizer.decode([token])!r}  {layer}jsd {answer.trace['jsd'][t]:.4f}  {changed}".rstrip()
        yield from (f"      {name:6} {top(name, t)}" for name in ("q_N", "q_j", "p_hat"))


class Asking:
    """The command's questions, and how they are answered: every variant, the switches of each domain, the tower."""

    def __init__(self, args: argparse.Namespace, questions: Sequence[Question]):
        from janus.dola.loading import load_pretrained_model  # here, so that the rest runs beside the original code too

        self.args, self.questions = args, questions
        self.switches = {
            domain: DoLaSwitches.from_json(args.config, domain) if args.config else None
            for domain in dict.fromkeys(question.domain for question in questions)
        }
        self.variants = {domain: read_variants(args, switches) for domain, switches in self.switches.items()}
        _, self.processor, self.model = load_pretrained_model(
            args.model, args.dtype, args.device, args.quantize, args.offload
        )
        for variant in (variant for variants in self.variants.values() for variant in variants.values()):
            DoLaLogitsProcessor(self.model.language_model, **(variant["dola"] or {}))
        self.tau, self.banks = 1.0, {}
        if lists := {question.candidates for question in questions if question.candidates}:
            tower = self.model.vision_model.vision_tower
            for switches in filter(None, self.switches.values()):
                check_layer(vision_layer(tower, switches), tower_depth(tower))
            siglip, tokenizer = find_text_encoder(args.model, args.text_encoder)
            self.tau = siglip_temperature(siglip) if args.tau is None else args.tau
            self.banks = {texts: build_text_bank(siglip, tokenizer, texts) for texts in lists}

    def settings(self) -> dict[str, Any]:
        """What a run is told by."""
        args = self.args
        named = {domain or "default": switches for domain, switches in self.switches.items() if switches}
        return run_settings(args, self.model) | {
            **{name: getattr(args, name) for name in ("max_new_tokens", "batch_size", "seed", "trace", "miss")},
            "tau": self.tau,
            "variants": {domain or "default": variants for domain, variants in self.variants.items()},
            "switches": {domain: asdict(switches) for domain, switches in named.items()},
        }

    def answer(self, batch: range, streamer: TextStreamer | None = None) -> dict[str, list[Answer]]:
        """Variant -> answers to a batch. Each draws with the seed of the batch, so that they share their noise."""
        asked = [self.questions[i] for i in batch]
        domain, args = asked[0].domain, self.args
        answers = {}
        for name, variant in self.variants[domain].items():
            prior, switches = None, self.switches[domain]
            if asked[0].candidates and switches and variant["dola"] is not None:
                banks = [self.banks[question.candidates] for question in asked]
                prior = TowerPrior(
                    switches,
                    [question.candidates for question in asked],
                    banks,
                    self.tau,
                    MISSES[args.miss or "floor"],
                    not args.no_norm,
                )
            torch.manual_seed(prompt_seed(args.seed, f"{batch.start}"))
            answers[name] = answer_batch(
                self.model,
                self.processor,
                [question.asked for question in asked],
                dola=variant["dola"],
                prior=prior,
                trace=TRACED if args.trace else 0,
                max_new_tokens=args.max_new_tokens,
                **variant["generate"] | ({"streamer": streamer} if streamer else {}),
            )
        return answers


def trace_file(index: int, variant: str) -> str:
    return f"{index:04d}_{variant}_trace.jsonl"


def is_trace_file(settings: Mapping[str, Any], inputs: Sequence[Any], name: str) -> bool:
    """Whether a run of such settings and inputs writes a file of such a name."""
    found, domains = re.fullmatch(r"(\d{4,})_(.+)_trace\.jsonl", name), settings.get("variants")
    if not found or not settings.get("trace") or not isinstance(domains, dict):
        return False
    known = any(isinstance(variants, dict) and found[2] in variants for variants in domains.values())
    return known and int(found[1]) < len(inputs)


def answer_line(index: int, question: Question, variant: str, text: str, traced: bool) -> dict[str, Any]:
    """What the log says of an answer."""
    line = {"index": index} | question.record | {"variant": variant, "answer": text.removeprefix(" ")}
    if question.expected is not None:
        line["right"] = is_right(text, question.expected)
    return line | ({"trace": trace_file(index, variant)} if traced else {})


def check_lines(log: RunLog, questions: Sequence[Question], names: Sequence[str], traced: bool) -> None:
    """Raises ValueError for a line that this run does not write."""
    for position, entry in enumerate(log.entries):
        index, row = divmod(position, len(names))
        line = index < len(questions) and answer_line(
            index, questions[index], names[row], f"{entry.get('answer')}", traced
        )
        if entry != line:
            raise ValueError(f"{log.path}: line {position + 1} is not a line of this run")


def answer_one(asking: Asking) -> None:
    """Print the answer to --question, one line for each variant where there are several, and its trace."""
    streamer = AnswerStreamer(asking.processor.tokenizer, skip_special_tokens=True) if asking.args.stream else None
    for name, (answer,) in asking.answer(range(1), streamer).items():
        text, named = answer.text.removeprefix(" "), f"{name}: " if asking.args.compare else ""
        if not streamer:
            print(f"{named}{text}")
        if asking.args.trace:
            print(*format_trace(asking.processor.tokenizer, answer), sep="\n")
        if not text.strip():
            note_no_answer(named or "the question: ")


def note_no_answer(what: str) -> None:
    print(f"note: {what}the model ended its answer before a word", file=sys.stderr)


def answer_all(asking: Asking) -> None:
    """Answer --questions into the log of --outdir, from where it stands."""
    args, questions = asking.args, asking.questions
    names = list(asking.variants[questions[0].domain])
    inputs = [question.record for question in questions]
    path = Path(args.outdir) / "answers.jsonl"
    with RunLog(path, asking.settings(), inputs, overwrite=args.overwrite, is_own=is_trace_file) as log:
        check_lines(log, questions, names, args.trace)
        done = len(log.entries) // len(names)
        with Progress(len(questions), done, "question") as progress:
            for batch in cut_batches(questions, args.batch_size):
                if batch.stop * len(names) <= len(log.entries):
                    continue
                try:
                    answers = asking.answer(batch)
                except ValueError as error:
                    where = f"entry {batch.start}" + f" to {batch.stop - 1}" * (len(batch) > 1)
                    raise ValueError(f"{args.questions}: {where}: {error}") from None
                lines = []
                for row, index in enumerate(batch):
                    for name in names:
                        text, tokens, trace = answers[name][row]
                        lines.append(answer_line(index, questions[index], name, text, args.trace))
                        if args.trace:
                            write_trace(log.directory / lines[-1]["trace"], tokens.cpu().numpy(), trace)
                log.add(batch.start * len(names), lines)
                progress.add(min(len(batch), batch.stop - done))
        print(f"{len(questions) - done} questions answered ({done} were done already): {log.path}")
        report(log.entries, names)


def report(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Print how many answers of each variant are right, are others than the first's, and are none."""
    for name in names:
        given = [entry for entry in entries if entry["variant"] == name]
        said = []
        if rights := [entry["right"] for entry in given if "right" in entry]:
            said.append(f"accuracy {sum(rights) / len(rights):.3f} ({sum(rights)} of {len(rights)})")
        if name != names[0]:
            others = sum(a["answer"] != b["answer"] for a, b in zip(given, entries[:: len(names)], strict=True))
            said.append(f"{others} answers are not those of {names[0]}")
        if said:
            print((f"{name}: " if len(names) > 1 else "") + ", ".join(said))
        if blank := sum(not entry["answer"].strip() for entry in given):
            note_no_answer(f"{name}, {blank} of {len(given)} questions: ")


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    check_options(parser, args)
    offered = tuple(args.candidates or ())
    if args.questions:
        questions = read_questions(args.questions, offered)
        for i, question in enumerate(questions):
            if question.domain and not args.config:
                parser.error(f"{args.questions}: entry {i}: a domain needs --config")
        questions = [replace(question, domain=question.domain or args.domain) for question in questions]
    else:
        questions = [Question(Path(), tuple(args.image), (args.question,), None, offered, args.domain)]
    asking = Asking(args, questions)
    if args.questions:
        answer_all(asking)
    else:
        answer_one(asking)


if __name__ == "__main__":
    run_command(main)
