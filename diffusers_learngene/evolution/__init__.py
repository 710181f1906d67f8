# SPDX-License-Identifier: Apache-2.0
"""Learngenes that are not condensed from one model but evolved in a population of them.

What GTL (circuits of conv nets) and GRL (genes of agents) share is here: `selection` (tournaments, credit, draws), the
`lineage`, `snapshots` of a generation, `threads`, and `plots`. What a learngene is, how it is inherited and what a
life consists of is in `gtl/`, `grl/`.
"""
