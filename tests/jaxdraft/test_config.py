"""Configs and the command line: every mistake ends in one sentence that names the field, before any model is loaded."""

import contextlib
import io

import pytest

from jaxdraft.cli import CONFIGS_DIR, load_config, parse_args
from jaxdraft.config import Config, DataConfig, DraftOptions, TargetConfig

TINY = ["--config", "tiny_qwen35vl.py"]


@pytest.mark.parametrize("file", sorted(CONFIGS_DIR.glob("*.py")), ids=lambda p: p.name)
def test_every_config_is_valid_and_pins_its_target(file):
    config = load_config(file.name)
    assert load_config(str(file)) == config == load_config(file.stem)
    assert config.name == file.stem
    local = CONFIGS_DIR in __import__("pathlib").Path(config.target.path).parents
    assert local or len(config.target.revision) == 40


def test_any_field_can_be_overridden():
    config = parse_args(
        [*TINY, "--data.row-tokens", "512", "--draft.target-layer-ids", "1", "4", "--optim.clip-norm", "None",
         "--bridge.sglang-args", "attention_backend", "triton", "--mesh.fsdp=2", "--fresh"]
    )  # fmt: skip
    assert config.data.row_tokens == 512
    assert config.draft.target_layer_ids == (1, 4)
    assert config.optim.clip_norm is None
    assert config.bridge.sglang_args == {"attention_backend": "triton"}
    assert config.mesh.fsdp == 2
    assert config.fresh


def test_help_lists_every_field_with_type_default_and_a_line():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_info:
        parse_args(["--help"])
    assert exit_info.value.code == 0
    text = " ".join(out.getvalue().replace("│", " ").split())
    import dataclasses

    def check(kind, prefix=""):
        for field in dataclasses.fields(kind):
            value = field.type if isinstance(field.type, type) else None
            default = getattr(load_config(TINY[1]), field.name) if not prefix else None
            if dataclasses.is_dataclass(default):
                check(type(default), f"{field.name}.")
            elif value is None or not dataclasses.is_dataclass(value):
                assert f"--{prefix}{field.name}".replace("_", "-") in text, field.name

    check(Config)
    assert "--data.row-tokens INT Tokens of a packed row, and of a sample at most. (default: 512)" in text


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "--config is missing"),
        (["--config", "nowhere.py"], "qwen35vl.py"),
        ([*TINY, "--data.row-token", "5"], "--data.row-token.*did you mean --data.row-tokens"),
        ([*TINY, "--data.row-tokens", "many"], "--data.row-tokens.*many"),
        ([*TINY, "--data.too-long", "cut"], "cut.*--data.too-long"),
        ([*TINY, "--data.row-tokens", "40"], "data.row_tokens=40 is smaller than draft.block_size=8 x 8"),
        ([*TINY, "--bridge.num-slots", "1"], "bridge.num_slots=1"),
        ([*TINY, "--bridge.reader-processes", "-1"], "bridge.reader_processes=-1"),
        (
            [*TINY, "--bridge.reader-processes", "2", "--bridge.transport", "in_process"],
            "bridge.reader_processes=2 needs a bridge process",
        ),
        ([*TINY, "--draft.num-sliding-layers", "1"], "draft.sliding_window"),
        ([*TINY, "--optim.learning-rate", "-1"], "optim.learning_rate=-1"),
        ([*TINY, "--loss.kind", "mse"], "mse"),
        ([*TINY, "--data.eval-fraction", "1.5"], "data.eval_fraction=1.5"),
        ([*TINY, "--anchors-per-row", "5000"], "anchors_per_row=5000"),
        ([*TINY, "--name", "a/b"], "name='a/b'"),
    ],
)
def test_bad_arguments_are_one_sentence(argv, named):
    with pytest.raises(ValueError, match=f"(?s){named}") as error:
        parse_args(argv)
    assert "\n" not in str(error.value)
    assert not set("│╭╰─") & set(str(error.value))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ('return Config(name="a", target=T, data=D, epoch=3)', "unknown field epoch of Config.*--help"),
        (
            'return Config(name="a", target=T, data=DataConfig(train_path="x", rows=3))',
            "unknown field rows of DataConfig",
        ),
        ('return Config(name="a", target=T, data=D, epochs=2.5)', "epochs has the wrong type: expected `int`"),
        ('return Config(name="a", target=T, data=DataConfig(train_path=3))', "data.train_path has the wrong type"),
        ('return Config(name="a", target=T, data=D, epochs=0)', "epochs=0"),
        ("return {}", "returned dict"),
    ],
)
def test_bad_config_files_are_one_sentence(tmp_path, body, named):
    file = tmp_path / "bad.py"
    file.write_text(
        "from jaxdraft.config import *\n"
        'T, D = TargetConfig(path="x"), DataConfig(train_path="x")\n'
        f"def get_config():\n    {body}\n"
    )
    with pytest.raises(ValueError, match=named) as error:
        parse_args(["--config", str(file)])
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_get_config(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="get_config"):
        parse_args(["--config", str(tmp_path / "empty.py")])


def test_default_anchor_count_is_the_recipes_density():
    base = dict(name="a", target=TargetConfig(path="x"), draft=DraftOptions(block_size=16))
    assert Config(**base, data=DataConfig(train_path="x", row_tokens=3072)).num_anchors == 512
    assert Config(**base, data=DataConfig(train_path="x", row_tokens=1000)).num_anchors == 167
