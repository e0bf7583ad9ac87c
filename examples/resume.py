"""Training that can be killed at any moment and goes on when it is started again.

    python resume.py --out run     # kill it, start it again: it goes on from its last checkpoint
    python resume.py --out run --toy [--die-after 3]

Tables, gates and optimiser end up with the bits of a run that nobody disturbed: the last line is
the same.
"""

import argparse
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from ingredients import TOY, own_text, own_tokenizer, sequences
from torch.utils.data import default_collate
from transformers import Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import engram_store
import engram_store_client as engram
from engram_store.recipes import compress_vocabulary


class Die(TrainerCallback):
    """Ends the process as kill -9 would, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, _args, state, _control, **_) -> None:
        if state.global_step == self.step:
            os._exit(9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--die-after", type=int, default=0, metavar="STEP")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    steps = 6 if options.toy else 200

    tokenizer = own_tokenizer(own_text())
    data = sequences(tokenizer, own_text(), time=64)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(TOY)
    store = options.out / "my.engram"
    if not store.exists():
        recipe = engram_store.recipes.engram(
            token_map=compress_vocabulary(tokenizer), layers=[0, 1], rows_per_head=2_000, pad_id=0
        )
        engram_store.create(store, recipe, dim=8)

    with engram.connect(store) as session:
        memory = engram.attach(model, session)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(options.out / "checkpoints"),
                max_steps=steps,
                save_steps=max(steps // 10, 2),
                save_total_limit=2,
                logging_steps=1 if options.toy else 10,
                learning_rate=3e-3,
                disable_tqdm=True,
                report_to="none",
            ),
            train_dataset=data,
            data_collator=memory.collator(default_collate),
            callbacks=[memory.callback(), Die(options.die_after)],
        )
        last = options.out / "checkpoints"
        newest = get_last_checkpoint(str(last)) if last.exists() else None
        print(f"from {newest or 'the beginning'}", flush=True)
        # The tables go back to the snapshot that the checkpoint names, then forward again.
        trainer.train(resume_from_checkpoint=newest)

        digest = hashlib.sha256()
        for layer, table in session.tables.items():
            digest.update(session.read_rows(layer, np.arange(table.rows, dtype=np.int32)))
        for parameter in memory.gates.parameters():
            digest.update(parameter.detach().cpu().numpy())
        print(f"step {session.step}, bits {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
