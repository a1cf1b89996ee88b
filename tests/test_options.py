"""Options of the command line, keys of settings files and tables of docs/cli.md follow from the fields of dataclasses.

`python -m tests.test_options` writes the tables.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pytest
import typer
from maskpack_cli.console import Output, Verbs
from maskpack_cli.main import app
from maskpack_cli.options import OF_A_CALL, Folder, Profile, Without, described, verb
from maskpack_cli.train import Experts
from typer.testing import CliRunner, Result

from maskpack.adapter.content import COMBINES
from maskpack.codecs.base import Profile as CodecProfile
from maskpack.training.config import JointConfig, TrainConfig

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
BLOCK = re.compile(r"<!-- options of ([\w -]+?) -->\n(.*?)<!-- end -->", re.DOTALL)
COMMAND: Any = typer.main.get_command(app)


def command(words: str) -> Any:
    found = COMMAND
    for word in words.split():
        found = found.commands[word]
    return found


def table(verb: Any, without: set[str] | None = None) -> str:
    """Return a Markdown table of a verb's options, but those with the names `without`, by panel."""
    panels: dict[str, list[str]] = {}
    for option in verb.params:
        if option.param_type_name != "option" or option.name in {"help", *OF_A_CALL[-2:], *(without or ())}:
            continue
        default = "needed" if option.required else "" if option.default in (None, (), []) else f"`{option.default}`"
        if isinstance(option.default, bool):
            default = "on" if option.default else "off"
        choices = get_args(option.type_descriptor.annotation) if option.type_descriptor.is_choice else ()
        names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
        text = option.help + (f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else "")
        row = f"| {names} | {default} | {text.replace('|', chr(92) + '|')} |"
        panels.setdefault(option.rich_help_panel or "Options", []).append(row)
    rows = [line for panel, lines in panels.items() for line in (f"| **{panel}** | | |", *lines)]
    return "\n".join(["| option | default | what |", "| --- | --- | --- |", *rows, ""])


def verbs(group: Any = COMMAND, before: str = "") -> list[str]:
    """Return the words of every verb with options of its own; `lab` names others."""
    found = []
    for name, one in group.commands.items():
        if name not in ("lab", "plot", "list"):
            found += verbs(one, f"{before}{name} ") if hasattr(one, "commands") else [before + name]
    return found


def expected(words: str) -> str:
    """Return the table of a verb: of one that trains only what `train` has not."""
    names = {option.name for option in command("train").params}
    trains = words != "train" and "method" in {option.name for option in command(words).params}
    return table(command(words), names - {option.name for option in own(words)} if trains else None)


def own(words: str) -> list[Any]:
    """The options of a verb that `train` has not, or has with another meaning or default."""
    theirs = {option.name: (option.help, option.default) for option in command("train").params}
    return [option for option in command(words).params if theirs.get(option.name) != (option.help, option.default)]


def documented() -> dict[str, str]:
    return dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))


@pytest.mark.parametrize("words", verbs())
def test_tables_of_the_page(words: str) -> None:
    assert documented()[words] == expected(words), "run: python -m tests.test_options"


def test_every_setting_is_an_option() -> None:
    for cls, words in ((TrainConfig, "train"), (TrainConfig, "multitask"), (JointConfig, "multitask")):
        names = {option.name for option in command(words).params}
        assert {field.name for field in fields(cls)} <= names
    assert {"--method-option", "--objective-option"} <= {option.opts[0] for option in command("train").params}


def test_choices_are_those_of_the_library() -> None:
    assert get_args(Profile) == get_args(CodecProfile)
    assert get_args(get_type_hints(Experts)["combine"]) == COMBINES


@dataclass(frozen=True)
class More(TrainConfig):
    """Settings with one more field.

    Training:
        decay: decay of a running mean of the scores,
            which goes on in a second line.
    """

    decay: float = 0.5


def try_more(*words: str) -> tuple[Result, list[Any], Any]:
    """Run a verb whose settings are these, in an app of its own."""
    own, seen = typer.Typer(cls=Verbs), list[Any]()

    @verb(own, None, "example")
    def train(settings: More, folder: Folder) -> None:
        seen.extend((settings, Output.given))

    @verb(own, None, "example")
    def other(settings: Annotated[More, Without("seed", decay=0.1)]) -> None:
        pass

    made: Any = typer.main.get_command(own)
    return CliRunner().invoke(own, ["train", "--output", "x", *words]), seen, made.commands["train"]


def test_a_new_field_is_an_option_a_key_and_a_line_of_the_page(tmp_path: Path) -> None:
    result, (settings, given), made = try_more("--decay", "0.9", "--scale")
    assert result.exit_code == 0
    assert (settings.decay, settings.scale, given) == (0.9, True, {"output", "decay", "scale"})
    file = tmp_path / "run.toml"
    file.write_text("decay = 0.7\nscale = true\n[method-option]\ninit = 2\n")
    _, (settings, given), _ = try_more("--config", str(file), "--no-scale")
    assert (settings.decay, settings.scale, settings.method_options) == (0.7, False, {"init": "2"})
    assert given == {"output", "config", "decay", "scale", "method_options"}
    text = "Decay of a running mean of the scores, which goes on in a second line."
    assert f"| `--decay` | `0.5` | {text} |" in table(made)
    file.write_text('decay = "fast"')
    result, _, _ = try_more("--config", str(file))
    assert result.exit_code == 2
    assert "--decay" in result.stderr


def test_a_recipe_lies_below_the_file_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("lr = 20.0\nbatch-size = 8\n")
    recipe, config = ["--recipe", "source"], ["--config", str(file)]
    for words in ([*recipe, *config], [*config, *recipe]):
        _, (settings, _), _ = try_more(*words, "--batch-size", "16")
        own = (settings.optimizer, settings.scale, settings.head_kind, settings.epochs, settings.bn, settings.top)
        assert own == ("sgd", True, "masked", 150, "adapt", 1.0)
        assert (settings.lr, settings.batch_size, settings.beside) == (20.0, 16, ("none",))
    _, (settings, _), _ = try_more()
    assert settings == More()
    assert (settings.top, settings.beside, settings.bn) == (None, ("norms",), None)
    _, (settings, _), _ = try_more("--train", "none", "--train", "biases")
    assert settings.train == ("none", "biases")
    result, _, _ = try_more("--recipe", "other")
    assert result.exit_code == 2


def test_a_field_without_a_text_is_an_error() -> None:
    @dataclass
    class Silent:
        """Says nothing of its field."""

        width: int = 1

    with pytest.raises(TypeError, match="width"):

        @verb(typer.Typer(), None, "example")
        def train(settings: Silent) -> None:
            pass


def test_sections_and_bases() -> None:
    found = described(More)
    assert found["decay"][0] == "Training"
    assert found["method"] == described(TrainConfig)["method"]
    assert next(iter(found)) == "decay"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda found: f"<!-- options of {found[1]} -->\n{expected(found[1])}<!-- end -->", text))


if __name__ == "__main__":
    main()
