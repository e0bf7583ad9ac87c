"""A callback that trains the tables in step with a Trainer: no subclass, no change of its code."""
# ruff: noqa: ARG002 - a Trainer calls every event with all of its arguments

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from engram_store.errors import ConfigError, InputError
from engram_store_client.ids import DEFAULT_NAME
from engram_store_client.rates import TABLE_LR_FACTOR
from engram_store_client.trainer.ahead import LoaderAhead
from engram_store_client.trainer.checkpoints import Checkpoints
from engram_store_client.trainer.clipping import Clipped, TableClipping, mark_overflow
from engram_store_client.trainer.collator import TrainingBatches, arrivals_of
from engram_store_client.trainer.logs import Moment, describe
from engram_store_client.windows import checked_accumulation

if TYPE_CHECKING:
    from engram_store_client.memory import Memory


class EngramCallback(TrainerCallback):
    """Commits, clips, logs and saves a memory with a Trainer. `Memory.callback` makes it.

    * Every optimiser step is a commit, with the rate of the scheduler times a factor. A step that
      the loss scaler skips is skipped for the tables too.
    * `max_grad_norm` holds for dense and table gradients together, with one coefficient; the
      Trainer's `grad_norm` is the norm of both.
    * Checkpoints of the Trainer get a directory `engram`: the gates, and which snapshot belongs to
      them. Resuming goes back to it, and so does `load_best_model_at_end`.
    * `Memory.collator` is not needed, but for batches that are only read: the batches that a
      Trainer trains are announced by whichever collator makes them.

    Args:
        memory: attached to the Trainer's model, or to a part of it.
        learning_rate_factor: table learning rate / what the Trainer logs as `learning_rate`.
        learning_rate: a fixed table learning rate instead.
        eps, betas: see `Memory.commit`.
        look_ahead: batches taken from the Trainer's loader beyond the one that Accelerate holds,
            so that rows are fetched earlier. In a resumed epoch it is that one alone.
        wait: whether each commit is waited for. Without, rows of the next step are handed out
            while the rest is still being applied; results are the same bits.
        resume_from: the checkpoint that the Trainer is going to resume from, where that is not in
            its `output_dir`.

    Raises:
        ConfigError: a rate, a factor or a depth that makes no sense.
    """

    def __init__(
        self,
        memory: "Memory",
        *,
        learning_rate_factor: float = TABLE_LR_FACTOR,
        learning_rate: float | None = None,
        eps: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        look_ahead: int = 2,
        wait: bool = False,
        resume_from: Path | str | None = None,
    ) -> None:
        for name, rate in (
            ("learning_rate_factor", learning_rate_factor),
            ("learning_rate", learning_rate or 0.0),
        ):
            if not 0 <= rate < float("inf"):
                raise ConfigError(f"{name} must be finite and not negative, got {rate}")
        checked_accumulation(1, look_ahead)
        self._look_ahead = look_ahead
        self._memory, self._windows = memory, memory.reader.windows
        self._factor, self._fixed_rate = learning_rate_factor, learning_rate
        self._eps, self._betas, self._wait = eps, betas, wait
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._arrivals = arrivals_of(memory)
        self._clipping: TableClipping | None = None
        self._checkpoints: Checkpoints | None = None
        self._clipped = Clipped(0.0, None, 1.0)
        self._rate = 0.0
        self._steps = self._skipped = 0
        self._before: Moment | None = None
        self._warned = False

    # ------------------------------------------------------------------ begin and end

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Go back to the checkpoint, if there is one, and take part from now on.

        Raises:
            ConfigError: the Trainer trains in a way in which tables cannot take part, or another
                model.
            StoreNotFoundError, SnapshotMismatchError, ConfigError: the checkpoint has no tables,
                or not this store's. Neither tables nor gates were changed.
        """
        _check_supported(args, state)
        self._stop()
        self._clipping = TableClipping(
            self._memory.name,
            self._windows,
            self._memory.model,
            _gradients_complete,
        )
        if model is not None and not self._clipping.belongs_to(model):
            self._stop()
            raise ConfigError(
                "the memory is attached to another model than the Trainer trains: attach to the "
                "model that the Trainer gets, or to a part of it"
            )
        run = Path(args.output_dir or ".")
        self._checkpoints = Checkpoints(self._memory, run, self._resume_from)
        self._windows.close_all()
        if state.global_step > 0:
            try:
                self._checkpoints.resume(state, args.resume_from_checkpoint)
            except BaseException:
                self._stop()
                raise
        self._arrivals.accumulate = args.gradient_accumulation_steps
        self._arrivals.in_order = getattr(args, "dataloader_in_order", True)
        self._arrivals.inside_trainer = self._take_over(train_dataloader)
        self._before = self._now()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Finish the last commit; with `load_best_model_at_end` go back to the best checkpoint.

        Raises: a commit that failed; as `on_train_begin`, if the best checkpoint has no tables.
        """
        try:
            self._windows.finish_commit()
            best = state.best_model_checkpoint
            if args.load_best_model_at_end and best is not None and self._checkpoints is not None:
                self._checkpoints.load(Path(best))
        finally:
            self._stop()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The loader begins again."""
        self._arrivals.begin_epoch()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Give back what was announced and is not needed any more."""
        self._arrivals.drop()

    def _stop(self) -> None:
        if self._clipping is not None:
            self._clipping.remove()
        self._clipping = None
        self._arrivals.drop()
        self._arrivals.inside_trainer = False

    def _take_over(self, loader: Any) -> bool:
        """Mark a loader's batches as trained. Returns: whether that was possible."""
        outer = getattr(loader, "base_dataloader", loader)
        inner = outer.loader if isinstance(outer, LoaderAhead) else outer  # of another memory
        collate = getattr(inner, "collate_fn", None)
        if not callable(collate):
            return False
        if not _deals_out(loader):
            inner.collate_fn = TrainingBatches(self._memory, collate)
            if outer is inner is not loader and self._look_ahead:
                loader.base_dataloader = LoaderAhead(inner, self._look_ahead)
        return True

    # ------------------------------------------------------------------ a step

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """The first forward pass of a step is about to begin."""
        assert self._clipping is not None
        self._clipping.begin(getattr(optimizer, "scaler", None), _advice(state))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Gradients were clipped; the tables' share is applied with the commit.

        Raises:
            NonFiniteGradientError, InputError: NaN or infinity. Neither dense weights nor tables
                were changed.
        """
        assert self._clipping is not None
        clipped = self._clipped = self._clipping.end()
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            if clipped.norm == float("inf"):
                mark_overflow(optimizer, scaler)
        elif clipped.coefficient is not None and not 0.0 < clipped.coefficient <= 1.0:
            raise InputError(f"the gradients hold NaN or infinity. {_advice(state)}")
        if clipped.coefficient is None and args.max_grad_norm > 0 and not self._memory.zero_table:
            self._warn_unclipped()
        self._windows.clip_scale = 1.0 if clipped.coefficient is None else clipped.coefficient
        self._rate = _rate_of(optimizer, self._factor, self._fixed_rate)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Commit, or skip what the optimiser skipped.

        Raises: what `Memory.commit` raises, or the commit before, if it failed in the background.
        """
        step = self._memory.step
        self._steps += 1
        if getattr(optimizer, "step_was_skipped", False):
            self._memory.skip(step)
            self._skipped += 1
            return
        self._memory.commit(
            step,
            self._rate,
            gradient_scale=1.0 / self._clipped.loss_scale,
            eps=self._eps,
            betas=self._betas,
            wait=self._wait,
        )

    def _warn_unclipped(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "max_grad_norm is set, but the Trainer did not clip model.parameters(): the "
                "gradients of the tables are not clipped",
                RuntimeWarning,
                stacklevel=3,
            )

    # ------------------------------------------------------------------ beside the steps

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluation is over; training batches that wait stay announced."""
        self._arrivals.drop(training=False)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save gates and a snapshot in the checkpoint's directory, and pin the snapshot.

        Raises: what `Memory.save_pretrained` raises.
        """
        if state.is_world_process_zero and self._checkpoints is not None:
            self._checkpoints.save(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add what the store did since the last log to a log of training, under `engram/...`.

        Of a memory with a name of its own under `engram/NAME/...`.
        """
        if logs is None or "loss" not in logs or self._before is None:
            return
        now = self._now()
        added = describe(self._before, now)
        added["engram/grad_norm"] = self._clipped.norm
        added["engram/learning_rate"] = self._rate
        self._before = now
        if self._memory.name != DEFAULT_NAME:
            prefix = f"engram/{self._memory.name}/"
            added = {key.replace("engram/", prefix): value for key, value in added.items()}
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)

    def put_first(self, trainer: Any) -> None:
        """Let this callback speak before those that report to TensorBoard, W&B and others.

        A Trainer asks its own reporters first; they would not see what is added to a log.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def _now(self) -> Moment:
        return Moment(
            self._memory.session.stats(),
            self._steps,
            self._windows.announced_again,
            self._skipped,
        )


def _check_supported(args: TrainingArguments, state: TrainerState) -> None:
    """Refuse ways of training in which nobody would notice that tables do not take part."""
    for name, what in (("deepspeed", "DeepSpeed"), ("fsdp", "FSDP")):
        if getattr(args, name, None):
            raise ConfigError(
                f"{what} keeps gradients to itself, so tables cannot be clipped and committed with "
                "them; train on one GPU, or with torchrun and DDP"
            )
    if args.n_gpu > 1:
        raise ConfigError(
            f"nn.DataParallel over {args.n_gpu} GPUs copies the model for each batch, and hooks do "
            "not work in the copies; use torchrun, or CUDA_VISIBLE_DEVICES with one GPU"
        )
    if state.is_hyper_param_search:
        raise ConfigError(
            "a hyperparameter search would train the same tables in every trial; run each trial as "
            "a training of its own, on an exported store"
        )


def _gradients_complete() -> bool:
    """Whether the backward pass of a step's last micro-batch is the one that was last begun."""
    from accelerate.state import GradientState

    return bool(GradientState().sync_gradients)


def _deals_out(loader: Any) -> bool:
    """Whether one rank makes the batches of all, tickets and all: those would not be its own."""
    from accelerate.data_loader import DataLoaderDispatcher

    return isinstance(loader, DataLoaderDispatcher) and loader.state.num_processes > 1


def _rate_of(optimizer: Any, factor: float, fixed: float | None) -> float:
    """The tables' learning rate: a multiple of what the Trainer logs, or fixed."""
    if fixed is not None:
        return fixed
    groups: list[Mapping[str, Any]] = optimizer.param_groups
    return float(groups[0]["lr"]) * factor


def _advice(state: TrainerState) -> str:
    return (
        f"Training stopped before optimiser step {state.global_step + 1}: neither dense weights "
        "nor tables were changed. The loss was probably NaN: look at the last batches, lower "
        "learning_rate, or set max_grad_norm; resume from the last checkpoint"
    )
