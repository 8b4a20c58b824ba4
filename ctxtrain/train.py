"""The training run, from rows on disk to `final_model.zip`.

load_data          rows → windows → text → tokens; oversampling and class weights
setup_model        frozen Qwen + LoRA + head; AdamW; schedule; focal loss
train_epoch        optimizer steps over the oversampled windows
evaluate           validation scores
save_checkpoint    the state for resuming, and the scores for selecting the best epoch
run                all of these, epoch by epoch, then `finish`: best epoch → merged model → temperature → zip → summary
add_learning_curve for a config that asks for it: after `finish`, trains on parts of the training rows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.optim import Optimizer

from ctxtrain.config.schema import Config
from ctxtrain.data.batches import steps_per_epoch
from ctxtrain.data.dataset import Inputs, load_dataset
from ctxtrain.errors import Interrupted
from ctxtrain.evaluation.best_epoch import rank_epochs
from ctxtrain.export.check_device import lock_in_first_process, rehearse_check
from ctxtrain.export.package import place_export, prepare_export
from ctxtrain.learning_curve import Parts, begin_curve, open_sizes, too_large, with_entry
from ctxtrain.memory import TRAINING_REMEDY, annotate_memory_errors, release_memory
from ctxtrain.model.losses import Loss
from ctxtrain.model.tokenizer import tokenizer_and_notes
from ctxtrain.progress import Reporter
from ctxtrain.reporting.report import write_report
from ctxtrain.reporting.summary import make_summary
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.reporting.verdict import warnings
from ctxtrain.runtime import (
    StopRequest,
    catch_signals,
    environment,
    is_main_process,
    leave_process_group,
    make_deterministic,
)
from ctxtrain.storage import checkpoint
from ctxtrain.storage.atomic_files import write_json
from ctxtrain.storage.ownership import check_output_dir
from ctxtrain.storage.run_folder import RunFolder
from ctxtrain.tracking.trackers import Trackers, open_trackers
from ctxtrain.training import build
from ctxtrain.training.checkpoint_parts import load_exportable, load_resume_checkpoint
from ctxtrain.training.epoch import run_steps
from ctxtrain.training.inputs import build_inputs, dataset_settings, part_settings, require_single_run
from ctxtrain.training.step import Learner
from ctxtrain.training.validation import validate


class TrainingPipeline:
    """One run of a config. `run` calls the steps listed above; so can other code. `data`: rows in memory by split."""

    learner: Learner

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = False,
        reporter: Reporter | None = None,
        inputs: Inputs | None = None,
        data: Mapping[str, object] | None = None,
    ) -> None:
        self.config = require_single_run(config, inputs.files if inputs else data)
        self.inputs, self.rows, self.resume = inputs, data, resume
        self.reporter = reporter if reporter and is_main_process() else Reporter()
        self.folder = RunFolder(config.output_dir)
        self.checkpoints = self.folder.checkpoints(config.checkpoints.keep, config.checkpoints.average)
        self.state, self.trackers = checkpoint.TrainState(), Trackers()
        self.saved_position = (0, 0)  # optimizer steps and finished epochs of the newest checkpoint
        self.start: Path | None = None  # the checkpoint to resume from
        self.stop = StopRequest()
        self.model: PeftModel | None = None
        self.optimizer: Optimizer | None = None
        self.loss_fn: Loss | None = None

    def load_data(self) -> None:
        """Read, check, balance, render and tokenise the rows. Raises one DataError with the faults of all files."""
        model, training = self.config.model, self.config.training
        self.base_name = build.base_name(self.config)
        self.tokenizer, notes = tokenizer_and_notes(model.base, model.revision)
        self.pad_id: int = self.tokenizer.pad_token_id
        inputs = self.inputs or build_inputs(self.config, self.reporter.say, self.rows)
        self.token_store, sizes = inputs.tokens, self.config.evaluation.learning_curve
        self.data = load_dataset(inputs, self.tokenizer, **dataset_settings(self.config))
        windows = int(self.data.epoch_counts_C.sum())
        self.steps_per_epoch = steps_per_epoch(windows, training.batch_size, training.gradient_accumulation)
        self.total_steps = training.epochs * self.steps_per_epoch
        for note in notes + self.data.notes() + too_large(sizes, len(self.data.labels["train"])):
            self.reporter.say(f"note: {note}")

    def setup_model(self) -> None:
        """Build model, optimizer, schedule and loss. Raises ConfigError if they do not fit together."""
        say, pad_id, is_one_of_several = self.reporter.say, self.pad_id, self.inputs is not None
        self.dtype = build.training_dtype(self.config, self.start, is_one_of_several=is_one_of_several, say=say)
        self.learner = build.build_learner(self.config, self.dtype, pad_id, self.data, self.total_steps, say)
        self.model, self.optimizer, self.loss_fn = self.learner.model, self.learner.optimizer, self.learner.loss_fn
        self.setup_export(self.dtype)
        if reason := self.learner.engine.unsupported_reason:
            say(f"note: training uses the slower reference engine: {reason}")

    def setup_export(self, dtype: torch.dtype | None = None) -> None:
        """Find the names of the weights, and what a checkpoint of this run must fit, without loading a model.

        `dtype` is that of the training, which an export does not compare.
        """
        make_deterministic()
        self.skeleton = build.build_skeleton(self.config, self.pad_id)
        self.fingerprint = build.run_fingerprint(
            self.config, dtype, self.data.codec, self.data.fingerprint(), self.tokenizer, self.skeleton
        )

    def run(self) -> dict[str, Any] | None:
        """Train all epochs and export the best one. Returns the summary in the main process, None in all others."""
        with self._open_run():
            while not self._is_finished():
                epoch_end = (len(self.state.epochs) + 1) * self.steps_per_epoch
                if self.state.step < epoch_end:  # false if the run resumes after the last step of an epoch
                    self.train_epoch()
                metrics = self.evaluate()
                self.save_checkpoint(metrics)
                self._stop_on_signal()
            leave_process_group()
            self.learner.accelerator.end_training()
            return self.add_learning_curve(self.finish()) if is_main_process() else None

    def train_epoch(self) -> float:
        """Train one epoch, or the rest of it after a resume; returns its mean training loss."""
        training, every_steps = self.config.training, self.config.checkpoints.every_steps
        epoch, first = divmod(self.state.step, self.steps_per_epoch)
        # Several processes stop between steps only: within a step, they may have different numbers of micro-batches.
        before_batch = self._stop_on_signal if self.learner.accelerator.num_processes == 1 else None
        loop, say = build.training_loop(self.config), self.reporter.say
        steps = run_steps(self.learner, self.data, self.state, loop, self.steps_per_epoch, say, before_batch)
        with self.reporter.track_epoch(epoch + 1, training.epochs, self.steps_per_epoch, first) as after_step:
            for record, figures in steps:
                self._log(record)
                after_step(figures["loss"], figures["learning_rate"], record["windows"])
                if every_steps is not None and self.state.step % every_steps == 0:
                    self.save_checkpoint()
                self._stop_on_signal()
        return self.state.loss_sum / self.state.weight_sum

    def evaluate(self) -> dict[str, Any]:
        """Score the validation rows; `loss` is the focal loss with the class weights of training.

        Raises TrainingDiverged if a logit is not finite. After each batch it stops if a signal has arrived.
        """
        assert self.loss_fn is not None, "call setup_model first"
        tokens, labels_N = self.data.tokens["val"], self.data.labels["val"]
        with self.reporter.track_rows("validation", len(tokens)) as advance:

            def after_batch(rows: int) -> None:
                advance(rows)
                self._stop_on_signal()

            return validate(self.learner, self.loss_fn, tokens, labels_N, self.data.names["val"], after_batch)

    def save_checkpoint(self, metrics: dict[str, Any] | None = None) -> None:
        """Write a checkpoint; with `metrics`, first record the epoch as finished."""
        if metrics is not None:
            record = {
                "epoch": len(self.state.epochs) + 1,
                "step": self.state.step,
                "train_loss": self.state.loss_sum / self.state.weight_sum,
                **metrics,
            }
            self.state.epochs.append(record)
            self._log({"kind": "epoch", **record})
            self.reporter.report_epoch(record, best=rank_epochs(self.state.epochs)[0] == record["epoch"])
        if is_main_process():
            self.folder.metrics.sync()
            payload = {
                "state": asdict(self.state) | {"metrics_sha256": self.folder.metrics.sha256},
                "learner": self.learner.state_dict(),
                "fingerprint": self.fingerprint,
                "environment": environment(),
            }
            if metrics is not None:
                self.checkpoints.save_epoch(payload, self.state.epochs)
            else:
                self.checkpoints.save_step(payload, self.state.step)
        self.saved_position = (self.state.step, len(self.state.epochs))
        self.learner.accelerator.wait_for_everyone()

    def load_checkpoint(self, path: Path) -> None:
        """Restore the state of a checkpoint without writing files. Raises what `load_resume_checkpoint` raises."""
        payload = load_resume_checkpoint(path, self.checkpoints, self.fingerprint, self.learner, self.steps_per_epoch)
        for change in checkpoint.differences(payload["environment"], environment()):
            self.reporter.say(f"note: results can differ from those of an uninterrupted run: {change}")
        self.learner.load_state_dict(payload["learner"])
        self.state = checkpoint.TrainState(**payload["state"])
        self.saved_position = (self.state.step, len(self.state.epochs))

    def export(self) -> dict[str, Any]:
        """Export the best epoch of an existing run without training."""
        with self._open_run(exporting=True):
            return self.finish()

    def finish(self) -> dict[str, Any]:
        """Export the best epoch, or the mean of the best ones, and score it; writes and returns the summary."""
        best = self.checkpoints.exported_epochs(self.state.epochs)
        unfinished = None if self._is_finished() else self._progress()
        tokens = {split: rows for split, rows in self.data.tokens.items() if split != "test" or not unfinished}
        self.model = self.optimizer = self.loss_fn = None
        self.__dict__.pop("learner", None)
        release_memory()  # for the model that is exported
        with self.folder.scratch() as scratch:
            with self.stop.interrupt_immediately():
                weights = {n: checkpoint.load(self.checkpoints.epoch_path(n))["learner"]["weights"] for n in best}
                exported = prepare_export(
                    build.candidates(self.config, self.skeleton, weights),
                    self.tokenizer,
                    self.data,
                    tokens,
                    **build.export_settings(self.config),
                    base_name=self.base_name,
                    caveat=" ".join(warnings(self.data.leaked, unfinished)),
                    scratch=scratch,
                    say=self.reporter.say,
                )
            place_export(scratch, self.folder)  # signals are ignored from here on, because the export is in place
        summary = make_summary(
            model=build.model_summary(self.config, self.base_name, self.skeleton, self.fingerprint),
            data=self.data.summary(),
            epochs=self.state.epochs,
            best_epoch=best[0],
            unfinished=unfinished,
            skipped=self.state.skipped,
            exported=exported,
            environment=environment(),
        )
        summary = begin_curve(summary, self.config.evaluation.learning_curve, self.folder)
        write_json(self.folder.summary, written := summary.to_dict())
        write_report(self.folder, summary)
        self.trackers.log_summary(summary, self.folder)
        return written

    def add_learning_curve(self, written: dict[str, Any]) -> dict[str, Any]:
        """Add what the summary of the finished run lacks of its learning curve; returns the summary.

        Each point is written once it is computed, so that a run that is stopped here keeps it.
        """
        config, summary = self.config, Summary.model_validate(written)
        sizes = open_sizes(summary, config.evaluation.learning_curve or ())
        if not sizes:
            return written
        fitting = part_settings(config)
        learner = partial(build.build_part_learner, config, self.dtype, self.pad_id, self.total_steps)
        loop, trained = build.training_loop(config), partial(build.candidates, config, self.skeleton)
        parts = Parts(self.data, self.token_store, self.tokenizer, loop, learner, trained, self.reporter, **fitting)
        self.reporter.say(f"{self.folder.zip} is finished; computing the learning curve")
        for size in sizes:
            with self.stop.interrupt_immediately("the run is finished, stopped in its learning curve"):
                entry = parts.compute(size)
            summary = with_entry(summary, entry)
            write_json(self.folder.summary, summary.to_dict())
            write_report(self.folder, summary)
        self.trackers.log_summary(summary, self.folder)
        return summary.to_dict()

    @contextmanager
    def _open_run(self, *, exporting: bool = False) -> Iterator[None]:
        """Lock the run folder, load data and model, and start a new run or resume from the newest checkpoint."""
        config, say = self.config, self.reporter.say
        check_output_dir(self.folder.root, config.model.base)
        memory = annotate_memory_errors(f"in a run with {build.batch_size(config)}", TRAINING_REMEDY)
        with catch_signals() as self.stop, lock_in_first_process(self.folder), memory:
            self.folder.refuse_other_run(resume=self.resume, epochs=config.training.epochs)
            with self.stop.interrupt_immediately():
                self.load_data()
                start = self.checkpoints.find_resume_point(self.steps_per_epoch, say) if self.resume else None
                self.start = start
                if exporting:
                    self.setup_export()
                    self.state = load_exportable(
                        start, self.checkpoints, self.fingerprint, self.skeleton.adapted, self.steps_per_epoch
                    )
                else:
                    self.setup_model()
                    if start:
                        self.load_checkpoint(start)
                if is_main_process():
                    rehearse_check(config.export.check_device, say)
            if is_main_process():
                self.folder.begin_run(config.with_absolute_paths().to_yaml(), self.state, start, self.checkpoints, say)
            if start:
                self.reporter.report_resume(start.name, self.state.step, self.total_steps, self.state.epochs)
            names = config.tracking.to if is_main_process() else []
            try:
                with open_trackers(names, self.folder, config.public_values(), self.state.step, say) as self.trackers:
                    yield
            finally:
                leave_process_group()

    def _is_finished(self) -> bool:
        return self.state.is_finished(self.config.training.epochs, self.config.training.patience)

    def _progress(self) -> str:
        return f"stopped at optimizer step {self.state.step} of {self.total_steps}"

    def _stop_on_signal(self) -> None:
        """If any process got a signal, save a checkpoint and stop all processes at the same step."""
        if number := self.stop.number_of_any_process():
            if self.saved_position != (self.state.step, len(self.state.epochs)):
                self.save_checkpoint()
            raise Interrupted(number, f"{self._progress()}; continue with train --resume")

    def _log(self, record: dict[str, Any]) -> None:
        if is_main_process():
            self.folder.metrics.append(record)
        self.trackers.log(record)
