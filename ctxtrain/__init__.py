"""ctxtrain: windows of market bars, labelled LONG, SHORT or SKIP, become a calibrated Qwen classifier.

The data flows down this list; a module imports only from modules above it.

    errors                      what can go wrong, with exit codes
    regular_files               pipes and devices where a file should be
    memory                      memory that runs out, told as such
    streams                     standard output that nobody takes
    labels                      the three classes
    limits                      upper bounds of numbers that users give
    versions                    libraries with known holes are refused
    runtime                     seeds, device, processes, signals
    progress                    what a person sees meanwhile

    config.strict_yaml          YAML → plain values, with places
    config.overrides            names of keys; what is said of a wrong one
    config.value_types          kinds of values that keys take
    config.schema               the typed config of a run

    data.strict_json            one line of JSON, no key twice
    data.time_units             the unit and the moment of a time
    data.bar_order              where the bars of a row stand
    data.wild_prints            prints that are far off are drawn near
    data.parse_window           a JSON object → a window, or faults
    data.notices                what was dropped, guessed or put right in a file
    data.columns                columns of numbers on disk
    data.table                  windows as Arrow columns on disk
    data.formats                lines of JSON → windows, faults
    data.table_cache            tables kept between runs, by content
    data.window_file            the windows of a file, parsed once
    data.features               windows → normalised numbers
    data.codec                  windows → text
    data.positions              where the windows of files lie, on one scale
    data.oversampling           which windows an epoch sees
    data.class_weights          what an error on each class weighs
    data.profile                what is kept of a file's rows after a walk
    data.duplicates             rows that are the same window
    data.leakage                rows that know too much; purging
    data.drift                  does validation look like training
    data.walk_forward           one file → splits that go forward in time
    data.check                  a report on rows, before training
    data.batches                text → tokens → steps of micro-batches
    data.tokens                 the tokens of a file's rows, made once, on disk
    data.dataset                all of the above for the files of a run

    model.base_name             what model.base may name
    model.embedded              the package's own small Qwen and its tokenizer
    model.base_config           what of a config.json a model may be made from
    model.base                  what the files of a base must be
    model.tokenizer             its tokenizer
    model.lora                  frozen base + LoRA + head
    model.losses                class-weighted focal loss
    model.optimizer             the optimizer
    model.schedule              its learning rate over the steps
    model.agreement             does a network give transformers' logits

    engine.tuning               allocator, waiting threads, the first call of vector mathematics
    engine.reference            passes by transformers and PEFT
    engine.cpu.dropout          masks of dropout
    engine.cpu.rope_tables      the table of rotary embeddings
    engine.cpu.layer_parts      parts of a layer with their backward passes written out
    engine.cpu.attention        the same of attention, for windows one after the other
    engine.cpu.training_model   the model of them: the same results, sooner
    engine.cpu.wide_inference   the merged model of them, for answers alone
    engine.cpu.onnx_inference   the same of a narrow model, by ONNX Runtime
    engine.cpu.frozen_layers    what frozen layers give, computed once a row
    engine.cpu.select           which of these fit a model
    engine.api                  the one door: for_training, for_inference, tune_process

    evaluation                  metrics, temperature; intervals, baselines, targets: what may be believed
    storage.validated, storage.atomic_files, storage.archive    files that appear whole or not at all
    storage.result_file         where a command's result goes
    storage.ownership           what is written is neither what is read nor anyone else's
    storage.metrics_log         metrics.jsonl
    storage.checkpoint          checkpoints
    reporting.summary_schema    the schema of training_summary.json
    reporting.runs_schema       the schema of runs.json
    storage.run_folder          what lies where in a run, and who may write there
    reporting.verdict           what a run came to, in words
    reporting.charts, reporting.figures, reporting.report       report.html
    tracking                    TensorBoard, MLflow, Weights & Biases
    training                    one optimizer step; the config of a run → its model and learner

    export                      best adapters → merged model → checked zip → predictions
    reporting.summary           training_summary.json
    train                       TrainingPipeline: the run
    multi_run                   several runs: walk-forward folds, seeds

    synthetic                   structure flags, simulated bars with them, sample files
    pretraining                 what the embedded base learns, from which windows, and how
    serve                       predictions over HTTP
    cli                         what a user types; errors, exit codes
    __main__                    python -m ctxtrain
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxtrain.config.schema import Config
    from ctxtrain.export.predictor import load_model
    from ctxtrain.multi_run import run_several
    from ctxtrain.train import TrainingPipeline

__all__ = ["Config", "TrainingPipeline", "load_model", "run_several"]
__version__ = "0.1.0"

_HOMES = {
    "Config": "ctxtrain.config.schema",
    "TrainingPipeline": "ctxtrain.train",
    "load_model": "ctxtrain.export.predictor",
    "run_several": "ctxtrain.multi_run",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `ctxtrain --help` starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ctxtrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
