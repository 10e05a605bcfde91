"""What the runs of the two Hugging Face examples have in common."""

import torch
from transformers import Trainer, TrainingArguments


def arguments(folder: str, *, steps: int, learning_rate: float, seed: int) -> TrainingArguments:
    """Returns the settings of a run; its data and model are all else that there is."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=learning_rate,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=seed,
    )


def accuracy(trainer: Trainer) -> float:
    """Returns the percentage of the eval set that is classified right."""
    prediction = trainer.predict(trainer.eval_dataset)
    return 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
