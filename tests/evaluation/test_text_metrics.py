from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corral.errors import InputError
from corral.evaluation.bert_score import BertScorer, has_baseline
from corral.evaluation.scorecard import build_scorecard
from corral.evaluation.scoring import Row, VariantRows, score_rows
from corral.evaluation.text_metrics import TextMetrics
from corral.recipe.evaluate import ANSWER_METRICS, BertScore
from tests.evaluation.conftest import make_rows

CHEAP = ("chrf", "exact_match", "token_f1")


def test_only_the_metrics_that_are_named_are_computed() -> None:
    columns = score_rows("v", make_rows(0.5, seed=1, count=4), TextMetrics(("token_f1", "rougeL")))
    assert columns.keys() == {"loss", "rougeL", "token_f1"}


def test_the_best_of_several_references_counts() -> None:
    rows = [Row("a", reference="nothing alike", answer="The eggs.", other_references=("eggs", "rice"))]
    values = {name: column.measure.value for name, column in score_rows("v", rows, TextMetrics(CHEAP)).items()}
    assert values["exact_match"] == values["token_f1"] == 1.0
    assert (
        values["chrf"]
        == score_rows("v", [Row("a", reference="eggs", answer="The eggs.")], TextMetrics(CHEAP))["chrf"].measure.value
    )


def test_variants_are_compared_by_each_metric_and_by_token_f1_if_it_is_primary() -> None:
    rows = {"base": VariantRows(make_rows(0.3, seed=1)), "tuned": VariantRows(make_rows(0.9, seed=2))}
    card = build_scorecard(rows, baseline="base", primary="token_f1", metrics=TextMetrics(CHEAP))
    assert {c.metric for c in card.comparisons} == {"loss", *CHEAP}
    (primary,) = (c for c in card.comparisons if c.primary)
    assert primary.metric == "token_f1"
    assert primary.difference > 0
    assert card.signatures == {"chrf": card.signatures["chrf"]}
    assert card.signatures["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0")


def test_bertscore_ranks_a_paraphrase_above_another_text_and_names_how_it_was_computed() -> None:
    pytest.importorskip("bert_score")
    scorer = BertScorer(BertScore())
    references = ["the applicant must pay the fee", "the applicant must pay the fee", "text", "", "the fee is due"]
    answers = ["an applicant has to pay the charge", "seven blue whales sing", "", "text", "the fee is due"]
    scores = scorer.score([[text] for text in references], answers)
    assert scores[0] > scores[1] > 0
    assert scores[2:].tolist() == pytest.approx([0, 0, 1], abs=1e-5)
    best = scorer.score([[references[1], answers[1]]], answers[1:2])
    assert np.allclose(best, 1, atol=1e-5)
    assert scorer.signature.startswith(
        "asset:all-minilm-l6-v2_L5_no-idf_version=0.3.12(hug_trans="
    )  # of bert-score 0.3.13
    assert "not rescaled" in scorer.signature


def test_bertscore_is_rescaled_where_the_package_has_the_models_baseline() -> None:
    pytest.importorskip("bert_score")
    assert has_baseline("roberta-large")
    assert has_baseline("microsoft/deberta-xlarge-mnli")
    assert not has_baseline("asset:all-minilm-l6-v2")


def test_a_model_or_layer_that_bertscore_cannot_use_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    pytest.importorskip("bert_score")
    with pytest.raises(InputError, match="no model can be read from") as refused:
        BertScorer(BertScore(model=str(tmp_path))).check()
    assert refused.value.where == "evaluate.bertscore.model"
    with pytest.raises(InputError, match="has 6 layers, and BERTScore is to use layer 7"):
        BertScorer(BertScore(layer=7)).check()


def test_every_metric_that_a_recipe_can_name_is_computed() -> None:
    pytest.importorskip("bert_score")
    columns = score_rows("v", [Row("a", reference="red hat", answer="red hat")], TextMetrics(ANSWER_METRICS))
    assert set(columns) == set(ANSWER_METRICS)
