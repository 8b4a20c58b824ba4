"""Started by torchrun in part 10: a bfloat16 base with float32 adapters and head, sharded by `fully_shard`, trains.

    PYTHONPATH=.:benchmarks torchrun --nproc-per-node 1 benchmarks/gpu_parts/launched.py cuda

Ends with 0 if the loss of the last step is finite and below that of the first.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed
from gpu_parts.models import make_classifier, make_rows, set_dropout, with_adapters
from gpu_parts.setting import Setting
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from ctxtrain.data.batches import collate
from ctxtrain.model.lora import trainable_parameters

STEPS = 5


def main() -> None:
    device = sys.argv[1]
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    setting = Setting(device, "tiny", math.inf, Path())
    model = with_adapters(make_classifier("0.5b", setting, torch.bfloat16))
    set_dropout(model, 0.0)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, fused=True)
    tokens, labels_N = make_rows(setting)
    ids_BT = collate(tokens, range(len(tokens)), device)["input_ids"]
    labels_B = torch.from_numpy(labels_N).to(device)
    losses = []
    for _ in range(STEPS):
        with torch.autocast(device, torch.bfloat16):
            logits_BC = model(input_ids=ids_BT).logits
        loss = cross_entropy(logits_BC.float(), labels_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    torch.distributed.destroy_process_group()
    print(losses)
    sys.exit(not losses[-1] < losses[0])


if __name__ == "__main__":
    main()
