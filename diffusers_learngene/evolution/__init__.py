# SPDX-License-Identifier: Apache-2.0
"""Learngenes that are not condensed from one model but evolved in a population of them.

Here lives what GTL (circuits of conv nets, `gtl/`) and GRL (genes of agents, `grl/`) are, and what they share:
`selection` (tournaments, credit, draws), the `lineage`, and its picture in `plots`. Not here: snapshots and threads,
which every long run needs (`runs/`).
"""
