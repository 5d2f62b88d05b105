"""Recipes: every shipped file, round trips, overrides, and refusals with suggestions."""

import dataclasses
import importlib
import json
import pathlib

import jax
import pytest

from configs.study import cifar10
from gfa_jax import cli
from gfa_jax import config as config_lib
from gfa_jax.training import objective, recipe

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def recipes():
    """Returns every recipe as ``--config`` names it."""
    for path in CONFIGS:
        module = importlib.import_module(f"configs.{path.stem}")
        names = [f":{name}" for name in getattr(module, "RECIPES", ())] or [""]
        yield from (f"{path}{name}" for name in names)


@pytest.mark.parametrize("name", list(recipes()), ids=lambda name: name.rpartition("/")[2])
def test_every_config_is_valid_and_survives_json(name):
    path = pathlib.Path(name.partition(".py:")[0]).with_suffix(".py")
    config = config_lib.load_file(name)
    config_lib.validate(config)
    assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config)))) == config
    docstring = path.read_text().split('"""')[1]
    assert all(
        f"\n{word}: " in docstring for word in ("Source", "Data", "Cost", "Result", "Command")
    )
    assert f"configs/{path.name}" in docstring
    size = 8 if config.data.name == "digits" else 32
    # A network on images that are not normalised takes any number of channels.
    grey = config.data.name in ("digits", "tfds:mnist", "tfds:fashion_mnist", "tfds:kmnist")
    shape = (size, size, 1 if grey else 3)
    built = recipe.build(config, num_classes=10, image_shape=shape)
    assert bool(built.train_layers) == (config.gfa.weight > 0)
    # The small CNNs are trained bias-free, the networks of the published recipes with BatchNorm.
    assert config.model.homogeneous == (config.model.name in ("cnn4", "cnn6"))


def test_a_file_of_many_recipes_needs_a_name():
    path = next(str(path) for path in CONFIGS if path.stem == "digits_baselines")
    assert config_lib.load_file(f"{path}:trades").loss.name == "trades"
    with pytest.raises(ValueError, match=r"name one, as in .*\.py:NAME \(label_smoothing, n_fgsm"):
        config_lib.load_file(path)
    with pytest.raises(ValueError, match="recipe='trade' is not one of.*Did you mean 'trades'"):
        config_lib.load_file(f"{path}:trade")
    with pytest.raises(ValueError, match="holds several recipes: name one"):
        config_lib.load_file(f"{path}:")
    with pytest.raises(ValueError, match="holds one recipe, and takes no name such as 'x'"):
        config_lib.load_file(path.replace("_baselines", "_gfa") + ":x")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        config_lib.load_file(path.replace("_baselines", "_baseline") + ":trades")


@pytest.mark.parametrize(
    ("name", "trial"),
    [
        ("cifar10_standard", "standard"),
        ("cifar10_gfa", "gfa_input"),
        ("cifar10_fgsm_at", "fgsm_at"),
        ("cifar10_pgd_at", "pgd10_at"),
        ("cifar10_gfa_at", "gfa_fgsm_weak"),
    ],
)
def test_shipped_recipes_are_the_studys(name, trial):
    """But for their length, width and images."""
    shipped = importlib.import_module(f"configs.{name}").get_config()
    tried = cifar10.get_config(trial)
    assert (shipped.gfa, shipped.attack) == (tried.gfa, tried.attack)
    assert (shipped.optimizer, shipped.threat, shipped.loss) == (
        tried.optimizer,
        tried.threat,
        tried.loss,
    )


def test_a_config_holds_primitives_only():
    def check(values):
        for value in values.values():
            if isinstance(value, dict):
                check(value)
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                for item in value:
                    check(item)
            else:
                kinds = (str, int, float, bool, list, type(None))
                assert isinstance(value, kinds)

    check(config_lib.to_dict(config_lib.TrainConfig()))


@pytest.fixture
def smoke():
    return str(next(path for path in CONFIGS if path.stem == "smoke"))


def test_overrides_by_dotted_flags(smoke):
    flags = cli.parse_train(
        [
            f"--config={smoke}",
            "--workdir",
            "runs/x",
            "--config.threat.epsilon=8/255",
            "--config.optimizer.learning_rate",
            "0.5",
            "--config.data.flip=True",
            "--config.model.input_mean",
            "0.1",
            "0.2",
            "0.3",
            "--config.attack.step_size=2/255",
            "--stop_after=3",
        ]
    )
    assert flags.workdir == "runs/x"
    assert flags.stop_after == 3
    assert flags.config.threat.epsilon == pytest.approx(8 / 255)
    assert flags.config.optimizer.learning_rate == 0.5
    assert flags.config.data.flip
    assert flags.config.model.input_mean == (0.1, 0.2, 0.3)
    assert flags.config.attack.step_size == pytest.approx(2 / 255)
    untouched = config_lib.load_file(smoke)
    assert flags.config.gfa == untouched.gfa


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.learning_rat=1"], "config.optimizer.learning-rate"),
        (["--config.gfa.wieght=1"], "config.gfa.weight"),
        (["--config.threat.epsilon=much"], "epsilon"),
        (["--wrokdir=x"], "workdir"),
    ],
)
def test_misspelt_flags_end_with_a_suggestion(smoke, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.parse_train([f"--config={smoke}", "--workdir=x", *arguments])
    assert stopped.value.code == 2
    text = "".join(capsys.readouterr()).replace("_", "-").replace("\n", " ")
    assert message in text


def test_config_files_that_cannot_be_used_are_named(tmp_path, capsys, smoke):
    missing = smoke.replace("smoke.py", "smok.py")
    for argv, message in (
        ([], "--config FILE is required"),
        (["--config", missing], "does not exist. Close: "),
    ):
        with pytest.raises(SystemExit):
            cli.parse_train([*argv, "--workdir", "x"])
        assert message in capsys.readouterr().err
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"has no get_config\(\)"):
        config_lib.load_file(str(bad))
    bad.write_text(
        "from gfa_jax.config import TrainConfig\n"
        "def get_config(seed=3):\n    return TrainConfig(seed=seed)\n"
    )
    assert config_lib.load_file(str(bad)).seed == 3
    bad.write_text("def get_config():\n    return {}\n")
    with pytest.raises(ValueError, match="returns dict, not"):
        config_lib.load_file(str(bad))


def test_regularizers_from_the_command_line(tmp_path):
    path = next(str(path) for path in CONFIGS if path.stem == "digits_baselines")
    flags = cli.parse_train(
        [
            f"--config={path}:curvature",
            f"--workdir={tmp_path}",
            "--config.regularizers.0.weight=3",
            "--config.regularizers.0.options.h",
            "0.25",
        ]
    )
    (entry,) = flags.config.regularizers
    assert (entry.name, entry.weight) == ("curvature", 3.0)
    assert entry.options == {"h": 0.25, "squared": False}
    assert not list(tmp_path.iterdir())


def test_differences_within_a_list_are_named_by_field():
    old, new = (
        config_lib.to_dict(
            config_lib.TrainConfig(
                regularizers=(config_lib.RegularizerConfig(name="grad_align", weight=weight),)
            )
        )
        for weight in (0.1, 0.2)
    )
    assert config_lib.differences(old, new) == ["config.regularizers[0].weight: 0.1 there, 0.2 now"]


def test_a_config_of_an_earlier_version_means_what_it_did():
    """Without the sections and fields that came later: the same recipe as with their defaults."""
    values = config_lib.to_dict(config_lib.TrainConfig())
    for section in ("loss", "regularizers", "noise"):
        del values[section]
    for section, fields in {
        "attack": ("loss", "start_std"),
        "gfa": ("inputs",),
        "optimizer": ("drops", "nesterov"),
    }.items():
        for field in fields:
            del values[section][field]
    assert config_lib.from_dict(values) == config_lib.TrainConfig()


def test_damaged_sections_of_a_saved_config_are_named():
    values = config_lib.to_dict(config_lib.TrainConfig())
    values["regularizers"] = [{"name": "curvature"}, 3]
    with pytest.raises(ValueError, match=r"config.regularizers\[1\]=3 must hold fields"):
        config_lib.from_dict(values)
    values["regularizers"] = [{"nam": "curvature"}]
    with pytest.raises(ValueError, match=r"unknown field config.regularizers\[0\].nam"):
        config_lib.from_dict(values)


def test_unknown_fields_of_a_saved_config_are_named():
    values = config_lib.to_dict(config_lib.TrainConfig())
    values["gfa"]["wieght"] = 1
    with pytest.raises(ValueError, match=r"unknown field config.gfa.wieght. Did you mean 'weight'"):
        config_lib.from_dict(values)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (None, {"batch_size": 0}, "config.batch_size=0 must be an integer >= 1"),
        (None, {"precision": "half"}, "config.precision='half' is not one of"),
        (None, {"parallelism": "pmapp"}, "config.parallelism='pmapp'.*Did you mean 'pmap'"),
        (None, {"fsdp": 0}, "config.fsdp=0 must be an integer >= 1"),
        (None, {"fsdp": 2}, "config.fsdp=2 must be a divisor of the 1 devices"),
        (None, {"accumulation_steps": 0}, "config.accumulation_steps=0 must be an integer >= 1"),
        (
            None,
            {"accumulation_steps": 3},
            "batch_size=64 must be divisible by the 1 devices times config.accumulation_steps=3",
        ),
        (None, {"ema_decay": 1.0}, r"config.ema_decay=1.0 must lie in \[0, 1\)"),
        (
            None,
            {
                "parallelism": "pmap",
                "loss": config_lib.LossConfig(weight_perturbation=0.01),
                "attack": config_lib.AttackConfig(name="pgd"),
            },
            "config.loss.weight_perturbation=0.01 needs config.parallelism='jit'",
        ),
        ("model", {"dtype": "float16"}, "config.model.dtype='float16' is not one of"),
        ("data", {"placement": "disk"}, "config.data.placement='disk' is not one of"),
        ("threat", {"epsilon": -1.0}, "config.threat.epsilon=-1.0"),
        ("threat", {"norm": "l3"}, "config.threat.norm='l3'.*Did you mean 'l2'|'l1'"),
        ("model", {"name": "cnn44"}, "config.model.name='cnn44'.*Did you mean 'cnn4'"),
        ("gfa", {"target": "margins"}, "config.gfa.target='margins'.*Did you mean 'margin'"),
        (
            "gfa",
            {"warmup_fraction": 1.5},
            r"config.gfa.warmup_fraction=1.5 must be a number in \[0, 1\]",
        ),
        ("attack", {"name": "apgd"}, "config.attack.name='apgd'.*Did you mean 'pgd'"),
        ("optimizer", {"learning_rate": float("nan")}, "config.optimizer.learning_rate=nan"),
        ("optimizer", {"drops": (0.7, 0.5)}, r"config.optimizer.drops=\(0.7, 0.5\) must ascend"),
        ("optimizer", {"drops": (0.5, 1.0)}, "must ascend within"),
        ("loss", {"name": "tradess"}, "config.loss.name='tradess'.*Did you mean 'trades'"),
        ("loss", {"name": "trades"}, "needs adversarial examples, and config.attack.name='none'"),
        ("loss", {"label_smoothing": 2.0}, "config.loss.label_smoothing=2.0"),
        ("loss", {"weight_perturbation": -1.0}, "config.loss.weight_perturbation=-1.0"),
        ("loss", {"statistics": "both"}, "config.loss.statistics='both'"),
        ("attack", {"loss": "kl"}, "config.attack.loss='kl' needs config.attack.name='pgd'"),
        (
            "attack",
            {"start_std": 0.1},
            "config.attack.start_std=0.1 needs config.attack.name='pgd'",
        ),
        (
            "attack",
            {"name": "pgd", "loss": "kl", "random_start": False},
            "no gradient at the clean input",
        ),
        ("attack", {"loss": "klx"}, "config.attack.loss='klx'"),
        ("noise", {"name": "normal"}, "config.noise.name='normal' does not fit"),
        ("noise", {"scale": 0.1}, "config.noise.name='none' does not fit config.noise.scale=0.1"),
        ("gfa", {"inputs": "adversarial"}, "config.gfa.inputs='adversarial'"),
        (
            None,
            {"regularizers": (config_lib.RegularizerConfig(name="grad_algn"),)},
            r"config.regularizers\[0\].name='grad_algn'.*Did you mean 'grad_align'",
        ),
        (
            None,
            {"regularizers": (config_lib.RegularizerConfig(name="grad_align", weight=-1),)},
            r"config.regularizers\[0\].weight=-1",
        ),
        (
            None,
            {"regularizers": (config_lib.RegularizerConfig(name="a:b", inputs="noisy"),)},
            r"config.regularizers\[0\].inputs='noisy'",
        ),
        (
            None,
            {"regularizers": (config_lib.RegularizerConfig(name="a:b", options={"weight": 1}),)},
            r"must not hold \['weight'\]",
        ),
        (
            None,
            {"regularizers": (config_lib.RegularizerConfig(name="a:b", options={"p": (1, 2)}),)},
            r"options\['p'\]=\(1, 2\) of type tuple must be",
        ),
        (
            "attack",
            {"name": "fgsm", "step_size": 0.1, "random_start": False},
            "config.attack.step_size=0.1 needs config.attack.random_start=True",
        ),
        ("loop", {"log_every": 0}, "config.loop.log_every=0"),
        ("gfa", {"input_ceiling": 0.0}, r"config.gfa.input_ceiling=0.0 must lie in \(0, 1\]"),
        (
            "gfa",
            {"form": "tangential", "input_ceiling": 0.1},
            "config.gfa.input_ceiling=0.1: the form 'tangential' has no ceiling",
        ),
    ],
)
def test_values_out_of_range_are_refused(section, changes, message):
    config = config_lib.TrainConfig()
    if section is None:
        config = dataclasses.replace(config, **changes)
    else:
        part = dataclasses.replace(getattr(config, section), **changes)
        config = dataclasses.replace(config, **{section: part})
    with pytest.raises(ValueError, match=message):
        config_lib.validate(config)


def test_the_batch_must_divide_over_the_devices():
    with pytest.raises(ValueError, match="config.batch_size=10 must be divisible by the 4 devices"):
        config_lib.validate(config_lib.TrainConfig(batch_size=10), num_devices=jax.device_count())


def test_pmap_is_for_whole_state_in_one_process():
    config = config_lib.TrainConfig(parallelism="pmap", fsdp=2)
    with pytest.raises(ValueError, match="config.fsdp=2 needs config.parallelism='jit'"):
        config_lib.validate(config, num_devices=4)
    config = dataclasses.replace(config, fsdp=1)
    config_lib.validate(config, num_devices=4)
    with pytest.raises(ValueError, match="config.parallelism='pmap' runs in one process.*2"):
        config_lib.validate(config, num_devices=4, num_processes=2)


def test_how_a_run_is_laid_out_may_change_on_resuming():
    one = config_lib.TrainConfig()
    other = dataclasses.replace(
        one,
        fsdp=4,
        data=dataclasses.replace(one.data, placement="stream"),
        model=dataclasses.replace(one.model, remat=True),
    )
    values = [config_lib.to_dict(config) for config in (one, other)]
    assert config_lib.differences(*values) == []
    values[1]["model"]["dtype"] = "bfloat16"
    assert config_lib.differences(*values) == [
        "config.model.dtype: 'float32' there, 'bfloat16' now"
    ]


def test_schedules_reach_the_objective():
    """The alignment weight and the training radius rise from 0 over their share of training."""
    weight_at = objective.ramp(4.0, 0.5, 100)
    assert [float(weight_at(step)) for step in (0, 25, 50, 99)] == [0.0, 2.0, 4.0, 4.0]
    assert objective.ramp(0.0, 0.5, 100)(3) == 0.0
    assert objective.ramp(4.0, 0.0, 100)(0) == 4.0
