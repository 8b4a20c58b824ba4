"""ctxtrain: windows of market bars, labelled LONG, SHORT or SKIP, become a calibrated Qwen classifier.

The data flows down this list; a module imports only from modules above it.

    errors            what can go wrong, with exit codes
    regular           pipes and devices where a file should be
    memory            memory that runs out, told as such
    streams           standard output that nobody takes
    labels            the three classes
    limits            upper bounds of numbers that users give
    versions          libraries with known holes are refused
    yaml_text         YAML → plain values, with places
    config_text       names of keys; what is said of a wrong one
    config_values     kinds of values that keys take
    config            the typed config of a run
    runtime           seeds, device, processes, signals
    progress          what a person sees meanwhile
    data.strict_json  one line of JSON, no key twice
    data.clock        the unit and the moment of a time
    data.placing      where the bars of a row stand
    data.wild         prints that are far off are drawn near
    data.rows         a JSON object → a window, or faults
    data.noticed      what was dropped, guessed or put right in a file
    data.windows      files of JSONL → windows, faults
    data.features     windows → normalised numbers
    data.codec        windows → text
    data.places       where the windows of files lie, on one scale
    data.sampling     oversampling and class weights
    data.survey       what is kept of a file's rows after a walk
    data.twins        rows that are the same window
    data.leaks        rows that know too much; purging
    data.drift        does validation look like training
    data.folds        one file → splits that go forward in time
    data.check        a report on rows, before training
    data.batches      text → tokens → steps of micro-batches
    data.dataset      all of the above for the files of a run
    model.embedded    the package's own small Qwen and its tokenizer
    model.plain_config    what of a config.json a model may be made from
    model.base        what the files of a base must be
    model.tokenizer   its tokenizer
    model.qwen        frozen base + LoRA + head
    model.agreement   does the engine give transformers' logits
    model.loss        class-weighted focal loss
    model.optim       AdamW and schedule
    model.dropout     masks of dropout
    model.rotations   the table of rotary embeddings
    model.passes      parts of a layer with their backward passes written out
    model.attention   the same of attention, for windows one after the other
    model.fast        the model of them: the same results, sooner
    model.merged      the merged model of them, for answers alone
    model.graph       the same of a narrow model, by ONNX Runtime
    model.answers     logits of many rows, on all cores
    model.trunk       what frozen layers give, computed once a row
    model.learner     one optimizer step; logits
    evaluation        metrics, temperature; intervals, baselines, targets: what may be believed
    output            checkpoints, export, prediction, summary, report
    build             the config of a run → its model and learner
    train             TrainingPipeline: the run
    repeat            several runs: walk-forward folds, seeds
    structure, simulate, sample_files, sample    structure flags, simulated bars with them, sample files
    practice, pretrain             what the embedded base learns, from which windows, and how
    serve             predictions over HTTP
    console           results as tables
    commands          what a user types
    cli               the process around them: errors, exit codes
    __main__          python -m ctxtrain
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxtrain.config import Config
    from ctxtrain.output.predictor import load_model
    from ctxtrain.repeat import run_several
    from ctxtrain.train import TrainingPipeline

__all__ = ["Config", "TrainingPipeline", "load_model", "run_several"]
__version__ = "0.1.0"

_HOMES = {
    "Config": "ctxtrain.config",
    "TrainingPipeline": "ctxtrain.train",
    "load_model": "ctxtrain.output.predictor",
    "run_several": "ctxtrain.repeat",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `ctxtrain --help` starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ctxtrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
