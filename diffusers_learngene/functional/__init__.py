# SPDX-License-Identifier: Apache-2.0
"""Pure tensor maths, one file a method: compose, apply (without building W), factorize. No modules, no files."""
