"""A trainer sends weights to a server of two ranks while streams run and modes flip."""

import asyncio
import json
import threading

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.server.job import ADMIN, Job
from ulysses_infer.job.processes import free_port
from ulysses_infer.rl.weight_sender import WeightSender

pytestmark = [pytest.mark.distributed, pytest.mark.thorough]
NUM_STREAMS, NUM_UPDATES, NUM_TOKENS, NUM_CHECKED = 200, 20, 60, 12


def two_models(folder):
    """The served model, and one of the same shape with other weights."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.copy_(parameter.flip(-1))
    return models


async def stream(client, number):
    """(prompt, [(token, version of the weights)]) of one request."""
    prompt = [5 + (number * 7 + place) % 80 for place in range(10 + number % 7)]
    params = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "detokenize": False}
    body = {"token_ids": prompt, "sampling_params": params, "stream": True}
    tokens = []
    async with client.stream("POST", "/inference/v1/generate", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    tokens += [(token, (choice["weight_versions"] or ["0"])[-1]) for token in choice["token_ids"]]
    return prompt, tokens


async def all_streams(url):
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return await asyncio.gather(*(stream(client, number) for number in range(NUM_STREAMS)))


def check(prompt, tokens, models):
    """Every token is the likeliest of the weights of its version, after all before it."""
    ids = torch.tensor([prompt + [token for token, _ in tokens]])
    with torch.no_grad():
        scores = [model(ids).logits[0].log_softmax(-1) for model in models]
    for place, (token, version) in enumerate(tokens, start=len(prompt) - 1):
        row = scores[int(version) % 2][place]
        assert row[token] > row.max() - 1e-4, (place, version)


def test_no_stream_is_lost_while_weights_change(long_folder):
    models = two_models(long_folder)
    changes = {"cache.num_blocks": 2048, "model.dtype": "float32", "server.max_num_queued_requests": 2000}
    with Job(long_folder, fault="flip", **changes) as job:
        sender = WeightSender(job.url, "admin", free_port())

        def train():
            for version in range(1, NUM_UPDATES + 1):
                sender.send(models[version % 2].state_dict().items(), str(version))

        trainer = threading.Thread(target=train)
        trainer.start()
        outputs = asyncio.run(all_streams(job.url))
        trainer.join()
        info = httpx.get(job.url + "/weight_info", headers=ADMIN).json()
        assert job.complete().status_code == 200
        assert job.stats()["kv_cache_usage_perc"] == 0
    assert [len(tokens) for _, tokens in outputs] == [NUM_TOKENS] * NUM_STREAMS
    assert info["weight_version"] == str(NUM_UPDATES)
    assert any(len({version for _, version in tokens}) > 1 for _, tokens in outputs)
    for prompt, tokens in outputs[:: NUM_STREAMS // NUM_CHECKED]:
        check(prompt, tokens, models)
