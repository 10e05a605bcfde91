"""A VIDTrainer's run in a process of its own: to be killed and resumed."""

import sys
from pathlib import Path

import torch
from _hf import bert, distil

STATE = "trainer_state.json"  # what the Trainer writes last of a checkpoint


def main() -> None:
    output = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    trainer = distil(
        output, bert(), max_steps=60, save_strategy="steps", save_steps=4, save_total_limit=4
    )
    trainer.train(resume_from_checkpoint=any(output.glob(f"checkpoint-*/{STATE}")))
    logs = [
        {key: value for key, value in entry.items() if not key.startswith("train_")}  # times
        for entry in trainer.state.log_history
    ]
    state = trainer.model.state_dict()
    heads = trainer.distiller.state_dict()
    torch.save({"student": state, "heads": heads, "history": logs}, output / "end-0.pt")


if __name__ == "__main__":
    main()
