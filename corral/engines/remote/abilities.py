"""What an endpoint can do, found out by asking it for one token: more is asked for at first than some servers know.

It does not know which of several endpoints answers: they serve the same model, and are taken to be alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx2

from corral.engines.remote.endpoints import Endpoints
from corral.engines.remote.events import Event
from corral.errors import EngineError, EngineUnavailableError, ModelError, RequestError

_IDS = {"return_token_ids": True, "ignore_eos": True, "stop_token_ids": []}
_LOGPROBS = {"logprobs": 0}
_ECHO = {"echo": True}
_TRIES: tuple[dict[str, Any], ...] = (_IDS | _LOGPROBS | _ECHO, _IDS | _LOGPROBS, _IDS, {})


@dataclass(frozen=True, slots=True)
class Abilities:
    """What comes back beside text."""

    ids: bool
    """Token ids of what is drawn."""
    logprobs: bool
    """Log-probabilities of what is drawn."""
    score: bool
    """Log-probabilities of the prompt."""


async def abilities(endpoints: Endpoints, model: str) -> Abilities:
    """Find out. An endpoint that is too busy to say is taken to be one of corral's own, which does it all.

    Raises:
        ModelError: it completes no token ids.
    """

    async def read(response: httpx2.Response) -> Abilities:
        choices = Event.model_validate_json(await response.aread()).choices
        if not choices or choices[0].token_ids is None:
            return Abilities(ids=False, logprobs=False, score=False)
        told = choices[0].logprobs.token_logprobs if choices[0].logprobs else []
        return Abilities(ids=True, logprobs=bool(told), score=len(told) > 1 and told[1] is not None)

    refusal: EngineError | None = None
    for more in _TRIES:
        try:
            return await endpoints.post(
                "/completions", {"model": model, "prompt": [1, 2], "max_tokens": 1} | more, read
            )
        except RequestError as error:
            refusal = error
        except EngineUnavailableError:
            return Abilities(ids=True, logprobs=True, score=True)
        except EngineError as error:
            refusal = error
            break
    assert refusal is not None
    hint = "it must complete token ids at /v1/completions, as corral serve, vLLM and llama.cpp's server do"
    raise ModelError(refusal.what, where=refusal.where, hint=hint)
