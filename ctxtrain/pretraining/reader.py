"""A Qwen3 that reads statistics: what the embedded base is while it is pre-trained.

Comes in: token ids, padded on the right. Goes out: guesses at the last token of every bar and at the last token of
the text; and, at the end, the plain Qwen inside. Token embeddings are sums of the embeddings of their numbers, so that
17,000 tokens share what is learnt about a hundred levels; `plain` writes the sums out as Qwen's ordinary table.

Legend: B windows, T tokens, D width, X bars of all windows, P and E statistics at a bar and at the event.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from ctxtrain.model.embedded import PARTS, is_close_token, token_parts

PART_SPREAD = 0.3  # standard deviation of a part's embedding at the start


class Reader(nn.Module):
    """Qwen3 without its table, a table of parts, and a linear head for bars and one for events."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, config: Qwen3Config, bar_statistics: int, event_statistics: int
    ) -> None:
        super().__init__()
        parts, size = token_parts(tokenizer)
        self.parts = torch.from_numpy(parts)
        self.is_close = torch.from_numpy(is_close_token(tokenizer))
        self.qwen = Qwen3Model(config)
        self.table = nn.Embedding(size, config.hidden_size)
        self.bar_head = nn.Linear(config.hidden_size, bar_statistics)
        self.event_head = nn.Linear(config.hidden_size, event_statistics)
        _initialise_layers(self.qwen)
        _initialise_parts(self.table.weight)

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Guesses of shape (X, P), bars in the order of the text, and (B, E).

        Attention is causal and pad stands on the right, so no real token sees it and no mask is needed.
        """
        states_BTD = self.qwen(inputs_embeds=self.table(self.parts[ids_BT]).sum(dim=2)).last_hidden_state
        at_bars = states_BTD[self.is_close[ids_BT]]
        at_end = states_BTD[torch.arange(len(ids_BT)), lengths_B - 1]
        return self.bar_head(at_bars), self.event_head(at_end)

    def matrices(self) -> list[nn.Parameter]:
        """The matrices inside the layers."""
        return [weight for weight in self.qwen.layers.parameters() if weight.ndim == 2]

    def others(self) -> list[nn.Parameter]:
        """All other weights that are trained: parts, norms and heads."""
        apart = {id(weight) for weight in [*self.matrices(), self.qwen.embed_tokens.weight]}
        return [weight for weight in self.parameters() if id(weight) not in apart]

    @torch.no_grad()
    def plain(self) -> Qwen3ForCausalLM:
        """The Qwen3 that this is, with an ordinary table of token embeddings."""
        model = Qwen3ForCausalLM(self.qwen.config)
        model.model.load_state_dict(self.qwen.state_dict())
        model.model.embed_tokens.weight.copy_(self.table(self.parts).sum(dim=1))
        return model


@torch.no_grad()
def _initialise_layers(qwen: Qwen3Model) -> None:
    """Spread 1/√inputs, which suits narrow models.

    What is added to the residual stream starts smaller, by 1/√(2·layers), as in GPT-2 (Radford et al. 2019).
    """
    for name, weight in qwen.layers.named_parameters():
        if weight.ndim == 2:
            spread = weight.shape[1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                spread /= math.sqrt(2 * qwen.config.num_hidden_layers)
            weight.normal_(0, spread)


@torch.no_grad()
def _initialise_parts(table: Tensor) -> None:
    """Numbers start as random mixtures of waves, so that like values are alike from the first step."""
    table.normal_(0, PART_SPREAD)
    first = 0
    for count in PARTS.values():
        place = torch.arange(count)[:, None] / count
        octaves = range(7 if count > 20 else 3)
        waves = [wave(math.pi * place * 2.0**octave) for octave in octaves for wave in (torch.sin, torch.cos)]
        shapes = torch.cat([2 * place - 1, *waves], dim=1)
        mixture = torch.randn(shapes.shape[1], table.shape[1]) * PART_SPREAD / math.sqrt(shapes.shape[1] / 2)
        table[first : first + count] = shapes @ mixture
        first += count
    table[first] = 0  # the part that adds nothing
