#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# diffusers 0.42.1: a DiTPipeline forgets its class names when it is saved.
#
# One would guess: `id2label`, an argument of DiTPipeline, is part of what save_pretrained writes, as in the published
# facebook/DiT-XL-2-256, whose model_index.json has it; so get_label_ids works after a round trip.
# What happens: the constructor keeps the names to itself (`pipe.labels`) and registers them nowhere; model_index.json
# has none, and after loading `labels` is empty. A folder that *had* names loses them by loading and saving.
# Seen with torch 2.13.0, diffusers 0.42.1, transformers 5.23.0. The way round it: pipe.register_to_config(id2label=...).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
"$folder/venv/bin/python" - "$folder/pipeline" <<'PYTHON'
import json
import sys

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

dit = DiTTransformer2DModel(
    num_attention_heads=1, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, num_embeds_ada_norm=3,
    sample_size=4, patch_size=2, norm_num_groups=1,
)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
pipe = DiTPipeline(dit, vae, DDIMScheduler(), id2label={0: "owl", 1: "zebra", 2: "bee"})
made = pipe.get_label_ids(["zebra"])
pipe.save_pretrained(sys.argv[1])
written = "id2label" in json.load(open(f"{sys.argv[1]}/model_index.json"))
loaded = DiTPipeline.from_pretrained(sys.argv[1]).labels
print(f"as made: zebra is {made}; in model_index.json: {written}; after loading: {loaded}")
sys.exit(not (made == [1] and not written and loaded == {}))
PYTHON
