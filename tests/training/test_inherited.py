"""The stand-in for SFTConfig and TrainingArguments equals the real class, field by field."""

import dataclasses
import json
import re
from typing import get_type_hints

import pytest
from transformers import TrainingArguments
from trl import SFTConfig, TrlParser

from vlmcap.errors import UserError
from vlmcap.strict_parsing import parse_yaml
from vlmcap.training.arguments import (
    CaptionDPOFields,
    CaptionerFields,
    CaptionGRPOFields,
    CaptionSFTFields,
    FoodFields,
)
from vlmcap.training.inherited import (
    SFT_CONFIG,
    TABLE,
    TRAINING_ARGUMENTS,
    complete,
    parsed_as,
    read_fields,
    refused,
)
from vlmcap.training.trainer_arguments import (
    CaptionDPOConfig,
    CaptionerTrainingArguments,
    CaptionGRPOConfig,
    CaptionSFTConfig,
    FoodTrainingArguments,
)

INHERITED = [(SFT_CONFIG, SFTConfig), (TRAINING_ARGUMENTS, TrainingArguments)]
REAL = [
    (CaptionSFTFields, SFT_CONFIG, CaptionSFTConfig),
    (CaptionDPOFields, TRAINING_ARGUMENTS, CaptionDPOConfig),
    (CaptionGRPOFields, TRAINING_ARGUMENTS, CaptionGRPOConfig),
    (CaptionerFields, TRAINING_ARGUMENTS, CaptionerTrainingArguments),
    (FoodFields, TRAINING_ARGUMENTS, FoodTrainingArguments),
]


def described(kind: type) -> dict[str, dict]:
    """What the parser sees of each field. Enumerations are told by their values: the stand-in has its own."""
    hints = get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        default = field.default_factory() if callable(field.default_factory) else field.default
        metadata = {key: list(value) if key == "choices" else value for key, value in field.metadata.items()}
        hint = re.sub(r"(\w+\.)+", "", repr(hints[field.name]))  # without the names of modules
        found[field.name] = {"type": hint, "default": default, "metadata": metadata, "init": field.init}
    return found


def enumerations(kind: type) -> dict[str, list[str]]:
    parser = TrlParser(kind)
    return {action.dest: list(action.choices) for action in parser._actions if action.choices}


@pytest.mark.parametrize(("chain", "real"), INHERITED, ids=["SFTConfig", "TrainingArguments"])
def test_the_fields_read_from_the_source_are_those_of_the_class(chain, real):
    ours, theirs = described(read_fields(chain)), described(real)
    assert list(ours) == list(theirs)
    for name, field in theirs.items():
        assert ours[name] == field, name
    assert enumerations(read_fields(chain)) == enumerations(real)


@pytest.mark.parametrize(("own", "chain", "real"), REAL, ids=[real.__name__ for *_, real in REAL])
def test_a_recipe_parses_the_fields_of_the_class_it_trains_with(own, chain, real):
    assert described(parsed_as(own, chain)) == described(real)
    assert TrlParser(parsed_as(own, chain)).format_help() == TrlParser(real).format_help()


@pytest.mark.parametrize(("own", "chain", "real"), REAL, ids=[real.__name__ for *_, real in REAL])
def test_the_real_object_has_the_values_of_the_command_line(own, chain, real, tmp_path):
    words = f"--output_dir {tmp_path} --learning_rate 1e-3 --max_steps 3 --lr_scheduler_type cosine --eval_strategy"
    words = f"{words} steps --eval_steps 2 --save_steps 2 --load_best_model_at_end --no_dataloader_in_order".split()
    words += ["--lr_scheduler_kwargs", json.dumps({"num_cycles": 2})]
    (parsed,) = TrlParser(parsed_as(own, chain)).parse_args_and_config(words)
    (direct,) = TrlParser(real).parse_args_and_config(words)
    built = complete(real, parsed)
    assert type(built) is real
    assert built.to_dict() == direct.to_dict()
    assert built.metric_for_best_model == "cider_d" and built.lr_scheduler_kwargs == {"num_cycles": 2}


def test_what_only_the_real_class_refuses_ends_as_an_error_of_the_user(tmp_path):
    words = ["--output_dir", str(tmp_path), "--eval_strategy", "steps", "--eval_steps", "2.5"]
    (parsed,) = TrlParser(parsed_as(CaptionSFTFields, SFT_CONFIG)).parse_args_and_config(words)
    with pytest.raises(UserError, match="--eval_steps must be an integer"):
        complete(CaptionSFTConfig, parsed)


def test_the_table_has_the_settings_of_the_installed_libraries():
    """One that a library adds or drops must be looked at: does it have an effect in the recipes?"""
    settings = {field.name for field in dataclasses.fields(SFTConfig)}
    table = parse_yaml(TABLE.read_bytes())
    assert settings - table.keys() == set(), f"{TABLE.name} lacks settings of the installed libraries"
    assert table.keys() - settings == set(), f"{TABLE.name} has settings that the installed libraries lack"
    for name, said in table.items():
        verdicts = [said["sft"], said["captioner"]] if isinstance(said, dict) else [said]
        assert all(verdict is True or isinstance(verdict, str) for verdict in verdicts), name


def another(field: dataclasses.Field) -> object:
    """A value that a setting does not have by default."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return not default if isinstance(default, bool) else (default or 0) + 1 if isinstance(default, int) else "x"


@pytest.mark.parametrize(("own", "chain", "real"), REAL, ids=[real.__name__ for *_, real in REAL])
def test_what_has_no_effect_is_refused_by_name_and_nothing_else(own, chain, real, tmp_path):
    kind, obeyed = parsed_as(own, chain), set()
    reasons = refused(read_fields(chain), chain)
    for field in dataclasses.fields(read_fields(chain)):
        try:
            kind(**{"output_dir": str(tmp_path)} | {field.name: another(kind.__dataclass_fields__[field.name])})
        except ValueError as error:
            named = f"{field.name} must stay at its default" in str(error)
            assert named == (field.name in reasons), (field.name, str(error))
        else:
            obeyed.add(field.name)
    assert not obeyed & reasons.keys()
    assert ("per_device_eval_batch_size" in obeyed) == (real is not CaptionSFTConfig)


def test_a_setting_that_a_newer_library_has_is_refused_until_it_was_looked_at():
    newer = dataclasses.make_dataclass("Newer", [("seed", int, 1), ("no_such_setting", int, 1)])
    assert "newer than the tested one" in refused(newer, TRAINING_ARGUMENTS).pop("no_such_setting")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_type": "greedy"}, "greedy follows a metric; name it as metric_for_best_model"),
        ({"save_strategy": "best"}, "save_strategy: best rank the model by captions of validation images"),
        ({"save_strategy": "best", "eval_strategy": "steps"}, "best .* follows a metric; name it as metric_for_best"),
        ({"optim": "galore_adamw"}, "galore_adamw cannot be used here"),
        ({"optim": "adamw_torch_8bit"}, "adamw_torch_8bit cannot be used: .*torchao"),
        ({"optim": "grokadamw"}, "grokadamw cannot be used: .*pip install grokadamw"),
        ({"optim_args": "momentum=0.9", "optim": "adamw_torch"}, "momentum=0.9 cannot be used: it reads none"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "kwargs None cannot be used: .*num_decay_steps"),
    ],
)
def test_what_optimizer_and_schedule_miss_is_said_before_a_model_is_loaded(tmp_path, settings, message):
    (parsed,) = TrlParser(parsed_as(CaptionerFields, TRAINING_ARGUMENTS)).parse_dict({"output_dir": str(tmp_path)})
    for name, value in settings.items():
        setattr(parsed, name, value)
    with pytest.raises(UserError, match=message):
        complete(CaptionerTrainingArguments, parsed)


@pytest.mark.parametrize(
    "source",
    [
        "class Base:\n    pass\n@dataclass\nclass Settings(Base):\n    rate: float = field(default=1.0)\n",
        "RATE = 1.0\n@dataclass\nclass Settings:\n    rate: float = field(default=RATE)\n",
        "Settings = make_dataclass('Settings', [('rate', float, 1.0)])\n",
    ],
    ids=["another parent", "an unknown name", "no class statement"],
)
def test_a_library_that_is_written_otherwise_is_imported(tmp_path, monkeypatch, request, source):
    name = f"library_{request.node.callspec.id.replace(' ', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "settings.py").write_text(f"from dataclasses import dataclass, field, make_dataclass\n{source}")
    monkeypatch.syspath_prepend(tmp_path)
    chain = ((f"{name}/settings.py", "Settings"),)
    with pytest.raises(LookupError):
        read_fields(chain)

    @dataclasses.dataclass
    class Own:
        steps: int = 3

    assert dataclasses.asdict(parsed_as(Own, chain)()) == {"rate": 1.0, "steps": 3}
