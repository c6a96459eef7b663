"""The command line: parses arguments, calls the library and prints results.

Exit codes: 0 done, those of `errors`, 128 + N stopped by signal N (130 for Ctrl-C). Results go to standard output,
progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import corral
from corral.cli import cache_commands, document_commands, model_commands, run_commands, serve_commands
from corral.engines.base import CHAT_SAMPLING
from corral.errors import CorralError, MissingExtraError, OutOfMemoryError, out_of_memory_reason

Command = Callable[[argparse.Namespace], dict[str, Any] | None]

_METHODS = ("none", "rouge-l", "cosine", "majority", "rouge-l+math")
_MODELS = "a run directory, a model or exported folder, a .gguf file, asset:NAME or hub:OWNER/NAME"


def positive_int(text: str) -> int:
    """An argument that is a whole number from 1. Raises: ValueError."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


positive_int.__name__ = "positive integer"  # the name in argparse's error message


def local_path(text: str) -> str:
    """An argument that is a file or folder of this machine. Raises: ArgumentTypeError (it is an address)."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is an address, and results are written to this machine: give a path, then copy the result there"
        )
    return text


class _VerbParser(argparse.ArgumentParser):
    """The parser of one verb. `fill` adds arguments when it is first used, as what declares them may be slow to import."""

    fill: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(*args, **options)


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    from corral.engines.registry import ENGINE_NAMES
    from corral.export_forms import EXPORT_TYPES

    root = argparse.ArgumentParser(
        prog="corral",
        description="From your data to a served model with one recipe file, checked at each step.",
        epilog="start with: corral init my.toml   or, in a clone: corral run recipes/quickstart.toml",
    )
    root.add_argument("--version", action="version", version=f"corral {corral.__version__}")
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_VerbParser)

    def verb(name: str, call: Command, example: str, *, settings: bool = False, as_json: bool = True) -> Any:
        summary = (call.__doc__ or "").strip()
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example: {example}",
        )
        sub.set_defaults(call=call)
        if settings:
            help_ = "override a setting of the recipe, e.g. train.0.steps=20; can be repeated"
            sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_)
        if as_json:
            sub.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
        return sub

    engine_help = "the engine that computes answers (default: the best one for this machine)"

    def add_answer_options(sub: Any, **defaults: float) -> None:
        def default(name: str) -> str:
            otherwise = f", otherwise {defaults[name]:g}" if name in defaults else ""
            return f"(default: [answer] of the run's recipe{otherwise})"

        sub.add_argument(
            "--consensus", choices=_METHODS, help=f"sample several answers and vote {default('consensus')}"
        )
        sub.add_argument("--n", type=positive_int, help=f"answers sampled for a vote {default('n')}")
        sub.add_argument("--shots", type=int, help=f"solved examples shown before the question {default('shots')}")
        figures: tuple[tuple[str, Any, str], ...] = (
            ("max_tokens", positive_int, "the most tokens of an answer"),
            ("temperature", float, "0 always takes the most likely token"),
            ("top_p", float, "sample from the most likely tokens that reach this probability"),
        )
        for name, kind, what in figures:
            flag = f"--{name.replace('_', '-')}"
            sub.add_argument(flag, type=kind, help=f"{what} {default(name)}")
        sub.add_argument("--engine", choices=ENGINE_NAMES, help=engine_help)
        url = "an endpoint that serves the model and computes in place of this machine; can be repeated"
        sub.add_argument("--url", action="append", default=[], help=url)

    sub = verb("init", run_commands.init, "corral init my.toml")
    sub.add_argument(
        "path", nargs="?", type=local_path, default="recipe.toml", help="the file to write (default: recipe.toml)"
    )
    sub = verb(
        "run",
        run_commands.run,
        "corral run recipes/quickstart.toml --set train.0.steps=20 --out runs/short",
        settings=True,
    )
    sub.add_argument("recipe", help="a recipe file")
    sub.add_argument("--out", type=local_path, help="the run directory (default: runs/NAME, or runs/NAME-small)")
    small = "try the recipe in minutes: with the starter model, a few made-up rows for each source and a few steps"
    sub.add_argument("--small", action="store_true", help=small)
    redo = "run this stage again in any case, and what depends on it; can be repeated"
    sub.add_argument("--redo", action="append", default=[], metavar="STAGE", help=redo)
    profile = "profile some training steps: prints a table and writes a trace to the stage's folder"
    sub.add_argument("--profile", action="store_true", help=profile)
    sub = verb("plan", run_commands.plan, "corral plan recipes/quickstart.toml --device t4", settings=True)
    sub.add_argument("recipe", help="a recipe file")
    sub.add_argument(
        "--device", choices=("t4", "24g", "a100-80g", "h100", "h200"), help="estimate for this device instead"
    )
    sub.add_argument("--out", type=local_path, help="the run directory that is planned (default: as for run)")
    sub.add_argument("--small", action="store_true", help="plan the small form of the recipe (run --small)")
    sub = verb(
        "inspect",
        run_commands.inspect,
        "corral inspect recipes/quickstart.toml --rows 3 --html rows.html",
        settings=True,
    )
    sub.add_argument("recipe", help="a recipe file")
    sub.add_argument("--rows", type=int, default=2, help="rows to show of each split and outcome (default: 2)")
    sub.add_argument("--html", type=local_path, metavar="FILE", help="also write an HTML page")
    sub = verb(
        "evaluate", run_commands.evaluate, "corral evaluate runs/quickstart --set evaluate.loss_rows=500", settings=True
    )
    sub.add_argument("run", help="a run directory")
    test = "rows to evaluate on as they are, in place of the run's test rows: sets evaluate.test.path"
    sub.add_argument("--test", metavar="FILE", help=test)
    sub = verb("compare", run_commands.compare, "corral compare runs/short runs/quickstart")
    sub.add_argument("a", help="a run directory, or RUN:VARIANT (default: the tuned model)")
    sub.add_argument("b", help="the other one; differences are a − b")
    sub = verb("report", run_commands.report, "corral report runs/quickstart")
    sub.add_argument("run", help="a run directory")
    sub = verb("rows", document_commands.rows, "corral rows policies/ --out rows.jsonl")
    documents = "files and folders of .txt, .md, .html, .pdf, .docx or .jsonl, s3://BUCKET/KEY or asset:NAME"
    sub.add_argument("documents", nargs="+", metavar="DOCUMENTS", help=documents)
    sub.add_argument("--out", type=local_path, required=True, help="the .jsonl file to write")
    columns = "the columns of .jsonl rows that hold the text (default: text)"
    sub.add_argument("--columns", nargs="+", default=["text"], metavar="COLUMN", help=columns)
    sub = verb("merge", model_commands.merge, "corral merge my-adapter --out my-model")
    sub.add_argument("adapter", help="a folder that PEFT or corral wrote, or hub:OWNER/NAME")
    sub.add_argument("--out", type=local_path, required=True, help="the model folder to write; nothing is overwritten")
    base = "its base model: a folder, a .gguf file, asset:NAME or hub:OWNER/NAME (default: the one that it names)"
    sub.add_argument("--base", metavar="MODEL", help=base)
    sub = verb("export", model_commands.export, "corral export runs/quickstart --to gguf --type q8_0")
    sub.add_argument("model", help="a run directory; or a model folder, asset:NAME or hub:OWNER/NAME with --out")
    sub.add_argument("--to", choices=EXPORT_TYPES, help="the format (default: those that the recipe names)")
    kinds = "; ".join(f"{to}: {', '.join(types)}" for to, types in EXPORT_TYPES.items())
    sub.add_argument("--type", help=f"the type of the weights; {kinds} (default: q8_0 or int8)")
    sub.add_argument(
        "--out",
        type=local_path,
        help="the folder to write, for a model without a run (a run is exported to RUN/export)",
    )
    sub = verb("verify", model_commands.verify, "corral verify runs/quickstart --engine openvino")
    sub.add_argument("model", help="a run directory, a folder with a contract.json, or an exported .gguf file")
    sub.add_argument("--engine", choices=ENGINE_NAMES, help=engine_help)
    sub = verb("chat", model_commands.chat, "corral chat runs/quickstart", as_json=False)
    sub.add_argument("model", nargs="?", help=f"{_MODELS}; without it, --url names a server to chat with")
    sub.add_argument("--system", help="a system message")
    add_answer_options(sub, **CHAT_SAMPLING)
    server = sub.add_argument_group("without MODEL", "chat with any OpenAI-compatible server, with its own defaults")
    server.add_argument("--host", help="host of the server, in place of --url")
    server.add_argument("--port", type=int, help="port of the server, in place of --url (default: 8000)")
    server.add_argument("--model", dest="server_model", metavar="NAME", help="the model (default: the only one there)")
    key = "API key (default: the environment variable CORRAL_API_KEY, which is safer; for OpenAI also OPENAI_API_KEY)"
    server.add_argument("--key", help=key)
    sub = verb("batch", model_commands.batch, "corral batch runs/quickstart prompts.jsonl --out answers.jsonl")
    sub.add_argument("model", help=_MODELS)
    sub.add_argument("prompts", help="a .jsonl file with a `prompt` or `messages` in each row, and optionally an `id`")
    sub.add_argument(
        "--out", type=local_path, required=True, help="the file to write: a row for each prompt, in the same order"
    )
    add_answer_options(sub)
    sub.add_argument("--seed", type=int, help="seed of all sampling (default: the recipe's)")
    ray = "use the Ray cluster at this address (default: the one this machine belongs to, or a new one here)"
    sub.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help=ray)
    sub = verb("serve", serve_commands.serve, "corral serve runs/quickstart --port 8000", as_json=False)
    sub.fill = partial(serve_commands.add_serve, models=_MODELS)
    sub = verb("keys", serve_commands.keys, "corral keys add alice --tokens-per-day 100000")
    serve_commands.add_keys(sub, positive=positive_int)
    sub = verb("assets", cache_commands.assets, "corral assets --fetch smollm2-135m-instruct")
    sub.add_argument("--fetch", nargs="+", metavar="NAME", help="download these into the cache")
    sub = verb("cache", cache_commands.cache, "corral cache clear wikibooks-recipes")
    sub.add_argument("action", nargs="?", choices=["list", "clear"], default="list", help="default: list")
    sub.add_argument("names", nargs="*", help="what to clear (default: all)")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    args = parser().parse_args(argv)
    as_json = getattr(args, "json", False)
    args.stdout = sys.stdout
    try:
        with redirect_stdout(io.StringIO()) if as_json else nullcontext():  # what a command prints is for people
            result = args.call(args)
        if as_json and result is not None:
            print(json.dumps(result, ensure_ascii=False))
        return 0
    except CorralError as error:
        return _fail(error, args)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("corral"):
            raise
        missing = MissingExtraError(f"the package {error.name!r} is not installed", hint="pip install corral")
        return _fail(missing, args)
    except KeyboardInterrupt as stop:
        resumes = args.verb in ("run", "evaluate", "export", "batch")
        print("\nstopped" + ("; the same command goes on from here" if resumes else ""), file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except BrokenPipeError:
        # The reader of the output has gone; without this, Python would complain again when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if reason := out_of_memory_reason(error):
            hint = "end other programs, or use a smaller or a quantised model; `corral plan RECIPE` says what training needs"
            where = f"corral {args.verb}"
            return _fail(OutOfMemoryError(f"out of memory: {reason}", where=where, hint=hint), args)
        if args.debug:
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"corral: this is an error inside corral, not in your input: {type(error).__name__}: {error}\n"
            f"  where: {Path(where.filename).name}:{where.lineno}\n"
            "  next:  report it with the output of the same command after `corral --debug`",
            file=sys.stderr,
        )
        return 1


def _fail(error: CorralError, args: argparse.Namespace) -> int:
    if args.debug:
        traceback.print_exception(error)
    print(f"corral: {error}", file=sys.stderr)
    return error.exit_code
