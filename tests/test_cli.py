from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tessella.cli import COMMANDS, Command, main
from tessella.engine.interrupt import Interrupted
from tessella.methods import METHODS
from tessella.recipes import RECIPES, recipe
from tessella.recipes.suggest import suggested_recipes
from tessella.run.config import to_yaml

ROOT = Path(__file__).resolve().parents[1]
TINY = "--backbone.name resnet10 --backbone.width 4 --batch-size 16 --device cpu --workers 1 --log-every 1"


def run(line: str) -> int:
    return main(shlex.split(line))


def in_a_fresh_process(code: str) -> list[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.splitlines()


# --- first contact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_answer_at_once_without_the_heavy_libraries(word):
    *said, seconds, heavy = in_a_fresh_process(
        f"import sys, time; from tessella.cli import main; code = main(['{word}'])\n"
        "print(time.process_time()); print({'torch', 'tyro', 'numpy', 'yaml'} & set(sys.modules) or code)"
    )
    assert said
    assert heavy == "0"
    assert float(seconds) < 0.3  # processor time from the interpreter's start: a busy machine does not count


def test_the_overview_lists_every_command(capsys):
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said and command.summary in said for name, command in COMMANDS.items())


def test_a_mistyped_recipe_is_refused_before_torch_is_imported():
    *_, heavy = in_a_fresh_process(
        "import sys; from tessella.cli import main\n"
        "code = main(['pretrain', 'swav_cpuu', '--data', 'x', '--out', 'y'])\n"
        "print({'torch', 'numpy'} & set(sys.modules) or code)"
    )
    assert heavy == "2"


def test_no_words_at_all_show_the_overview(capsys):
    assert main([]) == 0
    assert "usage: tessella COMMAND" in capsys.readouterr().out


def test_python_m_tessella_is_the_same_program():
    command = [sys.executable, "-m", "tessella", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("tessella ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_words(name, capsys):
    assert run(f"{name} --help") == 0
    said = capsys.readouterr().out
    assert f"usage: tessella {name}" in said
    positional = COMMANDS[name].usage.partition("--")[0].strip("[] ").split()
    assert all(word in said for word in positional)


def test_a_recipe_s_help_shows_its_method_s_fields_with_its_values(capsys):
    assert run("pretrain jigclu_cpu --help") == 0
    said = capsys.readouterr().out
    assert "--method.tile-size INT" in said and "(default: 16)" in said
    assert "images to train on" in said  # comments in the config are the help
    assert "--method.prototypes" not in said  # SwAV's


# --- user errors --------------------------------------------------------------------------------------------

WRONG = {
    "pretrian": "did you mean pretrain?",
    "nonsense": "there is no command 'nonsense'. The commands are demo, scan",
    "pretrain": "RECIPE comes first: tessella pretrain RECIPE --data DATA --out RUN",
    "pretrain --data digits --out {tmp}/run": "RECIPE comes first",
    "pretrain swav_cpuu --data digits --out {tmp}/run": "did you mean swav_cpu",
    "pretrain swav_cpu": "--data STR images to train on; labels are never read (required). Usage:",
    "pretrain swav_cpu --out {tmp}/run": "pretrain swav_cpu: --data STR",
    "pretrain swav_cpu --data {tmp}/nothing --out {tmp}/run": "nothing does not exist",
    "pretrain swav_cpu --data digits --out {tmp}/full": "full is not an empty folder",
    "pretrain swav_cpu --data digits --out {tmp}/run --epochs 0": "epochs=0 must be at least 1",
    "pretrain swav_cpu --data digits --out {tmp}/run --checkpoint-minutes inf": "checkpoint_minutes=inf must be",
    "pretrain swav_cpu --data digits --out {tmp}/run --rank-timeout inf": "rank_timeout=inf must be at least 0",
    "pretrain swav_cpu --data digits --out {tmp}/run --max-unreadable nan": "max_unreadable=nan must be at least 0",
    "pretrain swav_cpu --data digits --out {tmp}/run --method.queue-length -5": "method.queue_length=-5 must be",
    "pretrain swav_cpu --data digits::test --out {tmp}/run --method.prototypes 100000": "at most 360, the number of im",
    "bench swav_cpu --data digits --seconds -1": "seconds=-1.0 must be above 0",
    "evaluate random:resnet10 --train digits --test digits --out {tmp}/e --batch-size 0": "batch_size=0 must be at",
    "pretrain swav_cpu --data digits --out {tmp}/run --epochs three": "base 10: 'three'; Argument helptext",
    "pretrain swav_cpu --data digits --out {tmp}/run --optimizer.lr x": "could not convert string to float: 'x'",
    "pretrain swav_cpu --data digits --out {tmp}/run --epoch 3": "--epoch, 3; Perhaps you meant: --epochs INT",
    "pretrain swav_cpu --data digits --out {tmp}/run --device tpu": "'auto', 'cpu', 'cuda', 'mps'",
    "pretrain swav_cpu --data digits --out {tmp}/run --method.tile-size 8": "Unrecognized options",
    "pretrain swav_cpu --data digits --out {tmp}/run --method.name jigclu": "invalid choice 'jigclu'",
    "pretrain swav_cpu --data digits --out {tmp}/run --recipe jigclu_cpu": "leave --recipe out",
    "pretrain swav_cpu --data digits --out {tmp}/run --method.views.groups.0.scale 0.9 0.1": "lower bound",
    "resume": "RUN comes first",
    "resume {tmp}/full": "full is not a run folder",
    "resume {tmp}/full/note.txt": "note.txt is not a run folder",
    "report {tmp}/full/note.txt": "note.txt is not a run folder",
    "evaluate": "tessella evaluate: BACKBONE a run, imported",
    "evaluate random:resnet10 --out {tmp}/e": "by --train and --test, or by --data FILE.yaml",
    "evaluate random:resnet10 --data {tmp}/no.yaml --out {tmp}/e": "cannot be read: No such file",
    "compare {tmp}/full": "holds no evaluation.json with figures",
    "evaluate {tmp} --train digits::train --test digits::test --out {tmp}/e": "is not a run folder",
    "evaluate random:resnet10 --train digits --test digits --out {tmp}/e --protocols knm": "mean knn?",
    "embed random:resnet10 digits --out {tmp}/features.csv": "neither in .npy nor in .parquet",
    "embed random:resnet10": "DATA the images. (required) --out PATH",
    "recipes swav_gpu": "did you mean swav_cpu",
    "recipes swav_cpu swav_digits": "Unrecognized options: swav_digits",
    "report {tmp}": "is not a run folder",
    "scan": "DATA the images. (required). Usage: tessella scan DATA",
    "scan {tmp}/nothing": "does not exist. Give a folder, ",
    "demo --seeds x": "--seeds: invalid literal for int() with base 10: 'x'",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_input_is_one_helpful_line_and_code_2(line, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    assert run(line.format(tmp=tmp_path)) == 2
    said, told = capsys.readouterr()
    assert not said
    assert told.startswith("tessella: ") and told.count("\n") == 1
    assert WRONG[line] in told
    assert [path.name for path in tmp_path.iterdir()] in (
        ["full"],
        ["full", "e"],
        ["e", "full"],
    )  # no run begun


def test_control_characters_of_foreign_names_do_not_reach_the_terminal(capsys):
    assert main(["scan", "no\x1b[31mwhere\nelse\udc80"]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "runs/first/x"), "runs/first/x: Permission denied. Check that"),
        (NotADirectoryError(20, "Not a directory", b"runs/\xff"), "runs/\\udcff: Not a directory. Check that"),
        (OSError(24, "Too many open files"), "the system refuses: Too many open files"),
        (TimeoutError(), "the system refuses: TimeoutError"),
    ],
)
def test_an_error_of_the_system_is_one_line_and_code_2(error, said, monkeypatch, capsys):
    def refuses(words: list[str]) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "recipes", Command("recipes", "", refuses))
    assert run("recipes swav_cpu") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"tessella: {said}") and told.count("\n") == 1


def test_an_internal_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("tessella.recipes.recipe", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("recipes swav_cpu")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, "tessella: there is no command"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, ""),
        ({"RANK": "8", "LOCAL_RANK": "0"}, "tessella (rank 8): there is no command"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, ""),
    ],
)
def test_an_error_is_told_once_per_machine(variables, expected, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run("nonsense") == 2
    told = capsys.readouterr().err
    assert told.startswith(expected) if expected else not told


# --- interruptions ------------------------------------------------------------------------------------------


def test_an_interrupted_run_exits_with_75_and_tells_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(config, out):
        raise Interrupted("stopped and saved at step 3 of 10")

    monkeypatch.setattr("tessella.engine.pretrain.pretrain", stopped)
    assert main(["pretrain", "swav_cpu", "--data", "digits", "--out", str(tmp_path / "my run")]) == 75
    assert f"step 3 of 10; `tessella resume '{tmp_path}/my run'` continues the run" in capsys.readouterr().err


def test_ctrl_c_where_nothing_was_to_be_saved_exits_with_130(monkeypatch, capsys):
    def pressed(data, labels):
        raise KeyboardInterrupt

    monkeypatch.setattr("tessella.data.sources.objects.open_images", pressed)
    assert run("scan digits") == 130
    assert capsys.readouterr().err == "tessella: stopped by Ctrl-C\n"


CONSOLES = {  # where standard output goes -> exit code where the text is the result, and what is said
    "| true": (0, ""),
    ">&-": (0, ""),
    "> /dev/full": (2, "tessella: cannot write to standard output: No space left on device\n"),
    "> /dev/full 2>&1": (2, ""),
    "2>&- >&- <&-": (0, ""),
}


@pytest.mark.parametrize("to", CONSOLES)
def test_a_console_that_is_closed_full_or_has_no_reader_ends_in_one_line_at_most(to):
    done = in_a_shell(f"recipes {to}")
    assert (done.returncode, done.stderr) == CONSOLES[to]


@pytest.mark.parametrize("to", ["| true", "2>&1 | true", ">&- 2>&-", "> /dev/full 2>&1"])
def test_a_run_is_finished_without_its_console(to, tmp_path):
    out = tmp_path / "run"
    done = in_a_shell(f"pretrain swav_cpu --data digits::test --max-steps 2 --out {out} {TINY} {to}")
    assert done.returncode == 0 and done.stderr.count("\n") <= 1  # a note about the batch size
    assert (out / "backbone.safetensors").exists()


def in_a_shell(words: str) -> subprocess.CompletedProcess[str]:
    command = f"{shlex.quote(sys.executable)} -m tessella {words}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)


def test_a_console_without_unicode_gets_escapes(tmp_path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "tessella", "scan", str(tmp_path / "M\u00fcnchen")]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and done.stderr.isascii()


# --- looking ------------------------------------------------------------------------------------------------


def test_recipes_are_listed_method_by_method(capsys):
    assert run("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split() for line in lines if line.startswith("  ")]
    assert {line[0] for line in listed[1:]} == set(RECIPES)
    assert all(len(line) > 4 for line in listed)


def test_a_recipe_s_page_holds_its_settings(capsys):
    assert run("recipes swav_imagenet_200ep") == 0
    said = capsys.readouterr().out
    assert "Published: 73.9" in said
    settings = yaml.safe_load(said.partition("temperature 0.2:")[2])
    assert settings["batch_size"] == 4096 and settings["method"]["prototypes"] == 3000


@pytest.mark.parametrize(
    ("name", "forwards"),
    [
        ("jigclu_imagenet_200ep", "1 forward of 224 x 224"),  # 4 tiles of 112 make one montage
        ("swav_imagenet_200ep", "3.1 forwards of 224 x 224"),  # 2 + 6 * (96 / 224) ** 2 = 3.102
        ("swav_imagenet_400ep_2x224", "2 forwards of 224 x 224"),
    ],
)
def test_the_cost_of_a_recipe_counts_forwards_per_image(name, forwards, capsys):
    assert run(f"recipes {name}") == 0
    assert forwards in capsys.readouterr().out


def test_scan_counts_measures_and_lists_what_cannot_be_read(tmp_path, capsys):
    for number, size in enumerate([(40, 30), (60, 50), (100, 20)]):
        Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad\x1b[31m.jpg").write_bytes(b"no image")
    assert main(["scan", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "images      3\n" in said
    assert "40 to 100 pixels wide, 20 to 50 high; the shorter side has 30 in the median" in said
    assert "unreadable  1\n" in said and "bad\\x1b[31m.jpg: not an image" in said
    assert "recipe      swav_cpu or jigclu_cpu" in said


@pytest.mark.parametrize("side", [8, 32, 64, 65, 256, 4000])
def test_suggested_recipes_exist(side):
    names, reason = suggested_recipes(side)
    assert set(names) <= set(RECIPES) and reason


def test_the_editor_has_a_debug_configuration_for_one_step_of_each_method():
    path = ROOT / ".vscode" / "launch.json"
    if not path.exists():
        pytest.skip("not a checkout of the repository")
    arguments = [entry["args"] for entry in json.loads(path.read_text())["configurations"]]
    runs = [words for words in arguments if words[0] == "pretrain"]
    assert {recipe(words[1]).method.name for words in runs} == set(METHODS)
    assert all(words[words.index("--max-steps") + 1] == "1" for words in runs)


# --- the whole way ------------------------------------------------------------------------------------------


def test_from_images_to_a_backbone_its_figures_its_features_and_its_page(tmp_path, capsys):
    out = tmp_path / "my run"
    quoted = shlex.quote(str(out))
    words = f"--data digits::train --out {quoted} --max-steps 2 --method.temperature 0.2 --seed 5 {TINY}"

    assert run(f"pretrain swav_cpu {words} --method.views.groups.0.size 24") == 0
    said = capsys.readouterr().out
    assert f"tessella evaluate {quoted} --train" in said and f"tessella report {quoted}" in said
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["recipe"] == "swav_cpu" and settings["data"] == "digits::train" and settings["seed"] == 5
    assert settings["method"]["temperature"] == 0.2 and settings["method"]["views"]["groups"][0]["size"] == 24

    assert run(f"resume {quoted} --epochs 3") == 2
    assert "epochs would change from 60 to 3" in capsys.readouterr().err
    assert run(f"resume {quoted} --max-steps 3") == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 3
    capsys.readouterr()

    labelled = "--train digits::train --test digits::test"
    assert run(f"evaluate {quoted} {labelled} --protocols knn --out {quoted} --device cpu") == 0
    record = json.loads((out / "evaluation.json").read_text())[0]
    assert 0 < record["scores"]["top1"] <= 1
    assert "evaluation.json" in capsys.readouterr().out

    assert run(f"embed {quoted} digits::test --out {tmp_path}/features.npy --device cpu") == 0
    features = np.load(tmp_path / "features.npy", allow_pickle=False)
    assert features.shape == (360, 32) and np.isfinite(features).all()

    assert run(f"report {quoted}") == 0
    assert str(out / "report.html") in capsys.readouterr().out
    assert "swav_cpu" in (out / "report.html").read_text()


def test_max_steps_none_lets_a_run_go_to_its_end(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("tessella.engine.pretrain.resume", lambda out, changes, **more: given.update(changes, **more))
    saved = dataclasses.replace(recipe("swav_cpu"), max_steps=5)
    (tmp_path / "config.yaml").write_text(to_yaml(saved))
    assert run(f"resume {shlex.quote(str(tmp_path))} --max-steps None --workers 3") == 0
    assert given == {"max_steps": None, "workers": 3, "allow": []}


def test_a_report_of_images_that_have_gone_is_still_written(tmp_path, capsys):
    gone = tmp_path / "images"
    gone.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(gone / f"{number}.png")
    words = f"--data {gone} --out {tmp_path}/run --max-steps 1 {TINY}"
    assert run(f"pretrain jigclu_cpu {words}") == 0
    gone.rename(tmp_path / "elsewhere")
    assert run(f"report {tmp_path}/run") == 0
    assert "the page shows less" in capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_a_machine_without_the_memory_is_one_line_and_code_2(error, monkeypatch, capsys):
    def full(*_):
        raise error

    monkeypatch.setattr("tessella.cli._dispatch", full)
    assert run("embed x y --out z.npy") == 2
    said = capsys.readouterr().err
    assert "less memory than this needs" in said and said.count("\n") == 1
