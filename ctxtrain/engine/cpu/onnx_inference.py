"""The forward pass of a narrow merged dense Qwen2 or Qwen3 classifier on a CPU, for answers alone, by ONNX Runtime.

Comes in: a model without adapters, in float32, for which `why_plain` gives None. Goes out: a module around it that
gives the model's own logits, sooner.

The operators of a narrow model are so short that Python between them costs as much as they do. ONNX Runtime goes
through a graph of them in one call, on the calling thread alone and without the interpreter's lock, and its products
read weights that were packed once. Of the arithmetic this spares the scores above attention's diagonal, the weights of
norms, which are in those of the layers behind them, and in the last layer all but the pooled token of each window.

Legend: B windows, T tokens of the longest, V vocabulary, D model width, E, F width of what goes into and out of a
linear layer, H query heads, K key-value heads, G = H/K query heads that share keys and values, P width of a head,
C = P/2 pairs of its numbers that are rotated together, S keys up to the last query of a block.
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
from ctxtrain.engine.cpu.rope_tables import LONGEST, rotations
from ctxtrain.engine.cpu.training_model import lengths_of

OPSET, IR_VERSION = 23, 11  # the first with norm and rotation as operators
BLOCKS = 5  # of queries, each with all keys up to its last
LARGEST_TABLE = 1 << 24  # numbers; a larger vocabulary's part of the first layer is not made beforehand

Floats = NDArray[np.float32]


class GraphClassifier(nn.Module):
    """A merged model for which `why_plain` gives None, with the weights that it has now.

    `weights` is memory that the session reads and does not keep alive.
    """

    def __init__(
        self, model: PreTrainedModel, session: onnxruntime.InferenceSession, weights: Mapping[str, Floats]
    ) -> None:
        super().__init__()
        self.model = model
        self.session = session
        self.weights = weights

    @classmethod
    def of(cls, model: PreTrainedModel) -> GraphClassifier:
        graph, options = Graph(model), onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        opsets = [helper.make_opsetid("", OPSET)]
        whole = helper.make_model(graph.whole(), opset_imports=opsets, ir_version=IR_VERSION)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight) for weight in graph.weights.values()]
        options.add_external_initializers(list(graph.weights), values)
        session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return cls(model, session, graph.weights)

    def forward(self, input_ids: Tensor) -> SequenceClassifierOutputWithPast:
        """Logits of shape (B, 3) of ids of shape (B, T), padded on the right; T is at most `LONGEST`."""
        config: Any = self.model.config
        last_B = lengths_of(input_ids, config.pad_token_id) - 1
        tokens = int(last_B.max()) + 1
        feeds = {
            "ids_BT": input_ids[:, :tokens].numpy(),
            "places_BT": np.tile(np.arange(tokens), (len(input_ids), 1)),
            "last_B1": last_B[:, None].numpy(),
        }
        shared = config.num_attention_heads // config.num_key_value_heads
        (logits_BC,) = self.session.run(None, feeds | blocks(tokens, shared))
        return SequenceClassifierOutputWithPast(logits=torch.from_numpy(logits_BC))


def blocks(tokens: int, shared: int) -> dict[str, NDArray[Any]]:
    """For each block of queries where its rows end, where its keys end, and -inf where a key lies behind its query.

    A query has `shared` rows, one for each head that reads the same keys. Of few tokens the last blocks are empty.
    """
    stops = [min(tokens, -(-tokens * number // (BLOCKS * LANES)) * LANES) for number in range(BLOCKS + 1)]
    feeds: dict[str, NDArray[Any]] = {}
    for number, (start, stop) in enumerate(pairwise(stops)):
        query_M1 = np.arange(start, stop).repeat(shared)[:, None]
        feeds[f"rows_{number}"] = np.array([stop * shared])
        feeds[f"keys_{number}"] = np.array([stop])
        feeds[f"future_{number}"] = np.where(np.arange(stop) > query_M1, -np.inf, 0).astype(np.float32)
    return feeds


class Graph:
    """The operators of a model's forward pass. A method adds some and gives the name of what they make."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.layers = list(model.model.layers)
        self.queries, self.keys = self.config.num_attention_heads, self.config.num_key_value_heads
        self.shared, self.head = self.queries // self.keys, self.layers[0].self_attn.head_dim
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.weights: dict[str, Floats] = {}
        turns_TC = rotations(model.model.rotary_emb, LONGEST)
        self.turns = [self.of(turns_TC.real.contiguous()), self.of(turns_TC.imag.contiguous())]

    @torch.no_grad()
    def whole(self) -> GraphProto:
        """From `ids_BT`, their `places_BT`, the place of each window's `last_B1`, and `blocks` to logits."""
        *layers, last = self.layers
        table_VD = self.model.model.embed_tokens.weight
        states_BTD = self.gather(table_VD)
        for number, layer in enumerate(layers):
            if number == 0 and len(table_VD) * (self.queries + 2 * self.keys) * self.head <= LARGEST_TABLE:
                heads = self.of_vocabulary(layer)
            else:
                heads = self.heads(self.normed(states_BTD, layer.input_layernorm), layer, "q", "k", "v")
            states_BTD = self.rest(states_BTD, self.attention(*heads), layer)
        pooled_BD = self.last_layer(states_BTD, last)
        norm = self.model.model.norm
        logits_BC = self.linear(self.normed(pooled_BD, norm), self.model.score, norm)
        inputs: dict[str, tuple[int, list[str | int]]] = {
            "ids_BT": (TensorProto.INT64, ["B", "T"]),
            "places_BT": (TensorProto.INT64, ["B", "T"]),
            "last_B1": (TensorProto.INT64, ["B", 1]),
        }
        for number in range(BLOCKS):
            inputs[f"rows_{number}"] = inputs[f"keys_{number}"] = (TensorProto.INT64, [1])
            inputs[f"future_{number}"] = (TensorProto.FLOAT, [f"M{number}", f"S{number}"])
        return helper.make_graph(
            self.nodes,
            "classifier",
            [helper.make_tensor_value_info(name, *of) for name, of in inputs.items()],
            [helper.make_tensor_value_info(logits_BC, TensorProto.FLOAT, ["B", self.config.num_labels])],
            self.constants,
        )

    def of_vocabulary(self, layer: Any) -> list[str]:
        """Queries, keys and values of the first layer, which depend on a token alone, from tables."""
        own, normed_VD = layer.self_attn, layer.input_layernorm(self.model.model.embed_tokens.weight)
        heads = []
        for name in ("q", "k", "v"):
            x_VHP = getattr(own, f"{name}_proj")(normed_VD).unflatten(1, (-1, self.head))
            x_VHP = getattr(own, f"{name}_norm", nn.Identity())(x_VHP)
            heads.append(self.gather(x_VHP.flatten(1)))
        return heads

    def heads(self, x_BTD: str, layer: Any, *names: str) -> list[str]:
        """Queries, keys or values, of shape (B, T, H·P or K·P): normed where the family has a norm, not rotated yet."""
        own, heads = layer.self_attn, []
        for name in names:
            x_BTE = self.linear(x_BTD, getattr(own, f"{name}_proj"), layer.input_layernorm)
            if norm := getattr(own, f"{name}_norm", None):
                x_BTHP = self.normed(self.shaped(x_BTE, 0, 0, -1, self.head), norm, weighted=True)
                x_BTE = self.shaped(x_BTHP, 0, 0, -1)
            heads.append(x_BTE)
        return heads

    def attention(self, q_BTE: str, k_BTE: str, v_BTE: str) -> str:
        """What each token attends to, of shape (B, T, H·P)."""
        q_BTE, k_BTE = self.turned(q_BTE, self.queries), self.turned(k_BTE, self.keys)
        q_BKTE = self.transposed(self.shaped(q_BTE, 0, 0, self.keys, -1), 0, 2, 1, 3)
        q_BKMP = self.shaped(q_BKTE, 0, 0, -1, self.head)  # M = T·G
        k_BKPT = self.transposed(self.shaped(k_BTE, 0, 0, self.keys, -1), 0, 2, 3, 1)
        v_BKTP = self.transposed(self.shaped(v_BTE, 0, 0, self.keys, -1), 0, 2, 1, 3)
        start, none, mixed = self.ints(0), self.ints(0), []
        for number in range(BLOCKS):
            rows, keys = f"rows_{number}", f"keys_{number}"
            own_BKMP = self.op("Slice", q_BKMP, start, rows, self.ints(2))
            scores_BKMS = self.scores(own_BKMP, self.op("Slice", k_BKPT, none, keys, self.ints(3)))
            weights_BKMS = self.op("Softmax", self.op("Add", scores_BKMS, f"future_{number}"), axis=-1)
            mixed.append(self.op("MatMul", weights_BKMS, self.op("Slice", v_BKTP, none, keys, self.ints(2))))
            start = rows
        mixed_BKTE = self.shaped(self.op("Concat", *mixed, axis=2), 0, 0, -1, self.shared * self.head)
        return self.shaped(self.transposed(mixed_BKTE, 0, 2, 1, 3), 0, 0, -1)

    def scores(self, q_BKMP: str, k_BKPS: str) -> str:
        """Of shape (B, K, M, S)."""
        return self.op("Mul", self.op("MatMul", q_BKMP, k_BKPS), self.of(self.layers[0].self_attn.scaling))

    def last_layer(self, states_BTD: str, layer: Any) -> str:
        """Its output, of shape (B, D), at the token of each window that is pooled.

        Values are mixed before they are made: a weighted sum of products is the product of the weighted sum.
        """
        own, norm = layer.self_attn, layer.input_layernorm
        x_BTD = self.normed(states_BTD, norm)
        x_B1D = self.op("Unsqueeze", self.op("GatherND", x_BTD, "last_B1", batch_dims=1), self.ints(1))
        (q_B1E,), (k_BTE,) = self.heads(x_B1D, layer, "q"), self.heads(x_BTD, layer, "k")
        q_BKGP = self.shaped(self.turned(q_B1E, self.queries, "last_B1"), 0, self.keys, self.shared, self.head)
        k_BKPT = self.transposed(self.shaped(self.turned(k_BTE, self.keys), 0, 0, self.keys, -1), 0, 2, 3, 1)
        unread_BT = self.op("Greater", "places_BT", "last_B1")
        unread_B11T = self.op("Unsqueeze", unread_BT, self.ints(1, 2))
        scores_BKGT = self.op("Where", unread_B11T, self.of(-np.inf), self.scores(q_BKGP, k_BKPT))
        weights_BHT = self.shaped(self.op("Softmax", scores_BKGT, axis=-1), 0, self.queries, -1)
        mixed_BKGD = self.shaped(self.op("MatMul", weights_BHT, x_BTD), 0, self.keys, self.shared, -1)
        value_KDP = (own.v_proj.weight * norm.weight).unflatten(0, (self.keys, -1)).mT
        mixed_BKGP = self.op("MatMul", mixed_BKGD, self.of(value_KDP))
        if own.v_proj.bias is not None:
            mixed_BKGP = self.op("Add", mixed_BKGP, self.of(own.v_proj.bias.view(self.keys, 1, -1)))
        states_BD = self.op("GatherND", states_BTD, "last_B1", batch_dims=1)
        return self.rest(states_BD, self.shaped(mixed_BKGP, 0, -1), layer)

    def rest(self, states: str, mixed: str, layer: Any) -> str:
        """A layer after its attention."""
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        states = self.op("Add", states, self.linear(mixed, layer.self_attn.o_proj))
        x = self.normed(states, norm)
        gate = self.linear(x, mlp.gate_proj, norm)
        gated = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), self.linear(x, mlp.up_proj, norm))
        return self.op("Add", states, self.linear(gated, mlp.down_proj))

    def linear(self, x: str, layer: nn.Linear, norm: Any = None) -> str:
        """With the weight of the norm before the layer in its own."""
        weight_FE = layer.weight if norm is None else layer.weight * norm.weight
        y = self.op("MatMul", x, self.of(weight_FE.t()))
        return y if layer.bias is None else self.op("Add", y, self.of(layer.bias))

    def normed(self, x: str, norm: Any, *, weighted: bool = False) -> str:
        """Over the last dimension, x / rms(x) (Zhang & Sennrich 2019), times the norm's weight or not yet."""
        weight = norm.weight if weighted else torch.ones_like(norm.weight)
        return self.op("RMSNormalization", x, self.of(weight), axis=-1, epsilon=norm.variance_epsilon)

    def turned(self, x_BTE: str, heads: int, places_BT: str = "places_BT") -> str:
        """Rotated by the turn of each place (Su et al. 2021, RoFormer, section 3.2)."""
        return self.op("RotaryEmbedding", x_BTE, *self.turns, places_BT, num_heads=heads)

    def gather(self, table_VE: Tensor) -> str:
        return self.op("Gather", self.of(table_VE), "ids_BT")

    def shaped(self, x: str, *shape: int) -> str:
        """0 leaves a dimension, -1 takes what is left."""
        return self.op("Reshape", x, self.ints(*shape))

    def transposed(self, x: str, *order: int) -> str:
        return self.op("Transpose", x, perm=order)

    def ints(self, *values: int) -> str:
        self.constants.append(
            numpy_helper.from_array(np.array(values, dtype=np.int64), f"constant_{len(self.constants)}")
        )
        return str(self.constants[-1].name)

    def of(self, value: Tensor | float) -> str:
        """A constant, in float32, whose memory the session reads where it is."""
        weight = torch.as_tensor(value, dtype=torch.float32).contiguous().numpy()
        constant = TensorProto(name=f"constant_{len(self.constants)}", data_type=TensorProto.FLOAT, dims=weight.shape)
        constant.data_location = TensorProto.EXTERNAL
        constant.external_data.add(key="location", value=constant.name)
        self.constants.append(constant)
        self.weights[constant.name] = weight
        return str(constant.name)

    def op(self, kind: str, *inputs: str, **attributes: int | float | Sequence[int]) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name
