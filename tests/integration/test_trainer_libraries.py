"""A memory in the trainers and models of trl, peft and bitsandbytes, and a store process."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

import engram_store
from engram_store.recipes import compress_vocabulary, engram
from engram_store.store import Store
from engram_store_client import attach, connect
from tests.servers import serving
from tests.unit.client.tiny import LAYERS, VOCABULARY, llama, scramble
from tests.unit.trainer_runs import (
    arguments,
    attached,
    make_store,
    make_trainer,
    series,
    tables_of,
    weights_of,
)


class Power(TrainerCallback):
    """Goes out after three steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def library(name: str) -> Any:
    """An optional package. Skips the test, with the reason, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported here: {error}")


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of as many words as the tiny models know."""
    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))]
    plain = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)  # type: ignore[no-untyped-call]
    tokenizer.pad_token, tokenizer.eos_token = names[:2]
    return tokenizer


def store_of_words(path: Path) -> Store:
    made = engram(
        token_map=compress_vocabulary(words()), layers=LAYERS, rows_per_head=101, heads=2, pad_id=0
    )
    initial = engram_store.Normal(std=0.5, seed=3)
    engram_store.create(path, made, dim=4, dtype="float32", optimizer="sgd", initial=initial)
    return engram_store.open(path, "train")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # trl's
@pytest.mark.parametrize("packed", [False, True])
def test_trl_trains_a_memory(tmp_path: Path, *, packed: bool) -> None:
    """SFTTrainer with its own collator, and the callback alone; packed and not."""
    trl, datasets = library("trl"), library("datasets")
    draw = np.random.default_rng(2)
    texts = [" ".join(f"w{i}" for i in draw.integers(2, VOCABULARY, 10)) for _ in range(12)]
    with store_of_words(tmp_path / "a.engram") as store:
        memory = attach(llama(), store, mode="full")
        scramble(memory)
        before = tables_of(store)
        args = trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            max_steps=3,
            max_length=16,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            packing=packed,
            packing_strategy="wrapped",
            save_strategy="steps",
            save_steps=3,
        )
        trainer = trl.SFTTrainer(
            model=memory.model,
            args=args,
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=words(),
            callbacks=[memory.callback()],
        )
        trainer.train()

        assert memory.step == 3
        assert tables_of(store) != before
        assert sum(series(trainer, "engram/announced_again")) == 0
        assert (tmp_path / "run" / "checkpoint-3" / "engram").is_dir()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_lora_beside_a_memory_resumes_bit_for_bit(tmp_path: Path) -> None:
    """peft saves its adapter alone: the gates come back from the memory's own directory."""
    peft = library("peft")

    def model() -> nn.Module:
        torch.manual_seed(4)
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
        wrapped: nn.Module = peft.get_peft_model(llama(), config)
        return wrapped

    results = []
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.3}
    for name in ("whole", "broken"):
        with make_store(tmp_path / f"{name}.engram", "adam") as store:
            memory = attached(store, model(), mode="preserve_trainable")
            where = arguments(tmp_path / name, **args)
            if name == "broken":
                trainer = make_trainer(memory, where, more_callbacks=[Power()])
                with pytest.raises(KeyboardInterrupt):
                    trainer.train()
                memory.detach()
                memory = attached(store, model(), mode="preserve_trainable")
            trainer = make_trainer(memory, where)
            trainer.train(resume_from_checkpoint=name == "broken")
            results.append((tables_of(store), series(trainer, "loss"), weights_of(memory.model)))
    whole, broken = results
    assert broken[:2] == whole[:2]
    assert all(torch.equal(tensor, whole[2][key]) for key, tensor in broken[2].items())


def quantised(bits: int) -> nn.Module:
    """A tiny model whose projections bitsandbytes holds in 8 or 4 bits."""
    bitsandbytes = library("bitsandbytes")
    model = llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            size = (module.in_features, module.out_features)
            if bits == 8:
                smaller = bitsandbytes.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
            else:
                smaller = bitsandbytes.nn.Linear4bit(*size, bias=False, quant_type="nf4")
            smaller.load_state_dict(module.state_dict())
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, smaller.requires_grad_(False))
    return model.to("cpu")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_trains_a_memory(tmp_path: Path, bits: int) -> None:
    """The base stays as it is; gradients go through it to gates and tables."""
    model = quantised(bits)
    try:
        with torch.no_grad():
            model(torch.ones(1, 4, dtype=torch.int64))
    except Exception as error:
        pytest.skip(f"bitsandbytes cannot compute with {bits} bits here: {error}")
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store, model, mode="engram_only")
        before = tables_of(store)
        trainer = make_trainer(memory, arguments(tmp_path / "run", max_steps=3, learning_rate=0.2))
        trainer.train()
        assert tables_of(store) != before
        assert memory.step == 3
        assert np.isfinite(series(trainer, "loss")).all()
        assert min(series(trainer, "engram/grad_norm")) > 0


def test_a_store_process_trains_and_resumes_the_same(tmp_path: Path) -> None:
    """Through a socket: tables, gates and losses, workers and pins included."""
    args: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "dataloader_num_workers": 1,
        "gradient_accumulation_steps": 2,
    }
    with make_store(tmp_path / "a.engram") as store:
        memory = attached(store)
        trainer = make_trainer(memory, arguments(tmp_path / "whole", **args))
        trainer.train()
        expected = tables_of(store), series(trainer, "loss")

    with (
        make_store(tmp_path / "b.engram") as store,
        tempfile.TemporaryDirectory() as short,
        serving(store, f"unix:{short}/store.sock") as address,
    ):
        with connect(address) as session:
            memory = attached(session)
            trainer = make_trainer(
                memory, arguments(tmp_path / "run", **args), more_callbacks=[Power()]
            )
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        with connect(address) as session:
            memory = attached(session)
            trainer = make_trainer(memory, arguments(tmp_path / "run", **args))
            trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
            assert (tables_of(store), series(trainer, "loss")) == expected
        pins = [i.step for i in engram_store.snapshots.describe(store.path) if i.pins]
        assert pins == [4]
