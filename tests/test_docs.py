"""README.md and docs/*.md: every python block runs, every command parses and most run, and nothing is left out.

Blocks are run in the order of their file, in a prepared folder, with stand-ins for what is not here: timm's pretrained
weights (a small network with random ones) and the Hub (a loopback server). A block of commands is parsed, and run
unless the comment `<!-- not run: why -->` stands before it. A block in another language is not touched.
"""

import ast
import importlib
import inspect
import re
import runpy
import shlex
import shutil
import socket
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from maskpack_cli.main import app
from typer.testing import CliRunner

import maskpack
import maskpack.training
from maskpack.codecs.base import CODECS
from maskpack.importers.base import IMPORTERS
from maskpack.lab.baselines.base import BASELINES
from maskpack.training import TrainConfig, load_data, train_mask
from maskpack.training.config import config_from
from maskpack.training.data.base import SOURCES
from maskpack.training.methods.base import METHODS
from maskpack.training.objectives.base import OBJECTIVES

from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer
from .helpers_signing import write_key

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING"))]
    # the cards of the gallery are adapters' own
    + [page for page in (ROOT / "docs").rglob("*.md") if page.parent.parent.name != "gallery"]
)
# README.md, api.md, results/codecs.md
TEXTS = {str(page.relative_to(ROOT)).removeprefix("docs/"): page.read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(
    r"^(?:<!-- (?P<skip>not run): [^\n]+ -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE
)
RUN_LANGUAGES = ("python", "bash")
KNOWN_LANGUAGES = (*RUN_LANGUAGES, "text", "toml", "json")
COMMAND: Any = typer.main.get_command(app)
OWN_NAME = "user"  # of the docs' Hub references; the loopback Hub knows it as alice


def blocks(page: str) -> list[tuple[str, str, bool]]:
    """(language, body, is it run) of every fenced block of a page."""
    return [(found["kind"], found["body"], not found["skip"]) for found in BLOCK.finditer(TEXTS[page])]


def verb_of(words: list[str]) -> tuple[Any, list[str]]:
    """The verb, or the verb of a verb, that the words call, and the words for it."""
    found = COMMAND
    while words and words[0] in (own := getattr(found, "commands", {})):
        found, words = own[words[0]], words[1:]
    return found, words


def commands(body: str) -> list[list[str]]:
    """The words of every maskpack command of a block."""
    lines = body.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("maskpack ")]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the docs name: flowers, sketches, images, masks, settings, a demo's output."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("docs")
    digits = load_digits()
    names = {0: "daisy", 1: "rose", 4: "tulip"}
    from PIL import Image

    for split, rows in (("train", range(0, 120)), ("test", range(120, 180))):
        for row in rows:
            if int(digits.target[row]) in names:
                folder = root / "flowers" / split / names[int(digits.target[row])]
                folder.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray((digits.images[row] * 15).astype("uint8")).resize((32, 32))
                image.save(folder / f"{row:03}.png")
                inverted = root / "sketches" / split / names[int(digits.target[row])]
                inverted.mkdir(parents=True, exist_ok=True)
                Image.eval(image, lambda value: 255 - value).save(inverted / f"{row:03}.png")
    for name in ("rose", "daisy"):
        image.save(root / f"{name}.jpg")
    image.save(root / "a.jpg")
    image.save(root / "b.jpg")
    image.save(root / "some-digit.png")
    settings = next(body for kind, body, _ in blocks("quickstart.md") if kind == "toml")
    (root / "run.toml").write_text(settings)
    (root / "settings.toml").write_text(settings)  # to be parsed; `maskpack init` makes it where blocks are run
    (root / "tasks.toml").write_text("")

    key = write_key(root, "public")[0]
    key.rename(root / "key.pem")

    demo = root / "demo-output"
    demo.mkdir()
    shutil.copyfile(ROOT / "cli/maskpack_cli/digits_backbone.py", demo / "backbone.py")
    from maskpack.backbone.load import export_state

    backbone = maskpack.load_backbone(f"{demo}/backbone.py:digits_cnn", random_weights=0)
    export_state(demo / "backbone.safetensors", backbone.model)
    config = TrainConfig(epochs=2, optimizer="sgd", lr=20.0, scale=True, augment="crop")
    result = train_mask(backbone, load_data("digits:5-9", labels_fraction=0.2), config)
    maskpack.save_adapter(demo / "adapter", result.parts, result.base, result.about)
    return root


@pytest.fixture
def world(prepared: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder as the current one, and the stand-ins."""
    import timm

    from maskpack.safetensors_io import write_tensors

    create = timm.create_model

    def small(name: str, pretrained: bool = False, **options: Any) -> Any:
        """Stand in for pretrained weights, which would have to be downloaded: a small network with random ones."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = create("test_resnet", pretrained=False)
        network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, 64, 64)}  # the flowers have 32 pixels
        return network

    folder = tmp_path / "here"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    Path("settings.toml").unlink()
    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setenv("COLUMNS", "160")
    with socket.socket() as free:  # another run on this machine may have the page's own port
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    # the examples of docs/extending.md are gone afterwards
    for registry in (METHODS, OBJECTIVES, CODECS, SOURCES, IMPORTERS, BASELINES):
        registry.all()
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    network = small("")
    masks = {"layer4.0.conv1.weight": network.get_parameter("layer4.0.conv1.weight") > 0}
    write_tensors("masks.safetensors", masks, {"format": "pt"})
    pruned = {name: torch.where(masks[name], t, 0) if name in masks else t for name, t in network.state_dict().items()}
    write_tensors("pruned.safetensors", pruned, {"format": "pt"})
    tuned = {name: t * 1.01 if t.is_floating_point() else t for name, t in network.state_dict().items()}
    write_tensors("tuned.safetensors", tuned, {"format": "pt"})
    return folder


def translated(text: str) -> str:
    """The docs' Hub names as the loopback Hub knows them."""
    return re.sub(rf"(?<![\w/.]){OWN_NAME}/", "alice/", text)


def run_command(words: list[str]) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"maskpack {shlex.join(words)}\n{done.stdout}\n{done.stderr}\n{done.exception!r}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in TEXTS if any(k in RUN_LANGUAGES for k, _, _ in blocks(page))])
def test_blocks_run(page: str, world: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}
    for kind, body, is_run in blocks(page):
        if kind == "python" and is_run:
            exec(compile(translated(body), f"{page}", "exec"), namespace)
        elif kind == "bash" and is_run:
            for words in commands(translated(body)):
                run_command(words)


COMMANDS = [
    (page, words) for page in TEXTS for kind, body, _ in blocks(page) if kind == "bash" for words in commands(body)
]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_command_parses(page: str, words: list[str], prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared)  # which has the settings files
    verb, rest = verb_of(words)
    verb.make_context(words[0], list(rest))


def test_commands_in_sentences_exist() -> None:
    for page, text in TEXTS.items():
        for command in re.findall(r"`maskpack ([a-z][^`\n]*)`", BLOCK.sub("", text)):
            words = shlex.split(command)
            assert words[0] in COMMAND.commands, f"{page}: maskpack {command}"
            if len(words) == 1:
                continue
            known = {name for option in verb_of(words)[0].params for name in option.opts} | {"--help"}
            assert {word for word in words if word.startswith("-")} <= known, f"{page}: maskpack {command}"


def test_options_in_pages_exist() -> None:
    known = {
        name
        for top in COMMAND.commands.values()
        for verb in (top, *getattr(top, "commands", {}).values())
        for option in verb.params
        for name in (*option.opts, *option.secondary_opts)
    }
    others = {"--version", "--help"}
    for page in ("cli.md", "hub.md", "quickstart.md", "methods.md", "troubleshooting.md", "reliability.md"):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", BLOCK.sub("", TEXTS[page])):
            assert option in known | others, f"{page}: {option}"


def test_the_site_has_every_page() -> None:
    """`make docs` builds it, with broken links as errors."""
    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    named = re.findall(r"'([\w/-]+\.md)'", str(nav))
    own = {page for page in TEXTS if page not in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")}
    assert sorted(page for page in named if not re.match("gallery/.+/", page)) == sorted(own)


@pytest.mark.parametrize("package", [maskpack, maskpack.training])
def test_every_docstring_is_on_the_page(package: Any) -> None:
    for name in set(package.__all__) - {"__version__"}:
        place = f"{getattr(package, name).__module__}.{name}"
        assert f"\n### {name}\n\n::: {place}\n" in TEXTS["reference.md"]


def test_pictures_are_those_of_the_script(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / ".ci" / "pictures.py"))["main"](tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (ROOT / "docs" / "assets" / path.name).read_text(), "run .ci/pictures.py"


def test_every_verb_option_and_name_is_described() -> None:
    cli, api = TEXTS["cli.md"], TEXTS["api.md"]
    for name, verb in COMMAND.commands.items():
        words = () if name in ("plot", "lab") else getattr(verb, "commands", {})
        for own in (name, *(f"{name} {word}" for word in words)):
            assert re.search(rf"^## {own}\b", cli, re.MULTILINE), own
        if name == "train":
            for option in verb.params:
                assert f"`{option.opts[0]}" in cli, option.opts
    for name in (*maskpack.__all__, *maskpack.training.__all__):
        assert re.search(rf"`(maskpack\.)?{name}[(`]", api), name


def test_signatures_in_api() -> None:
    places = [
        importlib.import_module(f"maskpack{own}") for own in ("", ".training", ".training.cascade", ".lab.comparison")
    ]
    for name, given in re.findall(r"^\| `(\w+)\((.*?)\)` \|", TEXTS["api.md"], re.MULTILINE):
        stated = [word.strip() for word in given.split(",")]
        parameters = inspect.signature(
            next(getattr(place, name) for place in places if hasattr(place, name))
        ).parameters.values()
        real: list[str] = []
        for parameter in parameters:
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD) and "*" not in real:
                real.append("*")
            # **options: Unpack[a TypedDict]
            passed_on = get_args(parameter.annotation) if parameter.kind is parameter.VAR_KEYWORD else ()
            real += passed_on[0].__annotations__ if passed_on else [parameter.name]
        assert stated == real, name


def test_settings_files_are_accepted() -> None:
    for _, body, _ in [block for block in blocks("quickstart.md") if block[0] == "toml"]:
        settings = tomllib.loads(body)
        for key in ("backbone", "data", "output"):
            settings.pop(key)
        config_from(settings)


def test_languages_are_known() -> None:
    for page in TEXTS:
        fences = re.findall(r"^```(\w*)", TEXTS[page], re.MULTILINE)
        assert set(fences[::2]) <= set(KNOWN_LANGUAGES), page
        assert not any(fences[1::2]), page


def anchors(text: str) -> set[str]:
    found = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found}


def test_links() -> None:
    links: dict[Path, set[Path]] = {}
    for page, text in zip(PAGES, TEXTS.values(), strict=True):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", BLOCK.sub("", text)):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.is_file(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name}: {target}"
            links.setdefault(page, set()).add(file)
    reached, ahead = set(), {ROOT / "README.md"}
    while ahead:
        reached |= ahead
        ahead = {file for page in ahead for file in links.get(page, ())} - reached
    assert not set(PAGES) - reached, "no way of links leads there from README.md"


def messages() -> str:
    """The texts of all string constants of maskpack and its command line, a NUL where a value goes."""
    found = []
    for path in [*(ROOT / "maskpack").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found).replace("`", "")


def test_quoted_messages_are_those_of_the_code() -> None:
    said = messages()
    headings = re.findall(r"^\*\*(`.+?)\*\*", TEXTS["troubleshooting.md"], re.MULTILINE)
    assert len(headings) > 30
    for heading in headings:
        for quote in re.findall(r"`([^`]+)`", heading):
            for piece in quote.split("…"):
                piece = piece.strip(" ,;:[]'")
                assert piece in said, f"no message of the code holds {piece!r}"


def test_pages_name_no_machine() -> None:
    for page, text in TEXTS.items():
        assert not re.search(r"(?<![\w.])/(home|root|Users|mnt|tmp|var)/", text), page
