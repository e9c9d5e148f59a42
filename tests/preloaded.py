"""What the fork server of `tests/ranks.py` imports before it forks; the garbage collector then leaves it alone."""

import gc

gc.disable()

import deepspeed  # noqa: E402, F401
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: E402, F401

import tests.equivalence.cases  # noqa: E402, F401
import ulysses_infer.cli.rank  # noqa: E402
import ulysses_infer.inference  # noqa: E402
import ulysses_infer.server.serve  # noqa: E402, F401

gc.freeze()
gc.enable()
