# SPDX-License-Identifier: Apache-2.0
"""Genetic Transfer Learning (GTL): circuits of channels, evolved in a population of conv nets.

networks     VGG11 and ResNet12, and how any conv net is described: by the names of its modules
circuit      index sets of channels: extract, inherit with zero fill, mutate; pure functions
translation  a circuit of one network in the words of another: other depths, VGG <-> ResNet
artefact     class Circuit: the learngene as files
tasks        images by class, and small tasks drawn from them
pool         whose circuits newborns inherit: scores, tournament, credit
population   networks of one shape, trained as one batched computation
options      how to evolve
evolution    one generation, and the loop with snapshots
evaluation   descendants on novel classes, beside other starts
steps        the steps of the script: plots, table, card
"""
