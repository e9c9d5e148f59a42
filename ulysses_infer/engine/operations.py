"""What can be done to an engine between steps: warm-up, sleep, new weights, and a description of its state."""

from __future__ import annotations

from typing import Any

from ulysses_infer.engine.engine import Engine
from ulysses_infer.engine.expert_load import expert_load
from ulysses_infer.engine.stats import StepStats
from ulysses_infer.sampling_params import SamplingParams


def warm_up(engine: Engine) -> None:
    """Run a prefill and a decode in every mode, to prove that all ranks can before a request waits for it."""
    outputs = 2 if engine.worker.drafter is None else 4  # with room for drafted tokens
    params = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False)
    parallel = engine.config.parallel
    for mode in parallel.available_modes:
        engine.choose_mode = lambda batch, mode=mode: mode
        engine.add([0] * min(parallel.world_size + 1, engine.scheduler.max_model_len - 2), params)
        while engine.has_unfinished:
            engine.step()
    engine.choose_mode = None
    engine.scheduler.allocator.reset_prefix_cache()
    engine.stats = StepStats()
    if engine.speculation is not None:
        engine.speculation.reset_stats()


def weights_changed(engine: Engine) -> None:
    """Forget cached prefixes, which were computed with the old weights."""
    engine.sleep.lacks_weights = False
    engine.scheduler.allocator.reset_tier()  # even if kept requests hold blocks
    engine.scheduler.allocator.reset_prefix_cache()


def recompute_running(engine: Engine) -> None:
    """Give up the cache of running requests, which are computed again, and cached prefixes. No step is in flight."""
    for request in engine.scheduler.running:
        engine.scheduler.requeue(request)
        engine.requests.add_forgotten([request.index])
    engine.scheduler.allocator.reset_prefix_cache()


def fall_asleep(engine: Engine, level: int) -> None:
    """Refuse requests until `wake_up`, and forget cached prefixes. Raises `RequestError` while requests run."""
    engine.requests.check_idle("sleep")
    engine.sleep.deepen(level)
    engine.scheduler.allocator.reset_prefix_cache()
    if engine.speculation is not None:
        engine.speculation.reset_caches()


def wake_up(engine: Engine) -> None:
    """Accept requests again."""
    engine.sleep.level = 0


def describe(engine: Engine) -> dict[str, Any]:
    """Counters per mode, queue lengths, cache usage, the policy and the load of experts, as plain values."""
    scheduler, policy = engine.scheduler, engine.policies.policy
    allocator = scheduler.allocator
    return {
        **engine.stats.as_dict(),
        **expert_load(engine.rank),
        "policy": policy.describe(),
        "policy_stats": policy.stats(),
        "num_requests_running": scheduler.num_running,
        "num_requests_waiting": scheduler.num_waiting,
        "kv_cache_usage_perc": allocator.usage,
        "num_blocks": allocator.num_blocks,
        "prefix_cache_queries": allocator.prefix_stats.queries,
        "prefix_cache_hits": allocator.prefix_stats.hits,
        "num_preemptions": scheduler.num_preemptions,
        **({} if engine.speculation is None else engine.speculation.stats.as_dict()),
        **_describe_states(engine),
        **_describe_tier(engine),
    }


def _describe_states(engine: Engine) -> dict[str, int]:
    """The slots of recurrent states, if the model has any."""
    states, snapshots = engine.worker.states, engine.scheduler.allocator.snapshots
    if states is None or snapshots is None:
        return {}
    return {
        "state_slots": states.num_sequences,
        "state_bytes_per_slot": states.num_bytes_per_slot,
        "state_snapshot_slots": snapshots.num_slots,
        "state_snapshots": snapshots.num_held,
        "state_snapshot_hits": snapshots.num_hits,
    }


def _describe_tier(engine: Engine) -> dict[str, float]:
    """The tier below the cache, if there is one, by vLLM's names. Bytes are those of each rank."""
    tier = engine.scheduler.allocator.tier
    if tier is None:
        return {}
    return {
        "external_prefix_cache_queries": tier.stats.queries,
        "external_prefix_cache_hits": tier.stats.hits,
        "kv_offload_store_bytes": tier.stored_bytes,
        "kv_offload_load_bytes": tier.loaded_bytes,
        "kv_offload_disk_store_bytes": tier.spilled_bytes,
        "kv_offload_cpu_cache_usage_perc": tier.host_usage,
        "kv_offload_disk_cache_usage_perc": tier.disk_usage,
    }
