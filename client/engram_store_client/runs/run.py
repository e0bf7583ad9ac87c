"""One training run, from its settings to its last checkpoint."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engram_store.errors import ConfigError
from engram_store.session import Session
from engram_store_client.huggingface import attach
from engram_store_client.planning import Plan, TableShape, check_fits, fitting_text, tables_of
from engram_store_client.runs import data, models, plans, stores
from engram_store_client.runs.settings import RunSettings

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from engram_store_client.memory import Memory

Tell = Callable[[str], None]
"""Gets a line for people."""
_GATES = "engram"
"""Directory of a memory in a checkpoint, and of the result."""


def run(settings: RunSettings, tell: Tell, *, check_only: bool = False) -> None:
    """Train what a file describes; its plan is told first.

    Args:
        settings: the file's content.
        tell: gets the plan and what happens.
        check_only: stop after the plan.

    Raises:
        ConfigError: something in the file cannot be, or the run cannot fit.
        What the store and the Trainer raise.
    """
    args = plans.training_arguments(settings)
    if args.process_index:  # one of several ranks speaks

        def tell(_: str) -> None:
            return None

    directory = stores.store_directory(settings.store)
    if directory is not None and args.world_size > 1:
        raise ConfigError(
            f"{args.world_size} ranks cannot open {directory} each; serve it by `engram-store "
            "serve` and give its address as store.path"
        )
    with ExitStack() as open_until_the_end:
        session = None
        if directory is None:
            session = open_until_the_end.enter_context(stores.open_store(settings.store, None))
            tables = tables_of(session.recipe, session.tables)
        else:
            tables = stores.wanted_tables(directory, settings.store)
        plan = plans.plan_of(settings, args, tables, directory)
        _tell_plan(plan, settings, tell)
        if check_only:
            return
        resume = resume_directory(settings, args)
        tokenizer = models.load_tokenizer(settings.model)
        if session is None:
            assert directory is not None
            if tables.stored is None:
                _make(directory, tables, settings, tokenizer, tell)
            session = stores.open_store(settings.store, plan, tell)
            open_until_the_end.enter_context(session)
        train(settings, args, tokenizer, session, resume, tell)


def _tell_plan(plan: Plan, settings: RunSettings, tell: Tell) -> None:
    """Raises: ConfigError: it does not fit, and that counts."""
    tell(str(plan))
    if plan.fits:
        return
    if settings.limits.enforce:
        check_fits(plan)
    tell(fitting_text(plan))
    tell("limits.enforce is false: it starts all the same.")


def _make(
    directory: Path, tables: TableShape, settings: RunSettings, tokenizer: Any, tell: Tell
) -> None:
    """Make the store that the file describes."""
    create = settings.store.create
    assert create is not None
    tell(f"Making {directory}")
    stores.make_store(directory, tables, create, tokenizer, settings.seed)


def train(
    settings: RunSettings,
    args: "TrainingArguments",
    tokenizer: Any,
    session: Session,
    resume: Path | None,
    tell: Tell,
) -> None:
    """Train with an open store. Raises: as `run`."""
    from transformers import Trainer

    train_data = data.load_dataset(settings.data.train, settings.data, tokenizer)
    held_out = None
    if settings.data.validation:
        held_out = data.load_dataset(settings.data.validation, settings.data, tokenizer)
    model = _model(settings, args)
    torch.manual_seed(settings.seed)
    memory = _attach(model, session, settings, tokenizer)
    tell(f"{len(train_data):,} sequences; step {session.step:,} of the store is next")
    collate = (
        data.collate_packed if settings.data.packing else data.PaddedLines(tokenizer.pad_token_id)
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=memory.collator(collate),
        callbacks=[
            memory.callback(
                learning_rate_factor=settings.memory.learning_rate_factor, resume_from=resume
            )
        ],
    )
    if resume is not None:
        tell(f"Going on from {resume}")
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if held_out is not None:
        loss = trainer.evaluate()["eval_loss"]
        tell(f"Held out: loss {loss:.4f}")
    if args.process_index == 0:
        _save(memory, model, Path(str(args.output_dir)), lora=settings.lora is not None, tell=tell)
    trainer.accelerator.wait_for_everyone()


def _model(settings: RunSettings, args: "TrainingArguments") -> nn.Module:
    model = models.load_model(settings.model, args.device, settings.seed)
    if settings.lora is None:
        return model
    adapted: nn.Module = models.add_lora(
        model,
        settings.lora,
        quantised=settings.model.quantization != "none",
        checkpointing=plans.checkpointing_of(args),
    )
    return adapted


def _attach(model: nn.Module, session: Session, settings: RunSettings, tokenizer: Any) -> "Memory":
    chosen = settings.memory
    options: dict[str, Any] = {"identity_init": True} if chosen.identity_init else {}
    return attach(
        model,
        session,
        mode=settings.mode,
        layers=chosen.layers,
        gate=chosen.gate,
        zero_table=chosen.zero_table,
        dtype=None if chosen.dtype is None else getattr(torch, chosen.dtype),
        tokenizer=tokenizer,
        **options,
    )


def _save(memory: "Memory", model: Any, output: Path, *, lora: bool, tell: Tell) -> None:
    """What was trained, without the base: gates with a snapshot's name, and LoRA."""
    memory.save_pretrained(output / _GATES)
    told = f"Gates and the tables' snapshot are in {output / _GATES}"
    if lora:
        model.save_pretrained(output / "lora")
        told += f", LoRA in {output / 'lora'}"
    tell(told)


def resume_directory(settings: RunSettings, args: "TrainingArguments") -> Path | None:
    """The checkpoint to go on from; None: begin. Raises: ConfigError."""
    if settings.resume == "never":
        return None
    if settings.resume != "auto":
        chosen = Path(settings.resume)
        if not _complete(chosen):
            raise ConfigError(
                f"resume names {chosen}, which is no complete checkpoint of a run with tables; "
                "give a directory checkpoint-STEP of output_dir, or auto, or never"
            )
        return chosen
    found = Path(str(args.output_dir)).glob("checkpoint-*")
    complete = [path for path in found if path.name[11:].isdecimal() and _complete(path)]
    return max(complete, key=lambda path: int(path.name[11:]), default=None)


def _complete(directory: Path) -> bool:
    """The memory's part is written last, and its directory appears whole."""
    from engram_store_client import checkpoint

    saved = directory / _GATES / checkpoint.DENSE_FILE
    return saved.is_file() and (directory / "trainer_state.json").is_file()
