"""Train a 4B model on one card of 24 GB, with four Engram layers of 2.5 GB each on disk.

    python train_4b_24gb.py --model Qwen/Qwen3-4B --text corpus.txt
    python train_4b_24gb.py --text corpus.txt              # Qwen3-4B's sizes, random weights
    python train_4b_24gb.py --plan-only --vram 16GB        # what it takes, and what would fit
    python train_4b_24gb.py --toy                          # everything tiny, in seconds, on a CPU

The base is frozen; `--lora 16` trains adapters of it too.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from ingredients import CHECKPOINTING, QWEN3_4B, TOY, own_text, own_tokenizer, sequences
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import engram_store
import engram_store_client as engram
from engram_store.recipes import compress_vocabulary
from engram_store_client.planning import (
    Limits,
    Setup,
    TableShape,
    fitting_text,
    make_plan,
    model_of_config,
    parse_size,
)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a directory or a name; without: random weights")
    parser.add_argument("--text", type=Path, help="a text file; without: what comes with Python")
    parser.add_argument("--out", type=Path, default=Path("run-4b"), help="store and checkpoints")
    parser.add_argument("--lora", type=int, default=0, help="its rank; 0: none")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--time", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--vram", default="24GB")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--toy", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = options()
    cuda = torch.cuda.is_available()
    config = AutoConfig.from_pretrained(args.model) if args.model else TOY if args.toy else QWEN3_4B
    tables = TableShape(layers=(1, 9, 17, 25), rows_per_head=1_220_000, dim=64)  # 2.5 GB each
    if args.toy:
        tables = TableShape(layers=(0, 1), rows_per_head=2_000, dim=8)
        args.batch, args.time, args.steps = 2, 64, 3

    # 1. What it takes, before anything is made.
    setup = Setup(
        model=model_of_config(config.to_dict()),
        tables=tables,
        mode="preserve_trainable" if args.lora else "engram_only",
        lora_rank=args.lora,
        batch=args.batch,
        time=args.time,
        steps=args.steps,
        accumulate=8,
        checkpointing=True,
        device="cpu" if args.toy and not cuda else "cuda",
    )
    limits = Limits.of_machine(args.out)
    plan = make_plan(setup, replace(limits, vram=parse_size(args.vram)))
    print(plan, flush=True)
    if not plan.fits:
        raise SystemExit(fitting_text(plan))
    if args.plan_only:
        return

    # 2. Text, tokenizer, base.
    text = args.text.read_text() if args.text else own_text()
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else own_tokenizer(text)
    data = sequences(tokenizer, text, args.time)
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        if args.model:
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if args.lora:
        model = get_peft_model(model, LoraConfig(r=args.lora, target_modules="all-linear"))

    # 3. The tables: made once, zeros take no disk until they are trained.
    store = args.out / "tables.engram"
    if not store.exists():
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        recipe = tables.make_recipe(
            token_map=compress_vocabulary(tokenizer),
            pad_id=end if pad is None else pad,
            vocabulary=len(tokenizer),
            eos_id=end,
        )
        engram_store.create(store, recipe, dim=tables.dim)

    # 4. Train.
    with engram.connect(store) as session:
        memory = engram.attach(model, session, mode=setup.mode, tokenizer=tokenizer)
        memory.print_trainable_parameters()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(args.out / "checkpoints"),
                per_device_train_batch_size=args.batch,
                gradient_accumulation_steps=setup.accumulate,
                **CHECKPOINTING,
                max_steps=args.steps,
                learning_rate=4e-4,
                lr_scheduler_type="cosine",
                warmup_steps=min(100, args.steps // 10),
                logging_steps=max(args.steps // 100, 1),
                save_steps=max(args.steps // 4, 2),
                save_total_limit=setup.checkpoints - 1,
                report_to="none",
            ),
            train_dataset=data,
            data_collator=memory.collator(torch.utils.data.default_collate),
            callbacks=[memory.callback(learning_rate_factor=5.0)],
        )
        trainer.train()
        memory.save_pretrained(args.out / "engram")
        print(memory.guards())


if __name__ == "__main__":
    main()
