"""Tiny checkpoints with heads for drafting, and what these heads draft by their published description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.equivalence.tiny_models import make_checkpoint, perturb
from tests.model.quantization.checkpoints import Format, change_config
from tests.tiny import SHAPE, write_tokenizer

ROUTED = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **ROUTED,
        "num_key_value_heads": 8,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": {**ROUTED, "head_dim": 8, "use_qk_norm": True},
    "qwen2": {},
    "qwen3_next": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    },
}
NEXTN = ("model.layers.2.", "enorm", "hnorm", "eh_proj", "shared_head.norm")
NAMES = {
    "deepseek_v3": NEXTN,
    "glm4_moe": NEXTN,
    "qwen2": ("model.mtp_layers.0.", "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
    "qwen3_next": ("mtp.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
}
"""Prefix, norms of token and hidden state, projection, output norm: the names of DeepSeek-V3, GLM-4.5, MiMo and
Qwen3-Next."""


FREQUENT = [6, 9, 12, 21]
"""The tokens that random models output almost always, so that random heads guess some right."""


class Head(NamedTuple):
    """A head in plain torch: modules of transformers, put together by the test."""

    served: Any
    parts: nn.ModuleDict
    kind: str
    normalises_residual: bool = False

    @torch.inference_mode()
    def drafts(self, text: list[int], count: int) -> list[int]:
        """The greedy drafts after `text`, whose last token the served model has not seen."""
        model, ids = self.served, torch.tensor([text])
        states = self.states_of_served(ids[:, :-1])
        tokens, drafted = ids[:, 1:], list[int]()
        for _ in range(count):
            embedding = dict(self.parts.items()).get("embed_tokens", model.model.embed_tokens)
            output = self._layer(embedding(tokens), states)
            logits, handed_on = self._finish(output[:, -1:])
            drafted.append(self._token(int(logits.argmax())))
            tokens = torch.cat([tokens, torch.tensor([[drafted[-1]]])], dim=1)
            states = torch.cat([states, handed_on], dim=1)
        return drafted

    def states_of_served(self, ids: torch.Tensor) -> torch.Tensor:
        """The hidden state of each token, as the head reads it."""
        model = self.served.model
        if self.kind != "eagle3":
            return model(ids).last_hidden_state
        states = model(ids, output_hidden_states=True).hidden_states  # [n] is the input of layer n
        layers = len(model.layers)
        return self.parts["fc"](torch.cat([states[2], states[layers // 2], states[layers - 3]], dim=-1))

    def _layer(self, token: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        parts, count = self.parts, token.shape[1]
        mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
        positions = torch.arange(count)[None]
        arguments = {"attention_mask": mask, "position_embeddings": parts["rotary"](token, positions)}
        if self.kind == "eagle3":
            normed = parts["hidden_norm"](hidden)
            joined = torch.cat([parts["input_layernorm"](token), normed], dim=-1)
            residual = normed if self.normalises_residual else hidden
            after = residual + parts["self_attn"](hidden_states=joined, **arguments)[0]
            return after + parts["mlp"](parts["post_attention_layernorm"](after))
        joined = [parts["token_norm"](token), parts["hidden_norm"](hidden)]
        joined = joined[::-1] if self.kind == "qwen2" else joined
        output = parts["layer"](parts["projection"](torch.cat(joined, dim=-1)), position_ids=positions, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def _finish(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits, and the state that the next token is drafted from."""
        normed = self.parts["output_norm"](state)
        head = self.parts["lm_head"] if self.kind == "eagle3" else self.served.lm_head
        return head(normed), normed if self.kind in ("qwen2", "qwen3_next") else state

    def _token(self, drafted: int) -> int:
        return drafted + int(self.parts["lm_head"].offsets[drafted]) if self.kind == "eagle3" else drafted


def one_layer(config: Any) -> Any:
    """`config` with one layer, which is a mixture where the family has any."""
    changes = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "first_k_dense_replace": 0}
    own = type(config)(**{**config.to_dict(), **changes})
    own._attn_implementation = "eager"
    return own


def frequent_model(config: Any, folder: Path, seed: int = 0) -> Any:
    """A random checkpoint with a tokenizer that outputs few kinds of tokens; returns transformers' model of it."""
    served = make_checkpoint(config, folder, seed)
    write_tokenizer(folder)
    weight = served.lm_head.weight.detach()
    weight[[token for token in range(len(weight)) if token not in FREQUENT]] *= 0.05
    _add_tensors(folder, {"lm_head.weight": weight})
    return served


def mtp_checkpoint(kind: str, folder: Path, seed: int = 0, chosen: Format | None = None) -> Head:
    """A checkpoint of model type `kind` with a multi-token-prediction module, all of it random, with a tokenizer.

    chosen: how the linear layers of the module's decoder layer are stored.
    """
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**{**SHAPE, **CHANGES[kind], "num_nextn_predict_layers": 1})
    served = frequent_model(config, folder, seed)
    layer, norm = type(served.model.layers[-1]), type(served.model.norm)
    width = config.hidden_size
    parts = nn.ModuleDict(
        {
            "token_norm": norm(width),
            "hidden_norm": norm(width),
            "projection": nn.Linear(2 * width, width, bias=False),
            "output_norm": norm(width),
            "layer": layer(one_layer(config), 0),
            "rotary": type(served.model.rotary_emb)(config),
        }
    )
    perturb(parts, seed + 1)
    tensors = dict(_mtp_tensors(kind, parts))
    if chosen is not None:
        _quantise(tensors, NAMES[kind][0], parts["layer"], chosen)
        change_config(
            folder, quantization_config=chosen.config | {"modules_to_not_convert": ["model.layers", "lm_head"]}
        )
    _add_tensors(folder, tensors)
    if kind == "qwen2":
        change_config(
            folder, model_type="mimo", architectures=["MiMoForCausalLM"], auto_map={"AutoConfig": "code.Config"}
        )
    return Head(served, parts.eval(), kind)


def _quantise(tensors: dict[str, torch.Tensor], prefix: str, layer: nn.Module, chosen: Format) -> None:
    """Store the linear layers of `layer` in a public format, and let them compute with what that represents."""
    for name, module in layer.named_modules():
        if type(module) is nn.Linear:
            stored, dense = chosen.quantise(module.weight.detach())
            del tensors[f"{prefix}{name}.weight"]
            tensors |= {f"{prefix}{name}.{leaf}": tensor for leaf, tensor in stored.items()}
            module.weight.data = dense


def _mtp_tensors(kind: str, parts: nn.ModuleDict) -> Any:
    """(name in checkpoints, tensor) of a module; experts one by one, as they are published."""
    prefix, *names = NAMES[kind]
    inner = "layers.0." if kind == "qwen3_next" else ""
    for own, name in zip(("token_norm", "hidden_norm", "projection", "output_norm"), names, strict=True):
        yield f"{prefix}{name}.weight", parts[own].weight
    for name, tensor in parts["layer"].state_dict().items():
        owner, _, leaf = f"{inner}{name}".rpartition(".")
        if leaf == "gate_up_proj":
            for number, (gate, up) in enumerate(expert.chunk(2) for expert in tensor):
                yield f"{prefix}{owner}.{number}.gate_proj.weight", gate
                yield f"{prefix}{owner}.{number}.up_proj.weight", up
        elif leaf == "down_proj":
            for number, down in enumerate(tensor):
                yield f"{prefix}{owner}.{number}.down_proj.weight", down
        else:
            yield f"{prefix}{inner}{name}", tensor
    if NAMES[kind] is NEXTN:  # stored again, and not read
        yield f"{prefix}shared_head.head.weight", torch.zeros(1)
        yield f"{prefix}embed_tokens.weight", torch.zeros(1)


def _add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    everything = load_file(path) | {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(everything, path, {"format": "pt"})


def eagle3_checkpoint(served: Any, folder: Path, seed: int = 0, **changes: Any) -> Head:
    """A random EAGLE-3 head of `served`, a Llama, in `folder`, with every third token in its vocabulary."""
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    target, width = served.config, served.config.hidden_size
    vocabulary = torch.arange(0, target.vocab_size, 3)
    own = LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=width,
        intermediate_size=72,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        rope_theta=500.0,
    )
    own._attn_implementation = "eager"
    attention = llama.LlamaAttention(own, 0)
    for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
        setattr(attention, name, nn.Linear(2 * width, heads * 24, bias=False))
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm", "output_norm")
    head = nn.Linear(width, len(vocabulary), bias=False)
    parts = nn.ModuleDict(
        {
            **{name: llama.LlamaRMSNorm(width) for name in norms},
            "fc": nn.Linear(3 * width, width, bias=False),
            "self_attn": attention,
            "mlp": llama.LlamaMLP(own),
            "lm_head": head,
            "rotary": llama.LlamaRotaryEmbedding(own),
        }
    )
    perturb(parts, seed + 1)
    head.weight.data[[place for place, token in enumerate(vocabulary) if int(token) not in FREQUENT]] *= 0.05
    head.offsets = vocabulary - torch.arange(len(vocabulary))
    folder.mkdir(parents=True, exist_ok=True)
    kept = torch.zeros(target.vocab_size, dtype=torch.bool)
    kept[vocabulary] = True
    maps = {"d2t": head.offsets, "t2d": kept}
    save_file(_named(parts, "midlayer") | maps, folder / "model.safetensors")
    values = own.to_dict() | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": len(vocabulary)}
    (folder / "config.json").write_text(json.dumps(values | changes))
    return Head(served, parts.eval(), "eagle3")


def other_format(head: Head, folder: Path, source: Path) -> Head:
    """The head in `source` as the library speculators writes it, with an embedding of its own and the residual behind
    the norm; in torch's format."""
    values = json.loads((source / "config.json").read_text())
    layer = {name: value for name, value in values.items() if name not in ("architectures", "draft_vocab_size")}
    own = {"architectures": ["Eagle3Speculator"], "transformer_layer_config": layer, "norm_before_residual": True}
    (folder / "config.json").write_text(json.dumps(own | {"draft_vocab_size": values["draft_vocab_size"]}))
    embedding = nn.Embedding(head.served.config.vocab_size, head.served.config.hidden_size)
    perturb(embedding, 5)
    parts = nn.ModuleDict({**head.parts, "embed_tokens": embedding})
    tensors = _named(parts, "layers.0") | {"d2t": head.parts["lm_head"].offsets}
    torch.save(tensors, folder / "pytorch_model.bin")
    return head._replace(parts=parts.eval(), normalises_residual=True)


def _named(parts: nn.ModuleDict, layer: str) -> dict[str, torch.Tensor]:
    """The tensors of an EAGLE-3 head; layer: the name of its layer."""
    outside = {"output_norm": "norm", "fc": "fc", "lm_head": "lm_head", "embed_tokens": "embed_tokens"}
    found = {}
    for name, tensor in parts.state_dict().items():
        first, _, rest = name.partition(".")
        found[f"{outside.get(first, f'{layer}.{first}')}.{rest}"] = tensor.detach().contiguous()
    return found
