"""An engine whose model has recurrent layers: snapshots, preemption, aborts, sleep, new weights, sizes and errors."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from tests.equivalence.tiny_models import make_prompts
from tests.tiny import settings, tiny_llama
from ulysses_infer import SamplingParams, init_inference
from ulysses_infer.errors import ConfigError

LENGTHS = (37, 9, 22)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
COMMON = {"hidden_size": 64, "vocab_size": 101, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


def hybrid(seed=0):
    """Three gated delta nets and an attention layer."""
    torch.manual_seed(seed)
    config = Qwen3NextConfig(
        **COMMON,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=0,
        mlp_only_layers=[0, 1, 2, 3],
        max_position_embeddings=128,
    )
    return Qwen3NextForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return hybrid()


def opened(model, **changes):
    return init_inference(
        model, **settings(**{"cache.state_snapshot_interval": 8, "model.max_model_len": 128, **changes})
    )


def tokens(engine, prompts):
    return [output.outputs[0].token_ids for output in engine.generate(prompts, GREEDY)]


@torch.inference_mode()
def expected(model, prompts):
    made = (model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False) for prompt in prompts)
    return [output[0, -8:].tolist() for output in made]


def test_a_repeated_prompt_starts_from_a_snapshot_and_decodes_are_replayed(model):
    prompts = make_prompts(lengths=LENGTHS)
    wanted = expected(model, prompts)
    with opened(model) as engine:
        worker = engine._rank.worker
        assert tokens(engine, prompts) == wanted
        assert engine.stats()["state_snapshot_hits"] == 0
        assert tokens(engine, prompts) == wanted
        stats = engine.stats()
        assert stats["state_snapshot_hits"] == 3
        assert stats["state_snapshots"] > 3
        assert stats["prefix_cache_hits"] == 32 + 8 + 16
        assert stats["state_slots"] == 8
        assert worker.graphs._recorded, "decodes of hybrids are recorded"
        engine._engine.scheduler.allocator.assert_idle()


def test_replayed_decodes_read_the_states_of_whichever_sequences_run(model):
    """Slots are inputs of a recording: requests end and start between replays of steps with equally many rows."""
    prompts = make_prompts(lengths=(30, 5, 17, 11, 26, 8))
    with opened(model, **{"scheduler.max_num_seqs": 2}) as engine:
        assert tokens(engine, prompts) == expected(model, prompts)
        with opened(model, **{"scheduler.max_num_seqs": 2, "runtime.enforce_eager": True}) as eager:
            assert tokens(eager, prompts) == tokens(engine, prompts)


@pytest.mark.parametrize("changes", [{}, {"cache.state_snapshots": 1}, {"cache.enable_prefix_caching": False}], ids=str)
def test_preempted_requests_are_computed_again(model, changes):
    prompts = make_prompts(lengths=(40, 40, 40, 40))
    if not changes.get("cache.enable_prefix_caching", True):
        changes = {**changes, "cache.state_snapshot_interval": None}
    with opened(model, **{"cache.num_blocks": 34, **changes}) as engine:
        outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        assert [output.outputs[0].token_ids for output in outputs] == expected(model, prompts)
        long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
        first = [output.outputs[0].token_ids for output in engine.generate([p[:30] for p in prompts], long)]
        assert engine.stats()["num_preemptions"] > 0
        alone = [engine.generate([p[:30]], long)[0].outputs[0].token_ids for p in prompts]
        assert first == alone
        engine._engine.scheduler.allocator.assert_idle()


def test_aborted_requests_leave_nothing_behind(model):
    prompts = make_prompts(lengths=LENGTHS)
    with opened(model) as engine:
        brain = engine._engine
        names = [brain.add(prompt, GREEDY) for prompt in prompts]
        for name in names:
            brain.step()
            brain.abort(name)
        assert not brain.has_unfinished
        brain.scheduler.allocator.assert_idle()
        assert tokens(engine, prompts) == expected(model, prompts)


def test_sleep_and_new_weights_forget_snapshots(model):
    prompts, other = make_prompts(lengths=LENGTHS), hybrid(seed=1)
    with opened(model) as engine:
        wanted = tokens(engine, prompts)
        engine.sleep(1)
        engine.wake_up()
        assert engine.stats()["state_snapshots"] == 0
        assert tokens(engine, prompts) == wanted
        assert engine.stats()["state_snapshots"] > 0
        engine.update_weights(other)
        assert engine.stats()["state_snapshots"] == 0
        assert tokens(engine, prompts) == expected(other, prompts)
        assert engine.stats()["state_snapshot_hits"] == 0


def test_a_model_without_attention_has_blocks_of_no_bytes():
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(**COMMON, num_hidden_layers=2, state_size=8)).eval()
    prompts = make_prompts(lengths=LENGTHS)
    with opened(mamba, **{"cache.num_blocks": None, "cache.memory_bytes": 4 << 20}) as engine:
        assert engine._rank.worker.cache.num_bytes == 0
        assert tokens(engine, prompts) == expected(mamba, prompts) == tokens(engine, prompts)
        assert engine.stats()["state_snapshot_hits"] == 3


def test_slots_are_taken_from_the_cache_before_blocks(model):
    with opened(model) as engine:
        states, cache = engine._rank.worker.states, engine._rank.worker.cache
        slot, request = states.num_bytes_per_slot, 32 * cache.shape.bytes_per_block
    memory = {"cache.num_blocks": None, "cache.memory_bytes": slot + request}
    with opened(model, **memory) as engine:
        worker = engine._rank.worker
        assert worker.states.num_slots == 1, "one request, and no snapshot"
        assert worker.states.num_bytes + worker.cache.num_bytes <= slot + request
        prompts = make_prompts(lengths=LENGTHS)
        assert tokens(engine, prompts) == expected(model, prompts)
    memory["cache.memory_bytes"] -= 1
    with pytest.raises(
        ConfigError, match=rf"but one request needs {slot + request} \({slot} for recurrent states"
    ) as error:
        opened(model, **memory)
    assert "\n" not in str(error.value)


def test_snapshots_that_nobody_can_use_are_refused(model, tmp_path):
    tiny_llama(tmp_path)
    with pytest.raises(ConfigError, match=r"cache\.state_snapshots = 4: model type 'llama' has no recurrent layers"):
        init_inference(str(tmp_path), **settings(**{"cache.state_snapshots": 4}))
    with pytest.raises(ConfigError, match=r"state_snapshots = 4 .*enable_prefix_caching is false; use null"):
        opened(model, **{"cache.state_snapshots": 4, "cache.enable_prefix_caching": False})
    with pytest.raises(ConfigError, match=r"state_snapshot_interval = 6 .*multiple of cache\.block_size = 4"):
        opened(model, **{"cache.state_snapshot_interval": 6})
