"""Forward pass of a narrow merged dense Qwen2 or Qwen3 classifier on a CPU with ONNX Runtime, for prediction only.

Input: a model without adapters, in float32, that `unsupported_reason` accepts. Output: a module around it that computes
the same logits faster.

The operators of a narrow model are so short that the Python code between them costs as much as they do. ONNX Runtime
runs a graph of operators in one call, on the calling thread, without the interpreter's lock, and its products read
weights that it packed once. The graph also skips arithmetic: the scores above attention's diagonal; the weights of
norms, which are multiplied into the layers after them; and in the last layer all but the pooled token of each window.

Legend: B windows, T tokens of the longest, V vocabulary, D model width, E, F input and output width of a linear layer,
H query heads, K key-value heads, G = H/K query heads that share keys and values, P width of a head, C = P/2 pairs of
its numbers that are rotated together, S keys up to the last query of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ctxtrain.engine.cpu.attention import LANES
from ctxtrain.engine.cpu.rope_tables import MAX_GRAPH_TOKENS, rope_table
from ctxtrain.engine.reference import window_lengths

OPSET, IR_VERSION = 23, 11  # the first opset with operators for RMS norm and rotary embeddings
BLOCKS = 5  # blocks of queries; each reads all keys up to its last query
LARGEST_TABLE = 1 << 24  # elements; the first layer of a larger vocabulary is computed per text instead of per token

Floats = NDArray[np.float32]


class OnnxClassifier(nn.Module):
    """A merged model that `unsupported_reason` accepts, with the weights that it has at construction.

    The session reads the memory of `weights` and does not keep it alive, so this object holds it.
    """

    def __init__(
        self, model: PreTrainedModel, session: onnxruntime.InferenceSession, weights: Mapping[str, Floats]
    ) -> None:
        super().__init__()
        self.model = model
        self.session = session
        self.weights = weights

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> OnnxClassifier:
        builder, options = GraphBuilder(model), onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        opsets = [helper.make_opsetid("", OPSET)]
        proto = helper.make_model(builder.build(), opset_imports=opsets, ir_version=IR_VERSION)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight) for weight in builder.weights.values()]
        options.add_external_initializers(list(builder.weights), values)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return cls(model, session, builder.weights)

    def forward(self, input_ids: Tensor) -> SequenceClassifierOutputWithPast:
        """Logits of shape (B, 3) for ids of shape (B, T), padded on the right; T is at most `MAX_GRAPH_TOKENS`."""
        config: Any = self.model.config
        last_B = window_lengths(input_ids, config.pad_token_id) - 1
        tokens = int(last_B.max()) + 1
        feeds = {
            "ids_BT": input_ids[:, :tokens].numpy(),
            "positions_BT": np.tile(np.arange(tokens), (len(input_ids), 1)),
            "last_B1": last_B[:, None].numpy(),
        }
        shared = config.num_attention_heads // config.num_key_value_heads
        (logits_BC,) = self.session.run(None, feeds | query_block_feeds(tokens, shared))
        return SequenceClassifierOutputWithPast(logits=torch.from_numpy(logits_BC))


def query_block_feeds(tokens: int, shared: int) -> dict[str, NDArray[Any]]:
    """For each block of queries: the end of its rows, the end of its keys, and its causal mask (-inf for later keys).

    A query has `shared` rows, one for each head that reads the same keys. Short texts leave the last blocks empty.
    """
    stops = [min(tokens, -(-tokens * number // (BLOCKS * LANES)) * LANES) for number in range(BLOCKS + 1)]
    feeds: dict[str, NDArray[Any]] = {}
    for number, (start, stop) in enumerate(pairwise(stops)):
        query_M1 = np.arange(start, stop).repeat(shared)[:, None]
        feeds[f"rows_{number}"] = np.array([stop * shared])
        feeds[f"keys_{number}"] = np.array([stop])
        feeds[f"mask_{number}"] = np.where(np.arange(stop) > query_M1, -np.inf, 0).astype(np.float32)
    return feeds


class GraphBuilder:
    """Builds the ONNX graph of a model's forward pass. A method adds nodes and returns the name of their output."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.layers = list(model.model.layers)
        self.query_heads, self.kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.shared, self.head_dim = self.query_heads // self.kv_heads, self.layers[0].self_attn.head_dim
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.weights: dict[str, Floats] = {}
        rope_TC = rope_table(model.model.rotary_emb, MAX_GRAPH_TOKENS)
        self.rope = [self.float_constant(rope_TC.real.contiguous()), self.float_constant(rope_TC.imag.contiguous())]

    @torch.no_grad()
    def build(self) -> GraphProto:
        """Build the graph. Inputs: `ids_BT`, `positions_BT`, last positions `last_B1`, `query_block_feeds`."""
        *layers, last = self.layers
        table_VD = self.model.model.embed_tokens.weight
        states_BTD = self.gather(table_VD)
        for number, layer in enumerate(layers):
            if number == 0 and len(table_VD) * (self.query_heads + 2 * self.kv_heads) * self.head_dim <= LARGEST_TABLE:
                heads = self.vocabulary_heads(layer)
            else:
                heads = self.heads(self.normalize(states_BTD, layer.input_layernorm), layer, "q", "k", "v")
            states_BTD = self.finish_layer(states_BTD, self.attention(*heads), layer)
        pooled_BD = self.last_layer(states_BTD, last)
        norm = self.model.model.norm
        logits_BC = self.linear(self.normalize(pooled_BD, norm), self.model.score, norm)
        inputs: dict[str, tuple[int, list[str | int]]] = {
            "ids_BT": (TensorProto.INT64, ["B", "T"]),
            "positions_BT": (TensorProto.INT64, ["B", "T"]),
            "last_B1": (TensorProto.INT64, ["B", 1]),
        }
        for number in range(BLOCKS):
            inputs[f"rows_{number}"] = inputs[f"keys_{number}"] = (TensorProto.INT64, [1])
            inputs[f"mask_{number}"] = (TensorProto.FLOAT, [f"M{number}", f"S{number}"])
        return helper.make_graph(
            self.nodes,
            "classifier",
            [helper.make_tensor_value_info(name, *type_and_shape) for name, type_and_shape in inputs.items()],
            [helper.make_tensor_value_info(logits_BC, TensorProto.FLOAT, ["B", self.config.num_labels])],
            self.constants,
        )

    def vocabulary_heads(self, layer: Any) -> list[str]:
        """Queries, keys and values of the first layer, looked up in tables, since they depend on the token only."""
        attn, normed_VD = layer.self_attn, layer.input_layernorm(self.model.model.embed_tokens.weight)
        heads = []
        for name in ("q", "k", "v"):
            x_VHP = getattr(attn, f"{name}_proj")(normed_VD).unflatten(1, (-1, self.head_dim))
            x_VHP = getattr(attn, f"{name}_norm", nn.Identity())(x_VHP)
            heads.append(self.gather(x_VHP.flatten(1)))
        return heads

    def heads(self, x_BTD: str, layer: Any, *names: str) -> list[str]:
        """Queries, keys or values, of shape (B, T, H·P or K·P), not rotated yet; normalised if the family does so."""
        attn, heads = layer.self_attn, []
        for name in names:
            x_BTE = self.linear(x_BTD, getattr(attn, f"{name}_proj"), layer.input_layernorm)
            if norm := getattr(attn, f"{name}_norm", None):
                x_BTHP = self.normalize(self.reshape(x_BTE, 0, 0, -1, self.head_dim), norm, weighted=True)
                x_BTE = self.reshape(x_BTHP, 0, 0, -1)
            heads.append(x_BTE)
        return heads

    def attention(self, q_BTE: str, k_BTE: str, v_BTE: str) -> str:
        """Causal attention of each token, of shape (B, T, H·P)."""
        q_BTE, k_BTE = self.apply_rope(q_BTE, self.query_heads), self.apply_rope(k_BTE, self.kv_heads)
        q_BKTE = self.transpose(self.reshape(q_BTE, 0, 0, self.kv_heads, -1), 0, 2, 1, 3)
        q_BKMP = self.reshape(q_BKTE, 0, 0, -1, self.head_dim)  # M = T·G
        k_BKPT = self.transpose(self.reshape(k_BTE, 0, 0, self.kv_heads, -1), 0, 2, 3, 1)
        v_BKTP = self.transpose(self.reshape(v_BTE, 0, 0, self.kv_heads, -1), 0, 2, 1, 3)
        start, zero, outputs = self.int_constant(0), self.int_constant(0), []
        for number in range(BLOCKS):
            rows, keys = f"rows_{number}", f"keys_{number}"
            block_BKMP = self.add_node("Slice", q_BKMP, start, rows, self.int_constant(2))
            keys_BKPS = self.add_node("Slice", k_BKPT, zero, keys, self.int_constant(3))
            masked_BKMS = self.add_node("Add", self.scores(block_BKMP, keys_BKPS), f"mask_{number}")
            weights_BKMS = self.add_node("Softmax", masked_BKMS, axis=-1)
            values_BKSP = self.add_node("Slice", v_BKTP, zero, keys, self.int_constant(2))
            outputs.append(self.add_node("MatMul", weights_BKMS, values_BKSP))
            start = rows
        attended_BKMP = self.add_node("Concat", *outputs, axis=2)
        attended_BKTE = self.reshape(attended_BKMP, 0, 0, -1, self.shared * self.head_dim)
        return self.reshape(self.transpose(attended_BKTE, 0, 2, 1, 3), 0, 0, -1)

    def scores(self, q_BKMP: str, k_BKPS: str) -> str:
        """Scaled attention scores, of shape (B, K, M, S)."""
        scale = self.float_constant(self.layers[0].self_attn.scaling)
        return self.add_node("Mul", self.add_node("MatMul", q_BKMP, k_BKPS), scale)

    def last_layer(self, states_BTD: str, layer: Any) -> str:
        """Output of the last layer at the pooled token of each window, of shape (B, D).

        The attention weights apply to the layer's input before the value projection, which gives the same result with
        one row per window to project.
        """
        attn, norm = layer.self_attn, layer.input_layernorm
        x_BTD = self.normalize(states_BTD, norm)
        x_BD = self.add_node("GatherND", x_BTD, "last_B1", batch_dims=1)
        x_B1D = self.add_node("Unsqueeze", x_BD, self.int_constant(1))
        (q_B1E,), (k_BTE,) = self.heads(x_B1D, layer, "q"), self.heads(x_BTD, layer, "k")
        q_B1E, k_BTE = self.apply_rope(q_B1E, self.query_heads, "last_B1"), self.apply_rope(k_BTE, self.kv_heads)
        q_BKGP = self.reshape(q_B1E, 0, self.kv_heads, self.shared, self.head_dim)
        k_BKPT = self.transpose(self.reshape(k_BTE, 0, 0, self.kv_heads, -1), 0, 2, 3, 1)
        is_padding_BT = self.add_node("Greater", "positions_BT", "last_B1")
        is_padding_B11T = self.add_node("Unsqueeze", is_padding_BT, self.int_constant(1, 2))
        minus_infinity = self.float_constant(-np.inf)
        scores_BKGT = self.add_node("Where", is_padding_B11T, minus_infinity, self.scores(q_BKGP, k_BKPT))
        weights_BHT = self.reshape(self.add_node("Softmax", scores_BKGT, axis=-1), 0, self.query_heads, -1)
        mean_BKGD = self.reshape(self.add_node("MatMul", weights_BHT, x_BTD), 0, self.kv_heads, self.shared, -1)
        value_KDP = (attn.v_proj.weight * norm.weight).unflatten(0, (self.kv_heads, -1)).mT
        attended_BKGP = self.add_node("MatMul", mean_BKGD, self.float_constant(value_KDP))
        if attn.v_proj.bias is not None:
            bias_K1P = self.float_constant(attn.v_proj.bias.view(self.kv_heads, 1, -1))
            attended_BKGP = self.add_node("Add", attended_BKGP, bias_K1P)
        states_BD = self.add_node("GatherND", states_BTD, "last_B1", batch_dims=1)
        return self.finish_layer(states_BD, self.reshape(attended_BKGP, 0, -1), layer)

    def finish_layer(self, states: str, attended: str, layer: Any) -> str:
        """The part of a layer after attention."""
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        states = self.add_node("Add", states, self.linear(attended, layer.self_attn.o_proj))
        x = self.normalize(states, norm)
        gate = self.linear(x, mlp.gate_proj, norm)
        silu = self.add_node("Mul", gate, self.add_node("Sigmoid", gate))
        gated = self.add_node("Mul", silu, self.linear(x, mlp.up_proj, norm))
        return self.add_node("Add", states, self.linear(gated, mlp.down_proj))

    def linear(self, x: str, layer: nn.Linear, norm: Any = None) -> str:
        """A linear layer, with the weight of the norm before it multiplied into its weight."""
        weight_FE = layer.weight if norm is None else layer.weight * norm.weight
        y = self.add_node("MatMul", x, self.float_constant(weight_FE.t()))
        return y if layer.bias is None else self.add_node("Add", y, self.float_constant(layer.bias))

    def normalize(self, x: str, norm: Any, *, weighted: bool = False) -> str:
        """RMS norm over the last dimension (Zhang & Sennrich 2019), with the norm's weight only if `weighted`."""
        weight = norm.weight if weighted else torch.ones_like(norm.weight)
        return self.add_node("RMSNormalization", x, self.float_constant(weight), axis=-1, epsilon=norm.variance_epsilon)

    def apply_rope(self, x_BTE: str, heads: int, positions_BT: str = "positions_BT") -> str:
        """Rotary position embedding (Su et al. 2021, RoFormer, section 3.2)."""
        return self.add_node("RotaryEmbedding", x_BTE, *self.rope, positions_BT, num_heads=heads)

    def gather(self, table_VE: Tensor) -> str:
        return self.add_node("Gather", self.float_constant(table_VE), "ids_BT")

    def reshape(self, x: str, *shape: int) -> str:
        """As in ONNX: 0 keeps a dimension, -1 is inferred."""
        return self.add_node("Reshape", x, self.int_constant(*shape))

    def transpose(self, x: str, *order: int) -> str:
        return self.add_node("Transpose", x, perm=order)

    def int_constant(self, *values: int) -> str:
        self.constants.append(
            numpy_helper.from_array(np.array(values, dtype=np.int64), f"constant_{len(self.constants)}")
        )
        return str(self.constants[-1].name)

    def float_constant(self, value: Tensor | float) -> str:
        """A float32 constant; the session reads its memory in place."""
        weight = torch.as_tensor(value, dtype=torch.float32).contiguous().numpy()
        constant = TensorProto(name=f"constant_{len(self.constants)}", data_type=TensorProto.FLOAT, dims=weight.shape)
        constant.data_location = TensorProto.EXTERNAL
        constant.external_data.add(key="location", value=constant.name)
        self.constants.append(constant)
        self.weights[constant.name] = weight
        return str(constant.name)

    def add_node(self, kind: str, *inputs: str, **attributes: int | float | Sequence[int]) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name
