"""Runs what a program does with its client, and says of each thing whether it worked; knows nothing of corral.

    python use_CLIENT.py ADDRESS [NAME …]

`ADDRESS` ends in `/v1`; `{}` in it is replaced by the scenario's name. Prints JSON: name → null, or what went wrong.
"""

import json
import sys
import traceback

ANSWER = "Two plus two is four."
MODEL, EMBEDDING_MODEL = "m", "all-minilm-l6-v2"
ASK = [{"role": "user", "content": "What is two plus two?"}]
SYSTEM = [{"role": "system", "content": "Answer in one sentence."}, *ASK]
LATER_SYSTEM = [*SYSTEM, {"role": "assistant", "content": "Four."}, {"role": "system", "content": "Be brief."}, *ASK]
PREFILL = [*ASK, {"role": "assistant", "content": "Two plus"}]

_SCENARIOS = {}


def scenario(function):
    """Marks a function that takes the address of a server; its name is the scenario's."""
    _SCENARIOS[function.__name__] = function
    return function


def main():
    address, *names = sys.argv[1:]
    results = {}
    for name in names or _SCENARIOS:
        try:
            _SCENARIOS[name](address.replace("{}", name))
            results[name] = None
        except Exception as error:
            traceback.print_exc()
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))
