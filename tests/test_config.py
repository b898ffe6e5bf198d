"""Options: parsing, refusals, and the JSON round trip."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys

import pytest

import growth
import train
from dst import METHODS, UpdateSchedule
from dst.config import (
    Config,
    DataConfig,
    GrowthConfig,
    check,
    from_json,
    parse_block,
    parse_interval,
    parse_skip,
    to_json,
)
from dst.growing import fields_of, growth_strategy
from dst.presets import PRESETS
from dst.recipes.sparse import build_method
from growth import STRATEGIES, InputError, MissingLibraryError


def test_defaults_pass_the_check():
    check(Config())


@pytest.mark.parametrize("library", ["faiss", "nmslib"])
def test_refusals_of_the_libraries(library):
    for flags, words in (
        ([f"--growth={library}", "--block=4"], "single neurons"),
        ([f"--growth={library}", "--growth.k-similar=0"], "k_similar 0"),
        ([f"--growth={library}", "--growth.index=tree"], f"{library} has no index 'tree'"),
        ([f"--growth={library}", "--growth.links=1"], "links 1"),
    ):
        pytest.importorskip(library, reason="the extra 'cpu' brings it")
        with pytest.raises(InputError, match=words):
            check(train.parse(flags))


@pytest.mark.parametrize("library", ["faiss", "nmslib"])
def test_a_library_that_is_missing_is_told_before_anything_is_built(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingLibraryError, match=f"needs the library {library}"):
        check(train.parse([f"--growth={library}"]))


def test_every_option_of_every_strategy_has_a_flag():
    options = {field.name for field in dataclasses.fields(GrowthConfig)}
    for name in STRATEGIES:
        # The decay of a sum over steps is called momentum; what Averaged wraps has flags itself.
        own = {{"decay": "momentum"}.get(field, field) for field in fields_of(name)}
        assert own - {"strategy"} <= options, name
    every = {field for name in STRATEGIES for field in fields_of(name)} | {"momentum"}
    assert options - {"strategy", "audit"} <= every


def test_every_strategy_may_be_named_and_keeps_its_own_defaults():
    for name, kind in STRATEGIES.items():
        if name not in ("faiss", "nmslib") or importlib.util.find_spec(name):
            assert growth_strategy(train.parse([f"--growth={name}"])) == kind()
            check(train.parse([f"--growth={name}"]))


def test_without_a_strategy_it_is_the_methods_own():
    for name, entry in METHODS.items():
        config = train.parse([f"--method={name}"])
        own = entry.build(UpdateSchedule(1, 9, 0.5), 0)
        assert growth_strategy(config) == getattr(own, "growth", None)
        check(config)


def test_options_reach_the_strategy():
    def made(*flags):
        config = train.parse(list(flags))
        check(config)
        return build_method(config, 20)

    method = made("--growth=lowrank", "--growth.rank=8", "--growth.recall=0.9")
    assert method.growth == growth.LowRank(8, 0.9)
    assert made("--growth.metric=l2").growth == growth.Exact("l2")
    assert made("--growth=momentum", "--growth.momentum=0.5").growth == growth.Momentum(0.5)
    method = made("--growth=subblock", "--growth.share=0.5", "--update-average-rank=4")
    assert method.growth == growth.Averaged(growth.Subblock(0.5), 4)
    method = made("--method=rigl", "--update-average-rank=4", "--update-average-decay=0.3")
    assert method.growth == growth.Averaged(growth.Exact(), 4, 0.3)
    assert made("--growth=averaged", "--growth.rank=4").growth == growth.Averaged(rank=4)
    method = made("--update-average=3", "--update-average-decay=0.3")
    assert method.growth == growth.Exact()
    assert (method.schedule.average, method.average_decay) == (3, 0.3)
    assert made("--update-average=3").average_decay == 1


def test_methods_that_grow_nothing_ignore_how():
    for method in ("static", "dense"):
        check(train.parse([f"--method={method}", "--growth.k-similar=0.2", "--growth-audit=2"]))


def test_a_config_from_before_options_could_be_left_open(tmp_path):
    """Such files say every default, also of what the strategy does not have."""
    old = {"strategy": "auto", "metric": "abs-ip", "k_similar": 0.15, "momentum": 0.9}
    for method, changed, expected in (
        ("rigl", {}, growth.Exact()),
        ("similarity", {"metric": "ip"}, growth.Exact("ip")),
        ("snfs", {"momentum": 0.8}, growth.Momentum(0.8)),
    ):
        (tmp_path / "c.json").write_text(json.dumps({"method": method, "growth": old | changed}))
        config = from_json(tmp_path / "c.json")
        check(config)
        assert growth_strategy(config) == expected


def test_flags_as_a_sweep_passes_them():
    config = train.parse(
        [
            "--lr=0.02",
            "--method=similarity",
            "--growth=faiss",
            "--growth.k-similar=0.25",
            "--growth.metric=l2",
            "--nesterov=false",
            "--compile=True",
            "--download",
            "true",
            "--update-skips-step=false",
            "--update_fraction=0.2",
        ]
    )
    assert config.training.lr == 0.02
    assert config.growth == dataclasses.replace(
        config.growth, strategy="faiss", k_similar=0.25, metric="l2"
    )
    assert (config.training.nesterov, config.training.compile, config.data.download) == (
        False,
        True,
        True,
    )
    assert config.update.update_skips_step is False
    assert config.update.update_fraction == 0.2


def test_bare_boolean_flags_and_a_string_that_reads_true():
    config = train.parse(["--download", "--no-nesterov", "--name=true"])
    assert config.data.download and not config.training.nesterov
    assert config.run.name == "true"


def test_json_round_trip(tmp_path):
    config = train.parse(["--density=0.3", "--block=2x4", "--update-end=0.5", "--threads=1"])
    (tmp_path / "c.json").write_text(to_json(config))
    assert from_json(tmp_path / "c.json") == config
    again = train.parse([f"--config={tmp_path / 'c.json'}", "--lr=0.3"])
    assert again.sparsity == config.sparsity and again.training.lr == 0.3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "must hold an object"),
        ('{"metod": "set"}', "unknown option metod"),
        ('{"training": {"lrr": 1}}', "unknown option training.lrr"),
        ('{"training": {"lr": "fast"}}', "must be float"),
        ('{"training": {"epochs": 1.5}}', "must be int"),
        ('{"training": {"nesterov": 1}}', "must be bool"),
    ],
)
def test_damaged_config_files(tmp_path, text, words):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=words):
        from_json(tmp_path / "c.json")


def test_missing_config_file(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        train.parse([f"--config={tmp_path / 'none.json'}"])


def test_an_int_where_a_float_belongs_is_a_float(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"training": {"lr": 1}}))
    assert from_json(tmp_path / "c.json").training.lr == 1.0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--density=0"], "density 0"),
        (["--density=1"], "density 1"),
        (["--density=1.5"], "density 1.5"),
        (["--density=nan"], "density nan"),
        (["--density=-0.1"], "density -0.1"),
        (["--method=rigel"], "did you mean rigl"),
        (["--growth=fais"], "did you mean faiss"),
        (["--growth.metric=cosine"], "abs-ip"),
        (["--growth.k-similar=0.2"], "growth exact has no k-similar, which is for faiss, nmslib"),
        (["--method=set", "--growth.metric=abs-ip"], "random has no metric, which is for dense"),
        (["--growth=exact", "--growth.momentum=0.5"], "which is for averaged, momentum"),
        (["--growth=exact", "--growth.screen=float16"], "screen 'float16'"),
        (["--growth=lowrank", "--growth.rank=0"], "rank 0"),
        (["--growth=lowrank", "--growth.recall=1.5"], "recall 1.5"),
        (["--growth=gse", "--growth.sampling=all"], "sampling 'all'"),
        (["--growth=gse", "--growth.subset=0"], "subset 0"),
        (["--growth=subblock", "--growth.share=2"], "share 2"),
        (["--growth=pool", "--growth.candidates=0.5"], "candidates 0.5"),
        (["--growth=blocks", "--growth.way=round"], "way 'round'"),
        (["--update-average-rank=0"], "update-average-rank 0"),
        (["--update-average-rank=4", "--update-average-decay=1.1"], "update-average-decay 1.1"),
        (["--update-average-decay=0.5"], "nothing to decay"),
        (["--update-average-rank=4", "--update-average=3"], "leave --update-average away"),
        (["--update-average-rank=4", "--growth.metric=l2"], "metric 'l2'"),
        (["--update-average-rank=4", "--growth=momentum"], "momentum averages by itself"),
        (["--update-average-decay=0.5", "--method=snfs"], "momentum averages by itself"),
        (["--update-average-rank=4", "--growth=averaged"], "averaged averages by itself"),
        (["--update-average-rank=4", "--method=set"], "random searches no vectors"),
        (["--update-average-rank=4", "--growth=random"], "random searches no vectors"),
        (["--growth-audit=-1"], "growth-audit -1"),
        (["--method=rigl", "--growth=faiss"], "rigl grows by exact"),
        (["--method=set", "--growth=exact"], "set grows by random"),
        (["--method=static", "--growth=exact"], "grows by nothing"),
        (["--method=rigl", "--growth.metric=l2"], "no metric"),
        (["--growth.metric=ip", "--block=4"], "single neurons"),
        (["--data=mnist5k"], "did you mean mnist-5k"),
        (["--distribution=erks"], "did you mean erk"),
        (["--block=0"], "block '0'"),
        (["--block=2x2x2"], "block '2x2x2'"),
        (["--update-interval=often"], "update-interval 'often'"),
        (["--update-interval=0"], "update-interval '0'"),
        (["--update-interval=infep"], "update-interval 'infep'"),
        (["--update-fraction=0"], "update-fraction"),
        (["--update-end=2"], "update-end"),
        (["--update-decay=cos"], "did you mean cosine"),
        (["--epochs=0"], "epochs 0"),
        (["--batch=0"], "batch 0"),
        (["--lr=inf"], "lr inf"),
        (["--momentum=1"], "momentum"),
        (["--momentum=0"], "no-nesterov"),
        (["--label-smoothing=1"], "label-smoothing"),
        (["--lr-milestones=a"], "separated by commas"),
        (["--amp=fp8"], "amp 'fp8'"),
        (["--seed=-1"], "seed -1"),
        (["--wandb=yes"], "wandb 'yes'"),
        (["--workers=-1"], "workers"),
        (["--density-start=1.5"], "density-start 1.5"),
        (["--density-ramp=square"], "density-ramp 'square'"),
        (["--density-ramp-end=0"], "density-ramp-end"),
        (["--redistribute=size"], "redistribute 'size'"),
        (["--redistribute=momentum"], "use --method snfs or"),
        (["--method=rigl", "--redistribute=momentum"], "use --method snfs or"),
        (["--method=snfs", "--growth=exact"], "snfs grows by momentum"),
        (["--growth=momentum", "--growth.metric=l2"], "momentum has no metric"),
        (["--growth=random", "--growth.metric=ip"], "random has no metric"),
        (["--method=snfs", "--growth.momentum=1"], "momentum decay 1"),
        (["--preset=itop"], "preset 'itop' is unknown"),
    ],
)
def test_refusals(flags, words):
    with pytest.raises(InputError, match=words) as caught:
        check(train.parse(flags))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr=fast"], "fast"),
        (["--lrr=0.1"], "lrr"),
        (["--epochs"], "epochs"),
        (["stray"], "stray"),
    ],
)
def test_complaints_of_the_parser_are_one_line(flags, words):
    with pytest.raises(InputError, match=words) as caught:
        train.parse(flags)
    assert "\n" not in str(caught.value) and "│" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_configs_that_flags_win_over(name, tmp_path):
    config = train.parse([f"--preset={name}"])
    check(config)
    for option, value in PRESETS[name].options.items():
        found = config
        for part in option.split("."):
            found = getattr(found, part)
        assert found == value, option
    assert (config.model, config.data.data) == (Config().model, Config().data.data)
    other = train.parse(["--epochs=3", f"--preset={name}", "--density=0.3"])
    assert other.training.epochs == 3 and other.sparsity.density == 0.3
    assert other.update == config.update
    # What a run writes says everything by itself.
    (tmp_path / "config.json").write_text(to_json(other))
    assert train.parse([f"--config={tmp_path / 'config.json'}"]) == dataclasses.replace(
        other, run=dataclasses.replace(other.run, config=str(tmp_path / "config.json"))
    )


def test_presets_are_the_papers_settings():
    itop = train.parse(["--preset=itop-rigl"])
    assert itop.method == "rigl" and itop.sparsity.distribution == "erk"
    assert itop.update.update_interval == "4000" and itop.update.update_fraction == 0.5
    assert (itop.data.batch, itop.training.epochs, itop.training.lr) == (128, 250, 0.1)
    assert train.parse(["--preset=itop-set"]).update.update_interval == "1500"
    thesis = train.parse(["--preset=similarity-step"])
    method = build_method(dataclasses.replace(thesis, data=DataConfig(batch=256)), 196)
    assert method.schedule.interval == 1 and not method.skips_step
    assert {method.schedule.fraction_at(step) for step in (1, 5000, 13_719)} == {0.01}
    assert method.due(13_719)
    assert thesis.sparsity.skip == "none" and thesis.sparsity.distribution == "uniform"


def test_a_preset_and_a_config_are_one_too_many(tmp_path):
    (tmp_path / "config.json").write_text(to_json(Config()))
    with pytest.raises(InputError, match="give one of them"):
        train.parse(["--preset=itop-set", f"--config={tmp_path / 'config.json'}"])


def test_small_parsers():
    assert parse_block("16") == (16, 16) and parse_block("8x32") == (8, 32)
    assert parse_interval("x", "100", 28) == 100
    assert parse_interval("x", "1ep", 28) == 28 and parse_interval("x", "0.5ep", 28) == 14
    assert parse_interval("x", "0.001ep", 28) == 1
    assert parse_skip("auto") is None and parse_skip("none") == ()
    assert parse_skip("first, fc*") == ("first", "fc*")
