"""A training loop of ten lines, without a Trainer.

Run it:

    python plain_loop.py          # a toy model, on this machine's GPU or CPU
    python plain_loop.py --toy    # the same, with fewer steps
"""

import sys
import tempfile
from pathlib import Path

import torch
from ingredients import TOY, own_text, own_tokenizer, sequences, to_device
from torch.utils.data import DataLoader
from transformers import Qwen3ForCausalLM

import engram_store
import engram_store_client as engram
from engram_store.recipes import compress_vocabulary


def main(directory: Path, steps: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokenizer = own_tokenizer(own_text())
    data = sequences(tokenizer, own_text(), time=64)[: 8 * steps]
    loader = DataLoader(data, batch_size=8)
    model = Qwen3ForCausalLM(TOY).to(device)

    recipe = engram_store.recipes.engram(
        token_map=compress_vocabulary(tokenizer), layers=[0, 1], rows_per_head=5_000, pad_id=0
    )
    engram_store.create(directory / "my.engram", recipe, dim=8)
    with engram.connect(directory / "my.engram") as session:
        memory = engram.attach(model, session, mode="full")
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model.train()

        for step, batch in enumerate(memory.look_ahead(loader)):
            loss = model(**to_device(batch, device)).loss
            loss.backward()
            memory.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            memory.commit(step, lr=5 * 3e-3)
            if step % 5 == 0 or step == steps - 1:
                print(f"step {step}: loss {loss.item():.3f}")

        memory.save_pretrained(directory / "checkpoint")  # gates, and the name of a snapshot


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name), steps=12 if "--toy" in sys.argv else 60)
