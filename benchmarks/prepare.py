"""Preparing R1's mix at its full size: 88,031 rows from ten sources, tokenised, masked and packed at 512 tokens.

The rows have the true columns of the ten data sets and lengths like theirs, as the data sets themselves cannot be shipped;
their words are pieces of a book of recipes (seeded), so that numbers, punctuation and rare words are as in real text.
Seven are written as JSON lines, three as parquet; those that R1 caps at 10,000 rows hold a tenth more. Preparation is what
`corral run` does, with nothing in its cache: read, format, hash, remove copies, choose, tokenise, mask, split, compare with
the held-out rows, write, then pack the training rows. It is measured again with 300,000 rows of the same kinds. Memory is
the largest sum over all processes at one time (pages that processes share counted once). Beside it TRL prepares the same
rows with the same template and tokenizer: the files loaded and formatted with `datasets`, then SFTTrainer's own preparation,
packed, as it comes.

    python benchmarks/prepare.py [--json FILE] [--rows 88031] [--without-trl]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import claims
import numpy as np

ROWS, MANY = 88_031, 300_000
LENGTH = 512
TOKENIZER = "asset:smollm2-135m-instruct"
TEXT = "wikibooks-recipes"
PIECE = 12  # words that stay together: less than counts as a passage shared with a held-out row
TEMPLATE = "instruction"
# Rows of each source in R1; a number that is no cap is all there are.
SOURCES = {
    "alpaca": 10_000,
    "dolly": 10_000,
    "hh-rlhf": 10_000,
    "gsm8k": 7_473,
    "metamathqa": 10_000,
    "hotpot_qa": 10_000,
    "mmlu": 10_000,
    "commonsense_qa": 9_741,
    "trivia_qa": 10_000,
    "truthfulqa": 817,
}
CAP = 10_000
PARQUET = {"metamathqa", "hotpot_qa", "mmlu"}


class Speaker:
    """Texts of given lengths, in words, around which they vary as texts do (log-normal)."""

    def __init__(self, words: list[str], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._words = words
        self._starts: list[int] = []

    def say(self, words: float, spread: float = 0.6) -> str:
        return " ".join(self.take(max(1, int(words * np.exp(spread * self._rng.standard_normal() - spread**2 / 2)))))

    def take(self, count: int) -> list[str]:
        taken: list[str] = []
        while len(taken) < count:
            if not self._starts:
                self._starts = self._rng.integers(len(self._words) - PIECE, size=100_000).tolist()
            start = self._starts.pop()
            taken += self._words[start : start + min(PIECE, count - len(taken))]
        return taken

    def draw(self, below: int) -> int:
        return int(self._rng.integers(below))

    def maybe(self, share: float) -> bool:
        return bool(self._rng.random() < share)


def hotpot(say: Speaker, i: int) -> dict[str, Any]:
    titles = [f"{say.say(3, 0.1)} {k}" for k in range(10)]
    sentences = [[" " + say.say(22) + "." for _ in range(4)] for _ in titles]
    return {
        "id": f"{i:024x}",
        "question": say.say(17) + "?",
        "answer": say.say(2.5),
        "type": "bridge",
        "level": "medium",
        "supporting_facts": {"title": [titles[2], titles[7]], "sent_id": [0, 1]},
        "context": {"title": titles, "sentences": sentences},
    }


def hh(say: Speaker, _: int) -> dict[str, Any]:
    turns = [f"\n\nHuman: {say.say(20)}\n\nAssistant: {say.say(38)}" for _ in range(1 + say.draw(3))]
    shared = "".join(turns) + f"\n\nHuman: {say.say(16)}\n\nAssistant:"
    return {"chosen": f"{shared} {say.say(42)}", "rejected": f"{shared} {say.say(38)}"}


def commonsense(say: Speaker, i: int) -> dict[str, Any]:
    choices = {"label": list("ABCDE"), "text": [say.say(1.6) for _ in range(5)]}
    return {
        "id": f"{i:032x}",
        "question": say.say(13, 0.4) + "?",
        "question_concept": say.say(1),
        "choices": choices,
        "answerKey": "ABCDE"[say.draw(5)],
    }


def trivia(say: Speaker, i: int) -> dict[str, Any]:
    value = say.say(2.2)
    answer = {"aliases": [say.say(2) for _ in range(8)], "value": value, "normalized_value": value.lower()}
    empty: dict[str, list[str]] = {"title": [], "filename": []}
    return {
        "question": say.say(15) + "?",
        "question_id": f"tc_{i}",
        "question_source": "x",
        "entity_pages": empty,
        "search_results": empty,
        "answer": answer,
    }


def truthful(say: Speaker, _: int) -> dict[str, Any]:
    return {
        "Type": "Adversarial",
        "Category": say.say(1),
        "Question": say.say(10, 0.4) + "?",
        "Best Answer": say.say(10),
        "Correct Answers": "; ".join(say.say(9) for _ in range(3)),
        "Incorrect Answers": "; ".join(say.say(9) for _ in range(4)),
        "Source": say.say(3),
    }


def alpaca(say: Speaker, _: int) -> dict[str, Any]:
    row = {"instruction": say.say(11), "input": say.say(13) if say.maybe(0.4) else "", "output": say.say(46, 0.8)}
    return row | {"text": "\n".join(row.values())}


ROW: dict[str, Callable[[Speaker, int], dict[str, Any]]] = {
    "alpaca": alpaca,
    "dolly": lambda say, _: {
        "instruction": say.say(12),
        "context": say.say(190, 0.8) if say.maybe(0.3) else "",
        "response": say.say(59, 0.8),
        "category": "open_qa",
    },
    "hh-rlhf": hh,
    "gsm8k": lambda say, i: {"question": say.say(46, 0.4), "answer": f"{say.say(52, 0.5)}\n#### {i}"},
    "metamathqa": lambda say, i: {
        "type": "GSM_Rephrased",
        "query": say.say(45, 0.4),
        "original_question": say.say(45, 0.4),
        "response": f"{say.say(105, 0.5)} The answer is: {i}",
    },
    "hotpot_qa": hotpot,
    "mmlu": lambda say, _: {
        "question": say.say(35, 0.9),
        "subject": "",
        "choices": [say.say(6) for _ in range(4)],
        "answer": say.draw(4),
    },
    "commonsense_qa": commonsense,
    "trivia_qa": trivia,
    "truthfulqa": truthful,
}


def write_sources(folder: Path, rows: int, words: list[str]) -> None:
    """The ten files, with rows in R1's proportions."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir()
    for seed, (name, count) in enumerate(SOURCES.items()):
        kept = round(count * rows / ROWS)
        there = kept + kept // 10 if count == CAP else kept
        say = Speaker(words, seed)
        made: Iterator[dict[str, Any]] = (ROW[name](say, i) for i in range(there))
        if name in PARQUET:
            writer = None
            while batch := [row for row, _ in zip(made, range(2000), strict=False)]:
                table = pa.Table.from_pylist(batch)
                writer = writer or parquet.ParquetWriter(folder / f"{name}.parquet", table.schema)
                writer.write_table(table)
            assert writer is not None
            writer.close()
        else:
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in made)


def running_text() -> list[str]:
    """The words of a book of recipes as they stand, with their numbers, punctuation and capitals."""
    from corral.assets import fetch

    recipes: dict[str, dict[str, Any]] = json.loads(fetch(TEXT).files[0].read_text("utf-8"))
    texts = [
        text for recipe in recipes.values() for text in (recipe["title"], *recipe["ingredients"], *recipe["steps"])
    ]
    return [word for text in texts for word in text.split()]


def sources_of(folder: Path, rows: int) -> list[Any]:
    from corral.recipe import Source

    cap = round(CAP * rows / ROWS)
    names = [(name, folder / f"{name}.{'parquet' if name in PARQUET else 'jsonl'}") for name in SOURCES]
    return [Source(path=str(path), name=name, format=name, rows=cap) for name, path in names]


def side_corral(folder: Path, rows: int) -> dict[str, Any]:
    from corral.data.packing import pack_sequences
    from corral.data.prepare import prepare
    from corral.model.loading import load_tokenizer, resolve_model
    from corral.progress import Progress
    from corral.recipe import Data
    from corral.template import Template

    class Times(Progress):
        def __init__(self) -> None:
            self.began: list[tuple[str, float]] = []

        def start(self, title: str, total: int | None) -> None:
            self.began.append((title, time.perf_counter()))

    template = Template.load(load_tokenizer(resolve_model(TOKENIZER).folder), TEMPLATE)
    data = Data(sources=tuple(sources_of(folder, rows)), max_length=LENGTH, split={"validation": 0, "test": 800})
    times = Times()
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        (Path(out) / "stage").mkdir()
        began = time.perf_counter()
        prepared = prepare(data, template, Path(out) / "stage", 1, times, cache=Path(out) / "cache")
        times.start("Packing", None)
        packed = pack_sequences(prepared.train.lengths.tolist(), LENGTH)
        ended = time.perf_counter()
        ledger = prepared.ledger
        ends = [at for _, at in times.began[1:]] + [ended]
        return {
            "seconds": ended - began,
            "processor_seconds": processor_seconds(),
            "parts": {title: end - at for (title, at), end in zip(times.began, ends, strict=True)},
            "rows": sum(ledger["fates"].values()) - ledger["fates"]["not sampled"],
            "fates": ledger["fates"],
            "tokens": int(prepared.train.lengths.sum()),
            "packs": len(packed),
        }


def side_trl(folder: Path, rows: int) -> dict[str, Any]:
    from importlib import resources

    from datasets import concatenate_datasets, disable_progress_bars, load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from corral.data.formats import choose_format
    from corral.model.loading import load_tokenizer, resolve_model

    disable_progress_bars()
    tokenizer = load_tokenizer(resolve_model(TOKENIZER).folder)
    tokenizer.chat_template = (resources.files("corral.templates") / f"{TEMPLATE}.jinja").read_text("utf-8")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small))
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        began = time.perf_counter()
        parts = []
        for source in sources_of(folder, rows):
            kind = "parquet" if source.path.endswith(".parquet") else "json"
            loaded = load_dataset(kind, data_files=source.path, split="train", cache_dir=f"{out}/cache")
            chosen = loaded.shuffle(seed=1).select(range(min(source.rows, len(loaded))))
            to_record = choose_format(source, loaded.select(range(min(1000, len(loaded)))).to_list()).to_record
            parts.append(chosen.map(lambda row, f=to_record: f(row).to_json(), remove_columns=chosen.column_names))
        formatted = time.perf_counter()
        config = SFTConfig(
            output_dir=out, max_length=LENGTH, packing=True, assistant_only_loss=True, use_cpu=True, report_to=[]
        )
        trainer = SFTTrainer(model, config, train_dataset=concatenate_datasets(parts), processing_class=tokenizer)
        ended = time.perf_counter()
        dataset: Any = trainer.train_dataset
        return {
            "seconds": ended - began,
            "processor_seconds": processor_seconds(),
            "parts": {"load and format": formatted - began, "SFTTrainer": ended - formatted},
            "packs": len(dataset),
        }


def processor_seconds() -> float:
    """Of this process and its children, imports included: what the clock would say on one core with nothing else to do."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measured(side: str, folder: Path, rows: int) -> dict[str, Any]:
    """One side in a process of its own, with the most memory that it and its children held at one time, in MB."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--rows", str(rows)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], tree_memory(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{side} failed with {process.returncode}")
    figures = json.loads(output.splitlines()[-1]) | {"peak_mb": peak[0] / 1e6}
    print(f"{side}, {rows:,} rows: {figures['seconds']:.1f} s, {figures['peak_mb']:,.0f} MB", flush=True)
    return figures


def tree_memory(pid: int) -> int:
    """Bytes of a process and its children: proportional set sizes, so that shared pages count once."""
    total = 0
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, ProcessLookupError):
            continue
    return total


def main() -> int:
    options = claims.parser(__doc__)
    options.add_argument("--rows", type=int, default=ROWS, help="for a quick look: fewer rows in the same proportions")
    options.add_argument("--without-trl", action="store_true", help="leave out TRL")
    options.add_argument("--side", choices=("corral", "trl"), help="(how it calls itself)")
    options.add_argument("--folder", type=Path, help="(how it calls itself)")
    args = options.parse_args()
    if args.side:
        print(json.dumps({"corral": side_corral, "trl": side_trl}[args.side](args.folder, args.rows)))
        return 0
    many = round(args.rows * MANY / ROWS)
    with tempfile.TemporaryDirectory() as name:
        words = running_text()
        for rows in (args.rows, many):
            write_sources(Path(name) / str(rows), rows, words)
        one = measured("corral", Path(name) / str(args.rows), args.rows)
        large = measured("corral", Path(name) / str(many), many)
        trl = None if args.without_trl else measured("trl", Path(name) / str(args.rows), args.rows)
    linearity = (large["seconds"] / many) / (one["seconds"] / args.rows)
    found = [
        claims.Claim("prepare_seconds_88031", one["seconds"], "s", 90, "<="),
        claims.Claim("prepare_peak_mb", max(one["peak_mb"], large["peak_mb"]), "MB, all processes", 1500, "<="),
        claims.Claim("prepare_linearity_300k", linearity, "× the time of a row", 1.2, "<="),
    ]
    if trl is not None:
        found.append(claims.Claim("prepare_speed_vs_trl", trl["seconds"] / one["seconds"], "×", 1.0))
    raw = {"rows": args.rows, "many": many, "corral": one, "corral_many": large, "trl": trl}
    packages = ["numpy", "tokenizers", "transformers", "datasets", "pyarrow", "trl"]
    return claims.report(found, raw, packages, args.json)


if __name__ == "__main__":
    sys.exit(main())
