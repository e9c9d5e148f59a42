"""Train the demo model from scratch: corpus, tokenizer, Llama, with DeepSpeed ZeRO and Ulysses SP.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 2 tools/train_demo_model.py \
        --config recipes/train_demo.yaml [train.steps=100 output_dir=/tmp/demo ...]

The ranks split every sequence (Ulysses: by tokens outside attention, by heads inside it) and the optimizer state
(ZeRO). The result is a Hugging Face folder in bf16.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import deepspeed
import deepspeed.comm as dist
import numpy as np
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

if not __package__:  # started by path, as the deepspeed launcher does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.demo_corpus import END, END_OF_TEXT, build_corpus, encode, train_tokenizer
from tools.demo_recipe import Recipe, parse_arguments
from ulysses_infer.job.lifetime import end_with_launcher

IGNORED_LABEL = -100
AVERAGED_STEPS = 100  # the loss of a single step is noisy


MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# Demo model of ulysses_infer

A Llama of {parameters:,} parameters, small enough to ship and to serve on any machine. It imitates the
Python standard library's code and answers questions about it in the manner of its docstrings; do not rely
on what it says.

| | |
|---|---|
| corpus | {files} files of Python {python}'s standard library: code, reference, chats made from docstrings |
| training text | {train[documents]:,} documents, {train[characters]:,} characters, {train[tokens]:,} tokens |
| trained | {step} of {steps} steps, {seen:,} tokens in rows of {seq_length} |
| loss | {loss:.3f} over the last 100 steps, {evaluated} on held-out files (nats per token) |
| how | DeepSpeed ZeRO-{zero_stage}, {dtype}, {world} ranks, Ulysses sequence parallel {sequence_parallel} |

Chats use the tokenizer's chat template; a turn ends with `<|end|>`, a document with `<|endoftext|>`.
It was trained on {seq_length} positions at a time: beyond them its text degrades.

To train it again, in the repository's root:

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --num_gpus 2 tools/train_demo_model.py \\
        --config recipes/train_demo.yaml
"""


class PackedText(Dataset):
    """Endless rows of `seq_length` tokens; row i is the same in every run and on every rank.

    Each epoch shuffles the documents, joins them, cuts the text into rows and shuffles the rows, so that a document has
    different neighbours and cuts in each epoch.
    """

    def __init__(self, documents: list[np.ndarray], seq_length: int, seed: int) -> None:
        self.documents, self.seq_length, self.seed = documents, seq_length, seed
        self.rows_per_epoch = sum(map(len, documents)) // seq_length
        self.epoch, self.rows = -1, np.empty((0, seq_length))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Row `index`, counted from the start of the first epoch."""
        epoch, row = divmod(index, self.rows_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.rows = epoch, self.pack(epoch)
        tokens = torch.from_numpy(self.rows[row].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(self.seq_length)}

    def pack(self, epoch: int) -> np.ndarray:
        """The rows of one epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        joined = np.concatenate([self.documents[i] for i in rng.permutation(len(self.documents))])
        rows = joined[: self.rows_per_epoch * self.seq_length].reshape(-1, self.seq_length)
        return rng.permutation(rows)


class Trainer:
    """One rank's part of the run: data, engine, log."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.train = recipe, recipe.train
        self.device = torch.device(get_accelerator().current_device_name())
        self.world = dist.get_world_size()
        self.sequence_parallel = recipe.parallel.sequence_parallel or self.world
        replicas = self.world // self.sequence_parallel
        self.tokens_per_step = self.train.micro_batch * self.train.seq_length * replicas
        self.is_main = dist.get_rank() == 0
        self.run_dir, self.output_dir = Path(recipe.run_dir), Path(recipe.output_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self.tokenizer, self.train_text, self.eval_text = self.prepare_data()
        self.model_config = self.make_model_config()
        self.mpu = self.register_ulysses()
        self.engine = self.make_engine()
        self.first_step = self.resume() if self.train.resume else 0

    def prepare_data(self) -> tuple[Any, PackedText, PackedText]:
        """Rank 0 reads the corpus and trains the tokenizer; all ranks load the files it wrote."""
        data_dir = self.run_dir / "data"
        if self.is_main:
            self.write_data(data_dir)
        dist.barrier()
        tokenizer = AutoTokenizer.from_pretrained(data_dir)
        splits = np.load(data_dir / "tokens.npz")
        train, held_out = (
            PackedText(np.split(splits[name], splits[f"{name}_ends"][:-1]), self.train.seq_length, self.train.seed)
            for name in ("train", "held_out")
        )
        return tokenizer, train, held_out

    def write_data(self, folder: Path) -> None:
        """Build corpus and tokenizer into `folder`."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        options = self.recipe.corpus
        corpus = build_corpus(options.held_out_every, options.max_files, self.train.seed)
        longest = self.recipe.model.max_position_embeddings
        tokenizer = train_tokenizer(corpus.train, options.vocab_size, longest)
        tokenizer.save_pretrained(folder)
        arrays: dict[str, np.ndarray] = {}
        facts: dict[str, Any] = {"files": corpus.files}
        for name in ("train", "held_out"):
            texts = getattr(corpus, name)
            tokens = encode(tokenizer, texts)
            ends = np.cumsum([len(document) for document in tokens])
            arrays |= {name: np.concatenate(tokens), f"{name}_ends": ends}
            facts[name] = {"documents": len(texts), "characters": sum(map(len, texts)), "tokens": int(ends[-1])}
        np.savez(folder / "tokens.npz", **arrays)  # type: ignore[arg-type]
        (folder / "facts.json").write_text(json.dumps(facts))
        print(f"corpus: {facts}", flush=True)

    def make_model_config(self) -> LlamaConfig:
        """A Llama with the tokenizer's special tokens."""
        end_of_text, end = self.tokenizer.convert_tokens_to_ids([END_OF_TEXT, END])
        return LlamaConfig(  # type: ignore[call-arg]
            **asdict(self.recipe.model),
            vocab_size=len(self.tokenizer),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=[end_of_text, end],
            pad_token_id=end_of_text,
            attn_implementation="sdpa",
        )

    def register_ulysses(self) -> ModuleType | None:
        """Route attention through Ulysses' all-to-all; returns DeepSpeed's group object, None for SP 1."""
        torch.manual_seed(self.train.seed)  # the same initial weights on every rank
        self.model = LlamaForCausalLM(self.model_config)
        return UlyssesSPAttentionHF.register_with_transformers(
            self.model,
            "sdpa",
            sequence_parallel_size=self.sequence_parallel,
            micro_batch_size=self.train.micro_batch,
            seq_length=self.train.seq_length,
            seq_length_is_variable=False,
        )

    def make_engine(self) -> deepspeed.DeepSpeedEngine:
        """The DeepSpeed engine, with torch's AdamW because DeepSpeed would compile its own first."""
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": self.train.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.train.learning_rate, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        stage = self.recipe.parallel.zero_stage
        config = {
            "train_micro_batch_size_per_gpu": self.train.micro_batch,
            "gradient_clipping": self.train.grad_clip,
            "sequence_parallel_size": self.sequence_parallel,
            "bf16": {"enabled": self.recipe.parallel.dtype == "bf16"},
            # ZeRO-3's reduce-scatter ignores sequence_parallel_size when it averages (DeepSpeed 0.19.8);
            # its all-reduce does not.
            "zero_optimization": {"stage": stage, "reduce_scatter": stage < 3},
            "steps_per_print": sys.maxsize,
        }
        return deepspeed.initialize(
            model=self.model, optimizer=optimizer, lr_scheduler=scheduler, mpu=self.mpu, config=config
        )[0]

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then cosine decay to the floor."""
        if step < self.train.warmup_steps:
            return (step + 1) / self.train.warmup_steps
        progress = (step - self.train.warmup_steps) / max(1, self.train.steps - self.train.warmup_steps)
        floor = self.train.min_learning_rate_ratio
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def batches(self, text: PackedText, first: int, last: int) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's share of batches `first` to `last` - 1: its slice of each sequence of its SP group.

        Each rank loads different batches; the Ulysses adapter distributes each batch over the SP group, one after
        another. So SP n on n ranks sees the same batches in the same order as SP 1 on one rank.
        """
        replicas, size = self.world // self.sequence_parallel, self.train.micro_batch
        rounded = -(-(last - first) // self.sequence_parallel) * self.sequence_parallel
        own = range(first * replicas + dist.get_rank(), (first + rounded) * replicas, self.world)
        loader = DataLoader(text, batch_sampler=[list(range(b * size, (b + 1) * size)) for b in own])
        adapter = (
            loader
            if self.mpu is None
            else UlyssesSPDataLoaderAdapter(
                loader,
                self.mpu.get_sequence_parallel_rank(),
                self.mpu.get_sequence_parallel_group(),
                self.sequence_parallel,
                self.device,
            )
        )
        for _, batch in zip(range(last - first), adapter, strict=False):
            yield {key: value.to(self.device) for key, value in batch.items()}

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        """This rank's term to call backward on, and the mean loss over the whole sequences.

        The terms of an SP group sum to its mean loss. DeepSpeed sums gradients inside an SP group and averages them
        over groups (it divides by ranks / sequence_parallel_size), so no factor is needed here.
        """
        labels = batch.get("shift_labels")
        if labels is None:  # without Ulysses the labels are not shifted yet
            labels = F.pad(batch["labels"], (0, 1), value=IGNORED_LABEL)[:, 1:]
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits = self.engine(**inputs, use_cache=False).logits.float()
        local = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        totals = torch.stack([local.detach(), (labels != IGNORED_LABEL).sum()])
        if self.mpu is not None:
            dist.all_reduce(totals, group=self.mpu.get_sequence_parallel_group())
        total, count = totals.tolist()
        return local / count, total / count

    def fit(self) -> None:
        """Train, log and save; evaluate at the end."""
        started = time.perf_counter()
        recent: deque[float] = deque(maxlen=AVERAGED_STEPS)
        batches = self.batches(self.train_text, self.first_step, self.train.steps)
        for step, batch in enumerate(batches, self.first_step + 1):
            self.engine.train()
            term, loss = self.loss(batch)
            recent.append(loss)
            self.engine.backward(term)
            self.engine.step()
            if step % self.train.log_every == 0 or step == self.train.steps:
                seconds = time.perf_counter() - started
                self.log(
                    step=step,
                    loss=round(loss, 6),
                    learning_rate=self.engine.get_lr()[0],
                    tokens_per_second=round((step - self.first_step) * self.tokens_per_step / seconds),
                )
            if step % self.train.save_every == 0 and step < self.train.steps:
                self.save(step, fmean(recent))
        self.save(self.train.steps, fmean(recent), self.evaluate())

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on held-out files."""
        self.engine.eval()
        losses = [self.loss(batch)[1] for batch in self.batches(self.eval_text, 0, self.train.eval_batches)]
        mean = sum(losses) / len(losses)
        self.log(step=self.train.steps, eval_loss=round(mean, 6))
        return mean

    def log(self, **values: float) -> None:
        """Write one JSON line to the log in the run folder and to rank 0's terminal."""
        if self.is_main:
            line = json.dumps(values)
            print(line, flush=True)
            with (self.run_dir / "log.jsonl").open("a") as stream:
                stream.write(line + "\n")

    def save(self, step: int, loss: float, eval_loss: float | None = None) -> None:
        """Save a checkpoint to resume from, and the current model."""
        self.engine.save_checkpoint(str(self.checkpoints), tag=f"step{step}", client_state={"step": step})
        parameters = list(self.engine.module.parameters())
        partitioned = self.recipe.parallel.zero_stage == 3
        with deepspeed.zero.GatheredParameters(parameters, enabled=partitioned):
            if self.is_main:
                self.export(self.run_dir / "export", step, loss, eval_loss)
        dist.barrier()
        if self.is_main:  # the new checkpoint is complete
            for old in set(self.checkpoints.glob("step*")) - {self.checkpoints / f"step{step}"}:
                shutil.rmtree(old)

    def export(self, staging: Path, step: int, loss: float, eval_loss: float | None) -> None:
        """Write the Hugging Face folder to `staging`, then replace the old files one by one."""
        exported: Any = LlamaForCausalLM(self.model_config)  # type checkers do not understand transformers' decorators
        exported.load_state_dict(self.engine.module.state_dict())
        exported.tie_weights()
        exported.generation_config.max_new_tokens = 128
        exported.to(torch.bfloat16).save_pretrained(staging)
        self.tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(self.model_card(exported.num_parameters(), step, loss, eval_loss))
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for path in staging.iterdir():
            beside = self.output_dir / f".{path.name}.new"  # a rename is atomic only within a file system
            shutil.copyfile(path, beside)
            beside.replace(self.output_dir / path.name)

    def model_card(self, parameters: int, step: int, loss: float, eval_loss: float | None) -> str:
        """The text of the model's README.md."""
        facts = json.loads((self.run_dir / "data" / "facts.json").read_text())
        evaluated = "not evaluated yet" if eval_loss is None else f"{eval_loss:.3f}"
        parallel = asdict(self.recipe.parallel) | {"sequence_parallel": self.sequence_parallel}
        return MODEL_CARD.format(
            parameters=parameters,
            python=platform.python_version(),
            step=step,
            steps=self.train.steps,
            seen=step * self.tokens_per_step,
            loss=loss,
            evaluated=evaluated,
            seq_length=self.train.seq_length,
            world=self.world,
            **facts,
            **parallel,
        )

    def resume(self) -> int:
        """Load the last checkpoint; returns its step number."""
        path, state = self.engine.load_checkpoint(str(self.checkpoints))
        if path is None:
            sys.exit(f"train.resume=true, but there is no checkpoint in {self.checkpoints}")
        return state["step"]


def main(argv: list[str]) -> None:
    """Entry point of every rank."""
    end_with_launcher()
    recipe = parse_arguments(__doc__.split("\n")[0], argv)
    # DeepSpeed would first compile its shared-memory collective, which takes a minute and ignores the given group. gloo
    # is fast enough here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    Trainer(recipe).fit()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
