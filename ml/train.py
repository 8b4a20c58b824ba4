"""Entry point of the specification: section 10 requires `ml/train.py` with a `TrainingPipeline`.

This file is only in the repository, not in the wheel, and nothing in `ctxtrain` imports it. Methods and the boxes of
the specification's diagrams (sections 2.1 and 2.2) that they implement:

__init__           section 10: `config`, `model`, `optimizer`, `loss_fn`
load_data          Load Dataset, Parse CTX Windows, Extract Features, Oversample Classes, Tokenize Context, Create
                   DataLoader; Class Weight Calculation (3.2)
setup_model        Load Qwen Base Model, Apply LoRA Config (5), Setup Optimizer, Setup Scheduler (7), Focal Loss (4)
train_epoch        For each batch: Forward Pass, Compute Focal Loss, Backward Pass, Update Weights, Log Metrics
evaluate           Validation Pass: Accuracy, Macro-F1 (6)
save_checkpoint    Save after each epoch, Track best macro-F1, Keep top-3 checkpoints (8)
run                Full training loop; then Post-calibration, Save Model, Generate Summary (9)
"""

from ctxtrain.train import TrainingPipeline

__all__ = ["TrainingPipeline"]
