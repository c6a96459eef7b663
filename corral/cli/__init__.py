"""The command line: parse, call, print. Knows nothing that the modules it calls should know.

Exit codes: 0 done, 2 bad input, 3 a missing extra, 4 a gate failed, 1 a fault of corral's own, 130 and 143 stopped by a
signal. Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import corral
from corral.cli import cache_commands, model_commands, run_commands, serve_commands
from corral.engines.base import CHAT_SAMPLING
from corral.errors import CorralError, MissingExtraError

Command = Callable[[argparse.Namespace], dict[str, Any] | None]

_METHODS = ("none", "rouge-l", "cosine", "majority", "rouge-l+math")
_MODELS = "a run directory, a model or exported folder, a .gguf file, asset:NAME or hub:OWNER/NAME"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_positive.__name__ = "positive integer"  # what argparse calls it in an error


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from corral.engines.registry import ENGINE_NAMES
    from corral.export_forms import EXPORT_TYPES

    root = argparse.ArgumentParser(
        prog="corral",
        description="From your data to a served model with one recipe file, proved at each step.",
        epilog="start with: corral init my.toml   or, in a clone: corral run recipes/quickstart.toml",
    )
    root.add_argument("--version", action="version", version=f"corral {corral.__version__}")
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")

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
            help_ = "override a setting of the recipe, e.g. train.0.steps=20; may be given again"
            sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_)
        if as_json:
            sub.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
        return sub

    best = "what computes the answers (default: the best one for this machine)"

    def asking(sub: Any, **defaults: float) -> None:
        def own(name: str) -> str:
            other = f", else {defaults[name]:g}" if name in defaults else ""
            return f"(default: the run's recipe, [answer]{other})"

        sub.add_argument("--consensus", choices=_METHODS, help=f"draw several answers and vote {own('consensus')}")
        sub.add_argument("--n", type=_positive, help=f"how many are drawn for a vote {own('n')}")
        sub.add_argument("--shots", type=int, help=f"solved examples that are shown first {own('shots')}")
        figures: tuple[tuple[str, Any, str], ...] = (
            ("max_tokens", _positive, "most tokens of an answer"),
            ("temperature", float, "0 takes the most likely token"),
            ("top_p", float, "draw from this much probability"),
        )
        for name, kind, what in figures:
            flag = f"--{name.replace('_', '-')}"
            sub.add_argument(flag, type=kind, help=f"{what} {own(name)}")
        sub.add_argument("--engine", choices=ENGINE_NAMES, help=best)
        url = "let this endpoint, which serves the model, compute; may be given again"
        sub.add_argument("--url", action="append", default=[], help=url)

    sub = verb("init", run_commands.init, "corral init my.toml")
    sub.add_argument("path", nargs="?", default="recipe.toml", help="the file to write (default: recipe.toml)")
    sub = verb(
        "run",
        run_commands.run,
        "corral run recipes/quickstart.toml --set train.0.steps=20 --out runs/short",
        settings=True,
    )
    sub.add_argument("recipe", help="a recipe file")
    sub.add_argument("--out", help="the run directory (default: runs/NAME, or runs/NAME-small)")
    small = "try the recipe in minutes: the starter model, a few made-up rows of each source's form, a few steps"
    sub.add_argument("--small", action="store_true", help=small)
    profile = "record where the time of some training steps goes: a table here, a trace in the stage's folder"
    sub.add_argument("--profile", action="store_true", help=profile)
    sub = verb("plan", run_commands.plan, "corral plan recipes/quickstart.toml --device t4", settings=True)
    sub.add_argument("recipe", help="a recipe file")
    sub.add_argument(
        "--device", choices=("t4", "24g", "a100-80g", "h100", "h200"), help="estimate for this device instead"
    )
    sub.add_argument("--out", help="where the run is going to be (default: as for run)")
    sub.add_argument("--small", action="store_true", help="of the recipe's small form")
    sub = verb(
        "inspect",
        run_commands.inspect,
        "corral inspect recipes/quickstart.toml --rows 3 --html rows.html",
        settings=True,
    )
    sub.add_argument("recipe", help="a recipe file")
    sub.add_argument("--rows", type=int, default=2, help="rows to show of each side and fate (default: 2)")
    sub.add_argument("--html", metavar="FILE", help="write a page as well")
    sub = verb(
        "evaluate", run_commands.evaluate, "corral evaluate runs/quickstart --set evaluate.loss_rows=500", settings=True
    )
    sub.add_argument("run", help="a run directory")
    sub = verb("compare", run_commands.compare, "corral compare runs/short runs/quickstart")
    sub.add_argument("a", help="a run directory, or RUN:VARIANT (default: its tuned model)")
    sub.add_argument("b", help="another; differences are a − b")
    sub = verb("report", run_commands.report, "corral report runs/quickstart")
    sub.add_argument("run", help="a run directory")
    sub = verb("export", model_commands.export, "corral export runs/quickstart --to gguf --type q8_0")
    sub.add_argument("model", help="a run directory; or a model folder, asset:NAME or hub:OWNER/NAME with --out")
    sub.add_argument("--to", choices=EXPORT_TYPES, help="the form (default: those the recipe names)")
    kinds = "; ".join(f"{to}: {', '.join(types)}" for to, types in EXPORT_TYPES.items())
    sub.add_argument("--type", help=f"of the weights; {kinds} (default: q8_0 or int8)")
    sub.add_argument("--out", help="where to write, for a model that is no run (a run has its own place: RUN/export)")
    sub = verb("verify", model_commands.verify, "corral verify runs/quickstart --engine openvino")
    sub.add_argument("model", help="a run directory, a folder with a contract.json, or an exported .gguf file")
    sub.add_argument("--engine", choices=ENGINE_NAMES, help=best)
    sub = verb("chat", model_commands.chat, "corral chat runs/quickstart", as_json=False)
    sub.add_argument("model", nargs="?", help=f"{_MODELS}; without it --url names a server to talk with")
    sub.add_argument("--system", help="a system message")
    asking(sub, **CHAT_SAMPLING)
    there = sub.add_argument_group("without MODEL", "any OpenAI-compatible server answers, as it sees fit unless told")
    there.add_argument("--host", help="of the server, in place of --url")
    there.add_argument("--port", type=int, help="of the server, in place of --url (default: 8000)")
    there.add_argument("--model", dest="named", metavar="NAME", help="its name there (default: the only one)")
    key = "its key (default: CORRAL_API_KEY of the environment, where others cannot see it; for OpenAI also OPENAI_API_KEY)"
    there.add_argument("--key", help=key)
    sub = verb("batch", model_commands.batch, "corral batch runs/quickstart prompts.jsonl --out answers.jsonl")
    sub.add_argument("model", help=_MODELS)
    sub.add_argument("prompts", help="a .jsonl file: a `prompt` or `messages` in each row, and an `id` if you like")
    sub.add_argument("--out", required=True, help="the file to write: a row for each prompt, in the same order")
    asking(sub)
    sub.add_argument("--seed", type=int, help="of all draws (default: the recipe's)")
    ray = "spread it over the Ray cluster at this address (default: the one this machine belongs to, or a new one here)"
    sub.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help=ray)
    sub = verb("serve", serve_commands.serve, "corral serve runs/quickstart --port 8000", as_json=False)
    serve_commands.add_serve(sub, models=_MODELS, engines=ENGINE_NAMES, positive=_positive)
    sub = verb("keys", serve_commands.keys, "corral keys add alice --tokens-per-day 100000")
    serve_commands.add_keys(sub, positive=_positive)
    sub = verb("assets", cache_commands.assets, "corral assets --fetch smollm2-135m-instruct")
    sub.add_argument("--fetch", nargs="+", metavar="NAME", help="fetch these into the cache")
    sub = verb("cache", cache_commands.cache, "corral cache clear wikibooks-recipes")
    sub.add_argument("action", nargs="?", choices=["list", "clear"], default="list", help="default: list")
    sub.add_argument("names", nargs="*", help="what to clear (default: all)")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    args = parser().parse_args(argv)
    try:
        result = args.call(args)
        if getattr(args, "json", False):
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
        # Whoever read the output has left; Python would complain once more when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"corral: this is a fault in corral, not in your input: {type(error).__name__}: {error}\n"
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
