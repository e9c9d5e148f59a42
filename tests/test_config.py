"""Loading a configuration: which source wins, which names are understood, and the message of every error."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from ulysses_infer.config import (
    Config,
    choose_for_device,
    load_config,
    refuse_unavailable,
    resolved_yaml,
    schema_reference,
)
from ulysses_infer.config.keys import all_keys
from ulysses_infer.errors import ConfigError
from ulysses_infer.parallel.layout import Mode


def load(overrides=(), **sections):
    """A configuration from a dict with a model, and overrides."""
    return load_config({"model": {"path": "org/model"}, **sections}, overrides)


def complaint(overrides=(), **sections):
    """The one line that `load` fails with."""
    with pytest.raises(ConfigError) as caught:
        load(overrides, **sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class TestSources:
    def test_defaults_are_those_of_the_schema(self):
        config = load()
        assert config == Config(model=config.model)
        assert config.cache.memory_utilization == 0.92

    def test_command_line_wins_over_recipe_wins_over_default(self, tmp_path):
        recipe = write(tmp_path, "r.yaml", "model: {path: org/m}\nparallel: {sp: 4}\nscheduler: {max_num_seqs: 7}\n")
        config = load_config(recipe, ["parallel.sp=2"])
        assert (config.parallel.sp, config.scheduler.max_num_seqs, config.parallel.tp) == (2, 7, 1)

    def test_nested_and_dotted_dict_keys_mean_the_same(self):
        assert load({"parallel": {"sp": 2}}) == load({"parallel.sp": 2}) == load(["parallel.sp=2"])

    def test_config_object_is_a_source_and_stays_as_it_was(self):
        config = load(["generate.prompts=['a']", "policy.name=static", "policy.mode=[1, 1]"])
        changed = load_config(config, ["scheduler.max_num_seqs=3"])
        assert (config.scheduler.max_num_seqs, changed.scheduler.max_num_seqs) == (256, 3)
        assert load_config(config) == config
        assert load_config(config).generate.prompts is not config.generate.prompts

    def test_omegaconf_objects_are_sources(self):
        config = load_config(OmegaConf.create({"model": {"path": "m"}}), OmegaConf.create({"parallel": {"sp": 2}}))
        assert config.parallel.sp == 2

    def test_other_kinds_of_source_are_refused(self):
        with pytest.raises(ConfigError, match=r"config = 3: give the path of a recipe, a dict or a Config"):
            load_config(3)

    def test_missing_model_says_how_to_give_it(self):
        with pytest.raises(ConfigError, match=r"^model.path is not set; give it in the recipe or as model.path=...$"):
            load_config(None)

    def test_empty_section_changes_nothing(self, tmp_path):
        recipe = write(tmp_path, "r.yaml", "model: {path: m}\nparallel:\ngenerate:\n  sampling:\n")
        assert load_config(recipe) == load_config({"model.path": "m"})

    def test_sampling_entries_merge_key_by_key(self):
        config = load(["generate.sampling.temperature=0.5"], generate={"sampling": {"max_tokens": 5, "top_p": 0.9}})
        assert config.generate.sampling == {"max_tokens": 5, "top_p": 0.9, "temperature": 0.5}

    def test_interpolation_reads_another_key(self):
        assert load(["scheduler.max_num_seqs=${parallel.sp}", "parallel.sp=3"]).scheduler.max_num_seqs == 3

    def test_interpolation_of_an_unknown_key_is_one_line(self):
        assert "parallel.nothing" in complaint(["parallel.sp=${parallel.nothing}"])

    def test_text_on_the_command_line_stays_text(self):
        assert load(["model.revision=0123456", "server.api_key=1e5"]).model.revision == "0123456"
        assert load(["model.revision=null"]).model.revision is None

    def test_importing_the_config_imports_no_torch(self):
        heavy = "{'torch', 'transformers', 'deepspeed'}"
        code = f"import sys, ulysses_infer.config; sys.exit(bool({heavy} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestIncludes:
    def test_later_include_wins_and_the_including_file_wins_over_both(self, tmp_path):
        write(tmp_path, "parts/a.yaml", "parallel: {sp: 2, tp: 2}\nscheduler: {max_num_seqs: 1}\n")
        write(tmp_path, "parts/b.yaml", "parallel: {sp: 4}\nscheduler: {max_num_seqs: 2}\n")
        recipe = write(
            tmp_path,
            "recipes/r.yaml",
            "include: [../parts/a.yaml, ../parts/b.yaml]\nmodel: {path: m}\nscheduler: {max_num_seqs: 3}\n",
        )
        config = load_config(recipe)
        assert (config.parallel.sp, config.parallel.tp, config.scheduler.max_num_seqs) == (4, 2, 3)

    def test_includes_nest_relative_to_their_own_file(self, tmp_path):
        write(tmp_path, "a/b/leaf.yaml", "parallel: {sp: 8}\n")
        write(tmp_path, "a/middle.yaml", "include: b/leaf.yaml\n")
        assert load_config(write(tmp_path, "r.yaml", "include: [a/middle.yaml]\nmodel.path: m\n")).parallel.sp == 8

    def test_one_file_may_be_included_on_two_ways(self, tmp_path):
        write(tmp_path, "leaf.yaml", "parallel: {sp: 8}\n")
        write(tmp_path, "a.yaml", "include: leaf.yaml\n")
        write(tmp_path, "b.yaml", "include: leaf.yaml\n")
        assert load_config(write(tmp_path, "r.yaml", "include: [a.yaml, b.yaml]\nmodel.path: m\n")).parallel.sp == 8

    def test_circle_is_an_error_that_shows_it(self, tmp_path):
        write(tmp_path, "a.yaml", "include: [b.yaml]\n")
        write(tmp_path, "b.yaml", "include: [a.yaml]\n")
        with pytest.raises(ConfigError, match=r"in a circle: .*a.yaml -> .*b.yaml -> .*a.yaml$"):
            load_config(tmp_path / "a.yaml")

    def test_missing_include_names_it_and_the_recipe(self, tmp_path):
        recipe = write(tmp_path, "r.yaml", "include: [nowhere.yaml]\n")
        with pytest.raises(ConfigError, match=r"include 'nowhere.yaml' \(in .*r.yaml\) does not exist in"):
            load_config(recipe)

    @pytest.mark.parametrize("include", ["{a: b}", "[1]", "3"])
    def test_include_that_is_not_a_list_of_names_is_refused(self, tmp_path, include):
        with pytest.raises(ConfigError, match="give a list of file names"):
            load_config(write(tmp_path, "r.yaml", f"include: {include}\n"))


class TestUnreadableRecipes:
    def test_missing_recipe(self):
        with pytest.raises(ConfigError, match=r"^recipe 'nowhere.yaml' does not exist"):
            load_config("nowhere.yaml")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("model: {path: m\n", r"is not valid YAML, line 2: .*expected ',' or '}'"),
            (
                "parallel: {sp: 1}\nparallel: {sp: 2}\n",
                r"is not valid YAML, line 2: found duplicate key parallel",
            ),
            ("- a\n- b\n", r"holds a list; it must hold sections"),
            ("just words\n", r"^unknown key 'just words' in .*; known: model, parallel"),
        ],
    )
    def test_broken_recipe_is_one_line(self, tmp_path, text, message):
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(write(tmp_path, "r.yaml", text))
        assert "\n" not in str(caught.value)

    def test_binary_file_is_one_line(self, tmp_path):
        (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(tmp_path / "r.yaml")


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("policy.treshold_tokens", "policy.threshold_tokens"),
            ("paralel.sp", "parallel.sp"),
            ("threshold_tokens", "policy.threshold_tokens"),
            ("memory_utilisation", "cache.memory_utilization"),
            ("shedulr.max_num_seqs", "scheduler.max_num_seqs"),
        ],
    )
    def test_the_nearest_key_is_named(self, written, meant):
        message = complaint([f"{written}=1"])
        assert message == f"unknown key '{written}' in the command line; did you mean '{meant}'?"

    def test_the_section_is_listed_when_nothing_is_near(self):
        assert complaint({"parallel": {"zzz": 1}}).endswith(
            "known: parallel.sp, parallel.tp, parallel.dp, parallel.modes, parallel.rank_order, "
            "parallel.pad_heads, parallel.expert_placement"
        )

    def test_unknown_section_lists_the_sections(self):
        assert "known: model, parallel, policy" in complaint(zzz={"a": 1})

    def test_the_file_is_named(self, tmp_path):
        recipe = write(tmp_path, "r.yaml", "model: {path: m, dtpye: auto}\n")
        with pytest.raises(ConfigError, match=r"unknown key 'model.dtpye' in .*r.yaml; did you mean 'model.dtype'\?"):
            load_config(recipe)

    def test_the_included_file_is_named(self, tmp_path):
        write(tmp_path, "part.yaml", "modle: {path: m}\n")
        with pytest.raises(ConfigError, match=r"unknown key 'modle' in .*part.yaml; did you mean 'model'\?"):
            load_config(write(tmp_path, "r.yaml", "include: part.yaml\n"))

    def test_key_below_a_plain_value_is_unknown(self):
        assert complaint(["parallel.sp.x=1"]).startswith("unknown key 'parallel.sp.x'")

    def test_unknown_sampling_parameter_names_the_nearest(self):
        assert "temperature" in complaint(["generate.sampling.temprature=1"])


class TestWrongValues:
    @pytest.mark.parametrize(
        ("override", "rest"),
        [
            ("parallel.sp=two", "'two' (in the command line): expected int"),
            ("parallel.sp=1.5", "1.5 (in the command line): expected int"),
            ("parallel.sp=true", "True (in the command line): expected int"),
            ("parallel.sp=null", "None (in the command line): expected int"),
            ("parallel.modes=3", "3 (in the command line): expected list of [sp, tp] or null"),
            (
                "parallel.modes=[[1, x]]",
                "[[1, 'x']] (in the command line): expected list of [sp, tp] or null",
            ),
            ("cache.memory_bytes=lots", "'lots' (in the command line): expected int or null"),
            ("cache.memory_utilization=most", "'most' (in the command line): expected float"),
            ("runtime.debug=perhaps", "'perhaps' (in the command line): expected bool"),
            ("generate.prompts=hello", "'hello' (in the command line): expected list"),
        ],
    )
    def test_wrong_type_names_key_value_and_type(self, override, rest):
        assert complaint([override]) == f"{override.partition('=')[0]} = {rest}"

    def test_list_for_a_text_is_refused(self):
        assert complaint({"model": {"revision": ["a"]}}).endswith("expected str or null")

    @pytest.mark.parametrize("section", ["parallel", "generate.sampling"])
    def test_plain_value_for_a_section_is_refused(self, section):
        assert "give its keys" in complaint([f"{section}=2"])

    @pytest.mark.parametrize(
        ("override", "rest"),
        [
            ("parallel.sp=0", "must be at least 1"),
            ("parallel.tp=-2", "must be at least 1"),
            ("parallel.dp=0", "must be at least 1"),
            ("policy.threshold_tokens=-1", "must be at least 0"),
            ("cache.block_size=0", "must be at least 1"),
            ("cache.memory_utilization=0", "must be more than 0"),
            ("cache.memory_utilization=1.01", "must be at most 1"),
            ("cache.memory_utilization=.nan", "must be more than 0"),
            ("cache.num_blocks=0", "must be at least 1"),
            ("model.max_model_len=0", "must be at least 1"),
            ("scheduler.max_num_seqs=0", "must be at least 1"),
            ("runtime.step_timeout=0", "must be more than 0"),
            ("server.port=65536", "must be at most 65535"),
            ("policy.name=magic", "choose from static, threshold, adaptive"),
            ("model.dtype=int8", "choose from auto, bfloat16, float16, float32"),
            ("scheduler.policy=lifo", "choose from fcfs, priority"),
            ("runtime.device=tpu", "choose from auto, cpu, cuda"),
            ("parallel.rank_order=random", "choose from sp_inner, tp_inner"),
        ],
    )
    def test_value_out_of_range_says_the_range(self, override, rest):
        key, _, value = override.partition("=")
        message = complaint([override])
        assert message.startswith(f"{key} = ")
        assert message.endswith(f"(in the command line): {rest}")
        assert value.strip(".") in message

    def test_limits_themselves_are_values(self):
        config = load(["cache.memory_utilization=1", "policy.threshold_tokens=0", "server.port=0"])
        assert config.cache.memory_utilization == 1.0

    def test_the_recipe_of_a_bad_value_is_named(self, tmp_path):
        recipe = write(tmp_path, "r.yaml", "model: {path: m}\nparallel: {sp: 0}\n")
        with pytest.raises(ConfigError, match=r"parallel.sp = 0 \(in .*r.yaml\): must be at least 1"):
            load_config(recipe)

    @pytest.mark.parametrize("argument", ["parallel.sp", "=3", "generate"])
    def test_argument_without_a_value_is_refused(self, argument):
        assert "is not of the form key=value" in complaint([argument])

    def test_broken_value_on_the_command_line_is_one_line(self):
        assert "generate.prompts=[1," in complaint(["generate.prompts=[1,"])


class TestModes:
    def test_default_modes_are_base_and_full_tensor_parallelism(self):
        parallel = load({"parallel": {"sp": 4, "tp": 2}}).parallel
        assert parallel.available_modes == [Mode(4, 2), Mode(1, 8)]
        assert (parallel.base, parallel.world_size) == (Mode(4, 2), 8)

    def test_listed_modes_join_the_base_mode(self):
        parallel = load(["parallel.sp=8", "parallel.modes=[[2, 4], [1, 8], [8, 1]]"]).parallel
        assert parallel.available_modes == [Mode(8, 1), Mode(2, 4), Mode(1, 8)]

    def test_one_rank_has_one_mode(self):
        assert load().parallel.available_modes == [Mode(1, 1)]

    def test_mode_the_weights_cannot_run_lists_those_they_can(self):
        message = complaint(["parallel.sp=2", "parallel.tp=2", "parallel.modes=[[4, 1]]"])
        assert "choose from [2, 2], [1, 4]" in message

    @pytest.mark.parametrize("modes", ["[[1, 2, 3]]", "[[0, 2]]", "[[2]]"])
    def test_a_value_that_is_not_a_pair_is_refused(self, modes):
        assert "each mode is [sp, tp]" in complaint(["parallel.sp=2", f"parallel.modes={modes}"])

    def test_threshold_policy_needs_the_mode_it_shifts_to(self):
        message = complaint(["parallel.sp=4", "parallel.modes=[[2, 2]]"])
        assert message.endswith("policy threshold shifts to [1, 4]; list it or set it to null")

    @pytest.mark.parametrize("mode", ["sp", "tp", "[2, 1]", "[1, 2]", "null"])
    def test_static_mode_takes_names_and_pairs(self, mode):
        assert load(["parallel.sp=2", "policy.name=static", f"policy.mode={mode}"]).policy.name == "static"

    @pytest.mark.parametrize("mode", ["pp", "3", "[1]", "[1.0, 2]"])
    def test_other_static_modes_are_refused(self, mode):
        assert "give sp, tp or [sp, tp]" in complaint(["parallel.sp=2", "policy.name=static", f"policy.mode={mode}"])

    def test_static_mode_must_be_available(self):
        message = complaint(["parallel.sp=4", "policy.name=static", "policy.mode=[2, 2]"])
        assert message.endswith("mode [2, 2] is not available; add it to parallel.modes")


class TestClashes:
    def test_override_that_contradicts_a_dict_raises_when_strict(self):
        with pytest.raises(ConfigError, match=r"^parallel.sp is 4 in the config dict but 2 in the arguments: give it"):
            load_config({"model.path": "m", "parallel": {"sp": 4}}, {"parallel.sp": 2}, strict_clash=True)

    def test_same_value_and_other_keys_do_not_clash(self):
        source = {"model.path": "m", "parallel": {"sp": 4}, "policy": {"name": "static"}}
        config = load_config(source, {"parallel.sp": "4", "policy": {"mode": "tp"}}, strict_clash=True)
        assert (config.parallel.sp, config.policy.mode) == (4, "tp")

    def test_default_does_not_clash(self):
        assert load_config(Config(), {"model.path": "m", "parallel.sp": 2}, strict_clash=True).parallel.sp == 2

    def test_clash_between_an_alias_and_a_key_raises_when_strict(self):
        with pytest.raises(ConfigError, match=r"^parallel\.tp is 4 "):
            load_config({"model.path": "m", "mp_size": 4}, {"parallel": {"tp": 2}}, strict_clash=True)

    def test_without_strict_the_override_wins(self):
        assert load({"parallel.sp": 2}, parallel={"sp": 4}).parallel.sp == 2


class TestAliases:
    @pytest.mark.parametrize("join", [lambda flag, value: [flag, value], lambda flag, value: [f"{flag}={value}"]])
    def test_flags_of_the_plugin_are_understood(self, join):
        arguments = [
            *join("--tensor-parallel-size", "2"),
            *join("--ulysses-sequence-parallel-size", "4"),
            *join("--shift-parallel-threshold", "64"),
            "--enable-shift-parallel",
        ]
        config = load(arguments, policy={"name": "static"})
        assert (config.parallel.sp, config.parallel.tp) == (4, 2)
        assert (config.policy.name, config.policy.threshold_tokens) == ("threshold", 64)

    def test_flags_and_dotted_keys_mix(self):
        config = load(["parallel.sp=2", "--max_num_seqs", "9", "cache.block_size=32"])
        assert (config.parallel.sp, config.scheduler.max_num_seqs, config.cache.block_size) == (2, 9, 32)

    def test_switches_can_be_turned_off(self):
        config = load(["--no-enable-shift-parallel", "--no-enable-prefix-caching", "--enforce-eager=false"])
        assert config.policy.name == "static"
        assert (config.cache.enable_prefix_caching, config.runtime.enforce_eager) == (False, False)

    def test_last_of_two_equal_flags_wins(self):
        assert load(["--max-num-seqs", "9", "--max-num-seqs=8"]).scheduler.max_num_seqs == 8

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["--tensor-paralel-size", "2"],
                "unknown flag '--tensor-paralel-size'; did you mean '--tensor-parallel-size'?",
            ),
            (["--xyz"], "unknown flag '--xyz'; any key can be set with key=value, as in parallel.sp=4"),
            (["--tensor-parallel-size"], "flag '--tensor-parallel-size' needs a value"),
            (["--tensor-parallel-size", "--enforce-eager"], "flag '--tensor-parallel-size' needs a value"),
            (["--no-max-num-seqs"], "unknown flag '--no-max-num-seqs'; did you mean '--max-num-seqs'?"),
        ],
    )
    def test_wrong_flags_are_one_line(self, arguments, message):
        assert complaint(arguments) == message

    def test_wrong_value_of_a_flag_names_flag_and_key(self):
        message = complaint(["--tensor-parallel-size", "two"])
        assert message == "parallel.tp = 'two' (in the command line, as tensor_parallel_size): expected int"

    def test_shift_switch_takes_only_true_and_false(self):
        assert complaint(["--enable-shift-parallel=2"]) == (
            "enable_shift_parallel (in the command line): must be true or false, not '2'"
        )

    def test_deepspeed_keys_are_understood(self):
        config = load({"dtype": torch.float16, "tensor_parallel": {"tp_size": 2}, "max_out_tokens": 512})
        assert (config.model.dtype, config.parallel.tp, config.model.max_model_len) == ("float16", 2, 512)
        assert load({"mp_size": 4}).parallel.tp == 4

    @pytest.mark.parametrize(
        ("given", "name"),
        [("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("torch.float32", "float32")],
    )
    def test_dtypes_have_other_names(self, given, name):
        assert load({"dtype": given}).model.dtype == load({"model": {"path": "m", "dtype": given}}).model.dtype == name

    def test_unknown_key_under_an_alias_is_refused(self):
        assert complaint({"tensor_parallel": {"tp_sise": 2}}).startswith("unknown key 'tensor_parallel.tp_sise'")

    @pytest.mark.parametrize(
        "given",
        [
            {"mp_size": 2, "parallel": {"tp": 4}},
            {"mp_size": 2, "tensor_parallel": {"tp_size": 4}},
            ["--tensor-parallel-size", "2", "parallel.tp=4"],
        ],
    )
    def test_alias_that_contradicts_its_key_raises(self, given):
        message = complaint(given)
        assert "both set parallel.tp, to 2 and 4: give one of them" in message

    def test_every_alias_leads_to_a_key(self):
        from ulysses_infer.config.aliases import ALIASES

        assert {alias.target for alias in ALIASES.values()} <= set(all_keys())

    @pytest.mark.parametrize(
        ("given", "key", "value"),
        [
            ({"tool_call_parser": "qwen3_xml"}, "server.tool_call_parser", "qwen3_coder"),
            ({"attention_backend": "FLASH_ATTN"}, "runtime.attention_backend", "flash_attn"),
            ({"attention_backend": "TORCH_SDPA"}, "runtime.attention_backend", "torch"),
            ({"generation_config": "vllm"}, "model.generation_config", "none"),
            ({"async_scheduling": True}, "scheduler.async_scheduling", True),
            ({"enable_expert_parallel": True}, "parallel.expert_placement", "expert"),
            ({"enable_expert_parallel": False}, "parallel.expert_placement", "auto"),
            ({"served_model_name": ["a"]}, "server.served_model_name", "a"),
            ({"lora_modules": ["a=org/x", '{"name": "b"}=y']}, "lora.adapters", {"a": "org/x", '{"name": "b"}': "y"}),
            ({"lora_modules": {"name": "a", "path": "org/x"}}, "lora.adapters", {"a": "org/x"}),
            ({"lora_modules": {"a": "org/x"}}, "lora.adapters", {"a": "org/x"}),
            ({"max_num_seqs": None, "tokenizer": None, "dtype": None}, "scheduler.max_num_seqs", 256),
            (["--enable-log-requests", "--port", "1"], "server.access_log", True),
            (["--chat-template=x.jinja"], "server.chat_template", "x.jinja"),
            (["--no-async-scheduling"], "scheduler.async_scheduling", False),
        ],
    )
    def test_arguments_of_vllm_set_ours(self, given, key, value):
        section, _, name = key.partition(".")
        assert getattr(getattr(load(given), section), name) == value

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("speculative_config", {"method": "ngram"}, "use speculation.method, speculation.model"),
            ("reasoning_parser", "qwen3", "there is no such setting here; reasoning is part of the content"),
            ("quantization", "fp8", "the quantization of the checkpoint is detected"),
            ("load_format", "dummy", "the format of the weights is detected"),
            ("pipeline_parallel_size", 2, "use parallel.sp and parallel.tp"),
            ("cpu_offload_gb", 4, "raise parallel.tp"),
            ("served_model_name", ["a", "b"], "several values"),
            ("lora_modules", ["a"], "lora.adapters.NAME=PATH"),
            ("checkpoint", "x.json", "give the checkpoint as the model"),
        ],
    )
    def test_arguments_without_a_meaning_here_are_refused_with_the_reason(self, name, value, words):
        message = complaint({name: value})
        assert message.startswith(name)
        assert words in message

    @pytest.mark.parametrize(
        "given",
        [
            {"swap_space": 4},
            {"disable_log_requests": True},
            {"load_format": "auto"},
            {"enable_lora": False},
            {"cpu_offload_gb": 0},
            {"replace_with_kernel_inject": True},
            ["--enable-auto-tool-choice"],
            ["--max-lora-rank", "64"],
            ["--no-disable-log-stats"],
        ],
    )
    def test_arguments_that_change_nothing_are_accepted_with_one_line(self, given, caplog):
        assert load(given) == load()
        assert len(caplog.messages) == 1
        assert "has no effect: " in caplog.text

    def test_null_for_a_foreign_argument_is_silent(self, caplog):
        assert load({"quantization": None, "speculative_config": None}) == load()
        assert not caplog.messages


class TestPaths:
    @pytest.mark.parametrize("sign", ["pyproject.toml", ".git"])
    def test_paths_are_found_from_the_repository_of_the_recipe(self, folders, sign):
        (folders / sign).touch()
        (folders / "models" / "m").mkdir(parents=True)
        write(folders, "templates/t.jinja", "x")
        text = "model: {path: models/m}\nserver: {chat_template: templates/t.jinja}\npolicy: {profile: auto}\n"
        config = load_config(write(folders, "recipes/deep/r.yaml", text))
        assert config.model.path == str(folders / "models" / "m")
        assert config.server.chat_template == str(folders / "templates" / "t.jinja")
        assert config.policy.profile == "auto"

    @pytest.fixture
    def folders(self, tmp_path, monkeypatch):
        """A working directory and a folder of recipes beside it."""
        (tmp_path / "work").mkdir()
        (tmp_path / "recipes").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        return tmp_path

    def recipe(self, folders, path):
        return write(folders, "recipes/r.yaml", f"model: {{path: {path}}}\n")

    def test_folder_beside_the_recipe_comes_first(self, folders):
        for place in ("work", "recipes"):
            (folders / place / "tiny").mkdir()
        assert load_config(self.recipe(folders, "tiny")).model.path == str(folders / "recipes" / "tiny")

    def test_folder_in_the_working_directory_comes_second(self, folders):
        (folders / "work" / "tiny").mkdir()
        assert load_config(self.recipe(folders, "tiny")).model.path == str(folders / "work" / "tiny")

    def test_anything_else_is_a_hub_id(self, folders):
        assert load_config(self.recipe(folders, "org/tiny")).model.path == "org/tiny"

    def test_dotted_path_is_never_a_hub_id(self, folders):
        assert load_config(self.recipe(folders, "../models/x")).model.path == str(folders / "models" / "x")

    def test_override_is_relative_to_the_working_directory(self, folders):
        for place in ("work", "recipes"):
            (folders / place / "tiny").mkdir()
        config = load_config(self.recipe(folders, "org/other"), ["model.path=tiny", "model.tokenizer=tiny"])
        assert config.model.path == config.model.tokenizer == str(folders / "work" / "tiny")

    def test_path_in_an_included_file_is_relative_to_that_file(self, folders):
        (folders / "parts" / "tiny").mkdir(parents=True)
        write(folders, "parts/p.yaml", "model: {path: tiny}\n")
        recipe = write(folders, "recipes/r.yaml", "include: ../parts/p.yaml\n")
        assert load_config(recipe).model.path == str(folders / "parts" / "tiny")


class TestIgnoredSettings:
    @pytest.mark.parametrize(
        ("overrides", "warning"),
        [
            (
                ["policy.name=static", "policy.threshold_tokens=9"],
                "policy.threshold_tokens (in the command line)",
            ),
            (
                ["policy.mode=tp"],
                "policy.mode (in the command line) is ignored: policy.name is threshold, not static",
            ),
            (["policy.profile=x"], "policy.profile"),
            (["cache.num_blocks=9", "cache.memory_bytes=9"], "cache.memory_bytes"),
            (
                ["speculation.method=ngram", "speculation.quantize=int4"],
                "speculation.quantize (in the command line) is ignored: speculation.method is ngram",
            ),
            (["scheduler.max_num_seqs=9", "scheduler.max_num_batched_tokens=8"], "scheduler.max_num_seqs"),
        ],
    )
    def test_setting_without_effect_is_warned_of(self, caplog, overrides, warning):
        load(overrides)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert caplog.messages[0].startswith(warning)
        assert "is ignored: " in caplog.messages[0]

    @pytest.mark.parametrize(
        "overrides",
        [[], ["policy.threshold_tokens=9"], ["policy.name=static"], ["scheduler.max_num_batched_tokens=8"]],
    )
    def test_defaults_and_settings_with_effect_are_not(self, caplog, overrides):
        load(overrides)
        assert not caplog.records

    def test_other_ranks_are_silent(self, caplog, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        load(["policy.mode=tp"])
        assert not caplog.records


class TestWhatTheDeviceChooses:
    @pytest.mark.parametrize(("device", "tokens"), [("cpu", 2048), ("cuda", 8192)])
    def test_the_largest_step(self, device, tokens):
        config = load()
        assert config.scheduler.max_num_batched_tokens is None
        choose_for_device(config, device)
        assert config.scheduler.max_num_batched_tokens == tokens

    @pytest.mark.parametrize(("device", "ahead"), [("cpu", False), ("cuda", True)])
    def test_whether_steps_are_scheduled_ahead(self, device, ahead):
        config = load()
        choose_for_device(config, device)
        assert config.scheduler.async_scheduling is ahead

    def test_explicit_values_are_kept(self):
        config = load(["scheduler.max_num_batched_tokens=77", "scheduler.async_scheduling=true"])
        choose_for_device(config, "cpu")
        assert config.scheduler.max_num_batched_tokens == 77
        assert config.scheduler.async_scheduling is True


class TestUnavailable:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("parallel.dp=2", "parallel.dp = 2: replicas need the router of serve; use 1 here"),
        ],
    )
    def test_feature_not_there_yet_is_refused_by_name(self, override, message):
        config = load([override])
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            refuse_unavailable(config)

    def test_available_configuration_passes(self):
        refuse_unavailable(load(["parallel.sp=4", "parallel.tp=2"]))


class TestPrompts:
    def test_texts_and_mappings_are_prompts(self):
        prompts = [
            "text",
            {"prompt": "text", "sampling": {"temperature": 0, "min_tokens": 20}},
            {"messages": [{"role": "user", "content": "hi"}]},
        ]
        config = load({"generate": {"prompts": prompts, "sampling": {"max_tokens": 100}, "schedule": [0, 1, 1]}})
        assert config.generate.prompts == prompts

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            (3, "generate.prompts[0] = 3: expected a text, or a mapping with prompt, messages, sampling"),
            ({"text": "x"}, "unknown key 'text' in generate.prompts[0]; known: prompt, messages, sampling"),
            ({"sampling": {}}, "generate.prompts[0]: give either prompt or messages"),
            ({"prompt": "x", "messages": []}, "generate.prompts[0]: give either prompt or messages"),
            ({"prompt": ["x"]}, "generate.prompts[0].prompt = ['x']: expected a text"),
            (
                {"messages": []},
                "generate.prompts[0].messages: expected a list of mappings with role and content",
            ),
            ({"messages": [{"role": "user"}]}, "generate.prompts[0].messages: expected a list of mappings"),
            ({"prompt": "x", "sampling": 3}, "generate.prompts[0].sampling = 3: expected a mapping"),
            ({"prompt": "x", "sampling": {"temperature": -1}}, "generate.prompts[0].sampling: "),
            ({"prompt": "x", "sampling": {"temprature": 1}}, "generate.prompts[0].sampling: "),
        ],
    )
    def test_wrong_prompt_is_named_by_its_place(self, prompt, message):
        assert complaint({"generate": {"prompts": [prompt]}}).startswith(message)

    def test_absurd_sampling_value_is_one_line(self):
        assert complaint(["generate.sampling.temperature=-1"]).startswith("generate.sampling: ")

    @pytest.mark.parametrize("schedule", ["[0]", "[0, -1]", "[0, x]"])
    def test_schedule_has_a_step_for_each_prompt(self, schedule):
        assert "generate.schedule" in complaint(["generate.prompts=[a, b]", f"generate.schedule={schedule}"])


class TestPrinting:
    def test_resolved_recipe_reads_back_as_the_same_configuration(self, tmp_path):
        overrides = [
            "parallel.sp=4",
            "parallel.modes=[[1, 4], [2, 2]]",
            "generate.sampling.logit_bias={5: 1.0}",
            r"generate.prompts=['print(\${x})', 'Ünïcode\n']",
        ]
        config = load(overrides)
        assert config.generate.prompts[0] == "print(${x})"
        assert load_config(write(tmp_path, "r.yaml", resolved_yaml(config))) == config
        assert load_config(config) == config

    def test_every_key_is_printed(self):
        tree = yaml.safe_load(resolved_yaml(load()))
        assert {f"{section}.{name}" for section, keys in tree.items() for name in keys} == set(all_keys())

    def test_secrets_are_not_printed(self):
        text = resolved_yaml(load(["server.api_key=s3cret", "server.admin_api_key=s3cret"]))
        assert "s3cret" not in text
        assert "api_key: (hidden)" in text

    def test_reference_has_a_row_for_every_key(self):
        rows = [line for line in schema_reference().splitlines() if line.startswith("| `")]
        assert [re.match(r"\| `([\w.]+)` \|", row)[1] for row in rows] == list(all_keys())
        assert "| `parallel.sp` | int, ≥ 1 | `1` | Sequence-parallel size" in schema_reference()
        assert "| `model.path` | str | required |" in schema_reference()

    def test_documented_reference_is_up_to_date(self):
        root = Path(__file__).parents[1]
        command = [sys.executable, "-m", "docs.generate.make_docs", "--check"]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
