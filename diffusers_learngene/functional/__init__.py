# SPDX-License-Identifier: Apache-2.0
"""Pure tensor maths, one file a method: compose, apply (without building W), factorize; and resizing.

Here live functions of tensors that return tensors, where a reader looks for the paper's equations. Not here: modules,
files, and anything that knows a model.
"""
