# SPDX-License-Identifier: Apache-2.0
"""What every long run needs, whatever it trains: one loop, exact resume, trackers, plots and reports.

Here lives what knows steps, seeds, checkpoints, processes and pictures; it knows neither models nor data.
Not here: losses and tasks (`training/`), populations (`evolution/`).
"""
