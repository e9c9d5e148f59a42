"""Stand-ins for attention libraries that need a GPU: plain float32 torch on the CPU, written from their documentation.

Each takes the arguments of the real function and refuses what the real one refuses, so the adapters' calls are
checked. They loop over sequences; only for tests.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import torch


def attend(query, key, value, scale, left, right, softcap, slopes=None):
    """One sequence; the queries are its last tokens. Returns [n, Hq, dv] and the log sums [n, Hq]."""
    length, heads, _ = query.shape
    count, groups = key.shape[0], heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("nhd,mhd->hnm", query.float(), key.float()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    where = torch.arange(count - length, count)[:, None] - torch.arange(count)[None, :]  # > 0: the key is to the left
    if slopes is not None:
        scores = scores - slopes[:, None, None] * where.abs()
    hidden = torch.zeros(length, count, dtype=torch.bool)
    if left >= 0:
        hidden |= where > left
    if right >= 0:
        hidden |= -where > right
    scores = scores.masked_fill(hidden, float("-inf"))
    output = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), value.float())
    return output.to(query.dtype), scores.logsumexp(-1).t()


def paged(query, keys, values, query_starts, context_lens, tables, scale, left, right, softcap=0.0, slopes=None):
    """All sequences. tables: one list of pages per sequence. Returns [T, Hq, dv] and [T, Hq]."""
    outputs, sums = [], []
    for index, context in enumerate(context_lens):
        rows = slice(query_starts[index], query_starts[index + 1])
        pages = torch.tensor(tables[index][: -(-context // keys.shape[1])], dtype=torch.int64)
        key, value = keys[pages].flatten(0, 1)[:context], values[pages].flatten(0, 1)[:context]
        output, log_sum = attend(query[rows], key, value, scale, left, right, softcap, slopes)
        outputs.append(output)
        sums.append(log_sum)
    return torch.cat(outputs), torch.cat(sums)


def check_int32(*tensors):
    assert all(tensor.dtype == torch.int32 and tensor.stride(-1) == 1 for tensor in tensors)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn 2.8: key lengths are the differences of `cu_seqlens_k`; the log sums are [Hq, T]."""
    assert block_table is not None
    check_int32(cu_seqlens_q, cu_seqlens_k, block_table)
    assert alibi_slopes is None or (alibi_slopes.dtype, alibi_slopes.shape) == (torch.float32, (q.shape[1],))
    contexts, lengths = cu_seqlens_k.diff().tolist(), cu_seqlens_q.diff().tolist()
    assert max(lengths) <= max_seqlen_q
    assert max(contexts) <= max_seqlen_k
    left, right = window_size
    output, log_sum = paged(
        q,
        k,
        v,
        cu_seqlens_q.tolist(),
        contexts,
        block_table.tolist(),
        softmax_scale,
        left,
        0 if causal else right,
        softcap,
        alibi_slopes,
    )
    return (output, log_sum.t().contiguous(), None) if return_attn_probs else output


class Wrapper:
    """The common part of flashinfer's wrappers: a plan, then any number of runs."""

    def __init__(self, workspace, kv_layout="NHD", **buffers):
        assert (workspace.dtype, kv_layout) == (torch.uint8, "NHD")
        self.buffers, self.plans, self.runs = buffers, 0, 0

    def _set(self, query_starts, indptr, indices, last_page_len, page_size, left, right, **rest):
        check_int32(query_starts, indptr, indices, last_page_len)
        assert len(last_page_len) == len(indptr) - 1 == len(query_starts) - 1
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
        if self.buffers.get("use_cuda_graph"):
            assert len(last_page_len) == len(self.buffers["paged_kv_last_page_len_buffer"])
            assert len(indptr) == len(self.buffers["paged_kv_indptr_buffer"])
            assert len(indices) <= len(self.buffers["paged_kv_indices_buffer"])
        pages = [indices[start:stop].tolist() for start, stop in itertools.pairwise(indptr)]
        contexts = [(len(own) - 1) * page_size + int(last) for own, last in zip(pages, last_page_len, strict=True)]
        self.planned = SimpleNamespace(
            query_starts=query_starts.tolist(),
            contexts=contexts,
            pages=pages,
            left=left,
            right=right,
            page_size=page_size,
            **rest,
        )
        self.plans += 1

    def run(self, q, paged_kv_cache, return_lse=False):
        keys, values = paged_kv_cache
        plan = self.planned
        assert (q.shape[1:], keys.shape[1:]) == (
            (plan.heads, plan.width),
            (plan.page_size, plan.key_value_heads, plan.width),
        )
        assert (q.dtype, keys.dtype) == plan.dtypes
        assert q.shape[0] == plan.query_starts[-1]
        self.runs += 1
        output, log_sum = paged(
            q,
            keys,
            values,
            plan.query_starts,
            plan.contexts,
            plan.pages,
            plan.scale,
            plan.left,
            plan.right,
            plan.softcap,
        )
        return (output, log_sum / math.log(2.0)) if return_lse else output


class Decode(Wrapper):
    """`BatchDecodeWithPagedKVCacheWrapper`: one query per sequence."""

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        pos_encoding_mode="NONE",
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        data_type=None,
        sm_scale=None,
    ):
        self._set(
            torch.arange(len(indptr), dtype=torch.int32),
            indptr,
            indices,
            last_page_len,
            page_size,
            window_left,
            -1,
            heads=num_qo_heads,
            key_value_heads=num_kv_heads,
            width=head_dim,
            scale=sm_scale,
            softcap=logits_soft_cap,
            dtypes=(q_data_type, kv_data_type),
        )


class Prefill(Wrapper):
    """`BatchPrefillWithPagedKVCacheWrapper`."""

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
    ):
        self._set(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            page_size,
            window_left,
            0 if causal else -1,
            heads=num_qo_heads,
            key_value_heads=num_kv_heads,
            width=head_dim_qk,
            scale=sm_scale,
            softcap=logits_soft_cap,
            dtypes=(q_data_type, kv_data_type),
        )


class FlashInfer:
    """The module `flashinfer`; it keeps the wrappers made from it."""

    def __init__(self):
        self.wrappers = []

    def BatchDecodeWithPagedKVCacheWrapper(self, *args, **kwargs):  # noqa: N802
        return self._made(Decode(*args, **kwargs))

    def BatchPrefillWithPagedKVCacheWrapper(self, *args, **kwargs):  # noqa: N802
        return self._made(Prefill(*args, **kwargs))

    def _made(self, wrapper):
        self.wrappers.append(wrapper)
        return wrapper
