"""Run by torchrun from test_transformers_tp.py: log-probabilities of oracles on two ranks, to a file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import qplug_core.bridges.transformers as bridge
from qplug_core.engine.modules import QuantExperts, QuantLinear
from qplug_core.errors import QplugError

out, folders = Path(sys.argv[1]), [Path(f) for f in sys.argv[2:]]
bridge.register()
torch.set_num_threads(1)
dist.init_process_group("gloo")
found = {}
for folder in folders:
    options = {"dtype": torch.float32, "distributed_config": DistributedConfig(tp_size=2)}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=bridge.QplugConfig(activations="16bit"), **options
        )
    except QplugError as error:
        found[folder.name] = str(error)
        continue
    with torch.inference_mode():
        logits = model(input_ids=load_file(folder / "ref.safetensors")["input_ids"]).logits
    methods = [m for module in model.modules() if isinstance(module, QuantLinear | QuantExperts) for m in module.methods()]
    held = sum(m.decision.layer.n * m.decision.layer.local_k for m in methods)
    found[folder.name] = (torch.log_softmax(logits.float(), dim=-1), held)
if dist.get_rank() == 0:
    torch.save(found, out)
dist.destroy_process_group()
