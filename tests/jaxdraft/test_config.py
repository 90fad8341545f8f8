"""Configs and the command line: every mistake ends in one sentence that names the field, before any model is loaded."""

import ast
import contextlib
import dataclasses
import io
import json
import re
import sys
import typing
from pathlib import Path

import pytest
from draft_helpers import TINY as DRAFT

from jaxdraft import export
from jaxdraft.checkpoint import as_json
from jaxdraft.cli import CONFIGS_DIR, Parser, load_config, parse_args, parse_command, parse_options, run_command
from jaxdraft.config import CONFIG_FILE, BridgeConfig, Config, DataConfig, DraftOptions, TargetConfig
from jaxdraft.model.dflash import DraftConfig
from jaxdraft.run import open_run_dir

TINY = ["--config", "tiny_qwen35vl.py"]


@pytest.mark.parametrize("package", ["jaxdraft", "feature_bridge"])
def test_messages_name_fields_that_there_are(package):
    parts = {name: kind for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
    known = {f"{part}.{field.name}" for part, kind in parts.items() for field in dataclasses.fields(kind)}
    known |= {f"draft.{field.name}" for field in dataclasses.fields(DraftConfig)}  # of a draft on disk
    named = re.compile(rf"(?<![\w.-])(?:{'|'.join(parts)})\.(?:\w+(?==)|[a-z]+_\w+)")  # data.row_tokens, bridge.python=
    for file in sorted((CONFIGS_DIR.parent / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert set(named.findall(node.value)) <= known, f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", sorted(CONFIGS_DIR.glob("*.py")), ids=lambda p: p.name)
def test_every_config_is_valid_and_pins_its_target(file):
    config = load_config(file.name)
    assert load_config(str(file)) == config == load_config(file.stem)
    assert config.name == file.stem
    local = CONFIGS_DIR in Path(config.target.path).parents
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

    def check(kind, prefix=""):
        for name, hint in typing.get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint):
                check(hint, f"{name}.")
            else:
                assert f"--{prefix}{name}".replace("_", "-") in text, name

    check(Config)
    assert "--data.row-tokens INT Tokens of a packed row; the limit of a sample as well. (default: 4096)" in text
    assert "--name STR Name of the run" in text
    assert "qwen3_8b.py" in text  # what --config may be
    assert str(CONFIGS_DIR) not in text


@pytest.mark.parametrize(("given", "gamma"), [("auto", "auto"), ("4", 4.0), ("2.5", 2.5), ("None", None)])
def test_the_decay_is_a_number_none_or_by_block_size(given, gamma, tmp_path):
    config = parse_args([*TINY, "--loss.gamma", given])
    assert config.loss.gamma == gamma
    (tmp_path / CONFIG_FILE).write_text(json.dumps(as_json(config)))  # as a run writes it down
    assert load_config(str(tmp_path)) == config


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
        ([*TINY, "--name", "."], "name='.'"),
        ([*TINY, "--name", ".."], "name='..'"),
        ([*TINY, "--optim.weight-decay", "nan"], "optim.weight_decay=nan"),
        ([*TINY, "--optim.learning-rate", "inf"], "optim.learning_rate=inf is not possible: give a finite number"),
        ([*TINY, "--optim.eps", "inf"], "optim.eps=inf"),
        ([*TINY, "--loss.gamma", "inf"], "loss.gamma=inf"),
        ([*TINY, "--loss.gamma", "0"], "loss.gamma=0.0 must be positive"),
        ([*TINY, "--loss.gamma", "some"], "--loss.gamma.*some"),
        ([*TINY, "--seed", "9223372036854775808"], "seed=9223372036854775808"),
        ([*TINY, "--seed=-1"], "seed=-1"),
        ([*TINY, "--max-new-tokens", "0"], "max_new_tokens=0"),
        ([*TINY, "--num-decode=-1"], "num_decode=-1"),
        ([*TINY, "--data.num-workers=-1"], "data.num_workers=-1"),
        ([*TINY, "--max-bad-batches=-1"], "max_bad_batches=-1"),
        ([*TINY, "--draft.num-heads", "0"], "draft.num_heads=0 is not possible: give 1 or more"),
        ([*TINY, "--draft.sliding-window", "0"], "draft.sliding_window=0"),
        ([*TINY, "--data.max-pixels", "0"], "data.max_pixels=0"),
        ([*TINY, "--bridge.request-timeout-s", "0"], "bridge.request_timeout_s=0"),
        ([*TINY, "--bridge.start-timeout-s", "nan"], "bridge.start_timeout_s=nan"),
        (["--config"], "--config.*--help"),
    ],
)
def test_bad_arguments_are_one_sentence(argv, named):
    with pytest.raises(ValueError, match=f"(?s){named}") as error:
        parse_args(argv)
    assert "\n" not in str(error.value)
    assert "Error parsing" not in str(error.value)
    assert not set("│╭╰─") & set(str(error.value))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ('return Config(name="a", target=T, data=D, epoch=3)', "unknown field epoch of Config.*--help"),
        (
            'return Config(name="a", target=T, data=DataConfig(train_path="x", rows=3))',
            "unknown field rows of DataConfig",
        ),
        ('return Config(name="a", target=T, data=D, epochs=2.5)', "epochs=2.5 has the wrong type: expected `int`"),
        ('return Config(name="a", target=T, data=D, epochs="5")', "epochs='5' has the wrong type: .*got `str`"),
        ('return Config(name="a", target=T, data=D, loss=LossConfig(gamma="7"))', "loss.gamma='7' has the wrong type"),
        ('return Config(name="a", target=T, data=D, bridge=BridgeConfig(num_slots="3"))', "bridge.num_slots='3'"),
        ('return Config(name="a", target="x", data=D)', "target='x' has the wrong type"),
        ('return Config(name="a", target=T, data="x")', "data is str and not DataConfig"),
        ("return Config(target=T, data=D)", "bad.py:4: Config needs 'name'"),
        ("return Config(name=1/0)", "bad.py:4: ZeroDivisionError: division by zero"),
        ("import no_such_module", "bad.py:4: ModuleNotFoundError: No module named 'no_such_module'"),
        ('return open("/no/such/file")', "bad.py:4: FileNotFoundError: .*No such file or directory: '/no/such/file'"),
        ("return Config(name=undefined)", "bad.py:4: NameError: name 'undefined' is not defined"),
        ("return Config(", "bad.py:4: SyntaxError: "),
        ('return Config(name="a", target=T, data=DataConfig(train_path=3))', "data.train_path=3 has the wrong type"),
        ('return Config(name="a", target=T, data=D, epochs=0)', "epochs=0"),
        ("return {}", "returned dict"),
    ],
)
def test_bad_config_files_are_one_sentence(tmp_path, body, named):
    file = tmp_path / "bad.py"
    file.write_text(
        "from jaxdraft.config import *; from jaxdraft.losses import LossConfig\n"
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


@pytest.mark.parametrize(("name", "content"), [("a.yaml", b"epochs: 3"), ("a.py", b"\x80\x00\xff"), ("a.json", b"{")])
def test_a_file_that_is_no_config(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/{name}") as error:
        parse_args(["--config", str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_a_runs_directory_is_its_config(tmp_path):
    config = parse_args([*TINY, "--epochs", "3", "--optim.clip-norm", "None", "--output-dir", str(tmp_path)])
    config = dataclasses.replace(config, bridge=BridgeConfig(sglang_args={"page_size": 2}), fresh=True)
    run_dir = open_run_dir(config, DRAFT)
    assert (
        load_config(str(run_dir))
        == load_config(str(run_dir / "config.json"))
        == dataclasses.replace(config, fresh=False)
    )
    assert parse_args(["--config", str(run_dir), "--epochs", "4"]).epochs == 4
    written = json.loads((run_dir / "config.json").read_text())
    for change, named in (
        ({"epoch": 3}, "epoch is not a field"),
        ({"epochs": 0}, "epochs=0"),
        ({"data": 3}, "`object`"),
    ):
        (run_dir / "config.json").write_text(json.dumps(written | change))
        with pytest.raises(ValueError, match=f"{run_dir}/config.json.*{named}"):
            load_config(str(run_dir))


def test_a_file_where_runs_should_be(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ValueError, match="output_dir=.*cannot hold the run tiny_qwen35vl"):
        open_run_dir(parse_args([*TINY, "--output-dir", str(tmp_path / "runs")]), DRAFT)


@pytest.mark.parametrize("unicode", [True, False])  # of the terminal, as tyro sees it
def test_a_hint_looks_among_the_commands_own_options_first(unicode, capsys, monkeypatch):
    monkeypatch.setattr("tyro._fmtlib._should_use_utf8_drawing_chars", lambda: unicode)

    def parser():
        parser = Parser(prog="x")
        parser.add_argument("--draft", required=True)
        parser.add_argument("--number", type=int)
        return parser

    with pytest.raises(ValueError, match="did you mean --draft[?]"):
        parse_command(parser(), [*TINY, "--draft", "d", "--drat", "d"])
    with pytest.raises(ValueError, match="required: --draft; --help"):
        parse_command(parser(), TINY)
    with pytest.raises(ValueError, match="--number: invalid int value: 'a'"):
        parse_command(parser(), [*TINY, "--draft", "d", "--number", "a"])
    own, config = parse_command(parser(), [*TINY, "--draft", "d", "--epochs", "2"])
    assert (own.draft, config.epochs) == ("d", 2)
    with pytest.raises(SystemExit):
        parse_command(parser(), ["--help"])
    assert "usage: x --config NAME" in capsys.readouterr().out


def test_a_terminal_without_lines_for_boxes_reads_the_same(monkeypatch):
    wrong = [*TINY, "--data.row-token", "5"]
    said = []
    for encoding in ("utf-8", "latin-1"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        with pytest.raises(ValueError, match="did you mean --data.row-tokens") as error:
            parse_args(wrong)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_missing_options_are_named():
    with pytest.raises(ValueError, match="^missing: --checkpoint, --output; --help"):
        parse_options(export.Arguments, [], "x")


def test_what_the_system_says_of_a_file_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda: Path("/no/such/file").stat())
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: /no/such/file cannot be used: No such file or directory\n"


def test_a_full_disk_is_one_sentence(capsys):
    def write():
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(SystemExit) as exit_info:
        run_command(write)
    assert exit_info.value.code == 2
    said = "error: No space left on device; free some and give the same command again\n"
    assert capsys.readouterr().err == said


def test_default_anchor_count_is_the_recipes_density():
    base = dict(name="a", target=TargetConfig(path="x"), draft=DraftOptions(block_size=16))
    assert Config(**base, data=DataConfig(train_path="x", row_tokens=3072)).num_anchors == 512
    assert Config(**base, data=DataConfig(train_path="x", row_tokens=1000)).num_anchors == 167
