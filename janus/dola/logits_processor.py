"""DoLa as one more rule of transformers' `generate`, for any decoder-only model with a final norm and an lm_head."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from dola_runtime import (
    DEFAULT_ALPHA,
    DEFAULT_LAYER_RATIO,
    check_alpha,
    check_gamma,
    compute_logprobs_from_hidden,
    contrast_layers,
    pick_contrast_layers,
    trace_step,
)
from janus.dola.decoder_parts import find_decoder_parts


class DoLaLogitsProcessor(LogitsProcessor):
    """Replace a step's scores by DoLa's `log p_hat`: last layer against an earlier one, on the plausible tokens.

    It is its own context manager: entering attaches a forward hook to the contrast layer(s), leaving removes it,
    whatever happened in between. One context serves any number of `generate` calls:

        with DoLaLogitsProcessor(model, layer=24) as dola:
            model.generate(**inputs, max_new_tokens=64, logits_processor=[dola])

    transformers runs it after its own penalties and constraints and before temperature, top-k and top-p, so
    `log q_N` is what the penalties left, the plausible set too, and the warpers see `p_hat`. Scores are normalised, so
    that beams add up log-probabilities; a token outside the plausible set has -inf. The hook keeps the last position
    of the forward pass that made the scores, row for row, so beams and left-padded batches need nothing more. The
    model itself has put the last layer through lm_head when the processor is called; the contrast layers, all in one
    matmul, go through it once more. `generate` does not compile its decoding step inside the context, where a
    compiled graph would miss the hooks or keep them.

    Args:
        model: what `generate` is called on (`mmgpt.language_model` of Janus).
        layer: contrast layer as `hidden_states` counts, in 1..N; N is the bypass. Default: `layer_ratio` of the depth.
        candidate_layers: early exit instead of a fixed layer: per row and step the candidate furthest from layer N.
        alpha: plausibility, in [0, 1].
        gamma: the contrast's weight; 1 is DoLa, 0 leaves the mask alone and reads no layer.
        norm: read the contrast layer through LN_out; False reads it as it is, as the DoLa paper's code does.
        use_dola: False leaves every score as it is.

    Raises ValueError for arguments out of range, and RuntimeError in a step whose scores no hook belongs to: outside
    the context, on another model, or where `generate` runs the model more than once for a step (`guidance_scale`,
    assisted decoding).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layer: int | None = None,
        layer_ratio: float = DEFAULT_LAYER_RATIO,
        candidate_layers: Sequence[int] | None = None,
        alpha: float = DEFAULT_ALPHA,
        gamma: float = 1.0,
        norm: bool = True,
        use_dola: bool = True,
    ):
        parts = find_decoder_parts(model)
        check_alpha(alpha)
        check_gamma(gamma)
        layers = pick_contrast_layers(len(parts.layers), layer, layer_ratio, candidate_layers)
        self.on = use_dola and (bool(layers) or gamma == 0)
        self.layers: tuple[int, ...] = layers if self.on and gamma != 0 else ()
        self.model = model
        self.blocks, self.phi = parts.layers, parts.phi
        self.ln_out = parts.ln_out if norm else None
        self.alpha, self.gamma = alpha, gamma
        self._hooks = []
        self._states: dict[int, Tensor] = {}
        self._passes = 0
        self._length = -1
        self.step: tuple[Tensor, Tensor, Tensor | None] | None = None
        """Of the last step, up to a constant per row: log q_N, what it was contrasted with, and early exit's choice."""

    def __enter__(self) -> "DoLaLogitsProcessor":
        if self.layers:
            self._disable_compile = getattr(self.model.generation_config, "disable_compile", False)  # new in 4.49
            self.model.generation_config.disable_compile = True
        for layer in self.layers:
            self._hooks.append(self.blocks[layer - 1].register_forward_hook(self._keep_last_position(layer)))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._states.clear()
        self.step = None
        if self.layers:
            self.model.generation_config.disable_compile = self._disable_compile

    def _keep_last_position(self, layer: int) -> Callable:
        def hook(_module, _args, output):
            h = output[0] if isinstance(output, tuple) else output
            self._states[layer] = h[:, -1].clone()
            self._passes += layer == self.layers[0]

        return hook

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[rows, vocab]` of the last layer to `log p_hat`, same shape, dtype and device."""
        if not self.on:
            self.step = scores, scores, None
            return scores
        log_qN = torch.log_softmax(scores.float(), dim=-1)
        log_qj = self._read_layers(input_ids, scores) if self.layers else log_qN[:0, None]
        F, chosen, choice = contrast_layers(log_qN, log_qj, self.alpha, self.gamma)
        self.step = log_qN, chosen, choice
        return torch.log_softmax(F, dim=-1).to(scores)

    def _read_layers(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """log q_j of the states that the hooks kept, `[layers, rows, vocab]`."""
        h_j = [self._states.pop(layer).to(scores.device) for layer in self.layers if layer in self._states]
        passes, self._passes = self._passes, 0
        length, self._length = self._length, input_ids.shape[1]
        if len(h_j) < len(self.layers) or len(h_j[0]) != len(scores) or (passes > 1 and self._length == length + 1):
            raise RuntimeError(
                "DoLa needs the one forward pass that made these scores: call generate on the processor's own model, "
                "inside its context (`with DoLaLogitsProcessor(model) as dola`), without guidance_scale or an assistant"
            )
        return compute_logprobs_from_hidden(torch.stack(h_j), self.ln_out, self.phi)


class TraceLogitsProcessor(LogitsProcessor):
    """Keep what every step did; last in the list, behind a DoLa processor and what follows it (fusion).

    Of each row: what `trace_step` tells of q_N (what transformers' penalties left), of q_j (q_N where nothing is
    contrasted) and of p_hat (what comes in here, before temperature and warpers); `argmax_changed`, whether p_hat's
    argmax is another than q_N's; and `layer`, the one contrasted with. Scores stay as they are.

    Args:
        dola: the DoLa processor of the same list.
        top_k: how many of the most probable tokens to tell of.
    """

    def __init__(self, dola: DoLaLogitsProcessor, top_k: int = 5):
        self.dola, self.top_k = dola, top_k
        self.steps: list[dict[str, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert self.dola.step is not None
        log_qN, log_qj, choice = self.dola.step
        p_hat = scores.float().softmax(-1)
        told = trace_step(log_qN, log_qj, p_hat, self.top_k)
        told["argmax_changed"] = p_hat.argmax(-1) != log_qN.argmax(-1)
        if layers := self.dola.layers:
            told["layer"] = torch.tensor(layers, device=scores.device)[
                torch.zeros_like(told["argmax_changed"], dtype=torch.long) if choice is None else choice
            ]
        self.steps.append({name: value.cpu() for name, value in told.items()})
        return scores

    def trace_of(self, row: int, length: int) -> dict[str, np.ndarray]:
        """The first steps of a row: arrays `[length, ...]` by name."""
        return {name: torch.stack([step[name][row] for step in self.steps[:length]]).numpy() for name in self.steps[0]}
