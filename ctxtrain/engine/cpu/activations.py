"""Bytes of activations in a step of the fast engine, computed from shapes; dense Qwen2 and Qwen3 only.

Input and output as in `engine/activations.py`. It follows `training_model.py`, `layer_parts.py` and `attention.py` (on
a GPU `device_attention.py`) line by line. `tests/engine/test_activations.py` counts the bytes.

Legend of comments: N rows with their few rows of padding, D model width, E width of all queries, K of all keys, F inner
width of the MLP, H heads, T tokens of the longest window.
"""

from __future__ import annotations

from ctxtrain.engine.activations import ATTENTION_INPUTS, MLP_INPUTS, Activations
from ctxtrain.engine.cpu.attention import MAX_SAVED_TOKENS, MAX_SCORES, QUERY_BLOCK, query_blocks
from ctxtrain.engine.cpu.layer_parts import HAS_ONEDNN, LARGE_NUMEL, MKL_IS_WIDE
from ctxtrain.engine.cpu.training_model import padded_count
from ctxtrain.model.shape import Batch, LoraShape, ModelShape, Precision

PLACE_BYTES = 4 * 8 + 2  # of a token on a GPU: four indices, and whether its place is padding, twice
KEYS_AND_VALUES = frozenset(("k_proj", "v_proj"))


def training_activations(
    shape: ModelShape, lora: LoraShape, precision: Precision, batch: Batch, *, checkpointing: bool
) -> Activations:
    """Activations of a micro-batch; the last layer computes little more than keys and values, and keeps them."""
    sizes = _Sizes(shape, lora, precision, batch, checkpointing=checkpointing)
    first = min(lora.first_layer(shape), shape.layers - 1)
    layers = [sizes.layer_bytes(layer, has_grad=layer > first) for layer in range(first, shape.layers - 1)]
    last = sizes.last_layer_bytes(has_grad=bool(layers)) + sizes.pooled_bytes() + sizes.layout_bytes()
    if checkpointing:
        states = sizes.rows * shape.width * precision.bytes
        return Activations(last + len(layers) * states, max(layers, default=0) + sizes.working_bytes())
    return Activations(last + sum(layers), sizes.working_bytes())


def evaluation_activations(shape: ModelShape, precision: Precision, batch: Batch) -> Activations:
    """Activations of a batch without gradients: of the MLP, or of attention in float32."""
    states = shape.width * (3 * precision.bytes + 4)
    mlp = 2 * shape.inner_width * precision.bytes
    attention = 2 * 4 * (2 * shape.query_width + 2 * shape.kv_width)
    return Activations(0, padded_count(batch.tokens) * (states + max(mlp, attention)) + _score_bytes(shape, batch))


def weight_copies(shape: ModelShape, precision: Precision) -> int:
    """Copies of the weights of queries and keys, whose rows the engine puts into another order on a CPU."""
    if precision.device != "cpu":
        return 0
    return shape.layers * (shape.query_width + shape.kv_width) * shape.width * precision.bytes


def _score_bytes(shape: ModelShape, batch: Batch) -> int:
    """Attention scores that are computed together, and the weights made of them."""
    return 2 * 4 * min(MAX_SCORES, batch.tokens * shape.heads * min(batch.longest, QUERY_BLOCK))


class _Sizes:
    """Bytes of the parts of a layer, for one batch."""

    def __init__(
        self, shape: ModelShape, lora: LoraShape, precision: Precision, batch: Batch, *, checkpointing: bool
    ) -> None:
        self.shape, self.lora, self.precision, self.batch = shape, lora, precision, batch
        self.on_cpu = precision.device == "cpu"
        self.rows = padded_count(batch.tokens) if self.on_cpu else batch.tokens
        self.is_large = self.rows * shape.width > LARGE_NUMEL
        self.recomputes = self.is_large and not checkpointing

    def layer_bytes(self, layer: int, *, has_grad: bool) -> int:
        shape, names = self.shape, self.lora.adapted(self.shape, layer)
        kept = self._norm_bytes(shape.width, 1) if has_grad else 0
        if not has_grad and self.recomputes and names & set(ATTENTION_INPUTS):
            kept += self.rows * shape.width * self.precision.bytes  # of the function that computes the norm anew
        kept += self._adapter_bytes(shape.width, names & set(ATTENTION_INPUTS), recomputes=self.recomputes)
        if has_grad := has_grad or bool(names & set(ATTENTION_INPUTS)):  # one node has the gradients of all three
            kept += self._norm_bytes(shape.query_width, shape.heads) * shape.has_head_norms
            kept += self._norm_bytes(shape.kv_width, shape.kv_heads) * shape.has_head_norms
            kept += self._attention_bytes()
        kept += self._adapter_bytes(shape.query_width, names & {"o_proj"}, recomputes=False)
        if has_grad := has_grad or "o_proj" in names:
            kept += self._norm_bytes(shape.width, 1)
        return kept + self._mlp_bytes(names, has_grad=has_grad)

    def last_layer_bytes(self, *, has_grad: bool) -> int:
        """Norm, keys and values of all tokens; `pooled_bytes` are the rest."""
        shape, names = self.shape, self.lora.adapted(self.shape, self.shape.layers - 1)
        kept = self._norm_bytes(shape.width, 1) if has_grad else 0
        kept += self._adapter_bytes(shape.width, names & KEYS_AND_VALUES, recomputes=False)
        if shape.has_head_norms and (has_grad or names & KEYS_AND_VALUES):
            kept += self._norm_bytes(shape.kv_width, shape.kv_heads)
        if has_grad or names & set(ATTENTION_INPUTS):
            kept += self.batch.tokens * 4 * (2 * shape.kv_width + shape.heads)
        return kept

    def layout_bytes(self) -> int:
        """Rotations of each position, on a GPU of each token, with the places of the tokens in padded blocks."""
        if self.on_cpu:
            return self.batch.longest * self.shape.head_width * 4
        return self.batch.tokens * (self.shape.head_width * 4 + PLACE_BYTES)

    def pooled_bytes(self) -> int:
        """About what the last layer keeps of the pooled tokens: states, queries, attended values, gate and up."""
        shape, windows = self.shape, max(1, self.batch.tokens // self.batch.longest)
        numbers = windows * (4 * shape.width + 4 * shape.query_width + 2 * shape.inner_width)
        kept = self.precision.bytes * numbers
        widths = {"o_proj": shape.query_width, "down_proj": shape.inner_width}
        names = self.lora.adapted(shape, shape.layers - 1) - KEYS_AND_VALUES
        return kept + sum(self._factor_bytes(widths.get(name, shape.width), frozenset({name})) for name in names)

    def working_bytes(self) -> int:
        """Gradients in the MLP of one layer: of its product, and of the states twice; or of attention, in float32."""
        shape = self.shape
        mlp = shape.inner_width * self.precision.bytes + 3 * shape.width * 4
        attention = 4 * 2 * (2 * shape.query_width + 2 * shape.kv_width)
        return self.rows * max(mlp, attention) + _score_bytes(shape, self.batch)

    def _norm_bytes(self, width: int, per_row: int) -> int:
        """The input, and the float32 inverse root mean square of each of `per_row` vectors."""
        return self.rows * (width * self.precision.bytes + 4 * per_row)

    def _adapter_bytes(self, width: int, names: frozenset[str], *, recomputes: bool) -> int:
        """Adapters of one input: dropout(x) unless it is computed anew, the mask unless it is large, and x·Aᵀ."""
        if not names:
            return 0
        dropped = 0 if recomputes else width
        mask = width if self.lora.dropout and self.rows * width <= LARGE_NUMEL else 0
        kept = self.rows * (dropped + mask + len(names) * self.lora.r)
        return self.precision.bytes * kept + self._factor_bytes(width, names)

    def _factor_bytes(self, width: int, names: frozenset[str]) -> int:
        """A of all adapters of one input, stacked, and copies of B.

        In bfloat16 each B is converted. In float32 a CPU has copies of those of queries and keys, whose rows it puts
        into another order.
        """
        shape, copied = self.shape, names
        if self.precision.dtype == "float32":
            copied = names & {"q_proj", "k_proj"} if self.on_cpu else frozenset()
        outputs = {"q_proj": shape.query_width, "k_proj": shape.kv_width, "v_proj": shape.kv_width}
        outputs |= dict.fromkeys(MLP_INPUTS, shape.inner_width)
        numbers = len(names) * width + sum(outputs.get(name, shape.width) for name in copied)
        return self.precision.bytes * self.lora.r * numbers

    def _attention_bytes(self) -> int:
        """On a CPU, q, k and v in float32, and attention weights of short windows; on a GPU, as the reference engine.

        In float32 a GPU's kernel reads keys and values that are repeated for each head of queries.
        """
        shape, batch = self.shape, self.batch
        if not self.on_cpu:
            keys = shape.kv_width if self.precision.dtype == "bfloat16" else shape.query_width
            return batch.tokens * (2 * (shape.query_width + keys) * self.precision.bytes + 4 * shape.heads)
        kept = 4 * batch.tokens * (shape.query_width + 2 * shape.kv_width)
        if batch.longest <= MAX_SAVED_TOKENS:
            scores = sum((stop - start) * stop for start, stop in query_blocks(batch.longest))
            kept += 4 * batch.tokens * shape.heads * scores // batch.longest
        return kept

    def _mlp_bytes(self, names: frozenset[str], *, has_grad: bool) -> int:
        shape, inner = self.shape, self.rows * self.shape.inner_width * self.precision.bytes
        if not names & {*MLP_INPUTS, "down_proj"}:
            in_pool = (
                self.on_cpu and self.is_large and self.precision.dtype == "float32" and (MKL_IS_WIDE or not HAS_ONEDNN)
            )
            return has_grad * inner * (1 if self.recomputes and self.on_cpu and not in_pool else 2)
        kept = self._adapter_bytes(shape.width, names & set(MLP_INPUTS), recomputes=self.recomputes)
        kept += 2 * inner if has_grad or names & set(MLP_INPUTS) else 0
        return kept + self._adapter_bytes(shape.inner_width, names & {"down_proj"}, recomputes=False)
