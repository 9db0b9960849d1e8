"""Hugging Face's Trainer, recorded, then trained with the plan that the recording leads to.

    python examples/huggingface_trainer.py --steps 60

A tiny BERT learns whether a word is in a sentence. Trained under bf16=True by the Trainer as it
is, with a callback; asked what fp16 would do; trained again with a plan that was tried on the model. Needs
`pip install "precscope[hf]"`; nothing is downloaded. Seconds on two CPU cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import precscope as ps
from precscope.integrations.transformers import RecordCallback, train_with_plan

LENGTH, WORD = 16, 7


def sentences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 40, (count, LENGTH), generator=generator)
    words[torch.rand(words.shape, generator=generator) < 0.02] = WORD
    there = (words == WORD).any(1).long()
    return [{"input_ids": row, "labels": label} for row, label in zip(words, there, strict=True)]


def make_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=LENGTH, **sizes))


def make_trainer(folder: Path, steps: int, callbacks=(), **precision) -> Trainer:
    args = TrainingArguments(
        str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=32, gradient_accumulation_steps=2,
        learning_rate=3e-3, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, log_level="error", **precision,
    )  # fmt: skip
    trainer = Trainer(make_model(), args, train_dataset=sentences(4096, 0), eval_dataset=sentences(512, 1),
                      compute_metrics=accuracy, callbacks=list(callbacks))  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = make_trainer(folder, steps, [RecordCallback(folder / "run", every=10, shadow_every=20)], bf16=True)
        trainer.train()
        profile = ps.Profile.load(folder / "run")
        worst = profile.ask("fp16", roles=["grad_output"]).sort_values("flushed").iloc[-1]
        print(f"recorded {profile.run['recorded_steps']} of {steps} optimizer steps, in {profile.run['precision']}")
        print(f"fp16 without a loss scale: {worst.flushed:.1%} of the gradients at {worst.module} would be flushed")
        print(f"bf16=True        accuracy {trainer.evaluate()['eval_accuracy']:.3f}")

        batches = [default_data_collator(sentences(32, seed)) for seed in range(2, 4)]
        task = ps.Task(model=make_model(), loss=lambda model, batch: model(**batch).loss, batches=batches)
        plan = ps.recommend(profile, formats=("bf16", "fp32"), task=task)
        trainer = make_trainer(folder, steps)
        train_with_plan(trainer, plan)
        kinds = ", ".join(f"{count} modules {word}" for word, count in sorted(plan.counts(
            n for n, _ in trainer.model.named_modules()).items()))  # fmt: skip
        print(f"with the plan    accuracy {trainer.evaluate()['eval_accuracy']:.3f}   ({kinds}; {plan.status})")


if __name__ == "__main__":
    main()
