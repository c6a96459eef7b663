"""Data preparation of R1's mix at full size: 88,031 rows from ten sources, tokenised, masked and packed at 512 tokens.

The data sets cannot be shipped, so the rows are generated with their columns and similar lengths; the words are pieces of a
book of recipes (seeded), so that numbers, punctuation and rare words are as in real text. Seven are written as JSON lines,
three as parquet; those that R1 caps at 10,000 rows have a tenth more. Preparation is what `corral run` does with an empty
cache: read, format, hash, remove duplicates, select, tokenise, mask, split, compare with the held-out rows, write, then pack
the training rows. It is measured again with 300,000 rows of the same kinds. Memory is the largest sum over all processes at
one time (shared pages counted once). TRL prepares the same rows with the same template and tokenizer: the files are loaded and
formatted with `datasets`, then prepared and packed by SFTTrainer with its default settings, by one process and by two, as many
as corral uses here. The sides take turns, in two rounds, and medians are compared: processor seconds with TRL's one process,
which needs fewer than two do, and the time that passes with its two.

    python benchmarks/prepare.py [--json FILE] [--rows 88031] [--rounds 2] [--without-trl]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import claims
import numpy as np

ROWS, MANY = 88_031, 300_000
LENGTH = 512
TOKENIZER = "asset:smollm2-135m-instruct"
TEXT = "wikibooks-recipes"
PIECE = 12  # consecutive words; fewer than what counts as a passage shared with a held-out row
TEMPLATE = "instruction"
# Rows of each source in R1: the cap, or all that the data set has.
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


class TextGenerator:
    """Generates texts whose numbers of words are log-normal around a given mean, as in real texts."""

    def __init__(self, words: list[str], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._words = words
        self._starts: list[int] = []

    def words(self, mean: float, spread: float = 0.6) -> str:
        return " ".join(self.take(max(1, int(mean * np.exp(spread * self._rng.standard_normal() - spread**2 / 2)))))

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


def hotpot(text: TextGenerator, i: int) -> dict[str, Any]:
    titles = [f"{text.words(3, 0.1)} {k}" for k in range(10)]
    sentences = [[" " + text.words(22) + "." for _ in range(4)] for _ in titles]
    return {
        "id": f"{i:024x}",
        "question": text.words(17) + "?",
        "answer": text.words(2.5),
        "type": "bridge",
        "level": "medium",
        "supporting_facts": {"title": [titles[2], titles[7]], "sent_id": [0, 1]},
        "context": {"title": titles, "sentences": sentences},
    }


def hh(text: TextGenerator, _: int) -> dict[str, Any]:
    turns = [f"\n\nHuman: {text.words(20)}\n\nAssistant: {text.words(38)}" for _ in range(1 + text.draw(3))]
    shared = "".join(turns) + f"\n\nHuman: {text.words(16)}\n\nAssistant:"
    return {"chosen": f"{shared} {text.words(42)}", "rejected": f"{shared} {text.words(38)}"}


def commonsense(text: TextGenerator, i: int) -> dict[str, Any]:
    choices = {"label": list("ABCDE"), "text": [text.words(1.6) for _ in range(5)]}
    return {
        "id": f"{i:032x}",
        "question": text.words(13, 0.4) + "?",
        "question_concept": text.words(1),
        "choices": choices,
        "answerKey": "ABCDE"[text.draw(5)],
    }


def trivia(text: TextGenerator, i: int) -> dict[str, Any]:
    value = text.words(2.2)
    answer = {"aliases": [text.words(2) for _ in range(8)], "value": value, "normalized_value": value.lower()}
    empty: dict[str, list[str]] = {"title": [], "filename": []}
    return {
        "question": text.words(15) + "?",
        "question_id": f"tc_{i}",
        "question_source": "x",
        "entity_pages": empty,
        "search_results": empty,
        "answer": answer,
    }


def truthful(text: TextGenerator, _: int) -> dict[str, Any]:
    return {
        "Type": "Adversarial",
        "Category": text.words(1),
        "Question": text.words(10, 0.4) + "?",
        "Best Answer": text.words(10),
        "Correct Answers": "; ".join(text.words(9) for _ in range(3)),
        "Incorrect Answers": "; ".join(text.words(9) for _ in range(4)),
        "Source": text.words(3),
    }


def alpaca(text: TextGenerator, _: int) -> dict[str, Any]:
    row = {
        "instruction": text.words(11),
        "input": text.words(13) if text.maybe(0.4) else "",
        "output": text.words(46, 0.8),
    }
    return row | {"text": "\n".join(row.values())}


MAKE_ROW: dict[str, Callable[[TextGenerator, int], dict[str, Any]]] = {
    "alpaca": alpaca,
    "dolly": lambda text, _: {
        "instruction": text.words(12),
        "context": text.words(190, 0.8) if text.maybe(0.3) else "",
        "response": text.words(59, 0.8),
        "category": "open_qa",
    },
    "hh-rlhf": hh,
    "gsm8k": lambda text, i: {"question": text.words(46, 0.4), "answer": f"{text.words(52, 0.5)}\n#### {i}"},
    "metamathqa": lambda text, i: {
        "type": "GSM_Rephrased",
        "query": text.words(45, 0.4),
        "original_question": text.words(45, 0.4),
        "response": f"{text.words(105, 0.5)} The answer is: {i}",
    },
    "hotpot_qa": hotpot,
    "mmlu": lambda text, _: {
        "question": text.words(35, 0.9),
        "subject": "",
        "choices": [text.words(6) for _ in range(4)],
        "answer": text.draw(4),
    },
    "commonsense_qa": commonsense,
    "trivia_qa": trivia,
    "truthfulqa": truthful,
}


def write_sources(folder: Path, rows: int, words: list[str]) -> None:
    """Write the ten files, with rows in R1's proportions."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir()
    for seed, (name, count) in enumerate(SOURCES.items()):
        kept = round(count * rows / ROWS)
        available = kept + kept // 10 if count == CAP else kept
        text = TextGenerator(words, seed)
        new_rows: Iterator[dict[str, Any]] = (MAKE_ROW[name](text, i) for i in range(available))
        if name in PARQUET:
            writer = None
            while batch := [row for row, _ in zip(new_rows, range(2000), strict=False)]:
                table = pa.Table.from_pylist(batch)
                writer = writer or parquet.ParquetWriter(folder / f"{name}.parquet", table.schema)
                writer.write_table(table)
            assert writer is not None
            writer.close()
        else:
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in new_rows)


def running_text() -> list[str]:
    """The words of a book of recipes in their order, with numbers, punctuation and capitals."""
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
    from corral.model.loading import load_template, resolve_model
    from corral.progress import Progress
    from corral.recipe import Data

    class Times(Progress):
        def __init__(self) -> None:
            self.began: list[tuple[str, float]] = []

        def start(self, title: str, total: int | None) -> None:
            self.began.append((title, time.perf_counter()))

    template = load_template(resolve_model(TOKENIZER).folder, TEMPLATE)
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


def side_trl(folder: Path, rows: int, processes: int | None = None) -> dict[str, Any]:
    from importlib import resources

    from datasets import concatenate_datasets, disable_progress_bars, load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from corral.data.formats import choose_format
    from corral.model.loading import load_tokenizer, resolve_model

    disable_progress_bars()
    tokenizer = load_tokenizer(resolve_model(TOKENIZER).folder)
    tokenizer.chat_template = (resources.files("corral.template") / "shipped" / f"{TEMPLATE}.jinja").read_text("utf-8")
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
            names = chosen.column_names
            records = chosen.map(lambda row, f=to_record: f(row).to_json(), remove_columns=names, num_proc=processes)
            parts.append(records)
        formatted = time.perf_counter()
        config = SFTConfig(
            output_dir=out,
            max_length=LENGTH,
            packing=True,
            assistant_only_loss=True,
            use_cpu=True,
            report_to=[],
            dataset_num_proc=processes,
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


SIDES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "corral": side_corral,
    "trl": side_trl,
    "trl-2-processes": partial(side_trl, processes=2),
}


def processor_seconds() -> float:
    """CPU time of this process and its children, imports included."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def run_side(side: str, folder: Path, rows: int) -> dict[str, Any]:
    """Run one side in a process of its own. Returns its figures, with the peak memory of it and its children in MB."""
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
    print(
        f"{side}, {rows:,} rows: {figures['seconds']:.1f} s, {figures['processor_seconds']:.1f} processor seconds, "
        f"{figures['peak_mb']:,.0f} MB",
        flush=True,
    )
    return figures


def tree_memory(pid: int) -> int:
    """Memory of a process and its children in bytes: proportional set sizes, so that shared pages count once."""
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
    options.add_argument(
        "--rows", type=int, default=ROWS, help="number of rows; fewer for a quick look, in the same proportions"
    )
    options.add_argument("--without-trl", action="store_true", help="leave out TRL")
    options.add_argument("--rounds", type=int, default=2, help="how often each side is measured")
    options.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args.folder, args.rows)))
        return 0
    many = round(args.rows * MANY / ROWS)
    with tempfile.TemporaryDirectory() as name:
        words = running_text()
        for rows in (args.rows, many):
            write_sources(Path(name) / str(rows), rows, words)
        sides = [side for side in SIDES if side == "corral" or not args.without_trl]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                runs[side].append(run_side(side, Path(name) / str(args.rows), args.rows))
        large = run_side("corral", Path(name) / str(many), many)

    def middle(side: str, figure: str) -> float:
        return statistics.median(run[figure] for run in runs[side])

    linearity = (large["seconds"] / many) / (middle("corral", "seconds") / args.rows)
    growth = large["peak_mb"] / middle("corral", "peak_mb")
    results = [
        claims.Claim("prepare_seconds_88031", middle("corral", "seconds"), "s", 90, "<="),
        claims.Claim("prepare_peak_mb", large["peak_mb"], "MB, all processes", 1500, "<="),
        claims.Claim("prepare_peak_growth_300k", growth, "× the peak of 88,031 rows", 1.1, "<="),
        claims.Claim("prepare_linearity_300k", linearity, "× the time of a row", 1.2, "<="),
    ]
    if not args.without_trl:
        processor = middle("corral", "processor_seconds") / middle("trl", "processor_seconds")
        wall = middle("trl-2-processes", "seconds") / middle("corral", "seconds")
        results.append(claims.Claim("prepare_processor_vs_trl", processor, "× TRL's processor seconds", 0.6, "<="))
        results.append(claims.Claim("prepare_speed_vs_trl_2_processes", wall, "×", 1.3))
    raw = {"rows": args.rows, "many": many, "corral_many": large, **runs}
    packages = ["numpy", "tokenizers", "transformers", "datasets", "pyarrow", "trl"]
    return claims.report(results, raw, packages, args.json)


if __name__ == "__main__":
    sys.exit(main())
