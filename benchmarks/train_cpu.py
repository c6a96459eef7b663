"""LoRA fine-tuning on a CPU: corral beside TRL's SFTTrainer, on the same rows, one process after another.

Each side trains the same adapter (rank 16 on q, k, v, o; float32) of SmolLM2-135M-Instruct on the same recipes from
Wikibooks, 8 rows a step, loss on the answers only. Speed counts real tokens (no padding) from the end of the first step to
the end of the last; memory is the peak resident size of the process. TRL runs twice: as it comes (padded batches of 4,
accumulated twice) and packed (best-fit decreasing into 1,024 tokens); the faster one is TRL's best, and the leaner one is
what memory is held against.

    python benchmarks/train_cpu.py [--steps 9] [--json FILE]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import claims

ROWS_PER_STEP = 8
PACK = 1024  # of TRL's packed form
LR = 2e-4


def prepared(folder: Path, rows: int) -> Any:
    """(model folder, tokenizer, the first `rows` training examples in step order)."""
    from corral.data.prepared import prepare
    from corral.model.loading import load_tokenizer, resolve
    from corral.progress import Progress
    from corral.recipe import Data, Source, Train
    from corral.template import Template
    from corral.training.order import Order

    base = resolve("asset:smollm2-135m-instruct").folder
    template = Template.load(load_tokenizer(base))
    data = Data(sources=(Source(path="asset:wikibooks-recipes", format="wikibooks-recipes"),), max_length=512)
    train = prepare(data, template, folder, 0, Progress()).train
    order = Order(Train(steps=rows // ROWS_PER_STEP, batch_size=ROWS_PER_STEP), train.lengths.tolist(), 0)
    return base, template.tokenizer, train, [train[i] for step in range(1, order.steps + 1) for i in order.batch(step)]


def side_corral(steps: int) -> dict[str, Any]:
    from corral.model import adapters, loading
    from corral.recipe import Lora, Optimizer, Train
    from corral.stages import PACK_LENGTHS
    from corral.training.loop import Training
    from corral.training.objectives import OBJECTIVES

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, _, train, _ = prepared(folder, steps * ROWS_PER_STEP)
        model = adapters.attach(loading.load_model(base, dtype="float32", device="cpu"), Lora(), seed=0)
        config = Train(
            steps=steps,
            batch_size=ROWS_PER_STEP,
            checkpoint_every=10**6,
            optimizer=Optimizer(lr=LR, schedule="constant", warmup_ratio=0),
        )
        training = Training(
            model,
            train,
            [],
            OBJECTIVES["sft"],
            config,
            pack_length=PACK_LENGTHS["cpu"],
            seed=0,
            folder=folder,
            save_best=lambda _: None,
        )
        log: list[tuple[float, int, float]] = []
        training.run(on_step=lambda m: log.append((time.perf_counter(), m.tokens, m.loss or 0.0)))
    seconds, tokens = log[-1][0] - log[0][0], log[-1][1] - log[0][1]
    return {"tokens_per_second": tokens / seconds, "tokens": tokens, "losses": [x[2] for x in log]}


def side_trl(steps: int, *, packed: bool) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tokenizer, _, examples = prepared(folder, steps * ROWS_PER_STEP)
        rows = [
            {"input_ids": list(s.ids), "completion_mask": [int(t) for t in s.trained]}
            for e in examples
            for s in e.sequences
        ]
        config = SFTConfig(
            output_dir=str(folder / "out"),
            num_train_epochs=1,
            per_device_train_batch_size=1 if packed else 4,
            gradient_accumulation_steps=3 if packed else 2,
            packing=packed,
            packing_strategy="bfd",
            max_length=PACK,
            completion_only_loss=True,
            learning_rate=LR,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=1.0,
            weight_decay=0.0,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        times: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append(time.perf_counter())

        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[Clock()],
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    total = sum(len(r["input_ids"]) for r in rows)
    first = total / len(times) if packed else sum(len(r["input_ids"]) for r in rows[:ROWS_PER_STEP])
    tokens = total - first
    return {"tokens_per_second": tokens / (times[-1] - times[0]), "tokens": tokens, "losses": losses}


SIDES = {
    "trl": lambda steps: side_trl(steps, packed=False),
    "trl-packed": lambda steps: side_trl(steps, packed=True),
    "corral": side_corral,
}


def measure(side: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--steps", str(steps)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    rate, memory = result["tokens_per_second"], result["peak_memory_bytes"] / 1e9
    print(f"{side:<11} {rate:7.1f} tokens/s  {memory:5.2f} GB  losses {result['losses'][:4]}", flush=True)
    return result


def main() -> int:
    parser = claims.parser(__doc__)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process and print JSON")
    args = parser.parse_args()
    if args.side:
        result = SIDES[args.side](args.steps)
        result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result))
        return 0
    sides = {side: measure(side, args.steps) for side in SIDES}
    theirs = (sides["trl"], sides["trl-packed"])
    ours = sides["corral"]
    speed = ours["tokens_per_second"] / max(s["tokens_per_second"] for s in theirs)
    memory = ours["peak_memory_bytes"] / min(s["peak_memory_bytes"] for s in theirs)
    gap = max(abs(a - b) for a, b in zip(ours["losses"], sides["trl"]["losses"], strict=True))
    found = [
        claims.Claim("train_speed_vs_trl", speed, "×", 1.7),
        claims.Claim("train_memory_vs_trl", memory, "×", 0.5, "<="),
        claims.Claim("train_loss_gap", gap, "nats", 1e-3, "<="),
    ]
    packages = ["torch", "transformers", "peft", "trl", "accelerate"]
    return claims.report(found, sides, packages, args.json)


if __name__ == "__main__":
    sys.exit(main())
