"""The training run, from rows on disk to `final_model.zip`, readable top to bottom.

load_data          rows → windows → text → tokens; classes counted, raised and weighted
setup_model        frozen Qwen + LoRA + head; AdamW; schedule; focal loss
train_epoch        optimizer steps over the oversampled windows
evaluate           validation scores
save_checkpoint    what resume and selection need
run                all of these, epoch by epoch, then `finish`: best epoch → temperature → merged model → zip → summary
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.optim import Optimizer

from ctxtrain.config.schema import Config
from ctxtrain.data.batches import plan_step, steps_per_epoch
from ctxtrain.data.dataset import Inputs, load_dataset
from ctxtrain.data.oversampling import epoch_rows
from ctxtrain.errors import ConfigError, Interrupted, TrainingDiverged
from ctxtrain.evaluation.metrics import evaluate_logits
from ctxtrain.export.package import place_export, prepare_export
from ctxtrain.memory import SMALLER, needed_for
from ctxtrain.model import lora
from ctxtrain.model.losses import Loss
from ctxtrain.model.tokenizer import tokenizer_and_notes
from ctxtrain.progress import Reporter
from ctxtrain.reporting.report import write_report
from ctxtrain.reporting.summary import make_summary
from ctxtrain.reporting.verdict import warnings
from ctxtrain.runtime import StopRequest, catch_signals, environment, is_main_process, leave_process_group
from ctxtrain.storage import checkpoint
from ctxtrain.storage.atomic_files import write_json
from ctxtrain.storage.ownership import refuse_output
from ctxtrain.storage.run_folder import RunFolder
from ctxtrain.tracking.trackers import Trackers, tracked
from ctxtrain.training import build
from ctxtrain.training.checkpoint_parts import load_own
from ctxtrain.training.step import Ints, Learner, NonFinite, refuse_not_finite

EVALUATION_BATCH = 32


class TrainingPipeline:
    """One run of one config; several are in `multi_run.py`. The methods can be called one by one, as above."""

    learner: Learner

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = False,
        reporter: Reporter | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        self.config = build.one_run(config)
        self.inputs = inputs
        self.resume = resume
        self.reporter = reporter if reporter and is_main_process() else Reporter()
        self.folder = RunFolder(config.output_dir)
        self.checkpoints = self.folder.checkpoints(config.checkpoints.keep)
        self.state = checkpoint.TrainState()
        self.trackers = Trackers()
        self.on_disk = (0, 0)  # optimizer steps and finished epochs of the newest checkpoint
        self.stop = StopRequest()
        self.model: PeftModel | None = None
        self.optimizer: Optimizer | None = None
        self.loss_fn: Loss | None = None

    def load_data(self) -> None:
        """Read, check, balance, render and tokenise the rows. Raises DataError with the faults of all files."""
        model, training = self.config.model, self.config.training
        self.base_name = build.base_name(self.config)
        self.tokenizer, notes = tokenizer_and_notes(model.base, model.revision)
        inputs = self.inputs or build.inputs(self.config, self.reporter.say)
        self.data = load_dataset(inputs, self.tokenizer, **build.dataset_settings(self.config))
        windows = int(self.data.epoch_counts_C.sum())
        self.steps_per_epoch = steps_per_epoch(windows, training.batch_size, training.gradient_accumulation)
        self.total_steps = training.epochs * self.steps_per_epoch
        for note in notes + self.data.notes():
            self.reporter.say(f"note: {note}")

    def setup_model(self) -> None:
        """Build model, optimizer, schedule and loss. Raises ConfigError if they do not fit together."""
        self.learner = build.build_learner(
            self.config, self.tokenizer.pad_token_id, self.data.class_weights, self.total_steps, self.reporter.say
        )
        self.model, self.optimizer, self.loss_fn = self.learner.model, self.learner.optimizer, self.learner.loss_fn
        self.fingerprint = build.fingerprint(
            self.config, self.data.codec, self.data.fingerprint(), self.tokenizer, self.model
        )
        if reason := self.learner.passes.unsupported_reason:
            self.reporter.say(f"note: training takes the slower path of transformers and PEFT: {reason}")

    def run(self) -> dict[str, Any] | None:
        """The whole run; returns the summary in the first process and None in others."""
        with self._opened():
            while not self._ended():
                if self.state.step < (len(self.state.epochs) + 1) * self.steps_per_epoch:
                    self.train_epoch()
                metrics = self.evaluate()
                self.save_checkpoint(metrics)
                self._stop_if_asked()
            leave_process_group()
            self.learner.accelerator.end_training()
            return self.finish() if is_main_process() else None

    def train_epoch(self) -> float:
        """One epoch of optimizer steps, or the rest of it after a resume; returns its mean training loss."""
        training, labels_N = self.config.training, self.data.labels["train"]
        epoch, first = divmod(self.state.step, self.steps_per_epoch)
        if first == 0:
            self.state.loss_sum = self.state.weight_sum = 0.0
        # Several processes end together, after a step: within it they may have different numbers of batches.
        between = self._stop_if_asked if self.learner.accelerator.num_processes == 1 else None
        order = epoch_rows(labels_N, self.data.epoch_counts_C, training.seed, epoch)
        with self.reporter.epoch(epoch + 1, training.epochs, self.steps_per_epoch, first) as after_step:
            for step in range(first, self.steps_per_epoch):
                plan = plan_step(
                    order,
                    self.data.tokens["train"].lengths,
                    step,
                    batch_size=training.batch_size,
                    accumulation=training.gradient_accumulation,
                    process=self.learner.accelerator.process_index,
                    processes=self.learner.accelerator.num_processes,
                )
                weight = self.learner.loss_fn.weight(labels_N[plan.windows])
                place = {"step": self.state.step + 1, "epoch": epoch + 1}
                try:
                    figures = self.learner.step(self.data.tokens["train"], labels_N, plan, (epoch, step), between)
                    self.state.loss_sum += figures["loss"] * weight
                    self.state.weight_sum += weight
                    self._log({"kind": "step", **place, **figures, "windows": len(plan.windows)})
                except NonFinite as error:
                    figures = self._skip(error, place, plan.windows)
                self.state.step += 1
                after_step(figures["loss"], figures["learning_rate"], len(plan.windows))
                every = self.config.checkpoints.every_steps
                if every is not None and self.state.step % every == 0:
                    self.save_checkpoint()
                self._stop_if_asked()
        return self.state.loss_sum / self.state.weight_sum

    def evaluate(self) -> dict[str, Any]:
        """Scores on the validation rows; `loss` is the focal loss with the training's class weights.

        Raises TrainingDiverged if a logit is not finite. A signal ends it after a batch.
        """
        assert self.loss_fn is not None, "setup_model comes first"
        tokens, labels_N = self.data.tokens["val"], self.data.labels["val"]
        with self.reporter.rows("validation", len(tokens)) as advance:

            def after_batch(rows: int) -> None:
                advance(rows)
                self._stop_if_asked()

            logits_NC = self.learner.logits(tokens, EVALUATION_BATCH, after_batch)
        refuse_not_finite(logits_NC, self.data.names["val"])
        loss_sum, weight_sum = self.loss_fn.sums(logits_NC, torch.from_numpy(labels_N).to(logits_NC.device))
        return {"loss": float(loss_sum / weight_sum), **evaluate_logits(logits_NC.cpu().numpy(), labels_N)}

    def save_checkpoint(self, metrics: dict[str, Any] | None = None) -> None:
        """With the scores of an epoch, close it and write its checkpoint; without, write one within the epoch."""
        if metrics is not None:
            record = {
                "epoch": len(self.state.epochs) + 1,
                "step": self.state.step,
                "train_loss": self.state.loss_sum / self.state.weight_sum,
                **metrics,
            }
            self.state.epochs.append(record)
            self._log({"kind": "epoch", **record})
            self.reporter.epoch_done(record, best=checkpoint.ranking(self.state.epochs)[0] == record["epoch"])
        if is_main_process():
            self.folder.metrics.sync()
            payload = {
                "state": asdict(self.state) | {"metrics_sha256": self.folder.metrics.sha256},
                "learner": self.learner.state_dict(),
                "fingerprint": self.fingerprint,
                "environment": self._environment(),
            }
            if metrics is not None:
                self.checkpoints.save_epoch(payload, self.state.epochs)
            else:
                self.checkpoints.save_step(payload, self.state.step)
        self.on_disk = (self.state.step, len(self.state.epochs))
        self.learner.accelerator.wait_for_everyone()

    def load_checkpoint(self, path: Path) -> None:
        """Continue from a checkpoint; the disk stays as it is. Raises what `load_own` does."""
        payload = load_own(path, self.checkpoints, self.fingerprint, self.learner, self.steps_per_epoch)
        for change in checkpoint.differences(payload["environment"], self._environment()):
            self.reporter.say(f"note: the run goes on, but no longer bit for bit: {change}")
        self.learner.load_state_dict(payload["learner"])
        self.state = checkpoint.TrainState(**payload["state"])
        self.on_disk = (self.state.step, len(self.state.epochs))

    def export(self) -> dict[str, Any]:
        """Export the best epoch so far of a run that was started before; train nothing."""
        with self._opened(exporting=True):
            return self.finish()

    def finish(self) -> dict[str, Any]:
        """Export the best epoch in float32, as it will be used, and score that; writes and returns the summary."""
        assert self.model is not None, "setup_model comes first"
        best = checkpoint.ranking(self.state.epochs)[0]
        environment, sizes = self._environment(), lora.parameter_counts(self.model)
        device, unfinished = self.learner.accelerator.device, self._unfinished()
        tokens = {name: own for name, own in self.data.tokens.items() if name != "test" or not unfinished}
        model = self.model if build.trains_in_float32(self.config) else None
        self.model = self.optimizer = self.loss_fn = None  # make room for the model that is exported
        del self.learner
        with self.folder.scratch() as scratch:
            with self.stop.at_once():
                model = model or build.build_exact_model(self.config, self.tokenizer.pad_token_id)
                weights = checkpoint.load(self.checkpoints.epoch_path(best))["learner"]["weights"]
                lora.load_trainable_state(model, weights)
                exported = prepare_export(
                    model.to(device),
                    self.tokenizer,
                    self.data,
                    tokens,
                    **build.export_settings(self.config),
                    base_name=self.base_name,
                    caveat=" ".join(warnings(self.data.leaked, unfinished)),
                    scratch=scratch,
                )
            place_export(scratch, self.folder)  # from here on a signal changes nothing: the run is as good as done
        facts = build.model_facts(self.config, self.base_name, model.config.model_type, self.fingerprint)
        summary = make_summary(
            model=facts | sizes,
            data=self.data.summary(),
            epochs=self.state.epochs,
            best_epoch=best,
            unfinished=unfinished,
            skipped=self.state.skipped,
            exported=exported,
            environment=environment,
            folder=self.folder,
        )
        written = summary.plain()
        write_json(self.folder.summary, written)
        write_report(self.folder, summary)
        self.trackers.finished(summary, self.folder)
        return written

    @contextmanager
    def _opened(self, *, exporting: bool = False) -> Iterator[None]:
        """Own the run folder, build everything, and begin anew or where the newest checkpoint stands."""
        config, batch = self.config, self.config.training.batch_size
        refuse_output(self.folder.root, config.model.base)
        doing = f"in a run with batches of {batch} windows of at most {config.model.max_tokens} tokens"
        owned = self.folder.owned() if is_main_process() else nullcontext()
        with catch_signals() as self.stop, owned, needed_for(doing, SMALLER):
            self.folder.refuse_other_run(resume=self.resume, epochs=config.training.epochs)
            with self.stop.at_once():
                self.load_data()
                self.setup_model()
                found = self.checkpoints.resume_point(self.steps_per_epoch, self.reporter.say) if self.resume else None
                if found:
                    self.load_checkpoint(found)
            if exporting and not self.state.epochs:
                rule = "an export needs one finished epoch, this run has none. Train first."
                raise ConfigError(f"{self.folder.root}: {rule}")
            if is_main_process():
                self.folder.begin(
                    config.with_absolute_paths().to_yaml(), self.state, found, self.checkpoints, self.reporter.say
                )
            if found:
                self.reporter.resuming(found.name, self.state.step, self.total_steps, self.state.epochs)
            names = config.tracking.to if is_main_process() else []
            try:
                with tracked(
                    names, self.folder, config.model_dump(), self.state.step, self.reporter.say
                ) as self.trackers:
                    yield
            finally:
                leave_process_group()

    def _environment(self) -> dict[str, Any]:
        return {**environment(), "processes": self.learner.accelerator.num_processes}

    def _skip(self, error: NonFinite, place: dict[str, int], windows: Ints) -> dict[str, float]:
        """Leave a step out and note why; its figures. Raises TrainingDiverged if that is not allowed."""
        names, allowed = self.data.names["train"], self.config.training.skip_nonfinite
        told = f"optimizer step {place['step']} has {error.told(names, windows)}"
        epoch_untrained = self.state.weight_sum == 0 and place["step"] % self.steps_per_epoch == 0
        if end := error.why_end(self.state.skipped, allowed, epoch_untrained=epoch_untrained):
            raise TrainingDiverged(f"a step needs a finite loss and gradient, but {told}. {end}") from None
        self.learner.skip()
        self.state.skipped += 1
        found = {"why": str(error), "rows": [names[row] for row in error.rows]}
        self._log({"kind": "skip", **place, **found, "windows": len(windows)})
        self.reporter.say(f"note: {told}. It is skipped, {self.state.skipped} of {allowed} that may be")
        return error.figures

    def _ended(self) -> bool:
        return self.state.ended(self.config.training.epochs, self.config.training.patience)

    def _unfinished(self) -> str | None:
        """Where a run stopped that goes on with --resume; None at its end."""
        return None if self._ended() else f"stopped at optimizer step {self.state.step} of {self.total_steps}"

    def _stop_if_asked(self) -> None:
        """After a signal to any process, save if that is not done, and end all of them at the same step."""
        accelerator = self.learner.accelerator
        signals = torch.tensor([self.stop.signal_number], device=accelerator.device)
        number = int(accelerator.gather(signals).max())
        if number:
            if self.on_disk != (self.state.step, len(self.state.epochs)):
                self.save_checkpoint()
            place = f"stopped at optimizer step {self.state.step} of {self.total_steps}"
            raise Interrupted(number, f"{place}; continue with train --resume")

    def _log(self, record: dict[str, Any]) -> None:
        if is_main_process():
            self.folder.metrics.append(record)
        self.trackers.log(record)
