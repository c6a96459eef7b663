"""`[serve]`: what may be set, and what is refused."""

from __future__ import annotations

import pytest

from corral import recipe
from corral.errors import RecipeError
from corral.recipe.serve import Serve
from tests.recipe.test_recipe import GOOD


def serve_of(text: str) -> Serve:
    return recipe.parse(f"{GOOD}\n[serve]\n{text}", where="r.toml").serve


def test_a_recipe_says_how_its_model_is_served() -> None:
    serve = serve_of('at_once = 4\nalias = ["gpt-4o-mini"]\ndatabase = "postgresql+psycopg://corral@db/corral"\n')
    assert serve.changes() == {
        "alias": ("gpt-4o-mini",),
        "database": "postgresql+psycopg://corral@db/corral",
        "at_once": 4,
    }
    assert serve.with_flags({"at_once": 2, "strict": True}).changes().keys() >= {"alias", "strict"}
    assert serve.with_flags({"at_once": 2}).at_once == 2


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('database = "postgresql://u:hush@h/d"', "CORRAL_DATABASE"),
        ('database = "postgresql://h/d?password=hush"', "CORRAL_DATABASE"),
        ('database = "server.db"', "sqlite:///FILE"),
        ('cors = ["*"]', "'*' is not the origin of a page"),
        ('cors = ["https://*.example.org"]', "is not the origin"),
        ('cors = ["https://a.example/page"]', "is not the origin"),
        ('cors = ["null"]', "is not the origin"),
        ('cors = "https://a.example"', "a list is needed"),
        ('allowed_host = ["a.example/x"]', "is not the name of a host"),
        ('alias = ["=x"]', "neither NAME nor NAME=MODEL"),
        ('root_path = "llm"', "begin it with /"),
        ('root_path = "/llm/"', "begin it with /"),
        ('engine = "tensorflow"', "serve.engine"),
        ("waiting = -1", "serve.waiting"),
        ("max_seconds = 0", "serve.max_seconds"),
        ('key = "corral_x"', "unknown key"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name_without_secrets(line: str, part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        serve_of(line)
    assert part in str(caught.value)
    assert "hush" not in str(caught.value)
