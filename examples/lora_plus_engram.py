"""LoRA and Engram together: adapters change how the base reads, tables hold what it should know.

    python lora_plus_engram.py          # a toy model, all three arms
    python lora_plus_engram.py --toy    # the same, with fewer steps

Trains LoRA alone, Engram alone, and both, from the same random base on the same text, and prints
the loss on text that was held out. (A random base makes the figures meaningless; the code is what
to look at.)
"""

import sys
import tempfile
from pathlib import Path

import torch
from ingredients import TOY, own_text, own_tokenizer, sequences
from peft import LoraConfig, get_peft_model
from torch.utils.data import default_collate
from transformers import Qwen3ForCausalLM, Trainer, TrainingArguments

import engram_store
import engram_store_client as engram
from engram_store.recipes import compress_vocabulary


def main(directory: Path, steps: int) -> None:
    tokenizer = own_tokenizer(own_text())
    data = sequences(tokenizer, own_text(), time=64)
    train, held_out = data[:-32], data[-32:]

    def trainer(model: torch.nn.Module, collator, callbacks) -> Trainer:
        return Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(directory / "run"),
                max_steps=steps,
                per_device_train_batch_size=8,
                learning_rate=3e-3,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collator,
            callbacks=callbacks,
        )

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return Qwen3ForCausalLM(TOY)

    def with_lora(model: torch.nn.Module) -> torch.nn.Module:
        return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))

    def store(name: str) -> Path:
        recipe = engram_store.recipes.engram(
            token_map=compress_vocabulary(tokenizer), layers=[0, 1], rows_per_head=5_000, pad_id=0
        )
        engram_store.create(directory / name, recipe, dim=8, optimizer="adam")
        return directory / name

    lora = trainer(with_lora(base()), default_collate, [])
    lora.train()
    print(f"LoRA             {lora.evaluate()['eval_loss']:.4f}")

    for title, model, mode in (
        ("Engram", base(), "engram_only"),
        ("LoRA and Engram", with_lora(base()), "preserve_trainable"),
    ):
        with engram.connect(store(title)) as session:
            memory = engram.attach(model, session, mode=mode)
            both = trainer(model, memory.collator(default_collate), [memory.callback()])
            both.train()
            print(f"{title:16} {both.evaluate()['eval_loss']:.4f}")
            memory.save_pretrained(directory / "engram")  # the gates; LoRA has its own


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name), steps=3 if "--toy" in sys.argv else 60)
