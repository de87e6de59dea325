"""Benchmarks: `python -m bench run` measures, `python -m bench report` writes docs/benchmarks.md."""
