#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# diffusers 0.42.1: a value that is changed in a scheduler's config before from_config is dropped without a word.
#
# One would guess: Scheduler.from_config({**other.config, "prediction_type": "v_prediction"}) has v_prediction.
# What happens: it has epsilon. The config of a scheduler lists, under "_use_default_values", the keys that were left at
# their defaults when it was made; from_config throws those out before it reads the rest, the changed one included. As an
# argument (from_config(other.config, prediction_type=...)) it is taken. A model that was trained to predict v is sampled
# as if it predicted noise, and makes grey mush.
# Seen with torch 2.13.0, diffusers 0.42.1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

from diffusers import DDIMScheduler, DDPMScheduler

other = DDPMScheduler(num_train_timesteps=100)
changed = DDIMScheduler.from_config({**other.config, "prediction_type": "v_prediction"}).config.prediction_type
argument = DDIMScheduler.from_config(other.config, prediction_type="v_prediction").config.prediction_type
print(f"v_prediction in the config gives {changed}, as an argument {argument}")
sys.exit(not (changed == "epsilon" and argument == "v_prediction"))
PYTHON
