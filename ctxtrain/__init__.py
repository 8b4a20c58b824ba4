"""ctxtrain: fine-tune a Qwen classifier of market windows, labelled LONG, SHORT or SKIP, with calibrated probabilities.

The list starts with the lowest layer. A module imports only from modules that are listed before it.

    errors                      exceptions and exit codes
    regular_files               open regular files only, not pipes or devices
    memory                      free memory, out-of-memory errors of any library
    streams                     standard output and standard error that survive write errors
    labels                      the three classes
    limits                      bounds of user-supplied numbers
    urls                        URLs of files, shown without credentials
    versions                    checks of library versions and optional packages
    runtime                     device, processes, seeds, signals
    progress                    progress output

    config.strict_yaml          YAML → plain values, with line and column
    config.overrides            overrides of keys, and messages about wrong keys
    config.value_types          value types of config keys
    config.sections             every key of the config of a run
    config.schema               the typed config of a run

    data.strict_json            one line of JSON without duplicate keys
    data.time_units             units and parsing of times
    data.row_schema             the fields of a row and of a bar
    data.bar_order              the position of a row's bars in time
    data.outliers               outlying prints, moved closer to the others
    data.bar_values             the values of validated bars as columns
    data.spellings              other spellings of fields and numbers
    data.label_side             label, label horizon and outcome of a row
    data.parse_window           JSON object → window, or faults
    data.notices                notices about what was dropped, assumed or corrected
    data.columns                growing columns of numbers on disk
    data.table                  windows as Arrow columns on disk
    data.parse_report           decoded rows → windows, or faults with their place
    data.json_rows              JSON lines and JSON arrays → decoded rows
    data.plain_values           values of other types as plain values
    data.arrow_rows             Parquet and Arrow → decoded rows
    data.memory_rows            lists, frames and tables in memory → decoded rows
    data.compression            .gz and .zst, unpacked while they are read
    data.formats                the format of a file, detected from its content
    data.remote_files           files at URLs, copied by fsspec
    data.sources                a file, URL, pipe or object in memory → decoded rows
    data.table_cache            tables kept between runs, by content hash
    data.window_file            the windows of a file, parsed once
    data.features               windows → normalised numbers
    data.levels                 one character for a value without a fixed range
    data.codec                  windows → text
    data.codec_fitter           training windows → the codec
    data.mirror                 windows upside down and windows without their oldest bars
    data.positions              positions of windows on a common scale
    data.oversampling           the windows of an epoch
    data.class_weights          class weights of the loss
    data.profile                statistics of a file from one pass
    data.duplicates             rows that are the same window
    data.separation             purge, embargo and label horizon
    data.leakage                leakage checks
    data.label_rule             labels that a small decision tree reproduces
    data.drift                  drift between splits
    data.walk_forward           one file → walk-forward folds
    data.check                  the report of `ctxtrain check`
    data.tokens                 texts → token rows
    data.token_store            token rows of a file on disk, computed once
    data.batches                an epoch → steps of micro-batches
    data.training_rows          the rows that training draws from, with augmentation
    data.dataset                the rows of a run, ready for training
    data.part                   a part of the training rows, as a dataset of its own

    model.base_name             checks of the value of model.base
    model.embedded              the small Qwen that ships with the package
    model.base_config           checks of config.json
    model.base_files            checks of the files of a base model
    model.precision             float32 or bfloat16, chosen once for a run
    model.tokenizer             the tokenizer of a base model
    model.base                  a base model, loaded as a classifier
    model.lora                  frozen base model + adapters + trained head
    model.forward               a batch → logits
    model.shape                 sizes of model and adapters, from the config alone
    model.skeleton              names, shapes and source files of a model's weights, without the numbers
    model.averaging             the mean of the weights of several epochs
    model.losses                class-weighted focal loss
    model.optimizer             the optimizer
    model.schedule              the learning rate schedule
    model.agreement             comparison of an engine's logits with transformers

    engine.tuning               memory allocator, waiting threads, vector math
    engine.activations          bytes of activations of the reference engine
    engine.batch_memory         how many tokens a batch of answers may have on a GPU
    engine.reference            the reference engine: transformers and PEFT
    engine.cpu.dropout          dropout masks
    engine.cpu.rope_tables      rotary position embeddings
    engine.cpu.layer_parts      parts of a layer, with hand-written backward passes
    engine.cpu.attention        attention, with a hand-written backward pass
    engine.cpu.device_attention  attention by torch's kernels, for GPUs
    engine.cpu.training_model   the training model of the fast engine
    engine.cpu.activations      bytes of activations of the fast engine
    engine.cpu.wide_inference   prediction with a wide merged model
    engine.cpu.onnx_inference   prediction with a narrow merged model, by ONNX Runtime
    engine.cpu.frozen_layers    cached outputs of the frozen layers
    engine.cpu.select           the fast engine that fits a model
    engine.memory_needs         memory of a run by part; gradient checkpointing or not
    engine.api                  entry point: make_training_engine, make_inference_engine, tune_process

    evaluation                  metrics, best epoch, intervals, baselines, targets, calibration, scores of the export
    storage.validated, storage.atomic_files, storage.archive    schemas of stored files, atomic writes, final_model.zip
    storage.result_file         the result of a command, to a file or standard output
    storage.ownership           checks that no command overwrites inputs or foreign files
    storage.split_folder        checks of folders with the rows of a sample or of windows
    storage.metrics_log         metrics.jsonl
    storage.checkpoint          checkpoints
    reporting.curve_schema      the schema of a learning curve
    reporting.summary_schema    the schema of training_summary.json
    reporting.runs_schema       the schema of runs.json
    storage.run_folder          layout and lock of a run folder
    reporting.verdict           the verdict of a run in plain sentences
    reporting.charts, reporting.figures, reporting.learning_curve, reporting.report     report.html
    tracking                    TensorBoard, MLflow, Weights & Biases
    training                    rows and learner of a run, one optimizer step, validation pass, checks of a checkpoint

    export                      best adapters → merged model → checked zip → predictions
    reporting.summary           training_summary.json
    learning_curve              a run's model and baselines, trained anew on parts of its rows
    train                       TrainingPipeline: one run
    multi_run                   several runs: walk-forward folds, seeds

    bars                        bars as market programs export them → labelled windows
    synthetic                   simulated bars, sample files
    pretraining                 pre-training of the embedded base model
    serve                       predictions over HTTP
    cli                         the command line
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

_MODULES = {
    "Config": "ctxtrain.config.schema",
    "TrainingPipeline": "ctxtrain.train",
    "load_model": "ctxtrain.export.predictor",
    "run_several": "ctxtrain.multi_run",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `ctxtrain --help` starts without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'ctxtrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
