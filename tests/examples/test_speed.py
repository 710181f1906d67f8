# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of adapters and of cut models: that they run, and that their tables add up."""

import json


def test_added_adapters(speed, tmp_path):
    rows = speed("--output_dir", tmp_path)
    saved = json.loads((tmp_path / "speed.json").read_text())
    assert [row["comparison"] for row in saved["rows"]] == [row["comparison"] for row in rows]
    assert len(rows) == 3 * 2 * 3 and all(row["ratio"] > 0 for row in rows if "they add" not in row["comparison"])
    assert all((row["ratio"] <= row["target"]) == (row["met"] == "yes") for row in rows if row["target"])


def test_a_cut_model(kind_speed, tmp_path):
    rows = {row["what"]: row for row in kind_speed("--output_dir", tmp_path)}
    bound = rows["FLOPs of the forward: the bound"]
    assert bound["dense / KIND"] == bound["dense"] / bound["KIND"] > 1
    assert rows["parameters"]["KIND"] < rows["parameters"]["dense"]
