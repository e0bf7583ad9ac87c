"""Steps of a Trainer with a memory: skipped, refused, logged, and never half done."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import AutocastKwargs
from transformers import Trainer, TrainerCallback

from engram_store.errors import ConfigError, InputError, NonFiniteGradientError
from engram_store_client import attach
from engram_store_client.trainer import EngramCallback
from engram_store_client.trainer.logs import KEYS
from tests.unit.client.tiny import LAYERS, llama, make_session
from tests.unit.trainer_runs import (
    arguments,
    attached,
    callback_of,
    make_store,
    make_trainer,
    rows_of,
    series,
    tables_of,
    weights_of,
)


def poison(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan


class At(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step: int, do: Any) -> None:
        self._step, self._do = step, do

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            self._do()


def test_a_loss_that_is_not_a_number_is_one_error(tmp_path: Path) -> None:
    """It names the step; neither tables nor dense weights were changed by it."""
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store, mode="full")
        head = memory.model.get_submodule("lm_head").weight
        assert isinstance(head, torch.Tensor)
        states: dict[str, Any] = {}

        def spoil() -> None:
            memory.finish_commit()
            poison(head)
            states["before"] = tables_of(store), weights_of(memory.model)

        trainer = make_trainer(memory, arguments(tmp_path), more_callbacks=[At(2, spoil)])
        with pytest.raises(NonFiniteGradientError, match="NaN") as caught:
            trainer.train()

        assert "before optimiser step 3" in caught.value.__notes__[0]
        tables, weights = states["before"]
        assert tables_of(store) == tables
        for name, tensor in weights_of(memory.model).items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0, equal_nan=True)
        assert memory.step == 2


def test_dense_gradients_that_are_not_finite_are_refused_too(tmp_path: Path) -> None:
    """Although those of the tables are finite: they would be multiplied by NaN."""
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store, mode="full")
        embedding = memory.model.get_submodule("model.embed_tokens").weight
        assert isinstance(embedding, torch.Tensor)
        embedding.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]
        before = tables_of(store)
        with pytest.raises(InputError, match=r"NaN or infinity\. Training stopped"):
            make_trainer(memory, arguments(tmp_path)).train()
        assert tables_of(store) == before


def test_a_store_may_leave_rows_out_whose_gradient_is_not_finite(tmp_path: Path) -> None:
    """With `on_nonfinite="skip"`; they count neither in the norm nor in the step, and are told."""
    with make_store(tmp_path / "a.engram", on_nonfinite="skip") as store:
        memory = attached(store)
        windows: Any = memory.reader.windows
        lookup = windows.lookup

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            spoiled = gradient.clone()
            spoiled[0, 0] = torch.nan
            return spoiled

        def spoiled(window: Any, layer: int, *more: Any) -> torch.Tensor:
            rows: torch.Tensor = lookup(window, layer, *more)
            if rows.requires_grad:
                rows.register_hook(spoil)  # type: ignore[no-untyped-call]
            return rows

        windows.lookup = spoiled
        before = tables_of(store)
        trainer = make_trainer(
            memory, arguments(tmp_path, max_steps=2), callbacks=[memory.callback(wait=True)]
        )
        trainer.train()

        assert tables_of(store) != before
        assert min(series(trainer, "engram/skipped_rows")) > 0
        assert np.isfinite(series(trainer, "grad_norm")).all()


def scale_the_loss(patch: pytest.MonkeyPatch, trainer: Trainer, scale: float) -> None:
    """fp16 without a GPU, which Accelerate asks for: its loss scaler, and fp32 arithmetic."""
    accelerator: Any = trainer.accelerator
    patch.setattr(accelerator.state, "_mixed_precision", "fp16")
    accelerator.native_amp = True
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)


def test_a_scaled_loss_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are powers of two, so everything is as it is without: nearly the same bits."""
    results = []
    for scale in (None, 1024.0):
        with make_store(tmp_path / f"{scale}.engram") as store:
            memory = attached(store, mode="full")
            optimizer = torch.optim.SGD(memory.model.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
            trainer = make_trainer(
                memory,
                arguments(tmp_path / str(scale), max_grad_norm=0.3, max_steps=4),
                optimizers=(optimizer, schedule),
            )
            if scale is not None:
                scale_the_loss(monkeypatch, trainer, scale)
            trainer.train()
            results.append(
                (
                    {n: rows_of(store, n).copy() for n in LAYERS},
                    weights_of(memory.model),
                    series(trainer, "loss"),
                    series(trainer, "grad_norm"),
                )
            )
    for number in LAYERS:
        np.testing.assert_allclose(results[0][0][number], results[1][0][number], rtol=0, atol=1e-7)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=0, atol=1e-7)
    np.testing.assert_allclose(results[0][2], results[1][2], rtol=1e-6)
    np.testing.assert_allclose(results[0][3], results[1][3], rtol=1e-6)


@pytest.mark.parametrize("where", ["tables", "dense"])
def test_an_overflow_anywhere_skips_the_whole_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Of table gradients alone, or of dense gradients alone."""
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store, mode="full")
        optimizer = torch.optim.SGD(memory.model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer = make_trainer(
            memory,
            arguments(tmp_path / "run", max_grad_norm=0.3, max_steps=3),
            optimizers=(optimizer, schedule),
        )
        scale_the_loss(monkeypatch, trainer, 8.0)
        states = []

        class Look(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                memory.finish_commit()
                states.append((tables_of(store), weights_of(memory.model)))

        overflow = [True]

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.inf if overflow.pop() else gradient

        class Arm(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                overflow[:] = [state.global_step == 1]

        if where == "dense":
            weight = memory.model.get_submodule("model.norm").weight
            assert isinstance(weight, torch.Tensor)
            weight.register_hook(spoil)  # type: ignore[no-untyped-call]
        else:
            windows: Any = memory.reader.windows
            lookup = windows.lookup

            def spoiled(window: Any, layer: int, *more: Any) -> torch.Tensor:
                rows: torch.Tensor = lookup(window, layer, *more)
                if layer == LAYERS[0] and rows.requires_grad:
                    rows.register_hook(spoil)  # type: ignore[no-untyped-call]
                return rows

            windows.lookup = spoiled
        for callback in (Look(), Arm()):
            trainer.add_callback(callback)
        trainer.train()

        assert states[1][0] == states[0][0] != states[2][0]
        assert all(torch.equal(t, states[0][1][n]) for n, t in states[1][1].items())
        assert series(trainer, "engram/skipped_steps") == [0.0, 1.0, 0.0]
        assert memory.step == 3


def test_logs_tell_what_the_store_did(tmp_path: Path) -> None:
    """Every key, in the history and for reporters; shares of rows add up to one."""
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store)
        args = arguments(tmp_path, logging_steps=2, learning_rate=0.1, max_steps=4)
        trainer = make_trainer(memory, args)
        trainer.callback_handler.callbacks.insert(0, Reporter())
        callback_of(trainer).put_first(trainer)
        trainer.train()

    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [{k: v for k, v in log.items() if k.startswith("engram/")} for log in logs] == [
        {k: v for k, v in log.items() if k.startswith("engram/")} for log in seen if "loss" in log
    ]
    for log in logs:
        assert set(KEYS) <= log.keys()
        shares = [log[f"engram/{name}"] for name in ("hits_overlay", "hits_page", "cold")]
        assert sum(shares) == pytest.approx(1.0)
        assert 0 < log["engram/grad_norm"] < log["grad_norm"]
        assert log["engram/learning_rate"] == pytest.approx(5 * log["learning_rate"])
        assert log["engram/stale_rows"] == 0


def test_the_control_arm_trains_with_a_trainer(tmp_path: Path) -> None:
    """Its tables stay as they are, and nobody is told that they were not clipped."""
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store, zero_table=True)
        before = tables_of(store)
        make_trainer(memory, arguments(tmp_path / "run", max_steps=2)).train()
        assert tables_of(store) == before
        assert memory.step == 2


def test_a_fixed_rate_takes_the_schedules_place(tmp_path: Path) -> None:
    """And a rate of zero leaves the tables alone."""
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store)
        before = tables_of(store)
        trainer = make_trainer(
            memory,
            arguments(tmp_path / "run", max_steps=2),
            callbacks=[memory.callback(learning_rate=0.0, wait=True)],
        )
        trainer.train()
        assert tables_of(store) == before
        assert series(trainer, "engram/learning_rate") == [0.0, 0.0]
        with pytest.raises(ConfigError, match="learning_rate_factor"):
            memory.callback(learning_rate_factor=-1.0)
        with pytest.raises(ConfigError, match="learning_rate must"):
            memory.callback(learning_rate=float("nan"))


def test_a_trainer_of_another_model_is_refused(tmp_path: Path) -> None:
    """Nothing is left in either model."""
    memory = attach(llama(), make_session())
    trainer = make_trainer(memory, arguments(tmp_path))
    trainer.model = trainer.model_wrapped = llama()

    with pytest.raises(ConfigError, match="another model"):
        trainer.train()

    assert not any("clipping" in name for name, _ in memory.model.named_modules())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"deepspeed": {"stage": 2}}, "DeepSpeed"),
        ({"fsdp": True}, "FSDP"),
        ({"_n_gpu": 2}, "DataParallel"),
        ({"is_hyper_param_search": True}, "hyperparameter"),
    ],
)
def test_ways_of_training_that_leave_tables_out_are_refused(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    """Before the first step."""
    memory = attach(llama(), make_session())
    trainer = make_trainer(memory, arguments(tmp_path))
    for name, value in changes.items():
        of = trainer.state if name.startswith("is_") else trainer.args
        object.__setattr__(of, name, value)

    with pytest.raises(ConfigError, match=match):
        callback_of(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_trainer_that_clips_in_another_way_is_reported(tmp_path: Path) -> None:
    """Once; tables train on, unclipped."""
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store)
        trainer: Any = make_trainer(memory, arguments(tmp_path, max_steps=2))
        gates = list(memory.gates.parameters())
        clip = torch.nn.utils.clip_grad_norm_
        trainer._clip_grad_norm = lambda _: clip(gates, 1.0)
        trainer._get_grad_norm = lambda _, grad_norm: grad_norm

        with pytest.warns(RuntimeWarning, match="not clipped"):
            trainer.train()

        assert memory.step == 2


def test_two_memories_train_with_one_trainer(tmp_path: Path) -> None:
    """Both are clipped by the same coefficient, logged and saved apart; both are resumed."""
    with make_store(tmp_path / "a.engram") as one, make_store(tmp_path / "b.engram") as two:
        first = attached(one)
        second = attach(first.model, two, name="second")
        with torch.no_grad():
            for parameter in second.gates.parameters():
                parameter.fill_(0.3)
        args = arguments(
            tmp_path / "run", max_steps=4, max_grad_norm=0.2, save_strategy="steps", save_steps=2
        )
        callbacks = [first.callback(), second.callback()]
        trainer = make_trainer(first, args, callbacks=callbacks)
        trainer.train()
        final = tables_of(one), tables_of(two)

        assert first.step == second.step == 4
        for ours, other, both in zip(
            series(trainer, "engram/grad_norm"),
            series(trainer, "engram/second/grad_norm"),
            series(trainer, "grad_norm"),
            strict=True,
        ):
            assert 0 < np.hypot(ours, other) < both
        for name in ("announced_again", "second/announced_again"):
            assert sum(series(trainer, f"engram/{name}")) == 0
        kept = tmp_path / "run" / "checkpoint-2"
        assert (kept / "engram").is_dir()
        assert (kept / "engram-second").is_dir()

        callbacks = [first.callback(), second.callback()]
        trainer = make_trainer(first, args, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=str(kept))
        assert (tables_of(one), tables_of(two)) == final


def test_every_log_key_and_option_is_documented() -> None:
    """In docs/training.md."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    options = list(inspect.signature(EngramCallback).parameters)[1:]
    names = [key.removeprefix("engram/") for key in KEYS] + options
    assert [name for name in names if f"`{name}`" not in text] == []
