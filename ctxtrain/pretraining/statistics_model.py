"""The model that pre-training trains: a Qwen3 with linear heads that predict statistics of windows.

Input: token ids, padded on the right. Output: predictions at the last token of every bar and at the last token of the
text; after training, the Qwen3 without heads. A token embedding is the sum of the embeddings of the numbers in the
token, so that 17,000 tokens share the embeddings of a hundred levels. `to_qwen` writes these sums into the ordinary
embedding table of Qwen3.

Legend: B windows, T tokens, D width, X bars of all windows, P and E statistics at a bar and at the event.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from ctxtrain.model.embedded import PARTS, is_close_token, token_parts

PART_SPREAD = 0.3  # initial standard deviation of a part's embedding


class StatisticsModel(nn.Module):
    """Qwen3 with a table of token parts as its embedding, a linear head for bars and one for the event."""

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
        """Predictions at bars, of shape (X, P) in the order of the text, and at the event, of shape (B, E).

        Attention is causal and padding is on the right, so no token attends to padding and no mask is needed.
        """
        states_BTD = self.qwen(inputs_embeds=self.table(self.parts[ids_BT]).sum(dim=2)).last_hidden_state
        bar_states_XD = states_BTD[self.is_close[ids_BT]]
        event_states_BD = states_BTD[torch.arange(len(ids_BT)), lengths_B - 1]
        return self.bar_head(bar_states_XD), self.event_head(event_states_BD)

    def layer_matrices(self) -> list[nn.Parameter]:
        """The matrices of the layers, which Muon trains."""
        return [weight for weight in self.qwen.layers.parameters() if weight.ndim == 2]

    def other_parameters(self) -> list[nn.Parameter]:
        """All other trained weights: parts, norms and heads."""
        excluded = {id(weight) for weight in [*self.layer_matrices(), self.qwen.embed_tokens.weight]}
        return [weight for weight in self.parameters() if id(weight) not in excluded]

    @torch.no_grad()
    def to_qwen(self) -> Qwen3ForCausalLM:
        """The trained Qwen3 with an ordinary table of token embeddings."""
        model = Qwen3ForCausalLM(self.qwen.config)
        model.model.load_state_dict(self.qwen.state_dict())
        model.model.embed_tokens.weight.copy_(self.table(self.parts).sum(dim=1))
        return model


@torch.no_grad()
def _initialise_layers(qwen: Qwen3Model) -> None:
    """Initialise matrices with standard deviation 1/√inputs, which suits narrow models.

    Projections into the residual stream start smaller by 1/√(2·layers), as in GPT-2 (Radford et al. 2019).
    """
    for name, weight in qwen.layers.named_parameters():
        if weight.ndim == 2:
            spread = weight.shape[1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                spread /= math.sqrt(2 * qwen.config.num_hidden_layers)
            weight.normal_(0, spread)


@torch.no_grad()
def _initialise_parts(table: Tensor) -> None:
    """Initialise numbers as random mixtures of waves, so that similar values have similar embeddings from the start."""
    table.normal_(0, PART_SPREAD)
    first = 0
    for count in PARTS.values():
        position = torch.arange(count)[:, None] / count
        octaves = range(7 if count > 20 else 3)
        waves = [wave(math.pi * position * 2.0**octave) for octave in octaves for wave in (torch.sin, torch.cos)]
        shapes = torch.cat([2 * position - 1, *waves], dim=1)
        mixture = torch.randn(shapes.shape[1], table.shape[1]) * PART_SPREAD / math.sqrt(shapes.shape[1] / 2)
        table[first : first + count] = shapes @ mixture
        first += count
    table[first] = 0  # unused columns of `token_parts` point here
